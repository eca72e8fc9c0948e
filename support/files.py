"""Files that are whole or not there, and what made them.

written_whole, write_json, save_folder          a file or folder of models, whole
new_array, writing_array, resumable_arrays      .npy arrays, filled in place; the last go on after a kill
manifest.json beside the arrays: read_manifest, read_prepared, is_made_by, add_to_manifest; sha256, hashes
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np

from support.readers import FileFault, MissingFile, check_keys, damaged, read_array, read_json, reading


class MissingData(MissingFile):
    """A dataset that is not prepared: its message is a guide of one screen."""


@contextmanager
def written_whole(path: Path, keep: bool = False) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` when the block ends, and is removed if the block fails,
    unless to `keep`.

    Raises OSError naming the file and the space it wants where the disk is full.
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        wanted, free = (part.stat().st_size if part.is_file() else 0), shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} takes {wanted / 1e9:,.3f} GB, but the disk is full, with {free / 1e9:,.3f} GB free: "
            "make room and run the command again; it keeps what is whole"
        ) from error
    finally:
        if not keep:
            part.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    with written_whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def save_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """write(temporary folder), whose files then replace those of `folder` one by one: a kill leaves whole
    files."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        folder.mkdir(exist_ok=True)
        for file in part.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def new_array(part: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A memory-mapped array on disk space that is its own: a full disk is an OSError now, not a crash while
    it is filled."""
    array = np.lib.format.open_memmap(part, "w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # Linux
        with open(part, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return array


@contextmanager
def writing_array(
    path: Path, shape: tuple[int, ...], dtype: str, recipe: dict, inputs: dict[str, str] | None = None
) -> Iterator[np.ndarray]:
    """A memory-mapped array to fill; afterwards it is `path`, and the manifest says what made it."""
    with written_whole(path) as part:
        array = new_array(part, shape, dtype)
        yield array
        array.flush()
    add_to_manifest(path, array, recipe, inputs)


@contextmanager
def resumable_arrays(
    shapes: dict[Path, tuple[int, ...]], dtype: str, recipe: dict, inputs: dict[str, str]
) -> Iterator[tuple[list[np.ndarray], int, Callable[[int], None]]]:
    """As `writing_array`, for arrays that take hours, filled side by side clip by clip: after a kill they go
    on.

    Yields the arrays, how many clips an earlier start has filled by the same recipe from the same inputs, and
    a function to be told how many are filled now.
    """
    first = next(iter(shapes))
    state = first.with_name(f".{first.stem}.part.json")
    asked = json.loads(
        json.dumps({"shapes": [*shapes.values()], "dtype": dtype, "recipe": recipe, "inputs": inputs})
    )
    try:
        before = read_json(state, keys={"asked": dict, "done": int}) if state.is_file() else {}
    except ValueError:  # it says how far an earlier start came, and no more: without it this one starts anew
        before = {}
    with ExitStack() as stack:
        parts = [stack.enter_context(written_whole(path, keep=True)) for path in shapes]
        done = before["done"] if before.get("asked") == asked and all(part.is_file() for part in parts) else 0
        try:
            arrays = [np.load(part, mmap_mode="r+", allow_pickle=False) for part in parts] if done else []
        except (ValueError, EOFError):  # half a file
            done, arrays = 0, []
        if not done:
            arrays = [
                new_array(part, shape, dtype) for part, shape in zip(parts, shapes.values(), strict=True)
            ]

        def filled(
            clips: int,
        ) -> None:  # the arrays are not flushed: a kill takes nothing from what is mapped
            write_json(state, {"asked": asked, "done": clips})

        filled(done)
        yield arrays, done, filled
        for path, array in zip(shapes, arrays, strict=True):
            array.flush()
            add_to_manifest(path, array, recipe, inputs)
    state.unlink()


# ---------------------------------------------------------------- what made a file


def sha256(*files: Path) -> str:
    """Of the contents of the files, one after the other."""
    sha = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
    return sha.hexdigest()


def hashes(groups: Iterable[Sequence[Path]]) -> dict[str, str]:
    """The SHA-256 of each group of files, by the name of its only file or of its first and last; a group that
    recurs once."""
    digests: dict[str, str] = {}
    for files in groups:
        name = files[0].name + (f" ... {files[-1].name}" if len(files) > 1 else "")
        if name not in digests:
            digests[name] = sha256(*files)
    return digests


def read_manifest(path: Path) -> dict | None:
    """What manifest.json in the folder of `path` says of it; None where either is missing or `path` is not
    finished."""
    manifest = path.with_name("manifest.json")
    if not (path.exists() and manifest.exists()):
        return None
    with reading(manifest, "JSON", f"delete {path.parent} and prepare it again"):
        entry = read_json(manifest).get(path.name)
        if entry is None:
            return None
        if not isinstance(entry, dict):
            raise damaged(manifest, f"{path.name}: {str(entry)[:40]}", "an object {...}")
        return check_keys(entry, f"{manifest}, {path.name}", {"recipe": dict, "inputs": dict})


def read_prepared(
    path: Path, kind: str, shape: Sequence[int | None], finite: bool = False, mend: str | None = None
) -> np.ndarray:
    """`read_array` of an array that is still what the manifest says was made: of that dtype and shape."""
    with reading(path, "a prepared array", mend):
        array, entry = read_array(path, kind, shape, finite), read_manifest(path) or {}
        dtype, sizes = str(array.dtype), [*array.shape]
        recorded = entry.get("dtype", dtype), entry.get("shape", sizes)
        if (dtype, sizes) != recorded or 0 in sizes:
            wanted = f"{recorded[0]} of shape {recorded[1]}, as manifest.json beside it says"
            raise damaged(path, f"{dtype} of shape {sizes}", wanted)
        return array


def is_made_by(path: Path, recipe: dict) -> bool:
    """Is `path` there, made by this recipe? Raises ValueError naming both values if it was made by
    another."""
    entry = read_manifest(path)
    if entry is None:
        return False
    for key, wanted in recipe.items():
        made = entry["recipe"].get(key)
        if made != json.loads(json.dumps(wanted)):
            text = f"{key} = {made!r}, but {key} = {wanted!r} is asked for"
            raise FileFault(f"{path} was made with {text}; delete it and make it anew")
    return True


def add_to_manifest(path: Path, array: np.ndarray, recipe: dict, inputs: dict[str, str] | None) -> None:
    """What manifest.json beside `path` says of it: what made it (inputs: file name -> sha256)."""
    versions = {name: version(name) for name in ("numpy", "torch", "open_clip_torch")}
    manifest = path.with_name("manifest.json")
    entries = read_json(manifest) if manifest.is_file() else {}
    made = {
        "shape": array.shape,
        "dtype": str(array.dtype),
        "recipe": recipe,
        "inputs": inputs or {},
        "versions": versions,
    }
    write_json(manifest, entries | {path.name: made})

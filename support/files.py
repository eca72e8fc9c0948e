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
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np

from support.readers import FileFault, MissingFile, check_keys, damaged, read_array, read_json, reading


class MissingData(MissingFile):
    """A dataset that is not prepared: its message is a guide of one screen."""


class DiskFull(OSError):
    """Its message names the file that was written, its size and the room on the disk."""


@contextmanager
def written_whole(path: Path, keep: bool = False) -> Iterator[Path]:
    """A temporary name to write a file or a folder to. When the block ends, it becomes `path`; of a folder,
    file by file. If the block fails, it is removed, unless to `keep`. Raises DiskFull where it is that."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.is_dir():  # of an earlier start
        shutil.rmtree(part)
    try:
        yield part
        if part.is_dir():
            path.mkdir(exist_ok=True)
            for file in part.iterdir():
                file.replace(path / file.name)
        else:
            os.replace(part, path)
    except Exception as error:
        free = shutil.disk_usage(path.parent).free
        if not _is_of_a_full_disk(error, free):
            raise
        size = sum(file.stat().st_size for file in [part, *part.rglob("*")] if file.is_file())
        sizes = f"takes {size / 1e9:,.3f} GB, but the disk is full, with {free / 1e9:,.3f} GB free"
        advice = "make room and run the command again; it keeps what is whole"
        raise DiskFull(f"{path} {sizes}: {advice}") from error
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        elif not keep:
            part.unlink(missing_ok=True)


def _is_of_a_full_disk(error: Exception, free: int) -> bool:
    """torch.save does not say so; other libraries hand on the system's text, or numpy's."""
    texts = os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "Not enough free space"
    unclear = isinstance(error, (OSError, RuntimeError)) and free < 1 << 20
    return not isinstance(error, DiskFull) and (unclear or any(text in str(error) for text in texts))


def write_json(path: Path, value: object) -> None:
    with written_whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def save_model(model, folder: Path) -> None:
    """config.json and model.safetensors of a PyTorchModelHubMixin, without its card, which says nothing."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def save_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """write(temporary folder), whose files then replace those of `folder`."""
    with written_whole(folder) as part:
        part.mkdir()
        write(part)


def new_array(part: Path, shape: tuple[int, ...], dtype: str) -> np.memmap:
    """A memory-mapped array on reserved space: a full disk is an error now, no crash while it is filled."""
    array = np.lib.format.open_memmap(part, "w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # Linux
        with open(part, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return array


@contextmanager
def writing_array(
    path: Path, shape: tuple[int, ...], dtype: str, recipe: dict, inputs: dict[str, str] | None = None
) -> Iterator[np.memmap]:
    """A memory-mapped array to fill in the block; then it is `path`, and the manifest says what made it."""
    with written_whole(path) as part:
        array = new_array(part, shape, dtype)
        yield array
        array.flush()
        array._mmap.close()  # Windows does not rename what is mapped; the array is not to be touched again
    add_to_manifest(path, array, recipe, inputs)


@contextmanager
def resumable_arrays(
    shapes: dict[Path, tuple[int, ...]], dtype: str, recipe: dict, inputs: dict[str, str]
) -> Iterator[tuple[list[np.memmap], int, Callable[[int], None]]]:
    """As `writing_array`, for arrays that take hours: after a kill they go on. Yields the arrays, how many
    clips an earlier start has filled in the same way, and a function to call with how many are filled now."""
    first = next(iter(shapes))
    state = first.with_name(f".{first.stem}.part.json")
    request = {"shapes": [*shapes.values()], "dtype": dtype, "recipe": recipe, "inputs": inputs}
    request = json.loads(json.dumps(request))  # tuples are lists there

    def filled(clips: int) -> None:  # arrays are not flushed: a kill takes nothing from what is mapped
        write_json(state, {"asked": request, "done": clips})

    with ExitStack() as stack:
        parts = {stack.enter_context(written_whole(path, keep=True)): shapes[path] for path in shapes}
        done, arrays = _earlier_arrays(state, request, parts)
        if not arrays:
            arrays = [new_array(part, shape, dtype) for part, shape in parts.items()]
        filled(done)
        yield arrays, done, filled
        for path, array in zip(shapes, arrays, strict=True):
            array.flush()
            array._mmap.close()
            add_to_manifest(path, array, recipe, inputs)
    state.unlink()


def _earlier_arrays(state: Path, request: dict, parts: Iterable[Path]) -> tuple[int, list[np.memmap]]:
    """How many clips an earlier start filled, and its arrays; none if not whole or of another request."""
    with suppress(ValueError, FileNotFoundError):
        note = read_json(state, keys={"asked": dict, "done": int})
        if note["asked"] == request:
            return note["done"], [np.lib.format.open_memmap(part, "r+") for part in parts]
    return 0, []


def sha256(*files: Path) -> str:
    """Of the contents of the files, one after the other."""
    sha = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                sha.update(block)
    return sha.hexdigest()


def hashes(groups: Iterable[Sequence[Path]]) -> dict[str, str]:
    """The SHA-256 of each group of files, by the name of its only file or of its first and last."""
    digests: dict[str, str] = {}
    for files in groups:
        name = files[0].name + (f" ... {files[-1].name}" if len(files) > 1 else "")
        if name not in digests:
            digests[name] = sha256(*files)
    return digests


def read_manifest(path: Path) -> dict | None:
    """What manifest.json beside `path` says of it; None where it says nothing, or `path` is not finished."""
    manifest = path.with_name("manifest.json")
    if not (path.exists() and manifest.exists()):
        return None
    with reading(manifest, "JSON", f"delete {path.parent} and prepare it again"):
        entries = read_json(manifest)
        if path.name not in entries:
            return None
        entry = check_keys(entries, manifest, {path.name: dict})[path.name]
        return check_keys(entry, f"{manifest}, {path.name}", {"recipe": dict, "inputs": dict})


def read_prepared(path: Path, kind: str, shape: Sequence[int | None], finite: bool = False) -> np.ndarray:
    """`read_array` of an array that is still what the manifest says was made: of that dtype and shape."""
    array = read_array(path, kind, shape, finite)
    dtype, sizes = str(array.dtype), [*array.shape]
    entry = {"dtype": dtype, "shape": sizes} | (read_manifest(path) or {})
    if dtype != entry["dtype"] or sizes != entry["shape"] or 0 in sizes:
        wanted = f"{entry['dtype']} of shape {entry['shape']}, as manifest.json beside it says"
        raise damaged(path, f"{dtype} of shape {sizes}", wanted)
    return array


def is_made_by(path: Path, recipe: dict) -> bool:
    """Is `path` there, made by this recipe? Raises FileFault naming both values if it was made by another."""
    entry = read_manifest(path)
    if entry is None:
        return False
    for key, value in json.loads(json.dumps(recipe)).items():
        recorded = entry["recipe"].get(key)
        if recorded != value:
            values = f"{key} = {recorded!r}, but {key} = {recipe[key]!r} is asked for"
            raise FileFault(f"{path} was made with {values}; delete it and make it anew")
    return True


def add_to_manifest(path: Path, array: np.ndarray, recipe: dict, inputs: dict[str, str] | None) -> None:
    """What manifest.json beside `path` says of it: what made it (inputs: file name -> sha256)."""
    manifest = path.with_name("manifest.json")
    entries = read_json(manifest) if manifest.is_file() else {}
    entries[path.name] = {
        "shape": array.shape,
        "dtype": str(array.dtype),
        "recipe": recipe,
        "inputs": inputs or {},
        "versions": {name: version(name) for name in ("numpy", "torch", "open_clip_torch")},
    }
    write_json(manifest, entries)

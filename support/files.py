"""Files that are whole or not there, and manifest.json: what made the arrays beside it."""

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
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from support.readers import FileFault, MissingFile, advising, check_keys, damaged, read_array, read_json


class MissingData(MissingFile):
    """A dataset that is not prepared: its message is a guide of one screen."""


@contextmanager
def written_whole(path: Path, keep: bool = False) -> Iterator[Path]:
    """A temporary name to write a file or a folder to. It becomes `path` when the block ends; where a
    folder is there, file by file. If the block fails, it is removed, unless to `keep`."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if part.is_dir():  # of an earlier start
        shutil.rmtree(part)
    try:
        yield part
        if part.is_dir() and path.is_dir():
            for file in part.iterdir():
                file.replace(path / file.name)
        else:
            os.replace(part, path)
    except Exception as error:
        _raise_if_full(path, part, error)
        if isinstance(error, FileNotFoundError) and str(part) in (error.filename, str(error.filename)):
            raise ValueError(f"{path}: another process writes it: wait for it, or choose another") from error
        raise
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        elif not keep:
            part.unlink(missing_ok=True)


def _raise_if_full(path: Path, part: Path, error: Exception) -> None:
    """OSError that names the file, its size and the room on the disk, in place of a library's words."""
    texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    texts += ["Not enough free space", "requested and", "fail at inline_container"]
    if any(text in str(error) for text in texts):
        sizes = [sum(f.stat().st_size for f in [p, *p.rglob("*")] if f.is_file()) for p in (part, path)]
        sizes.append(getattr(error, "size", 0))
        takes, free = max(sizes) / 1e6, shutil.disk_usage(path.parent).free / 1e6
        advice = "make room, or take another disk, and run the command again; it keeps what is whole"
        fault = f"{path}: no room on the disk: it takes {takes:,.1f} MB or more, {free:,.1f} MB are free"
        raise OSError(f"{fault}: {advice}") from error


def check_room(folder: Path, content: object) -> None:
    """Raises OSError where tensors, in dicts and lists of any depth, are larger than what the disk has free:
    libraries say of a full disk neither what they write nor how much. `written_whole` names the file."""
    size = sum(leaf.nbytes for leaf in tree_leaves(content) if isinstance(leaf, Tensor))
    if size > shutil.disk_usage(folder).free:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error.size = size
        raise error


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        _raise_if_full(path, path, error)
        raise


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_state(path: Path, state: dict) -> None:
    """A checkpoint, .pt."""
    with written_whole(path) as part:
        check_room(part.parent, state)
        torch.save(state, part)


def save_model(model, folder: Path) -> None:
    """config.json and model.safetensors of a PyTorchModelHubMixin, without its card, which says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, model.state_dict())
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def follow_umask(part: Path) -> None:
    """A file, or those of a folder, for whom the umask says: safetensors writes for the user alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in filter(Path.is_file, part.iterdir() if part.is_dir() else [part]):
        with suppress(OSError):  # some disks have no modes
            file.chmod(0o666 & ~mask)


def save_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """write(temporary folder), whose files then replace those of `folder`."""
    with written_whole(folder) as part:
        part.mkdir()
        write(part)
        follow_umask(part)


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
        with _closing([array]):
            yield array
    add_to_manifest(path, array, recipe, inputs)


@contextmanager
def _closing(arrays: Sequence[np.memmap]) -> Iterator[None]:
    """Windows neither renames nor removes what is mapped; then the arrays are not to be touched again."""
    try:
        yield
    finally:
        for array in arrays:
            array.flush()
            array._mmap.close()


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
        parts = [stack.enter_context(written_whole(path, keep=True)) for path in shapes]
        done, arrays = 0, []
        with suppress(ValueError, FileNotFoundError):  # what is not whole begins anew
            note = read_json(state, keys={"asked": dict, "done": int})
            if note["asked"] == request:
                arrays = [np.lib.format.open_memmap(part, "r+") for part in parts]
                done = note["done"]
        if not arrays:
            arrays = [new_array(part, shapes[path], dtype) for part, path in zip(parts, shapes, strict=True)]
        stack.enter_context(_closing(arrays))
        filled(done)
        yield arrays, done, filled
        for path, array in zip(shapes, arrays, strict=True):
            add_to_manifest(path, array, recipe, inputs)
    state.unlink()


def sha256(*files: Path) -> str:
    """Of the contents of the files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def hashes(groups: Iterable[Sequence[Path]]) -> dict[str, str]:
    """The SHA-256 of each group of files, by the name of its only file or of its first and last."""
    digests: dict[str, str] = {}
    for files in groups:
        name = files[0].name + (f" ... {files[-1].name}" if len(files) > 1 else "")
        digests[name] = digests.get(name) or sha256(*files)
    return digests


def read_manifest(path: Path) -> dict | None:
    """What manifest.json beside `path` says of it; None where it says nothing, or `path` is not finished."""
    manifest = path.with_name("manifest.json")
    if not (path.exists() and manifest.exists()):
        return None
    with advising(f"delete {path.parent} and prepare it again"):
        entry = read_json(manifest).get(path.name)
        keys = {"recipe": dict, "inputs": dict}
        return None if entry is None else check_keys(entry, f"{manifest}, {path.name}", keys)


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


def find_weights(name: Path | str) -> str:
    """The place of what is not here but beside the code (toy/wan, local-dir:toy/clip, toy/trained/x.npy); any
    other name as it is."""
    name = str(name)
    folder = name.removeprefix("local-dir:")
    beside = Path(__file__).parents[1] / folder
    is_beside = not Path(folder).exists() and beside.exists()
    return f"{name.removesuffix(folder)}{beside}" if is_beside else name

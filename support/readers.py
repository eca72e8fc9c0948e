"""Readers that turn any damage into one error: a file's name, what it holds, what was wanted and what to do.

A reader raises MissingFile, or the FileFault of `damaged`. Nothing that a file holds is ever executed."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

KINDS = {"f": "floating-point", "u": "whole", "iu": "whole", "fiu": "real", "b": "boolean"}
TYPES = {dict: "an object {...}", list: "a list [...]"}
Shape = Sequence[int | None] | None  # None: any, or of any size
Shapes = dict[str, Sequence[int]] | None  # of tensors by name
Type = type | tuple[type, ...]
# faults of the machine, which no file is deleted for: the texts that libraries hand on in errors of their own
_MACHINE = ("EACCES", "EPERM", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EDQUOT", "EIO")
_MACHINE_TEXTS = [os.strerror(getattr(errno, name)) for name in _MACHINE]
# torch's of the CPU, Windows among it, and of the driver
_MEMORY_TEXTS = (os.strerror(errno.ENOMEM), "DefaultCPUAllocator", "CUDA error: out of memory")
_NO_DAMAGE = (ImportError, ConnectionError, TimeoutError)

_advice = ContextVar("advice", default="delete it and make it anew")


class FileFault(ValueError):
    """A file that is there but not right; the message is complete, with the file's name and advice."""


class MissingFile(FileNotFoundError):
    """A file that is not there; the message is complete, too."""


def damaged(path: Path | str, content: object, wanted: object, advice: str | None = None) -> FileFault:
    """The one form of an error about a file. Its content may be a library's error; advice: of `reading`."""
    text = str(content).strip().split("\n")[0][:160] or type(content).__name__
    if any(words in text for words in ("pickle", "Weights only load", "mmap can only")):
        text = "a damaged file, or Python objects, which could run code"  # the library advises to load them
    return FileFault(f"{path}: found {text}, wanted {wanted}: {advice or _advice.get()}")


def lacks_memory(error: BaseException) -> bool:
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in _MEMORY_TEXTS)


def of_machine(error: BaseException) -> bool:
    """Permission, open files, memory, disk."""
    return lacks_memory(error) or any(text in str(error) for text in _MACHINE_TEXTS)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """What errors about files inside advise, where they do not say it themselves."""
    token = _advice.set(advice)
    try:
        yield
    finally:
        _advice.reset(token)


@contextmanager
def reading(path: Path | str, wanted: str = "a whole file", advice: str | None = None) -> Iterator[None]:
    """Whatever a library raises inside becomes FileFault or MissingFile about `path`.

    Such an error of a reader inside passes through, and so do faults of the machine (permission, open files,
    memory, disk). Not around the `yield` of a generator: its caller would get the advice, too."""
    with advising(advice or _advice.get()):
        try:
            if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
                raise ValueError("a pipe or a device")  # to wait at, or to read from, without an end
            yield
        except (FileFault, MissingFile, *_NO_DAMAGE):
            raise
        except Exception as error:
            if of_machine(error):
                raise
            missing = getattr(error, "filename", None) or path
            if isinstance(error, FileNotFoundError) and not os.path.exists(missing):
                raise MissingFile(f"{missing} is not there: {_advice.get()}") from error
            raise damaged(path, error, wanted) from error


def check_array(
    array: np.ndarray, path: Path | str, kind: str = "f", shape: Shape = None, finite: bool = False
) -> np.ndarray:
    """The array itself, where its dtype is of `kind` (KINDS), its shape fits and its values are finite."""
    wanted = "text" if kind == "U" else f"{KINDS[kind]} numbers"
    fits = array.dtype.kind in kind
    if shape is not None:
        sizes = [size if n is None else n for n, size in zip(shape, array.shape, strict=False)]
        fits &= len(shape) == array.ndim and sizes == [*array.shape]
        wanted += f" of shape ({', '.join(map(str, shape))})".replace("None", "any")
    if not fits:
        raise damaged(path, f"{array.dtype} of shape {array.shape}", wanted)
    if finite and not np.isfinite(array).all():
        place = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise damaged(path, f"{array[place]} at {place}", f"finite {wanted}")
    return array


def read_array(path: Path, kind: str = "f", shape: Shape = None, finite: bool = False) -> np.ndarray:
    """An .npy array, memory-mapped: a header that promises more than the file holds takes no memory."""
    with reading(path, "a whole .npy file"):
        return check_array(np.lib.format.open_memmap(path, "r"), path, kind, shape, finite)


def read_npz(path: Path, kinds: dict[str, str]) -> dict[str, np.ndarray]:
    """The named arrays (n,) of an .npz file, of the given kinds and of one length."""
    with reading(path, f"an .npz file of {', '.join(kinds)}"), np.load(path, allow_pickle=False) as file:
        arrays = {name: check_array(file[name], f"{path}[{name}]", kinds[name], (None,)) for name in kinds}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len({*lengths.values()}) > 1:
        raise damaged(path, lengths, "arrays of one length")
    return arrays


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark."""
    with reading(path, "a file of UTF-8 text"):
        return path.read_text(encoding="utf-8-sig")


def check_keys(row: dict, path: Path | str, keys: dict[str, Type]) -> dict:
    """The row itself, where each key is there and of its type. A float is finite, and may be a whole number;
    True and False are no numbers."""
    if not isinstance(row, dict):
        raise damaged(path, f"{type(row).__name__} {str(row)[:40]}", TYPES[dict])
    for key, kind in keys.items():
        value, kinds = row.get(key), kind if isinstance(kind, tuple) else (kind,)
        fits = isinstance(value, kinds) or float in kinds and isinstance(value, int)
        if key not in row or not fits or isinstance(value, bool) and bool not in kinds:
            entry = f"{key} = {str(value)[:60]!r}" if key in row else f"no {key}"
            raise damaged(path, entry, f"{key} as {' or '.join(TYPES.get(k, k.__name__) for k in kinds)}")
        if isinstance(value, float) and not np.isfinite(value):
            raise damaged(path, f"{key} = {value}", f"{key} as a finite number")
    return row


def _parse_json(text: str, path: Path | str, kind: type, keys: dict[str, Type] | None) -> dict | list:
    with reading(path, "JSON"):
        value = json.loads(text)
    if not isinstance(value, kind):
        raise damaged(path, f"{type(value).__name__} {text.strip()[:40]}", TYPES[kind])
    return check_keys(value, path, keys or {}) if kind is dict else value


def read_json(path: Path, kind: type = dict, keys: dict[str, Type] | None = None) -> dict | list:
    """A JSON file of an object (or a list), whose `keys` are there and of their types."""
    return _parse_json(read_text(path), path, kind, keys)


def read_json_lines(path: Path, keys: dict[str, Type] | None = None) -> list[dict]:
    """A JSON object a line. Lines end at \\n alone: a caption may hold U+2028."""
    lines = enumerate(read_text(path).rstrip().split("\n"), 1)
    return [_parse_json(line, f"{path}, line {number}", dict, keys) for number, line in lines]


def read_tensors(path: Path, shapes: Shapes = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: finite, and of the `shapes` by name, no more and no fewer."""
    with reading(path, "a whole .safetensors file"):
        open(path, "rb").close()  # safetensors calls each fault of opening "no such file"
        return check_tensors(load_file(path), path, shapes)


def check_tensors(tensors: dict[str, Tensor], path: Path, shapes: Shapes = None) -> dict[str, Tensor]:
    """The tensors themselves, where they are finite, and those of `shapes`."""
    for name in sorted(tensors.keys() | shapes.keys()) if shapes is not None else ():
        size = tuple(tensors[name].shape) if name in tensors else "missing"
        wanted = tuple(shapes[name]) if name in shapes else "no such tensor"
        if size != wanted:
            raise damaged(path, f"{name} {size}", wanted)
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise damaged(path, f"NaN or infinity in {name}", "finite weights")
    return tensors


def read_state(path: Path, keys: dict[str, Type]) -> dict:
    """A .pt checkpoint of plain values and tensors, memory-mapped; nothing in it is ever executed."""
    with reading(path, "a checkpoint of this program"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__}")
        return check_keys(state, path, keys)


def load_model(kind: type, folder: Path) -> nn.Module:
    """kind.from_pretrained(folder) of config.json and model.safetensors: all its weights, finite."""
    weights = folder / "model.safetensors"
    with reading(folder, f"a {kind.__name__}"):  # its sizes, names and weights
        config = read_json(folder / "config.json")
        tensors = read_tensors(weights)
        if config.get("layers", 0) > len(tensors):
            raise ValueError(f"{config['layers']} layers and {len(tensors)} weights")
        with torch.device("meta"):  # sizes that are not those of the weights take no memory
            shapes = kind(**config).state_dict()
        check_tensors(tensors, weights, {name: x.shape for name, x in shapes.items()})
        with redirect_stdout(None):  # it prints where it reads the weights from
            return kind.from_pretrained(folder, strict=True)  # the mixin lets weights be missing

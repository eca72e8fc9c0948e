"""Readers that turn any damage into one error: a file's name, what it holds, what was wanted and what to do.

    read_array, read_npz            .npy and .npz of numbers or text
    read_text, read_json, read_json_lines
    read_tensors, read_state        .safetensors, and .pt checkpoints of plain values
    load_model                      a model of config.json and model.safetensors

A reader raises FileNotFoundError, or a ValueError of the form of `damaged`. Nothing that a file holds is ever
executed.
"""

import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ANEW = "delete it and make it anew"
KINDS = {"f": "floating-point", "u": "whole", "iu": "whole", "fiu": "real", "b": "true-or-false", "U": "text"}


def damaged(path: Path, found: object, wanted: str, mend: str) -> ValueError:
    """The one form of an error about a file. A library's message is cut to a line; numpy's advice to unpickle
    is left out."""
    text = str(found).strip().split("\n")[0][:160]
    if "pickle" in text:
        text = "Python objects, which could run code, or no such file"
    return ValueError(f"{path}: found {text or type(found).__name__}, wanted {wanted}: {mend}")


def check_array(
    array: np.ndarray,
    path: Path,
    kind: str = "f",
    shape: Sequence[int | None] | None = None,
    finite: bool = False,
    mend: str = ANEW,
) -> np.ndarray:
    """The array itself, where its dtype is of `kind` (KINDS), its shape fits (None: any size) and its values
    are finite."""
    wanted = f"{KINDS[kind]} numbers" if kind != "U" else "text"
    if shape is not None:
        wanted += " of shape (" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
    fits = (
        shape is None
        or len(shape) == array.ndim
        and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    )
    if array.dtype.kind not in kind or not fits:
        raise damaged(path, f"{array.dtype} of shape {array.shape}", wanted, mend)
    if finite and not np.isfinite(array).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise damaged(path, f"{array[place]} at {place}", f"finite {wanted}", mend)
    return array


def read_array(
    path: Path,
    kind: str = "f",
    shape: Sequence[int | None] | None = None,
    finite: bool = False,
    mend: str = ANEW,
) -> np.ndarray:
    """An .npy array, memory-mapped and read-only: a header that promises more than the file holds takes no
    memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: {mend}") from error
    except Exception as error:  # whatever a damaged file makes numpy say
        raise damaged(path, error, "a whole .npy file", mend) from error
    if not isinstance(array, np.ndarray):
        raise damaged(path, "several arrays", "one .npy array", mend)
    return check_array(array, path, kind, shape, finite, mend)


def read_npz(path: Path, kinds: dict[str, str], mend: str = ANEW) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file, of the given kinds and of one length."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in kinds}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: {mend}") from error
    except Exception as error:  # likewise
        raise damaged(path, error, f"an .npz file of {', '.join(kinds)}", mend) from error
    for name, array in arrays.items():
        check_array(array, Path(f"{path}[{name}]"), kinds[name], mend=mend)
    if len({len(np.atleast_1d(array)) for array in arrays.values()}) > 1:
        raise damaged(
            path, {name: array.shape for name, array in arrays.items()}, "arrays of one length", mend
        )
    return arrays


def read_text(path: Path, mend: str = ANEW) -> str:
    """UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: {mend}") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise damaged(path, error, "a file of UTF-8 text", mend) from error


def _parse_json(text: str, path: Path | str, wanted: type | tuple[type, ...], mend: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error, "JSON", mend) from error
    if not isinstance(value, wanted):
        names = {dict: "an object {...}", list: "a list [...]"}
        forms = [
            names.get(kind, kind.__name__) for kind in (wanted if isinstance(wanted, tuple) else (wanted,))
        ]
        raise damaged(path, f"{type(value).__name__} {text.strip()[:40]}", " or ".join(forms), mend)
    return value


def check_keys(
    row: dict, path: Path | str, keys: dict[str, type | tuple[type, ...]], mend: str = ANEW
) -> dict:
    """The row itself, where each key is there and of its type; a float may be a whole number, but not NaN or
    infinite."""
    for key, kind in keys.items():
        value, kinds = row.get(key), (kind if isinstance(kind, tuple) else (kind,))
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds) and not (
            isinstance(value, bool) and bool not in kinds
        )
        if key not in row or not fits:
            found = f"{key} = {str(value)[:60]!r}" if key in row else f"no {key}"
            raise damaged(path, found, f"{key} as {' or '.join(k.__name__ for k in kinds)}", mend)
        if isinstance(value, float) and not np.isfinite(value):
            raise damaged(path, f"{key} = {value}", f"{key} as a finite number", mend)
    return row


def read_json(
    path: Path, wanted: type | tuple[type, ...] = dict, keys: dict | None = None, mend: str = ANEW
) -> dict | list:
    """A JSON file of an object (or a list), whose `keys` are there and of their types."""
    value = _parse_json(read_text(path, mend), path, wanted, mend)
    return check_keys(value, path, keys or {}, mend) if isinstance(value, dict) else value


def read_json_lines(path: Path, keys: dict | None = None, mend: str = ANEW) -> list[dict]:
    """A JSON object a line. Lines end at \\n alone (a caption may hold U+2028); blank lines at the end are no
    lines."""
    rows = []
    for number, line in enumerate(read_text(path, mend).rstrip().split("\n"), 1):
        where = f"{path}, line {number}"
        rows.append(check_keys(_parse_json(line, where, dict, mend), where, keys or {}, mend))
    return rows


def read_tensors(
    path: Path, shapes: dict[str, Sequence[int]] | None = None, mend: str = ANEW
) -> dict[str, Tensor]:
    """The tensors of a .safetensors file: finite, and of the `shapes` by name, no more and no fewer."""
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: {mend}") from error
    except Exception as error:  # SafetensorError, and what a damaged header makes it say
        raise damaged(path, error, "a whole .safetensors file", mend) from error
    return check_tensors(tensors, path, shapes, mend)


def check_tensors(
    tensors: dict[str, Tensor], path: Path, shapes: dict[str, Sequence[int]] | None = None, mend: str = ANEW
) -> dict:
    """The tensors themselves, where they are finite, and those of `shapes`."""
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if shapes is not None:
        wanted = {name: tuple(shape) for name, shape in shapes.items()}
        for name in sorted(wanted.keys() | found.keys()):
            if found.get(name) != wanted.get(name):
                raise damaged(
                    path,
                    f"{name} {found.get(name, 'missing')}",
                    f"{wanted.get(name, 'no such tensor')}",
                    mend,
                )
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise damaged(path, f"NaN or infinity in {name}", "finite weights", mend)
    return tensors


def read_state(path: Path, keys: dict, mend: str = ANEW) -> dict:
    """A .pt checkpoint of plain values and tensors, memory-mapped; nothing in it is ever executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there: {mend}") from error
    except Exception as error:  # UnpicklingError and many others
        raise damaged(
            path, "a damaged file, or one that would run code", "a checkpoint of this program", mend
        ) from error
    if not isinstance(state, dict):
        raise damaged(path, type(state).__name__, "a checkpoint of this program", mend)
    return check_keys(state, path, keys, mend)


def load_model(kind: type, folder: Path, mend: str = ANEW) -> nn.Module:
    """kind.from_pretrained(folder) of a model with config.json and model.safetensors: its own weights, all of
    them, finite."""
    read_json(folder / "config.json", mend=mend)
    try:
        with redirect_stdout(None):  # it prints where it reads the weights from
            model = kind.from_pretrained(folder)
    except Exception as error:  # sizes of another type, missing or unexpected weights, a damaged file
        raise damaged(folder, error, f"a {kind.__name__}", mend) from error
    check_tensors(model.state_dict(), folder / "model.safetensors", mend=mend)
    return model

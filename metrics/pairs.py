"""Which videos are compared, and what is seen of each: folders -> pairs -> frames."""

import math
import unicodedata
from collections.abc import Callable, Collection
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from support.readers import damaged
from support.videos import SUFFIXES, Video, read_video, resized, uniform_frames

PADDING = 2  # pixels of torchvision's make_grid around and between its pictures
BLACK = 24  # of 255: a compressed border is not quite black


# ---------------------------------------------------------------- which videos


class Source(NamedTuple):
    path: Path
    half: str = ""  # left or right, of a video that shows two side by side


class Pair(NamedTuple):
    name: str
    pred: Source | None  # None: it is not there
    gt: Source | None
    other: Source | None  # another stimulus, the control


def find_pairs(
    folder: Path, split: bool = False, skip_bad: bool = False, out: Path | None = None
) -> dict[str, list[Pair]]:
    """Of each METHOD the pairs of folder/gt/NAME.* and folder/METHOD/NAME.*, in the same order; results in
    folder/metrics or `out` are passed over. Raises FileNotFoundError, ValueError."""
    sets, strange = _videos_in(folder, {folder / "metrics", out})
    also = f"; no video: {_some(strange)}" if strange else ""
    if not sets.keys() - {"gt"} or not split and "gt" not in sets:
        wanted = (
            "METHOD/NAME.*, side by side" if split else "gt/NAME.* and METHOD/NAME.* (side by side: --split)"
        )
        found = f"{folder} has videos in {', '.join(sets) or 'no folder'}{also}"
        raise FileNotFoundError(f"{found}; wanted {wanted}, of {' '.join(SUFFIXES)}")
    gt = {} if split else sets.pop("gt")
    every = set(gt) or {name for files in sets.values() for name in files}
    names = sorted(every, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
    for method, files in sets.items():
        alone, here = files.keys() ^ every, folder / method
        if not files.keys() & every:
            found = f"{folder / 'gt'} has {_some(names)}; {here} has {_some(files)}{also}"
            raise ValueError(f"no pair matches by name: {found}")
        if alone and not skip_bad:
            found = f"{folder}: {len(names)} stimuli, {len(files)} videos in {method}; without a partner: "
            mend = "--skip-bad leaves them out, as missing values"
            raise ValueError(f"{found}{_some(alone)}{also}; {mend}")
    return {method: _pairs_of(names, files if split else gt, files, split) for method, files in sets.items()}


def _pairs_of(names: list[str], gt: dict[str, Path], pred: dict[str, Path], split: bool) -> list[Pair]:
    left, right = ("left", "right") if split else ("", "")
    stimuli = [Source(gt[name], left) if name in gt else None for name in names]
    predictions = [Source(pred[name], right) if name in pred else None for name in names]
    half = len(names) // 2
    others = stimuli[half:] + stimuli[:half] if half else [None]  # each stimulus with another name, once each
    return [Pair(*of) for of in zip(names, predictions, stimuli, others, strict=True)]


def _videos_in(folder: Path, results: set[Path | None]) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """{subfolder: {name: video}}, and what is no video. A name may be composed (NFC) or not: é is é. Names
    that begin with a dot are passed over."""
    sets: dict[str, dict[str, Path]] = {}
    strange = []
    for path in sorted(folder.glob("*/*")):
        if path.parent in results or path.name.startswith(".") or path.parent.name.startswith("."):
            continue
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            strange.append(f"{path.parent.name}/{path.name}")
            continue
        name = unicodedata.normalize("NFC", path.stem)
        other = sets.setdefault(path.parent.name, {}).setdefault(name, path)
        if other != path:
            raise ValueError(f"{other} and {path.name}: two videos of one name, wanted one")
    return sets, strange


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (" ..." if len(names) > 8 else "")


def other_scenes(far: np.ndarray) -> np.ndarray:
    """(clips,) for each clip another, each once: the test set turned round by half of it, or by as near to
    that as leaves all of them far apart. far (clips, clips) bool: is the column's clip of another scene than
    the row's? Raises ValueError where the clips are too few for that."""
    n = len(far)
    for shift in sorted(range(1, n), key=lambda shift: abs(2 * shift - n)):
        order = (np.arange(n) + shift) % n
        if far[np.arange(n), order].all():
            return order
    raise ValueError(
        f"--shuffle: {n} clips cannot be paired with other scenes, of other segments or more than 15 away"
    )


# ---------------------------------------------------------------- one video


class Watched:
    """A video's frames uint8 (F, H, W, 3), and what was made of them: each judge sees them once."""

    def __init__(self, frames: np.ndarray, fps: float):
        self.frames, self.fps, self.made = frames, fps, {}

    def __len__(self) -> int:
        return len(self.frames)

    def uniform(self, n: int) -> tuple[int, ...]:
        return tuple(uniform_frames(len(self), n).tolist())

    def seen(
        self,
        picks: tuple[int, ...] | None = None,
        size: tuple[int, int] | None = None,
        judge: Callable | None = None,
    ) -> np.ndarray:
        """The frames picked (all) at a size (their own), or what a judge makes of them."""
        picks, size = picks or tuple(range(len(self))), size or self.frames.shape[1:3]
        if not judge and size == self.frames.shape[1:3]:
            return self.frames[list(picks)]
        key = picks, size, judge
        if key not in self.made:
            frames = self.frames[list(picks)]
            self.made[key] = judge(self.seen(picks, size)) if judge else resized(frames, size)
        return self.made[key]


def watch(source: Source, seconds: float) -> Watched:
    """Read a video, or the half of one. Raises ValueError, naming the file. An .npy array has no times: it
    lasts `seconds`."""
    if not source.half:
        return Watched(*read_video(source.path, seconds))
    frames, fps = _read(source.path, seconds, source.path.stat().st_mtime_ns)
    return Watched(halves(frames, source.path)[source.half], fps)


@lru_cache(2)  # both halves are asked for, one after the other
def _read(path: Path, seconds: float, changed: int) -> Video:
    return read_video(path, seconds)


def halves(frames: np.ndarray, path: Path) -> dict[str, np.ndarray]:
    """The left and right half of frames (F, H, W, 3), without the black border around and between them that
    make_grid of torchvision puts there, as in the field's GIFs (518 x 260 for 2 x 256 x 256)."""
    p, (_, H, W, _) = PADDING, frames.shape
    if W < 2:
        raise damaged(path, f"frames of {H} x {W}", "two videos side by side", "leave --split out")
    w, odd = divmod(W - 3 * p, 2)
    if not odd and w > 0 and H > 2 * p:
        border = np.ones((H, W), bool)
        border[p:-p, p : p + w] = border[p:-p, -p - w : -p] = False
        if frames[:, border].max() <= BLACK:
            _say_once(f"--split: a black border of {p} pixels, as of make_grid, is cut off")
            return {"left": frames[:, p:-p, p : p + w], "right": frames[:, p:-p, -p - w : -p]}
    return {"left": frames[:, :, : W // 2], "right": frames[:, :, -(W // 2) :]}


@cache
def _say_once(text: str) -> None:
    tqdm.write(text)

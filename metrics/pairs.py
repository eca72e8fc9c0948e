"""Which videos are compared, and which frames of each are looked at: folders -> pairs -> frames."""

import math
import unicodedata
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.readers import damaged
from support.videos import SUFFIXES, frames_of, read_all_clips, read_video, resized, uniform_frames

PADDING = 2  # pixels of torchvision's make_grid around and between its pictures
BLACK = 24  # of 255: a compressed border is not quite black


class Source(NamedTuple):
    path: Path
    half: str = ""  # left or right, of a video that shows two side by side
    clip: int | None = None  # its number in an array of all clips


class Pair(NamedTuple):
    name: str
    pred: Source | None  # None: it is missing
    gt: Source | None
    control: Source | None  # another stimulus
    frames: int | None = None  # of the coarsest video of this clip in the table; None: each has its own step


def find_pairs(
    folder: Path, split: bool = False, skip_bad: bool = False, out: Path | None = None
) -> dict[str, list[Pair]]:
    """{METHOD: pairs of folder/gt/NAME.* and folder/METHOD/NAME.*}, in the same order; clip k of an array
    METHOD.npy or METHOD.pt is that of the k-th name. Results in folder/metrics or `out` are passed over.
    Raises FileNotFoundError, ValueError."""
    sets, arrays = _videos_in(folder, {folder / "metrics", out})
    for method, file in arrays.items():
        if method == "gt" or split:
            sets[method] = {f"{k:04d}": Source(file, "", k) for k in range(len(read_all_clips(file)))}
    methods = [method for method in {**sets, **arrays} if sets.get(method, arrays)]  # with videos
    if not {*methods} - {"gt"} or not split and "gt" not in methods:
        names = "METHOD/NAME.*, side by side" if split else "gt/NAME.* and METHOD/NAME.* (or --split)"
        contents = f"{folder} has videos in {', '.join(methods) or 'no folder'}"
        raise FileNotFoundError(f"{contents}; wanted {names}, of {' '.join(SUFFIXES)}")
    gt = {} if split else sets.pop("gt")
    names = gt or set().union(*sets.values())
    names = sorted(names, key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
    left, right = ("left", "right") if split else ("", "")
    half = len(names) // 2
    for method, file in arrays.items():
        if not split and method != "gt":
            if (n := len(read_all_clips(file))) != len(names):
                raise damaged(file, f"{n} clips", f"{len(names)}, those of gt by their names", "make it anew")
            sets[method] = {name: Source(file, "", k) for k, name in enumerate(names)}
    pairs = {}
    for method, files in sets.items():
        unpaired = files.keys() ^ {*names}
        if not files.keys() & {*names}:
            contents = f"{folder / 'gt'} has {_first(names)}; {folder / method} has {_first(files) or 'none'}"
            raise ValueError(f"no pair matches by name: {contents}")
        if unpaired and not skip_bad:
            counted = f"{folder}: {len(names)} stimuli, {len(files)} videos in {method}"
            advice = "--skip-bad leaves them out, as missing values"
            raise ValueError(f"{counted}; without a partner: {_first(unpaired)}; {advice}")
        stimuli = _sources(names, files if split else gt, left)
        controls = stimuli[half:] + stimuli[:half] if half else [None]  # of another name, each once
        pairs[method] = list(map(Pair, names, _sources(names, files, right), stimuli, controls))
    return pairs


def _sources(names: list[str], files: dict[str, Source], half: str) -> list[Source | None]:
    return [files[name]._replace(half=half) if name in files else None for name in names]


def _videos_in(
    folder: Path, results: set[Path | None]
) -> tuple[dict[str, dict[str, Source]], dict[str, Path]]:
    """{subfolder: {name: video}}, {name: array of all clips}; é composed (NFC) or not is é. No hidden files,
    and nothing that is no video."""
    sets: dict[str, dict[str, Source]] = {}
    arrays: dict[str, Path] = {}
    for method in sorted(folder.glob("[!.]*")):
        if method in results:
            continue
        if not method.is_dir():
            if method.suffix.lower() in (".npy", ".pt"):
                if arrays.setdefault(method.stem, method) != method or method.stem in sets:
                    raise ValueError(f"{method}: another METHOD has its name, wanted one")
            continue
        videos = sets[method.name] = {}
        for path in sorted(method.glob("[!.]*")):
            sequence = path.is_dir() and frames_of(path)
            if not sequence and (path.suffix.lower() not in SUFFIXES or not path.is_file()):
                continue
            name = unicodedata.normalize("NFC", path.name if sequence else path.stem)
            first = videos.setdefault(name, Source(path)).path
            if first != path:
                raise ValueError(f"{first} and {path.name}: two videos of one name, wanted one")
    return sets, arrays


def _first(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:8]) + (" ..." if len(names) > 8 else "")


def other_scenes(far: np.ndarray) -> np.ndarray:
    """(clips,) for each clip another, each once: the test set turned round by about half, so that all are far
    apart. far (clips, clips) bool: is the column's clip of another scene than the row's? Raises ValueError
    where the clips are too few for that."""
    n = len(far)
    clips = np.arange(n)
    for shift in sorted(range(1, n), key=lambda shift: abs(2 * shift - n)):
        order = (clips + shift) % n
        if far[clips, order].all():
            return order
    wanted = "other scenes, of other segments or more than 15 away"
    raise ValueError(f"--shuffle: {n} clips cannot be paired with {wanted}")


class Watched:
    """A video's frames uint8 (F, H, W, 3), and what the judges make of them: each sees them once."""

    def __init__(self, frames: np.ndarray, fps: float):
        self.frames, self.fps = frames, fps
        self.results: dict[tuple, np.ndarray] = {}
        self.thinner: dict[int, Watched] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def uniform(self, n: int) -> list[int]:
        return uniform_frames(len(self), n).tolist()

    def thinned(self, n: int | None) -> "Watched":
        """The same video with n frames, uniform in time, where it has more."""
        if not n or n >= len(self):
            return self
        if n not in self.thinner:
            self.thinner[n] = Watched(self.frames[self.uniform(n)], self.fps * n / len(self))
        return self.thinner[n]

    def seen(
        self, picks: Sequence[int] | None = None, size: tuple | None = None, judge: Callable | None = None
    ):
        """The frames picked (all) at a size (H, W; their own), or what a judge makes of them: an array."""
        picks, size = tuple(picks or range(len(self))), size or self.frames.shape[1:3]
        frames = self.frames[list(picks)]
        if not judge and size == frames.shape[1:3]:
            return frames
        key = picks, size, judge
        if key not in self.results:
            self.results[key] = judge(self.seen(picks, size)) if judge else resized(frames, size)
        return self.results[key]


def watch(source: Source, seconds: float) -> Watched:
    """A video, or the half of one. Without times it lasts `seconds`. Raises ValueError, naming the file."""
    frames, fps = read_video(source.path, seconds, source.clip)
    return Watched(_half(frames, source) if source.half else frames, fps)


def _half(frames: np.ndarray, source: Source) -> np.ndarray:
    """The left or right half of frames (F, H, W, 3), without the black border around and between them that
    make_grid of torchvision puts there, as in the field's GIFs (518 x 260 for 2 x 256 x 256)."""
    _, H, W, _ = frames.shape
    left, right, p = slice(W // 2), slice(W - W // 2, W), PADDING
    w, odd = divmod(W - 3 * p, 2)
    if not odd and w > 0 and H > 2 * p:
        border = np.ones((H, W), bool)
        border[p:-p, p : p + w] = border[p:-p, -p - w : -p] = False
        if frames[:, border].max() <= BLACK:
            frames, left, right = frames[:, p:-p], slice(p, p + w), slice(-p - w, -p)
    return frames[:, :, left if source.half == "left" else right]

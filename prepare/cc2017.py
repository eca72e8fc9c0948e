"""cc2017 as its authors publish it (Purdue) and as NeuroClips publishes it, preprocessed.

Subject 3 has 85 runs in place of 86: one showing of a test segment is missing, and masked.
"""

import codecs
import warnings
import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from prepare import facts
from prepare.cifti import mmp_areas, read_cifti
from prepare.facts import CORTEX
from prepare.release import Release, only, visible
from support.readers import advising, check_array, damaged, reading

AFTER = 4  # volumes that a run goes on for when the film has ended
DOWNLOAD = "download it again"


class CC2017(Release):
    """Segments of 8 minutes. Raises ValueError for a delay that leaves the runs."""

    complete = facts.SIZES["cc2017"]

    def __post_init__(self):
        if not 0 <= (self.delay or 0) <= AFTER:
            raise ValueError(f"--delay {self.delay}: wanted 0 to {AFTER} volumes of 2 s, which follow a film")
        self.splits = facts.cc2017_splits(self.train_segments, self.test_segments)

    def window(self, segment: str) -> tuple[int, int]:
        return 0, facts.SEGMENT_VOLUMES


class PurdueFilms(CC2017):
    """The films of the Purdue release: stimuli/seg1.mp4 ..., 30 frames a second, below a folder."""

    film = facts.CC2017_FPS, 2 * facts.SEGMENT_VOLUMES, 5

    def find_films(self, folder: Path) -> None:
        self.films = below(folder, "stimuli") or folder / "stimuli"

    def stimulus(self, segment: str) -> list[Path]:
        return [self.films / f"{segment}.mp4"]

    read_clips, check = Release.read_clips, Release.check  # and not those of NeuroClips


def below(folder: Path, name: str) -> Path | None:
    """The folder of this name: in `folder`, or up to three folders further down, as archives unpack."""
    places = visible(folder, *("*/" * depth + name for depth in range(4)))
    folders = {place.resolve(): place for place in places if place.is_dir()}
    return next(iter(only([*folders.values()], f"the release's {name}")), None)


class PurdueRelease(PurdueFilms):
    """Wen et al. 2018 (doi 10.4231/R7SF2TCW): CIFTI recordings of one subject, and mp4 films.

        subject1/fmri/seg1/cifti/seg1_1_Atlas.dtseries.nii   seg1-18, 2 showings each; test1-5, 10 showings
        stimuli/seg1.mp4                                     30 frames a second

    raw: the folder of these two, or the one in which the archives were unpacked. delay: in volumes of 2 s.
    Raises FileNotFoundError where there are no recordings of the subject.
    """

    def __post_init__(self):
        super().__post_init__()
        self.delay = facts.CC2017_DELAY if self.delay is None else self.delay
        self.runs = below(self.raw, f"subject{self.subject}/fmri")
        if not self.runs:
            text = f"{self.raw} has no subject{self.subject}/fmri below it, the recordings of the subject"
            raise FileNotFoundError(f"{text}: download it, or unpack bundle.zip where it lies")
        self.find_films(self.raw)

    def run_file(self, segment: str, repeat: int) -> Path:
        return self.runs / segment / "cifti" / f"{segment}_{repeat + 1}_Atlas.dtseries.nii"

    def files(self, segment: str) -> list[Path]:
        return visible(self.runs / segment / "cifti", f"{segment}_*_Atlas.dtseries.nii")

    def recording(self, subject: int) -> list[Path]:
        runs = below(self.raw, f"subject{subject}/fmri")
        return visible(runs / "seg1" / "cifti", "seg1_1_Atlas.dtseries.nii") if runs else []

    def repeats(self, segment: str) -> int:
        return 10 if segment.startswith("test") else 2

    def window(self, segment: str) -> tuple[int, int]:
        trimmed = 2 if segment in ("test2", "test3", "test4", "test5") else 1  # as published, before the film
        return trimmed + self.delay, facts.SEGMENT_VOLUMES

    @property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        """The cortical grayordinates and their areas."""
        return np.arange(CORTEX), mmp_areas()[:CORTEX]

    def load_run(self, segment: str, repeat: int) -> np.ndarray | None:
        path = self.run_file(segment, repeat)
        if not path.is_file():
            warnings.warn(f"{path} is not there; this showing of {segment} is masked", stacklevel=2)
            return None
        start, length = self.window(segment)
        volumes = start - self.delay + length + AFTER  # 245 or 246
        return read_cifti(path, slice(CORTEX), facts.CC2017_TR, volumes)


class NeuroClipsRelease(CC2017):
    """Hugging Face gongzx/cc2017_dataset: selected and preprocessed recordings.

        subj01_train_fmri.pt (4320, 2, N)   subj01_test_fmri.pt (1200, 10, N)     clips x showings x voxels
        GT_train_3fps.pt (4320, 6, 3, 224, 224)   GT_train_caption.pt (4320,)     and the same of the test set

    The areas of its voxels are not published, nor whether its recordings are delayed: NeuroClips' MATLAB code
    keeps volumes 2 to 241 without a delay. delay: in volumes of 2 s (none: as they are); the last volume of a
    segment stands for those after it. Raises ValueError for other sizes, a value that is not finite and a
    file that needs pickle, FileNotFoundError for a missing file.
    """

    preprocessed = True
    name = "NeuroClipsRelease"

    def __post_init__(self):
        super().__post_init__()
        form = None, None, None  # clips, showings, voxels
        self._fmri = {split: self._load(split, self._recordings(split), "f", form) for split in self.splits}

    def _recordings(self, split: str, subject: int | None = None) -> Path:
        return self.raw / f"subj{subject or self.subject:02d}_{split}_fmri.pt"

    def _load(self, split: str, file: Path, kind: str, shape: tuple) -> np.ndarray:
        """The array of the segments: the whole file, or the first clips of the complete release."""
        with reading(file, "a tensor of numbers", DOWNLOAD):
            value = check_array(load_pt(file, torch.Tensor).numpy(), file, kind, shape)
        segments = len(self.splits[split])
        n = facts.SEGMENT_VOLUMES * segments
        if len(value) not in (n, prod(self.complete[split])):
            advice = "download it again, or give --train-segments, --test-segments"
            raise damaged(file, f"{len(value)} clips", f"{n} ({segments} segments)", advice)
        return value[:n]

    def _place(self, segment: str) -> tuple[str, slice]:
        """Split of a segment, and where its clips are in the split's files."""
        split = "test" if segment.startswith("test") else "train"
        first = self.splits[split].index(segment) * facts.SEGMENT_VOLUMES
        return split, slice(first, first + facts.SEGMENT_VOLUMES)

    def repeats(self, segment: str) -> int:
        return self._fmri[self._place(segment)[0]].shape[1]

    @property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        N = self._fmri["train"].shape[2]
        return np.arange(N), np.full(N, "unknown")

    def load_run(self, segment: str, repeat: int) -> np.ndarray:
        split, clips = self._place(segment)
        run = self._fmri[split][clips, repeat]  # (240, N)
        with advising(DOWNLOAD):
            place = f"{self._recordings(split)}[{clips.start}:{clips.stop}, {repeat}]"
            check_array(run, place, finite=True)
        return run[np.minimum(np.arange(len(run)) + (self.delay or 0), len(run) - 1)]

    def files(self, segment: str) -> list[Path]:
        return [self._recordings(self._place(segment)[0])]

    def recording(self, subject: int) -> list[Path]:
        return visible(self.raw, self._recordings("train", subject).name)

    @property
    def captions(self) -> dict[str, Path]:
        return {split: self.raw / f"GT_{split}_caption.pt" for split in self.splits}

    def stimulus(self, segment: str) -> list[Path]:
        return [self.raw / f"GT_{self._place(segment)[0]}_3fps.pt"]

    def _frames(self, split: str) -> np.ndarray:
        return self._load(split, self.raw / f"GT_{split}_3fps.pt", "fiu", (None, 6, 3, None, None))

    def check(self) -> None:
        for split in self.splits:
            self._frames(split)

    def read_clips(self, segment: str) -> Iterator[np.ndarray]:
        split, clips = self._place(segment)
        for frames in self._frames(split)[clips]:
            scale = 255 if frames.dtype.kind == "f" else 1
            low, high = float(frames.min()), float(frames.max())
            if not (low >= 0 and high * scale <= 255):
                form = "[0, 1], or whole numbers up to 255"
                raise damaged(self.stimulus(segment)[0], f"pixels in [{low:g}, {high:g}]", form, DOWNLOAD)
            pixels = (frames.astype(np.float32) * scale).round().astype(np.uint8)
            yield pixels.transpose(0, 2, 3, 1)


class NeuroClipsWithFilms(PurdueFilms, NeuroClipsRelease):
    """The recordings of NeuroClips and the films of Purdue: all that stage 2 and Table 1 need."""

    def __init__(self, raw: Path, films: Path, *options, **more):
        super().__init__(raw, *options, **more)
        self.find_films(films)


def load_pt(path: Path, kind: type = object) -> torch.Tensor | list:
    """A tensor (memory-mapped), or a list of strings; nothing in it is ever executed. ValueError where it is
    not of this kind."""
    # The published captions are a NumPy array of fixed-width strings; these names rebuild one, nothing else.
    rebuild = np.empty(0).__reduce__()[0]
    names = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    names += [np.ndarray, np.dtype, np.dtypes.StrDType, codecs.encode]
    with reading(path, "a tensor, or a list of strings", DOWNLOAD), torch.serialization.safe_globals(names):
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, kind):
        raise damaged(path, type(value).__name__, f"a {kind.__name__}", DOWNLOAD)
    return value

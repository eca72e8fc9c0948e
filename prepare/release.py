"""What a release of recordings and films must offer, so that prepare/ can make data/<name>/ of it.

For a dataset of your own: write a class as in extras/own_dataset.py, and a row of DATASETS in facts.py. A
segment is a piece of film that was shown as a whole; its name says whether it is for training or for testing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from support.videos import check_film, read_clips


@dataclass
class Release:
    """Recordings and films of a subject, read a run at a time. By default a clip lasts 2 s, and is a volume.

    delay: of the haemodynamic response, in volumes; None: recordings are taken as they are
    train_segments, test_segments: only so many, from the first on
    splits: {"train": names of the segments, "test": ...}
    volumes: how many a clip has for itself; TR: seconds a volume
    preprocessed: do runs come trimmed, delayed and standardised?
    voxels: (N,) int64 index of each voxel in the source, (N,) str name of its area
    complete: of each split the segments of the complete release and the clips of each; none: not known
    film: what a film must be: frames a second, seconds, and how many seconds longer it may last
    """

    raw: Path
    subject: int
    delay: int | None = None
    train_segments: int = 18
    test_segments: int = 5

    volumes = 1
    TR = 2.0
    preprocessed = False
    complete = {}
    film = None

    def __post_init__(self):
        """Finds the files: FileNotFoundError for what is missing, ValueError for what does not fit."""

    @property
    def segments(self) -> list[str]:
        """Those of training, then those of testing."""
        return [*chain(*self.splits.values())]

    @property
    def name(self) -> str:
        """Of the recordings, in the manifest."""
        return type(self).__name__

    @property
    def recipe(self) -> dict:
        """What makes the recordings, for the manifest."""
        return {"release": self.name, "subject": self.subject, "delay": self.delay}

    # ------------------------------------------------------------ recordings

    def repeats(self, segment: str) -> int:
        """How often the segment was shown."""
        raise NotImplementedError

    def window(self, segment: str) -> tuple[int, int]:
        """First volume of the film in a run, the haemodynamic delay included, and the number of volumes."""
        raise NotImplementedError

    def clips_of(self, segment: str) -> int:
        """How many clips the segment has."""
        return self.window(segment)[1] // self.volumes

    def load_run(self, segment: str, repeat: int) -> np.ndarray | None:
        """One showing, counted from 0: float32 (volumes, N), or None where it was not recorded."""
        raise NotImplementedError

    def files(self, segment: str) -> list[Path]:
        """What is read of the segment's recordings."""
        raise NotImplementedError

    def run_file(self, segment: str, repeat: int) -> Path:
        """The file of one showing, for messages."""
        files = self.files(segment)
        return files[min(repeat, len(files) - 1)] if files else self.raw

    def recording(self, subject: int) -> list[Path]:
        """The files of any subject's first run; none where the release lacks it."""
        return []

    # ------------------------------------------------------------ stimuli

    @property
    def captions(self) -> dict[str, Path]:
        """The file of captions of each split."""
        return dict.fromkeys(self.splits, self.raw / "captions.jsonl")

    def stimulus(self, segment: str) -> list[Path]:
        """The segment's film, or the films of its clips."""
        raise NotImplementedError

    def video(self, segment: str, clip: int) -> tuple[Path, float]:
        """Where a clip is: its file, and at how many seconds it begins."""
        return self.stimulus(segment)[0], 2.0 * clip

    def read_clips(self, segment: str) -> Iterator[np.ndarray]:
        """The clips of a segment in order, uint8 (frames, H, W, 3) each."""
        return read_clips(self.stimulus(segment)[0], self.clips_of(segment))

    def check(self) -> None:
        """Raises ValueError where films or recordings are not as they should be: before hours of work."""
        for segment in self.segments:
            films = self.stimulus(segment) or [self.raw]
            recordings = self.files(segment) or [self.run_file(segment, 0)]
            for role, file in (("film", films[0]), ("recording", recordings[0])):
                if not file.is_file():
                    advice = "download it, or ask for fewer segments"
                    raise FileNotFoundError(f"{file}: no {role} of {segment}: {advice}")
            if self.film:
                check_film(films[0], *self.film)


def visible(folder: Path, *patterns: str) -> list[Path]:
    """The files and folders that match a pattern, sorted. What a system hides is passed over: names that
    begin with a dot, and the folder __MACOSX of archives packed on a Mac."""
    paths = {path: path.relative_to(folder).parts for path in chain(*map(folder.glob, patterns))}
    return sorted(p for p, names in paths.items() if not any(n[0] == "." or n == "__MACOSX" for n in names))


def only(paths: list[Path], role: str) -> list[Path]:
    """The paths themselves: one, or none. Raises ValueError, naming both, where two would do."""
    if len(paths) > 1:
        pair = f"{paths[0]} and {paths[1]}"
        raise ValueError(f"{pair} both look like {role}: move the wrong one out of the folder")
    return paths

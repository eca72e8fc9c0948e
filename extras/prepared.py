"""The prepared files of a subject as extras/check.py and show.py look at them, damaged or not, and the lines
of the check's page. The readers are those of data.Clips, which ends at the first fault; here reading goes on.
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import LINE
from prepare.facts import SIZES, stimuli_folder
from support.readers import read_array, read_json, read_json_lines, read_npz

OK, WARNING, FAIL = "ok", "warning", "FAIL"
EMBEDDINGS = ("e_img.npy", "e_txt.npy", "e_act.npy")
OF_SUBJECT = ("fmri.npy", "recorded.npy")  # beside these all files are of the stimuli
OF_CLIPS = (*OF_SUBJECT, "categories.npy", *EMBEDDINGS, "near_copies.npy", "captions.npy")  # a row a clip


class Line(NamedTuple):
    """A line of the page."""

    level: str
    check: str
    text: str


ok, warning, fail = partial(Line, OK), partial(Line, WARNING), partial(Line, FAIL)


class Showing(NamedTuple):
    """One showing of one segment."""

    ids: list[str]  # of its clips
    number: int  # from 1
    fmri: np.ndarray  # (clips, T, N)


def digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row), digest_size=16).digest()


class Prepared:
    """What can be read of a subject: `arrays` (memory-mapped, by path), `clips` (lines of clips.jsonl, by
    split), `voxels`, `copies` (near_copies.json). What cannot be is `unreadable`; a stopped run left
    `left_over`."""

    def __init__(self, name: str, subject: int, root: Path):
        self.name, self.subject, self.root = name, subject, root
        self.folder, self.stimuli = root / name / f"sub{subject}", stimuli_folder(name, subject, root)
        raw = "" if name == "toy" else " --raw RAW"
        self.command = f"python data.py {name}{raw} --subject {subject}"
        self.arrays: dict[Path, np.ndarray] = {}
        self.clips: dict[str, list[dict]] = {}
        self.voxels: dict[str, np.ndarray] = {}
        self.copies: dict = {}
        self.unreadable: list[Path] = []
        files = sorted(file for folder in (self.folder, self.stimuli) for file in folder.rglob("*.np[yz]"))
        self.left_over = [file for file in files if file.name.startswith(".")]
        lists = [self.of(split, "clips.jsonl") for split in SIZES[name]]
        for file in [*files, *self.manifests(), *lists, self.of("train", "near_copies.json")]:
            if file.is_file() and file not in self.left_over:
                self._read(file)

    def _read(self, file: Path) -> None:
        try:
            if file.suffix == ".npz":
                self.voxels = read_npz(file, {"index": "iu", "roi": "U"})
            elif file.suffix == ".npy":
                self.arrays[file] = read_array(file, "b" if file.name == "recorded.npy" else "fiu")
            elif file.suffix == ".jsonl":
                self.clips[file.parent.name] = read_json_lines(file, LINE)
            elif file.name == "near_copies.json":
                self.copies = read_json(file, keys={"threshold": float, "best_match": dict})
            else:
                read_json(file)
        except ValueError:
            self.unreadable.append(file)

    def manifests(self) -> list[Path]:
        return [*self.folder.rglob("manifest.json"), *self.stimuli.rglob("manifest.json")]

    def of(self, split: str, name: str) -> Path:
        return (self.folder if name in OF_SUBJECT else self.stimuli) / split / name

    def array(self, split: str, name: str) -> np.ndarray:
        return self.arrays[self.of(split, name)]

    def showings(self, split: str) -> Iterator[Showing]:
        """Each that was recorded; one in memory."""
        fmri, first = self.array(split, "fmri.npy"), 0
        for _, clips in groupby(self.clips[split], key=lambda clip: clip["segment"]):
            ids = [clip["id"] for clip in clips]
            for k in range(fmri.shape[1]):
                values = np.array(fmri[first : first + len(ids), k])
                if not np.isnan(values).all():
                    yield Showing(ids, k + 1, values)
            first += len(ids)

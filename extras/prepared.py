"""The prepared files of a subject, as extras/check.py looks at them, and the lines of its page."""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prepare.facts import SIZES, stimuli_folder
from support.readers import read_array, read_json, read_json_lines, read_npz

OK, WARNING, FAIL = "ok", "warning", "FAIL"
PER_CLIP = ("categories.npy", "e_img.npy", "e_txt.npy", "e_act.npy")


class Line(NamedTuple):
    """A line of the page: how bad, what was looked at, what was found."""

    level: str
    what: str
    found: str


def blocks(array: np.ndarray, size: int = 256) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first, and values in float32, of a few hundred rows at a time."""
    for i in range(0, len(array), size):
        yield i, np.array(array[i : i + size], np.float32)


def digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row), digest_size=16).digest()


LINE = {"id": str, "segment": str, "caption": str, "categories": list}  # what a line of clips.jsonl holds


class Prepared:
    """The files of a subject: `arrays` (memory-mapped, by path) and `clips` (lines of clips.jsonl, by split)
    that can be read."""

    def __init__(self, name: str, subject: int, root: Path):
        self.name, self.subject, self.folder = name, subject, root / name / f"sub{subject}"
        self.stimuli = stimuli_folder(name, subject, root)
        raw = "" if name == "toy" else " --raw RAW"
        self.command = f"python data.py {name}{raw} --subject {subject}"
        self.arrays, self.clips, self.unreadable, self.voxels = {}, {}, [], {}
        files = sorted(file for folder in (self.folder, self.stimuli) for file in folder.rglob("*.np[yz]"))
        self.left_over = [file for file in files if file.name.startswith(".")]
        lists = [self.stimuli / split / "clips.jsonl" for split in SIZES[name]]
        manifests = [*self.folder.rglob("manifest.json"), *self.stimuli.rglob("manifest.json")]
        for file in [*files, *manifests, *lists]:
            if file.is_file() and file not in self.left_over:
                self._read(file)

    def _read(self, file: Path) -> None:
        """Into `arrays`, `voxels` or `clips`; or into `unreadable`."""
        try:
            if file.suffix == ".npz":
                self.voxels = read_npz(file, {"index": "iu", "roi": "U"})
            elif file.suffix == ".npy":
                self.arrays[file] = read_array(file, "fiu")
            elif file.suffix == ".jsonl":
                self.clips[file.parent.name] = read_json_lines(file, LINE)
            else:
                read_json(file)
        except ValueError:
            self.unreadable.append(file)

    def of(self, split: str, name: str) -> Path:
        return (self.folder if name == "fmri.npy" else self.stimuli) / split / name

    def array(self, split: str, name: str) -> np.ndarray:
        return self.arrays[self.of(split, name)]

    def runs(self, split: str) -> Iterator[tuple[list[str], int, np.ndarray]]:
        """ids of the clips, showing from 1, fMRI (clips, T, N) of each run that was recorded; one in
        memory."""
        fmri, first = self.array(split, "fmri.npy"), 0
        for _, clips in groupby(self.clips[split], key=lambda clip: clip["segment"]):
            ids = [clip["id"] for clip in clips]
            for showing in range(fmri.shape[1]):
                run = np.array(fmri[first : first + len(ids), showing])
                if not np.isnan(run).all():
                    yield ids, showing + 1, run
            first += len(ids)

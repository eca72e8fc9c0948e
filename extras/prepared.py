"""The prepared files of a subject as extras/check.py looks at them, damaged or not, and the lines of its
page. The readers are those of data.Clips, which ends at the first fault; here reading goes on."""

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

DIMENSIONS = dict(zip(OF_CLIPS, (4, 2, 2, 3, 2, 2, 2, 1), strict=True))
DIMENSIONS |= {"latents.npy": 5, "text_tokens.npy": 2, "text_offsets.npy": 1, "empty_prompt.npy": 2}


class Line(NamedTuple):
    """A line of the page."""

    level: str
    check: str
    text: str


ok, warning, fail = partial(Line, OK), partial(Line, WARNING), partial(Line, FAIL)


def digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row), digest_size=16).digest()


class Prepared:
    """What can be read of a subject: `arrays` (memory-mapped, by path), `clips` (lines of clips.jsonl, by
    split), `voxels`, `copies` (near_copies.json). What cannot be is `unreadable`; a stopped run left
    `left_over`."""

    def __init__(self, name: str, subject: int, root: Path):
        self.name, self.subject, self.root = name, subject, root
        self.folder, self.stimuli = root / name / f"sub{subject}", stimuli_folder(name, subject, root)
        self.command = f"python data.py {name}{'' if name == 'toy' else ' --raw RAW'} --subject {subject}"
        self.arrays: dict[Path, np.ndarray] = {}
        self.clips: dict[str, list[dict]] = {}
        self.voxels: dict[str, np.ndarray] = {}
        self.copies: dict = {}
        self.unreadable: list[Path] = []
        files = self._files("*.np[yz]")
        self.manifests = self._files("manifest.json")
        self.left_over = [file for file in files if file.name.startswith(".")]
        lists = [self.of(split, "clips.jsonl") for split in SIZES[name]]
        for file in [*files, *self.manifests, *lists, self.of("train", "near_copies.json")]:
            if file.is_file() and file not in self.left_over:
                try:
                    self._read(file)
                except ValueError:
                    self.unreadable.append(file)

    def _files(self, pattern: str) -> list[Path]:
        return sorted([*self.folder.rglob(pattern), *self.stimuli.rglob(pattern)])

    def _read(self, file: Path) -> None:
        match file.suffix:
            case ".npz":
                self.voxels = read_npz(file, {"index": "iu", "roi": "U"})
            case ".npy":
                kind = file.stem.partition("-")[0] + file.suffix  # latents-9x32x48.npy: latents.npy
                shape = [None] * DIMENSIONS[kind] if kind in DIMENSIONS else None
                self.arrays[file] = read_array(file, "b" if file.name == "recorded.npy" else "fiu", shape)
            case ".jsonl":
                self.clips[file.parent.name] = read_json_lines(file, LINE)
            case _ if file in self.manifests:
                read_json(file)
            case _:
                self.copies = read_json(file, keys={"threshold": float, "best_match": dict})

    def of(self, split: str, name: str) -> Path:
        return (self.folder if name in OF_SUBJECT else self.stimuli) / split / name

    def array(self, split: str, name: str) -> np.ndarray:
        return self.arrays[self.of(split, name)]

    def showings(self, split: str) -> Iterator[tuple[list[str], int, np.ndarray]]:
        """Each showing of a segment that was recorded, one in memory: the ids of its clips, its number from
        1, fMRI (clips, T, N)."""
        fmri, first = self.array(split, "fmri.npy"), 0
        for _, clips in groupby(self.clips[split], key=lambda clip: clip["segment"]):
            ids = [clip["id"] for clip in clips]
            for k in range(fmri.shape[1]):
                values = np.array(fmri[first : first + len(ids), k])
                if not np.isnan(values).all():
                    yield ids, k + 1, values
            first += len(ids)

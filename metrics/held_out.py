"""The held-out clips of a run, around their videos: the stimuli, what was recalled, the report and its pictures."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metrics.attributes import ALL, agreement, right, shown_in_training
from metrics.pairs import Pair, Source, other_scenes
from metrics.report import Clips, pictures, report
from prepare.copies import far_apart
from prepare.facts import raw_folder
from support.files import written_whole
from support.videos import read_clip, video_frames, write_video


class Films:
    """The stimuli of a subject. Raises FileNotFoundError where one of these clips' films is missing."""

    def __init__(self, config, size: tuple[int, int, int], lines: Sequence[dict]):
        self.folder = Path(config.stimuli or raw_folder(config.data, config.subject) / "stimuli")
        self.size, self.seconds, self.fps = size, config.seconds, config.fps
        missing = sorted({line["video"] for line in lines if not (self.folder / line["video"]).is_file()})
        if missing:
            found = f"{self.folder / missing[0]} is not there ({len(missing)} stimuli are missing)"
            raise FileNotFoundError(f"{found}: --stimuli FOLDER")

    def frames(self, line: dict) -> np.ndarray:
        """A line of clips.jsonl -> its frames, uint8 (F, H, W, 3), as the decoder saw them in training."""
        clip = read_clip(self.folder / line["video"], line["start_s"], self.seconds)
        return video_frames(clip, *self.size)

    def write(self, folder: Path, lines: dict[int, dict], silent: bool) -> None:
        """The missing folder/NNNN.mp4 of these clips."""
        for clip, line in tqdm(lines.items(), desc="stimuli", unit="clip", disable=silent):
            file = folder / f"{clip:04d}.mp4"
            if not file.is_file():
                write_video(file, self.frames(line), self.fps)


def write_retrieved(model, x: Tensor, lines: dict[int, dict], file: Path) -> np.ndarray | None:
    """retrieved.jsonl of x (clips, T, N), fMRI of the clips with these lines of clips.jsonl. Returns the top-1
    memories (clips,), None where nothing is retrieved: without integration. model: evaluate.CineNeuron."""
    batches = [model.remember(batch) for batch in x.split(16)]
    if batches[0].indices is None:
        return None
    indices = torch.cat([recalled.indices for recalled in batches]).cpu().numpy()  # (clips, K)
    W_r = torch.cat([recalled.W_r for recalled in batches]).cpu().numpy().astype(float).round(4)  # (clips, 3)
    with written_whole(file) as part, open(part, "w", encoding="utf-8") as opened:
        for clip, memories, weights in zip(lines, indices.tolist(), W_r.tolist(), strict=True):
            row = {"clip": clip, "id": lines[clip]["id"], "retrieved": memories, "W_r": weights}
            opened.write(json.dumps(row) + "\n")
    return indices[:, 0]


class HeldOut:
    """Clips of the test set, {number: line of clips.jsonl}, with gt/ and recon/ in the folder of an evaluation."""

    def __init__(self, out: Path, lines: dict[int, dict], shuffle: bool):
        self.out, self.lines, self.shuffle = out, list(lines.values()), shuffle
        self.files = [f"{clip:04d}.mp4" for clip in lines]
        stimuli = [Source(out / "gt" / file) for file in self.files]
        controls = self._controls(stimuli)
        pairs = []
        for file, stimulus, control in zip(self.files, stimuli, controls, strict=True):
            pairs.append(Pair(file.removesuffix(".mp4"), Source(out / "recon" / file), stimulus, control))
        self.sets = {"from shuffled fMRI" if shuffle else "reconstruction": pairs}

    def _controls(self, stimuli: list[Source]) -> list[Source | None]:
        """Of each clip the stimulus of another scene; none where there are too few clips."""
        try:
            others = other_scenes(far_apart([line["segment"] for line in self.lines]))
        except ValueError:
            return [None] * len(stimuli)
        return [stimuli[k] for k in others]

    def report(
        self,
        config,
        unavailable: dict[str, str],
        memories: list[dict],  # lines of clips.jsonl
        top_1: np.ndarray | None,  # (clips,) of the memories
        near_copy: np.ndarray,  # (clips,) bool
        films: Films,
    ) -> str:
        """Writes metrics.json, recognised.json and the pictures; returns the tables."""
        groups = shown_in_training(self.lines, memories)
        groups = groups or {"with a near-copy": near_copy, "without a near-copy": ~near_copy}
        groups = {name: inside for name, inside in groups.items() if inside.any()}
        judges = (config.video_classifier, config.image_classifier)
        seen, recognised = agreement(
            self.out, self.shuffle, judges, self.lines, memories, self.files, top_1, groups
        )
        values = {"all_attributes": right(seen, self.lines)[ALL]} if seen else {}
        source = {name: getattr(config, name) for name in ("data", "subject", "run", "seed", "shuffle")}
        folders = {next(iter(self.sets)): self.out}
        results, table = report(
            self.sets, folders, self.out, config, unavailable, source, Clips(groups, values)
        )

        def texts(i: int) -> list[str]:
            memory = [] if top_1 is None else [memories[top_1[i]]["caption"]]
            as_seen = " ".join(value[i] for value in seen.values())
            return [self.lines[i]["caption"], *memory, f"seen as {as_seen}" if seen else ""]

        recalled = None if top_1 is None else lambda i: films.frames(memories[top_1[i]])
        pictures(self.out, self.sets, results, texts, config.seconds, recalled, groups)
        written = f"written: {self.out}/ (gt, recon, retrieved.jsonl, metrics.json, sheet.png ...)"
        return f"{recognised}{table}\n\n{written}"

"""The held-out clips of a run: their stimuli and reconstructions, and what is known of them beside."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data import Clips
from metrics.attributes import Recognised, agreement, shown_in_training
from metrics.pairs import Pair, Source, other_scenes
from metrics.report import MEMORY, Evaluation
from prepare.copies import far_apart
from prepare.facts import raw_folder
from support import shared
from support.files import sha256, write_json, write_text
from support.options import settings_of
from support.runs import read_settings, run_folder
from support.videos import read_clip, video_frames, write_video


class Films:
    """The stimuli of a subject. Raises FileNotFoundError where one of these clips' films is missing."""

    def __init__(self, config, size: tuple[int, int, int], lines: Sequence[dict]):
        self.folder = Path(config.stimuli or raw_folder(config.data, config.subject) / "stimuli")
        self.size, self.seconds, self.fps = size, config.seconds, config.fps
        missing = sorted({line["video"] for line in lines if not (self.folder / line["video"]).is_file()})
        if missing:
            missed = f"{self.folder / missing[0]} is not there ({len(missing)} stimuli are missing)"
            raise FileNotFoundError(f"{missed}: --stimuli FOLDER")

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


def order_of(config) -> slice | np.ndarray:
    """The test clips' order: their own, or with --shuffle for each clip one of another scene. Raises
    ValueError where they are too few: ask before models are loaded."""
    if not config.shuffle:
        return slice(None)
    lines = Clips(config.data, config.subject, "test").lines
    return other_scenes(far_apart([line["segment"] for line in lines]))


def write_retrieved(model, x: Tensor, lines: dict[int, dict], file: Path | None) -> np.ndarray | None:
    """retrieved.jsonl (no file: none) of x (clips, T, N), fMRI of the clips with these lines of clips.jsonl,
    by an evaluate.CineNeuron. Returns the top-1 memories (clips,); None where nothing is retrieved."""
    batches = [model.remember(batch) for batch in x.split(16)]
    if batches[0].indices is None:
        return None
    indices = torch.cat([recalled.indices for recalled in batches]).cpu().numpy()  # (clips, K)
    W_r = torch.cat([recalled.W_r for recalled in batches]).cpu().numpy().astype(float).round(4)  # (clips, 3)
    rows = []
    for (clip, line), memories, weights in zip(lines.items(), indices.tolist(), W_r.tolist(), strict=True):
        row = {"clip": clip, "id": line["id"], "retrieved": memories, "W_r": weights}
        rows.append(json.dumps(row) + "\n")
    if file:
        write_text(file, "".join(rows))
    return indices[:, 0]


def pairs_of(out: Path, lines: dict[int, dict], method: str, played: bool = False) -> dict[str, list[Pair]]:
    """Reconstruction and stimulus of these clips, {number: line of clips.jsonl}, in the folder of an
    evaluation; the control is the stimulus of another scene, none where there are too few clips. played:
    also the best memory and the stimulus, without a control."""
    names = [f"{clip:04d}" for clip in lines]
    stimuli, reconstructions, memories = (
        [Source(out / kind / f"{name}.mp4") for name in names] for kind in ("gt", "recon", "memory")
    )
    controls: list[Source | None] = [None] * len(names)
    with suppress(ValueError):
        controls = [stimuli[k] for k in other_scenes(far_apart([line["segment"] for line in lines.values()]))]
    sets = {method: list(map(Pair, names, reconstructions, stimuli, controls))}
    if played:
        sets[MEMORY] = [Pair(*pair, None) for pair in zip(names, memories, stimuli, strict=True)]
    return sets


def describe(
    evaluation: Evaluation,
    lines: dict[int, dict],  # of the clips
    memories: list[dict],  # lines of clips.jsonl
    top_1: np.ndarray | None,  # (clips,) of the memories
    near_copy: np.ndarray,  # (clips,) bool
    films: Films,
) -> Evaluation:
    """The evaluation with what is known of its clips beside their videos, such as what classifiers see.
    Groups are by attributes: does training show a clip's? Without such, by near-copies."""
    config = evaluation.config
    groups = shown_in_training(list(lines.values()), memories)
    groups = groups or {"with a near-copy": near_copy, "without a near-copy": ~near_copy}
    groups = {name: members for name, members in groups.items() if members.any()}
    judges = (config.video_classifier, config.image_classifier)
    try:
        recognised = agreement(evaluation.out, judges, lines, memories, groups)
    except (OSError, ValueError) as error:  # a damaged classifier: the scores are kept
        recognised = Recognised(table=f"attributes: n/a: {error}")
    texts = []
    for i, line in enumerate(lines.values()):
        memory = [] if top_1 is None else [memories[top_1[i]]["caption"]]
        attributes = " ".join(values[i] for values in recognised.values.values())
        texts.append([line["caption"], *memory, f"seen as {attributes}" if attributes else ""])
    values, played = (
        {"all_attributes": recognised.right[kind]} if kind in recognised.right else {}
        for kind in ("recon", "memory")
    )
    recalled = None if top_1 is None else lambda i: films.frames(memories[top_1[i]])
    more = {"texts": texts, "memories": recalled, "seen": recognised.table}
    return evaluation._replace(groups=groups, values=values, played=played, **more)


def untrained(config, accelerator: Accelerator) -> tuple[Path, dict, Clips]:
    """What stage 2 of a run starts from: by the options of its stage 2 where it has one, else by the preset,
    with the Mixture-of-Memories. Returns the folder of stage 1, settings and clips."""
    import train_stage2  # which imports evaluate

    common = ["--data", config.data, "--subject", str(config.subject), "--seed", str(config.seed)]
    options = train_stage2.parse([*common, "--stage1", config.run])
    stage2 = run_folder(config.data, config.subject, config.run, config.seed) / "stage2"
    if (stage2 / "config.json").is_file():
        stored = shared.read_settings(stage2)
        names = settings_of(options, "mom", "integration", "precision", "device").keys() & stored.keys()
        options = replace(options, **{name: stored[name] for name in names})
    return train_stage2.starting_point(replace(options, sample_every=1), accelerator)  # its decoder has a VAE


def evaluation_folder(
    run: Path, config, settings: dict, complete: bool, metrics: list[str], all_metrics: list[str]
) -> Path:
    """eval or eval-shuffled of a run; no stage 2, fewer clips than the test set, other sampling than the
    run's and fewer than all metrics have folders of their own, and so never replace the results of all."""
    name = "eval-shuffled" if config.shuffle else "eval"
    if not config.stage2:
        name += "-no-stage2"
    if not complete:
        name += f"-{config.clips}-clips"
    if config.steps not in (None, settings["sampling_steps"]):
        name += f"-steps{config.steps}"
    if config.guidance not in (None, settings["guidance"]):
        name += f"-guidance{config.guidance:g}"
    if set(all_metrics) - set(metrics):
        digest = hashlib.sha256(",".join(metrics).encode()).hexdigest()[:6]
        name += "-" + ("-".join(metrics) if len(metrics) <= 3 else f"{len(metrics)}-metrics-{digest}")
    return run / name


def claim(folder: Path, settings: dict, write: bool = True) -> None:
    """config.json: what a folder's videos are made by. Raises ValueError where others would join them."""
    advice = f"to make its videos anew delete the folder: rm -r {folder}"
    read_settings(folder / "config.json", settings, (), advice)
    if write:
        write_json(folder / "config.json", settings)


def made_by(config, settings: dict, stage: Path) -> dict:
    """What the videos of an evaluation are made by. stage: folder of the weights, stage 1's with
    --no-stage2."""
    more = {}  # beside the weights, which are those of stage 1
    if not config.stage2:
        size = [settings[name] for name in ("frames", "height", "width")]
        more = {"decoder": Path(settings["decoder"]).name, "size": size}
    return more | {
        "steps": settings["sampling_steps"] if config.steps is None else config.steps,
        "guidance": settings["guidance"] if config.guidance is None else config.guidance,
        "fps": config.fps,
        "weights": sha256(*sorted(stage.glob("*/*.safetensors")))[:16],
    }


def reconstruct(model, x: Tensor, clips: np.ndarray, folder: Path, config, rank: int, world: int) -> None:
    """x (test clips, T, N) -> the missing folder/NNNN.mp4 of `clips`, this process's share. Noise comes from
    (seed, clip). Batches are cut before they are shared out, and one that lacks a clip is done whole: even
    the rounding, which depends on a batch's size, stays the same after a kill."""
    batches = [clips[i : i + config.batch_size] for i in range(0, len(clips), config.batch_size)]
    for batch in tqdm(batches[rank::world], desc="reconstructing", unit="batch", disable=rank > 0):
        files = [folder / f"{clip:04d}.mp4" for clip in batch]
        if all(file.is_file() for file in files):
            continue
        keys = [(config.seed, int(clip)) for clip in batch]
        videos = model.reconstruct(x[batch], keys, config.steps, config.guidance)  # (B, F, H, W, 3)
        for file, video in zip(files, videos, strict=True):
            if not file.is_file():
                write_video(file, video, config.fps)

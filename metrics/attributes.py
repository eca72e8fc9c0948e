"""What do classifiers see in a video of the toy world, and is it what was shown?

The names of the classes hold the attributes: "a red circle moves right". Used by evaluate.py where the clips
have such attributes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from metrics.classes import Classifier
from support.files import write_json
from support.readers import read_json
from support.videos import read_video, uniform_frames

ATTRIBUTES = ("colour", "shape", "action", "background")  # of a line of clips.jsonl
FRAMES = 16  # that the toy world's classifiers were trained on


@torch.inference_mode()
def class_probabilities(
    videos: Iterable[np.ndarray], classifiers: Sequence[str | Path]
) -> list[tuple[np.ndarray, list[str]]]:
    """Videos uint8 (F, H, W, 3) -> of each classifier probabilities (clips, classes), of 16 uniform frames
    (their mean), and the classes' names. Each video is read once."""
    judges, p = [Classifier(classifier) for classifier in classifiers], []
    for video in videos:
        frames = video[uniform_frames(len(video), FRAMES)]
        p.append([judge(frames).mean(0) for judge in judges])
    return [(np.stack(of), judge.names) for of, judge in zip(zip(*p, strict=True), judges, strict=True)]


def recognise(
    videos: Sequence[Path], classifiers: Sequence[str], values: dict[str, list[str]]
) -> dict[str, list[str]]:
    """What each video shows: of each attribute the most probable of its `values`, where P(red) is the sum
    over the red classes. The first classifier whose classes' names hold an attribute's values is asked for
    it."""
    seen: dict[str, list[str]] = {}
    for p, names in class_probabilities((read_video(file).frames for file in videos), classifiers):
        for attribute in values.keys() - seen.keys():
            holds = np.zeros((len(names), len(values[attribute])), bool)
            for i, name in enumerate(names):
                holds[i] = [f" {value} " in f" {name} " for value in values[attribute]]
            if holds.any():
                seen[attribute] = [values[attribute][i] for i in (p @ holds).argmax(1)]
    return {attribute: seen[attribute] for attribute in values if attribute in seen}


def shown_in_training(shown: Sequence[dict], train: Sequence[dict]) -> dict[str, np.ndarray]:
    """Which clips show a combination of attributes that a training clip shows, and which do not: {name:
    (clips,) bool}; nothing where the clips have no attributes."""
    attributes = [name for name in ATTRIBUTES if name in train[0]]
    trained = {tuple(clip[name] for name in attributes) for clip in train}
    known = np.array([tuple(clip[name] for name in attributes) in trained for clip in shown])
    return {"shown in training": known, "never shown": ~known} if attributes else {}


ALL = "all of them"


def right(seen: dict[str, list[str]], shown: Sequence[dict]) -> dict[str, np.ndarray]:
    """(clips,) bool: is the attribute seen as it was shown? Of each attribute and of all together."""
    hits = {}
    for name in seen:
        hits[name] = np.array([value == clip[name] for value, clip in zip(seen[name], shown, strict=True)])
    return hits | {ALL: np.all(list(hits.values()), 0)}


def shares(
    seen: dict[str, list[str]], shown: Sequence[dict], groups: dict[str, np.ndarray] | None = None
) -> dict[str, float]:
    """Share of the clips whose attribute is seen as it was shown, of each attribute, of all together, and of
    all together in each group of clips."""
    hits = right(seen, shown)
    named = {name: float(of.mean()) for name, of in hits.items()}
    for group, inside in (groups or {}).items():
        if inside.any():
            named[f"{ALL}, {group}"] = float(hits[ALL][inside].mean())
    return named


def agreement(
    out: Path,
    shuffled: bool,
    classifiers: Sequence[str],
    shown: list[dict],
    train: list[dict],
    files: list[str],
    top_1: np.ndarray | None,
    groups: dict[str, np.ndarray] | None = None,
) -> tuple[dict[str, list[str]], str]:
    """What is seen in out/recon/FILES, and a table of it beside chance, the stimuli, the top-1 memories
    (indices into `train`) and the run's other reconstructions. Writes out/recognised.json; nothing where the
    clips have no attributes or no classifier is a local folder."""
    attributes = [name for name in ATTRIBUTES if name in train[0]]
    classifiers = [name for name in classifiers if attributes and Path(name).is_dir()]
    if not classifiers:
        return {}, ""
    values, n = {name: sorted({clip[name] for clip in train}) for name in attributes}, len(files)
    videos = [out / kind / file for kind in ("recon", "gt") for file in files]
    both = recognise(videos, classifiers, values)
    seen, real = ({name: of[part] for name, of in both.items()} for part in (slice(n), slice(n, None)))
    this = "shuffled fMRI" if shuffled else "reconstruction"
    columns = {this: shares(seen, shown, groups), "stimulus": shares(real, shown, groups)}
    if top_1 is not None:
        remembered = {name: [train[i][name] for i in top_1] for name in seen}
        columns["top-1 memory"] = shares(remembered, shown, groups)
    chance = {name: 1 / len(values[name]) for name in seen}
    of_all = float(np.prod(list(chance.values())))
    columns["chance"] = {name: chance.get(name, of_all) for name in columns[this]}
    write_json(out / "recognised.json", {"shares": columns, "videos": files, "seen": seen})
    names = ("eval-shuffled", "eval") if shuffled else ("eval", "eval-shuffled")
    other = out.with_name(out.name.replace(*names, 1)) / "recognised.json"
    theirs = read_json(other, keys={"shares": dict})["shares"] if other.is_file() else {}
    # the memories and stimuli in the table are those of the reconstruction
    columns = columns | theirs if shuffled else theirs | columns
    return seen, _table(columns, len(files))


def _table(columns: dict[str, dict[str, float]], clips: int) -> str:
    order = ("reconstruction", "top-1 memory", "shuffled fMRI", "stimulus", "chance")
    names = [name for name in order if name in columns]
    lines = [f"{f'{clips} held-out clips, seen as shown':<36}" + "".join(f"{name:>16}" for name in names)]
    for row in columns["chance"]:
        cells = "".join(f"{columns[name].get(row, np.nan):>16.3f}" for name in names)
        lines.append(f"{row:<36}{cells}")
    return "\n".join(lines)

"""What do classifiers, whose classes name attributes ("a red circle moves right"), see in a video?"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from metrics.classes import Classifier
from support.files import find_weights, write_json
from support.readers import read_json
from support.videos import read_video, uniform_frames

ATTRIBUTES = ("colour", "shape", "action", "background")  # of a line of clips.jsonl
FRAMES = 16  # that the toy world's classifiers were trained on
ALL = "all of them"
COLUMNS = ("reconstruction", "top-1 memory", "shuffled fMRI", "stimulus", "chance")  # of the printed table


class Recognised(NamedTuple):
    """What classifiers see in the reconstructions; empty where the clips have no attributes."""

    values: dict[str, list[str]] = {}  # attribute: of each clip the value
    right: dict[str, np.ndarray] = {}  # of recon, gt and memory (clips,) bool: are all the clip's own?
    table: str = ""


def attribute_values(lines: Sequence[dict]) -> dict[str, list[str]]:
    """Of each attribute that these lines of clips.jsonl have the value of each; {} where they have none."""
    return {name: [line[name] for line in lines] for name in ATTRIBUTES if name in lines[0]}


@torch.inference_mode()
def recognise(
    videos: Sequence[Path], classifiers: Sequence[str], values: dict[str, list[str]]
) -> dict[str, list[str]]:
    """{attribute: of each video the most probable of its values}, by 16 uniform frames, where P(red) is the
    sum over the red classes. The first classifier whose classes name an attribute is asked for it."""
    recognised: dict[str, list[str]] = {}
    for classifier in classifiers:
        judge, p = Classifier(classifier), []
        for file in videos:
            frames = read_video(file).frames
            p.append(judge(frames[uniform_frames(len(frames), FRAMES)]).mean(0))
        for attribute in values.keys() - recognised.keys():
            holds = np.array([[f" {v} " in f" {n} " for v in values[attribute]] for n in judge.names])
            if holds.any():  # (classes, values)
                recognised[attribute] = [values[attribute][i] for i in (np.stack(p) @ holds).argmax(1)]
    return {attribute: recognised[attribute] for attribute in values if attribute in recognised}


def shown_in_training(clips: Sequence[dict], train: Sequence[dict]) -> dict[str, np.ndarray]:
    """{name: (clips,) bool}: does training show a clip's combination of attributes? {} if it has none."""
    trained = set(zip(*attribute_values(train).values(), strict=True))
    if not trained:
        return {}
    known = np.array([clip in trained for clip in zip(*attribute_values(clips).values(), strict=True)])
    return {"shown in training": known, "never shown": ~known}


def right(recognised: dict[str, list[str]], clips: Sequence[dict]) -> dict[str, np.ndarray]:
    """(clips,) bool of each attribute, and of all together: is the clip's own recognised?"""
    truth = attribute_values(clips)
    hits = {name: np.array(values) == truth[name] for name, values in recognised.items()}
    return {**hits, ALL: np.all(list(hits.values()), 0)}


def shares(
    recognised: dict[str, list[str]], clips: Sequence[dict], groups: dict[str, np.ndarray]
) -> dict[str, float]:
    """Share of the clips whose attribute is recognised: of each, of all together, also in groups of clips."""
    hits = right(recognised, clips)
    for group, members in groups.items():
        hits[f"{ALL}, {group}"] = hits[ALL][members]
    return {name: float(values.mean()) for name, values in hits.items()}


def agreement(
    out: Path,
    classifiers: Sequence[str],
    clips: dict[int, dict],
    train: list[dict],
    groups: dict[str, np.ndarray],
) -> Recognised:
    """What is recognised in out/recon/NNNN.mp4 of `clips` {number: line of clips.jsonl}, beside chance, the
    stimuli, the top-1 memories where they are played in out/memory/, and the control. train: lines of the
    memories. Writes out/recognised.json; nothing where the clips have no attributes or no classifier is a
    local folder."""
    values = {name: sorted({*column}) for name, column in attribute_values(train).items()}
    classifiers = list(filter(os.path.isdir, map(find_weights, classifiers)))
    if not (values and classifiers):
        return Recognised()
    lines, files = list(clips.values()), [f"{number:04d}.mp4" for number in clips]
    shuffled = out.name.startswith("eval-shuffled")
    column = "shuffled fMRI" if shuffled else "reconstruction"
    seen, columns = {}, {}
    for title, kind in ((column, "recon"), ("stimulus", "gt"), ("top-1 memory", "memory")):
        if (out / kind).is_dir():
            seen[kind] = recognise([out / kind / file for file in files], classifiers, values)
            columns[title] = shares(seen[kind], lines, groups)
    chance = {name: 1 / len(values[name]) for name in seen["recon"]}
    of_all = float(np.prod([*chance.values()]))
    columns["chance"] = {name: chance.get(name, of_all) for name in columns[column]}
    write_json(out / "recognised.json", {"shares": columns, "videos": files, "seen": seen["recon"]})
    options = out.name.removeprefix("eval-shuffled" if shuffled else "eval")  # such as -4-clips
    file = out.with_name(("eval" if shuffled else "eval-shuffled") + options) / "recognised.json"
    more = read_json(file, keys={"shares": dict})["shares"] if file.is_file() else {}
    # the memories and stimuli in the table are those of the reconstruction
    columns = columns | more if shuffled else more | columns
    every = {kind: right(values, lines)[ALL] for kind, values in seen.items()}
    return Recognised(seen["recon"], every, _table(columns, len(files)))


def _table(columns: dict[str, dict[str, float]], clips: int) -> str:
    text = f"{f'{clips} held-out clips, seen as shown':<36}"
    names = [name for name in COLUMNS if name in columns]
    text += "".join(f"{name:>16}" for name in names)
    for row in columns["chance"]:
        text += f"\n{row:<36}" + "".join(f"{columns[name].get(row, np.nan):>16.3f}" for name in names)
    return text

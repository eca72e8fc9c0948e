"""Values -> means, intervals, controls: metrics.json, a table beside the paper's, pictures."""

import csv
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metrics.intervals import blocks_of, estimate, remark
from metrics.pairs import Pair, find_pairs, watch
from metrics.score import (
    VERSIONS,
    at_common_times,
    keys_of,
    known_value,
    known_values,
    score_all,
    step_of,
    weights_of,
)
from metrics.table import BLOCKS, METRICS, NAMES, Judging, asked
from prepare.facts import DATASETS
from support.files import write_json
from support.pictures import contact_sheet, grid_gif, spread
from support.runs import FolderLock
from support.training import start

MEMORY = "best memory, played"  # a set beside a reconstruction's: the stimulus of each clip's top-1 memory
QUOTED = Path(__file__).with_name("quoted.csv")  # Tables 1 and 2 of the paper


class Evaluation(NamedTuple):
    """What was scored, and what is known of the clips beside their videos."""

    sets: dict[str, list[Pair]]  # of each method the clips, in the same order
    out: Path
    config: Judging
    unavailable: dict[str, str]  # judge: why it could not be had; metric: why a clip has no value
    provenance: dict  # of the videos
    groups: dict[str, np.ndarray] = {}  # name: (clips,) bool, such as which of them training shows
    values: dict[str, np.ndarray] = {}  # name: (clips,) another value of each
    played: dict[str, np.ndarray] = {}  # likewise of MEMORY
    texts: list[list[str]] | None = None  # of each clip, below each column of the pictures; None: its name
    memories: Callable[[int], np.ndarray] | None = None  # clip -> the top-1 memory, uint8 (F, H, W, 3)
    seen: str = ""  # a table of what classifiers see


def values_of(name: str, rows: Sequence[dict]) -> np.ndarray:
    """(clips,) with NaN where there is no value."""
    return np.array([row.get(name) for row in rows], float)


def summarise(method: str, run: Evaluation, known: dict[str, object]) -> dict:
    """The contents of metrics.json: metrics of the set, of each group and of each clip; what made them."""
    config, scored, rows = run.config, [], []
    others = run.played if method == MEMORY else run.values
    for i, pair in enumerate(run.sets[method]):
        values = {name: known_value(known, name, key) for name, key in keys_of(pair, config).items()}
        row = {"clip": pair.name} | {name: value and value[0] for name, value in values.items()}
        rows.append(row | {name: float(values[i]) for name, values in others.items()})
        scored.append(values)
    clips = np.array([pair.name for pair in run.sets[method]])
    blocks = blocks_of(clips, run.provenance.get("data", ""))
    groups = {}
    for group, members in run.groups.items():
        groups[group] = {"clips": clips[members].tolist()}
        for name in (*asked(config), *others):
            values = values_of(name, rows)[members]
            groups[group][name] = estimate(name, values, blocks[members])._asdict()
    metrics = {name: _entry(name, scored, blocks, run) for name in NAMES}
    frames, trials = config.classifier_frames, config.trials or "exact"
    options = {"size": config.size, "classifier_frames": frames, "trials": trials, "versions": VERSIONS}
    step = step_of(run.sets, config.seconds) or "each video's own"
    provenance = run.provenance | {"method": method, "step": step} | options
    return {"metrics": metrics, "groups": groups, "clips": rows, "provenance": provenance}


def less(result: dict, memory: dict) -> dict:
    """How much more each metric is than the best memory's on the same clips, with its paired 95 % interval:
    {"metrics": of all clips, "groups": of each group}."""
    clips = [row["clip"] for row in result["clips"]]
    names = result["clips"][0].keys() - {"clip"}
    blocks = blocks_of(clips, result["provenance"].get("data", ""))

    def of(members: np.ndarray) -> dict[str, dict]:
        entries = {}
        for name in names:
            a, b = (values_of(name, rows["clips"])[members] for rows in (result, memory))
            entries[name] = estimate(name, a, blocks[members], b)._asdict()
        return entries

    groups = {name: of(np.isin(clips, group["clips"])) for name, group in result["groups"].items()}
    return {"metrics": of(np.ones(len(clips), bool)), "groups": groups}


def _entry(name: str, scored: list[dict], blocks: np.ndarray, run: Evaluation) -> dict:
    """A metric of the set. scored: of each clip {metric: [value, value against another stimulus] or None}."""
    metric = METRICS[name]
    values, controls = np.array([row.get(name) or (None, None) for row in scored], float).T  # (clips,) each
    finite = values[np.isfinite(values)]
    mean, ci95 = estimate(name, values, blocks)
    std = shuffled = None
    if len(finite) and metric.chance:  # as the papers' ±
        std = float(np.sqrt(finite * (1 - finite) / (run.config.trials or 100)).mean())
    elif len(finite) and not metric.signed:
        std = float(finite.std())
    if np.isfinite(controls).any():
        shuffled = float(np.nanmean(controls))
        shuffled = abs(shuffled) if metric.signed else shuffled
    entry = {"mean": mean, "std": std, "ci95": ci95, "chance": metric.chance, "shuffled": shuffled}
    entry |= {"n": len(finite), "weights": weights_of(metric, run.config)}
    if name not in asked(run.config):
        entry["reason"] = "not asked for (--metrics)"
    elif missing := len(values) - len(finite):
        short = sum(row.get(name) == [None, None] for row in scored)
        too_short = f"{short} videos of fewer than {metric.least} frames"
        cause = too_short if short else "videos that are missing or cannot be read"
        cause = run.unavailable.get(name, cause)
        counted = f"{missing} of {len(values)} clips have no value: {cause}"
        entry["reason"] = run.unavailable.get(metric.judge, counted)
    return entry


def report(run: Evaluation) -> str:
    """Writes the pictures and, last, metrics.json of each method. Returns the text to print."""
    known, names, config = known_values(run.out), asked(run.config), run.config
    common = _common_clips(run, known)
    some = config.pairs and common.any() and not common.all()
    pictured = run._replace(sets={method: run.sets[method] for method in run.sets if method != MEMORY})
    if some and len(run.sets) > 1:  # else means would be over different clips
        run = run._replace(groups={"that all methods have": common})
    results = {method: summarise(method, run, known) for method in run.sets}
    reasons: dict[str, list[str]] = {}
    rows: list[Row] = []
    control = "another stimulus" if config.pairs else "shuffled"  # --pairs knows no scenes
    memory = results.get(MEMORY)
    for method, result in results.items():
        if result is not memory:
            if memory:
                result["memory"] = {key: memory[key] for key in ("metrics", "groups", "clips")}
                result["less_memory"] = less(result, memory)
            rows += _rows(method, result, names, control)
        for name in names:
            if reason := result["metrics"][name].get("reason"):
                reasons.setdefault(f"{method}: {reason}", []).append(name)
    rows.append(("chance", {name: number(METRICS[name].chance) for name in names}))
    size = "the stimuli's size" if config.size == "native" else f"{config.size} x {config.size}"
    blocks = blocks_of([pair.name for pair in next(iter(run.sets.values()))], run.provenance.get("data", ""))
    text = run.seen + f"\nSSIM, PSNR and EPE at {size} and common frame times; {remark(blocks)}"
    text += table(rows, beside_quoted(config.data, run.provenance, len(blocks)))
    if step := step_of(run.sets, config.seconds):
        text += f"\nCLIP-pcc, DTC, MS, Dyn. Degree, EPE: of the coarsest video's times, {step}"
    for reason, metrics in reasons.items():
        text += f"\nn/a or in part, {', '.join(metrics)}: {reason}"
    _pictures(pictured, results, common)
    for method, result in results.items():
        if result is not memory:
            write_json((run.out / method if config.pairs else run.out) / "metrics.json", result)
    return f"{text}\n\nwritten: {run.out}/"


def report_pairs(config) -> int:
    """--pairs: score anyone's videos. Returns the exit status."""
    accelerator, folder = start(config.device), Path(config.pairs)
    out = Path(config.out or folder / "metrics")
    sets = find_pairs(folder, config.split, config.skip_bad, out)
    with FolderLock(out, take=accelerator.is_main_process):
        sets = at_common_times(sets, config)
        unavailable = score_all(sets, config, out, accelerator)
        if accelerator.is_main_process:
            source = {"pairs": folder.resolve().name, "data": config.data}
            print(report(Evaluation(sets, out, config, unavailable, source)))
    accelerator.end_training()
    return 3 if unavailable else 0


# ---------------------------------------------------------------- the printed table

Row = tuple[str, dict[str, str]]  # a label, and the text of each metric's cell; "" where it has none


def number(x: float | None, std: float | None = None) -> str:
    """A mean, with its ±."""
    if x is None:
        return ""
    return f"{x:.{3 if abs(x) < 10 else 2}f}" + ("" if std is None else f"±{std:.2f}")


def interval(ci95: list[float] | None) -> str:
    return f"[{number(ci95[0])}, {number(ci95[1])}]" if ci95 else ""


def _rows(method: str, result: dict, names: list[str], control: str) -> list[Row]:
    """A method's rows, from its metrics.json, with those of the memories beside it."""
    means, intervals, controls = {}, {}, {}
    for name in names:
        entry = result["metrics"][name]
        means[name] = number(entry["mean"], entry["std"]) or "n/a"
        intervals[name] = interval(entry["ci95"])
        controls[name] = number(entry["shuffled"])
    label = f"{method}, {len(result['clips'])} clips: mean ±"
    rows = [(label, means), ("   95 % interval", intervals)]
    for group, entries in result["groups"].items():
        cells = {name: number(entries[name]["mean"]) for name in names}
        rows.append((f"   {group}, {len(entries['clips'])} clips", cells))
    if "memory" in result:
        of_set = result["less_memory"]["metrics"]
        rows += _rows(MEMORY, result["memory"], names, control)
        rows.append((f"{method} less memory", {name: number(of_set[name]["mean"]) for name in names}))
        rows.append(("   95 % interval, paired", {name: interval(of_set[name]["ci95"]) for name in names}))
    rows.append((f"   {control}", controls))
    return rows


def table(rows: list[Row], data: str) -> str:
    """The rows, and the paper's of this dataset, in blocks of metrics, but no block of the paper's alone."""
    lines = []
    with open(QUOTED, newline="", encoding="utf-8") as file:
        paper = [row for row in csv.DictReader(file) if row["data"] == data]
    quoted = [(f"{row['method']}, quoted from the paper", row) for row in paper]
    for block in BLOCKS:
        titles = {name: f"{m.title} {m.better}" for name, m in METRICS.items() if m.block == block}
        filled = [row for row in rows + quoted if any(row[1].get(name) for name in titles)]
        if filled and filled[0] not in quoted:
            lines.append("")
            for label, cells in [("", titles), *filled]:
                lines.append(f"{label:<48}" + "".join(f"{cells.get(name) or '-':>17}" for name in titles))
    return "\n".join(lines)


def beside_quoted(data: str, origin: dict, clips: int) -> str:
    """`data`, whose quoted rows may stand beside these clips; "" where they are not of its test set: of
    --pairs only so many are."""
    whole = data in DATASETS and clips == prod(DATASETS[data].test)
    return data if origin.get("data") == data and (whole or "pairs" not in origin) else ""


def _common_clips(run: Evaluation, known: dict[str, object]) -> np.ndarray:
    """(clips,) bool: has each method any value of it?"""

    def has_any(pair: Pair) -> bool:
        keys = keys_of(pair, run.config).items()
        return any((known_value(known, *key) or [None])[0] is not None for key in keys)

    return np.array([all(map(has_any, clip)) for clip in zip(*run.sets.values(), strict=True)])


def _pictures(run: Evaluation, results: dict[str, dict], complete: np.ndarray) -> None:
    """sheet.png (three moments, as Figures 3 and 4) and grid.gif of six clips, chosen by `spread`; ranked.png
    of the first method's two best, median and worst by 50-way accuracy, or else SSIM. complete (clips,) bool:
    `_common_clips`."""
    if not complete.any():
        return
    titles = ["stimulus", *(["top-1 memory"] if run.memories else []), *run.sets]
    chosen = spread(np.flatnonzero(complete).tolist(), 6, run.groups)
    videos, texts = _cells(run, dict.fromkeys(chosen, ""))
    contact_sheet(run.out / "sheet.png", videos, texts, titles)
    grid_gif(run.out / "grid.gif", videos, texts, titles, run.config.seconds)
    first = next(iter(results.values()))
    name = "video_50way" if first["metrics"]["video_50way"]["n"] else "ssim"
    values = np.where(complete, values_of(name, first["clips"]), np.nan)
    best = np.argsort(-values, kind="stable")[: np.isfinite(values).sum()]
    N, ranked = len(best), {}
    for k in sorted({0, 1, N // 2 - 1, N // 2, N - 2, N - 1} & {*range(N)}):
        ranked[best[k]] = f"{k + 1} of {N}, {METRICS[name].title} {values[best[k]]:.3f}: "
    if ranked:
        contact_sheet(run.out / "ranked.png", *_cells(run, ranked), titles)


def _cells(run: Evaluation, clips: dict[int, str]) -> tuple[list[list[np.ndarray]], list[list[str]]]:
    """Of each clip {number: words before its first text} its stimulus, memory and predictions, of the
    stimulus's size, at most 256 rows; and the texts below them, its group in brackets."""
    rows, labels = [], []
    for i, words in clips.items():
        pairs = [pairs[i] for pairs in run.sets.values()]
        videos = [watch(source, run.config.seconds) for source in (pairs[0].gt, *(p.pred for p in pairs))]
        H, W = videos[0].frames.shape[1:3]
        size = (256, round(W * 256 / H)) if H > 256 else (H, W)
        cells = [video.seen(video.uniform(min(60, len(video))), size) for video in videos]
        if run.memories:
            cells.insert(1, run.memories(i))
        texts = list(run.texts[i]) if run.texts else [pairs[0].name, *[""] * len(pairs)]
        groups = [f" [{name}]" for name, members in run.groups.items() if members[i]]
        texts[0] = words + texts[0] + "".join(groups)
        rows.append(cells)
        labels.append(texts)
    return rows, labels

"""Values -> means, intervals, controls: metrics.json, metrics.csv, a table beside the paper's, pictures."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metrics.pairs import Pair, watch
from metrics.score import VERSIONS, keys_of, known_value, known_values, weights_of
from metrics.table import BLOCKS, METRICS, NAMES, asked
from support.files import write_json, written_whole
from support.pictures import contact_sheet, grid_gif, spread

DRAWS, BLOCK = 2000, 20  # of the bootstrap; clips that are drawn together
CONTROLS = {False: "shuffled", True: "another stimulus"}  # by --pairs, which knows no scenes


def estimate(
    name: str, a: np.ndarray, blocks: np.ndarray, b: np.ndarray | float = 0.0
) -> tuple[float | None, list[float] | None]:
    """A metric of the set from its clips' values a (clips,), NaN where there is none, less that of b; and its
    95 % interval. `name` is one of METRICS, or the set's value is the mean.

    Blocks of clips are drawn (the same for all), since neighbours are not independent; None for fewer than
    two blocks.
    """
    there = np.isfinite(a + b)
    if not there.any():
        return None, None
    rows = np.column_stack([a, np.broadcast_to(b, a.shape), np.ones(len(a))])[there]
    of = np.unique(blocks[there], return_inverse=True)[1]
    n = of.max() + 1
    sums = np.zeros((n, 3))
    np.add.at(sums, of, rows)
    drawn = sums[np.random.default_rng(0).integers(n, size=(DRAWS, n))].sum(1)  # (draws, 3)
    of_set = METRICS[name].of_set if name in METRICS else np.asarray

    def difference(x: np.ndarray) -> np.ndarray:
        return of_set(x[..., 0] / x[..., 2]) - of_set(x[..., 1] / x[..., 2])

    interval = np.quantile(difference(drawn), [0.025, 0.975]).tolist() if n > 1 else None
    return float(difference(rows.sum(0))), interval


def values_of(name: str, rows: Sequence[dict]) -> np.ndarray:
    """(clips,) with NaN where there is no value."""
    return np.array([row.get(name) for row in rows], float)


def blocks_of(clips: Sequence[str]) -> np.ndarray:
    """20 consecutive clips are a block: by their numbers where the names are numbers."""
    numbers = [int(clip) if clip.isdecimal() else i for i, clip in enumerate(clips)]
    return np.array(numbers) // BLOCK


class Clips(NamedTuple):
    """What is known of a run's clips beside their videos."""

    groups: dict[str, np.ndarray]  # name: (clips,) bool, such as which of them training shows
    values: dict[str, np.ndarray]  # name: (clips,) another value of each


NOTHING = Clips({}, {})


def summarise(
    pairs: list[Pair], config, known: dict[str, list], absent: dict[str, str], what: dict, about: Clips
) -> dict:
    """The contents of metrics.json: all of NAMES, of the set, of each group and of each clip; what made
    them."""
    found = []
    for pair in pairs:
        found.append({name: known_value(known, name, key) for name, key in keys_of(pair, config).items()})
    own, controls = ([{name: v and v[k] for name, v in row.items()} for row in found] for k in (0, 1))
    blocks, metrics = blocks_of([pair.name for pair in pairs]), {}
    for name in NAMES:
        metric, values = METRICS[name], values_of(name, own)
        there = np.isfinite(values)
        entry = dict.fromkeys(("mean", "std", "ci95"))
        entry |= {"chance": metric.chance, "shuffled": None, "n": int(there.sum())}
        entry["weights"] = weights_of(metric, config)
        if there.any():
            v, control = values[there], values_of(name, controls)
            entry["mean"], entry["ci95"] = estimate(name, values, blocks)
            if metric.chance:  # as the papers' ±
                entry["std"] = float(np.sqrt(v * (1 - v) / (config.trials or 100)).mean())
            elif not metric.signed:
                entry["std"] = float(v.std())
            if np.isfinite(control).any():
                entry["shuffled"] = float(metric.of_set(np.nanmean(control)))
        if name not in asked(config):
            entry["reason"] = "not asked for (--metrics)"
        elif not there.all():
            short = sum(row.get(name) == [None, None] for row in found)
            why = f"{short} videos of fewer than {metric.least} frames"
            why = why if short else "videos that are missing or cannot be read"
            counted = f"{(~there).sum()} of {len(there)} clips have no value: {why}"
            entry["reason"] = absent.get(metric.judge, counted)
        metrics[name] = entry
    for name, values in about.values.items():
        for row, value in zip(own, values, strict=True):
            row[name] = float(value)
    rows = [{"clip": pair.name} | row for pair, row in zip(pairs, own, strict=True)]
    groups = {}
    for group, inside in about.groups.items():
        groups[group] = {"clips": [pair.name for pair, here in zip(pairs, inside, strict=True) if here]}
        for name in (*asked(config), *about.values):
            mean, interval = estimate(name, values_of(name, own)[inside], blocks[inside])
            groups[group][name] = {"mean": mean, "ci95": interval}
    how = {"size": config.size, "classifier_frames": config.classifier_frames}
    how |= {"trials": config.trials or "exact", "versions": VERSIONS}
    return {"metrics": metrics, "groups": groups, "clips": rows, "provenance": what | how}


QUOTED = """
cc2017    | Kupershmidt   | 0.771±0.03 | -          | 0.386±0.47 | -          | -          | 0.135±0.08 | 8.761±2.22 | -     | -
cc2017    | MinD-Video    | 0.839±0.03 | 0.197±0.02 | 0.408±0.46 | 0.884±0.08 | 0.901±0.05 | 0.171±0.08 | 8.662±1.52 | 9.045 | 0.1155
cc2017    | Mind-Animator | 0.830      | -          | 0.425      | -          | -          | 0.321      | 9.220      | -     | -
cc2017    | NeuroClips    | 0.834±0.03 | 0.220±0.01 | 0.738±0.17 | 0.926±0.05 | 0.955±0.01 | 0.390±0.08 | 9.211±1.46 | 4.432 | 0.2133
cc2017    | CineNeuron    | 0.850±0.02 | 0.240±0.03 | 0.972±0.01 | 0.954±0.01 | 0.966±0.02 | 0.375±0.06 | 9.476±0.23 | 1.628 | 0.0200
cinebrain | GLFA          | 0.801      | 0.167      | 0.735      | 0.706      | -          | 0.123      | 7.526      | -     | -
cinebrain | CineSync      | 0.893      | 0.307      | 0.945      | 0.907      | 0.974±0.01 | 0.240      | 11.92      | 3.258 | 0.2611
cinebrain | CineSync*     | 0.933±0.02 | 0.324±0.02 | 0.977±0.01 | 0.942±0.01 | 0.973±0.01 | 0.267±0.04 | 16.04±2.35 | -     | -
cinebrain | CineNeuron    | 0.937±0.02 | 0.393±0.03 | 0.988±0.01 | 0.975±0.01 | 0.975±0.01 | 0.271±0.05 | 16.02±2.38 | 2.126 | 0.0649
""".strip()  # noqa: E501  Tables 1 and 2 of the paper
QUOTED_NAMES = "video_2way video_50way clip_pcc dtc ms ssim psnr epe delta_dynamic_degree".split()


def table(rows: list[tuple[str, dict]], data: str) -> str:
    """Rows (label, {metric: mean, (mean, ±) or interval}), and those that the paper prints of this dataset,
    in three blocks of metrics."""

    def cell(x: str | float | tuple | list | None) -> str:
        if isinstance(x, tuple):
            return "n/a" if x[0] is None else cell(x[0]) + ("" if x[1] is None else f"±{x[1]:.2f}")
        if isinstance(x, list):
            return f"[{cell(x[0])}, {cell(x[1])}]"
        return f"{x:.{3 if abs(x) < 10 else 2}f}" if isinstance(x, float) else x or "-"

    quoted = []
    for line in QUOTED.splitlines():
        of, method, *cells = [part.strip().strip("-") or None for part in line.split("|")]
        if of == data:
            quoted.append((f"{method}, quoted from the paper", dict(zip(QUOTED_NAMES, cells, strict=True))))
    lines = []
    for block in BLOCKS:
        names = [name for name in NAMES if METRICS[name].block == block]
        measured, printed = (
            [row for row in of if any(row[1].get(name) is not None for name in names)]
            for of in (rows, quoted)
        )
        if measured:
            titles = [f"{METRICS[name].title} {METRICS[name].better}" for name in names]
            lines += ["", f"{'':<40}" + "".join(f"{title:>17}" for title in titles)]
            for label, cells in measured + printed:
                lines.append(f"{label:<40}" + "".join(f"{cell(cells.get(name)):>17}" for name in names))
    return "\n".join(lines)


def report(
    sets: dict[str, list[Pair]],
    folders: dict[str, Path],
    out: Path,
    config,
    absent: dict[str, str],
    what: dict,
    about: Clips = NOTHING,
) -> tuple[dict[str, dict], str]:
    """metrics.json in each method's folder, and out/metrics.csv. Returns each method's metrics.json, and the
    table for the terminal."""
    known, names, results = known_values(out), asked(config), {}
    rows, reasons = [], {}
    for method, pairs in sets.items():
        result = summarise(pairs, config, known, absent, what | {"method": method}, about)
        write_json(folders[method] / "metrics.json", result)
        results[method], entries = result, {name: result["metrics"][name] for name in names}
        means = {name: (entry["mean"], entry["std"]) for name, entry in entries.items()}
        rows.append((f"{method}, {len(pairs)} clips: mean ±", means))
        rows.append(("   95 % interval", {name: entry["ci95"] for name, entry in entries.items()}))
        control = {name: entry["shuffled"] for name, entry in entries.items()}
        rows.append((f"   {CONTROLS[bool(config.pairs)]}", control))
        for group, of in result["groups"].items():
            means = {name: of[name]["mean"] for name in names}
            rows.append((f"   {group}, {len(of['clips'])} clips", means))
        for name, entry in entries.items():
            if "reason" in entry:
                reasons.setdefault(f"{method}: {entry['reason']}", []).append(name)
    rows.append(("chance", {name: METRICS[name].chance for name in names}))
    with written_whole(out / "metrics.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, "method metric mean std ci95 chance shuffled n weights reason".split())
        writer.writeheader()
        for method, result in results.items():
            writer.writerows(
                {"method": method, "metric": name} | entry for name, entry in result["metrics"].items()
            )
    where = "the stimuli's size" if config.size == "native" else f"{config.size} x {config.size}"
    text = f"\nSSIM, PSNR and EPE at {where} and common frame times; intervals by blocks of {BLOCK} clips"
    text += table(rows, config.data)
    for reason, of in reasons.items():
        text += f"\nn/a or in part, {', '.join(of)}: {reason}"
    return results, text


def pictures(
    out: Path,
    sets: dict[str, list[Pair]],
    results: dict[str, dict],
    texts: Callable[[int], list[str]],
    seconds: float,
    memories: Callable[[int], np.ndarray] | None = None,
    groups: dict[str, np.ndarray] | None = None,
) -> None:
    """out/sheet.png (three moments, as Figures 3 and 4) and grid.gif of six clips, chosen by `spread`;
    ranked.png of the first method's two best, median and worst by 50-way accuracy, or else SSIM. texts(clip)
    stand below the columns, its group in brackets; memories(clip), uint8 (F, H, W, 3), is a second column."""
    pairs = list(zip(*sets.values(), strict=True))
    titles = ["stimulus", *(["top-1 memory"] if memories else []), *sets]
    whole = []  # the clips that have a value by every method
    for i, rows in enumerate(zip(*(result["clips"] for result in results.values()), strict=True)):
        if all(set(row.values()) - {None, row["clip"]} for row in rows):
            whole.append(i)
    if not whole:
        return

    def videos(i: int) -> list[np.ndarray]:  # of the stimulus's size, at most 256 rows
        loaded = [watch(source, seconds) for source in (pairs[i][0].gt, *(pair.pred for pair in pairs[i]))]
        H, W = loaded[0].frames.shape[1:3]
        size = (256, round(W * 256 / H)) if H > 256 else (H, W)
        shown = [video.seen(video.uniform(min(60, len(video))), size) for video in loaded]
        return [shown[0], *([memories(i)] if memories else []), *shown[1:]]

    def words(i: int) -> list[str]:
        first, *others = texts(i)
        return [first + "".join(f" [{name}]" for name, of in (groups or {}).items() if of[i]), *others]

    some = spread(whole, 6, groups)
    rows, below = [videos(i) for i in some], [words(i) for i in some]
    contact_sheet(out / "sheet.png", rows, below, titles)
    grid_gif(out / "grid.gif", rows, below, titles, seconds)

    result = next(iter(results.values()))
    by = "video_50way" if result["metrics"]["video_50way"]["n"] else "ssim"
    values = values_of(by, result["clips"])
    best = sorted((i for i in whole if np.isfinite(values[i])), key=lambda i: values[i], reverse=True)
    N, below = len(best), []
    ranks = sorted({k for k in (0, 1, N // 2 - 1, N // 2, N - 2, N - 1) if 0 <= k < N})
    for k in ranks:
        first, *others = words(best[k])
        below.append([f"{k + 1} of {N}, {METRICS[by].title} {values[best[k]]:.3f}: {first}", *others])
    if ranks:
        contact_sheet(out / "ranked.png", [videos(best[k]) for k in ranks], below, titles)

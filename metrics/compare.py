"""Runs side by side, over subjects and seeds. Every clip is first the mean of the runs' values: intervals are
over clips; the ± of the runs' means is what differs between seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metrics.report import Estimate, blocks_of, estimate, interval, number, table, values_of
from metrics.table import NAMES
from support.readers import advising, check_keys, damaged, read_json


class Runs(NamedTuple):
    """Some runs of one kind. A key is (subject, clip)."""

    name: str
    results: list[dict]  # the metrics.json of each
    rows: dict[tuple, list[dict]]  # key -> the clip's values by each run
    groups: dict[str, set[tuple]]  # by whether training shows their like: the keys of each

    def shared(self, others: "Runs | None" = None, group: str | None = None) -> list[tuple]:
        """The keys of the clips, of a group or all, that the others have, too."""
        members = self.groups[group] if group else self.rows
        return [key for key in self.rows if key in members and (others is None or key in others.rows)]

    def summary(self, metric: str, group: str | None = None) -> tuple[float, float | None] | None:
        """Mean and deviation (None of one) of the runs' values of the set, or of a group of its clips."""
        means, members = [], {*self.shared(group=group)}
        for run in self.results:
            rows = [row for row in run["clips"] if (run["provenance"].get("subject"), row["clip"]) in members]
            if group is None and metric in run["metrics"]:
                means.append(run["metrics"][metric]["mean"])
            else:
                means.append(estimate(metric, values_of(metric, rows), np.zeros(len(rows))).mean)
        means = [mean for mean in means if mean is not None]
        if not means:
            return None
        return float(np.mean(means)), float(np.std(means)) if len(means) > 1 else None

    def less(self, metric: str, others: "Runs | None" = None, group: str | None = None) -> Estimate:
        """The metric less that of others (of none: the metric itself) on the clips that both have, and its
        paired 95 % interval."""
        keys = self.shared(others, group)
        b = others.means(metric, keys) if others else 0.0
        return estimate(metric, self.means(metric, keys), blocks_of([clip for _, clip in keys]), b)

    def means(self, metric: str, keys: Sequence[tuple]) -> np.ndarray:
        """(clips,) of each the mean of the runs' values."""
        return np.array([values_of(metric, self.rows[key]).mean() for key in keys])


def read_runs(name: str, files: Sequence[Path]) -> Runs:
    """Runs of one kind. Raises ValueError where two scored other clips of one subject."""
    runs, scored = Runs(name, [read_metrics(file) for file in files], {}, {}), {}
    for run in runs.results:
        subject, clips = run["provenance"].get("subject"), [row["clip"] for row in run["clips"]]
        if scored.setdefault(subject, clips) != clips:
            counted = f"{len(scored[subject])} and {len(clips)} clips"
            raise ValueError(f"--compare {name}: its runs scored {counted}, wanted the same ones")
        for row in run["clips"]:
            runs.rows.setdefault((subject, row["clip"]), []).append(row)
        for group, about in run["groups"].items():
            runs.groups.setdefault(group, set()).update((subject, clip) for clip in about["clips"])
    return runs


def check_alike(groups: Sequence[Runs]) -> None:
    """Raises ValueError where runs were measured at other sizes or on other frames."""
    options = set()
    for origin in (run["provenance"] for runs in groups for run in runs.results):
        frames = origin.get("classifier_frames", 16)
        options.add(f"--size {origin['size']} --classifier-frames {frames}")
    if len(options) > 1:
        raise ValueError(f"--compare: measured with {', and '.join(sorted(options))}, wanted all alike")


def compare(names: Sequence[str], data: str) -> str:
    """The table: each the mean over its subjects and seeds; the first less each of the rest, clip by clip."""
    every = [read_runs(name, _metrics_files(name, data)) for name in names]
    check_alike(every)
    rows, first = [], every[0]
    for runs in every:
        labels: dict[str | None, str] = {None: f"{runs.name}: mean ± over {len(runs.results)} runs"}
        labels |= {group: f"   {group}, {len(runs.shared(group=group))} clips" for group in runs.groups}
        for group, label in labels.items():
            summaries = {metric: runs.summary(metric, group) for metric in NAMES}
            rows.append((label, {metric: number(*pair) for metric, pair in summaries.items() if pair}))
    for runs in every:
        second = None if runs.name == first.name else runs
        means, intervals = {}, {}
        for metric in NAMES:
            less = first.less(metric, second)
            means[metric] = number(less.mean)
            intervals[metric] = interval(less.ci95)
        clips = f"{len(first.shared(second))} clips"
        rows.append((f"{first.name} less {runs.name}, {clips}" if second else f"   {clips}", means))
        rows.append(("   95 % interval, paired" if second else "   95 % interval", intervals))
    return table(rows, data)


def _metrics_files(name: str, data: str) -> list[Path]:
    """Of a run's name (NAME, NAME/eval-shuffled) all its subjects and seeds; or of a folder."""
    base, _, kind = name.partition("/")
    pattern = f"sub*/{base}-s[0-9]*/{kind or 'eval'}/metrics.json"
    files = sorted(Path("runs", data).glob(pattern))
    if Path(name).is_dir():
        files = [*Path(name).glob("metrics.json"), *Path(name).glob("eval/metrics.json")][:1]
    if not files:
        place = f"runs/{data}/{pattern}"
        raise FileNotFoundError(f"--compare {name}: no metrics.json there, nor in {place}")
    return files


def read_metrics(file: Path) -> dict:
    """metrics.json, checked; "groups" is empty in older ones. Raises ValueError naming the file."""

    def check(values: object, place: str, keys: dict) -> None:
        if not isinstance(values, dict):
            raise damaged(file, values, f"an object in its {place}")
        check_keys(values, f"{file}, {place}", keys)

    optional = (float, type(None))
    with advising("python evaluate.py makes it anew"):
        kinds = {"metrics": dict, "groups": dict, "clips": list, "provenance": dict}
        result = check_keys({"groups": {}} | read_json(file), file, kinds)
        check(result["provenance"], "provenance", {"size": str})
        for name in result["metrics"].keys() & set(NAMES):
            check(result["metrics"][name], name, {"mean": optional})
        for name, group in result["groups"].items():
            check(group, f"groups, {name}", {"clips": list})
            if not all(isinstance(clip, str) for clip in group["clips"]):
                raise damaged(file, group["clips"], "names of clips")
        for row in result["clips"]:
            check(row, "clips", {"clip": str})
            check(row, "clips", {name: optional for name in NAMES if name in row})
    return result

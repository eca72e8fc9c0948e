"""Runs side by side, over their subjects and seeds: evaluate.py --compare, extras/ablations.py.

Every clip is first the mean of the runs' values, so that intervals are over clips, drawn in blocks; what
differs between seeds is the ± of the runs' means.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metrics.report import blocks_of, estimate, table, values_of
from metrics.table import NAMES
from support.readers import check_keys, damaged, read_json


class Runs(NamedTuple):
    """Some runs of one kind."""

    name: str
    results: list[dict]  # the metrics.json of each
    rows: dict[tuple, list[dict]]  # (subject, clip) -> the clip's values by each run

    def inside(self, group: str | None) -> set[tuple]:
        """The keys of the clips of a group, None: of all."""
        if group is None:
            return set(self.rows)
        named = {(run["provenance"].get("subject"), _groups(run).get(group, ())) for run in self.results}
        return {(subject, clip) for subject, clips in named for clip in clips}

    def summary(self, metric: str, group: str | None = None) -> tuple[float, float | None] | None:
        """Mean of the runs' values of the set, or of a group of its clips, and their standard deviation (None
        for one run); None where no run has a value."""
        means = []
        for run in self.results:
            if group is None and metric in run["metrics"]:
                means.append(run["metrics"][metric]["mean"])
                continue
            within = {row["clip"] for row in run["clips"]} if group is None else _groups(run).get(group, ())
            values = values_of(metric, [row for row in run["clips"] if row["clip"] in within])
            means.append(estimate(metric, values, np.zeros(len(values)))[0])
        means = [mean for mean in means if mean is not None]
        return (float(np.mean(means)), float(np.std(means)) if len(means) > 1 else None) if means else None

    def less(
        self, metric: str, other: "Runs | None" = None, group: str | None = None
    ) -> tuple[float | None, list[float] | None]:
        """The metric less that of the other runs (of none: the metric itself) on the clips that both have,
        and its paired 95 % interval."""
        keys = self.shared(other, group)
        a, b = (
            np.array([values_of(metric, of.rows[key]).mean() for key in keys]) if of else 0.0
            for of in (self, other)
        )
        return estimate(metric, a, blocks_of([clip for _, clip in keys]), b)

    def shared(self, other: "Runs | None", group: str | None = None) -> list[tuple]:
        """The keys of the clips, of a group or all, that the others have, too."""
        within = self.inside(group)
        return [key for key in self.rows if key in within and (other is None or key in other.rows)]


def _groups(run: dict) -> dict[str, tuple[str, ...]]:
    """{name: clips} of a metrics.json, whether training shows their like; older ones have none."""
    return {name: tuple(of["clips"]) for name, of in run.get("groups", {}).items()}


def read_runs(name: str, files: Sequence[Path]) -> Runs:
    """Runs of one kind from their metrics.json. Raises ValueError where two scored other clips of one
    subject, or measured otherwise."""
    results, clips, rows = [read_metrics(file) for file in files], {}, {}
    for run in results:
        subject, scored = run["provenance"].get("subject"), [row["clip"] for row in run["clips"]]
        if clips.setdefault(subject, scored) != scored:
            counted = f"{len(clips[subject])} and {len(scored)} clips"
            raise ValueError(f"--compare {name}: its runs scored {counted}, wanted the same ones")
        for row in run["clips"]:
            rows.setdefault((subject, row["clip"]), []).append(row)
    return Runs(name, results, rows)


def check_alike(groups: Sequence[Runs]) -> None:
    """Raises ValueError where runs were measured at other sizes or on other frames."""
    how = set()
    for run in (run for runs in groups for run in runs.results):
        about = run["provenance"]
        how.add(f"--size {about['size']} --classifier-frames {about.get('classifier_frames', 16)}")
    if len(how) > 1:
        raise ValueError(f"--compare: measured with {', and '.join(sorted(how))}, wanted all alike")


def compare(names: Sequence[str], data: str) -> str:
    """Runs side by side, each the mean over its subjects and seeds; the first less each other, clip by clip.
    Returns the table. Raises FileNotFoundError, ValueError."""
    groups = [read_runs(name, _metrics_files(name, data)) for name in names]
    check_alike(groups)
    rows, first = [], groups[0]
    for runs in groups:
        cells = {metric: runs.summary(metric) for metric in NAMES}
        label = f"{runs.name}: mean ± over {len(runs.results)} runs"
        rows.append((label, {metric: cell for metric, cell in cells.items() if cell}))
        for group in _groups(runs.results[0]):
            cells = {metric: runs.summary(metric, group) for metric in NAMES}
            label = f"   {group}, {len(runs.inside(group))} clips"
            rows.append((label, {metric: cell for metric, cell in cells.items() if cell}))
    for runs in groups:
        other = None if runs.name == first.name else runs
        less = {metric: first.less(metric, other) for metric in NAMES}
        clips = len(first.shared(other))
        label = f"{first.name} less {runs.name}, {clips} clips" if other else f"   {clips} clips"
        rows.append((label, {metric: mean for metric, (mean, _) in less.items()}))
        interval = {metric: ci95 for metric, (_, ci95) in less.items()}
        rows.append(("   95 % interval" + (", paired" if other else ""), interval))
    return table(rows, data)


def _metrics_files(name: str, data: str) -> list[Path]:
    """Of a run's name (NAME, NAME/eval-shuffled) all its subjects and seeds; or of a folder."""
    base, _, kind = name.partition("/")
    kind = kind or "eval"
    files = sorted(Path("runs", data).glob(f"sub*/{base}-s[0-9]*/{kind}/metrics.json"))
    if Path(name).is_dir():
        places = Path(name, "metrics.json"), Path(name, "eval", "metrics.json")
        files = [file for file in places if file.is_file()][:1]
    if not files:
        raise FileNotFoundError(
            f"--compare {name}: no metrics.json there, nor in runs/{data}/sub*/{base}-s*/{kind}/"
        )
    return files


def read_metrics(file: Path) -> dict:
    """metrics.json, checked. Raises ValueError naming the file."""
    mend = "python evaluate.py makes it anew"
    result = read_json(file, keys={"metrics": dict, "clips": list, "provenance": dict}, mend=mend)
    check_keys(result["provenance"], f"{file}, provenance", {"size": str}, mend)
    number, entries = (float, type(None)), result["metrics"]
    check_keys(entries, f"{file}, metrics", {name: dict for name in NAMES if name in entries}, mend)
    for name in entries.keys() & set(NAMES):
        check_keys(entries[name], f"{file}, {name}", {"mean": number}, mend)
    groups = result.get("groups", {})
    check_keys(result, str(file), {"groups": dict} if "groups" in result else {}, mend)
    check_keys(groups, f"{file}, groups", dict.fromkeys(groups, dict), mend)
    for name, of in groups.items():
        check_keys(of, f"{file}, groups, {name}", {"clips": list}, mend)
        if not all(isinstance(clip, str) for clip in of["clips"]):
            raise damaged(file, of["clips"], "names of clips", mend)
    for row in result["clips"]:
        if not isinstance(row, dict):
            raise damaged(file, row, "an object a clip", mend)
        keys = {"clip": str} | {name: number for name in NAMES if name in row}
        check_keys(row, f"{file}, clips", keys, mend)
    return result

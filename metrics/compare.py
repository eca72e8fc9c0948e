"""Runs side by side, over subjects and seeds. The ± of the runs' means is what differs between them; their
intervals are over clips and runs: where a mean would lie on other clips, from other seeds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metrics.intervals import Difference, blocks_of, difference, estimate, remark
from metrics.report import beside_quoted, interval, number, table, values_of
from metrics.table import METRICS, NAMES
from prepare.facts import stimuli_folder
from support.readers import check_keys, read_json, reading


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
        return float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else None

    def less(self, metric: str, others: "Runs | None" = None, group: str | None = None) -> Difference:
        """The metric less that of others (of none: the metric itself) on the clips that both have, and its
        paired 95 % interval."""
        keys = self.shared(others, group)
        b = others.values(metric, keys) if others else 0.0
        return difference(metric, self.values(metric, keys), self.blocks(keys), b)

    def values(self, metric: str, keys: Sequence[tuple]) -> np.ndarray:
        """(runs, clips), NaN where a subject has fewer runs than another, and where a run has no value."""
        most = max((len(self.rows[key]) for key in keys), default=1)
        values = np.full((most, len(keys)), np.nan)
        for i, key in enumerate(keys):
            of_runs = values_of(metric, self.rows[key])
            if np.isfinite(of_runs).all():
                values[: len(of_runs), i] = of_runs
        return values

    def blocks(self, keys: Sequence[tuple]) -> np.ndarray:
        """(clips,) of each its block; subjects who saw one film share its blocks."""
        data = self.results[0]["provenance"].get("data", "")
        numbers = blocks_of([clip for _, clip in keys], data)
        films = [stimuli_folder(data, subject or 1) for subject, _ in keys]
        return np.array([f"{film} {number}" for film, number in zip(films, numbers, strict=True)], str)

    def memory(self) -> "Runs | None":
        """The best memory of each clip, played, as if a run had made it; None where not all runs have it."""
        results = [
            run["memory"] | {"provenance": run["provenance"]} for run in self.results if run.get("memory")
        ]
        return joined(f"{self.name}, its memory", results) if len(results) == len(self.results) else None


def read_runs(name: str, files: Sequence[Path]) -> Runs:
    """Runs of one kind, from the metrics.json of each."""
    return joined(name, [read_metrics(file) for file in files])


def joined(name: str, results: list[dict]) -> Runs:
    """Runs of one kind. Raises ValueError where two scored other clips of one subject."""
    runs, scored = Runs(name, results, {}, {}), {}
    for run in runs.results:
        subject, clips = run["provenance"].get("subject"), [row["clip"] for row in run["clips"]]
        if scored.setdefault(subject, clips) != clips:
            counted = f"{len(scored[subject])} and {len(clips)} clips"
            raise ValueError(f"--compare {name}: its runs scored {counted}, wanted the same ones")
        for row in run["clips"]:
            runs.rows.setdefault((subject, row["clip"]), []).append(row)
        for group, about in run.get("groups", {}).items():
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


def compare(names: Sequence[str], data: str, subject: int | None = None, seed: int | None = None) -> str:
    """The table: each the mean over its subjects and seeds, or of one of them; the first less each of the
    rest, and each less its best memory, clip by clip."""
    every = [_runs(name, data, {"subject": subject, "seed": seed}) for name in names]
    check_alike(every)
    rows, first = [], every[0]
    for runs in every:
        n, memory = len(runs.results), runs.memory()
        over = f"mean ± over {n} runs" if n > 1 else "1 run"
        rows.append((f"{runs.name}, {len(runs.rows)} clips: {over}", _means(runs)))
        rows.append((f"   95 % interval of {runs.name}", _less(runs, None)[1]))
        for group in runs.groups:
            rows.append((f"   {group}, {len(runs.shared(group=group))} clips", _means(runs, group)))
        if memory:
            rows.append(("   best memory, played", _means(memory)))
    differences = [(first, runs, runs.name) for runs in every[1:]]
    differences += [(runs, memory, "its memory") for runs in every if (memory := runs.memory())]
    for runs, others, name in differences:
        means, intervals = _less(runs, others)
        rows.append((f"{runs.name} less {name}, {len(runs.shared(others))} clips", means))
        rows.append(("   95 % interval, paired", intervals))
    rows.append(("chance", {name: number(METRICS[name].chance) for name in _means(first)}))
    origins = [(run["provenance"], len(run["clips"])) for runs in every for run in runs.results]
    beside = min(beside_quoted(data, *origin) for origin in origins)
    return f"{table(rows, beside)}\n\n{remark(first.blocks(first.shared()))}, and runs"


def _means(runs: Runs, group: str | None = None) -> dict[str, str]:
    summaries = {metric: runs.summary(metric, group) for metric in NAMES}
    return {metric: number(*pair) for metric, pair in summaries.items() if pair}


def _less(runs: Runs, others: Runs | None) -> tuple[dict[str, str], dict[str, str]]:
    """Of each metric the text of `Runs.less`: the mean, the interval."""
    means, intervals = {}, {}
    for metric in NAMES:
        mean, ci95, _ = runs.less(metric, others)
        means[metric], intervals[metric] = number(mean), interval(ci95)
    return means, intervals


def _runs(name: str, data: str, only: dict[str, int | None]) -> Runs:
    """The runs of a name, of `only` this subject and seed. Raises ValueError where there is none."""
    runs = read_runs(name, _metrics_files(name, data))
    wanted = {key: number for key, number in only.items() if number is not None}
    results = [run for run in runs.results if wanted.items() <= run["provenance"].items()]
    if not results:
        options = " ".join(f"--{key} {number}" for key, number in wanted.items())
        raise ValueError(f"--compare {name} {options}: none of its {len(runs.results)} runs is of these")
    return joined(name, results)


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
    """metrics.json; "groups" is empty in older ones. Summing it up finds what is damaged: raises ValueError
    naming the file."""
    with reading(file, "what evaluate.py writes", "python evaluate.py makes it anew"):
        kinds = {"metrics": dict, "groups": dict, "clips": list, "provenance": dict}
        result = check_keys({"groups": {}} | read_json(file), file, kinds)
        json.dumps(result, allow_nan=False)  # every number is finite
        runs = joined(str(file), [result])
        check_alike([runs])
        for part in filter(None, (runs, runs.memory())):
            part.blocks(part.shared())
            for metric in NAMES:
                part.summary(metric)
                part.values(metric, part.shared())
    return result

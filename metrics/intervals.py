"""95 % intervals of a set of clips. Neighbours are alike, so that blocks of clips are what is independent."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from metrics.table import METRICS
from prepare.facts import DATASETS

BLOCK, FEWEST = 20, 6  # clips of a block; blocks that an interval needs


class Estimate(NamedTuple):
    mean: float | None
    ci95: list[float] | None  # the 95 % interval


class Difference(NamedTuple):
    more: float | None
    ci95: list[float] | None
    freedom: float | None = None  # how many independent values the interval rests on, less one


def blocks_of(clips: Sequence[str], data: str = "") -> np.ndarray:
    """(clips,) the number of each clip's block: 20 consecutive clips of a segment of the test set, or the
    rest of it. By their numbers where the names are numbers."""
    numbers = np.array([int(clip) if clip.isdecimal() else i for i, clip in enumerate(clips)], int)
    length = DATASETS[data].test[1] if data in DATASETS else BLOCK
    return numbers // length * -(-length // BLOCK) + numbers % length // BLOCK


def remark(blocks: np.ndarray) -> str:
    """How the intervals are had, or why there are none."""
    n, by = len(np.unique(blocks)), f"intervals by blocks of {BLOCK} clips"
    return by if n >= FEWEST else f"{by} are n/a: {n} of them, wanted {FEWEST}"


def interval(mean: float, variances: Sequence[float], freedoms: Sequence[float]) -> Difference:
    """Of a mean with these variances, to be added, each with its degrees of freedom (Satterthwaite's t)."""
    parts = np.array(variances)
    doubt = np.sum(parts**2 / freedoms)
    freedom = float(parts.sum() ** 2 / doubt) if doubt > 0 else float(min(freedoms))
    half = t.ppf(0.975, freedom) * parts.sum() ** 0.5
    return Difference(float(mean), [float(mean - half), float(mean + half)], freedom)


def pooled(estimates: Sequence[Difference]) -> Difference:
    """The mean of independent ones, such as of two films. No interval where one has none."""
    if any(one.more is None for one in estimates):
        return Difference(None, None)
    n, mean = len(estimates), np.mean([one.more for one in estimates])
    if not all(one.ci95 and one.freedom for one in estimates):
        return Difference(float(mean), None)
    errors = [(one.ci95[1] - one.ci95[0]) / 2 / t.ppf(0.975, one.freedom) for one in estimates]
    return interval(mean, [(error / n) ** 2 for error in errors], [one.freedom for one in estimates])


def of_mean(clips: np.ndarray, runs: np.ndarray, blocks: np.ndarray) -> Difference:
    """The mean of `clips` (clips,), and its interval over other clips and other seeds, where `runs` (runs,)
    are the means of single runs. The clips' part is the jackknife: how the mean moves without each block. It
    holds the runs' noise, too, so that the sum errs to the wide side."""
    _, numbers, counts = np.unique(blocks, return_inverse=True, return_counts=True)
    n = len(counts)
    if n < FEWEST:
        return Difference(float(clips.mean()), None)
    without = (clips.sum() - np.bincount(numbers, clips)) / (len(clips) - counts)  # (blocks,)
    variances, freedoms = [(n - 1) / n * np.sum((without - clips.mean()) ** 2)], [n - 1]
    if len(runs) > 1:
        variances.append(runs.var(ddof=1) / len(runs))
        freedoms.append(len(runs) - 1)
    return interval(clips.mean(), variances, freedoms)


def estimate(name: str, a: np.ndarray, blocks: np.ndarray, b: np.ndarray | float = 0.0) -> Estimate:
    """`difference` without its degrees of freedom."""
    return Estimate(*difference(name, a, blocks, b)[:2])


def difference(name: str, a: np.ndarray, blocks: np.ndarray, b: np.ndarray | float = 0.0) -> Difference:
    """A metric of the set from its clips' values a, (clips,) or of several runs (runs, clips), less that of
    b; NaN where there is none. The interval is paired, and None for fewer than six blocks. Of a `name` not in
    METRICS the set's value is the mean."""
    sides = [np.atleast_2d(a), np.atleast_2d(np.broadcast_to(b, a.shape) if np.ndim(b) == 0 else b)]
    finite = np.isfinite(sides[0]).any(0) & np.isfinite(sides[1]).any(0)
    if not finite.any():
        return Difference(None, None)
    clips = [np.nanmean(side[:, finite], 0) for side in sides]
    runs = [side[: min(map(len, sides)), finite].mean(1) for side in sides]  # NaN of one that lacks a clip
    complete = np.isfinite(runs[0] + runs[1])

    def less(sign_a: float, sign_b: float) -> Difference:
        values, means = (sign_a * of[0] - sign_b * of[1] for of in (clips, runs))
        return of_mean(values, means[complete], blocks[finite])

    metric = METRICS.get(name)
    signs = [(1,), (1,)]
    if metric and metric.signed:  # the set's value is the absolute mean: the signs that each side leaves open
        for i, (mean, ci95, _) in enumerate((less(1, 0), less(0, -1))):
            sign = -1 if mean < 0 else 1
            signs[i] = (sign, -sign) if ci95 and ci95[0] <= 0 <= ci95[1] else (sign,)
    possible = [less(*pair) for pair in product(*signs)]
    if possible[0].ci95 is None:
        return possible[0]
    low, high = np.array([of.ci95 for of in possible]).T
    ends = np.array([low.min(), high.max()])
    if metric and np.ndim(b) == 0:  # no accuracy exceeds 1
        ends = ends.clip(0 if metric.signed else metric.bounds[0], metric.bounds[1])
    return possible[0]._replace(ci95=ends.tolist())

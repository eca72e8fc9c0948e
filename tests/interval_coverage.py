"""How often does a 95 % interval hold the truth? Simulated films, by hand: python tests/interval_coverage.py

Scenes are four clips long, or cc2017's two to fourteen, across blocks. A value is a 50-way accuracy, most near 0 or 1.
The other row's model is a little better, and sees the same clips."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).parents[1]))
from metrics.intervals import BLOCK, estimate  # noqa: E402

FILMS, DRAWS = 2000, 500
# blocks of a film
STRUCTURES = {"toy film": 8, "its never-shown half": 8, "two films": 16, "cc2017": 60, "slow drift": 60}
RNG = np.random.default_rng(0)


def latents(structure: str, clips: int) -> np.ndarray:
    """(films, clips) normal, half of the variance shared by the clips of a scene, or by about 25 neighbours."""
    of_scenes = np.zeros((FILMS, clips))
    if "drift" in structure:
        x = RNG.normal(size=FILMS)
        for i in range(clips):
            x = 0.92 * x + (1 - 0.92**2) ** 0.5 * RNG.normal(size=FILMS)
            of_scenes[:, i] = x
    else:
        lengths = RNG.integers(2, 15, clips) if "cc2017" in structure else np.full(clips, 4)
        scene_of = np.repeat(np.arange(clips), lengths)[:clips]
        of_scenes = RNG.normal(size=(FILMS, clips))[:, scene_of]
    return 0.5**0.5 * (of_scenes + RNG.normal(size=(FILMS, clips)))


def accuracies(z: np.ndarray, other: float, better: float) -> np.ndarray:
    """`other`: the share of the model's own luck in the latents z."""
    return expit(4 * ((1 - other**2) ** 0.5 * z + other * RNG.normal(size=z.shape) + better) - 2)


def bootstraps(sums: np.ndarray, counts: np.ndarray) -> list[list[float]]:
    """Over blocks; sums, counts (blocks,): the percentile interval, and bootstrap-t, with the quantiles of
    (drawn mean - mean) / its standard error in place of those of t."""

    def mean_and_error(s, c):
        mean, n = s.sum(-1) / c.sum(-1), s.shape[-1]
        residuals = (s - mean[..., None] * c) / c.sum(-1)[..., None]
        return mean, (n / (n - 1) * (residuals**2).sum(-1)) ** 0.5

    drawn = RNG.integers(len(sums), size=(DRAWS, len(sums)))
    (mean, error), (means, errors) = mean_and_error(sums, counts), mean_and_error(sums[drawn], counts[drawn])
    low, high = np.quantile((means - mean) / np.maximum(errors, 1e-9), [0.025, 0.975])
    return [np.quantile(means, [0.025, 0.975]).tolist(), [mean - high * error, mean - low * error]]


def show(structure: str, label: object, x: np.ndarray, truth: float, intervals: Callable) -> None:
    """The share of the films x whose `intervals` hold the truth, such as the mean of all films."""
    holds = [[low <= truth <= high for low, high in intervals(film)] for film in x]
    shares = "".join(f"{share:>13.3f}" for share in np.mean(holds, 0))
    print(f"{structure:<22}{label:<11}{shares}", flush=True)


def of_clips(film: np.ndarray, half: bool) -> list[list[float]]:
    blocks = np.arange(len(film)) // BLOCK
    if half:
        chosen = RNG.random(len(film)) < 0.5
        film, blocks = film[chosen], blocks[chosen]
    return [*bootstraps(np.bincount(blocks, film), np.bincount(blocks)), estimate("", film, blocks).ci95]


def of_seeds(film: np.ndarray) -> list[list[float]]:
    """film (seeds, clips): by the clips alone, and by both"""
    blocks = np.arange(film.shape[1]) // BLOCK
    return [estimate("", values, blocks).ci95 for values in (film.mean(0), film)]


def over_clips() -> None:
    print(f"{'':<22}{'value':<14}percentile  bootstrap-t  t on blocks")
    for structure, n in STRUCTURES.items():
        z = latents(structure, n * BLOCK)
        values = accuracies(z, 0.6, 0.0)
        for value, x in {"accuracy": values, "difference": accuracies(z, 0.6, 0.1) - values}.items():
            show(structure, value, x, x.mean(), partial(of_clips, half="half" in structure))


def over_seeds() -> None:
    """Differences of two rows, three seeds each: a seed's training moves all its clips."""
    print(f"\n{'three seeds':<22}{'deviation':<14} clips alone  clips and seeds")
    for structure, n in STRUCTURES.items():
        for deviation in (0.0, 0.02, 0.05):  # of the seeds' differences
            z = latents(structure, n * BLOCK)
            a, b = (np.stack([accuracies(z, 0.6, better) for _ in range(3)], 1) for better in (0.1, 0.0))
            x = a - b  # (films, seeds, clips)
            show(structure, deviation, x + deviation * RNG.normal(size=(FILMS, 3, 1)), x.mean(), of_seeds)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    over_clips()
    over_seeds()

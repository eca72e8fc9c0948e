"""How often does a 95 % interval hold the truth? Simulated films, by hand: python tests/interval_coverage.py

The toy's scenes are four clips long, cc2017's two to fourteen, across the blocks' borders. A value is a 50-way accuracy:
most near 0 or 1. The other row's model is a little better, and sees the same clips."""

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.special import expit

sys.path.insert(0, str(Path(__file__).parents[1]))
from metrics.intervals import BLOCK, estimate  # noqa: E402

FILMS = 2000
STRUCTURES = {
    "toy film, 8 blocks": 8,
    "its never-shown half": 8,
    "two films, 16": 16,
    "cc2017, 60": 60,
    "60, slow drift": 60,
}
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


def share_held(films: np.ndarray, truth: float) -> float:
    """Of films (films, clips) or (films, seeds, clips), NaN where a clip is left out: whose interval holds the truth?"""
    blocks, held = np.arange(films.shape[-1]) // BLOCK, 0
    for film in films:
        low, high = estimate("", film, blocks).ci95
        held += low <= truth <= high
    return held / len(films)


def main() -> None:
    print(
        "one seed: an accuracy, a difference; a difference of three seeds, which varies by 0, 0.02, 0.05 between"
    )
    print("them as a training moves all its clips: the interval of the clips alone, that of clips and seeds")
    for structure, n in STRUCTURES.items():
        z = latents(structure, n * BLOCK)
        accuracy = accuracies(z, 0.6, 0.0)
        shares = []
        for x in (accuracy, accuracies(z, 0.6, 0.1) - accuracy):
            left_out = "half" in structure and RNG.random(x.shape) < 0.5
            shares.append(share_held(np.where(left_out, np.nan, x), x.mean()))
        alone, of_both = [], []
        for deviation in (0.0, 0.02, 0.05):
            a, b = (np.stack([accuracies(z, 0.6, better) for _ in range(3)], 1) for better in (0.1, 0.0))
            x = a - b + deviation * RNG.normal(size=(FILMS, 3, 1))  # (films, seeds, clips)
            alone.append(share_held(x.mean(1), (a - b).mean()))
            of_both.append(share_held(x, (a - b).mean()))
        row = [", ".join(f"{share:.3f}" for share in column) for column in (shares, alone, of_both)]
        print(f"{structure:<22}{row[0]:<16}{row[1]:<23}{row[2]}", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()

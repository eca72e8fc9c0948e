"""Which haemodynamic delay fits the recordings? Ask the data, on training segments only.

    python extras/delay.py --data cc2017 --subject 1      a table, and data/cc2017/sub1/delay.png

For each shift the CLIP features of a clip's mean frame predict the responses that many clips later, by ridge
regression from all training segments but one to that one. The right shift is where voxels are predicted best.
0 is what was prepared: `python data.py ... --delay D` adds D volumes. Where no shift stands out from the
spread over tenths of the recordings, or the best is the last one tried, nothing is decided. The idea:
encoding models (Naselaris et al. 2011, NeuroImage 56).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import Clips  # noqa: E402
from prepare.copies import mean_frames  # noqa: E402
from prepare.facts import SIZES  # noqa: E402
from support.files import write_json  # noqa: E402
from support.options import option, parse  # noqa: E402
from support.pictures import curves  # noqa: E402
from support.runs import door  # noqa: E402


@dataclass
class Config:
    data: str = option("toy", ", ".join(SIZES))
    subject: int = option(1, "K", least=1)
    rois: str | None = option(None, "regions, such as visual (default: every voxel prepared)")
    least: int = option(-4, "smallest shift, in clips", least=-20, most=20)
    most: int = option(4, "largest shift, in clips", least=-20, most=20)
    ridge: float = option(10.0, "weight of the penalty, in units of the features' variance", above=0)
    best: int = option(500, "the curve is the mean over so many voxels, those predicted best", least=1)


PARTS = 10  # of the recordings: how much a correlation differs between them says how far to trust it
CLEAR = 3.0  # standard errors by which the best shift must exceed each other one


def correlations(x: np.ndarray, y: np.ndarray, segments: np.ndarray, shift: int, ridge: float) -> np.ndarray:
    """(parts, N) whose mean is the Pearson correlation, over all segments, of the responses y (clips, N) with
    what the features x (clips, D) of `shift` clips before predict; a segment is predicted by the others."""
    pairs = []  # of each segment (features, responses)
    for name in dict.fromkeys(segments):
        (clips,) = np.nonzero(segments == name)
        n = len(clips) - abs(shift)
        if n > 0:
            pairs.append((x[clips][max(0, -shift) :][:n], y[clips][max(0, shift) :][:n]))
    if len(pairs) < 2 or sum(len(features) for features, _ in pairs) < PARTS:
        wanted = "at least two training segments that are longer: give --least, --most"
        raise ValueError(f"a shift of {shift} clips: wanted {wanted}")
    grams = [features.T @ features for features, _ in pairs]  # (D, D) each
    products = [features.T @ truth for features, truth in pairs]  # (D, N) each
    gram, product, guesses = sum(grams), sum(products), []
    penalty = (ridge * np.trace(gram) / len(gram) / 100 or 1) * np.eye(len(gram), dtype=gram.dtype)
    for k, (features, _) in enumerate(pairs):
        weights = np.linalg.solve(gram - grams[k] + penalty, product - products[k])  # (D, N)
        guesses.append(features @ weights)
    guess, truth = np.concatenate(guesses), np.concatenate([truth for _, truth in pairs])
    guess, truth = guess - guess.mean(0), truth - truth.mean(0)
    norms = np.linalg.norm(guess, axis=0) * np.linalg.norm(truth, axis=0)
    products = guess * truth / np.maximum(norms, 1e-12)  # their sum is r
    return np.stack([PARTS * part.sum(0) for part in np.array_split(products, PARTS)])


def decide(curves: np.ndarray, shifts: list[int]) -> tuple[int, str]:
    """curves (shifts, parts) -> the best shift, and why it is not decided, or ""."""
    best = curves.mean(1).argmax()
    gaps = np.delete(curves[best] - curves, best, 0)  # (shifts - 1, parts)
    error = gaps.std(1, ddof=1) / np.sqrt(gaps.shape[1])
    if not (gaps.mean(1) > CLEAR * error).all():
        return shifts[best], "no shift stands out from the others"
    edge = best in (0, len(shifts) - 1)
    return shifts[best], "the best shift is the last one tried: widen --least, --most" if edge else ""


def main(config: Config) -> None:
    if config.least > config.most:
        raise ValueError(f"--least {config.least} --most {config.most}: wanted the smaller first")
    train = Clips(config.data, config.subject, "train", config.rois)
    segments = np.array([clip["segment"] for clip in train.lines])
    responses = []  # (N,) of each clip: the mean over the showings that were recorded, and over its volumes
    for fmri, recorded in zip(train.fmri, train.recorded, strict=True):
        responses.append(fmri[recorded][..., train.voxels].mean((0, 1)))
    x, y = mean_frames(train.e_img), np.stack(responses)  # (clips, D) (clips, N)
    x -= x.mean(0)
    shifts = list(range(config.least, config.most + 1))
    r = np.stack([correlations(x, y, segments, k, config.ridge) for k in tqdm(shifts, unit="shift")])
    chosen = np.argsort(-r.mean(1).max(0))[: config.best]
    of_parts = r[:, :, chosen].mean(2)  # (shifts, parts)
    curve, spread = of_parts.mean(1), of_parts.std(1, ddof=1) / np.sqrt(of_parts.shape[1])  # (shifts,) each
    best, doubt = decide(of_parts, shifts)
    print(f"{'shift, clips':>14}{'mean r':>9}   of {len(chosen)} voxels, training segments only")
    for shift, value, error in zip(shifts, curve, spread, strict=True):
        mark = "   best" if shift == best and not doubt else ""
        print(f"{shift:>14}{value:>9.3f} +- {error:.3f}{mark}")
    advice = f"Prepare again with a delay that is {best:+d} clips longer."
    print(f"Not decided: {doubt}." if doubt else advice if best else "0 is what was prepared.")
    folder = train.folder
    result = {"shifts": shifts, "mean_r": curve.tolist(), "spread": spread.tolist(), "voxels": len(chosen)}
    result |= {"best": None if doubt else best, "not decided": doubt}
    write_json(folder / "delay.json", result)
    points = {f"mean of {len(chosen)} voxels": (shifts, curve)}
    verdict = "not decided" if doubt else f"the shift that fits is {best}"
    title = f"{config.data}, subject {config.subject}: {verdict}"
    x_label, y_label = "shift of the responses, in clips", "correlation with the prediction"
    curves(folder / "delay.png", points, title=title, xlabel=x_label, ylabel=y_label)
    print(f"written: {folder}/ (delay.png, delay.json)")


if __name__ == "__main__":
    door(lambda: main(parse(Config, dict.fromkeys(SIZES, {}), __doc__, "extras/delay.py", sys.argv[1:])))

"""Stage 1's table: what can be retrieved from the fMRI of held-out clips.

top-1, top-5    share of the clips whose own embedding is the most similar to the prediction, or among the
                five most similar, of all clips. Chance: 1 / clips, 5 / clips
50-way          share where it is the most similar among itself and 49 clips of other scenes: exactly, the
                mean over all ways to draw them. Chance: 1 / 50. Left out where there are fewer than 49
category mAP    mean over the categories of the average precision. Chance: their frequency
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import hypergeom
from torch import Tensor, nn
from tqdm import tqdm

from prepare.copies import far_apart

WAYS = 50


def retrieval(f: Tensor, e: Tensor, far: np.ndarray, n: int = WAYS) -> dict[str, float]:
    """top-1, top-5 and n-way of f (clips, D) against the clips' own e (clips, D). far (clips, clips) bool:
    which clips (columns) may be drawn beside a clip (row); no n-way where they are fewer than n - 1. Among
    equals (clips of one caption) the first two take one at random: their expectation. Raises ValueError where
    f is not finite."""
    f, e = (nn.functional.normalize(vectors, dim=-1) for vectors in (f, e))
    S = (f @ e.T).double().numpy().round(6)  # (clips, clips); what is equal up to rounding is equally similar
    if not np.isfinite(S).all():
        raise ValueError("the Brain Model's output is not finite: train it again with a lower --lr")
    correct = S.diagonal()[:, None]  # (clips, 1)
    better = (S > correct).sum(1)  # (clips,)
    equal = (S == correct).sum(1)  # (clips,) itself, too
    rows = {f"top-{m}": float(np.clip((m - better) / equal, 0, 1).mean()) for m in (1, 5)}
    candidates = far.sum(1)  # (clips,)
    above = (far & (S >= correct)).sum(1)  # (clips,) of n - 1 drawn none may be among these
    if candidates.min() >= n - 1:
        rows[f"{n}-way"] = float(hypergeom.cdf(0, candidates, above, n - 1).mean())
    return rows


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the categories (columns) that occur of the precision at each positive clip, best first."""
    precisions = []
    for score, true in zip(scores.T, truth.T.astype(bool), strict=True):
        if true.any():
            hits = true[np.argsort(-score, kind="stable")]
            precisions.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return float(np.mean(precisions))


@torch.inference_mode()
def scores(
    model: nn.Module, heads: nn.Module, x: Tensor, targets: NamedTuple, far: np.ndarray
) -> dict[str, float]:
    """The table's rows, by Brain Model and heads on z-scored fMRI x (clips, T, N) with data.Clips.targets."""
    device = next(model.parameters()).device
    f_c = torch.cat([model(part.to(device))[0].float().cpu() for part in x.split(64)])  # (clips, D)
    e_img, f_a, logits = (v.float().cpu() for v in heads(f_c.to(device), targets.e_img.to(device)))
    pairs = {"image": (f_c, e_img), "text": (f_c, targets.e_txt), "action": (f_a, targets.e_act)}
    rows = {}
    for name, (f, e) in pairs.items():
        rows |= {f"{name} {test}": score for test, score in retrieval(f, e, far).items()}
    rows["category mAP"] = average_precision(logits.numpy(), targets.categories.numpy())
    return rows


def with_controls(
    model: nn.Module, heads: nn.Module, x: Tensor, targets: NamedTuple, far: np.ndarray
) -> dict[str, dict[str, float]]:
    """The table's columns: the `scores`, those with the fMRI of other clips, and what guessing reaches."""
    n = len(x)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    fmri = scores(model, heads, x, targets, far)
    shuffled = scores(model, heads, x[order], targets, far)
    labels = targets.categories.float()  # (clips, classes)
    by_guessing = {"top-1": 1 / n, "top-5": min(1, 5 / n), f"{WAYS}-way": 1 / WAYS}
    by_guessing["mAP"] = float(labels.mean(0)[labels.any(0)].mean())
    chance = {name: by_guessing[name.split()[1]] for name in fmri}
    return {"fmri": fmri, "shuffled": shuffled, "chance": chance}


def validate(model: nn.Module, heads: nn.Module, train) -> dict[str, float]:
    """The table's scores of what --val_segments holds out of the data.Clips, with names for the log."""
    clips = train.held_out
    if not len(clips):
        return {}
    far = far_apart(np.array([line["segment"] for line in train.lines])[clips])
    values = scores(model, heads, train.averaged(clips), train.targets(clips), far)
    text = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if "top" not in name)
    tqdm.write(f"{len(clips)} clips of the segments held out: {text}")
    return {f"held out, {name}": value for name, value in values.items()}


def table(columns: dict[str, dict[str, float]], title: str) -> str:
    """`with_controls` as lines of text."""
    lines = [f"{title:<28}{'fMRI':>9}{'shuffled':>10}{'chance':>9}"]
    for name in columns["fmri"]:
        cells = f"{columns['shuffled'][name]:>10.3f}{columns['chance'][name]:>9.3f}"
        lines.append(f"{name:<28}{columns['fmri'][name]:>9.3f}{cells}")
    if f"image {WAYS}-way" not in columns["fmri"]:
        lines.append(f"{WAYS}-way: n/a: some clip has fewer than {WAYS - 1} clips of other scenes beside it")
    return "\n".join(lines)

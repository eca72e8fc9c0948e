"""What the trainings of the toy world's networks share: random clips, schedules, `fit`, a command line.

The pretrain files say their networks, losses and gates. Sizes, tokenizers and image processors stand in the
configuration files of toy/.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from tqdm import tqdm

from support.options import within
from support.training import average
from support.videos import uniform_frames
from toy.world import COLOURS, Clip, combinations, coverage, ground, random_clip, render

HERE = Path(__file__).parent
SEEN, HELD_OUT = combinations()  # 752 combinations that training may show, and 160
MEAN, STD = 0.45, 0.225  # of the pixels that the classifiers and DINO see


# ---------------------------------------------------------------- clips


def random_clips(pool: Sequence[tuple], count: int, rng: np.random.Generator) -> list[Clip]:
    return [random_clip(pool[i], rng) for i in rng.integers(len(pool), size=count)]


def clips_of(pool: list[tuple], copies: int, seed: int) -> list[Clip]:
    """Random clips of each combination: the pool, `copies` times over."""
    rng = np.random.default_rng(seed)
    return [random_clip(combination, rng) for combination in pool * copies]


def rendered(clips: list[Clip], frames: int) -> np.ndarray:
    """uint8 (clips, F, 64, 64, 3): `frames` uniform ones of each clip."""
    chosen = uniform_frames(17, frames)
    progress = tqdm(clips, desc="rendering", disable=len(clips) < 1000)
    return np.stack([render(clip)[chosen] for clip in progress])


def pixels(frames: np.ndarray, mean: float | list[float] = MEAN, std: float | list[float] = STD) -> Tensor:
    """uint8 (..., H, W, 3) -> normalised (..., 3, H, W)."""
    x = torch.from_numpy(frames).movedim(-1, -3).float() / 255
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


class Stage:
    """Random clips of given combinations; each shape and action is covered `copies` times in advance."""

    def __init__(self, copies: int):
        self.rng, self.copies = np.random.default_rng(1), copies
        self.alpha = {}  # (shape, action) -> uint8 (copies, 16, 64, 64)
        frames = uniform_frames(17, 16)
        kinds = dict.fromkeys((shape, action) for shape, _, action, _ in SEEN + HELD_OUT)
        for shape, action in tqdm(kinds, desc="rendering"):
            clips = [random_clip((shape, "red", action, "in fog"), self.rng) for _ in range(copies)]
            alpha = np.stack([coverage(clip)[frames] for clip in clips])
            self.alpha[shape, action] = (alpha * 255).round().astype(np.uint8)

    def clips(self, chosen: list[tuple], one_frame: bool) -> Tensor:
        """(B, F, 3, 64, 64), normalised; at random blurred, shifted, noisy and of another brightness, so that
        what is shown is judged and not how sharply."""
        rng = self.rng
        covered = []
        for shape, _, action, _ in chosen:
            alpha = self.alpha[shape, action][rng.integers(self.copies)]  # (16, 64, 64)
            alpha = alpha[rng.integers(len(alpha), size=1)] if one_frame else alpha
            covered.append(np.roll(alpha, tuple(rng.integers(-2, 3, 2)), (1, 2)))
        alpha = torch.from_numpy(np.stack(covered)) / 255  # (B, F, 64, 64)
        if rng.random() < 0.4:
            alpha = F.avg_pool2d(alpha, 3, 1, 1, count_include_pad=False)
        behind = np.stack([ground(background) for *_, background in chosen]) / np.float32(255)
        behind = torch.from_numpy(behind).movedim(-1, 1).contiguous()[:, None]  # (B, 1, 3, 64, 1)
        colour = torch.tensor([COLOURS[name] for _, name, *_ in chosen])[:, None, :, None, None] / 255
        spread = torch.tensor([0.15, 0.08]).view(2, 1, 1, 1, 1, 1)
        gain, offset = (torch.rand(2, len(chosen), 1, 3, 1, 1) - 0.5) * spread
        behind, colour = ((v * (1 + gain) + offset - MEAN) / STD for v in (behind, colour))
        x = behind + alpha[:, :, None] * (colour - behind)
        return x + rng.uniform(0, 0.5) * torch.randn_like(x) if rng.random() < 0.25 else x


# ---------------------------------------------------------------- training


def one_cycle(
    parameters: Iterable, lr: float, steps: int, warm_up=0.1, weight_decay=0.05, beta=0.999
) -> LRScheduler:
    """AdamW whose rate rises over the share `warm_up` of the steps to lr, then falls as a cosine."""
    optimiser = torch.optim.AdamW(parameters, lr, betas=(0.9, beta), weight_decay=weight_decay)
    rising = max(warm_up, 1.5 / steps)  # a trial of a few steps has a first one, too
    return OneCycleLR(optimiser, lr, total_steps=steps, pct_start=rising)


def flat_then_cosine(optimiser: Optimizer, steps: int, tail: int) -> LRScheduler:
    """The rate rises over 50 steps, is flat, and falls as a cosine over the last `tail` steps."""

    def rate(step: int) -> float:
        return min((step + 1) / 50, 0.5 + 0.5 * np.cos(np.pi * max(0, step - (steps - tail)) / tail))

    return LambdaLR(optimiser, rate)


def fit(
    name: str, losses: Callable, schedules: Sequence[LRScheduler], steps: int, max_norm=1.0, after=None
) -> None:
    """The training loop: each step's gradients, averaged over the processes and clipped, move the weights.

    losses(): the "loss" of new clips, and what else stands in the log line, as means over 50 steps: Tensors.
    schedules: of the optimisers, each of which moves its part of the weights. after(step): follows a step.
    """
    start = time.time()
    rows = []
    groups = [group for schedule in schedules for group in schedule.optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    first = not dist.is_initialized() or dist.get_rank() == 0
    progress = tqdm(range(steps), desc=name, mininterval=20, disable=not first)
    for step in progress:
        numbers = losses()
        for schedule in schedules:
            schedule.optimizer.zero_grad()
        numbers["loss"].backward()
        if dist.is_initialized():
            average([p.grad for p in parameters])
        nn.utils.clip_grad_norm_(parameters, max_norm)
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.step()
        if after:
            after(step)
        rows.append({key: value.item() for key, value in numbers.items()})
        if first and (step % 50 == 49 or step == steps - 1):
            means = [f"{key} {np.mean([row[key] for row in rows]):.3f}" for key in rows[0]]
            progress.write(f"{name} {step + 1} {' '.join(means)} {time.time() - start:.0f} s")
            rows.clear()


# ---------------------------------------------------------------- command line


def configured(folder: Path, network: str) -> Path:
    """The folder, to write a network to, with the configuration files of toy/network in it."""
    if folder.resolve() != HERE / network:
        weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(HERE / network, folder, ignore=weights, dirs_exist_ok=True)
    return folder


def command(doc: str, networks: Sequence[str] = ()) -> tuple[str | None, Path, dict]:
    """Which of the networks, the folder for it, and what the command line says of steps."""
    parser = parser_of(doc)
    if networks:
        parser.add_argument("network", choices=networks)
    parser.add_argument("--out", type=Path, default=HERE, help="where its folder is written (default: toy/)")
    arguments = parser.parse_args()
    recipe = {"steps": arguments.steps} if arguments.steps else {}
    return getattr(arguments, "network", None), arguments.out, recipe


def parser_of(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=within(int, least=2), help="of training (default: the recipe's)")
    return parser

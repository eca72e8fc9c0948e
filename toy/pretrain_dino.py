"""Trains toy/dino, the toy world's DINO, and writes it beside this file: the weights of DTC (subject
consistency).

    python -m toy.pretrain_dino          about six minutes on one core; then prints the gate

A `ViTModel` without pooler, as facebook/dino-vitb16 is, trained without labels by self-distillation (Caron et
al. 2021, DINO): a student sees global and local crops of a frame, a teacher, its moving average, only the
global ones; the student predicts the teacher's soft assignment to prototypes in every other crop. The
assignments are sharpened, and centred so that all prototypes are used alike (by Sinkhorn's iterations, as in
DINOv2). It learns from the 752 combinations alone; the gate asks its frozen features about the 160 held out:
they tell colours and backgrounds apart, shapes hardly, so DTC on the toy world sees a change of colour, not
one of shape.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from support.videos import uniform_frames
from toy.pretrain_classifiers import ATTRIBUTES, HERE, Stage, normalise
from toy.world import SIZE, combinations, random_clip, render

WIDTH, PROTOTYPES, LOCALS = 48, 128, 4


class WithHead(torch.nn.Module):
    """x (B, 3, h, w) -> (B, PROTOTYPES): cosines of the CLS token, through a projection that is thrown away
    later, to prototypes."""

    def __init__(self):
        super().__init__()
        size = {
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 2 * WIDTH,
        }
        self.vit = ViTModel(
            ViTConfig(image_size=SIZE, patch_size=8, initializer_range=0.08, **size), add_pooling_layer=False
        )
        self.head = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 128), torch.nn.GELU(), torch.nn.Linear(128, 32)
        )
        self.prototypes = torch.nn.Parameter(torch.randn(PROTOTYPES, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return F.normalize(self.head(f), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def crops(x: torch.Tensor, size: int, smallest: float, largest: float) -> torch.Tensor:
    """x (B, 3, 64, 64) -> (B, 3, size, size): of each, a random square of between `smallest` and `largest` of
    its area."""
    side = torch.empty(len(x)).uniform_(smallest, largest).sqrt()
    shift = (torch.rand(2, len(x)) * 2 - 1) * (1 - side)
    zero = torch.zeros(len(x))
    theta = torch.stack(
        [torch.stack([side, zero, shift[0]], -1), torch.stack([zero, side, shift[1]], -1)], 1
    )  # (B, 2, 3)
    where = F.affine_grid(theta, (len(x), 3, size, size), align_corners=False)
    return F.grid_sample(x, where, padding_mode="reflection", align_corners=False)


def assignments(t: torch.Tensor) -> torch.Tensor:
    """The teacher's cosines (B, PROTOTYPES) -> soft assignments, rows of sum 1, columns nearly of the same
    sum: sharpened and centred."""
    p = (t / 0.05).exp()
    for _ in range(3):
        p = p / p.sum(0)
        p = p / p.sum(1, keepdim=True)
    return p


def pretrain_dino(steps: int, batch: int, lr: float, out: Path = HERE) -> None:
    torch.manual_seed(0)
    student = WithHead()
    teacher = deepcopy(student).requires_grad_(False)
    stage, pool, rng = Stage(40, 1, uniform_frames(17, 16)), combinations()[0], np.random.default_rng(2)
    optimiser = torch.optim.AdamW(student.parameters(), lr, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    progress = tqdm(range(steps), desc="dino", mininterval=20)
    for step in progress:
        x = stage.clips([pool[i] for i in rng.integers(len(pool), size=batch)], one_frame=True)[:, 0]
        globals_ = torch.cat([crops(x, SIZE, 0.5, 1) for _ in range(2)])
        locals_ = torch.cat([crops(x, SIZE // 2, 0.2, 0.5) for _ in range(LOCALS)])
        with torch.no_grad():
            p = assignments(teacher(globals_)).chunk(2)
        s = [*student(globals_).chunk(2), *student(locals_).chunk(LOCALS)]
        log_q = [(v / 0.1).log_softmax(-1) for v in s]
        pairs = [(i, j) for i in range(2) for j in range(2 + LOCALS) if i != j]
        loss = -sum((p[i] * log_q[j]).sum(-1).mean() for i, j in pairs) / len(pairs)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        optimiser.step()
        schedule.step()
        keep = 1 - 0.01 * (1 + np.cos(np.pi * step / steps)) / 2  # 0.99 to 1
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - keep)
        if step % 100 == 99:
            progress.write(f"{step + 1} loss {loss.item():.3f}")
    whole = {"height": SIZE, "width": SIZE}
    ViTImageProcessor(size=whole, image_mean=[0.45] * 3, image_std=[0.225] * 3).save_pretrained(out / "dino")
    teacher.vit.half().save_pretrained(out / "dino")


@torch.inference_mode()
def dino_gate(out: Path = HERE, bank: int = 3, queries: int = 2, k: int = 5) -> dict[str, float]:
    """Clips of the 160 held-out combinations by the votes of their k nearest of the 752; cosines of frames
    within and across clips."""
    model = ViTModel.from_pretrained(out / "dino", add_pooling_layer=False, dtype=torch.float32).eval()
    rng, (seen, unseen) = np.random.default_rng(4), combinations()

    def features(chosen: list[tuple], frames: list[int]) -> torch.Tensor:  # (clips, frames, D), unit
        x = [
            normalise(torch.from_numpy(render(random_clip(c, rng))[frames]).movedim(-1, 1) / 255)
            for c in chosen
        ]
        f = torch.cat([model(torch.cat(x[i : i + 32])).last_hidden_state[:, 0] for i in range(0, len(x), 32)])
        return F.normalize(f, dim=-1).unflatten(0, (len(x), -1))

    known, asked = seen * bank, unseen * queries
    votes = (features(asked, [8])[:, 0] @ features(known, [8])[:, 0].T).topk(k).indices  # (clips, k)
    scores = {}
    for a, name in enumerate(ATTRIBUTES):
        values = sorted({c[a] for c in known})
        of = torch.tensor([values.index(c[a]) for c in known])[votes]
        scores[name] = float(
            np.mean([values[int(v)] == c[a] for v, c in zip(of.mode(1).values, asked, strict=True)])
        )
        print(f"nearest {k}: {name} {scores[name]:.3f} (chance {1 / len(values):.3f})")
    f = features(unseen, list(range(17)))  # (160, 17, D)
    scores["within"] = float((f[:, 1:] * f[:, :1]).sum(-1).mean())
    other = torch.stack([(f[:, 0] * f.roll(s, 0)[:, 8]).sum(-1) for s in range(1, 160)])  # (159, 160)
    scores["across"] = float(other.mean())
    scores["closer"] = float(((f[:, 0] * f[:, 8]).sum(-1) > other).float().mean())
    print(
        "cosine of frames: within a clip {within:.3f}, across {across:.3f}; "
        "own is closer in {closer:.1%} of pairs".format(**scores)
    )
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pretrain_dino(args.steps, args.batch, args.lr, args.out)
    dino_gate(args.out)

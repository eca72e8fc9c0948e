"""Trains toy/dino, the toy world's DINO, and writes it beside this file: the weights of DTC.

    python -m toy.pretrain_dino          about six minutes on one core; then prints the gate

A `ViTModel` without pooler, as facebook/dino-vitb16 is, trained without labels by self-distillation (Caron et
al. 2021, DINO): a student sees global and local crops of a frame, a teacher, its moving average, only the
global ones; the student predicts the teacher's soft assignment to prototypes in every other crop. The
assignments are sharpened, and centred so that all prototypes are used alike (by Sinkhorn's iterations, as in
DINOv2). It learns from the 752 combinations alone; the gate asks its frozen features about the 160 held out.
"""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from toy.fit import HELD_OUT, HERE, SEEN, Stage, command, configured, fit, one_cycle, pixels, rendered
from toy.world import FRAMES, SIZE, random_clip

PROTOTYPES, LOCALS = 128, 4


class WithHead(nn.Module):
    """x (B, 3, h, w) -> (B, PROTOTYPES): cosines of the projected CLS token to prototypes."""

    def __init__(self):
        super().__init__()
        config = ViTConfig.from_pretrained(HERE / "dino")
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Sequential(nn.Linear(config.hidden_size, 128), nn.GELU(), nn.Linear(128, 32))
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 32))

    def forward(self, x: Tensor) -> Tensor:
        f = self.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        return F.normalize(self.head(f), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def crops(x: Tensor, size: int, smallest: float, largest: float) -> Tensor:
    """x (B, 3, 64, 64) -> (B, 3, size, size): random squares of `smallest` to `largest` of its area."""
    side = torch.empty(len(x)).uniform_(smallest, largest).sqrt()
    shift = (torch.rand(2, len(x)) * 2 - 1) * (1 - side)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = shift.T
    grid = F.affine_grid(theta, (len(x), 3, size, size), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def assignments(t: Tensor) -> Tensor:
    """The teacher's cosines (B, PROTOTYPES), sharpened and centred: rows of sum 1, columns nearly equal."""
    p = (t / 0.05).exp()
    for _ in range(3):
        p = p / p.sum(0)
        p = p / p.sum(1, keepdim=True)
    return p


def pretrain_dino(out: Path, steps: int = 900, batch: int = 96, lr: float = 2e-3) -> None:
    torch.manual_seed(0)
    student = WithHead()
    teacher = deepcopy(student).requires_grad_(False)
    stage = Stage(40)
    rng = np.random.default_rng(2)
    pairs = [(i, j) for i in range(2) for j in range(2 + LOCALS) if i != j]  # a global crop and another one

    def losses() -> dict[str, Tensor]:
        chosen = [SEEN[i] for i in rng.integers(len(SEEN), size=batch)]
        x = stage.clips(chosen, one_frame=True)[:, 0]  # (B, 3, 64, 64)
        large = torch.cat([crops(x, SIZE, 0.5, 1) for _ in range(2)])
        small = torch.cat([crops(x, SIZE // 2, 0.2, 0.5) for _ in range(LOCALS)])
        with torch.no_grad():
            p = assignments(teacher(large)).chunk(2)
        cosines = [*student(large).chunk(2), *student(small).chunk(LOCALS)]
        log_q = [(v / 0.1).log_softmax(-1) for v in cosines]
        return {"loss": -sum((p[i] * log_q[j]).sum(-1).mean() for i, j in pairs) / len(pairs)}

    def move_teacher(step: int) -> None:
        weight = 0.01 * (1 + np.cos(np.pi * step / steps)) / 2  # of the student: 0.01 to 0
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast.detach(), weight)

    schedules = [one_cycle(student.parameters(), lr, steps, weight_decay=0.04)]
    fit("dino", losses, schedules, steps, max_norm=3.0, after=move_teacher)
    teacher.vit.half().save_pretrained(configured(out / "dino", "dino"))


@torch.inference_mode()
def dino_gate(out: Path) -> None:
    """Cosines of frames within and across clips of the 160 held-out combinations."""
    model = ViTModel.from_pretrained(out / "dino", add_pooling_layer=False, dtype=torch.float32).eval()
    rng = np.random.default_rng(4)
    x = pixels(rendered([random_clip(combination, rng) for combination in HELD_OUT], FRAMES))
    f = torch.cat([model(clips.flatten(0, 1)).last_hidden_state[:, 0] for clips in x.split(32)])
    f = F.normalize(f, dim=-1).unflatten(0, (len(x), -1))  # (160, 17, D)
    within = (f[:, 1:] * f[:, :1]).sum(-1).mean()
    across = torch.stack([(f[:, 0] * f.roll(s, 0)[:, 8]).sum(-1) for s in range(1, 160)])  # (159, 160)
    closer = ((f[:, 0] * f[:, 8]).sum(-1) > across).float().mean()
    print(f"cosine of frames: within a clip {within:.3f}, across {across.mean():.3f}; ", end="")
    print(f"the own clip's is closer in {closer:.1%} of pairs")


if __name__ == "__main__":
    _, out, recipe = command(__doc__)
    torch.set_num_threads(1)
    pretrain_dino(out, **recipe)
    dino_gate(out)

"""Stage-1 heads and losses (§3.1, Eq. 1-3): what the Brain Model's global token is taught.

    L_stage1 = L_clip + λ_1 L_action + λ_2 L_cls                                               Eq. 3
    L_clip   = L_info(f_c, φ_v(e_img)) + L_info(f_c, e_txt)         image and text of CLIP     Eq. 1, 2
    L_action = L_info(φ_a(f_c), e_act)                              action of ViCLIP
    L_cls    = BCE + focal on φ_c(f_c)                              object categories

Why four? One embedding tells little of a video. Image and text say what it shows, the action what happens,
the categories which objects are there.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize


class ImageAggregator(nn.Module):
    r"""$\hat{e}^{img} = \varphi_v(e^{img})$: the CLIP embeddings (B, F, D) of F frames -> one, (B, D).

    A learned weighted mean over the frames, which starts as the plain mean (a choice)."""

    def __init__(self, frames: int):
        super().__init__()
        self.mix = nn.Conv1d(frames, 1, kernel_size=1, bias=False)
        nn.init.constant_(self.mix.weight, 1 / frames)

    def forward(self, e_img: Tensor) -> Tensor:
        return self.mix(e_img).squeeze(1)  # (B, D)


class ActionHead(nn.Module):
    r"""$f^a = \varphi_a(f^c)$: from the space of CLIP into that of ViCLIP, which knows actions.

    A residual MLP that starts as the identity, since both spaces have width D (a choice)."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.mlp[3].weight)
        nn.init.zeros_(self.mlp[3].bias)

    def forward(self, f_c: Tensor) -> Tensor:
        return f_c + self.mlp(f_c)  # (B, D)


class CategoryHead(nn.Module):
    r"""$\varphi_c(f^c)$: a logit, yes or no, for each category of objects.

    Its bias starts as the logit of p = 0.01: else many negatives outweigh few positives (Lin et al. 2017)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.linear = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))
        nn.init.constant_(self.linear[1].bias, math.log(0.01 / 0.99))

    def forward(self, f_c: Tensor) -> Tensor:
        return self.linear(f_c)  # (B, classes)


class Stage1Heads(nn.Module, PyTorchModelHubMixin):
    """φ_v, φ_a and φ_c. Stage 2 freezes them, so that φ_v(e_img) of the memories is computed once."""

    def __init__(self, dim: int = 768, frames: int = 8, classes: int = 12):
        super().__init__()
        self.phi_v = ImageAggregator(frames)
        self.phi_a = ActionHead(dim)
        self.phi_c = CategoryHead(dim, classes)

    def forward(self, f_c: Tensor, e_img: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f_c (B, D), e_img (B, F, D) -> φ_v(e_img) (B, D), φ_a(f_c) (B, D), φ_c(f_c) (B, classes)."""
        return self.phi_v(e_img), self.phi_a(f_c), self.phi_c(f_c)

    def queries(self, f_c: Tensor) -> Tensor:
        """f_c (B, D) -> q (B, 3, D): the fMRI side of Eq. 5, in the order txt, img, act.

        Eq. 5 compares f_e with the memories. But stage 1 aligns f_c, not f_e, with them, and f_e has another
        width. So f_c, f_c and φ_a(f_c) stand for f_e (a choice)."""
        return torch.stack([f_c, f_c, self.phi_a(f_c)], 1)  # (B, 3, D)


def info_nce(f: Tensor, e: Tensor, tau: float = 0.07) -> Tensor:
    r"""Eq. 2: $L_{info}(f, e) = -\frac{1}{B} \sum_{i=1}^B \log
    \frac{\exp(f_i \cdot e_i / \tau)}{\sum_{j=1}^B \exp(f_i \cdot e_j / \tau)}$

    f, e (b, D): the clips of this process, B of all. Each f picks its own e among all B: a classification
    with B classes, hence the cross-entropy. Why not a distance? f is to be near its own e *and* far from the
    others, because stage 2 searches memories with it. On unit vectors; tau is the temperature."""
    f, e = normalize(f.float(), dim=-1), normalize(e.float(), dim=-1)  # (b, D), (b, D)
    first = 0  # this process's first row of e
    if dist.is_initialized():  # the negatives are those of the whole batch
        e = torch.cat(dist_nn.all_gather(e))  # (B, D), with gradient
        first = dist.get_rank() * len(f)
    target = first + torch.arange(len(f), device=f.device)  # (b,)
    with torch.autocast(f.device.type, enabled=False):  # bf16 would round the logits by 0.03
        return cross_entropy(f @ e.T / tau, target)  # Eq. 2


def focal_bce(logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    r"""$L_{cls}$ of §3.1: BCE + focal loss (Lin et al. 2017), of equal weight, mean over clips and
    categories.

    logits (B, classes), targets (B, classes) in {0, 1}. Why focal? Most clips lack most categories. These
    easy answers (p, the probability of the truth, is near 1) weigh only (1 - p)^gamma. The rare positives
    would now dominate: so they weigh alpha = 0.25, negatives 1 - alpha, as in Lin et al."""
    logits, targets = logits.float(), targets.float()
    bce = binary_cross_entropy_with_logits(logits, targets, reduction="none")  # (B, classes), -log p
    p = torch.exp(-bce)  # (B, classes), probability of the truth
    weight = alpha * targets + (1 - alpha) * (1 - targets)  # (B, classes)
    return (bce + weight * (1 - p) ** gamma * bce).mean()


class Stage1Loss(NamedTuple):
    loss: Tensor  # Eq. 3
    image: Tensor
    text: Tensor
    action: Tensor
    category: Tensor


def stage1_loss(
    heads: Stage1Heads, f_c: Tensor, batch, tau: float = 0.07, lambda_1: float = 1.0, lambda_2: float = 1.0
) -> Stage1Loss:
    r"""Eq. 1: $L_{clip} = L_{info}(f^c, \hat{e}^{img}) + L_{info}(f^c, e^{txt})$
    Eq. 3: $L_{stage1} = L_{clip} + \lambda_1 L_{action} + \lambda_2 L_{cls}$

    f_c (B, D) of a data.Batch. A λ of 0 leaves a task out (Table 4)."""
    e_img_hat, f_a, logits = heads(f_c, batch.e_img)  # (B, D), (B, D), (B, classes)
    image = info_nce(f_c, e_img_hat, tau)
    text = info_nce(f_c, batch.e_txt, tau)
    l_clip = image + text  # Eq. 1
    l_action = info_nce(f_a, batch.e_act, tau)
    l_cls = focal_bce(logits, batch.categories)
    loss = l_clip + lambda_1 * l_action + lambda_2 * l_cls  # Eq. 3
    return Stage1Loss(loss, image, text, l_action, l_cls)

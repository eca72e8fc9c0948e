"""Stage-1 heads and losses (§3.1, Eq. 1-3): what the Brain Model's global token is taught.

L_stage1 = L_clip + λ_1 L_action + λ_2 L_cls                                                    Eq. 3
L_clip   = L_info(f_c, φ_v(e_img)) + L_info(f_c, e_txt)         image and text of CLIP          Eq. 1, 2
L_action = L_info(φ_a(f_c), e_act)                              action of ViCLIP
L_cls    = BCE + focal on φ_c(f_c)                              object categories
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, pad


class ImageAggregator(nn.Module):
    """φ_v: the CLIP embeddings of F frames -> one, a learned weighted mean over the frames. It starts as the
    plain mean."""

    def __init__(self, frames: int):
        super().__init__()
        self.mix = nn.Conv1d(frames, 1, kernel_size=1, bias=False)
        nn.init.constant_(self.mix.weight, 1 / frames)

    def forward(self, e_img: Tensor) -> Tensor:
        """e_img (B, F, D) -> (B, D)"""
        return self.mix(e_img).squeeze(1)  # (B, D)


class ActionHead(nn.Module):
    """φ_a: f_c -> the space of ViCLIP. A residual MLP that starts as the identity, since both spaces have
    width D."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.mlp[3].weight)
        nn.init.zeros_(self.mlp[3].bias)

    def forward(self, f_c: Tensor) -> Tensor:
        return f_c + self.mlp(f_c)  # (B, D)


class CategoryHead(nn.Module):
    """φ_c: f_c -> a logit for each category. Its bias is the logit of p = 0.01 at the start, so that rare
    positives are not drowned (Lin et al. 2017)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.linear = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))
        nn.init.constant_(self.linear[1].bias, math.log(0.01 / 0.99))

    def forward(self, f_c: Tensor) -> Tensor:
        return self.linear(f_c)  # (B, classes)


MODEL_CARD = "---\n{{ card_data }}\n---\n\nThe stage-1 heads of CineNeuron (§3.1): φ_v, φ_a, φ_c.\n"


class Stage1Heads(nn.Module, PyTorchModelHubMixin, model_card_template=MODEL_CARD):
    """φ_v, φ_a and φ_c. Stage 1 trains them, stage 2 keeps them as they are."""

    def __init__(self, dim: int = 768, frames: int = 8, classes: int = 12):
        super().__init__()
        self.phi_v = ImageAggregator(frames)
        self.phi_a = ActionHead(dim)
        self.phi_c = CategoryHead(dim, classes)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs):  # the mixin lets weights be missing
        return super()._from_pretrained(strict=strict, **kwargs)

    def forward(self, f_c: Tensor, e_img: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f_c (B, D), e_img (B, F, D) -> φ_v(e_img) (B, D), φ_a(f_c) (B, D), φ_c(f_c) (B, classes)."""
        return self.phi_v(e_img), self.phi_a(f_c), self.phi_c(f_c)

    def queries(self, f_c: Tensor) -> Tensor:
        """f_c (B, D) -> q (B, 3, D), the fMRI side of Eq. 5 in the order txt, img, act: the embeddings that
        stage 1 has aligned with the memories."""
        return torch.stack([f_c, f_c, self.phi_a(f_c)], 1)  # (B, 3, D)


# ---------------------------------------------------------------- losses


def rows_of_processes(e: Tensor) -> tuple[list[int], int]:
    """How many rows of the batch each process has, and this process's number; e holds its own rows."""
    if not dist.is_initialized():
        return [len(e)], 0
    rows = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=e.device)
    rows[dist.get_rank()] = len(e)
    dist.all_reduce(rows)
    return rows.tolist(), dist.get_rank()


def gather(e: Tensor, rows: list[int]) -> Tensor:
    """e (B, D) of every process below each other, with gradient. `all_gather` needs equal shapes: a
    process with fewer rows pads with zeros, and the padding is cut off afterwards."""
    if len(rows) == 1:
        return e
    parts = dist_nn.all_gather(pad(e, (0, 0, 0, max(rows) - len(e))).contiguous())
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])


def info_nce(f: Tensor, e: Tensor, tau: float = 0.07) -> Tensor:
    """Eq. 2 on unit vectors: each row of f (B, D) is to find its own row among all rows of e (B, D).
    Temperature tau. Returns a scalar, the mean over the rows of f.

    With several processes, e is gathered over them: the negatives are those of the whole batch.
    """
    f, e = normalize(f.float(), dim=-1), normalize(e.float(), dim=-1)  # (B, D)
    rows, process = rows_of_processes(e)
    own = sum(rows[:process]) + torch.arange(len(f), device=f.device)  # (B,) the column of each row's match
    with torch.autocast(f.device.type, enabled=False):  # bf16 would round the logits by 0.03
        return cross_entropy(f @ gather(e, rows).T / tau, own)  # Eq. 2


def focal_bce(logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """L_cls of §3.1: BCE + focal loss (Lin et al. 2017), of equal weight, mean over clips and categories.

    logits (B, classes), targets (B, classes) in {0, 1}. What is already well classified (p of the truth near
    1) weighs (1 - p)^gamma; positives weigh alpha, negatives 1 - alpha. Returns a scalar.
    """
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
    heads: nn.Module,
    f_c: Tensor,
    e_img: Tensor,
    e_txt: Tensor,
    e_act: Tensor,
    categories: Tensor,
    tau: float = 0.07,
    lambda_1: float = 1.0,
    lambda_2: float = 1.0,
) -> Stage1Loss:
    """Eq. 3 and its parts. f_c (B, D), e_img (B, F, D), e_txt and e_act (B, D), categories (B, classes).
    lambda 0 leaves a task out (Table 4).

    With several processes the mean of their losses is the loss of the whole batch in one process: each loss
    is weighted by the process's number of clips, relative to the mean number.
    """
    rows, process = rows_of_processes(f_c)
    weight = rows[process] * len(rows) / sum(rows)  # 1 where all have as many
    e_img_hat, f_a, logits = heads(f_c, e_img)  # (B, D) (B, D) (B, classes)
    image = weight * info_nce(f_c, e_img_hat, tau)
    text = weight * info_nce(f_c, e_txt, tau)
    l_clip = image + text  # Eq. 1
    l_action = weight * info_nce(f_a, e_act, tau)
    l_cls = weight * focal_bce(logits, categories)
    loss = l_clip + lambda_1 * l_action + lambda_2 * l_cls  # Eq. 3
    return Stage1Loss(loss, image, text, l_action, l_cls)

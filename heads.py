"""Stage-1 heads and losses (§3.1, Eq. 1-3): what the Brain Model's global token is taught.

L_stage1 = L_clip + lambda_1 L_action + lambda_2 L_cls                                                     Eq. 3
L_clip   = L_info(f_c, phi_v(e_img)) + L_info(f_c, e_txt)            image and text of CLIP                 Eq. 1, 2
L_action = L_info(phi_a(f_c), e_act)                                 action of ViCLIP
L_cls    = BCE + focal on phi_c(f_c)                                 object categories
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn


class ImageAggregator(nn.Module):
    """phi_v: the CLIP embeddings of F frames -> one, a learned weighted mean over the frames. It starts as the plain mean."""

    def __init__(self, frames: int):
        super().__init__()
        self.mix = nn.Conv1d(frames, 1, kernel_size=1, bias=False)
        nn.init.constant_(self.mix.weight, 1 / frames)

    def forward(self, e_img: Tensor) -> Tensor:
        B, F_, D = e_img.shape  # clips, frames, width of CLIP
        return self.mix(e_img).squeeze(1)  # (B, D)


class ActionHead(nn.Module):
    """phi_a: f_c -> the space of ViCLIP. A residual MLP that starts as the identity, since both spaces have width D."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.mlp[3].weight)
        nn.init.zeros_(self.mlp[3].bias)

    def forward(self, f_c: Tensor) -> Tensor:
        return f_c + self.mlp(f_c)  # (B, D)


class CategoryHead(nn.Module):
    """phi_c: f_c -> one logit a category. Its bias starts at p = 0.01, so that rare positives are not drowned (Lin et al. 2017)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.linear = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))
        nn.init.constant_(self.linear[1].bias, -4.595)

    def forward(self, f_c: Tensor) -> Tensor:
        return self.linear(f_c)  # (B, K)


class Stage1Heads(nn.Module, PyTorchModelHubMixin):
    """phi_v, phi_a and phi_c. Trained in stage 1, frozen in stage 2."""

    def __init__(self, dim: int = 768, frames: int = 8, classes: int = 12):
        super().__init__()
        self.phi_v = ImageAggregator(frames)
        self.phi_a = ActionHead(dim)
        self.phi_c = CategoryHead(dim, classes)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs):  # the mixin's own default lets weights be missing
        return super()._from_pretrained(strict=strict, **kwargs)

    def forward(self, f_c: Tensor, e_img: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f_c (B, D), e_img (B, F, D) -> the aggregated image embedding (B, D), f_a (B, D), category logits (B, K)."""
        return self.phi_v(e_img), self.phi_a(f_c), self.phi_c(f_c)


def gather(e: Tensor) -> Tensor:
    """The rows of every process, in the order of the ranks, with gradient; e itself in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return torch.cat(dist_nn.all_gather(e.contiguous()))
    return e


def info_nce(f: Tensor, e: Tensor, tau: float = 0.07) -> Tensor:
    """Eq. 2 on unit vectors: each row of f (B, D) is to find its own row among all rows of e (B, D). Temperature tau. Returns a scalar.

    With several processes e is gathered over them, so that the negatives are those of the whole batch, and the mean of the
    processes' losses is the loss that one process would have.
    """
    f, e = F.normalize(f.float(), dim=-1), F.normalize(e.float(), dim=-1)  # (B, D)
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = torch.arange(len(f), device=f.device) + rank * len(f)  # (B,) column of each row's match
    return F.cross_entropy(f @ gather(e).T / tau, own)  # Eq. 2


def focal_bce(logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """L_cls of §3.1: BCE + focal loss (Lin et al. 2017), equal weight, mean over clips and categories. Returns a scalar.

    logits (B, K), targets (B, K) in {0, 1}. What is already well classified (p of the truth near 1) weighs (1 - p)^gamma;
    alpha weighs positives, 1 - alpha negatives.
    """
    logits, targets = logits.float(), targets.float()
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # (B, K), -log p of the truth
    p = torch.exp(-bce)  # (B, K), probability of the truth
    weight = alpha * targets + (1 - alpha) * (1 - targets)
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
    """Eq. 3 and its parts. f_c (B, D), e_img (B, F, D), e_txt and e_act (B, D), categories (B, K). lambda 0 leaves a task out (Table 4)."""
    e_img_hat, f_a, logits = heads(f_c, e_img)
    image, text = info_nce(f_c, e_img_hat, tau), info_nce(f_c, e_txt, tau)
    l_clip = image + text  # Eq. 1
    l_action = info_nce(f_a, e_act, tau)
    l_cls = focal_bce(logits, categories)
    return Stage1Loss(l_clip + lambda_1 * l_action + lambda_2 * l_cls, image, text, l_action, l_cls)  # Eq. 3

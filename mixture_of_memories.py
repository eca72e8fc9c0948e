"""Mixture-of-Memories (§3.2, Eq. 4-8): what the fMRI brings to mind, between Brain Model and video decoder.

In:  f_e (B,L,D') the fMRI tokens; q (B,3,D) the fMRI side of the three similarities (Stage1Heads.queries);
     the `MemoryPool` of the N training clips.
Out: f_fuse (B,L,D_txt), in place of the decoder's text embeddings.

     f_e ──► Router ──► W_r ──┐                                                                       Eq. 4
     q ───────────────────────┴─► S ─► top-K memories ──► e_mem_txt (top-1), e_mem_img, e_mem_act     Eq. 5
     f_e ─► CrossAttention(img) + CrossAttention(act) ─► f_hat ─► z_f;  e_mem_txt ─► z_t;  f_fuse     Eq. 6-8

`condition` leads from the fMRI to f_fuse. The ablations `TopTextMemory` (w/o MoM, Table 4) and
`DirectProjection` (w/o Integration, Table 6) are called as `MixtureOfMemories` is.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

# One modality more: its name here, its query in Stage1Heads.queries, its unit embedding of width D in
# data.memories, its weight among the columns that train_stage2.py draws
MODALITIES = ("txt", "img", "act")  # M_modal of Eq. 5
FUSED = MODALITIES[1:]  # fused by cross-attention, Eq. 6; the text has a stream of its own, Eq. 7
ALL_ALLOWED = 1.01  # a near-copy threshold above every cosine


@dataclass(frozen=True)
class MemoryPool:
    """The memories of the N training clips and, ragged, the text that their captions give the decoder (§3.2).

    Caption n is rows text_offsets[n] : text_offsets[n + 1] of text_tokens: its real tokens, no padding. The
    fields from caption on serve `excluded`. Raises ValueError where lengths disagree or rows are not unit.
    """

    e: Tensor  # (N,3,D) float, unit rows: CLIP text, φ_v of the CLIP frames, ViCLIP
    text_tokens: Tensor  # (sum of the captions' lengths, D_txt) float; they stay on the CPU
    text_offsets: Tensor  # (N+1,) int64
    caption: Tensor  # (N,) int64, equal where two captions are identical word for word
    segment: Tensor  # (N,) int64
    position: Tensor  # (N,) int64, a clip's number within its segment
    mean_frame: Tensor  # (N,D) float, unit rows: mean over frames of the CLIP frame embeddings
    near_copy: float = ALL_ALLOWED  # the cosine of mean frames above which a clip copies another
    scene: int = 15  # clips of a segment this near in time show one scene

    def __post_init__(self):
        N, steps, rows = len(self.e), self.text_offsets.diff(), len(self.text_tokens)
        names = ("caption", "segment", "position", "mean_frame")
        found = (self.e.shape[1], len(steps), *(len(getattr(self, name)) for name in names))
        if found != (len(MODALITIES), *[N] * 5):
            of_each = f"modalities, text offsets, {', '.join(names)}: {found}"
            raise ValueError(f"{of_each}, wanted {len(MODALITIES)} modalities and {N} of each else")
        if self.text_offsets[0] != 0 or steps.sum() != rows or steps.min() < 1:
            raise ValueError(f"text offsets must rise from 0 to {rows}, the rows of the text tokens")
        for name, x in (("e", self.e), ("mean_frame", self.mean_frame)):
            error = (x.float().norm(dim=-1) - 1).abs().max()
            if not error < 1e-3:  # nor NaN
                raise ValueError(f"a row of {name} has a length {error:.3g} away from 1: normalise its rows")

    def to(self, device: torch.device | str) -> "MemoryPool":
        """All but the text tokens: those of a large pool have no room beside a video decoder."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **{name: x.to(device) for name, x in tensors.items() if name != "text_tokens"})

    def text(self, i: Tensor, L: int) -> Tensor:
        """Memories i (B,) -> the decoder's text embeddings (B,L,D_txt) float32, zero after the caption."""
        start = self.text_offsets[i]  # (B,)
        length = self.text_offsets[i + 1] - start  # (B,)
        if length.max() > L:
            raise ValueError(f"a caption has {length.max()} tokens, the decoder {L}: prepare its text tokens")
        real = torch.arange(L, device=i.device) < length[:, None]  # (B,L)
        rows = start[:, None] + real.cumsum(1) - 1  # (B,L), past the end of a caption its last
        tokens = self.text_tokens[rows.to(self.text_tokens.device)].to(i.device)  # (B,L,D_txt)
        return tokens.float().masked_fill(~real[..., None], 0)  # (B,L,D_txt)

    def text_rms(self) -> float:
        """Root mean square of the real text tokens, where the gain of Eq. 7's Norm starts."""
        return self.text_tokens.float().square().mean().sqrt().item()

    def neighbours(self, clip: Tensor) -> Tensor:
        """Training clips (B,), as indices into the pool -> (B,N) bool: the memories of the same scene."""
        apart = (self.position[clip, None] - self.position).abs()  # (B,N)
        return (self.segment[clip, None] == self.segment) & (apart <= self.scene)

    def near_copies(self, mean_frame: Tensor) -> Tensor:
        """Unit mean frames (B,D) of any clips -> (B,N) bool: the memories that show the same."""
        return mean_frame.float() @ self.mean_frame.float().T > self.near_copy

    def same_caption(self, clip: Tensor) -> Tensor:
        """Training clips (B,) -> (B,N) bool: the memories with the same caption, word for word."""
        return self.caption[clip, None] == self.caption

    def excluded(self, clip: Tensor, untold: Tensor | None = None) -> Tensor:
        """Training clips (B,) -> (B,N) bool: the memories they may not retrieve, as no held-out clip can.
        untold (B,) bool: those that may not retrieve their own caption from another clip, either."""
        scene = self.neighbours(clip) | self.near_copies(self.mean_frame[clip])
        return scene if untold is None else scene | self.same_caption(clip) & untold[:, None]

    def untold_share(self, told: float) -> tuple[float, int, int]:
        """told: how often a held-out clip's own caption is among the memories. Returns the share of training
        clips that must go untold, so that theirs is as seldom, and the fewest and the most memories that a
        training clip may retrieve. The pool is compared with itself by blocks of rows."""
        counts = []
        for clip in torch.arange(len(self.e), device=self.e.device).split(1024):
            free = ~self.excluded(clip)  # (rows,N)
            counts.append(torch.stack([free.sum(1), (free & self.same_caption(clip)).sum(1)]))
        allowed, own = torch.cat(counts, 1)  # (N,) (N,)
        share = 1 - min(1.0, told / max((own > 0).double().mean().item(), 1e-9))
        return share, int((allowed - own * (share > 0)).min()), int(allowed.max())


class Router(nn.Module):
    """R of Eq. 4: mean over tokens, LayerNorm, 2-layer MLP, softmax. f_e (B,L,D') -> W_r (B,3)."""

    def __init__(self, width: int):
        super().__init__()
        logits = nn.Linear(width, len(MODALITIES))
        self.R = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), logits)

    def forward(self, f_e: Tensor) -> Tensor:
        return self.R(f_e.mean(1)).float().softmax(-1)  # (B,3)  Eq. 4


def mixture_scores(W_r: Tensor, q: Tensor, e: Tensor) -> Tensor:
    """Eq. 5: W_r (B,3), q (B,3,D), e (N,3,D) of unit rows -> S (B,N), the weighted sum of cosines.

    Concatenate the three weighted unit queries, (B,3D), and the embeddings of each memory, (N,3D): their dot
    product is the sum over modalities, so that one matrix product gives S. q is f_c, f_c, φ_a(f_c), not f_e:
    `Stage1Heads.queries` says why. In float32: rounding must not swap memories with close scores.
    """
    with torch.autocast(q.device.type, enabled=False):
        weighted = W_r.float()[..., None] * normalize(q.float(), dim=-1)  # (B,3,D)
        return weighted.flatten(1) @ e.float().flatten(1).T  # (B,N)  Eq. 5


def retrieve(
    W_r: Tensor, q: Tensor, pool: MemoryPool, K: int, excluded: Tensor | None = None
) -> tuple[Tensor, ...]:
    """S (B,N), its K highest (B,K) in falling order, and their indices (B,K) (§3.2). excluded (B,N) bool, in
    training: the memories that may not be retrieved; they score -inf. Raises ValueError where the pool is too
    small for K."""
    N = len(pool.e)
    if N < K + 1:
        raise ValueError(f"the pool has {N} memories, K = {K} wants {K + 1} or more: more clips or a lower K")
    S = mixture_scores(W_r, q, pool.e)  # (B,N)
    if excluded is not None:
        S = S.masked_fill(excluded, -torch.inf)  # (B,N)
    S_top, i = S.topk(K)  # (B,K) (B,K)
    if S_top.isneginf().any():
        raise ValueError(f"what is excluded leaves a clip fewer than K = {K} memories: lower K")
    return S, S_top, i


class Integration(nn.Module):
    """Eq. 6-8: a cross-attention of f_e to the memories of each of FUSED, and the top-1 text beside it."""

    def __init__(
        self, width: int, embed_dim: int, text_dim: int, attention_heads: int, alpha: float, text_rms: float,
        residual: bool,
    ):  # fmt: skip
        super().__init__()
        if width % attention_heads:
            raise ValueError(f"width {width} is not a multiple of attention_heads {attention_heads}")
        self.attention_heads, self.alpha, self.residual = attention_heads, alpha, residual
        self.W_Q = nn.Linear(width, width, bias=False)  # Q^e, for all modalities
        self.W_K = nn.ModuleDict({m: nn.Linear(embed_dim, width, bias=False) for m in FUSED})
        self.W_V = nn.ModuleDict({m: nn.Linear(embed_dim, width, bias=False) for m in FUSED})
        self.W_O = nn.Linear(width, text_dim, bias=False)
        self.norm = nn.RMSNorm(text_dim, eps=1e-6)
        self.Z_fMRI = nn.Conv1d(text_dim, text_dim, kernel_size=1)
        self.Z_txt = nn.Conv1d(text_dim, text_dim, kernel_size=1)
        self.initialise_weights(text_rms)

    def initialise_weights(self, text_rms: float) -> None:
        for linear in (self.W_Q, *self.W_K.values(), *self.W_V.values(), self.W_O):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)  # keeps the variance: logits near 1
        nn.init.constant_(self.norm.weight, text_rms)  # "scale it comparably to the text embeddings"
        for zero in (*self.Z_fMRI.parameters(), *self.Z_txt.parameters()):
            nn.init.zeros_(zero)  # f_fuse starts as e_mem_txt, exactly

    def per_head(self, x: Tensor) -> Tensor:
        """(B,n,D') -> (B,heads,n,D'/heads)"""
        return x.unflatten(-1, (self.attention_heads, -1)).transpose(1, 2)

    def forward(self, f_e: Tensor, e_mem_txt: Tensor, e_mem: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """f_e (B,L,D'), top-1 text (B,L,D_txt), memories (B,K,3,D), their log-weights (B,K), added to the
        attention logits of every head and token -> f_fuse (B,L,D_txt) and, to be logged, ‖α z_f‖ / ‖z_t‖."""
        e_mem = e_mem * e_mem.shape[-1] ** 0.5  # (B,K,3,D) of unit RMS: of unit length, all logits are near 0
        Q = self.per_head(self.W_Q(f_e))  # (B,heads,L,D'/heads)
        log_w = log_w[:, None, None].expand(*Q.shape[:3], -1).to(Q.dtype)  # (B,heads,L,K)
        attended = 0
        for m in FUSED:
            e_m = e_mem[:, :, MODALITIES.index(m)]  # (B,K,D)
            K, V = self.per_head(self.W_K[m](e_m)), self.per_head(self.W_V[m](e_m))  # (B,heads,K,D'/heads)
            attended = attended + scaled_dot_product_attention(Q, K, V, log_w)  # (B,heads,L,D'/heads)
        attended = attended.transpose(1, 2).flatten(2)  # (B,L,D')
        attended = attended + f_e if self.residual else attended  # (B,L,D'), a deviation, off by default
        f_hat = self.W_O(attended)  # (B,L,D_txt)  Eq. 6
        z_f = self.Z_fMRI(self.norm(f_hat).mT).mT  # (B,L,D_txt)  Eq. 7
        z_t = self.Z_txt(e_mem_txt.mT).mT + e_mem_txt  # (B,L,D_txt)  Eq. 7
        f_fuse = z_t + self.alpha * z_f  # (B,L,D_txt)  Eq. 8
        return f_fuse, (self.alpha * z_f).detach().float().norm() / z_t.detach().float().norm()


class Remembered(NamedTuple):
    """What conditions the decoder, and where it comes from: None where nothing was sought."""

    f_fuse: Tensor  # (B,L,D_txt)
    indices: Tensor | None = None  # (B,K) i_1 ... i_K
    W_r: Tensor | None = None  # (B,3)
    S: Tensor | None = None  # (B,N), -inf where excluded
    ratio: Tensor | None = None  # () ‖α z_f‖ / ‖z_t‖

    def measures(self, pool: MemoryPool, clip: Tensor) -> dict[str, Tensor]:
        """What training logs: mean W_r, how alike training clips (B,) and their first memories look (the
        cosine of their mean frames), how often these have the clips' own caption, and the ratio."""
        if self.W_r is None:
            return {}
        named = {f"w_{m}": w for m, w in zip(MODALITIES, self.W_r.mean(0), strict=True)}
        first = self.indices[:, 0]  # (B,)
        named["alike"] = (pool.mean_frame[clip] * pool.mean_frame[first]).sum(1).mean()
        named["own_caption"] = (pool.caption[clip] == pool.caption[first]).float().mean()
        return named if self.ratio is None else named | {"z_f/z_t": self.ratio}


MODEL_CARD = (
    "---\n{{ card_data }}\n---\n\nThe Mixture-of-Memories of CineNeuron (§3.2), or an ablation of it.\n"
)


class _Saved(nn.Module, PyTorchModelHubMixin, model_card_template=MODEL_CARD):
    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs):  # the mixin lets weights be missing
        return super()._from_pretrained(strict=strict, **kwargs)


class MixtureOfMemories(_Saved):
    """Router, retrieval and integration (§3.2); the defaults are the paper's sizes with Wan2.1 as decoder.

    tokens is L, the decoder's text length (CogVideoX: 226), width D', embed_dim D, text_dim D_txt. text_rms
    comes from `MemoryPool.text_rms()`. tau scales the retrieval log-weights (a choice); it is Eq. 2's, since
    q was trained with it. residual adds f_e to what Eq. 6 attends to; the paper does not.
    """

    def __init__(
        self,
        tokens: int = 512,
        width: int = 2048,
        embed_dim: int = 768,
        text_dim: int = 4096,
        K: int = 5,
        attention_heads: int = 16,
        alpha: float = 1.0,
        tau: float = 0.07,
        text_rms: float = 1.0,
        residual: bool = False,
    ):
        super().__init__()
        self.tokens, self.K, self.tau = tokens, K, tau
        self.router = Router(width)
        self.integration = Integration(width, embed_dim, text_dim, attention_heads, alpha, text_rms, residual)

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, excluded: Tensor | None = None) -> Remembered:
        """f_e (B,L,D'), q (B,3,D), excluded as in `retrieve` -> f_fuse and all else."""
        if f_e.shape[1] != self.tokens:
            L = f_e.shape[1]
            mend = f"train_stage1.py --tokens {self.tokens}"
            raise ValueError(f"f_e has {L} tokens, the decoder's text {self.tokens}: {mend}")
        W_r = self.router(f_e)  # (B,3)  Eq. 4
        S, S_top, i = retrieve(W_r, q, pool, self.K, excluded)  # (B,N) (B,K) (B,K)  Eq. 5
        log_w = (S_top / self.tau).log_softmax(-1)  # (B,K): so Eq. 9 teaches the router, as indices cannot
        e_mem_txt = pool.text(i[:, 0], self.tokens)  # (B,L,D_txt)
        f_fuse, ratio = self.integration(f_e, e_mem_txt, pool.e[i], log_w)  # (B,L,D_txt)  Eq. 6-8
        return Remembered(f_fuse, i, W_r, S, ratio)


class TopTextMemory(_Saved):
    """Without MoM (Table 4): the same retrieval by text alone, f_fuse = e_mem_txt. It has no weights."""

    def __init__(self, tokens: int = 512, K: int = 5):
        super().__init__()
        self.tokens, self.K = tokens, K

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, excluded: Tensor | None = None) -> Remembered:
        W_r = q.new_tensor([m == "txt" for m in MODALITIES]).expand(len(q), -1)  # (B,3) of 1, 0, 0
        S, _, i = retrieve(W_r, q, pool, self.K, excluded)  # (B,N) (B,K)
        return Remembered(pool.text(i[:, 0], self.tokens), i, W_r, S)


class DirectProjection(_Saved):
    """Without integration (Table 6): "directly conditions on raw fMRI features", through a Linear."""

    def __init__(self, width: int = 2048, text_dim: int = 4096):
        super().__init__()
        self.project = nn.Linear(width, text_dim)

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, excluded: Tensor | None = None) -> Remembered:
        return Remembered(self.project(f_e))  # (B,L,D_txt)


def make_mom(
    config, tokens: int, width: int, embed_dim: int, text_dim: int, tau: float, text_rms: float
) -> MixtureOfMemories | TopTextMemory | DirectProjection:
    """The Mixture-of-Memories, or what an ablation has in its place. config: mom, integration, K,
    attention_heads, alpha and residual, options of train_stage2.py."""
    if not config.integration:
        return DirectProjection(width, text_dim)
    if not config.mom:
        return TopTextMemory(tokens, config.K)
    how = config.K, config.attention_heads, config.alpha, tau, text_rms, config.residual
    return MixtureOfMemories(tokens, width, embed_dim, text_dim, *how)


def condition(
    brain_model: nn.Module, heads: nn.Module, mom: nn.Module, pool: MemoryPool,
    x: Tensor, excluded: Tensor | None = None,
) -> tuple[Tensor, Remembered]:  # fmt: skip
    """x (B,T,N) z-scored fMRI of N voxels -> f_c (B,D), and f_fuse with what it was made of. excluded, in
    training, (B, number of memories): those that may not be retrieved."""
    f_c, f_e = brain_model(x)  # (B,D) (B,L,D')
    return f_c, mom(f_e, heads.queries(f_c), pool, excluded)

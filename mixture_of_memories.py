"""Mixture-of-Memories (§3.2, Eq. 4-8): what the fMRI brings to mind, between the Brain Model and the video decoder.

In:  f_e (B,L,D') the fMRI tokens; q (B,3,D) the fMRI side of the three similarities, in the order txt, img, act
     (f_c, f_c, φ_a(f_c): only those are aligned with the memories); the `MemoryPool` of the N training clips.
Out: f_fuse (B,L,D_txt), in place of the decoder's text embeddings.

     f_e ──► Router ──► W_r ──┐                                                                       Eq. 4
     q ───────────────────────┴─► S ─► top-K memories ──► e_mem_txt (top-1), e_mem_img, e_mem_act     Eq. 5
     f_e ─► CrossAttention(img) + CrossAttention(act) ─► f_hat ─► z_f;  e_mem_txt ─► z_t;  f_fuse     Eq. 6-8
The ablations `TopTextMemory` (w/o MoM, Table 4) and `DirectProjection` (w/o Integration, Table 6) are called alike.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

NEIGHBOURS = 15  # clips of the same segment this near in time are not retrieved in training
ALL_ALLOWED = 1.01  # a near-copy threshold above every cosine


@dataclass(frozen=True)
class MemoryPool:
    """The memories of the N training clips and, ragged, the text that their captions give the decoder (§3.2).

    Caption n is rows text_offsets[n] : text_offsets[n + 1] of text_tokens: its real tokens, no padding. The fields
    from segment on serve `excluded`. Raises ValueError where lengths disagree or rows that must be unit are not.
    """

    e: Tensor  # (N,3,D) float, unit rows: CLIP text, φ_v of the CLIP frames, ViCLIP
    text_tokens: Tensor  # (sum of the captions' lengths, D_txt) float
    text_offsets: Tensor  # (N+1,) int64
    segment: Tensor  # (N,) int64
    position: Tensor  # (N,) int64, a clip's number within its segment
    mean_frame: Tensor  # (N,D) float, unit rows: mean over frames of the CLIP frame embeddings
    near_copy: float = ALL_ALLOWED  # cosine of two mean frames above which one clip copies the other: data.near_copy_threshold

    def __post_init__(self):
        N, steps, rows = len(self.e), self.text_offsets.diff(), len(self.text_tokens)
        found = (self.e.shape[1], len(self.segment), len(self.position), len(self.mean_frame), len(steps))
        if found != (3, N, N, N, N):
            raise ValueError(f"modalities, segments, positions, frames, captions: {found}, wanted {(3, N, N, N, N)}")
        if self.text_offsets[0] != 0 or steps.sum() != rows or steps.min() < 1:
            raise ValueError(f"text offsets must rise from 0 to {rows}, the rows of the text tokens: prepare them anew")
        for name, x in (("e", self.e), ("mean_frame", self.mean_frame)):
            error = (x.float().norm(dim=-1) - 1).abs().max()
            if not error < 1e-3:  # nor NaN
                raise ValueError(f"a row of {name} has a length {error:.3g} away from 1: normalise its rows")

    def to(self, device: torch.device | str) -> "MemoryPool":
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)})

    def text(self, i: Tensor, L: int) -> Tensor:
        """Memories i (B,) -> the decoder's text embeddings (B,L,D_txt) float32, zero after the caption's last token."""
        start, length = self.text_offsets[i], self.text_offsets[i + 1] - self.text_offsets[i]  # (B,) (B,)
        if length.max() > L:
            raise ValueError(f"a caption has {length.max()} tokens, the decoder {L}: prepare the text tokens for it")
        real = torch.arange(L, device=i.device) < length[:, None]  # (B,L)
        rows = start[:, None] + real.cumsum(1) - 1  # (B,L), past the end of a caption its last
        return self.text_tokens[rows].float().masked_fill(~real[..., None], 0)  # (B,L,D_txt)

    def text_rms(self) -> float:
        """Root mean square of the real text tokens, where the gain of Eq. 7's Norm starts."""
        return self.text_tokens.float().square().mean().sqrt().item()

    def neighbours(self, clip: Tensor) -> Tensor:
        """Training clips (B,), as indices into the pool -> (B,N) bool: themselves and those near them in time."""
        apart = (self.position[clip, None] - self.position).abs()  # (B,N)
        return (self.segment[clip, None] == self.segment) & (apart <= NEIGHBOURS)

    def near_copies(self, mean_frame: Tensor) -> Tensor:
        """Unit mean frames (B,D) of any clips -> (B,N) bool, the memories that show the same."""
        return mean_frame.float() @ self.mean_frame.float().T > self.near_copy

    def excluded(self, clip: Tensor) -> Tensor:
        """Training clips (B,) -> (B,N) bool, the memories they may not retrieve, as no held-out clip can (a choice)."""
        return self.neighbours(clip) | self.near_copies(self.mean_frame[clip])


class Router(nn.Module):
    """R of Eq. 4: mean over tokens, LayerNorm, 2-layer MLP, softmax. f_e (B,L,D') -> W_r (B,3) for txt, img, act."""

    def __init__(self, width: int):
        super().__init__()
        self.R = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))

    def forward(self, f_e: Tensor) -> Tensor:
        return self.R(f_e.mean(1)).float().softmax(-1)  # (B,3)  Eq. 4


def mixture_scores(W_r: Tensor, q: Tensor, e: Tensor) -> Tensor:
    """Eq. 5: W_r (B,3), q (B,3,D) of any length, e (N,3,D) unit rows -> S (B,N), the weighted sum of three cosines.

    The sums over m and D are one inner product, so S is one matrix product; float32, as near-ties decide the rank.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = W_r.float()[..., None] * F.normalize(q.float(), dim=-1)  # (B,3,D)
        return q.flatten(1) @ e.float().flatten(1).T  # (B,N)  Eq. 5


def retrieve(W_r: Tensor, q: Tensor, pool: MemoryPool, K: int, clip: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """S (B,N), its K highest (B,K) in falling order, and their indices (B,K) (§3.2). clip (B,): training clips' indices
    into the pool; what they may not retrieve scores -inf. Raises ValueError where the pool is too small for K."""
    if len(pool.e) < K + 1:
        raise ValueError(f"the pool has {len(pool.e)} memories, K = {K} wants {K + 1} or more: more clips or a lower K")
    S = mixture_scores(W_r, q, pool.e)  # (B,N)
    if clip is not None:
        S = S.masked_fill(pool.excluded(clip), -torch.inf)  # (B,N)
    S_top, i = S.topk(K)  # (B,K) (B,K)
    if S_top.isneginf().any():
        raise ValueError(f"neighbours and copies (cosine > {pool.near_copy:.4f}) leave a clip fewer than K = {K} memories: lower K")
    return S, S_top, i


class Integration(nn.Module):
    """Eq. 6-8: two cross-attentions of f_e to the retrieved memories, fused with the top-1 text in two streams."""

    def __init__(self, width: int, embed_dim: int, text_dim: int, heads: int, alpha: float, text_rms: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads, self.alpha = heads, alpha
        self.W_Q = nn.Linear(width, width, bias=False)  # Q^e, for both
        self.W_K_img, self.W_V_img = nn.Linear(embed_dim, width, bias=False), nn.Linear(embed_dim, width, bias=False)
        self.W_K_act, self.W_V_act = nn.Linear(embed_dim, width, bias=False), nn.Linear(embed_dim, width, bias=False)
        self.W_O = nn.Linear(width, text_dim, bias=False)
        self.norm = nn.RMSNorm(text_dim, eps=1e-6)
        self.Z_fMRI, self.Z_txt = nn.Conv1d(text_dim, text_dim, 1), nn.Conv1d(text_dim, text_dim, 1)
        self.initialise_weights(text_rms)

    def initialise_weights(self, text_rms: float) -> None:
        for linear in (self.W_Q, self.W_K_img, self.W_V_img, self.W_K_act, self.W_V_act, self.W_O):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)  # keeps the variance: logits of order 1
        nn.init.constant_(self.norm.weight, text_rms)  # "scale it comparably to the text embeddings"
        for zero in (*self.Z_fMRI.parameters(), *self.Z_txt.parameters()):
            nn.init.zeros_(zero)  # f_fuse starts as e_mem_txt, exactly

    def forward(self, f_e: Tensor, e_mem_txt: Tensor, e_mem: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """f_e (B,L,D'), top-1 text (B,L,D_txt), memories (B,K,3,D), their log-weights (B,K), added to the attention
        logits of every head and token -> f_fuse (B,L,D_txt) and, to be logged, ‖α z_f‖ / ‖z_t‖."""
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B,n,D') -> (B,heads,n,D'/heads)
        _, img, act = (e_mem * e_mem.shape[-1] ** 0.5).unbind(2)  # (B,K,D) of unit RMS: at unit length logits start near 0
        Q = split(self.W_Q(f_e))  # (B,heads,L,D'/heads)
        log_w = log_w[:, None, None].expand(*Q.shape[:3], -1).to(Q.dtype)  # (B,heads,L,K)
        img = F.scaled_dot_product_attention(Q, split(self.W_K_img(img)), split(self.W_V_img(img)), log_w)
        act = F.scaled_dot_product_attention(Q, split(self.W_K_act(act)), split(self.W_V_act(act)), log_w)
        f_hat = self.W_O((img + act).transpose(1, 2).flatten(2))  # (B,L,D_txt)  Eq. 6
        z_f = self.Z_fMRI(self.norm(f_hat).mT).mT  # (B,L,D_txt)  Eq. 7
        z_t = self.Z_txt(e_mem_txt.mT).mT + e_mem_txt  # (B,L,D_txt)  Eq. 7
        f_fuse = z_t + self.alpha * z_f  # (B,L,D_txt)  Eq. 8
        return f_fuse, (self.alpha * z_f).detach().float().norm() / z_t.detach().float().norm()


class Remembered(NamedTuple):
    """What conditions the decoder, and how it was found: None where nothing was sought."""

    f_fuse: Tensor  # (B,L,D_txt)
    indices: Tensor | None = None  # (B,K) i_1 ... i_K
    W_r: Tensor | None = None  # (B,3)
    S: Tensor | None = None  # (B,N), -inf where excluded
    ratio: Tensor | None = None  # () ‖α z_f‖ / ‖z_t‖


class _Saved(nn.Module, PyTorchModelHubMixin):
    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs):  # the mixin's own default lets weights be missing
        return super()._from_pretrained(strict=strict, **kwargs)


class MixtureOfMemories(_Saved):
    """Router, retrieval and integration (§3.2); the defaults are the paper's sizes with Wan2.1 as the decoder.

    tokens is L, the decoder's text length (CogVideoX: 226), width D', embed_dim D, text_dim D_txt, text_rms `MemoryPool.text_rms()`. tau,
    the temperature of the retrieval log-weights (a choice), is Eq. 2's, at which q was trained: at 1 the K best would count the same.
    """

    def __init__(
        self,
        tokens: int = 512,
        width: int = 2048,
        embed_dim: int = 768,
        text_dim: int = 4096,
        K: int = 5,
        heads: int = 16,
        alpha: float = 1.0,
        tau: float = 0.07,
        text_rms: float = 1.0,
    ):
        super().__init__()
        self.tokens, self.K, self.tau = tokens, K, tau
        self.router = Router(width)
        self.integration = Integration(width, embed_dim, text_dim, heads, alpha, text_rms)

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, clip: Tensor | None = None) -> Remembered:
        """f_e (B,L,D'), q (B,3,D), clip as in `retrieve` -> f_fuse and all else. Raises ValueError if L is another."""
        if f_e.shape[1] != self.tokens:
            raise ValueError(f"f_e has {f_e.shape[1]} tokens, the decoder's text {self.tokens}: the two must agree")
        W_r = self.router(f_e)  # (B,3)  Eq. 4
        S, S_top, i = retrieve(W_r, q, pool, self.K, clip)  # (B,N) (B,K) (B,K)  Eq. 5
        log_w = (S_top / self.tau).log_softmax(-1)  # (B,K): through it Eq. 9 teaches the router, as indices cannot
        e_mem_txt = pool.text(i[:, 0], self.tokens)  # (B,L,D_txt)
        f_fuse, ratio = self.integration(f_e, e_mem_txt, pool.e[i], log_w)  # (B,L,D_txt)  Eq. 6-8
        return Remembered(f_fuse, i, W_r, S, ratio)


class TopTextMemory(_Saved):
    """Without MoM (Table 4): the same retrieval by text alone, f_fuse = e_mem_txt. It has no weights."""

    def __init__(self, tokens: int = 512, K: int = 5):
        super().__init__()
        self.tokens, self.K = tokens, K

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, clip: Tensor | None = None) -> Remembered:
        W_r = q.new_tensor([1, 0, 0]).expand(len(q), 3)  # (B,3)
        S, _, i = retrieve(W_r, q, pool, self.K, clip)  # (B,N) (B,K)
        return Remembered(pool.text(i[:, 0], self.tokens), i, W_r, S)


class DirectProjection(_Saved):
    """Without integration (Table 6): "directly conditions on raw fMRI features". f_fuse is a Linear of f_e."""

    def __init__(self, width: int = 2048, text_dim: int = 4096):
        super().__init__()
        self.project = nn.Linear(width, text_dim)

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, clip: Tensor | None = None) -> Remembered:
        return Remembered(self.project(f_e))  # (B,L,D_txt)

"""Mixture-of-Memories (§3.2, Eq. 4-8): what the fMRI brings to mind, between Brain Model and video decoder.

In:  f_e (B, L, D') the fMRI tokens; q (B, 3, D) the fMRI side of Eq. 5 (Stage1Heads.queries); the
     `MemoryPool` of the N training clips (this N is §3.2's; that of the fMRI x counts voxels).
Out: f_fuse (B, L, D_txt), in place of the decoder's text embeddings.

     f_e ──► Router ──► W_r ──┐                                                                       Eq. 4
     q ───────────────────────┴─► S ─► top-K memories ──► e_mem_txt (top-1), e_mem_img, e_mem_act     Eq. 5
     f_e ─► CrossAttention(img) + CrossAttention(act) ─► f_hat ─► z_f;  e_mem_txt ─► z_t;  f_fuse     Eq. 6-8

Why memories? The fMRI is sparse; what it resembles fills in what it lacks. Why three kinds, with weights?
Retrieval by text alone fails where the fMRI carries little of the text.
"""

from typing import NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, scaled_dot_product_attention


class MemoryPool(nn.Module):
    r"""$M = \{ (e_i^{txt}, e_i^{img}, e_i^{act}) \}_{i=1}^N$ (§3.2), and each memory's caption."""

    def __init__(self, e: Tensor, captions: list[Tensor]):
        super().__init__()
        self.register_buffer("e", e)  # (N, 3, D) unit vectors txt, img, act: CLIP, φ_v of CLIP's, ViCLIP
        self.captions = captions  # N times (n_i, D_txt): the decoder's text tokens, on the CPU

    def text(self, i: Tensor, L: int) -> Tensor:
        """e_mem_txt: memories i (B,) -> their captions as the decoder reads them, (B, L, D_txt), zero after
        the last token. CLIP's embedding finds a memory; the decoder gets its own text tokens."""
        captions = [self.captions[memory].float() for memory in i.tolist()]  # (n_i, D_txt) each
        captions = [pad(tokens, (0, 0, 0, L - len(tokens))) for tokens in captions]  # (L, D_txt) each
        return torch.stack(captions).to(i.device)  # (B, L, D_txt)


class Recalled(NamedTuple):
    """f_fuse, and for logs and pictures what it was made of: None where that was not made."""

    f_fuse: Tensor  # (B, L, D_txt)
    indices: Tensor | None = None  # (B, K) i_1 ... i_K
    W_r: Tensor | None = None  # (B, 3)
    S: Tensor | None = None  # (B, N), -inf where excluded
    z_f: Tensor | None = None  # (B, L, D_txt)
    z_t: Tensor | None = None  # (B, L, D_txt)


class Router(nn.Module):
    """Eq. 4: $W_r = [w^{txt}, w^{img}, w^{act}] = softmax(R(f^e))$

    How much to trust each kind of memory, clip by clip: three weights whose sum is 1. R is the mean over the
    tokens, a LayerNorm and a 2-layer MLP (a choice)."""

    def __init__(self, width: int):
        super().__init__()
        logits = nn.Linear(width, 3)
        self.R = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), logits)

    def forward(self, f_e: Tensor) -> Tensor:
        return self.R(f_e.mean(1)).float().softmax(-1)  # (B, 3)  Eq. 4


def mixture_scores(W_r: Tensor, q: Tensor, e: Tensor) -> Tensor:
    r"""Eq. 5: $S_i = \sum_{m \in \{txt, img, act\}} w_m \cdot sim(q^m, e_i^m)$

    W_r (B, 3), q (B, 3, D), e (N, 3, D) of unit vectors -> S (B, N). The paper compares f_e;
    `Stage1Heads.queries` says why q stands for it. The sum over modalities is one matrix product, of (B, 3D)
    and (N, 3D), in float32: rounding must not swap memories of close scores."""
    with torch.autocast(q.device.type, enabled=False):
        weighted = W_r.float()[..., None] * normalize(q.float(), dim=-1)  # (B, 3, D)  w_m q^m
        return weighted.flatten(1) @ e.float().flatten(1).T  # (B, N)  Eq. 5


class CrossAttention(nn.Module):
    """A term of Eq. 6: every fMRI token asks the K memories of one modality for what belongs to it."""

    def __init__(self, width: int, embed_dim: int):
        super().__init__()
        self.W_K = nn.Linear(embed_dim, width, bias=False)
        self.W_V = nn.Linear(embed_dim, width, bias=False)

    def forward(self, Q: Tensor, e_mem: Tensor, bias: Tensor) -> Tensor:
        """Q (B, heads, L, d), e_mem (B, K, D), bias of the logits (B, heads, L, K) -> (B, L, D')."""
        heads = Q.shape[1]
        keys = self.W_K(e_mem).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, K, d)
        values = self.W_V(e_mem).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, K, d)
        attended = scaled_dot_product_attention(Q, keys, values, bias)  # (B, heads, L, d)
        return attended.transpose(1, 2).flatten(2)  # (B, L, D')


class Integration(nn.Module):
    r"""Eq. 6: $\hat{f}^e = CrossAttention(Q^e, K^{img}, V^{img}) + CrossAttention(Q^e, K^{act}, V^{act})$
    Eq. 7: $z_f = Z_{fMRI}(Norm(\hat{f}^e)), \quad z_t = Z_{txt}(e_{txt}^{mem}) + e_{txt}^{mem}$
    Eq. 8: $f^{fuse} = z_t + \alpha z_f$

    Two streams: what the fMRI finds in the memories (f_e is the query, and is not added), and the caption of
    the best one. Their sum is what the video decoder reads in place of a prompt. Why zero-convolutions? Both
    start at 0, so f_fuse starts as e_mem_txt, exactly: a prompt that the decoder knows."""

    def __init__(self, width: int, embed_dim: int, text_dim: int, heads: int, alpha: float, text_rms: float):
        super().__init__()
        self.heads, self.alpha = heads, alpha
        self.W_Q = nn.Linear(width, width, bias=False)  # Q^e, for both modalities
        self.img = CrossAttention(width, embed_dim)
        self.act = CrossAttention(width, embed_dim)
        self.W_O = nn.Linear(width, text_dim, bias=False)
        self.norm = nn.RMSNorm(text_dim, eps=1e-6)
        self.Z_fMRI = nn.Conv1d(text_dim, text_dim, kernel_size=1)
        self.Z_txt = nn.Conv1d(text_dim, text_dim, kernel_size=1)
        self.initialise_weights(text_rms)

    def initialise_weights(self, text_rms: float) -> None:
        for layer in (self.W_Q, self.img.W_K, self.act.W_K, self.img.W_V, self.act.W_V, self.W_O):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # logits of unit variance
        for zero in (*self.Z_fMRI.parameters(), *self.Z_txt.parameters()):
            nn.init.zeros_(zero)
        nn.init.constant_(self.norm.weight, text_rms)  # "scale it comparably to the text embeddings"

    def forward(
        self, f_e: Tensor, e_mem_txt: Tensor, e_mem_img: Tensor, e_mem_act: Tensor, log_w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f_e (B, L, D'), text (B, L, D_txt), image and action memories (B, K, D), their log-weights (B, K),
        which are added to the attention's logits -> f_fuse, z_f, z_t (B, L, D_txt)."""
        Q = self.W_Q(f_e).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)
        bias = log_w[:, None, None].to(Q.dtype).expand(*Q.shape[:3], -1)  # (B, heads, L, K)
        f_hat = self.img(Q, e_mem_img, bias) + self.act(Q, e_mem_act, bias)  # (B, L, D')  Eq. 6
        projected = self.W_O(f_hat)  # (B, L, D_txt), the decoder's width (a choice)
        z_f = self.Z_fMRI(self.norm(projected).mT).mT  # (B, L, D_txt)  Eq. 7
        z_t = self.Z_txt(e_mem_txt.mT).mT + e_mem_txt  # (B, L, D_txt)  Eq. 7
        f_fuse = z_t + self.alpha * z_f  # (B, L, D_txt)  Eq. 8
        return f_fuse, z_f, z_t


class MixtureOfMemories(nn.Module, PyTorchModelHubMixin):
    """Router, retrieval and integration (§3.2); the defaults are the paper's sizes with Wan2.1 as decoder."""

    def __init__(
        self,
        tokens: int = 512,  # L, the decoder's text length
        width: int = 2048,  # D'
        embed_dim: int = 768,  # D
        text_dim: int = 4096,  # D_txt
        K: int = 5,
        attention_heads: int = 16,
        alpha: float = 1.0,  # Eq. 8
        tau: float = 0.07,  # of log_w in forward; Eq. 2's, since q was trained with it
        text_rms: float = 1.0,  # of the decoder's text tokens, where the gain of Eq. 7's Norm starts
    ):
        super().__init__()
        self.tokens, self.K, self.tau = tokens, K, tau
        self.router = Router(width)
        self.integration = Integration(width, embed_dim, text_dim, attention_heads, alpha, text_rms)

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, excluded: Tensor | None = None) -> Recalled:
        """f_e (B, L, D'), q (B, 3, D); excluded (B, N) bool, in training: these may not be retrieved.

        An index has no gradient. So the K scores enter the attention, too, as log-weights: thus Eq. 9 teaches
        the router and f_c what to retrieve (a choice)."""
        W_r = self.router(f_e)  # (B, 3)  Eq. 4
        S = mixture_scores(W_r, q, pool.e)  # (B, N)  Eq. 5
        S = S if excluded is None else S.masked_fill(excluded, -torch.inf)
        S_top, i = S.topk(self.K)  # (B, K), (B, K)

        e_mem_txt = pool.text(i[:, 0], self.tokens)  # (B, L, D_txt), of the top-1 memory
        D = pool.e.shape[-1]
        e_mem = D**0.5 * pool.e[i]  # (B, K, 3, D); unit vectors times √D have entries near 1
        _, e_mem_img, e_mem_act = e_mem.unbind(2)  # (B, K, D) each; text enters as e_mem_txt
        log_w = (S_top / self.tau).log_softmax(-1)  # (B, K)
        f_fuse, z_f, z_t = self.integration(f_e, e_mem_txt, e_mem_img, e_mem_act, log_w)  # Eq. 6-8
        return Recalled(f_fuse, i, W_r, S, z_f, z_t)


class TopTextMemory(nn.Module, PyTorchModelHubMixin):
    """Without MoM (Table 4): the same retrieval by text alone, f_fuse = e_mem_txt. It has no weights."""

    def __init__(self, tokens: int = 512, K: int = 5):
        super().__init__()
        self.tokens, self.K = tokens, K

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, excluded: Tensor | None = None) -> Recalled:
        W_r = torch.tensor([1.0, 0.0, 0.0], device=q.device).expand(len(q), 3)  # (B, 3)
        S = mixture_scores(W_r, q, pool.e)  # (B, N)
        S = S if excluded is None else S.masked_fill(excluded, -torch.inf)
        i = S.topk(self.K).indices  # (B, K)
        return Recalled(pool.text(i[:, 0], self.tokens), i, W_r, S)


class DirectProjection(nn.Module, PyTorchModelHubMixin):
    """w/o integration (Table 6): "directly conditions the generator on raw fMRI features", by a Linear."""

    def __init__(self, width: int = 2048, text_dim: int = 4096):
        super().__init__()
        self.project = nn.Linear(width, text_dim)

    def forward(self, f_e: Tensor, q: Tensor, pool: MemoryPool, excluded: Tensor | None = None) -> Recalled:
        return Recalled(self.project(f_e))  # (B, L, D_txt)


def condition(brain_model, heads, mom, pool: MemoryPool, x: Tensor, excluded: Tensor | None = None):
    """From the fMRI to the prompt, in training, samples and evaluation (§3.3): x (B, T, N) -> f_c (B, D), and
    f_fuse with what it was made of."""
    f_c, f_e = brain_model(x)  # (B, D), (B, L, D')
    return f_c, mom(f_e, heads.queries(f_c), pool, excluded)

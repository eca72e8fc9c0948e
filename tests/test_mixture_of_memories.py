"""mixture_of_memories.py: Eq. 4-8 against loops and torch's own attention, Eq. 9's gradients, the ablations."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from tiny import away_from_zero
from torch import nn

from brain_model import BrainModel
from heads import Stage1Heads
from mixture_of_memories import (
    DirectProjection,
    MemoryPool,
    MixtureOfMemories,
    Router,
    TopTextMemory,
    condition,
    mixture_scores,
)

B, L, WIDTH, D, D_TXT, HEADS, K, N = 4, 6, 16, 12, 10, 2, 3, 60


torch.manual_seed(0)
LENGTHS = torch.randint(1, L + 1, (N,)).tolist()  # of the captions
POOL = MemoryPool(F.normalize(torch.randn(N, 3, D), dim=-1), [2 * torch.randn(n, D_TXT) for n in LENGTHS])
F_E, Q = torch.randn(B, L, WIDTH), 7 * torch.randn(B, 3, D)  # of any length
# (B, N): the memories that equal weights would retrieve, and every seventh
BEST = mixture_scores(torch.full((B, 3), 1 / 3), Q, POOL.e).topk(K).indices
EXCLUDED = (torch.arange(N).expand(B, N) % 7 == 0).scatter(1, BEST, True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_mom(alpha: float = 1.0, tau: float = 0.07, text_rms: float = 1.0) -> MixtureOfMemories:
    return MixtureOfMemories(L, WIDTH, D, D_TXT, K, HEADS, alpha, tau, text_rms)


def make_trained(**options) -> MixtureOfMemories:
    away_from_zero(mom := make_mom(**options))
    return mom


def captions_by_hand(i: torch.Tensor) -> torch.Tensor:
    text = torch.zeros(len(i), L, D_TXT)
    for b, n in enumerate(i.tolist()):
        text[b, : LENGTHS[n]] = POOL.captions[n]
    return text


def test_router_is_a_softmax_of_an_mlp_of_the_mean_token():
    router = Router(WIDTH)
    for parameter in router.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    norm, first, _, second = router.R
    h = sum(F_E[:, token] for token in range(L)) / L
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    h = h * norm.weight + norm.bias
    logits = F.gelu(h @ first.weight.T + first.bias) @ second.weight.T + second.bias
    W_r = router(F_E)
    torch.testing.assert_close(W_r, logits.exp() / logits.exp().sum(-1, keepdim=True))
    assert W_r.shape == (B, 3)


def test_mixture_scores_against_a_loop_of_cosine_similarities():
    W_r = torch.rand(B, 3).softmax(-1)
    S = mixture_scores(W_r, Q, POOL.e)
    assert S.shape == (B, N)
    for b in range(B):
        for n in range(N):
            cosines = F.cosine_similarity(Q[b], POOL.e[n], dim=-1)  # (3,)
            torch.testing.assert_close(S[b, n], (W_r[b] * cosines).sum(), atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = mixture_scores(W_r, Q, POOL.e)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, S)


def test_the_highest_scores_are_retrieved_best_first():
    mom = make_mom()
    free, bound = mom(F_E, Q, POOL), mom(F_E, Q, POOL, EXCLUDED)
    assert torch.equal(bound.S.isneginf(), EXCLUDED) and torch.equal(bound.S[~EXCLUDED], free.S[~EXCLUDED])
    torch.testing.assert_close(free.S, mixture_scores(mom.router(F_E), Q, POOL.e))
    for recalled in (free, bound):
        assert torch.equal(recalled.indices, recalled.S.argsort(1, descending=True)[:, :K])
    assert not EXCLUDED.gather(1, bound.indices).any() and EXCLUDED.gather(1, free.indices).any()


def test_integration_is_torchs_attention_of_each_kind_and_two_convolutions():
    mom = make_trained(alpha=0.7, tau=0.2, text_rms=1.7)
    out, part = mom(F_E, Q, POOL), mom.integration
    best = out.S.gather(1, out.indices) / 0.2
    log_w = best - best.exp().sum(-1, keepdim=True).log()  # (B, K)
    attended = 0
    for m, cross in ((1, part.img), (2, part.act)):
        torchs = nn.MultiheadAttention(WIDTH, HEADS, bias=False, kdim=D, vdim=D, batch_first=True)
        torchs.load_state_dict({
            "q_proj_weight": part.W_Q.weight, "k_proj_weight": cross.W_K.weight, "v_proj_weight": cross.W_V.weight,
            "out_proj.weight": torch.eye(WIDTH),
        })  # fmt: skip
        memories = torch.stack([POOL.e[i, m] * D**0.5 for i in out.indices])  # (B, K, D)
        mask = log_w[:, None].expand(B, L, K).repeat_interleave(HEADS, 0)  # (B*heads, L, K)
        attended = attended + torchs(F_E, memories, memories, attn_mask=mask)[0]  # Eq. 6
    f_hat = attended @ part.W_O.weight.T
    normed = 1.7 * f_hat / f_hat.square().mean(-1, keepdim=True).sqrt()
    z_f = normed @ part.Z_fMRI.weight[..., 0].T + part.Z_fMRI.bias  # Eq. 7
    text = captions_by_hand(out.indices[:, 0])
    z_t = text @ part.Z_txt.weight[..., 0].T + part.Z_txt.bias + text  # Eq. 7
    for result, expected in ((out.z_f, z_f), (out.z_t, z_t), (out.f_fuse, z_t + 0.7 * z_f)):  # Eq. 8
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


def test_weights_of_integration_keep_unit_variance_and_the_defaults_are_the_papers():
    for name, p in MixtureOfMemories(4, 96, 64, 80, K, HEADS).integration.named_parameters():
        if "W_" in name:
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.05), name
    with torch.device("meta"):
        mom = MixtureOfMemories()
    assert (mom.K, mom.tokens, mom.tau, mom.integration.alpha) == (TopTextMemory().K, 512, 0.07, 1.0)
    shapes = {name: tuple(p.shape) for name, p in mom.integration.named_parameters()}
    assert shapes["img.W_K.weight"] == (2048, 768) and shapes["W_O.weight"] == (4096, 2048) and mom.K == 5
    assert mom.integration.heads == 16 and DirectProjection().project.weight.shape == (4096, 2048)


def test_bfloat16_autocast_runs_forward_and_backward():
    mom = make_trained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mom(F_E, Q, POOL)
    out.f_fuse.float().square().mean().backward()
    exact = mom(F_E, Q, POOL).f_fuse
    assert (out.f_fuse - exact).norm() < 0.02 * exact.norm()
    assert all(parameter.grad.isfinite().all() for parameter in mom.parameters())


def test_router_and_brain_model_learn_from_the_diffusion_loss_after_one_step():
    """At step 0 the zero-convolutions stop every gradient but their own; one step later all is reached."""
    mom, denoiser, epsilon = make_mom(), nn.Linear(D_TXT, D_TXT), torch.randn(B, L, D_TXT)
    f_e, q = F_E.clone().requires_grad_(), Q.clone().requires_grad_()
    trainable = dict(mom.named_parameters()) | {"f_e": f_e, "q": q}
    optimizer, out = torch.optim.AdamW(mom.parameters(), lr=1e-3), mom(f_e, q, POOL)
    assert torch.equal(out.f_fuse, captions_by_hand(out.indices[:, 0])) and not out.z_f.any()

    def reached() -> set[str]:
        for x in trainable.values():
            x.grad = None
        (epsilon - denoiser(mom(f_e, q, POOL).f_fuse)).square().mean().backward()
        return {name for name, x in trainable.items() if x.grad.abs().max() > 0}

    zero_convs = {name for name in trainable if ".Z_" in name}
    assert len(zero_convs) == 4 and reached() == zero_convs
    optimizer.step()
    assert reached() == trainable.keys()


def test_condition_is_brain_model_queries_and_mixture():
    brain_model, heads = BrainModel(7, 2, L, WIDTH, 1, HEADS, D), Stage1Heads(D, 3, 4)
    nn.init.normal_(heads.phi_a.mlp[3].weight)
    mom, x = make_trained(), torch.randn(B, 2, 7)
    expected, f_e = brain_model(x)
    q = torch.stack([expected, expected, heads.phi_a(expected)], 1)
    f_c, recalled = condition(brain_model, heads, mom, POOL, x, EXCLUDED)
    assert torch.equal(f_c, expected) and torch.equal(recalled.S.isneginf(), EXCLUDED)
    assert torch.equal(recalled.f_fuse, mom(f_e, q, POOL, EXCLUDED).f_fuse)


def test_ragged_text_is_padded_with_zeros_in_float32_and_captions_do_not_move():
    i = torch.tensor([5, 0, 59, 5])
    text = POOL.text(i, L + 2)
    assert text.shape == (4, L + 2, D_TXT) and not text[:, L:].any()
    assert torch.equal(text[:, :L], captions_by_hand(i))
    half = MemoryPool(POOL.e, [caption.half() for caption in POOL.captions]).text(i, L)
    assert half.dtype == torch.float32 and torch.equal(half, text[:, :L].half().float())
    moved = deepcopy(POOL).to("meta")  # shows what a GPU would
    assert moved.e.is_meta and not any(caption.is_meta for caption in moved.captions)
    assert POOL.state_dict().keys() == {"e"} and not [*POOL.parameters()]


def test_without_mom_text_alone_retrieves_and_conditions():
    mom = TopTextMemory(tokens=L, K=K)
    for bound in (None, EXCLUDED):
        out = mom(F_E, Q, POOL, bound)
        cosines = F.cosine_similarity(Q[:, None, 0], POOL.e[None, :, 0], dim=-1)  # (B, N)
        cosines = cosines if bound is None else cosines.masked_fill(bound, -torch.inf)
        torch.testing.assert_close(out.S, cosines)
        best = cosines.argsort(1, descending=True)[:, :K]
        assert torch.equal(out.indices, best)
        assert torch.equal(out.f_fuse, captions_by_hand(best[:, 0]))
        assert torch.equal(out.W_r, torch.tensor([[1.0, 0, 0]] * B)) and out.z_f is None


def test_without_integration_f_e_is_projected():
    projection = DirectProjection(width=WIDTH, text_dim=D_TXT)
    out = projection(F_E, Q, POOL)
    torch.testing.assert_close(out.f_fuse, F_E @ projection.project.weight.T + projection.project.bias)
    assert out.indices is None and out.W_r is None

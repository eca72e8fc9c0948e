"""mixture_of_memories.py: Eq. 4-8 against independent formulas, Eq. 9's gradients, the ablations."""

import pytest
import torch
import torch.nn.functional as F

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


def make_pool(D: int = D, D_txt: int = D_TXT) -> MemoryPool:
    """Random memories, captions of 1 to L tokens."""
    lengths = torch.randint(1, L + 1, (N,)).tolist()
    return MemoryPool(F.normalize(torch.randn(N, 3, D), dim=-1), [2 * torch.randn(n, D_txt) for n in lengths])


def make_mom(alpha: float = 1.0, tau: float = 0.07, text_rms: float = 1.0) -> MixtureOfMemories:
    return MixtureOfMemories(L, WIDTH, D, D_TXT, K, HEADS, alpha, tau, text_rms)


def trained(mom: MixtureOfMemories) -> MixtureOfMemories:
    """With zero-convs that are no longer zero, as after some training."""
    for parameter in (*mom.integration.Z_fMRI.parameters(), *mom.integration.Z_txt.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return mom


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def pool() -> MemoryPool:
    return make_pool()


@pytest.fixture
def f_e() -> torch.Tensor:
    return torch.randn(B, L, WIDTH)


@pytest.fixture
def q() -> torch.Tensor:
    return 7 * torch.randn(B, 3, D)  # of any length


@pytest.fixture
def W_r() -> torch.Tensor:
    return torch.rand(B, 3).softmax(-1)


@pytest.fixture
def excluded(pool, q) -> torch.Tensor:
    """(B, N): the memories that equal weights would retrieve, and every seventh."""
    excluded = torch.arange(N).expand(B, N) % 7 == 0
    best = mixture_scores(torch.full((B, 3), 1 / 3), q, pool.e).topk(K).indices
    return excluded.scatter(1, best, True)


def captions_by_hand(pool: MemoryPool, i: torch.Tensor) -> torch.Tensor:
    text = torch.zeros(len(i), L, D_TXT)
    for b, n in enumerate(i.tolist()):
        text[b, : len(pool.captions[n])] = pool.captions[n]
    return text


# ---------------------------------------------------------------- Eq. 4 and 5


def test_router_is_a_softmax_of_an_mlp_of_the_mean_token(f_e):
    router = Router(WIDTH)
    W_r = router(f_e)
    norm, first, _, second = router.R
    h = sum(f_e[:, token] for token in range(L)) / L
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    logits = F.gelu(h @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(W_r, logits.exp() / logits.exp().sum(-1, keepdim=True))
    assert W_r.shape == (B, 3)
    torch.testing.assert_close(W_r.sum(-1), torch.ones(B))
    torch.testing.assert_close(router(f_e[:, torch.randperm(L)]), W_r)  # a mean knows no order


def test_mixture_scores_against_a_loop_of_cosine_similarities(pool, W_r, q):
    S = mixture_scores(W_r, q, pool.e)
    assert S.shape == (B, N)
    for b in range(B):
        for n in range(N):
            cosines = F.cosine_similarity(q[b], pool.e[n], dim=-1)  # (3,)
            torch.testing.assert_close(S[b, n], (W_r[b] * cosines).sum(), atol=1e-6, rtol=1e-5)


def test_mixture_scores_keep_float32_under_autocast(pool, W_r, q):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        S = mixture_scores(W_r, q, pool.e)
    assert S.dtype == torch.float32 and torch.equal(S, mixture_scores(W_r, q, pool.e))


def test_the_highest_scores_are_retrieved_best_first(pool, f_e, q, excluded):
    mom = make_mom()
    free, bound = mom(f_e, q, pool), mom(f_e, q, pool, excluded)
    assert torch.equal(bound.S.isneginf(), excluded) and torch.equal(bound.S[~excluded], free.S[~excluded])
    torch.testing.assert_close(free.S, mixture_scores(mom.router(f_e), q, pool.e))
    for recalled in (free, bound):
        for b in range(B):
            order = sorted(range(N), key=lambda n, S=recalled.S[b]: -S[n].item())
            assert recalled.indices[b].tolist() == order[:K]
    assert not excluded.gather(1, bound.indices).any() and excluded.gather(1, free.indices).any()


def test_a_memory_is_retrieved_by_its_own_embeddings(pool, f_e):
    assert make_mom()(f_e, pool.e[:B], pool).indices[:, 0].tolist() == [*range(B)]


# ---------------------------------------------------------------- Eq. 6-8


def test_integration_against_explicit_attention_loops(pool, f_e, q):
    mom = trained(make_mom(alpha=0.7, tau=0.2, text_rms=1.7))
    kept = {}
    mom.integration.W_O.register_forward_hook(lambda module, args, out: kept.update(f_hat=out))
    mom.integration.register_forward_hook(lambda module, args, out: kept.update(log_w=args[4]))
    out = mom(f_e, q, pool)

    p = {name: weight.detach() for name, weight in mom.integration.named_parameters()}
    d = WIDTH // HEADS
    f_hat, f_fuse = torch.zeros(B, L, D_TXT), torch.zeros(B, L, D_TXT)
    e_mem_txt = captions_by_hand(pool, out.indices[:, 0])
    for b in range(B):
        scores = out.S[b, out.indices[b]] / 0.2
        log_w = scores - scores.exp().sum().log()
        torch.testing.assert_close(kept["log_w"][b], log_w, atol=1e-5, rtol=1e-5)
        for token in range(L):
            Q, attended = p["W_Q.weight"] @ f_e[b, token], torch.zeros(WIDTH)
            for m, name in ((1, "img"), (2, "act")):
                memories = [pool.e[n, m] * D**0.5 for n in out.indices[b]]
                keys = [p[f"{name}.W_K.weight"] @ e for e in memories]
                values = [p[f"{name}.W_V.weight"] @ e for e in memories]
                for head in (slice(h * d, (h + 1) * d) for h in range(HEADS)):
                    logits = torch.stack([Q[head] @ key[head] / d**0.5 for key in keys])
                    a = (
                        log_w.exp() * logits.exp()
                    )  # the retrieval weight of a memory multiplies its attention
                    attended[head] += sum(x / a.sum() * v[head] for x, v in zip(a, values, strict=True))
            f_hat[b, token] = p["W_O.weight"] @ attended  # Eq. 6
            norm = f_hat[b, token] / f_hat[b, token].square().mean().sqrt() * 1.7
            z_f = p["Z_fMRI.weight"][..., 0] @ norm + p["Z_fMRI.bias"]  # Eq. 7
            text = e_mem_txt[b, token]
            z_t = p["Z_txt.weight"][..., 0] @ text + p["Z_txt.bias"] + text  # Eq. 7
            f_fuse[b, token] = z_t + 0.7 * z_f  # Eq. 8
    torch.testing.assert_close(kept["f_hat"], f_hat, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.f_fuse, f_fuse, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.z_t + 0.7 * out.z_f, out.f_fuse)


def test_at_step_0_f_fuse_is_the_top_1_text_exactly(pool, f_e, q):
    out = make_mom()(f_e, q, pool)
    assert torch.equal(out.f_fuse, captions_by_hand(pool, out.indices[:, 0])) and not out.z_f.any()
    assert out.indices.shape == (B, K) and out.W_r.shape == (B, 3) and out.S.shape == (B, N)


def test_the_norm_brings_f_hat_to_the_scale_of_the_text(pool, f_e, q):
    text_rms = torch.cat(pool.captions).square().mean().sqrt()
    kept, mom = [], make_mom(text_rms=text_rms.item())
    mom.integration.norm.register_forward_hook(lambda module, args, out: kept.append(out))
    mom(f_e, q, pool)
    torch.testing.assert_close(kept[0].square().mean().sqrt(), text_rms)


def test_f_hat_differs_between_tokens_from_the_start():
    """Unit vectors of D = 768 must not make every logit vanish: then all tokens would read the same from memory."""
    mom = MixtureOfMemories(tokens=L, width=64, embed_dim=768, text_dim=32, K=5, attention_heads=4)
    kept = []
    mom.integration.W_O.register_forward_hook(lambda module, args, out: kept.append(out))
    mom(torch.randn(8, L, 64), torch.randn(8, 3, 768), make_pool(D=768, D_txt=32))
    between_tokens = (kept[0] - kept[0].mean(1, keepdim=True)).square().mean()
    assert between_tokens / kept[0].square().mean() > 0.1


def test_a_batch_in_another_order_gives_the_same_in_that_order(pool, f_e, q):
    mom, order = trained(make_mom()), torch.tensor([2, 0, 3, 1])
    out, permuted = mom(f_e, q, pool), mom(f_e[order], q[order], pool)
    assert torch.equal(permuted.indices, out.indices[order])
    torch.testing.assert_close(permuted.f_fuse, out.f_fuse[order])


def test_bfloat16_autocast_runs_forward_and_backward(pool, f_e, q):
    mom = trained(make_mom())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mom(f_e, q, pool)
    out.f_fuse.float().square().mean().backward()
    torch.testing.assert_close(out.f_fuse.float(), mom(f_e, q, pool).f_fuse, atol=0.3, rtol=0.1)
    assert all(parameter.grad.isfinite().all() for parameter in mom.parameters())


# ---------------------------------------------------------------- Eq. 9


def test_router_and_brain_model_learn_from_the_diffusion_loss_after_one_step(pool, f_e, q):
    """Zero-convs stop every gradient at step 0 but their own; one step later all that is to train is reached."""
    mom, denoiser, epsilon = make_mom(), torch.nn.Linear(D_TXT, D_TXT), torch.randn(B, L, D_TXT)
    trainable = dict(mom.named_parameters()) | {"f_e": f_e.requires_grad_(), "q": q.requires_grad_()}
    optimizer = torch.optim.AdamW(mom.parameters(), lr=1e-3)

    def reached() -> set[str]:
        for x in trainable.values():
            x.grad = None
        (epsilon - denoiser(mom(f_e, q, pool).f_fuse)).square().mean().backward()
        return {name for name, x in trainable.items() if x.grad.abs().max() > 0}

    zero_convs = {name for name in trainable if ".Z_" in name}
    assert len(zero_convs) == 4 and reached() == zero_convs
    optimizer.step()
    assert reached() == trainable.keys()


def test_the_log_weights_reward_the_modality_that_ranks_a_memory_first(pool):
    """Memory 0 is near by action and far by text and image: to be given more weight, it asks for a higher w_act."""
    W_r = torch.full((1, 3), 1 / 3, requires_grad=True)
    q = pool.e[:1] * torch.tensor([-1, -1, 1])[:, None]
    log_w = mixture_scores(W_r, q, pool.e[:K]).log_softmax(-1)
    (gradient,) = torch.autograd.grad(log_w[0, 0], W_r)
    assert gradient[0, 2] > 0 > max(gradient[0, 0], gradient[0, 1])


def test_condition_is_brain_model_queries_and_mixture(pool, excluded):
    brain_model, heads = BrainModel(7, 2, L, WIDTH, 1, HEADS, D), Stage1Heads(D, 3, 4)
    torch.nn.init.normal_(heads.phi_a.mlp[3].weight)
    mom, x = trained(make_mom()), torch.randn(B, 2, 7)
    expected, f_e = brain_model(x)
    q = torch.stack([expected, expected, heads.phi_a(expected)], 1)
    for bound in (None, excluded):
        f_c, recalled = condition(brain_model, heads, mom, pool, x, bound)
        assert torch.equal(f_c, expected)
        assert torch.equal(recalled.f_fuse, mom(f_e, q, pool, bound).f_fuse)
        assert recalled.S.isneginf().any() == (bound is not None)


# ---------------------------------------------------------------- the memories, saving, the ablations


def test_ragged_text_is_padded_with_zeros_in_float32(pool):
    i = torch.tensor([5, 0, 59, 5])
    text = pool.text(i, L + 2)
    assert text.shape == (4, L + 2, D_TXT) and not text[:, L:].any()
    assert torch.equal(text[:, :L], captions_by_hand(pool, i))
    half = MemoryPool(pool.e, [caption.half() for caption in pool.captions]).text(i, L)
    assert half.dtype == torch.float32 and torch.equal(half, text[:, :L].half().float())


def test_the_captions_stay_where_they_are_when_the_pool_moves(pool):
    captions = [*pool.captions]
    moved = pool.to("meta")  # shows what a GPU would
    assert moved.e.is_meta and all(a is b for a, b in zip(moved.captions, captions, strict=True))
    assert pool.state_dict().keys() == {"e"} and not [*pool.parameters()]


def test_save_and_load(tmp_path, pool, f_e, q):
    mom = trained(make_mom(alpha=0.5, tau=0.3, text_rms=2.5))
    mom.save_pretrained(tmp_path)
    loaded = MixtureOfMemories.from_pretrained(tmp_path)
    assert (loaded.K, loaded.tau, loaded.integration.alpha, loaded.tokens) == (K, 0.3, 0.5, L)
    assert torch.equal(loaded(f_e, q, pool).f_fuse, mom(f_e, q, pool).f_fuse)


def test_without_mom_text_alone_retrieves_and_conditions(tmp_path, pool, f_e, q, excluded):
    TopTextMemory(tokens=L, K=K).save_pretrained(tmp_path)
    mom = TopTextMemory.from_pretrained(tmp_path)
    for bound in (None, excluded):
        out = mom(f_e, q, pool, bound)
        scores = q[:, 0] @ pool.e[:, 0].T  # (B, N)
        best = (scores if bound is None else scores.masked_fill(bound, -99)).argmax(1)
        assert torch.equal(out.indices[:, 0], best) and out.indices.shape == (B, K)
        assert torch.equal(out.f_fuse, captions_by_hand(pool, best))
        assert torch.equal(out.W_r, torch.tensor([[1.0, 0, 0]] * B)) and out.z_f is None
    assert torch.equal(out.S.isneginf(), excluded)


def test_without_integration_f_e_is_projected(tmp_path, pool, f_e, q):
    projection = DirectProjection(width=WIDTH, text_dim=D_TXT)
    projection.save_pretrained(tmp_path)
    out = DirectProjection.from_pretrained(tmp_path)(f_e, q, pool)
    torch.testing.assert_close(out.f_fuse, f_e @ projection.project.weight.T + projection.project.bias)
    assert out.indices is None and out.W_r is None

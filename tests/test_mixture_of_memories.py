"""mixture_of_memories.py: Eq. 4-8 against independent formulas, the exclusion rule, Eq. 9's gradients, bad
input."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.stats import wasserstein_distance

import mixture_of_memories
from brain_model import BrainModel
from data import near_copy_threshold
from heads import Stage1Heads
from mixture_of_memories import (
    ALL_ALLOWED,
    MODALITIES,
    DirectProjection,
    MemoryPool,
    MixtureOfMemories,
    Remembered,
    Router,
    TopTextMemory,
    condition,
    mixture_scores,
    retrieve,
)

B, L, WIDTH, D, D_TXT, HEADS, K = 4, 6, 16, 12, 10, 2, 3


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def make_pool(
    N: int = 60, D: int = D, D_txt: int = D_TXT, captions: int = L, per_segment: int = 20, modalities: int = 3
) -> MemoryPool:
    """Random memories in segments of 20 clips, captions of 1 to `captions` tokens."""
    lengths = torch.randint(1, captions + 1, (N,))
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    return MemoryPool(
        e=unit(N, modalities, D),
        text_tokens=2 * torch.randn(int(offsets[-1]), D_txt),
        text_offsets=offsets,
        caption=torch.arange(N),
        segment=torch.arange(N) // per_segment,
        position=torch.arange(N) % per_segment,
        mean_frame=unit(N, D),
    )


def make_mom(**changes) -> MixtureOfMemories:
    sizes = {"tokens": L, "width": WIDTH, "embed_dim": D, "text_dim": D_TXT, "K": K, "attention_heads": HEADS}
    return MixtureOfMemories(**sizes | changes)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def pool() -> MemoryPool:
    return make_pool()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, L, WIDTH), torch.randn(B, 3, D)


def opened(mom: MixtureOfMemories) -> MixtureOfMemories:
    """With zero-convs that are no longer zero, as after some training."""
    for parameter in (*mom.integration.Z_fMRI.parameters(), *mom.integration.Z_txt.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return mom


def captions_by_hand(pool: MemoryPool, i: torch.Tensor, L: int) -> torch.Tensor:
    rows = torch.zeros(len(i), L, pool.text_tokens.shape[1])
    for b, n in enumerate(i.tolist()):
        tokens = pool.text_tokens[pool.text_offsets[n] : pool.text_offsets[n + 1]]
        rows[b, : len(tokens)] = tokens
    return rows


# Eq. 4


def test_router_is_a_softmax_of_an_mlp_of_the_mean_token():
    router, f_e = Router(WIDTH), torch.randn(B, L, WIDTH)
    W_r = router(f_e)
    norm, first, _, second = router.R
    h = sum(f_e[:, token] for token in range(L)) / L
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    logits = F.gelu(h @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert W_r.shape == (B, 3)
    torch.testing.assert_close(W_r, expected)
    torch.testing.assert_close(W_r.sum(-1), torch.ones(B))
    torch.testing.assert_close(router(f_e[:, torch.randperm(L)]), W_r)  # a mean knows no order


# Eq. 5


def test_mixture_scores_against_a_loop_of_cosine_similarities(pool):
    W_r, q = torch.rand(B, 3).softmax(-1), 7 * torch.randn(B, 3, D)  # q of any length
    S = mixture_scores(W_r, q, pool.e)
    assert S.shape == (B, 60)
    for b in range(B):
        for n in range(60):
            cosines = [F.cosine_similarity(q[b, m], pool.e[n, m], dim=0) for m in range(3)]
            expected = sum(w * c for w, c in zip(W_r[b], cosines, strict=True))
            torch.testing.assert_close(S[b, n], expected, atol=1e-6, rtol=1e-5)


def test_mixture_scores_keep_float32_under_autocast(pool):
    W_r, q = torch.rand(B, 3).softmax(-1), torch.randn(B, 3, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        S = mixture_scores(W_r, q, pool.e)
    assert S.dtype == torch.float32
    assert torch.equal(S, mixture_scores(W_r, q, pool.e))


def test_top_k_are_the_highest_scores_best_first(pool):
    W_r, q = torch.rand(B, 3).softmax(-1), torch.randn(B, 3, D)
    S, S_top, i = retrieve(W_r, q, pool, K, None)
    for b in range(B):
        by_hand = sorted(range(60), key=lambda n, b=b: -S[b, n].item())[:K]
        assert i[b].tolist() == by_hand
        assert S_top[b].tolist() == [S[b, n].item() for n in by_hand]


def test_a_memory_is_retrieved_by_its_own_embeddings(pool):
    i = retrieve(torch.full((B, 3), 1 / 3), pool.e[:B], pool, K, None)[2]
    assert i[:, 0].tolist() == list(range(B))


# Eq. 6-8


def test_integration_against_explicit_attention_loops(pool, inputs):
    f_e, q = inputs
    mom = opened(make_mom(alpha=0.7, tau=0.2, text_rms=1.7))
    kept = {}
    mom.integration.W_O.register_forward_hook(lambda module, args, out: kept.update(f_hat=out))
    mom.integration.register_forward_hook(lambda module, args, out: kept.update(log_w=args[3]))
    out = mom(f_e, q, pool)

    p = {name: weight.detach() for name, weight in mom.integration.named_parameters()}
    d = WIDTH // HEADS
    f_hat, f_fuse = torch.zeros(B, L, D_TXT), torch.zeros(B, L, D_TXT)
    e_mem_txt = captions_by_hand(pool, out.indices[:, 0], L)
    for b in range(B):
        scores = [out.S[b, n].item() / 0.2 for n in out.indices[b]]
        log_w = torch.tensor(scores) - torch.tensor(scores).exp().sum().log()
        torch.testing.assert_close(kept["log_w"][b], log_w, atol=1e-5, rtol=1e-5)
        for token in range(L):
            Q, attended = p["W_Q.weight"] @ f_e[b, token], torch.zeros(WIDTH)
            for m, name in ((1, "img"), (2, "act")):
                memories = [pool.e[n, m] * D**0.5 for n in out.indices[b]]
                keys = [p[f"W_K.{name}.weight"] @ e for e in memories]
                values = [p[f"W_V.{name}.weight"] @ e for e in memories]
                for head in (slice(h * d, (h + 1) * d) for h in range(HEADS)):
                    # the retrieval weight of a memory multiplies its attention
                    a = [
                        w * (Q[head] @ key[head] / d**0.5).exp()
                        for w, key in zip(log_w.exp(), keys, strict=True)
                    ]
                    attended[head] += sum(x / sum(a) * v[head] for x, v in zip(a, values, strict=True))
            f_hat[b, token] = p["W_O.weight"] @ attended  # Eq. 6
            norm = f_hat[b, token] / f_hat[b, token].square().mean().sqrt() * 1.7
            z_f = p["Z_fMRI.weight"][..., 0] @ norm + p["Z_fMRI.bias"]  # Eq. 7
            z_t = (
                p["Z_txt.weight"][..., 0] @ e_mem_txt[b, token] + p["Z_txt.bias"] + e_mem_txt[b, token]
            )  # Eq. 7
            f_fuse[b, token] = z_t + 0.7 * z_f  # Eq. 8
    torch.testing.assert_close(kept["f_hat"], f_hat, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.f_fuse, f_fuse, atol=1e-5, rtol=1e-4)
    assert 0 < out.ratio < 10


def test_at_step_0_f_fuse_is_the_top_1_text_exactly(pool, inputs):
    out = make_mom()(*inputs, pool)
    assert torch.equal(out.f_fuse, captions_by_hand(pool, out.indices[:, 0], L))
    assert out.ratio == 0
    assert out.indices.shape == (B, K) and out.W_r.shape == (B, 3) and out.S.shape == (B, 60)


def test_the_norm_brings_f_hat_to_the_scale_of_the_text(pool, inputs):
    mom = make_mom(text_rms=pool.text_rms())
    kept = []
    mom.integration.norm.register_forward_hook(lambda module, args, out: kept.append(out))
    mom(*inputs, pool)
    torch.testing.assert_close(kept[0].square().mean().sqrt(), pool.text_tokens.square().mean().sqrt())
    assert pool.text_rms() == pytest.approx(
        2, rel=0.1
    )  # of the real tokens; with padding it would be about 1.5


def test_f_hat_differs_between_tokens_from_the_start():
    """Unit vectors of D = 768 must not make every logit vanish: then all tokens would read the same from
    memory."""
    D = 768
    mom = MixtureOfMemories(tokens=L, width=64, embed_dim=D, text_dim=32, K=5, attention_heads=4)
    kept = []
    mom.integration.W_O.register_forward_hook(lambda module, args, out: kept.append(out))
    mom(torch.randn(8, L, 64), torch.randn(8, 3, D), make_pool(D=D, D_txt=32))
    between_tokens = (kept[0] - kept[0].mean(1, keepdim=True)).square().mean()
    assert between_tokens / kept[0].square().mean() > 0.1


def test_a_batch_in_another_order_gives_the_same_in_that_order(pool, inputs):
    mom, order = opened(make_mom()), torch.tensor([2, 0, 3, 1])
    out, permuted = mom(*inputs, pool), mom(*(x[order] for x in inputs), pool)
    assert torch.equal(permuted.indices, out.indices[order])
    torch.testing.assert_close(permuted.f_fuse, out.f_fuse[order])


def test_bfloat16_autocast_runs_forward_and_backward(pool, inputs):
    mom = opened(make_mom())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mom(*inputs, pool)
    out.f_fuse.float().square().mean().backward()
    torch.testing.assert_close(out.f_fuse.float(), mom(*inputs, pool).f_fuse, atol=0.3, rtol=0.1)
    assert all(parameter.grad.isfinite().all() for parameter in mom.parameters())


# Eq. 9


def test_router_and_brain_model_learn_from_the_diffusion_loss_after_one_step(pool):
    """Zero-convs stop every gradient at step 0 but their own; one step later all that is to train is
    reached."""
    mom, denoiser = make_mom(), torch.nn.Linear(D_TXT, D_TXT)
    f_e, q = torch.randn(B, L, WIDTH, requires_grad=True), torch.randn(B, 3, D, requires_grad=True)
    epsilon = torch.randn(B, L, D_TXT)
    optimizer = torch.optim.AdamW(mom.parameters(), lr=1e-3)

    def gradients() -> dict[str, float]:
        optimizer.zero_grad()
        f_e.grad = q.grad = None
        (epsilon - denoiser(mom(f_e, q, pool).f_fuse)).square().mean().backward()
        reached = {name: p.grad.abs().max().item() for name, p in mom.named_parameters()}
        return reached | {"f_e": f_e.grad.abs().max().item(), "q": q.grad.abs().max().item()}

    first = gradients()
    zero_convs = {name for name in first if ".Z_" in name}
    assert len(zero_convs) == 4
    assert all((first[name] > 0) == (name in zero_convs) for name in first), first
    optimizer.step()
    second = gradients()
    assert all(value > 0 for value in second.values()), second


def test_the_log_weights_reward_the_modality_that_ranks_a_memory_first(pool):
    """Memory 0 is near by action and far by text and image: to be given more weight, it asks for a higher
    w_act."""
    W_r = torch.full((1, 3), 1 / 3, requires_grad=True)
    q = pool.e[:1] * torch.tensor([-1, -1, 1])[:, None]
    log_w = mixture_scores(W_r, q, pool.e[:K]).log_softmax(-1)
    (gradient,) = torch.autograd.grad(log_w[0, 0], W_r)
    assert gradient[0, 2] > 0 > max(gradient[0, 0], gradient[0, 1])


def test_condition_is_brain_model_queries_and_mixture(pool):
    brain_model, heads = BrainModel(7, 2, L, WIDTH, 1, HEADS, D), Stage1Heads(D, 3, 4)
    torch.nn.init.normal_(heads.phi_a.mlp[3].weight)
    mom, x, clip = opened(make_mom()), torch.randn(B, 2, 7), torch.arange(B)
    for who in (None, pool.excluded(clip)):
        f_c, remembered = condition(brain_model, heads, mom, pool, x, who)
        expected, f_e = brain_model(x)
        q = torch.stack([expected, expected, heads.phi_a(expected)], 1)
        assert torch.equal(f_c, expected)
        assert torch.equal(remembered.f_fuse, mom(f_e, q, pool, who).f_fuse)
        assert remembered.S.isneginf().any() == (who is not None)


def test_the_residual_adds_f_e_to_what_is_attended_to(pool, inputs, tmp_path):
    with_it = opened(make_mom(residual=True))
    without = make_mom()
    without.load_state_dict(with_it.state_dict())
    seen = []
    for mom in (with_it, without):
        mom.integration.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        mom(*inputs, pool)
    torch.testing.assert_close(seen[0] - seen[1], with_it.integration.W_O(inputs[0]), rtol=1e-4, atol=1e-5)
    with_it.save_pretrained(tmp_path)
    assert MixtureOfMemories.from_pretrained(tmp_path).integration.residual


def test_measures_are_the_mean_weights_the_likeness_and_the_ratio(pool, inputs):
    clip = torch.arange(B)
    out = opened(make_mom())(*inputs, pool, pool.excluded(clip))
    measures = out.measures(pool, clip)
    assert list(measures) == ["w_txt", "w_img", "w_act", "alike", "own_caption", "z_f/z_t"]
    torch.testing.assert_close(measures["w_act"], out.W_r[:, 2].mean())
    cosines = [pool.mean_frame[n] @ pool.mean_frame[out.indices[n, 0]] for n in range(B)]
    torch.testing.assert_close(measures["alike"], sum(cosines) / B)
    assert Remembered(out.f_fuse).measures(pool, clip) == {}


def test_a_modality_more_is_a_name_more(monkeypatch, inputs):
    monkeypatch.setattr(mixture_of_memories, "MODALITIES", (*MODALITIES, "sound"))
    monkeypatch.setattr(mixture_of_memories, "FUSED", ("img", "act", "sound"))
    mom, q = opened(make_mom()), torch.randn(B, 4, D)
    out = mom(inputs[0], q, make_pool(modalities=4))
    assert out.W_r.shape == (B, 4)
    out.f_fuse.square().mean().backward()
    assert mom.integration.W_K["sound"].weight.grad.abs().max() > 0
    assert mom.router.R[3].weight.grad[3].abs().max() > 0


# The exclusion rule


def test_excluded_are_the_clip_its_neighbours_and_planted_copies():
    pool = make_pool(N=100, per_segment=50)
    frames = pool.mean_frame.clone()
    frames[90] = F.normalize(frames[10] + 0.01 * unit(D), dim=-1)  # a copy in another segment
    frames[45] = frames[10]  # and one in the same segment, far away
    pool = replace(pool, mean_frame=frames, near_copy=0.99)
    clip = torch.tensor([10, 90, 49])
    excluded = pool.excluded(clip)
    for row, c in zip(excluded, clip.tolist(), strict=True):
        expected = set()
        for n in range(100):
            neighbour = n // 50 == c // 50 and abs(n - c) <= 15
            if neighbour or F.cosine_similarity(frames[c], frames[n], dim=0) > 0.99:
                expected.add(n)
        assert set(row.nonzero().flatten().tolist()) == expected
    assert set(excluded[0].nonzero().flatten().tolist()) == {*range(26), 45, 90}
    assert excluded[2].sum() == pool.scene + 1  # clip 50, next in the file but of another segment, stays

    q, W_r = pool.e[clip], torch.full((3, 3), 1 / 3)
    S, _, i = retrieve(W_r, q, pool, K, excluded)
    assert torch.equal(S.isneginf(), excluded)
    assert not excluded.gather(1, i).any()
    assert torch.equal(retrieve(W_r, q, pool, K, None)[2][:, 0], clip)  # at inference nothing is excluded


def test_a_clip_that_is_untold_retrieves_no_caption_like_its_own():
    pool = replace(make_pool(N=100, per_segment=50), caption=torch.arange(100) % 25)
    clip, untold = torch.tensor([10, 10]), torch.tensor([True, False])
    told, hidden = pool.excluded(clip), pool.excluded(clip, untold)
    assert torch.equal(hidden[1], told[1])
    same = {n for n in range(100) if n % 25 == 10}
    assert {*hidden[0].nonzero().flatten().tolist()} == {*range(26)} | same
    S, _, _ = retrieve(torch.full((2, 3), 1 / 3), pool.e[clip], pool, K, hidden)
    assert torch.equal(S.isneginf(), hidden)


def test_training_clips_find_their_caption_as_seldom_as_held_out_clips():
    pool = replace(
        make_pool(N=100, per_segment=50), caption=torch.arange(100) % 50
    )  # each twice, in two segments
    pool.caption[:20], pool.caption[50:70] = torch.arange(100, 120), torch.arange(200, 220)  # 40 clips: once
    assert pool.untold_share(0.6)[0] == 0 and pool.untold_share(1.0)[0] == 0
    assert pool.untold_share(0.06)[0] == pytest.approx(0.9)  # 60 % have theirs: a tenth of these, 6 % of all
    share, fewest, most = pool.untold_share(0.0)
    free = ~pool.excluded(torch.arange(100))
    assert share == 1 and most == free.sum(1).max()
    assert fewest == (free & ~pool.same_caption(torch.arange(100))).sum(1).min()
    many = make_pool(N=1500, per_segment=50)  # more than a block
    assert many.untold_share(0.0)[1:] == (1500 - 31, 1500 - 16)


def test_position_and_not_the_index_counts():
    """With some clips dropped (held-out segments' copies), neighbours are still found by their time."""
    pool = replace(make_pool(N=8), segment=torch.zeros(8, dtype=torch.int64), position=torch.arange(8) * 10)
    assert pool.neighbours(torch.tensor([3])).tolist() == [
        [False, False, True, True, True, False, False, False]
    ]


def threshold_of(pool: MemoryPool, held_out: torch.Tensor) -> tuple[float, dict[str, list[float]]]:
    return near_copy_threshold(pool.mean_frame.numpy(), pool.segment.tolist(), held_out.numpy())


def film_with_copies(copied: float) -> tuple[MemoryPool, torch.Tensor]:
    """Clips of 20 kinds, a share of the first half copied in the second; held-out clips of the same kinds."""
    D, kinds = 32, unit(20, 32)

    def clips(n: int) -> torch.Tensor:
        return F.normalize(kinds[torch.arange(n) % 20] + 0.12 * torch.randn(n, D), dim=-1)

    frames, held_out = clips(600), clips(200)
    n = int(300 * copied)
    frames[300 : 300 + n] = F.normalize(frames[:n] + 0.002 * torch.randn(n, D), dim=-1)
    pool = replace(make_pool(N=600, D=D, per_segment=100), mean_frame=frames)
    return pool, held_out


def test_the_threshold_removes_planted_copies_and_keeps_what_held_out_clips_have():
    pool, held_out = film_with_copies(copied=0.9)
    threshold, distributions = threshold_of(pool, held_out)
    cos = pool.mean_frame @ pool.mean_frame.T
    cos[pool.neighbours(torch.arange(600))] = -1
    assert cos.amax(1).median() > 0.999  # before: most clips have a copy elsewhere
    copies = torch.arange(270)
    thinned = replace(pool, near_copy=threshold)
    assert thinned.excluded(copies)[copies, copies + 300].all()
    left = cos.masked_fill(thinned.excluded(torch.arange(600)), -1).amax(1)
    by_hand = (held_out @ pool.mean_frame.T).amax(1)
    for other in torch.linspace(0.3, 1.01, 50):
        other_left = cos.masked_fill(cos > other, -1).amax(1)
        assert wasserstein_distance(left, by_hand) <= wasserstein_distance(other_left, by_hand) + 1e-3
    assert wasserstein_distance(left, by_hand) < 0.1 * wasserstein_distance(cos.amax(1), by_hand)
    for name, values in (("held out", by_hand), ("training, left", left), ("training, all", cos.amax(1))):
        levels = torch.tensor([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
        assert distributions[name] == pytest.approx(values.quantile(levels).tolist(), abs=1e-5)
    json.dumps(distributions)


def test_without_recurring_material_no_clip_is_called_a_copy():
    pool, held_out = film_with_copies(copied=0.0)
    cos = pool.mean_frame @ pool.mean_frame.T
    cos[pool.neighbours(torch.arange(600))] = -1
    threshold = threshold_of(pool, F.normalize(held_out + pool.mean_frame[:200], dim=-1))[0]  # closer still
    assert threshold == pytest.approx(ALL_ALLOWED, abs=1e-4)
    pool = replace(pool, near_copy=threshold)
    assert torch.equal(pool.excluded(torch.arange(600)), pool.neighbours(torch.arange(600)))


# The text


def test_ragged_text_is_padded_with_zeros(pool):
    i = torch.tensor([5, 0, 59, 5])
    text = pool.text(i, L + 2)
    assert text.shape == (4, L + 2, D_TXT)
    assert torch.equal(text, captions_by_hand(pool, i, L + 2))
    lengths = pool.text_offsets.diff()[i]
    assert torch.equal((text != 0).any(-1).sum(1), lengths)
    half = replace(pool, text_tokens=pool.text_tokens.half()).text(i, L)
    assert half.dtype == torch.float32 and torch.equal(half, text[:, :L].half().float())


def test_a_caption_longer_than_the_decoders_text_is_an_error():
    pool = make_pool(captions=L)
    with pytest.raises(ValueError, match=f"{L} tokens, the decoder {L - 1}"):
        pool.text(pool.text_offsets.diff().argmax()[None], L - 1)


def test_to_moves_all_but_the_text_which_stays_on_the_cpu(pool):
    moved = replace(pool, near_copy=0.9, scene=7).to(torch.float64)  # a dtype shows what a GPU would
    assert moved.near_copy == 0.9 and moved.scene == 7
    for name, x in vars(pool).items():
        if isinstance(x, torch.Tensor):
            assert (getattr(moved, name).dtype == torch.float64) == (name != "text_tokens"), name


def test_a_scene_of_another_length():
    pool = replace(make_pool(N=20), scene=2)
    assert pool.neighbours(torch.tensor([10])).nonzero()[:, 1].tolist() == [8, 9, 10, 11, 12]


# Bad input


@pytest.mark.parametrize("clip", [None, torch.arange(B) % K])
def test_a_pool_of_k_memories_is_too_small(inputs, clip):
    small = make_pool(N=K)
    with pytest.raises(ValueError, match=rf"{K} memories, K = {K} wants {K + 1}"):
        make_mom()(*inputs, small, clip if clip is None else small.excluded(clip))
    if clip is None:
        make_mom()(*inputs, make_pool(N=K + 1))


def test_a_pool_of_neighbours_leaves_too_few(inputs):
    pool = make_pool(N=15 + K, per_segment=100)  # clip 0 has K - 1 others left
    with pytest.raises(ValueError, match=f"fewer than K = {K}"):
        make_mom()(*inputs, pool, pool.excluded(torch.zeros(B, dtype=torch.int64)))
    pool = make_pool(N=15 + K + 1, per_segment=100)
    excluded = pool.excluded(torch.zeros(B, dtype=torch.int64))
    assert make_mom()(*inputs, pool, excluded).indices.min() > 15


def test_tokens_must_be_the_decoders(pool, inputs):
    f_e, q = inputs
    with pytest.raises(ValueError, match=f"{L - 1} tokens, the decoder's text {L}"):
        make_mom()(f_e[:, 1:], q, pool)


def test_attention_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="multiple of attention_heads 5"):
        make_mom(attention_heads=5)


@pytest.mark.parametrize(
    ("field", "spoil", "message"),
    [
        ("e", lambda x: 1.1 * x, "row of e has a length 0.1"),
        ("e", lambda x: x.index_fill(0, torch.tensor([2]), torch.nan), "row of e has a length nan"),
        ("e", lambda x: x[:, :2], "wanted"),
        ("mean_frame", lambda x: 0 * x, "row of mean_frame"),
        ("mean_frame", lambda x: x[1:], "wanted"),
        ("segment", lambda x: x[1:], "wanted"),
        ("position", lambda x: x[1:], "wanted"),
        ("text_offsets", lambda x: x[:-1], "wanted"),
        ("text_offsets", lambda x: x + 1, "text offsets must rise from 0"),
        ("text_offsets", lambda x: x.sort(descending=True)[0], "text offsets must rise from 0"),
        ("text_tokens", lambda x: x[:-1], "text offsets must rise from 0"),
    ],
)
def test_a_pool_that_does_not_fit_together_is_an_error(pool, field, spoil, message):
    with pytest.raises(ValueError, match=message):
        replace(pool, **{field: spoil(getattr(pool, field))})


# Saved and loaded, and the ablations


def test_save_and_load(tmp_path, pool, inputs):
    mom = opened(make_mom(alpha=0.5, tau=0.3, text_rms=2.5))
    mom.save_pretrained(tmp_path)
    loaded = MixtureOfMemories.from_pretrained(tmp_path)
    assert (loaded.K, loaded.tau, loaded.integration.alpha, loaded.tokens) == (K, 0.3, 0.5, L)
    assert torch.equal(loaded(*inputs, pool).f_fuse, mom(*inputs, pool).f_fuse)


def test_a_checkpoint_that_lacks_a_weight_is_an_error(tmp_path):
    make_mom().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["router.R.1.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="router.R.1.weight"):
        MixtureOfMemories.from_pretrained(tmp_path)


def test_without_mom_text_alone_retrieves_and_conditions(tmp_path, pool, inputs):
    f_e, q = inputs
    TopTextMemory(tokens=L, K=K).save_pretrained(tmp_path)
    out = TopTextMemory.from_pretrained(tmp_path)(f_e, q, pool)
    best = [max(range(60), key=lambda n, b=b: (pool.e[n, 0] @ q[b, 0]).item()) for b in range(B)]
    assert out.indices[:, 0].tolist() == best
    assert torch.equal(out.f_fuse, captions_by_hand(pool, torch.tensor(best), L))
    clip = torch.arange(B)
    out = TopTextMemory(tokens=L, K=K)(f_e, pool.e[clip], pool, pool.excluded(clip))  # the same exclusion
    assert torch.equal(out.S.isneginf(), pool.excluded(clip))


def test_without_integration_f_e_is_projected(tmp_path, pool, inputs):
    projection = DirectProjection(width=WIDTH, text_dim=D_TXT)
    projection.save_pretrained(tmp_path)
    out = DirectProjection.from_pretrained(tmp_path)(*inputs, pool)
    expected = inputs[0] @ projection.project.weight.T + projection.project.bias
    torch.testing.assert_close(out.f_fuse, expected)
    assert out.indices is None and out.W_r is None

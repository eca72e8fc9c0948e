"""Eq. 1-3 against explicit loops and libraries; real processes: test_train_stage1.py."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from data import Batch
from heads import Stage1Heads, focal_bce, info_nce, stage1_loss

B, FRAMES, D, CLASSES = 6, 3, 16, 5


G = torch.Generator().manual_seed(0)
F_C = 3 * F.normalize(torch.randn(B, D, generator=G), dim=-1)  # the Brain Model's output is no unit vector
E_IMG, E_TXT, E_ACT = (
    F.normalize(torch.randn(*shape, D, generator=G), dim=-1) for shape in ((B, FRAMES), (B,), (B,))
)
CATEGORIES = (torch.rand(B, CLASSES, generator=G) < 0.3).to(torch.uint8)
BATCH = Batch(torch.arange(B), torch.zeros(B, 1, 20), E_IMG, E_TXT, E_ACT, CATEGORIES)


@pytest.fixture
def heads() -> Stage1Heads:
    torch.manual_seed(1)
    heads = Stage1Heads(D, FRAMES, CLASSES)
    for p in heads.parameters():
        nn.init.normal_(p, std=0.3)
    return heads


def by_hand(f: torch.Tensor, e: torch.Tensor, tau: float) -> float:
    """Eq. 2, one number at a time."""
    total = 0.0
    for i in range(len(f)):
        similar = [math.exp(F.cosine_similarity(f[i], e[j], dim=0).item() / tau) for j in range(len(e))]
        total -= math.log(similar[i] / sum(similar))
    return total / len(f)


def test_info_nce_against_a_double_loop():
    e = E_TXT * torch.arange(1, B + 1)[:, None]  # of any length, too
    for tau in (0.2, 1.0):
        assert info_nce(F_C, e, tau).item() == pytest.approx(by_hand(F_C, e, tau), rel=1e-5)
    expected = pytest.approx(by_hand(F_C, e, 0.07), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # leaves the logits in float32
        assert info_nce(F_C, e).item() == expected
    assert info_nce(F_C, e).item() == expected


def test_a_process_finds_its_own_clips_among_those_of_all(monkeypatch):
    """Three processes of two clips, one after another: losses and gradients are those of one process."""
    losses, gradients = [], []
    for processes in (1, 3):
        f, e = F_C.clone().requires_grad_(), E_TXT.clone().requires_grad_()
        loss, share = 0.0, B // processes
        for process in range(processes):
            mine = slice(process * share, (process + 1) * share)
            monkeypatch.setattr(dist, "is_initialized", lambda n=processes: n > 1)
            monkeypatch.setattr(dist, "get_rank", lambda k=process: k)
            parts = [*F.normalize(e, dim=-1).split(share)]
            gathered = lambda own, k=process, parts=parts: [*parts[:k], own, *parts[k + 1 :]]  # noqa: E731
            monkeypatch.setattr("heads.dist_nn.all_gather", gathered)
            loss = loss + info_nce(f[mine], e[mine], 0.2) / processes
        loss.backward()
        losses.append(loss.detach())
        gradients.append((f.grad, e.grad))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (3.0, 0.9)])
def test_focal_bce_against_torch_and_torchvision(gamma, alpha):
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(40, CLASSES), (torch.rand(40, CLASSES) < 0.2).float()
    logits[0, :3], targets[0, :3] = torch.tensor([200.0, -200.0, 200.0]), torch.tensor([1.0, 0.0, 0.0])
    logits.requires_grad_()
    focal = sigmoid_focal_loss(logits, targets, alpha, gamma, reduction="mean")
    expected = nn.BCEWithLogitsLoss()(logits, targets) + focal
    loss = focal_bce(logits, targets.to(torch.uint8), gamma, alpha)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_phi_v_starts_as_the_mean_phi_a_as_the_identity_and_phi_c_with_rare_positives():
    heads = Stage1Heads(D, FRAMES, CLASSES)
    e_img_hat, f_a, logits = heads(F_C, E_IMG)
    torch.testing.assert_close(e_img_hat, E_IMG.mean(1))
    assert torch.equal(f_a, F_C) and logits.shape == (B, CLASSES)
    torch.testing.assert_close(heads.phi_c.linear[1].bias.sigmoid(), torch.full((CLASSES,), 0.01))
    paper = Stage1Heads()
    assert paper.phi_v.mix.weight.shape == (1, 8, 1) and paper.phi_c.linear[1].weight.shape == (12, 768)


def test_heads_and_queries_by_hand(heads):
    p = dict(heads.named_parameters())

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name: str) -> torch.Tensor:
        x = (F_C - F_C.mean(-1, keepdim=True)) / (F_C.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    hidden = linear("phi_a.mlp.1", norm("phi_a.mlp.0"))
    f_a = F_C + linear("phi_a.mlp.3", hidden * (1 + (hidden / 2**0.5).erf()) / 2)
    weights = p["phi_v.mix.weight"][0, :, 0]  # no plain mean
    e_img_hat = sum(weight * frame for weight, frame in zip(weights, E_IMG.unbind(1), strict=True))
    expected = e_img_hat, f_a, linear("phi_c.linear.1", norm("phi_c.linear.0"))
    torch.testing.assert_close(heads(F_C, E_IMG), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads.queries(F_C), torch.stack([F_C, F_C, f_a], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau, options", [(0.1, {"tau": 0.1, "lambda_1": 0.5, "lambda_2": 2.0}), (0.07, {})])
def test_stage1_loss_is_eq_1_and_eq_3(heads, tau, options):
    e_img_hat, f_a, logits = heads(F_C, E_IMG)
    pairs = (F_C, e_img_hat), (F_C, E_TXT), (f_a, E_ACT)
    image, text, action = (by_hand(*pair, tau) for pair in pairs)
    truth = CATEGORIES.float()
    focal = sigmoid_focal_loss(logits, truth, alpha=0.25, gamma=2, reduction="mean")
    category = (F.binary_cross_entropy_with_logits(logits, truth) + focal).item()
    losses = stage1_loss(heads, F_C, BATCH, **options)
    assert [v.item() for v in losses[1:]] == pytest.approx([image, text, action, category], rel=1e-4)
    weighted = options.get("lambda_1", 1) * action + options.get("lambda_2", 1) * category
    assert losses.loss.item() == pytest.approx(image + text + weighted, rel=1e-4)

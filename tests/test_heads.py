"""Eq. 1-3 against explicit loops and libraries, and the same numbers from two processes as from one."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from brain_model import BrainModel
from heads import Stage1Heads, focal_bce, info_nce, stage1_loss

B, FRAMES, D, CLASSES = 8, 3, 16, 5


def example(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"f_c": (B, D), "e_img": (B, FRAMES, D), "e_txt": (B, D), "e_act": (B, D)}
    made = {name: F.normalize(torch.randn(shape, generator=g), dim=-1) for name, shape in shapes.items()}
    made["f_c"] *= 3  # the Brain Model's output is no unit vector
    return made | {"categories": (torch.rand(B, CLASSES, generator=g) < 0.3).to(torch.uint8)}


def random_heads() -> Stage1Heads:
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


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_info_nce_against_a_double_loop(tau):
    made = example()
    expected = by_hand(made["f_c"], made["e_txt"], tau)
    assert info_nce(made["f_c"], made["e_txt"], tau).item() == pytest.approx(expected, rel=1e-5)


def test_info_nce_of_a_perfect_and_of_a_random_match():
    perfect = torch.eye(64)
    assert info_nce(5 * perfect, perfect, 0.07).item() < 1e-3
    assert info_nce(perfect, perfect.roll(1, 0), 0.07).item() == pytest.approx(
        1 / 0.07, rel=1e-3
    )  # finds a wrong one
    torch.manual_seed(0)
    chance = info_nce(torch.randn(512, 768), torch.randn(512, 768), 1.0).item()
    assert chance == pytest.approx(math.log(512), abs=0.01)


def test_info_nce_searches_one_direction():
    """f finds its e among all e: with one e for two f the loss is log 2 for both, whichever the other f
    is."""
    f, e = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [1.0, 0]])
    assert info_nce(f, e, 0.07).item() == pytest.approx(math.log(2), rel=1e-5)
    assert info_nce(e, f, 0.07).item() == pytest.approx(1 / 0.14, rel=1e-3)


def test_the_order_of_the_batch_does_not_matter():
    made, heads, order = example(), random_heads(), torch.randperm(B)
    permuted = stage1_loss(heads, **{k: v[order] for k, v in made.items()})
    for here, there in zip(permuted, stage1_loss(heads, **made), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (3.0, 0.9)])
def test_focal_bce_against_torch_and_torchvision(gamma, alpha):
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(40, CLASSES), (torch.rand(40, CLASSES) < 0.2).float()
    focal = sigmoid_focal_loss(logits, targets, alpha, gamma, reduction="mean")
    expected = nn.BCEWithLogitsLoss()(logits, targets) + focal
    torch.testing.assert_close(focal_bce(logits, targets.to(torch.uint8), gamma, alpha), expected)


def test_focal_bce_stays_finite_with_gradients_at_large_logits():
    logits = torch.tensor([[200.0, -200.0, 200.0]], requires_grad=True)
    loss = focal_bce(logits, torch.tensor([[1, 0, 0]]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_phi_v_starts_as_the_mean_phi_a_as_the_identity_and_phi_c_with_rare_positives():
    made, heads = example(), Stage1Heads(D, FRAMES, CLASSES)
    e, f_a, logits = heads(made["f_c"], made["e_img"])
    torch.testing.assert_close(e, made["e_img"].mean(1))
    assert torch.equal(f_a, made["f_c"])
    assert logits.shape == (B, CLASSES) and heads.phi_c.linear[1].bias.sigmoid().allclose(
        torch.tensor(0.01), atol=1e-6
    )


def test_phi_v_is_a_weighted_mean_over_the_frames():
    heads, e_img = Stage1Heads(D, FRAMES, CLASSES), example()["e_img"]
    weight = torch.tensor([0.5, -1.0, 2.0])
    heads.phi_v.mix.weight.data[0, :, 0] = weight
    torch.testing.assert_close(heads.phi_v(e_img), sum(weight[k] * e_img[:, k] for k in range(FRAMES)))


def test_stage1_loss_is_eq_1_and_eq_3():
    made, heads = example(), random_heads()
    e_img, f_a, logits = heads(made["f_c"], made["e_img"])
    pairs = (made["f_c"], e_img), (made["f_c"], made["e_txt"]), (f_a, made["e_act"])
    image, text, action = (by_hand(f, e, 0.1) for f, e in pairs)
    category = focal_bce(logits, made["categories"]).item()
    losses = stage1_loss(heads, **made, tau=0.1, lambda_1=0.5, lambda_2=2.0)
    assert [v.item() for v in losses[1:]] == pytest.approx([image, text, action, category], rel=1e-4)
    assert losses.loss.item() == pytest.approx(image + text + 0.5 * action + 2.0 * category, rel=1e-4)


def test_a_lambda_of_0_leaves_its_task_out():
    made, heads = example(), random_heads()
    losses = stage1_loss(heads, **made, lambda_1=0.0, lambda_2=0.0)
    assert losses.loss.item() == (losses.image + losses.text).item()
    losses.loss.backward()
    assert all((p.grad == 0).all() for head in (heads.phi_a, heads.phi_c) for p in head.parameters())
    assert (heads.phi_v.mix.weight.grad != 0).any()


def test_saved_and_loaded_the_heads_are_the_same(tmp_path):
    heads, made = random_heads(), example()
    heads.save_pretrained(tmp_path)
    loaded = Stage1Heads.from_pretrained(tmp_path)
    for here, there in zip(
        loaded(made["f_c"], made["e_img"]), heads(made["f_c"], made["e_img"]), strict=True
    ):
        assert torch.equal(here, there)


def test_queries_are_f_c_twice_and_phi_a_of_it():
    f_c, heads = example()["f_c"], random_heads()
    q = heads.queries(f_c)
    assert q.shape == (B, 3, D) and torch.equal(q[:, 0], f_c) and torch.equal(q[:, 1], f_c)
    assert torch.equal(q[:, 2], heads.phi_a(f_c)) and not torch.allclose(q[:, 2], f_c)


# ---------------------------------------------------------------- several processes


def losses_and_gradients(process: int, world: int, clips: int) -> dict[str, torch.Tensor]:
    """One step on this process's share of the first `clips` of the same batch: the losses, averaged, and the
    gradients of all weights."""
    torch.manual_seed(0)
    model = BrainModel(20, 1, tokens=4, width=32, layers=1, attention_heads=2, embed_dim=D, rank=2)
    heads = random_heads()
    parts = nn.ModuleDict({"model": model, "heads": heads})
    made = example() | {"x": torch.randn(B, 1, 20, generator=torch.Generator().manual_seed(2))}
    own = slice(process * clips // world, (process + 1) * clips // world)
    made = {name: value[own] for name, value in made.items() if name != "f_c"}
    if world > 1:
        model, heads = nn.parallel.DistributedDataParallel(model), nn.parallel.DistributedDataParallel(heads)
    losses = stage1_loss(heads, model(made.pop("x"))[0], **made)
    losses.loss.backward()
    mean = torch.stack([v.detach() for v in losses])
    if world > 1:
        torch.distributed.all_reduce(mean)
    return {"losses": mean / world} | {name: p.grad.clone() for name, p in parts.named_parameters()}


def one_of_several(process: int, folder: str, world: int, clips: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    how = {"init_method": f"file://{folder}/meet", "rank": process, "world_size": world}
    torch.distributed.init_process_group("gloo", **how)
    torch.save(losses_and_gradients(process, world, clips), f"{folder}/{process}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("world", "clips"), [(2, 8), (2, 7), (3, 5)])
def test_several_processes_have_the_losses_and_gradients_of_one(tmp_path: Path, world, clips):
    """Also where the clips do not divide among them."""
    torch.multiprocessing.spawn(one_of_several, (str(tmp_path), world, clips), nprocs=world)
    expected = losses_and_gradients(0, 1, clips)
    assert sum(v.abs().max() > 1e-3 for v in expected.values()) > 20  # there is something to compare
    for process in range(world):
        found = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            message = f"{name} of process {process}"
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=message)


def test_autocast_leaves_the_logits_of_eq_2_in_float32():
    f, e = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = info_nce(f, f + e)
    assert rounded == info_nce(f, f + e)

"""The Brain Model: shapes, the two orders of the voxel regression, checkpointing, initial weights, saving."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from brain_model import BrainModel, VoxelRegression
from support.readers import load_model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model() -> BrainModel:
    return BrainModel(
        voxels=30, volumes=2, tokens=5, width=32, layers=2, attention_heads=4, embed_dim=12, rank=3
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, 2, 30)


def test_shapes_and_a_batch_in_another_order(model, x):
    f_c, f_e = model(x)
    assert f_c.shape == (6, 12) and f_e.shape == (6, 5, 32)
    order = torch.randperm(6)
    for original, permuted in zip((f_c, f_e), model(x[order]), strict=True):
        torch.testing.assert_close(permuted, original[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("output", [0, 1])
def test_every_voxel_and_volume_reaches_both_outputs(model, x, output):
    x.requires_grad_()
    model(x)[output].square().sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize("shape", [(3, 2, 29), (3, 1, 30)])
def test_another_number_of_voxels_or_volumes_is_refused(model, shape):
    with pytest.raises(AssertionError, match=rf"fMRI \({shape[1]}, {shape[2]}\), wanted \(2, 30\)"):
        model(torch.randn(shape))


def test_parameters_at_the_papers_size():
    with torch.device("meta"):  # no memory
        model = BrainModel(voxels=13_447)
    block = 12 * 2048**2 + 13 * 2048  # attention 4 D'^2, MLP 8 D'^2; biases 9 D', two LayerNorms 4 D'
    regression = (13_447 + 1) * 512 * 4 + (4 + 1) * 2048
    rest = (1 + 513) * 2048 + 2 * 2048 + (2048 + 1) * 768  # tokens and positions, last LayerNorm, to_f_c
    assert sum(p.numel() for p in model.parameters()) == 24 * block + regression + rest
    assert 24 * block + regression + rest == pytest.approx(1.24e9, rel=0.003)


def test_with_rank_1_the_order_of_contracting_and_lifting_is_the_same_function():
    x, regression = torch.randn(4, 1, 30), VoxelRegression(30, 1, 5, 32, rank=1)
    lift, contract = regression.lift, regression.contract
    lifted = x.squeeze(1)[:, :, None] * lift.weight[:, 0]  # (B, N, D'): every voxel to D' first, as is usual
    by_token = torch.einsum("ln,bnd->bld", contract.weight, lifted)  # (B, L, D')
    expected = by_token + contract.bias[:, None] * lift.weight[:, 0] + lift.bias
    torch.testing.assert_close(regression(x), expected, rtol=1e-5, atol=1e-5)


def test_a_token_has_its_own_numbers_of_each_volume(model, x):
    """Explicit loops: token l of clip b is lift of the r numbers of volume 0, then of volume 1."""
    contract, lift = model.regression.contract, model.regression.lift
    y = model.regression(x)
    for b in range(6):
        for token in range(5):
            rows = slice(3 * token, 3 * token + 3)
            numbers = [contract.weight[rows] @ x[b, t] + contract.bias[rows] for t in range(2)]
            torch.testing.assert_close(y[b, token], lift(torch.cat(numbers)), rtol=1e-5, atol=1e-5)


def test_recomputing_the_blocks_gives_equal_gradients(model, x):
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        f_c, f_e = model(x)
        (f_c.square().mean() + f_e.square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


def test_the_model_hides_no_voxels_by_itself(model, x):
    assert torch.equal(model.train()(x)[0], model.eval()(x)[0])


@pytest.mark.parametrize("N", [50, 2000])
@pytest.mark.parametrize("T", [1, 5])
def test_z_scored_voxels_come_out_of_the_regression_with_unit_variance(N, T):
    model = BrainModel(N, T, tokens=16, width=64, layers=1, attention_heads=4, embed_dim=8)
    assert model.regression(torch.randn(64, T, N)).var().item() == pytest.approx(1, abs=0.3)


def test_initial_weights():
    model = BrainModel(100, tokens=16, width=128, layers=8, attention_heads=4, embed_dim=32)
    for block in model.blocks:
        assert block.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        for writes in (block.out, block.mlp[2]):  # into the residual stream, 2 * 8 times
            assert writes.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert (block.norm_mlp.weight == 1).all()
    assert model.position.std().item() == pytest.approx(0.02, rel=0.1)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    f_c, f_e = model(torch.randn(32, 1, 100))
    assert 0.5 < f_c.std() < 2 and 0.5 < f_e.std() < 2


def test_saved_and_loaded_it_is_the_same(model, x, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = BrainModel.from_pretrained(tmp_path)
    assert (loaded.voxels, loaded.volumes, loaded.regression.rank, len(loaded.blocks)) == (30, 2, 3, 2)
    assert all(map(torch.equal, model.eval()(x), loaded.eval()(x)))


@pytest.mark.parametrize("change", [lambda w: w.pop("norm.weight"), lambda w: w.update(extra=torch.zeros(1))])
def test_a_checkpoint_with_a_weight_missing_or_left_over_is_refused(model, tmp_path, change):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path}: found .*, wanted a BrainModel"):
        load_model(BrainModel, tmp_path)

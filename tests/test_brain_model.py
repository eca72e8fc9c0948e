"""The Brain Model against explicit loops and torch's own Transformer; recomputing, initial weights."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from brain_model import BrainModel

B, T, N, L, WIDTH, D, RANK = 6, 2, 30, 5, 32, 12, 3
X = torch.randn(B, T, N, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> BrainModel:
    """As after some training: no weight is where it started."""
    torch.manual_seed(0)
    model = BrainModel(N, T, L, WIDTH, layers=2, attention_heads=4, embed_dim=D, rank=RANK)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def test_a_token_has_its_own_numbers_of_each_volume(model):
    """Token l of clip b is lift of the r numbers of volume 0, then of volume 1."""
    contract, lift = model.regression.contract, model.regression.lift
    y = model.regression(X)
    for b in range(B):
        for token in range(L):
            rows = slice(RANK * token, RANK * token + RANK)
            numbers = [contract.weight[rows] @ X[b, t] + contract.bias[rows] for t in range(T)]
            torch.testing.assert_close(y[b, token], lift(torch.cat(numbers)), rtol=1e-5, atol=1e-5)


def test_the_blocks_are_torchs_pre_norm_transformer_and_f_c_comes_of_the_global_token(model):
    tokens = [model.global_token[0, 0].expand(B, -1), *model.regression(X).unbind(1)]
    h = torch.stack([token + model.position[0, i] for i, token in enumerate(tokens)], 1)  # (B, L+1, D')
    for block in model.blocks:
        activation = partial(gelu, approximate="tanh")
        options = dict(activation=activation, batch_first=True, norm_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0, **options)
        for name, source in (("norm1", block.norm_attention), ("norm2", block.norm_mlp), ("self_attn.out_proj", block.out),
                             ("linear1", block.mlp[0]), ("linear2", block.mlp[2])):  # fmt: skip
            layer.get_submodule(name).load_state_dict(source.state_dict())
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block.qkv.weight, block.qkv.bias
        h = layer(h)
    h = nn.functional.layer_norm(h, (WIDTH,), model.norm.weight, model.norm.bias)
    expected = h[:, 0] @ model.to_f_c.weight.T + model.to_f_c.bias, h[:, 1:]
    for mode in (model.train(), model.eval()):  # the model hides no voxels by itself
        torch.testing.assert_close(mode(X), expected, rtol=1e-4, atol=1e-4)


def test_another_number_of_voxels_or_volumes_is_refused(model):
    for T_, N_ in ((T, N - 1), (1, N)):
        with pytest.raises(AssertionError, match=rf"fMRI \({T_}, {N_}\), wanted \(2, 30\)"):
            model(torch.randn(3, T_, N_))


def test_parameters_at_the_papers_size():
    with torch.device("meta"):  # no memory
        model = BrainModel(voxels=13_447)
    block = 12 * 2048**2 + 13 * 2048  # attention 4 D'^2, MLP 8 D'^2; biases 9 D', two LayerNorms 4 D'
    regression = (13_447 + 1) * 512 * 4 + (4 + 1) * 2048
    rest = (1 + 513) * 2048 + 2 * 2048 + (2048 + 1) * 768  # tokens and positions, last LayerNorm, to_f_c
    assert sum(p.numel() for p in model.parameters()) == 24 * block + regression + rest
    assert 24 * block + regression + rest == pytest.approx(1.24e9, rel=0.003)
    assert model.volumes == 1 and model.blocks[0].attention_heads == 16
    assert not model.gradient_checkpointing


def test_recomputing_the_blocks_gives_equal_gradients(model):
    gradients, calls = [], []
    model.blocks[0].register_forward_pre_hook(lambda *args: calls.append(model.gradient_checkpointing))
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        f_c, f_e = model(X)
        (f_c.square().mean() + f_e.square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)
    assert calls == [False, True, True]  # once more, in the backward pass


def test_initial_weights():
    torch.manual_seed(0)
    model = BrainModel(100, 3, tokens=16, width=128, layers=8, attention_heads=4, embed_dim=32)
    stds = dict.fromkeys(["global_token", "position", "qkv", "mlp.0"], 0.02)
    stds |= dict.fromkeys(["out", "mlp.2"], 0.02 / 4)  # these are added, 2 * 8 times
    stds |= {"contract": 100**-0.5, "lift": (3 * 4) ** -0.5, "to_f_c": 128**-0.5}  # unit variance in, and out
    for name, p in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            assert (p == float("norm" in name and name.endswith("weight"))).all(), name
        else:
            (std,) = [std for part, std in stds.items() if name.removesuffix(".weight").endswith(part)]
            assert p.std().item() == pytest.approx(std, rel=0.2 if name == "global_token" else 0.05), name
            assert abs(p.mean().item()) < 0.2 * std, name

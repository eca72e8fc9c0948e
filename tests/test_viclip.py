"""ViCLIP equals the published implementation (as shipped in vbench) on one random state dict, and loads
strictly."""

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import packaging.version
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from prepare import viclip
from prepare.viclip import ViCLIP, ViCLIPConfig

TINY = ViCLIPConfig(
    image_size=28, patch_size=14, num_frames=3, vision_width=64, vision_layers=2, vision_heads=4,
    text_width=32, text_layers=2, text_heads=2, vocab_size=50, context_length=7, embed_dim=24,
)  # fmt: skip


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter, those that start at 0 or 1 too, so that a swapped or unused one shows."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def published(monkeypatch):
    """Both towers of the public code at TINY's sizes, under the public names. Not needed for them, so
    replaced: its tokenizer, which downloads a vocabulary when imported, and pkg_resources, which setuptools
    no longer ships."""
    monkeypatch.setitem(sys.modules, "pkg_resources", SimpleNamespace(packaging=packaging))
    tokenizer = SimpleNamespace(SimpleTokenizer=lambda: None)
    monkeypatch.setitem(sys.modules, "vbench.third_party.ViCLIP.simple_tokenizer", tokenizer)
    vision = pytest.importorskip("vbench.third_party.ViCLIP.viclip_vision", exc_type=ImportError)
    text = pytest.importorskip("vbench.third_party.ViCLIP.viclip_text", exc_type=ImportError)
    model = nn.Module()
    model.vision_encoder = vision.VisionTransformer(
        TINY.image_size, TINY.patch_size, TINY.vision_width, TINY.vision_layers, TINY.vision_heads,
        output_dim=TINY.embed_dim, num_frames=TINY.num_frames, drop_path=0.1,
    )  # fmt: skip
    model.text_encoder = text.CLIP_TEXT(
        TINY.embed_dim, TINY.context_length, TINY.vocab_size, TINY.text_width, TINY.text_heads, TINY.text_layers, 0
    )  # fmt: skip
    for empty in (
        model.vision_encoder.proj, model.text_encoder.positional_embedding, model.text_encoder.text_projection
    ):  # fmt: skip
        nn.init.zeros_(empty)
    model.temp = nn.Parameter(torch.tensor(0.01))
    return randomise(model)


def test_both_towers_equal_the_published_ones(published, tmp_path):
    torch.save({"model": published.state_dict(), "epoch": 3}, tmp_path / "viclip.pth")
    ours = ViCLIP.from_pretrained(tmp_path / "viclip.pth", TINY)
    frames = torch.randn(2, 3, 3, 28, 28)
    tokens = torch.tensor([[48, 5, 9, 49, 0, 0, 0], [48, 7, 7, 7, 2, 3, 49]])
    with torch.no_grad():
        e_act, e_txt = published.vision_encoder(frames.transpose(1, 2)), published.text_encoder(tokens)
    assert (ours.encode_video(frames) - e_act).abs().max() < 1e-5
    assert (ours.encode_text(tokens) - e_txt).abs().max() < 1e-5
    assert e_act.std() > 0.1 and e_txt.std() > 0.1  # the comparison is of something


def test_names_and_shapes_of_the_published_checkpoint():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in ViCLIP().state_dict().items()}
    assert len(shapes) == (9 + 24 * 12) + (5 + 12 * 12) + 1  # video tower, text tower, temp
    assert shapes["vision_encoder.temporal_positional_embedding"] == (1, 8, 1024)
    assert shapes["vision_encoder.transformer.resblocks.23.mlp.c_fc.weight"] == (4096, 1024)
    assert shapes["text_encoder.transformer.resblocks.11.attn.in_proj_weight"] == (2304, 768)
    model, frames = randomise(ViCLIP(TINY)), torch.randn(1, 3, 3, 28, 28)
    with torch.no_grad():  # their order matters
        assert not torch.allclose(model.encode_video(frames), model.encode_video(frames.flip(1)), atol=1e-3)
        with pytest.raises(ValueError, match="got 2 frames a clip, wanted 3"):
            model.encode_video(frames[:, :2])


def test_save_and_load(tmp_path):
    model, frames = randomise(ViCLIP(TINY)), torch.randn(2, 3, 3, 28, 28)
    model.save_pretrained(tmp_path)
    loaded = ViCLIP.from_pretrained(tmp_path)
    assert asdict(loaded.config) == json.loads(json.dumps(asdict(TINY))) and not loaded.training
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, False)}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    assert torch.cosine_similarity(loaded.encode_video(frames), model.encode_video(frames)).min() > 0.999


def test_loading_is_strict_and_names_the_damaged_file(tmp_path):
    model, weights, config = ViCLIP(TINY), tmp_path / "model.safetensors", tmp_path / "config.json"
    model.save_pretrained(tmp_path)
    values, state = json.loads(config.read_text()), model.state_dict()
    for change in ({"patch_size": 0}, {"no_such_size": 1}, {"embed_dim": 12}):
        config.write_text(json.dumps(values | change))
        damaged = weights if "embed_dim" in change else config
        with pytest.raises(ValueError, match=f"{damaged.name}: found"):
            ViCLIP.from_pretrained(tmp_path)
    torch.save({"model": state | {"temp": "0.01"}}, tmp_path / "text.pth")
    torch.save({"model": state | {"temp": torch.tensor(torch.inf)}}, tmp_path / "inf.pth")
    del state["temp"]
    save_file(state, tmp_path / "less.safetensors")
    for name in ("text.pth", "inf.pth", "less.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: found.*download it again"):
            ViCLIP.from_pretrained(tmp_path / name, TINY)


def test_weights_of_the_hub_are_downloaded_and_absent_ones_say_how(tmp_path, monkeypatch):
    def download(hub, file, revision):
        asked.append((hub, file, revision))
        if not present:
            raise OSError("no network")
        torch.save({"module": ViCLIP(TINY).state_dict()}, tmp_path / "hub.pth")
        return tmp_path / "hub.pth"

    asked, present = [], False
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(viclip, "hf_hub_download", download)
    file = "ViClip-InternVid-10M-FLT.pth"
    for path in ("OpenGVLab/ViCLIP", tmp_path, tmp_path / file):
        with pytest.raises(FileNotFoundError, match=f"hf download OpenGVLab/ViCLIP {file}"):
            ViCLIP.from_pretrained(path)
    ViCLIP(TINY).save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="half/config.json not found"):
        ViCLIP.from_pretrained(tmp_path / "half")
    present = True
    assert ViCLIP.from_pretrained("OpenGVLab/ViCLIP", TINY).config == TINY
    assert ViCLIP.from_pretrained("OpenGVLab/ViCLIP@v2", TINY).config == TINY
    assert asked == [("OpenGVLab/ViCLIP", file, revision) for revision in (None, None, "v2")]

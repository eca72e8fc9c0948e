"""ViCLIP's tower equals open_clip's, given its weights, and loads strictly."""

import json
from dataclasses import asdict
from unittest.mock import Mock

import pytest
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
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


@torch.no_grad()
def test_a_video_is_a_picture_of_its_frames_one_below_the_other():
    """To the image tower of open_clip, if each patch has the position in its frame and that of its frame."""
    ours, frames = randomise(ViCLIP(TINY)).vision_encoder, torch.randn(2, 3, 3, 28, 28)
    theirs = VisionTransformer((84, 28), 14, 64, 2, 4, 4.0, output_dim=24, act_layer=QuickGELU)
    state = ours.state_dict()
    times, places = state.pop("temporal_positional_embedding")[0], state["positional_embedding"]
    state["conv1.weight"] = state["conv1.weight"].squeeze(2)
    state["positional_embedding"] = torch.cat([places[:1], (places[1:] + times[:, None]).flatten(0, 1)])
    theirs.load_state_dict(state)
    e_act = theirs(frames.transpose(1, 2).flatten(2, 3))
    assert (ours(frames) - e_act).abs().max() < 1e-5 and e_act.std() > 0.1
    with pytest.raises(ValueError, match="got 2 frames a clip, wanted 3"):
        ours(frames[:, :2])


def test_names_and_shapes_of_the_published_checkpoint():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in ViCLIP().state_dict().items()}
    assert len(shapes) == (9 + 24 * 12) + (5 + 12 * 12) + 1  # video tower, text tower, temp
    assert shapes["vision_encoder.temporal_positional_embedding"] == (1, 8, 1024)
    assert shapes["vision_encoder.transformer.resblocks.23.mlp.c_fc.weight"] == (4096, 1024)
    assert shapes["text_encoder.transformer.resblocks.11.attn.in_proj_weight"] == (2304, 768)


def test_what_is_saved_is_loaded_strictly_and_a_damaged_file_is_named(tmp_path):
    model, weights, config = randomise(ViCLIP(TINY)), tmp_path / "model.safetensors", tmp_path / "config.json"
    model.save_pretrained(tmp_path)
    loaded = ViCLIP.from_pretrained(tmp_path)
    assert asdict(loaded.config) == json.loads(json.dumps(asdict(TINY))) and not loaded.training
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, False)}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
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
    monkeypatch.setattr(viclip, "hf_hub_download", hub := Mock(side_effect=OSError("no network")))
    file = "ViClip-InternVid-10M-FLT.pth"
    for path in ("OpenGVLab/ViCLIP", tmp_path / file):
        with pytest.raises(FileNotFoundError, match=f"hf download OpenGVLab/ViCLIP {file}"):
            ViCLIP.from_pretrained(path)
    ViCLIP(TINY).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="ViCLIP: .*/config.json not found"):
        ViCLIP.from_pretrained(tmp_path)
    torch.save({"module": ViCLIP(TINY).state_dict()}, tmp_path / "hub.pth")
    hub.side_effect, hub.return_value = None, tmp_path / "hub.pth"
    assert ViCLIP.from_pretrained("OpenGVLab/ViCLIP", TINY).config == TINY
    assert hub.call_args.args == ("OpenGVLab/ViCLIP", file)

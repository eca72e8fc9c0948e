"""The frozen encoders on the toy's CLIP, a directory of the published layout, and its ViCLIP."""

import json
import shutil
from functools import partial
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
from conftest import REPO
from PIL import Image
from safetensors.torch import load_file, save_file

from prepare.encoders import encode_actions, encode_images, encode_texts, load_clip, prepare_frames
from prepare.stimuli import _digests
from prepare.viclip import ViCLIP
from support.files import writing_array

CLIP, VICLIP = REPO / "toy" / "clip", REPO / "toy" / "viclip"


@pytest.fixture(scope="module")
def clip():
    return load_clip(f"local-dir:{CLIP}")


@pytest.fixture
def frames():
    blocks = np.random.default_rng(0).integers(0, 256, (5, 3, 3, 4, 3), dtype=np.uint8)
    return blocks.repeat(24, 2).repeat(24, 3)


def test_load_clip(clip, tmp_path):
    model, stats, tokenizer = clip
    mean, std = [*open_clip.OPENAI_DATASET_MEAN], [*open_clip.OPENAI_DATASET_STD]
    assert stats == {"size": 64, "mean": mean, "std": std}
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    assert not model.training
    number = json.loads((CLIP / "tokenizer.json").read_text())["model"]["vocab"]
    texts = ["<bos> a red circle <eos>", "<bos> <unk> moves <eos>", f"<bos> {'red ' * 14}<eos>"]
    ids = [[number[word] for word in text.split()] for text in texts]
    tokens = tokenizer(["A red circle", "zebra moves", "red " * 30])
    assert tokens.tolist() == [row + [0] * (16 - len(row)) for row in ids]
    with pytest.raises(FileNotFoundError, match="nowhere/open_clip_config.json not found, wanted with"):
        load_clip(f"local-dir:{tmp_path}/nowhere")
    for name in ("nothing/of-this", "ViT-B-32/nothing", "hf-hub:someone/clip"):
        with pytest.raises(ValueError, match=f"--clip {name}: "):
            load_clip(name)


def test_a_published_clip_is_loaded_by_open_clip_and_runs_no_code(clip, monkeypatch):
    create = Mock(return_value=clip[0])
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name, **options: (name, options))
    for name, options in (("ViT-L-14-quickgelu", {}), ("ViT-B-16-SigLIP", {"trust_remote_code": False})):
        assert load_clip(f"{name}/published") == (clip[0], clip[1], (name, options))
        assert create.call_args.args == (name, "published")


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(CLIP, tmp_path / "clip")


def test_a_clip_is_loaded_from_a_checkpoint_of_torch(clip, folder):
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    weights.unlink()
    model, _, _ = load_clip(f"local-dir:{folder}")
    for name, value in clip[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    state["visual.positional_embedding"] = state["visual.positional_embedding"][:10].clone()
    save_file(state, weights)
    with pytest.raises(ValueError, match="open_clip_model.safetensors: found"):  # open_clip would resize it
        load_clip(f"local-dir:{folder}")


def test_the_digest_of_the_encoders_is_that_of_their_weights(clip, tmp_path):
    viclip, file = ViCLIP.from_pretrained(VICLIP), tmp_path / "e_img.npy"
    digests = _digests((clip[0], clip[2], viclip), [file])
    with writing_array(file, (1,), "float32", {}, digests):
        pass
    assert _digests((clip[0], None, viclip), [file]) == digests and len({*digests.values()}) == 2
    with pytest.raises(ValueError, match="e_img.npy: found the output of a viclip of .*, wanted"):
        _digests((clip[0], None, ViCLIP(viclip.config)), [file])


@pytest.mark.parametrize(("key", "value"), [("trust_remote_code", True), ("hf_model_name", str(CLIP))])
def test_a_clip_that_asks_for_code_is_refused(folder, key, value):
    for part in ("text_cfg", "vision_cfg"):
        config = json.loads((CLIP / "open_clip_config.json").read_text())
        config["model_cfg"][part] |= {"tokenizer_kwargs": [{key: value}]}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"config.json: found {key}"):
            load_clip(f"local-dir:{folder}")


def check_vectors(encode, items, e: np.ndarray) -> None:
    """Unit vectors, the same a batch at a time and one by one."""
    assert e.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(e, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(encode(items, batch=2), e, atol=1e-5)
    np.testing.assert_allclose(encode(items[3:4])[0], e[3], atol=1e-5)


def test_frames_are_encoded_as_open_clip_does(clip, frames):
    model, stats, _ = clip
    e_img = encode_images(model, frames)
    assert e_img.shape == (5, 3, 64)
    check_vectors(partial(encode_images, model), frames, e_img)
    transform = open_clip.image_transform(64, is_train=False, mean=stats["mean"], std=stats["std"])
    images = torch.stack([transform(Image.fromarray(frame)) for frame in frames[3]])
    with torch.no_grad():
        theirs = model.encode_image(images, normalize=True).numpy()
    assert abs(e_img[3] - theirs).max() < 2e-3


def test_captions_are_encoded_as_open_clip_does(clip):
    model, _, tokenizer = clip
    captions = ["a red circle moves left", "a blue square", "A  RED circle moves left", "red " * 30]
    e_txt = encode_texts(model, tokenizer, captions)
    assert e_txt.shape == (4, 64)
    check_vectors(partial(encode_texts, model, tokenizer), captions, e_txt)
    np.testing.assert_allclose(e_txt[2], e_txt[0], atol=1e-5)
    with torch.no_grad():
        theirs = model.encode_text(tokenizer(captions), normalize=True)
    np.testing.assert_allclose(e_txt, theirs, atol=1e-5)


def test_actions_are_encoded_of_whole_frames_by_viclips_own_statistics():
    viclip, rng = ViCLIP.from_pretrained(VICLIP), np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 8, 28, 56, 3), dtype=np.uint8)
    e_act = encode_actions(viclip, frames)
    check_vectors(partial(encode_actions, viclip), frames, e_act)
    size, x = viclip.config.image_size, torch.from_numpy(frames).flatten(0, 1).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((x - mean[:, None, None]) / std[:, None, None]).unflatten(0, (4, 8))
    e = viclip.encode_video(x)
    np.testing.assert_allclose(e_act, e / e.norm(dim=-1, keepdim=True), atol=1e-5)


def test_prepare_frames_is_close_to_pil():
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    transform = open_clip.image_transform(64, is_train=False, mean=mean, std=std)
    for height, width in ((97, 72), (50, 64)):
        y, x = np.mgrid[:height, :width]
        picture = np.stack([128 + 120 * np.sin(x / 5), 128 + 120 * np.cos(y / 4), 20 + x + y], -1)
        theirs = transform(Image.fromarray(frame := picture.astype(np.uint8)))
        ours = prepare_frames(torch.from_numpy(frame), 64, mean, std)
        assert ours.shape == theirs.shape == (3, 64, 64)
        assert (ours - theirs).abs().max() < 1.6 / 255 / min(std)  # PIL rounds to grey levels after each axis
    with pytest.raises(ValueError, match="float64 .*wanted uint8"):
        prepare_frames(torch.from_numpy(picture), 64, mean, std)

"""The folder of a finished model: without data/ it gives the same videos; its card. Damage: test_faults.py."""

import os
import re
import shutil
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import N, T

import data
import train_stage1
import train_stage2
from data import Clips
from evaluate import CineNeuron
from metrics import card
from prepare import facts
from support import shared
from support.files import writing_array

RUN = Path("runs/cc2017/sub1/full-s0")
PARTS = "brain_model config.json heads lora memories.json memories.safetensors mixture_of_memories voxels.npz".split()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, T, N)).astype(np.float32))


@pytest.fixture(scope="module")
def model(tiny) -> CineNeuron:
    return CineNeuron.from_pretrained(tiny / RUN)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    root, mask = tmp_path_factory.mktemp("shared"), os.umask(0o027)
    model.save_pretrained(root / "subject-1")
    os.umask(mask)
    return root / "subject-1"


@pytest.mark.parametrize("run", ["full-s0", "no-mom-s0", "no-integration-s0"])
def test_a_folder_makes_the_videos_of_its_run(run, tiny, x, tmp_path, monkeypatch):
    """Shared, or a copy of stage2/; without data/ in the working directory."""
    of_run = CineNeuron.from_pretrained(tiny / RUN.with_name(run))
    of_run.save_pretrained(tmp_path / "shared")
    shutil.copytree(tiny / RUN.with_name(run) / "stage2", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    for name in ("shared", "copy"):
        again = CineNeuron.from_pretrained(name)
        assert np.array_equal(again.reconstruct(x), of_run.reconstruct(x))
        assert str(again.remember(x).indices) == str(of_run.remember(x).indices)


def test_the_folder_holds_what_the_run_holds_and_its_card_loads_it(tiny, model, folder, x, monkeypatch):
    assert sorted(file.name for file in (tiny / RUN / "stage2").iterdir()) == PARTS
    assert sorted(file.name for file in folder.iterdir()) == sorted([*PARTS, "README.md"])
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10 and {file.stat().st_mode & 0o777 for file in files} == {0o640}  # as the umask was
    text = (folder / "README.md").read_text()
    for part in folder.rglob("README.md"):
        assert not re.search("More Information Needed|{{", part.read_text())
    monkeypatch.chdir(folder.parent)
    code, names = text.split("```python\n")[1].split("```")[0], {"x": x[:1]}
    exec(code, names)
    assert names["videos"].shape == (1, 9, 32, 48, 3)
    assert hasattr(CineNeuron, text.split("`model.")[1].split("(x).indices`")[0])
    tokens, texts = load_file(folder / "memories.safetensors"), [line["caption"] for line in model.lines]
    assert len(tokens["text_offsets"]) - 1 == len(set(texts)) < len(texts)  # one that recurs stands once
    captions = shared.read_memories(folder, 20)[1]
    assert all(map(torch.equal, captions, model.pool.captions)) and len(captions) == len(texts)


def test_push_and_load_by_name(model, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = Mock()
    hub.create_repo.return_value.repo_id = "lab/subject-1"
    hub.upload_folder.side_effect = lambda repo_id, folder_path: (
        shutil.copytree(folder_path, "uploaded") and Mock(commit_url=f"huggingface.co/{repo_id}/commit/1")
    )
    monkeypatch.setattr(card, "HfApi", lambda: hub)
    assert model.push_to_hub("subject-1", private=True) == "huggingface.co/lab/subject-1/commit/1"
    hub.create_repo.assert_called_once_with("subject-1", private=True, exist_ok=True)
    assert 'from_pretrained("lab/subject-1")' in Path("uploaded/README.md").read_text()
    download = Mock(return_value="uploaded")
    monkeypatch.setattr(shared, "snapshot_download", download)
    again = CineNeuron.from_pretrained("lab/subject-1")
    assert np.array_equal(again.reconstruct(x[:1]), model.reconstruct(x[:1]))
    assert shared.locate("lab/subject-1@refs/pr/1") == Path("uploaded")
    assert download.mock_calls == [call("lab/subject-1", revision=name) for name in (None, "refs/pr/1")]
    monkeypatch.setitem(model.settings, "decoder", "Wan-AI/Wan@v1")
    assert card.model_card(model, "x", None).data.base_model == "Wan-AI/Wan"


def test_a_model_is_located(tiny_copy, monkeypatch):
    monkeypatch.setattr(shared, "snapshot_download", lambda name: pytest.fail(name))
    assert shared.locate(RUN) == shared.locate(RUN / "stage2") == RUN / "stage2"
    (RUN / "stage2" / "config.json").unlink()
    assert shared.locate(RUN / "stage2") == RUN / "stage2"  # its error names config.json
    shutil.copytree(RUN / "stage2" / "heads", "half/heads")
    with pytest.raises(FileNotFoundError, match="^half/config.json is not there: .*download"):
        CineNeuron.from_pretrained("half")
    for name in ("runs/none", "none", RUN):
        with pytest.raises(FileNotFoundError, match=f"{name}/stage2/config.json is not there"):
            shared.locate(name)


def test_a_decoder_is_its_bytes_and_else_its_name(tmp_path):
    def is_made_for(name: str, digest: str | None, frames: int = 9) -> bool:
        return facts.is_made_for(tmp_path / "x.npy", {"decoder": name, "vae": digest, "frames": frames})

    with writing_array(tmp_path / "x.npy", (1,), "float32", {"decoder": "a/wan", "vae": "X", "frames": 9}):
        pass
    assert is_made_for("wan@v1", "X") and is_made_for("a/wan", None)
    for asked in (("b/wan", None), ("a/wan", "Y"), ("wan", "X", 5)):
        with pytest.raises(ValueError, match="x.npy was made with (decoder|vae|frames) = .*, but"):
            is_made_for(*asked)


def test_what_a_copy_of_a_decoder_needs_lies_under_its_first_name(tiny, tmp_path, monkeypatch):
    """And is trained from under any name; what another decoder needs is not."""
    stimuli, wan = tiny / "data/cc2017/stimuli/train", tiny / "models/wan"
    cached = lambda repo, file, **_: str(wan / file) if repo == "a/b" else None  # noqa: E731
    monkeypatch.setattr(facts, "try_to_load_from_cache", cached)
    (tmp_path / "copy").symlink_to(wan)
    for name in (str(tmp_path / "copy"), "a/b@v1"):
        assert facts.decoder_folder(stimuli, name) == stimuli / "wan"
        assert Clips("cc2017", 1, "train", None, name, (9, 32, 48), tiny / "data").latents is not None
    shutil.copytree(wan, other := tmp_path / "other")
    (other / "text_encoder/config.json").write_text("{}")
    assert facts.decoder_folder(stimuli, str(other)) == stimuli / "other"
    assert facts.decoder_folder(stimuli, "c/d") == stimuli / "d"  # not downloaded yet
    assert facts.decoder_recipes(str(other), (9, 32, 48))[0]["vae"]
    weights = next((other / "vae").glob("*.safetensors"))
    weights.rename(other / "vae" / "model-00001-of-00002.safetensors")  # one of two
    assert facts.decoder_recipes(str(other), (9, 32, 48))[0]["vae"] is None


def test_the_ranges_are_those_of_the_options():
    for field in (*fields(train_stage1.Config), *fields(train_stage2.Config)):
        if field.name in shared.RANGES:
            assert shared.RANGES[field.name] == field.metadata["ranges"], field.name
    assert shared.LINE == data.LINE


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x[..., 1:], r"shape \(2, 2, 39\), wanted \(B, 2, 40\)"),
    (lambda x: x[:0], "shape"),
    (lambda x: x * torch.inf, "NaN, infinity"),
    (lambda x: x + 0j, "no real numbers"),
    (lambda x: x + 4 * torch.tensor([0, 1])[:, None, None], "in clip 1, wanted z-scores"),
    (lambda x: 7 * x, "± [67]"),
    (lambda x: 0 * x, "0 ± 0 in clip 0"),
    (lambda x: np.ma.masked_greater(x.numpy(), 2), "NaN"),
    (lambda x: x.numpy().astype(str), ""),
])  # fmt: skip
def test_fmri_is_clips_volumes_voxels_as_z_scores(change, message, x):
    with pytest.raises(ValueError, match=f"^x: found .*{message}"):
        shared.check_fmri(change(x), T, N)
    one, backwards = x[:, 0].double(), x.numpy().astype(">f8")[::-1]  # clips of one volume, not one of many
    for given, n, expected in ((x[0].numpy(), T, x[:1]), (one, 1, x[:, :1]), (backwards, T, x.flip(0))):
        assert torch.equal(shared.check_fmri(given, n, N), expected)
    assert shared.check_fmri(2.5 * x + 2, T, N).shape == shared.check_fmri(x / 10, T, N).shape == x.shape


def test_a_recording_has_the_voxels_of_the_model_or_all_that_are_prepared(model, tiny_copy, monkeypatch):
    every = np.random.default_rng(0).normal(size=(T, N))
    np.save("x.npy", every)
    assert np.array_equal(shared.read_fmri(Path("x.npy"), model)[0], every.astype(np.float32))
    visual = np.arange(N) % 3 == 0  # the model sees some of the voxels
    monkeypatch.setitem(model.voxels, "index", np.load("data/cc2017/sub1/voxels.npz")["index"][visual])
    monkeypatch.setattr(model.brain_model, "voxels", int(visual.sum()))
    assert np.array_equal(shared.read_fmri(Path("x.npy"), model)[0], every[:, visual].astype(np.float32))
    np.save("x.npy", every[:, :20])
    with pytest.raises(ValueError, match=r"wanted real numbers of shape \(2, 14\): prepare it with data.py"):
        shared.read_fmri(Path("x.npy"), model)

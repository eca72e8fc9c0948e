"""The folder of a finished model: it needs no data/, gives the same videos bit by bit; shared, it has a card that says
what it is. Damage to it: test_faults.py."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LATENT, D, F, L, N, T

from data import Clips
from evaluate import CineNeuron
from metrics import card
from support import shared
from support.files import write_json

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
    """The run full, shared."""
    root = tmp_path_factory.mktemp("shared")
    model.save_pretrained(root / "subject-1")
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


def test_the_folder_holds_what_the_run_holds(tiny, folder):
    assert sorted(file.name for file in (tiny / RUN / "stage2").iterdir()) == PARTS
    assert sorted(file.name for file in folder.iterdir()) == sorted([*PARTS, "README.md"])


def test_its_memories_and_voxels_are_those_of_the_data(tiny, folder):
    """In their order: what was prepared is read as files."""
    model, data = CineNeuron.from_pretrained(folder), tiny / "data" / "cc2017"
    stimuli = data / "stimuli" / "train"
    assert model.lines == [json.loads(line) for line in open(stimuli / "clips.jsonl")]
    for k, name in ((0, "e_txt"), (2, "e_act")):
        np.testing.assert_allclose(model.pool.e[:, k], np.load(stimuli / f"{name}.npy"), atol=1e-6)
    tokens, offsets = (np.load(stimuli / "wan" / f"text_{name}.npy") for name in ("tokens", "offsets"))
    for i, caption in enumerate(model.pool.captions):
        assert np.array_equal(caption, tokens[offsets[i] : offsets[i + 1]])
    empty, voxels = np.load(stimuli.parent / "wan/empty_prompt.npy"), np.load(data / "sub1" / "voxels.npz")
    assert np.array_equal(model.empty, empty) and empty.any()
    assert all(np.array_equal(model.voxels[name], voxels[name]) for name in ("index", "roi"))


def test_the_lines_of_the_card_load_the_model(folder, x, monkeypatch):
    text = (folder / "README.md").read_text()
    for part in folder.rglob("README.md"):
        assert not re.search("More Information Needed|{{", part.read_text())
    monkeypatch.chdir(folder.parent)
    code, names = text.split("```python\n")[1].split("```")[0], {"x": x[:1]}
    exec(code, names)
    assert names["videos"].shape == (1, 9, 32, 48, 3)
    assert hasattr(CineNeuron, text.split("`model.")[1].split("(x).indices`")[0])


class Hub:
    """An HfApi that keeps what it is given."""

    calls: list = []

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path):
        shutil.copytree(folder_path, "uploaded")
        self.calls.append(("upload", repo_id))
        return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})


def test_push_and_load_by_name(model, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "HfApi", Hub)
    assert model.push_to_hub("lab/subject-1", private=True).endswith("lab/subject-1/commit/1")
    assert Hub.calls == [("create", "lab/subject-1", True, True), ("upload", "lab/subject-1")]
    assert 'from_pretrained("lab/subject-1")' in Path("uploaded/README.md").read_text()
    monkeypatch.setattr(shared, "snapshot_download", {"lab/subject-1": "uploaded"}.get)
    again = CineNeuron.from_pretrained("lab/subject-1")
    assert np.array_equal(again.reconstruct(x[:1]), model.reconstruct(x[:1]))


def test_a_model_is_located(tiny_copy, monkeypatch):
    monkeypatch.setattr(shared, "snapshot_download", lambda name: pytest.fail(name))
    assert shared.locate(RUN) == shared.locate(RUN / "stage2") == RUN / "stage2"
    (RUN / "stage2" / "config.json").rename("aside.json")
    assert shared.locate(RUN / "stage2") == RUN / "stage2"  # its error names config.json
    for name in ("runs/none", "none", RUN):
        with pytest.raises(FileNotFoundError, match=f"{name}/stage2/config.json is not there"):
            shared.locate(name)


def test_decoders_are_sought_in_the_folder_in_the_project_and_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(shared.decoder_at("toy/wan", Path())) == shared.PROJECT / "toy" / "wan"
    assert shared.decoder_at("Wan-AI/Wan2.1", Path()) == "Wan-AI/Wan2.1"
    (tmp_path / "toy" / "wan").mkdir(parents=True)
    assert shared.decoder_at("toy/wan", Path()) == "toy/wan"


def test_the_first_folder_that_holds_a_finished_run_is_started_from(tmp_path):
    places = [tmp_path / name for name in ("absent", "one", "two")]
    for place, seed in zip(places[1:], (7, 8), strict=True):
        write_json(place / "config.json", {"subject": 1, "step": 4, "steps_in_all": 4, "seed": seed})
    folder, stored = shared.finished_run(places, {"subject": 1}, {"subject": int}, "train")
    assert folder == places[1] and stored["seed"] == 7
    with pytest.raises(FileNotFoundError, match="absent/config.json is not there: train"):
        shared.finished_run(places[:1], {}, {}, "train")


def test_parts_that_do_not_fit_each_other_are_refused(tiny, model, monkeypatch):
    clips = Clips("cc2017", 1, "train", None, str(tiny / "models" / "wan"), (9, 32, 48), tiny / "data")
    assert clips.sizes == {"voxels": N, "volumes": T, "embed_dim": D, "frames": F, "classes": 4}
    settings = {"mom": True, "integration": True, "K": 3, "attention_heads": 4}
    settings["stage1_config"] = {"sizes": clips.sizes}

    def check(message: str = "", **changes) -> None:
        parts = (settings | changes, clips, model.brain_model, model.decoder)
        if not message:
            return shared.check_parts(Path("stage1"), *parts)
        with pytest.raises(ValueError, match=message):
            shared.check_parts(Path("stage1"), *parts)

    fewest = clips.recall.fewest
    check()
    check(K=fewest)
    check(f"may retrieve {fewest} of 45", K=fewest + 1)
    check(K=45, integration=False)
    check("--attention_heads 5: wanted a divisor of 24", attention_heads=5)
    check(attention_heads=5, mom=False)
    check("^stage1: trained on data of .*39.*--rois", stage1_config={"sizes": clips.sizes | {"voxels": 39}})
    with monkeypatch.context() as patch:
        patch.setattr(model.decoder, "text_length", 11)
        check(f"a Brain Model of {L} tokens, wanted the decoder's 11")
    monkeypatch.setattr(clips, "latents", np.zeros((45, LATENT[0] + 1, *LATENT[1:])))
    check("latents")


# ---------------------------------------------------------------- fMRI


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x[..., 1:], r"shape \(2, 2, 39\), wanted \(B, 2, 40\)"), (lambda x: x[:0], "shape"), (lambda x: x[0, 0], "shape"),
    (lambda x: x[None], "shape"), (lambda x: x * torch.inf, "NaN, infinity"), (lambda x: x > 0, "no real numbers"),
    (lambda x: x + 0j, "no real numbers"), (lambda x: x + 4 * torch.tensor([0, 1])[:, None, None], "in clip 1, wanted z-scores"),
    (lambda x: x - 4, "in clip 0"), (lambda x: 7 * x, "± [67]"), (lambda x: x / 40, "in clip 0"), (lambda x: 1.0, ""),
])  # fmt: skip
def test_fmri_is_clips_volumes_voxels_as_z_scores(change, message, x):
    with pytest.raises(ValueError, match=f"^x: found .*{message}"):
        shared.check_fmri(change(x), T, N)
    for fmri, T_, expected in ((x, T, x), (x[0].numpy(), T, x[:1]), (x[:, 0].double(), 1, x[:, :1])):
        assert torch.equal(shared.check_fmri(fmri, T_, N), expected)  # clips of one volume, not one of many
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

"""The folder of a finished model: it needs no data/, gives the same videos bit by bit; shared, it has a card that says
what it is. Damage to it: test_faults.py."""

import json
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from test_faults import damaged, edit, npz, setting, tensors, without
from tiny import LATENT, D, F, L, N, T

import data
import train_stage1
import train_stage2
from data import Clips
from evaluate import CineNeuron
from metrics import card
from prepare import facts
from support import pipelines, shared
from support.files import save_folder, write_json, writing_array

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


def test_the_folder_holds_what_the_run_holds(tiny, folder):
    assert sorted(file.name for file in (tiny / RUN / "stage2").iterdir()) == PARTS
    assert sorted(file.name for file in folder.iterdir()) == sorted([*PARTS, "README.md"])
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10 and {file.stat().st_mode & 0o777 for file in files} == {0o640}  # as the umask was


def test_what_there_is_no_room_for_is_said_beforehand(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    for write in (
        shared.write_memories,
        lambda folder, model: save_folder(folder, shared.writers(model)["lora"]),
    ):
        with pytest.raises(OSError, match="no room on the disk: it takes .* MB or more, 0.0 MB are free"):
            write(tmp_path / "new", model)
    assert not [*tmp_path.glob("**/*.safetensors")]


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
        return type("Repo", (), {"repo_id": repo_id if "/" in repo_id else f"lab/{repo_id}"})

    def upload_folder(self, repo_id, folder_path):
        shutil.copytree(folder_path, "uploaded")
        self.calls.append(("upload", repo_id))
        return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})


def test_push_and_load_by_name(model, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "HfApi", Hub)
    assert model.push_to_hub("subject-1", private=True).endswith("lab/subject-1/commit/1")
    assert Hub.calls == [("create", "subject-1", True, True), ("upload", "lab/subject-1")]
    assert 'from_pretrained("lab/subject-1")' in Path("uploaded/README.md").read_text()
    download = Mock(return_value="uploaded")
    monkeypatch.setattr(shared, "snapshot_download", download)
    again = CineNeuron.from_pretrained("lab/subject-1")
    assert np.array_equal(again.reconstruct(x[:1]), model.reconstruct(x[:1]))
    assert shared.locate("lab/subject-1@refs/pr/1") == Path("uploaded")
    assert download.mock_calls == [
        call("lab/subject-1", revision=None),
        call("lab/subject-1", revision="refs/pr/1"),
    ]
    monkeypatch.setitem(model.settings, "decoder", "Wan-AI/Wan@v1")
    assert card.model_card(model, "x", None).data.base_model == "Wan-AI/Wan"


def test_a_model_is_located(tiny_copy, monkeypatch):
    monkeypatch.setattr(shared, "snapshot_download", lambda name: pytest.fail(name))
    assert shared.locate(RUN) == shared.locate(RUN / "stage2") == RUN / "stage2"
    (RUN / "stage2" / "config.json").rename("aside.json")
    assert shared.locate(RUN / "stage2") == RUN / "stage2"  # its error names config.json
    shutil.copytree(RUN / "stage2" / "heads", "half/heads")
    with pytest.raises(FileNotFoundError, match="^half/config.json is not there: .*download"):
        CineNeuron.from_pretrained("half")
    for name in ("runs/none", "none", RUN):
        with pytest.raises(FileNotFoundError, match=f"{name}/stage2/config.json is not there"):
            shared.locate(name)


def test_decoders_are_sought_in_the_folder_in_the_project_and_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(shared.decoder_at("toy/wan", Path())) == shared.PROJECT / "toy" / "wan"
    for name in ("Wan-AI/Wan2.1", "Wan-AI/Wan2.1@v1"):
        assert shared.decoder_at(name, Path()) == name
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


# ---------------------------------------------------------------- a decoder is its bytes, at its revision


@pytest.mark.parametrize(("stored", "asked", "message"), [
    (("a/wan", "X"), ("wan", "X"), ""), (("wan", "X"), ("a/wan@v1", "X"), ""), (("a/wan", None), ("a/wan", "X"), ""), (("a/wan", "X"), ("a/wan", None), ""),
    (("wan", "X"), ("a/wan", None), ""), (("a/wan", "X"), ("b/wan", None), "decoder = 'a/wan', but decoder = 'b/wan'"), (("a/wan", "X"), ("a/wan", "Y"), "vae = 'X', but vae = 'Y'"),
])  # fmt: skip
def test_a_decoder_is_its_bytes_and_else_its_name(stored, asked, message, tmp_path):
    stored, asked = ({"decoder": name, "vae": digest, "frames": 9} for name, digest in (stored, asked))
    with writing_array(tmp_path / "x.npy", (1,), "float32", stored):
        pass
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        assert facts.is_made_for(tmp_path / "x.npy", asked)
    with pytest.raises(ValueError, match=message or "frames = 9, but frames = 5"):
        facts.is_made_for(tmp_path / "x.npy", asked | {"frames": 5})


def test_what_a_copy_of_a_decoder_needs_lies_under_its_first_name(tiny, tmp_path, monkeypatch):
    """And is trained from under any name; what another decoder needs is not."""
    stimuli, wan, weights = tiny / "data/cc2017/stimuli/train", tiny / "models/wan", "model-00001-of-0000"
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
    for n, known in ((1, True), (2, False)):  # whole, and one of two
        next((other / "vae").glob("*.safetensors")).rename(other / "vae" / f"{weights}{n}.safetensors")
        assert (facts.decoder_recipes(str(other), (9, 32, 48))[0]["vae"] is not None) == known


def test_a_decoder_is_loaded_at_a_revision(tiny, monkeypatch):
    download = Mock(return_value=str(tiny / "models/wan"))
    monkeypatch.setattr(pipelines, "snapshot_download", download)
    assert pipelines.load_pipeline("a/wan@v1", vae=True)[0].vae is not None
    files = ["*.json", "tokenizer/*", "vae/*.safetensors"]
    download.assert_called_once_with("a/wan", revision="v1", allow_patterns=files)


# ---------------------------------------------------------------- a stranger's folder


def pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.with_name("pipe").replace(path)


def device(path: Path) -> None:
    path.with_name("zero").symlink_to("/dev/zero")
    path.with_name("zero").replace(path)


def stage1(**changes):
    return edit(lambda settings: settings | {"stage1_config": settings["stage1_config"] | changes})


MOM, BRAIN, MEMORIES = "mixture_of_memories/config.json", "brain_model/config.json", "memories.safetensors"
STRANGE = [
    *[("config.json", setting(**{name: value}), f"found {name} = {value}, wanted {name} (at least|above)") for name, value in [
        ("height", 0), ("frames", -1), ("sampling_steps", 0), ("guidance", -1), ("lora_rank", -2), ("lora_alpha", 0), ("subject", 0), ("noise_shift", 0.0)]],
    *[("config.json", stage1(**{name: value}), f"stage1_config: found {name} = {value}") for name, value in [("tau", 0), ("lambda_1", -1), ("lambda_2", -0.5)]],
    *[("config.json", setting(**{name: value}), f"/config.json: found .*{value}") for name, value in [
        ("lora_rank", 10**9), ("lora_alpha", 1e9), ("height", 33), ("height", 10**6 * 32), ("width", 48 * 10**18), ("frames", 10**9 + 1), ("sampling_steps", 10**6)]],
    *[(MOM, setting(**{name: value}), f"{name} = '?{value}'?, wanted") for name, value in [
        ("K", 0), ("K", 46), ("K", "3"), ("K", 2.5), ("tau", 0.0), ("tau", -1), ("alpha", float("nan")), ("attention_heads", 5), ("tokens", 11)]],
    (BRAIN, setting(attention_heads=5), "brain_model/config.json: found attention_heads = 5, wanted a divisor of 24"),
    *[(file, without(name), f"{file}: found no {name}") for file, name in [(BRAIN, "attention_heads"), (MOM, "attention_heads"), (MOM, "tokens"), (MOM, "K")]],
    (BRAIN, setting(layers=10**6), "brain_model: found 1000000 layers and .* weights"), ("heads/config.json", setting(frames=0), "heads: found"),
    *[(BRAIN, setting(**{name: 10**9}), "brain_model/model.safetensors: found .*wanted") for name in ("voxels", "tokens", "rank")],
    (BRAIN, setting(dropout=7.0), "brain_model: found .*dropout"), (BRAIN, setting(rank=-2), "brain_model"), (BRAIN, pipe, "brain_model/config.json: found a pipe or a device"),
    ("heads/model.safetensors", pipe, "heads/model.safetensors: found a pipe"), (MEMORIES, pipe, "found a pipe"),
    ("lora/pytorch_lora_weights.safetensors", pipe, "found a pipe"), ("voxels.npz", device, "voxels.npz: found a pipe or a device"),
    ("config.json", device, "config.json: found a pipe or a device"), ("memories.json", device, "found a pipe or a device"),
    *[("memories.json", edit(lambda rows, change={name: value}: [rows[0] | change, *rows[1:]]), f"line 0: found {name} = '{value}'") for name, value in [
        ("caption", 3), ("caption", None), ("video", None), ("segment", 1), ("start_s", "0"), ("categories", None)]],
    *[(MEMORIES, tensors(**{name: getattr(torch.Tensor, dtype)}), "memories.safetensors") for name, dtype in [
        ("e", "double"), ("e", "bfloat16"), ("empty", "bfloat16"), ("text_tokens", "bfloat16"), ("text_offsets", "bool")]],
    (MEMORIES, tensors(e=lambda e: e.sum()), "memories.safetensors"),
    ("voxels.npz", npz(index=np.ones((N, 2), int)), r"voxels.npz\[index\]: found int64 of shape \(40, 2\)"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "damage", "message"), STRANGE)
def test_a_strangers_folder_is_one_error_that_names_its_file(file, damage, message, folder):
    with damaged(folder / file, damage), pytest.raises(ValueError, match=message):
        CineNeuron.from_pretrained(folder)


def test_the_ranges_are_those_of_the_options():
    for field in (*fields(train_stage1.Config), *fields(train_stage2.Config)):
        if field.name in shared.RANGES:
            assert shared.RANGES[field.name] == field.metadata["ranges"], field.name
    assert shared.LINE == data.LINE


# ---------------------------------------------------------------- fMRI


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x[..., 1:], r"shape \(2, 2, 39\), wanted \(B, 2, 40\)"), (lambda x: x[:0], "shape"), (lambda x: x[0, 0], "shape"),
    (lambda x: x[None], "shape"), (lambda x: x * torch.inf, "NaN, infinity"), (lambda x: x > 0, "no real numbers"),
    (lambda x: x + 0j, "no real numbers"), (lambda x: x + 4 * torch.tensor([0, 1])[:, None, None], "in clip 1, wanted z-scores"),
    (lambda x: x - 4, "in clip 0"), (lambda x: 7 * x, "± [67]"), (lambda x: x / 40, "in clip 0"), (lambda x: 1.0, ""),
    (lambda x: 0 * x, "0 ± 0 in clip 0"), (lambda x: 0 * x + 1, "1 ± 0"), (lambda x: 100 * x + 1e4, "in clip 0"), (lambda x: 1e38 * x.double() * 1e3, "infinity"),
    (lambda x: np.ma.masked_greater(x.numpy(), 2), "NaN"), (lambda x: x.numpy().astype(str), ""), (lambda x: None, ""), (lambda x: [[1, 2], [3]], ""),
    (lambda x: x.numpy().astype(object), ""), (lambda x: x.to_sparse(), ""),
])  # fmt: skip
def test_fmri_is_clips_volumes_voxels_as_z_scores(change, message, x):
    with pytest.raises(ValueError, match=f"^x: found .*{message}"):
        shared.check_fmri(change(x), T, N)
    swapped, backwards = x.numpy().astype(">f8"), np.ascontiguousarray(x.numpy()[::-1])[::-1]
    as_given = [(x, T, x), (x[0].numpy(), T, x[:1]), (x[:, 0].double(), 1, x[:, :1]), (x.tolist(), T, x)]
    for fmri, T_, expected in (*as_given, (swapped, T, x), (backwards, T, x), ([*x.numpy()], T, x)):
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

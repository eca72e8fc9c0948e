"""The folder of a finished model: it needs no data/, gives the same videos bit by bit; shared, it has a card that says
what it is. Damage to it: test_faults.py."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import D_TXT, LATENT, D, F, L, N, T

from data import Clips
from evaluate import CineNeuron
from metrics import card
from support import shared
from support.files import write_json
from support.runs import brief

RUN = Path("runs/cc2017/sub1/full-s0")
READ = """
import sys
import numpy as np
from evaluate import CineNeuron
model, x = CineNeuron.from_pretrained(sys.argv[1]), np.load(sys.argv[2])
np.save(sys.argv[3], model.reconstruct(x))
memory = model.remember(x).indices
print("" if memory is None else model.lines[memory[0, 0]]["caption"])
"""
METRICS = {
    "metrics": {
        "ssim": {"mean": 0.25, "std": 0.1, "ci95": [0.2, 0.3], "chance": None, "shuffled": 0.125, "n": 24},
        "video_50way": {"mean": 0.5, "std": 0.1, "ci95": None, "chance": 0.058, "shuffled": None, "n": 24},
        "ms": {"mean": None, "std": None, "ci95": None, "chance": None, "shuffled": None, "n": 0},
    },
    "clips": [],
}
PARTS = "brain_model config.json heads lora memories.json memories.safetensors mixture_of_memories voxels.npz".split()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, T, N)).astype(np.float32))


@pytest.fixture(scope="module")
def model(tiny) -> CineNeuron:
    return CineNeuron.from_pretrained(tiny / RUN)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """The run full, shared after its evaluation."""
    root = tmp_path_factory.mktemp("shared")
    shutil.copytree(tiny / RUN, root / "run")
    write_json(root / "run" / "eval" / "metrics.json", METRICS)
    CineNeuron.from_pretrained(root / "run").save_pretrained(root / "subject-1")
    return root / "subject-1"


def files_of(root: Path) -> set[Path]:
    return {file.relative_to(root) for file in root.rglob("*") if file.is_file()}


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


@pytest.mark.slow
def test_a_fresh_process_without_data_makes_the_same_videos(tiny, x, tmp_path):
    of_run = CineNeuron.from_pretrained(tiny / RUN)
    of_run.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", READ, "../model", "../x.npy", "videos.npy"]
    done = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "elsewhere" / "videos.npy"), of_run.reconstruct(x))
    assert done.stdout.split("\n")[-2] == of_run.lines[of_run.remember(x).indices[0, 0]]["caption"]


def test_the_folder_holds_what_the_run_holds(tiny, folder, model):
    assert sorted(file.name for file in (tiny / RUN / "stage2").iterdir()) == PARTS
    assert sorted(file.name for file in folder.iterdir()) == sorted([*PARTS, "README.md", "eval"])
    again = CineNeuron.from_pretrained(folder)
    assert again.settings == model.settings and again.folder == folder
    weights, of_run = again.state_dict(), model.state_dict()
    assert weights.keys() == of_run.keys()
    assert all(torch.equal(weights[name], of_run[name]) for name in weights)


def test_its_memories_and_voxels_are_those_of_the_data(tiny, folder):
    """In their order: what was prepared is read as files."""
    model, data = CineNeuron.from_pretrained(folder), tiny / "data" / "cc2017"
    stimuli = data / "stimuli" / "train"
    assert model.lines == [json.loads(line) for line in open(stimuli / "clips.jsonl")]
    for k, name in ((0, "e_txt"), (2, "e_act")):
        np.testing.assert_allclose(model.pool.e[:, k], np.load(stimuli / f"{name}.npy"), atol=1e-6)
    tokens, offsets = (np.load(stimuli / "wan" / f"text_{name}.npy") for name in ("tokens", "offsets"))
    assert len(model.pool.captions) == len(model.lines) == len(offsets) - 1
    for i, caption in enumerate(model.pool.captions):
        assert np.array_equal(caption, tokens[offsets[i] : offsets[i + 1]])
    assert (
        np.array_equal(model.empty, np.load(data / "stimuli" / "wan" / "empty_prompt.npy"))
        and model.empty.any()
    )
    voxels = np.load(data / "sub1" / "voxels.npz")
    assert model.voxels.keys() == {"index", "roi"}
    assert all(np.array_equal(model.voxels[name], voxels[name]) for name in voxels)


def test_a_shared_folder_is_shared_again_with_its_metrics(folder, tmp_path):
    copy = tmp_path / "copy"
    CineNeuron.from_pretrained(folder).save_pretrained(copy)
    assert files_of(folder) == files_of(copy)
    for file in files_of(folder) - {Path("README.md")}:  # it names the folder
        if file.suffix == ".safetensors":  # its header is in any order
            tensors, copied = load_file(folder / file), load_file(copy / file)
            assert tensors.keys() == copied.keys()
            assert all(torch.equal(tensors[name], copied[name]) for name in tensors)
        elif file.suffix != ".npz":  # it holds the time of day
            assert (folder / file).read_bytes() == (copy / file).read_bytes(), file


def test_the_card_says_what_it_is(folder, x, monkeypatch):
    front = ModelCard.load(folder / "README.md")
    assert front.data.license == "other" and front.data.license_name == "as-the-data"
    assert "fmri" in front.data.tags and front.data.base_model is None  # the tiny decoder is a folder
    assert "40 voxels of subject 1" in front.text and "45 memories" in front.text
    assert "| `ssim` | 0.250 | 0.200 to 0.300 |  | 0.125 | 24 |" in front.text
    assert "| `video_50way` | 0.500 |  | 0.058 |  | 24 |" in front.text and "`ms`" not in front.text
    for part in folder.rglob("README.md"):
        assert not re.search("More Information Needed|{{", part.read_text())
    monkeypatch.chdir(folder.parent)  # its lines load it
    code, names = front.text.split("```python\n")[1].split("```")[0], {"x": x[:1]}
    exec(code, names)
    assert len([line for line in code.split("\n") if line]) <= 4
    assert names["videos"].shape == (1, 9, 32, 48, 3) and "(B, 9, 32, 48, 3)" in code
    assert hasattr(CineNeuron, front.text.split("`model.")[1].split("(x).indices`")[0])


def test_a_run_without_an_evaluation_says_so_and_other_folders_are_not_touched(model, tmp_path):
    model.save_pretrained(tmp_path / "new")
    assert "no numbers" in (tmp_path / "new" / "README.md").read_text()
    assert not (tmp_path / "new" / "eval").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="wanted a new or an empty folder"):
        model.save_pretrained(tmp_path / "notes")
    assert files_of(tmp_path / "notes") == {Path("notes.txt")}


@pytest.mark.parametrize(
    ("data", "decoder", "licence", "base"),
    [
        ("toy", "toy/wan", "mit", None),
        ("cc2017", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "other", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("cinebrain", "/home/someone/wan", "other", None),
    ],
)
def test_front_matter_by_data_and_decoder(model, monkeypatch, data, decoder, licence, base):
    monkeypatch.setitem(model.settings, "data", data)
    monkeypatch.setitem(model.settings, "decoder", decoder)
    front = card.model_card(model, "place", None)
    assert front.data.license == licence and front.data.base_model == base
    assert front.data.datasets == (["Fudan-fMRI/CineBrain"] if data == "cinebrain" else None)
    assert f"`{decoder}`" in front.text and card.SOURCES[data][:20] in front.text


class Hub:
    """An HfApi that keeps what it is given."""

    calls: list = []

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path):
        root = Path(folder_path)
        self.calls.append(("upload", repo_id, {file: (root / file).read_bytes() for file in files_of(root)}))
        return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})


def test_push_and_load_by_name(model, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(card, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    assert model.push_to_hub("lab/subject-1", private=True).endswith("lab/subject-1/commit/1")
    create, (kind, name, files) = Hub.calls
    assert create == ("create", "lab/subject-1", True, True) and (kind, name) == ("upload", "lab/subject-1")
    assert b'from_pretrained("lab/subject-1")' in files[Path("README.md")]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    monkeypatch.setattr(shared, "snapshot_download", lambda name: {"lab/subject-1": str(tmp_path)}[name])
    again = CineNeuron.from_pretrained("lab/subject-1")
    assert np.array_equal(again.reconstruct(x[:1]), model.reconstruct(x[:1]))


def test_a_model_is_located(tiny_copy, monkeypatch):
    def never(name):
        raise AssertionError(name)

    monkeypatch.setattr(shared, "snapshot_download", never)
    assert shared.locate(RUN) == shared.locate(RUN / "stage2") == RUN / "stage2"
    (RUN / "stage2" / "config.json").rename("aside.json")
    assert shared.locate(RUN / "stage2") == RUN / "stage2"  # its error names config.json
    for name in ("runs/none", "none", RUN):
        with pytest.raises(
            FileNotFoundError, match=f"{name}/stage2/config.json is not there: python train_stage2.py"
        ):
            shared.locate(name)
    message = "--data cc2017 --subject 1 comes first; trained here: full-s0, no-integration-s0, no-mom-s0"
    with pytest.raises(FileNotFoundError, match=message):
        CineNeuron.from_pretrained(RUN.with_name("none-s0"))


def test_decoders_are_sought_in_the_folder_in_the_project_and_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(shared.decoder_at("toy/wan", Path())) == shared.PROJECT / "toy" / "wan"
    assert shared.decoder_at("Wan-AI/Wan2.1", Path()) == "Wan-AI/Wan2.1"
    (tmp_path / "toy" / "wan").mkdir(parents=True)
    assert shared.decoder_at("toy/wan", Path()) == "toy/wan"


def test_a_run_in_the_folder_of_another_subject_or_not_finished(tiny, capsys):
    settings = {"data": "cc2017", "subject": 1, "step": 6, "steps_in_all": 6}
    shared.check_place(settings, tiny / RUN)
    assert capsys.readouterr().out == ""
    shared.check_place(settings | {"step": 5}, tiny / RUN)
    assert "full-s0: stage 2 is at step 5 of 6" in capsys.readouterr().out
    for changes in ({"subject": 2}, {"data": "toy"}):
        with pytest.raises(ValueError, match="config.json: found a run of .*, wanted one of cc2017 sub1"):
            shared.check_place(settings | changes, tiny / RUN)


def test_the_first_folder_that_holds_a_finished_run_is_started_from(tmp_path):
    places = [tmp_path / name for name in ("absent", "one", "two")]
    for place, seed in zip(places[1:], (7, 8), strict=True):
        write_json(place / "config.json", {"subject": 1, "step": 4, "steps_in_all": 4, "seed": seed})
    folder, stored = shared.finished_run(places, {"subject": 1}, {"subject": int}, "train")
    assert folder == places[1] and stored["seed"] == 7
    with pytest.raises(FileNotFoundError, match="absent/config.json is not there: train"):
        shared.finished_run(places[:1], {}, {}, "train")


def clips_and_model(tiny, model):
    clips = Clips("cc2017", 1, "train", None, str(tiny / "models" / "wan"), (9, 32, 48), tiny / "data")
    settings = {"integration": True, "K": 3, "attention_heads": 4, "stage1_config": {"sizes": clips.sizes}}
    return settings, clips, model.brain_model, model.decoder


@pytest.mark.parametrize(("changes", "message"), [
    ({}, None), ({"attention_heads": 5}, "--attention_heads 5: wanted a divisor of 24"), ({"K": 45}, "--K 45: a clip may retrieve .* of 45"),
    ({"K": 45, "integration": False}, None), ({"stage1_config": {"sizes": dict(voxels=39, volumes=T, embed_dim=D, frames=F, classes=4)}}, "^stage1: trained on data of .*39.*--rois"),
])  # fmt: skip
def test_parts_that_do_not_fit_each_other_are_refused(changes, message, tiny, model):
    settings, clips, brain_model, decoder = clips_and_model(tiny, model)
    check = lambda: shared.check_parts(Path("stage1"), settings | changes, clips, brain_model, decoder)  # noqa: E731
    if message is None:
        return check()
    with pytest.raises(ValueError, match=message):
        check()


def test_tokens_memories_and_latents_that_do_not_fit_are_refused(tiny, model, monkeypatch):
    settings, clips, brain_model, decoder = clips_and_model(tiny, model)
    shared.check_parts(Path("stage1"), settings | {"K": clips.recall.fewest}, clips, brain_model, decoder)
    with pytest.raises(ValueError, match=f"may retrieve {clips.recall.fewest} of 45"):
        shared.check_parts(Path("s"), settings | {"K": clips.recall.fewest + 1}, clips, brain_model, decoder)
    assert clips.sizes == {"voxels": N, "volumes": T, "embed_dim": D, "frames": F, "classes": 4}
    monkeypatch.setattr(decoder, "text_length", 11)
    with pytest.raises(
        ValueError, match=f"a Brain Model of {L} tokens, wanted the decoder's 11: .*--tokens 11"
    ):
        shared.check_parts(Path("stage1"), settings, clips, brain_model, decoder)
    monkeypatch.setattr(decoder, "text_length", L)
    monkeypatch.setattr(clips, "latents", np.zeros((45, LATENT[0] + 1, *LATENT[1:])))
    with pytest.raises(ValueError, match="latents"):
        shared.check_parts(Path("stage1"), settings, clips, brain_model, decoder)
    assert clips.empty.shape == (L, D_TXT)


# ---------------------------------------------------------------- fMRI


def test_fmri_is_clips_volumes_voxels(x):
    assert torch.equal(shared.check_fmri(x, T, N), x) and torch.equal(
        shared.check_fmri(x[0].numpy(), T, N), x[:1]
    )
    of_one = shared.check_fmri(x[:, 0].double(), 1, N)  # B clips of one volume, not one of B
    assert torch.equal(of_one, x[:, :1]) and of_one.dtype == torch.float32


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x[..., 1:], r"shape \(2, 2, 39\), wanted \(B, 2, 40\)"), (lambda x: x[:, :1], "shape"), (lambda x: x[:0], "shape"),
    (lambda x: x[0, 0], "shape"), (lambda x: x[None], "shape"), (lambda x: x * torch.inf, "NaN, infinity"), (lambda x: x > 0, "no real numbers"),
    (lambda x: x + 0j, "no real numbers"), (lambda x: torch.where(x == x[1, 0, 0], torch.nan, x), "NaN"),
    (lambda x: x + 4 * torch.tensor([0, 1])[:, None, None], "in clip 1, wanted z-scores"), (lambda x: x - 4, "in clip 0"), (lambda x: 7 * x, "± [67]"),
    (lambda x: x / 40, "in clip 0"),
])  # fmt: skip
def test_what_is_no_z_scored_fmri_of_this_brain_is_refused(change, message, x):
    with pytest.raises(ValueError, match=f"^x: found .*{message}"):
        shared.check_fmri(change(x), T, N)
    assert (
        shared.check_fmri(2.5 * x + 2, T, N).shape == x.shape
        and shared.check_fmri(x / 10, T, N).shape == x.shape
    )


def test_a_recording_has_the_voxels_of_the_model_or_all_that_are_prepared(model, tiny_copy, monkeypatch):
    every = np.random.default_rng(0).normal(size=(T, N))
    np.save("x.npy", every)
    assert np.array_equal(shared.read_fmri(Path("x.npy"), model)[0], every.astype(np.float32))
    visual = np.arange(N) % 3 == 0  # the model sees some of the voxels
    monkeypatch.setitem(model.voxels, "index", np.load("data/cc2017/sub1/voxels.npz")["index"][visual])
    monkeypatch.setattr(model.brain_model, "voxels", int(visual.sum()))
    assert np.array_equal(shared.read_fmri(Path("x.npy"), model)[0], every[:, visual].astype(np.float32))
    for x, message in (
        (every[:, :20], r"wanted real numbers of shape \(2, 14\): prepare it with data.py"),
        (99 * every, "x.npy: found .*z-scores"),
    ):
        np.save("x.npy", x)
        with pytest.raises(ValueError, match=message) as error:
            shared.read_fmri(Path("x.npy"), model)
        assert len(brief(error.value).splitlines()) == 1

"""A shared folder: it needs no data/, gives the same videos bit by bit, and its card says what it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.experiment import brief
from test_evaluate import RUN, here, model, world  # noqa: F401  fixtures

from evaluate import CineNeuron
from support import sharing

READ = """
import sys
import numpy as np
from evaluate import CineNeuron
model = CineNeuron.from_pretrained(sys.argv[1])
x = model.brain_model.regression.contract.weight.new_tensor(np.load(sys.argv[2]))
np.save(sys.argv[3], model.reconstruct(x))
print(model.train.clips[model.remember(x).indices[0, 0]]["caption"])
"""
METRICS = {
    "metrics": {
        "ssim": {"mean": 0.25, "std": 0.1, "ci95": [0.2, 0.3], "chance": None, "shuffled": 0.125, "n": 24},
        "video_50way": {"mean": 0.5, "std": 0.1, "ci95": None, "chance": 0.058, "shuffled": None, "n": 24},
        "ms": {"mean": None, "std": None, "ci95": None, "chance": None, "shuffled": None, "n": 0},
    },
    "clips": [],
}


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 40)).astype(np.float32))


@pytest.fixture(scope="module")
def shared(world, model, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("shared") / "subject-1"
    (world / RUN / "eval").mkdir()
    (world / RUN / "eval" / "metrics.json").write_text(json.dumps(METRICS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        model.save_pretrained(folder)
    shutil.rmtree(world / RUN / "eval")
    return folder


@pytest.mark.parametrize("run", ["full-s0", "no-mom-s0", "no-integration-s0"])
def test_a_fresh_process_without_data_makes_the_same_videos(world, x, tmp_path, run):  # noqa: F811
    of_run = CineNeuron.from_pretrained(RUN.with_name(run))
    of_run.save_pretrained(tmp_path / "shared")
    np.save(tmp_path / "x.npy", x)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-c", READ]
    if run == "no-integration-s0":  # it seeks no memory
        command[-1] = command[-1].split("print(")[0]
    command += ["../shared", "../x.npy", "videos.npy"]
    done = subprocess.run(command, cwd=elsewhere, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(elsewhere / "videos.npy"), of_run.reconstruct(x))
    if run != "no-integration-s0":
        first = of_run.remember(x).indices[0, 0]
        assert done.stdout.split("\n")[-2] == of_run.train.clips[first]["caption"]


def test_the_folder_holds_what_the_run_holds(shared, model):  # noqa: F811
    names = "README.md brain_model config.json eval heads lora memories.json memories.safetensors"
    assert sorted(file.name for file in shared.iterdir()) == [
        *names.split(),
        "mixture_of_memories",
        "voxels.npz",
    ]
    again = CineNeuron.from_pretrained(shared)
    assert again.settings == model.settings
    for name, value in vars(model.pool).items():
        assert torch.equal(torch.as_tensor(getattr(again.pool, name)), torch.as_tensor(value)), name
    assert torch.equal(again.empty, model.empty)
    assert np.array_equal(again.train.index, model.train.index)
    assert np.array_equal(again.train.roi, model.train.roi)
    assert [clip["caption"] for clip in again.train.clips] == [clip["caption"] for clip in model.train.clips]


def test_a_shared_folder_is_shared_again_with_its_metrics(shared, x, tmp_path):
    again = CineNeuron.from_pretrained(shared)
    again.save_pretrained(tmp_path / "copy")
    same = {file.relative_to(shared) for file in shared.rglob("*") if file.is_file()}
    assert same == {
        file.relative_to(tmp_path / "copy") for file in (tmp_path / "copy").rglob("*") if file.is_file()
    }
    for file in same - {Path("README.md")}:  # it names the folder
        if file.suffix == ".safetensors":  # its header is in any order
            one, other = load_file(shared / file), load_file(tmp_path / "copy" / file)
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        else:
            assert (shared / file).read_bytes() == (tmp_path / "copy" / file).read_bytes(), file


def test_the_card_says_what_it_is(shared):
    card = ModelCard.load(shared / "README.md")
    assert card.data.license == "other" and card.data.license_name == "as-the-data"
    assert "fmri" in card.data.tags and card.data.base_model is None  # the tiny decoder is a folder
    assert "40 voxels of subject 1" in card.text and "48 memories" in card.text
    assert "| `ssim` | 0.250 | 0.200 to 0.300 |  | 0.125 | 24 |" in card.text
    assert "| `video_50way` | 0.500 |  | 0.058 |  | 24 |" in card.text and "`ms`" not in card.text
    for part in shared.rglob("README.md"):
        assert "More Information Needed" not in part.read_text()
        assert "{{" not in part.read_text()


def test_the_cards_lines_load_it(shared, monkeypatch):
    code = (shared / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(shared.parent)
    names = {"x": torch.zeros(1, 1, 40)}
    exec(code, names)
    assert len([line for line in code.split("\n") if line]) <= 4
    assert names["videos"].shape == (1, 9, 32, 32, 3)
    assert "(B, 9, 32, 32, 3)" in code


def test_a_run_without_an_evaluation_says_so(model, tmp_path):  # noqa: F811
    model.save_pretrained(tmp_path / "new")
    assert "no numbers" in (tmp_path / "new" / "README.md").read_text()
    assert not (tmp_path / "new" / "eval").exists()


@pytest.mark.parametrize(
    ("data", "decoder", "licence", "base"),
    [
        ("toy", "toy/wan", "mit", None),
        ("cc2017", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "other", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("cinebrain", "/home/someone/wan", "other", None),
    ],
)
def test_front_matter_by_data_and_decoder(model, monkeypatch, data, decoder, licence, base):  # noqa: F811
    monkeypatch.setitem(model.settings, "data", data)
    monkeypatch.setitem(model.settings, "decoder", decoder)
    card = sharing.model_card(model, "here", None)
    assert card.data.license == licence and card.data.base_model == base
    assert card.data.datasets == (["Fudan-fMRI/CineBrain"] if data == "cinebrain" else None)
    assert f"`{decoder}`" in card.text and sharing.SOURCES[data][:20] in card.text


def test_decoders_are_sought_here_in_the_project_and_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Path()
    assert Path(sharing.decoder_at("toy/wan", config)) == sharing.PROJECT / "toy" / "wan"
    assert sharing.decoder_at("Wan-AI/Wan2.1", config) == "Wan-AI/Wan2.1"
    (tmp_path / "toy" / "wan").mkdir(parents=True)
    assert sharing.decoder_at("toy/wan", config) == "toy/wan"
    with pytest.raises(ValueError, match="config.json: found decoder = '/home/someone/wan'"):
        sharing.decoder_at("/home/someone/wan", config)


class Hub:
    """An HfApi that keeps what it is given."""

    calls: list = []

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path):
        root = Path(folder_path)
        files = {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        self.calls.append(("upload", repo_id, files))
        return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})


def test_push_and_load_by_name(model, x, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sharing, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    assert model.push_to_hub("lab/subject-1", private=True).endswith("lab/subject-1/commit/1")
    create, (kind, name, files) = Hub.calls
    assert create == ("create", "lab/subject-1", True, True) and (kind, name) == ("upload", "lab/subject-1")
    assert b'from_pretrained("lab/subject-1")' in files["README.md"]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    monkeypatch.setattr(sharing, "snapshot_download", lambda name: {"lab/subject-1": str(tmp_path)}[name])
    again = CineNeuron.from_pretrained("lab/subject-1")
    assert np.array_equal(again.reconstruct(x[:1]), model.reconstruct(x[:1]))


def test_a_path_that_is_not_there_is_not_sought_on_the_hub(world, monkeypatch):  # noqa: F811
    def never(name):
        raise AssertionError(name)

    monkeypatch.setattr(sharing, "snapshot_download", never)
    for name in ("runs/none", "runs/cc2017/sub1/none-s0", "none"):
        with pytest.raises(FileNotFoundError, match="is not there"):
            CineNeuron.from_pretrained(name)


def without(name: str, rows: int = 0):
    """What takes a tensor, or its first rows, out of a file."""

    def change(file: Path) -> None:
        tensors = load_file(file)
        left = {name: tensors[name][rows:].clone()} if rows else {}
        save_file({key: x for key, x in tensors.items() if key != name} | left, file)

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda f: f.unlink(), "config.json is not there"),
        ("memories.json", lambda f: f.write_text("[]"), "found 0 lines, wanted a caption for each memory"),
        ("memories.safetensors", lambda f: f.write_bytes(b"x"), "wanted a whole .safetensors file"),
        ("memories.safetensors", without("empty"), "found 'empty', wanted the tensors of a MemoryPool"),
        ("memories.safetensors", without("segment"), "missing 1 required positional argument: 'segment'"),
        ("memories.safetensors", without("mean_frame", 1), "wanted the tensors of a MemoryPool"),
        ("voxels.npz", lambda f: f.unlink(), "voxels.npz is not there"),
        ("lora/pytorch_lora_weights.safetensors", lambda f: f.unlink(), "is not there"),
    ],
)
def test_damage_is_one_error(shared, tmp_path, file, change, message):
    shutil.copytree(shared, tmp_path / "bad")
    change(tmp_path / "bad" / file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        CineNeuron.from_pretrained(tmp_path / "bad")
    assert "share the run anew" in brief(raised.value)


def test_a_folder_of_something_else_is_not_touched(model, tmp_path):  # noqa: F811
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="wanted a new or an empty folder"):
        model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]

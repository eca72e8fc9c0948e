"""The folder of a finished model: it needs no data/, gives the same videos bit by bit, one error where it is damaged;
shared, it has a card that says what it is."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_evaluate import RUN, in_world, model, world  # noqa: F401  fixtures

from evaluate import CineNeuron
from metrics import card
from support import shared
from support.files import write_json
from support.runs import brief

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


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 40)).astype(np.float32))


@pytest.fixture(scope="module")
def folder(world, model, tmp_path_factory) -> Path:  # noqa: F811
    """The run full, shared after its evaluation."""
    shared_folder = tmp_path_factory.mktemp("shared") / "subject-1"
    write_json(world / RUN / "eval" / "metrics.json", METRICS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        model.save_pretrained(shared_folder)
    shutil.rmtree(world / RUN / "eval")
    return shared_folder


def files_of(root: Path) -> set[Path]:
    return {file.relative_to(root) for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize("run", ["full-s0", "no-mom-s0", "no-integration-s0"])
@pytest.mark.parametrize("source", ["stage2", "shared"])
def test_a_fresh_process_without_data_makes_the_same_videos(world, x, tmp_path, run, source):  # noqa: F811
    of_run = CineNeuron.from_pretrained(RUN.with_name(run))
    if source == "shared":
        of_run.save_pretrained(tmp_path / "model")
    else:
        shutil.copytree(RUN.with_name(run) / "stage2", tmp_path / "model")
    np.save(tmp_path / "x.npy", x)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-c", READ, "../model", "../x.npy", "videos.npy"]
    done = subprocess.run(command, cwd=elsewhere, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(elsewhere / "videos.npy"), of_run.reconstruct(x))
    memory = of_run.remember(x).indices
    assert done.stdout.split("\n")[-2] == ("" if memory is None else of_run.lines[memory[0, 0]]["caption"])


def test_the_folder_holds_what_the_run_holds(world, folder, model):  # noqa: F811
    parts = (
        "brain_model config.json heads lora memories.json memories.safetensors mixture_of_memories voxels.npz"
    )
    assert sorted(file.name for file in (world / RUN / "stage2").iterdir()) == parts.split()
    assert sorted(file.name for file in folder.iterdir()) == sorted([*parts.split(), "README.md", "eval"])
    again = CineNeuron.from_pretrained(folder)
    assert again.settings == model.settings and again.lines == model.lines
    weights, of_run = again.state_dict(), model.state_dict()  # e of the memories and the empty prompt, too
    assert weights.keys() == of_run.keys() and all(
        torch.equal(weights[name], of_run[name]) for name in weights
    )
    for name in ("index", "roi"):
        assert np.array_equal(again.voxels[name], model.voxels[name])
    i = torch.arange(len(model.lines))
    assert torch.equal(again.pool.text(i, 12), model.pool.text(i, 12))


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


def test_the_card_says_what_it_is(folder):
    front = ModelCard.load(folder / "README.md")
    assert front.data.license == "other" and front.data.license_name == "as-the-data"
    assert "fmri" in front.data.tags and front.data.base_model is None  # the tiny decoder is a folder
    assert "40 voxels of subject 1" in front.text and "48 memories" in front.text
    assert "| `ssim` | 0.250 | 0.200 to 0.300 |  | 0.125 | 24 |" in front.text
    assert "| `video_50way` | 0.500 |  | 0.058 |  | 24 |" in front.text and "`ms`" not in front.text
    for part in folder.rglob("README.md"):
        assert "More Information Needed" not in part.read_text()
        assert "{{" not in part.read_text()


def test_the_cards_lines_load_it(folder, monkeypatch):
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    names = {"x": torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(0))}
    exec(code, names)
    assert len([line for line in code.split("\n") if line]) <= 4
    assert names["videos"].shape == (1, 9, 32, 32, 3)
    assert "(B, 9, 32, 32, 3)" in code


def test_the_card_names_a_method_of_the_class(folder):
    """`model.METHOD(x).indices` names the memories."""
    method = (folder / "README.md").read_text().split("`model.")[1].split("(x).indices`")[0]
    assert hasattr(CineNeuron, method)


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
    front = card.model_card(model, "here", None)
    assert front.data.license == licence and front.data.base_model == base
    assert front.data.datasets == (["Fudan-fMRI/CineBrain"] if data == "cinebrain" else None)
    assert f"`{decoder}`" in front.text and card.SOURCES[data][:20] in front.text


def test_decoders_are_sought_here_in_the_project_and_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(shared.decoder_at("toy/wan", Path())) == shared.PROJECT / "toy" / "wan"
    assert shared.decoder_at("Wan-AI/Wan2.1", Path()) == "Wan-AI/Wan2.1"
    (tmp_path / "toy" / "wan").mkdir(parents=True)
    assert shared.decoder_at("toy/wan", Path()) == "toy/wan"
    with pytest.raises(ValueError, match="config.json: found decoder = '/home/someone/wan'"):
        shared.decoder_at("/home/someone/wan", Path())


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


def test_push_and_load_by_name(model, x, tmp_path, monkeypatch):  # noqa: F811
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


def test_a_path_that_is_not_there_is_not_sought_on_the_hub(world, monkeypatch):  # noqa: F811
    def never(name):
        raise AssertionError(name)

    monkeypatch.setattr(shared, "snapshot_download", never)
    for name in ("runs/none", "runs/cc2017/sub1/none-s0", "none"):
        with pytest.raises(FileNotFoundError, match="is not there"):
            CineNeuron.from_pretrained(name)


# ---------------------------------------------------------------- files that do not fit (test_faults.py: damaged ones)


def settings(**changes) -> Callable[[Path], None]:
    return lambda file: write_json(file, json.loads(file.read_text()) | changes)


def tensors(**changes) -> Callable[[Path], None]:
    """Each a function of the file's tensor of that name, or None: it goes."""

    def damage(file: Path) -> None:
        stored = load_file(file)
        for name, change in changes.items():
            tensor = stored.pop(name, torch.ones(1))
            if change is not None:
                stored[name] = change(tensor).contiguous()
        save_file(stored, file)

    return damage


def lines(change: Callable[[list], object]) -> Callable[[Path], None]:
    return lambda file: write_json(file, change(json.loads(file.read_text())))


def voxels(**changes) -> Callable[[Path], None]:
    """Each a function of the file's array of that name."""

    def damage(file: Path) -> None:
        arrays = dict(np.load(file))
        np.savez(file, **{name: changes.get(name, np.array)(array) for name, array in arrays.items()})

    return damage


NAMES = "wanted e, text_tokens, text_offsets, empty"
DAMAGES = [
    ("config.json", Path.unlink, "config.json is not there"),
    ("config.json", settings(decoder=None), "found decoder = 'None', wanted decoder as str"),
    ("config.json", settings(frames="nine"), "found frames = 'nine'"),
    ("config.json", settings(stage1_config={}), "stage1_config: found no rois"),
    ("memories.json", lines(lambda rows: rows[:-1]), "found 47 lines, wanted one for each of the 48 memories"),
    ("memories.json", lines(lambda rows: [1, *rows[1:]]), "found 1 as line 0"),
    ("memories.json", lines(lambda rows: [*rows[1:], {"id": "x"}]), "line 47: found no caption"),
    ("memories.json", lines(lambda rows: [{"id": 1, "caption": "x"}, *rows[1:]]), "line 0: found id = '1'"),
    ("memories.safetensors", tensors(empty=None), NAMES),
    ("memories.safetensors", tensors(e=None), NAMES),
    ("memories.safetensors", tensors(segment=torch.ones_like, mean_frame=torch.ones_like), NAMES),  # as of old
    ("memories.safetensors", tensors(e=lambda e: e[1:]), "text_offsets: found"),
    ("memories.safetensors", tensors(e=lambda e: e[:, :2]), "e: found float32 of shape"),
    ("memories.safetensors", tensors(e=lambda e: e.half()), "float16 of e"),
    ("memories.safetensors", tensors(e=lambda e: 2 * e), "wanted unit vectors"),
    ("memories.safetensors", tensors(e=lambda e: e[:0], text_offsets=lambda o: o[:1] * 0), "found"),
    ("memories.safetensors", tensors(e=lambda e: e[..., 1:] / e[..., 1:].norm(dim=-1, keepdim=True)), "found"),
    ("memories.safetensors", tensors(empty=lambda e: e[:, 1:]), "empty: found"),
    ("memories.safetensors", tensors(empty=lambda e: e[1:]), "found"),
    ("memories.safetensors", tensors(text_tokens=lambda t: t[1:]), "found text_offsets"),
    ("memories.safetensors", tensors(text_tokens=lambda t: t.long()), "found"),
    ("memories.safetensors", tensors(text_offsets=lambda o: o.float()), "offsets"),
    ("memories.safetensors", tensors(text_offsets=lambda o: o[[0, 2, 1, *range(3, len(o))]]), "text_offsets"),
    ("voxels.npz", voxels(roi=lambda roi: roi[1:]), "wanted arrays of one length"),
    ("voxels.npz", voxels(roi=lambda roi: roi[1:], index=lambda i: i[1:]), "found 39 voxels, wanted the 40"),
    ("voxels.npz", voxels(index=lambda index: index.astype(float)), "found float64"),
    ("voxels.npz", voxels(roi=lambda roi: roi.astype(object)), "found"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "damage", "message"), DAMAGES)
def test_what_does_not_fit_is_one_error_that_names_the_file(folder, tmp_path, file, damage, message):
    shutil.copytree(folder, tmp_path / "bad")
    damage(tmp_path / "bad" / file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        CineNeuron.from_pretrained(tmp_path / "bad")
    text = brief(raised.value)
    assert file in text and len(text.splitlines()) == 1
    assert "train stage 2 anew, or download the folder again" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lora_rank": 8}, "lora.*rank 4"), ({"mom": False}, "mixture_of_memories: found"), ({"integration": False}, "mixture_of_memories: found")],
)  # fmt: skip
def test_settings_of_other_weights_are_refused(folder, tmp_path, changes, message):
    shutil.copytree(folder, tmp_path / "bad")
    settings(**changes)(tmp_path / "bad" / "config.json")
    with pytest.raises(ValueError, match=message):
        CineNeuron.from_pretrained(tmp_path / "bad")


def test_a_run_of_old_is_one_error(world, tmp_path):  # noqa: F811
    """Its stage2/ held no memories: they were read from data/."""
    shutil.copytree(world / RUN / "stage2", tmp_path / "old" / "stage2")
    for name in ("memories.safetensors", "memories.json", "voxels.npz"):
        (tmp_path / "old" / "stage2" / name).unlink()
    with pytest.raises(FileNotFoundError, match="voxels.npz is not there: train stage 2 anew"):
        CineNeuron.from_pretrained(tmp_path / "old")


def test_a_folder_of_something_else_is_not_touched(model, tmp_path):  # noqa: F811
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="wanted a new or an empty folder"):
        model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]

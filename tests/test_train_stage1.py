"""train_stage1.py as a reader runs it, on a tiny prepared dataset: what it writes, learns, resumes, and refuses."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, environment, run_script, sha256, write_prepared

import train_stage1
from brain_model import BrainModel
from heads import Stage1Heads

TINY = "--tokens 4 --width 32 --layers 1 --heads 2 --rank 2 --lr 3e-3 --batch_size 16 --log_every 1".split()
STAGE1 = Path("runs/cc2017/sub1/full-s0/stage1")


def command(*more: object) -> list[str]:
    return ["--data", "cc2017", *TINY, *map(str, more)]


def here(*more: object) -> dict[str, float]:
    """Train in this process: quicker than another, which takes seconds to import everything."""
    return train_stage1.main(train_stage1.parse(command(*more)))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The tiny dataset in the working directory; returns its folder."""
    monkeypatch.chdir(tmp_path)
    return write_prepared(tmp_path / "data")


# ---------------------------------------------------------------- it finishes and learns

LONG = command("--steps", 150, "--save_every", 25, "--dropout", 0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_prepared(folder / "data")
    return folder, run_script("train_stage1.py", *LONG, cwd=folder)


def test_it_writes_all_that_a_run_has(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    out = folder / STAGE1
    config = json.loads((out / "config.json").read_text())
    assert (config["data"], config["steps"], config["lr"], config["width"]) == ("cc2017", 150, 3e-3, 32)
    assert (config["tau"], config["lambda_1"], config["weight_decay"]) == (0.07, 1.0, 0.01)  # the defaults
    assert BrainModel.from_pretrained(out / "brain_model").voxels == 40
    assert Stage1Heads.from_pretrained(out / "heads").phi_v.mix.weight.shape == (1, 3, 1)
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.glob("events.out.tfevents*"))
    assert not list(out.rglob(".*")), "temporary files are left"
    assert [row["step"] for row in log(out)] == list(range(150))
    assert log(out)[0].keys() >= {"step", "loss", "image", "text", "action", "category", "lr", "norm"}


def test_the_loss_falls_and_the_log_adds_up_to_eq_3(trained):
    rows = log(trained[0] / STAGE1)
    assert np.mean([row["loss"] for row in rows[-10:]]) < 0.4 * rows[0]["loss"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["image"] + row["text"] + row["action"] + row["category"], rel=1e-5)


def test_the_table_of_the_held_out_clips_beats_chance_and_shuffled_fmri(trained):
    folder, done = trained
    scores = json.loads((folder / STAGE1 / "test.json").read_text())
    names = [f"{what} {k}" for what in ("image", "text", "action") for k in ("top-1", "top-5", "50-way")] + ["category mAP"]
    assert all(list(scores[column]) == names for column in ("fmri", "shuffled", "chance"))
    for name in ("image top-5", "text top-5", "action top-5", "text 50-way"):
        assert scores["fmri"][name] > 2 * max(scores["chance"][name], scores["shuffled"][name]), name
    assert scores["fmri"]["category mAP"] > scores["chance"]["category mAP"] + 0.1
    labels = np.load(folder / "data/cc2017/stimuli/test/categories.npy")
    assert scores["chance"]["image top-5"] == pytest.approx(5 / 24)
    assert scores["chance"]["image 50-way"] == pytest.approx(1 / 13)  # 12 clips of the other segment beside its own
    assert scores["chance"]["category mAP"] == pytest.approx(labels.mean(0)[labels.any(0)].mean())
    table = (folder / STAGE1 / "test.txt").read_text().strip()
    assert table in done.stdout and "24 held-out clips, cc2017" in table
    assert f"{scores['fmri']['image top-1']:.3f}" in table


def test_one_batch_is_learnt_by_heart(prepared):
    here("--batch_size", 48, "--steps", 300, "--width", 64)
    last = log(STAGE1)[-1]
    embeddings = {name: torch.from_numpy(np.load(prepared / "stimuli" / "train" / f"{name}.npy")) for name in ("e_img", "e_txt", "e_act")}
    embeddings["e_img"] = torch.nn.functional.normalize(embeddings["e_img"].mean(1), dim=-1)
    for part, name in (("image", "e_img"), ("text", "e_txt"), ("action", "e_act")):
        e = embeddings[name]
        floor = torch.nn.functional.cross_entropy(e @ e.T / 0.07, torch.arange(48)).item()  # of f = e, clips being alike
        assert last[part] < 1.3 * floor + 0.3, (part, last[part], floor)
    assert last["category"] < 0.5


# ---------------------------------------------------------------- killed, resumed, on two processes


def test_killed_with_sigkill_and_resumed_the_weights_are_bit_equal(trained, tmp_path):
    uninterrupted, out = trained[0] / STAGE1, tmp_path / STAGE1
    (tmp_path / "data").symlink_to(trained[0] / "data")
    script = [sys.executable, str(REPO / "train_stage1.py"), *LONG]
    with subprocess.Popen(script, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (out / "log.jsonl").is_file() and (out / "log.jsonl").read_text().count("\n") > 55:  # two checkpoints, and on the way
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL and not (out / "test.json").exists()
    steps = len(log(out))
    resumed = run_script("train_stage1.py", *LONG, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert 55 < steps < 150
    for part in ("brain_model", "heads"):
        assert sha256(out / part / "model.safetensors") == sha256(uninterrupted / part / "model.safetensors")
    assert log(out) == log(uninterrupted)  # no step twice, none left out
    assert (out / "test.json").read_text() == (uninterrupted / "test.json").read_text()


def test_a_write_that_fails_leaves_the_earlier_checkpoint(tmp_path):
    train_stage1.save_whole(tmp_path / "model", lambda part: (part / "a").write_text("first"))

    def fails(part: Path) -> None:
        (part / "a").write_text("sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train_stage1.save_whole(tmp_path / "model", fails)
    assert (tmp_path / "model" / "a").read_text() == "first"
    train_stage1.save_whole(tmp_path / "model", lambda part: (part / "a").write_text("third"))
    assert (tmp_path / "model" / "a").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


TWO = """
import sys, train_stage1
try:
    train_stage1.main(train_stage1.parse([*sys.argv[1:], "--batch_size", "15"]))
except ValueError as error:  # so they are two, and each knows it
    print(error)
train_stage1.main(train_stage1.parse(sys.argv[1:]))
"""


def test_two_processes_log_what_one_does(prepared, tmp_path):
    options = command("--steps", 6, "--lr", 1e-3)
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "two.py"]
    done = subprocess.run([*launch, *options], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--batch_size 15 does not divide among 2 processes") == 2
    here("--steps", 6, "--lr", 1e-3, "--run", "one")
    one, two = (log(STAGE1.parents[1] / f"{name}-s0" / "stage1") for name in ("one", "full"))
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)
    assert done.stdout.count("24 held-out clips") == 1  # one process prints


# ---------------------------------------------------------------- options


def test_ablation_switches_name_the_run_and_leave_their_loss_out(prepared):
    here("--steps", 2, "--no-cls", "--no-action")
    row = log(STAGE1.parents[1] / "full-no-cls-no-action-s0" / "stage1")[0]
    assert row["loss"] == pytest.approx(row["image"] + row["text"], rel=1e-6) and row["action"] > 0
    for switches, name in ((["--no-cls"], "full-no-cls"), (["--no-action"], "full-no-action"), (["--no-cls", "--run", "x"], "x")):
        assert train_stage1.parse(switches).run == name


def test_seeds_have_runs_of_their_own(prepared):
    here("--steps", 1, "--seed", 3)
    here("--steps", 1)
    three, zero = (STAGE1.parents[1] / f"full-s{seed}" / "stage1" for seed in (3, 0))
    assert log(three)[0]["loss"] != log(zero)[0]["loss"]
    assert sha256(three / "brain_model/model.safetensors") != sha256(zero / "brain_model/model.safetensors")


def test_val_segments_are_held_out_with_their_near_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_prepared(tmp_path / "data", clips=(120, 48), copies=20, hidden_numbers=8)  # the first 20 clips of seg1 show what seg3 shows
    used = set()
    batch = train_stage1.ClipDataset.batch
    monkeypatch.setattr(train_stage1.ClipDataset, "batch", lambda self, clips, *a: used.update(clips) or batch(self, clips, *a))
    here("--steps", 40, "--batch_size", 8, "--save_every", 10, "--val-segments", "seg3")
    printed = capsys.readouterr().out
    assert not used & set(range(80, 120)), "clips of the held-out segment are trained on"
    assert not used & set(range(20)), "near-copies of held-out clips are trained on"
    assert len(used) > 45, "and hardly anything else is left out"
    assert [f"step {k}, seg3:" in printed for k in (10, 20, 30, 40)] == [True] * 4
    assert printed.count("48 held-out clips, cc2017") == 1
    with pytest.raises(ValueError, match="--val_segments seg3,seg9: the training segments are seg1, seg2, seg3"):
        here("--steps", 1, "--val-segments", "seg3,seg9")


def test_rois_restrict_the_voxels(prepared):
    here("--steps", 1, "--rois", "visual,hippocampus")
    assert BrainModel.from_pretrained(STAGE1 / "brain_model").voxels == 32  # 4 of the 5 areas


def test_help_lists_each_option_with_its_default(capsys):
    for data, defaults in (("cc2017", {"steps": 8000, "lr": 1e-4, "width": 2048}), ("toy", train_stage1.PRESETS["toy"])):
        with pytest.raises(SystemExit) as ended:
            train_stage1.parse(["--data", data, "--help"])
        assert ended.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for f in train_stage1.fields(train_stage1.Config):
            assert f"--{f.name} " in text and f.metadata["help"] in text
        for name, value in defaults.items():
            assert f"--{name}" in text and f"(default: {value})" in text
    assert f"--data DATA {train_stage1.Config.__dataclass_fields__['data'].metadata['help']} (default: toy)" in text


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_paper():
    assert train_stage1.parse(["--data", "cinebrain"]).rois == "visual,hippocampus"
    assert train_stage1.parse(["--data", "cinebrain", "--rois", "visual"]).rois == "visual"
    assert train_stage1.parse([]).width == train_stage1.PRESETS["toy"]["width"] != train_stage1.Config().width


# ---------------------------------------------------------------- what it refuses


def test_an_unknown_option_ends_with_2_and_its_name(tmp_path):
    done = run_script("train_stage1.py", "--data", "cc2017", "--stepz", 3, cwd=tmp_path)
    assert done.returncode == 2 and "--stepz" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("argv", "message"), [(["--data", "cc2018"], "toy, cc2017, cinebrain"), (["--steps", "many"], "--steps")])
def test_a_wrong_value_ends_with_2_and_what_there_is(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train_stage1.parse(argv)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_dataset_is_one_screen_with_the_next_command(tmp_path):
    done = run_script("train_stage1.py", "--data", "cc2017", "--subject", 2, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "python data.py cc2017 --raw RAW --subject 2" in done.stderr and "doi:" in done.stderr
    assert len(done.stderr.splitlines()) < 24 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_nan_is_an_error_that_names_clip_and_voxel(prepared, split):
    file = prepared / "sub1" / split / "fmri.npy"
    fmri = np.load(file)
    fmri[13, 0, 0, 5] = np.nan
    np.save(file, fmri)
    with pytest.raises(ValueError, match=rf"{split}/fmri.npy: nan at clip 13 .*voxel 5 \(source index 35, L_V1\)"):
        here("--steps", 6)


def test_arrays_that_differ_in_their_number_of_clips_are_an_error(prepared):
    e_txt = prepared / "stimuli" / "test" / "e_txt.npy"
    np.save(e_txt, np.load(e_txt)[1:])
    with pytest.raises(ValueError, match="'fmri': 24.*'e_txt': 23"):
        here("--steps", 1)
    assert not Path("runs").exists()


def test_a_batch_larger_than_the_training_set_is_an_error(prepared):
    with pytest.raises(ValueError, match="a batch of 64 clips, but only 48 clips"):
        here("--steps", 1, "--batch_size", 64)


def test_resuming_needs_a_checkpoint_of_the_same_settings_and_voxels(prepared):
    with pytest.raises(FileNotFoundError, match="state.pt: there is no checkpoint to resume; leave out --resume"):
        here("--resume")
    here("--steps", 4, "--save_every", 2)
    before = {path: sha256(path) for path in STAGE1.rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=r"other settings .*'width': \(32, 16\)"):
        here("--steps", 4, "--resume", "--width", 16)
    with pytest.raises(ValueError, match=r"other settings .*'rois': \(None, 'visual'\)"):
        here("--steps", 4, "--resume", "--rois", "visual")
    write_prepared(Path("data"), N=35)
    with pytest.raises(ValueError, match=r"'voxels': 40.*'voxels': 35"):
        here("--steps", 4, "--resume")
    assert before == {path: sha256(path) for path in STAGE1.rglob("*.*") if path.is_file()}, "a refused run changes nothing"

"""train_stage1.py as a reader runs it, on a tiny prepared dataset: what it writes, learns, goes on from, and
refuses."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, chatter, environment, run_script, sha256
from tiny import write_prepared
from torch.nn.functional import cross_entropy, normalize

import train_stage1
from brain_model import BrainModel
from data import Batch, Clips
from heads import Stage1Heads, stage1_loss
from metrics import retrieval
from support import training

TINY = "--tokens 4 --width 32 --layers 1 --attention_heads 2 --rank 2 --lr 3e-3 --batch_size 16".split()
TINY += ["--log_every", "1"]
STAGE1 = Path("runs/cc2017/sub1/full-s0/stage1")


def command(*more: object) -> list[str]:
    return ["--data", "cc2017", *TINY, *map(str, more)]


def here(*more: object) -> None:
    """Train in this process: quicker than another, which takes seconds to import everything."""
    train_stage1.main(train_stage1.parse(command(*more)))


def of(run: str, seed: int = 0) -> Path:
    """The folder of a run's stage 1."""
    return STAGE1.parents[1] / f"{run}-s{seed}" / "stage1"


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_logs_agree(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    for a, b in zip(log(one), log(other), strict=True):
        assert b == pytest.approx(a, rel=tolerance, abs=1e-5)


@pytest.fixture
def prepared(tmp_path, monkeypatch) -> Path:
    """The folder of the tiny dataset in the working directory."""
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
    assert not chatter(done)
    out = folder / STAGE1
    config = json.loads((out / "config.json").read_text())
    assert config["step"] == config["steps_in_all"] == 150
    assert config["sizes"] == {"volumes": 1, "voxels": 40, "frames": 3, "embed_dim": 16, "classes": 4}
    assert (config["data"], config["steps"], config["lr"], config["width"]) == ("cc2017", 150, 3e-3, 32)
    assert (config["tau"], config["lambda_1"], config["weight_decay"]) == (0.07, 1.0, 0.01)  # the defaults
    assert BrainModel.from_pretrained(out / "brain_model").voxels == 40
    assert Stage1Heads.from_pretrained(out / "heads").phi_v.mix.weight.shape == (1, 3, 1)
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG") and list(out.glob("events.out.tfevents*"))
    assert not list(out.rglob(".*")), "temporary files are left"
    assert [row["step"] for row in log(out)] == list(range(150))
    assert log(out)[0].keys() >= {"step", "loss", "image", "text", "action", "category", "lr", "norm"}


def test_the_loss_falls_and_the_log_adds_up_to_eq_3(trained):
    rows = log(trained[0] / STAGE1)
    assert np.mean([row["loss"] for row in rows[-10:]]) < 0.4 * rows[0]["loss"]
    for row in rows:
        parts = sum(row[name] for name in ("image", "text", "action", "category"))
        assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_table_of_the_held_out_clips_beats_chance_and_shuffled_fmri(trained):
    folder, done = trained
    scores = json.loads((folder / STAGE1 / "test.json").read_text())
    columns = ("top-1", "top-5", "50-way")
    names = [f"{what} {k}" for what in ("image", "text", "action") for k in columns] + ["category mAP"]
    assert all(list(scores[column]) == names for column in ("fmri", "shuffled", "chance"))
    for name in ("image top-5", "text top-5", "action top-5", "text 50-way"):
        assert scores["fmri"][name] > 2 * max(scores["chance"][name], scores["shuffled"][name]), name
    assert scores["fmri"]["category mAP"] > scores["chance"]["category mAP"] + 0.1
    labels = np.load(folder / "data/cc2017/stimuli/test/categories.npy")
    assert scores["chance"]["image top-5"] == pytest.approx(5 / 24)
    assert scores["chance"]["image 50-way"] == pytest.approx(1 / 13)  # 12 of the other segment, and its own
    assert scores["chance"]["category mAP"] == pytest.approx(labels.mean(0)[labels.any(0)].mean())
    table = (folder / STAGE1 / "test.txt").read_text().strip()
    assert table in done.stdout and "24 held-out clips, cc2017" in table
    assert f"{scores['fmri']['image top-1']:.3f}" in table


def test_one_batch_is_learnt_by_heart(prepared):
    here("--batch_size", 48, "--steps", 300, "--width", 64)
    last, clips = log(STAGE1)[-1], Clips("cc2017", 1, "train").targets()
    image = normalize(clips.e_img.mean(1), dim=-1)
    for part, e in {"image": image, "text": clips.e_txt, "action": clips.e_act}.items():
        floor = cross_entropy(e @ e.T / 0.07, torch.arange(48)).item()  # of f = e
        assert last[part] < 1.3 * floor + 0.3, (part, last[part], floor)
    assert last["category"] < 0.5


# ---------------------------------------------------------------- killed, stopped, on several processes


def signalled(script: str, argv: list, cwd: Path, file: Path, lines: int, number: int, **env: str):
    """A script of the repository, sent a signal once a file of its log has so many lines."""
    command, env = [sys.executable, str(REPO / script), *map(str, argv)], environment() | env
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes) as process:
        while not (file.is_file() and file.read_text().count("\n") >= lines) and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it was stopped"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def stopped(folder: Path, number: int, lines: int) -> subprocess.CompletedProcess:
    return signalled("train_stage1.py", LONG, folder, folder / STAGE1 / "log.jsonl", lines, number)


def contents(folder: Path) -> dict[Path, str]:
    """Of each file of the runs its sha256."""
    return {path: sha256(path) for path in (folder / "runs").rglob("*") if path.is_file()}


def weights(out: Path) -> list[str]:
    return [sha256(out / part / "model.safetensors") for part in ("brain_model", "heads")]


def test_killed_and_started_again_the_weights_are_bit_equal(trained, tmp_path):
    uninterrupted, out = trained[0] / STAGE1, tmp_path / STAGE1
    (tmp_path / "data").symlink_to(trained[0] / "data")
    done = stopped(tmp_path, signal.SIGKILL, 56)  # two checkpoints, and on the way to a third
    assert done.returncode == -signal.SIGKILL and not (out / "test.json").exists()
    assert 55 < len(log(out)) < 150
    again = run_script("train_stage1.py", *LONG, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert weights(out) == weights(uninterrupted)
    assert log(out) == log(uninterrupted)  # no step twice, none left out
    assert (out / "test.json").read_text() == (uninterrupted / "test.json").read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_and_sigterm_save_the_step_and_the_same_command_goes_on(trained, tmp_path, number, status):
    (tmp_path / "data").symlink_to(trained[0] / "data")
    done, out = stopped(tmp_path, number, 30), tmp_path / STAGE1
    step = json.loads((out / "config.json").read_text())["step"]
    assert done.returncode == status and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"saved after step {step} of 150; the same command goes on"
    assert 30 <= step < 150 and step % 25, "stopped at a checkpoint: nothing is shown"
    assert run_script("train_stage1.py", *LONG, cwd=tmp_path).returncode == 0
    assert weights(out) == weights(trained[0] / STAGE1)


def test_a_finished_run_says_so_and_changes_nothing(trained):
    before = contents(trained[0])
    done = run_script("train_stage1.py", *LONG, cwd=trained[0])
    assert done.returncode == 0 and "full-s0/stage1 is finished" in done.stdout
    assert contents(trained[0]) == before


def test_a_run_that_lacks_its_table_makes_it(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy")
    table = tmp_path / "copy" / STAGE1 / "test.json"
    expected = table.read_text()
    table.unlink()
    assert run_script("train_stage1.py", *LONG, cwd=tmp_path / "copy").returncode == 0
    assert table.read_text() == expected


def test_training_stops_before_nan_reaches_a_checkpoint(prepared):
    with pytest.raises(ValueError, match="step 1: .*nan.*lower --lr"):
        here("--steps", 6, "--lr", 1e30, "--save_every", 1)
    assert json.loads((STAGE1 / "config.json").read_text())["step"] == 1
    assert all(p.isfinite().all() for p in BrainModel.from_pretrained(STAGE1 / "brain_model").parameters())


SEVERAL = """
import sys, torch, train_stage1
step = torch.optim.AdamW.step
def keep(self, *args, **kwargs):  # the gradients of the last step
    number = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save([p.grad for group in self.param_groups for p in group["params"]], f"{sys.argv[1]}-{number}.pt")
    return step(self, *args, **kwargs)
torch.optim.AdamW.step = keep
train_stage1.main(train_stage1.parse([*sys.argv[2:], "--run", sys.argv[1]]))
"""


@pytest.mark.parametrize(("processes", "batch", "more"), [(2, 16, []), (3, 15, ["--micro_batch", "2"])])
def test_several_processes_train_as_one_does(prepared, tmp_path, processes, batch, more):
    """Dropout included, and in micro-batches: each is as one, to 1e-5."""
    (tmp_path / "several.py").write_text(SEVERAL)
    options = command("--steps", 6, "--lr", 1e-3, "--dropout", 0.4, "--batch_size", batch)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]

    def start(launcher: list[str], name: str, *more: str) -> str:
        script = [*launcher, "several.py", name, *options, *more]
        done = subprocess.run(script, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    start([sys.executable], "one")
    assert start(launch, "many", *more).count("24 held-out clips") == 1  # one process prints
    assert len(log(of("one"))) == 6
    assert_logs_agree(of("one"), of("many"), 1e-5)
    expected = torch.load(tmp_path / "one-0.pt")
    for number in range(processes):
        torch.testing.assert_close(torch.load(tmp_path / f"many-{number}.pt"), expected, rtol=1e-5, atol=1e-5)


def test_a_batch_that_processes_cannot_share_evenly_is_an_error(prepared, monkeypatch):
    monkeypatch.setattr(training, "start", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="--batch_size 16: wanted a multiple of the 3 processes"):
        here()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch", [None, 1, 3, 8, 16])
def test_the_gradients_of_a_step_are_those_of_eq_3(micro_batch, checkpointing):
    """InfoNCE is over the whole batch, however many clips are in the Brain Model at once."""
    options = ["--layers", 2, "--lambda_2", 0.5, "--precision", "fp32"]
    config = replace(train_stage1.parse(command(*options)), micro_batch=micro_batch)
    torch.manual_seed(0)
    sizes = {"volumes": 2, "voxels": 30, "frames": 3, "embed_dim": 16, "classes": 4}
    model, heads = train_stage1.build(config, sizes)
    model.gradient_checkpointing = checkpointing
    torch.nn.init.normal_(heads.phi_a.mlp[3].weight, std=0.3)
    e_txt, e_act = torch.randn(2, 16, 16)
    categories = (torch.rand(16, 4) > 0.7).float()
    batch = Batch(None, torch.randn(16, 2, 30), torch.randn(16, 3, 16), e_txt, e_act, categories)
    parameters = [*model.parameters(), *heads.parameters()]
    eq_3 = stage1_loss(heads, model(batch.x)[0], batch, 0.07, 1.0, 0.5)
    expected = torch.autograd.grad(eq_3.loss, parameters)
    losses = train_stage1.train_step(model, heads, batch, config)
    torch.testing.assert_close(losses, eq_3)
    for p, gradient in zip(parameters, expected, strict=True):
        assert gradient.norm() > 0 and (p.grad - gradient).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("options", ["--micro_batch 5", "--compile --checkpointing"])
def test_parts_of_a_batch_and_compiled_blocks_train_as_it_does_without(prepared, options):
    if "--compile" in options and shutil.which("g++") is None:
        pytest.skip("no compiler")
    here("--steps", 4, "--run", "plain", "--no-checkpointing")
    here("--steps", 4, "--run", "other", *options.split())
    assert_logs_agree(of("plain"), of("other"))
    assert BrainModel.from_pretrained(of("other") / "brain_model").voxels == 40


def test_bf16_is_a_choice_and_keeps_weights_and_losses_in_float32(prepared):
    here("--steps", 3, "--run", "fp32")
    here("--steps", 3, "--run", "bf16", "--precision", "bf16")
    one, other = (np.array([row["loss"] for row in log(of(name))]) for name in ("fp32", "bf16"))
    assert 0 < abs(one - other).max() < 0.05 * one.max()
    weights = BrainModel.from_pretrained(of("bf16") / "brain_model").parameters()
    assert {p.dtype for p in weights} == {torch.float32}


# ---------------------------------------------------------------- options


def test_8_bit_moments_need_bitsandbytes(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="--optimizer adamw8bit: no bitsandbytes .*pip install bitsandbytes"):
        here("--steps", 1, "--optimizer", "adamw8bit")
    assert not STAGE1.exists()


def test_8_bit_moments_train_and_go_on(prepared):
    """bitsandbytes runs on the CPU, too; it is an extra."""
    pytest.importorskip("bitsandbytes")
    here("--steps", 30, "--width", 64, "--optimizer", "adamw8bit")
    here("--steps", 30, "--width", 64, "--run", "32")
    eight, full = ([row["loss"] for row in log(out)] for out in (STAGE1, of("32")))
    assert eight[0] == full[0] and eight[-1] == pytest.approx(full[-1], rel=0.02)
    state = torch.load(STAGE1 / "state" / "state.pt", weights_only=True)["optimiser"]["state"]
    moments = [entry.get("__bnb_optimizer_quant_state__", entry)["state1"] for entry in state.values()]
    kinds = {(x.numel() >= 4096, x.dtype) for x in moments}
    assert kinds == {(True, torch.uint8), (False, torch.float32)}
    (STAGE1 / "test.json").unlink()
    here("--steps", 30, "--width", 64, "--optimizer", "adamw8bit")  # its state is read again
    with pytest.raises(ValueError, match="optimizer 'adamw8bit' .now 'adamw'"):
        here("--steps", 30, "--width", 64)


def test_gradients_travel_in_few_messages(monkeypatch):
    sent = []
    monkeypatch.setattr(training.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(training.dist, "all_reduce", lambda x: sent.append(x.numel()) or x.mul_(3))
    gradients = [torch.randn(n, 3) for n in (5, 1, 7, 200)] + [torch.randn(4, dtype=torch.float64)]
    before = [g.clone() for g in gradients]
    monkeypatch.setattr(training, "MESSAGE", 100)
    training.average(gradients)
    assert sent == [39, 600, 4]
    torch.testing.assert_close(gradients, [1.5 * g for g in before])


def test_ablation_switches_name_the_run_and_leave_their_loss_out(prepared):
    here("--steps", 2, "--no-cls", "--no-action")
    row = log(of("full-no-cls-no-action"))[0]
    assert row["loss"] == pytest.approx(row["image"] + row["text"], rel=1e-6) and row["action"] > 0
    names = {"--no-cls": "full-no-cls", "--no-action": "full-no-action", "--no-cls --run x": "x"}
    for switches, name in names.items():
        assert train_stage1.parse(switches.split()).run == name


def test_seeds_have_runs_of_their_own(prepared):
    three, zero = of("full", 3), of("full")
    here("--steps", 1, "--seed", 3)
    here("--steps", 1)
    assert log(three)[0]["loss"] != log(zero)[0]["loss"]
    assert weights(three)[0] != weights(zero)[0]


def test_val_segments_are_held_out_with_their_near_copies(tmp_path, monkeypatch, capsys):
    """The first 20 clips of seg1 show what seg3 shows."""
    monkeypatch.chdir(tmp_path)
    write_prepared(tmp_path / "data", clips=(120, 48), copies=20, hidden_numbers=8)
    used, clips_of_step = set(), Clips.clips_of_step

    def record(self, step: int) -> np.ndarray:
        clips = clips_of_step(self, step)
        used.update(clips.tolist())
        return clips

    monkeypatch.setattr(Clips, "clips_of_step", record)
    here("--steps", 40, "--batch_size", 8, "--save_every", 10, "--val-segments", "seg3")
    printed = capsys.readouterr().out
    assert not used & set(range(80, 120)), "clips of the held-out segment are trained on"
    assert not used & set(range(20)), "near-copies of held-out clips are trained on"
    assert len(used) > 45, "and hardly anything else is left out"
    assert printed.count("40 clips of the segments held out") == 4
    checked = [row["step"] for row in log(STAGE1) if "held out, text 50-way" in row]
    assert checked == [9, 19, 29, 39]
    assert log(STAGE1)[-1]["held out, text top-5"] > 3 * 5 / 40  # of clips never seen
    assert printed.count("48 held-out clips, cc2017") == 1
    message = "--val_segments seg3,seg9: the training segments are seg1, seg2, seg3"
    with pytest.raises(ValueError, match=message):
        here("--steps", 1, "--val-segments", "seg3,seg9", "--run", "other")


def test_rois_restrict_the_voxels_to_their_areas(prepared):
    """What lies in other areas changes nothing; without --rois it does."""
    roi = np.load(prepared / "sub1" / "voxels.npz")["roi"]
    runs = {}
    for noise in (0, 1):
        for rois in ("visual,hippocampus", None):
            name = f"{'some' if rois else 'all'}-{noise}"
            here("--steps", 2, "--run", name, *(["--rois", rois] if rois else []))
            runs[name] = of(name)
        for split in ("train", "test"):
            file = prepared / "sub1" / split / "fmri.npy"
            fmri = np.load(file)
            fmri[..., roi == "R_4"] += 5  # motor cortex
            np.save(file, fmri)
    assert BrainModel.from_pretrained(runs["some-0"] / "brain_model").voxels == (roi != "R_4").sum() == 32
    assert weights(runs["some-0"]) == weights(runs["some-1"])
    assert weights(runs["all-0"]) != weights(runs["all-1"])


def test_help_lists_each_option_with_its_default(capsys):
    presets = (("cc2017", {"steps": 8000, "lr": 1e-4, "width": 2048}), ("toy", train_stage1.PRESETS["toy"]))
    for data, defaults in presets:
        with pytest.raises(SystemExit) as ended:
            train_stage1.parse(["--data", data, "--help"])
        assert ended.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for f in dataclasses.fields(train_stage1.Config):
            assert f"--{f.name}" in text and f.metadata["help"] in text
        for name, value in defaults.items():
            assert f"--{name}" in text and str(value) in text


@pytest.mark.parametrize(
    "option",
    "--stepz=3 --steps=many --lr=0 --lr=nan --tau=1e-4 --seed=-1 --seed=4294967296 --steps=0 "
    "--batch_size=0 --tokens=0 --width=0 --layers=0 --micro_batch=0 --optimizer=sgd --precision=fp16 "
    "--attention_heads=0 --rank=0 --dropout=1 --dropout=-0.1 --save_every=0 --log_every=0 "
    "--weight_decay=-1 --lambda_1=-1 --max_norm=0 --subject=0".split(),
)
def test_a_value_out_of_its_range_is_one_line_that_names_the_option(option, capsys):
    with pytest.raises(SystemExit) as ended:
        train_stage1.parse([option])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and option.split("=")[0] in error and len(error.splitlines()) == 1


def test_a_width_that_heads_do_not_divide_names_both():
    with pytest.raises(ValueError, match="--width 30: wanted a multiple of --attention_heads, which is 4"):
        train_stage1.parse(["--width", "30"])


def test_the_command_line_wins_over_the_preset_and_the_preset_over_the_paper():
    assert train_stage1.parse(["--data", "cinebrain"]).rois == "visual,hippocampus"
    assert train_stage1.parse(["--data", "cinebrain", "--rois", "visual"]).rois == "visual"
    assert train_stage1.parse([]).width == train_stage1.PRESETS["toy"]["width"] != train_stage1.Config().width


# ---------------------------------------------------------------- what it refuses


def test_an_unknown_dataset_ends_with_2_and_those_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        train_stage1.parse(["--data", "cc2018"])
    assert ended.value.code == 2 and "toy, cc2017, cinebrain" in capsys.readouterr().err


def test_a_missing_dataset_is_one_screen_with_the_next_command(tmp_path):
    done = run_script("train_stage1.py", "--data", "cc2017", "--subject", 2, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "python data.py cc2017 --raw RAW --subject 2" in done.stderr and "doi.org" in done.stderr
    assert len(done.stderr.splitlines()) < 24 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_nan_is_an_error_that_names_clip_and_voxel(prepared, split):
    file = prepared / "sub1" / split / "fmri.npy"
    fmri = np.load(file)
    fmri[13, 0, 0, 5] = np.nan
    np.save(file, fmri)
    with pytest.raises(
        ValueError, match=rf"{split}/fmri.npy: found nan at clip 13 .*voxel 5 \(source index 35, L_V1\)"
    ):
        here("--steps", 6)


def test_arrays_that_differ_in_their_number_of_clips_are_an_error(prepared):
    e_txt = prepared / "stimuli" / "test" / "e_txt.npy"
    np.save(e_txt, np.load(e_txt)[1:])
    with pytest.raises(ValueError, match=r"e_txt.npy: found .*\(23, 16\), wanted .*\(24, 16\)"):
        here("--steps", 1)
    assert not Path("runs").exists()


def test_a_batch_larger_than_the_training_set_is_an_error(prepared):
    with pytest.raises(ValueError, match="a batch of 64 clips, but only 48 clips"):
        here("--steps", 1, "--batch_size", 64)


def test_other_settings_or_voxels_are_refused_and_nothing_changes(prepared):
    here("--steps", 4, "--save_every", 2)
    before = contents(Path())
    for name, found, now in (("width", 32, 16), ("rois", None, "visual"), ("steps", 4, 8)):
        with pytest.raises(ValueError, match=rf"made with .*{name} {found} \(now {now!r}\).*--run NAME"):
            here("--steps", 4, f"--{name}", now)
    write_prepared(Path("data"), N=35)
    with pytest.raises(ValueError, match=r"'voxels': 40.*'voxels': 35"):
        here("--steps", 4)
    assert contents(Path()) == before, "a refused run changes nothing"


def test_what_may_change_while_a_run_goes_on(prepared, capsys):
    here("--steps", 4)
    capsys.readouterr()
    here("--steps", 4, "--save_every", 1, "--log_every", 2, "--no-checkpointing")
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "text", "other sizes", "gone"])
def test_a_damaged_checkpoint_is_an_error_that_names_it(prepared, damage):
    here("--steps", 4)
    (STAGE1 / "test.json").unlink()
    file = STAGE1 / "state" / "state.pt"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "text":
        file.write_text("state")
    elif damage == "gone":
        file.unlink()
    else:
        state = torch.load(file, weights_only=True)
        state["model"]["position"] = torch.zeros(1, 2, 3)
        torch.save(state, file)
    with pytest.raises((ValueError, FileNotFoundError), match="state.pt"):
        here("--steps", 4)


def test_the_import_of_the_script_loads_no_encoder_and_no_decoder():
    code = "import sys, train_stage1; print([n for n in ('open_clip', 'diffusers') if n in sys.modules])"
    stdout = subprocess.check_output([sys.executable, "-c", code], env=environment(), text=True)
    assert stdout.strip() == "[]"


# ---------------------------------------------------------------- the table


def test_retrieval_against_a_count_by_hand():
    torch.manual_seed(0)
    f, e = torch.randn(12, 5), torch.randn(12, 5)
    e[3] = e[4]  # two clips of one caption
    i = np.arange(12)
    other = (i[:, None] // 6 != i // 6) | (abs(i[:, None] - i) > 2)  # of two segments, or far apart
    S = (normalize(f, dim=1) @ normalize(e, dim=1).T).numpy()
    ranks = np.array([(row > row[i] + 1e-6).sum() for i, row in enumerate(S)])
    equal = np.array([(abs(row - row[i]) < 1e-6).sum() for i, row in enumerate(S)])
    top_1, top_5, n_way = retrieval.retrieval(f, e, other, n=3)
    assert top_1 == pytest.approx(np.clip((1 - ranks) / equal, 0, 1).mean())
    assert top_5 == pytest.approx(np.clip((5 - ranks) / equal, 0, 1).mean())
    hits = []
    for i in range(12):  # all pairs of the other clips
        pairs = [*itertools.combinations(np.flatnonzero(other[i]), 2)]
        hits.append(np.mean([S[i, [*pair]].max() < S[i, i] - 1e-6 for pair in pairs]))
    assert n_way == pytest.approx(np.mean(hits))
    assert retrieval.retrieval(e, e, other)[1] == 1 and retrieval.retrieval(f, e, other & False)[2] == 1
    with pytest.raises(ValueError, match="not finite"):
        retrieval.retrieval(f * torch.nan, e, other)


def test_average_precision_is_that_of_scikit_learn_by_hand():
    scores, truth = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), np.array([[1, 0], [0, 0], [1, 0]])
    assert retrieval.average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)  # one column occurs

"""train_stage1.py on the tiny world: what a step gets, what a run writes, learns, goes on from, and refuses."""

import itertools
import json
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
from conftest import REPO, environment, run_script, sha256
from test_data import equal
from tiny import D, F, L, N, T, write_prepared
from torch.nn.functional import normalize
from watch import STAGE1, watch

import train_stage1
from brain_model import BrainModel
from data import Batch, Clips
from heads import Stage1Heads, stage1_loss
from metrics import retrieval
from support import training

OUT = Path("runs/cc2017/sub1/full-s0/stage1")


def train(*more: object) -> None:
    """The script in this process: another takes seconds to import everything."""
    train_stage1.main(train_stage1.parse([*STAGE1, *map(str, more)]))


def of(run: str) -> Path:
    return OUT.parents[1] / f"{run}-s0" / "stage1"


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[Path, str]:
    """Of each file of the runs its sha256."""
    return {path: sha256(path) for path in (folder / "runs").rglob("*") if path.is_file()}


def weights(out: Path) -> list[str]:
    return [sha256(out / part / "model.safetensors") for part in ("brain_model", "heads")]


def test_a_step_gets_the_clips_that_the_files_hold(linked):
    run = watch(train_stage1, STAGE1, stop=6)
    train = Clips("cc2017", 1, "train", batch_size=8, voxel_dropout=0.25)
    assert all(equal(batch, train.batch(step)) for step, batch in enumerate(run.batches))
    epoch = torch.cat([batch.clips for batch in run.batches[:5]]).tolist()  # 5 steps of 8
    assert len(run.batches) == 6 and len(set(epoch)) == 40
    assert run.batches[0].excluded is None and (run.batches[0].x == 0).float().mean() > 0.15


@pytest.mark.parametrize("micro_batch, checkpointing", [(None, False), (1, False), (3, True)])
def test_the_gradients_of_a_step_are_those_of_eq_3(micro_batch, checkpointing):
    """InfoNCE is over the whole batch, however many clips are in the Brain Model at once."""
    options = [*STAGE1, *"--lambda_1 0.7 --lambda_2 0.5 --tau 0.2".split()]
    config = replace(train_stage1.parse(options), micro_batch=micro_batch)
    torch.manual_seed(0)
    sizes = {"volumes": 2, "voxels": 30, "frames": 3, "embed_dim": 16, "classes": 4}
    model, heads = train_stage1.build(config, sizes)
    model.gradient_checkpointing = checkpointing
    torch.nn.init.normal_(heads.phi_a.mlp[3].weight, std=0.3)
    e_txt, e_act = torch.randn(2, 16, 16)
    categories = (torch.rand(16, 4) > 0.7).float()
    batch = Batch(None, torch.randn(16, 2, 30), torch.randn(16, 3, 16), e_txt, e_act, categories)
    parameters = [*model.parameters(), *heads.parameters()]
    eq_3 = stage1_loss(heads, model(batch.x)[0], batch, 0.2, 0.7, 0.5)
    expected = torch.autograd.grad(eq_3.loss, parameters)
    losses = train_stage1.train_step(model, heads, batch, config)
    torch.testing.assert_close(losses, eq_3)
    for p, gradient in zip(parameters, expected, strict=True):
        assert gradient.norm() > 0 and (p.grad - gradient).norm() <= 1e-6 * gradient.norm()


def test_the_rate_rises_and_comes_down_and_the_log_tells_the_norm_before_clipping(linked):
    run = watch(train_stage1, [*STAGE1, "--max_norm", 0.5, "--steps", 10], stop=99)
    rates = [row[0] for row in run.rates]
    assert (rates[0], rates[2], max(rates)) == pytest.approx((3e-3 / 25, 3e-3, 3e-3))  # of 10 steps
    assert len(rates) == 10 and rates[-1] < 1e-6
    moved = {p for group in run.optimiser.param_groups for p in group["params"]}
    assert moved == {p for model in run.models for p in model.parameters()}
    rows = log(OUT)
    assert all(row["norm"] > 0.5 for row in rows) and run.norms == pytest.approx([0.5] * 10, rel=1e-4)
    assert [row["lr"] for row in rows[:9]] == pytest.approx(rates[1:])  # of the step that follows


LONG = "--steps 150 --save_every 25 --dropout 0.1 --tau 0.07 --width 32 --layers 1".split()


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(tiny / "data", target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(*LONG)
    return folder / OUT


def test_it_writes_all_that_a_run_has(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["step"] == config["steps_in_all"] == 150
    assert config["sizes"] == {"volumes": T, "voxels": N, "frames": F, "embed_dim": D, "classes": 4}
    assert (config["lambda_1"], config["weight_decay"], config["precision"]) == (1.0, 0.01, "fp32")
    brain_model = BrainModel.from_pretrained(trained / "brain_model")
    assert (brain_model.voxels, brain_model.position.shape) == (N, (1, L + 1, 32))
    assert Stage1Heads.from_pretrained(trained / "heads").phi_v.mix.weight.shape == (1, F, 1)
    assert (trained / "losses.png").is_file() and [*trained.glob("events.out.tfevents*")]
    assert not list(trained.rglob(".*")), "temporary files are left"
    rows = log(trained)
    assert [row["step"] for row in rows] == list(range(150))
    assert np.mean([row["loss"] for row in rows[-10:]]) < 0.5 * rows[0]["loss"]


def top_1(out: Path, clips: Clips, numbers: np.ndarray) -> float:
    """How often the caption of a clip is the nearest to its averaged fMRI, by the weights of a run."""
    brain_model = BrainModel.from_pretrained(out / "brain_model").eval()
    e = normalize(clips.targets(numbers).e_txt.float(), dim=1)
    with torch.no_grad():
        f_c, _ = brain_model(clips.averaged(numbers))
    return ((f_c @ e.T).argmax(1) == torch.arange(len(numbers))).float().mean().item()


def test_the_table_of_the_held_out_clips_beats_chance_and_shuffled_fmri(trained, linked):
    scores = json.loads((trained / "test.json").read_text())
    fmri, shuffled, chance = (scores[column] for column in ("fmri", "shuffled", "chance"))
    for name in ("image top-5", "text top-5", "action top-5"):
        assert fmri[name] > 2 * max(chance[name], shuffled[name]), name
    assert fmri["category mAP"] > chance["category mAP"] + 0.1
    assert fmri["text top-1"] == pytest.approx(top_1(trained, Clips("cc2017", 1, "test"), np.arange(26)))
    labels = np.load("data/cc2017/stimuli/test/categories.npy")
    assert chance["image top-5"] == pytest.approx(5 / 26)
    assert "image 50-way" not in fmri  # 13 clips of the other segment are too few
    assert chance["category mAP"] == pytest.approx(labels.mean(0)[labels.any(0)].mean())
    table = (trained / "test.txt").read_text()
    assert "26 held-out clips, cc2017" in table and f"{fmri['image top-1']:.3f}" in table
    assert "50-way: n/a" in table


def test_stopped_at_any_step_it_goes_on_bit_equal(linked):
    train("--save_every", 2, "--run", "whole")
    for stop in (3, 4, 5):
        name = f"stopped-{stop}"
        before = watch(train_stage1, [*STAGE1, "--save_every", 2, "--run", name], stop)
        step = json.loads((of(name) / "config.json").read_text())["step"]
        assert step == before.saved[-1] == stop // 2 * 2 and not (of(name) / "test.json").exists()
        rest = watch(train_stage1, [*STAGE1, "--save_every", 2, "--run", name], stop=99)
        assert len(rest.batches) == 8 - step
        assert weights(of(name)) == weights(of("whole"))
        assert log(of(name)) == log(of("whole"))  # no step twice, none left out
        assert (of(name) / "test.json").read_text() == (of("whole") / "test.json").read_text()


def test_a_finished_run_changes_nothing_and_one_that_lacks_its_table_makes_it(linked, capsys):
    train()
    before, table = contents(Path()), OUT / "test.json"
    train("--save_every", 1, "--log_every", 2, "--no-checkpointing", "--micro_batch", 2)  # what may change
    assert "full-s0/stage1 is finished" in capsys.readouterr().out and contents(Path()) == before
    expected = table.read_text()
    table.unlink()
    train()
    assert table.read_text() == expected


def test_training_stops_before_nan_reaches_a_checkpoint(linked):
    with pytest.raises(ValueError, match="step 1: .*nan.*lower --lr"):
        train("--steps", 6, "--lr", 1e30, "--save_every", 1)
    assert json.loads((OUT / "config.json").read_text())["step"] == 1
    assert all(p.isfinite().all() for p in BrainModel.from_pretrained(OUT / "brain_model").parameters())


def test_val_segments_are_held_out_with_their_near_copies_and_areas_left_out(linked, capsys):
    """The first 10 clips of seg1 show what seg3 shows."""
    options = "--steps 40 --save_every 10 --val-segments seg3 --rois visual".split()
    run = watch(train_stage1, [*STAGE1, *options], stop=99)
    printed, used = capsys.readouterr().out, set(torch.cat([batch.clips for batch in run.batches]).tolist())
    assert used == set(range(10, 30)), "of seg1 what seg3 does not show, and seg2"
    assert printed.count("15 clips of the segments held out") == 4
    rows = [row for row in log(OUT) if "held out, text top-1" in row]
    assert [row["step"] for row in rows] == [9, 19, 29, 39]
    expected = top_1(OUT, Clips("cc2017", 1, "train", "visual"), np.arange(30, 45))
    assert rows[-1]["held out, text top-1"] == pytest.approx(expected)
    assert printed.count("26 held-out clips, cc2017") == 1


def test_names_of_runs_and_the_papers_defaults():
    assert train_stage1.parse(["--no-cls", "--no-action"]).run == "full-no-cls-no-action"
    assert train_stage1.parse(["--no-cls", "--run", "x"]).run == "x"
    assert train_stage1.parse(["--data", "cinebrain"]).rois == "visual,hippocampus"
    c = train_stage1.parse(["--data", "cc2017"])
    assert (c.steps, c.batch_size, c.lr) == (8000, 144, 1e-4)  # §4.1
    assert (c.tokens, c.width, c.layers, c.attention_heads) == (512, 2048, 24, 16)


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_prepared(Path("data"))
    train("--steps", 2)
    before = contents(Path())
    for name, old, new in (("width", 24, 16), ("rois", None, "visual"), ("steps", 2, 8), ("tau", 0.07, 0.1)):
        with pytest.raises(ValueError, match=rf"made with .*{name} {old} \(now {new!r}\).*--run NAME"):
            train("--steps", 2, f"--{name}", new)
    write_prepared(Path("data"), N=35)
    with pytest.raises(ValueError, match=r"'voxels': 40.*'voxels': 35"):
        train("--steps", 2)
    fmri = np.load(file := Path("data/cc2017/sub1/test/fmri.npy"))
    fmri[13, :, 0, 5] = np.nan
    np.save(file, fmri)
    with pytest.raises(ValueError, match="test/fmri.npy: found nan at clip 13 .*voxel 5"):  # before training
        train("--run", "new")
    monkeypatch.setattr(training, "start", lambda device: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="--batch_size 8: wanted a multiple of the 3 processes"):
        train("--run", "new")
    assert contents(Path()) == before


def test_retrieval_against_a_count_by_hand():
    torch.manual_seed(0)
    f, e = torch.randn(12, 5), torch.randn(12, 5)
    e[3] = e[4]  # two clips of one caption
    i = np.arange(12)
    other = (i[:, None] // 6 != i // 6) | (abs(i[:, None] - i) > 2)  # of two segments, or far apart
    S = (normalize(f, dim=1) @ normalize(e, dim=1).T).numpy()
    ranks = np.array([(row > row[i] + 1e-6).sum() for i, row in enumerate(S)])
    equal = np.array([(abs(row - row[i]) < 1e-6).sum() for i, row in enumerate(S)])
    top_1, top_5, n_way = retrieval.retrieval(f, e, other, n=3).values()
    assert top_1 == pytest.approx(np.clip((1 - ranks) / equal, 0, 1).mean())
    assert top_5 == pytest.approx(np.clip((5 - ranks) / equal, 0, 1).mean())
    hits = []
    for i in range(12):  # all pairs of the other clips
        pairs = [*itertools.combinations(np.flatnonzero(other[i]), 2)]
        hits.append(np.mean([S[i, [*pair]].max() < S[i, i] - 1e-6 for pair in pairs]))
    assert n_way == pytest.approx(np.mean(hits))
    assert retrieval.retrieval(e, e, other) == {"top-1": pytest.approx(11 / 12), "top-5": 1}  # no 50 clips
    with pytest.raises(ValueError, match="not finite"):
        retrieval.retrieval(f * torch.nan, e, other)
    scores, truth = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), np.array([[1, 0], [0, 0], [1, 0]])
    assert retrieval.average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)  # one column occurs


def signalled(script: str, argv: list, cwd: Path, file: Path, lines: int, number: int):
    """A script of the repository, sent a signal once a file of its log has so many lines."""
    command, env = [sys.executable, str(REPO / script), *map(str, argv)], environment()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes) as process:
        while not (file.is_file() and file.read_text().count("\n") >= lines) and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it was stopped"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_killed_or_stopped_the_same_command_goes_on_bit_equal(trained, linked, number, status):
    command = [*STAGE1, *LONG]
    done = signalled("train_stage1.py", command, linked, OUT / "log.jsonl", 30, number)
    assert done.returncode == status and not (OUT / "test.json").exists()
    if number != signal.SIGKILL:
        step = json.loads((OUT / "config.json").read_text())["step"]
        assert done.stderr.splitlines()[-1] == f"saved after step {step} of 150; the same command goes on"
        assert 30 <= step < 150 and "Traceback" not in done.stderr
    again = run_script("train_stage1.py", *command, cwd=linked)
    assert again.returncode == 0 and "Warning" not in again.stderr, again.stderr
    assert weights(OUT) == weights(trained) and log(OUT) == log(trained)
    assert (trained / "test.txt").read_text().strip() in again.stdout


SEVERAL = """
import os, sys, torch, train_stage1
step = torch.optim.AdamW.step
def keep(self, *args, **kwargs):  # the gradients of the last step
    gradients = [p.grad for group in self.param_groups for p in group["params"]]
    torch.save(gradients, f"{sys.argv[1]}-{os.environ.get('RANK', 0)}.pt")
    return step(self, *args, **kwargs)
torch.optim.AdamW.step = keep
train_stage1.main(train_stage1.parse([*sys.argv[2:], "--run", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes, batch, more", [(2, 16, []), (3, 15, ["--micro_batch", "2"])])
def test_several_processes_train_as_one_does(linked, processes, batch, more):
    """Dropout included, and in micro-batches: each is as one, to 1e-5."""
    (linked / "several.py").write_text(SEVERAL)
    options = [*STAGE1, *f"--steps 6 --lr 1e-3 --dropout 0.4 --batch_size {batch}".split()]
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes} several.py many".split()
    for words in (["several.py", "one", *options], [*launch, *options, *more]):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=linked, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("26 held-out clips") == 1  # one process prints
    assert len(log(of("one"))) == 6
    for one, many in zip(log(of("one")), log(of("many")), strict=True):  # the gradient's norm, too
        assert many == pytest.approx(one, rel=1e-5, abs=1e-5)
    for number in range(processes):
        found, expected = torch.load(f"many-{number}.pt"), torch.load("one-0.pt")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

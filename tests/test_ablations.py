"""extras/ablations.py: the commands of each table, tiny real runs that go on after a failure, the numbers."""

import json
import shutil
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import REPO, environment
from test_evaluate import SIZE, Films
from tiny import wan_pipeline, write_prepared

from extras import ablation_tables, ablations
from metrics.compare import read_runs
from metrics.report import BLOCK
from prepare.decoder import prepare_decoder
from support.videos import write_video

diffusers.utils.logging.set_verbosity_error()
STAGE1 = "--steps 4 --batch_size 8 --tokens 12 --width 24 --layers 1 --attention_heads 4 --no-checkpointing"
STAGE2 = (
    "--decoder models/wan --frames 9 --height 32 --width 32 --epochs 1 --batch_size 16 --micro_batch 16 --K 3 "
    "--attention_heads 4 --sample_every 0 --sampling_steps 2 --guidance 1 --no-checkpointing --lora_rank 2"
)
EVALUATE = "--clips 6 --batch_size 6 --fps 4.5 --metrics ssim,psnr --size native"
TINY = ["--data", "cc2017", "--stage1", STAGE1, "--stage2", STAGE2, "--evaluate", EVALUATE]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ablations")
    folder, films = write_prepared(root / "data"), Films(root)
    (folder / "raw" / "stimuli").mkdir(parents=True)
    for name in (*films.splits["train"], *films.splits["test"]):
        bars = np.concatenate(list(films.read_clips(name)))
        write_video(folder / "raw" / "stimuli" / f"{name}.mp4", bars, 10)
    torch.manual_seed(0)
    wan_pipeline().save_pretrained(root / "models" / "wan")
    prepare_decoder(films, folder / "stimuli", str(root / "models" / "wan"), SIZE)
    return root


@pytest.fixture
def here(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return world


# ---------------------------------------------------------------- the commands


def commands(*argv: str) -> list[str]:
    config = ablations.parse_options(ablations.Config, {"toy": {}, "cinebrain": {}}, "", "", argv)
    rows = ablations.rows_of(config.table, config.data, config.subject)
    return [" ".join(job.options[6:]) for wave in ablations.plan(config, rows).waves for job in wave]


def test_the_rows_share_their_stage_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands("--table", "4", "--seeds", "3") == [
        "--no-cls --no-action",
        "--no-action",
        "",  # of the last two rows
        "--stage1 full-no-cls-no-action --no-mom",
        "--stage1 full-no-action --no-mom",
        "--stage1 full --no-mom",
        "--stage1 full",
        "--run full-no-cls-no-action-no-mom",
        "--run full-no-action-no-mom",
        "--run full-no-mom",
        "--run full",
        "--run full --shuffle",
    ]
    assert commands("--table", "6", "--seeds", "3")[:3] == [
        "",
        "--stage1 full --no-integration",
        "--stage1 full",
    ]
    assert len(commands("--table", "4")) == 36


@pytest.mark.parametrize(
    ("data", "run", "options"),
    [
        ("cinebrain", "full", "--rois visual,hippocampus"),  # its preset
        ("toy", "visual-hippocampus", "--rois visual,hippocampus --run visual-hippocampus"),
    ],
)
def test_the_rows_of_table_5_are_areas(data, run, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = commands("--table", "5", "--data", data, "--seeds", "0")
    assert given[:3] == [
        "--rois visual --run visual",
        options,
        "--rois visual,hippocampus,mpfc --run visual-hippocampus-mpfc",
    ]
    assert f"--run {run} --shuffle" in given  # the control is the paper's model, not the last row


def test_a_region_without_voxels_is_not_trained(tmp_path, monkeypatch):
    """As the toy's mPFC, which nothing drives: the row says so, and the others are run."""
    monkeypatch.chdir(tmp_path)
    voxels = tmp_path / "data" / "toy" / "sub1" / "voxels.npz"
    voxels.parent.mkdir(parents=True)
    np.savez(voxels, index=np.arange(2), roi=np.array(["L_V1", "hippocampus_left"]))
    rows = ablations.rows_of(5, "toy", 1)
    assert [bool(row.lacks) for row in rows] == [False, False, True]
    visual, all_voxels = (row.stage1 for row in rows[:2])
    assert visual == ["--rois", "visual", "--run", "visual"] and not all_voxels  # the run `full`
    assert len(commands("--table", "5", "--seeds", "0")) == 2 + 2 + 3
    np.savez(voxels, index=np.arange(3), roi=np.array(["L_V1", "hippocampus_left", "R_p24"]))
    rows = ablations.rows_of(5, "toy", 1)
    assert not any(row.lacks for row in rows) and [bool(row.stage1) for row in rows] == [True, True, False]


def test_one_command_goes_on_after_a_failure(here, capsys, monkeypatch):
    """Table 6 of one seed: the evaluations fail, since a film is missing; then it is back."""
    argv = ["--table", "6", "--seeds", "0", "--jobs", "2", *TINY]
    film, runs = Path("data/cc2017/raw/stimuli/test1.mp4"), Path("runs/cc2017/sub1")
    film.rename(film.with_suffix(".away"))
    with pytest.raises(ValueError, match=r"evaluate.py .* status 1: error: .*test1.mp4 is not there"):
        ablations.main(argv)
    film.with_suffix(".away").rename(film)
    stages = [runs / f"full{name}-s0" for name in ("", "-no-integration")]
    trained = [run / "stage2" / "config.json" for run in stages] + [runs / "full-s0/stage1/config.json"]
    times = [file.stat().st_mtime_ns for file in trained]
    assert not (stages[1] / "stage1").exists()  # it has that of `full`
    capsys.readouterr()
    ablations.main([*argv, "--dry-run"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all("evaluate.py" in line and "? min" in line for line in said[:3])

    ablations.main(argv)
    assert [file.stat().st_mtime_ns for file in trained] == times
    said = capsys.readouterr().out
    assert "w/ integration" in said and "without a near-copy, 6 clips" in said and "0.973±0.01" in said
    result = json.loads(Path("docs/results/table6-cc2017-sub1.json").read_text())
    assert [row["run"] for row in result["rows"]] == ["full-no-integration", "full"]
    assert len(result["minutes"]) == 6 and None not in result["minutes"].values()

    monkeypatch.setattr(ablations.subprocess, "Popen", None)  # nothing is left to run
    ablations.main([*argv, "--dry-run"])
    assert "0 commands are left" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(here)
    ablations.main(["--table", "4", "--seeds", "7", *TINY, "--dry-run"])
    said = capsys.readouterr().out
    assert "12 commands are left, about " in said and "?" not in said
    weights = stages[0] / "stage2" / "lora" / "pytorch_lora_weights.safetensors"
    later = time.time() + 5
    shutil.os.utime(weights, (later, later))  # trained anew: its evaluations are not of these weights
    ablations.main([*argv, "--dry-run"])
    assert "2 commands are left" in capsys.readouterr().out


SCRIPT = """
import signal, sys, time
from pathlib import Path
told = []
signal.signal(signal.SIGTERM, lambda *of: told.append(1))
me = Path(sys.argv[1])
if me.name == "bad":
    time.sleep(1.5)
    sys.exit("this went wrong")
end = time.time() + 20
while not told and time.time() < end:
    time.sleep(0.1)
time.sleep(1)  # it saves
me.write_text(str(len(told)))
"""


def test_when_one_fails_the_others_are_told_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "REPO", tmp_path)
    (tmp_path / "train_stage1.py").write_text(SCRIPT)
    jobs = []
    for name in ("good", "bad", "later"):
        folder = tmp_path / f"{name}-s0" / "stage1"
        jobs.append(ablations.Job("stage1", [str(tmp_path / name)], folder, None))
    with pytest.raises(ValueError, match="bad ended with status 1: this went wrong"):
        ablations.run(jobs, 2, tmp_path / "logs")
    assert (tmp_path / "good").read_text() == "1" and not (tmp_path / "later").exists()
    assert sorted(file.name for file in (tmp_path / "logs").iterdir()) == [
        "bad-s0-stage1.log",
        "good-s0-stage1.log",
    ]


def test_ctrl_c_lets_those_under_way_save(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "REPO", tmp_path)
    (tmp_path / "train_stage1.py").write_text(SCRIPT)
    folder, sleep, slept = tmp_path / "good-s0" / "stage1", time.sleep, []

    def interrupted(seconds: float) -> None:
        slept.append(sleep(seconds))
        if len(slept) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ablations.time, "sleep", interrupted)
    job = ablations.Job("stage1", [str(tmp_path / "good")], folder, None)
    with pytest.raises(KeyboardInterrupt):
        ablations.run([job, job], 1, tmp_path / "logs")
    assert (tmp_path / "good").read_text() == "1"  # told once, and waited for


# ---------------------------------------------------------------- the numbers

CLIPS = 4 * BLOCK


def write_metrics(folder: Path, run: str, seed: int, values: np.ndarray, right: np.ndarray) -> Path:
    """metrics.json of 80 clips, half of them shown in training; values (clips,) of the 50-way accuracy."""
    rows = []
    for i in range(CLIPS):
        rows.append({"clip": f"{i:04d}", "video_50way": float(values[i]), "all_attributes": float(right[i])})
    entry = {"mean": float(values.mean())}
    halves = {"shown in training": rows[::2], "never shown": rows[1::2]}
    result = {
        "metrics": {"video_50way": entry, "ms_flow": {"mean": None}},
        "groups": {name: {"clips": [row["clip"] for row in half]} for name, half in halves.items()},
        "clips": rows,
        "provenance": {"subject": 2, "run": run, "seed": seed, "size": "native"},
    }
    file = folder / f"{run}-s{seed}" / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(result))
    return file


@pytest.fixture
def result(tmp_path) -> dict:
    """Two rows of two seeds: the second is better by 0.2 on what was never shown, and by nothing elsewhere."""
    rng = np.random.default_rng(0)
    base, odd, files = rng.uniform(0.2, 0.4, CLIPS), np.arange(CLIPS) % 2, {}
    right = odd == 0
    rows = [ablations.Row("w/o", quoted="0.1±0.2 0.3"), ablations.Row("w/", quoted="0.4 0.5±0.1")]
    for seed in (0, 1):
        for row, gain in zip(rows, (0, 0.2), strict=True):
            values = base + gain * odd + 0.04 * seed
            file = write_metrics(tmp_path, "after" if gain else "before", seed, values, right)
            files.setdefault(row.label, []).append(file)
    control = [write_metrics(tmp_path, "shuffled", 0, np.full(CLIPS, 0.05), ~right)]
    tests = {
        row.label: [tmp_path / f"stage1-{k}-{seed}.json" for seed in (0, 1)] for k, row in enumerate(rows)
    }
    for k, of_row in enumerate(tests.values()):
        for seed, file in enumerate(of_row):
            told = {"action 50-way": 0.5 + 0.4 * k + 0.02 * seed, "image top-1": 0.3}
            file.write_text(json.dumps({"fmri": told, "shuffled": {"action 50-way": 0.02}}))
    measured = ablation_tables.result_of(rows, tests, files, control, ["video_50way", "ms_flow"])
    about = {"table": 6, "data": "toy", "subject": 2, "seeds": [0, 1], "quoted_of": "cc2017, subject 1"}
    about |= {"command": "python extras/ablations.py --table 6", "minutes": {"a": 1.5, "b": None}}
    measured["base"] = float(base.mean())
    return json.loads(json.dumps(about | ablation_tables.made_by(Path(__file__).parent) | measured))


def test_means_deviations_and_paired_intervals(result):
    first, second = (row["metrics"]["video_50way"] for row in result["rows"])
    assert first["mean"] == pytest.approx(result["base"] + 0.02) and first["std"] == pytest.approx(0.02)
    assert "more" not in first and second["more"] == pytest.approx(0.1)
    assert second["ci95"] == pytest.approx([0.1, 0.1])  # paired: that of the clips themselves is 0.01 wide
    never = result["rows"][1]["groups"]["never shown"]
    assert never["video_50way"]["more"] == pytest.approx(0.2) and never["all_attributes"]["mean"] == 0
    shown = result["rows"][1]["groups"]["shown in training"]
    assert shown["video_50way"]["more"] == pytest.approx(0) and shown["all_attributes"]["mean"] == 1
    assert result["rows"][0]["metrics"]["all_attributes"]["mean"] == 0.5
    assert result["shuffled"]["metrics"]["video_50way"] == {"mean": pytest.approx(0.05), "std": None}
    assert result["groups"] == {"shown in training": CLIPS // 2, "never shown": CLIPS // 2}
    assert result["columns"] == ["video_2way", "video_50way", "clip_pcc", "dtc", "ms_flow", "all_attributes"]


def test_the_table_has_rows_controls_groups_and_what_is_quoted(result):
    lines = [[cell.strip() for cell in row] for row in ablation_tables.lines_of(result)]
    base = result["base"]
    assert lines[1] == ["w/o", "-", f"{base + 0.02:.3f}±0.020", "-", "-", "-", "0.500±0.000"]
    assert lines[3][:3] == ["more than the row before", "", "+0.100 [0.100, 0.100]"]
    assert lines[4][0] == "paper's model, shuffled fMRI" and lines[4][2] == "0.050"
    assert lines[5][:3] == ["chance", "0.750", "0.058"]
    headings = [row[0] for row in lines[1:] if not any(row[1:])]
    quoted = "quoted from the paper (cc2017, subject 1):"
    assert headings == ["shown in training, 40 clips:", "never shown, 40 clips:", quoted]
    assert lines[-2][:4] == ["w/o", "0.1±0.2", "0.3", ""]
    result["rows"].append({"label": "+ mPFC", "quoted": ["0.6"], "lacks": "not trained"})
    lines = ablation_tables.lines_of(result)
    assert [row[0] for row in lines if "mPFC" in row[0]] == ["+ mPFC: not trained", "+ mPFC"]
    del result["rows"][-1]
    text = ablation_tables.as_text(result)
    assert text.startswith("Table 6 on toy, subject 2: 80 held-out clips") and "0.5±0.1" in text


def test_stage_1_of_each_row_stands_below(result):
    titles, first, second, shuffled = ablation_tables.stage1_lines(result)
    assert titles[3] == "action 50-way" and first == ["w/o", "-", "-", "0.510±0.010", "-"]
    assert second[3] == "0.910±0.010" and shuffled == ["shuffled fMRI", "-", "-", "0.020±0.000", "-"]
    assert "0.910±0.010" in ablation_tables.as_text(result) and "0.910±0.010" in ablation_tables.as_markdown(
        result
    )


def test_what_the_judges_misread_is_told(result, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_tables, "RESULTS", tmp_path)
    assert not [row for row in ablation_tables.lines_of(result) if "judges" in row[0]]
    right = {"stimulus": {"all of them": 0.99}, "VAE": {"all of them": 0.98}}
    (tmp_path / "judges.json").write_text(json.dumps({"right": right}))
    told = [(row[0], row[-1]) for row in ablation_tables.lines_of(result) if "judges" in row[0]]
    assert told == [("judges on: stimulus", "0.990"), ("judges on: VAE", "0.980")]
    del result["columns"][-1]  # real data: nothing is known of the stimuli
    assert not ablation_tables.judged(result["columns"], tmp_path / "judges.json")


def test_the_page_keeps_the_words_around_its_tables(result, tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "results"
    with pytest.raises(FileNotFoundError, match="table"):
        ablation_tables.write_page(page, results)
    results.mkdir()
    (results / "table6-toy-sub2.json").write_text(json.dumps(result))
    begin, end = ablation_tables.MARKS
    page.write_text(f"# Words\n\n{begin}\nold\n{end}\n\nmore words\n")
    ablation_tables.write_page(page, results)
    once = page.read_text()
    assert once.startswith(f"# Words\n\n{begin}\n\n### Table 6") and once.endswith(
        f"\n\n{end}\n\nmore words\n"
    )
    assert "old" not in once and "| w/ |" in once and "2 commands" not in once and "took 2 minutes" in once
    ablation_tables.write_page(page, results)
    assert page.read_text() == once
    page.write_text("# Words\n")
    with pytest.raises(ValueError, match="put them back"):
        ablation_tables.write_page(page, results)
    assert page.read_text() == "# Words\n"


def test_the_page_is_what_the_results_make(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    page = tmp_path / "ablations.md"
    page.write_bytes(ablation_tables.PAGE.read_bytes())
    ablation_tables.write_page(page)
    assert page.read_bytes() == ablation_tables.PAGE.read_bytes()


def test_runs_of_other_clips_do_not_join(tmp_path):
    files = [write_metrics(tmp_path, "a", seed, np.ones(CLIPS), np.ones(CLIPS)) for seed in (0, 1)]
    cut = json.loads(files[1].read_text())
    files[1].write_text(json.dumps(cut | {"clips": cut["clips"][:-1]}))
    with pytest.raises(ValueError, match="80 and 79 clips"):
        read_runs("a", files)


@pytest.mark.parametrize(
    ("options", "said"),
    [("--table 3", "--table 3: wanted one of"), ("--seeds 0 0", "each once"), ("--jobs 0", "--jobs 0")],
)
def test_options_out_of_range(options, said, capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        ablations.main(options.split())
    assert said in capsys.readouterr().err + str(stopped.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--stage1", "--seed 5"], "--stage1 '--seed 5': --seed is the table's to set"),
        (["--table", "5", "--stage1=--rois=visual"], "--rois is the table's to set"),
        (["--evaluate=--shuffle"], "--evaluate '--shuffle': --shuffle is the table's"),
        (["--evaluate", "--compare full"], "--compare is the table's"),
        (["--stage1", "--run small"], "two rows would be one run, runs/toy/sub1/small-no-mom-s0"),
        (["--stage2=--no-integration"], "choose one"),
    ],
)
def test_options_that_break_the_table_are_refused_before_any_training(options, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=error):
        ablations.main([*options, "--dry-run"])
    assert not list(tmp_path.iterdir())


def test_films_that_are_missing_are_told_before_any_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--table", "6", "--data", "cc2017", "--seeds", "0"]
    with pytest.raises(FileNotFoundError, match="raw/stimuli is not there.*--evaluate '--stimuli FOLDER'"):
        ablations.main(argv)
    with pytest.raises(FileNotFoundError, match="elsewhere is not there"):
        ablations.main([*argv, "--evaluate", "--stimuli elsewhere"])
    assert not (tmp_path / "runs").exists()

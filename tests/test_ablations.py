"""extras/ablations.py: the commands of each table, a study that goes on where it was, the numbers."""

import json
import os
import re
import shlex
import shutil
import signal
import threading
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from conftest import REPO, environment

from extras import ablation_tables, ablations
from support.files import write_json
from support.options import settings_of

CLIPS = 120  # six blocks
ODD = np.arange(CLIPS) % 2  # never shown in training
approx = pytest.approx


def waves(words: str) -> list[list[ablations.Job]]:
    presets = dict.fromkeys(("toy", "cc2017", "cinebrain"), {})
    config = ablations.parse_options(ablations.Config, presets, "", "", shlex.split(words))
    return ablations.plan(config, ablations.chosen_rows(config))[0]


def commands(words: str) -> list[str]:
    """Without --data, --subject and --seed."""
    return [" ".join(job.options[6:]) for wave in waves(words) for job in wave]


TABLE_4 = [
    "", "--no-cls --no-action", "--no-action",  # the first is of four rows
    "--stage1 full-no-cls-no-action --no-mom", "--stage1 full-no-action --no-mom", "--stage1 full --no-mom",
    "--stage1 full --no-mom --own_captions 1 --run full-no-mom-any-caption", "--stage1 full",
    "--run full --no-stage2", "--run full-no-cls-no-action-no-mom", "--run full-no-action-no-mom", "--run full-no-mom",
    "--run full-no-mom-any-caption", "--run full", "--run full --shuffle",
]  # fmt: skip
TABLE_6 = [
    "", "--stage1 full --no-integration", "--stage1 full --alpha 0 --run full-alpha0", "--stage1 full",
    "--run full-no-integration", "--run full-alpha0", "--run full", "--run full --shuffle",
]  # fmt: skip
TABLE_5 = [
    "--rois visual --run visual", "--rois visual,hippocampus", "--rois visual,hippocampus,mpfc --run visual-hippocampus-mpfc",
    "--stage1 visual", "--stage1 full", "--stage1 visual-hippocampus-mpfc",
    "--run visual", "--run full", "--run full --shuffle", "--run visual-hippocampus-mpfc",
]  # fmt: skip


def test_the_rows_share_their_stage_1(tmp_path, monkeypatch):
    """CineBrain's own areas are the run `full`. The control is the paper's model, not the last row."""
    monkeypatch.chdir(tmp_path)
    assert commands("--table 4 --seeds 3") == TABLE_4 and commands("--table 6 --seeds 3") == TABLE_6
    assert commands("--table 5 --data cinebrain --seeds 0") == TABLE_5
    alone, _, full = waves("--table 6 --seeds 3 --stage2 '--K=3 --lr 1e-4 --attention_heads 4'")[1]
    assert " ".join(alone.options[8:]) == "--no-integration --lr 1e-4"  # which uses no other
    assert " ".join(full.options[8:]) == "--K=3 --lr 1e-4 --attention_heads 4"
    assert len(commands("--table 4")) == 45
    assert commands("--table 4 --rows 1 6 --seeds 3") == [TABLE_4[i] for i in (0, 7, 8, 13, 14)]


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
told = []
signal.signal(signal.SIGTERM, lambda *of: told.append(1))
me = Path(sys.argv[1])
if me.name == "bad":
    sys.exit("this went wrong")
me.with_name("ready").write_text("")
end = time.time() + 20
while not told and time.time() < end:
    time.sleep(0.01)
time.sleep(0.3)  # it saves
me.write_text(f"{len(told)} {os.getsid(0) == os.getpid()}")
"""


@pytest.mark.parametrize("name", ["bad", "good"])
def test_the_one_under_way_is_told_once_and_saves(name, tmp_path, monkeypatch):
    """After Ctrl-C; then, and when one fails, no more begin."""
    monkeypatch.setattr(ablations, "REPO", tmp_path)
    (tmp_path / "train_stage1.py").write_text(PROGRAM)
    folders = [tmp_path / f"{first}-s0" / "stage1" for first in (name, "later")]
    jobs = [ablations.Job("stage1", [str(folder.parent)[:-3]], folder, None) for folder in folders]

    def press_ctrl_c() -> None:
        while not (tmp_path / "ready").exists():
            sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    if name == "good":
        threading.Thread(target=press_ctrl_c).start()
    job, logs = f"{name}-s0-stage1", tmp_path / "logs"
    write_json(logs / "minutes.json", {job: 7, "other": 2})  # of an earlier start
    with pytest.raises((KeyboardInterrupt, ValueError)) as stopped:
        ablations.run(jobs, logs)
    spent = ablations.minutes_of(logs)
    assert [*logs.glob("*.log")] == [logs / f"{job}.log"] and 7 < spent.pop(job) < 8 and spent == {"other": 2}
    if name == "good":
        assert (tmp_path / "good").read_text() == "1 True"
    else:
        assert "bad ended with status 1: this went wrong" in str(stopped.value)


GAINS = (0.3, 0.0, 0.2, 0.1, 0.1, 0.5)  # on odd clips
GAIN = dict(zip([word[6:] for word in TABLE_4[8:14]], GAINS, strict=True))
BASE = np.random.default_rng(0).uniform(0.2, 0.4, CLIPS)


def metrics_of(run: str, seed: int, shuffled: bool) -> dict:
    """Each clip's 50-way accuracy and, of no use but to tell the groups apart, whether it was recognised. The memory
    has no gain."""
    clips, sets = [f"{i:04d}" for i in range(CLIPS)], []
    groups = {"shown in training": {"clips": clips[::2]}, "never shown": {"clips": clips[1::2]}}
    for values in (np.full(CLIPS, 0.05) if shuffled else BASE + GAIN[run] * ODD, BASE):
        rows = [{"clip": clip, "video_50way": v + 0.04 * seed, "all_attributes": float(odd == shuffled)}
                for clip, v, odd in zip(clips, values, ODD, strict=True)]  # fmt: skip
        mean = {"video_50way": {"mean": float(values.mean()) + 0.04 * seed}, "ms_flow": {"mean": None}}
        sets.append({"metrics": mean, "groups": groups, "clips": rows})
    provenance = {"subject": 1, "run": run, "seed": seed, "size": "native"}
    return sets[0] | {"provenance": provenance} | ({} if shuffled else {"memory": sets[1]})


def write(job: ablations.Job) -> None:
    """What the script is to write."""
    if job.script == "evaluate":
        run = job.config.run + ("" if job.config.stage2 else " --no-stage2")
        write_json(job.folder / "metrics.json", metrics_of(run, job.config.seed, job.config.shuffle))
        return
    write_json(job.folder / "config.json", settings_of(job.config) | {"step": 7, "steps_in_all": 7})
    (job.folder / "lora").mkdir()
    for name in ("test.json", "losses.png", "lora/x.safetensors"):
        (job.folder / name).touch()


@pytest.fixture(scope="module")
def table_4(tmp_path_factory) -> tuple[str, str]:
    """docs/results/*.json of a study of two seeds, and the table that is printed."""
    words = "--table 4 --data cc2017 --seeds 0 1 --evaluate '--metrics video_50way,ms_flow'"
    about = {"date": "2026-11-25", "commit": "23a6b329465a5914", "versions": {"torch": "2.14"}}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(tmp_path_factory.mktemp("study"))
        Path("data/cc2017/raw/stimuli").mkdir(parents=True)
        patch.setattr(ablations, "run", lambda jobs, *_: [write(job) for job in jobs])
        patch.setattr(ablations, "provenance", lambda folder: about)
        ablations.main(shlex.split(words))
        begun: list[ablations.Job] = []
        patch.setattr(ablations, "run", lambda jobs, *_: begun.extend(jobs))
        ablations.main(shlex.split(words))
        assert not begun, "a finished study begins anew"
        os.utime("runs/cc2017/sub1/full-no-mom-s1/stage2/lora/x.safetensors", (1e10, 1e10))  # trained anew
        other = Path("runs/cc2017/sub1/full-s0/stage2/config.json")
        write_json(other, {"step": 7, "steps_in_all": 7, "K": 4})
        patch.setattr(ablations, "on_paper", lambda script, *options: 150.0 if script == "evaluate" else None)
        ablations.main(shlex.split(f"{words} --dry-run"))
        return Path("docs/results/table4-cc2017-sub1.json").read_text(), printed.getvalue()


def test_means_deviations_and_paired_intervals(table_4):
    """± is over the seeds; `more` is over the clips of the row and the row before, with its sign. The paper's model
    is also measured from the best memory, played, and from each row that the paper does not have."""
    result, printed, previous = json.loads(table_4[0]), table_4[1], None
    *rows, played = result["rows"]
    assert [row["run"] for row in rows] == [*GAIN] and played["label"] == "best memory, played"
    for row, gain in zip(rows, GAINS, strict=True):
        cells = [row["metrics"], row["groups"]["shown in training"], row["groups"]["never shown"]]
        values, share = [cell["video_50way"] for cell in cells], np.array([0.5, 0, 1])  # of clips that gain
        assert values[0]["mean"] == approx(BASE.mean() + gain / 2 + 0.02)
        assert [value["std"] for value in values] == approx([0.02 * 2**0.5] * 3)
        assert [cell["all_attributes"]["mean"] for cell in cells] == [0.5, 1, 0]
        if previous is not None:
            more = share * (gain - previous)
            assert [value["more"] for value in values] == approx(more, abs=1e-9)
            np.testing.assert_allclose([value["ci95"] for value in values], np.c_[more, more], atol=1e-9)
        assert ("more" in values[0]) == (previous is not None)
        previous = gain
    than = {label: (cell["more"], *cell["ci95"]) for label, cell in values[0]["than"].items()}
    assert than["no stage 2"] == approx((0.1,) * 3) and than["+ L_action"] == approx((0.2,) * 3)
    assert than["the best memory, played"] == approx((0.25,) * 3) and len(than) == 3
    assert played["metrics"]["video_50way"]["mean"] == approx(BASE.mean() + 0.02)
    shuffled = result["shuffled"]
    assert shuffled["metrics"]["video_50way"] == {"mean": approx(0.07), "std": approx(0.02 * 2**0.5)}
    assert shuffled["groups"]["never shown"]["all_attributes"]["mean"] == 1
    left = printed.splitlines()[-3:]
    assert "stage2.py" in left[0] and left[1].startswith(" 150.0 min  python evaluate.py --data cc2017")
    assert left[2] == "2 commands are left, 2 hours by extras/plan.py"
    for text in (f"{BASE.mean() + 0.27:.3f}±0.028", "+0.200 [0.200, 0.200]", "0.824±0.01"):
        assert text in printed


DAMAGE = [  # a path in a result, and what stands there
    ("rows 0 metrics video_50way mean", float("nan")),
    ("rows 1 metrics video_50way ci95", [0.1]),
    ("rows 1 quoted", ["0.824"]),
    ("shuffled metrics video_50way std", "x"),
]


def test_the_page_of_two_films_keeps_the_words_around_it_and_takes_no_damaged_result(table_4, tmp_path):
    page, (begin, end) = tmp_path / "page.md", ablation_tables.MARKS
    page.write_text(f"# Words\n\n{begin}\nold\n{end}\n\nmore words\n")
    result = json.loads(table_4[0]) | {"minutes": {"a": 1.5, "b": None, "c": 2.0}}
    row, file = result["rows"][3], tmp_path / "table4-b.json"
    cell = row["metrics"]["video_50way"]
    cell |= {"more": 0.2, "ci95": [0.1, 0.3], "freedom": 7.0}
    (tmp_path / "table4-a.json").write_text(json.dumps(result))
    cell |= {"mean": cell["mean"] + 0.1, "more": -0.1, "ci95": [-0.3, 0.1]}
    result["subject"] = 2
    file.write_text(json.dumps(result))
    for _ in range(2):
        ablation_tables.write_page(page, tmp_path)
        text = page.read_text()
        assert text.startswith(f"# Words\n\n{begin}\n\n### What a part is worth on cc2017")
        assert text.endswith(f"\n\n{end}\n\nmore words\n") and "\nold\n" not in text
    worth, first, second = text.split("### ")[1:]
    # by hand: half lengths of 0.1 and 0.2 by t(7); of their sum by t(10.3): 7 * 0.05^2 / (0.01^2 + 0.04^2)
    half = (0.1**2 + 0.2**2) ** 0.5 / 2 / 2.3646 * 2.2191
    less = f"{row['label']} less {result['rows'][2]['label']}".replace("+ ", "")
    assert f"| {less} | +0.200 / -0.100 | +0.050 [{0.05 - half:.3f}, {0.05 + half:.3f}] |" in worth
    assert "subject 1 / 2" in worth and f"| {cell['mean']:.3f}±" in second
    assert (
        "| all four, never shown |" in first
        and "2026-11-25, commit 23a6b32946, torch 2.14, 4 minutes." in first
    )
    for path, value in DAMAGE:
        entry = broken = json.loads(json.dumps(result))
        *parents, last = [int(key) if key.isdecimal() else key for key in path.split()]
        for key in parents:
            entry = entry[key]
        entry[last] = value
        file.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="table4-b.json: found .* extras/ablations.py makes it anew"):
            ablation_tables.write_page(page, tmp_path)
        assert page.read_text() == text


def test_the_page_is_what_the_results_make_and_sentences_have_their_intervals_from_it(tmp_path, monkeypatch):
    """0.369 [0.309, 0.430], or with the other sign; an interval that holds 0 is no sentence's claim."""
    monkeypatch.chdir(REPO)
    copy, page = Path(shutil.copy(ablation_tables.PAGE, tmp_path)), ablation_tables.PAGE.read_text("utf-8")
    ablation_tables.write_page(copy)
    assert copy.read_text("utf-8") == page
    start, end = (page.index(mark) for mark in ablation_tables.MARKS)
    interval = r"([+-]?\d\.\d{3}) \[([+-]?\d\.\d{3}), ([+-]?\d\.\d{3})\]"
    text = page[:start] + page[end:] + Path("README.md").read_text("utf-8")
    parts = [re.findall(interval, part) for part in (page[start:end], text)]
    tables, claims = ([tuple(map(float, words)) for words in part] for part in parts)
    assert claims and {*claims} <= {*tables, *((-more, -high, -low) for more, low, high in tables)}


WORDS = """--table 6 --data cc2017 --seeds 0
--stage1 '--steps 4 --batch_size 8 --tokens 12 --width 24 --layers 1 --attention_heads 4'
--stage2 '--decoder models/wan --frames 9 --height 32 --width 48 --epochs 1 --batch_size 16 --K 3 --attention_heads 4
--sample_every 0 --sampling_steps 2 --guidance 1 --lora_rank 2'
--evaluate '--clips 6 --batch_size 6 --fps 4.5 --metrics ssim,psnr --size native'"""


@pytest.mark.slow
def test_the_real_scripts_make_a_table(tiny_copy, capsys, monkeypatch):
    shutil.rmtree("runs")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    ablations.main(shlex.split(WORDS))
    result = json.loads(Path("docs/results/table6-cc2017-sub1.json").read_text())
    runs = ["full-no-integration", "full-alpha0", "full", None]  # the last: the best memory, played
    assert [row.get("run") for row in result["rows"]] == runs
    assert len(result["minutes"]) == 8 and all(result["minutes"].values())
    assert not Path("runs/cc2017/sub1/full-no-integration-s0/stage1").exists()  # it has that of `full`
    assert "SSIM" in capsys.readouterr().out
    ablations.main(shlex.split(f"{WORDS} --dry-run"))
    assert capsys.readouterr().out == "0 commands are left\n"


@pytest.mark.parametrize("words, error", [
    ("--rows 1 2", "--rows 1 2: wanted 1 to 6, 6 among them"), ("--rows 6 7", "wanted 1 to 6"),
    ("--seeds 0 0", "--seeds 0 0: wanted each once"),
    ("--stage1 --no-cls", "--stage1 '--no-cls': --cls is the table's"),  # one word
    ("--evaluate '--compare x'", "--compare is the table's"),
    ("--stage2 '--run other'", "two rows would be one run"),
    ("--data cc2017", "data/cc2017/raw/stimuli is not there.*--evaluate '--stimuli FOLDER'"),
])  # fmt: skip
def test_a_study_that_cannot_end_is_refused_before_any_training(words, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "prepare_toy", lambda **options: None)
    monkeypatch.setattr(ablations.subprocess, "Popen", None)
    with pytest.raises((SystemExit, OSError, ValueError)) as refused:
        ablations.main(shlex.split(words))
    assert re.search(error, capsys.readouterr().err + str(refused.value))
    assert not list(tmp_path.iterdir())

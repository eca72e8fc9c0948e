"""extras/ablations.py: the commands of each table, a study that goes on where it was, the numbers."""

import json
import os
import re
import shlex
import shutil
import signal
import threading
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from conftest import REPO, environment

from extras import ablation_tables, ablations
from metrics.intervals import Difference, pooled
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
    assert commands("--table 4 --rows 1 6 --seeds 3") == [TABLE_4[i] for i in (0, 7, 8, 13, 14)]
    for refused in ("--table 4 --rows 1 2", "--table 4 --stage1=--no-cls"):
        with pytest.raises(ValueError, match="wanted 1 to 6, 6 among them|--cls is the table's"):
            commands(refused)


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
told = []
signal.signal(signal.SIGTERM, lambda *of: told.append(1))
me = Path(sys.argv[1])
me.with_name("ready").write_text("")
signal.alarm(20)
while not told:
    time.sleep(0.01)
time.sleep(0.3)  # it saves
me.write_text(f"{len(told)} {os.getsid(0) == os.getpid()}")
"""


def test_after_ctrl_c_the_one_under_way_is_told_once_and_saves_and_no_more_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "REPO", tmp_path)
    (tmp_path / "train_stage1.py").write_text(PROGRAM)
    folders = [tmp_path / f"{name}-s0" / "stage1" for name in ("first", "later")]
    jobs = [ablations.Job("stage1", [str(folder.parent)[:-3]], folder, None) for folder in folders]

    def press_ctrl_c() -> None:
        while not (tmp_path / "ready").exists():
            sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c).start()
    with pytest.raises(KeyboardInterrupt):
        ablations.run(jobs, tmp_path / "logs")
    assert (tmp_path / "first").read_text() == "1 True"
    assert [*ablations.minutes_of(tmp_path / "logs")] == ["first-s0-stage1"]


GAINS = (0.3, 0.0, 0.2, 0.1, 0.1, 0.5)  # on odd clips
GAIN = dict(zip([word[6:] for word in TABLE_4[8:14]], GAINS, strict=True))
BASE = np.random.default_rng(0).uniform(0.2, 0.4, CLIPS)


def metrics_of(run: str, seed: int, shuffled: bool) -> dict:
    """Each clip's 50-way accuracy, and whether it was recognised, which tells the groups apart."""
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


def test_means_deviations_and_paired_intervals(tmp_path, monkeypatch, capsys):
    """± is over the seeds; `more` over the clips of the row and the row before, for the paper's model of others, too."""
    words = shlex.split("--table 4 --data cc2017 --seeds 0 1 --evaluate '--metrics video_50way,ms_flow'")
    monkeypatch.chdir(tmp_path)
    Path("data/cc2017/raw/stimuli").mkdir(parents=True)
    monkeypatch.setattr(ablations, "run", lambda jobs, *_: [write(job) for job in jobs])
    ablations.main(words)
    ablations.main([*words, "--dry-run"])
    os.utime("runs/cc2017/sub1/full-no-mom-s1/stage2/lora/x.safetensors", (1e10, 1e10))  # trained anew
    other = Path("runs/cc2017/sub1/full-s0/stage2/config.json")
    write_json(other, {"step": 7, "steps_in_all": 7, "K": 4})
    monkeypatch.setattr(ablations, "on_paper", lambda script, *_: 90.0)
    ablations.main([*words, "--dry-run"])
    printed = capsys.readouterr().out
    for text in (f"{BASE.mean() + 0.27:.3f}±0.028", "+0.200 [0.200, 0.200]", "0.824±0.01"):
        assert text in printed
    none, stage2, evaluation, total = printed.splitlines()[-4:]
    assert none == "0 commands are left" and total == "2 commands are left, 3 hours by extras/plan.py"
    assert "stage2.py" in stage2 and evaluation.startswith("  90.0 min  python evaluate.py --data cc2017")
    result = json.loads(Path("docs/results/table4-cc2017-sub1.json").read_text())
    *rows, played = result["rows"]
    assert [row["run"] for row in rows] == [*GAIN] and played["label"] == "best memory, played"
    for row, gain, previous in zip(rows, GAINS, (0, *GAINS[:-1]), strict=True):
        cells = [row["metrics"], row["groups"]["shown in training"], row["groups"]["never shown"]]
        values, share = [cell["video_50way"] for cell in cells], np.array([0.5, 0, 1])  # of clips that gain
        assert values[0]["mean"] == approx(BASE.mean() + gain / 2 + 0.02)
        assert [value["std"] for value in values] == approx([0.02 * 2**0.5] * 3)
        assert [cell["all_attributes"]["mean"] for cell in cells] == [0.5, 1, 0]
        if row is not rows[0]:
            more = share * (gain - previous)
            assert [value["more"] for value in values] == approx(more, abs=1e-9)
            np.testing.assert_allclose([value["ci95"] for value in values], np.c_[more, more], atol=1e-9)
    than = {label: (cell["more"], *cell["ci95"]) for label, cell in values[0]["than"].items()}
    assert than["no stage 2"] == approx((0.1,) * 3) and than["+ L_action"] == approx((0.2,) * 3)
    assert than["the best memory, played"] == approx((0.25,) * 3) and len(than) == 3
    assert played["metrics"]["video_50way"]["mean"] == approx(BASE.mean() + 0.02)
    assert result["shuffled"]["metrics"]["video_50way"]["mean"] == approx(0.07)
    assert result["shuffled"]["groups"]["never shown"]["all_attributes"]["mean"] == 1


def test_films_together():
    """Half lengths of 0.1 and 0.2 by t(7); of their mean by t(10.3): 7 * 0.05^2 / (0.01^2 + 0.04^2)."""
    together = pooled([Difference(0.2, [0.1, 0.3], 7.0), Difference(-0.1, [-0.3, 0.1], 7.0)])
    half = (0.1**2 + 0.2**2) ** 0.5 / 2 / 2.3646 * 2.2191
    assert (together.more, *together.ci95) == approx((0.05, 0.05 - half, 0.05 + half), abs=1e-4)


def test_the_page_is_what_the_results_make_and_sentences_have_their_intervals_from_it(tmp_path, monkeypatch):
    """0.369 [0.309, 0.430], or with the other sign; an interval that holds 0 is no sentence's claim."""
    monkeypatch.chdir(REPO)
    copy, page = tmp_path / "page.md", ablation_tables.PAGE.read_text("utf-8")
    start, end = (page.index(mark) for mark in ablation_tables.MARKS)
    copy.write_text(f"{page[:start]}{ablation_tables.MARKS[0]}\nold\n{page[end:]}", "utf-8")
    ablation_tables.write_page(copy)
    assert copy.read_text("utf-8") == page
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

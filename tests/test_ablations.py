"""extras/ablations.py: the commands of each table, a study that goes on where it was, the numbers."""

import contextlib
import io
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
from support.files import write_json
from support.options import settings_of

CLIPS = 120  # six blocks
ODD = np.arange(CLIPS) % 2  # never shown in training


def planned(words: str) -> ablations.Plan:
    config = ablations.parse_options(
        ablations.Config, dict.fromkeys(("toy", "cc2017", "cinebrain"), {}), "", "", shlex.split(words)
    )
    return ablations.plan(config, ablations.chosen_rows(config))


def commands(words: str) -> list[str]:
    """Without --data, --subject and --seed."""
    return [" ".join(job.options[6:]) for wave in planned(words).waves for job in wave]


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
    alone, _, full = planned("--table 6 --seeds 3 --stage2 '--K=3 --lr 1e-4 --attention_heads 4'").waves[1]
    assert " ".join(alone.options[8:]) == "--no-integration --lr 1e-4"  # which uses no other
    assert " ".join(full.options[8:]) == "--K=3 --lr 1e-4 --attention_heads 4"
    assert len(commands("--table 4")) == 45
    assert commands("--table 4 --rows 1 6 --seeds 3") == [TABLE_4[i] for i in (0, 7, 8, 13, 14)]


GAINS = (0.3, 0.0, 0.2, 0.1, 0.1, 0.5)  # on odd clips
GAIN = dict(zip([word[6:] for word in TABLE_4[8:14]], GAINS, strict=True))
STAGE1 = {"full-no-cls-no-action": 0.1, "full-no-action": 0.3, "full": 0.9}
BASE = np.random.default_rng(0).uniform(0.2, 0.4, CLIPS)


def metrics_of(run: str, seed: int, shuffled: bool) -> dict:
    """Each clip's 50-way accuracy and, of no use but to tell the groups apart, whether it was recognised."""
    values = np.full(CLIPS, 0.05) if shuffled else BASE + GAIN.get(run, 0) * ODD
    clips = [f"{i:04d}" for i in range(CLIPS)]
    rows = [{"clip": clip, "video_50way": v + 0.04 * seed, "all_attributes": float(odd == shuffled)}
            for clip, v, odd in zip(clips, values, ODD, strict=True)]  # fmt: skip
    groups = {"shown in training": {"clips": clips[::2]}, "never shown": {"clips": clips[1::2]}}
    mean = {"video_50way": {"mean": float(values.mean()) + 0.04 * seed}, "ms_flow": {"mean": None}}
    provenance = {"subject": 1, "run": run, "seed": seed, "size": "native"}
    result = {"metrics": mean, "groups": groups, "clips": rows, "provenance": provenance}
    return result if shuffled or "no-integration" in run else result | {"memory": {}}


def write(job: ablations.Job) -> None:
    """What the script is to write."""
    if job.is_evaluation:
        run = job.config.run + ("" if job.config.stage2 else " --no-stage2")
        write_json(job.folder / "metrics.json", metrics_of(run, job.config.seed, job.config.shuffle))
        return
    write_json(job.folder / "config.json", settings_of(job.config) | {"step": 7, "steps_in_all": 7})
    scores = {"action 50-way": STAGE1.get(job.config.run, 0) + 0.02 * job.config.seed, "image top-1": 0.3}
    write_json(job.folder / "test.json", {"fmri": scores, "shuffled": {"action 50-way": 0.02}})
    (job.folder / "losses.png").touch()
    (job.folder / "lora").mkdir()
    (job.folder / "lora" / "x.safetensors").touch()


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


@pytest.mark.parametrize("names", [("bad", "later"), ("good", "later")])
def test_the_one_under_way_is_told_once_and_saves(names, tmp_path, monkeypatch):
    """After Ctrl-C; then, and when one fails, no more begin."""
    monkeypatch.setattr(ablations, "REPO", tmp_path)
    (tmp_path / "train_stage1.py").write_text(PROGRAM)
    folders = [tmp_path / f"{name}-s0" / "stage1" for name in names]
    script = ablations.SCRIPTS["stage1"]
    jobs = [ablations.Job(script, [f"{folder.parent}"[:-3]], folder, None) for folder in folders]

    def press_ctrl_c() -> None:
        while not (tmp_path / "ready").exists():
            sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    if names[0] == "good":
        threading.Thread(target=press_ctrl_c).start()
    with pytest.raises((KeyboardInterrupt, ValueError)) as stopped:
        ablations.run(jobs, tmp_path / "logs")
    assert [file.name for file in (tmp_path / "logs").iterdir()] == [f"{names[0]}-s0-stage1.log"]
    if names[0] == "good":
        assert (tmp_path / "good").read_text() == "1 True"
    else:
        assert "bad ended with status 1: this went wrong" in str(stopped.value)


@pytest.fixture(scope="module")
def table_4(tmp_path_factory) -> tuple[dict, str]:
    """docs/results/*.json of a study of two seeds, and the table that is printed."""
    words = "--table 4 --data cc2017 --seeds 0 1 --evaluate '--metrics video_50way,ms_flow'"
    about = {"date": "2026-11-25", "commit": "23a6b329465a5914", "versions": {"torch": "2.14"}}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(tmp_path_factory.mktemp("study"))
        Path("data/cc2017/raw/stimuli").mkdir(parents=True)
        patch.setattr(ablations, "run", lambda jobs, *_: [write(job) for job in jobs])
        patch.setattr(ablations, "provenance", lambda folder: about)
        ablations.main(shlex.split(words))
        begun: list[ablations.Job] = []
        patch.setattr(ablations, "run", lambda jobs, *_: begun.extend(jobs))
        ablations.main(shlex.split(words))
        assert not begun, "a finished study begins anew"
        result = json.loads(Path("docs/results/table4-cc2017-sub1.json").read_text())
    return result, printed.getvalue()


def test_means_deviations_and_paired_intervals(table_4):
    """± is over the seeds; `more` is over the clips of the row and the row before, with its sign."""
    result, previous, approx = table_4[0], None, pytest.approx
    assert [row["run"] for row in result["rows"]] == [*GAIN]
    for row, gain, stage1 in zip(result["rows"], GAIN.values(), (0.9, 0.1, 0.3, 0.9, 0.9, 0.9), strict=True):
        cells = [row["metrics"], row["groups"]["shown in training"], row["groups"]["never shown"]]
        values, share = [cell["video_50way"] for cell in cells], np.array([0.5, 0, 1])  # of clips that gain
        assert values[0]["mean"] == approx(BASE.mean() + gain / 2 + 0.02)
        assert [value["std"] for value in values] == approx([0.02 * 2**0.5] * 3)
        assert [cell["all_attributes"]["mean"] for cell in cells] == [0.5, 1, 0]
        assert row["stage1"]["action 50-way"]["mean"] == approx(stage1 + 0.01)
        if previous is not None:
            more = share * (gain - previous)
            assert [value["more"] for value in values] == approx(more, abs=1e-9)
            np.testing.assert_allclose([value["ci95"] for value in values], np.c_[more, more], atol=1e-9)
        assert ("more" in values[0]) == (previous is not None)
        previous = gain
    shuffled = result["shuffled"]
    assert shuffled["metrics"]["video_50way"] == {"mean": approx(0.07), "std": approx(0.02 * 2**0.5)}
    assert shuffled["groups"]["never shown"]["all_attributes"]["mean"] == 1
    for text in (
        f"{BASE.mean() + 0.27:.3f}±0.028",
        "+0.200 [0.200, 0.200]",
        "0.824±0.01",
    ):  # the last is quoted
        assert text in table_4[1]


def test_the_page_keeps_the_words_around_its_tables(table_4, tmp_path):
    page, results, (begin, end) = tmp_path / "page.md", tmp_path / "results", ablation_tables.MARKS
    results.mkdir()
    result = json.loads(json.dumps(table_4[0] | {"minutes": {"a": 1.5, "b": None, "c": 2.0}}))
    (results / "table4-cc2017-sub1.json").write_text(json.dumps(result))
    page.write_text(f"# Words\n\n{begin}\nold\n{end}\n\nmore words\n")
    for _ in range(2):
        ablation_tables.write_page(page, results)
        text = page.read_text()
        assert text.startswith(f"# Words\n\n{begin}\n\n### What a part is worth on cc2017")
        assert text.endswith(f"\n\n{end}\n\nmore words\n")
    source = "2026-11-25, commit 23a6b32946, torch 2.14, 4 minutes."
    assert "\nold\n" not in text and "| all four, never shown |" in text and source in text
    result["rows"][0]["metrics"]["video_50way"] = {"mean": "0.5"}
    (results / "table4-cc2017-sub1.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="table4-cc2017-sub1.json: found .*makes it anew"):
        ablation_tables.write_page(page, results)
    assert page.read_text() == text


DAMAGE = [  # a path in a result, and what stands there
    ("rows", [1, 2]),
    ("rows 0 metrics video_50way mean", "0.5"),
    ("rows 0 metrics video_50way mean", float("nan")),
    ("rows 1 metrics video_50way ci95", [0.1]),
    ("rows 1 quoted", ["0.824"]),
    ("shuffled metrics video_50way std", "x"),
]


@pytest.mark.parametrize("path, value", DAMAGE)
def test_a_damaged_result_does_not_enter_the_page(table_4, tmp_path, path, value):
    result = json.loads(json.dumps(table_4[0]))
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split()]
    entry = result
    for key in parents:
        entry = entry[key]
    entry[last] = value
    (tmp_path / "table4.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="table4.json: found .*: python extras/ablations.py makes it anew"):
        ablation_tables.write_page(tmp_path / "page.md", tmp_path)
    assert not (tmp_path / "page.md").exists()


def test_the_page_is_what_the_results_make(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    page = shutil.copy(ablation_tables.PAGE, tmp_path)
    ablation_tables.write_page(Path(page))
    assert Path(page).read_bytes() == ablation_tables.PAGE.read_bytes()


STAGE1_WORDS = "--steps 4 --batch_size 8 --tokens 12 --width 24 --layers 1 --attention_heads 4"
STAGE2_WORDS = (
    "--decoder models/wan --frames 9 --height 32 --width 48 --epochs 1 --batch_size 16 --micro_batch 16 --K 3 "
    "--attention_heads 4 --sample_every 0 --sampling_steps 2 --guidance 1 --no-checkpointing --lora_rank 2"
)
EVALUATE_WORDS = "--clips 6 --batch_size 6 --fps 4.5 --metrics ssim,psnr --size native"


@pytest.mark.slow
def test_the_real_scripts_make_a_table(tiny_copy, capsys, monkeypatch):
    shutil.rmtree("runs")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    words = ["--table", "6", "--data", "cc2017", "--seeds", "0"]
    words += ["--stage1", STAGE1_WORDS, "--stage2", STAGE2_WORDS, "--evaluate", EVALUATE_WORDS]
    ablations.main(words)
    result = json.loads(Path("docs/results/table6-cc2017-sub1.json").read_text())
    runs = ["full-no-integration", "full-alpha0", "full", None]  # the last: the best memory, played
    assert [row.get("run") for row in result["rows"]] == runs
    assert len(result["minutes"]) == 8 and None not in result["minutes"].values()
    assert not Path("runs/cc2017/sub1/full-no-integration-s0/stage1").exists()  # it has that of `full`
    assert "shown in training, 6 clips" in capsys.readouterr().out
    ablations.main([*words, "--dry-run"])
    assert capsys.readouterr().out == "0 commands are left\n"


@pytest.mark.parametrize("words, error", [
    ("--table 3", "--table 3: wanted one of"), ("--rows 1 2", "--rows 1 2: wanted 1 to 6, 6 among them"), ("--rows 6 7", "wanted 1 to 6"),
    ("--seeds 0 0", "--seeds 0 0: wanted each once"),
    ("--stage1 '--seed 5'", "--stage1 '--seed 5': --seed is the table's to set"),
    ("--stage1 --no-cls", "--stage1 '--no-cls': --cls is the table's"),
    ("--stage2 '--run other'", "two rows would be one run"),
    ('--stage1 "--run \'x"', "--stage1 --run 'x: No closing quotation: close the quotation in it"),
    ("--stage2=--no-integration", "choose one"),
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


STAGE1_WORDS = "--steps 4 --batch_size 8 --tokens 12 --width 24 --layers 1 --attention_heads 4"
STAGE2_WORDS = (
    "--decoder models/wan --frames 9 --height 32 --width 48 --epochs 1 --batch_size 16 --micro_batch 16 --K 3 "
    "--attention_heads 4 --sample_every 0 --sampling_steps 2 --guidance 1 --no-checkpointing --lora_rank 2"
)
EVALUATE_WORDS = "--clips 6 --batch_size 6 --fps 4.5 --metrics ssim,psnr --size native"


def test_the_papers_model_is_measured_from_the_strongest_of_the_others(tmp_path):
    """From the best memory, played, and from each row that the paper does not have."""
    rows = [ablations.Row("no stage 2"), ablations.Row("+ L_action", quoted="1 2 3 4 5"), ablations.FULL]
    paths = {}
    for run, gain in (("no stage 2", 0.1), ("+ L_action", 0.2), ("", 0.5)):
        result = metrics_of(run or "full", 0, False)
        memory = {key: json.loads(json.dumps(result[key])) for key in ("metrics", "groups", "clips")}
        for row, played, odd in zip(result["clips"], memory["clips"], ODD, strict=True):
            row["video_50way"], played["video_50way"] = 0.2 + gain * odd, 0.3
        paths[run] = [tmp_path / (run or "full") / "metrics.json"]
        paths[run][0].parent.mkdir()
        paths[run][0].write_text(json.dumps(result | {"memory": memory}))
    stage1 = tmp_path / "test.json"
    stage1.write_text(json.dumps({"fmri": {}, "shuffled": {}}))
    files = ablation_tables.Files(dict.fromkeys(paths, [stage1]), paths, paths[""])
    result = ablation_tables.result_of(rows, files, ["video_50way"])
    approx = pytest.approx
    assert [row["label"] for row in result["rows"]] == ["no stage 2", "+ L_action", "", "best memory, played"]
    cell = result["rows"][2]["metrics"]["video_50way"]
    assert cell["more"] == approx(0.15) and {*cell["than"]} == {"no stage 2", "the best memory, played"}
    assert cell["than"]["no stage 2"] == {"more": approx(0.2), "ci95": approx([0.2, 0.2]), "freedom": 5}


def test_the_page_says_what_a_part_is_worth_on_each_film_and_together(table_4, tmp_path):
    result, page = json.loads(json.dumps(table_4[0])), tmp_path / "page.md"
    row = result["rows"][3]
    cell = row["metrics"]["video_50way"]
    cell |= {"more": 0.2, "ci95": [0.1, 0.3], "freedom": 7.0}
    (tmp_path / "table4-a.json").write_text(json.dumps(result))
    cell |= {"mean": cell["mean"] + 0.1, "more": -0.1, "ci95": [-0.3, 0.1]}
    (tmp_path / "table4-b.json").write_text(json.dumps(result | {"subject": 2}))
    ablation_tables.write_page(page, tmp_path)
    worth, _, second = page.read_text().split("### ")[1:]
    # by hand: half lengths of 0.1 and 0.2 by t(7); of their sum by t(10.3): 7 * 0.05^2 / (0.01^2 + 0.04^2)
    half = (0.1**2 + 0.2**2) ** 0.5 / 2 / 2.3646 * 2.2191
    less = f"{row['label']} less {result['rows'][2]['label']}".replace("+ ", "")
    assert f"| {less} | +0.200 / -0.100 | +0.050 [{0.05 - half:.3f}, {0.05 + half:.3f}] |" in worth
    assert "subject 1 / 2" in worth and f"| {cell['mean']:.3f}±" in second


@pytest.mark.parametrize("name", ["README.md", "docs/ablations.md"])
def test_a_sentence_with_an_interval_has_it_from_the_tables(name):
    """0.369 [0.309, 0.430], or with the other sign; an interval that holds 0 is no sentence's claim."""
    page = ablation_tables.PAGE.read_text(encoding="utf-8")
    start, end = (page.index(mark) for mark in ablation_tables.MARKS)
    number = r"[+-]?\d\.\d{3}"
    known = set()
    for more, low, high in re.findall(rf"({number}) \[({number}), ({number})\]", page[start:end]):
        more, low, high = float(more), float(low), float(high)
        known |= {(more, low, high), (-more, -high, -low)}
    text = (REPO / name).read_text(encoding="utf-8").replace(page[start:end], "")
    for words in re.findall(rf"({number}) \[({number}), ({number})\]", text):
        assert tuple(map(float, words)) in known, words

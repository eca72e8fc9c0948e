"""A dataset of one's own: the example from end to end, and what does not fit named by the run's file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from tiny import wan_pipeline
from watch import watch

import train_stage1
from data import Clips
from extras import check, delay
from extras.own_dataset import MyRelease, write_miniature
from prepare import command
from prepare.fmri import prepare_fmri
from support.options import parse

ENCODERS = ["--clip", f"local-dir:{REPO / 'toy' / 'clip'}", "--viclip", str(REPO / "toy" / "viclip")]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    raw = tmp_path_factory.mktemp("mine") / "raw"
    write_miniature(raw)
    return raw


@pytest.mark.filterwarnings("ignore:.*may be in another order")  # the toy's CLIP never saw such films
def test_the_example_from_its_files_to_a_step_of_stage_1(raw, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wan_pipeline().save_pretrained("wan")
    size = ["--frames", "9", "--height", "32", "--width", "48"]
    with pytest.raises(ValueError, match="wan: a video of 9 frames, 32x40, does not fit"):  # before any work
        command.main(["mine", "--raw", str(raw), *ENCODERS, "--decoder", "wan", *size[:-1], "40"])
    assert not Path("data").exists()
    command.main(["mine", "--raw", str(raw), *ENCODERS, "--decoder", "wan", *size])
    assert np.load("data/mine/sub1/train/fmri.npy").shape[:3] == (90, 2, 3)
    assert np.load("data/mine/stimuli/test/wan/latents-9x32x48.npy", mmap_mode="r").shape == (30, 4, 3, 4, 6)
    assert len(Clips("mine", 1, "test", decoder="wan", size=(9, 32, 48))) == 30
    anew = "latents-17x.*.npy, for wan, is not there: run python data.py mine .*--decoder wan"
    with pytest.raises(FileNotFoundError, match=f"{anew}$"):  # the size of its row needs no option
        Clips("mine", 1, "test", decoder="wan")
    assert check.main(["--data", "mine"]) == 0
    delay.main(parse(delay.Config, {"mine": {}}, "", "delay.py", ["--data", "mine"]))
    assert json.loads(Path("data/mine/sub1/delay.json").read_text())["best"] == 0
    small = "--data mine --tokens 12 --width 24 --layers 2 --attention_heads 4 --batch_size 8 --rank 2"
    assert len(watch(train_stage1, small.split(), stop=2).batches) == 2


BAD_RUNS = [  # file, its change, what the error says
    ("seg3_2", lambda run: run[:, :-2], r"found float32 of shape \(50, 498\), wanted .*: 50 .*, 500 voxels"),
    ("seg2_1", lambda run: run[:49], r"shape \(49, 500\), wanted .*: 50 volumes or more"),
    ("test1_2", lambda run: run * np.nan, "voxels kept are constant or not finite in showing 2 of test1"),
]


def test_a_run_that_does_not_fit_is_named_and_never_to_be_deleted(raw, tmp_path):
    copy = shutil.copytree(raw, tmp_path / "raw")
    release = MyRelease(copy, 1, None, 6, 2)
    assert release.delay == 5 and release.window("seg1") == (5, 45)
    assert MyRelease(copy, 1, None, 2, 1).segments == ["seg1", "seg2", "test1"]
    for name, change, problem in BAD_RUNS:
        file = copy / "sub1" / f"{name}.npy"
        run = np.load(file)
        np.save(file, change(run))
        with pytest.raises(ValueError, match=rf"{name}.npy: .*{problem}.*move it away") as error:
            prepare_fmri(release, tmp_path / "out", {}, window=3)
        assert "delete" not in str(error.value)
        np.save(file, run)
    release.voxels = np.arange(500), np.arange(500)
    with pytest.raises(ValueError, match="voxels of MyRelease: found int64 .*, wanted text"):
        prepare_fmri(release, tmp_path / "out", {})

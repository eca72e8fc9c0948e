"""A dataset of one's own: the example from end to end, and what does not fit named by the run's file."""

import json
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

BAD_RUNS = [  # file, its change, what the error says
    ("seg3_2", lambda run: run[:, :-2], r"found float32 of shape \(50, 498\), wanted .*: 50 .*, 500 voxels"),
    ("seg2_1", lambda run: run[:49], r"shape \(49, 500\), wanted .*: 50 volumes or more"),
    ("test1_2", lambda run: run * np.nan, "voxels kept are constant or not finite in showing 2 of test1"),
]


@pytest.mark.filterwarnings("ignore:.*may be in another order")  # the toy's CLIP never saw such films
def test_the_example_from_its_files_to_a_step_of_stage_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_miniature(Path("raw"))
    wan_pipeline().save_pretrained("wan")
    words = ["mine", "--raw", "raw", "--clip", f"local-dir:{REPO}/toy/clip", "--viclip", f"{REPO}/toy/viclip"]
    words += ["--decoder", "wan", "--frames", "9", "--height", "32", "--width"]
    with pytest.raises(ValueError, match="wan: a video of 9 frames, 32x40, does not fit"):  # before any work
        command.main([*words, "40"])
    assert not Path("data").exists()
    command.main([*words, "48"])
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

    release = MyRelease(Path("raw"), 1, None, 6, 2)
    for name, change, problem in BAD_RUNS:
        file = Path(f"raw/sub1/{name}.npy")
        run = np.load(file)
        np.save(file, change(run))
        with pytest.raises(ValueError, match=rf"{name}.npy: .*{problem}.*move it away"):
            prepare_fmri(release, tmp_path / "out", {}, window=3)
        np.save(file, run)
    release.voxels = np.arange(500), np.arange(500)
    with pytest.raises(ValueError, match="voxels of MyRelease: found int64 .*, wanted text"):
        prepare_fmri(release, tmp_path / "out", {})

"""A dataset of one's own: the example from end to end, and what does not fit named by the run's file."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from tiny import wan_pipeline
from watch import watch

import train_stage1
from extras import check, delay
from extras.own_dataset import write_miniature
from prepare import command
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
    command.main(["mine", "--raw", str(raw), *ENCODERS, "--decoder", "wan"])
    assert np.load("data/mine/sub1/train/fmri.npy").shape[:3] == (90, 2, 3)
    assert np.load("data/mine/stimuli/test/wan/latents.npy", mmap_mode="r").shape[0] == 30
    assert check.main(["--data", "mine"]) == 0
    delay.main(parse(delay.Config, {"mine": {}}, "", "delay.py", ["--data", "mine"]))
    assert json.loads(Path("data/mine/sub1/delay.json").read_text())["best"] == 0
    small = "--data mine --tokens 12 --width 24 --layers 2 --attention_heads 4 --batch_size 8 --rank 2"
    assert len(watch(train_stage1, small.split(), stop=2).batches) == 2
    assert train_stage1.parse(["--data", "mine"]).steps == 8000

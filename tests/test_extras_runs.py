"""extras/runs.py: the settings of a run, the names of runs, and which clips a picture shows."""

import json
from pathlib import Path

import pytest

from extras import runs


def test_a_run_is_read_by_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Clips", lambda *arguments: arguments)
    settings = {"data": "cc2017", "subject": 3, "frames": 9, "height": 32, "width": 48, "rois": "mpfc"}
    settings["stage1_config"] = {"rois": "hippocampus"}
    (tmp_path / "stage2").mkdir()
    (tmp_path / "stage2" / "config.json").write_text(json.dumps(settings))
    assert runs.Run(tmp_path, "stage2").test_clips() == ("cc2017", 3, "test", "hippocampus")
    folders = ["a/sub1/full-s0", "a/sub2/full-s0", "a/sub1/no-mom-s0", "a/sub1/no-mom-s0/eval-shuffled"]
    names = ["sub1/full-s0", "sub2/full-s0", "no-mom-s0", "no-mom-s0/eval-shuffled"]
    assert runs.names_of([Path(folder) for folder in folders]) == names


def test_clips_are_chosen_of_those_reconstructed_half_of_each_group(tmp_path):
    (tmp_path / "eval" / "recon").mkdir(parents=True)
    for name in ("0001", "0002", "0004", "0005", "0007", "0011", "sheet"):
        (tmp_path / "eval" / "recon" / f"{name}.mp4").touch()
    middles = dict.fromkeys((2, 5, 11), "")  # of 1 2, 4 5, 7 11
    assert runs.choose_clips(tmp_path, None, 3) == middles
    seen, new = "shown in training", "never shown"
    groups = {seen: ["0001", "0002", "0007", "mean"], new: ["0004", "0005", "0011"]}
    rows = [{"clip": clip} for clips in groups.values() for clip in clips]
    metrics = {"metrics": {}, "clips": rows, "provenance": {"size": "native"}}
    metrics["groups"] = {name: {"clips": clips} for name, clips in groups.items()}
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps(metrics))
    assert list(runs.choose_clips(tmp_path, None, 2).items()) == [(2, seen), (5, new)]
    assert runs.choose_clips(tmp_path, [11, 1], 9) == {11: new, 1: seen}
    with pytest.raises(ValueError, match="--clips 3, 6: 6 clips of 1 to 11 were reconstructed in .*/eval"):
        runs.choose_clips(tmp_path, [6, 1, 3], 9)

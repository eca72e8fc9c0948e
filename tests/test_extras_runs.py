"""extras/runs.py: the settings of a run, its videos by name and number, and which clips a picture shows."""

import json
from pathlib import Path

import numpy as np
import pytest

from extras import runs
from support.readers import FileFault
from support.videos import write_video

STAGE2 = {"data": "cc2017", "subject": 3, "frames": 9, "height": 32, "width": 48, "rois": "mpfc"}


def write_config(folder: Path, stage: str, **settings) -> None:
    (folder / stage).mkdir(parents=True, exist_ok=True)
    (folder / stage / "config.json").write_text(json.dumps(settings))


def test_a_run_is_read_by_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Clips", lambda *arguments: arguments)
    write_config(tmp_path, "stage1", data="toy", subject=2, rois="visual")
    write_config(tmp_path, "stage2", **STAGE2, stage1_config={"rois": "hippocampus"})
    first, second = runs.Run(tmp_path, "stage1"), runs.Run(tmp_path, "stage2")
    assert first.test_clips() == ("toy", 2, "test", "visual") and first.stage == tmp_path / "stage1"
    assert second.test_clips() == ("cc2017", 3, "test", "hippocampus") and second.folder == tmp_path
    mnist = {**STAGE2, "stage1_config": {}, "data": "mnist"}
    for settings, problem in ((mnist, "'mnist', wanted one of toy"), (STAGE2, "no stage1_config")):
        write_config(tmp_path, "stage2", **settings)
        with pytest.raises(FileFault, match=problem):
            runs.Run(tmp_path, "stage2")
    with pytest.raises(FileNotFoundError, match="is not there: RUN is .* after python train_stage1.py"):
        runs.Run(tmp_path / "nowhere", "stage1")
    folders = [
        Path("a/sub1/full-s0"),
        Path("a/sub2/full-s0"),
        Path("a/sub1/no-mom-s0"),
        Path("a/sub1/no-mom-s0/eval-shuffled"),
    ]
    assert runs.names_of(folders) == ["sub1/full-s0", "sub2/full-s0", "no-mom-s0", "no-mom-s0/eval-shuffled"]
    assert runs.caption_of({"caption": "a dog"}, "never shown") == "a dog [never shown]"
    assert runs.caption_of({"caption": "a dog"}, "") == "a dog"


def test_clips_are_chosen_of_those_reconstructed_half_of_each_group(tmp_path):
    with pytest.raises(FileNotFoundError, match="eval/recon holds no video: python evaluate.py comes first"):
        runs.choose_clips(tmp_path, None, 4)
    for kind, first in (("gt", 0), ("recon", 100)):
        for clip in (1, 2, 4, 5, 7, 11):
            frames = np.full((4, 16, 16, 3), first + 10 * clip, np.uint8)
            write_video(tmp_path / "eval" / kind / f"{clip:04d}.mp4", frames, 2)
    (tmp_path / "eval" / "recon" / "sheet.mp4").touch()
    middles = dict.fromkeys((2, 5, 11), "")  # of 1 2, 4 5, 7 11
    assert runs.choose_clips(tmp_path, None, 3) == middles
    seen, new = "shown in training", "never shown"
    groups = {seen: ["0001", "0002", "0007", "mean"], new: ["0004", "0005", "0011"]}
    metrics = {"metrics": {}, "clips": [], "provenance": {"size": "native"}}
    metrics["groups"] = {name: {"clips": clips} for name, clips in groups.items()}
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps(metrics))
    assert runs.groups_of(tmp_path) == {seen: {1, 2, 7}, new: {4, 5, 11}}
    assert list(runs.choose_clips(tmp_path, None, 2).items()) == [(2, seen), (5, new)]
    assert runs.choose_clips(tmp_path, [11, 1], 9) == {11: new, 1: seen}
    with pytest.raises(ValueError, match="--clips 3, 6: 6 clips of 1 to 11 were reconstructed in .*/eval"):
        runs.choose_clips(tmp_path, [6, 1, 3], 9)
    stimulus, reconstruction = (runs.frames_of(tmp_path, kind, 7).mean() for kind in ("gt", "recon"))
    assert abs(stimulus - 70) < 2 and abs(reconstruction - 170) < 2
    with pytest.raises(FileNotFoundError, match="recon/0003.mp4 is not there: evaluate the same clips"):
        runs.frames_of(tmp_path, "recon", 3)

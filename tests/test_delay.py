"""extras/delay.py: a delay that was planted is the one that it names."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import write_prepared

from extras import delay
from prepare.copies import prepare_recorded
from support.options import parse


def run(*words: object) -> dict:
    delay.main(parse(delay.Config, {"cc2017": {}}, "", "delay.py", ["--data", "cc2017", *map(str, words)]))
    return json.loads(Path("data/cc2017/sub1/delay.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Four segments of 40 clips, the second showing of the last not recorded; of 40 voxels the last 8 are noise."""
    monkeypatch.chdir(tmp_path)
    folder = write_prepared(tmp_path / "data", clips=(160, 24), segments=(4, 2), T=2)
    file = folder / "sub1" / "train" / "fmri.npy"
    fmri = np.load(file)
    fmri[..., 32:] = np.random.default_rng(1).normal(size=(*fmri.shape[:3], 8))
    fmri[-40:, -1] = np.nan
    np.save(file, fmri)
    return folder


@pytest.mark.parametrize("planted", [-2, 1])
def test_the_planted_delay_is_named(planted, folder, capsys):
    file = folder / "sub1" / "train" / "fmri.npy"
    fmri = np.load(file)
    for start in range(0, 160, 40):  # within each segment: the response comes `planted` clips later
        fmri[start : start + 40] = np.roll(fmri[start : start + 40], planted, 0)
    np.save(file, fmri)
    result = run("--best", 20, "--most", 3)
    assert (result["best"], result["voxels"], result["shifts"]) == (planted, 20, [*range(-4, 4)])
    curve = dict(zip(result["shifts"], result["mean_r"], strict=True))
    assert curve.pop(planted) > 0.8 and max(curve.values()) < 0.5
    assert f"a delay that is {planted:+d} clips longer" in capsys.readouterr().out
    assert (folder / "sub1" / "delay.png").stat().st_size > 5000


def test_what_no_shift_fits_is_not_decided(folder, capsys):
    """The last shift that is tried, beyond which the right one may lie; and noise."""
    assert run("--most", 0)["best"] is None
    assert "Not decided: the best shift is the last one tried" in capsys.readouterr().out
    file = folder / "sub1" / "train" / "fmri.npy"
    np.save(file, np.random.default_rng(3).normal(size=np.load(file).shape).astype("f"))
    prepare_recorded(folder / "sub1")
    assert run()["best"] is None
    assert "Not decided: no shift stands out" in capsys.readouterr().out

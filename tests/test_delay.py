"""extras/delay.py: a delay that was planted is the one that it names."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge
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


def test_the_correlation_is_that_of_a_regression_without_the_segment():
    rng = np.random.default_rng(0)
    x, segments = rng.normal(size=(24, 5)), np.repeat(["b", "a", "c"], 8)
    y = x @ rng.normal(size=(5, 3)) + rng.normal(size=(24, 3))
    early, late = np.r_[0:6, 8:14, 16:22], np.r_[2:8, 10:16, 18:24]
    of_segment = np.repeat([0, 1, 2], 6)
    for shift, features, truth in ((2, x[early], y[late]), (-2, x[late], y[early])):
        penalty, guess = 30 * np.mean((features**2).sum(0)) / 100, np.empty((18, 3))
        for k in range(3):
            model = Ridge(penalty, fit_intercept=False).fit(features[of_segment != k], truth[of_segment != k])
            guess[of_segment == k] = model.predict(features[of_segment == k])
        expected = [np.corrcoef(guess[:, v], truth[:, v])[0, 1] for v in range(3)]
        parts = delay.correlations(x, y, segments, shift, 30.0)  # (10, 3)
        np.testing.assert_allclose(parts.mean(0), expected, atol=1e-10)


@pytest.mark.parametrize(("file", "change", "words"), [
    ("sub1/train/fmri.npy", lambda x: np.random.default_rng(3).normal(size=x.shape).astype("f"), ()),
    ("stimuli/train/e_img.npy", lambda e: np.repeat(e[:1], len(e), 0), ()),
    ("sub1/train/fmri.npy", lambda x: x, ("--most", 0)),  # it may lie beyond
])  # fmt: skip
def test_what_no_shift_fits_is_not_decided(file, change, words, folder, capsys):
    np.save(folder / file, change(np.load(folder / file)))
    prepare_recorded(folder / "sub1")
    assert run(*words)["best"] is None
    page = capsys.readouterr().out
    assert "Not decided: " in page and "Prepare again" not in page
    assert ("widen --least, --most" in page) == bool(words)

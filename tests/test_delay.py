"""extras/delay.py: a delay that was planted is the one that it names."""

import json

import numpy as np
import pytest
from conftest import run_script
from tiny import write_prepared


@pytest.mark.parametrize("planted", [-2, 0, 1])
def test_the_planted_delay_is_named(planted: int, tmp_path):
    folder = write_prepared(tmp_path / "data", clips=(160, 24), segments=(4, 2))
    file = folder / "sub1" / "train" / "fmri.npy"
    fmri = np.load(file)
    for start in range(0, 160, 40):  # within each segment: the response comes `planted` clips later
        fmri[start : start + 40] = np.roll(fmri[start : start + 40], planted, 0)
    fmri[-40:, -1] = np.nan  # a showing that was not recorded
    np.save(file, fmri)
    done = run_script("extras/delay.py", "--data", "cc2017", "--best", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "sub1" / "delay.json").read_text())
    assert found["best"] == planted
    curve = dict(zip(found["shifts"], found["mean_r"], strict=True))
    assert curve[planted] > 0.8 and max(v for s, v in curve.items() if s != planted) < 0.5
    said = "0 is what was prepared" if planted == 0 else f"{planted:+d} clips longer"
    assert said in done.stdout


def test_options_that_cannot_be_are_refused(tmp_path):
    write_prepared(tmp_path / "data")
    for words, named in (
        (("--least", 3, "--most", 1), "--least"),
        (("--ridge", 0), "--ridge"),
        (("--most", 18), "shift"),
    ):
        done = run_script("extras/delay.py", "--data", "cc2017", *words, cwd=tmp_path)
        assert (
            done.returncode in (1, 2)
            and named in done.stderr
            and len(done.stderr.strip().splitlines()[-1:]) == 1
        )

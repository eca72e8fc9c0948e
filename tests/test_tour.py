"""toy/trained/ and docs/tour.ipynb, which runs on it: without training, without data/, from any folder."""

import json
import re

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from conftest import REPO

from evaluate import main
from metrics.options import parse
from support.videos import read_video

CELLS = json.loads((REPO / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
CAPTION = "a red triangle shrinks in the sea"  # of the best memory, as toy/trained/README.md says
RUN = ["--run", "toy/trained"]


def test_it_shows_clip_brain_memories_and_reconstruction(monkeypatch, capsys):
    nbformat.validate(nbformat.read(REPO / "docs" / "tour.ipynb", as_version=4))
    assert len(CELLS) <= 12 and not any(cell.get("outputs") for cell in CELLS)
    monkeypatch.chdir(REPO / "docs")
    plt.switch_backend("Agg")
    printed, names = [], {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            printed.append(capsys.readouterr().out)
    assert len(plt.get_fignums()) == 6
    plt.close("all")
    W_r, *memories = printed[3].strip().split("\n")
    assert sum(float(w) for w in re.findall(r"\d\.\d+", W_r)) == pytest.approx(1, abs=2e-3)
    scores = [float(line.split()[2]) for line in memories]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True) and memories[0].endswith(CAPTION)
    assert names["video"].shape == (17, 64, 64, 3) and names["video"].std() > 10


def test_the_run_that_comes_along_is_evaluated_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*RUN, "--device", "cpu", "--fmri", "toy/trained/x.npy", "--steps", "2"]
    assert np.load(REPO / "toy" / "trained" / "x.npy").shape == (1, 1300)
    assert main(parse(options, "")) == 0
    assert capsys.readouterr().out == f"written: out.mp4; it recalls: {CAPTION}\n"
    assert read_video(tmp_path / "out.mp4").frames.shape == (17, 64, 64, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
    with pytest.raises(ValueError, match="--run toy/trained: wanted"):
        main(parse([*RUN, "--no-stage2", "--device", "cpu"], ""))

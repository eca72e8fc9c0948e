"""docs/tour.ipynb runs from the first cell to the last, in this process, on the tiny world's run."""

import json
import re

import matplotlib.pyplot as plt
import pytest
from conftest import REPO

CELLS = json.loads((REPO / "docs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]


def test_it_shows_clip_brain_memories_and_reconstruction(tiny, monkeypatch, capsys):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(REPO / "docs" / "tour.ipynb", as_version=4))
    assert len(CELLS) == 10 and not any(cell.get("outputs") for cell in CELLS)
    monkeypatch.chdir(tiny)
    plt.switch_backend("Agg")
    printed, names, run = [], {}, 'RUN = "runs/toy/sub1/full-s0"'
    code = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    assert code[0].count(run) == 1
    for source in code:
        exec(source.replace(run, 'RUN = "runs/cc2017/sub1/full-s0"'), names)
        printed.append(capsys.readouterr().out)
    assert len(plt.get_fignums()) == 4
    plt.close("all")
    clip = json.loads((tiny / "data/cc2017/stimuli/test/clips.jsonl").read_text().splitlines()[3])
    assert printed[0] == f"test1-003 | {clip['caption']}\n"
    weights, *memories = printed[3].strip().split("\n")
    assert sum(float(w) for w in re.findall(r"\d\.\d+", weights)) == pytest.approx(1, abs=2e-3)
    scores = [float(line.split()[2]) for line in memories]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert "f_fuse (1, 12, 16)" in printed[5] and names["video"].shape == (9, 32, 48, 3)

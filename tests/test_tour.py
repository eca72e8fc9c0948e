"""docs/tour.ipynb runs from the first cell to the last, on the tiny run of the evaluation's tests."""

import re

import nbformat
import pytest
from conftest import REPO, environment
from nbclient import NotebookClient
from test_evaluate import RUN, in_world, world  # noqa: F401  fixtures

TOUR = REPO / "docs" / "tour.ipynb"


@pytest.fixture(scope="module")
def cells(world) -> list:  # noqa: F811
    tour = nbformat.read(TOUR, as_version=4)
    first = tour.cells[1]
    assert first.source.count('RUN = "runs/toy/sub1/full-s0"') == 1
    first.source = first.source.replace("runs/toy/sub1/full-s0", str(RUN))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.delenv("MPLBACKEND")  # the kernel's own
        client = NotebookClient(tour, timeout=300, kernel_name="python3")
        client.execute(cwd=str(world))
    return tour.cells


def text_of(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def test_ten_cells_without_outputs():
    tour = nbformat.read(TOUR, as_version=4)
    nbformat.validate(tour)
    assert len(tour.cells) == 10
    for cell in tour.cells:
        assert cell.cell_type == "markdown" or not cell.outputs and cell.execution_count is None


def test_it_shows_clip_brain_memories_and_reconstruction(cells):
    pictures = [
        cell
        for cell in cells
        if cell.cell_type == "code" and any("image/png" in o.get("data", {}) for o in cell.outputs)
    ]
    assert len(pictures) == 4
    assert re.search(r"test1-003 \| a (red|blue) (circle|square) moves", text_of(cells[1]))
    weights, *memories = text_of(cells[5]).strip().split("\n")
    assert sum(float(w) for w in re.findall(r"\d\.\d+", weights)) == pytest.approx(1, abs=2e-3)
    scores = [float(line.split()[2]) for line in memories]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert "f_fuse (1, 12, 16)" in text_of(cells[8])

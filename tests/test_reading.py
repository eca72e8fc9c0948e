"""extras/page: the page is that of today's code, its shapes are those of a real run, its links lead somewhere."""

import html
import re
import sys
from itertools import islice
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import REPO

from extras import reading
from extras.page import draw, prose, shapes
from prepare.fmri import select_voxels
from toy import subject, world
from toy.release import ToyRelease, write_release

PATHS = [REPO / f"{module}.py" for module in draw.FILES]


@pytest.fixture(scope="module")
def page() -> str:
    return draw.build()


def test_the_page_in_docs_is_that_of_this_code(page):
    assert reading.PAGE.read_text(encoding="utf-8") == page, "python extras/reading.py writes it anew"


def test_check_tells_a_stale_page(page, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "build", lambda: page)
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    monkeypatch.setattr(reading, "PAGE", tmp_path / "reading.html")
    assert reading.main(["--check"]) == 1 and "stale: python extras/reading.py" in capsys.readouterr().out
    assert reading.main([]) == 0 and reading.main(["--check"]) == 0
    reading.PAGE.write_text(page + "\n")
    assert reading.main(["--check"]) == 1


def test_links_lead_to_lines_and_back(page):
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    links = re.findall(r'href="#([^"]+)"', page)
    assert set(links) <= set(ids)
    assert not re.findall(r'(?:src|href)="(?!#)', page) and "<script" not in page  # one file, no JavaScript
    for number in range(1, 11):
        assert f'id="eq-{number}"' in page
        (place,) = set(re.findall(rf'<td><a href="#eq-{number}">.*<td><a href="#([\w-]+)">', page))
        module, row = place.rsplit("-", 1)
        line = (REPO / f"{module}.py").read_text().splitlines()[int(row) - 1]
        assert re.search(rf"# .*Eq\. {number}\b", line)
        assert f'href="#eq-{number}"' in re.search(rf'id="{place}".*', page)[0]


def test_the_pieces_of_a_file_are_there_in_order_line_by_line(page):
    for module in draw.FILES:
        source = draw.read(module)
        rows = re.findall(rf'<span class="l" id="{module}-(\d+)" [^>]*><a [^>]*>\d+</a>(.*)\n', page)
        lines = {int(row): html.unescape(re.sub(r"<[^>]+>", "", code)) for row, code in rows}
        assert [*lines] == [row for piece in source.on_page for row in piece.lines] == sorted(lines)
        for row, line in lines.items():
            assert line == source.lines[row - 1]
    for name in ("Clips.batch", "CineNeuron.reconstruct", "train_step", "Integration", "BrainModel.forward"):
        assert f'<div class="at">{name}</div>' in page
    assert "class Config" not in page and "def _read_clips" not in page
    assert 'class="skipped">⋯ Config, parse<' in page


def test_a_docstring_becomes_html():
    text = r"""Eq. 5: $S_i = \sum_{m}
w_m$ of *all* clips, like Eq. 2 -> `S`, $\hat{f}^e$.

    f_e --> S   Eq. 4"""
    out = prose.prose(text, {5: "lines"})
    assert '<div class="eq" id="eq-5"><h3>Eq. 5 <span class="at">lines</span></h3>' in out
    assert '<p>of <em>all</em> clips, like <a href="#eq-2">Eq. 2</a> → <code>S</code>, <math>' in out
    assert '<pre>    f_e --&gt; S   <a href="#eq-4">Eq. 4</a></pre>' in out
    assert "<mtext>info</mtext>" in prose.mathml(r"L_{info} + \alpha")
    assert len(re.findall("<math>", prose.breakable(r"f = g(a + b) + c, \quad z_t = 1"))) == 5


def test_each_formula_of_the_docstrings_is_well_formed(page):
    formulas = re.findall(r"<math>.*?</math>", page)
    assert len(formulas) > 40
    for formula in formulas:
        ElementTree.fromstring(formula)
        assert "\\" not in formula, "LaTeX that latex2mathml cannot read"


def test_an_equation_without_a_line_and_a_line_without_an_equation_are_refused():
    source = draw.read("heads")
    (piece,) = [piece for piece in source.pieces if piece.name == "info_nce"]
    piece.lines.pop()
    with pytest.raises(ValueError, match="heads.info_nce: its docstring says Eq. 2, and no line # Eq. 2"):
        draw.equations([source])
    piece.docstring = ""
    source.lines[piece.lines[-1] - 1] += "  # Eq. 2"
    with pytest.raises(ValueError, match="no docstring says Eq. 2"):
        draw.equations([source])


def test_a_piece_that_a_file_lacks_is_refused(monkeypatch):
    monkeypatch.setitem(draw.FILES, "heads", "info_nce gone")
    with pytest.raises(ValueError, match="heads.py: found no gone: correct FILES"):
        draw.read("heads")


# ---------------------------------------------------------------- the tracer

TRACED = '''
import torch

def double(x):
    """Twice."""
    B, T = x.shape
    y = (
        x
        + x
    )
    for part in y.split(1):
        z = part.sum()
    return y, z
'''


def test_the_tracer_sees_what_lines_assign(tmp_path, monkeypatch):
    file = tmp_path / "traced.py"
    file.write_text(TRACED)
    monkeypatch.syspath_prepend(str(tmp_path))
    import traced

    def debugger(*event):
        return None

    tracer, outer = shapes.Tracer([file]), sys.gettrace()
    sys.settrace(debugger)
    with tracer.tracing():
        traced.double(torch.zeros(2, 3))
        traced.double(torch.zeros(5, 5))  # the first call alone counts
    restored = sys.gettrace()
    sys.settrace(outer)
    assert restored is debugger
    assert tracer.shapes == {
        ("traced", 4): {"x": "(2, 3)"},
        ("traced", 6): {"B": "2", "T": "3"},
        ("traced", 10): {"y": "(2, 3)"},
        ("traced", 11): {"part": "(1, 3)"},
        ("traced", 12): {"z": "scalar"},
        ("traced", 13): {"returns": "(2, 3) scalar"},
    }


def test_meta_shapes_are_those_of_numbers():
    """The Brain Model of the toy, with numbers, against what the page says."""
    seen, rows = shapes.traced("toy", PATHS)
    sizes = {symbol: size for symbol, _, size in rows}
    from brain_model import BrainModel

    B, N = int(sizes["B"].split(",")[0]), shapes.TOY_SIZES["voxels"]
    L, width, D, r = (int(sizes[symbol]) for symbol in ("L", "D'", "D", "r"))
    f_c, f_e = BrainModel(N, 1, L, width, 1, 4, D, r)(torch.zeros(B, 1, N))
    lines = (REPO / "brain_model.py").read_text().splitlines()
    (row,) = [row for row, line in enumerate(lines, 1) if line.strip() == "return f_c, f_e"]
    assert seen["brain_model", row] == {"returns": f"{tuple(f_c.shape)} {tuple(f_e.shape)}"}
    assert {module for module, _ in seen} == set(draw.FILES)


class Recorded(ToyRelease):
    """The recordings of the toy's training segments, without a file: enough to select its voxels."""

    def __init__(self):
        self.splits = {"train": [f"seg{s + 1}" for s in range(world.TRAIN_SEGMENTS)], "test": []}
        self.clips, self.delay, self.runs = dict.fromkeys(self.splits["train"], world.TRAIN_CLIPS), 2, {}
        films = world.film("train", 0) + world.film("test", 0)
        response = subject.responses(films, np.load(subject.VOXELS)["roi"], 0)  # (clips, voxels)
        for s, segment in enumerate(self.splits["train"]):
            shown = response[s * world.TRAIN_CLIPS :][: world.TRAIN_CLIPS]
            self.runs[segment] = [*subject.recordings(shown, world.TRAIN_REPEATS, [0, False, s])]

    def load_run(self, segment: str, repeat: int) -> np.ndarray:
        return self.runs[segment][repeat]


def test_the_voxels_of_the_toy_are_those_that_its_preparation_keeps(tmp_path):
    """Two segments of the release, from files, against the recordings without one; and the page's N."""
    raw, release = tmp_path / "raw", Recorded()
    assert [*islice(write_release(raw), 4)] == ["seg1_1", "seg1_2", "seg2_1", "seg2_2"]
    for segment in ("seg1", "seg2"):
        for repeat in (0, 1):
            recorded = np.load(raw / "fmri" / f"{segment}_{repeat + 1}.npy")
            assert np.array_equal(release.load_run(segment, repeat), recorded)
    assert shapes.TOY_SIZES["voxels"] == select_voxels(release).kept

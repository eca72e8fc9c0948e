"""extras/page: the page is that of today's code, its shapes are those of a real run, its links lead somewhere."""

import html
import re
import sys
from xml.etree import ElementTree

import pytest
import torch
from conftest import REPO

from brain_model import BrainModel
from extras import reading
from extras.page import draw, prose, shapes

PATHS = [REPO / f"{module}.py" for module in draw.FILES]


@pytest.fixture(scope="module")
def built() -> tuple[str, str]:
    return draw.build()


@pytest.fixture(scope="module")
def page(built) -> str:
    return built[0]


def test_the_page_and_the_figure_are_those_of_this_code(built):
    for file, text in zip((reading.PAGE, reading.FIGURE), built, strict=True):
        assert file.read_text(encoding="utf-8") == text, "python extras/reading.py writes it anew"
    links = re.findall(r'href="../docs/reading.html#([^"]+)"', built[1])
    assert len(links) == 11 and all(f' id="{place}"' in built[0] for place in links)
    ElementTree.fromstring(built[1])


def test_check_tells_a_stale_page(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reading, "build", lambda: built)
    monkeypatch.setattr(reading, "ROOT", tmp_path)
    monkeypatch.setattr(reading, "PAGE", tmp_path / "reading.html")
    monkeypatch.setattr(reading, "FIGURE", tmp_path / "method.svg")
    assert reading.main(["--check"]) == 1 and "stale: python extras/reading.py" in capsys.readouterr().out
    assert reading.main([]) == 0 and reading.main(["--check"]) == 0
    reading.PAGE.write_text(built[0] + "\n")
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
        assert [*lines.values()] == [source.lines[row - 1] for row in lines]
    for name in ("Clips.batch", "CineNeuron.reconstruct", "train_step", "Integration", "BrainModel.forward"):
        assert f'<div class="at">{name}</div>' in page
    assert "<details><summary>Config</summary>" in page and 'class="skipped">⋯ parse<' in page


def test_a_docstring_becomes_html(page):
    text = r"""Eq. 5: $S_i = \sum_{m}
w_m$ of *all* clips, like Eq. 2 -> `S`, $\hat{f}^e$.

    f_e --> S   Eq. 4"""
    out = prose.prose(text, {5: "lines"})
    assert '<div class="eq" id="eq-5"><h3>Eq. 5 <span class="at">lines</span></h3>' in out
    assert '<p>of <em>all</em> clips, like <a href="#eq-2">Eq. 2</a> → <code>S</code>, <math>' in out
    assert '<pre>    f_e --&gt; S   <a href="#eq-4">Eq. 4</a></pre>' in out
    assert len(re.findall("<math>", prose.breakable(r"f = g(a + b) + c, \quad z_t = 1"))) == 5
    formulas = re.findall(r"<math>.*?</math>", page)
    assert len(formulas) > 40
    for formula in formulas:
        ElementTree.fromstring(formula)
        assert "\\" not in formula, "LaTeX that latex2mathml cannot read"


def test_what_a_file_lacks_is_refused(monkeypatch):
    source = draw.read("heads")
    (piece,) = [piece for piece in source.pieces if piece.name == "info_nce"]
    piece.lines.pop()
    with pytest.raises(ValueError, match="heads.info_nce: its docstring says Eq. 2, and no line # Eq. 2"):
        draw.equations([source])
    piece.docstring = ""
    source.lines[piece.lines[-1] - 1] += "  # Eq. 2"
    with pytest.raises(ValueError, match="no docstring says Eq. 2"):
        draw.equations([source])
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

    tracer, outer = shapes.Tracer([file]), sys.gettrace()
    sys.settrace(debugger := lambda *event: None)
    with tracer.tracing():
        traced.double(torch.zeros(2, 3))
        traced.double(torch.zeros(5, 5))  # the first call alone counts
    restored = sys.gettrace()
    sys.settrace(outer)
    assert restored is debugger
    seen = {
        4: {"x": "(2, 3)"},
        6: {"B": "2", "T": "3"},
        10: {"y": "(2, 3)"},
        11: {"part": "(1, 3)"},
        12: {"z": "scalar"},
        13: {"returns": "(2, 3) scalar"},
    }
    assert tracer.shapes == {("traced", line): values for line, values in seen.items()}


def test_meta_shapes_are_those_of_numbers():
    """The Brain Model of the toy, with numbers, against what the page says."""
    seen, rows = shapes.traced("toy", PATHS)
    sizes = {symbol: size for symbol, _, size in rows}
    B, N = int(sizes["B"].split(",")[0]), shapes.TOY_SIZES["voxels"]
    L, width, D, r = (int(sizes[symbol]) for symbol in ("L", "D'", "D", "r"))
    f_c, f_e = BrainModel(N, 1, L, width, 1, 4, D, r)(torch.zeros(B, 1, N))
    lines = (REPO / "brain_model.py").read_text().splitlines()
    (row,) = [row for row, line in enumerate(lines, 1) if line.strip() == "return f_c, f_e"]
    assert seen["brain_model", row] == {"returns": f"{tuple(f_c.shape)} {tuple(f_e.shape)}"}
    assert {module for module, _ in seen} == set(draw.FILES)

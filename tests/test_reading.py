"""extras/reading.py: the page is that of today's code, its shapes are those of a real run, its links lead somewhere."""

import re
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import REPO

from extras import reading, shapes
from toy.release import write_release

PATHS = [REPO / f"{module}.py" for module in reading.FILES]


@pytest.fixture(scope="module")
def page() -> str:
    return reading.build()


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


def test_every_line_of_the_files_is_there_in_order(page):
    for path in PATHS:
        lines = path.read_text().splitlines()
        rows = re.findall(rf'<span class="l" id="{path.stem}-(\d+)" [^>]*><a [^>]*>\d+</a>(.*)\n', page)
        shown = {int(row): re.sub(r"<[^>]+>", "", code) for row, code in rows}
        assert [*shown] == sorted(shown)
        for row, line in enumerate(lines, 1):
            text = shown.get(row, "").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
            assert text.replace("&quot;", '"').replace("&#x27;", "'") == line


def test_mathml_is_well_formed():
    from xml.etree import ElementTree

    formulas = [formula for _, formula, _ in reading.EQUATIONS.values()]
    for formula in [*formulas, *(symbols for symbols, _ in reading.NOTES.values())]:
        ElementTree.fromstring(reading.mathml(formula))
    text = reading.mathml(r"\frac{a}{b_1} \sum_{i=1}^N \hat{f}^e \{ x \}")
    assert "<mfrac><mrow><mi>a</mi></mrow><mrow><msub><mi>b</mi><mn>1</mn></msub></mrow></mfrac>" in text
    assert "<munderover><mo>∑</mo>" in text and "<mo>{</mo><mi>x</mi><mo>}</mo>" in text


def test_a_note_about_nothing_and_an_equation_without_a_line_are_refused(monkeypatch):
    monkeypatch.setitem(reading.NOTES, "heads.Gone", ("", ""))
    with pytest.raises(ValueError, match="no file has heads.Gone"):
        reading.build()
    monkeypatch.delitem(reading.NOTES, "heads.Gone")
    monkeypatch.setitem(reading.EQUATIONS, 2, ("heads.focal_bce", "a", ""))
    with pytest.raises(ValueError, match="no line of heads.focal_bce says # Eq. 2"):
        reading.equation_lines({path.stem: path.read_text() for path in PATHS})


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

    seen = shapes.Shapes({str(file): "traced"})
    before = sys.gettrace()
    with seen.tracing():
        traced.double(torch.zeros(2, 3))
        traced.double(torch.zeros(5, 5))  # the first call alone counts
    assert sys.gettrace() is before
    assert seen.seen == {
        ("traced", 4): {"x": "(2, 3)"},
        ("traced", 6): {"B": "2", "T": "3"},
        ("traced", 10): {"y": "(2, 3)"},
        ("traced", 11): {"part": "(1, 3)"},
        ("traced", 12): {"z": "scalar"},
        ("traced", 13): {"returns": "(2, 3) scalar"},
    }


def test_meta_shapes_are_those_of_numbers():
    """The Brain Model of the toy, with numbers, against what the page says."""
    seen, sizes = shapes.traced("toy", PATHS)
    from brain_model import BrainModel

    model = BrainModel(sizes["N"], sizes["T"], sizes["L"], sizes["D'"], 1, 4, sizes["D"], sizes["r"])
    f_c, f_e = model(torch.zeros(sizes["B1"], sizes["T"], sizes["N"]))
    lines = (REPO / "brain_model.py").read_text().splitlines()
    (row,) = [row for row, line in enumerate(lines, 1) if line.strip() == "return f_c, f_e"]
    assert seen["brain_model", row] == {"returns": f"{tuple(f_c.shape)} {tuple(f_e.shape)}"}
    forwards = {module for module, _ in seen}
    assert forwards == set(reading.FILES) - {"train_stage1"}  # its loop alone is not run


def test_the_voxels_of_the_toy_are_those_that_its_preparation_keeps(tmp_path):
    """Two segments of the release, from files, against the recordings that shapes.py makes without one."""
    raw, of_page = tmp_path / "raw", shapes.Recorded()
    runs = list(islice(write_release(raw), 4))  # seg1, seg2, twice each
    assert runs == ["seg1_1", "seg1_2", "seg2_1", "seg2_2"]
    for segment in ("seg1", "seg2"):
        for repeat in (0, 1):
            recorded = np.load(raw / "fmri" / f"{segment}_{repeat + 1}.npy")
            assert np.array_equal(of_page.load_run(segment, repeat), recorded)
    sizes = shapes.settings("toy")
    assert sizes["N"] == shapes.select_voxels(of_page).kept and sizes["memories"] == 2000
    prepared = REPO / "data" / "toy" / "sub1" / "voxels.npz"
    assert not prepared.is_file() or sizes["N"] == len(np.load(prepared)["index"])

"""extras/page: the page is that of today's code, its links lead somewhere."""

import re
from xml.etree import ElementTree

import pytest
from conftest import REPO

from extras import reading
from extras.page import draw


@pytest.fixture(scope="module")
def built() -> tuple[str, str]:
    return draw.build()


def test_the_page_and_the_figure_are_those_of_this_code(built):
    for file, text in zip((reading.PAGE, reading.FIGURE), built, strict=True):
        assert file.read_text(encoding="utf-8") == text, "python extras/reading.py writes it anew"


def test_links_lead_to_lines_and_back(built):
    page = built[0]
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and {*re.findall(r'href="#([^"]+)"', page)} <= {*ids}
    assert not re.findall(r'(?:src|href)="(?!#)', page) and "<script" not in page  # one file, no JavaScript
    for number in range(1, 11):
        (place,) = set(re.findall(rf'<td><a href="#eq-{number}">.*<td><a href="#([\w-]+)">', page))
        module, row = place.rsplit("-", 1)
        line = (REPO / f"{module}.py").read_text().splitlines()[int(row) - 1]
        assert re.search(rf"# .*Eq\. {number}\b", line)
        assert f'href="#eq-{number}"' in re.search(rf'id="{place}".*', page)[0]
    for formula in re.findall(r"<math>.*?</math>", page):
        ElementTree.fromstring(formula)
        assert "\\" not in formula, "LaTeX that latex2mathml cannot read"

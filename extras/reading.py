"""The paper beside the code: one page, docs/reading.html, of the docstrings and the code of the method; and
figures/method.svg, its drawing.

python extras/reading.py            writes it anew, in half a minute
python extras/reading.py --check    says whether it is stale; exit status 1 where it is
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras.page.draw import build  # noqa: E402
from support.files import written_whole  # noqa: E402
from support.options import Parser  # noqa: E402
from support.runs import door  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reading.html"
FIGURE = ROOT / "figures" / "method.svg"


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 where --check saw a stale page."""
    parser = Parser("extras/reading.py", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing: is the page what it should be?")
    check = parser.parse_args(arguments).check
    stale = 0
    for file, text in zip((PAGE, FIGURE), build(), strict=True):
        present = file.read_text(encoding="utf-8") if file.is_file() else ""
        if check:
            state = "up to date" if text == present else "stale: python extras/reading.py writes it anew"
            print(f"{file.relative_to(ROOT)} is {state}")
            stale |= text != present
            continue
        with written_whole(file) as part:
            part.write_text(text, encoding="utf-8")
        print(f"written: {file.relative_to(ROOT)}, {len(text) / 1e3:,.0f} kB")
    return int(stale)


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

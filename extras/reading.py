"""The paper beside the code: one page, docs/reading.html, of the docstrings and the code of the method; and
figures/method.svg, its drawing.

python extras/reading.py            writes both anew, in half a minute
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


def main(arguments: list[str]) -> None:
    Parser("extras/reading.py", description=__doc__.split("\n")[0]).parse_args(arguments)
    for file, text in zip((PAGE, FIGURE), build(), strict=True):
        with written_whole(file) as part:
            part.write_text(text, encoding="utf-8")
        print(f"written: {file.relative_to(ROOT)}, {len(text) / 1e3:,.0f} kB")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

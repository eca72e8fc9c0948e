"""Wrong edits, made one at a time, that the fast tests must notice.

`python tests/mutants.py --processes 2 --only heads.py`: two at once, of tests/mutants.txt the lines with this text. Each
is `FILE: BEFORE ==> AFTER`; BEFORE stands once in FILE (\\n for a new line). In a copy with the edit the fast tests run,
those that name the file first, until one fails. Prints who noticed, or SURVIVED."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".git", "data", "runs", "__pycache__", ".*_cache", "*.egg-info")


def read_edits(file: Path, only: str) -> list[tuple[str, str, str]]:
    """(file, before, after) of each line that holds `only`. Raises ValueError where BEFORE does not stand once."""
    edits = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#") or only not in line:
            continue
        name, before, after = re.fullmatch(r"(\S+?): (.+?) ==> ?(.*)", line).groups()
        before, after = before.replace("\\n", "\n"), after.replace("\\n", "\n")
        count = (REPO / name).read_text(encoding="utf-8").count(before)
        if count != 1:
            raise ValueError(f"{file.name}: {before!r} stands {count} times in {name}, wanted once")
        edits.append((name, before, after))
    return edits


def tests_for(name: str) -> list[str]:
    """Every test file: that of the file's own name first, then those that name it, then the others."""
    stem = Path(name).stem

    def rank(test: Path) -> tuple[bool, bool, str]:
        named = re.search(rf"\b{stem}\b", test.read_text(encoding="utf-8"))
        return test.stem != f"test_{stem}", named is None, test.name

    return [f"tests/{test.name}" for test in sorted((REPO / "tests").glob("test_*.py"), key=rank)]


def try_edit(edit: tuple[str, str, str]) -> str | None:
    """The name of the test that noticed; None where all passed."""
    name, before, after = edit
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", *tests_for(name)]
    with tempfile.TemporaryDirectory() as folder:
        checkout = shutil.copytree(REPO, Path(folder) / "checkout", ignore=IGNORED)
        text = (checkout / name).read_text(encoding="utf-8").replace(before, after)
        (checkout / name).write_text(text, encoding="utf-8")
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    noticed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return noticed[1] if noticed else f"exit {done.returncode}"


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--only", default="", help="lines that hold this text")
    parser.add_argument("--processes", type=int, default=1)
    config = parser.parse_args()
    edits, survivors = read_edits(REPO / "tests" / "mutants.txt", config.only), 0
    with ThreadPoolExecutor(config.processes) as pool:
        for (name, before, after), noticed in zip(edits, pool.map(try_edit, edits), strict=True):
            survivors += noticed is None
            print(f"{noticed or 'SURVIVED'}  {name}: {before!r} ==> {after!r}", flush=True)
    print(f"{len(edits) - survivors} of {len(edits)} noticed")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())

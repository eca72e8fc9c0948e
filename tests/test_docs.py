"""Each command of the pages parses, each name, equation and link leads somewhere. <!-- docs/results/toy.json --> before
a paragraph or table: each number with a decimal point in it is a value of that file, rounded."""

import argparse
import ast
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO

from support.files import write_json

PAGES = [*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").glob("*.md")), REPO / "toy" / "README.md"]

# ---------------------------------------------------------------- commands


class Parsed(BaseException):
    """The command line was understood; nothing more is to run."""


def commands(text: str) -> Iterator[str]:
    """What follows `python` or `accelerate launch` in blocks and in spans of code; placeholders become values."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    joined = [block.replace("\\\n", " ") for block in blocks]  # lines that end with a backslash go on
    for line in [line for block in joined for line in block.splitlines()] + spans:
        for part in re.split(r"&&|;", re.sub(r"(^|\s+)# .*", "", line)):
            words = part.strip().removeprefix("OMP_NUM_THREADS=1 ")
            script = re.match(r"(python3?|accelerate launch) (?!-m venv|-c )", words)
            if script and "..." not in words.split()[:3]:
                yield words


def check_command(command: str, monkeypatch) -> None:
    """Fails, or ends with SystemExit, where the script does not understand it."""
    print(command)  # for whoever reads of the failure
    text = re.sub(r"[\[\]]", "", command)  # [--rois visual]: may be left out
    text = re.sub(r"(--subject|--seed|--delay) [A-Z]\b", r"\1 1", text)
    text = text.replace("--data NAME", "--data toy")
    words = [word for word in shlex.split(text) if word != "..."]
    while words[0] != "-m" and not words[0].endswith(".py"):  # python, or accelerate and its options
        words.pop(0)
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **options):
        real(self, *args, **options)
        raise Parsed

    script, *more = words[1:] if words[0] == "-m" else words
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "path", [str(REPO), *sys.path])
    monkeypatch.setattr(sys, "argv", [script, *more])
    run = runpy.run_module if words[0] == "-m" else runpy.run_path
    place = script if words[0] == "-m" else str(REPO / script)
    with pytest.raises(Parsed):
        run(place, run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_what_a_page_says(page: Path, monkeypatch):
    text = page.read_text()
    for command in dict.fromkeys(commands(text)):
        with monkeypatch.context() as patch:
            check_command(command, patch)
    check_names(text)
    check_links(page, text)
    check_figures(text)
    check_imports(text)


# ---------------------------------------------------------------- names and equations


def named(text: str) -> Iterator[tuple[str, str, str]]:
    """(file, name, line) of each `file.py`: `name`, `name`."""
    for line in text.splitlines():
        for file, rest in re.findall(r"`([\w/]+\.py)`: (`[\w.]+`(?:(?:,| and) `[\w.]+`)*)", line):
            yield from ((file, name, line) for name in re.findall(r"`([\w.]+)`", rest))


def definition(file: str, name: str) -> str | None:
    """The source of a top-level name, or Class.method, of a file; None where it has none."""
    text = (REPO / file).read_text()
    node = ast.parse(text)
    for part in name.split("."):
        body, node = getattr(node, "body", []), None
        for candidate in body:
            targets = getattr(candidate, "targets", [getattr(candidate, "target", None)])
            names = [n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]
            node = candidate if part in (getattr(candidate, "name", None), *names) else node
    return ast.get_source_segment(text, node) if node else None


def equations(text: str) -> set[int]:
    """Those named: Eq. 4, and Eq. 6-8."""
    pairs = re.findall(r"Eq\. (\d+)(?:-(\d+))?", text)
    return {n for first, last in pairs for n in range(int(first), int(last or first) + 1)}


def check_names(text: str) -> None:
    for file, name, line in named(text):
        assert (REPO / file).is_file(), f"{file} is not there: {line}"
        source = definition(file, name)
        assert source is not None, f"{file} has no {name}: {line}"
        missing = equations(line.split("`")[0]) - equations(source)
        assert not missing, f"{file}: {name} does not say Eq. {missing}: {line}"


def test_the_map_of_the_readme_has_all_equations():
    lines = [line.split("`")[0] for _, _, line in named((REPO / "README.md").read_text())]
    assert equations("\n".join(lines)) == set(range(1, 11))


# ---------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        bare = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        found.add(bare.strip().replace(" ", "-"))
    return found | set(re.findall(r'id="([^"]+)"', text))


def check_links(page: Path, text: str) -> None:
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'(?:src|href)="([^"]+)"', prose)
    for target in targets:
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file) if file else page
        assert there.exists(), f"{page.name}: {target} is not there"
        if anchor:
            words = text if there == page else there.read_text()
            assert anchor in anchors(words), f"{page.name}: {target}: no such heading"


def test_the_site_leads_to_each_page():
    """docs/ can be served as a site: index.html links to all, draws the .md pages, and stands beside them."""
    index = REPO / "docs" / "index.html"
    text = index.read_text(encoding="utf-8").partition("<body>")[2]
    check_links(index, text)
    pages = {file.name for file in index.parent.glob("*.[hmi]*")} - {"index.html"}
    assert {*re.findall(r'href="([^"?]+)"', text)} >= pages


# ---------------------------------------------------------------- figures


def check_figures(text: str, root: Path = REPO) -> None:
    file = r"docs/results/[\w./-]+\.json"
    for match in re.finditer(rf"<!--\s*({file}(?:\s+{file})*)\s*-->", text):
        known: list[str] = []  # all numbers of the files
        for one in match[1].split():
            json.loads((root / one).read_text(), parse_float=known.append, parse_int=known.append)
        block = re.split(r"\n\s*\n", text[match.end() :].lstrip("\n"))[0]
        for quoted in re.findall(r"(?<![\w.])-?\d+\.\d+(?![\w.]*\d)", block):
            half = 0.5 * 10 ** -len(quoted.partition(".")[2]) * (1 + 1e-6)
            near = any(abs(float(quoted) - float(value)) <= half for value in known)
            assert near, f"{quoted} is not in {match[1]}: {block[:80]}"


RIGHT = """`mixture_of_memories.py`: `mixture_scores` [y](LICENSE) `python train_stage1.py --steps 3`

<!-- docs/results/x.json -->
| 0.28 | v1.2 |"""
WRONG = {"--steps": "--no-such", "mixture_scores": "gone", "LICENSE": "gone.md", "| 0.28": "| 0.29"}


def test_what_is_wrong_is_told(tmp_path, monkeypatch):
    write_json(tmp_path / "docs" / "results" / "x.json", {"full": {"action": 0.27785}})

    def check(text: str) -> None:
        for command in commands(text):
            check_command(command, monkeypatch)
        check_names(text)
        check_links(REPO / "README.md", text)
        check_figures(text, tmp_path)

    check(RIGHT)
    for right, wrong in WRONG.items():
        with pytest.raises((AssertionError, SystemExit)):
            check(RIGHT.replace(right, wrong))


# ---------------------------------------------------------------- code in pages


def test_the_readme_has_the_commands_that_ci_takes_from_it():
    for command in ("python train_stage1.py", "pytest"):
        assert f"pip install -r requirements.txt && {command}" in (REPO / "README.md").read_text()


def test_the_reading_order_says_how_long_each_file_is():
    rows = re.findall(r"^\d  (\w+\.py) +(\d+)", (REPO / "README.md").read_text(encoding="utf-8"), re.M)
    lengths = [len((REPO / file).read_text(encoding="utf-8").splitlines()) for file, _ in rows]
    assert [int(lines) for _, lines in rows] == lengths and len(rows) == 8


def test_the_lines_that_exercises_change_are_those_of_the_code():
    parts = re.split(r"^--- ", (REPO / "docs" / "exercises.md").read_text(), flags=re.M)[1:]
    edits = [(part, edit) for part in parts for edit in re.findall(r"^-(.*)\n\+(.*)$", part, re.M)]
    assert len(edits) == 6
    for part, (old, new) in edits:
        code = (REPO / re.split(r"[,\n]", part)[0]).read_text()
        assert code.count(old + "\n") == 1, f"{part}: no such line"
        ast.parse(code.replace(old, new))


def check_imports(text: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        for node in ast.parse(block).body:
            file = f"{node.module.replace('.', '/')}.py" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names if (REPO / file).is_file() else ():
                assert definition(file, alias.name), alias.name

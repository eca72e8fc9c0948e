"""The house: who imports whom, how long a file is, and that nothing says what a reader cannot know."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPO

METHOD = ["brain_model", "heads", "mixture_of_memories", "video_decoder"]
LINES = dict(brain_model=140, heads=140, mixture_of_memories=205, video_decoder=210, data=295)
LINES |= dict(train_stage1=215, train_stage2=290, evaluate=315)
FLOORS = dict.fromkeys(METHOD, 0) | {
    "support": 0,
    "prepare.facts": 1,
    "prepare.release": 1,
    "prepare.copies": 2,
}
FLOORS |= dict(prepare=3, data=3, metrics=4, evaluate=5, toy=5, train_stage1=6, train_stage2=6, extras=7)
ROOMS = ["support", "prepare", "metrics", "toy", "extras"]
# what makes data is imported where it is asked for: the only arrows up, and all that leads to the toy world
LAZY = {("data", "prepare.command"), ("prepare.command", "toy.release")}
LAZY |= {("train_stage1", "toy.release"), ("train_stage2", "toy.release")}
FILES = sorted(path for place in [".", *ROOMS] for path in REPO.glob(f"{place}/*.py"))
NAMES = {file: ".".join(file.relative_to(REPO).with_suffix("").parts) for file in FILES}
TREES = {name: ast.parse(file.read_text()) for file, name in NAMES.items()}


def imports(nodes) -> set[str]:
    """The modules of ours that these statements import."""
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules & {*TREES}


ARROWS = {name: imports(ast.walk(tree)) for name, tree in TREES.items()}


def floor(name: str) -> int:
    return FLOORS.get(name, FLOORS[name.split(".")[0]])


@pytest.mark.parametrize("name", TREES)
def test_arrows_point_down(name: str):
    room = name.split(".")[0]
    beside = [m for m in ARROWS[name] if m.split(".")[0] == room and floor(m) == floor(name)]
    up = [m for m in ARROWS[name] - {*beside} if floor(m) >= floor(name) and (name, m) not in LAZY]
    assert not up and not (name in METHOD and ARROWS[name])


def test_there_is_no_circle():
    TopologicalSorter(ARROWS).prepare()


def test_the_toy_world_and_the_command_are_imported_where_they_are_asked_for():
    to_toy = {(name, m) for name in TREES if floor(name) < 7 for m in ARROWS[name] if m.startswith("toy.")}
    assert {(name, m) for name, m in to_toy if not name.startswith("toy.")} <= LAZY
    for name, module in LAZY:
        assert module in ARROWS[name] and module not in imports(TREES[name].body)


@pytest.mark.parametrize("file", FILES, ids=NAMES.get)
def test_a_file_can_be_read_in_a_sitting(file: Path):
    assert len(file.read_text().splitlines()) <= LINES.get(NAMES[file], 430)


@pytest.mark.parametrize("name", LINES)
def test_a_function_of_the_paper_fits_in_sight(name: str):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_top_level_is_the_paper():
    assert {path.stem for path in REPO.glob("*.py")} == {*LINES}
    for room in ROOMS:
        tree = TREES[f"{room}.__init__"]
        assert ast.get_docstring(tree) and len(tree.body) == 1
    for name in LINES:
        assert re.search(r"§|Eq\. \d", ast.get_docstring(TREES[name]))


def test_only_what_a_reader_has_is_named():
    for page in [*FILES, *REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("toy/*.md")]:
        names = re.findall(r"DESIGN|LAYOUT\.md|STYLE\.md|\.\./shared", page.read_text())
        assert not names, f"{page.relative_to(REPO)}: {names}"


def test_each_equation_stands_at_a_line():
    code = "\n".join((REPO / f"{name}.py").read_text() for name in LINES)
    for number in range(1, 11):
        line = rf"^(?!\s*#)(?=.*\S.*#.*Eq\. (\d-)?{number}\b)"
        assert re.search(line, code, re.M), f"no line says Eq. {number}"

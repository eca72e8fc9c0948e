"""The house: who imports whom, how long a file is, and that nothing says what a reader cannot know."""

import ast
import re
from pathlib import Path

import pytest
from conftest import REPO

PAPER = [
    "brain_model",
    "heads",
    "mixture_of_memories",
    "video_decoder",
    "data",
    "train_stage1",
    "train_stage2",
    "evaluate",
]
METHOD = PAPER[:4]
ROOMS = ["prepare", "metrics", "support", "toy", "extras"]
BUDGET = 335
FILES = sorted(
    [REPO / f"{name}.py" for name in PAPER] + [p for room in ROOMS for p in (REPO / room).rglob("*.py")]
)


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(REPO).with_suffix("").parts)


def imports(file: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    ours, tree = {name_of(path) for path in FILES}, ast.parse(file.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & ours


def allowed(name: str) -> list[str]:
    """What a file may import: names, or rooms with a dot behind."""
    room = name.split(".")[0]
    own = {
        "data": ["support.", "prepare.facts", "prepare.command"],
        "train_stage1": [
            "brain_model",
            "heads",
            "data",
            "support.",
            "metrics.retrieval",
            "prepare.command",
            "prepare.facts",
            "extras.steps",
        ],
        "train_stage2": [*METHOD, "data", "support.", "prepare.command", "prepare.facts", "extras.steps"],
        "evaluate": [*METHOD, "data", "support.", "metrics.", "toy.recognise", "prepare.facts"],
        "prepare.facts": ["support."],
        "prepare.release": ["support.", "prepare.facts"],
        "prepare.decoder": ["support.", "prepare.", "video_decoder"],
        "prepare.command": ["support.", "prepare.", "toy.release"],
        "toy.release": ["toy.world", "toy.subject", "prepare.", "support."],
        "toy.recognise": ["support.", "metrics."],
        "toy.world": [],
        "toy.subject": ["toy.world"],
    }
    if name in METHOD:
        return []
    return own.get(name) or {
        "prepare": ["support.", "prepare."],
        "metrics": ["support.", "metrics.", "prepare.encoders"],
        "support": ["support."],
    }.get(room, [""])


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_arrows_point_down(file: Path):
    name = name_of(file)
    wrong = {
        m
        for m in imports(file)
        if not any(m == a or a.endswith(".") and m.startswith(a) or a == "" for a in allowed(name))
    }
    assert not wrong, f"{name} imports {wrong}"


def test_there_is_no_circle():
    edges = {name_of(file): imports(file) for file in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in edges.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_only_the_command_and_the_training_scripts_prepare():
    """No constructor renders a world or runs a VAE: data.py knows the preparation only as a command."""
    tree = ast.parse((REPO / "data.py").read_text())
    where = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "prepare.command"
    ]
    main = [node for node in tree.body if isinstance(node, ast.If)]
    inside = [node for block in main for node in ast.walk(block)]
    assert where and all(node in inside for node in where)


@pytest.mark.parametrize(
    "file", [f for f in FILES if not name_of(f).startswith(("extras", "toy.pretrain"))], ids=name_of
)
def test_a_file_can_be_read_in_a_sitting(file: Path):
    assert len(file.read_text().splitlines()) <= BUDGET


@pytest.mark.parametrize("script", ["train_stage1", "train_stage2"])
def test_a_training_main_fits_in_sight(script: str):
    tree = ast.parse((REPO / f"{script}.py").read_text())
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert main.end_lineno - main.lineno + 1 <= 110


def test_the_top_level_is_the_paper():
    assert sorted(path.stem for path in REPO.glob("*.py")) == sorted(PAPER)
    for room in ROOMS:
        tree = ast.parse((REPO / room / "__init__.py").read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1


def test_only_what_a_reader_has_is_named():
    pages = [*FILES, *REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("toy/*.md")]
    for page in pages:
        named = re.findall(r"DESIGN|LAYOUT\.md|STYLE\.md|\.\./shared", page.read_text())
        assert not named, f"{page.relative_to(REPO)}: {named}"


@pytest.mark.parametrize("file", [REPO / f"{name}.py" for name in PAPER], ids=name_of)
def test_the_paper_is_beside_the_code(file: Path):
    assert re.search(r"§|Eq\. \d", ast.get_docstring(ast.parse(file.read_text())))


def test_each_equation_stands_at_a_line():
    code = "\n".join((REPO / f"{name}.py").read_text() for name in PAPER)
    for number in range(1, 11):
        assert re.search(rf"^(?!\s*#)(?=.*\S.*#.*Eq\. (\d-)?{number}\b)", code, re.M), (
            f"no line says Eq. {number}"
        )

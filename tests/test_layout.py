"""The house: a floor for each room, imports that go down and in no circle, files and functions that fit in sight."""

import ast
import re
from graphlib import TopologicalSorter

from conftest import REPO

LINES = dict(brain_model=140, heads=140, mixture_of_memories=205, video_decoder=190, data=277)
LINES |= dict(train_stage1=200, train_stage2=272, evaluate=297)
ROOMS = ["support", "prepare", "metrics", "toy", "extras"]
METHOD = ["brain_model", "heads", "mixture_of_memories", "video_decoder"]
FLOORS = dict.fromkeys([*METHOD, "support"], 0)
FLOORS |= {"prepare.facts": 1, "prepare.release": 1, "prepare.copies": 2}
FLOORS |= dict(prepare=3, data=3, metrics=4, evaluate=5, toy=5, train_stage1=6, train_stage2=6, extras=7)
# what makes data is imported where it is asked for, and what stage 2 starts from where there is none: the only
# arrows up, and all that leads to the toy world
LAZY = {("metrics.held_out", "train_stage2"), ("data", "prepare.command")}
LAZY |= {(name, "toy.release") for name in ("prepare.command", "train_stage1", "train_stage2")}
FILES = sorted(path for place in [".", *ROOMS] for path in REPO.glob(f"{place}/*.py"))
NAMES = [".".join(file.relative_to(REPO).with_suffix("").parts) for file in FILES]
TREES = {name: ast.parse(file.read_text()) for name, file in zip(NAMES, FILES, strict=True)}


def imports(nodes) -> set[str]:
    """The modules of ours that these statements import."""
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules & {*TREES}


def place(name: str) -> tuple[int, str]:
    room = name.split(".")[0]
    return FLOORS.get(name, FLOORS[room]), room


def test_arrows_point_down_or_to_the_same_floor_of_the_room_and_in_no_circle():
    arrows = {name: imports(ast.walk(tree)) for name, tree in TREES.items()}
    assert all(module in arrows[name] - imports(TREES[name].body) for name, module in LAZY)
    for name, module in {(a, b) for a in arrows for b in arrows[a]} - LAZY:
        assert place(module)[0] < place(name)[0] or place(module) == place(name), (name, module)
        to_toy = place(module)[1] == "toy" and place(name)[1] not in ("toy", "extras")
        assert name not in METHOD and not to_toy, (name, module)
    arrows["metrics.held_out"].remove("train_stage2")  # which imports evaluate, and that held_out
    TopologicalSorter(arrows).prepare()


def test_files_and_the_functions_of_the_paper_fit_in_sight():
    for file, (name, tree) in zip(FILES, TREES.items(), strict=True):
        assert len(file.read_text().splitlines()) <= LINES.get(name, 430), name
        for node in ast.walk(tree) if name in LINES else ():
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 60, node.name


def test_the_top_level_is_the_paper_and_each_equation_stands_at_a_line():
    assert {path.stem for path in REPO.glob("*.py")} == {*LINES}
    code = "\n".join((REPO / f"{name}.py").read_text() for name in LINES)
    for number in range(1, 11):
        assert re.search(rf"^(?!\s*#)(?=.*\S.*#.*Eq\. (\d-)?{number}\b)", code, re.M), number
    for page in [*FILES, *REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("toy/*.md")]:
        assert not re.search(r"DESIGN|LAYOUT\.md|STYLE\.md|\.\./shared", page.read_text()), page

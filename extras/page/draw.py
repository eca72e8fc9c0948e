"""The page as one HTML file: the docstrings of the code on the left, the code and its shapes on the right."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from extras.page.figure import drawing
from extras.page.prose import EQUATION, linked, mathml, prose
from extras.page.shapes import ROOT, first_line, traced

TEMPLATE = Path(__file__).with_name("page.html")
FILES = {  # in reading order: what of a file is on the page; nothing: all of it
    "brain_model": "",
    "heads": "",
    "data": "Batch Batch.parts Clips.batch Clips.targets Clips._draw_fmri Clips._draw_stage2 Clips.averaged "
    "memories",
    "train_stage1": "Config build train_step learn",
    "mixture_of_memories": "",
    "video_decoder": "",
    "evaluate": "CineNeuron CineNeuron.from_stage1 CineNeuron.forward CineNeuron.remember "
    "CineNeuron.reconstruct",
    "train_stage2": "Config train_step measures learn",
}
FOLDED = {"evaluate.CineNeuron.from_stage1", "data.Clips.averaged", "data.memories", "train_stage2.measures"}
FOLDED |= {"train_stage1.Config", "train_stage2.Config"}


@dataclass
class Piece:
    """A class or function with its docstring, and what follows up to the next one that has a docstring."""

    name: str  # "BrainModel.forward"; "" of what stands above the first
    docstring: str
    lines: list[int]  # without those of the docstring


@dataclass
class Source:
    """A file of the page."""

    module: str
    lines: list[str]
    docstring: str
    pieces: list[Piece]

    @property
    def on_page(self) -> list[Piece]:
        return [piece for piece in self.pieces if piece.name in (FILES[self.module].split() or [piece.name])]


@dataclass
class Equation:
    """An equation of a docstring, and the lines (module, number) whose comments name it."""

    latex: str
    home: str  # "heads.info_nce", whose docstring it is
    at_home: list[tuple[str, int]] = field(default_factory=list)
    elsewhere: list[tuple[str, int]] = field(default_factory=list)

    def links(self) -> str:
        """To each of its lines, those at home first."""
        links, before = [], ""
        for module, row in self.at_home + self.elsewhere:
            name = f"{row}" if module == before else f"{module}.py:{row}"
            links.append(f'<a href="#{module}-{row}">{name}</a>')
            before = module
        return ", ".join(links)


def documented(body: list[ast.stmt], above: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """(name, node) of each class, method and function that has a docstring."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            yield above + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from documented(node.body, f"{above}{node.name}.")


def read(module: str) -> Source:
    """Raises ValueError where FILES names what the file does not hold."""
    text = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    code = [node for node in tree.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
    stop = len(lines) + 1
    if isinstance(code[-1], ast.If):  # if __name__ == "__main__"
        stop = code[-1].lineno
    pieces = []
    for name, node in reversed([("", code[0]), *documented(code)]):
        start = first_line(node)
        while stop > start and lines[stop - 2].strip()[:1] in ("", "#"):  # about what follows
            stop -= 1
        text = node.body[0] if name else None  # the docstring
        numbers = [n for n in range(start, stop) if not text or not text.lineno <= n <= text.end_lineno]
        if numbers:
            pieces.insert(0, Piece(name, ast.get_docstring(node) if name else "", numbers))
        stop = start
    if missing := set(FILES[module].split()) - {piece.name for piece in pieces}:
        raise ValueError(f"{module}.py: found no {', '.join(sorted(missing))}: correct FILES in {__file__}")
    return Source(module, lines, ast.get_docstring(tree), pieces)


def equations(sources: list[Source]) -> dict[int, Equation]:
    """Of the docstrings, by number. Raises KeyError where a comment names another."""
    found: dict[int, Equation] = {}
    pieces = [(source, piece) for source in sources for piece in source.on_page]
    for source, piece in pieces:
        for number, latex in EQUATION.findall(piece.docstring):
            found[int(number)] = Equation(latex, f"{source.module}.{piece.name}")
    for source, piece in pieces:
        for line in piece.lines:
            for number in equations_of(source.lines[line - 1]):
                equation = found[number]
                is_home = f"{source.module}.{piece.name}.".startswith(f"{equation.home}.")
                lines = equation.at_home if is_home else equation.elsewhere
                lines.append((source.module, line))
    return dict(sorted(found.items()))


def equations_of(line: str) -> range:
    """The numbers that its comment names: # Eq. 5, # Eq. 6-8."""
    match = re.search(r"#.*Eq\. (\d+)(?:-(\d+))?", line)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)


# ---------------------------------------------------------------- HTML


def shape_groups(toy: dict[str, str], paper: dict[str, str]) -> str:
    """What stands below a line: names of one shape together, q, k, v."""
    names: dict[str, list[str]] = {}
    for name, small in toy.items():
        large = f' <b class="paper">{paper[name]}</b>' if name in paper else ""
        shape = f"<b>{small}</b>" if small == paper.get(name) else f'<b class="toy">{small}</b>{large}'
        names.setdefault(shape, []).append(name)
    return " ".join(f"<span>{', '.join(names[shape])} {shape}</span>" for shape in names)


def coloured(lines: list[str]) -> list[str]:
    """Python -> HTML, line by line."""
    code = highlight("\n".join(lines), PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    plain = re.sub(r'<span class="[npow]">([^<]*)</span>', r"\1", code)  # names, brackets, operators, blanks
    return linked(plain).split("\n")


def section(source: Source, toy: dict, paper: dict, links: dict[int, str]) -> str:
    """A file: rows of a docstring and its code, and between them the names of what is not on the page."""
    about = source.docstring.split("\n\n")[0] if FILES[source.module] else source.docstring
    blocks = [f'<section id="{source.module}"><h2>{source.module}.py</h2>']
    blocks.append(f'<div class="about">{prose(about, links)}</div>')
    code, skipped = coloured(source.lines), []
    for piece in source.pieces:
        if piece not in source.on_page:
            skipped += [piece.name] if piece.name else []
            continue
        blocks, skipped = [*blocks, ellipsis(skipped)], []
        left = f'<div><div class="at">{piece.name}</div>{prose(piece.docstring, links)}</div>'
        right = "".join(code_line(source, number, code, toy, paper) for number in piece.lines)
        row = f'<div class="row"><aside>{left}</aside><pre class="code">{right}</pre></div>'
        if f"{source.module}.{piece.name}" in FOLDED:
            row = f"<details><summary>{piece.name}</summary>{row}</details>"
        blocks.append(row)
    return "\n".join([*blocks, ellipsis(skipped), "</section>"])


def ellipsis(names: list[str]) -> str:
    return f'<p class="skipped">⋯ {", ".join(names)}</p>' if names else ""


def code_line(source: Source, number: int, code: list[str], toy: dict, paper: dict) -> str:
    """A line of code, and below it its shapes."""
    text, place = source.lines[number - 1], f"{source.module}-{number}"
    style = f'style="--i:{len(text) - len(text.lstrip())}"'
    link = f'<a class="number" href="#{place}">{number}</a>'
    shapes = shape_groups(toy.get((source.module, number), {}), paper.get((source.module, number), {}))
    below = f'<span class="shape" {style}>{shapes}</span>' if shapes else ""
    return f'<span class="l" id="{place}" {style}>{link}{code[number - 1]}\n</span>{below}'


def places(sources: list[Source]) -> dict[str, str]:
    """ "heads.info_nce" -> its line on the page."""
    pieces = [(source.module, piece) for source in sources for piece in source.on_page]
    return {f"{module}.{piece.name}": f"#{module}-{piece.lines[0]}" for module, piece in pieces}


def build() -> tuple[str, str]:
    """The page, and its drawn figure as a file of its own."""
    sources = [read(module) for module in FILES]
    paths = [ROOT / f"{module}.py" for module in FILES]
    (toy, toy_sizes), (paper, paper_sizes) = traced("toy", paths), traced("cc2017", paths)
    table, sizes, links = "", "", {}
    for number, equation in equations(sources).items():
        links[number] = equation.links()
        module, row = equation.at_home[0]
        table += f'<tr><td><a href="#eq-{number}">Eq. {number}</a></td><td>{mathml(equation.latex)}</td>'
        table += f'<td><a href="#{module}-{row}">{module}.py:{row}</a></td></tr>\n'
    for (symbol, meaning, small), (_, _, large) in zip(toy_sizes, paper_sizes, strict=True):
        sizes += f'<tr><td>{mathml(symbol)}</td><td>{meaning}</td><td class="toy">{small}</td>'
        sizes += f'<td class="paper">{large}</td></tr>\n'
    files = " → ".join(f'<a href="#{module}">{module}.py</a>' for module in FILES)
    body = "\n".join(section(source, toy, paper, links) for source in sources)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    here = places(sources)
    elsewhere = {name: f"../docs/reading.html{place}" for name, place in here.items()}
    page = template.substitute(files=files, equations=table, sizes=sizes, body=body, figure=drawing(here))
    return page, drawing(elsewhere)

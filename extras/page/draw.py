"""The page as one HTML file: the docstrings of the code on the left, the code and its shapes on the right."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from extras.page.prose import EQUATION, inline, linked, mathml, prose
from extras.page.shapes import ROOT, traced

STYLE = Path(__file__).with_name("page.css")
FILES = {  # in reading order: what of a file is on the page; nothing: all of it
    "brain_model": [],
    "heads": [],
    "data": [
        "Batch",
        "Clips.batch",
        "Clips.targets",
        "Clips._draw_fmri",
        "Clips._draw_stage2",
        "Clips.averaged",
        "memories",
    ],
    "train_stage1": ["build", "train_step"],
    "mixture_of_memories": [],
    "video_decoder": [],
    "evaluate": [
        "CineNeuron",
        "CineNeuron.from_stage1",
        "CineNeuron.forward",
        "CineNeuron.remember",
        "CineNeuron.reconstruct",
    ],
    "train_stage2": ["train_step", "measures", "learn"],
}
SYMBOLS = {
    "B": "clips of a step, in stage 1 and in stage 2",
    "b": "clips in the video decoder at once",
    "T": "fMRI volumes of a clip",
    "N": "voxels; of a pool: memories",
    "L": "tokens of f_e, and of the decoder's text",
    "D'": "width of the Brain Model",
    "r": "numbers a token keeps of each volume (ours)",
    "D": "width of CLIP and ViCLIP",
    "F": "frames that CLIP sees of a clip",
    "K": "memories retrieved",
    "D_{txt}": "width of the decoder's text tokens",
    "y": "latents of a video: channels, frames, rows, columns",
    "classes": "categories of objects",
}


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
        return [piece for piece in self.pieces if piece.name in (FILES[self.module] or [piece.name])]


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
    end = next(
        (node.lineno for node in code if isinstance(node, ast.If)), len(lines) + 1
    )  # if __name__ == ...
    nodes = [("", code[0]), *documented(code)]
    starts = [
        min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for _, node in nodes
    ]
    pieces = []
    for (name, node), start, stop in zip(nodes, starts, [*starts[1:], end], strict=True):
        hidden = range(node.body[0].lineno, node.body[0].end_lineno + 1) if name else ()
        while stop > start and lines[stop - 2].strip()[:1] in (
            "",
            "#",
        ):  # blank, or a comment about what follows
            stop -= 1
        numbers = [number for number in range(start, stop) if number not in hidden]
        if numbers:
            pieces.append(Piece(name, ast.get_docstring(node) if name else "", numbers))
    if missing := set(FILES[module]) - {piece.name for piece in pieces}:
        raise ValueError(f"{module}.py: found no {', '.join(sorted(missing))}: correct FILES in {__file__}")
    return Source(module, lines, ast.get_docstring(tree), pieces)


def equations(sources: list[Source]) -> dict[int, Equation]:
    """Of the docstrings, by number. Raises ValueError where one leads to no line, or a comment names none."""
    found: dict[int, Equation] = {}
    pieces = [(source, piece) for source in sources for piece in source.on_page]
    for source, piece in pieces:
        for number, latex in EQUATION.findall(piece.docstring):
            found[int(number)] = Equation(latex, f"{source.module}.{piece.name}")
    for source, piece in pieces:
        for row in piece.lines:
            match = re.search(r"#.*Eq\. (\d+)(?:-(\d+))?", source.lines[row - 1])
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            for number in range(first, last + 1):
                if number not in found:
                    raise ValueError(f"{source.module}.py:{row}: no docstring says Eq. {number}: $LaTeX$")
                is_home = f"{source.module}.{piece.name}.".startswith(f"{found[number].home}.")
                lines = found[number].at_home if is_home else found[number].elsewhere
                lines.append((source.module, row))
    for number, equation in found.items():
        if not equation.at_home:
            raise ValueError(f"{equation.home}: its docstring says Eq. {number}, and no line # Eq. {number}")
    return dict(sorted(found.items()))


# ---------------------------------------------------------------- HTML


def shape_line(toy: dict[str, str], paper: dict[str, str], indent: int) -> str:
    """What stands below a line: names of one shape together, q, k, v."""
    names: dict[tuple[str, str], list[str]] = {}
    for name in toy:
        names.setdefault((toy[name], paper.get(name, "")), []).append(name)
    groups = []
    for small, large in names:
        shape = f"<b>{small}</b>" if small == large else f'<b class="t">{small}</b> <b class="p">{large}</b>'
        groups.append(f"<span>{', '.join(names[small, large])} {shape}</span>")
    return f'<span class="shape" style="--i:{indent}">{" ".join(groups)}</span>'


def section(source: Source, toy: dict, paper: dict, links: dict[int, str]) -> str:
    """A file: rows of a docstring and its code."""
    module, docstring = source.module, source.docstring
    if FILES[module]:
        docstring = docstring.split("\n\n")[0]
    formatter = HtmlFormatter(nowrap=True)
    code = highlight("\n".join(source.lines), PythonLexer(stripnl=False), formatter).split("\n")
    parts = [f'<section id="{module}"><h2>{module}.py</h2><div class="about">{prose(docstring, links)}</div>']
    skipped: list[str] = []
    for piece in source.pieces:
        if piece not in source.on_page:
            skipped.append(piece.name)
            continue
        if skipped:
            parts.append(f'<p class="skipped">⋯ {", ".join(filter(None, skipped))}</p>')
            skipped = []
        right = []
        for row in piece.lines:
            line = source.lines[row - 1]
            indent = len(line) - len(line.lstrip())
            number = f'<a class="n" href="#{module}-{row}">{row}</a>'
            right.append(
                f'<span class="l" id="{module}-{row}" style="--i:{indent}">{number}{linked(code[row - 1])}\n</span>'
            )
            if (module, row) in toy:
                right.append(shape_line(toy[module, row], paper.get((module, row), {}), indent))
        name = f'<div class="at">{piece.name}</div>' if piece.name else ""
        left = f"<div>{name}{prose(piece.docstring, links)}</div>"
        parts.append(f'<div class="row"><aside>{left}</aside><pre class="code">{"".join(right)}</pre></div>')
    if skipped:
        parts.append(f'<p class="skipped">⋯ {", ".join(skipped)}</p>')
    return "\n".join([*parts, "</section>"])


def build() -> str:
    """The page as a string."""
    sources = [read(module) for module in FILES]
    paths = [ROOT / f"{module}.py" for module in FILES]
    (toy, toy_sizes), (paper, paper_sizes) = traced("toy", paths), traced("cc2017", paths)
    table, links = "", {}
    for number, equation in equations(sources).items():
        links[number] = equation.links()
        module, row = equation.at_home[0]
        table += f'<tr><td><a href="#eq-{number}">Eq. {number}</a></td><td>{mathml(equation.latex)}</td>'
        table += f'<td><a href="#{module}-{row}">{module}.py:{row}</a></td></tr>\n'
    sizes = ""
    for symbol, meaning in SYMBOLS.items():
        sizes += f"<tr><td>{mathml(symbol)}</td><td>{inline(meaning)}</td>"
        sizes += f'<td class="t">{toy_sizes[symbol]}</td><td class="p">{paper_sizes[symbol]}</td></tr>\n'
    files = " → ".join(f'<a href="#{module}">{module}.py</a>' for module in FILES)
    body = "\n".join(section(source, toy, paper, links) for source in sources)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CineNeuron: the paper beside the code</title><style>
{STYLE.read_text(encoding="utf-8")}</style></head><body>
<h1>CineNeuron: the paper beside the code</h1>
<div class="intro"><p>Left: what the docstrings say, the paper's equations among it. Right: the code. Read the files
in this order: {files}. Of data.py, the training scripts and evaluate.py the page shows the method; what reads files
and options stays in them (⋯).</p>
<p>Below a line stand the shapes of what it assigns or returns, as they were when it ran: <span class="t">at the
toy's size</span> and <span class="p">at the paper's</span> (cc2017, subject 1 of the NeuroClips release, Wan2.1
1.3B). A shape that both share stands once. The shapes are of the first call of a function: stage 1 calls the Brain
Model with its batch, stage 2 the memories with its own. An equation links to its lines, and a line to its
equation.</p></div>
<div class="tables"><div><table><tr><th></th><th>equation</th><th>line</th></tr>
{table}</table></div>
<div><table><tr><th></th><th>size</th><th>toy</th><th>paper</th></tr>
{sizes}</table></div></div>
{body}
</body></html>
"""

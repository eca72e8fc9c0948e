"""Docstrings as HTML: paragraphs, equations, links to equations; LaTeX as MathML."""

import html
import re

from latex2mathml.converter import convert

EQUATION = re.compile(r"^Eq\. (\d+): \$([^$]+)\$", re.MULTILINE)


def mathml(latex: str, display: str = "inline") -> str:
    """LaTeX -> a <math>. A word of several letters is upright, as if it stood in \\text."""
    upright = re.sub(r"(\\[a-zA-Z]+)|([a-zA-Z]{2,})", lambda m: m[1] or rf"\text{{{m[2]}}}", latex)
    return re.sub(r"<math[^>]*>", "<math>", convert(upright, display=display))


def breakable(latex: str) -> str:
    """A long equation as several <math>, so that a line may end before = and +, and after a comma."""
    parts, depth = [""], 0
    for token in re.findall(r"\\[a-zA-Z]+|\\.|.", latex, re.DOTALL):
        depth += (token in "{([") - (token in "})]")
        if token in "=+" and not depth:
            parts.append("{}")  # without it, the sign would stand too near to what follows
        parts[-1] += token
        if token == r"\quad" and not depth:
            parts.append("")
    return " ".join(mathml(part, "block") for part in parts)


def linked(text: str) -> str:
    """Eq. 5 -> a link to it."""
    return re.sub(r"Eq\. (\d+)(-\d+)?", r'<a href="#eq-\1">\g<0></a>', text)


def inline(text: str) -> str:
    """`code`, *stress*, $LaTeX$ and equations of a paragraph."""
    parts = []
    for n, part in enumerate(re.split(r"\$([^$]+)\$", text)):
        if n % 2:
            parts.append(mathml(part))
            continue
        part = linked(html.escape(part, quote=False).replace("-&gt;", "→"))
        part = re.sub(r"`([^`]+)`", r"<code>\1</code>", part)
        parts.append(re.sub(r"(?<!\w)\*(\w[^*]*\w)\*(?!\w)", r"<em>\1</em>", part))
    return "".join(parts)


def prose(docstring: str, lines_of: dict[int, str]) -> str:
    """A docstring as HTML; lines_of: the links of each equation to its lines. Indented text stays as is."""
    blocks = []
    for paragraph in docstring.split("\n\n"):
        if re.search(r"^( |>>>)", paragraph, re.MULTILINE):
            blocks.append(f"<pre>{linked(html.escape(paragraph, quote=False))}</pre>")
            continue
        text, *equations = EQUATION.split(paragraph)
        blocks.append(f"<p>{inline(text)}</p>" if text.strip() else "")
        for number, latex, text in zip(equations[::3], equations[1::3], equations[2::3], strict=True):
            lines = f'<span class="at">{lines_of[int(number)]}</span>'
            blocks.append(
                f'<div class="eq" id="eq-{number}"><h3>Eq. {number} {lines}</h3>{breakable(latex)}</div>'
            )
            blocks.append(f"<p>{inline(text.strip())}</p>" if text.strip() else "")
    return "".join(blocks)

"""The paper beside the code: one page, docs/reading.html.

    python extras/reading.py            writes it anew, in half a minute
    python extras/reading.py --check    says whether it is stale; exit status 1 where it is

Left the paper's symbols and equations with a sentence of our own, right the method files and the two training
scripts, each line of the method with the shapes that extras/shapes.py saw when it ran.
"""

import ast
import html
import io
import keyword
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras import shapes  # noqa: E402
from support.files import written_whole  # noqa: E402
from support.options import Parser  # noqa: E402
from support.runs import door  # noqa: E402

ROOT = Path(__file__).parents[1]
STYLE = Path(__file__).with_name("reading.css")
PAGE = ROOT / "docs" / "reading.html"
FILES = ["brain_model", "heads", "train_stage1", "mixture_of_memories", "video_decoder", "train_stage2"]

EQUATIONS = {  # number: (where it is, the equation, a sentence)
    1: (
        "heads.stage1_loss",
        r"ℒ_{clip} = ℒ_{info} ( f^c , \hat{e}^{img} ) \br + ℒ_{info} ( f^c , e^{txt} )",
        "The global token must be near to the image embedding and to the text embedding of its own clip.",
    ),
    2: (
        "heads.info_nce",
        r"ℒ_{info} ( f^c , e ) = − \frac{1}{B} \sum_{i=1}^{B} \br log \frac{exp ( f_i^c · e_i / τ )}"
        r"{\sum_{j=1}^{B} exp ( f_i^c · e_j / τ )}",
        "Each clip of the batch picks its own embedding among those of all B clips: a classification with B "
        "classes, hence the cross-entropy.",
    ),
    3: (
        "heads.stage1_loss",
        r"ℒ_{stage1} = ℒ_{clip} + λ_1 ℒ_{action} + λ_2 ℒ_{cls}",
        "Stage 1 adds the action and the object categories. A λ of 0 leaves a task out (Table 4).",
    ),
    4: (
        "mixture_of_memories.Router",
        r"W_r = [ w^{txt} , w^{img} , w^{act} ] \br = softmax ( R ( f^e ) )",
        "The router says, of each clip, how much to trust each kind of memory. The three weights sum to "
        "1. On the toy it ends near 0.23 for text, 0.25 for image and 0.52 for action (docs/integration.md).",
    ),
    5: (
        "mixture_of_memories.mixture_scores",
        r"S_i = \sum_{m∈\{txt,img,act\}} w_m · sim ( f^e , e_i^m ) , \br i ∈ \{ 1 , … , N \}",
        "The score of a memory is the weighted sum of three cosines. Where the paper has f_e the code has q, "
        "that is f_c and f_a (heads.py, Stage1Heads.queries): stage 1 aligns f_c with the memories, and f_e "
        "has another width. One matrix product gives all B × N.",
    ),
    6: (
        "mixture_of_memories.Integration.forward",
        r"\hat{f}^e = CrossAttention ( Q^e , K^{img} , V^{img} ) \br + CrossAttention "
        r"( Q^e , K^{act} , V^{act} )",
        "Each fMRI token asks the K images and the K actions what belongs to it.",
    ),
    7: (
        "mixture_of_memories.Integration.forward",
        r"z_f = Z_{fMRI} ( Norm ( \hat{f}^e ) ) , \br z_t = Z_{txt} ( e_{txt}^{mem} ) + e_{txt}^{mem}",
        "Both zero-convolutions start at 0. So training starts at the text of the best memory, exactly.",
    ),
    8: (
        "mixture_of_memories.Integration.forward",
        r"f^{fuse} = z_t + α z_f",
        "What the video decoder reads in place of a prompt.",
    ),
    9: (
        "video_decoder.VideoDecoder.diffusion_loss",
        r"ℒ ( θ ) = 𝔼_{y,ε,f^{fuse},t} [ ‖ ε − ε_θ ( y_t , f^{fuse} , t ) ‖_2^2 ]",
        "The decoder learns to tell the noise in a noisy video, with f_fuse as its prompt. Wan predicts a "
        "velocity, noise less video, in place of the noise.",
    ),
    10: (
        "train_stage2.losses_and_gradients",
        r"ℒ_{stage2} = ℒ_{stage1} + ℒ ( θ )",
        "One backward pass leads both through the Brain Model. The gradient of ℒ(θ) comes in as f.grad.",
    ),
}

NOTES = {  # where: (the paper's symbols, a sentence)
    "brain_model.VoxelRegression": (
        r"x ∈ ℝ^{B×N}",
        "The “first regression layer”. Its weights, a column a voxel, are Fig. 5. We keep the T volumes of a "
        "clip apart: x (B, T, N).",
    ),
    "brain_model.Block": ("", "One layer of the Transformer; the paper has 24 of width 2048."),
    "brain_model.BrainModel.forward": (
        r"f ( x ) = ( f^c , f^e ) , \br f^c ∈ ℝ^{B×D} , \br f^e ∈ ℝ^{B×L×D′}",
        "One summary for the losses of stage 1, and L tokens for the memories and the decoder.",
    ),
    "heads.ImageAggregator": (
        r"\hat{e}^{img} = φ_v ( e^{img} )",
        "The F frames of a clip become one embedding.",
    ),
    "heads.ActionHead": (
        r"f^a = φ_a ( f^c )",
        "From the space of CLIP into that of ViCLIP, which knows actions.",
    ),
    "heads.CategoryHead": (r"φ_c ( f^c )", "A yes or no for each category of objects."),
    "heads.Stage1Heads.queries": (
        r"f^e → ( f^c , f^c , f^a )",
        "Eq. 5 compares f_e with the memories, but stage 1 aligns only f_c. So f_c and f_a stand for it (a "
        "choice).",
    ),
    "heads.focal_bce": (
        r"ℒ_{cls} = BCE + focal",
        "Rare categories count: what is already right weighs little.",
    ),
    "train_stage1.learn": (
        r"min ℒ_{stage1}",
        "§4.1: AdamW and OneCycle, 8,000 steps of 144 clips at the paper's size. The loop draws clips, "
        "computes Eq. 3 and steps.",
    ),
    "mixture_of_memories.MemoryPool": (
        r"ℳ = \{ ( e_i^{txt} , e_i^{img} , e_i^{act} ) \}_{i=1}^N",
        "A memory is a training clip: three embeddings, and the text tokens of its caption.",
    ),
    "mixture_of_memories.MemoryPool.text": (
        r"e_{txt}^{mem}",
        "The caption of a memory in the decoder's own text tokens, zero after its end.",
    ),
    "mixture_of_memories.MemoryPool.excluded": (
        "",
        "In training a clip may not recall itself or its copies: a held-out clip cannot, either (a choice).",
    ),
    "mixture_of_memories.retrieve": (
        r"\{ i_1 , … , i_K \}",
        "The K memories of the highest score, the best first.",
    ),
    "mixture_of_memories.MixtureOfMemories.forward": (
        r"f^e → f^{fuse}",
        "Eq. 4 to 8 in order. An index has no gradient, so the scores enter the attention, too (a choice).",
    ),
    "mixture_of_memories.TopTextMemory": ("", "The ablation “without MoM” of Table 4."),
    "mixture_of_memories.DirectProjection": ("", "The ablation “without integration” of Table 6."),
    "mixture_of_memories.condition": (
        r"x → f^{fuse}",
        "The whole way from the fMRI to the prompt: for training, samples and evaluation.",
    ),
    "video_decoder.draw": (r"ε , t", "Noise and time depend on seed, step and clip, and on nothing else."),
    "video_decoder.VideoDecoder.predict": (r"ε_θ ( y_t , f^{fuse} , t )", "The diffusion Transformer, once."),
    "video_decoder.VideoDecoder.generate": (
        r"f^{fuse} → video",
        "§3.3: from noise to video, in sampling steps that follow the prompt.",
    ),
    "train_stage2.load_parts": ("", "Stage 1's models, the memory pool, and the parts that stage 2 adds."),
    "train_stage2.learn": (
        r"min ℒ_{stage2}",
        "§4.1 gives one rate, 1e-6. Here Eq. 6-7 and the LoRA may have their own; the router keeps the Brain "
        "Model's. Each step is one call of Eq. 10.",
    ),
}

SIZES = [  # the paper's symbol, its meaning, how it is read of the sizes that ran
    ("B", "clips of a step, in stage 1 and in stage 2", lambda s: f"{s['B1']}, {s['B2']}"),
    ("b", "clips in the video decoder at once", lambda s: s["b"]),
    ("T", "fMRI volumes of a clip", lambda s: s["T"]),
    ("N", "voxels; of a pool: memories", lambda s: f"{s['N']:,}; {s['memories']:,}"),
    ("L", "tokens of f_e, and of the decoder's text", lambda s: s["L"]),
    ("D′", "width of the Brain Model", lambda s: s["D'"]),
    ("r", "numbers a token keeps of each volume (ours)", lambda s: s["r"]),
    ("D", "width of CLIP and ViCLIP", lambda s: s["D"]),
    ("F", "frames that CLIP sees of a clip", lambda s: s["F"]),
    ("K", "memories retrieved", lambda s: s["K"]),
    ("D_txt", "width of the decoder's text tokens", lambda s: s["D_txt"]),
    (
        "y",
        "latents of a video: channels, frames, rows, columns",
        lambda s: " × ".join(map(str, s["latents"])),
    ),
    ("classes", "categories of objects", lambda s: s["classes"]),
]


# ---------------------------------------------------------------- MathML


def mathml(text: str, display: bool = False) -> str:
    r"""A small part of TeX -> MathML: scripts _ ^ with {}, \{ \}, \frac, \hat, \sum. Words of several letters
    are upright; \br begins a line of its own in display, which is a <math> of its own."""
    if display:
        return "".join(_math(line, ' display="block"') for line in text.split(r"\br"))
    return _math(text.replace(r"\br", " "), "")


def _math(text: str, kind: str) -> str:
    tokens = re.findall(r"\\[a-z]+|\\[{}]|[^\W\d_]+|\d+|[^\s]", text)
    at = 0

    def group() -> str:
        nonlocal at
        if tokens[at] != "{":
            return atom()
        at += 1
        parts = []
        while tokens[at] != "}":
            parts.append(scripted())
        at += 1
        return f"<mrow>{''.join(parts)}</mrow>"

    def atom() -> str:
        nonlocal at
        token = tokens[at]
        at += 1
        if token == r"\frac":
            return f"<mfrac>{group()}{group()}</mfrac>"
        if token == r"\hat":
            return f'<mover accent="true">{group()}<mo stretchy="false">^</mo></mover>'
        if token == r"\sum":
            return "<mo>∑</mo>"
        if token in (r"\{", r"\}"):
            return f"<mo>{token[1]}</mo>"
        if token.isdecimal():
            return f"<mn>{token}</mn>"
        if token[0].isalpha() and token not in "∈":
            return f"<mi>{token}</mi>"
        return f"<mo>{html.escape(token)}</mo>"

    def scripted() -> str:
        nonlocal at
        base = atom()
        below = above = ""
        while at < len(tokens) and tokens[at] in "_^":
            kind = tokens[at]
            at += 1
            if kind == "_":
                below = group()
            else:
                above = group()
        names = ("munder", "mover", "munderover") if base == "<mo>∑</mo>" else ("msub", "msup", "msubsup")
        if below and above:
            return f"<{names[2]}>{base}{below}{above}</{names[2]}>"
        if below or above:
            name = names[0] if below else names[1]
            return f"<{name}>{base}{below}{above}</{name}>"
        return base

    parts = []
    while at < len(tokens):
        parts.append(scripted())
    return f"<math{kind}><mrow>{''.join(parts)}</mrow></math>"


# ---------------------------------------------------------------- code


@dataclass
class Chunk:
    where: str  # module, or module.Class.function
    first: int
    last: int


def chunks(module: str, text: str) -> list[Chunk]:
    """A file in pieces: what stands above, each class, each function; comments above one belong to it. A
    method is a piece where a note is about it."""
    lines, starts = text.splitlines(), {1: module}
    noted = NOTES.keys() | {where for where, *_ in EQUATIONS.values()}

    def visit(body: list[ast.stmt], above: str, cut: bool) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            while lines[first - 2].strip().startswith("#"):
                first -= 1
            where = f"{above}.{node.name}"
            if cut or where in noted:
                starts[first] = where
            if isinstance(node, ast.ClassDef):
                visit(node.body, where, False)
            elif above != module:
                cut = where in noted  # what follows is another piece

    visit(ast.parse(text).body, module, True)
    places = [*sorted(starts), len(lines) + 1]
    pieces = []
    for first, last in zip(places, places[1:], strict=False):
        while not lines[last - 2].strip():  # blank lines between two pieces
            last -= 1
        pieces.append(Chunk(starts[first], first, last - 1))
    return pieces


def coloured(text: str) -> list[str]:
    """Python -> HTML, a string a line: comments, strings, keywords and the names that are defined."""
    lines = text.splitlines()
    marks: list[list[tuple[int, int, str]]] = [[] for _ in lines]
    depth, begin, before = 0, (0, 0), ""

    def mark(start: tuple[int, int], end: tuple[int, int], kind: str) -> None:
        for row in range(start[0], end[0] + 1):
            a = start[1] if row == start[0] else 0
            b = end[1] if row == end[0] else len(lines[row - 1])
            marks[row - 1].append((a, b, kind))

    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_START":  # Python 3.12 and later cut an f-string in parts
            begin, depth = (token.start if not depth else begin), depth + 1
        elif name == "FSTRING_END":
            depth -= 1
            if not depth:
                mark(begin, token.end, "s")
        elif depth:
            continue
        elif name == "COMMENT":
            mark(token.start, token.end, "c")
        elif name == "STRING":
            mark(token.start, token.end, "s")
        elif name == "NAME" and keyword.iskeyword(token.string):
            mark(token.start, token.end, "k")
        elif name == "NAME" and before in ("def", "class"):
            mark(token.start, token.end, "d")
        before = token.string
    out = []
    for line, of_line in zip(lines, marks, strict=True):
        parts, at = [], 0
        for a, b, kind in sorted(of_line):
            inside = linked(html.escape(line[a:b], quote=False)) if kind in "cs" else html.escape(line[a:b])
            parts += [html.escape(line[at:a], quote=False), f'<i class="{kind}">{inside}</i>']
            at = b
        out.append("".join([*parts, html.escape(line[at:], quote=False)]))
    return out


def linked(text: str) -> str:
    """Eq. 5 -> a link to it."""
    return re.sub(r"Eq\. (\d+)(-\d+)?", lambda m: f'<a href="#eq-{m[1]}">{m[0]}</a>', text)


def equation_lines(texts: dict[str, str]) -> dict[int, list[tuple[str, int]]]:
    """Equation -> the lines whose comment names it, (module, line), that in its home first."""
    found: dict[int, list[tuple[str, int]]] = {number: [] for number in EQUATIONS}
    for module, text in texts.items():
        homes = {chunk.where: chunk for chunk in chunks(module, text)}
        for row, line in enumerate(text.splitlines(), 1):
            if match := re.search(r"\S.*  #.*Eq\. (\d+)(?:-(\d+))?", line):
                for number in range(int(match[1]), int(match[2] or match[1]) + 1):
                    home = homes.get(EQUATIONS[number][0])
                    here = home and home.first <= row <= home.last and not match[2]
                    found[number].insert(0 if here else len(found[number]), (module, row))
    for number, (where, *_) in EQUATIONS.items():
        module = where.split(".")[0]
        home = next((c for c in chunks(module, texts[module]) if c.where == where), None)
        first = found[number][0] if found[number] else ("", 0)
        if home is None or first[0] != module or not home.first <= first[1] <= home.last:
            raise ValueError(
                f"no line of {where} says # Eq. {number}: correct EQUATIONS in extras/reading.py"
            )
    return found


# ---------------------------------------------------------------- the page


def shape_line(of_line: tuple[dict[str, str], dict[str, str]], indent: int) -> str:
    """Names of one shape stand together: q, k, v."""
    toy, paper = of_line
    groups: dict[tuple[str, str], list[str]] = {}
    for name in toy:
        groups.setdefault((toy[name], paper.get(name, "")), []).append(name)
    parts = []
    for (small, large), names in groups.items():
        shape = f"<b>{small}</b>" if small == large else f'<b class="t">{small}</b> <b class="p">{large}</b>'
        parts.append(f"<span>{html.escape(', '.join(names))} {shape}</span>")
    return f'<span class="shape" style="--i:{indent}">{" ".join(parts)}</span>'


def note(where: str, module_lines: dict[int, list[tuple[str, int]]]) -> str:
    """What stands left of a piece of code."""
    parts = []
    if where in NOTES:
        symbols, sentence = NOTES[where]
        parts.append(f"<div>{mathml(symbols, True) if symbols else ''}<p>{html.escape(sentence)}</p></div>")
    for number, (home, formula, sentence) in EQUATIONS.items():
        if home == where:
            places, before = [], ""
            for module, row in module_lines[number]:
                name = f"{row}" if module == before else f"{module}.py:{row}"
                places.append(f'<a href="#{module}-{row}">{name}</a>')
                before = module
            head = f'<h3>Eq. {number}</h3><div class="at">{", ".join(places)}</div>'
            parts.append(
                f'<div id="eq-{number}">{head}{mathml(formula, True)}<p>{html.escape(sentence)}</p></div>'
            )
    return "".join(parts)


def section(module: str, text: str, seen: list[dict], lines_of: dict[int, list[tuple[str, int]]]) -> str:
    """A file: rows of a note and its code."""
    code, source = coloured(text), text.splitlines()
    rows: list[tuple[str, list[str]]] = []
    for chunk in chunks(module, text):
        left, right = note(chunk.where, lines_of), []
        for row in range(chunk.first, chunk.last + 1):
            indent = len(source[row - 1]) - len(source[row - 1].lstrip())
            number = f'<a class="n" href="#{module}-{row}">{row}</a>'
            right.append(
                f'<span class="l" id="{module}-{row}" style="--i:{indent}">{number}{code[row - 1]}\n</span>'
            )
            if (module, row) in seen[0]:
                right.append(shape_line((seen[0][module, row], seen[1].get((module, row), {})), indent))
        if rows and not left and not rows[-1][0]:
            rows[-1][1].extend(["\n\n", *right])
        else:
            rows.append((left, right))
    out = [f'<section id="{module}"><h2>{module}.py</h2>']
    for left, right in rows:
        out.append(f'<div class="row"><aside>{left}</aside><pre>{"".join(right)}</pre></div>')
    return "\n".join([*out, "</section>"])


def build() -> str:
    """The page as a string."""
    paths = [ROOT / f"{module}.py" for module in FILES]
    texts = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    known = {chunk.where for module, text in texts.items() for chunk in chunks(module, text)}
    if lost := sorted(NOTES.keys() - known):
        raise ValueError(f"no file has {', '.join(lost)}: correct NOTES in extras/reading.py")
    lines_of = equation_lines(texts)
    (toy, toy_sizes), (paper, paper_sizes) = (shapes.traced(data, paths) for data in ("toy", "cc2017"))

    equations = ""
    for number, (_, formula, _) in EQUATIONS.items():
        module, row = lines_of[number][0]
        place = f'<a href="#{module}-{row}">{module}.py:{row}</a>'
        equations += f'<tr><td><a href="#eq-{number}">Eq. {number}</a></td><td>{mathml(formula)}</td>'
        equations += f"<td>{place}</td></tr>\n"
    sizes = ""
    for symbol, meaning, read in SIZES:
        sizes += f"<tr><td>{mathml(symbol.replace('D_txt', 'D_{txt}'))}</td><td>{meaning}</td>"
        sizes += f'<td class="t">{read(toy_sizes)}</td><td class="p">{read(paper_sizes)}</td></tr>\n'
    files = " → ".join(f'<a href="#{module}">{module}.py</a>' for module in FILES)
    body = "\n".join(section(module, text, [toy, paper], lines_of) for module, text in texts.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>CineNeuron: the paper beside the code</title><style>
{STYLE.read_text()}</style></head><body>
<h1>CineNeuron: the paper beside the code</h1>
<div class="intro"><p>Left: the symbols and equations of the paper, with a sentence of our own. Right: the
code. Read the files in this order: {files}.</p>
<p>Below a line stand the shapes of what it assigns or returns, as they were when it ran: <span class="t">at
the toy's size</span> and <span class="p">at the paper's</span> (cc2017, subject 1 of the NeuroClips release,
Wan2.1 1.3B). A shape that both share stands once. The shapes are of the first call of a function: stage 1
calls the Brain Model with its batch, stage 2 the memories with its own. An equation links to its lines, and a
line to its equation.</p></div>
<div class="tables"><div><table><tr><th></th><th>equation</th><th>line</th></tr>
{equations}</table></div>
<div><table><tr><th></th><th>size</th><th>toy</th><th>paper</th></tr>
{sizes}</table></div></div>
{body}
</body></html>
"""


def main(argv: list[str]) -> int:
    """Returns the exit status: 1 where --check saw a stale page."""
    parser = Parser("extras/reading.py", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing: is the page what it should be?")
    check = parser.parse_args(argv).check
    page, there = build(), PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    if check:
        said = "up to date" if page == there else "stale: python extras/reading.py writes it anew"
        print(f"{PAGE.relative_to(ROOT)} is {said}")
        return int(page != there)
    with written_whole(PAGE) as part:
        part.write_text(page, encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}, {len(page) / 1e3:,.0f} kB")
    return 0


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

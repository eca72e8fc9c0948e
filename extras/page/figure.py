"""The drawn figure of the method, light and dark: boxes are files, arrows carry the paper's symbols."""

import re
from typing import NamedTuple

WIDTH, HEIGHT = 1190, 496
STYLE = """
svg { --ink: #222; --quiet: #6b6b6b; --box: #fff; --rule: #8a8a8a; --one: #e8f3ef; --two: #fbf0e6;
  --link: #1f5aa6 }
@media (prefers-color-scheme: dark) { svg { --ink: #e6e4df; --quiet: #a5a29b; --box: #24262a; --rule: #85827b;
  --one: #17302a; --two: #35271a; --link: #8db8f2 } }
text { font: 14px Georgia, "DejaVu Serif", serif; fill: var(--ink); text-anchor: middle }
.title { font-weight: bold }
.file { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; fill: var(--link) }
.small { font-size: 12px; fill: var(--quiet) } .symbol { font-style: italic } .stage { text-anchor: start }
rect { fill: var(--box); stroke: var(--rule); rx: 6px } .one { fill: var(--one); stroke: none }
.two { fill: var(--two); stroke: none }
path { fill: none; stroke: var(--ink); stroke-width: 1.3; marker-end: url(#head) }
.dashed { stroke-dasharray: 5 4 }
#head path { fill: var(--ink); stroke: none; marker-end: none }
"""


class Box(NamedTuple):
    """A part of the method, and the place on the page that it links to."""

    x: int  # of its left edge; its top is y
    y: int
    width: int
    title: str
    detail: str
    file: str
    piece: str  # a class or function of the file; "" is the file


class Arrow(NamedTuple):
    """A line through points, with a symbol at a place."""

    points: str  # of an SVG path
    symbol: str = ""
    x: int = 0  # the symbol's middle
    y: int = 0
    dashed: bool = False  # a target or a gradient, no input


BOX_HEIGHT = 74
BOXES = [
    Box(20, 150, 150, "the clips", "films, fMRI", "data.py", "Batch"),
    Box(265, 150, 180, "Brain Model", "§3.1", "brain_model.py", "BrainModel"),
    Box(560, 48, 210, "heads φ_v, φ_a, φ_c", "InfoNCE, BCE + focal: Eq. 1-3", "heads.py", "stage1_loss"),
    Box(960, 48, 200, "L_stage1", "Eq. 3, the loop of stage 1", "train_stage1.py", "train_step"),
    Box(265, 388, 180, "memories", "of the training clips", "mixture_of_memories.py", "MemoryPool"),
    Box(495, 268, 180, "Router", "Eq. 4", "mixture_of_memories.py", "Router"),
    Box(495, 388, 180, "mixture score", "Eq. 5", "mixture_of_memories.py", "mixture_scores"),
    Box(755, 268, 180, "integration", "Eq. 6-8", "mixture_of_memories.py", "Integration"),
    Box(1000, 268, 160, "video DiT + LoRA", "Eq. 9", "video_decoder.py", "VideoDecoder"),
    Box(755, 388, 180, "L_stage2", "Eq. 10, the loop of stage 2", "train_stage2.py", "train_step"),
    Box(1000, 388, 160, "the video", "§3.3, Tables 1 and 2", "evaluate.py", "CineNeuron.reconstruct"),
]
ARROWS = [
    Arrow("M170 187 H265", "x", 217, 178),
    Arrow("M445 170 H500 V100 H560", "f_c", 472, 160),
    Arrow("M95 150 V66 H560", "e_img, e_txt, e_act, c", 330, 57, dashed=True),
    Arrow("M770 85 H960", "L_clip, L_action, L_cls", 865, 76),
    Arrow("M445 205 H470 V305 H495", "f_e", 456, 226),
    Arrow("M715 122 V410 H675", "q", 727, 150),
    Arrow("M445 425 H495", "e", 470, 416),
    Arrow("M585 342 V388", "W_r", 565, 369),
    Arrow("M675 440 H738 V322 H755", "K best", 706, 456),
    Arrow("M445 187 H845 V268", "f_e", 800, 178),
    Arrow("M935 305 H1000", "f_fuse", 965, 296),
    Arrow("M1080 342 V388"),
    Arrow("M1000 328 H967 V425 H935", "L(θ)", 985, 380),
    Arrow("M95 224 V480 H1176 V305 H1160", "y", 130, 472, dashed=True),
]


def text(x: float, y: float, words: str, kind: str) -> str:
    """Words at a place; what follows an underscore is set low."""
    low = r'<tspan dy="4" font-size="10">\1</tspan><tspan dy="-4">&#8203;</tspan>'
    return f'<text x="{x}" y="{y}" class="{kind}">{re.sub(r"_([A-Za-z0-9]+)", low, words)}</text>'


def drawing(places: dict[str, str]) -> str:
    """The SVG. places: "heads.stage1_loss" -> the address that its box links to."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>CineNeuron: from fMRI to video</title><style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect class="one" x="4" y="4" width="{WIDTH - 8}" height="232"/>',
        f'<rect class="two" x="4" y="244" width="{WIDTH - 8}" height="{HEIGHT - 248}"/>',
        text(16, 26, "Stage 1 (§3.1): what the fMRI tells", "title stage"),
        text(108, 268, "Stage 2 (§3.2): memories, then video", "title stage"),
    ]
    for arrow in ARROWS:
        dashed = ' class="dashed"' if arrow.dashed else ""
        parts.append(f'<path{dashed} d="{arrow.points}"/>')
        if arrow.symbol:
            parts.append(text(arrow.x, arrow.y, arrow.symbol, "symbol"))
    for box in BOXES:
        middle = box.x + box.width / 2
        module = box.file.removesuffix(".py")
        parts += [
            f'<a href="{places[f"{module}.{box.piece}"]}">',
            f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{BOX_HEIGHT}"/>',
            text(middle, box.y + 22, box.title, "title"),
            text(middle, box.y + 42, box.detail, "small"),
            f'<text x="{middle}" y="{box.y + 62}" class="file">{box.file}</text></a>',
        ]
    return "\n".join([*parts, "</svg>\n"])

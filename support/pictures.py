"""Pictures: curves, contact sheets of videos, GIFs of many videos side by side."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.files import written_whole
from support.videos import uniform_frames, write_gif

Pictures = list[list[np.ndarray]]  # rows of pictures uint8 (H, W, 3), or of videos (F, H, W, 3)
Labels = list[list[str]]
Curves = dict[str, tuple[Sequence[float], Sequence[float]]]  # name: (x, y)
SHARES = ("w_txt", "w_img", "w_act", "z_f/z_t")  # columns of log.jsonl that are no losses: W_r, and a ratio
SMOOTH = 0.05  # of the steps of a run


def curves(file: Path, points: Curves, **labels) -> None:
    """Curves (x, y) by name in one picture; labels: xlabel, title, yscale ... of matplotlib's axes."""
    panels(file, [(points, labels)])


def panels(file: Path, rows: list[tuple[Curves, dict]]) -> None:
    """Axes below each other, each with its curves and labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4 if len(rows) == 1 else 3 * len(rows)), layout="constrained")
    for axis, (points, labels) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        for name, (x, y) in points.items():
            axis.plot(x, y, label=name, marker="." if len(x) < 20 else None)
        axis.set(**labels)
        axis.legend()
        axis.grid(alpha=0.3)
    with written_whole(file) as part:
        figure.savefig(part, dpi=120)


def loss_curves(file: Path, log: Sequence[dict], labels: dict[str, str], title: str) -> None:
    """The lines of log.jsonl as running means over the steps, of those names of `labels` that they hold. A
    checkpoint logs a line right beside another: as they are, their noise is a step. SHARES stand apart."""
    losses: Curves = {}
    shares: Curves = {}
    for name, label in labels.items():
        logged = [line for line in log if name in line]
        if logged:
            steps = [line["step"] for line in logged]
            curve = steps, smoothed(steps, [line[name] for line in logged])
            (shares if name in SHARES else losses)[label] = curve
    x = f"step (mean over {SMOOTH:.0%} of them)"
    scale = "log" if len(losses) > 1 else "linear"
    rows = [(losses, {"xlabel": x, "ylabel": "loss", "yscale": scale, "title": title})]
    panels(file, rows + ([(shares, {"xlabel": x, "ylabel": "share"})] if shares else []))


def smoothed(steps: Sequence[int], values: Sequence[float]) -> list[float]:
    """The mean of the values within SMOOTH / 2 of all steps, before and after."""
    x, y = np.array(steps, float), np.array(values, float)
    return [float(y[np.abs(x - step) <= SMOOTH / 2 * (x[-1] - x[0])].mean()) for step in x]


def near_copies(file: Path, threshold: float, percent: Sequence[float], best_match: dict[str, list]) -> None:
    """The cosine above which a clip copies another, and quantiles, at `percent`, of the cosines behind it."""
    points = {name: (cosines, percent) for name, cosines in best_match.items()}
    x = "highest cosine of a clip's mean frame to a memory's"
    title = f"near-copies, not retrieved in training: cosine > {threshold:.4f}"
    curves(file, points, xlabel=x, ylabel="% of clips below", title=title)


def spread(clips: Sequence[int], n: int, groups: dict[str, np.ndarray] | None = None) -> list[int]:
    """The rule by which pictures choose their clips, whatever came out: of each group equally many, each the
    middle of one of as many equal parts of it; `n` in all, group after group.

    clips: numbers to choose from; groups: {name: (clips,) bool, by number}, or all are one group."""
    clips, chosen = np.asarray(clips, int), []
    members = [clips[mask[clips]] for mask in (groups or {}).values()]
    members = [group for group in members if len(group)] or [clips]
    for k, group in enumerate(members):
        share = n // len(members) + (k < n % len(members))
        middles = (np.arange(share) + 0.5) * len(group) / max(share, 1)  # (share,)
        chosen += group[np.unique(middles.astype(int))].tolist()
    return chosen


def page(pictures: Pictures, labels: Labels, titles: list[str], height: int):
    """Pictures in rows and columns, a label of three lines at most below each, a title above each column
    -> PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    gap, line = 8, 16  # pixels
    H, W, _ = pictures[0][0].shape
    width = round(W * height / H)
    resampling = Image.Resampling.NEAREST if H < height else Image.Resampling.LANCZOS
    wrapper = textwrap.TextWrapper(max(12, width // 7), max_lines=3, placeholder=" ...")
    texts = [[wrapper.fill(label) for label in row] for row in labels]
    lines = 1 + max(text.count("\n") for row in texts for text in row)
    column, row = width + gap, height + lines * line + gap
    image = Image.new("RGB", (column * len(titles) + gap, row * len(texts) + line + 2 * gap), "white")
    draw = ImageDraw.Draw(image)
    for j, title in enumerate(titles):
        left = gap + j * column
        draw.text((left, gap), title, "black", ImageFont.load_default(14))
        for i, text in enumerate(texts):
            top = line + 2 * gap + i * row
            image.paste(Image.fromarray(pictures[i][j]).resize((width, height), resampling), (left, top))
            under, font = (left, top + height + 1), ImageFont.load_default(13)
            draw.multiline_text(under, text[j], (70, 70, 70), font, spacing=2)
    return image


def strip(video: np.ndarray) -> np.ndarray:
    """First, middle and last frame beside each other, a white column either side of each."""
    frames = video[[0, len(video) // 2, -1]]  # (3, H, W, 3)
    return np.concatenate(np.pad(frames, ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=255), 1)


def contact_sheet(file: Path, videos: Pictures, labels: Labels, titles: list[str], height: int = 112) -> None:
    """Of each video three moments, a row a clip, a column a method."""
    with written_whole(file) as part:
        page([[strip(video) for video in row] for row in videos], labels, titles, height).save(part)


def grid_gif(
    file: Path, videos: Pictures, labels: Labels, titles: list[str], seconds: float, height: int = 144
) -> None:
    """The videos themselves in rows and columns, as one GIF that lasts `seconds` and repeats."""
    n = max(len(video) for row in videos for video in row)
    even = [[video[uniform_frames(len(video), n)] for video in row] for row in videos]  # of n frames each
    pages = [page([[v[t] for v in row] for row in even], labels, titles, height) for t in range(n)]
    write_gif(file, pages, seconds / n)

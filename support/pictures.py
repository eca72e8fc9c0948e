"""Pictures: curves, contact sheets of videos, GIFs of many videos side by side."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.files import written_whole
from support.videos import uniform_frames


def curves(file: Path, named: dict[str, tuple[Sequence[float], Sequence[float]]], **labels) -> None:
    """Named curves (x, y) in one picture; labels: xlabel, ylabel, title, yscale ... of matplotlib's axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (x, y) in named.items():
        axis.plot(x, y, label=name, marker="." if len(x) < 20 else None)
    axis.set(**labels)
    axis.legend()
    axis.grid(alpha=0.3)
    with written_whole(file) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


def loss_curves(file: Path, rows: Sequence[dict], names: dict[str, str], title: str) -> None:
    """The lines of log.jsonl as a picture: of each name that they hold a curve over the steps, by its
    label."""
    named = {}
    for name, label in names.items():
        there = [row for row in rows if name in row]
        if there:
            named[label] = [row["step"] for row in there], [row[name] for row in there]
    curves(file, named, xlabel="step", ylabel="loss", yscale="log", title=title)


def near_copies(
    file: Path, threshold: float, percent: list[float], best_match: dict[str, list[float]]
) -> None:
    """The cosine above which a clip copies another, and the distributions behind it, as quantiles
    (prepare.copies.near_copy_threshold)."""
    curves(
        file,
        {name: (cosines, percent) for name, cosines in best_match.items()},
        title=f"near-copies, not retrieved in training: cosine > {threshold:.4f}",
        xlabel="highest cosine of a clip's mean frame to a memory's",
        ylabel="% of clips below",
    )


def spread(clips: Sequence[int], n: int, groups: dict[str, np.ndarray] | None = None) -> list[int]:
    """The rule by which pictures choose their clips, whatever came out: of each group equally many, each the
    middle of one of as many equal parts of it; `n` in all, group after group.

    clips: numbers to choose from; groups: {name: (clips,) bool, by number}, or all are one group.
    """
    parts = [[i for i in clips if inside[i]] for inside in (groups or {}).values()]
    parts, chosen = [part for part in parts if part] or [list(clips)], []
    for k, part in enumerate(parts):
        share = n // len(parts) + (k < n % len(parts))
        places = (np.arange(share) + 0.5) * len(part) / max(share, 1)  # (share,)
        chosen += [part[place] for place in np.unique(places.astype(int))]
    return chosen


def page(cells: list[list[np.ndarray]], labels: list[list[str]], titles: list[str], height: int):
    """Pictures uint8 (H, W, 3) in rows and columns, a label below each (three lines at most), a title above
    each column -> PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    font, gap, line = ImageFont.load_default(13), 8, 16
    H, W, _ = cells[0][0].shape
    width, how = round(W * height / H), Image.Resampling.NEAREST if H < height else Image.Resampling.LANCZOS
    lines = [
        [textwrap.wrap(label, max(12, width // 7), max_lines=3, placeholder=" ...") for label in row]
        for row in labels
    ]
    below = line * max(len(text) for row in lines for text in row) + gap
    image = Image.new(
        "RGB", ((width + gap) * len(titles) + gap, (height + below) * len(cells) + line + 2 * gap), "white"
    )
    draw = ImageDraw.Draw(image)
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        draw.text((left, gap), title, "black", ImageFont.load_default(14))
        for row, (pictures, texts) in enumerate(zip(cells, lines, strict=True)):
            top = line + 2 * gap + row * (height + below)
            image.paste(Image.fromarray(pictures[column]).resize((width, height), how), (left, top))
            draw.multiline_text(
                (left, top + height + 1), "\n".join(texts[column]), (70, 70, 70), font, spacing=2
            )
    return image


def strip(video: np.ndarray) -> np.ndarray:
    """First, middle and last frame beside each other, a white column either side of each."""
    frames = [
        np.pad(video[t], ((0, 0), (1, 1), (0, 0)), constant_values=255) for t in (0, len(video) // 2, -1)
    ]
    return np.concatenate(frames, 1)


def contact_sheet(
    file: Path, rows: list[list[np.ndarray]], labels: list[list[str]], titles: list[str], height: int = 112
) -> None:
    """Of each video uint8 (F, H, W, 3) three moments, a row a clip, a column a method."""
    with written_whole(file) as part:
        page([[strip(video) for video in row] for row in rows], labels, titles, height).save(part)


def grid_gif(
    file: Path,
    rows: list[list[np.ndarray]],
    labels: list[list[str]],
    titles: list[str],
    seconds: float,
    height: int = 144,
) -> None:
    """The videos themselves in rows and columns, as one GIF that lasts `seconds` and repeats."""
    n = max(len(video) for row in rows for video in row)
    rows = [[video[uniform_frames(len(video), n)] for video in row] for row in rows]
    first, *others = [
        page([[video[t] for video in row] for row in rows], labels, titles, height) for t in range(n)
    ]
    with written_whole(file) as part:
        first.save(part, save_all=True, append_images=others, duration=round(1000 * seconds / n), loop=0)

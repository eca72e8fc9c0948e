"""CIFTI files by their axes: which column is which grayordinate, and how far apart the volumes are."""

import numpy as np
import pytest
from mini_releases import GRAYORDINATES, brain_model, cifti_header, cifti_start, write_cifti

from prepare import cifti
from prepare.cifti import read_cifti

VOLUMES = 6
EVERY = slice(None)


@pytest.fixture(scope="module")
def run() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((VOLUMES, GRAYORDINATES), dtype=np.float32)


@pytest.fixture(scope="module")
def standard():
    return brain_model()


def series(step: float = 2.0, unit: str = "SECOND"):
    from nibabel.cifti2 import SeriesAxis

    return SeriesAxis(0, step, VOLUMES, unit)


def parts(axis) -> dict:
    """The axis of each structure, by its name."""
    return {name.removeprefix("CIFTI_STRUCTURE_"): part for name, _, part in axis.iter_structures()}


def joined(pieces):
    first, *others = pieces
    for piece in others:
        first = first + piece
    return first


def test_each_distinct_header_is_parsed_once(run, tmp_path, monkeypatch):
    from nibabel.cifti2.parse_cifti2 import Cifti2Parser

    header = cifti_header(VOLUMES, 0.8), cifti_header(VOLUMES)  # made before, as that parses too
    parsed, parse = [], Cifti2Parser.parse
    monkeypatch.setattr(cifti, "_known", {})
    monkeypatch.setattr(Cifti2Parser, "parse", lambda self, **how: parsed.append(1) or parse(self, **how))
    for name in ("a", "b"):
        write_cifti(tmp_path / f"{name}.dtseries.nii", run)
        assert np.array_equal(read_cifti(tmp_path / f"{name}.dtseries.nii", EVERY, 2.0), run)
    assert len(parsed) == 1
    write_cifti(tmp_path / "c.dtseries.nii", run, header[0])
    assert np.array_equal(read_cifti(tmp_path / "c.dtseries.nii", [3, 70_000], 0.8), run[:, [3, 70_000]])
    assert len(parsed) == 2


def test_columns_in_another_order_are_put_in_the_standard_order(run, standard, tmp_path):
    """Subcortex first; vertices of a cortex backwards; voxels as fMRIPrep once wrote them (k fastest)."""
    structures = parts(standard)
    cortex = [structures["CORTEX_LEFT"][::-1], structures["CORTEX_RIGHT"]]
    deep = []
    for name, part in structures.items():
        if not name.startswith("CORTEX"):
            order = np.lexsort(part.voxel.T[::-1])  # by i first
            deep.append(part[order])
    axis = joined([*deep[::-1], *cortex[::-1]])
    place = {}
    for i in range(GRAYORDINATES):
        place[standard.name[i], standard.vertex[i], *standard.voxel[i]] = i
    shuffled = [place[axis.name[i], axis.vertex[i], *axis.voxel[i]] for i in range(GRAYORDINATES)]
    file = tmp_path / "shuffled.dtseries.nii"
    write_cifti(file, run[:, shuffled], cifti_start(series(), axis))
    assert np.array_equal(read_cifti(file, EVERY, 2.0), run)
    some = np.array([59_411, 5, 90_000])
    assert np.array_equal(read_cifti(file, some, 2.0), run[:, some])
    assert np.array_equal(read_cifti(file, slice(59_412), 2.0), run[:, :59_412])


def test_volumes_of_the_other_orientation_are_the_same_places(run, standard, tmp_path):
    """The HCP counts i from right to left; a file that counts from left to right lists other numbers."""
    from nibabel.cifti2 import BrainModelAxis

    flip = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    pieces, order = [], []
    for name, where, part in standard.iter_structures():
        numbers = np.arange(GRAYORDINATES)[where]
        if "CORTEX" not in name:
            voxel = part.voxel * [-1, 1, 1] + [90, 0, 0]
            rows = np.lexsort(voxel.T)
            part = BrainModelAxis(name, voxel=voxel[rows], affine=flip, volume_shape=(91, 109, 91))
            numbers = numbers[rows]
        pieces.append(part)
        order.append(numbers)
    file = tmp_path / "flipped.dtseries.nii"
    write_cifti(file, run[:, np.concatenate(order)], cifti_start(series(), joined(pieces)))
    assert np.array_equal(read_cifti(file, EVERY, 2.0), run)


def other_structures(standard):
    """59,412 cortical vertices, and as many grayordinates in all, but one structure under another's name."""
    structures = parts(standard)
    structures["PUTAMEN_LEFT"].name[:] = "CIFTI_STRUCTURE_OTHER"
    return joined(structures.values())


def other_vertices(standard):
    structures = parts(standard)
    right = structures["CORTEX_RIGHT"]
    right.vertex[-1] = np.setdiff1d(np.arange(32_492), right.vertex)[-1]
    return joined(structures.values())


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (other_structures, "found 0 columns for CIFTI_STRUCTURE_PUTAMEN_LEFT, wanted 1,060"),
        (other_vertices, r"found vertices .* in CIFTI_STRUCTURE_CORTEX_RIGHT, wanted .* of 32,492"),
    ],
)
def test_other_grayordinates_are_refused_with_both_named(run, tmp_path, axis, said):
    file = tmp_path / "other.dtseries.nii"
    write_cifti(file, run, cifti_start(series(), axis(brain_model())))
    with pytest.raises(ValueError, match=f"other.dtseries.nii: {said}: take the 91k CIFTI-2 files"):
        read_cifti(file, EVERY, 2.0)


@pytest.mark.parametrize(
    ("step", "unit", "said"),
    [
        (0.72, "SECOND", "found a volume every 0.72 s, wanted one every 2 s"),
        (2000.0, "SECOND", "found a volume every 2000 s, wanted one every 2 s"),  # milliseconds
        (2.0, "HERTZ", "found a series in HERTZ, wanted one in SECOND"),
    ],
)
def test_another_step_or_unit_is_refused(run, standard, tmp_path, step, unit, said):
    file = tmp_path / "run.dtseries.nii"
    write_cifti(file, run, cifti_start(series(step, unit), standard))
    with pytest.raises(ValueError, match=f"run.dtseries.nii: {said}: download it again"):
        read_cifti(file, EVERY, 2.0)


def test_the_exponent_of_the_step_counts(run, tmp_path):
    """2,000 with the exponent -3 is 2 s."""
    header = cifti_header(VOLUMES)
    for before, after in ((b'Exponent="0"', b'Exponent="-3"'), (b'Step="2"', b'Step="2000"')):
        assert before in header
        header = header.replace(before, after)
    assert header[-4:] == b"\0\0\0\0"  # what pads the end makes room
    file = tmp_path / "run.dtseries.nii"
    write_cifti(file, run, header[:-4])
    assert np.array_equal(read_cifti(file, slice(5), 2.0), run[:, :5])


def test_scaled_and_big_endian_files_are_read(run, standard, tmp_path):
    import nibabel

    stored = np.arange(VOLUMES * GRAYORDINATES).reshape(VOLUMES, -1).astype(">i2")
    image = nibabel.Cifti2Image(stored, nibabel.Cifti2Header.from_axes((series(), standard)))
    image.nifti_header.set_data_dtype(np.int16)
    written = bytearray(image.to_bytes())
    start = nibabel.Nifti2Header(bytes(written[:540]))
    start.set_slope_inter(0.5, 3)
    written[:540] = start.binaryblock
    file = tmp_path / "scaled.dtseries.nii"
    file.write_bytes(bytes(written))
    kept = [0, 7, 91_281]
    assert np.array_equal(read_cifti(file, kept, 2.0), stored[:, kept].astype(np.float32) * 0.5 + 3)

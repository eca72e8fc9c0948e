"""Recordings: preprocessing, the choice of voxels, fmri.npy."""

import json

import numpy as np
import pytest
import scipy.stats
from conftest import sha256

from prepare import fmri
from prepare.fmri import fisher_z, prepare_fmri, preprocess_run, reproducible_voxels
from prepare.release import Release
from support.files import writing_array


def bold(voxels: int):
    """245 volumes as a scanner gives them: a level near 1e4, a drift and a signal of a percent of it."""
    rng, time = np.random.default_rng(0), np.linspace(0, 1, 245)[:, None]
    drift = sum(rng.normal(0, 300, (1, voxels)) * time**k for k in range(1, 5))
    level, signal = rng.uniform(5e3, 2e4, (1, voxels)), rng.normal(0, 40, (245, voxels))
    return (level + drift + signal).astype(np.float32)


def polyfit(run, start, length, order):
    time, columns = np.arange(length), []
    for voxel in run[start : start + length].T.astype(np.float64):
        rest = voxel - np.polyval(np.polyfit(time, voxel, order), time)
        columns.append((rest - rest.mean()) / rest.std())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(("start", "length", "order", "layout"), [(3, 240, 4, "F"), (4, 100, 0, "C")])
def test_preprocess_run_equals_polyfit_per_voxel(start, length, order, layout):
    run = np.array(bold(voxels=1500), order=layout)
    untouched = run.copy()
    response = preprocess_run(run, start, length, order)
    assert response.dtype == np.float32 and response.shape == (length, 1500)
    assert np.abs(response[:, ::5] - polyfit(run[:, ::5], start, length, order)).max() < 1e-4
    assert np.array_equal(run, untouched)


def test_voxels_without_a_signal_are_nan_and_harm_no_other():
    run = bold(voxels=8)
    clean = preprocess_run(run, 3, 240)
    run[:, 0], run[:, 1], run[:, 2] = 0, 12_345.678, 9_000 + 0.01 * np.arange(245) ** 2
    run[200, 3], run[7, 4], run[244, 5] = np.nan, np.inf, np.nan  # volume 244 is outside the window
    response = preprocess_run(run, 3, 240)
    assert np.isnan(response[:, :5]).all() and np.array_equal(response[:, 5:], clean[:, 5:])
    # 3dDetrend -polort A: 1 + floor(seconds / 150); 4 at cc2017's 480 s (§4.1)
    assert [fmri.detrending_degree(seconds) for seconds in (149, 150, 480)] == [1, 2, 4]


def test_selection_equals_scipy_voxel_by_voxel():
    """Of six segments, shown twice each; 20 of 60 voxels share half of their variance."""
    rng, pairs = np.random.default_rng(0), []
    for _ in range(6):
        shared = rng.normal(size=(240, 60)) * (np.arange(60) < 20)
        pair = [shared + rng.normal(size=shared.shape) for _ in range(2)]
        pairs.append([preprocess_run(run.astype(np.float32), 0, 240) for run in pair])
    pairs[2][0][:, 5] = np.nan
    mask, tested = reproducible_voxels([fisher_z(*pair) for pair in pairs])
    keep = np.zeros(60, bool)
    for v in (v for v in range(60) if v != 5):
        z = [np.arctanh(scipy.stats.pearsonr(a[:, v], b[:, v]).statistic) for a, b in pairs]
        keep[v] = scipy.stats.ttest_1samp(z, 0).pvalue < 0.05 / 59 and np.mean(z) > 0
    assert 0 < keep.sum() < 20  # the bar is where it matters
    assert np.array_equal(mask, keep) and tested == 59
    opposite = [fisher_z(first, -second) for first, second in pairs]  # as reliable
    assert not reproducible_voxels(opposite)[0].any()
    assert np.isfinite(fisher_z(pairs[0][0], -pairs[0][0])).all()  # a correlation of -1
    with pytest.raises(ValueError, match="1 training segments were shown twice, wanted 2 or more"):
        reproducible_voxels(opposite[:1])


pytestmark = pytest.mark.filterwarnings("ignore:Precision loss")


class Film(Release):
    """Runs of 70 volumes, segments of other lengths; 6 voxels respond, 2 are noise, one is constant."""

    splits = {"train": ["seg1", "seg2", "seg3"], "test": ["test1", "test2"]}
    windows = {"seg1": (3, 50), "seg2": (4, 60), "seg3": (5, 52), "test1": (3, 46), "test2": (6, 48)}
    voxels = np.arange(9) * 10 + 7, np.array([f"L_{n}" for n in range(9)])
    TR = 5.0  # 50 volumes are 250 s: a parabola goes
    silent = None  # (segment, showing, voxel) that fell out

    def repeats(self, segment):
        return 3 if segment.startswith("test") else 2

    def window(self, segment):
        return self.windows[segment]

    def files(self, segment):
        return sorted(self.raw.glob(f"{segment}_*"))

    def load_run(self, segment, repeat):
        if (segment, repeat) in (("seg3", 1), ("test2", 2)):
            return None
        number = [*self.windows].index(segment)
        rng, time = np.random.default_rng([number, repeat]), np.linspace(-1, 1, 70)[:, None]
        run = np.random.default_rng(number).normal(0, 100, (70, 9)) + rng.normal(0, 0.01, (70, 9))
        run[:, [2, 6]] = rng.normal(0, 100, (70, 2))
        run = 1e4 + run + 900 * time - 500 * time**2
        run[:, 4] = 1e4
        if self.silent and self.silent[:2] == (segment, repeat):
            run[30, self.silent[2]] = np.nan
        return run.astype(np.float32)


@pytest.fixture
def film(tmp_path):
    (tmp_path / "raw").mkdir()
    for segment in Film.windows:
        for repeat in (1, 2):
            (tmp_path / "raw" / f"{segment}_{repeat}.nii").write_text(f"{segment} {repeat}")
    return Film(tmp_path / "raw", 1)


KEPT = [0, 1, 3, 5, 7, 8]  # those that respond


def test_each_volume_comes_to_its_clip(film, tmp_path):
    """Segments in order, showings apart, each run freed of its own trend; what was not recorded is NaN."""
    prepare_fmri(film, out := tmp_path / "out", {"delay": 2}, window=3)
    voxels = np.load(out / "voxels.npz")
    assert voxels["index"].tolist() == [7, 17, 37, 57, 77, 87]
    assert voxels["roi"].tolist() == [f"L_{n}" for n in KEPT]
    for split, sizes in (("train", (162, 2, 3, 6)), ("test", (94, 3, 3, 6))):
        prepared = np.load(out / split / "fmri.npy")
        assert prepared.shape == sizes and prepared.dtype == np.float32
        rows = 0
        for segment in film.splits[split]:
            start, length = film.windows[segment]
            for repeat in range(sizes[1]):
                part, run = prepared[rows : rows + length, repeat], film.load_run(segment, repeat)
                if run is None:
                    assert np.isnan(part).all()
                    continue
                z = polyfit(run[:, KEPT], start, length, order=1 + length * 5 // 150)
                for t in range(3):  # at the end of a segment its last volume stands for those after it
                    later = z[np.minimum(np.arange(length) + t, length - 1)]
                    np.testing.assert_allclose(part[:, t], later, atol=1e-4)
            rows += length
        entry = json.loads((out / split / "manifest.json").read_text())["fmri.npy"]
        names = [f"{segment}_{repeat}.nii" for segment in film.splits[split] for repeat in (1, 2)]
        assert entry["recipe"] == {"delay": 2} and [*entry["inputs"]] == names
        assert entry["inputs"][names[-1]] == sha256(film.raw / names[-1])


def test_what_is_prepared_is_not_prepared_again_and_nothing_stale_is_taken(film, tmp_path, monkeypatch):
    prepare_fmri(film, out := tmp_path / "out", {"delay": 2})
    content = np.load(out / "train" / "fmri.npy")
    with monkeypatch.context() as patch:
        patch.setattr(Film, "load_run", None)  # nothing is read
        prepare_fmri(film, out, {"delay": 2})
    with pytest.raises(ValueError, match="train/fmri.npy was made with delay = 2, but delay = 3 is"):
        prepare_fmri(film, out, {"delay": 3})
    film.splits = Film.splits | {"test": ["test1"]}
    with pytest.raises(ValueError, match="test/fmri.npy has 94 clips, but 46 are asked for; delete it"):
        prepare_fmri(film, out, {"delay": 2})
    film.splits = Film.splits
    for lost in ("voxels.npz", "test/fmri.npy"):
        (out / lost).unlink()
        prepare_fmri(film, out, {"delay": 2})
        again = np.load(out / "train" / "fmri.npy")
        assert (out / lost).is_file() and np.array_equal(again, content, equal_nan=True)


def test_runs_without_signal_are_no_data(film, tmp_path):
    film.silent = ("test2", 1, 3)
    message = r"raw/test2_2.nii: 1 of the 6 voxels kept .*showing 2 of test2, the first at index 37: download"
    with pytest.raises(ValueError, match=message):
        prepare_fmri(film, tmp_path / "out", {})
    assert not (tmp_path / "out" / "test" / "fmri.npy").exists()
    film.silent = ("seg2", 1, 3)  # in a training run it is not chosen
    assert fmri.select_voxels(film)[0].nonzero()[0].tolist() == [0, 1, 5, 7, 8]


def test_the_recording_of_another_subject_is_refused(tmp_path):
    class Subjects(Release):
        def recording(self, subject):
            return sorted(self.raw.glob(f"{subject}-*"))

    source, data = Subjects(tmp_path, 2), tmp_path / "data" / "sub2"
    for name, content in {"2-a": "run", "2-b": "and run", "6-a": "run", "6-b": "or run"}.items():
        (tmp_path / name).write_text(content)
    fmri.refuse_twins(source, data)  # the first of 6 is equal, the second is not
    file = data.with_name("sub1") / "train" / "fmri.npy"  # prepared beside it
    with writing_array(file, (1,), "float32", {}, {"2-b": sha256(tmp_path / "2-b")}):
        pass
    with pytest.raises(ValueError, match="subjects 2 and 1 .*/2-a and .*sub1/train/fmri.npy: .*--allow"):
        fmri.refuse_twins(source, data)

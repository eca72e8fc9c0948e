"""Recordings and stimuli: preprocessing, voxel selection, the two releases of cc2017, films; and bad
input."""

import shutil
import tracemalloc
from fractions import Fraction
from pathlib import Path

import mini_releases
import numpy as np
import pytest
import scipy.stats
import torch

from prepare import fmri
from prepare.captions import read_captions
from prepare.cc2017 import NeuroClipsRelease, PurdueRelease, load_pt
from prepare.fmri import detrending_degree, fisher_z, load_response, preprocess_run, reproducible_voxels
from prepare.release import Release
from support.videos import check_film, read_clip, read_clips
from toy.release import ToyRelease, make_toy, toy_recipe
from toy.subject import VERSION

# ---------------------------------------------------------------- preprocessing


def bold(volumes=245, voxels=300, seed=0):
    """Raw BOLD as a scanner gives it: a level near 1e4, a drift and a signal of a percent of it."""
    rng, time = np.random.default_rng(seed), np.linspace(0, 1, volumes)[:, None]
    drift = sum(rng.normal(0, 300, (1, voxels)) * time**k for k in range(1, 5))
    return (rng.uniform(5e3, 2e4, (1, voxels)) + drift + rng.normal(0, 40, (volumes, voxels))).astype(
        np.float32
    )


def polyfit(run, start, length, order):
    """The same, voxel by voxel."""
    time, columns = np.arange(length), []
    for voxel in run[start : start + length].T.astype(np.float64):
        rest = voxel - np.polyval(np.polyfit(time, voxel, order), time)
        columns.append((rest - rest.mean()) / rest.std())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(("start", "length", "order"), [(3, 240, 4), (0, 245, 2), (4, 100, 0)])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_preprocess_run_equals_polyfit_per_voxel(start, length, order, layout):
    run = np.array(bold(voxels=1500), order=layout)
    before = run.copy()
    response = preprocess_run(run, start, length, order)
    assert response.dtype == np.float32 and response.shape == (length, 1500)
    assert np.abs(response[:, ::5] - polyfit(run[:, ::5], start, length, order)).max() < 1e-4
    assert np.abs(response.mean(0)).max() < 1e-5 and np.abs(response.std(0) - 1).max() < 1e-5
    assert np.array_equal(run, before)


def test_voxels_without_a_signal_are_nan_and_harm_no_other():
    run = bold(voxels=8)
    clean = preprocess_run(run, 3, 240)
    time = np.arange(245)
    run[:, 0], run[:, 1], run[:, 2] = 0, 12_345.678, 9_000 + 0.01 * time**2
    run[200, 3], run[7, 4], run[244, 5] = np.nan, np.inf, np.nan  # volume 244 is outside the window
    response = preprocess_run(run, 3, 240)
    assert np.isnan(response[:, :5]).all()
    assert np.array_equal(response[:, 5:], clean[:, 5:])


def test_preprocess_run_refuses_a_window_outside_the_run():
    with pytest.raises(ValueError, match=r"\[6, 246\).*245 volumes"):
        preprocess_run(bold(), 6, 240)


def test_preprocess_run_needs_little_beyond_its_result():
    run = bold(voxels=20_000)
    tracemalloc.start()
    response = preprocess_run(run, 3, 240)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < response.nbytes + 10e6


# ---------------------------------------------------------------- selection


def showings(segments=18, volumes=240, voxels=2000, planted=100, seed=0):
    """Per segment two showings; the first `planted` voxels share half of their variance."""
    rng = np.random.default_rng(seed)
    for _ in range(segments):
        shared = rng.normal(size=(volumes, voxels)) * (np.arange(voxels) < planted)
        yield [
            preprocess_run((shared + rng.normal(size=shared.shape)).astype(np.float32), 0, volumes)
            for _ in "12"
        ]


def test_selection_equals_scipy_voxel_by_voxel():
    pairs = list(showings(segments=6, voxels=60, planted=20))
    pairs[2][0][:, 5] = np.nan
    found = reproducible_voxels([fisher_z(*pair) for pair in pairs])
    keep, mean_z = np.zeros(60, bool), np.full(60, np.nan)
    for v in (v for v in range(60) if v != 5):
        z = [np.arctanh(scipy.stats.pearsonr(a[:, v], b[:, v]).statistic) for a, b in pairs]
        mean_z[v] = np.mean(z)
        keep[v] = scipy.stats.ttest_1samp(z, 0).pvalue < 0.05 / 59 and mean_z[v] > 0
    assert 0 < keep.sum() < 20  # the bar is where it matters
    assert np.array_equal(found.mask, keep)
    np.testing.assert_allclose(found.mean_z, mean_z, atol=1e-5)
    assert (found.tested, found.dropped, found.kept) == (59, 1, keep.sum())


def test_selection_finds_the_planted_voxels_and_no_other():
    z = [fisher_z(*pair) for pair in showings()]
    found = reproducible_voxels(z)
    assert np.array_equal(np.flatnonzero(found.mask), np.arange(100))
    against = reproducible_voxels([-one for one in z])  # as reliable, but opposite
    assert against.kept == 0


def test_selection_says_when_it_has_nothing_to_test():
    z = [fisher_z(*pair) for pair in showings(segments=2, voxels=5, planted=5)]
    with pytest.raises(ValueError, match="1 training segments.*at least 2"):
        reproducible_voxels(z[:1])
    with pytest.raises(ValueError, match="each of the 5 voxels"):
        reproducible_voxels([one * np.nan for one in z])


# ---------------------------------------------------------------- the Purdue release


@pytest.fixture(scope="module")
def purdue(tmp_path_factory):
    """4 training segments shown twice, one test segment shown once: 9 true CIFTI files, 0.8 GB for the time
    of the tests."""
    folder = tmp_path_factory.mktemp("purdue")
    yield mini_releases.write_purdue(folder, train_segments=4, test_segments=1, test_repeats=1)
    shutil.rmtree(folder)


@pytest.fixture
def empty_release(tmp_path):
    """The complete tree of the release, of empty files."""
    for name, repeats in [(f"seg{i}", 2) for i in range(1, 19)] + [(f"test{i}", 10) for i in range(1, 6)]:
        folder = tmp_path / "subject1" / "fmri" / name / "cifti"
        folder.mkdir(parents=True)
        for repeat in range(1, repeats + 1):
            (folder / f"{name}_{repeat}_Atlas.dtseries.nii").touch()
        (tmp_path / "stimuli").mkdir(exist_ok=True)
        (tmp_path / "stimuli" / f"{name}.mp4").touch()
    return tmp_path


@pytest.mark.filterwarnings("ignore:Precision loss")  # of scipy: the planted voxels have hardly any noise
def test_planted_voxels_are_selected_from_true_cifti_files(purdue):
    source = PurdueRelease(purdue.folder, subject=1, train_segments=4, test_segments=1)
    found = fmri.select_voxels(source)
    assert np.array_equal(np.flatnonzero(found.mask), purdue.planted)
    assert (found.tested, found.dropped) == (59_412 - len(purdue.broken), len(purdue.broken))
    index, areas = source.voxels
    assert np.array_equal(index, np.arange(59_412)) and len(set(areas)) == 360
    assert {area[2:] for area in areas[found.mask]} == mini_releases.VISUAL


def test_clip_t_is_volume_t(purdue):
    source = PurdueRelease(purdue.folder, subject=1, train_segments=4, test_segments=1)
    for segment, number in [("seg2", 1), ("test1", 4)]:
        response = load_response(source, segment, 0)[:, purdue.planted]
        expected = scipy.stats.zscore(purdue.pattern[mini_releases.shown(number)])
        match = [
            np.corrcoef(np.roll(expected, lag, 0).ravel(), response.ravel())[0, 1] for lag in range(-3, 4)
        ]
        assert np.argmax(match) == 3 and match[3] > 0.99
    late = PurdueRelease(purdue.folder, subject=1, delay=3, train_segments=4, test_segments=1)
    shifted = load_response(late, "seg2", 0)[:, purdue.planted]
    expected = scipy.stats.zscore(purdue.pattern[mini_releases.shown(1)])
    assert np.corrcoef(shifted[:-1].ravel(), expected[1:].ravel())[0, 1] > 0.99


def test_stimuli_and_captions_of_the_release(purdue):
    contents = np.stack([frames.mean(0) for frames, _, _ in mini_releases.contents(64)])  # (12, H, W, 3)
    source = PurdueRelease(purdue.folder, subject=1, train_segments=4, test_segments=1)
    seen = []
    for clip in source.read_clips("seg3"):
        assert clip.shape == (60, 64, 64, 3) and clip.dtype == np.uint8
        seen.append(np.abs(contents - clip.mean(0)).mean((1, 2, 3)).argmin())
    assert np.array_equal(seen, mini_releases.shown(2))
    assert len(purdue.captions.read_text(encoding="utf-8").splitlines()) == 5 * 240


def test_windows_keep_240_volumes_after_trimming_and_delay(empty_release):
    source = PurdueRelease(empty_release, subject=1)
    assert len(source.splits["train"]) == 18 and len(source.splits["test"]) == 5
    assert (source.repeats("seg1"), source.repeats("test1")) == (2, 10)
    for segment, window in [("seg1", (3, 243)), ("test1", (3, 243)), ("test2", (4, 244))]:
        start, length = source.window(segment)
        assert (start, start + length) == window
    assert PurdueRelease(empty_release, subject=1, delay=0).window("test5") == (2, 240)
    with pytest.raises(ValueError, match="--delay 5"):
        PurdueRelease(empty_release, subject=1, delay=5)


def test_a_missing_segment_is_an_error_and_a_missing_repeat_a_warning(empty_release):
    folder = empty_release / "subject1" / "fmri" / "test2" / "cifti"
    (folder / "test2_9_Atlas.dtseries.nii").unlink()
    source = PurdueRelease(empty_release, subject=1)
    with pytest.warns(UserWarning, match="test2_9_Atlas.dtseries.nii"):
        assert source.load_run("test2", 8) is None
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="test2.*cifti.*test2_1_Atlas.dtseries.nii"):
        PurdueRelease(empty_release, subject=1)
    PurdueRelease(empty_release, subject=1, test_segments=1)  # not asked for, not missed
    (empty_release / "stimuli" / "seg18.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="seg18.mp4"):
        PurdueRelease(empty_release, subject=1, test_segments=1)
    with pytest.raises(FileNotFoundError, match="no subject2/fmri below it"):
        PurdueRelease(empty_release, subject=2)


def test_a_run_of_another_length_is_an_error_that_names_it(empty_release):
    source = PurdueRelease(empty_release, subject=1)
    run = np.random.default_rng(0).standard_normal((245, 91_282), dtype=np.float32)
    mini_releases.write_cifti(source.run_file("seg1", 0), run)
    read = source.load_run("seg1", 0)
    assert read.dtype == np.float32 and np.array_equal(read, run[:, :59_412])
    source.run_file("seg1", 0).rename(source.run_file("test2", 3))  # wants 246
    with pytest.raises(ValueError, match=r"test2_4_Atlas.*\(245, 91282\).*\(246, 91282\)"):
        source.load_run("test2", 3)
    source.run_file("test2", 3).unlink()  # 90 MB


def test_a_truncated_cifti_file_is_an_error_that_names_it(empty_release):
    source = PurdueRelease(empty_release, subject=1)
    path = source.run_file("seg1", 1)
    mini_releases.write_cifti(path, np.zeros((245, 91_282), np.float32))
    size = path.stat().st_size
    for length in (size - 1, size // 2, 600_000, 300_000, 5_000, 545, 300, 0):  # in data, XML and header
        with path.open("r+b") as file:
            file.truncate(length)
        with pytest.raises(
            ValueError, match="seg1_2_Atlas.dtseries.nii: found .*wanted .*: download it again"
        ):
            source.load_run("seg1", 1)


# ---------------------------------------------------------------- where the archives lie


def unpacked(tree, raw):
    """The release's tree as the archives of the publisher unpack; returns the folders of recordings and
    films."""
    runs = raw / "10_4231_R7X63K3M" / "video_fmri_dataset"
    films = raw / "10_4231_R71Z42KK" / "video_fmri_dataset"
    for folder, name in ((runs, "subject1"), (films, "stimuli")):
        folder.mkdir(parents=True)
        (tree / name).rename(folder / name)
    return runs / "subject1", films / "stimuli"


def test_the_archives_are_read_where_they_were_unpacked(empty_release, tmp_path):
    raw = tmp_path / "raw"
    runs, films = unpacked(empty_release, raw)
    source = PurdueRelease(raw, subject=1)
    assert source.run_file("seg1", 0) == runs / "fmri" / "seg1" / "cifti" / "seg1_1_Atlas.dtseries.nii"
    assert source.stimulus("test5") == [films / "test5.mp4"] and len(source.files("test5")) == 10
    assert source.recording(1) == [source.run_file("seg1", 0)] and source.recording(2) == []
    assert PurdueRelease(raw / "..", subject=1).runs.resolve() == source.runs.resolve()  # a folder further up
    for place in (
        raw / "__MACOSX" / "stimuli",
        raw / ".Trash" / "stimuli",
    ):  # what a system hides is no release
        place.mkdir(parents=True)
    hidden = runs / "fmri" / "seg1" / "cifti" / "._seg1_1_Atlas.dtseries.nii"
    hidden.touch()
    source = PurdueRelease(raw, subject=1)
    assert hidden not in source.files("seg1") and len(source.files("seg1")) == 2
    (raw / "old" / "stimuli").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="10_4231.*stimuli and .*old/stimuli both look like the release's stimuli"
    ):
        PurdueRelease(raw, subject=1)


def test_a_bundle_that_is_packed_still_is_named(tmp_path):
    (tmp_path / "10_4231_R7X63K3M").mkdir()
    (tmp_path / "10_4231_R7X63K3M" / "bundle.zip").touch()
    with pytest.raises(
        FileNotFoundError, match="no subject1/fmri below it.*unpack .*R7X63K3M/bundle.zip where it lies"
    ):
        PurdueRelease(tmp_path, subject=1)


# ---------------------------------------------------------------- what is not finite


class Run(PurdueRelease):
    """A release whose runs are made up: 4 voxels that respond alike to each showing."""

    voxels = np.arange(4) * 10, np.full(4, "L_V1")

    def load_run(self, segment, repeat):
        film = np.random.default_rng(int(segment[-1])).normal(size=(246, 4))
        noise = np.random.default_rng([repeat, int(segment[-1])]).normal(size=(246, 4))
        run = (1e4 + 100 * film + noise).astype(np.float32)
        if segment == "test1" and repeat == 3:
            run[100, 2] = np.nan
        return run


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_a_voxel_without_signal_in_a_test_run_names_the_releases_file(empty_release, tmp_path):
    source = Run(empty_release, subject=1)
    wanted = r"test1_4_Atlas.dtseries.nii: 1 of the 4 voxels kept .*showing 4 of test1, the first at index 20"
    with pytest.raises(ValueError, match=wanted):
        fmri.prepare_fmri(source, tmp_path / "out", {})
    assert not (tmp_path / "out" / "test" / "fmri.npy").exists()


# ---------------------------------------------------------------- the NeuroClips release


def test_neuroclips_release(tmp_path):
    mini = mini_releases.write_neuroclips(tmp_path, subject=3)
    source = NeuroClipsRelease(tmp_path, subject=3, train_segments=2, test_segments=1)
    assert (source.repeats("seg1"), source.repeats("test1"), source.preprocessed) == (2, 10, True)
    fmri = torch.load(tmp_path / "subj03_train_fmri.pt", weights_only=True).numpy()
    run = load_response(source, "seg2", 1)
    assert np.array_equal(run, fmri[240:480, 1])
    expected = mini.pattern[mini_releases.shown(1)]
    assert np.corrcoef(expected.ravel(), run.ravel())[0, 1] > 0.8
    assert source.window("seg2") == (0, 240)
    assert set(source.voxels[1]) == {"unknown"} and len(source.voxels[0]) == fmri.shape[2]
    contents = mini_releases.contents(32)
    told = read_captions(tmp_path / "GT_test_caption.pt", ["test1"])
    assert [row["caption"] for row in told] == [contents[k][1] for k in mini_releases.shown(2)]
    clips = list(source.read_clips("test1"))
    assert len(clips) == 240 and all(
        np.array_equal(c, contents[k][0]) for c, k in zip(clips, mini_releases.shown(2), strict=True)
    )


def test_neuroclips_release_bad_input(tmp_path):
    mini_releases.write_neuroclips(tmp_path, train_segments=1)
    options = {"subject": 1, "train_segments": 1, "test_segments": 1}
    with pytest.raises(ValueError, match="--delay 9: wanted 0 to 4 volumes of 2 s"):
        NeuroClipsRelease(tmp_path, delay=9, **options)
    with pytest.raises(ValueError, match="subj01_train_fmri.pt has 240 clips, wanted 4320"):
        NeuroClipsRelease(tmp_path, subject=1)
    with pytest.raises(FileNotFoundError, match="subj02_train_fmri.pt"):
        NeuroClipsRelease(tmp_path, subject=2)
    source = NeuroClipsRelease(tmp_path, **options)
    torch.save(torch.full((240, 6, 3, 8, 8), 127.0), tmp_path / "GT_test_3fps.pt")
    with pytest.raises(ValueError, match=r"GT_test_3fps.pt.*127.*wanted \[0, 1\]"):
        next(source.read_clips("test1"))
    path = tmp_path / "subj01_test_fmri.pt"
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"subj01_test_fmri.pt: found 50,000 bytes, truncated"):
        NeuroClipsRelease(tmp_path, **options)


def test_a_delay_of_the_neuroclips_recordings_shifts_them_within_a_segment(tmp_path):
    mini_releases.write_neuroclips(tmp_path)
    sizes = {"subject": 1, "train_segments": 2, "test_segments": 1}
    plain, late = NeuroClipsRelease(tmp_path, **sizes), NeuroClipsRelease(tmp_path, delay=2, **sizes)
    for segment in ("seg2", "test1"):
        a, b = plain.load_run(segment, 1), late.load_run(segment, 1)
        assert np.array_equal(b[:-2], a[2:]) and np.array_equal(b[-2:], a[[-1, -1]])
    assert (plain.delay, late.delay) == (None, 2)


def test_a_value_that_is_not_finite_names_the_neuroclips_file(tmp_path):
    mini_releases.write_neuroclips(tmp_path)
    fmri_file = tmp_path / "subj01_test_fmri.pt"
    values = torch.load(fmri_file, weights_only=True)
    values[7, 3, 5] = float("inf")
    torch.save(values, fmri_file)
    source = NeuroClipsRelease(tmp_path, 1, train_segments=2, test_segments=1)
    source.load_run("test1", 2)
    with pytest.raises(
        ValueError,
        match=r"subj01_test_fmri.pt\[0:240, 3\]: found inf at \(7, 5\), wanted finite .*: download it again",
    ):
        source.load_run("test1", 3)


class Unsafe:
    """Its pickle runs code when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("kind", ["code", "objects"])
def test_a_pt_file_that_needs_pickle_is_refused(tmp_path, kind):
    marker, path = tmp_path / "ran", tmp_path / "GT_test_caption.pt"
    torch.save(Unsafe(marker) if kind == "code" else np.array(["a", Fraction(1)], dtype=object), path)
    with pytest.raises(ValueError, match="GT_test_caption.pt needs pickle.*weights_only=False"):
        load_pt(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"<html>not here</html>", b"", b"PK", b"\x80\x02."])
def test_what_is_no_pt_file_is_named(tmp_path, content):
    path = tmp_path / "GT_test_caption.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="GT_test_caption.pt"):
        load_pt(path)


# ---------------------------------------------------------------- the toy world's release


def test_the_toy_world_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    made = []

    def write_release(folder, seed):
        (folder / "stimuli").mkdir(parents=True)
        made.append(folder)
        yield "seg1_1"
        if len(made) == 1:
            raise OSError("disk full")
        (folder / "captions.jsonl").write_text('{"split": "train", "segment": "seg1"}\n' * 3)

    monkeypatch.setattr("toy.release.write_release", write_release)
    raw = tmp_path / "toy" / "raw"
    with pytest.raises(OSError, match="disk full"):
        make_toy(raw)
    assert not [*raw.parent.iterdir()]
    make_toy(raw)
    make_toy(raw)
    assert len(made) == 2 and [*raw.parent.iterdir()] == [raw]
    assert ToyRelease(raw).splits == {"train": ["seg1"], "test": []} and ToyRelease(raw).window("seg1") == (
        3,
        3,
    )
    (raw / "captions.jsonl").write_text('{"split": "train"}\n')
    with pytest.raises(ValueError, match="captions.jsonl, line 1: found no segment.*delete the folder"):
        ToyRelease(raw)
    assert toy_recipe(1)["world"] == VERSION
    for older in ('{"version": 1}', None):
        (raw / "version.json").unlink() if older is None else (raw / "version.json").write_text(older)
        with pytest.raises(
            ValueError, match=f"raw is of another version of the toy world, wanted {VERSION}: delete"
        ):
            make_toy(raw)


# ---------------------------------------------------------------- video


def write_ramp(path, frames, rate, faststart, size=32):
    """A video whose frame i has the grey level i mod 200, with B-frames, which are stored out of order."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "0", "g": "50", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = size, size, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((size, size, 3), 20 + i % 200, np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def levels(clip):
    return clip.mean((1, 2, 3)) - 20


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(30_000, 1001), Fraction(25)])
def test_clips_hold_the_frames_of_their_two_seconds(tmp_path, rate):
    video, seconds = tmp_path / "film.mp4", 10
    write_ramp(video, round(seconds * rate), rate, faststart=True)
    clips = list(read_clips(video, 5))
    for k, clip in enumerate(clips):
        wanted = [i % 200 for i in range(round(seconds * rate)) if 2 * k <= i / rate < 2 * k + 2]
        assert len(clip) == len(wanted) and np.abs(levels(clip) - wanted).max() < 2  # YUV rounds
        assert np.array_equal(clip, read_clip(video, 2 * k))
    assert len(list(read_clips(video, 3))) == 3  # more film than clips


def test_a_video_that_is_too_short_or_damaged_is_an_error_that_names_it(tmp_path):
    video = tmp_path / "seg1.mp4"
    write_ramp(video, 300, 30, faststart=True)
    with pytest.raises(ValueError, match=r"seg1.mp4: found 10.0 s, wanted 480.0 s: download it again"):
        next(read_clips(video, 240))
    whole = video.read_bytes()
    for part in (0.3, 0.6, 0.9):
        video.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ValueError, match=r"seg1.mp4: found .*, wanted .*: download it again"):
            list(read_clips(video, 5))
    with pytest.raises(ValueError, match="seg1.mp4: found .*, wanted .*: download it again"):
        read_clip(video, 8)
    write_ramp(video, 300, 30, faststart=False)  # the index stands at the end
    video.write_bytes(video.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="seg1.mp4: found .*, wanted a whole video: download it again"):
        read_clip(video, 0)
    video.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="seg1.mp4: found .*, wanted .*: download it again"):
        next(read_clips(video, 5))


def test_a_film_of_another_rate_or_length_is_an_error(tmp_path):
    film = tmp_path / "seg1.mp4"
    write_ramp(film, 250, 25, faststart=True)
    check_film(film, fps=25, seconds=10, over=1)
    check_film(film, fps=25, seconds=9.5, over=1)
    for fps, seconds in ((30, 10), (25, 11), (25, 8)):
        with pytest.raises(
            ValueError,
            match=f"seg1.mp4: found 10.0 s at 25.00 frames a second, wanted {seconds}.0 s at {fps}.00",
        ):
            check_film(film, fps, seconds, over=1)


def test_the_stimuli_can_be_rendered_without_the_real_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_releases, "SHARED", tmp_path)
    clips = mini_releases.contents(48)
    assert (
        len({frames.tobytes() for frames, _, _ in clips}) == len({caption for _, caption, _ in clips}) == 12
    )
    assert all(frames.shape == (6, 48, 48, 3) and tags for frames, _, tags in clips)


# ---------------------------------------------------------------- the slow trend


@pytest.mark.parametrize("seconds, degree", [(480, 4), (200, 2), (160, 2), (149, 1), (150, 2), (1080, 8)])
def test_the_degree_of_the_trend_is_afnis(seconds, degree):
    """3dDetrend -polort A: 1 + floor(seconds / 150); 4 at cc2017's 480 s (§4.1)."""
    assert detrending_degree(seconds) == degree


def test_a_run_is_freed_of_the_trend_of_its_own_length():
    """Of 240 volumes of 2 s a quartic goes, of 80 a parabola and no more."""

    class Source(Release):
        def window(self, segment):
            return 0, int(segment)

        def load_run(self, segment, repeat):
            t = np.linspace(-1, 1, int(segment))
            noise = 0.1 * np.random.default_rng(0).standard_normal((len(t), 2))
            return (1000 + np.stack([t**2, t**4 - t**2], 1) * 100 + noise).astype(np.float32)

    t = np.linspace(-1, 1, 240)
    assert abs(np.corrcoef(load_response(Source(Path(), 1), "240", 0)[:, 1], t**4 - t**2)[0, 1]) < 0.2
    short = load_response(Source(Path(), 1), "80", 0)
    t = np.linspace(-1, 1, 80)
    assert abs(np.corrcoef(short[:, 1], t**4 - t**2)[0, 1]) > 0.5  # a quartic stays
    assert abs(np.corrcoef(short[:, 0], t**2)[0, 1]) < 0.2

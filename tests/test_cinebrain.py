"""CineBrain: regions on the real atlas, a miniature of the release (`short`: episodes of 6 clips), bad input."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from mini_releases import contents, raw_run, shown, write_cinebrain

from prepare import facts
from prepare.captions import describe_clips
from prepare.cifti import mmp_areas
from prepare.cinebrain import CineBrainRelease
from prepare.command import main
from prepare.facts import AUDITORY_AND_LANGUAGE, ROIS, in_areas

RUN = "sub_000{0}/dtseries/sub-000{0}_task-shape_run-{1}_space-fsLR_den-91k_bold.dtseries.nii"
CSV = "sub_000{0}/beh_data/sub_000{0}_{1}.csv"


def test_the_regions_have_the_published_sizes_on_the_real_atlas():
    areas = mmp_areas()
    sizes = [in_areas(areas, names).sum() for names in ROIS.values()]
    assert [*ROIS] == ["visual", "hippocampus", "mpfc"] and sizes == [8_405, 1_559, 3_240]
    assert all(in_areas(areas, [name]).any() for name in chain(*ROIS.values()))  # each is one of the atlas
    # values of a published volume of visual, auditory and language areas
    assert in_areas(areas, ROIS["visual"] + AUDITORY_AND_LANGUAGE.split()).sum() == 18_946


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(facts, "EPISODE_CLIPS", 6)
    monkeypatch.setattr(facts, "EPISODE_VOLUMES", 30)


@pytest.mark.parametrize(("subject", "last", "folder"), [(3, 29, "stimuli"), (2, 19, "stimuli-1-2-6")])
def test_the_command_prepares_each_volume_of_the_release(short, stimuli, tmp_path, subject, last, folder):
    """z-scores over all volumes of a subject's episodes; zero for voxels that are constant, as published."""
    mini = write_cinebrain(tmp_path / "release", subject)  # runs 1, 2, 19
    texts = mini / "captions-qwen-2.5-vl-7b.json"
    command = ["cinebrain", "--raw", str(mini), "--subject", str(subject), "--test-segments", "1"]
    main([*command, "--train-segments", "2"])
    data = tmp_path / "data" / "cinebrain" / f"sub{subject}"
    voxels, areas = np.load(data / "voxels.npz"), mmp_areas()
    chosen = np.flatnonzero(in_areas(areas, [*chain(*ROIS.values())]))
    assert np.array_equal(voxels["index"], chosen) and np.array_equal(voxels["roi"], areas[chosen])
    raw = []  # 30 volumes an episode, from the first one on that begins 4 s or more after the film
    for run in (1, 2, 19):
        volumes = raw_run(mini / RUN.format(subject, run), 10 + run + 30 + 4)
        raw.append(np.array(volumes[10 + run : 10 + run + 30, chosen], np.float64))
    x = np.concatenate(raw)
    with np.errstate(invalid="ignore"):
        z = np.nan_to_num((x - x.mean(0)) / x.std(0, ddof=1))
    for split, part, runs in (("train", z[:60], (1, 2)), ("test", z[60:], (19,))):
        fmri = np.load(data / split / "fmri.npy")
        assert fmri.shape == (len(part) // 5, 1, 5, len(chosen))
        np.testing.assert_allclose(fmri.reshape(part.shape), part, atol=1e-4)
        entry = json.loads((data / split / "manifest.json").read_text())["fmri.npy"]
        names = [name.format(subject, run).split("/")[-1] for run in runs for name in (RUN, CSV)]
        recipe = {"release": "CineBrainRelease", "subject": subject, "delay": 5, "window": 5}
        assert [*entry["inputs"]] == names and entry["recipe"] == recipe
    (source, place, captions, *_), _ = stimuli[0]
    assert place == Path("data/cinebrain", folder) and set(captions.values()) == {texts}
    assert source.splits == {"train": ["episode01", "episode02"], "test": [f"episode{last}"]}
    for split, episodes in (("train", [1, 2]), ("test", [last])):
        lines = describe_clips(source, split, texts)
        numbers = [6 * (e - 1) + k for e in episodes for k in range(6)]
        assert [line["video"] for line in lines] == [f"{number:06d}.mp4" for number in numbers]
        order = np.concatenate([shown(episode, 6) for episode in episodes])
        assert [line["caption"] for line in lines] == [contents(48)[k][1] for k in order]
        assert lines[3]["id"] == f"episode{episodes[0]:02d}-003" and lines[3]["start_s"] == 0
    pictures = np.stack([frames.mean(0) for frames, _, _ in contents(48)])
    for k, clip in zip(shown(last, 6), source.read_clips(f"episode{last}"), strict=True):
        assert clip.shape == (33, 48, 48, 3)
        assert np.abs(pictures - clip.mean(0)).mean((1, 2, 3)).argmin() == k


@pytest.mark.filterwarnings("ignore:.*no CIFTI")
def test_preprocessed_volumes_are_taken_as_they_are(short, stimuli, tmp_path):
    mini = write_cinebrain(tmp_path / "raw", kind="volumes")
    command = ["cinebrain", "--raw", "raw", "--subject", "3", "--train-segments", "2", "--test-segments", "1"]
    with pytest.warns(UserWarning, match="no CIFTI runs of subject 3: visual areas only, and no hippocampus"):
        main(command)
    data, areas = Path("data/cinebrain/sub3"), mmp_areas()
    visual = np.flatnonzero(in_areas(areas, ROIS["visual"]))
    assert np.array_equal(np.load(data / "voxels.npz")["index"], visual)
    for split, runs in (("train", (1, 2)), ("test", (19,))):  # each volume is 1,000 x run + its number
        fmri = np.load(data / split / "fmri.npy")
        assert fmri.shape == (6 * len(runs), 1, 5, 8_405) and np.ptp(fmri, axis=3).max() == 0
        assert np.array_equal(fmri[..., 0].ravel(), np.ravel([1_000 * run + np.arange(30) for run in runs]))
        recipe = json.loads((data / split / "manifest.json").read_text())["fmri.npy"]["recipe"]
        assert recipe["recordings"] == "preprocessed volumes" and recipe["delay"] is None
    with pytest.raises(ValueError, match="--delay 5: the preprocessed volumes of raw are delayed already"):
        main([*command, "--delay", "5"])
    source = CineBrainRelease(tmp_path / "raw", 3, None, 2, 1)
    folder = mini / "sub-0003" / "visual_audio"
    assert source.recording(3) == [folder / f"{k}.npy" for k in range(30)] and not source.recording(4)
    wide = np.flatnonzero(in_areas(areas, ROIS["visual"] + AUDITORY_AND_LANGUAGE.split()))  # (18946,)
    np.save(folder / "37.npy", wide / 4.0)  # the grayordinates' numbers: the visual ones are picked
    assert np.array_equal(source.load_run("episode02", 0)[7] * 4, visual)
    for bad, message in (
        (np.zeros(8_404), "8,404 numbers, wanted 8,405 or 18,946"),
        (np.full(8_405, np.nan), "nan at .0,., wanted finite .*"),
    ):
        np.save(folder / "37.npy", bad)
        with pytest.raises(ValueError, match=f"visual_audio/37.npy: found {message}: unpack"):
            source.load_run("episode02", 0)
    (folder / "37.npy").unlink()
    with pytest.raises(FileNotFoundError, match="episode02 is not .*wanted .*/30.npy to 59.npy"):
        CineBrainRelease(tmp_path / "raw", 3, None, 2, 1)


def tree(folder, *subjects: int):
    """The complete release of empty films, and of runs whose film lasts from 12 s on."""
    (folder / "videos").mkdir()
    for number in range(30 * facts.EPISODE_CLIPS):
        (folder / "videos" / f"{number:06d}.mp4").touch()
    times = f"videoStartTime,videoStopTime\n12.0,{12.05 + facts.EPISODE_VOLUMES * 0.8}\n"
    for name, text in ((RUN, "a run"), (CSV, times)):
        for file in [folder / name.format(subject, run) for subject in subjects for run in range(1, 21)]:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)


def test_the_clips_of_the_test_set_are_those_of_the_authors(tmp_path):
    """get_metric.py: 7560-8099 of subject 5; 18 minutes are 1,350 volumes of 0.8 s and 270 clips of 4 s."""
    tree(tmp_path, 5, 1)
    for subject, second, test in ((5, 5_400, range(7_560, 8_100)), (1, 2_700, range(4_860, 5_400))):
        source = CineBrainRelease(tmp_path, subject)
        numbers = {}
        for split, episodes in source.splits.items():
            numbers[split] = [int(source.video(e, k)[0].stem) for e in episodes for k in range(270)]
        assert numbers["test"] == list(test)
        assert numbers["train"] == [*range(2_700), *range(second, test[0])] and len(numbers["train"]) == 4_860
        assert source.stimulus("episode02") == [tmp_path / "videos" / f"{n:06d}.mp4" for n in range(270, 540)]
        runs = [source.files(episode) for episode in source.segments]
        expected = [[tmp_path / name.format(subject, run) for name in (RUN, CSV)] for run in range(1, 21)]
        assert runs == expected and source.recording(6 - subject) == [tmp_path / RUN.format(6 - subject, 1)]
        assert source.window(source.splits["test"][1]) == (21, 1_350) and source.clips_of("episode01") == 270
    folders = [facts.stimuli_folder("cinebrain", subject).name for subject in range(1, 7)]
    assert [k for k, name in enumerate(folders, 1) if name == "stimuli-1-2-6"] == [1, 2, 6]


def test_a_film_begins_with_the_first_volume_after_its_delay_and_lasts_18_minutes(short, tmp_path):
    tree(tmp_path, 4)
    for start, delay, first in (
        (12.7, None, 21),  # 16.7 s lie in volume 20
        (12.9, None, 22),  # 16.9 s lie in volume 21
        (0.0, 3, 4),  # 2.4 s, though in floating-point numbers 3 x 0.8 is more
    ):
        times = f"other,videoStopTime,videoStartTime\n1,{start + 24.1},{start}\n2,3,4\n"
        (tmp_path / CSV.format(4, 3)).write_text(times)
        assert CineBrainRelease(tmp_path, 4, delay).window("episode03") == (first, 30)
    for line, message in (
        ("nan,36.0", "the video lasts nan s"),
        ("-9.0,15.0", "the video lasts 24.0 s from -9.0 s on, wanted 24.0 s: is it the CSV of this run"),
        ("12.0,37.7", "the video lasts 25.7 s"),
        ("12.0", "wanted a line of numbers videoStartTime"),
    ):
        (tmp_path / CSV.format(4, 3)).write_text(f"videoStartTime,videoStopTime\n{line}\n")
        with pytest.raises(ValueError, match=f"sub_0004_3.csv: .*{message}"):
            CineBrainRelease(tmp_path, 4).window("episode03")


def test_what_is_missing_or_there_twice_is_named(short, tmp_path):
    tree(tmp_path, 1, 5)
    (tmp_path / CSV.format(5, 7)).unlink()
    message = r"episode07 is not there whole: wanted .*sub_0005/dtseries/\*_run-7_.* and beh_data/\*_7.csv; download"
    with pytest.raises(FileNotFoundError, match=message):
        CineBrainRelease(tmp_path, 5)
    CineBrainRelease(tmp_path, 5, None, 6, 2)  # not asked for, not missed
    (tmp_path / "videos" / "000011.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="000011.mp4 is not there .1 clips of episode02.: unpack"):
        CineBrainRelease(tmp_path, 1)
    run = tmp_path / RUN.format(5, 1)
    run.with_name(f"._{run.name}").touch()  # hidden: no second one
    CineBrainRelease(tmp_path, 5, None, 1, 1)
    run.with_name(f"ses-1_{run.name}").touch()
    with pytest.raises(ValueError, match="ses-1.*run-1.* and .*/sub-0005.*run-1.* both look like run 1"):
        CineBrainRelease(tmp_path, 5, None, 1, 1)
    mini = write_cinebrain(tmp_path / "release")
    nearly, past = (CineBrainRelease(mini, 3, delay, 2, 1) for delay in (9, 10))
    assert np.isfinite(nearly.load_run("episode02", 0)).all()  # 4 volumes follow the response
    with pytest.raises(ValueError, match="_run-2_.* has 46 volumes, wanted 47: start, delay and 18 minutes"):
        past.load_run("episode02", 0)

"""cc2017: both releases as miniatures on real formats, prepared by the README's command."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import sha256
from mini_releases import contents, planted_voxels, raw_run, shown, write_neuroclips, write_purdue
from test_preprocessing import polyfit

from prepare import cc2017
from prepare.captions import read_captions
from prepare.cc2017 import NeuroClipsRelease, NeuroClipsWithFilms, PurdueRelease
from prepare.cifti import mmp_areas
from prepare.command import main
from prepare.fmri import load_response
from support.videos import write_video

FEW = {"train_segments": 3, "test_segments": 2}


@pytest.fixture(scope="module")
def purdue(tmp_path_factory):
    """3 + 2 segments in the folders that the publisher's archives unpack to, all shown twice."""
    return write_purdue(tmp_path_factory.mktemp("purdue") / "raw", **FEW, size=16)


@pytest.fixture(scope="module")
def neuroclips(tmp_path_factory):
    return write_neuroclips(tmp_path_factory.mktemp("neuroclips"), **FEW, size=16)


PT_FILES = "subj01_{}_fmri.pt", "GT_{}_caption.pt"


@pytest.fixture
def empty_release(tmp_path):
    """Empty files of seg1 and test1 of the Purdue release."""
    (tmp_path / "stimuli").mkdir()
    for name in ("seg1", "test1"):
        (folder := tmp_path / "subject1" / "fmri" / name / "cifti").mkdir(parents=True)
        for file in (folder / f"{name}_1_Atlas.dtseries.nii", tmp_path / "stimuli" / f"{name}.mp4"):
            file.touch()
    return tmp_path


@pytest.mark.filterwarnings("ignore:Precision loss", "ignore:.*showing of test. is masked")
def test_the_command_prepares_each_volume_of_the_release(purdue, stimuli, tmp_path, monkeypatch, capsys):
    """Trimmed by 1 volume (2 of test2), delayed by 2; eight of the ten showings are not in the miniature."""
    monkeypatch.setattr(cc2017, "CORTEX", 2_000)
    command = ["cc2017", "--raw", str(purdue), "--train-segments", "3", "--test-segments", "2"]
    with pytest.raises(FileNotFoundError, match="--viclip gone.pth is not there"):  # beforehand
        main([*command, "--viclip", "gone.pth"])
    main([*command, "--decoder", "wan", "--caption-sentences", "2"])
    data = tmp_path / "data" / "cc2017"
    voxels, (planted, _) = np.load(data / "sub1" / "voxels.npz"), planted_voxels(step=16)
    kept = planted[planted < 2_000]
    assert np.array_equal(voxels["index"], kept) and np.array_equal(voxels["roi"], mmp_areas()[kept])
    recipe = {"release": "PurdueRelease", "subject": 1, "delay": 2, "window": 1}
    for split, segments, repeats in (("train", 3, 2), ("test", 2, 10)):
        fmri = np.load(data / "sub1" / split / "fmri.npy")
        assert fmri.shape == (240 * segments, repeats, 1, len(kept)) and np.isnan(fmri[:, 2:]).all()
        assert (np.load(data / "sub1" / split / "recorded.npy") == (np.arange(repeats) < 2)).all()
        entry = json.loads((data / "sub1" / split / "manifest.json").read_text())["fmri.npy"]
        assert entry["recipe"] == recipe and len(entry["inputs"]) == 2 * segments
        for number, segment in enumerate([*range(segments)] * 2):
            name, repeat = f"{split.replace('train', 'seg')}{segment + 1}", number // segments
            volumes, start = (246, 4) if name == "test2" else (245, 3)
            (file,) = purdue.rglob(f"subject1/**/{name}_{repeat + 1}_Atlas.dtseries.nii")
            expected = polyfit(raw_run(file, volumes)[:, kept], start, 240, 4)
            np.testing.assert_allclose(fmri[240 * segment :][:240, repeat, 0], expected, atol=2e-3)
            assert entry["inputs"][file.name] == sha256(file)
    (encoded, more), copies, decoder = stimuli
    captions = dict.fromkeys(("train", "test"), purdue / "captions.jsonl")
    assert encoded[1:3] == (data.relative_to(tmp_path) / "stimuli", captions) and more == {"sentences": 2}
    assert encoded[3:] == ("ViT-L-14-quickgelu/openai", "OpenGVLab/ViCLIP")
    assert copies == encoded[1] and decoder[1:] == (encoded[1], "wan", (57, 624, 624), 2)
    assert f"sub1/train/fmri.npy  float32 (720, 2, 1, {len(kept)})" in capsys.readouterr().out
    twin = purdue / "subject2"
    twin.symlink_to(purdue / "10_4231_R7X63K3M" / "video_fmri_dataset" / "subject1")
    with pytest.raises(ValueError, match="subjects 2 and 1 have identical .*subject2.* and .*subject1"):
        main([*command, "--subject", "2"])
    assert not (data / "sub2").exists()
    main([*command, "--subject", "2", "--allow-duplicate-subject"])
    assert (data / "sub2" / "test" / "fmri.npy").is_file()
    assert stimuli[-2][0][1] == encoded[1]  # they share their stimuli
    twin.unlink()


def test_windows_keep_240_volumes_after_trimming_and_delay_and_what_is_missing_is_named(empty_release):
    source = PurdueRelease(empty_release, subject=1)
    assert (source.repeats("seg1"), source.repeats("test1")) == (2, 10)
    late = {f"test{n}": (4, 240) for n in (2, 3, 4, 5)}
    windows = {segment: source.window(segment) for segment in source.segments}
    assert windows == dict.fromkeys(source.segments, (3, 240)) | late
    assert PurdueRelease(empty_release, 1, delay=0).window("test5") == (2, 240)
    PurdueRelease(empty_release, 1, delay=4)
    for delay in (5, -1):
        with pytest.raises(ValueError, match=f"--delay {delay}: wanted 0 to 4 volumes of 2 s"):
            PurdueRelease(empty_release, 1, delay)
    with pytest.warns(UserWarning, match="test1_9_Atlas.dtseries.nii is not there; this showing of"):
        assert source.load_run("test1", 8) is None
    few = PurdueRelease(empty_release, 1, train_segments=1, test_segments=1)
    assert few.film == (30, 480, 5)  # frames a second, seconds, and how many more it may last
    few.film = 30, 2, 1
    for name, seconds in (("seg1", 3), ("test1", 4)):
        write_video(few.films / f"{name}.mp4", np.zeros((30 * seconds, 16, 16, 3), np.uint8), 30)
    with pytest.raises(ValueError, match=r"test1.mp4: found 4.0 s at 30.00 .*, wanted 2.0 s"):
        few.check()
    few.run_file("test1", 0).unlink()
    with pytest.raises(FileNotFoundError, match="test1_1_Atlas.*: no recording of test1: download it"):
        few.check()
    (few.films / "seg1.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="seg1.mp4: no film of seg1: download it"):
        few.check()
    with pytest.raises(FileNotFoundError, match="no subject2/fmri below it.*unpack bundle.zip"):
        PurdueRelease(empty_release, subject=2)


def test_the_archives_are_read_where_they_were_unpacked(purdue, empty_release):
    source = PurdueRelease(purdue, 1, **FEW)
    assert source.load_run("seg2", 1).dtype == np.float32
    source.run_file("seg2", 1).rename(file := source.run_file("test2", 5))  # 245 volumes, where test2 has 246
    with pytest.raises(ValueError, match=r"test2_6_Atlas.*\(245, 91282\).*\(246, 91282\)"):
        source.load_run("test2", 5)
    file.rename(source.run_file("seg2", 1))
    assert source.recording(1) == [source.run_file("seg1", 0)] and source.recording(2) == []
    upper = PurdueRelease(purdue / "..", 1, **FEW)  # a folder further up
    place = "10_4231_R7X63K3M/video_fmri_dataset/subject1/fmri"
    assert upper.runs.resolve() == (purdue / place).resolve()
    for hidden in ("__MACOSX", ".Trash"):  # what a system hides is no release
        (empty_release / hidden / "stimuli").mkdir(parents=True)
    double = empty_release / "subject1" / "fmri" / "seg1" / "cifti" / "._seg1_1_Atlas.dtseries.nii"
    double.touch()
    assert [file.name for file in PurdueRelease(empty_release, 1).files("seg1")] == [double.name[2:]]
    (empty_release / "old" / "stimuli").mkdir(parents=True)
    with pytest.raises(ValueError, match="old/stimuli and .*stimuli both look like the release's stimuli"):
        PurdueRelease(empty_release, 1)


def test_the_neuroclips_release_is_read_segment_by_segment(neuroclips, monkeypatch):
    source, late = (NeuroClipsRelease(neuroclips, 1, delay, **FEW) for delay in (None, 2))
    source.check()
    files, lists = ({s: neuroclips / name.format(s) for s in ("train", "test")} for name in PT_FILES)
    assert (source.repeats("seg1"), source.repeats("test1"), source.preprocessed) == (2, 10, True)
    assert source.window("seg2") == (0, 240) and source.clips_of("seg2") == 240
    for segment, split, first in (("seg1", "train", 0), ("seg3", "train", 480), ("test2", "test", 240)):
        values = torch.load(files[split], weights_only=True).numpy()
        for repeat in (0, values.shape[1] - 1):
            run, shifted = (load_response(release, segment, repeat) for release in (source, late))
            assert run.dtype == np.float32 and np.array_equal(run, values[first : first + 240, repeat])
            assert np.array_equal(shifted, run[[*range(2, 240), 239, 239]])  # within the segment
        assert source.files(segment) == [files[split]]
        clips, order = [*source.read_clips(segment)], shown(source.segments.index(segment))
        assert clips[0].dtype == np.uint8
        assert all(np.array_equal(clip, contents(16)[k][0]) for clip, k in zip(clips, order, strict=True))
    assert (source.recipe["delay"], late.recipe["delay"]) == (None, 2)
    assert source.recording(1) == [files["train"]] and source.recording(2) == []
    assert set(source.voxels[1]) == {"unknown"} and np.array_equal(source.voxels[0], np.arange(96))
    captions = [row["caption"] for row in read_captions(lists["test"], source.splits["test"])]
    assert source.captions == lists
    assert captions == [contents(16)[k][1] for k in np.concatenate([shown(3), shown(4)])]
    monkeypatch.setattr(NeuroClipsRelease, "complete", {"train": (3, 240), "test": (2, 240)})
    few = NeuroClipsRelease(neuroclips, 1, train_segments=2, test_segments=1)  # the first of them
    few.check()
    assert few.segments == ["seg1", "seg2", "test1"]
    assert all(np.array_equal(few.load_run(name, 1), source.load_run(name, 1)) for name in few.segments)


def test_recordings_of_neuroclips_go_with_the_films_of_purdue(purdue, neuroclips, stimuli, tmp_path):
    both = NeuroClipsWithFilms(neuroclips, purdue, 1, **FEW)
    pt, films = NeuroClipsRelease(neuroclips, 1, **FEW), PurdueRelease(purdue, 1, **FEW)
    both.check()
    assert both.name == "NeuroClipsRelease"
    assert np.array_equal(next(both.read_clips("seg2")), next(films.read_clips("seg2")))
    with pytest.raises(FileNotFoundError, match="seg1.mp4"):
        NeuroClipsWithFilms(neuroclips, tmp_path, 1, **FEW).check()
    command = ["cc2017", "--fmri-release", str(neuroclips), "--raw", str(purdue)]
    command += ["--train-segments", "3", "--test-segments", "2"]
    (tmp_path / "train.json").write_text(json.dumps(["a dog"] * 720))
    (tmp_path / "test.json").write_text(json.dumps(["a dog"] * 479))
    with pytest.raises(ValueError, match="test.json has 479 captions for the 480 test clips of 2 segments"):
        main([*command, "--captions", "train.json", "test.json"])
    assert not stimuli and not [*tmp_path.rglob("*.npy")]
    main(command)
    values = torch.load(neuroclips / "subj01_test_fmri.pt", weights_only=True).numpy()
    assert np.array_equal(np.load("data/cc2017/sub1/test/fmri.npy")[:, :, 0], values)
    ((source, _, captions, *_), _), _ = stimuli
    assert source.stimulus("seg1") == films.stimulus("seg1") and captions == pt.captions


FMRI, FILMS, SHAPE = "subj01_test_fmri.pt", "GT_test_3fps.pt", (480, 6, 3, 8, 8)
PT_FAULTS = [  # file of the test set, its value, what the error says
    (FMRI, torch.zeros(480, 10, 95), r"found float32 of shape \(240, 95\), wanted .*, 96 voxels"),
    (FMRI, torch.zeros(480, 10), r"found float32 of shape \(480, 10\), wanted floating-point"),
    (FMRI, ["a list"], "found list, wanted a Tensor"),
    (FMRI, torch.full((480, 10, 96), torch.inf), r"found inf at \(0, 0\), wanted finite .*: download"),
    (FILMS, torch.full(SHAPE, 1.1), r"found pixels in \[1.1, 1.1\], wanted \[0, 1\]"),
    (FILMS, torch.zeros(480, 3, 6, 8, 8), r"found float32 of shape \(480, .*, wanted .*any, 6, 3, any, any"),
]


def test_bad_input_of_the_neuroclips_release_is_named(neuroclips, tmp_path):
    folder = shutil.copytree(neuroclips, tmp_path / "release", copy_function=os.link)
    for segments, clips in ((18, 4320), (2, 480)):
        message = f"subj01_train_fmri.pt: found 720 clips, wanted {clips} .{segments} seg"
        with pytest.raises(ValueError, match=message):
            NeuroClipsRelease(folder, 1, train_segments=segments, test_segments=2)
    with pytest.raises(FileNotFoundError, match="subj02_train_fmri.pt is not there"):
        NeuroClipsRelease(folder, 2, **FEW)
    for name, value, message in PT_FAULTS:
        (folder / name).rename(tmp_path / name)
        torch.save(value, folder / name)
        with pytest.raises(ValueError, match=rf"{name}(\[0:240, 0\])?: {message}"):
            source = NeuroClipsRelease(folder, 1, **FEW)
            source.check()
            load_response(source, "test1", 0)
            next(source.read_clips("test1"))
        (tmp_path / name).rename(folder / name)
    torch.save(torch.full(SHAPE, 7, dtype=torch.uint8), tmp_path / FILMS)  # as uint8 they are what they are
    os.replace(tmp_path / FILMS, folder / FILMS)
    assert np.unique(next(NeuroClipsRelease(folder, 1, **FEW).read_clips("test1"))).tolist() == [7]
    for content in (b"<html>not here</html>", b"PK"):
        (folder / "GT_test_caption.pt").unlink()
        (folder / "GT_test_caption.pt").write_bytes(content)
        with pytest.raises(ValueError, match="caption.pt: found .* wanted a tensor, or .*: download it"):
            read_captions(folder / "GT_test_caption.pt", [])

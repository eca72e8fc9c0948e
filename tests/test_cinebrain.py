"""CineBrain: regions on the real atlas, a miniature of the release through every script, and what happens to
bad input."""

import json
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import REPO
from mini_releases import CINEBRAIN_VISUAL, CLIP_SHAPE, EPISODE_CLIPS, contents, write_cinebrain
from tiny import L, wan_pipeline

import evaluate
import metrics.options
import train_stage1
import train_stage2
from data import Clips
from prepare import command
from prepare.captions import describe_clips
from prepare.cifti import mmp_areas
from prepare.cinebrain import CineBrainRelease
from prepare.copies import prepare_recorded
from prepare.decoder import prepare_decoder
from prepare.facts import AUDITORY_AND_LANGUAGE, GRAYORDINATES, ROIS, in_areas, stimuli_folder
from prepare.fmri import prepare_fmri, refuse_twins
from support.files import hashes, writing_array
from support.videos import read_video

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

ENCODERS = ["--clip", f"local-dir:{REPO / 'toy' / 'clip'}", "--viclip", str(REPO / "toy" / "viclip")]
FEW = ["--train-segments", "1", "--test-segments", "1"]
SIZE = (9, 32, 32)


def prepare(*args: object) -> None:
    command.main(["cinebrain", *map(str, args), *FEW, *ENCODERS])


# ---------------------------------------------------------------- regions


def test_the_regions_have_the_published_sizes_on_the_real_atlas(capsys):
    areas = mmp_areas()
    assert len(areas) == GRAYORDINATES
    size = {roi: {name: int(in_areas(areas, [name]).sum()) for name in names} for roi, names in ROIS.items()}
    with capsys.disabled():
        print("\n".join(f"\n{roi}: {sum(n.values()):,}  {n}" for roi, n in size.items()))
    assert all(n > 0 for names in size.values() for n in names.values())  # every name is one of the atlas
    assert {roi: sum(n.values()) for roi, n in size.items()} == {
        "visual": 8_405,
        "hippocampus": 1_559,
        "mpfc": 3_240,
    }
    assert size["visual"]["V1"] == 1_618 and size["visual"]["MT"] == 100 and size["mpfc"]["25"] == 117
    assert ROIS["visual"] == CINEBRAIN_VISUAL and len(ROIS["mpfc"]) == 15
    assert size["hippocampus"] == {"hippocampus_left": 764, "hippocampus_right": 795}
    everything = ROIS["visual"] + AUDITORY_AND_LANGUAGE.split()
    assert (
        in_areas(areas, everything).sum() == 18_946
    )  # values of a published volume of visual, auditory and language areas


# ---------------------------------------------------------------- the miniature through the scripts


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_cinebrain(tmp_path_factory.mktemp("cinebrain") / "raw")


@pytest.fixture(scope="module")
def world(release, tmp_path_factory):
    """The working directory: subject 3 prepared from CIFTI runs, with latents and text of a tiny decoder."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    wan_pipeline().save_pretrained(root / "wan")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the toy CLIP does not know the words of real captions
        patch.chdir(root)
        prepare("--raw", release.folder, "--subject", 3)
        source = CineBrainRelease(release.folder, 3, train_segments=1, test_segments=1)
        prepare_decoder(source, root / "data" / "cinebrain" / "stimuli", "wan", SIZE)
    return root


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def test_the_prepared_files_are_those_of_the_contract(here, release):
    folder = here / "data" / "cinebrain"
    voxels = np.load(folder / "sub3" / "voxels.npz")
    index, roi = voxels["index"], voxels["roi"]
    assert len(index) == 8_405 + 1_559 + 3_240 and set(release.planted) <= set(index)
    assert {"L_V1", "R_FFC", "hippocampus_left", "hippocampus_right", "L_10r", "R_25"} <= set(roi)
    where, told = np.searchsorted(index, release.planted), [caption for _, caption, _ in contents(48)]
    for split, first, number in (("train", 0, 1), ("test", 7560, 29)):
        fmri = np.load(folder / "sub3" / split / "fmri.npy", mmap_mode="r")
        assert fmri.shape == (EPISODE_CLIPS, 1, 5, len(index)) and np.isfinite(fmri).all()
        x, order = np.array(fmri[:, 0][..., where]), (np.arange(EPISODE_CLIPS) + 5 * number) % 12
        expected = scipy.stats.zscore(
            (release.pattern[order][:, None] * CLIP_SHAPE[:, None]).reshape(-1, len(where))
        )  # (volumes, planted)
        match = [np.corrcoef(np.roll(expected, lag, 0).ravel(), x.ravel())[0, 1] for lag in range(-3, 4)]
        assert np.argmax(match) == 3 and match[3] > 0.9  # clip t is its own five volumes
        clips = [json.loads(line) for line in open(folder / "stimuli" / split / "clips.jsonl")]
        assert [clip["video"] for clip in clips] == [f"{first + k:06d}.mp4" for k in range(EPISODE_CLIPS)]
        assert [clip["caption"] for clip in clips] == [told[k] for k in order]
        assert clips[3]["id"] == f"episode{number:02d}-003" and clips[3]["start_s"] == 0
        assert np.load(folder / "stimuli" / split / "e_img.npy").shape == (EPISODE_CLIPS, 8, 64)
    both = np.concatenate(
        [np.load(folder / "sub3" / split / "fmri.npy")[:, 0] for split in ("train", "test")]
    ).reshape(-1, len(index))
    responds = np.isin(index, release.planted)
    assert (
        np.abs(both[:, responds].mean(0)).max() < 1e-4
        and np.abs(both[:, responds].std(0, ddof=1) - 1).max() < 1e-4
    )
    assert not both[:, ~responds].any()  # constant: zero, as published
    assert not list(folder.rglob("*.part*"))


def test_training_and_evaluation_run_on_it(here, release):
    common = ["--data", "cinebrain", "--subject", "3"]
    small = f"--steps 60 --tokens {L} --width 32 --layers 2 --attention_heads 4 --batch_size 90 --lr 1e-3"
    train_stage1.main(train_stage1.parse([*common, *small.split()]))
    run = here / "runs" / "cinebrain" / "sub3" / "full-s0"
    scores = json.loads((run / "stage1" / "test.json").read_text())["fmri"]
    assert scores["category mAP"] > 0.9
    assert scores["image top-5"] > 0.1  # by chance 0.02; each of the 12 contents is 22 or 23 clips
    config = json.loads((run / "stage1" / "config.json").read_text())
    brain = json.loads((run / "stage1" / "brain_model" / "config.json").read_text())
    assert config["rois"] == "visual,hippocampus"
    assert (brain["voxels"], brain["volumes"]) == (8_405 + 1_559, 5)
    sizes = "--frames 9 --height 32 --width 32 --epochs 1 --batch_size 90 --micro_batch 45 --samples 1"
    options = "--attention_heads 4 --lora_rank 4 --save_every 100 --sampling_steps 2 --decoder wan"
    train_stage2.main(train_stage2.parse([*common, *sizes.split(), *options.split()]))
    logged = [json.loads(line) for line in open(run / "stage2" / "log.jsonl")]
    assert logged[-1]["step"] == 2 and all(np.isfinite(row["loss"]) for row in logged)
    assert [*(run / "stage2" / "samples").glob("*.gif")]
    pictures = [*"--clips 2 --steps 2 --metrics ssim --stimuli".split(), str(release.folder / "videos")]
    evaluate.main(metrics.options.parse([*common, *pictures], ""))
    (out,) = run.glob("eval*")
    for kind in ("gt", "recon"):
        assert sorted(file.name for file in (out / kind).glob("*.mp4")) == ["0000.mp4", "0269.mp4"]
    assert read_video(out / "gt" / "0000.mp4").frames.shape == (9, 32, 32, 3)


def test_the_regions_are_chosen_at_training(here):
    sizes = {
        rois: Clips("cinebrain", 3, "test", rois).sizes["voxels"]
        for rois in ("visual", "hippocampus", "visual,hippocampus,mpfc")
    }
    assert sizes == {"visual": 8_405, "hippocampus": 1_559, "visual,hippocampus,mpfc": 13_204}
    batch = Clips("cinebrain", 3, "train", "mpfc", batch_size=2).batch(0)
    assert batch.x.shape == (2, 5, 3_240) and batch.x.std() > 0.1


def test_preprocessed_volumes_give_the_same_visual_recordings(here, release, tmp_path, monkeypatch):
    write_cinebrain(tmp_path / "raw", kind="volumes")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="no CIFTI runs of subject 3: visual areas only"):
        source = CineBrainRelease(tmp_path / "raw", 3, train_segments=1, test_segments=1)
    prepare_fmri(source, tmp_path / "data" / "cinebrain" / "sub3", {}, 5)
    prepare_recorded(tmp_path / "data" / "cinebrain" / "sub3")
    shutil.copytree(here / "data" / "cinebrain" / "stimuli", tmp_path / "data" / "cinebrain" / "stimuli")
    theirs, ours = (
        Clips("cinebrain", 3, "test", "visual"),
        Clips("cinebrain", 3, "test", "visual", root=here / "data"),
    )
    assert np.array_equal(theirs.index, ours.index) and np.array_equal(theirs.roi, ours.roi)
    np.testing.assert_allclose(theirs.averaged(), ours.averaged(), atol=2e-3)
    with pytest.raises(
        ValueError,
        match="none of the voxels of .* lies in hippocampus, they are in .*CIFTI runs, or leave it out",
    ):
        Clips("cinebrain", 3, "train", "visual,hippocampus")
    with pytest.raises(ValueError, match="--delay 5: the preprocessed volumes"):
        CineBrainRelease(tmp_path / "raw", 3, 5, 1, 1)
    volume = tmp_path / "raw" / "sub-0003" / "visual_audio" / "7.npy"
    wide = np.arange(18_946) / 1e4
    np.save(volume, wide)  # with the auditory and language areas: the visual ones are picked
    areas = mmp_areas()
    held = in_areas(areas, ROIS["visual"] + AUDITORY_AND_LANGUAGE.split())
    np.testing.assert_allclose(
        source._volumes("episode01")[7], wide[in_areas(areas[held], ROIS["visual"])], rtol=1e-6
    )
    for bad, said in (
        (np.zeros(8_404), "8,404 numbers, wanted 8,405 or 18,946"),
        (np.full(8_405, np.nan), "nan at .0,., wanted finite .*"),
        (np.zeros((8_405, 1)), r"float64 of shape .8405, 1., wanted .*"),
    ):
        np.save(volume, bad)
        with pytest.raises(ValueError, match=f"visual_audio/7.npy: found {said}: unpack the archive again"):
            source.load_run("episode01", 0)
    volume.write_bytes(volume.read_bytes()[:500])
    with pytest.raises(ValueError, match="visual_audio/7.npy: found .*: unpack the archive again"):
        source.load_run("episode01", 0)
    volume.unlink()
    with pytest.raises(
        FileNotFoundError, match="episode01 is not there whole: wanted .*visual_audio/0.npy to 1349.npy"
    ):
        CineBrainRelease(tmp_path / "raw", 3, None, 1, 1)


# ---------------------------------------------------------------- which clips


@pytest.fixture
def empty_release(tmp_path):
    """The tree of subjects 1 and 5, of empty files."""
    (tmp_path / "videos").mkdir()
    for number in range(8_100):
        (tmp_path / "videos" / f"{number:06d}.mp4").touch()
    for subject in (1, 5):
        here = tmp_path / f"sub_{subject:04d}"
        (here / "dtseries").mkdir(parents=True)
        (here / "beh_data").mkdir()
        for run in range(1, 21):
            (
                here
                / "dtseries"
                / f"sub-{subject:04d}_task-shape_run-{run}_space-fsLR_den-91k_bold.dtseries.nii"
            ).write_text(str(run))
            (here / "beh_data" / f"sub_{subject:04d}_{run}.csv").write_text(
                "videoStartTime,videoStopTime\n12.0,1092.05\n"
            )
    return tmp_path


def test_each_subject_has_its_own_episodes_and_the_published_test_clips(empty_release):
    for subject, test in ((5, range(7_560, 8_100)), (1, range(4_860, 5_400))):
        source = CineBrainRelease(empty_release, subject)
        numbers = {
            split: [int(source.video(e, k)[0].stem) for e in episodes for k in range(EPISODE_CLIPS)]
            for split, episodes in source.splits.items()
        }
        assert (
            numbers["test"] == list(test)
            and len(numbers["train"]) == 4_860
            and not set(numbers["train"]) & set(test)
        )
        assert numbers["train"][:2_700] == list(range(2_700)) and numbers["train"][2_700] == (
            5_400 if subject == 5 else 2_700
        )
        start, length = source.window(source.splits["test"][0])
        assert (start, length) == (int((12 + 4) / 0.8) + 1, 1_350)
    assert stimuli_folder("cinebrain", 1) != stimuli_folder("cinebrain", 5) == stimuli_folder("cinebrain", 3)


def test_what_is_missing_is_named(empty_release, monkeypatch, tmp_path):
    (empty_release / "sub_0005" / "beh_data" / "sub_0005_7.csv").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"episode07 is not there whole: wanted .*sub_0005/dtseries/\*_run-7_.* and beh_data/\*_7.csv",
    ):
        CineBrainRelease(empty_release, 5)
    CineBrainRelease(empty_release, 5, None, 6, 2)  # not asked for, not missed
    csv = empty_release / "sub_0001" / "beh_data" / "sub_0001_2.csv"
    csv.write_text("videoStartTime,videoStopTime\n12.0,980.0\n")
    source = CineBrainRelease(empty_release, 1)
    with pytest.raises(
        ValueError, match="sub_0001_2.csv: the video lasts 968.0 s from 12.0 s on, wanted 1080.0 s"
    ):
        source.window("episode02")
    csv.write_text("start,stop\n12.0,1092.0\n")
    with pytest.raises(ValueError, match="sub_0001_2.csv: found .*, wanted a line of numbers videoStartTime"):
        source.window("episode02")
    (empty_release / "videos" / "002699.mp4").unlink()
    with pytest.raises(
        FileNotFoundError, match="002699.mp4 is not there .1 clips of episode10.: unpack videos.tar"
    ):
        CineBrainRelease(empty_release, 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python data.py cinebrain --raw RAW --subject 2"):
        Clips("cinebrain", 2, "train")


@pytest.mark.parametrize("times", ["nan,1092.0", "-9.0,1071.0", "12.0", "", "a,b", "12.0,inf"])
def test_times_that_are_none_name_the_csv_file(empty_release, times):
    csv = empty_release / "sub_0005" / "beh_data" / "sub_0005_3.csv"
    csv.write_text(f"videoStartTime,videoStopTime\n{times}\n")
    with pytest.raises(ValueError, match="sub_0005_3.csv: "):
        CineBrainRelease(empty_release, 5).window("episode03")


def test_two_files_of_a_run_are_an_error_that_names_both(empty_release):
    folder = empty_release / "sub_0005" / "dtseries"
    name = "sub-0005_task-shape_run-3_space-fsLR_den-91k_bold.dtseries.nii"
    (folder / f"._{name}").touch()  # hidden: no second one
    CineBrainRelease(empty_release, 5)
    (folder / f"ses-1_{name}").touch()
    with pytest.raises(
        ValueError, match="dtseries/ses-1.*run-3.* and .*dtseries/sub-0005.*run-3.* both look like run 3"
    ):
        CineBrainRelease(empty_release, 5)


def test_identical_recordings_of_two_subjects_are_an_error_that_names_both(empty_release, monkeypatch):
    source = CineBrainRelease(empty_release, 5)
    with pytest.raises(
        ValueError,
        match="subjects 5 and 1 have identical recordings, .*sub-0005.* and .*sub-0001.*sub_005.*--allow-dup",
    ):
        refuse_twins(source, empty_release / "data" / "cinebrain" / "sub5")
    twin = (
        empty_release
        / "sub_0001"
        / "dtseries"
        / "sub-0001_task-shape_run-1_space-fsLR_den-91k_bold.dtseries.nii"
    )
    inputs = hashes([[twin]])
    twin.write_text("another run")
    refuse_twins(source, empty_release / "data" / "cinebrain" / "sub5")
    with writing_array(empty_release / "data/cinebrain/sub1/train/fmri.npy", (1,), "float32", {}, inputs):
        pass  # subject 1 was prepared before its folder was put right
    with pytest.raises(
        ValueError, match="subjects 5 and 1 have identical recordings, .*sub-0005.* and .*sub1/train/fmri.npy"
    ):
        refuse_twins(source, empty_release / "data" / "cinebrain" / "sub5")


def test_captions_of_other_clips_are_an_error(release, tmp_path):
    source = CineBrainRelease(release.folder, 3, train_segments=1, test_segments=1)
    told = json.loads(release.captions.read_text())
    (tmp_path / "captions.json").write_text(json.dumps([row for row in told if "007561" not in row["video"]]))
    with pytest.raises(ValueError, match="captions.json has no caption of 007561.mp4 and 0 other test clips"):
        describe_clips(source, "test", tmp_path / "captions.json")

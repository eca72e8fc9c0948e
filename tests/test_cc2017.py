"""The main job on real formats: a miniature cc2017, in both releases, through the README's two commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import REPO, environment, run_script
from mini_releases import CLIPS, write_neuroclips, write_purdue
from tiny import L, cogvideox_pipeline, wan_pipeline

from data import Clips
from prepare.captions import describe_clips
from prepare.cc2017 import NeuroClipsRelease, NeuroClipsWithFilms, PurdueRelease
from prepare.command import main
from prepare.decoder import prepare_decoder
from prepare.fmri import load_response

ENCODERS = ("--clip", f"local-dir:{REPO / 'toy' / 'clip'}", "--viclip", REPO / "toy" / "viclip")
SMALL = "--steps 150 --batch_size 96 --lr 1e-3 --width 64 --layers 2 --attention_heads 4".split()
SMALL += ["--tokens", L]
PURDUE = ("cc2017", "--subject", 1, "--train-segments", 4, "--test-segments", 1, *ENCODERS)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """In the folders that the publisher's archives unpack to."""
    folder = tmp_path_factory.mktemp("purdue")
    return write_purdue(folder / "raw", train_segments=4, test_segments=1, test_repeats=2, as_unpacked=True)


@pytest.fixture(scope="module")
def prepared(release, tmp_path_factory):
    """The preparation killed with SIGKILL in the middle of the encoding, then run again: where, and what it
    prints."""
    folder = tmp_path_factory.mktemp("cc2017")
    command = [sys.executable, str(REPO / "data.py"), *map(str, PURDUE), "--raw", str(release.folder)]
    with open(folder / "first.log", "w") as log:
        first = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
    fmri = folder / "data" / "cc2017" / "sub1" / "test" / "fmri.npy"
    deadline = time.monotonic() + 600
    train = folder / "data" / "cc2017" / "stimuli" / "train"
    while not (state := train / ".e_img.part.json").is_file() or json.loads(state.read_text())["done"] < 64:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    made, begun = fmri.stat().st_mtime_ns, (train / ".e_img.part.npy").stat().st_ino
    encoded = json.loads(state.read_text())["done"]
    done = run_script("data.py", *PURDUE, "--raw", release.folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert fmri.stat().st_mtime_ns == made  # what was whole is kept
    assert (train / "e_img.npy").stat().st_ino == begun  # what was begun is gone on with
    assert f"| {encoded}/960 [" in done.stderr
    return folder, (folder / "first.log").read_text() + done.stdout + done.stderr


def test_the_prepared_files_are_those_of_the_contract(prepared, release):
    folder, said = prepared
    data = folder / "data" / "cc2017"
    voxels = np.load(data / "sub1" / "voxels.npz")
    assert set(voxels["index"]) <= set(release.planted) and len(voxels["index"]) > 0.9 * len(release.planted)
    N = len(voxels["index"])
    shapes = {
        "sub1/train/fmri.npy": (4 * CLIPS, 2, 1, N),
        "sub1/test/fmri.npy": (CLIPS, 10, 1, N),
        "stimuli/train/e_img.npy": (4 * CLIPS, 8, 64),
        "stimuli/test/e_txt.npy": (CLIPS, 64),
        "stimuli/train/e_act.npy": (4 * CLIPS, 64),
    }
    for name, shape in shapes.items():
        file = data / name
        assert np.load(file, mmap_mode="r").shape == shape and name in said
        entry = json.loads(file.with_name("manifest.json").read_text())[file.name]
        assert (
            tuple(entry["shape"]) == shape
            and all(len(digest) == 64 for digest in entry["inputs"].values())
            and entry["inputs"]
        )
    fmri = np.load(data / "sub1" / "test" / "fmri.npy")
    assert (
        np.isfinite(fmri[:, :2]).all() and np.isnan(fmri[:, 2:]).all()
    )  # eight of the ten showings are not in the miniature
    assert "is not there; this showing of test1 is masked" in said and "7 constant or not finite" in said
    clips = [json.loads(line) for line in open(data / "stimuli" / "train" / "clips.jsonl")]
    assert [clip["start_s"] for clip in clips[:3]] == [0, 2, 4] and clips[CLIPS]["id"] == "seg2-000"
    classes = json.loads((data / "stimuli" / "train" / "manifest.json").read_text())["categories.npy"][
        "recipe"
    ]["classes"]
    labels = np.load(data / "stimuli" / "train" / "categories.npy")
    assert (
        labels.shape == (len(clips), len(classes))
        and set(np.unique(labels)) == {0, 1}
        and "person" in classes
        and "person" in said
    )
    assert not list(data.rglob("*.part*"))


@pytest.fixture(scope="module")
def trained(prepared):
    """The folder with a stage 1."""
    folder, _ = prepared
    done = run_script("train_stage1.py", "--data", "cc2017", "--subject", 1, *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_stage_1_trains_on_it(trained):
    folder = trained
    scores = json.loads(
        (folder / "runs" / "cc2017" / "sub1" / "full-s0" / "stage1" / "test.json").read_text()
    )
    assert (
        scores["fmri"]["category mAP"] > 0.9 > scores["shuffled"]["category mAP"]
    )  # 12 contents, which the test film shows, too
    assert scores["fmri"]["image 50-way"] > 5 * scores["shuffled"]["image 50-way"]


@pytest.mark.parametrize("model", [wan_pipeline, cogvideox_pipeline])
def test_stage_2_and_evaluation_run_on_it(trained, release, monkeypatch, model):
    """Both families of decoders through the same scripts: latents and text, training, reconstruction,
    metrics."""
    monkeypatch.chdir(trained)
    torch.manual_seed(0)
    name, size = model.__name__, ("--frames", 9, "--height", 32, "--width", 32)
    model().save_pretrained(name)
    films = PurdueRelease(release.folder, 1, 2, 4, 1)
    prepare_decoder(films, trained / "data" / "cc2017" / "stimuli", name, size[1::2])
    options = ["--decoder", name, "--run", name, *size, *"--stage1 full --epochs 1 --batch_size 240".split()]
    options += (
        "--micro_batch 60 --attention_heads 4 --lora_rank 4 --sample_every 0 --sampling_steps 2".split()
    )
    done = run_script("train_stage2.py", "--data", "cc2017", *options, cwd=trained)
    assert done.returncode == 0, done.stderr
    metrics = ("--clips", 4, "--metrics", "ssim,psnr", "--stimuli", films.films)
    done = run_script("evaluate.py", "--data", "cc2017", "--run", name, *metrics, cwd=trained)
    assert done.returncode == 0, done.stderr
    (out,) = (trained / "runs" / "cc2017" / "sub1" / f"{name}-s0").glob("eval*")
    scores = json.loads((out / "metrics.json").read_text())["metrics"]
    assert (
        len([*(out / "recon").glob("*.mp4")]) == 4
        and 0 < scores["psnr"]["mean"] < 40
        and scores["ssim"]["n"] == 4
    )
    assert (out / "sheet.png").is_file() and (out / "grid.gif").is_file()


def test_both_releases_give_the_same_clips_in_the_same_order(release, tmp_path):
    neuroclips = write_neuroclips(tmp_path, train_segments=4, size=64, like=release)
    sizes = {"train_segments": 4, "test_segments": 1}
    purdue, pt = PurdueRelease(release.folder, 1, **sizes), NeuroClipsRelease(neuroclips.folder, 1, **sizes)
    for split, segment in (("train", "seg3"), ("test", "test1")):
        ours = describe_clips(purdue, split, release.captions)
        theirs = describe_clips(pt, split, neuroclips.folder / f"GT_{split}_caption.pt")
        for key in ("id", "segment", "start_s", "caption"):
            assert [row[key] for row in ours] == [row[key] for row in theirs], key
        frames = [
            [c.astype(float).mean(0) for c in islice(source.read_clips(segment), 40)]
            for source in (purdue, pt)
        ]
        distance = np.abs(np.array(frames[0])[:, None] - np.array(frames[1])).mean((2, 3, 4))  # (40, 40)
        shows = (distance == distance.min(1, keepdims=True)).argmax(
            1
        ) % 12  # each content comes back after 12 clips
        assert np.array_equal(shows, np.arange(40) % 12)
        a = load_response(purdue, segment, 0, release.planted)
        b = load_response(pt, segment, 0)
        match = [np.corrcoef(np.roll(a, lag, 0).ravel(), b.ravel())[0, 1] for lag in range(-3, 4)]
        assert np.argmax(match) == 3 and match[3] > 0.8


def test_recordings_of_neuroclips_go_with_the_films_of_purdue(release, tmp_path):
    """As `--fmri-release DIR --raw RAW`: the films have the frames that stage 2 needs."""
    neuroclips = write_neuroclips(tmp_path, train_segments=4, size=64, like=release)
    sizes = {"train_segments": 4, "test_segments": 1}
    both = NeuroClipsWithFilms(neuroclips.folder, release.folder, 1, **sizes)
    pt, purdue = NeuroClipsRelease(neuroclips.folder, 1, **sizes), PurdueRelease(release.folder, 1, **sizes)
    both.check()
    assert both.preprocessed and both.name == "NeuroClipsRelease"
    assert np.array_equal(both.load_run("seg2", 1), pt.load_run("seg2", 1))
    assert both.files("seg2") == pt.files("seg2") and both.stimulus("seg2") == purdue.stimulus("seg2")
    frames = next(both.read_clips("seg2"))
    assert len(frames) >= 57 and np.array_equal(frames, next(purdue.read_clips("seg2")))
    with pytest.raises(FileNotFoundError, match="seg1.mp4"):
        NeuroClipsWithFilms(neuroclips.folder, tmp_path, 1, **sizes)


def test_a_copy_of_another_subject_is_refused_and_subjects_share_their_stimuli(
    prepared, release, tmp_path, monkeypatch
):
    folder, _ = prepared
    recordings = release.folder / "10_4231_R7X63K3M" / "video_fmri_dataset"
    copy = release.folder / "10_4231_R7NS0S1F" / "video_fmri_dataset" / "subject2"
    shutil.copytree(recordings / "subject1", copy, copy_function=os.link)
    monkeypatch.chdir(folder)
    command = [*map(str, PURDUE), "--raw", str(release.folder), "--subject", "2"]
    with pytest.raises(
        ValueError,
        match="subjects 2 and 1 have identical recordings, .*subject2.*seg1_1.* and .*subject1.*seg1_1",
    ):
        main(command)
    assert not (folder / "data" / "cc2017" / "sub2").exists()
    made = (folder / "data" / "cc2017" / "stimuli" / "train" / "e_img.npy").stat().st_mtime_ns
    with pytest.warns(UserWarning, match="is not there; this showing of test1 is masked"):
        main([*command, "--allow-duplicate-subject"])
    assert (folder / "data" / "cc2017" / "stimuli" / "train" / "e_img.npy").stat().st_mtime_ns == made
    assert len(Clips("cc2017", 2, "test")) == CLIPS
    shutil.rmtree(copy)
    shutil.rmtree(folder / "data" / "cc2017" / "sub2")  # else subject 1 would be refused next


def test_other_settings_are_an_error_that_names_both_values(prepared, release):
    folder, _ = prepared
    done = run_script("data.py", *PURDUE, "--raw", release.folder, "--delay", 3, cwd=folder)
    assert done.returncode == 1 and "was made with delay = 2, but delay = 3 is asked for" in done.stderr


def test_captions_that_differ_in_number_from_the_clips(release, tmp_path):
    lists = [tmp_path / "train.json", tmp_path / "test.json"]
    for file, n in zip(lists, (4 * CLIPS - 1, CLIPS), strict=True):
        file.write_text(json.dumps(["a dog"] * n))
    write = write_neuroclips(tmp_path / "release", train_segments=4)
    options = ("--fmri-release", write.folder, "--captions", *lists)
    done = run_script("data.py", *PURDUE, *options, cwd=tmp_path)
    assert (
        done.returncode == 1
        and "train.json has 959 captions for the 960 train clips of 4 segments" in done.stderr
    )
    lists[0].write_text(json.dumps(["a dog"] * 4 * CLIPS))
    gone = run_script("data.py", *PURDUE, *options, "--viclip", "gone.pth", cwd=tmp_path)
    assert gone.returncode == 1 and "--viclip gone.pth is not there" in gone.stderr
    assert not list((tmp_path / "data").rglob("*.npy"))  # told before the recordings


def test_the_neuroclips_release_through_both_commands(tmp_path):
    write_neuroclips(tmp_path / "release")
    few = ("--train-segments", 2, "--test-segments", 1)
    options = ("cc2017", "--fmri-release", tmp_path / "release", *few, *ENCODERS)
    done = run_script("data.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "data" / "cc2017" / "sub1" / "test" / "fmri.npy", mmap_mode="r").shape == (
        CLIPS,
        10,
        1,
        96,
    )
    done = run_script("train_stage1.py", "--data", "cc2017", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_script("data.py", *options, "--delay", 2, cwd=tmp_path)
    assert done.returncode == 1 and "was made with delay = None, but delay = 2 is asked for" in done.stderr


def test_a_release_that_is_not_there_says_what_to_do(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in (("nowhere", "nowhere is not there"), ("empty", "empty has no subject1/fmri below it")):
        done = run_script("data.py", "cc2017", "--raw", tmp_path / name, cwd=tmp_path)
        assert done.returncode == 1 and said in done.stderr
    (tmp_path / "subject1" / "fmri").mkdir(parents=True)
    done = run_script("data.py", "cc2017", "--raw", tmp_path, cwd=tmp_path)
    assert done.returncode == 1 and "has no recording of seg1: wanted seg1_1_Atlas" in done.stderr
    done = run_script("data.py", "cc2017", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: give --raw (the release), --fmri-release")
    assert "python data.py cc2017 --raw RAW --subject 1" in done.stderr
    assert not list(tmp_path.rglob("*.npy"))

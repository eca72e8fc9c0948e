"""Prepared files, the dataset and its batches, scenes and near-copies, and what the held-out clips are scored
by."""

import errno
import json
import os
import sys
import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import AREAS, CLASSES, run_script, sha256, unit, write_prepared
from test_video_decoder import wan_pipeline

import data
import prepare.decoder
from data import (
    ClipDataset,
    DecoderData,
    clips_of_step,
    far_apart,
    held_out_clips,
    hide_voxels,
    mean_frames,
    near_copy_threshold,
)
from metrics.retrieval import average_precision, retrieval
from prepare import command, stimuli
from prepare.decoder import prepare_decoder
from prepare.facts import VIDEO
from prepare.fmri import prepare_fmri
from prepare.release import Release
from prepare.stimuli import encode_all, first_sentences, prepare_stimuli
from support.files import MissingData, hashes, is_made_by, writing_array, written_whole
from toy import release
from video_decoder import VideoDecoder

# ---------------------------------------------------------------- written whole


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with written_whole(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and files(path.parent) == ["a.txt"]
    with pytest.raises(RuntimeError, match="power"), written_whole(path) as part:
        part.write_text("half")
        raise RuntimeError("power")
    assert path.read_text() == "whole" and files(path.parent) == ["a.txt"]  # the earlier one is not harmed


def test_an_array_that_fails_halfway_leaves_neither_file_nor_part_nor_entry(tmp_path):
    with (
        pytest.raises(RuntimeError),
        writing_array(tmp_path / "e.npy", (3, 2), "float32", {"clip": "a"}) as array,
    ):
        array[0] = 1
        raise RuntimeError
    assert files(tmp_path) == []
    assert not is_made_by(tmp_path / "e.npy", {"clip": "a"})


def test_the_manifest_says_what_made_each_array(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"film")
    inputs = hashes([[tmp_path / "film.mp4"]])
    for name, shape in (("e.npy", (3, 2)), ("f.npy", (4,))):
        with writing_array(tmp_path / name, shape, "float32", {"clip": name}, inputs) as array:
            array[:] = 7
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.keys() == {"e.npy", "f.npy"}
    assert manifest["e.npy"]["shape"] == [3, 2] and manifest["e.npy"]["dtype"] == "float32"
    assert manifest["e.npy"]["recipe"] == {"clip": "e.npy"}
    assert manifest["e.npy"]["inputs"] == {"film.mp4": sha256(tmp_path / "film.mp4")}
    assert manifest["e.npy"]["versions"]["numpy"] == np.__version__
    assert (np.load(tmp_path / "e.npy", allow_pickle=False) == 7).all()


def test_finished_names_both_values_where_the_recipe_differs(tmp_path):
    path = tmp_path / "e.npy"
    assert not is_made_by(path, {"clip": "a"})
    with writing_array(path, (1,), "uint8", {"clip": "a", "sizes": (1, 2)}):
        pass
    assert is_made_by(path, {"clip": "a", "sizes": (1, 2)})  # a tuple comes back as a list
    with pytest.raises(
        ValueError, match=r"e.npy was made with clip = 'a', but clip = 'b' is asked for; delete it"
    ):
        is_made_by(path, {"clip": "b"})
    with pytest.raises(ValueError, match="window = None, but window = 2"):
        is_made_by(path, {"window": 2})
    path.unlink()
    assert not is_made_by(path, {"clip": "a"})  # described, but gone


# ---------------------------------------------------------------- recordings -> fmri.npy


class Source(Release):
    """Two training segments and one test segment of 6 clips x 4 voxels; response = 100 segment + 10 repeat +
    clip + voxel / 10."""

    preprocessed = True
    splits = {"train": ["seg1", "seg2"], "test": ["test1"]}
    voxels = np.arange(4) + 50, np.array(["L_V1"] * 4)

    def __init__(self, fails_at: str | None = None):
        self.fails_at = fails_at

    def repeats(self, segment):
        return 3 if segment == "test1" else 2

    def window(self, segment):
        return 0, 6

    def files(self, segment):
        return []

    def load_run(self, segment, repeat):
        if segment == self.fails_at:
            raise KeyboardInterrupt
        if (segment, repeat) == ("seg2", 1):
            return None
        number = {"seg1": 1, "seg2": 2, "test1": 3}[segment]
        return (100 * number + 10 * repeat + np.arange(6)[:, None] + np.arange(4) / 10).astype(np.float32)


def test_prepare_fmri_puts_each_volume_in_its_place(tmp_path):
    prepare_fmri(Source(), tmp_path, {"window": 3}, window=3)
    train, test = (np.load(tmp_path / split / "fmri.npy", allow_pickle=False) for split in ("train", "test"))
    assert train.shape == (12, 2, 3, 4) and test.shape == (6, 3, 3, 4) and train.dtype == np.float32
    assert train[2, 1, :, 0].tolist() == [112, 113, 114]
    assert train[5, 0, :, 0].tolist() == [105, 105, 105]  # the end of a segment, not the start of the next
    assert train[6, 0, 0] == pytest.approx([200, 200.1, 200.2, 200.3])
    assert np.isnan(train[6:, 1]).all() and np.isfinite(train[:6]).all() and np.isfinite(test).all()
    assert np.load(tmp_path / "voxels.npz")["index"].tolist() == [50, 51, 52, 53]


@pytest.mark.parametrize("fails_at", ["seg1", "seg2", "test1"])
def test_an_interrupted_preparation_is_completed_by_the_next(tmp_path, fails_at):
    with pytest.raises(KeyboardInterrupt):
        prepare_fmri(Source(fails_at), tmp_path, {"window": 1})
    assert not list(tmp_path.rglob(".*")) and not (tmp_path / "test" / "fmri.npy").exists()
    prepare_fmri(Source(), tmp_path, {"window": 1})
    made = (tmp_path / "test" / "fmri.npy").stat().st_mtime_ns
    prepare_fmri(Source(fails_at), tmp_path, {"window": 1})  # finished: nothing is read
    assert (tmp_path / "test" / "fmri.npy").stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="window = 1, but window = 2"):
        prepare_fmri(Source(), tmp_path, {"window": 2}, window=2)


@pytest.mark.parametrize(("file", "function", "call"), [
    ("voxels.npz", (np, "savez_compressed"), 1),
    ("train/fmri.npy", (os, "posix_fallocate"), 1),
    ("test/fmri.npy", (os, "posix_fallocate"), 2),
    ("train/manifest.json", (Path, "write_text"), 1),
])  # fmt: skip
def test_a_full_disk_names_the_file_and_the_next_run_completes(tmp_path, monkeypatch, file, function, call):
    with monkeypatch.context() as patch:
        patch.setattr(*function, full_at(call, getattr(*function)))
        with pytest.raises(
            OSError, match=rf"{file} takes 0.00\d GB, but the disk is full, with [\d.,]+ GB free: make room"
        ):
            prepare_fmri(Source(), tmp_path, {"window": 1})
    assert not list(tmp_path.rglob(".*")) and not is_made_by(tmp_path / file, {})
    prepare_fmri(Source(), tmp_path, {"window": 1})
    assert np.load(tmp_path / "test" / "fmri.npy").shape == (6, 3, 1, 4) and is_made_by(
        tmp_path / "train" / "fmri.npy", {"window": 1}
    )


def full_at(call: int, function):
    """The function, but at that call the disk is full."""
    calls = []

    def called(*args, **options):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **options)

    return called


# ---------------------------------------------------------------- encodings


class Films(Source):
    """The clips of `Source`, 24 a segment; clip k of a segment shows one colour, and its caption says
    which."""

    def window(self, segment):
        return 0, 24

    def stimulus(self, segment):
        return [self.folder / f"{segment}.mp4"]

    def read_clips(self, segment):
        for k in range(24):
            yield np.full((9, 4, 4, 3), colour_of(segment, k), np.uint8)


def colour_of(segment: str, k: int) -> int:
    return 10 * k + int(segment[-1]) + 3 * segment.startswith("test")


def embedded(colour) -> np.ndarray:
    """(..., 16) unit vectors, another for each colour."""
    return unit(np.random.default_rng(0).normal(size=(256, 16)))[np.asarray(colour, int)]


@pytest.fixture
def films(tmp_path, monkeypatch):
    """prepare_stimuli(captions' order) into tmp_path/stimuli with encoders that read colours; `films.batches`
    is what they have encoded."""
    source, batches = Films(), []
    source.folder = tmp_path
    for segments in source.splits.values():
        for segment in segments:
            source.stimulus(segment)[0].write_text(segment)

    def prepare(order=lambda rows: rows, **more) -> Path:
        rows = [
            {"segment": segment, "caption": f"{colour_of(segment, k)} dogs. They run. A cat sees Dr. Dog!"}
            for s in source.splits.values()
            for segment in s
            for k in range(24)
        ]
        told = [row["caption"] for row in rows]
        rows = [row | {"caption": caption} for row, caption in zip(rows, order(told), strict=True)]
        (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        captions = dict.fromkeys(source.splits, tmp_path / "captions.jsonl")
        prepare_stimuli(source, tmp_path / "stimuli", captions, "clip", "viclip", **more)
        return tmp_path / "stimuli"

    def encode_images(model, frames, batch):
        batches.append(len(frames))
        return embedded(frames[..., 0, 0, 0])

    prepare.batches = batches
    monkeypatch.setattr(stimuli, "load_clip", lambda name: (torch.nn.Identity(), {}, None))
    monkeypatch.setattr(stimuli.ViCLIP, "from_pretrained", lambda name: torch.nn.Identity())
    monkeypatch.setattr(stimuli, "encode_images", encode_images)
    monkeypatch.setattr(
        stimuli, "encode_actions", lambda model, frames, batch=0: embedded(frames[:, 0, 0, 0, 0])
    )

    def encode_texts(model, tokenizer, captions):
        prepare.captions = captions
        return embedded([c.split()[0] for c in captions])

    monkeypatch.setattr(stimuli, "encode_texts", encode_texts)
    monkeypatch.setattr(stimuli, "plan", lambda what, encode, clips, on_cpu: on_cpu)
    return prepare


@pytest.mark.filterwarnings("error")
def test_encodings_are_in_the_order_of_the_clips(films):
    folder = films()
    for split, segments in Source.splits.items():
        colours = [colour_of(segment, k) for segment in segments for k in range(24)]
        assert np.array_equal(
            np.load(folder / split / "e_img.npy"), np.repeat(embedded(colours)[:, None], 8, 1)
        )
        assert np.array_equal(np.load(folder / split / "e_act.npy"), embedded(colours))
    assert films.batches == [16, 16, 16, 16, 8]


@pytest.mark.parametrize("kind", ["kill", "full disk"])
def test_an_encoding_that_stopped_goes_on_where_it_was(films, monkeypatch, kind):
    def stop(*args):
        raise KeyboardInterrupt if kind == "kill" else OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        encode = stimuli.encode_images
        patch.setattr(
            stimuli,
            "encode_images",
            lambda *args, **options: encode(*args, **options) if len(films.batches) < 2 else stop(),
        )
        with pytest.raises(
            KeyboardInterrupt if kind == "kill" else OSError,
            match=None if kind == "kill" else "the disk is full",
        ):
            films()
    assert films.batches == [16, 16]
    folder = films()
    assert films.batches == [16, 16, 16, 16, 8]  # 32 of the 48 training clips were not encoded again
    colours = [colour_of(segment, k) for segment in ("seg1", "seg2") for k in range(24)]
    assert np.array_equal(np.load(folder / "train" / "e_act.npy"), embedded(colours))
    assert np.array_equal(np.load(folder / "train" / "e_img.npy")[:, 3], embedded(colours))
    assert not list(folder.rglob(".*"))


def test_what_was_begun_with_other_captions_is_begun_anew(films, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(stimuli, "encode_actions", full_at(2, stimuli.encode_actions))
        with pytest.raises(OSError, match="e_img.npy takes|e_act.npy takes"):
            films()
    with pytest.raises(ValueError, match="e_txt.npy was made with captions = .* is asked for; delete it"):
        films(lambda told: told[::-1])
    (tmp_path / "stimuli" / "train" / "e_txt.npy").unlink()
    with pytest.warns(UserWarning, match="may be in another order"):
        films(lambda told: told[::-1])
    assert films.batches == [16, 16, 16, 16, 16, 16, 8]


def test_captions_in_another_order_are_a_warning_with_the_numbers(films):
    def swapped(told):
        return told[24:48] + told[:24] + told[48:]

    with pytest.warns(
        UserWarning,
        match=r"captions of seg1, seg2 may be in another order .* own caption .*\d, .* in \d+% of the clips",
    ):
        films(swapped)


def test_the_first_sentences_of_a_caption_go_to_clip(films):
    folder = films(sentences=2)
    assert films.captions[0] == f"{colour_of('test1', 0)} dogs. They run."
    entry = json.loads((folder / "train" / "manifest.json").read_text())["e_txt.npy"]
    assert entry["recipe"]["caption_sentences"] == 2
    rows = [json.loads(line) for line in open(folder / "train" / "clips.jsonl")]
    assert rows[0]["caption"].endswith("Dr. Dog!")  # whole
    with pytest.raises(ValueError, match="caption_sentences = 2, but caption_sentences = None is asked for"):
        films()


def test_without_the_option_the_recipe_is_as_it_was(films):
    entry = json.loads((films() / "train" / "manifest.json").read_text())["e_txt.npy"]
    assert entry["recipe"].keys() == {"clip", "viclip", "frames", "captions"}
    assert films.captions[0].endswith("Dr. Dog!")


@pytest.mark.parametrize(
    ("caption", "n", "first"),
    [
        ("A dog runs. A cat sits.", 1, "A dog runs."),
        ("A dog runs. A cat sits.", 2, "A dog runs. A cat sits."),
        ("A dog runs. A cat sits.", 5, "A dog runs. A cat sits."),
        (" A dog  runs.  A cat sits.", None, " A dog  runs.  A cat sits."),
        ("Dr. Cooper and Mr. Wolowitz talk. They eat.", 1, "Dr. Cooper and Mr. Wolowitz talk."),
        ("Is it 3.5 m long? It is.", 1, "Is it 3.5 m long?"),
        ('A sign says "Stop." A car stops.', 1, 'A sign says "Stop."'),
        ("a dog runs", 1, "a dog runs"),
        ("", 1, ""),
    ],
)
def test_first_sentences(caption, n, first):
    assert first_sentences(caption, n) == first


def test_encode_all_fills_side_by_side_from_where_it_was(monkeypatch):
    monkeypatch.setattr(stimuli, "plan", lambda what, encode, clips, on_cpu: on_cpu)
    arrays, said = (np.zeros(7), np.zeros((7, 2))), []
    clips = (np.full((1, 1, 1, 3), k, np.uint8) for k in range(2, 7))

    def encode(batch):
        k = batch[:, 0, 0, 0, 0].astype(float)
        return k, np.stack([k, -k], 1)

    encode_all(clips, encode, arrays, 2, said.append, "test", on_cpu=3)
    assert arrays[0].tolist() == [0, 0, 2, 3, 4, 5, 6]
    assert arrays[1][:, 1].tolist() == [0, 0, -2, -3, -4, -5, -6]
    assert said == [5, 7]
    encode_all(iter(()), encode, arrays, 7, said.append, "test", on_cpu=3)  # nothing is left to do
    with pytest.raises(ValueError, match="the films have 1 clips, wanted 7"):
        encode_all(iter([np.zeros((1, 1, 1, 3))]), encode, arrays, 0, said.append, "test", on_cpu=3)


# ---------------------------------------------------------------- the dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_prepared(root, N=10, T=2)
    return root


def test_the_dataset_reads_what_was_prepared(root):
    train, test = (ClipDataset("cc2017", 1, split, root=root) for split in ("train", "test"))
    assert (len(train), len(test)) == (48, 24)
    assert train.sizes == {"volumes": 2, "voxels": 10, "frames": 3, "embed_dim": 16, "classes": 4}
    assert train.classes == CLASSES and train.clips[17]["id"] == "seg2-001"
    recorded = train.showings(np.arange(48))
    assert recorded.sum() == 48 + 32 and not recorded[32:, 1].any()


def test_a_batch_has_one_recorded_showing_of_each_clip_and_its_own_targets(root):
    train, clips, seen = ClipDataset("cc2017", 1, "train", root=root), np.array([40, 3, 17]), set()
    for step in range(20):
        batch = train.batch(clips, seed=0, step=step)
        assert batch["x"].shape == (3, 2, 10) and batch["x"].isfinite().all()
        for x, clip in zip(batch["x"].numpy(), clips, strict=True):
            (showing,) = (k for k in (0, 1) if np.array_equal(x, train.fmri[clip, k]))
            seen.add((int(clip), showing))
    assert seen == {(40, 0), (3, 0), (3, 1), (17, 0), (17, 1)}  # clip 40 was shown twice but recorded once
    for name in ("e_img", "e_txt", "e_act", "categories"):
        assert np.array_equal(batch[name].numpy(), getattr(train, name)[clips])


def test_the_showing_drawn_does_not_depend_on_which_process_asks(root):
    train = ClipDataset("cc2017", 1, "train", root=root)
    whole = train.batch(np.arange(8), seed=3, step=5)["x"]
    halves = [train.batch(part, seed=3, step=5)["x"] for part in (np.arange(4), np.arange(4, 8))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, train.batch(np.arange(8), seed=4, step=5)["x"])


def test_averaged_is_the_mean_of_the_recorded_showings_z_scored_over_the_clips(root):
    train = ClipDataset("cc2017", 1, "train", root=root)
    x = train.averaged().numpy()
    assert np.abs(x.mean(0)).max() < 1e-5 and np.abs(x.std(0) - 1).max() < 1e-4
    mean = np.nanmean(np.array(train.fmri), 1)
    np.testing.assert_allclose(x, (mean - mean.mean(0)) / mean.std(0), atol=1e-4)
    some = np.arange(30, 40)  # over these clips alone
    np.testing.assert_allclose(
        train.averaged(some), (mean[some] - mean[some].mean(0)) / mean[some].std(0), atol=1e-4
    )


def test_rois_restrict_the_voxels(root):
    one = {
        rois: ClipDataset("cc2017", 1, "train", rois, root=root)
        for rois in ("visual", "hippocampus", "visual,hippocampus")
    }
    assert [AREAS[i // 7 % 5] for i in one["visual"].index] == ["L_V1", "R_FFC", "L_MST"] * 2
    assert (
        set(one["hippocampus"].roi) == {"hippocampus_left"} and one["visual,hippocampus"].sizes["voxels"] == 8
    )
    batch = one["visual"].batch(np.array([5]), 0, 0)["x"][0].numpy()
    assert any(np.array_equal(batch, one["visual"].fmri[5, k][:, [0, 1, 2, 5, 6, 7]]) for k in (0, 1))
    assert one["visual"].averaged().shape == (48, 2, 6)
    with pytest.raises(
        ValueError, match=r"--rois visual,auditory: \['auditory'\] unknown; there are visual, hippocampus"
    ):
        ClipDataset("cc2017", 1, "train", "visual,auditory", root=root)


def test_rois_without_a_voxel_are_an_error(tmp_path):
    write_prepared(tmp_path, N=3)  # V1, FFC, MST
    with pytest.raises(ValueError, match="--rois hippocampus: none of the voxels"):
        ClipDataset("cc2017", 1, "train", "hippocampus", root=tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("voxel", [0, 7, 9])
def test_a_nan_or_infinity_at_a_recorded_showing_names_clip_and_voxel(tmp_path, voxel, value):
    folder = write_prepared(tmp_path, N=10)
    fmri = np.load(folder / "sub1" / "train" / "fmri.npy")
    fmri[17, :, 0, voxel] = value
    np.save(folder / "sub1" / "train" / "fmri.npy", fmri)
    train = ClipDataset("cc2017", 1, "train", root=tmp_path)
    for look in (lambda: train.batch(np.array([3, 17]), 0, 0), train.averaged):
        with pytest.raises(
            ValueError,
            match=rf"fmri.npy: {value} at clip 17 \(seg2-001\), .*voxel {voxel} \(source index {7 * voxel}",
        ):
            look()


def test_arrays_that_differ_in_their_number_of_clips_are_an_error(tmp_path):
    stimuli = write_prepared(tmp_path) / "stimuli" / "train"
    np.save(stimuli / "e_txt.npy", np.load(stimuli / "e_txt.npy")[:-1])
    with pytest.raises(
        ValueError, match=r"e_txt.npy: found float32 of shape \(47, 16\), wanted .*\(48, 16\)"
    ):
        ClipDataset("cc2017", 1, "train", root=tmp_path)


def test_a_showing_that_is_nan_in_part_is_an_error(tmp_path):
    """Where the three voxels that are looked at are NaN, all are read: only a whole showing of NaN is
    none."""
    folder = write_prepared(tmp_path, N=10)
    fmri = np.load(folder / "sub1" / "train" / "fmri.npy")
    fmri[17, :, 0, [0, 5, 9]] = np.nan
    np.save(folder / "sub1" / "train" / "fmri.npy", fmri)
    with pytest.raises(ValueError, match="nan at clip 17"):
        ClipDataset("cc2017", 1, "train", root=tmp_path).batch(np.array([17]), 0, 0)
    fmri[17] = np.nan
    np.save(folder / "sub1" / "train" / "fmri.npy", fmri)
    with pytest.raises(ValueError, match="fmri.npy: found no showing of seg2-001"):
        ClipDataset("cc2017", 1, "train", root=tmp_path).batch(np.array([17]), 0, 0)


def resave(change):
    """A change of an .npy file's array."""

    def changed(file: Path) -> None:
        np.save(file, change(np.load(file)))

    return changed


def change_line(**values):
    """A change of the third line of clips.jsonl; a value None takes the key away."""

    def changed(file: Path) -> None:
        lines = file.read_text().splitlines()
        row = json.loads(lines[2]) | values
        lines[2] = json.dumps({key: value for key, value in row.items() if value is not None})
        file.write_text("\n".join(lines) + "\n")

    return changed


def with_value(value, place=(5, 0)):
    def change(array):
        array = array.copy()
        array[place] = value
        return array

    return resave(change)


def change_classes(classes):
    def changed(file: Path) -> None:
        manifest = json.loads(file.read_text())
        manifest["categories.npy"]["recipe"]["classes"] = classes
        file.write_text(json.dumps(manifest))

    return changed


def write(text: str):
    return lambda file: file.write_text(text)


def cut_off(size: int):
    return lambda file: os.truncate(file, size)


FMRI, VOXELS = "sub1/train/fmri.npy", "sub1/voxels.npz"
TRAIN, MANIFEST, LINES = "stimuli/train", "stimuli/train/manifest.json", "stimuli/train/clips.jsonl"
FAULTS = {
    "fmri of float64": (FMRI, resave(lambda x: x.astype(np.float64)), "float64"),
    "fmri of whole numbers": (FMRI, resave(lambda x: np.nan_to_num(x).astype(int)), "int64"),
    "fmri of three axes": (FMRI, resave(lambda x: x[:, 0]), "shape"),
    "fmri of other voxels": (FMRI, resave(lambda x: x[..., :-1]), "48, any, any, 10"),
    "fmri without a showing": (FMRI, resave(lambda x: x[:, :0]), "as manifest.json beside it says"),
    "fmri cut off": (FMRI, cut_off(3000), "a whole .npy file"),
    "e_img with NaN": (f"{TRAIN}/e_img.npy", with_value(np.nan, (5, 1, 2)), r"nan at \(5, 1, 2\)"),
    "e_txt with infinity": (f"{TRAIN}/e_txt.npy", with_value(np.inf), r"inf at \(5, 0\)"),
    "e_act of another D": (f"{TRAIN}/e_act.npy", resave(lambda x: x[:, :8]), "48, 16"),
    "e_img of text": (f"{TRAIN}/e_img.npy", resave(lambda x: x.astype("U3")), "floating-point"),
    "categories of another K": (f"{TRAIN}/categories.npy", resave(lambda x: x[:, :3]), "48, 4"),
    "categories of 2": (f"{TRAIN}/categories.npy", with_value(2), "wanted 0 and 1"),
    "categories of 0.5": (f"{TRAIN}/categories.npy", resave(lambda x: x / 2), "whole numbers"),
    "classes that are no list": (MANIFEST, change_classes("person"), "a list of names"),
    "classes that are no names": (MANIFEST, change_classes([1, 2, 3, 4]), "a list of names"),
    "a manifest without them": (MANIFEST, write("{}"), "a list of names"),
    "a manifest that is no JSON": (MANIFEST, write("{"), "JSON"),
    "a start that is no number": (LINES, change_line(start_s="2"), "start_s"),
    "a start that is NaN": (LINES, change_line(start_s=float("nan")), "start_s"),
    "a clip without a video": (LINES, change_line(video=None), "no video"),
    "a caption that is a list": (LINES, change_line(caption=["a"]), "caption"),
    "lines cut off": (LINES, cut_off(310), "JSON"),
    "voxels cut off": (VOXELS, cut_off(100), "an .npz file of index, roi"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named(tmp_path, fault):
    name, damage, said = FAULTS[fault]
    file = write_prepared(tmp_path, N=10) / name
    damage(file)
    with pytest.raises(ValueError, match=said) as error:
        ClipDataset("cc2017", 1, "train", root=tmp_path)
    assert str(error.value).startswith(str(file))


@pytest.mark.parametrize(
    "name",
    [VOXELS, FMRI, LINES, *(f"{TRAIN}/{name}.npy" for name in ("categories", "e_img", "e_txt", "e_act"))],
)
def test_what_is_not_prepared_is_named_with_the_way_to_it(tmp_path, name):
    file = write_prepared(tmp_path, N=10) / name
    file.unlink()
    with pytest.raises(MissingData, match="python data.py cc2017 --raw RAW --subject 1") as missing:
        ClipDataset("cc2017", 1, "train", root=tmp_path)
    assert str(file) in str(missing.value)


def test_the_toy_world_is_not_made_by_reading_it(tmp_path):
    with pytest.raises(
        MissingData, match="train_stage1.py and train_stage2.py make and prepare the toy world"
    ):
        ClipDataset("toy", 1, "train", root=tmp_path)
    with pytest.raises(ValueError, match="--subject 10: toy has subjects 1 to 9"):
        ClipDataset("toy", 10, "train", root=tmp_path)
    with pytest.raises(MissingData, match="for toy/wan, is not there: run train_stage2.py"):
        DecoderData("toy", "toy/wan", "train", root=tmp_path)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- latents and text tokens


class Coloured(Films):
    """The films of `Films`, in frames of 16 x 16."""

    def read_clips(self, segment):
        for k in range(24):
            yield np.full((9, 16, 16, 3), colour_of(segment, k), np.uint8)


def caption_of(k: int) -> str:
    """In words that the tiny tokenizer knows, one or three."""
    return ("a red circle", "blue", "square grows a")[k % 3]


def write_captions(root: Path, caption) -> None:
    for file in root.glob("cc2017/stimuli/*/clips.jsonl"):
        rows = [json.loads(line) for line in open(file)]
        rows = [row | {"caption": caption(k)} for k, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A tiny Wan, the root of a dataset that is prepared for it, and its source."""
    root = tmp_path_factory.mktemp("decoder")
    wan = root / "tiny-wan"
    torch.manual_seed(0)
    wan_pipeline().save_pretrained(wan)
    write_prepared(root, clips=(48, 24), segments=(2, 1))
    write_captions(root, caption_of)
    source = Coloured()
    source.folder = root
    for segment in ("seg1", "seg2", "test1"):
        source.stimulus(segment)[0].write_text(segment)
    prepare_decoder("cc2017", source, root, str(wan), 5, 16, 16)
    return str(wan), root, source


def test_latents_and_text_are_those_of_each_clip(decoder):
    wan, root, source = decoder
    y = DecoderData("cc2017", wan, "train", root, (5, 16, 16))
    model = VideoDecoder.from_pretrained(wan, load_vae=True, load_text_encoder=True, load_transformer=False)
    for k in (0, 30, 46):
        colour = colour_of(("seg1", "seg2")[k // 24], k % 24)
        video = torch.full((1, 5, 16, 16, 3), colour, dtype=torch.uint8)
        np.testing.assert_allclose(y.latents[k], model.encode_latents(video)[0].numpy(), atol=2e-3)
        start, end = y.text_offsets[k], y.text_offsets[k + 1]
        tokens = model.encode_text([caption_of(k)])[0].numpy()
        np.testing.assert_allclose(y.text_tokens[start:end], tokens, atol=2e-3)
    assert abs(y.latents[0] - y.latents[30]).max() > 0.02  # or the comparison says nothing
    assert y.empty.shape == (model.text_length, model.text_width)


def test_what_a_decoder_needs_and_another_made_is_an_error(decoder):
    wan, root, _ = decoder
    with pytest.raises(ValueError, match="latents.npy was made with frames = 5, but frames = 9 is asked for"):
        DecoderData("cc2017", wan, "train", root, (9, 16, 16))
    with pytest.raises(
        MissingData, match="other/latents.npy, for other, is not there: run python data.py cc2017"
    ):
        DecoderData("cc2017", "other", "train", root, (5, 16, 16))


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("latents.npy", resave(lambda y: y[:, 0]), "48, any, any, any, any"),
        ("latents.npy", resave(lambda y: y[:-1]), "found float16 of shape .47, 4"),
        ("text_tokens.npy", resave(lambda tokens: tokens[:, :-1]), "floating-point"),
        ("text_tokens.npy", resave(lambda tokens: tokens[:-1]), "shape .159, 16., wanted .*160, 16"),
        ("text_offsets.npy", resave(lambda offsets: offsets[::-1].copy()), "numbers that rise"),
        ("text_offsets.npy", resave(lambda offsets: offsets * 0.5), "whole numbers"),
        ("text_offsets.npy", resave(lambda offsets: offsets[1:]), "shape .48., wanted int64 of shape .49"),
    ],
)
def test_damaged_latents_and_text_are_named(decoder, name, damage, said):
    wan, root, _ = decoder
    file = root / "cc2017" / "stimuli" / "train" / "tiny-wan" / name
    whole = file.read_bytes()
    try:
        damage(file)
        with pytest.raises(ValueError, match=said) as error:
            DecoderData("cc2017", wan, "train", root, (5, 16, 16))
        assert str(file.parent) in str(error.value)
    finally:
        file.write_bytes(whole)


def test_the_first_sentences_of_a_caption_go_to_the_text_encoder(decoder, tmp_path):
    wan, _, source = decoder
    write_prepared(tmp_path, clips=(48, 24), segments=(2, 1))
    write_captions(tmp_path, lambda k: f"a red square. A {caption_of(k)}.")
    prepare_decoder("cc2017", source, tmp_path, wan, 5, 16, 16, sentences=1)
    y = DecoderData("cc2017", wan, "train", tmp_path, (5, 16, 16))
    lengths = np.diff(y.text_offsets)
    assert (lengths == lengths[0]).all()
    assert np.array_equal(y.text_tokens[: lengths[0]], y.text_tokens[-lengths[0] :])  # "a red square.", all
    with pytest.raises(ValueError, match="caption_sentences = 1, but caption_sentences = None"):
        prepare_decoder("cc2017", source, tmp_path, wan, 5, 16, 16)


@pytest.mark.parametrize(
    ("size", "tiled"), [(VIDEO["cc2017"], False), (VIDEO["cinebrain"], False), ((81, 720, 1280), True)]
)
def test_presets_are_encoded_in_whole_frames(decoder, monkeypatch, size, tiled):
    asked = []

    def stop(*args, **parts):
        asked.append(parts["tiling"])
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.decoder, "_load", stop)
    monkeypatch.setattr(prepare.decoder, "is_made_by", lambda file, recipe: file.name == "empty_prompt.npy")
    wan, root, source = decoder
    with pytest.raises(KeyboardInterrupt):
        prepare_decoder("cc2017", source, root, wan, *size)
    assert asked == [tiled]


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["cc2017", "--raw", "x", "--window", "0"],
            "argument --window: 0: wanted a whole number of at least 1",
        ),
        (
            ["cc2017", "--raw", "x", "--delay", "-1"],
            "argument --delay: -1: wanted a whole number of at least 0",
        ),
        (["cc2017", "--raw", "x", "--train-segments", "0"], "--train-segments: 0: wanted a whole number"),
        (["cc2017", "--raw", "x", "--test-segments", "two"], "--test-segments: two: wanted a whole number"),
        (["cinebrain", "--raw", "x", "--caption-sentences", "0"], "--caption-sentences: 0: wanted"),
        (["cinebrain", "--raw", "x", "--subject", "7"], "invalid choice: 7"),
        (["cc2017", "--raw", "x", "--captions", "a", "b", "c"], "the test list; 3 files are given"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["cc2017", "--raw", "x", "--win", "2"], "unrecognized arguments: --win"),
    ],
)
def test_wrong_options_end_in_one_line(options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert said in error


def test_without_a_release_the_guide_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["cc2017"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "give --raw" in said
    assert "python data.py cc2017 --raw RAW --subject 1" in said


def test_help_says_what_clip_sees(capsys):
    with pytest.raises(SystemExit):
        command.main(["cinebrain", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--caption-sentences N" in said and "CLIP sees the first 77 tokens" in said


def test_bad_input_is_one_line_and_no_traceback(tmp_path):
    done = run_script("data.py", "cc2017", "--raw", tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.npy"))


def test_reading_imports_no_encoder(tmp_path):
    """Reading prepared data, and asking whether the toy world is prepared, load neither open_clip nor
    diffusers."""
    code = "import sys, data, prepare.command, toy.release; print(sorted({'open_clip', 'diffusers'} & {*sys.modules}))"
    (tmp_path / "look.py").write_text(code)
    done = run_script(str(tmp_path / "look.py"), cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_prepared_toy_world_is_left_as_it_is(tmp_path, monkeypatch):
    files = ["sub1/voxels.npz", "sub1/train/fmri.npy", "sub1/test/fmri.npy"]
    for split in ("train", "test"):
        names = ("clips.jsonl", "categories.npy", "e_txt.npy", "e_img.npy", "e_act.npy")
        files += [f"stimuli/{split}/{name}" for name in names]
    for name in files:
        (tmp_path / "toy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / name).touch()
    for split in ("train", "test"):
        file = tmp_path / "toy" / "sub1" / split / "fmri.npy"
        with writing_array(file, (1, 2, 1, 3), "float32", release.toy_recipe(1)) as fmri:
            fmri[:] = 0
    for name in ("prepare.fmri", "prepare.stimuli", "prepare.decoder"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    monkeypatch.setattr(release, "make_toy", None)
    release.prepare_toy(tmp_path)
    with pytest.raises(ValueError, match="--subject 10: toy has subjects 1 to 9"):
        release.prepare_toy(tmp_path, subject=10)
    with pytest.raises(ImportError):  # the second subject is not there
        release.prepare_toy(tmp_path, subject=2)
    assert not (tmp_path / "toy" / "raw").exists()
    (tmp_path / "toy" / "stimuli" / "test" / "e_act.npy").unlink()
    with pytest.raises(ImportError):
        release.prepare_toy(tmp_path)


# ---------------------------------------------------------------- order of the clips


def test_an_epoch_shows_each_clip_once():
    clips = np.arange(100, 148)
    epochs = [[clips_of_step(clips, 8, 0, 6 * epoch + k) for k in range(6)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == clips.tolist()
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(clips_of_step(clips, 8, 0, 7), epochs[1][1])  # a function of seed and step alone
    assert not np.array_equal(clips_of_step(clips, 8, 1, 0), epochs[0][0])


def test_the_remainder_of_an_epoch_is_left_out_and_another_in_each_epoch():
    clips, left = np.arange(10), set()
    for epoch in range(20):
        shown = np.concatenate([clips_of_step(clips, 4, 0, 2 * epoch + k) for k in range(2)])
        assert len(set(shown)) == 8
        left |= set(clips) - set(shown)
    assert left == set(range(10))
    with pytest.raises(ValueError, match="a batch of 12 clips, but only 10"):
        clips_of_step(clips, 12, 0, 0)


# ---------------------------------------------------------------- scenes and near-copies


def test_far_apart_against_a_loop():
    segments = ["b"] * 20 + ["a"] * 20 + ["c"] * 3
    far = far_apart(segments)
    for i in range(43):
        for j in range(43):
            assert far[i, j] == (segments[i] != segments[j] or abs(i - j) > 15)
    assert far_apart(["s"] * 4, clips=2).sum() == 2


def clips_near(rng, n: int, D: int = 24) -> np.ndarray:
    return unit(rng.normal(size=(n, D)))


def test_near_copies_are_above_the_threshold_and_other_clips_below():
    rng = np.random.default_rng(0)
    train, held_out = clips_near(rng, 240), clips_near(rng, 120)
    copies = np.arange(100)  # clip 120 + k of segment b is a copy of clip k of segment a
    train[120 + copies] = unit(train[copies] + 0.02 * rng.normal(size=(100, 24)))
    threshold, found = near_copy_threshold(train, ["a"] * 120 + ["b"] * 120, held_out)
    assert (train[copies] * train[120 + copies]).sum(1).min() > threshold
    # what is left resembles what a held-out clip finds; with the copies it did not
    assert found["training, all"][3] > 0.95
    assert found["training, left"][3] == pytest.approx(found["held out"][3], abs=0.05)
    assert threshold <= found["held out"][-1]


def test_without_copies_hardly_a_match_is_above_the_threshold():
    rng = np.random.default_rng(1)
    train, held_out = clips_near(rng, 240), clips_near(rng, 120)
    threshold, found = near_copy_threshold(train, ["a"] * 120 + ["b"] * 120, held_out)
    assert threshold >= found["held out"][-2]  # the 95 % quantile
    assert (train @ train.T > threshold).sum() < 240 + 10  # the clips themselves


def test_neighbours_of_a_clip_say_nothing_of_copies():
    """A segment of one long scene: all its neighbours look alike, no clip of another scene does."""
    rng = np.random.default_rng(2)
    train, held_out = np.repeat(clips_near(rng, 30), 8, axis=0), clips_near(rng, 120)
    train = unit(train + 0.01 * rng.normal(size=train.shape))
    _, found = near_copy_threshold(train, ["a"] * 240, held_out)
    assert found["training, all"][-1] < 0.95


def threshold_at_once(train, segments, held_out):
    """The rule with the whole (N, N) matrix in memory, as it was first written."""
    cosines = np.where(far_apart(segments), train @ train.T, -1)
    best_held_out, levels = (held_out @ train.T).max(1), np.linspace(0, 1, 41)

    def best_left(threshold):
        return np.where(cosines > threshold, -1, cosines).max(1)

    def distance(threshold):
        return abs(np.quantile(best_left(threshold), levels) - np.quantile(best_held_out, levels)).mean()

    threshold = min([1.01, *np.quantile(best_held_out, levels)[::-1].tolist()], key=distance)
    best = {"held out": best_held_out, "training, all": best_left(1.01)}
    best |= {"training, left": best_left(threshold)}
    shown = levels[[0, 2, 10, 20, 30, 38, 40]]
    return threshold, {name: np.quantile(x, shown).tolist() for name, x in best.items()}


@pytest.mark.parametrize("block", [7, 64, 1024])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_threshold_by_blocks_is_that_of_the_whole_matrix(monkeypatch, block, seed):
    monkeypatch.setattr(data, "BLOCK", block)
    rng = np.random.default_rng(seed)
    train, held_out = clips_near(rng, 200), clips_near(rng, 90)
    train[120:170] = unit(train[:50] + 0.1 * rng.normal(size=(50, 24)))
    segments = ["b"] * 60 + ["a"] * 60 + ["c"] * 80
    wanted, quantiles = threshold_at_once(train, segments, held_out)
    threshold, found = near_copy_threshold(train, segments, held_out)
    assert threshold == pytest.approx(wanted, abs=1e-6) and threshold < 1.01
    assert found.keys() == quantiles.keys()
    for name in found:
        np.testing.assert_allclose(found[name], quantiles[name], atol=1e-6)


def test_the_memory_of_the_threshold_is_linear_in_the_clips(monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64)
    peaks = []
    for n in (2000, 4000):
        train = clips_near(np.random.default_rng(0), n)
        tracemalloc.start()
        near_copy_threshold(train, ["a"] * (n // 2) + ["b"] * (n // 2), train[:50])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.2 * peaks[0] and peaks[1] < 4000**2  # bytes: a quarter of one matrix of all clips


# ---------------------------------------------------------------- what is held out of training


def test_held_out_are_the_segments_and_no_copy_of_theirs_is_trained_on(tmp_path):
    write_prepared(tmp_path, clips=(240, 60), segments=(4, 2), copies=20, D=24, hidden_numbers=12)
    train, test = (ClipDataset("cc2017", 1, split, root=tmp_path) for split in ("train", "test"))
    split = held_out_clips(train, test, "seg4")
    assert split.held_out.tolist() == [*range(180, 240)]
    assert not set(split.clips) & set(range(20)) and len(split.clips) > 140  # clips 0-19 copy those of seg4
    frames = mean_frames(train.e_img)
    cosines = frames[:180] @ frames[180:].T
    assert np.array_equal(split.clips, np.flatnonzero((cosines <= split.threshold).all(1)))
    segments = [clip["segment"] for clip in train.clips]
    threshold, quantiles = near_copy_threshold(frames, segments, mean_frames(test.e_img))
    assert split.threshold == threshold and split.best_match == quantiles


@pytest.mark.parametrize("nothing", [None, ""])
def test_without_segments_held_out_all_clips_are_trained_on(root, nothing):
    train, test = (ClipDataset("cc2017", 1, split, root=root) for split in ("train", "test"))
    split = held_out_clips(train, test, nothing)
    assert split.clips.tolist() == [*range(48)] and len(split.held_out) == 0
    two = held_out_clips(train, test, "seg1,seg3")
    assert two.held_out.tolist() == [*range(16), *range(32, 48)]
    with pytest.raises(
        ValueError, match="--val_segments seg1,seg9: the training segments are seg1, seg2, seg3"
    ):
        held_out_clips(train, test, "seg1,seg9")


# ---------------------------------------------------------------- hidden voxels


def test_hidden_voxels_depend_on_seed_step_and_clip_alone():
    x, clips = torch.ones(6, 2, 500), np.array([3, 9, 4, 11, 3, 0])
    hidden = hide_voxels(x, 0.4, seed=1, step=7, clips=clips)
    assert hidden.unique().tolist() == [0, pytest.approx(1 / 0.6)]
    assert (hidden == 0).float().mean() == pytest.approx(0.4, abs=0.02)
    assert torch.equal(hidden[0], hidden[4])  # the same clip
    assert torch.equal(hidden[1:3], hide_voxels(x[1:3], 0.4, 1, 7, clips[1:3]))  # in another batch
    for seed, step in ((2, 7), (1, 8)):
        assert not torch.equal(hidden, hide_voxels(x, 0.4, seed, step, clips))
    draw = np.random.default_rng([1, 7, 9, 1]).random((2, 500), np.float32)
    assert np.array_equal(hidden[1].numpy() > 0, draw >= 0.4)
    assert hide_voxels(x, 0.0, 1, 7, clips) is x


def test_mean_frames_are_unit_vectors():
    e_img = unit(np.random.default_rng(0).normal(size=(5, 3, 16)))
    mean = mean_frames(e_img)
    np.testing.assert_allclose(mean, unit(e_img.sum(1)), atol=1e-6)


# ---------------------------------------------------------------- retrieval and average precision


def embeddings(n: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(n, 12, generator=g)
    return e + noise * torch.randn(n, 12, generator=g), e


def test_a_perfect_match_is_found_always():
    _, e = embeddings(80, 0)
    assert retrieval(3 * e, e, far_apart(["s"] * 80)) == pytest.approx((1, 1, 1))


def test_top_1_and_top_5_against_sorting():
    f, e = embeddings(60, 2.0)
    S = F.cosine_similarity(f[:, None], e[None], dim=-1)
    ranks = [S[i].argsort(descending=True).tolist().index(i) for i in range(60)]
    top_1, top_5, _ = retrieval(f, e, far_apart(["s"] * 60))
    assert 0.1 < top_1 < 0.9  # neither trivial
    assert (top_1, top_5) == pytest.approx((np.mean(np.array(ranks) < 1), np.mean(np.array(ranks) < 5)))


def test_n_way_against_every_possible_draw():
    f, e = embeddings(9, 1.5)
    segments = ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    S, other = F.cosine_similarity(f[:, None], e[None], dim=-1), far_apart(segments)
    won = []
    for i in range(9):
        draws = list(
            combinations(np.flatnonzero(other[i]), 3)
        )  # 3 clips of other scenes beside its own: 4-way
        won.append(np.mean([all(S[i, i] > S[i, j] for j in draw) for draw in draws]))
    assert 0.2 < np.mean(won) < 0.95
    assert retrieval(f, e, other, n=4)[2] == pytest.approx(np.mean(won), abs=1e-9)


def test_50_way_against_drawing():
    f, e = embeddings(150, 1.5)
    other, rng = far_apart(["a"] * 75 + ["b"] * 75), np.random.default_rng(0)
    S = F.cosine_similarity(f[:, None], e[None], dim=-1).numpy()
    won = [
        S[i, i] > S[i, rng.choice(np.flatnonzero(other[i]), 49, replace=False)].max()
        for i in range(150)
        for _ in range(60)
    ]
    assert 0.2 < np.mean(won) < 0.95
    assert retrieval(f, e, other)[2] == pytest.approx(np.mean(won), abs=0.025)


def test_random_embeddings_are_found_at_chance():
    torch.manual_seed(0)
    found = np.mean(
        [retrieval(torch.randn(400, 12), torch.randn(400, 12), far_apart(["s"] * 400)) for _ in range(10)], 0
    )
    assert found == pytest.approx([1 / 400, 5 / 400, 1 / 50], abs=0.008)


def test_a_model_that_says_the_same_of_every_clip_is_at_chance_and_not_perfect():
    _, e = embeddings(100, 0)
    top_1, top_5, way_50 = retrieval(torch.zeros(100, 12), e, far_apart(["s"] * 100))
    assert (top_1, top_5) == pytest.approx((0.01, 0.05)) and way_50 == 0
    with pytest.raises(ValueError, match="not finite"):
        retrieval(torch.full((100, 12), torch.nan), e, far_apart(["s"] * 100))


def test_clips_of_one_caption_share_the_first_place():
    e = torch.eye(4)[[0, 0, 1, 2]]
    assert retrieval(e, e, far_apart(["s"] * 4))[0] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)


def test_average_precision_by_hand_and_against_sklearn():
    scores = np.array([[0.9, 0.1, 0.3], [0.8, 0.2, 0.2], [0.7, 0.3, 0.1], [0.6, 0.4, 0.0]])
    truth = np.array(
        [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    )  # the third does not occur, and does not count
    assert average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 4) / 2)
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(200, 6)), rng.random((200, 6)) < 0.2
    assert average_precision(scores, truth) == pytest.approx(
        metrics.average_precision_score(truth, scores, average="macro")
    )


def test_progress_that_is_not_shown_changes_nothing(tmp_path, monkeypatch):
    """With TQDM_DISABLE=1 a bar counts nothing: what is done is counted beside it."""
    from functools import partial

    from tqdm import tqdm

    from prepare import stimuli

    monkeypatch.setattr(
        stimuli,
        "tqdm",
        type("Off", (), {"__new__": lambda cls, **how: tqdm(**how, disable=True), "write": tqdm.write}),
    )
    clips = np.arange(7, dtype=np.uint8)[:, None, None, None, None] * np.ones((7, 1, 2, 2, 3), np.uint8)
    array, counts = np.zeros((7, 1)), []
    encode = partial(lambda some: [some[:, 0, 0, 0, :1].astype(float)])
    stimuli.encode_all(iter(clips[2:]), encode, [array], 2, counts.append, "test", on_cpu=2)
    assert array.ravel().tolist() == [0, 0, 2, 3, 4, 5, 6] and counts == [4, 6, 7]

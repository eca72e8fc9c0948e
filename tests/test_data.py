"""Prepared files, the dataset and its batches, scenes and near-copies, and what the held-out clips are scored by."""

import errno
import json
import os
from itertools import combinations
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import AREAS, CLASSES, sha256, unit, write_prepared

import data
from data import ClipDataset, clips_of_step, far_apart, mean_frames, near_copy_threshold, read_captions
from train_stage1 import average_precision, retrieval

# ---------------------------------------------------------------- written whole


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with data.written_whole(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and files(path.parent) == ["a.txt"]
    with pytest.raises(RuntimeError, match="power"), data.written_whole(path) as part:
        part.write_text("half")
        raise RuntimeError("power")
    assert path.read_text() == "whole" and files(path.parent) == ["a.txt"]  # the earlier one is not harmed


def test_an_array_that_fails_halfway_leaves_neither_file_nor_part_nor_entry(tmp_path):
    with pytest.raises(RuntimeError), data.writing(tmp_path / "e.npy", (3, 2), "float32", {"clip": "a"}) as array:
        array[0] = 1
        raise RuntimeError
    assert files(tmp_path) == []
    assert not data.finished(tmp_path / "e.npy", {"clip": "a"})


def test_the_manifest_says_what_made_each_array(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"film")
    inputs = data.hashes([tmp_path / "film.mp4"])
    for name, shape in (("e.npy", (3, 2)), ("f.npy", (4,))):
        with data.writing(tmp_path / name, shape, "float32", {"clip": name}, inputs) as array:
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
    assert not data.finished(path, {"clip": "a"})
    with data.writing(path, (1,), "uint8", {"clip": "a", "sizes": (1, 2)}):
        pass
    assert data.finished(path, {"clip": "a", "sizes": (1, 2)})  # a tuple comes back as a list
    with pytest.raises(ValueError, match=r"e.npy was made with clip = 'a', but clip = 'b' is asked for; delete the file"):
        data.finished(path, {"clip": "b"})
    with pytest.raises(ValueError, match="window = None, but window = 2"):
        data.finished(path, {"window": 2})
    path.unlink()
    assert not data.finished(path, {"clip": "a"})  # described, but gone


# ---------------------------------------------------------------- recordings -> fmri.npy


class Source(data.Release):
    """Two training segments and one test segment of 6 clips x 4 voxels; response = 100 segment + 10 repeat + clip + voxel / 10."""

    preprocessed = True
    splits = {"train": ["seg1", "seg2"], "test": ["test1"]}
    voxels = np.arange(4) + 50, np.array(["L_V1"] * 4)

    def __init__(self, fails_at: str | None = None):
        self.fails_at = fails_at

    def repeats(self, split):
        return {"train": 2, "test": 3}[split]

    def window(self, split, segment):
        return 0, 6

    def files(self, split, segment):
        return []

    def load_run(self, split, segment, repeat):
        if segment == self.fails_at:
            raise KeyboardInterrupt
        if (segment, repeat) == ("seg2", 1):
            return None
        number = {"seg1": 1, "seg2": 2, "test1": 3}[segment]
        return (100 * number + 10 * repeat + np.arange(6)[:, None] + np.arange(4) / 10).astype(np.float32)


def test_prepare_fmri_puts_each_volume_in_its_place(tmp_path):
    data.prepare_fmri(Source(), tmp_path, {"window": 3}, window=3)
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
        data.prepare_fmri(Source(fails_at), tmp_path, {"window": 1})
    assert not list(tmp_path.rglob(".*")) and not (tmp_path / "test" / "fmri.npy").exists()
    data.prepare_fmri(Source(), tmp_path, {"window": 1})
    made = (tmp_path / "test" / "fmri.npy").stat().st_mtime_ns
    data.prepare_fmri(Source(fails_at), tmp_path, {"window": 1})  # finished: nothing is read
    assert (tmp_path / "test" / "fmri.npy").stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="window = 1, but window = 2"):
        data.prepare_fmri(Source(), tmp_path, {"window": 2}, window=2)


@pytest.mark.parametrize(("file", "function", "call"), [
    ("voxels.npz", (np, "savez_compressed"), 1),
    ("train/fmri.npy", (os, "posix_fallocate"), 1),
    ("test/fmri.npy", (os, "posix_fallocate"), 2),
    ("train/manifest.json", (Path, "write_text"), 1),
])  # fmt: skip
def test_a_full_disk_names_the_file_and_the_next_run_completes(tmp_path, monkeypatch, file, function, call):
    with monkeypatch.context() as patch:
        patch.setattr(*function, full_at(call, getattr(*function)))
        with pytest.raises(OSError, match=rf"{file} takes 0.00\d GB, but the disk is full, with [\d.,]+ GB free: make room"):
            data.prepare_fmri(Source(), tmp_path, {"window": 1})
    assert not list(tmp_path.rglob(".*")) and not data.finished(tmp_path / file, {})
    data.prepare_fmri(Source(), tmp_path, {"window": 1})
    assert np.load(tmp_path / "test" / "fmri.npy").shape == (6, 3, 1, 4) and data.finished(tmp_path / "train" / "fmri.npy", {"window": 1})


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
    """The clips of `Source`, 24 a segment; clip k of a segment shows one colour, and its caption says which."""

    def window(self, split, segment):
        return 0, 24

    def stimulus(self, segment):
        return self.folder / f"{segment}.mp4"

    def read_clips(self, split, segment):
        for k in range(24):
            yield np.full((9, 4, 4, 3), colour_of(segment, k), np.uint8)


def colour_of(segment: str, k: int) -> int:
    return 10 * k + int(segment[-1]) + 3 * segment.startswith("test")


def embedded(colour) -> np.ndarray:
    """(..., 16) unit vectors, another for each colour."""
    return unit(np.random.default_rng(0).normal(size=(256, 16)))[np.asarray(colour, int)]


@pytest.fixture
def films(tmp_path, monkeypatch):
    """prepare_stimuli(captions' order) into tmp_path/stimuli with encoders that read colours; `films.batches` is what they have encoded."""
    source, batches = Films(), []
    source.folder = tmp_path
    for segments in source.splits.values():
        for segment in segments:
            source.stimulus(segment).write_text(segment)

    def prepare(order=lambda rows: rows) -> Path:
        rows = [
            {"segment": segment, "caption": f"{colour_of(segment, k)} dogs"}
            for s in source.splits.values()
            for segment in s
            for k in range(24)
        ]
        told = [row["caption"] for row in rows]
        rows = [row | {"caption": caption} for row, caption in zip(rows, order(told), strict=True)]
        (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data.prepare_stimuli(source, tmp_path / "stimuli", dict.fromkeys(source.splits, tmp_path / "captions.jsonl"), "clip", "viclip")
        return tmp_path / "stimuli"

    def encode_images(model, frames, batch):
        batches.append(len(frames))
        return embedded(frames[..., 0, 0, 0])

    prepare.batches = batches
    monkeypatch.setattr(data, "load_clip", lambda name: (torch.nn.Identity(), {}, None))
    monkeypatch.setattr(data.ViCLIP, "from_pretrained", lambda name: torch.nn.Identity())
    monkeypatch.setattr(data, "encode_images", encode_images)
    monkeypatch.setattr(data, "encode_actions", lambda model, frames, batch=0: embedded(frames[:, 0, 0, 0, 0]))
    monkeypatch.setattr(data, "encode_texts", lambda model, tokenizer, captions: embedded([c.split()[0] for c in captions]))
    monkeypatch.setattr(data, "plan", lambda what, encode, clips, on_cpu: on_cpu)
    return prepare


@pytest.mark.filterwarnings("error")
def test_encodings_are_in_the_order_of_the_clips(films):
    folder = films()
    for split, segments in Source.splits.items():
        colours = [colour_of(segment, k) for segment in segments for k in range(24)]
        assert np.array_equal(np.load(folder / split / "e_img.npy"), np.repeat(embedded(colours)[:, None], 8, 1))
        assert np.array_equal(np.load(folder / split / "e_act.npy"), embedded(colours))
    assert films.batches == [16, 16, 16, 16, 8]


@pytest.mark.parametrize("kind", ["kill", "full disk"])
def test_an_encoding_that_stopped_goes_on_where_it_was(films, monkeypatch, kind):
    def stop(*args):
        raise KeyboardInterrupt if kind == "kill" else OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        encode = data.encode_images
        patch.setattr(data, "encode_images", lambda *args, **options: encode(*args, **options) if len(films.batches) < 2 else stop())
        with pytest.raises(KeyboardInterrupt if kind == "kill" else OSError, match=None if kind == "kill" else "the disk is full"):
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
        patch.setattr(data, "encode_actions", full_at(2, data.encode_actions))
        with pytest.raises(OSError, match="e_img.npy takes|e_act.npy takes"):
            films()
    with pytest.raises(ValueError, match="e_txt.npy was made with captions = .* is asked for; delete the file"):
        films(lambda told: told[::-1])
    (tmp_path / "stimuli" / "train" / "e_txt.npy").unlink()
    with pytest.warns(UserWarning, match="may be in another order"):
        films(lambda told: told[::-1])
    assert films.batches == [16, 16, 16, 16, 16, 16, 8]


def test_captions_in_another_order_are_a_warning_with_the_numbers(films):
    def swapped(told):
        return told[24:48] + told[:24] + told[48:]

    with pytest.warns(UserWarning, match=r"captions of seg1, seg2 may be in another order .* own caption .*\d, .* in \d+% of the clips"):
        films(swapped)


def test_captions_one_clip_late_are_noticed():
    rng = np.random.default_rng(0)
    scenes = np.repeat(rng.normal(size=(30, 16)), 8, 0)  # a scene lasts 8 clips
    e_img, e_txt = (unit(scenes + 0.3 * rng.normal(size=(240, 16)) + 0.3 * own) for own in 2 * [rng.normal(size=(240, 16))])
    segments = ["a"] * 120 + ["b"] * 120
    assert data.captions_that_fit(e_img[:, None], e_txt, segments)[1] == []
    assert data.captions_that_fit(e_img[:, None], np.roll(e_txt, 1, 0), segments)[1] == ["a", "b"]
    assert data.captions_that_fit(e_img[:, None], np.concatenate([e_txt[120:180], e_txt[60:120], e_txt[:60], e_txt[180:]]), segments)[1]


# ---------------------------------------------------------------- captions


def test_read_captions_of_each_format(tmp_path):
    captions = ["a dog runs", "zwei Männer", "a red car"]
    (tmp_path / "list.json").write_text(json.dumps(captions))
    (tmp_path / "records.json").write_text(json.dumps([{"caption": c, "tags": ["dog"], "idx": i} for i, c in enumerate(captions)]))
    rows = [{"segment": segment, "clip": i, "caption": c} for segment in ("test1", "seg1") for i, c in enumerate(captions)]
    rows[0]["caption"] = "only in the test set"
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with h5py.File(tmp_path / "strings.h5", "w") as file:
        file["Captions"] = [c.encode() for c in captions]
    with h5py.File(tmp_path / "column.h5", "w") as file:
        file.create_dataset("Captions", data=np.array([[c] for c in captions], object), dtype=h5py.string_dtype())
    torch.save(captions, tmp_path / "list.pt")
    torch.save(np.array(captions), tmp_path / "array.pt")
    for name in ("list.json", "records.json", "captions.jsonl", "strings.h5", "column.h5", "list.pt", "array.pt"):
        assert [row["caption"] for row in read_captions(tmp_path / name, ["seg1"])] == captions, name
    assert read_captions(tmp_path / "records.json", ["seg1"])[1]["tags"] == ["dog"]
    assert read_captions(tmp_path / "captions.jsonl", ["test1"])[0]["caption"] == "only in the test set"
    with pytest.raises(FileNotFoundError, match=r"gone.json: no such file; --captions takes"):
        read_captions(tmp_path / "gone.json", ["seg1"])


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
    assert train.recorded.sum() == 48 + 32 and not train.recorded[32:, 1].any()


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
    np.testing.assert_allclose(train.averaged(some), (mean[some] - mean[some].mean(0)) / mean[some].std(0), atol=1e-4)


def test_rois_restrict_the_voxels(root):
    one = {rois: ClipDataset("cc2017", 1, "train", rois, root=root) for rois in ("visual", "hippocampus", "visual,hippocampus")}
    assert [AREAS[i // 7 % 5] for i in one["visual"].index] == ["L_V1", "R_FFC", "L_MST"] * 2
    assert set(one["hippocampus"].roi) == {"hippocampus_left"} and one["visual,hippocampus"].sizes["voxels"] == 8
    batch = one["visual"].batch(np.array([5]), 0, 0)["x"][0].numpy()
    assert any(np.array_equal(batch, one["visual"].fmri[5, k][:, [0, 1, 2, 5, 6, 7]]) for k in (0, 1))
    assert one["visual"].averaged().shape == (48, 2, 6)
    with pytest.raises(ValueError, match=r"--rois visual,auditory: \['auditory'\] unknown; there are visual, hippocampus"):
        ClipDataset("cc2017", 1, "train", "visual,auditory", root=root)


def test_rois_without_a_voxel_are_an_error(tmp_path):
    write_prepared(tmp_path, N=3)  # V1, FFC, MST
    with pytest.raises(ValueError, match="--rois hippocampus: none of the voxels"):
        ClipDataset("cc2017", 1, "train", "hippocampus", root=tmp_path)


@pytest.mark.parametrize("voxel", [0, 7, 9])
def test_a_nan_at_a_recorded_showing_names_clip_and_voxel(tmp_path, voxel):
    folder = write_prepared(tmp_path, N=10)
    fmri = np.load(folder / "sub1" / "train" / "fmri.npy")
    fmri[17, :, 0, voxel] = np.nan
    np.save(folder / "sub1" / "train" / "fmri.npy", fmri)
    train = ClipDataset("cc2017", 1, "train", root=tmp_path)
    for look in (lambda: train.batch(np.array([3, 17]), 0, 0), train.averaged):
        with pytest.raises(ValueError, match=rf"fmri.npy: nan at clip 17 \(seg2-001\), .*voxel {voxel} \(source index {7 * voxel}"):
            look()


def test_arrays_that_differ_in_their_number_of_clips_are_an_error(tmp_path):
    stimuli = write_prepared(tmp_path) / "stimuli" / "train"
    np.save(stimuli / "e_txt.npy", np.load(stimuli / "e_txt.npy")[:-1])
    with pytest.raises(ValueError, match="differ in their number of clips.*'fmri': 48.*'e_txt': 47"):
        ClipDataset("cc2017", 1, "train", root=tmp_path)


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
        draws = list(combinations(np.flatnonzero(other[i]), 3))  # 3 clips of other scenes beside its own: 4-way
        won.append(np.mean([all(S[i, i] > S[i, j] for j in draw) for draw in draws]))
    assert 0.2 < np.mean(won) < 0.95
    assert retrieval(f, e, other, n=4)[2] == pytest.approx(np.mean(won), abs=1e-9)


def test_50_way_against_drawing():
    f, e = embeddings(150, 1.5)
    other, rng = far_apart(["a"] * 75 + ["b"] * 75), np.random.default_rng(0)
    S = F.cosine_similarity(f[:, None], e[None], dim=-1).numpy()
    won = [S[i, i] > S[i, rng.choice(np.flatnonzero(other[i]), 49, replace=False)].max() for i in range(150) for _ in range(60)]
    assert 0.2 < np.mean(won) < 0.95
    assert retrieval(f, e, other)[2] == pytest.approx(np.mean(won), abs=0.025)


def test_random_embeddings_are_found_at_chance():
    torch.manual_seed(0)
    found = np.mean([retrieval(torch.randn(400, 12), torch.randn(400, 12), far_apart(["s"] * 400)) for _ in range(10)], 0)
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
    truth = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])  # the third does not occur, and does not count
    assert average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 4) / 2)
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(200, 6)), rng.random((200, 6)) < 0.2
    assert average_precision(scores, truth) == pytest.approx(metrics.average_precision_score(truth, scores, average="macro"))

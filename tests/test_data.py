"""Prepared files and what makes them, the clips and their batches, which clips are alike, retrieval."""

import errno
import json
import os
import re
import shutil
import sys
import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_script, sha256
from tiny import AREAS, CLASSES, unit, wan_pipeline, write_prepared
from tqdm import tqdm

import prepare.copies
import prepare.decoder
from data import Batch, Clips, memories, noise_generator, rng
from metrics.retrieval import average_precision, retrieval
from prepare import stimuli
from prepare.copies import (
    FairRecall,
    far_apart,
    has_near_copy,
    mean_frames,
    near_copy_threshold,
    prepare_copies,
    prepare_recorded,
)
from prepare.decoder import prepare_decoder
from prepare.facts import VIDEO
from prepare.fmri import prepare_fmri
from prepare.release import Release
from prepare.stimuli import encode_all, first_sentences, prepare_stimuli
from support.files import MissingData, hashes, is_made_by, writing_array
from support.pipelines import load_pipeline
from toy import release
from video_decoder import VideoDecoder

# ---------------------------------------------------------------- arrays and their manifest


def test_an_array_that_fails_halfway_leaves_neither_file_nor_part_nor_entry(tmp_path):
    file = tmp_path / "e.npy"
    with pytest.raises(RuntimeError), writing_array(file, (3, 2), "float32", {"clip": "a"}) as array:
        array[0] = 1
        raise RuntimeError
    assert not [*tmp_path.iterdir()] and not is_made_by(file, {"clip": "a"})


def test_the_manifest_says_what_made_each_array(tmp_path):
    film, file = tmp_path / "film.mp4", tmp_path / "e.npy"
    film.write_bytes(b"film")
    for name in ("e", "f"):
        recipe = {"clip": name, "sizes": (1, 2)}
        with writing_array(tmp_path / f"{name}.npy", (3, 2), "float32", recipe, hashes([[film]])) as array:
            array[:] = 7
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest.keys() == {"e.npy", "f.npy"} and (np.load(file) == 7).all()
    entry = manifest["e.npy"]
    assert entry["shape"] == [3, 2] and entry["dtype"] == "float32"
    assert entry["recipe"] == {"clip": "e", "sizes": [1, 2]} and entry["inputs"] == {"film.mp4": sha256(film)}
    assert entry["versions"]["numpy"] == np.__version__
    assert is_made_by(file, {"clip": "e", "sizes": (1, 2)})  # a tuple comes back as a list
    made_with = "e.npy was made with window = None, but window = 2 is asked for; delete it"
    with pytest.raises(ValueError, match=made_with):
        is_made_by(file, {"window": 2})
    file.unlink()
    assert not is_made_by(file, {"clip": "e"})  # described, but gone


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
    file = tmp_path / "test" / "fmri.npy"
    assert not list(tmp_path.rglob(".*")) and not file.exists()
    prepare_fmri(Source(), tmp_path, {"window": 1})
    written_at = file.stat().st_mtime_ns
    prepare_fmri(Source(fails_at), tmp_path, {"window": 1})  # finished: nothing is read
    assert file.stat().st_mtime_ns == written_at
    with pytest.raises(ValueError, match="window = 1, but window = 2"):
        prepare_fmri(Source(), tmp_path, {"window": 2}, window=2)


@pytest.mark.parametrize(("file", "function", "call"), [
    ("voxels.npz", (np, "savez_compressed"), 1),
    ("train/fmri.npy", (os, "posix_fallocate"), 1),
    ("test/fmri.npy", (os, "posix_fallocate"), 2),
    ("train/manifest.json", (Path, "write_text"), 1),
])  # fmt: skip
def test_a_full_disk_names_the_file_and_the_next_run_completes(tmp_path, monkeypatch, file, function, call):
    message = rf"{file} takes 0.00\d GB, but the disk is full, with [\d.,]+ GB free: make room"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
        patch.setattr(*function, full_at(call, getattr(*function)))
        prepare_fmri(Source(), tmp_path, {"window": 1})
    assert not list(tmp_path.rglob(".*")) and not is_made_by(tmp_path / file, {})
    prepare_fmri(Source(), tmp_path, {"window": 1})
    assert np.load(tmp_path / "test" / "fmri.npy").shape == (6, 3, 1, 4)
    assert is_made_by(tmp_path / "train" / "fmri.npy", {"window": 1})


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

    size = 4

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        for segment in self.segments:
            (folder / f"{segment}.mp4").write_text(segment)

    def window(self, segment):
        return 0, 24

    def stimulus(self, segment):
        return [self.folder / f"{segment}.mp4"]

    def read_clips(self, segment):
        for k in range(24):
            yield np.full((9, self.size, self.size, 3), colour_of(segment, k), np.uint8)


def colour_of(segment: str, k: int) -> int:
    return 10 * k + int(segment[-1]) + 3 * segment.startswith("test")


def embedded(colour) -> np.ndarray:
    """(..., 16) unit vectors, another for each colour."""
    return unit(np.random.default_rng(0).normal(size=(256, 16)))[np.asarray(colour, int)]


COLOURS = [colour_of(segment, k) for segment in ("seg1", "seg2") for k in range(24)]


class FilmsPreparation:
    """prepare(order of the captions) into folder/stimuli, with encoders that read colours."""

    def __init__(self, folder: Path):
        self.folder, self.source, self.captions = folder, Films(folder), []
        self.batches = []  # how many clips were encoded at once
        self.error = None  # after two batches

    def prepare(self, order=lambda captions: captions, sentences: int | None = None) -> Path:
        places = [(segment, k) for segment in self.source.segments for k in range(24)]
        captions = order([f"{colour_of(*place)} dogs. They run. A cat sees Dr. Dog!" for place in places])
        file = self.folder / "captions.jsonl"
        rows = [{"segment": s, "caption": text} for (s, _), text in zip(places, captions, strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        lists, folder = {"train": file, "test": file}, self.folder / "stimuli"
        prepare_stimuli(self.source, folder, lists, "clip", "viclip", sentences=sentences)
        return folder

    def encode_images(self, model, frames, batch):
        if self.error and len(self.batches) == 2:
            raise self.error
        self.batches.append(len(frames))
        return embedded(frames[..., 0, 0, 0])

    def encode_actions(self, model, frames, batch):
        return embedded(frames[:, 0, 0, 0, 0])

    def encode_texts(self, model, tokenizer, captions):
        self.captions = captions
        return embedded([caption.split()[0] for caption in captions])


@pytest.fixture
def films(tmp_path, monkeypatch) -> FilmsPreparation:
    films = FilmsPreparation(tmp_path)
    for name in ("encode_images", "encode_actions", "encode_texts"):
        monkeypatch.setattr(stimuli, name, getattr(films, name))
    monkeypatch.setattr(stimuli, "load_clip", lambda name: (torch.nn.Identity(), {}, None))
    monkeypatch.setattr(stimuli.ViCLIP, "from_pretrained", lambda name: torch.nn.Identity())
    monkeypatch.setattr(stimuli, "plan", lambda title, encode, clips, on_cpu: on_cpu)
    return films


@pytest.mark.filterwarnings("error")
def test_encodings_are_in_the_order_of_the_clips(films):
    folder = films.prepare()
    for split, segments in Source.splits.items():
        expected = embedded([colour_of(segment, k) for segment in segments for k in range(24)])
        assert np.array_equal(np.load(folder / split / "e_img.npy"), np.repeat(expected[:, None], 8, 1))
        assert np.array_equal(np.load(folder / split / "e_act.npy"), expected)
    assert films.batches == [16, 16, 16, 16, 8]
    recipe = json.loads((folder / "train" / "manifest.json").read_text())["e_txt.npy"]["recipe"]
    assert recipe.keys() == {"clip", "viclip", "frames", "captions", "caption_sentences"}
    assert films.captions[0].endswith("Dr. Dog!")


@pytest.mark.parametrize(
    ("error", "message"),
    [(KeyboardInterrupt(), None), (OSError(errno.ENOSPC, os.strerror(28)), "the disk is full")],
)
def test_an_encoding_that_stopped_goes_on_where_it_was(films, error, message):
    films.error = error
    with pytest.raises(type(error), match=message):
        films.prepare()
    assert films.batches == [16, 16]
    films.error = None
    folder = films.prepare()
    assert films.batches == [16, 16, 16, 16, 8]  # 32 of the 48 training clips were not encoded again
    assert np.array_equal(np.load(folder / "train" / "e_act.npy"), embedded(COLOURS))
    assert np.array_equal(np.load(folder / "train" / "e_img.npy")[:, 3], embedded(COLOURS))
    assert not list(folder.rglob(".*"))


def test_what_was_begun_with_other_captions_is_begun_anew(films):
    films.error = OSError(errno.ENOSPC, os.strerror(28))
    with pytest.raises(OSError, match="e_img.npy takes|e_act.npy takes"):
        films.prepare()
    films.error = None
    with pytest.raises(ValueError, match="e_txt.npy was made with captions = .* is asked for; delete it"):
        films.prepare(lambda captions: captions[::-1])
    (films.folder / "stimuli" / "train" / "e_txt.npy").unlink()
    with pytest.warns(UserWarning, match="may be in another order"):
        films.prepare(lambda captions: captions[::-1])
    assert films.batches == [16, 16, 16, 16, 16, 16, 8]


def test_captions_in_another_order_are_a_warning_with_the_numbers(films):
    message = r"captions of seg1, seg2 may be in another order .* own caption .*\d, .* in \d+% of the clips"
    with pytest.warns(UserWarning, match=message):
        films.prepare(lambda captions: captions[24:48] + captions[:24] + captions[48:])


def test_the_first_sentences_of_a_caption_go_to_clip(films):
    folder = films.prepare(sentences=2)
    assert films.captions[0] == f"{colour_of('test1', 0)} dogs. They run."
    entry = json.loads((folder / "train" / "manifest.json").read_text())["e_txt.npy"]
    assert entry["recipe"]["caption_sentences"] == 2
    rows = [json.loads(line) for line in open(folder / "train" / "clips.jsonl")]
    assert rows[0]["caption"].endswith("Dr. Dog!")  # whole
    with pytest.raises(ValueError, match="caption_sentences = 2, but caption_sentences = None is asked for"):
        films.prepare()


@pytest.mark.parametrize(
    ("caption", "n", "first"),
    [
        ("A dog runs. A cat sits.", 1, "A dog runs."),
        *(("A dog runs. A cat sits.", n, "A dog runs. A cat sits.") for n in (2, 5)),
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


@pytest.mark.parametrize("silent", [False, True])
def test_encode_all_fills_side_by_side_from_where_it_was(monkeypatch, silent):
    """A progress bar that is not shown (TQDM_DISABLE=1) counts nothing: what is done is counted beside it."""
    monkeypatch.setattr(stimuli, "plan", lambda title, encode, clips, on_cpu: on_cpu)
    monkeypatch.setattr(stimuli, "tqdm", lambda **options: tqdm(**options, disable=silent))
    arrays, counts = (np.zeros(7), np.zeros((7, 2))), []
    clips = (np.full((1, 1, 1, 3), k, np.uint8) for k in range(2, 7))

    def encode(batch):
        k = batch[:, 0, 0, 0, 0].astype(float)
        return k, np.stack([k, -k], 1)

    encode_all(clips, encode, arrays, 2, counts.append, "test", on_cpu=3)
    assert arrays[0].tolist() == [0, 0, 2, 3, 4, 5, 6]
    assert arrays[1][:, 1].tolist() == [0, 0, -2, -3, -4, -5, -6]
    assert counts == [5, 7]
    encode_all(iter(()), encode, arrays, 7, counts.append, "test", on_cpu=3)  # nothing is left to do
    with pytest.raises(ValueError, match="the films have 1 clips, wanted 7"):
        encode_all(iter([np.zeros((1, 1, 1, 3))]), encode, arrays, 0, counts.append, "test", on_cpu=3)


# ---------------------------------------------------------------- the clips


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_prepared(root, N=10, T=2)
    return root


@pytest.fixture
def train(root) -> Clips:
    return Clips("cc2017", 1, "train", root=root, batch_size=8)


def equal(a: Batch, b: Batch) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def whole(parts: list[Batch]) -> Batch:
    return Batch(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True)))


def test_the_clips_read_what_was_prepared(train, root):
    test = Clips("cc2017", 1, "test", root=root)
    assert (len(train), len(test)) == (48, 24) and test.recall is None
    assert train.sizes == {"volumes": 2, "voxels": 10, "frames": 3, "embed_dim": 16, "classes": 4}
    assert train.classes == CLASSES and train.lines[17]["id"] == "seg2-001"
    assert train.recorded.sum() == 48 + 32 and not train.recorded[32:, 1].any()
    assert test.recorded.shape == (24, 3) and test.recorded.all()
    assert test.held_out.tolist() == [*range(24)]


def test_a_batch_has_one_recorded_showing_of_each_clip_and_its_own_targets(train):
    seen = set()
    for step in range(60):
        batch = train.batch(step)
        assert batch.x.shape == (8, 2, 10) and batch.x.isfinite().all() and batch.excluded is None
        for x, clip in zip(batch.x.numpy(), batch.clips.tolist(), strict=True):
            (showing,) = (k for k in (0, 1) if np.array_equal(x, train.fmri[clip, k]))
            seen.add((clip, showing))
        for name in ("e_img", "e_txt", "e_act", "categories"):
            assert np.array_equal(getattr(batch, name), getattr(train, name)[batch.clips])
    # the clips of the last segment were shown twice but recorded once
    assert seen == {(clip, k) for clip in range(48) for k in (0, 1) if clip < 32 or k == 0}
    assert batch.parts(None) == [slice(0, 8)] and batch.parts(5) == [slice(0, 5), slice(5, 10)]


def test_a_batch_does_not_depend_on_which_process_asks(train, root):
    for draws in (train, Clips("cc2017", 1, "train", root=root, batch_size=8, voxel_dropout=0.5)):
        assert equal(draws.batch(5), whole([draws.batch(5, process, 4) for process in range(4)]))
    other = Clips("cc2017", 1, "train", root=root, batch_size=48, seed=1)
    assert not equal(other.batch(0), other.batch(1))


def test_an_epoch_shows_each_clip_once(train, root):
    epochs = [[train.clips_of_step(6 * epoch + k) for k in range(6)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == [*range(48)]
    assert not np.array_equal(epochs[0], epochs[1])
    other = Clips("cc2017", 1, "train", root=root, batch_size=8, seed=1)
    assert not np.array_equal(other.clips_of_step(0), epochs[0][0])


def test_the_remainder_of_an_epoch_is_left_out_and_another_in_each_epoch(root):
    clips, left = Clips("cc2017", 1, "train", root=root, batch_size=20), set()
    for epoch in range(60):
        shown = np.concatenate([clips.clips_of_step(2 * epoch + k) for k in range(2)])
        assert len(set(shown)) == 40
        left |= {*range(48)} - set(shown)
    assert left == {*range(48)}
    with pytest.raises(ValueError, match="a batch of 49 clips, but only 48 .* smaller --batch_size"):
        Clips("cc2017", 1, "train", root=root, batch_size=49)


def test_hidden_voxels_depend_on_seed_step_and_clip_alone(root, train):
    clips = Clips("cc2017", 1, "train", root=root, batch_size=48, seed=1, voxel_dropout=0.4)
    plain = Clips("cc2017", 1, "train", root=root, batch_size=48, seed=1)
    batch, all_voxels = clips.batch(7), plain.batch(7)
    hidden = batch.x == 0
    assert hidden.float().mean() == pytest.approx(0.4, abs=0.05)
    torch.testing.assert_close(batch.x, all_voxels.x * ~hidden / 0.6)
    for mask, clip in zip(hidden.numpy(), batch.clips.tolist(), strict=True):
        assert np.array_equal(mask, np.random.default_rng([1, 7, clip, 1]).random((2, 10), np.float32) < 0.4)
    next_step = clips.batch(8)
    order = [next_step.clips.tolist().index(clip) for clip in batch.clips]
    assert not torch.equal(next_step.x[order] == 0, hidden)


def test_a_generator_belongs_to_its_numbers():
    for kind in (
        lambda *key: rng(*key).random(3).tolist(),
        lambda *key: noise_generator(*key).initial_seed(),
    ):
        draws = [kind(*key) for key in ((0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3))]
        assert draws[0] == kind(0, 1, 2) and all(draws[0] != other for other in draws[1:])
    assert noise_generator(1).initial_seed() != noise_generator(1, 0).initial_seed()


def test_averaged_is_the_mean_of_the_recorded_showings_z_scored_over_the_clips(train):
    x = train.averaged().numpy()
    assert np.abs(x.mean(0)).max() < 1e-5 and np.abs(x.std(0) - 1).max() < 1e-4
    mean = np.nanmean(np.array(train.fmri), 1)
    np.testing.assert_allclose(x, (mean - mean.mean(0)) / mean.std(0), atol=1e-4)
    part = mean[30:40]  # over these clips alone
    expected = (part - part.mean(0)) / part.std(0)
    np.testing.assert_allclose(train.averaged(np.arange(30, 40)), expected, atol=1e-4)


def test_rois_restrict_the_voxels(root):
    names = ("visual", "hippocampus", "visual,hippocampus")
    visual, hippocampus, both = (Clips("cc2017", 1, "train", rois, root=root) for rois in names)
    assert [AREAS[i // 7 % 5] for i in visual.index] == ["L_V1", "R_FFC", "L_MST"] * 2
    assert set(hippocampus.roi) == {"hippocampus_left"} and both.sizes["voxels"] == 8
    batch = visual.batch(0)
    showings = visual.fmri[batch.clips.item()][..., [0, 1, 2, 5, 6, 7]]
    assert any(np.array_equal(batch.x[0], showing) for showing in showings)
    assert visual.averaged().shape == (48, 2, 6)
    unknown = r"--rois visual,auditory: \['auditory'\] unknown; there are visual, hippocampus"
    with pytest.raises(ValueError, match=unknown):
        Clips("cc2017", 1, "train", "visual,auditory", root=root)


def test_rois_without_a_voxel_are_an_error(tmp_path):
    write_prepared(tmp_path, N=3)  # V1, FFC, MST
    with pytest.raises(ValueError, match="--rois hippocampus: none of the voxels"):
        Clips("cc2017", 1, "train", "hippocampus", root=tmp_path)


@pytest.mark.parametrize(("value", "voxels"), [(np.nan, [0, 5, 9]), (np.inf, [7]), (-np.inf, [9])])
def test_a_nan_or_infinity_at_a_recorded_showing_names_clip_and_voxel(tmp_path, value, voxels):
    folder = write_prepared(tmp_path, N=10) / "sub1"
    fmri = np.load(folder / "train" / "fmri.npy")
    fmri[17, :, 0, voxels] = value
    np.save(folder / "train" / "fmri.npy", fmri)
    prepare_recorded(folder)  # a showing that is NaN in part was recorded
    train = Clips("cc2017", 1, "train", root=tmp_path, batch_size=48)
    place = rf"{value} at clip 17 \(seg2-001\), volume 0, voxel {voxels[0]} "
    place += rf"\(source index {7 * voxels[0]}, {AREAS[voxels[0] % 5]}\)"
    for read in (lambda: train.batch(0), train.averaged):
        with pytest.raises(ValueError, match=f"fmri.npy: found {place}"):
            read()


def resave(change):
    """A change of an .npy file's array."""
    return lambda file: np.save(file, change(np.load(file)))


def with_value(value, place=(5, 0)):
    def change(array):
        array = array.copy()
        array[place] = value
        return array

    return resave(change)


def rewrite(old: str, new: str):
    """A change of a file's text, at its first place."""
    return lambda file: file.write_text(file.read_text().replace(old, new, 1))


def cut_off(size: int):
    return lambda file: os.truncate(file, size)


FMRI, VOXELS, LINES = "sub1/train/fmri.npy", "sub1/voxels.npz", "stimuli/train/clips.jsonl"
TRAIN, MANIFEST = "stimuli/train", "stimuli/train/manifest.json"
FAULTS = {
    "fmri of float64": (FMRI, resave(lambda x: x.astype(np.float64)), "float64"),
    "fmri of whole numbers": (FMRI, resave(lambda x: np.nan_to_num(x).astype(int)), "int64"),
    "fmri of three axes": (FMRI, resave(lambda x: x[:, 0]), "shape"),
    "fmri of other voxels": (FMRI, resave(lambda x: x[..., :-1]), "48, any, any, 10"),
    "fmri without a showing": (FMRI, resave(lambda x: x[:, :0]), "as manifest.json beside it says"),
    "fmri cut off": (FMRI, cut_off(3000), "a whole .npy file"),
    "recorded of one showing": ("sub1/train/recorded.npy", resave(lambda x: x[:, :1]), r"\(48, 2\)"),
    "near_copies of fewer clips": (f"{TRAIN}/near_copies.npy", resave(lambda x: x[:-1]), r"\(48, 6\)"),
    "captions of fewer clips": (f"{TRAIN}/captions.npy", resave(lambda x: x[:-1]), r"\(48\)"),
    "e_img with NaN": (f"{TRAIN}/e_img.npy", with_value(np.nan, (5, 1, 2)), r"nan at \(5, 1, 2\)"),
    "e_txt with infinity": (f"{TRAIN}/e_txt.npy", with_value(np.inf), r"inf at \(5, 0\)"),
    "e_txt of fewer clips": (
        f"{TRAIN}/e_txt.npy",
        resave(lambda x: x[:-1]),
        r"\(47, 16\), wanted .*\(48, 16\)",
    ),
    "e_act of another D": (f"{TRAIN}/e_act.npy", resave(lambda x: x[:, :8]), "48, 16"),
    "e_img of text": (f"{TRAIN}/e_img.npy", resave(lambda x: x.astype("U3")), "floating-point"),
    "categories of another K": (f"{TRAIN}/categories.npy", resave(lambda x: x[:, :3]), "48, 4"),
    "categories of 2": (f"{TRAIN}/categories.npy", with_value(2), "wanted 0 and 1"),
    "categories of 0.5": (f"{TRAIN}/categories.npy", resave(lambda x: x / 2), "whole numbers"),
    "classes that are no list": (
        MANIFEST,
        rewrite('"classes": [', '"classes": "person", "also": ['),
        "a list of names",
    ),
    "classes that are no names": (MANIFEST, rewrite('"person"', "1"), "a list of names"),
    "a manifest without them": (MANIFEST, lambda file: file.write_text("{}"), "a list of names"),
    "a manifest that is no JSON": (MANIFEST, cut_off(40), "JSON"),
    "a start that is no number": (LINES, rewrite('"start_s": 4.0', '"start_s": "4"'), "start_s"),
    "a start that is NaN": (LINES, rewrite('"start_s": 4.0', '"start_s": NaN'), "start_s"),
    "a clip without a video": (LINES, rewrite('"video": "seg1.mp4", ', ""), "no video"),
    "a caption that is a list": (LINES, rewrite('"caption": "clip 2"', '"caption": ["a"]'), "caption"),
    "lines cut off": (LINES, cut_off(310), "JSON"),
    "voxels cut off": (VOXELS, cut_off(100), "an .npz file of index, roi"),
}


@pytest.fixture
def prepared(tmp_path, root) -> Path:
    """A copy to damage."""
    return shutil.copytree(root, tmp_path / "data") / "cc2017"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named(prepared, fault):
    name, damage, message = FAULTS[fault]
    damage(prepared / name)
    with pytest.raises(ValueError, match=message) as error:
        Clips("cc2017", 1, "train", root=prepared.parent)
    assert str(error.value).startswith(str(prepared / name))


NAMES = ("categories", "e_img", "e_txt", "e_act")
DERIVED = (f"{TRAIN}/near_copies.npy", f"{TRAIN}/captions.npy", FMRI.replace("fmri", "recorded"))


@pytest.mark.parametrize("name", [VOXELS, FMRI, LINES, *(f"{TRAIN}/{name}.npy" for name in NAMES)])
def test_what_is_not_prepared_is_named_with_the_way_to_it(prepared, name):
    (prepared / name).unlink()
    with pytest.raises(MissingData, match="python data.py cc2017 --raw RAW --subject 1") as missing:
        Clips("cc2017", 1, "train", root=prepared.parent)
    assert str(prepared / name) in str(missing.value)


@pytest.mark.parametrize("name", DERIVED)
def test_what_an_older_version_did_not_prepare_is_one_line(prepared, name):
    (prepared / name).unlink()
    line = f"{prepared / name} is not there: python data.py cc2017 --raw DIR --subject 1 makes it"
    with pytest.raises(MissingData, match=f"^{re.escape(line)}$"):
        Clips("cc2017", 1, "train", root=prepared.parent)


def test_the_toy_world_is_not_made_by_reading_it(tmp_path):
    makes = "train_stage1.py and train_stage2.py make and prepare the toy world"
    with pytest.raises(MissingData, match=makes):
        Clips("toy", 1, "train", root=tmp_path)
    with pytest.raises(ValueError, match="--subject 10: toy has subjects 1 to 9"):
        Clips("toy", 10, "train", root=tmp_path)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- latents and text tokens


def caption_of(k: int) -> str:
    """In words that the tiny tokenizer knows, one or three."""
    return ("a red circle", "blue", "square grows a")[k % 3]


def write_captions(folder: Path, caption) -> None:
    for file in folder.glob("*/clips.jsonl"):
        rows = [json.loads(line) for line in open(file)]
        rows = [row | {"caption": caption(k)} for k, row in enumerate(rows)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_copies(folder)


@pytest.fixture(scope="module")
def films16(tmp_path_factory) -> Films:
    films = Films(tmp_path_factory.mktemp("films"))
    films.size = 16
    return films


@pytest.fixture(scope="module")
def wan_root(tmp_path_factory, films16) -> Path:
    """A dataset that is prepared for the tiny Wan beside it."""
    root = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    wan_pipeline().save_pretrained(root / "tiny-wan")
    stimuli = write_prepared(root, clips=(48, 24), segments=(2, 1)) / "stimuli"
    write_captions(stimuli, caption_of)
    prepare_decoder(films16, stimuli, str(root / "tiny-wan"), (5, 16, 16))
    return root


def read_clips(root: Path, decoder: str = "tiny-wan", size=(5, 16, 16), **options) -> Clips:
    return Clips("cc2017", 1, "train", None, str(root / decoder), size, root, **options)


def test_latents_and_text_are_those_of_each_clip(wan_root):
    clips = read_clips(wan_root)
    pipe, L, config = load_pipeline(wan_root / "tiny-wan", vae=True, text_encoder=True)
    model = VideoDecoder(pipe, L, config)
    for k in (0, 30, 46):
        video = torch.full((1, 5, 16, 16, 3), COLOURS[k], dtype=torch.uint8)
        np.testing.assert_allclose(clips.latents[k], model.encode_latents(video)[0].numpy(), atol=2e-3)
        (tokens,) = model.encode_text([caption_of(k)])
        np.testing.assert_allclose(clips.texts[k], tokens.numpy(), atol=2e-3)
    assert abs(clips.latents[0] - clips.latents[30]).max() > 0.02  # or the comparison says nothing
    assert clips.empty.shape == (model.text_length, model.text_width)


def test_the_draws_of_stage_2_belong_to_seed_step_and_clip(wan_root):
    clips = read_clips(wan_root, batch_size=8, seed=3, condition_dropout=0.3)
    batch = clips.batch(5)
    assert equal(batch, whole([clips.batch(5, process, 2) for process in range(2)]))
    assert np.array_equal(batch.y, clips.latents[batch.clips]) and batch.dropped.shape == (8, 1, 1)
    for b, clip in enumerate(batch.clips.tolist()):
        generator = noise_generator(3, 5, clip)
        u, chance = torch.rand(2, generator=generator)
        assert batch.u[b] == u and batch.dropped[b] == (chance < 0.3)
        assert torch.equal(batch.noise[b], torch.randn(batch.noise.shape[1:], generator=generator))
    steps = whole([clips.batch(step) for step in range(300)])
    dropped = steps.dropped.flatten()
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.03)
    assert steps.u.mean() == pytest.approx(0.5, abs=0.03)
    assert steps.u.std() == pytest.approx(12**-0.5, abs=0.02)
    assert steps.u[dropped].mean() == pytest.approx(0.5, abs=0.05)  # what is dropped does not follow the time


def test_a_step_excludes_what_a_held_out_clip_could_not_retrieve(wan_root):
    """All test captions recur in training: so may a training clip's, unless a share is asked for."""
    for share, p_hidden in ((None, 0), (0.0, 1), (0.25, 0.75)):
        clips = read_clips(wan_root, batch_size=48, caption_share=share)
        assert clips.recall.test_share == 1 and clips.recall.p_hidden == pytest.approx(p_hidden)
        batch, hidden = clips.batch(2), []
        for row, clip in zip(batch.excluded.numpy(), batch.clips.numpy(), strict=True):
            draw = np.random.default_rng([0, 2, clip, 2]).random()
            hidden.append(draw < p_hidden)
            assert np.array_equal(row, clips.recall.excluded(np.array([clip]), np.array([hidden[-1]]))[0])
        assert np.mean(hidden) == pytest.approx(p_hidden, abs=0.2)


def test_memories_are_the_clips_trained_on(wan_root):
    clips = read_clips(wan_root, val_segments="seg1")
    e, captions = memories(clips, lambda e_img: 2 * e_img[:, 1])
    assert clips.trained.min() >= 24 and len(e) == len(captions) == len(clips.trained)
    for n, clip in enumerate(clips.trained):
        kinds = torch.from_numpy(np.stack([clips.e_txt[clip], clips.e_img[clip, 1], clips.e_act[clip]]))
        torch.testing.assert_close(e[n], kinds)
        assert np.array_equal(captions[n], clips.texts[clip])


def test_what_a_decoder_needs_and_another_made_is_an_error(wan_root):
    with pytest.raises(ValueError, match="latents.npy was made with frames = 5, but frames = 9 is asked for"):
        read_clips(wan_root, size=(9, 16, 16))
    missing = "other/latents.npy, for .*other, is not there: run python data.py cc2017"
    with pytest.raises(MissingData, match=missing):
        read_clips(wan_root, "other")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("latents.npy", resave(lambda y: y[:, 0]), "48, any, any, any, any"),
        ("latents.npy", resave(lambda y: y[:-1]), "found float16 of shape .47, 4"),
        ("text_tokens.npy", resave(lambda tokens: tokens[:, :-1]), "floating-point"),
        ("text_tokens.npy", resave(lambda tokens: tokens[:-1]), "shape .159, 16., wanted .*160, 16"),
        ("text_tokens.npy", with_value(np.nan), r"nan at \(1, 0\)"),
        ("text_offsets.npy", resave(lambda offsets: offsets[::-1].copy()), "numbers that rise"),
        ("text_offsets.npy", resave(lambda offsets: offsets * 0.5), "whole numbers"),
        ("text_offsets.npy", resave(lambda offsets: offsets[1:]), "shape .48,., wanted .*49"),
    ],
)
def test_damaged_latents_and_text_are_named(wan_root, name, damage, message):
    file = wan_root / "cc2017" / "stimuli" / "train" / "tiny-wan" / name
    content = file.read_bytes()
    try:
        damage(file)
        with pytest.raises(ValueError, match=message) as error:
            memories(read_clips(wan_root), lambda e_img: e_img[:, 0])
        assert str(error.value).startswith(str(file))
    finally:
        file.write_bytes(content)


def test_the_first_sentences_of_a_caption_go_to_the_text_encoder(wan_root, films16, tmp_path):
    stimuli = write_prepared(tmp_path, clips=(48, 24), segments=(2, 1)) / "stimuli"
    write_captions(stimuli, lambda k: f"a red square. A {caption_of(k)}.")
    wan = shutil.copytree(wan_root / "tiny-wan", tmp_path / "tiny-wan")
    prepare_decoder(films16, stimuli, str(wan), (5, 16, 16), sentences=1)
    texts = read_clips(tmp_path).texts
    assert all(np.array_equal(text, texts[0]) for text in texts)  # "a red square.", all
    with pytest.raises(ValueError, match="caption_sentences = 1, but caption_sentences = None"):
        prepare_decoder(films16, stimuli, str(wan), (5, 16, 16))


@pytest.mark.parametrize(
    ("size", "tiled"), [(VIDEO["cc2017"], False), (VIDEO["cinebrain"], False), ((81, 720, 1280), True)]
)
def test_presets_are_encoded_in_whole_frames(wan_root, films16, monkeypatch, size, tiled):
    tiling = []

    def stop(*args, **parts):
        tiling.append(parts["tiling"])
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.decoder, "_load", stop)
    monkeypatch.setattr(prepare.decoder, "is_made_by", lambda file, recipe: file.name == "empty_prompt.npy")
    with pytest.raises(KeyboardInterrupt):
        prepare_decoder(films16, wan_root / "cc2017" / "stimuli", str(wan_root / "tiny-wan"), size)
    assert tiling == [tiled]


# ---------------------------------------------------------------- what reading leaves alone


def test_reading_imports_no_encoder(tmp_path):
    """Reading prepared data, and asking whether the toy world is prepared, load neither open_clip nor
    diffusers."""
    code = "import sys, data, prepare.command, toy.release; print(sorted({'open_clip', 'diffusers'} & {*sys.modules}))"
    (tmp_path / "look.py").write_text(code)
    done = run_script(str(tmp_path / "look.py"), cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_prepared_toy_world_is_left_as_it_is(tmp_path, monkeypatch):
    folder = tmp_path / "toy"
    names = (
        "clips.jsonl",
        "categories.npy",
        "e_txt.npy",
        "e_img.npy",
        "e_act.npy",
        "near_copies.npy",
        "captions.npy",
    )
    files = [folder / "stimuli" / split / name for split in ("train", "test") for name in names]
    files += [folder / "sub1" / name for name in ("voxels.npz", "train/recorded.npy", "test/recorded.npy")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for split in ("train", "test"):
        file = folder / "sub1" / split / "fmri.npy"
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
    assert not (folder / "raw").exists()
    (folder / "stimuli" / "test" / "e_act.npy").unlink()
    with pytest.raises(ImportError):
        release.prepare_toy(tmp_path)


# ---------------------------------------------------------------- scenes and near-copies


def test_far_apart_against_a_loop():
    segments = ["b"] * 20 + ["a"] * 20 + ["c"] * 3
    far = far_apart(segments)
    for i in range(43):
        for j in range(43):
            assert far[i, j] == (segments[i] != segments[j] or abs(i - j) > 15)
    assert np.array_equal(far_apart(segments, slice(5, 9)), far[5:9])


def test_mean_frames_are_unit_vectors():
    e_img = unit(np.random.default_rng(0).normal(size=(5, 3, 16)))
    np.testing.assert_allclose(mean_frames(e_img), unit(e_img.sum(1)), atol=1e-6)


def random_clips(rng: np.random.Generator, n: int) -> np.ndarray:
    return unit(rng.normal(size=(n, 24)))


def test_near_copies_are_above_the_threshold_and_other_clips_below():
    rng = np.random.default_rng(0)
    train, held_out = random_clips(rng, 240), random_clips(rng, 120)
    copies = np.arange(100)  # clip 120 + k of segment b is a copy of clip k of segment a
    train[120 + copies] = unit(train[copies] + 0.02 * rng.normal(size=(100, 24)))
    threshold, best = near_copy_threshold(train, ["a"] * 120 + ["b"] * 120, held_out)
    assert (train[copies] * train[120 + copies]).sum(1).min() > threshold
    # what is left resembles what a held-out clip finds; with the copies it did not
    assert best["training, all"][3] > 0.95
    assert best["training, left"][3] == pytest.approx(best["held out"][3], abs=0.05)
    assert threshold <= best["held out"][-1]


def test_without_copies_hardly_a_match_is_above_the_threshold():
    rng = np.random.default_rng(1)
    train, held_out = random_clips(rng, 240), random_clips(rng, 120)
    segments = ["a"] * 120 + ["b"] * 120
    threshold, best = near_copy_threshold(train, segments, held_out)
    assert threshold >= best["held out"][-2]  # the 95 % quantile
    assert (train @ train.T > threshold).sum() < 240 + 10  # the clips themselves
    closer = unit(held_out + train[:120])
    assert near_copy_threshold(train, segments, closer)[0] > 1


def test_neighbours_of_a_clip_say_nothing_of_copies():
    """A segment of one long scene: all its neighbours look alike, no clip of another scene does."""
    rng = np.random.default_rng(2)
    train, held_out = np.repeat(random_clips(rng, 30), 8, axis=0), random_clips(rng, 120)
    train = unit(train + 0.01 * rng.normal(size=train.shape))
    _, best = near_copy_threshold(train, ["a"] * 240, held_out)
    assert best["training, all"][-1] < 0.95


def threshold_at_once(train, segments, held_out):
    """The rule with the whole (N, N) matrix in memory, as it was first written."""
    cosines = np.where(far_apart(segments), train @ train.T, -1)
    best_held_out, levels = (held_out @ train.T).max(1), np.linspace(0, 1, 41)

    def best_left(threshold):
        return np.where(cosines > threshold, -1, cosines).max(1)

    def distance(threshold):
        return abs(np.quantile(best_left(threshold), levels) - np.quantile(best_held_out, levels)).mean()

    threshold = min([1.01, *np.quantile(best_held_out, levels)[::-1].tolist()], key=distance)
    best = {
        "held out": best_held_out,
        "training, all": best_left(1.01),
        "training, left": best_left(threshold),
    }
    shown = levels[[0, 2, 10, 20, 30, 38, 40]]
    return threshold, {name: np.quantile(x, shown).tolist() for name, x in best.items()}


@pytest.mark.parametrize("block", [7, 64, 1024])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_threshold_by_blocks_is_that_of_the_whole_matrix(monkeypatch, block, seed):
    monkeypatch.setattr(prepare.copies, "BLOCK", block)
    rng = np.random.default_rng(seed)
    train, held_out = random_clips(rng, 200), random_clips(rng, 90)
    train[120:170] = unit(train[:50] + 0.1 * rng.normal(size=(50, 24)))
    segments = ["b"] * 60 + ["a"] * 60 + ["c"] * 80
    wanted, quantiles = threshold_at_once(train, segments, held_out)
    threshold, best = near_copy_threshold(train, segments, held_out)
    assert threshold == pytest.approx(wanted, abs=1e-6) and threshold < 1.01
    assert best.keys() == quantiles.keys()
    for name in best:
        np.testing.assert_allclose(best[name], quantiles[name], atol=1e-6)


def test_the_memory_of_the_threshold_is_linear_in_the_clips(monkeypatch):
    monkeypatch.setattr(prepare.copies, "BLOCK", 64)
    peaks = []
    for n in (2000, 4000):
        train = random_clips(np.random.default_rng(0), n)
        tracemalloc.start()
        near_copy_threshold(train, ["a"] * (n // 2) + ["b"] * (n // 2), train[:50])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.2 * peaks[0] and peaks[1] < 4000**2  # bytes: a quarter of one matrix of all clips


@pytest.fixture
def with_copies(tmp_path) -> Path:
    """The data's root: of 240 training clips the first 20 copy clips of seg4."""
    write_prepared(tmp_path, clips=(240, 60), segments=(4, 2), copies=20, D=24, hidden_numbers=12)
    return tmp_path


def test_near_copies_captions_and_their_threshold_are_written_once(with_copies):
    folder = with_copies / "cc2017" / "stimuli"
    train, test = (Clips("cc2017", 1, split, root=with_copies) for split in ("train", "test"))
    frames, held_out = mean_frames(train.e_img), mean_frames(test.e_img)
    segments = [line["segment"] for line in train.lines]
    threshold, best_match = near_copy_threshold(frames, segments, held_out)
    values = json.loads((folder / "train" / "near_copies.json").read_text())
    assert values["threshold"] == threshold and values["best_match"] == best_match
    assert values["test clips with a caption of training"] == 1
    assert np.array_equal(train.recall.copies_of(np.arange(240)), frames @ frames.T > threshold)
    copies = (held_out @ frames.T > threshold).any(1)
    assert np.array_equal(has_near_copy(test.stimuli, np.arange(60)), copies)
    recall = Clips("cc2017", 1, "train", root=with_copies, val_segments="seg4").recall
    assert recall.held_out.tolist() == [*range(180, 240)] and recall.trained.tolist() == [*range(20, 180)]
    names = [f"{split}/{name}.npy" for split in ("train", "test") for name in ("near_copies", "captions")]
    times = [(folder / name).stat().st_mtime_ns for name in names]
    prepare_copies(folder)
    assert times == [(folder / name).stat().st_mtime_ns for name in names]
    write_captions(folder, lambda k: ("A dog, runs!", "a DOG runs", f"clip {k}", f"clip {1000 + k}")[k % 4])
    number = np.load(folder / "train" / "captions.npy")  # other captions: written anew
    assert number[0] == number[1] == number[4] and len(np.unique(number)) == 121
    lines = folder / "test" / "clips.jsonl"
    lines.write_text(lines.read_text().replace("a DOG runs", "a bird"))
    prepare_copies(folder)
    in_test = np.load(folder / "test" / "captions.npy")
    assert in_test[:4].tolist() == [number[0], -1, number[2], number[3]]


def test_which_showings_were_recorded_is_written_once_and_anew_for_other_recordings(prepared):
    folder = prepared / "sub1"
    file, fmri = folder / "train" / "recorded.npy", np.load(folder / "train" / "fmri.npy")
    assert np.array_equal(np.load(file), np.isfinite(fmri[:, :, 0, 0]))
    written_at = file.stat().st_mtime_ns
    prepare_recorded(folder)
    assert file.stat().st_mtime_ns == written_at
    fmri[3, 1], fmri[5, 0, 0, 2] = np.nan, np.nan  # a whole showing, and one number
    np.save(folder / "train" / "fmri.npy", fmri)
    prepare_recorded(folder)
    assert not np.load(file)[3, 1] and np.load(file)[5].all()
    fmri[17] = np.nan
    np.save(folder / "train" / "fmri.npy", fmri)
    with pytest.raises(ValueError, match="fmri.npy: found no showing of clip 17, wanted one or more"):
        prepare_recorded(folder)


# ---------------------------------------------------------------- train as one tests


SEGMENTS = ["a"] * 50 + ["b"] * 50


@pytest.fixture
def recall_of(tmp_path):
    """FairRecall of two segments of 50 clips, of pairs that are near-copies, and of these captions."""

    def make(
        pairs=(), captions=None, in_test=(-1,), val_segments=None, share=0.0, segments=SEGMENTS
    ) -> FairRecall:
        n = len(segments)
        copies = np.eye(n, dtype=bool)
        for i, j in pairs:
            copies[i, j] = copies[j, i] = True
        for split in ("train", "test"):
            (tmp_path / split).mkdir(exist_ok=True)
        np.save(tmp_path / "train" / "near_copies.npy", np.packbits(copies, axis=1))
        np.save(tmp_path / "train" / "captions.npy", np.arange(n) if captions is None else captions)
        np.save(tmp_path / "test" / "captions.npy", np.array(in_test))
        recall = FairRecall(tmp_path / "train", segments, val_segments, share)
        recall.count_choices()
        return recall

    return make


def test_excluded_are_the_clip_its_neighbours_and_its_copies(recall_of):
    recall, clips = recall_of(pairs=[(10, 90), (10, 45)]), np.array([10, 90, 49])
    excluded = recall.excluded(clips)
    assert np.flatnonzero(excluded[0]).tolist() == [*range(26), 45, 90]
    assert np.flatnonzero(excluded[1]).tolist() == [10, *range(75, 100)]
    # clip 50, next in the file but of another segment, stays
    assert np.flatnonzero(excluded[2]).tolist() == [*range(34, 50)]


def test_a_clip_whose_caption_is_hidden_retrieves_none_like_it(recall_of):
    recall, clips = recall_of(captions=np.arange(100) % 25), np.array([10, 10])
    hidden, visible = recall.excluded(clips, np.array([True, False]))
    assert np.array_equal(visible, recall.excluded(clips)[0])
    assert {*np.flatnonzero(hidden)} == {*range(26), 35, 60, 85}


def test_training_clips_find_their_caption_as_seldom_as_held_out_clips(recall_of):
    captions = np.arange(100) % 50  # each twice, in two segments
    captions[:20], captions[50:70] = np.arange(100, 120), np.arange(200, 220)  # 40 clips: once
    for share, hidden in (
        (0.6, 0),
        (1.0, 0),
        (0.06, 0.9),
        (0.0, 1),
    ):  # 60 % have theirs: a tenth are 6 % of all
        assert recall_of(captions=captions, share=share).p_hidden == pytest.approx(hidden)
    recall = recall_of(captions=captions, in_test=[49, -1, -1, 100, -1], share=None)
    assert recall.test_share == 0.4 and recall.p_hidden == pytest.approx(1 - 0.4 / 0.6)
    allowed = ~recall.excluded(np.arange(100))
    assert recall.most == allowed.sum(1).max()
    assert recall.fewest == (allowed & ~recall.same_caption(np.arange(100))).sum(1).min()
    assert "100 clips and memories" in recall.describe() and "(test clips: 40.0%)" in recall.describe()


def test_the_fewest_and_the_most_are_of_all_clips(recall_of):
    recall = recall_of(segments=[f"{i // 50}" for i in range(1500)])  # more than a block
    assert (recall.fewest, recall.most) == (1500 - 31, 1500 - 16)


def test_held_out_are_the_segments_and_no_copy_of_theirs_is_trained_on(recall_of):
    recall = recall_of(pairs=[(3, 70), (7, 8), (9, 99)], val_segments="b")
    assert recall.held_out.tolist() == [*range(50, 100)]
    assert recall.trained.tolist() == [i for i in range(50) if i not in (3, 9)]
    # a memory is no longer at the place of its clip
    assert recall.trained[recall.excluded(np.array([20]))[0]].tolist() == [5, 6, 7, 8, *range(10, 36)]


@pytest.mark.parametrize("nothing", [None, ""])
def test_without_segments_held_out_all_clips_are_trained_on(root, nothing):
    train = Clips("cc2017", 1, "train", root=root, val_segments=nothing)
    assert train.trained.tolist() == [*range(48)] and len(train.held_out) == 0
    two = Clips("cc2017", 1, "train", root=root, val_segments="seg1,seg3")
    assert two.held_out.tolist() == [*range(16), *range(32, 48)]
    unknown = "--val_segments seg1,seg9: the training segments are seg1, seg2, seg3"
    with pytest.raises(ValueError, match=unknown):
        Clips("cc2017", 1, "train", root=root, val_segments="seg1,seg9")


# ---------------------------------------------------------------- retrieval and average precision


def embeddings(n: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    e = torch.randn(n, 12, generator=g)
    return e + noise * torch.randn(n, 12, generator=g), e


def test_top_1_and_top_5_against_sorting():
    f, e = embeddings(60, 2.0)
    S = F.cosine_similarity(f[:, None], e[None], dim=-1)
    ranks = np.array([S[i].argsort(descending=True).tolist().index(i) for i in range(60)])
    top_1, top_5, _ = retrieval(f, e, far_apart(["s"] * 60))
    assert 0.1 < top_1 < 0.9  # neither trivial
    assert (top_1, top_5) == pytest.approx(((ranks < 1).mean(), (ranks < 5).mean()))
    assert retrieval(3 * e, e, far_apart(["s"] * 60)) == pytest.approx((1, 1, 1))
    e = torch.eye(4)[[0, 0, 1, 2]]  # clips of one caption share the first place
    assert retrieval(e, e, far_apart(["s"] * 4))[0] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)


def test_n_way_against_every_possible_draw_and_against_drawing():
    f, e = embeddings(150, 1.5)
    S = F.cosine_similarity(f[:, None], e[None], dim=-1).numpy()
    segments, rng = ["a"] * 75 + ["b"] * 75, np.random.default_rng(0)
    won = []
    for i, others in enumerate(far_apart(segments)):
        draws = [rng.choice(np.flatnonzero(others), 49, replace=False) for _ in range(60)]
        won += [S[i, i] > S[i, draw].max() for draw in draws]
    assert 0.2 < np.mean(won) < 0.95
    assert retrieval(f, e, far_apart(segments))[2] == pytest.approx(np.mean(won), abs=0.025)
    other, won = far_apart(["a"] * 4 + ["b"] * 3 + ["c"] * 2), []
    for i in range(9):
        draws = combinations(np.flatnonzero(other[i]), 3)  # 3 clips of other scenes beside its own: 4-way
        won.append(np.mean([S[i, i] > S[i, [*draw]].max() for draw in draws]))
    assert retrieval(f[:9], e[:9], other, n=4)[2] == pytest.approx(np.mean(won), abs=1e-9)


def test_random_embeddings_are_found_at_chance():
    torch.manual_seed(0)
    f, e, other = torch.randn(10, 400, 12), torch.randn(10, 400, 12), far_apart(["s"] * 400)
    scores = np.mean([retrieval(f[k], e[k], other) for k in range(10)], 0)
    assert scores == pytest.approx([1 / 400, 5 / 400, 1 / 50], abs=0.008)


def test_a_model_that_says_the_same_of_every_clip_is_at_chance_and_not_perfect():
    (_, e), other = embeddings(100, 0), far_apart(["s"] * 100)
    top_1, top_5, way_50 = retrieval(torch.zeros(100, 12), e, other)
    assert (top_1, top_5) == pytest.approx((0.01, 0.05)) and way_50 == 0
    with pytest.raises(ValueError, match="not finite"):
        retrieval(torch.full((100, 12), torch.nan), e, other)


def test_average_precision_by_hand_and_against_sklearn():
    scores = np.array([[0.9, 0.1, 0.3], [0.8, 0.2, 0.2], [0.7, 0.3, 0.1], [0.6, 0.4, 0.0]])
    truth = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])  # the third does not occur
    assert average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 4) / 2)
    metrics, rng = pytest.importorskip("sklearn.metrics"), np.random.default_rng(0)
    scores, truth = rng.normal(size=(200, 6)), rng.random((200, 6)) < 0.2
    expected = metrics.average_precision_score(truth, scores, average="macro")
    assert average_precision(scores, truth) == pytest.approx(expected)

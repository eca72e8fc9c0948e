"""Scenes, near-copies and recurring captions: which memories a training clip may retrieve."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import unit, write_prepared

from data import Clips
from prepare import copies
from prepare.copies import FairRecall, far_apart, has_near_copy, prepare_copies, prepare_recorded


def test_far_apart_are_clips_of_other_segments_or_sixteen_clips_apart():
    segments, number = np.array(["b"] * 20 + ["a"] * 20 + ["c"] * 3), np.arange(43)
    expected = (segments[:, None] != segments) | (abs(number[:, None] - number) > 15)
    for rows in (slice(None), slice(5, 9), np.array([41, 3])):
        assert np.array_equal(far_apart([*segments], rows), expected[rows])


COSINES = np.linspace(0.4, 0.9, 26)


def pairs(copies: int) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Training clips with cos(a_k, b_k) = COSINES[k], held-out clips that find a_k so; `copies` of a_k, at 0.99."""
    n, axes = len(COSINES), np.eye(200)
    sine = np.sqrt(1 - COSINES**2)[:, None]
    a, b = axes[:n], COSINES[:, None] * axes[:n] + sine * axes[n : 2 * n]
    held_out = COSINES[:, None] * axes[:n] + sine * axes[2 * n : 3 * n]
    copy = 0.99 * a[10 : 10 + copies] + np.sqrt(1 - 0.99**2) * axes[3 * n :][:copies]
    segments = ["a"] * n + ["b"] * n + ["c"] * copies
    return np.concatenate([a, b, copy]), segments, np.concatenate([held_out, held_out])


@pytest.mark.parametrize("block", [7, 1024])
def test_the_threshold_leaves_training_clips_the_matches_that_held_out_clips_find(monkeypatch, block):
    """Without the copies both distributions are the same: the best cosine of a held-out clip, 0.9, parts them."""
    monkeypatch.setattr(copies, "BLOCK", block)
    train, segments, held_out = pairs(copies=3)
    threshold, best = copies.near_copy_threshold(train, segments, held_out)
    assert threshold == pytest.approx(0.9, abs=1e-9)
    seven = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
    np.testing.assert_allclose(best["held out"], np.quantile([*COSINES, *COSINES], seven), atol=1e-9)
    assert best["training, all"][-1] == pytest.approx(0.99, abs=1e-9)
    assert best["training, left"][-1] == pytest.approx(0.9, abs=1e-9)
    np.testing.assert_allclose(best["training, left"], best["held out"], atol=0.02)
    np.testing.assert_allclose(copies.best_match(held_out, train)[:26], COSINES, atol=1e-9)
    closer = unit(held_out + 2 * train[:52])  # held-out clips find copies, too: no match need go
    assert copies.near_copy_threshold(train, segments, closer)[0] == 1.01
    threshold, best = copies.near_copy_threshold(*pairs(copies=0))
    assert threshold == 1.01 and best["training, left"] == best["training, all"]
    scenes = np.repeat(np.eye(40)[:5], 8, axis=0)  # neighbours are alike: they say nothing of copies
    _, best = copies.near_copy_threshold(scenes, ["a"] * 40, unit(np.eye(40)[:5] + np.eye(40)[5:10]))
    assert best["training, all"][-1] == 0


def write_captions(folder: Path, captions: list[str], *splits: str) -> None:
    """Four captions, and " k" behind the last two of every fourth clip k."""
    for split in splits:
        file = folder / split / "clips.jsonl"
        rows = [json.loads(line) for line in open(file)]
        for k, row in enumerate(rows):
            row["caption"] = captions[k % 4] + f" {k}" * (k % 4 > 1)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_copies(folder)


@pytest.fixture
def with_copies(tmp_path) -> Path:
    """The data's root: of 60 training clips the first 8 copy clips of seg3."""
    write_prepared(tmp_path, clips=(60, 30), segments=(3, 2), copies=8, D=24, hidden_numbers=12)
    return tmp_path


def test_near_copies_are_those_above_the_threshold(with_copies):
    folder = with_copies / "cc2017" / "stimuli"
    e_img, in_training = (np.load(folder / split / "e_img.npy") for split in ("test", "train"))
    e_img[4] = in_training[30]
    in_training[:8] = unit(in_training[:8] + 0.02 * np.random.default_rng(0).normal(size=24))
    np.save(folder / "test" / "e_img.npy", e_img)
    np.save(folder / "train" / "e_img.npy", in_training)
    prepare_copies(folder)
    train, test = (Clips("cc2017", 1, split, root=with_copies) for split in ("train", "test"))
    values = json.loads((folder / "train" / "near_copies.json").read_text())
    frames, held_out = (unit(clips.e_img.astype(np.float64).sum(1)) for clips in (train, test))
    alike = frames @ frames.T > values["threshold"]
    assert alike[range(8), range(40, 48)].all() and not alike[:20, 20:40].any()
    assert np.array_equal(train.recall.copies_of(np.arange(60)), alike)
    copies = (held_out @ frames.T > values["threshold"]).any(1)
    assert np.array_equal(has_near_copy(test.stimuli, np.arange(30)), copies)
    assert copies[4] and not copies.all()
    assert (folder / "train" / "near_copies.png").stat().st_size > 1000
    np.save(test.stimuli / "near_copies.npy", 0 * np.load(test.stimuli / "near_copies.npy"))
    assert np.flatnonzero(has_near_copy(test.stimuli, np.arange(30))).tolist() == [4]  # it is equal


def test_captions_are_equal_word_for_word_and_what_is_alike_is_written_once(with_copies):
    folder = with_copies / "cc2017" / "stimuli"
    write_captions(folder, ["A dog, runs!", "a DOG  runs", "clip", "another"], "train", "test")
    number = np.load(folder / "train" / "captions.npy")
    assert number[0] == number[1] == number[4] and len(np.unique(number)) == 31
    write_captions(folder, ["a dog runs", "a bird", "clip", "another"], "test")
    assert np.load(folder / "test" / "captions.npy")[:4].tolist() == [number[0], -1, number[2], number[3]]
    values = json.loads((folder / "train" / "near_copies.json").read_text())
    assert values["test clips with a caption of training"] == pytest.approx(22 / 30)
    files = sorted([*folder.rglob("near_copies.npy"), *folder.rglob("captions.npy")])
    times = [file.stat().st_mtime_ns for file in files]
    prepare_copies(folder)
    assert len(files) == 4 and times == [file.stat().st_mtime_ns for file in files]
    files[-1].unlink()
    prepare_copies(folder)
    assert all(file.stat().st_mtime_ns not in times for file in files)


def test_which_showings_were_recorded_is_written_once_and_anew_for_other_recordings(with_copies):
    folder = with_copies / "cc2017" / "sub1"
    file, source = folder / "train" / "recorded.npy", folder / "train" / "fmri.npy"
    fmri, written_at = np.load(source), file.stat().st_mtime_ns
    assert np.array_equal(np.load(file), np.isfinite(fmri[:, :, 0, 0])) and np.load(file).dtype == bool
    prepare_recorded(folder)
    assert file.stat().st_mtime_ns == written_at
    fmri[3, 1], fmri[5, 0, 0, 2] = np.nan, np.nan  # a whole showing, and one number
    np.save(source, fmri)
    prepare_recorded(folder)
    assert not np.load(file)[3, 1] and np.load(file)[5].all()
    fmri[17] = np.nan
    np.save(source, fmri)
    with pytest.raises(ValueError, match="fmri.npy: found no showing of clip 17, wanted one or more"):
        prepare_recorded(folder)


@pytest.fixture
def recall_of(tmp_path):
    """FairRecall of two segments of 50 clips, of pairs that are near-copies, and of these captions."""

    def make(pairs=(), captions=None, in_test=(-1,), val_segments=None, share=0.0, n=100) -> FairRecall:
        copies = np.eye(n, dtype=bool)
        for i, j in pairs:
            copies[i, j] = copies[j, i] = True
        for split in ("train", "test"):
            (tmp_path / split).mkdir(exist_ok=True)
        np.save(tmp_path / "train" / "near_copies.npy", np.packbits(copies, axis=1))
        np.save(tmp_path / "train" / "captions.npy", np.arange(n) if captions is None else captions)
        np.save(tmp_path / "test" / "captions.npy", np.array(in_test))
        segments = [f"{i // 50}" for i in range(n)]
        recall = FairRecall(tmp_path / "train", segments, val_segments, share)
        recall.count_choices()
        return recall

    return make


def test_excluded_are_the_clip_its_neighbours_and_its_copies(recall_of):
    recall = recall_of(pairs=[(10, 90), (10, 45)])
    excluded = recall.excluded(np.array([10, 90, 49]))
    assert np.flatnonzero(excluded[0]).tolist() == [*range(26), 45, 90]
    assert np.flatnonzero(excluded[1]).tolist() == [10, *range(75, 100)]
    # clip 50, next in the file but of another segment, stays
    assert np.flatnonzero(excluded[2]).tolist() == [*range(34, 50)]
    recall = recall_of(captions=np.arange(100) % 25)  # a caption that is hidden, and one that is not
    hidden, visible = recall.excluded(np.array([10, 10]), np.array([True, False]))
    assert np.flatnonzero(visible).tolist() == [*range(26)]
    assert np.flatnonzero(hidden).tolist() == [*range(26), 35, 60, 85]
    recall = recall_of(captions=np.arange(100) % 25, val_segments="0")  # memories are clips 50 to 99
    hidden = recall.excluded(np.array([60]), np.array([True]))[0]
    assert recall.trained[hidden].tolist() == [*range(50, 76), 85]


def test_training_clips_find_their_caption_as_seldom_as_held_out_clips(recall_of, monkeypatch):
    captions = np.arange(100) % 50  # each twice, in two segments
    captions[:20], captions[50:70] = np.arange(100, 120), np.arange(200, 220)  # 40 clips: once
    for share, hidden in {0.6: 0, 1.0: 0, 0.06: 0.9, 0.0: 1}.items():  # 60 % have theirs
        recall = recall_of(captions=captions, share=share, in_test=[49, -1])
        assert recall.p_hidden == pytest.approx(hidden)
    recall = recall_of(captions=captions, in_test=[49, -1, -1, 100, -1], share=None)
    assert recall.test_share == 0.4 and recall.p_hidden == pytest.approx(1 - 0.4 / 0.6)
    # clip 0 may retrieve all but its scene of 16; clip 70 not those of 31 in its scene, nor the one of its caption
    assert (recall.most, recall.fewest) == (84, 68)
    assert "may retrieve 68 to 84 of them" in recall.describe()
    seen = recall_of(captions=captions, share=1.0)  # no caption is ever hidden
    assert (seen.most, seen.fewest) == (84, 69)
    monkeypatch.setattr(copies, "BLOCK", 64)  # of all blocks
    recall = recall_of(n=300, pairs=[(290, 20)])
    assert (recall.fewest, recall.most) == (300 - 32, 300 - 16)


def test_no_near_copy_of_a_held_out_clip_is_trained_on(recall_of):
    recall = recall_of([(3, 70), (7, 8), (9, 99)], val_segments="1,2", in_test=[3, 5, 70, 6], n=150)
    assert recall.held_out.tolist() == [*range(50, 150)]
    assert recall.trained.tolist() == [i for i in range(50) if i not in (3, 9)]
    assert recall.test_share == 0.5  # of the captions trained on
    # a memory is no longer at the place of its clip
    assert recall.trained[recall.excluded(np.array([20]))[0]].tolist() == [5, 6, 7, 8, *range(10, 36)]

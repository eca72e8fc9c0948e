"""extras/check.py: a sound dataset passes, each planted fault is named and no other; a picture of a clip is drawn."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import write_prepared

from extras import check
from prepare.facts import SIZES
from support.videos import write_video
from toy.subject import VOXELS

N, T = 40, 2


@pytest.fixture(autouse=True)
def sizes(monkeypatch) -> None:
    """A dataset of 45 and 120 clips is complete."""
    monkeypatch.setitem(SIZES, "cc2017", {"train": (3, 15), "test": (2, 60)})


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """cc2017 with 40 real voxels, standardised by run."""
    folder = write_prepared(tmp_path_factory.mktemp("sound"), clips=(45, 120), N=N, T=T, D=20, F=5, copies=3)
    table = np.load(VOXELS)
    chosen = np.linspace(0, len(table["index"]) - 1, N).astype(int)
    np.savez(folder / "sub1" / "voxels.npz", index=table["index"][chosen], roi=table["roi"][chosen])
    for split, length in {"train": 15, "test": 60}.items():
        file = folder / "sub1" / split / "fmri.npy"
        fmri = np.load(file)
        runs = fmri.reshape(-1, length, *fmri.shape[1:])  # (segments, clips, showings, T, N)
        np.save(file, ((runs - runs.mean(1, keepdims=True)) / runs.std(1, keepdims=True)).reshape(fmri.shape))
    return folder


def test_a_sound_dataset_passes(sound, capsys):
    assert check.main(["--data", "cc2017", "--root", str(sound.parent)]) == 0
    page = capsys.readouterr().out
    assert "of 435 recordings of a clip no two are equal" in page  # 30 x 2 + 15 + 120 x 3
    assert "with another segment, 37.5% of test clips with training" in page  # 45 of 120
    assert "cc2017, subject 1: 0 failed, 1 warnings, 14 ok" in page


# ---------------------------------------------------------------- faults: changes of the folder


def edit(file: str, at: object, value: object) -> Callable:
    """Puts a value, or what value(array) returns, into an array."""

    def damage(folder: Path) -> None:
        array = np.load(folder / file)
        array[at] = value(array) if callable(value) else value
        np.save(folder / file, array)

    return damage


def replaced(file: str, old: str, new: str) -> Callable:
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new, 1))


def elsewhere(folder: Path) -> None:
    table = dict(np.load(folder / "sub1" / "voxels.npz"))
    np.savez(folder / "sub1" / "voxels.npz", index=table["index"], roi=np.full(N, "L_10d"))


def leak(folder: Path) -> None:
    edit("stimuli/test/e_img.npy", np.s_[10:12], np.load(folder / E_IMG)[30:32])(folder)


def latents(folder: Path) -> None:
    y = np.random.default_rng(0).normal(size=(45, 4, 3, 4, 6)).astype(np.float16)
    y[3], y[7, 1] = 0, np.nan
    (folder / "stimuli/train/wan").mkdir()
    np.save(folder / "stimuli/train/wan/latents-9x32x48.npy", y)


TRAIN, TEST, E_IMG = "sub1/train/fmri.npy", "sub1/test/fmri.npy", "stimuli/train/e_img.npy"
SWING = np.repeat([1.1, (2 - 1.1**2) ** 0.5], 60)[:, None, None, None]
FAULTS = [  # a change of the folder, the line that names it
    (edit(TRAIN, (20, 0, 1, 5), np.nan), r"FAIL files: .*fmri.npy: found nan at clip 20 \(seg2-005\), volume 1,"),
    (replaced("stimuli/test/manifest.json", '"viclip": "planted"', '"viclip": "b"'),
     "FAIL files: .*e_act.npy was made with viclip = 'b'"),
    (replaced("stimuli/train/clips.jsonl", '"segment": "seg1"', '"segment": "seg3"'),
     "FAIL clip counts: .*train/clips.jsonl mixes segments or repeats an id"),
    (elsewhere, "FAIL voxels: .*: voxel 0, grayordinate .* is L_10d here and .+"),
    (edit("sub1/train/recorded.npy", (7, 1), False), "FAIL showings: .*recorded.npy masks what .* has, .* seg1-007"),
    (edit(TRAIN, ..., lambda x: 100 * x + 10_000), "FAIL z-scores: .* by 1e.04 at most in a run, 3.8e.03"),
    # as CineBrain publishes its volumes: each run may be off, all together are not
    (edit(TEST, ..., lambda x: x * SWING), "ok z-scores: .* by 0.11 at most in a run"),
    (edit(TRAIN, np.s_[15:30, 1], lambda x: x[15:30, 0]), "FAIL repeated runs: train and train: 15 "),
    (leak, "FAIL leakage, frames: 2 of 120 test clips"),
    (edit(E_IMG, (20, 1), 0), "FAIL embeddings: .*train/e_img.npy: .* off 1 by 1 at most, in seg2-005"),
    (edit("stimuli/test/categories.npy", 67, lambda k: 1 - k[67]), "FAIL categories: .* 1 clips, .* test2-007"),
    (latents, r"FAIL latents: .*-9x32x48.npy: 2 of 45 clips are not finite, or all one value: \[3, 7\]"),
]  # fmt: skip


@pytest.mark.parametrize("damage, pattern", FAULTS)
def test_a_fault_is_named_and_no_other(sound, tmp_path, damage, pattern, capsys):
    damage(Path(shutil.copytree(sound, tmp_path / "cc2017")))
    status = check.main(["--data", "cc2017", "--root", str(tmp_path)])
    *page, last = capsys.readouterr().out.splitlines()
    lines = [f"{text[:8].strip()} {text[8:27].strip()}: {text[27:]}" for text in page]
    assert [text for text in lines if re.match(pattern, text)], page
    faults = [text for text in lines if text.startswith("FAIL")]
    assert status == (len(faults) > 0)
    checks = f"FAIL {re.match('(FAIL|ok) (.+?):', pattern)[2]}: "
    assert not [text for text in faults if not text.startswith(checks)], page


def test_a_clip_is_drawn(sound, tmp_path):
    copy = Path(shutil.copytree(sound, tmp_path / "cc2017"))
    write_video(copy / "raw" / "stimuli" / "seg1.mp4", np.zeros((60, 48, 64, 3), np.uint8), 10)
    assert check.main(["--data", "cc2017", "--root", str(tmp_path), "--show", "seg1-001"]) == 0
    assert (copy / "sub1" / "seg1-001.png").stat().st_size > 100_000

"""extras/check.py: a sound dataset passes, each planted fault is named and no other, and the picture shows
what was planted in it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import write_prepared

from extras import check, show
from prepare.facts import SIZES
from support.videos import uniform_frames, write_video
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


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    """A copy to plant faults in."""
    return Path(shutil.copytree(sound, tmp_path / "cc2017"))


SOUND = (
    "warning showings           train: 15 clips have some that were not recorded, the first seg3-000",
    "ok      clip counts        45 train clips, 15 of each of 3 segments",
    "{'volumes': 2, 'voxels': 40, 'frames': 5, 'embed_dim': 20, 'classes': 4}",
    "40 in 28 areas of the HCP MMP atlas, 2 below the cortex",
    "of 435 recordings of a clip no two are equal",  # 30 x 2 + 15 + 120 x 3
    "0 of 120 test clips have bit-equal frames",
    "0.0% of training clips share theirs with another segment, 37.5% of test clips with",  # 45 of 120
    "cc2017, subject 1: 0 failed, 1 warnings, 14 ok",
)


def test_a_sound_dataset_passes(sound, capsys):
    assert check.main(["--data", "cc2017", "--root", str(sound.parent)]) == 0
    page = capsys.readouterr().out
    alike = np.linalg.norm(np.load(sound / "stimuli" / "test" / "e_act.npy").mean(0))
    for text in (*SOUND, f"|mean| {alike:.2f} (1:"):
        assert text in page, page


# ---------------------------------------------------------------- faults: changes of the folder


def edit(file: str, change: Callable) -> Callable:
    """An array becomes what change(array) returns, or is changed in place."""

    def damage(folder: Path) -> None:
        array = np.load(folder / file)
        changed = change(array)
        np.save(folder / file, array if changed is None else np.asarray(changed, array.dtype))

    return damage


def put(index: object, value: object) -> Callable:
    """A change for `edit`."""
    return lambda array: array.__setitem__(index, value)


def copied(source: str, at: object, target: str, to: object) -> Callable:
    return lambda folder: edit(target, put(to, np.load(folder / source)[at]))(folder)


def replaced(file: str, old: str, new: str) -> Callable:
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new, 1))


def voxels(**change: np.ndarray) -> Callable:
    def damage(folder: Path) -> None:
        table = dict(np.load(folder / "sub1" / "voxels.npz"))
        np.savez(folder / "sub1" / "voxels.npz", **table | change)

    return damage


def latents(folder: Path) -> None:
    y = np.random.default_rng(0).normal(size=(45, 4, 3, 4, 6)).astype(np.float16)
    y[3], y[7, 1] = 0, np.nan
    (folder / "stimuli/train/wan").mkdir()
    np.save(folder / "stimuli/train/wan/latents-9x32x48.npy", y)


TRAIN, TEST, E_IMG = "sub1/train/fmri.npy", "sub1/test/fmri.npy", "stimuli/train/e_img.npy"
SWING = np.repeat([1.1, (2 - 1.1**2) ** 0.5], 60)[:, None, None, None]
FAULTS = [  # a change of the folder, the line that names it
    (edit(TRAIN, put((20, 0, 1, 5), np.nan)), r"FAIL files: .*fmri.npy: found nan at clip 20 \(seg2-005\), volume 1,"),
    (replaced("stimuli/test/manifest.json", '"viclip": "planted"', '"viclip": "b"'),
     "FAIL files: .*e_act.npy was made with viclip = 'b'"),
    (replaced("sub1/train/manifest.json", '"subject": 1', '"subject": 2'), "FAIL files: .*fmri.npy is of subject 2: were"),
    (replaced("stimuli/train/clips.jsonl", '"segment": "seg1"', '"segment": "seg3"'),
     "FAIL clip counts: .*train/clips.jsonl mixes segments or repeats an id"),
    (voxels(roi=np.full(40, "L_10d")), "FAIL voxels: .*: voxel 0, grayordinate .* is L_10d here and .+"),
    (voxels(roi=np.full(40, "unknown")), "warning voxels: 40 in 1 areas, unknown or of another"),
    (edit("sub1/train/recorded.npy", put((7, 1), False)), "FAIL showings: .*recorded.npy masks what .* has, .* seg1-007"),
    (edit(TRAIN, lambda x: 100 * x + 10_000), "FAIL z-scores: .* by 1e.04 at most in a run, 3.8e.03"),
    (edit(TRAIN, lambda x: 1.3 * x), "warning z-scores: .* by 0.3 at most in a run"),
    (edit(TRAIN, put(np.s_[:15, ..., 3], 0)), "warning z-scores: 1 voxels .* the first voxel 3: no signal"),
    # as CineBrain publishes its volumes: each run may be off, all together are not
    (edit(TEST, lambda x: x * SWING), "ok z-scores: .* by 0.11 at most in a run"),
    (copied(TRAIN, np.s_[15:30, 0], TRAIN, np.s_[15:30, 1]), "FAIL repeated runs: train and train: 15 "
     "recordings of a clip are bit-equal to another's: seg2-000, showing 1 = seg2-000, showing 2; is"),
    (copied(TRAIN, np.s_[15:30, 0], TEST, np.s_[:15, 1]), "FAIL leakage, fMRI: train and test: 15 "
     "recordings of a clip are bit-equal to another's: seg2-000, showing 1 = test1-000, showing 2"),
    (copied(E_IMG, np.s_[30:32], "stimuli/test/e_img.npy", np.s_[10:12]), "FAIL leakage, frames: 2 of "
     r"120 test clips have bit-equal frames in training \(e_img\); seg1-000 = test1-010; is"),
    (edit(E_IMG, put((20, 1), 0)), "FAIL embeddings: .*train/e_img.npy: .* off 1 by 1 at most, in seg2-005"),
    (edit("stimuli/train/e_act.npy", lambda e: np.repeat(e[:1], 45, 0)), "FAIL embeddings: .*; .mean. 1.00"),
    (edit("stimuli/test/categories.npy", lambda k: put(67, 1 - k[67])(k)), "FAIL categories: .* 1 clips, .* test2-007"),
    (latents, r"FAIL latents: .*-9x32x48.npy: 2 of 45 clips are not finite, or all one value: \[3, 7\]"),
]  # fmt: skip


@pytest.mark.parametrize("damage, pattern", FAULTS)
def test_a_fault_is_named_and_no_other(copy, damage, pattern, capsys):
    damage(copy)
    status = check.main(["--data", "cc2017", "--root", str(copy.parent)])
    *page, last = capsys.readouterr().out.splitlines()
    lines = [f"{text[:8].strip()} {text[8:27].strip()}: {text[27:]}" for text in page]
    assert [text for text in lines if re.match(pattern, text)], page
    faults = [text for text in lines if text.startswith("FAIL")]
    assert status == (len(faults) > 0) == last.endswith("run python data.py cc2017 --raw DIR --subject 1")
    checks = f"FAIL {re.match('(FAIL|warning|ok) (.+?):', pattern)[2]}: "
    assert not [text for text in faults if not text.startswith(checks)], page


def test_the_picture(copy, tmp_path):
    film = copy / "raw" / "stimuli" / "seg1.mp4"
    frames = np.repeat(np.arange(60, dtype=np.uint8) * 4, 48 * 64 * 3).reshape(60, 48, 64, 3)  # 10 a second
    write_video(film, frames, 10)
    shown = show.clip_frames(film, 2.0, 2.0).mean((1, 2, 3))
    assert abs(shown - 4 * (20 + uniform_frames(20, 8))).max() < 2
    argv = ["--data", "cc2017", "--root", str(tmp_path), "--show"]
    assert check.main([*argv, "seg1-001"]) == 0
    assert (copy / "sub1" / "seg1-001.png").stat().st_size > 100_000
    with pytest.raises(ValueError, match=r"seg1-1: no clip has this id; there are test1-000 and others"):
        check.main([*argv, "seg1-1"])

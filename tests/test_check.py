"""extras/check.py: a sound dataset passes, a planted fault is named, the picture shows what was planted."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import write_prepared

from extras import check, check_stimuli, show
from prepare.copies import mean_frames, near_copy_threshold
from prepare.facts import SIZES
from support.files import writing_array
from support.videos import uniform_frames, write_video
from toy.subject import VOXELS

LENGTH = {"train": 15, "test": 60}  # clips of a segment, of which there are 3 and 2
N, T, DECODER = 40, 2, "tiny-wan"


@pytest.fixture(autouse=True)
def sizes(monkeypatch) -> None:
    """A dataset of 45 and 120 clips is complete; seven clips are read at a time."""
    blocks = check_stimuli.blocks
    monkeypatch.setitem(SIZES, "cc2017", {"train": (3, 15), "test": (2, 60)})
    monkeypatch.setattr(check_stimuli, "blocks", lambda array, size=7: blocks(array, 7))


def save(file: Path, array: np.ndarray) -> None:
    with writing_array(file, array.shape, str(array.dtype), {"decoder": DECODER}) as out:
        out[:] = array


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """cc2017 with 40 real voxels, standardised by run, and files of a decoder."""
    folder = write_prepared(tmp_path_factory.mktemp("sound"), clips=(45, 120), N=N, T=T, D=20, F=5, copies=3)
    table = np.load(VOXELS)
    chosen = np.linspace(0, len(table["index"]) - 1, N).astype(int)
    np.savez(folder / "sub1" / "voxels.npz", index=table["index"][chosen], roi=table["roi"][chosen])
    rng = np.random.default_rng(0)
    save(folder / "stimuli" / DECODER / "empty_prompt.npy", np.ones((6, 5), np.float32))
    for split, length in LENGTH.items():
        file, decoder = folder / "sub1" / split / "fmri.npy", folder / "stimuli" / split / DECODER
        fmri = np.load(file)
        runs = fmri.reshape(-1, length, *fmri.shape[1:])  # (segments, clips, showings, T, N)
        np.save(file, ((runs - runs.mean(1, keepdims=True)) / runs.std(1, keepdims=True)).reshape(fmri.shape))
        save(decoder / "latents.npy", rng.normal(size=(len(fmri), 4, 2, 3, 3)).astype(np.float16))
        save(decoder / "text_tokens.npy", rng.normal(size=(2 * len(fmri), 5)).astype(np.float16))
        save(decoder / "text_offsets.npy", 2 * np.arange(len(fmri) + 1))
    return folder


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    """A copy to plant faults in."""
    return Path(shutil.copytree(sound, tmp_path / "cc2017"))


def page_of(folder: Path) -> list[str]:
    """The lines "LEVEL CHECK: TEXT" of the page."""
    return [f"{level} {name}: {text}" for level, name, text in check.check("cc2017", 1, folder.parent)]


SOUND = (
    "warning fMRI values        train: showings that were not recorded are masked: seg3 has 1 of 2",
    "ok      clip counts        45 train clips, 15 of each of 3 segments",
    "T = 2 volumes of N = 40 voxels, F = 5 frames of D = 20, 4 classes",
    "40 in 28 areas of the HCP MMP atlas, 2 below the cortex",
    "of 435 recordings of a clip no two are equal",  # 30 x 2 + 15 + 120 x 3
    "0 of 120 test clips have bit-equal frames",
    "have a word-identical one in another training segment, 37.5% of test clips in training",  # 45 of 120
    f"{DECODER}, train: latents (45, 4, 2, 3, 3), -0.03 +- 1.00; 90 text tokens, empty prompt (6, 5)",
    "cc2017, subject 1: 0 failed, 1 warnings, 19 ok",
)


def test_a_sound_dataset_passes(sound, capsys):
    assert check.main(["--data", "cc2017", "--root", str(sound.parent)]) == 0
    page, p = capsys.readouterr().out, check.Prepared("cc2017", 1, sound.parent)
    e_img = [mean_frames(p.array(split, "e_img.npy")) for split in LENGTH]
    threshold, best = near_copy_threshold(e_img[0], [clip["segment"] for clip in p.clips["train"]], e_img[1])
    alike = max(np.linalg.norm(p.array(split, "e_act.npy").mean(0)) for split in LENGTH)
    computed = (f"e_act.npy: unit vectors, |mean| {alike:.2f} (1:", f"cosine above {threshold:.3f}")
    for text in (*SOUND, *computed, f"held out        {best['held out'][0]:8.3f}"):
        assert text in page, text


def array(file: str, change: Callable) -> Callable:
    """A damage of the dataset: the array of a file becomes change(array, folder), or was changed in place."""

    def damage(folder: Path) -> None:
        values = np.load(folder / file)
        changed = change(values, folder)
        np.save(folder / file, values if changed is None else changed)

    return damage


def put(index: object, value: object, source: str = "") -> Callable:
    """A change for `array`: array[index] = value, or what another file has at that index."""

    def change(values: np.ndarray, folder: Path) -> None:
        values[index] = np.load(folder / source)[value] if source else value

    return change


def one_clip_fewer(folder: Path) -> None:
    file = folder / "stimuli" / "train" / "clips.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def another_subject(folder: Path) -> None:
    """The same, its voxels backwards."""
    shutil.copytree(folder / "sub1", folder / "sub2")
    for split in LENGTH:
        array(f"sub2/{split}/fmri.npy", lambda x, _: x[..., ::-1])(folder)


TRAIN, TEST, LATENTS = "sub1/train/fmri.npy", "sub1/test/fmri.npy", "stimuli/train/tiny-wan/latents.npy"
E_IMG, E_IMG_TEST, E_ACT = (f"stimuli/{name}.npy" for name in ("train/e_img", "test/e_img", "test/e_act"))
# as CineBrain publishes its volumes
OFF_BY_RUN = np.repeat(np.float32([1.1, (2 - 1.1**2) ** 0.5]), 60)[:, None, None, None]
FAULTS = [  # a damage, the line that names it
    (lambda folder: (folder / E_ACT).unlink(), "FAIL files: .*e_act.npy not there; to mend it, run"),
    (one_clip_fewer, "FAIL clip counts: train: wanted 15 clips a segment, found {'seg3': 14}"),
    (one_clip_fewer, "FAIL shapes: train: clips.jsonl has 44 clips, but {'fmri.npy': 45, 'recorded.npy'"),
    (array(TRAIN, put((20, 0, 1, 5), np.nan)), "FAIL fMRI values: .* first at seg2-005, voxel 5"),
    (array(TRAIN, lambda x, _: 100 * x + 10_000), "FAIL z-scores: .*sub1 has no z-scores"),
    (array(TEST, lambda x, _: x * OFF_BY_RUN), "ok z-scores: .*off by at most 0.11 in a run"),
    (array(TEST, put(np.s_[:15, 1], np.s_[15:30, 0], TRAIN)), "FAIL leakage, fMRI: .*= test1-000, showing 2"),
    (another_subject, "FAIL duplicate subjects: .*64 of 64 recordings .* equal, the voxels in another order"),
    (array(E_IMG, put((20, 1, 4), np.nan)), "FAIL embeddings: .*not unit vectors from seg2-005 on"),
    (array(E_ACT, lambda e, _: np.repeat(e[:1], 120, 0)), r"FAIL embeddings: .*\|mean\| 1.00"),
    (array(E_IMG_TEST, put(slice(10, 12), slice(30, 32), E_IMG)), "FAIL leakage, frames: 2 of 120 .*"),
    (array(E_IMG_TEST, lambda e, _: e[::-1]), "FAIL near-copies: .*near_copies.npy was computed from other"),
    (array("stimuli/test/categories.npy", put((67, 0), 3)), "FAIL categories: .* the first test2-007"),
    (array(LATENTS, lambda z, _: z[:-1]), "FAIL decoder: .*latents of 44 clips, .*wanted 45"),
]  # fmt: skip


@pytest.mark.parametrize("damage, line", FAULTS)
def test_a_fault_is_named(copy, damage, line):
    damage(copy)
    assert any(re.match(line, row) for row in page_of(copy)), "\n".join(page_of(copy))
    assert check.main(["--data", "cc2017", "--root", str(copy.parent)]) == line.startswith("FAIL")


def test_caption_copies_of_bare_lists(tmp_path, capsys):
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps([{"caption": f"c{i % 240 or i}"} for i in range(480)]))
    test.write_text(json.dumps([{"caption": "c239"}, {"caption": "x"}] * 120))
    assert check.main(["--captions", str(train), str(test)]) == 0
    # of 480 all but c0 and c240, of 240 each second
    shares = re.findall(r"caption: .*?([\d.]+)% of training .* ([\d.]+)% of test", capsys.readouterr().out)
    assert shares == [("99.6", "50.0")]


def test_the_picture(copy, tmp_path, capsys):
    film = copy / "raw" / "stimuli" / "seg1.mp4"
    frames = np.repeat(np.arange(60, dtype=np.uint8) * 4, 48 * 64 * 3).reshape(60, 48, 64, 3)  # 10 a second
    write_video(film, frames, 10)
    shown = show.clip_frames(film, 2.0, 2.0)
    assert shown.shape == (8, 48, 64, 3)
    assert abs(shown.mean((1, 2, 3)) - 4 * (20 + uniform_frames(20, 8))).max() < 2
    argv = ["--data", "cc2017", "--root", str(tmp_path), "--show"]
    assert check.main([*argv, "seg1-001"]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == tmp_path / "cc2017" / "sub1" / "seg1-001.png" and out.stat().st_size > 100_000
    with pytest.raises(ValueError, match=r"seg1-1: no clip has this id; there are seg1-000 ... seg3-014"):
        check.main([*argv, "seg1-1"])

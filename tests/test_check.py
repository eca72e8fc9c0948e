"""extras/check.py: a sound dataset passes, each planted fault is named, and the picture shows what was planted in it."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tiny import write_prepared

from extras import check, check_stimuli, show
from extras.prepared import FAIL, OK, WARNING
from prepare.copies import mean_frames, near_copy_threshold, prepare_copies, prepare_recorded
from prepare.facts import GRAYORDINATES, SIZES
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


def edit(folder: Path, file: str, change: Callable) -> None:
    array = np.load(folder / file)
    changed = change(array, folder)
    np.save(folder / file, array if changed is None else changed)


def put(index: object, value: object, source: str = "") -> Callable:
    """A change for `edit`: array[index] = value, or what another file has at that index."""

    def change(array: np.ndarray, folder: Path) -> None:
        array[index] = np.load(folder / source)[value] if source else value

    return change


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def page_of(folder: Path, pattern: str = "") -> list[str]:
    """The lines "LEVEL CHECK: TEXT" of the page in which the pattern occurs."""
    lines = [f"{level} {name}: {text}" for level, name, text in check.check("cc2017", 1, folder.parent)]
    return [line for line in lines if re.search(pattern, line)]


SOUND = (
    "warning fMRI values        train: showings that were not recorded are masked: seg3 has 1 of 2",
    "ok      clip counts        45 train clips, 15 of each of 3 segments",
    "T = 2 volumes of N = 40 voxels, F = 5 frames of D = 20, 4 classes",
    "40 in 28 areas of the HCP MMP atlas, 2 below the cortex",
    "of 435 recordings of a clip no two are equal",  # 30 x 2 + 15 + 120 x 3
    "0 of 120 test clips have bit-equal frames",
    "0.0% of training clips have a word-identical one in another training segment, 37.5% of test clips in",  # 45 of 120
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


FMRI, LATENTS = "sub1/{}/fmri.npy", "stimuli/train/tiny-wan/latents.npy"
FAULTS = [
    (FMRI.format("test"), lambda x, _: np.float32(3), FAIL, "files", "test/fmri.npy (132 bytes) is truncated or damaged"),
    (FMRI.format("train"), put((20, 0, 1, 5), np.nan), FAIL, "fMRI values", "1 values of showing 1, the first at seg2-005, voxel 5"),
    (FMRI.format("test"), put(slice(60, 120), np.nan), FAIL, "fMRI values", "60 clips have no recording, the first test2-000"),
    (FMRI.format("train"), lambda x, _: 100 * x + 10_000, FAIL, "z-scores", "sub1 has no z-scores, by run or by subject"),
    (FMRI.format("train"), lambda x, _: 1.3 * x, WARNING, "z-scores", "off by at most 0.3 in a run"),
    (FMRI.format("train"), lambda x, _: put((slice(15, 30), 1), x[15:30, 0])(x, _), FAIL, "repeated runs", "train and train: 15 recordings of a clip are bit-equal to another's: seg2-000, showing 1 = seg2-000, showing 2"),
    (FMRI.format("test"), put(np.s_[:15, 1], np.s_[15:30, 0], FMRI.format("train")), FAIL, "leakage, fMRI", "train and test: 15 recordings of a clip are bit-equal to another's: seg2-000, showing 1 = test1-000, showing 2"),
    (FMRI.format("train"), put((slice(0, 2), 0), 0), OK, "leakage, fMRI", "no two are equal"),  # nothing in both
    # as CineBrain publishes its volumes: each run may be off, all together are not
    (FMRI.format("test"), lambda x, _: x * np.repeat([1.1, (2 - 1.1**2) ** 0.5], 60)[:, None, None, None], OK, "z-scores", "off by at most 0.11 in a run"),
    ("stimuli/train/e_img.npy", put((20, 1, 4), np.nan), FAIL, "embeddings", "train/e_img.npy: not unit vectors from seg2-005 on (off by 8;"),
    ("stimuli/train/e_act.npy", lambda e, _: np.repeat(e[:1], 45, 0), FAIL, "embeddings", "e_act.npy: unit vectors, |mean| 1.00"),
    ("stimuli/test/e_img.npy", put(slice(10, 12), slice(30, 32), "stimuli/train/e_img.npy"), FAIL, "leakage, frames", "2 of 120 test clips have bit-equal frames in training (e_img); seg1-000 = test1-010"),
    ("stimuli/test/categories.npy", lambda k, _: put(67, 1 - k[67])(k, _), FAIL, "categories", "test/categories.npy is not what clips.jsonl says: 1 clips, the first test2-007"),
    ("stimuli/test/categories.npy", put((slice(None), slice(2)), 0), WARNING, "categories", "test: no clip is of person, animal"),
    (LATENTS, put((17, 0, 0, 0, 0), np.inf), FAIL, "decoder", "latents.npy: not finite"),
    (LATENTS, lambda z, _: z[:-1], FAIL, "decoder", "latents of 44 clips, offsets of 45, wanted 45"),
    ("stimuli/tiny-wan/empty_prompt.npy", None, FAIL, "decoder", "empty_prompt.npy not there; python data.py cc2017 --raw RAW --subject 1 --decoder ID"),
]  # fmt: skip


@pytest.mark.parametrize("file, change, level, name, text", FAULTS)
def test_a_fault_of_an_array_is_named_and_no_other(copy, file, change, level, name, text):
    if change:
        edit(copy, file, change)
    else:
        (copy / file).unlink()
    with suppress(ValueError):  # a clip without recordings, NaN
        prepare_recorded(copy / "sub1")
        prepare_copies(copy / "stimuli")
    page = page_of(copy)
    (line, *_) = [line for line in page if line.startswith(f"{level} {name}: ") and text in line] or [None]
    assert line, "\n".join(page)
    advice = r"; (to mend it, delete what is named and|python data.py .* --decoder ID; to mend it,.*) run python data.py"
    assert level != FAIL or re.search(advice, line)
    beside = f"FAIL ({name}|manifests)|warning ({name}|fMRI values)|ok|warning .* not looked at"
    assert not [line for line in page if not re.match(beside, line)]


def write(file: str, text: str) -> Callable:
    return lambda folder: (folder / file).write_text(text)


def manifest(place: str, change: Callable[[dict], object]) -> Callable:
    return lambda folder: edit_manifest(folder / place, change)


def lines(change: Callable[[list[str]], list[str]]) -> Callable:
    """Training's clips.jsonl with other lines."""

    def damage(folder: Path) -> None:
        file = folder / "stimuli" / "train" / "clips.jsonl"
        file.write_text("".join(change(file.read_text().splitlines(keepends=True))))

    return damage


def voxels(**change: np.ndarray) -> Callable:
    def damage(folder: Path) -> None:
        table = dict(np.load(folder / "sub1" / "voxels.npz"))
        np.savez(folder / "sub1" / "voxels.npz", **table | change)

    return damage


def another_subject(folder: Path, voxel_order: np.ndarray) -> None:
    shutil.copytree(folder / "sub1", folder / "sub2")
    for split in LENGTH:
        edit(folder, f"sub2/{split}/fmri.npy", lambda x, _: np.ascontiguousarray(x[..., voxel_order]))


NETWORKS = np.array(["7Networks_LH_Vis_1", "hV4"] * 20)
DAMAGED = "is truncated or damaged; to mend it, delete what is named and run python data.py cc2017"
OTHER_FAULTS = [  # a change of the folder, the line that names it
    (lambda folder: (folder / "stimuli/test/e_act.npy").unlink(), "FAIL files: .*test/e_act.npy not there; to mend it, run"),
    (write("stimuli/train/.e_img.part.npy", ""), "warning files: .*e_img.part.npy is what a stopped run left"),
    (write("sub1/voxels.npz", "PK"), f"FAIL files: .*voxels.npz .*{DAMAGED}"),
    (write("stimuli/test/clips.jsonl", '{"id": "test2-60'), f"FAIL files: .*test/clips.jsonl .*{DAMAGED}"),
    (write("stimuli/train/near_copies.json", "[]"), f"FAIL files: .*near_copies.json .*{DAMAGED}"),
    (manifest("stimuli/train", lambda m: m["e_txt.npy"].update(shape=[44, 20])), r"FAIL manifests: .*e_txt.npy has the shape \[45, 20\], its manifest says \[44, 20\]"),
    (manifest("stimuli/train/tiny-wan", lambda m: m.pop("latents.npy")), "FAIL manifests: .*latents.npy has no entry"),
    (manifest("stimuli/test", lambda m: m["e_act.npy"]["recipe"].update(viclip="b")), "FAIL manifests: .*e_act.npy was made with viclip"),
    (manifest("sub1/train", lambda m: m["fmri.npy"]["recipe"].update(subject=2)), "FAIL manifests: .*of subject 2, but lies in sub1"),
    (lines(lambda rows: rows[:-1]), "FAIL clip counts: train: wanted 15 clips a segment, found {'seg3': 14}"),
    (lines(lambda rows: rows[:-1]), "FAIL shapes: train: clips.jsonl has 44 clips, but {'fmri.npy': 45, 'recorded.npy'"),
    (lines(lambda rows: [*rows[1:], rows[0]]), "FAIL clip counts: .*mixes segments or repeats an id"),
    (voxels(index=np.arange(39), roi=NETWORKS[:39]), "FAIL shapes: .*N = 39 as in voxels.npz"),
    (voxels(roi=np.array(["L_10d"] * 40)), "FAIL voxels: .*are not those of the HCP MMP atlas: voxel 0, grayordinate .* is L_10d"),
    (voxels(index=np.arange(GRAYORDINATES - 39, GRAYORDINATES + 1)), "FAIL voxels: .*a grayordinate twice, or beyond 91,282"),
    (voxels(roi=np.full(40, "unknown")), "warning voxels: where the 40 voxels lie was not"),
    (voxels(roi=NETWORKS, index=np.arange(40)), "warning voxels: 40 in 2 areas of another atlas or space"),
    (lambda folder: another_subject(folder, np.arange(N)), "FAIL duplicate subjects: .*64 of 64 recordings compared are equal: one"),
    (lambda folder: another_subject(folder, np.arange(N)[::-1]), "FAIL duplicate subjects: .*equal, the voxels in another order"),
    (lambda folder: edit(folder, "sub1/train/recorded.npy", put((7, 1), False)), "FAIL fMRI values: .*recorded.npy: other showings .* of 1 clips, the first seg1-007"),
    (lambda folder: edit(folder, "stimuli/test/e_img.npy", lambda e, _: e[::-1]), "FAIL near-copies: .*near_copies.npy was computed from other"),
]  # fmt: skip


@pytest.mark.parametrize("damage, line", OTHER_FAULTS)
def test_a_fault_of_files_manifests_or_voxels_is_named(copy, damage, line):
    damage(copy)
    assert page_of(copy, f"^{line}"), "\n".join(page_of(copy))


def test_what_the_scripts_do_not_read_fails(copy):
    """Of files without a fault that another check finds."""
    file = copy / "stimuli" / "train" / "near_copies.npy"
    recipe = json.loads((file.parent / "manifest.json").read_text())[file.name]["recipe"]
    with writing_array(file, (45, 5), "uint8", recipe) as array:
        array[:] = 0
    *_, last = page_of(copy)
    assert last.startswith("FAIL training: ") and str(file) in last
    assert check.main(["--data", "cc2017", "--root", str(copy.parent)]) == 1


def test_caption_copies_of_bare_lists(tmp_path, capsys):
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps([{"caption": f"c{i % 240 or i}"} for i in range(480)]))
    test.write_text(json.dumps([{"caption": "c239"}, {"caption": "x"}] * 120))
    assert check.main(["--captions", str(train), str(test)]) == 0
    # of 480 all but c0 and c240, of 240 each second
    share = (
        "99.6% of training clips have a word-identical one in another training segment, 50.0% of test clips"
    )
    assert f"caption: {share} in training" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--captions: 1 lists, wanted the training and the test list"):
        check.main(["--captions", str(train)])


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
    with pytest.raises(FileNotFoundError, match="--stimuli nosuch: no such folder"):
        check.main([*argv, "seg1-001", "--stimuli", "nosuch"])

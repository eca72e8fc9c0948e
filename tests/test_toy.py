"""toy/: the films, the planted fMRI, the release that they make."""

import json
import re
from itertools import product

import numpy as np
import pytest
from conftest import REPO
from scipy import ndimage

from prepare.cifti import mmp_areas
from support.readers import read_json
from support.videos import read_clips
from toy import pretrain, release, subject, world
from toy.world import ACTIONS, BACKGROUNDS, COLOURS, SHAPES, Clip

TOY = REPO / "toy"
SEEN, UNSEEN = world.combinations()


def a_clip(shape="square", action="moves right", **changes) -> Clip:
    facts = dict(colour="red", background="at night", x=30.0, y=35.0, size=30.0, angle=0.0, turn=1)
    return Clip(shape=shape, action=action, **(facts | changes))


# ---------------------------------------------------------------- world


def test_what_may_be_shown_and_what_is_held_out_is_every_combination_once():
    everything = set(product(SHAPES, COLOURS, ACTIONS, BACKGROUNDS))
    unseeable = {c for c in everything if c[0] in ("circle", "ring") and c[2] == "rotates"}
    assert len(SEEN) == 752 and len(UNSEEN) == 160 and set(SEEN) | set(UNSEEN) == everything - unseeable
    held_out = [(shape, colour, ground) for shape, colour, _, ground in UNSEEN]
    assert sorted(held_out) == sorted([*{*held_out}] * 2)  # two actions of each of 80


def test_a_film_is_scenes_of_one_object_and_only_the_test_film_shows_what_is_held_out(seed=0):
    train, test = world.film("train", seed), world.film("test", seed)
    assert len(train) == len({*train}) == 2000 and len(test) == 160 and not {*train} & {*test}
    for split, film, unseen in (("train", train, 0), ("test", test, 2)):
        assert film == world.film(split, seed) and not {*film} & {*world.film(split, seed + 1)}
        for k in range(0, len(film), 4):
            scene = film[k : k + 4]
            assert len({(c.shape, c.colour, c.background) for c in scene}) == 1
            assert len({c.action for c in scene}) == 4
            assert sum(c.combination in UNSEEN for c in scene) == unseen
    objects = [(c.shape, c.colour, c.background) for c in train[::4]]
    assert len({*objects[:120]}) == 120  # each once before any comes again


MOTIONS = {  # x, y, size, angle at the start and at the end
    "moves right": ((20, 35, 30, 0), (44, 35, 30, 0)),
    "moves up": ((30, 44, 30, 0), (30, 20, 30, 0)),
    "jumps": ((30, 41, 30, 0), (30, 41, 30, 0)),
    "rotates": ((30, 35, 30, 0), (30, 35, 30, 2.4)),
    "grows": ((30, 35, 22.5, 0), (30, 35, 37.5, 0)),
}


@pytest.mark.parametrize("action", MOTIONS)
def test_an_action_moves_the_object_from_its_start_to_its_end(action):
    start, end = MOTIONS[action]
    values = np.stack(world.motion(a_clip(action=action), np.linspace(0, 1, 5)), 1)  # (5, 4)
    assert np.allclose(values[[0, 4]], [start, end])
    assert values[2, 1] == pytest.approx(21 if action == "jumps" else (start[1] + end[1]) / 2)
    if action == "rotates":
        assert world.motion(a_clip(action=action, turn=-1), np.ones(1))[3] == pytest.approx(-2.4)
    centre = ndimage.center_of_mass(world.coverage(a_clip("circle", action))[-1])  # row, column
    assert np.allclose(np.add(centre, 0.5), [end[1], end[0]], atol=0.05)


@pytest.mark.parametrize("ground", [*BACKGROUNDS][:2])
def test_a_frame_has_the_colours_that_its_caption_says(ground):
    clip = a_clip("circle", "grows", colour="pink", background=ground, x=34.0, y=30.0)
    video = world.render(clip)
    assert video.shape == (17, 64, 64, 3) and video.dtype == np.uint8
    assert (video[:, 0] == BACKGROUNDS[ground][0]).all() and (video[:, -1] == BACKGROUNDS[ground][1]).all()
    middle = np.add(*BACKGROUNDS[ground]) / 2
    assert abs(video[:, 31:33, 0].mean((0, 1)) - middle).max() <= 0.5
    assert (video[:, 30, 34] == COLOURS["pink"]).all() and clip.caption == f"a pink circle grows {ground}"


# ---------------------------------------------------------------- subject


def test_the_table_of_voxels_is_drawn_from_the_areas_of_the_atlas(tmp_path):
    subject.write_voxel_table(tmp_path / "voxels.npz")
    table, shipped = np.load(tmp_path / "voxels.npz"), np.load(subject.VOXELS)
    assert all(np.array_equal(table[key], shipped[key]) for key in ("index", "roi"))
    assert [*table["roi"]] == [*mmp_areas()[table["index"]]] and (np.diff(table["index"]) > 0).all()
    names = [re.sub("^[LR]_", "", name) for name in table["roi"]]
    counts = {drive: sum(name in areas for name in names) for drive, (areas, _) in subject.AREAS.items()}
    assert [*counts.values()] == [480, 160, 240, 240, 120, 60, 400]


def test_a_clip_shows_in_the_volumes_that_the_release_takes_for_it():
    """Of clip c the response peaks in volume 1 + c + 2; it reaches all showings alike, scaled to 1 % a unit."""
    response = np.zeros((30, 3), np.float32)
    response[4, 0], response[25, 1] = 1e4, -2e4
    showings = [*subject.recordings(response, 3, [0, 0, 0])]
    assert len(showings) == 3
    for volumes in showings:
        assert volumes.shape == (35, 3) and volumes.dtype == np.float32
        signal = (volumes - 10_000) / 1e6
        expected = np.zeros((35, 3))
        expected[5:15, 0], expected[26:35, 1] = subject.hrf(), -2 * subject.hrf()[:9]
        assert np.allclose(signal, expected, atol=3e-3)
        assert signal[:, 0].argmax() == 3 + 4


DRIVEN = {  # by drive: five clips' responses, summed over the voxels with weights
    "light": [20.09, 8.42, 4.69, 7.23, -42.27],
    "colour": [2.32, 2.32, -12.45, 2.32, 2.32],
    "object": [1.85, 10.34, 1.85, -17.56, -17.56],
    "motion": [-7.44, 2.99, 3.25, -6.61, -6.49],
    "place": [5.59, 5.59, -8.06, 1.02, -1.2],
    "conjunction": [6.58, 4.2, 6.8, 1.6, 1.6],
    "nothing": [0.0, 0.0, 0.0, 0.0, 0.0],
}


def test_the_world_of_this_version_is_the_one_that_was_made_before():
    """Who draws otherwise raises VERSION, so that prepared data and runs of the older world are refused."""
    assert subject.VERSION == 2
    train, test, roi = world.film("train", 0), world.film("test", 0), np.load(subject.VOXELS)["roi"]
    assert sum(clip.x for clip in train) == pytest.approx(64009.084555, abs=1e-6)
    assert sum(clip.size for clip in test) == pytest.approx(5203.594374, abs=1e-6)
    assert world.render(train[0]).mean() == pytest.approx(133.198525, abs=1e-3)
    response, other = (subject.responses(train[:200], roi, seed) for seed in (0, 1))
    assert response.dtype == np.float32 and abs(response.mean(0)).max() < 1e-4
    assert np.allclose(response[7, [0, 400, 800, 1200]], [-1.565, -0.548, -1.0537, -1.1133], atol=1e-3)
    names = [name.removeprefix("L_").removeprefix("R_") for name in roi]
    weight = np.cos(np.arange(len(roi)))  # of each voxel another
    for drive, (areas, _) in subject.AREAS.items():
        voxels = np.isin(names, areas)
        assert np.allclose(response[::40][:, voxels] @ weight[voxels], DRIVEN[drive], atol=1e-2), drive
        unit = float(drive != "nothing")
        assert np.allclose(response[:, voxels].std(0), unit, atol=1e-4)
        assert np.allclose(response[:, voxels], other[:, voxels]) == (not unit)
    first, second = subject.recordings(response[:50], 2, [0, False, 0])
    assert np.allclose(first[10, ::400], [9581.95, 10183.54, 9865.52, 10026.31, 10104.93], atol=0.1)
    assert np.allclose(second[54, ::400], [10125.28, 10583.16, 10389.23, 10190.98, 9924.84], atol=0.1)
    clip = a_clip("circle", "grows", x=16.0, y=44.0)
    centre, width = np.array([[16.0, 44.0], [44.0, 16.0], [20.0, 40.0]]), np.array([4.0, 4.0, 8.0])
    assert np.allclose(
        subject.light_response([clip], centre, width), [[2.500307, 0.000302, 2.146912]], rtol=1e-3
    )
    # by scipy.stats.gamma: pdf(t, 6, scale=0.75) - pdf(t, 16, scale=0.75) / 6
    assert np.allclose(subject.hrf()[:6], [0, 0.44988, 1, 0.51912, 0.10947, -0.05623], atol=1e-5)


# ---------------------------------------------------------------- release


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The small world of subject 2, prepared as the release is: its root."""
    root = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        release.prepare_toy(root, subject=2)
    return root


SMALL = dict(TRAIN_SEGMENTS=6, TRAIN_CLIPS=40, TEST_SEGMENTS=1, TEST_CLIPS=12, TEST_REPEATS=3)


def small(patch) -> None:
    """6 segments of 40 clips and one of 12."""
    for name, value in SMALL.items():
        patch.setattr(world, name, value)


def test_the_release_is_the_films_and_recordings_of_its_subject(made, monkeypatch):
    small(monkeypatch)
    raw, roi = made / "toy" / "raw-2", np.load(subject.VOXELS)["roi"]
    train, test = world.film("train", 1), world.film("test", 1)
    response = subject.responses(train + test, roi, 1)
    lines = [json.loads(line) for line in open(raw / "captions.jsonl")]
    segments = [f"seg{k}" for k in range(1, 7) for _ in range(40)] + ["test1"] * 12
    for line, clip, segment in zip(lines, train + test, segments, strict=True):
        assert line["caption"] == clip.caption and line["categories"] == [clip.shape]
        assert line["seen"] is (clip.combination in SEEN) and line["x"] == clip.x
        assert (line["segment"], line["split"]) == (segment, "test" if segment == "test1" else "train")
    assert [line["clip"] for line in lines] == [*range(40)] * 6 + [*range(12)]
    toy = release.ToyRelease(raw, 2)
    assert toy.splits == {"train": [f"seg{k}" for k in range(1, 7)], "test": ["test1"]}
    for name, clips, part, runs, seed in (
        ("seg2", train[40:80], response[40:80], 2, [1, 0, 1]),
        ("test1", test, response[240:], 3, [1, 1, 0]),
    ):
        assert toy.stimulus(name) == [raw / "stimuli" / f"{name}.mp4"]
        for video, clip in zip(read_clips(*toy.stimulus(name), len(clips)), clips, strict=True):
            assert abs(video.astype(int) - world.render(clip)).mean() < 3  # H.264 loses a little
        assert toy.files(name) == [raw / "fmri" / f"{name}_{k + 1}.npy" for k in range(runs)]
        for k, volumes in enumerate(subject.recordings(part, runs, seed)):
            assert np.array_equal(toy.load_run(name, k), volumes)
        assert (toy.window(name), toy.repeats(name)) == ((3, len(clips)), runs)
    assert toy.recording(2) == [raw / "fmri" / "seg1_1.npy"] and toy.recording(1) == []


def test_what_is_prepared_is_of_the_subject_and_whole(made, monkeypatch):
    small(monkeypatch)
    folder, stimuli, film = made / "toy" / "sub2", made / "toy" / "stimuli-2", world.film("train", 1)
    captions = [json.loads(line)["caption"] for line in open(stimuli / "train" / "clips.jsonl")]
    assert captions == [clip.caption for clip in film]
    labels = np.load(stimuli / "train" / "categories.npy")
    classes = read_json(stimuli / "train" / "manifest.json")["categories.npy"]["recipe"]["classes"]
    assert [classes[i] for i in labels.argmax(1)] == [clip.shape for clip in film]
    assert (labels.sum(1) == 1).all()
    fmri, e_txt = np.load(folder / "train" / "fmri.npy"), np.load(stimuli / "train" / "e_txt.npy")
    assert fmri.shape[:3] == (240, 2, 1) and np.load(folder / "test" / "fmri.npy").shape[:2] == (12, 3)
    # clip by clip the two showings say the same, and the caption's embedding is its caption's
    assert np.mean([np.corrcoef(*fmri[i, :, 0])[0, 1] for i in range(20)]) > 0.2
    clip, _, tokenizer = pretrain.load_clip(f"local-dir:{TOY / 'clip'}")
    assert np.allclose(e_txt[:5], pretrain.encode_texts(clip, tokenizer, captions[:5]), atol=1e-4)
    times = {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.is_file()}
    monkeypatch.setattr(release, "make_toy", None)
    release.prepare_toy(made, subject=2)
    assert times == {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.is_file()}


def test_whatever_is_missing_is_prepared_anew(made, monkeypatch):
    def make_toy(raw, seed):
        assert seed == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(release, "make_toy", make_toy)
    names = "fmri recorded clips categories e_txt e_img e_act near_copies captions voxels".split()
    files = [file for name in names for file in made.rglob(f"{name}.*") if "raw-2" not in file.parts]
    files = [file for file in files if file.suffix in (".npy", ".npz", ".jsonl")]
    assert len(files) == 19  # of both splits, and voxels.npz
    for file in files:
        away = file.rename(file.with_suffix(".away"))
        with pytest.raises(KeyboardInterrupt):
            release.prepare_toy(made, subject=2)
        away.rename(file)

"""toy/: films and recordings are those of before; the release they make."""

import json

import numpy as np
import pytest
from test_faults import damaged, setting

from support.videos import read_clips
from toy import release, subject, world
from toy.world import ACTIONS, BACKGROUNDS, COLOURS, SHAPES, Clip

SEEN, UNSEEN = world.combinations()
PICTURES = [658.5, -49.9, -2.5, 963.3, 2039.0, -153.6, -5.2, 108.6]  # of each action, its pixels with weights


def test_each_action_shape_colour_and_background_is_drawn_as_before():
    for k, action in enumerate(ACTIONS):
        looks = SHAPES[k % 5], [*COLOURS][k % 6], action, [*BACKGROUNDS][k % 4]
        clip = Clip(*looks, x=30.0, y=35.0, size=30.0, angle=0.1, turn=(-1) ** k)
        video = world.render(clip)
        assert video.shape == (17, 64, 64, 3) and video.dtype == np.uint8
        assert video.ravel() @ np.cos(np.arange(video.size)) == pytest.approx(PICTURES[k], abs=3)
        assert clip.caption == "a {1} {0} {2} {3}".format(*looks)


def test_the_table_of_voxels_is_drawn_from_the_areas_of_the_atlas(tmp_path):
    subject.write_voxel_table(tmp_path / "voxels.npz")
    table, shipped = np.load(tmp_path / "voxels.npz"), np.load(subject.VOXELS)
    assert all(np.array_equal(table[key], shipped[key]) for key in ("index", "roi"))


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
    assert release.toy_recipe(2)["world"] == subject.VERSION == 2
    train, test, roi = world.film("train", 0), world.film("test", 0), np.load(subject.VOXELS)["roi"]
    assert len(SEEN) == 752 and len(UNSEEN) == 160 and len({*train}) == 2000 and len({*test}) == 160
    assert not [clip for clip in train if clip.combination in UNSEEN]
    for k in range(0, len(test), 4):  # a scene: one object, four actions, two of which training never shows
        assert len({(c.shape, c.colour, c.background) for c in test[k : k + 4]}) == 1
        assert len({c.action for c in test[k : k + 4]}) == 4
        assert sum(c.combination in UNSEEN for c in test[k : k + 4]) == 2
    assert sum(clip.x for clip in train) == pytest.approx(64009.084555, abs=1e-6)
    assert sum(clip.size for clip in test) == pytest.approx(5203.594374, abs=1e-6)
    assert world.render(train[0]).mean() == pytest.approx(133.198525, abs=1e-3)
    response, other = (subject.responses(train[:200], roi, seed) for seed in (0, 1))
    assert response.dtype == np.float32 and abs(response.mean(0)).max() < 1e-4
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
    # by scipy.stats.gamma: pdf(t, 6, scale=0.75) - pdf(t, 16, scale=0.75) / 6
    assert np.allclose(subject.hrf()[:6], [0, 0.44988, 1, 0.51912, 0.10947, -0.05623], atol=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The small world of subject 2, prepared as the release is: its root."""
    root = tmp_path_factory.mktemp("toy")
    sizes = dict(TRAIN_SEGMENTS=6, TRAIN_CLIPS=40, TEST_SEGMENTS=1, TEST_CLIPS=12, TEST_REPEATS=3)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(world, name, value)
        release.prepare_toy(root, subject=2)
        yield root


def test_the_release_is_the_films_and_recordings_of_its_subject(made):
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
        for video, clip in zip(read_clips(*toy.stimulus(name), len(clips)), clips, strict=True):
            assert abs(video.astype(int) - world.render(clip)).mean() < 3  # H.264 loses a little
        assert toy.files(name) == [raw / "fmri" / f"{name}_{k + 1}.npy" for k in range(runs)]
        for k, volumes in enumerate(subject.recordings(part, runs, seed)):
            assert np.array_equal(toy.load_run(name, k), volumes)
        assert (toy.window(name), toy.repeats(name)) == ((3, len(clips)), runs)
    assert toy.recording(2) == [raw / "fmri" / "seg1_1.npy"] and toy.recording(1) == []
    release.make_toy(raw)  # it is there
    older = pytest.raises(ValueError, match="another version")
    with damaged(raw / "version.json", setting(version=1)), older:
        release.make_toy(raw)
    folder = made / "toy" / "sub2"
    captions = [json.loads(line)["caption"] for line in open(made / "toy/stimuli-2/train/clips.jsonl")]
    assert captions == [clip.caption for clip in train]
    fmri = np.load(folder / "train" / "fmri.npy")
    assert fmri.shape[:3] == (240, 2, 1) and np.load(folder / "test" / "fmri.npy").shape[:2] == (12, 3)
    # clip by clip the two showings say the same
    assert np.mean([np.corrcoef(*fmri[i, :, 0])[0, 1] for i in range(20)]) > 0.2


def test_the_release_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    calls = []

    def write_release(folder, seed):
        (folder / "stimuli").mkdir(parents=True)
        calls.append(seed)
        if len(calls) == 1:
            raise OSError

    monkeypatch.setattr(release, "write_release", write_release)
    raw = tmp_path / "toy" / "raw"
    with pytest.raises(OSError):
        release.make_toy(raw)
    assert not [*raw.parent.iterdir()]
    (raw.parent / ".raw.part" / "fmri").mkdir(parents=True)  # a kill left it
    release.make_toy(raw, 4)
    release.make_toy(raw, 4)
    assert calls == [0, 4] and [*raw.parent.iterdir()] == [raw]


def test_whatever_is_missing_is_prepared_anew(made, monkeypatch):
    def make_toy(raw, seed):
        assert seed == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(release, "make_toy", make_toy)
    release.prepare_toy(made, subject=2)  # nothing is missing yet
    names = "fmri recorded clips categories e_txt e_img e_act near_copies captions voxels".split()
    files = [file for name in names for file in made.rglob(f"{name}.*") if "raw-2" not in file.parts]
    files = [file for file in files if file.suffix in (".npy", ".npz", ".jsonl")]
    assert len(files) == 19  # of both splits, and voxels.npz
    for file in files:
        away = file.rename(file.with_suffix(".away"))
        with pytest.raises(KeyboardInterrupt):
            release.prepare_toy(made, subject=2)
        away.rename(file)

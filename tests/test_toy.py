"""toy/: the films, the planted fMRI, the release that they make, and the recipes of the published networks."""

import json
import re
from itertools import product

import numpy as np
import open_clip
import pytest
import torch
from conftest import REPO
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from scipy import ndimage, stats
from torch import nn
from transformers import UMT5EncoderModel, VideoMAEForVideoClassification, ViTForImageClassification, ViTModel

from prepare.viclip import ViCLIP
from support.readers import read_json
from support.videos import read_clips
from toy import (
    fit,
    pretrain,
    pretrain_classifiers,
    pretrain_dino,
    pretrain_wan,
    release,
    subject,
    world,
)
from toy.world import ACTIONS, BACKGROUNDS, COLOURS, SHAPES, Clip

TOY = REPO / "toy"
SEEN, UNSEEN = world.combinations()
AREA = {  # of a shape of half-size 1, by its formula
    "circle": np.pi, "square": 1.64**2, "ring": np.pi * (1.01**2 - 0.47**2), "cross": 4 * 0.68 - 0.68**2,
    "triangle": 3 * 3**0.5 * (0.58) ** 2,
}  # fmt: skip


def a_clip(shape="square", action="moves right", **changes) -> Clip:
    facts = dict(colour="red", background="at night", x=30.0, y=35.0, size=30.0, angle=0.0, turn=1)
    return Clip(shape=shape, action=action, **(facts | changes))


# ---------------------------------------------------------------- world


def test_what_may_be_shown_and_what_is_held_out_is_every_combination_once():
    everything = set(product(SHAPES, COLOURS, ACTIONS, BACKGROUNDS))
    unseeable = {c for c in everything if c[0] in ("circle", "ring") and c[2] == "rotates"}
    assert len(SEEN) == 752 and len(UNSEEN) == 160 and set(SEEN) | set(UNSEEN) == everything - unseeable
    held_out = stats.Counter if False else [(shape, colour, ground) for shape, colour, _, ground in UNSEEN]
    assert sorted(held_out) == sorted([*{*held_out}] * 2)  # two actions of each of 80


@pytest.mark.parametrize("seed", [0, 1])
def test_a_film_is_scenes_of_one_object_and_only_the_test_film_shows_what_is_held_out(seed):
    train, test = world.film("train", seed), world.film("test", seed)
    assert len(train) == 2000 and len(test) == 160
    assert {clip.combination for clip in train} <= set(SEEN)
    assert not {*train} & {*test} and len({*train}) == 2000
    for film, unseen in ((train, 0), (test, 2)):
        for k in range(0, len(film), 4):
            scene = film[k : k + 4]
            assert len({(c.shape, c.colour, c.background) for c in scene}) == 1
            assert len({c.action for c in scene}) == 4
            assert sum(c.combination in UNSEEN for c in scene) == unseen
    objects = [(c.shape, c.colour, c.background) for c in train[::4]]
    assert len({*objects[:120]}) == 120  # each once before any comes again


def test_films_of_two_subjects_differ_and_those_of_one_are_the_same():
    for split in ("train", "test"):
        assert world.film(split, 0) == world.film(split, 0)
        assert not {*world.film(split, 0)} & {*world.film(split, 1)}


def test_random_clips_lie_in_their_ranges():
    rng = np.random.default_rng(0)
    clips = [world.random_clip(SEEN[i % 752], rng) for i in range(3000)]
    for name, low, high in (("x", 27, 37), ("y", 27, 37), ("angle", -0.15, 0.15)):
        values = np.array([getattr(clip, name) for clip in clips])
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
    for still, (low, high) in ((True, (28, 38)), (False, (30, 34))):
        sizes = [clip.size for clip in clips if (clip.action not in ("grows", "shrinks")) is still]
        assert low <= min(sizes) < low + 0.1 and high - 0.1 < max(sizes) <= high
    assert {clip.turn for clip in clips} == {-1, 1}
    assert abs(np.corrcoef([c.x for c in clips], [c.y for c in clips])[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("action", "start", "end"),
    [  # x, y, size, angle
        ("moves left", (44, 35, 30, 0), (20, 35, 30, 0)),
        ("moves right", (20, 35, 30, 0), (44, 35, 30, 0)),
        ("moves up", (30, 44, 30, 0), (30, 20, 30, 0)),
        ("moves down", (30, 20, 30, 0), (30, 44, 30, 0)),
        ("jumps", (30, 41, 30, 0), (30, 41, 30, 0)),
        ("rotates", (30, 35, 30, 0), (30, 35, 30, 2.4)),
        ("grows", (30, 35, 22.5, 0), (30, 35, 37.5, 0)),
        ("shrinks", (30, 35, 37.5, 0), (30, 35, 22.5, 0)),
    ],
)
def test_an_action_moves_the_object_from_here_to_there(action, start, end):
    values = np.stack(world.motion(a_clip(action=action), np.linspace(0, 1, 5)), 1)  # (5, 4)
    assert np.allclose(values[[0, 4]], [start, end])
    top = 21 if action == "jumps" else (start[1] + end[1]) / 2
    assert values[2, 1] == pytest.approx(top)
    if action == "rotates":
        assert world.motion(a_clip(action=action, turn=-1), np.ones(1))[3] == pytest.approx(-2.4)
    centre = ndimage.center_of_mass(world.coverage(a_clip("circle", action))[-1])  # row, column
    assert np.allclose(np.add(centre, 0.5), [end[1], end[0]], atol=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area_and_turns_clockwise(shape):
    still = a_clip(shape, "moves up", size=32.0, x=32.0)
    alpha = world.coverage(still)[8]
    assert alpha.sum() == pytest.approx(AREA[shape] * 16**2, rel=0.02)
    assert alpha.min() == 0 and alpha.max() == 1
    upright = alpha.any(1).nonzero()[0]
    if shape == "triangle":  # its tip is up
        assert alpha[upright[0] + 2].sum() < alpha[upright[-1] - 2].sum() / 3
    turned = world.coverage(a_clip(shape, "moves up", size=32.0, x=32.0, angle=0.4))[8]
    by_scipy = ndimage.rotate(alpha, -np.degrees(0.4), reshape=False, order=1)
    assert abs(turned - by_scipy).mean() < 0.01


@pytest.mark.parametrize("ground", BACKGROUNDS)
def test_a_frame_has_the_colours_that_its_caption_says(ground):
    clip = a_clip("circle", "grows", colour="pink", background=ground, x=34.0, y=30.0)
    video = world.render(clip)
    assert video.shape == (17, 64, 64, 3) and video.dtype == np.uint8
    assert (video[:, 0] == BACKGROUNDS[ground][0]).all() and (video[:, -1] == BACKGROUNDS[ground][1]).all()
    middle = np.add(*BACKGROUNDS[ground]) / 2
    assert abs(video[:, 31:33, 0].mean((0, 1)) - middle).max() <= 0.5
    assert (video[:, 30, 34] == COLOURS["pink"]).all() and clip.caption == f"a pink circle grows {ground}"
    radius = (abs(video[[0, 16]].astype(int) - video[0, :, :1]).sum(-1) > 60).sum((1, 2)) ** 0.5
    assert radius[1] / radius[0] == pytest.approx(1.25 / 0.75, rel=0.03)


# ---------------------------------------------------------------- subject


def test_the_voxels_are_drawn_from_the_areas_of_the_atlas(tmp_path):
    table = np.load(subject.VOXELS)
    names = [re.sub("^[LR]_", "", name) for name in table["roi"]]
    counts = {drive: sum(name in areas for name in names) for drive, (areas, _) in subject.AREAS.items()}
    assert counts == dict(light=480, colour=160, object=240, motion=240, place=120, conjunction=60, nothing=400)
    assert (np.diff(table["index"]) > 0).all() and table["index"].max() < 91_282
    subject.write_voxel_table(tmp_path / "voxels.npz")
    again = np.load(tmp_path / "voxels.npz")
    assert all(np.array_equal(again[name], table[name]) for name in ("index", "roi"))


@pytest.fixture(scope="module")
def planted() -> tuple[list[Clip], np.ndarray, dict]:
    """Clips, their responses, and of each drive the voxels."""
    clips, roi = world.film("train", 3)[:600], np.load(subject.VOXELS)["roi"]
    names = np.array([re.sub("^[LR]_", "", name) for name in roi])
    areas = {
        "light": "V1 V2 V3", "colour": "V4 V8", "object": "LO1 LO2 LO3 PIT FFC VVC PH", "motion": "MT MST FST V4t V3CD",
        "place": "PHA1 PHA2 PHA3 VMV1 VMV2", "conjunction": "hippocampus_left hippocampus_right",
    }  # fmt: skip
    voxels = {drive: np.isin(names, text.split()) for drive, text in areas.items()}
    return clips, subject.responses(clips, roi, 3), voxels


def test_responses_are_standardised_and_nothing_drives_the_other_areas(planted):
    _, response, voxels = planted
    driven = np.any([*voxels.values()], 0)
    assert response.dtype == np.float32 and driven.sum() == 1300
    assert np.allclose(response[:, driven].std(0), 1, atol=1e-4) and abs(response.mean(0)).max() < 1e-4
    assert not response[:, ~driven].any()
    other = subject.responses(planted[0][:100], np.load(subject.VOXELS)["roi"], 4)
    assert abs(np.corrcoef(other[:, 3], response[:100, 3])[0, 1]) < 0.99  # another subject, another tuning


def explained(response: np.ndarray, groups: list) -> np.ndarray:
    """Share of each voxel's variance that lies between the groups of clips."""
    _, number = np.unique([" ".join(np.atleast_1d(group)) for group in groups], return_inverse=True)
    means = np.stack([response[number == k].mean(0) for k in range(number.max() + 1)])
    return means[number].var(0) / response.var(0)


@pytest.mark.parametrize(
    ("drive", "facts"),
    [
        ("colour", ["colour"]),
        ("object", ["shape"]),
        ("place", ["background"]),
        ("conjunction", ["shape", "colour"]),
    ],
)
def test_an_area_follows_what_it_is_tuned_to_and_nothing_else(planted, drive, facts):
    clips, response, voxels = planted
    own = explained(response[:, voxels[drive]], [[getattr(c, fact) for fact in facts] for c in clips])
    assert own.min() > 0.999
    for fact in {"colour", "shape", "background", "action"} - {*facts}:
        share = explained(response[:, voxels[drive]], [getattr(c, fact) for c in clips])
        assert np.median(share) < 0.1
    if drive != "conjunction":  # each voxel likes one value by far, and each value is liked
        values = sorted({getattr(c, facts[0]) for c in clips})
        means = [response[[getattr(c, facts[0]) == v for c in clips]][:, voxels[drive]].mean(0) for v in values]
        top = np.sort(means, 0)
        assert (top[-1] - top[-2] > 0.5 * (top[-1] - top[0])).mean() > 0.95
        assert {*np.argmax(means, 0)} == {*range(len(values))}


def test_motion_areas_follow_the_action_and_early_areas_the_light(planted):
    clips, response, voxels = planted
    by_action = explained(response[:, voxels["motion"]], [clip.action for clip in clips])
    assert np.median(by_action) > 0.9
    assert np.median(explained(response[:, voxels["light"]], [clip.action for clip in clips])) < 0.7
    amount = [world.coverage(clip, 5).mean() for clip in clips]
    light = response[:, voxels["light"]]
    r = ((light - light.mean(0)) * (np.array(amount) - np.mean(amount))[:, None]).mean(0) / np.std(amount)
    assert np.median(r) > 0.3


def test_a_receptive_field_is_a_gaussian_of_its_place():
    clips = [a_clip("circle", "grows", x=16.0, y=44.0), a_clip("circle", "rotates", x=40.0, y=24.0)]
    centre, width = np.array([[16.0, 44.0], [44.0, 16.0], [20.0, 40.0]]), np.array([4.0, 4.0, 8.0])
    light = subject.light_response(clips, centre, width)
    grid = np.arange(64) + 0.5
    for i, clip in enumerate(clips):
        shown = world.coverage(clip, 5).mean(0)
        for v, ((x, y), w) in enumerate(zip(centre, width, strict=True)):
            field = np.outer(stats.norm.pdf(grid, y, w), stats.norm.pdf(grid, x, w)) * 2 * np.pi * w**2
            assert light[i, v] == pytest.approx((shown * field).sum() ** 0.5 / w, rel=1e-3)
    assert light[0, 0] > 10 * light[0, 1]


def test_a_voxel_prefers_a_direction_and_a_kind_of_flow():
    directions = np.array([0, np.pi, np.pi / 2, -np.pi / 2])  # right, left, down, up
    for k, action in enumerate(("moves right", "moves left", "moves down", "moves up")):
        response = subject.motion_response(a_clip(action=action), directions, np.zeros(4, int))
        opposite, across = np.exp(-4), np.exp(-2)
        expected = {0: [1, opposite, across, across], 1: [opposite, 1, across, across]}.get(
            k, [across, across, 1, opposite] if k == 2 else [across, across, opposite, 1]
        )
        assert np.allclose(response, 1.3 * np.array(expected))
    kinds = np.array([1, 2, 3])
    for action, expected in (("rotates", [1, 0, 0]), ("grows", [0, 15 / 16, 0]), ("shrinks", [0, 0, 15 / 16])):
        for turn in (1, -1):
            response = subject.motion_response(a_clip(action=action, turn=turn), np.zeros(3), kinds)
            assert np.allclose(response, expected)


def test_the_haemodynamic_response_is_a_difference_of_gammas_that_peaks_two_volumes_later():
    t = np.arange(0, 20, 2.0)
    h = stats.gamma.pdf(t, 6, scale=0.75) - stats.gamma.pdf(t, 16, scale=0.75) / 6
    assert np.allclose(subject.hrf(), h / h.max()) and h.argmax() == 2


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


def test_noise_is_autoregressive_shared_in_part_and_drifts_slowly():
    zeros = np.zeros((100, 4000), np.float32)
    first, second = ((volumes - 10_000) / 100 for volumes in subject.recordings(zeros, 2, [1, 0, 0]))
    n, common = len(first), first.mean(1)  # (105,) the drifts of 4,000 voxels cancel out
    assert common.std() == pytest.approx(0.5, rel=0.25) and abs(np.corrcoef(common, second.mean(1))[0, 1]) < 0.3
    spread = (first - common[:, None]).std(1)
    for position, drift in ((0, 33), (n // 2, 0), (n - 1, 33), (3 * (n - 1) // 4, 4 + 1 + 1 / 64 + 1 / 4)):
        noise = 1.5**2 if position == 0 else 1.5**2 / (1 - 0.3**2)
        assert spread[position] == pytest.approx((drift + noise) ** 0.5, rel=0.04), position
    detrended = first - common[:, None]
    t = np.linspace(-1, 1, n)
    slow = np.stack([np.ones(n), t, t**2, t**3, np.sin(np.pi * t)], 1)
    detrended -= slow @ np.linalg.lstsq(slow, detrended, rcond=None)[0]
    r = (detrended[1:] * detrended[:-1]).mean() / (detrended**2).mean()
    assert r == pytest.approx(0.3, abs=0.05)
    assert abs(np.corrcoef(detrended[:, 0], detrended[:, 1])[0, 1]) < 0.35
    again = next(subject.recordings(zeros, 1, [1, 0, 0]))
    assert np.array_equal((again - 10_000) / 100, first)
    assert not np.array_equal(next(subject.recordings(zeros, 1, [1, 0, 1])), again)

"""The toy world's films of moving shapes; toy/subject.py is who watches them in the scanner.

The world stands in for cc2017 where there is no download: the same kinds of files (mp4 stimuli, runs of fMRI,
captions) go through the same code of prepare/. A clip lasts 2 s, 17 frames of 64 x 64: one of 5 shapes in one
of 6 colours does one of 8 actions before one of 4 backgrounds. A scene is 4 clips of the same object in the
same place doing 4 different things, as in a film.

Of the 912 combinations of attributes 160 are held out: no training clip shows them, half the test clips do
(`seen` in captions.jsonl says which).
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

SIZE, FRAMES, SECONDS = 64, 17, 2.0
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (225, 45, 40),
    "yellow": (250, 220, 40),
    "green": (50, 200, 70),
    "blue": (70, 120, 255),
    "pink": (245, 90, 200),
    "white": (248, 248, 248),
}
ACTIONS = ("moves left", "moves right", "moves up", "moves down", "jumps", "rotates", "grows", "shrinks")
BACKGROUNDS = {  # name: colour at the top, colour at the bottom
    "at night": ((8, 10, 30), (26, 30, 64)),
    "in fog": ((122, 126, 130), (122, 126, 130)),
    "on sand": ((172, 142, 102), (138, 108, 74)),
    "in the sea": ((8, 56, 76), (10, 96, 106)),
}
# in the order of a combination
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "action": ACTIONS, "background": tuple(BACKGROUNDS)}
TRAIN_SEGMENTS, TRAIN_CLIPS, TRAIN_REPEATS = 20, 100, 2
TEST_SEGMENTS, TEST_CLIPS, TEST_REPEATS = 2, 80, 10


@dataclass(frozen=True)
class Clip:
    """What a clip shows and how: `x`, `y`, `size` in pixels, `angle` in radians, `turn` +1 or -1."""

    shape: str
    colour: str
    action: str
    background: str
    x: float
    y: float
    size: float
    angle: float
    turn: int

    @property
    def combination(self) -> tuple[str, str, str, str]:
        return self.shape, self.colour, self.action, self.background

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.action} {self.background}"


def combinations() -> tuple[list[tuple], list[tuple]]:
    """The 752 combinations that training may show, and the 160 held out: two actions of each of 80 pairs of
    an object (shape and colour) and a background."""
    rng = np.random.default_rng(2017)
    objects = list(product(SHAPES, COLOURS, BACKGROUNDS))
    with_held_out = set(rng.permutation(len(objects))[:80].tolist())
    seen, unseen = [], []
    for i, (shape, colour, background) in enumerate(objects):
        round_shape = shape in ("circle", "ring")  # whose rotation cannot be seen
        actions = [action for action in ACTIONS if not (round_shape and action == "rotates")]
        held_out = set(rng.permutation(len(actions))[:2].tolist()) if i in with_held_out else set()
        for j, action in enumerate(actions):
            (unseen if j in held_out else seen).append((shape, colour, action, background))
    return seen, unseen


def random_clip(combination: tuple[str, str, str, str], rng: np.random.Generator) -> Clip:
    x, y = SIZE / 2 + rng.uniform(-5, 5, 2)
    size = rng.uniform(30, 34) if combination[2] in ("grows", "shrinks") else rng.uniform(28, 38)
    return Clip(*combination, x, y, size, rng.uniform(-0.15, 0.15), int(rng.choice([-1, 1])))


def motion(clip: Clip, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, size (pixels) and angle (radians) of the object at the times u, from 0 (start) to 1 (end)."""
    x, y, size, angle = (np.full(len(u), start) for start in (clip.x, clip.y, clip.size, clip.angle))
    path = 24 * (u - 0.5)
    match clip.action:
        case "moves left":
            x = SIZE / 2 - path
        case "moves right":
            x = SIZE / 2 + path
        case "moves up":
            y = SIZE / 2 - path
        case "moves down":
            y = SIZE / 2 + path
        case "jumps":
            y = SIZE / 2 + 9 - 20 * np.sin(np.pi * u)
        case "rotates":
            angle = clip.angle + clip.turn * u * 2.4
        case "grows":
            size = clip.size * (0.75 + 0.5 * u)
        case "shrinks":
            size = clip.size * (1.25 - 0.5 * u)
    return x, y, size, angle


def coverage(clip: Clip, frames: int = FRAMES) -> np.ndarray:
    """(frames, 64, 64) share of each pixel that the object covers, from its signed distance (pixels)."""
    x, y, size, angle = (v[:, None, None].astype(np.float32) for v in motion(clip, np.linspace(0, 1, frames)))
    grid = np.arange(SIZE, dtype=np.float32) + 0.5
    dx, dy, h = grid[None, None, :] - x, grid[None, :, None] - y, size / 2
    px, py = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    ax, ay, r = np.abs(px), np.abs(py), np.hypot(px, py)
    match clip.shape:
        case "circle":
            distance = r - h
        case "square":
            distance = np.maximum(ax, ay) - 0.82 * h
        case "triangle":  # equilateral, inside three half-planes
            distance = np.maximum(py + 0.15 * h, 0.866 * ax - 0.5 * (py + 0.15 * h)) - 0.58 * h
        case "cross":
            distance = np.minimum(np.maximum(ax - h, ay - 0.34 * h), np.maximum(ay - h, ax - 0.34 * h))
        case "ring":
            distance = np.abs(r - 0.74 * h) - 0.27 * h
    return np.clip(0.5 - distance, 0, 1)


def ground(background: str) -> np.ndarray:
    """The background as a float32 (64, 1, 3): each row of pixels between the colours at top and bottom."""
    top, bottom = np.array(BACKGROUNDS[background], np.float32)
    return top + (bottom - top) * np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]


def render(clip: Clip) -> np.ndarray:
    """The clip as uint8 (17, 64, 64, 3)."""
    behind = ground(clip.background)
    alpha = coverage(clip)[..., None].astype(np.float32)
    return (behind + alpha * (np.array(COLOURS[clip.colour], np.float32) - behind)).round().astype(np.uint8)


def film(split: str, seed: int) -> list[Clip]:
    """All clips of the training or test film in order: scenes of four clips."""
    rng = np.random.default_rng([seed, split == "test"])
    actions: dict[tuple, tuple[list, list]] = {}  # (shape, colour, background) -> seen actions, held-out ones
    for held_out, pool in enumerate(combinations()):
        for shape, colour, action, background in pool:
            actions.setdefault((shape, colour, background), ([], []))[held_out].append(action)
    test = split == "test"
    objects = [o for o in actions if not test or actions[o][1]]
    scenes = (TEST_SEGMENTS * TEST_CLIPS if test else TRAIN_SEGMENTS * TRAIN_CLIPS) // 4
    order = []
    while len(order) < scenes:
        order += rng.permutation(len(objects)).tolist()
    clips = []
    for i in order[:scenes]:
        shape, colour, background = objects[i]
        seen, unseen = actions[objects[i]]
        chosen = [*rng.permutation(seen)[:2], *unseen] if test else rng.permutation(seen)[:4]
        clips += [random_clip((shape, colour, str(a), background), rng) for a in rng.permutation(chosen)]
    return clips

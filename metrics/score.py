"""Pairs of videos -> values, clip by clip, in values/*.jsonl: what is known is not computed again. A value's
key is a digest of all that makes it: videos, weights, options, versions of libraries, this program's code."""

import json
from collections import ChainMap
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache, partial
from hashlib import sha256 as digest_of
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

import prepare.encoders
import support.videos
from metrics.motion import FLOWS
from metrics.pairs import Pair, Source, Watched, watch
from metrics.parallel import in_processes
from metrics.table import LOADERS, METRICS, Metric, asked
from support.files import find_weights, sha256

LIBRARIES = "numpy scipy scikit-image av torch torchvision transformers open_clip_torch"
VERSIONS: dict[str, str] = {}
for library in (*LIBRARIES.split(), "opencv-python-headless"):
    with suppress(PackageNotFoundError):  # OpenCV has several names
        VERSIONS[library] = version(library)
ROOM = sorted(Path(__file__).parent.glob("*.py"))
CODE = sha256(*ROOM, Path(prepare.encoders.__file__), Path(support.videos.__file__))


def digest(path: Path) -> str:
    """sha256 of a file, or of the weights and settings or pictures in a folder, as they are now."""
    files = [path]
    if path.is_dir():
        files = sorted([*path.glob("*.json"), *path.glob("*.safetensors"), *support.videos.frames_of(path)])
    return _digest(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@cache
def _digest(files: tuple) -> str:
    return sha256(*(file for file, *_ in files))


def weights_of(metric: Metric, config) -> str:
    """A metric's weights as metrics.json names them; of local files with their sha256."""
    weights = getattr(config, metric.judge) if metric.judge else "none"
    weights = FLOWS.get(weights, weights)
    path = Path(find_weights(weights).removeprefix("local-dir:")).expanduser()
    return weights + (f" (sha256 {digest(path)[:12]})" if path.exists() else "") + metric.note


def keys_of(pair: Pair, config) -> dict[str, str]:
    """Of each metric that is asked for the key of its value; none where a video is missing."""
    if not (pair.pred and pair.gt):
        return {}
    options = [config.size, config.classifier_frames, config.trials, config.seconds, VERSIONS, CODE]
    videos = [source and (digest(source.path), *source[1:]) for source in (pair.pred, pair.gt, pair.control)]
    keys = {}
    for name in asked(config):
        metric = METRICS[name]
        parts = [name, weights_of(metric, config), options, videos if metric.of_gt else videos[:1]]
        parts.append(pair.frames if metric.of_neighbours else None)
        keys[name] = digest_of(json.dumps(parts).encode()).hexdigest()[:20]
    return keys


def known_values(out: Path) -> dict[str, object]:
    """key -> value, from out/values/*.jsonl, but lines that a kill cut short; `known_value` checks them."""
    known = {}
    for file in sorted(out.glob("values/*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                known.update(row if isinstance(row, dict) else {})
    return known


def known_value(known: dict[str, object], name: str, key: str) -> list[float | None] | None:
    """[value, value against another stimulus], where known and in the metric's range."""
    value, (low, high), rounding = known.get(key), METRICS[name].bounds, 1e-4
    if not isinstance(value, list) or len(value) != 2:
        return None
    numbers = [x for x in value if x is not None]
    fits = all(type(x) in (int, float) and low - rounding <= x <= high + rounding for x in numbers)
    return value if fits else None


def at_common_times(sets: dict[str, list[Pair]], config) -> dict[str, list[Pair]]:
    """--frames common: the sets, each pair with the fewest frames that a video of its clip has. Raises as
    `score`."""
    if config.frames == "own" or not any(METRICS[name].of_neighbours for name in asked(config)):
        return sets
    counts, common = [], {}
    for clip in tqdm(list(zip(*sets.values(), strict=True)), desc="counting frames", unit="clip"):
        sources = dict.fromkeys(source for pair in clip for source in (pair.pred, pair.gt) if source)
        videos = filter(None, (_read(config, source) for source in sources))
        counts.append(min(map(len, videos), default=None))
    for method, pairs in sets.items():
        common[method] = [pair._replace(frames=n) for pair, n in zip(pairs, counts, strict=True)]
    return common


def step_of(sets: dict[str, list[Pair]], seconds: float) -> str:
    """The common time step of a table, or ""."""
    frames = {pair.frames for pairs in sets.values() for pair in pairs if pair.frames}
    ends = sorted({min(frames, default=0), max(frames, default=0)})
    steps = " to ".join(f"{seconds / n:.3f}" for n in ends if n)
    return f"{' to '.join(map(str, ends))} frames a clip, {steps} s between neighbours" if frames else ""


def score_all(sets: dict[str, list[Pair]], config, out: Path, accelerator: Accelerator) -> dict[str, str]:
    """`score`, shared over the processes; returns when all are done."""
    work = partial(score, sets, config, out, accelerator.device)
    reasons = in_processes(work, accelerator, config.processes)
    accelerator.wait_for_everyone()
    return dict(ChainMap(*reasons))


@torch.inference_mode()
def score(
    sets: dict[str, list[Pair]], config, out: Path, device: torch.device | str = "cpu", rank=0, world=1
) -> dict[str, str]:
    """Compute what out/values/ lacks, this process's share, clip by clip. Returns {judge: why it could not be
    had, metric: why a clip has no value}. Raises ValueError for a video that cannot be read, unless
    --skip-bad."""
    known, judges = known_values(out), Judges(config, device)
    read = lru_cache(4)(partial(_read, config))  # a prediction, its stimulus, the control's, the memory
    n = len(next(iter(sets.values())))
    order = sorted(range(n), key=lambda i: i % max(1, n // 2))  # a control's clip is next: read, judged once
    (out / "values").mkdir(parents=True, exist_ok=True)
    for i in tqdm(np.array_split(order, world)[rank], desc="scoring", unit="clip", disable=rank > 0):
        for pairs in sets.values():
            keys = keys_of(pairs[i], config)
            keys = {name: key for name, key in keys.items() if not known_value(known, name, key)}
            if values := _values(pairs[i], keys, config, judges, read):
                support.files.append_text(out / "values" / f"{rank}.jsonl", f"\n{json.dumps(values)}")
    return judges.unavailable


def _read(config, source: Source) -> Watched | None:
    try:
        return watch(source, config.seconds)
    except (ValueError, OSError) as error:
        if not config.skip_bad:
            advice = "; --skip-bad goes on without it, as a missing value" if config.pairs else ""
            raise ValueError(f"{error}{advice}") from error
        tqdm.write(f"{error}: a missing value")


def _values(pair: Pair, keys: dict[str, str], config, judges: "Judges", read: Callable) -> dict[str, list]:
    """key -> [value, value against another stimulus] of `keys` {metric: key}, where its judge can be had and
    both videos can be read."""
    if not keys or not (pred := read(pair.pred)) or not (gt := read(pair.gt)):
        return {}
    control = read(pair.control) if pair.control and any(METRICS[name].of_gt for name in keys) else None
    values = {}
    for name, key in keys.items():
        metric = METRICS[name]
        judge = judges(metric.judge)
        if judge or not metric.judge:
            try:
                value = metric.of_clip(judge, config, pred, gt, pair.frames)
                other = metric.of_clip(judge, config, pred, control, pair.frames) if metric.of_gt else None
            except Exception as error:  # such as frames that are too small: the other metrics go on
                judges.unavailable[name] = f"{pair.name}: {_cause(error)}"
                continue
            trials = metric.chance and config.trials
            values[key] = _by_trials([value, other], trials, int(key, 16)) if trials else [value, other]
    return values


def _by_trials(values: list[float | None], trials: int, seed: int) -> list[float | None]:
    """Of each probability the share of so many trials that succeed."""
    rngs = [np.random.default_rng([k, seed]) for k in range(len(values))]
    return [p and rng.binomial(trials, p) / trials for p, rng in zip(values, rngs, strict=True)]


def _cause(error: Exception) -> str:
    first, *_ = (str(error).strip() or type(error).__name__).splitlines()
    return first[:300]


class Judges:
    """The frozen networks, each loaded when first asked for, or None; `unavailable` says why, and why a
    metric has no value."""

    def __init__(self, config, device: torch.device | str):
        self.config, self.device = config, device
        self.loaded: dict[str, Callable | None] = {"": None}
        self.unavailable: dict[str, str] = {}

    def __call__(self, name: str) -> Callable | None:
        if name not in self.loaded:
            weights = getattr(self.config, name)
            try:
                self.loaded[name] = LOADERS[name](find_weights(weights), self.device)
            except Exception as error:  # no network, no such folder, a package is missing, a damaged file
                self.loaded[name] = None
                self.unavailable[name] = f"{weights} cannot be had: {_cause(error)}"
        return self.loaded[name]

"""Pairs of videos -> values, clip by clip, kept in values/*.jsonl: what is known is not computed again.

A value's key is a digest of all that makes it: videos, weights, options, versions of the libraries and this
program's own code.
"""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
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
from metrics.table import LOADERS, METRICS, Metric, asked
from support.files import sha256
from support.processes import in_processes
from support.readers import damaged

# ---------------------------------------------------------------- what makes a value


def _versions() -> dict[str, str | None]:
    names = (
        "numpy scipy scikit-image opencv-python-headless av torch torchvision transformers open_clip_torch"
    )
    found = {}
    for name in names.split():
        with suppress(PackageNotFoundError):  # OpenCV has several names
            found[name] = version(name)
    return found


VERSIONS = _versions()
_OWN = [
    Path(__file__).with_name(f"{name}.py")
    for name in "table classes pixels features motion pairs score".split()
]
CODE = sha256(*_OWN, Path(prepare.encoders.__file__), Path(support.videos.__file__))


def digest(path: Path) -> str:
    """sha256 of a file, or of the weights and settings in a folder, as they are now."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors"))
    return _digest(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@cache
def _digest(files: tuple) -> str:
    return sha256(*(file for file, *_ in files))


def weights_of(metric: Metric, config) -> str:
    """What metrics.json says of a metric's weights; of local files with their sha256."""
    weights = getattr(config, metric.judge) if metric.judge else "none"
    weights = FLOWS.get(weights, weights)
    path = Path(weights.removeprefix("local-dir:")).expanduser()
    return weights + (f" (sha256 {digest(path)[:12]})" if path.exists() else "") + metric.note


def keys_of(pair: Pair, config) -> dict[str, str]:
    """Of each metric that is asked for the key of its value; none where a video is not there."""
    if not (pair.pred and pair.gt):
        return {}
    how = [config.size, config.classifier_frames, config.trials, config.seconds, VERSIONS, CODE]
    videos = [source and (digest(source.path), source.half) for source in (pair.pred, pair.gt, pair.other)]
    keys = {}
    for name in asked(config):
        metric = METRICS[name]
        made_of = [name, weights_of(metric, config), how, videos if metric.of_gt else videos[:1]]
        keys[name] = digest_of(json.dumps(made_of).encode()).hexdigest()[:20]
    return keys


def known_values(out: Path) -> dict[str, list]:
    """key -> [value, value against another stimulus], from out/values/*.jsonl; what a kill cut short, or is
    nothing that `score` writes, is passed over and so computed anew. A folder in a file's place:
    ValueError."""
    known = {}
    for file in sorted(out.glob("values/*.jsonl")):
        if not file.is_file():
            raise damaged(file, "a folder", "a file of values", "delete it")
        for line in file.read_text(errors="replace").split("\n"):
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                known |= (
                    {key: row[key] for key in row if _is_value(row[key])} if isinstance(row, dict) else {}
                )
    return known


def _is_value(value: object) -> bool:
    def number(x: object) -> bool:
        return x is None or type(x) in (int, float) and math.isfinite(x)

    return isinstance(value, list) and len(value) == 2 and all(map(number, value))


def known_value(known: dict[str, list], name: str, key: str) -> list | None:
    """[value, control] of a metric where it is known and lies in the metric's range."""
    (low, high), value = METRICS[name].bounds, known.get(key, [math.nan])
    rounding = 1e-4
    right = all(x is None or low - rounding <= x <= high + rounding for x in value)
    return value if right else None


# ---------------------------------------------------------------- scoring


def score_all(sets: dict[str, list[Pair]], config, out: Path, accelerator: Accelerator) -> dict[str, str]:
    """`score`, shared over the processes; returns when all are done."""
    device = accelerator.device
    shares = in_processes(
        lambda *place: score(sets, config, out, device, *place), accelerator, config.processes
    )
    accelerator.wait_for_everyone()
    return {judge: why for absent in shares for judge, why in absent.items()}


@torch.inference_mode()
def score(
    sets: dict[str, list[Pair]],
    config,
    out: Path,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> dict[str, str]:
    """Compute what out/values/ does not hold, this process's share, clip by clip. Returns {judge: why it
    could not be had}. Raises ValueError for a video that cannot be read, unless --skip-bad."""
    known, judges = known_values(out), Judges(config, device)
    n = len(next(iter(sets.values())))
    order = sorted(
        range(n), key=lambda i: i % max(1, n // 2)
    )  # a control's clip comes next: read, judged once

    @lru_cache(3)  # a prediction, its stimulus and the control's
    def read(source: Source) -> Watched | None:
        try:
            return watch(source, config.seconds)
        except (ValueError, OSError) as error:
            if not config.skip_bad:
                mend = "; --skip-bad goes on without it, as a missing value" if config.pairs else ""
                raise ValueError(f"{error}{mend}") from error
            tqdm.write(f"{error}: a missing value")

    (out / "values").mkdir(parents=True, exist_ok=True)
    with open(out / "values" / f"{rank}.jsonl", "a") as file:
        for i in tqdm(np.array_split(order, world)[rank], desc="scoring", unit="clip", disable=rank > 0):
            for pair in (pairs[i] for pairs in sets.values()):
                keys = keys_of(pair, config)
                missing = {name: key for name, key in keys.items() if not known_value(known, name, key)}
                if not missing or not (pred := read(pair.pred)) or not (gt := read(pair.gt)):
                    continue
                other = (
                    read(pair.other) if pair.other and any(METRICS[name].of_gt for name in missing) else None
                )
                values = {}
                for name, key in missing.items():
                    judge, metric = judges(METRICS[name].judge), METRICS[name]
                    if judge or not metric.judge:
                        control = _value(metric, judge, config, key, pred, other, 1) if metric.of_gt else None
                        values[key] = [_value(metric, judge, config, key, pred, gt, 0), control]
                file.write(f"\n{json.dumps(values)}")
                file.flush()
    return judges.absent


def _value(
    metric: Metric,
    judge: Callable | None,
    config,
    key: str,
    pred: Watched,
    stimulus: Watched | None,
    control: int,
) -> float | None:
    """The metric of one clip; None where a video is missing or has too few frames."""
    videos = [pred, stimulus] if metric.of_gt else [pred]
    if any(video is None or len(video) < metric.least for video in videos):
        return None
    value = float(np.mean(metric.formula(*metric.picks(judge, config, *videos))))
    if metric.chance and config.trials:  # each trial succeeds with exactly this probability
        value = np.random.default_rng([control, int(key, 16)]).binomial(config.trials, value) / config.trials
    return value


class Judges:
    """The frozen networks, each loaded when it is first asked for; `absent` says why one could not be had."""

    def __init__(self, config, device: torch.device | str):
        self.config, self.device, self.loaded, self.absent = config, device, {"": None}, {}

    def __call__(self, name: str) -> Callable | None:
        if name not in self.loaded:
            weights = getattr(self.config, name)
            try:
                self.loaded[name] = LOADERS[name](weights, self.device)
            except (
                Exception
            ) as error:  # no network, no such folder, a package or a tensor is missing, a damaged file
                self.loaded[name] = None
                said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                self.absent[name] = f"{weights} cannot be had: {said}"
        return self.loaded[name]

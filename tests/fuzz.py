"""Damaged files by the thousand: `python tests/fuzz.py --files 2000` counts what a reader makes of each.

Each file of a small prepared world is changed at random (bytes flipped, cut, repeated, zeroed, JSON values exchanged) and
read as the scripts read it, with 70 s at most. Read or refused is right; anything else is printed with its number."""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from tiny import SIZE  # noqa: E402

from brain_model import BrainModel  # noqa: E402
from data import Clips  # noqa: E402
from evaluate import CineNeuron  # noqa: E402
from heads import Stage1Heads  # noqa: E402
from metrics.score import known_values  # noqa: E402
from prepare.captions import read_captions  # noqa: E402
from support.readers import load_model, read_json  # noqa: E402
from support.runs import BAD_INPUT, RunFolder, read_log  # noqa: E402
from support.videos import read_video, write_video  # noqa: E402

JUNK = [None, True, -1, 0, 1e308, float("nan"), "", "x" * 99, [], {}, [[]], {"a": 1}, "\u2028", 2**70]


def flip(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """Bytes changed, among the first `end`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32))):
        out[rng.randrange(min(len(out), end or len(out)))] = rng.randrange(256)
    return bytes(out)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Cut, or a part of it zero or twice in it."""
    start, ends = rng.randrange(len(data)), data[rng.randrange(len(data)) :]
    return data[:start] + rng.choice(
        (b"", bytes(rng.randrange(1, 400)) + data[start + 400 :], data[max(0, start - 200) :], ends)
    )


def junk(data: bytes, rng: random.Random) -> bytes:
    """A value of the JSON (or of a line of it) exchanged for another kind of value."""
    lines = data.decode("utf-8", "replace").split("\n")
    i, is_json = rng.randrange(len(lines)), not lines[0].endswith("}")
    try:
        holder = [json.loads(data if is_json else lines[i])]  # so that all of it can be exchanged, too
    except ValueError:
        return flip(data, rng)
    place, at = holder, 0
    while isinstance(place[at], (dict, list)) and place[at] and rng.random() < 0.8:
        place = place[at]
        at = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    if isinstance(place, dict) and rng.random() < 0.3:
        del place[at]
    else:
        place[at] = rng.choice(JUNK)
    text = json.dumps(holder[0])
    return (text if is_json else "\n".join([*lines[:i], text, *lines[i + 1 :]])).encode()


HEAD = partial(flip, end=256)  # where formats keep their sizes
BYTES = [flip, flip, HEAD, HEAD, cut, cut, cut]
TEXT = [junk, junk, junk, *BYTES]


def targets(root: Path) -> list[tuple[Path, Callable[[], object], list]]:
    """(file, the function that reads it as the scripts do, what may damage it)."""
    data, run = root / "data" / "cc2017", root / "runs/cc2017/sub1/full-s0"
    evaluation = next(run.glob("eval*"))

    def clips() -> None:
        train = Clips("cc2017", 1, "train", None, "models/wan", SIZE, root / "data", batch_size=8)
        train.batch(0)
        train.averaged(np.arange(8))

    def state() -> None:
        settings, log = read_json(run / "stage1" / "config.json"), "test.json"
        with RunFolder(root / "copy" / "stage1", settings, 4, log, Accelerator(cpu=True)) as folder:
            folder.first_step, folder.state_file = 4, run / "stage1" / "state" / "state.pt"
            model = load_model(BrainModel, run / "stage1" / "brain_model")
            folder.restore({"model": model, "heads": load_model(Stage1Heads, run / "stage1" / "heads")}, {})

    def model() -> None:
        CineNeuron.from_pretrained(run)

    def every(folder: Path, patterns: str, read: Callable[[], object], ways: list) -> list:
        return [(path, read, ways) for pattern in patterns.split() for path in sorted(folder.glob(pattern))]

    train, stage2 = data / "stimuli" / "train", run / "stage2"
    rows = every(data / "sub1", "train/*.npy voxels.npz", clips, BYTES) + every(
        train, "*.npy wan/*.npy", clips, BYTES
    )
    rows += every(train, "clips.jsonl manifest.json wan/manifest.json", clips, TEXT)
    rows += every(run, "stage1/state/state.pt", state, BYTES)
    rows += every(run, "stage1/log.jsonl", lambda: read_log(run / "stage1/log.jsonl"), TEXT)
    rows += every(stage2, "*.safetensors */*.safetensors voxels.npz", model, BYTES)
    rows += every(stage2, "config.json */config.json memories.json", model, TEXT)
    rows += every(evaluation, "values/*.jsonl", lambda: known_values(evaluation), TEXT)
    videos, frames = root / "videos", np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    for suffix in (".mp4", ".gif"):
        write_video(videos / f"a{suffix}", frames, 8)
    np.save(videos / "a.npy", np.zeros((9, 32, 32, 3), np.uint8))
    rows += [(p, lambda p=p: read_video(p), BYTES) for p in sorted(videos.iterdir())] * 4
    lists, captions = (root / "a.json", root / "b.pt"), [f"a dog {k}" for k in range(16)]
    lists[0].write_text(json.dumps(captions))
    torch.save(captions, lists[1])
    for file, ways in zip(lists, (TEXT, BYTES), strict=True):
        rows += [(file, lambda file=file: read_captions(file, ["seg1"]), ways)] * 2
    return rows


class Hang(BaseException):
    pass


def alarm(*_) -> None:
    raise Hang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from test_faults import make_world

    signal.signal(signal.SIGALRM, alarm)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = make_world(Path(folder))
        every = targets(root)
        os.chdir(root)
        for i in range(args.files):
            rng = random.Random(args.seed * 10**6 + i)
            path, read, ways = every[i % len(every)]
            content = path.read_bytes()
            path.write_bytes(rng.choice(ways)(content, rng))
            signal.alarm(70)
            try:
                read()
                counts["read"] += 1
            except BAD_INPUT as error:
                is_named = any(part in str(error) for part in (path.name, *path.parts[-3:-1]))
                counts["refused, named" if is_named else "refused, not named"] += 1
                if not is_named:
                    print(f"{i} {path.name}: {str(error)[:200]}")
            except Hang:
                counts["HANG"] += 1
                print(f"{i} {path.name}: more than 70 s")
            except BaseException:
                counts["UNCAUGHT"] += 1
                print(f"{i} {path.relative_to(root)}: {traceback.format_exc()}")
            finally:
                signal.alarm(0)
                path.write_bytes(content)
                shutil.rmtree(root / "copy", ignore_errors=True)
    os.chdir(Path(__file__).parent)
    print(", ".join(f"{n} {name}" for name, n in counts.most_common()))
    sys.exit(1 if counts["UNCAUGHT"] or counts["HANG"] else 0)


if __name__ == "__main__":
    main()

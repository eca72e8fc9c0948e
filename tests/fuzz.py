"""Damaged files by the thousand: `python tests/fuzz.py --files 2000` counts what a reader makes of each.

Each file of a small prepared world is changed at random (bytes flipped, cut, repeated, zeroed) and read as the scripts read
it, with 70 s at most. Read or refused is right; anything else is printed with its number, and a hang ends it."""

import argparse
import collections
import faulthandler
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from test_faults import RUN, STIMULI, SUBJECT, go_on, load_run, make_world, read_clips  # noqa: E402

from metrics.score import known_values  # noqa: E402
from support.runs import BAD_INPUT, read_log  # noqa: E402
from support.videos import read_video, write_video  # noqa: E402

READERS = {  # of the files of these names
    f"{SUBJECT}/train/*.npy": read_clips, f"{SUBJECT}/voxels.npz": read_clips, f"{STIMULI}/train/*.*": read_clips,
    f"{STIMULI}/train/wan/*.*": read_clips, f"{RUN}/stage1/state/state.pt": go_on, f"{RUN}/stage1/log.jsonl": read_log,
    f"{RUN}/stage2/*.*": load_run, f"{RUN}/stage2/*/*.*": load_run, "videos/*.*": read_video,
    f"{RUN}/eval*/values/*.jsonl": lambda path: known_values(path.parents[1]),
}  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bytes changed, half the time among the first 256, where formats keep their sizes; or a part lost, zero or twice."""
    if rng.random() < 0.5:
        out = bytearray(data)
        for _ in range(rng.choice((1, 4, 32))):
            out[rng.randrange(min(len(out), rng.choice((256, len(out)))))] = rng.randrange(256)
        return bytes(out)
    start, ends = rng.randrange(len(data)), data[rng.randrange(len(data)) :]
    zeros = bytes(rng.randrange(1, 400)) + data[start + 400 :]
    return data[:start] + rng.choice((b"", zeros, data[max(0, start - 200) :], ends))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(make_world(Path(folder)))
        frames = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
        for name in ("a.mp4", "a.gif"):
            write_video(Path("videos", name), frames, 8)
        every = [(path, read) for name, read in READERS.items() for path in sorted(Path().glob(name))]
        for i in range(args.files):
            path, read = every[i % len(every)]
            content, result, message = path.read_bytes(), "read", ""
            path.write_bytes(damage(content, random.Random(i)))
            faulthandler.dump_traceback_later(70, exit=True)
            try:
                read(path)
            except BAD_INPUT as error:
                is_named = any(part in str(error) for part in (path.name, *path.parts[-3:-1]))
                result, message = ("refused, named", "") if is_named else ("refused, not named", str(error))
            except BaseException:
                result, message = "UNCAUGHT", traceback.format_exc()
            path.write_bytes(content)
            counts[result] += 1
            if message:
                print(f"{i} {path}: {result}: {message}")
        faulthandler.cancel_dump_traceback_later()
        os.chdir(Path(__file__).parent)
    print(", ".join(f"{n} {name}" for name, n in counts.most_common()))
    sys.exit(1 if counts["UNCAUGHT"] else 0)


if __name__ == "__main__":
    main()

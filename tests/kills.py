"""Kill each script at random moments so many times, then let it end: `python tests/kills.py --kills 20`. What it leaves
must equal, bit by bit, what an undisturbed one leaves: no file more, and no process."""

import argparse
import hashlib
import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from conftest import run_script, wait  # noqa: E402
from mini_releases import write_neuroclips, write_purdue  # noqa: E402
from test_faults import EVALUATE, STAGE1, STAGE2, make_world  # noqa: E402

VOLATILE = "events.out state.pt log.jsonl .log README.md manifest.json table6-cc2017- minutes".split()


def contents(path: Path) -> str:
    """The digest of what says the same in every process."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":  # the order of its header's metadata varies by process
        size = int.from_bytes(data[:8], "little")
        data = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode() + data[8 + size :]
    if path.name == "config.json":  # of an evaluation: the digest of files with such headers
        data = json.dumps(json.loads(data) | {"weights": 0}, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def files_of(root: Path) -> dict[str, str]:
    """The contents of what a script leaves."""
    files = [path for path in root.rglob("*") if not any(word in path.name for word in VOLATILE)]
    return {str(path.relative_to(root)): contents(path) for path in files if path.is_file()}


def run(words: str, cwd: Path, seconds: float | None = None) -> tuple[int, str]:
    """Exit status and stderr; killed after `seconds`. Raises AssertionError where processes of it live on."""
    try:
        done = run_script(*shlex.split(words), cwd=cwd, timeout=seconds)
        outcome = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        outcome = -signal.SIGKILL, ""
    # what it started saves what it has, and ends
    wait(lambda: cwd.resolve() not in [link.resolve() for link in Path("/proc").glob("[0-9]*/cwd")], 60)
    return outcome


def try_one(name: str, words: str, world: Path, kills: int, rng: random.Random) -> bool:
    to_prepare = name in ("neuroclips", "purdue", "toy")
    copy = partial(shutil.copytree, world, ignore=shutil.ignore_patterns("data") if to_prepare else None)
    whole, killed = (copy(world.with_name(f"{name}-{kind}")) for kind in ("whole", "killed"))
    start = time.time()
    status, stderr = run(words, whole)
    lasts = time.time() - start
    deaths, right, expected, differ = 0, status == 0, files_of(whole), []
    while right and deaths <= kills:
        status, stderr = run(words, killed, rng.uniform(0.3, 1.0) * lasts if deaths < kills else None)
        deaths += status == -signal.SIGKILL or deaths == kills
        if status == 0:  # it ended, the last time or before it could be killed
            differ = sorted(files_of(killed).items() ^ expected.items())[:5]
            right = not differ
            if right and deaths < kills:  # begin anew
                shutil.rmtree(killed)
                copy(killed)
        right &= status in (0, -signal.SIGKILL)
    outcome = "equal, nothing lost" if right else f"exit {status}: {differ} {stderr[-300:]}"
    print(f"{name}: killed {min(deaths, kills)} times of {lasts:.1f} s each: {outcome}")
    return right


def commands(root: Path) -> dict[str, str]:
    """What is tried, by name, in a world with the releases to prepare."""
    write_neuroclips(root / "release", train_segments=2)
    write_purdue(root / "purdue", train_segments=2)
    few = f"--train-segments 2 --test-segments 1 --viclip {REPO}/toy/viclip --clip local-dir:{REPO}/toy/clip"
    scripts = {"stage1": STAGE1, "stage2": STAGE2, "evaluate": EVALUATE}
    rows = [f"--{name} '{words.replace('--data cc2017 ', '')}'" for name, words in scripts.items()]
    return {
        "neuroclips": f"data.py cc2017 --fmri-release release {few}",
        "purdue": f"data.py cc2017 --raw purdue --captions purdue/captions.jsonl {few}",
        "toy": "train_stage1.py --data toy --steps 1",
        "train_stage1": f"train_stage1.py {STAGE1.replace('--steps 4', '--steps 60')} --run k",
        "train_stage2": f"train_stage2.py {STAGE2} --run k --stage1 full",
        "evaluate": f"evaluate.py {EVALUATE.replace('--steps 1', '--steps 3')} --processes 2",
        "ablations": f"extras/ablations.py --data cc2017 --table 6 --seeds 0 {' '.join(rows)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", help="names of commands")
    args, rng = parser.parse_args(), random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        world = make_world(Path(temporary, "world"))
        tried = {name: words for name, words in commands(world).items() if not args.only or name in args.only}
        right = [try_one(name, words, world, args.kills, rng) for name, words in tried.items()]
    sys.exit(not all(right))


if __name__ == "__main__":
    main()

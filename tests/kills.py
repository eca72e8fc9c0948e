"""Kill each script at random moments, give the same command again, and compare: `python tests/kills.py --kills 20`.

In a small prepared world: both trainings, evaluate with two workers, ablations, the preparation of the toy world, and
data.py on miniatures of two releases. Each is killed with SIGKILL so many times, then left to end; what it leaves must
equal, bit by bit, what an undisturbed one leaves: no file more, and no process.
"""

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
from contextlib import suppress
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from conftest import environment, wait  # noqa: E402

# times, orders of keys
VOLATILE = "events.out state.pt log.jsonl .log README.md manifest.json table6-cc2017-sub1.json".split()


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
    files = [path for path in root.rglob("*") if path.is_file()]
    files = [path for path in files if not any(word in path.name for word in VOLATILE)]
    return {str(path.relative_to(root)): contents(path) for path in files}


def works_in(process: Path, folder: Path) -> bool:
    with suppress(OSError):
        return (process / "cwd").readlink() == folder.resolve()
    return False


def run(command: list[str], cwd: Path, seconds: float | None = None) -> tuple[int, str]:
    """Exit status and stderr; killed after `seconds`. Raises AssertionError where processes of it live on."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=cwd, env=environment(), text=True, **pipes)
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, stderr = process.communicate()
    # what it started saves what it has, and ends
    wait(lambda: not any(works_in(left, cwd) for left in Path("/proc").glob("[0-9]*")), 60)
    return process.returncode, stderr


def try_one(name: str, command: list[str], world: Path, kills: int, rng: random.Random, folder: Path) -> bool:
    whole, killed = folder / f"{name}-whole", folder / f"{name}-killed"
    for place in (whole, killed):
        shutil.copytree(world, place)
    start = time.time()
    status, stderr = run(command, whole)
    lasts = time.time() - start
    deaths, right, expected, differ = 0, status == 0, files_of(whole), []
    while right and deaths <= kills:
        status, stderr = run(command, killed, rng.uniform(0.3, 1.0) * lasts if deaths < kills else None)
        deaths += status == -signal.SIGKILL or deaths == kills
        if status == 0:  # it ended, the last time or before it could be killed
            differ = sorted(files_of(killed).items() ^ expected.items())[:5]
            right = not differ
            if right and deaths < kills:  # begin anew
                shutil.rmtree(killed)
                shutil.copytree(world, killed)
        right &= status in (0, -signal.SIGKILL)
    outcome = "equal, nothing lost" if right else f"exit {status}: {differ} {stderr[-300:]}"
    print(f"{name}: killed {min(deaths, kills)} times of {lasts:.1f} s each: {outcome}")
    return right


def commands(root: Path) -> dict[str, str]:
    """What is tried, by name, in a world with the releases to prepare."""
    from mini_releases import write_neuroclips, write_purdue
    from test_faults import EVALUATE, STAGE1, STAGE2

    write_neuroclips(root / "release")
    write_purdue(root / "purdue", train_segments=2)
    few = f"--train-segments 2 --test-segments 1 --viclip {REPO}/toy/viclip --clip local-dir:{REPO}/toy/clip"
    of_rows = [words.replace("--data cc2017 ", "") for words in (STAGE1, STAGE2, EVALUATE)]
    stage1, stage2, evaluate = map(shlex.quote, of_rows)
    rows = f"--stage1 {stage1} --stage2 {stage2} --evaluate {evaluate}"
    return {
        "neuroclips": f"data.py cc2017 --fmri-release release {few}",
        "purdue": f"data.py cc2017 --raw purdue --captions purdue/captions.jsonl {few}",
        "toy": "train_stage1.py --data toy --steps 1",
        "train_stage1": f"train_stage1.py {STAGE1.replace('--steps 4', '--steps 60')} --run k",
        "train_stage2": f"train_stage2.py {STAGE2} --run k --stage1 full",
        "evaluate": f"evaluate.py {EVALUATE.replace('--steps 1', '--steps 3')} --processes 2",
        "ablations": f"extras/ablations.py --data cc2017 --table 6 --seeds 0 {rows}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", help="names of commands")
    args = parser.parse_args()
    from test_faults import make_world

    right = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "world").mkdir()
        world = make_world(folder / "world")
        rng = random.Random(0)
        for name, words in commands(world).items():
            script, *options = shlex.split(words)
            if not args.only or name in args.only:
                bare = folder / f"{name}-world"
                shutil.copytree(world, bare)
                if name in ("neuroclips", "purdue", "toy"):
                    shutil.rmtree(bare / "data")
                command = [sys.executable, str(REPO / script), *options]
                right &= try_one(name, command, bare, args.kills, rng, folder)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()

"""Kill each script at random moments, give the same command again, and compare: `python tests/kills.py --kills 20`.

In a small prepared world: train_stage1, train_stage2, evaluate with two workers, ablations, the preparation of the toy
world, and data.py on miniatures of the NeuroClips and the Purdue release. Each is killed with SIGKILL so many times,
then left to end; what it leaves must equal, bit by bit, what an undisturbed one leaves: no file more, and no process.
And on a full disk (a file system of few MB where this may mount one) each ends in one error that says so, and goes on
when there is room.
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

from conftest import environment  # noqa: E402

# times, orders of keys
VOLATILE = "events.out state.pt log.jsonl .log README.md manifest.json table6-cc2017-sub1.json".split()


def files_of(root: Path) -> dict[str, str]:
    """The contents of what a script leaves."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not any(word in path.name for word in VOLATILE):
            data = path.read_bytes()
            if path.suffix == ".safetensors":  # the order of its header's metadata varies by process
                size = int.from_bytes(data[:8], "little")
                header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True)
                data = header.encode() + data[8 + size :]
            if path.name == "config.json":  # of an evaluation: the digest of files with such headers
                data = json.dumps(json.loads(data) | {"weights": 0}, sort_keys=True).encode()
            found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


def left_in(folder: Path) -> list[Path]:
    """The processes that work in a folder."""
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "cwd").readlink() == folder.resolve():
                left.append(process)
    return left


def run(command: list[str], cwd: Path, seconds: float | None = None) -> tuple[int, str]:
    """Exit status and stderr; killed after `seconds`. Raises TimeoutError where processes of it live on."""
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
    end = time.time() + 60  # what it started saves what it has, and ends
    while left := left_in(cwd):
        if time.time() > end:
            raise TimeoutError(f"{left} live on after {shlex.join(command)}")
        time.sleep(0.1)
    return process.returncode, stderr


def try_one(name: str, command: list[str], world: Path, kills: int, rng: random.Random, folder: Path) -> bool:
    whole, killed = folder / f"{name}-whole", folder / f"{name}-killed"
    for place in (whole, killed):
        shutil.copytree(world, place)
    start = time.time()
    status, stderr = run(command, whole)
    lasts = time.time() - start
    if status:
        print(f"{name}: exit {status}: {stderr[-500:]}")
        return False
    deaths, right, expected, differ = 0, True, files_of(whole), []
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


def full_disk(name: str, command: list[str], world: Path, folder: Path) -> bool:
    """On a file system that has no room: one error; with room the same command ends well."""
    place = folder / f"{name}-full"
    place.mkdir()
    pages = [-(-path.stat().st_size // 4096) for path in world.rglob("*") if path.is_file()]
    size = 4096 * sum(pages) + 20_000
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True
    ).returncode:
        print(f"{name}: full disk not tried: no file system may be mounted here")
        return True
    try:
        shutil.copytree(world, place, dirs_exist_ok=True)
        before = files_of(place)
        status, stderr = run(command, place)
        error = stderr[stderr.rfind("error: ") :].strip() if "error: " in stderr else stderr[-300:]
        said = status == 1 and len(error.splitlines()) <= 3 and "Traceback" not in stderr
        kept = {n: files_of(place).get(n) for n in before} == before
        subprocess.run(["mount", "-o", f"remount,size={size * 4 + 200_000_000}", str(place)], check=True)
        again, _ = run(command, place)
        outcome = f"{'one error' if said else f'exit {status}'}, {'kept' if kept else 'LOST'}"
        print(f"{name}: full disk: {outcome}, again exit {again}: {error[:110]}")
        return said and kept and again == 0
    finally:
        subprocess.run(["umount", str(place)], check=False)


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
                right &= full_disk(name, command, bare, folder)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()

"""Kill each script at random moments, give the same command again, and compare: `python tests/kills.py --kills 20`.

In a small prepared world: train_stage1, train_stage2, evaluate, and data.py on a miniature of the NeuroClips
release. Each is killed with SIGKILL so many times, then left to end; what it leaves must equal, bit by bit, what an
undisturbed one leaves. And on a full disk (a file system of few MB where this may mount one) each ends in one error
that says so, and goes on when there is room.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from conftest import environment  # noqa: E402

VOLATILE = ("events.out", "state.pt", "log.jsonl", "README.md", "manifest.json")  # times, orders of keys


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
            found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


def run(command: list[str], cwd: Path, seconds: float | None = None) -> tuple[int, str]:
    """Exit status and stderr; killed after `seconds`."""
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
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
    deaths, right, expected = 0, True, files_of(whole)
    while right and deaths <= kills:
        status, stderr = run(command, killed, rng.uniform(0.3, 1.0) * lasts if deaths < kills else None)
        deaths += status == -signal.SIGKILL or deaths == kills
        if status == 0:  # it ended, the last time or before it could be killed
            right = files_of(killed) == expected
            if deaths < kills:  # begin anew
                shutil.rmtree(killed)
                shutil.copytree(world, killed)
        right &= status in (0, -signal.SIGKILL)
    differ = sorted(files_of(killed).items() ^ expected.items())[:5]
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", help="one of the scripts")
    args = parser.parse_args()
    from mini_releases import write_neuroclips
    from test_faults import EVALUATE, STAGE1, STAGE2, make_world

    right = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "world").mkdir()
        world = make_world(folder / "world")
        write_neuroclips(world / "release")
        data = (
            f"cc2017 --fmri-release release --train-segments 2 --test-segments 1 --viclip {REPO}/toy/viclip"
        )
        options = {
            "data": f"{data} --clip local-dir:{REPO}/toy/clip",
            "train_stage1": STAGE1.replace("--steps 4", "--steps 60") + " --run k",
            "train_stage2": STAGE2 + " --run k --stage1 full",
            "evaluate": EVALUATE.replace("--steps 1", "--steps 3"),
        }
        rng = random.Random(0)
        for name, words in options.items():
            command = [sys.executable, str(REPO / f"{name}.py"), *words.split()]
            if args.only in (None, name):
                bare = folder / f"{name}-world"
                shutil.copytree(world, bare)
                if name == "data":
                    shutil.rmtree(bare / "data")
                right &= try_one(name, command, bare, args.kills, rng, folder)
                right &= full_disk(name, command, bare, folder)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()

"""What several tests use: the tiny world (tiny.py), the scripts run as a reader runs them."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import pytest
import torch
from mini_releases import stimuli  # noqa: F401  a fixture
from tiny import linked, tiny, tiny_copy  # noqa: F401  fixtures

diffusers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

REPO = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    usual = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | usual | {"PYTHONPATH": str(REPO)}


def run_script(script: str, *args: object, cwd: Path, timeout: float = 900) -> subprocess.CompletedProcess:
    """A script of the repository in a process of its own; data and runs are below `cwd`."""
    command = [sys.executable, str(REPO / script), *map(str, args)]
    options = dict(env=environment(), capture_output=True, text=True, timeout=timeout)
    return subprocess.run(command, cwd=cwd, **options)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def signals():
    """door() and Stopping.listen() set handlers, and a test's process lives on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def wait(true, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)

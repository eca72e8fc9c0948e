"""What several tests use: the tiny world (tiny.py), the scripts run as a reader runs them, a browser."""

import hashlib
import os
import shutil
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
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def signals():
    """door() and Stopping.listen() set handlers, and a test's process lives on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


FLAGS = """headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
disable-component-update disable-sync window-size=1280,720""".split()


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver here")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    opened.implicitly_wait(5)
    yield opened
    log = opened.get_log("browser")
    opened.quit()
    assert log == []


def wait(true, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def press(browser, key: str) -> None:
    browser.find_element("tag name", "body").send_keys(key)

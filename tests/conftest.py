"""What several tests use: a tiny prepared dataset with a planted signal, and the scripts run as a reader runs
them, a browser."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prepare.copies import prepare_copies, prepare_recorded

REPO = Path(__file__).parents[1]
AREAS = ["L_V1", "R_FFC", "L_MST", "hippocampus_left", "R_4"]  # of the voxels in turn; R_4 is motor cortex
CLASSES = ["person", "animal", "vehicle", "other"]


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def write_prepared(
    root: Path,
    name: str = "cc2017",
    clips: tuple[int, int] = (48, 24),
    segments: tuple[int, int] = (3, 2),
    N: int = 40,
    T: int = 1,
    D: int = 16,
    F: int = 3,
    hidden_numbers: int = 4,
    noise: float = 0.3,
    copies: int = 0,
    subject: int = 1,
    seed: int = 0,
) -> Path:
    """root/name as the contract has it (2 and 3 showings, the last of the last training segment not
    recorded). Returns root/name.

    fMRI and embeddings are linear in the same `hidden_numbers` a clip, so that one can be read from the
    other. The first `copies` clips of the first segment have the frames of the first of the last segment.
    """
    rng, folder = np.random.default_rng(seed), root / name
    to_fmri, to_text, to_action = (rng.normal(size=(hidden_numbers, k)) for k in (T * N, D, D))

    def save(path: Path, array: np.ndarray, **recipe) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
        manifest = path.with_name("manifest.json")
        entries = json.loads(manifest.read_text()) if manifest.is_file() else {}
        entries[path.name] = {
            "shape": array.shape,
            "dtype": str(array.dtype),
            "recipe": recipe,
            "inputs": {},
            "versions": {},
        }
        manifest.write_text(json.dumps(entries))

    for split, n, parts, repeats in (("train", clips[0], segments[0], 2), ("test", clips[1], segments[1], 3)):
        length, prefix = n // parts, {"train": "seg", "test": "test"}[split]
        hidden = rng.normal(size=(n, hidden_numbers))
        if split == "train" and copies:
            hidden[:copies] = hidden[-length:][:copies]
        fmri = (hidden @ to_fmri).reshape(n, 1, T, N) + noise * hidden_numbers**0.5 * rng.normal(
            size=(n, repeats, T, N)
        )
        fmri = (fmri - fmri.mean(0)) / fmri.std(0)
        if split == "train":
            fmri[-length:, -1] = np.nan
        frames = (
            hidden[:, None]
            + 0.1 * rng.normal(size=(n, F, hidden_numbers)) * (np.arange(n) >= copies)[:, None, None]
        )
        if split == "train" and copies:
            frames[:copies] = frames[-length:][:copies]
        labels = (hidden[:, :4] > 0.5).astype(np.uint8)
        save(folder / f"sub{subject}" / split / "fmri.npy", fmri.astype(np.float32), subject=subject)
        stimuli = folder / "stimuli" / split
        save(stimuli / "e_img.npy", unit(frames @ to_text), clip="planted")
        save(stimuli / "e_txt.npy", unit(hidden @ to_text), clip="planted")
        save(stimuli / "e_act.npy", unit(hidden @ to_action), viclip="planted")
        save(stimuli / "categories.npy", labels, classes=CLASSES)
        with open(stimuli / "clips.jsonl", "w") as file:
            for i, row in enumerate(labels):
                segment, k = f"{prefix}{i // length + 1}", i % length
                named = [name for name, true in zip(CLASSES, row, strict=True) if true]
                clip = {
                    "id": f"{segment}-{k:03d}",
                    "segment": segment,
                    "video": f"{segment}.mp4",
                    "start_s": 2.0 * k,
                }
                file.write(
                    json.dumps(clip | {"caption": f"clip {i}", "tags": [], "categories": named}) + "\n"
                )
    roi = np.array([AREAS[i % len(AREAS)] for i in range(N)])
    np.savez(folder / f"sub{subject}" / "voxels.npz", index=np.arange(N) * 7, roi=roi)
    prepare_copies(folder / "stimuli")
    prepare_recorded(folder / f"sub{subject}")
    return folder


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "CUDA_VISIBLE_DEVICES": "",
    }


def run_script(script: str, *args: object, cwd: Path, timeout: float = 900) -> subprocess.CompletedProcess:
    """A script of the repository in a process of its own; data and runs are below `cwd`."""
    command = [sys.executable, str(REPO / script), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def chatter(done: subprocess.CompletedProcess) -> list[str]:
    """What libraries said in a script's output: warnings, and bars of the models that they load."""
    lines = (done.stdout + done.stderr).replace("\r", "\n").split("\n")
    return [line for line in lines if "Warning" in line or "Loading" in line or "pixdim" in line]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    opened = webdriver.Chrome(options=options, service=service)
    opened.implicitly_wait(5)
    yield opened
    said = opened.get_log("browser")
    opened.quit()
    assert said == []


def wait(true, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def press(browser, key: str) -> None:
    browser.find_element("tag name", "body").send_keys(key)

"""The three scripts on a GPU, in bf16, at a small size, against the CPU: pytest tests/test_gpu.py says whether
they work there. Without a GPU, CINENEURON_TEST_DEVICE=cpu runs the same functions on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, environment
from test_train_stage1 import signalled
from tiny import SIZE, write_films

from support.videos import read_video

DEVICE = os.environ.get("CINENEURON_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = pytest.mark.skipif(not DEVICE, reason="no CUDA GPU")
GPUS = torch.cuda.device_count() if DEVICE == "cuda" else 2  # on the CPU two processes stand for them

ALL = ",".join(map(str, range(torch.cuda.device_count())))
RUN = Path("runs/cc2017/sub1/full-s0")
COMMON = "--data cc2017 --log_every 1 --save_every 1000".split()
STAGE1 = (
    "--steps 40 --tokens 12 --width 32 --layers 2 --attention_heads 4 --batch_size 16 --lr 3e-3 --dropout 0.1"
)
STAGE2 = "--decoder models/wan --frames {} --height {} --width {} --epochs 4 --batch_size 8 --micro_batch 4".format(
    *SIZE
)
STAGE2 += " --attention_heads 4 --lora_rank 4 --lr 1e-3 --lr_lora 1e-3 --sample_every 4 --sampling_steps 2"
EVALUATE = (
    "--metrics ssim,psnr,epe --flow farneback --size native --clips 6 --batch_size 4 --fps 4.5 --steps 4"
)
COMMANDS = {"train_stage1.py": STAGE1, "train_stage2.py": STAGE2}
# share by which a loss in bf16 may differ from the CPU's: at the first step, where the weights are equal, and
# the mean of the last ten, after as many steps of rounding as there are
FIRST, LAST = 0.02, 0.15


def command(script: str) -> list[str]:
    return [str(REPO / script), *COMMON, *COMMANDS[script].split()]


def visible(device: str) -> dict[str, str]:
    """What the environment says of the GPUs that a script on this device sees."""
    return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ALL) if device == "cuda" else ""}


def run(folder: Path, device: str, argv: list[str], launch: tuple[str, ...] = ()) -> str:
    command, env = [sys.executable, *launch, *argv], environment() | visible(device)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def losses(folder: Path, stage: str) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in open(folder / RUN / stage / "log.jsonl")])


def agree(found: np.ndarray, wanted: np.ndarray) -> None:
    assert len(found) == len(wanted) and np.isfinite(found).all()
    assert found[0] == pytest.approx(wanted[0], rel=FIRST)
    assert found[-10:].mean() == pytest.approx(wanted[-10:].mean(), rel=LAST)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with the tiny world's data, films and decoder."""
    root = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_films(Path())
    return root


@pytest.fixture(scope="module")
def on_cpu(project, tmp_path_factory) -> Path:
    """Both stages, trained on the CPU."""
    folder = tmp_path_factory.mktemp("cpu") / "project"
    shutil.copytree(project, folder)
    for script in COMMANDS:
        run(folder, "cpu", command(script))
    return folder


def copy_for(script: str, project: Path, on_cpu: Path, folder: Path) -> Path:
    """The project, for stage 2 with the CPU's stage 1, so that both start alike."""
    shutil.copytree(project, folder)
    if script == "train_stage2.py":
        shutil.copytree(on_cpu / RUN / "stage1", folder / RUN / "stage1")
    return folder


@pytest.mark.parametrize("script", COMMANDS)
def test_training_agrees_with_the_cpu_and_goes_on_after_a_stop(script, project, on_cpu, tmp_path):
    stage = script.removeprefix("train_").removesuffix(".py")
    whole, halved = (copy_for(script, project, on_cpu, tmp_path / name) for name in ("whole", "halved"))
    run(whole, DEVICE, command(script))
    agree(losses(whole, stage), losses(on_cpu, stage))

    log, argv = halved / RUN / stage / "log.jsonl", command(script)[1:]
    assert signalled(script, argv, halved, log, 5, signal.SIGINT, **visible(DEVICE)).returncode == 130
    before = len(losses(halved, stage))
    run(halved, DEVICE, command(script))
    found, wanted = losses(halved, stage), losses(whole, stage)
    assert before < len(found) == len(wanted)
    exact = 0 if DEVICE == "cpu" else 1e-2  # sums of a GPU have no fixed order
    assert np.allclose(found[: before + 1], wanted[: before + 1], rtol=exact, atol=0)
    agree(found, wanted)


def test_evaluation_shows_what_the_cpu_shows(on_cpu, tmp_path):
    argv = [str(REPO / "evaluate.py"), "--data", "cc2017", *EVALUATE.split()]
    folders = []
    for device in ("cpu", DEVICE):
        folder = tmp_path / f"on-{device}-{len(folders)}"
        shutil.copytree(on_cpu, folder)
        run(folder, device, argv)
        (out,) = (folder / RUN).glob("eval-*")
        folders.append(out)
    cpu, gpu = folders
    files = sorted(file.name for file in (cpu / "recon").iterdir())
    assert len(files) == 6
    for name in files:
        shown, wanted = (read_video(out / "recon" / name).frames.astype(float) for out in (gpu, cpu))
        assert shown.shape == wanted.shape and abs(shown - wanted).mean() < 8, name  # of 255
    lines = [(out / "retrieved.jsonl").read_text().splitlines() for out in folders]
    first = [[json.loads(line)["retrieved"][0] for line in of] for of in lines]
    assert np.mean(np.equal(*first)) >= 0.8
    for name in ("ssim", "psnr", "epe"):
        values = [json.loads((out / "metrics.json").read_text())["metrics"][name]["mean"] for out in folders]
        assert values[1] == pytest.approx(values[0], rel=0.1), name


@pytest.mark.skipif(GPUS < 2, reason="one GPU")
@pytest.mark.parametrize("script", COMMANDS)
def test_two_gpus_train_as_one(script, project, on_cpu, tmp_path):
    stage = script.removeprefix("train_").removesuffix(".py")
    folder = copy_for(script, project, on_cpu, tmp_path / "two")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run(folder, DEVICE, command(script), launch)
    agree(losses(folder, stage), losses(on_cpu, stage))

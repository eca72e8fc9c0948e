"""The scripts on a GPU, in bf16, against the CPU: pytest -m gpu. CINENEURON_TEST_DEVICE=cpu needs no GPU."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, environment
from tiny import SIZE, write_films

from support.runs import read_log
from support.videos import read_video

DEVICE = os.environ.get("CINENEURON_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not DEVICE, reason="no CUDA GPU")]
SEVERAL = DEVICE == "cpu" or torch.cuda.device_count() > 1  # on the CPU two processes stand for two GPUs
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
RUN = Path("runs/cc2017/sub1/full-s0")
COMMON = "--data cc2017 --log_every 1 --save_every 1000 --attention_heads 4"
VIDEO = "--decoder models/wan --frames {} --height {} --width {}".format(*SIZE)
COMMANDS = {
    "train_stage1.py": f"{COMMON} --steps 40 --tokens 12 --width 32 --layers 2 --batch_size 16 --lr 3e-3 --dropout 0.1",
    "train_stage2.py": f"{COMMON} {VIDEO} --epochs 4 --batch_size 8 --micro_batch 4 --lora_rank 4 --lr 1e-3 "
    "--lr_lora 1e-3 --sample_every 4 --sampling_steps 2",
    "evaluate.py": "--data cc2017 --metrics ssim,psnr,epe --flow farneback --size native --clips 6 --fps 4.5 --steps 4",
}


def run(folder: Path, device: str, script: str, launch: tuple[str, ...] = ()) -> None:
    command = [sys.executable, *launch, str(REPO / script), *COMMANDS[script].split()]
    seen = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1") if device == "cuda" else ""}
    subprocess.run(command, cwd=folder, env=environment() | seen, timeout=900, check=True)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Path:
    """The tiny world's data, films and decoder, and both stages, trained on the CPU."""
    folder = tmp_path_factory.mktemp("cpu")
    with chdir(folder):
        write_films(Path())
    for stage in (1, 2):
        run(folder, "cpu", f"train_stage{stage}.py")
    return folder


@pytest.mark.parametrize("launch", [(), TWO] if SEVERAL else [()])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_training_agrees_with_the_cpu(stage, launch, on_cpu, tmp_path):
    shutil.copytree(on_cpu, tmp_path / "gpu")
    shutil.rmtree(tmp_path / "gpu" / RUN / stage)  # stage 2 starts from the CPU's stage 1
    run(tmp_path / "gpu", DEVICE, f"train_{stage}.py", launch)
    logs = [read_log(root / RUN / stage / "log.jsonl") for root in (tmp_path / "gpu", on_cpu)]
    of_gpu, of_cpu = (np.array([row["loss"] for row in log]) for log in logs)
    assert len(of_gpu) == len(of_cpu) and np.isfinite(of_gpu).all()
    assert of_gpu[0] == pytest.approx(of_cpu[0], rel=0.02)  # bf16 against fp32, at equal weights
    assert of_gpu[-10:].mean() == pytest.approx(of_cpu[-10:].mean(), rel=0.15)  # after many roundings


def test_evaluation_shows_what_the_cpu_shows(on_cpu, tmp_path):
    for name, device in (("cpu", "cpu"), ("gpu", DEVICE)):
        shutil.copytree(on_cpu, tmp_path / name)
        run(tmp_path / name, device, "evaluate.py")
    cpu, gpu = folders = sorted(tmp_path.glob(f"*/{RUN}/eval-*"))
    files = sorted((cpu / "recon").iterdir())
    assert len(files) == 6
    for file in files:
        shown, wanted = (read_video(path).frames.astype(float) for path in (gpu / "recon" / file.name, file))
        assert shown.shape == wanted.shape and abs(shown - wanted).mean() < 8, file.name  # of 255
    first = [[json.loads(line)["retrieved"][0] for line in open(out / "retrieved.jsonl")] for out in folders]
    assert np.mean(np.equal(*first)) >= 0.8
    for name in ("ssim", "psnr", "epe"):
        values = [json.loads((out / "metrics.json").read_text())["metrics"][name]["mean"] for out in folders]
        assert values[1] == pytest.approx(values[0], rel=0.1), name

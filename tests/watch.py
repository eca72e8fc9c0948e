"""A script's main in this process, watched: what each step of training gets and does to the weights, what an
evaluation reconstructs and scores."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import SIZE
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import evaluate
import metrics.report
from data import Batch
from evaluate import CineNeuron
from metrics import score
from metrics.report import Evaluation
from metrics.score import known_values
from metrics.table import LOADERS
from mixture_of_memories import Recalled
from support import training
from support.runs import RunFolder, read_log
from support.videos import read_video
from video_decoder import VideoDecoder

SMALL = "--data cc2017 --log_every 1 --batch_size 8 --attention_heads 4 --precision fp32".split()
STAGE1 = [*SMALL, *"--tokens 12 --width 24 --layers 2 --rank 2 --steps 8 --dropout 0.25 --lr 3e-3".split()]
STAGE2 = [*SMALL, *"--decoder models/wan --epochs 2 --micro_batch 4 --lora_rank 4 --lora_alpha 8".split()]
STAGE2 += [f"--{name}={value}" for name, value in zip(("frames", "height", "width"), SIZE, strict=True)]
STAGE2 += "--lr 1e-3 --lr_lora 1e-3 --lr_fusion 2e-3 --condition_dropout 0.4 --sample_every 0".split()


class Enough(Exception):
    """The script is stopped before its next step."""


@dataclass
class Watched:
    folder: Path = None  # of the stage
    models: tuple[nn.Module, ...] = ()  # Brain Model and heads, or the CineNeuron
    optimiser: torch.optim.Optimizer = None
    batches: list[Batch] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)  # of each step
    norms: list[float] = field(default_factory=list)  # of the gradient that moves the weights
    rates: list[list[float]] = field(default_factory=list)  # of the groups, as the weights moved
    calls: list[int] = field(default_factory=list)  # clips in each pass through the Brain Model's first block
    dit_calls: list[int] = field(default_factory=list)  # clips in each pass through the DiT's first block
    logged: list[int] = field(default_factory=list)  # steps in log.jsonl
    saved: list[int] = field(default_factory=list)  # steps whose weights were saved
    compiled: list[nn.Module] = field(default_factory=list)
    recalled: list[Recalled] = field(default_factory=list)  # of each step of stage 2
    samples: list[dict] = field(default_factory=list)  # number of clips, steps, guidance of each sampling
    start: dict[str, Tensor] = field(default_factory=dict)  # weights before the first step
    end: dict[str, Tensor] = field(default_factory=dict)  # and after the last

    @property
    def brain_model(self) -> nn.Module:
        return getattr(self.models[0], "brain_model", self.models[0])

    def weights(self) -> dict[str, Tensor]:
        states = enumerate(model.state_dict() for model in self.models)
        return {f"{k}.{name}": p.clone() for k, state in states for name, p in state.items()}


def listen(patch: pytest.MonkeyPatch, owner: type, name: str, note: Callable) -> None:
    """Call note(*arguments) before each call of owner.name."""
    method = getattr(owner, name)

    def noted(*args, **options):
        note(*args, **options)
        return method(*args, **options)

    patch.setattr(owner, name, noted)


def row_of_sampling(decoder, f_fuse, empty, size, generators, steps, guidance) -> dict:
    noise = [generator.initial_seed() for generator in generators]
    return {"clips": len(f_fuse), "f_fuse": f_fuse, "steps": steps, "guidance": guidance, "noise": noise}


def watch(script: ModuleType, arguments: list, stop: int = 3) -> Watched:
    """Run the script's main on these arguments in the working directory; stop it before step `stop`."""
    watched, train_step = Watched(), script.train_step

    def step(*given):
        *models, batch, _ = given
        if not watched.models:
            watched.models = (*models,)
            watched.start = watched.weights()
            count_passes(watched.brain_model.blocks, watched.calls)
            if hasattr(models[0], "decoder"):
                dit = models[0].decoder.transformer
                count_passes(getattr(dit, "blocks", None) or dit.transformer_blocks, watched.dit_calls)
        if len(watched.batches) == stop:
            raise Enough
        watched.batches.append(batch)
        result = train_step(*given)
        losses = result[0] if isinstance(result[0], dict) else result._asdict()
        if len(models) == 1:
            watched.recalled.append(result[1])
        watched.losses.append({name: float(value.detach()) for name, value in losses.items()})
        return result

    def moved(optimiser, *_) -> None:
        watched.optimiser = optimiser
        moving = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        watched.norms.append(float(torch.cat([p.grad.flatten() for p in moving]).norm()))
        watched.rates.append([group["lr"] for group in optimiser.param_groups])

    def compile_blocks(blocks, dit=None) -> None:
        watched.compiled += [*blocks, dit]

    hook = register_optimizer_step_pre_hook(moved)
    with pytest.MonkeyPatch.context() as patch, suppress(Enough):
        patch.setattr(script, "train_step", step)
        listen(patch, RunFolder, "save", lambda run, number: watched.saved.append(number))
        listen(patch, RunFolder, "__enter__", lambda run: setattr(watched, "folder", run.folder))
        listen(patch, VideoDecoder, "generate", lambda *args: watched.samples.append(row_of_sampling(*args)))
        patch.setattr(training, "compile_blocks", compile_blocks)
        try:
            script.main(script.parse([str(word) for word in arguments]))
        finally:
            hook.remove()
    watched.end = watched.weights()
    watched.logged = [row["step"] for row in read_log(watched.folder / "log.jsonl")]
    return watched


def count_passes(blocks: nn.ModuleList, calls: list[int]) -> None:
    blocks[0].register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))


# -- evaluate.py -------------------------------------------------------------------------------------------

EVALUATE = "--data cc2017 --metrics ssim --size native --batch_size 2 --fps 4.5".split()


@dataclass
class Evaluated:
    evaluation: Evaluation | None = None  # as it goes to the report
    values: dict = field(default_factory=dict)  # key: [value, of the control], as they were computed
    reconstructed: list[tuple] = field(default_factory=list)  # x, keys, steps, guidance of each batch
    made: list[dict] = field(default_factory=list)  # number of clips, steps, guidance of each sampling
    processes: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)  # frames that the classifier of videos was given
    videos: dict[str, np.ndarray] = field(default_factory=dict)  # frames of gt/0000.mp4 and recon/0000.mp4
    fps: list[float] = field(default_factory=list)  # of both
    printed: str = ""

    @property
    def out(self) -> Path:
        return self.evaluation.out

    def x(self) -> Tensor:
        return torch.cat([x for x, *_ in self.reconstructed])

    def keys(self) -> list[tuple[int, int]]:
        return [key for _, keys, *_ in self.reconstructed for key in keys]


def watch_evaluation(arguments: list) -> Evaluated:
    """evaluate.py's main on these arguments in the working directory, without its report and its pictures. A
    classifier of videos stands in for VideoMAE: its probabilities are those of the frames' mean colours."""
    seen = Evaluated()

    def in_processes(work, accelerator, processes: int) -> list:
        seen.processes.append(processes)
        return [work(0, 1)]

    def report(evaluation: Evaluation) -> str:
        seen.evaluation, seen.values = evaluation, known_values(evaluation.out)
        for file in evaluation.out.glob("*/0000.mp4"):
            video = read_video(file)
            seen.videos[file.parent.name] = video.frames.astype(int)
            seen.fps.append(video.fps)
        return "the table"

    def classifier(weights: str, device: str):
        if weights == "nowhere":
            raise ValueError("no such folder")

        def judge(frames: np.ndarray) -> np.ndarray:
            seen.judged.append(len(frames))
            colours = frames.mean((0, 1, 2)) / 255
            p = np.outer([1.0], np.sin(np.arange(400)) * colours[0] + np.cos(np.arange(400)) * colours[2])
            return np.exp(p) / np.exp(p).sum()

        judge.of_video, judge.least = True, 2
        return judge

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        listen(patch, CineNeuron, "reconstruct", lambda _, *args: seen.reconstructed.append(args))
        listen(patch, VideoDecoder, "generate", lambda *args: seen.made.append(row_of_sampling(*args)))
        patch.setattr(evaluate, "in_processes", in_processes)
        patch.setattr(score, "in_processes", in_processes)
        patch.setattr(evaluate, "report", report)
        patch.setattr(metrics.report, "report", report)
        patch.setattr(evaluate, "compare", lambda runs, data, *only: f"compared: {runs} {data}")
        patch.setitem(LOADERS, "video_classifier", classifier)
        evaluate.main(evaluate.parse([str(word) for word in arguments], evaluate.__doc__))
    seen.printed = printed.getvalue()
    return seen

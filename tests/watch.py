"""A training script's main in this process, watched: what each step gets, and what it does to the weights."""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import SIZE
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from data import Batch
from mixture_of_memories import Recalled
from support import training
from support.runs import RunFolder, read_log
from video_decoder import VideoDecoder

SMALL = "--data cc2017 --log_every 1 --batch_size 8 --attention_heads 4 --precision fp32".split()
STAGE1 = [*SMALL, *"--tokens 12 --width 24 --layers 2 --rank 2 --steps 8 --dropout 0.25 --lr 3e-3".split()]
STAGE2 = [
    *SMALL,
    "--decoder",
    "models/wan",
    *"--epochs 2 --micro_batch 4 --lora_rank 4 --lora_alpha 8".split(),
]
STAGE2 += [f"--{name}={value}" for name, value in zip(("frames", "height", "width"), SIZE, strict=True)]
STAGE2 += "--lr 1e-3 --lr_lora 1e-3 --lr_fusion 2e-3 --condition_dropout 0.4 --sample_every 0".split()


class Enough(Exception):
    """The script is stopped before its next step."""


@dataclass
class Watched:
    folder: Path = None  # of the stage
    config: object = None  # as the step got it
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
        return {
            f"{k}.{name}": p.detach().clone()
            for k, m in enumerate(self.models)
            for name, p in m.state_dict().items()
        }


def watch(script: ModuleType, arguments: list, stop: int = 3) -> Watched:
    """Run the script's main on these arguments in the working directory; stop it before step `stop`."""
    watched, train_step = Watched(), script.train_step
    save, enter, generate = RunFolder.save, RunFolder.__enter__, VideoDecoder.generate

    def step(*given):
        *models, batch, config = given
        if not watched.models:
            watched.models, watched.config = (*models,), config
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
        gradients = [
            p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None
        ]
        watched.optimiser = optimiser
        watched.norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))))
        watched.rates.append([group["lr"] for group in optimiser.param_groups])

    def saving(run: RunFolder, number: int) -> None:
        watched.saved.append(number)
        save(run, number)

    def entered(run: RunFolder) -> RunFolder:
        watched.folder = run.folder
        return enter(run)

    def sampled(decoder, f_fuse, empty, size, generators, steps, guidance) -> Tensor:
        watched.samples.append({"clips": len(f_fuse), "steps": steps, "guidance": guidance})
        return generate(decoder, f_fuse, empty, size, generators, steps, guidance)

    def compile_blocks(blocks, dit=None) -> None:
        watched.compiled += [*blocks, *([dit] if dit is not None else [])]

    hook = register_optimizer_step_pre_hook(moved)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "train_step", step)
            patch.setattr(RunFolder, "save", saving)
            patch.setattr(RunFolder, "__enter__", entered)
            patch.setattr(VideoDecoder, "generate", sampled)
            patch.setattr(training, "compile_blocks", compile_blocks)
            try:
                script.main(script.parse([str(word) for word in arguments]))
            except Enough:
                pass
    finally:
        hook.remove()
    watched.end = watched.weights()
    watched.logged = [row["step"] for row in read_log(watched.folder / "log.jsonl")]
    return watched


def count_passes(blocks: nn.ModuleList, calls: list[int]) -> None:
    blocks[0].register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))

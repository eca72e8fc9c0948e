"""What a step of both training scripts shares: precision, optimiser, gradients over the processes."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.state import is_initialized
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

MESSAGE = 1 << 26  # numbers in a message between processes, about: 256 MB
SMALL = 4096  # a parameter of fewer numbers keeps 32-bit moments
OPTIMIZERS = ("adamw", "adamw8bit")
PRECISIONS = ("bf16", "fp32")
DEVICES = ("cpu", "cuda", "mps")
# options that may change while a run goes on, in both stages
MAY_CHANGE = ("checkpointing", "micro_batch", "compile", "precision", "device", "save_every", "log_every")


def best_device() -> str:
    """CUDA where there is one, else the CPU: Apple's mps lacks operators."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_type() -> str:
    """That of this process since `start`, the best before."""
    return PartialState().device.type if is_initialized() else best_device()


def start(device: str | None = None) -> Accelerator:
    """One process or several, on a device of DEVICES; None: on the best. Raises ValueError where it is not
    there, and where accelerate is set to what this program does not do."""
    patient = InitProcessGroupKwargs(timeout=timedelta(days=30))  # one process may have far more left to do
    cpu = (device or best_device()) == "cpu"
    plain = "wanted plain data parallelism: accelerate launch --multi_gpu --mixed_precision no"
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch sets it
    if precision not in ("no", "bf16"):
        raise ValueError(f"accelerate is set to {precision}: {plain}, and --precision bf16 or fp32")
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patient])
    except ImportError as error:  # of DeepSpeed, Megatron
        raise ValueError(f"accelerate is set to what is not installed ({error}): {plain}") from error
    kind, present = accelerator.distributed_type, accelerator.device.type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"{kind}: {plain}")
    if device and device != present:
        raise ValueError(f"--device {device}: this process has {present}: leave it out, or choose that")
    return accelerator


def check_processes(batch_size: int, accelerator: Accelerator) -> None:
    """Raises ValueError where a batch cannot be shared evenly: InfoNCE would weigh clips unequally."""
    n = accelerator.num_processes
    if batch_size % n:
        raise ValueError(f"--batch_size {batch_size}: wanted a multiple of the {n} processes")


def precision_of(config, device: torch.device) -> str:
    """bf16 on a GPU and fp32 on a CPU, where --precision does not say."""
    return config.precision or ("bf16" if device.type == "cuda" else "fp32")


def autocast(x: Tensor, precision: str) -> torch.autocast:
    """Matrix products in bf16, or all in fp32, on the device of x."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16")


def compile_blocks(blocks: Iterable[nn.Module], dit: nn.Module | None = None) -> None:
    """Have torch.compile see to blocks, and to those of a DiT of diffusers, at their first call. Raises
    ValueError where this machine cannot compile."""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device_type()))
    except Exception as error:  # no compiler, no triton, no headers of Python
        fault, advice = str(error).split("\n")[0], "install a C++ compiler (for a GPU triton, too)"
        raise ValueError(f"--compile: {fault}: {advice}, or leave the option out") from error
    for block in blocks:
        block.compile()
    if dit is not None:
        dit.compile_repeated_blocks()


def adamw_onecycle(
    groups: Sequence[tuple[Iterable[nn.Parameter], float]], optimizer: str, weight_decay: float, total: int
) -> tuple[Optimizer, LRScheduler]:
    """AdamW with OneCycle over `total` steps (§4.1); groups: parameters, each with its highest rate.

    adamw8bit is that of bitsandbytes: 8-bit moments of the first group (Dettmers et al. 2022)."""
    params = [{"params": [*parameters], "lr": lr} for parameters, lr in groups]
    if optimizer == "adamw":
        adamw = torch.optim.AdamW(params, weight_decay=weight_decay, fused=True)
    else:
        try:
            from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
        except ImportError as error:
            advice = "pip install bitsandbytes, or choose --optimizer adamw"
            raise ValueError(f"--optimizer adamw8bit: no bitsandbytes ({error}): {advice}") from error
        manager = GlobalOptimManager.get_instance()
        in_32_bits = [p for group in params[1:] for p in group["params"]]
        manager.override_config(in_32_bits, "optim_bits", 32)
        manager.register_parameters(params)
        adamw = AdamW8bit(params, weight_decay=weight_decay, min_8bit_size=SMALL)
    return adamw, OneCycleLR(adamw, [lr for _, lr in groups], total_steps=total)


def average(gradients: Sequence[Tensor]) -> None:
    """The mean over the processes, in place, in messages of many gradients: one each were hundreds a step."""
    messages: dict[tuple, list[Tensor]] = {}
    sizes: Counter = Counter()  # numbers of each dtype so far
    for g in gradients:
        sizes[g.dtype] += g.numel()
        messages.setdefault((g.dtype, sizes[g.dtype] // MESSAGE), []).append(g)
    for message in messages.values():
        flat = torch.cat([g.flatten() for g in message]) / dist.get_world_size()
        dist.all_reduce(flat)
        for g, mean in zip(message, flat.split([g.numel() for g in message]), strict=True):
            g.copy_(mean.view_as(g))


def update(optimiser: Optimizer, schedule: LRScheduler, max_norm: float) -> dict[str, float]:
    """The mean gradient over the processes, clipped, moves the weights. Returns its norm and the rate. Raises
    ValueError where it is not finite: nothing of that step is saved."""
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if dist.is_initialized():
        average([p.grad for p in parameters])
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if not norm < float("inf"):  # nor NaN
        advice = "the last checkpoint is whole; train anew with a lower --lr and another --run NAME"
        fault = f"step {schedule.last_epoch}: the gradient's norm is {norm}, training diverged"
        raise ValueError(f"{fault}: {advice}")
    optimiser.step()
    optimiser.zero_grad()
    schedule.step()
    return {"norm": norm, "lr": schedule.get_last_lr()[0]}

"""What a step of both training scripts shares: its optimiser, its parts, its gradients over the processes."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from support.experiment import diverged

MESSAGE = 1 << 26  # numbers in a message between processes: 256 MB
SMALL = 4096  # a parameter of fewer numbers keeps 32-bit moments
OPTIMIZERS = ("adamw", "adamw8bit")
# what may change while a run goes on, in both stages
MAY_CHANGE = ("checkpointing", "micro_batch", "compile", "attention_kernel", "save_every", "log_every")
KERNELS = ("auto", "flash", "cudnn", "efficient", "math")  # of attention, on CUDA


def parts(n: int, size: int | None) -> list[slice]:
    """n clips, `size` at a time (None: all at once)."""
    return [slice(start, start + (size or n)) for start in range(0, n, size or n)]


def recomputed(call: Callable, on: bool) -> Callable:
    """`call`, or where `on` one that keeps no activations: the backward pass makes it once more."""
    return partial(checkpoint, call, use_reentrant=False) if on else call


def compile_blocks(on: bool, blocks: Iterable[nn.Module], dit: nn.Module | None = None) -> None:
    """Have torch.compile see to blocks, and to those of a DiT of diffusers, at their first call."""
    for block in blocks if on else ():
        block.compile()
    if on and dit is not None:
        dit.compile_repeated_blocks()


def choose_attention(kernel: str, accelerator: Accelerator, head: int) -> None:
    """Have torch's attention run one of KERNELS alone, or with auto the one it takes for the fastest. Prints
    which one that is for heads of a width."""
    cuda = torch.backends.cuda
    switches = cuda.enable_flash_sdp, cuda.enable_cudnn_sdp, cuda.enable_mem_efficient_sdp
    for name, switch in zip(KERNELS[1:], (*switches, cuda.enable_math_sdp), strict=True):
        switch(kernel in ("auto", name))
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    q = torch.empty(1, 1, 1024, head, device=accelerator.device, dtype=dtype)
    accelerator.print(f"attention: {SDPBackend(torch._fused_sdp_choice(q, q, q)).name}")


def adamw(name: str, groups: list[dict], weight_decay: float, in_8_bit: int) -> Optimizer:
    """AdamW, or with adamw8bit that of bitsandbytes, which keeps the moments of the first `in_8_bit` groups
    in 8 bits (Dettmers et al. 2022). Raises ValueError where that package is not there."""
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
    except ImportError as error:
        mend = "pip install bitsandbytes, or choose --optimizer adamw"
        raise ValueError(f"--optimizer {name}: bitsandbytes is not there ({error}): {mend}") from error
    manager = GlobalOptimManager.get_instance()
    others = [p for group in groups[in_8_bit:] for p in group["params"]]
    manager.override_config(others, "optim_bits", 32)
    manager.register_parameters(groups)
    return AdamW8bit(groups, weight_decay=weight_decay, min_8bit_size=SMALL)


def average(gradients: Sequence[Tensor]) -> None:
    """The mean over the processes, in place, in messages of many gradients: one each were hundreds a step."""
    for dtype in dict.fromkeys(g.dtype for g in gradients):
        messages, size = [[]], 0
        for g in (g for g in gradients if g.dtype == dtype):
            if messages[-1] and size + g.numel() > MESSAGE:
                messages.append([])
                size = 0
            messages[-1].append(g)
            size += g.numel()
        for some in messages:
            flat = torch.cat([g.flatten() for g in some]) / dist.get_world_size()
            dist.all_reduce(flat)
            for g, mean in zip(some, flat.split([g.numel() for g in some]), strict=True):
                g.copy_(mean.view_as(g))


def update(
    accelerator: Accelerator, optimiser: Optimizer, schedule, max_norm: float,
    step: int, names: Sequence[str],
) -> float:  # fmt: skip
    """The mean gradient over the processes, clipped, moves the weights. Returns its norm. Raises ValueError
    where it is not finite; `names` are the clips of the step."""
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if accelerator.num_processes > 1:
        average([p.grad for p in parameters])
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if not norm < float("inf"):  # nor NaN
        raise diverged(step, norm, names)
    optimiser.step()
    optimiser.zero_grad()
    schedule.step()
    return norm


def logged(accelerator: Accelerator, row: dict[str, Tensor]) -> dict[str, float]:
    """The means over the processes."""
    means = accelerator.reduce(torch.stack([*row.values()]).detach(), "mean").tolist()
    return dict(zip(row, means, strict=True))

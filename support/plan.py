"""What a training step needs, counted before anything is loaded (`--plan` of the training scripts).

The step itself runs on fake tensors, which have a shape and no values. `count` adds up the operations of its
matrix products, convolutions and attention, recomputed ones too, and the bytes of the tensors that live at
once: parameters, gradients, moments, activations. What a GPU takes beside them (its context, the gaps between
tensors) is not counted, as nothing is measured.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from support.training import SMALL

GIB, GB, TERA = 1 << 30, 10**9, 10**12
# dense bf16 TFLOP/s with fp32 sums, of NVIDIA's data sheets (H100, H200 SXM: halved, since they say "with
# sparsity"; Ada and GA102 whitepapers), and GiB of memory; the first name that a card's name has counts
CARDS = {
    "H200": (989, 141), "H100": (989, 80), "A100": (312, 80),
    "L40S": (362, 48), "4090": (165, 24), "3090": (71, 24),
}  # fmt: skip


def bf16() -> AbstractContextManager:
    """The autocast of the count: its fake tensors live on the CPU."""
    return torch.autocast("cpu", torch.bfloat16)


class Count(NamedTuple):
    peak: int  # bytes
    flop: int  # of a step
    trained: int  # bytes of the trained parameters
    state: int  # bytes of what is needed to go on: trained parameters and moments


class Counter(TorchDispatchMode):
    """Adds up operations and bytes of what runs below it."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.flop, self._live = 0, 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # a question about values: no, or 0
            return False if args[0].dtype == torch.bool else 0
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tree_map_only(Tensor, self._see, out)
        if operations := FLOP.get(function.overloadpacket):
            self.flop += operations(*args, **kwargs, out_val=out)
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512  # as the allocator of a GPU rounds
        if key not in self._live:
            self._live[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._live[key]
        self.now -= size


def _attention(count: Callable) -> Callable:
    """Of the CPU's attention, which the registry lacks: `count` of the shapes of (∂out,) q, k, v."""
    n = 3 if count is sdpa_flop_count else 4
    return lambda *args, out_val, **kwargs: count(*(x.shape for x in args[:n]))


_aten = torch.ops.aten
FLOP = flop_registry | {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention(sdpa_flop_count),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention(sdpa_backward_flop_count),
}


class Repeated:
    """A call of a step that is made many times: the first one runs, the others cost what it did."""

    def __init__(self, call: Callable, stand_in: Callable, counter: Counter):
        self.call, self.stand_in, self.counter, self.starts = call, stand_in, counter, []

    def __call__(self, *inputs):
        self.starts.append(self.counter.flop)
        return self.call(*inputs) if len(self.starts) == 1 else self.stand_in(*inputs)

    def finish(self) -> None:
        """Add what did not run: the second start lies behind the first call and its backward pass."""
        if len(self.starts) > 1:
            self.counter.flop += (len(self.starts) - 1) * (self.starts[1] - self.starts[0])


def moments(parameters: Sequence[Tensor], in_8_bit: bool) -> list[Tensor]:
    """What AdamW keeps: two numbers a parameter, of 4 bytes; or of 1, and of 4 a scale for each 256."""
    small = [p for p in parameters if not in_8_bit or p.numel() < SMALL]
    large = [p for p in parameters if in_8_bit and p.numel() >= SMALL]
    kept = [torch.empty(2, p.numel()) for p in small]
    kept += [torch.empty(2, p.numel(), dtype=torch.uint8) for p in large]
    return kept + [torch.empty(2, -(-p.numel() // 256)) for p in large]


def count(
    step: Callable[[Counter], None],
    trained: Sequence[tuple[list[nn.Module], bool]],
    others: Sequence[nn.Module] = (),
) -> Count:
    """Count a step that trains modules built on the device "meta". trained: by group, each with whether its
    moments have 8 bits; others: what lies beside them. The step makes its own inputs."""
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # an RMSNorm under autocast
    with FakeTensorMode(), Counter() as counter:
        groups = []
        for modules, in_8_bit in trained:
            for module in modules:
                _fake(module)
            parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
            groups.append((parameters, in_8_bit))
        for module in others:
            _fake(module)
        weights = sum(p.nbytes for parameters, _ in groups for p in parameters)
        kept = [x for group in groups for x in moments(*group)]
        counter.peak, counter.flop = counter.now, 0
        step(counter)
    return Count(counter.peak, counter.flop, weights, weights + sum(x.nbytes for x in kept))


def _fake(module: nn.Module) -> None:
    """Tensors of a module on "meta" -> fake ones, which take memory."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = torch.empty(x.shape, dtype=x.dtype)


def pipeline(name: str, published: dict[str, dict]):
    """The diffusers pipeline `name` of a folder, or of the Hub's cache, with a DiT and a VAE of its shapes
    and no text encoder; `published` has the configs of what is not downloaded."""
    import diffusers

    if name in published:
        configs = published[name]
        kind = configs["_class_name"]
    else:
        local = {"local_files_only": True}
        kind = diffusers.DiffusionPipeline.load_config(name, **local)["_class_name"]
        load = {part: diffusers.AutoModel.load_config for part in ("transformer", "vae")}
        load["scheduler"] = diffusers.DDIMScheduler.load_config  # of any scheduler
        configs = {part: of(name, subfolder=part, **local) for part, of in load.items()}
    parts = {"tokenizer": None, "text_encoder": None}
    for part in ("transformer", "vae"):
        parts[part] = getattr(diffusers, configs[part]["_class_name"]).from_config(configs[part])
    with torch.device("cpu"):
        scheduler = configs["scheduler"]
        parts["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    for key, p in parts["transformer"].named_parameters():
        if not any(name in key for name in parts["transformer"]._keep_in_fp32_modules or ()):
            p.data = p.data.bfloat16()
    return getattr(diffusers, kind)(**parts)


# ---------------------------------------------------------------- what it means on a card


def gpu() -> tuple[str, int] | None:
    """Name and free bytes of the CUDA device at hand."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]


def refuse_what_cannot_fit(
    config, counted: Callable[[object], Count], mends: Sequence[tuple[str, object]]
) -> None:
    """Raises ValueError where the config's step needs more than the GPU at hand has free. `mends` are
    options, with values, that need less: the error names the first of them that fit, together."""
    if not gpu():
        return
    need, (name, free) = counted(config), gpu()
    if need.peak <= free:
        return
    said = f"a step needs {need.peak / GIB:.1f} GiB (counted), {name} has {free / GIB:.1f} free"
    options, less = [], need
    for option, value in mends:
        if getattr(config, option) != value:
            changed = replace(config, **{option: value})
            if (counting := counted(changed)).peak < less.peak:
                config, less = changed, counting
                options.append(f"--{option}" + ("" if value is True else f" {value}"))
        if less.peak <= free:
            raise ValueError(f"{said}; {less.peak / GIB:.1f} with {' '.join(options)}: add that")
    least = f"{less.peak / GIB:.1f} GiB with {' '.join(options)}" if options else "no option that needs less"
    raise ValueError(f"{said}: wanted another GPU ({least})")


def report(
    title: str, need: Count, steps: int, share: float, disk: dict[str, float], processes: int = 1
) -> str:
    """Memory, time and disk of a run. share: of the card's matrix rate that a step is taken to reach."""
    name, free = gpu() or ("H100", CARDS["H100"][1] * GIB)
    found = next((card for card in CARDS if card in name), None)
    where = "" if gpu() else " (no GPU is at hand: one of 80 GB)"
    lines = [f"{title}: counted, not measured, for {processes} x {name}{where}"]
    fit = "fits" if need.peak <= free else "DOES NOT FIT"
    lines.append(f"peak memory    {need.peak / GIB:8.1f} GiB a process: {fit} in {free / GIB:.1f}")
    lines.append(f"a step         {need.flop / TERA:8,.1f} TFLOP a process, recomputation included")
    if found:
        rate = CARDS[found][0]
        seconds = need.flop / TERA / rate / share
        lines.append(f"a step         {seconds:8.2f} s at {share:.0%} of {rate} TFLOP/s, dense bf16")
        lines.append(f"{steps:,} steps".ljust(15) + f"{seconds * steps / 3600:8.1f} hours")
    else:
        lines.append(f"a step         no estimate of seconds: {name} is none of {', '.join(CARDS)}")
    lines += [f"disk           {size / GB:8.1f} GB {what}" for what, size in disk.items()]
    return "\n".join(lines)

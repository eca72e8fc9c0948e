"""Operations and bytes of what runs on fake tensors, which have a shape and no values; decoders of such.

Counted are the operations of matrix products, convolutions and attention, recomputed ones too, and the bytes
of the tensors that live at once: parameters, gradients, moments, activations. What a GPU takes beside them is
not (its context, the gaps between tensors), as nothing is measured.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForTextEncoding

from support.pipelines import ADVICE, PIPELINES, WAN, WANTED, read_configs
from support.readers import reading
from support.training import SMALL

aten = torch.ops.aten
FLOP = flop_registry | {  # the registry lacks the CPU's attention, which takes its inputs in a GPU's order
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
# Wan2.1's 1.3B, which need not be downloaded: the numbers are those of "Wan-T2V-1.3B" in diffusers'
# scripts/convert_wan_to_diffusers.py
WAN_1_3B = {
    "transformer": {
        "_class_name": "WanTransformer3DModel", "num_layers": 30, "num_attention_heads": 12,
        "attention_head_dim": 128, "ffn_dim": 8960, "freq_dim": 256, "in_channels": 16, "out_channels": 16,
        "patch_size": [1, 2, 2], "text_dim": 4096, "cross_attn_norm": True, "eps": 1e-6,
        "qk_norm": "rms_norm_across_heads",
    },
    "vae": {"_class_name": "AutoencoderKLWan"},  # whose defaults in diffusers are Wan2.1's
    "scheduler": {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True,
                  "prediction_type": "flow_prediction"},
    "text_encoder": {"model_type": "umt5", "vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "d_ff": 10_240,
                     "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"},
}  # fmt: skip


class Count(NamedTuple):
    peak: int  # bytes
    flop: int  # of a step, or of a clip
    trained: int  # bytes of the trained parameters
    state: int  # bytes of what is needed to go on: trained parameters and moments


class Counter(TorchDispatchMode):
    """Adds up operations and bytes of what runs below it."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.flop = self.trained = 0
        self.moments = []
        self.live = {}  # storages

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 0  # a question about values: no, or 0
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tree_map_only(Tensor, self._see, out)
        if operations := FLOP.get(function.overloadpacket):
            self.flop += operations(*args, **kwargs, out_val=out)
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // 512) * 512  # as the allocator of a GPU rounds
        if key not in self.live:
            self.live[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self.live[key]
        self.now -= size

    def hold(self, *models: nn.Module) -> None:
        """Tensors of models on the device "meta" -> fake ones, which take memory, tied ones once; counting
        starts anew."""
        fakes = {}  # id: the tensor, which keeps its id as long, and its fake
        for module in (module for model in models for module in model.modules()):
            for tensors in (module._parameters, module._buffers):
                for name, x in tensors.items():
                    if x is not None and id(x) not in fakes:
                        fake = torch.empty(x.shape, dtype=x.dtype)
                        is_parameter = isinstance(x, nn.Parameter)
                        fakes[id(x)] = x, nn.Parameter(fake, x.requires_grad) if is_parameter else fake
                    tensors[name] = None if x is None else fakes[id(x)][1]
        self.peak, self.flop = self.now, 0

    def train(self, models: Iterable[nn.Module], in_8_bit: bool) -> None:
        """Hold what AdamW keeps: two numbers a parameter, of 4 bytes; or of 1, and a scale for each 256."""
        for p in (p for model in models for p in model.parameters() if p.requires_grad):
            self.trained += p.nbytes
            if in_8_bit and p.numel() >= SMALL:
                self.moments.append(torch.empty(2, p.numel(), dtype=torch.uint8))
                self.moments.append(torch.empty(2, -(-p.numel() // 256)))
            else:
                self.moments.append(torch.empty(2, p.numel()))

    def count(self) -> Count:
        state = self.trained + sum(x.nbytes for x in self.moments)
        return Count(self.peak, self.flop, self.trained, state)


@contextmanager
def counting() -> Iterator[Counter]:
    """Every tensor that is made below it is fake, and counted. A scheduler's real ones count as fake, too."""
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # an RMSNorm under autocast
    with FakeTensorMode(allow_non_fake_inputs=True), Counter() as counter:
        yield counter


class Repeated:
    """A call of a step that is made many times: the first one runs, the others cost what it did."""

    def __init__(self, call: Callable, stand_in: Callable, counter: Counter):
        self.call, self.stand_in, self.counter = call, stand_in, counter
        self.starts = []

    def __call__(self, *inputs):
        self.starts.append(self.counter.flop)
        return self.call(*inputs) if len(self.starts) == 1 else self.stand_in(*inputs)

    def finish(self) -> None:
        """Add what did not run: the second start lies behind the first call and its backward pass."""
        if len(self.starts) > 1:
            self.counter.flop += (len(self.starts) - 1) * (self.starts[1] - self.starts[0])


def fake_pipeline(name: str, text_encoder: bool = False) -> tuple[diffusers.DiffusionPipeline, int]:
    """The pipeline of a folder or of the Hub's cache, on "meta", in a GPU's precision, and its text length L.
    Raises FileFault for a pipeline that training refuses, or that is not there."""
    parts, kind, L = {"tokenizer": None, "text_encoder": None}, "WanPipeline", 512
    advice = (
        ADVICE if Path(name).is_dir() else f"hf download {name} --include '*.json' brings what is counted"
    )
    with reading(name, WANTED, advice):
        if name != WAN:
            kind, _, L = read_configs(name, local_files_only=True)
        for part in ("transformer", "vae", "scheduler"):
            if name == WAN:
                config = WAN_1_3B[part]
            else:  # the loaders read the config of any class
                loader = diffusers.DDIMScheduler if part == "scheduler" else diffusers.AutoModel
                config = loader.load_config(name, subfolder=part, local_files_only=True)
            with torch.device("cpu" if part == "scheduler" else "meta"):
                parts[part] = getattr(diffusers, config["_class_name"]).from_config(config)
        if text_encoder:
            config = AutoConfig.for_model(**WAN_1_3B["text_encoder"])
            if name != WAN:
                config = AutoConfig.from_pretrained(name, subfolder="text_encoder", local_files_only=True)
            with torch.device("meta"):
                parts["text_encoder"] = AutoModelForTextEncoding.from_config(config, dtype=torch.bfloat16)
    in_fp32 = parts["transformer"]._keep_in_fp32_modules or ()
    for key, p in parts["transformer"].named_parameters():
        if not any(module in key for module in in_fp32):
            p.data = p.data.bfloat16()
    if kind != "WanPipeline":  # its VAE has the precision of its DiT
        parts["vae"].bfloat16()
    pipe = PIPELINES[kind](**parts)
    pipe.register_to_config(_name_or_path=name)  # as errors name it
    return pipe, L

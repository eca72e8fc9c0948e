"""The true shapes of each line of the method, for extras/reading.py.

The code runs on meta tensors, which have a shape and no numbers, at the sizes of the toy and of the paper.

A tracer looks at the first call of each function of the files that are read: at its arguments, at what each
statement assigns, and at what it returns.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from unittest.mock import patch

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_stage1
import train_stage2
from brain_model import BrainModel
from heads import Stage1Heads, stage1_loss
from mixture_of_memories import DirectProjection, MemoryPool, MixtureOfMemories, TopTextMemory
from prepare import facts
from prepare.fmri import select_voxels
from support.readers import read_json
from toy import subject, world
from toy.release import ToyRelease
from video_decoder import VideoDecoder

ROOT = Path(__file__).parents[1]
WAN = {  # the DiT of Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json
    "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 4096,
    "in_channels": 16, "out_channels": 16, "freq_dim": 256, "patch_size": [1, 2, 2],
}  # fmt: skip
OF_DATA = {  # N (None: counted), T, D, F, categories; the paper gives no N: subject 1 as NeuroClips has it
    "toy": {"voxels": None, "volumes": 1, "dim": 64, "frames": 8, "classes": 5},
    "cc2017": {"voxels": 13_447, "volumes": 1, "dim": 768, "frames": 8, "classes": 12},
}
SYMBOLS = ("B", "T", "N", "L", "D_txt")  # whole numbers that are sizes
DEPTH = 1  # layers of Brain Model and DiT that run: more would change no shape


class Recorded(ToyRelease):
    """The recordings of the toy's training segments, without a file: enough to select its voxels."""

    def __init__(self):
        self.splits = {"train": [f"seg{s + 1}" for s in range(world.TRAIN_SEGMENTS)]}
        self.clips, self.delay, self.runs = dict.fromkeys(self.splits["train"], world.TRAIN_CLIPS), 2, {}
        films = world.film("train", 0) + world.film("test", 0)
        response = subject.responses(films, np.load(subject.VOXELS)["roi"], 0)  # (clips, voxels)
        for s, segment in enumerate(self.splits["train"]):
            shown = response[s * world.TRAIN_CLIPS :][: world.TRAIN_CLIPS]
            self.runs[segment] = [*subject.recordings(shown, world.TRAIN_REPEATS, [0, False, s])]

    def load_run(self, segment: str, repeat: int) -> np.ndarray:
        return self.runs[segment][repeat]


@cache
def toy_voxels() -> int:
    """N of the toy: how many voxels its preparation keeps."""
    return int(select_voxels(Recorded()).mask.sum())


def settings(data: str) -> dict[str, object]:
    """The sizes of a dataset's presets, under the names of the paper's symbols."""
    one, two = train_stage1.parse(["--data", data]), train_stage2.parse(["--data", data])
    of_data, clips = OF_DATA[data], facts.SIZES[data]["train"]
    return {
        "one": one, "two": two, "data": of_data, "B1": one.batch_size, "B2": two.batch_size,
        "T": of_data["volumes"], "N": of_data["voxels"] or toy_voxels(), "F": of_data["frames"],
        "D": of_data["dim"], "classes": of_data["classes"], "L": one.tokens, "D'": one.width, "r": one.rank,
        "K": two.K, "memories": clips[0] * clips[1], "b": two.micro_batch,
        "video": (two.frames, two.height, two.width),
    }  # fmt: skip


# ---------------------------------------------------------------- the tracer


@dataclass
class Statement:
    end: int  # its last line, or that of its header
    names: tuple[str, ...] = ()
    returns: bool = False
    is_with: bool = False


@dataclass
class Shapes:
    """What was seen: (file, line) -> {name: shape}."""

    files: dict[str, str]  # path -> name of the module
    seen: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    called: set[CodeType] = field(default_factory=set)
    statements: dict[str, dict[int, Statement]] = field(default_factory=dict)

    def __post_init__(self):
        for path in self.files:
            self.statements[path] = statements(ast.parse(Path(path).read_text()))

    def note(self, path: str, line: int, name: str, value: object) -> None:
        for label, shape in described(name, value):
            self.seen.setdefault((self.files[path], line), {}).setdefault(label, shape)

    def call(self, frame: FrameType, event: str, arg: object):
        """The global trace function of `sys.settrace`."""
        code, path = frame.f_code, frame.f_code.co_filename
        if path not in self.files or code in self.called or code.co_name.startswith("<"):
            return None
        self.called.add(code)
        of_file, names = self.statements[path], code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        header = of_file.get(code.co_firstlineno)
        for name in names:
            if isinstance(frame.f_locals[name], Tensor):
                self.note(path, header.end, name, frame.f_locals[name])
        at: list[Statement | None] = [None]

        def line(frame: FrameType, event: str, arg: object):
            for name in at[0].names if at[0] else ():
                if name in frame.f_locals:
                    self.note(path, at[0].end, name, frame.f_locals[name])
            if event == "return" and at[0] and at[0].returns:
                self.note(path, at[0].end, "returns", arg)
            to = of_file.get(frame.f_lineno) if event == "line" else None
            leaves = to and to.is_with and at[0] and at[0].returns  # a `return` passes the head of its `with`
            at[0] = at[0] if leaves else to
            return line

        return line

    @contextmanager
    def tracing(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self.call)
        try:
            yield
        finally:
            sys.settrace(before)


def statements(tree: ast.Module) -> dict[int, Statement]:
    """Line -> the statement that it belongs to; of a compound statement its header alone."""
    found: dict[int, Statement] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt):
            continue
        body = getattr(node, "body", None)
        end = body[0].lineno - 1 if body else node.end_lineno
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        inside = [part for target in targets if target for part in ast.walk(target)]
        names = [part.id for part in inside if isinstance(part, ast.Name) and part.id != "_"]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        for number in range(first, max(end, node.lineno) + 1):
            found[number] = Statement(
                max(end, node.lineno), tuple(names), isinstance(node, ast.Return), isinstance(node, ast.With)
            )
    return found


def described(name: str, value: object) -> Iterator[tuple[str, str]]:
    """(name, shape) of a tensor, of each tensor of a tuple or list, of a size such as B."""
    if isinstance(value, Tensor):
        yield name, str(tuple(value.shape)) if value.dim() else "scalar"
    elif isinstance(value, int) and not isinstance(value, bool) and name in SYMBOLS:
        yield name, str(value)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for part, x in zip(value._fields, value, strict=True):
            if isinstance(x, Tensor):
                yield from described(f"{name}.{part}", x)
    elif isinstance(value, tuple | list) and value and all(isinstance(x, Tensor) for x in value):
        yield name, " ".join(next(described(name, x))[1] for x in value)


# ---------------------------------------------------------------- what runs


class Unknown(TorchDispatchMode):
    """A meta tensor has no value: whatever asks for one, a check of the input, hears 0 or False."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0
        return func(*args, **(kwargs or {}))


def decoder_of(data: str, rank: int, alpha: float, L: int) -> VideoDecoder:
    """The video decoder without weights."""
    if data == "toy":
        dit, vae = (read_json(ROOT / "toy" / "wan" / part / "config.json") for part in ("transformer", "vae"))
    else:
        dit, vae = WAN, {}  # AutoencoderKLWan's defaults are Wan2.1's
    shallow = {**dit, "num_layers": DEPTH}
    transformer, vae = WanTransformer3DModel.from_config(shallow), AutoencoderKLWan.from_config(vae)
    how = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    with torch.device("cpu"):  # it has numbers
        scheduler = UniPCMultistepScheduler(**how)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
    )
    return VideoDecoder(pipe, L, lora_rank=rank, lora_alpha=alpha)


def run(data: str, shapes: Shapes) -> dict[str, object]:
    """One step of stage 1 and one of stage 2, at a dataset's sizes, traced. Returns the sizes."""
    s = settings(data)
    one, two, L, D, N = s["one"], s["two"], s["L"], s["D"], s["memories"]
    meta = torch.device("meta")
    no_autocast = patch.object(torch, "autocast", lambda *args, **options: nullcontext())  # meta has none
    with meta, Unknown(), no_autocast:
        brain_model = BrainModel(
            s["N"], s["T"], L, s["D'"], DEPTH, one.attention_heads, D, s["r"], one.dropout
        ).train()
        heads = Stage1Heads(D, s["F"], s["classes"])
        decoder = decoder_of(data, two.lora_rank, two.lora_alpha, L)
        D_txt = decoder.text_width
        mom = MixtureOfMemories(L, s["D'"], D, D_txt, s["K"], two.attention_heads, two.alpha, one.tau)
        fields = {"e": torch.empty(N, 3, D), "text_tokens": torch.empty(10 * N, D_txt)}
        fields |= {"text_offsets": torch.zeros(N + 1, dtype=torch.int64), "mean_frame": torch.empty(N, D)}
        for name in MemoryPool.__dataclass_fields__.keys() - fields.keys() - {"near_copy", "scene"}:
            fields[name] = torch.zeros(N, dtype=torch.int64)
        with patch.object(MemoryPool, "__post_init__", lambda pool: None):  # it looks at values
            pool = MemoryPool(**fields)

        def batch(B: int) -> tuple[Tensor, dict[str, Tensor]]:
            targets = {"e_img": torch.empty(B, s["F"], D), "categories": torch.empty(B, s["classes"])}
            targets |= {"e_txt": torch.empty(B, D), "e_act": torch.empty(B, D)}
            return torch.empty(B, s["T"], s["N"]), targets

        x, targets = batch(s["B1"])
        with shapes.tracing():
            f_c, f_e = brain_model(x)
            stage1_loss(heads, f_c, **targets)

        x, targets = batch(s["B2"])
        memory = torch.zeros(len(x), dtype=torch.int64)
        y = torch.empty(len(x), *decoder.latent_shape(*s["video"]))
        empty = torch.empty(L, D_txt)
        untold = [torch.zeros(len(x), dtype=torch.bool)] * (hasattr(pool, "same_caption"))
        with shapes.tracing():
            excluded = pool.excluded(memory, *untold)
        parts = train_stage2.Parts(brain_model, heads.requires_grad_(False), mom, decoder, pool, empty)
        known = {
            "parts": parts, "x": x, "y": y, "targets": targets, "clips": np.arange(len(x)), "memory": memory,
            "excluded": excluded, "weights": {"tau": one.tau}, "seed": 0, "step": 0, "micro_batch": s["b"],
            "dropout": two.condition_dropout, "autocast": nullcontext, "mean_clips": float(len(x)),
        }  # fmt: skip
        wanted = inspect.signature(train_stage2.losses_and_gradients).parameters
    with Unknown(), no_autocast, shapes.tracing():
        train_stage2.losses_and_gradients(**{name: known[name] for name in wanted})
        f_c, f_e = brain_model(x)
        for without in (TopTextMemory(L, s["K"]), DirectProjection(s["D'"], D_txt).to(meta)):
            without(f_e, heads.queries(f_c), pool)
    return s | {"latents": tuple(y.shape[1:]), "D_txt": D_txt}


def traced(data: str, files: list[Path]) -> tuple[dict[tuple[str, int], dict[str, str]], dict[str, object]]:
    """(module, line) -> {name: shape} of the files, at a dataset's sizes; and these sizes."""
    shapes = Shapes({str(file): file.stem for file in files})
    return shapes.seen, run(data, shapes)

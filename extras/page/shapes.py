"""The shapes of each line of the method, at the sizes of the toy and of the paper.

A step of both stages runs. Its batches are zeros, its models meta tensors: they have a shape and no numbers.
A tracer sees of the first call of each function its arguments, what each statement assigns, what it returns.
"""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_stage1
import train_stage2
from data import Clips, memories
from evaluate import CineNeuron
from extras import plan
from heads import ImageAggregator
from mixture_of_memories import DirectProjection, MemoryPool, TopTextMemory
from prepare import facts
from support.options import settings_of
from support.pipelines import latent_shape

ROOT = Path(__file__).parents[2]
TOY_SIZES = dict(volumes=1, voxels=1300, frames=8, embed_dim=64, classes=5)  # as prepared, subject 1
DATA = {"toy": TOY_SIZES, "cc2017": plan.PUBLISHED["cc2017"]}
SIZES = ("B", "T", "N", "L", "D_txt")  # variables that hold a size
CPU, META = torch.device("cpu"), torch.device("meta")
LAYERS = 1  # of Brain Model and DiT: more would change no shape


# ---------------------------------------------------------------- the tracer


@dataclass
class Statement:
    """A statement, or the header of a compound one."""

    last_line: int
    names: list[str]  # what it assigns, or the arguments of a function
    returns: bool


class Tracer:
    """shapes: (module, line) -> {name: shape} of what ran in these files while `tracing`."""

    def __init__(self, files: list[Path]):
        self.shapes: dict[tuple[str, int], dict[str, str]] = {}
        self.statements = {str(file): statements(file) for file in files}
        self.called: set[CodeType] = set()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: object):
        """What `sys.settrace` calls for each function; returns what it is to call for each line of it."""
        code, file = frame.f_code, frame.f_code.co_filename
        if file not in self.statements or code in self.called or code.co_name.startswith("<"):
            return None
        self.called.add(code)
        module, by_line = Path(file).stem, self.statements[file]
        statement, returned = by_line[code.co_firstlineno], None

        def step(frame: FrameType, event: str, arg: object):
            nonlocal statement, returned
            following = by_line.get(frame.f_lineno) if event == "line" else None
            if following and following is statement:  # it has several lines
                return step
            for name in statement.names if statement else ():
                if name in frame.f_locals:
                    self._add(module, statement, shapes_of(name, frame.f_locals[name]))
            statement = following
            if following and following.returns:
                returned = following
            if event == "return" and returned:
                self._add(module, returned, shapes_of("returns", arg))
            return step

        return step

    def _add(self, module: str, statement: Statement, shapes: dict[str, str]) -> None:
        for name, shape in shapes.items():
            self.shapes.setdefault((module, statement.last_line), {}).setdefault(name, shape)


def statements(file: Path) -> dict[int, Statement]:
    """Line -> the statement that it belongs to."""
    by_line: dict[int, Statement] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.stmt):
            continue
        body = getattr(node, "body", None)
        last = max(node.lineno, body[0].lineno - 1 if body else node.end_lineno)
        names = [argument.arg for argument in node.args.args] if isinstance(node, ast.FunctionDef) else []
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            for part in ast.walk(target) if target else ():
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    names.append(part.id)
        statement = Statement(last, names, isinstance(node, ast.Return))
        by_line |= dict.fromkeys(range(first_line(node), last + 1), statement)
    return by_line


def first_line(node: ast.stmt) -> int:
    """Of a statement with its decorators."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def shapes_of(name: str, value: object) -> dict[str, str]:
    """Of a tensor, of a few in a tuple, of the fields that a function returns; of a size its number."""
    if isinstance(value, Tensor | np.ndarray):
        return {name: str(tuple(value.shape)) if value.ndim else "scalar"}
    if type(value) is int and name in SIZES:
        return {name: str(value)}
    if name == "returns" and hasattr(value, "_asdict"):
        fields = {f".{field}": x for field, x in value._asdict().items() if x is not None}
        return {field: shapes_of(field, x)[field] for field, x in fields.items()}
    if isinstance(value, tuple | list) and 0 < len(value) <= 4 and all(isinstance(x, Tensor) for x in value):
        return {name: " ".join(shapes_of("", x)[""] for x in value)}
    return {}


# ---------------------------------------------------------------- what runs


class NoNumbers(TorchDispatchMode):
    """A meta tensor has no value: whatever asks for one gets 0 or False."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=CPU)
        return func(*args, **kwargs)


class EmptyClips(Clips):
    """The training clips of a dataset, all numbers 0, without a file."""

    def __init__(self, n: int, sizes: dict[str, int], batch_size: int, voxel_dropout: float):
        T, N, F, D = (sizes[name] for name in ("volumes", "voxels", "frames", "embed_dim"))
        self.lines, self.roi, self.voxels = [{}] * n, np.empty(N, str), slice(None)
        self.fmri, self.recorded = zeros(n, 1, T, N), np.ones((n, 1), bool)
        self.e_img, self.e_txt, self.e_act = zeros(n, F, D), zeros(n, D), zeros(n, D)
        self.categories, self.latents = zeros(n, sizes["classes"]), None
        self.seed, self.batch_size = 0, batch_size
        self.voxel_dropout, self.condition_dropout = voxel_dropout, 0.0
        nothing = np.zeros((batch_size, n), bool)
        self.trained, self.text_file = np.arange(n), None
        self.recall = SimpleNamespace(p_hidden=0, excluded=lambda *clips: nothing)


def zeros(*shape: int) -> np.ndarray:
    """Zeros that take no memory."""
    return np.broadcast_to(np.float32(0), shape)


def run(data: str, tracer: Tracer) -> list[tuple[str, str, str]]:
    """A step of both stages at the sizes of a dataset, traced. Returns (symbol, meaning, size) of each."""
    sizes, (segments, clips) = DATA[data], facts.SIZES[data]["train"]
    one, two = train_stage1.parse(["--data", data]), train_stage2.parse(["--data", data])
    one.layers, one.checkpointing, one.precision, two.precision = LAYERS, False, "fp32", "fp32"
    two.checkpointing = False
    n, D, L = segments * clips, sizes["embed_dim"], one.tokens
    no_autocast = patch.object(torch, "autocast", lambda *args, **options: nullcontext())  # meta has none

    # ---- stage 1
    train = EmptyClips(n, sizes, one.batch_size, one.dropout)
    with META:
        brain_model, heads = train_stage1.build(one, sizes)
    with no_autocast, NoNumbers(), tracer.tracing():
        train_stage1.train_step(brain_model, heads, train.batch(0).to(META), one)

    # ---- stage 2
    two.decoder = str(ROOT / two.decoder) if data == "toy" else two.decoder
    brain = {"voxels": sizes["voxels"], "tokens": L, "width": one.width, "layers": LAYERS, "embed_dim": D}
    with patch.dict(plan.WAN_1_3B["transformer"], num_layers=LAYERS):
        fake = plan.fake_model(settings_of(two), brain, sizes, n)
    decoder, D_txt = fake.decoder.float(), fake.decoder.text_width
    train = EmptyClips(n, sizes, two.batch_size, one.dropout)
    train.latents = zeros(n, *latent_shape(decoder, two.frames, two.height, two.width))
    train.texts = zeros(n, 1, D_txt)  # captions of one token
    settings = vars(two) | {"stage1_config": vars(one)}
    with no_autocast, NoNumbers(), tracer.tracing():
        e, captions = memories(train, ImageAggregator(sizes["frames"]))
        pool = MemoryPool(e, captions).to(META)
        model = CineNeuron(settings, brain_model, heads, fake.mom, pool, decoder, fake.empty, train.lines, {})
        batch = train.batch(0).to(META)
        train_stage2.train_step(model, batch, two)
        f_c, f_e = brain_model(batch.x)
        for ablation in (TopTextMemory(L, two.K), DirectProjection(one.width, D_txt).to(META)):
            ablation(f_e, heads.queries(f_c), pool)
    return [
        ("B", "clips of a step, in stage 1 and in stage 2", f"{one.batch_size}, {two.batch_size}"),
        ("b", "clips in the video decoder at once", f"{two.micro_batch}"),
        ("T", "fMRI volumes of a clip", f"{sizes['volumes']}"),
        ("N", "voxels; of a pool: memories", f"{sizes['voxels']:,}; {n:,}"),
        ("L", "tokens of f_e, and of the decoder's text", f"{L}"),
        ("D'", "width of the Brain Model", f"{one.width}"),
        ("r", "numbers a token keeps of each volume (ours)", f"{one.rank}"),
        ("D", "width of CLIP and ViCLIP", f"{D}"),
        ("F", "frames that CLIP sees of a clip", f"{sizes['frames']}"),
        ("K", "memories retrieved", f"{two.K}"),
        ("D_{txt}", "width of the decoder's text tokens", f"{D_txt}"),
        ("y", "latents of a video: channels, frames, rows, columns", f"{train.latents.shape[1:]}"),
        ("classes", "categories of objects", f"{sizes['classes']}"),
    ]


def traced(data: str, files: list[Path]) -> tuple[dict[tuple[str, int], dict[str, str]], list]:
    """(module, line) -> {name: shape} of the files, at the sizes of a dataset; and the rows of `run`."""
    tracer = Tracer(files)
    rows = run(data, tracer)
    return tracer.shapes, rows

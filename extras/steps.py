"""A step of each stage on tensors without values: what `--plan` of the training scripts counts and prints,
and what they refuse on a GPU that is too small. The scripts' own `losses_and_gradients` is what runs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from brain_model import BrainModel
from data import ClipDataset
from heads import Stage1Heads
from mixture_of_memories import MemoryPool, make_mom
from prepare.facts import PUBLISHED, SIZES, WAN_1_3B
from support import plan
from support.files import MissingData
from support.readers import read_json

# options that need less, in the order in which to try them
LESS_MEMORY_1 = [("checkpointing", True), ("micro_batch", 8), ("optimizer", "adamw8bit")]
LESS_MEMORY_2 = [("checkpointing", True), ("micro_batch", 1), ("optimizer", "adamw8bit")]
SHARE_1, SHARE_2 = 0.45, 0.40  # of a card's matrix rate that a step is taken to reach


def clips_of_a_process(config, processes: int | None) -> int:
    """The most clips of a step that one process has; None: of as many processes as run now."""
    return -(-config.batch_size // (processes or PartialState().num_processes))


def inputs(B: int, sizes: dict[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """x (B, T, N) and the targets of Eq. 3."""
    D, shapes = sizes["embed_dim"], {"e_img": (sizes["frames"], sizes["embed_dim"])}
    shapes |= {"e_txt": (D,), "e_act": (D,), "categories": (sizes["classes"],)}
    targets = {name: torch.empty(B, *shape) for name, shape in shapes.items()}
    return torch.empty(B, sizes["volumes"], sizes["voxels"]), targets


def stage1(
    config, sizes: dict[str, int], build: Callable, gradients: Callable, processes: int | None = None
) -> plan.Count:
    """A step of train_stage1.py in one of the processes. sizes: of ClipDataset."""
    with torch.device("meta"):
        model, heads = build(config, sizes)

    clips = clips_of_a_process(config, processes)
    few = min(clips, 3 * (config.micro_batch or clips))  # parts beyond the third are as the third

    def step(counter: plan.Counter) -> None:
        gradients(model, heads, *inputs(few, sizes), {}, config.micro_batch, plan.bf16)

    need = plan.count(step, [([model, heads], config.optimizer == "adamw8bit")])
    return need._replace(flop=need.flop * clips // few)


def stage2(
    config,
    sizes: dict[str, int],
    brain: dict,
    Parts: Callable,
    gradients: Callable,
    processes: int | None = None,
) -> plan.Count:
    """A step of train_stage2.py in one of the processes. brain: the options of its Brain Model."""
    from video_decoder import WAN, VideoDecoder  # stage 1 has no need of diffusers

    with torch.device("meta"):
        brain_model = BrainModel(**brain)
        brain_model.gradient_checkpointing = config.checkpointing
        (_, L, width), D = brain_model.position.shape, brain_model.to_f_c.out_features
        heads = Stage1Heads(D, sizes["frames"], sizes["classes"]).requires_grad_(False).eval()
        pipe = plan.pipeline(config.decoder, {WAN: WAN_1_3B})
        decoder = VideoDecoder(pipe, L - 1, None, config.lora_rank, config.lora_alpha, config.checkpointing)
        mom = make_mom(config, L - 1, width, D, decoder.text_width, 0.07, 1.0)
    latents = decoder.latent_shape(config.frames, config.height, config.width)

    def step(counter: plan.Counter) -> None:
        B, N, D_txt = (
            clips_of_a_process(config, processes),
            int(np.prod(SIZES[config.data]["train"])),
            decoder.text_width,
        )
        for p in filter(lambda p: p.requires_grad, decoder.parameters()):
            p.grad = torch.empty_like(p)  # as from the second part on
        pool = object.__new__(MemoryPool)  # unchecked; its text, which stays on the CPU, takes no memory here
        number, text = torch.empty(N + 1, dtype=torch.long), torch.empty(1, D_txt).expand(N, -1)
        vars(pool).update(
            e=torch.empty(N, 3, D), text_tokens=text, text_offsets=number, mean_frame=torch.empty(N, D)
        )
        vars(pool).update(dict.fromkeys(("caption", "segment", "position"), number[1:]))
        once = plan.Repeated(decoder, lambda y, f, *_: f.float().mean((1, 2)), counter)
        parts = Parts(brain_model, heads, mom, once, pool, torch.empty(L - 1, D_txt))
        x, targets = inputs(B, sizes)
        y, memory = torch.empty(1, *latents).expand(B, *latents), torch.zeros(B, dtype=torch.long)
        excluded = torch.zeros(B, N, dtype=torch.bool)
        how = excluded, {}, 0, 0, config.micro_batch, config.condition_dropout, plan.bf16, B
        gradients(parts, x, y, targets, np.arange(B), memory, *how)
        once.finish()

    others = [heads, pipe.vae] if config.sample_every else [heads]  # the VAE shows samples
    return plan.count(
        step, [([brain_model], config.optimizer == "adamw8bit"), ([mom, decoder], False)], others
    )


def refuse_stage1(config, *how) -> None:
    """Raises ValueError where the GPU at hand is too small; `how` as of `stage1`."""
    plan.refuse_what_cannot_fit(config, lambda changed: stage1(changed, *how), LESS_MEMORY_1)


def refuse_stage2(config, folder: Path, sizes: dict[str, int], *how) -> None:
    """Raises ValueError where the GPU at hand is too small; folder: of stage 1, the others as of `stage2`."""
    brain = read_json(folder / "brain_model" / "config.json")
    plan.refuse_what_cannot_fit(config, lambda changed: stage2(changed, sizes, brain, *how), LESS_MEMORY_2)


def published_or_own(config, rois: str | None) -> dict[str, int]:
    """The sizes of the data where it is prepared, else those published."""
    try:
        return ClipDataset(config.data, config.subject, "train", rois).sizes
    except MissingData:
        if config.data not in PUBLISHED:
            raise
        return PUBLISHED[config.data]


def print_stage1(config, build: Callable, gradients: Callable) -> None:
    """`train_stage1.py --plan`."""
    sizes = published_or_own(config, config.rois)
    need = stage1(config, sizes, build, gradients)
    disk = {"of weights": need.trained, "to go on (state/)": need.state}
    fmri = f"{sizes['volumes']} x {sizes['voxels']:,} voxels"
    title = f"stage 1 of {config.data}, {fmri}, {config.batch_size} clips a step"
    print(plan.report(title, need, config.steps, SHARE_1, disk))


def print_stage2(config, places: Sequence[Path], Parts: Callable, gradients: Callable) -> None:
    """`train_stage2.py --plan`; places: where stage 1 may lie."""
    there = next((place for place in places if (place / "brain_model" / "config.json").is_file()), None)
    if there:
        brain = read_json(there / "brain_model" / "config.json")
        sizes = read_json(there / "config.json", keys={"sizes": dict})["sizes"]
    else:
        sizes = published_or_own(config, None)
        brain = {name: sizes[name] for name in ("voxels", "volumes", "embed_dim")}
    need = stage2(config, sizes, brain, Parts, gradients)
    n = {split: int(np.prod(SIZES[config.data][split])) for split in ("train", "test")}
    steps = config.epochs * (n["train"] // config.batch_size)
    from video_decoder import WAN, VideoDecoder

    with torch.device("meta"):
        decoder = VideoDecoder(plan.pipeline(config.decoder, {WAN: WAN_1_3B}), 512, None, 0)
    numbers = np.prod(decoder.latent_shape(config.frames, config.height, config.width))
    shown = 1 + (steps - 1) // config.sample_every if config.sample_every else 0
    rows = config.samples * config.frames * 2 * 128 * 128  # pixels of a GIF, of a byte at most
    disk = {"of weights": need.trained, "to go on (state/)": need.state}
    disk |= {"of latents (data/), fp16": 2.0 * sum(n.values()) * numbers, "of samples, at most": shown * rows}
    size = f"{config.frames} x {config.height} x {config.width}"
    title = f"stage 2 of {config.data}, {size} by {config.decoder}, {config.batch_size} clips a step"
    print(plan.report(title, need, steps, SHARE_2, disk))

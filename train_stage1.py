"""Stage 1 (§3.1, Eq. 3): teach the Brain Model the semantics of what was watched.

    python train_stage1.py                                 the toy world, a minute or two on a laptop
    python train_stage1.py --data cc2017 --subject 1       the paper's size, on a GPU
    accelerate launch train_stage1.py --data cc2017        on several

fMRI x, and of the clip watched e_img, e_txt (CLIP), e_act (ViCLIP) and its categories  ->  Brain Model and
heads in runs/<data>/sub<S>/<run>-s<seed>/stage1/, a table of what can be retrieved from the fMRI of the
held-out clips, a picture of the losses. After Ctrl-C, or a kill, the same command goes on where it was."""

import sys
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import set_seed

from brain_model import BrainModel
from data import Batch, Clips
from heads import Stage1Heads, Stage1Loss, stage1_loss
from metrics import retrieval
from prepare.copies import far_apart
from prepare.facts import SIZES
from support import training
from support.files import save_model
from support.options import option, parse as parse_options, settings_of
from support.runs import RunFolder, door, run_folder


@dataclass
class Config:
    """The defaults are the paper's (§4.1) where it gives them (docs/choices.md lists the others); PRESETS
    holds what differs on a dataset."""

    data: str = option("toy", "toy, cc2017 or cinebrain")
    subject: int = option(1, "number of the subject", least=1)
    run: str | None = option(None, "name of the run; none: full, or what an ablation switch implies")
    seed: int = option(0, "of the first weights and of all that is drawn", least=0, most=2**32 - 1)
    cls: bool = option(True, "category learning, L_cls (Table 4)")
    action: bool = option(True, "action alignment, L_action (Table 4)")
    rois: str | None = option(None, "regions, such as visual,hippocampus; none: every voxel prepared")
    val_segments: str | None = option(None, "training segments to hold out, such as seg17,seg18")

    steps: int = option(8000, "optimiser steps", least=1)
    batch_size: int = option(144, "clips a step, over all processes", least=1)
    lr: float = option(1e-4, "highest learning rate of OneCycle", above=0)
    weight_decay: float = option(0.01, "of AdamW", least=0)
    max_norm: float = option(1.0, "highest norm of the gradient", above=0)
    tau: float = option(0.07, "temperature of Eq. 2", least=1e-3)
    lambda_1: float = option(1.0, "weight of L_action, Eq. 3", least=0)
    lambda_2: float = option(1.0, "weight of L_cls, Eq. 3", least=0)

    tokens: int = option(512, "L, as many as the video decoder has text tokens", least=1)
    width: int = option(2048, "D', of the Brain Model", least=1)
    layers: int = option(24, "of the Brain Model", least=1)
    attention_heads: int = option(16, "of the Brain Model", least=1)
    rank: int = option(4, "r, numbers a token keeps of each volume", least=1)
    dropout: float = option(0.0, "share of the voxels hidden while training", least=0, below=1)
    checkpointing: bool = option(True, "recompute blocks in the backward pass, in less memory")
    micro_batch: int | None = option(None, "clips in the Brain Model at once; none: all of a step", least=1)
    optimizer: str = option("adamw", "adamw, or adamw8bit of bitsandbytes", choices=training.OPTIMIZERS)
    precision: str | None = option(None, "bf16 or fp32; none: by device", choices=training.PRECISIONS)
    device: str | None = option(None, "cpu, cuda or mps; none: cuda, else cpu", choices=training.DEVICES)
    compile: bool = option(False, "compile the blocks of the Brain Model")

    save_every: int = option(500, "steps between checkpoints", least=1)
    log_every: int = option(20, "steps between lines of log.jsonl", least=1)


PRESETS = dict.fromkeys(SIZES, {}) | {
    "toy": dict(
        steps=700, batch_size=128, lr=2e-3, weight_decay=0.1, tokens=16, width=128, layers=2,
        attention_heads=4, rank=16, dropout=0.6, checkpointing=False, save_every=200,
    ),
    "cinebrain": dict(rois="visual,hippocampus"),
}  # fmt: skip
CURVES = {"image": "image, Eq. 2", "text": "text, Eq. 2", "action": "action", "category": "category"}
LAST = "test.json"  # the last file that a run writes


def parse(arguments: list[str]) -> Config:
    """The command line over the dataset's preset over the defaults."""
    config = parse_options(Config, PRESETS, __doc__, "train_stage1.py", arguments)
    if config.width % config.attention_heads:
        wanted = f"a multiple of --attention_heads, which is {config.attention_heads}"
        raise ValueError(f"--width {config.width}: wanted {wanted}")
    if config.run is None:
        config.run = "full" + ("" if config.cls else "-no-cls") + ("" if config.action else "-no-action")
    config.lambda_1 = config.lambda_1 if config.action else 0.0  # an ablation leaves its term of Eq. 3 out
    config.lambda_2 = config.lambda_2 if config.cls else 0.0
    return config


def build(config: Config, sizes: dict[str, int]) -> tuple[BrainModel, Stage1Heads]:
    """The Brain Model f and its heads φ, for data of these sizes."""
    brain_model = BrainModel(
        voxels=sizes["voxels"],
        volumes=sizes["volumes"],
        tokens=config.tokens,
        width=config.width,
        layers=config.layers,
        attention_heads=config.attention_heads,
        embed_dim=sizes["embed_dim"],
        rank=config.rank,
    )
    brain_model.gradient_checkpointing = config.checkpointing
    return brain_model, Stage1Heads(sizes["embed_dim"], sizes["frames"], sizes["classes"])


def train_step(brain_model: BrainModel, heads: Stage1Heads, batch: Batch, config: Config) -> Stage1Loss:
    """Eq. 3 of a batch of B clips; its gradients are added to .grad.

    InfoNCE needs all B clips at once, but the Brain Model may have no room for them. In micro-batches f_c is
    computed without a graph first; the loss leaves its gradient at f_c, and each part, computed again,
    carries its share of it through the Brain Model."""
    parts = batch.parts(config.micro_batch)
    with training.autocast(batch.x, config.precision):
        with torch.set_grad_enabled(len(parts) == 1):
            f_c = torch.cat([brain_model(batch.x[part])[0] for part in parts])  # (B, D)
        if len(parts) > 1:
            f_c.requires_grad_()
        losses = stage1_loss(heads, f_c, batch, config.tau, config.lambda_1, config.lambda_2)  # Eq. 3
    losses.loss.backward()
    if len(parts) > 1:
        for part in parts:
            with training.autocast(batch.x, config.precision):  # anew: the first cached weights, graphless
                f_part, _ = brain_model(batch.x[part])  # (b, D)
            f_part.backward(f_c.grad[part].to(f_part.dtype))
    return losses


def main(config: Config) -> None:
    """The clips and the folder of the run; `learn` does the rest where the run is not finished."""
    accelerator = training.start(config.device)
    training.check_processes(config.batch_size, accelerator)
    config.precision = training.precision_of(config, accelerator.device)
    if config.data == "toy":
        from toy.release import prepare_toy

        with accelerator.main_process_first():
            prepare_toy(subject=config.subject)
    train = Clips(
        config.data,
        config.subject,
        "train",
        config.rois,
        seed=config.seed,
        batch_size=config.batch_size,
        voxel_dropout=config.dropout,
        val_segments=config.val_segments,
    )
    test = Clips(config.data, config.subject, "test", config.rois)
    folder = run_folder(config.data, config.subject, config.run, config.seed) / "stage1"
    settings = settings_of(config) | {"sizes": train.sizes}
    with RunFolder(folder, settings, config.steps, LAST, accelerator, training.MAY_CHANGE) as run:
        if not run.finished:
            learn(config, run, train, test)
    accelerator.end_training()


def learn(config: Config, run: RunFolder, train: Clips, test: Clips) -> None:
    """§4.1: AdamW and OneCycle, 8,000 steps of 144 clips at the paper's size; from the first step or the last
    checkpoint to the table of the held-out clips."""
    accelerator = run.accelerator
    x_test = test.averaged()  # (clips, T, N), read now, so that a damaged file fails before training

    # ---- the Brain Model f, its heads φ, AdamW and OneCycle (§4.1)
    set_seed(config.seed)
    brain_model, heads = build(config, train.sizes)
    brain_model, heads = brain_model.to(accelerator.device), heads.to(accelerator.device)
    groups = [([*brain_model.parameters(), *heads.parameters()], config.lr)]
    optimiser, schedule = training.adamw_onecycle(groups, config.optimizer, config.weight_decay, run.total)
    if config.compile:
        training.compile_blocks(brain_model.blocks)
    run.restore(
        state={"model": brain_model, "heads": heads, "optimiser": optimiser, "schedule": schedule},
        models={"brain_model": partial(save_model, brain_model), "heads": partial(save_model, heads)},
    )
    clips, millions = len(train.trained), sum(p.numel() for p in brain_model.parameters()) / 1e6
    accelerator.print(f"{clips:,} clips, {train.sizes['voxels']:,} voxels; {millions:,.1f} M parameters")

    # ---- Eq. 3, step by step
    for step in run.steps():
        batch = train.batch(step, accelerator.process_index, accelerator.num_processes)
        losses = train_step(brain_model, heads, batch.to(accelerator.device), config)  # Eq. 3
        update = training.update(optimiser, schedule, config.max_norm)  # mean over processes, clipped, AdamW
        run.after_step(step, losses._asdict(), update, lambda: retrieval.validate(brain_model, heads, train))

    # ---- the held-out clips, once, with the last weights
    if accelerator.is_main_process:
        far = far_apart([line["segment"] for line in test.lines])  # (clips, clips) bool
        columns = retrieval.with_controls(brain_model, heads, x_test, test.targets(), far)
        table = retrieval.table(columns, f"{len(test)} held-out clips, {config.data}")
        run.finish(CURVES, "Stage 1: the parts of Eq. 3", {"test.txt": table + "\n", LAST: columns})
        print(f"\n{table}\n\nwritten: {run.folder}/ (brain_model, heads, losses.png, test.txt, {LAST})")


if __name__ == "__main__":
    door(lambda: main(parse(sys.argv[1:])))

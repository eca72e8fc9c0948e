"""Stage 1 (§3.1, Eq. 3): teach the Brain Model the semantics of what was watched.

    python train_stage1.py                                 the toy world, a minute or two on a laptop
    python train_stage1.py --data cc2017 --subject 1       the paper's size, on a GPU
    accelerate launch train_stage1.py --data cc2017        on several
    python train_stage1.py --data cc2017 --plan            memory, hours and disk, counted (docs/gpus.md)

fMRI x, and of the clip watched e_img, e_txt (CLIP), e_act (ViCLIP) and its categories  ->  Brain Model and
heads in runs/<data>/sub<K>/<run>-s<seed>/stage1/, a table of what can be retrieved from the fMRI of the
held-out clips, a picture of the losses. After Ctrl-C, or a kill, the same command goes on where it was.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from brain_model import BrainModel
from data import ClipDataset, Split, clips_of_step, far_apart, held_out_clips, hide_voxels
from extras import steps
from heads import Stage1Heads, Stage1Loss, stage1_loss
from metrics import retrieval
from prepare.command import prepare_toy
from support import experiment, training
from support.experiment import RunFolder, Stopping
from support.files import write_json, written_whole
from support.options import option, parse as parse_options, settings_of
from support.pictures import loss_curves


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
    compile: bool = option(False, "compile the blocks of the Brain Model")
    attention_kernel: str = option("auto", "of torch, on CUDA", choices=training.KERNELS)

    save_every: int = option(500, "steps between checkpoints", least=1)
    log_every: int = option(20, "steps between lines of log.jsonl", least=1)
    plan: bool = option(False, "print memory, hours and disk of these options, counted, and write nothing")


PRESETS = {
    "toy": dict(
        steps=700, batch_size=128, lr=2e-3, weight_decay=0.1, tokens=16, width=128, layers=2,
        attention_heads=4, rank=16, dropout=0.6, checkpointing=False, save_every=200,
    ),
    "cc2017": {},
    "cinebrain": dict(rois="visual,hippocampus"),
}  # fmt: skip
MAY_CHANGE = training.MAY_CHANGE
LAST = "test.json"  # the last file that a run writes


def parse(argv: list[str]) -> Config:
    """The command line over the dataset's preset over the defaults."""
    config = parse_options(Config, PRESETS, __doc__, "train_stage1.py", argv)
    if config.width % config.attention_heads:
        heads = config.attention_heads
        raise ValueError(f"--width {config.width}: wanted a multiple of --attention_heads, which is {heads}")
    if config.run is None:
        config.run = "full" + ("" if config.cls else "-no-cls") + ("" if config.action else "-no-action")
    return config


def build(config: Config, size: dict[str, int]) -> tuple[BrainModel, Stage1Heads]:
    """The Brain Model f and its heads φ, for data of these sizes."""
    model = BrainModel(
        size["voxels"], size["volumes"], config.tokens, config.width, config.layers, config.attention_heads,
        size["embed_dim"], config.rank, config.dropout,
    )  # fmt: skip
    model.gradient_checkpointing = config.checkpointing
    return model, Stage1Heads(size["embed_dim"], size["frames"], size["classes"])


def losses_and_gradients(
    model: BrainModel, heads: Stage1Heads, x: Tensor, targets: dict[str, Tensor], weights: dict[str, float],
    micro_batch: int | None, autocast,
) -> Stage1Loss:  # fmt: skip
    """Eq. 3 of a batch; its gradients are added to .grad. x (B, T, N); targets and weights of Eq. 3.

    InfoNCE wants the batch whole. In micro-batches f_c is computed without a graph first; the loss leaves its
    gradient at f_c, and each part, computed again, leads its share of it through the Brain Model.
    """
    parts = training.parts(len(x), micro_batch)
    whole = len(parts) == 1
    with autocast(), torch.set_grad_enabled(whole):
        f_c = torch.cat([model(x[part])[0] for part in parts])  # (B, D)
    if not whole:
        f_c.requires_grad_()
    with autocast():
        losses = stage1_loss(heads, f_c, **targets, **weights)  # Eq. 3
    losses.loss.backward()
    for part in () if whole else parts:
        with autocast():
            f_part, _ = model(x[part])  # (b, D)
        f_part.backward(f_c.grad[part].to(f_part.dtype))
    return losses


def weights_of(config: Config) -> dict[str, float]:
    """The temperature of Eq. 2, and the weights of Eq. 3 with what an ablation switch leaves out."""
    weights = {"tau": config.tau, "lambda_1": config.lambda_1 * config.action}
    return weights | {"lambda_2": config.lambda_2 * config.cls}


def main(config: Config) -> None:
    """The data and the folder of the run; `learn` does the rest where the run is not finished."""
    if config.plan:
        return steps.print_stage1(config, build, losses_and_gradients)
    accelerator = experiment.start()
    if config.batch_size < accelerator.num_processes:
        raise ValueError(f"--batch_size {config.batch_size}: wanted at least a clip for each process")
    with accelerator.main_process_first():
        if config.data == "toy":
            prepare_toy(subject=config.subject)
    train = ClipDataset(config.data, config.subject, "train", config.rois)
    test = ClipDataset(config.data, config.subject, "test", config.rois)
    split = held_out_clips(train, test, config.val_segments)
    clips_of_step(split.clips, config.batch_size, config.seed, 0)  # refuses a batch of more clips than these

    folder = experiment.run_folder(config.data, config.subject, config.run, config.seed) / "stage1"
    settings = settings_of(config, "plan") | {"sizes": train.sizes}
    chief = accelerator.is_main_process
    with RunFolder(folder, settings, config.steps, LAST, MAY_CHANGE, chief) as run:
        if run.finished:
            accelerator.print(f"{folder} is finished; another --run NAME or --seed trains anew")
        else:
            steps.refuse_stage1(config, train.sizes, build, losses_and_gradients)
            learn(config, accelerator, run, train, test, split)
    accelerator.end_training()


def learn(
    config: Config, accelerator: Accelerator, run: RunFolder,
    train: ClipDataset, test: ClipDataset, split: Split,
) -> None:  # fmt: skip
    """§3.1, from the first step or the last checkpoint to the table of the held-out clips."""
    device, chief, size = accelerator.device, accelerator.is_main_process, train.sizes

    x_test = test.averaged()  # (clips, T, N), read now: a damaged file ends it before the work

    # ---- the Brain Model f and its heads φ
    set_seed(config.seed)
    model, heads = (part.to(device) for part in build(config, size))
    training.compile_blocks(config.compile, model.blocks)
    training.choose_attention(config.attention_kernel, accelerator, config.width // config.attention_heads)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    accelerator.print(f"{len(split.clips):,} clips, {size['voxels']:,} voxels; {millions:,.1f} M parameters")

    # ---- AdamW and OneCycle (§4.1)
    groups = [{"params": [*model.parameters(), *heads.parameters()], "lr": config.lr}]
    optimiser = training.adamw(config.optimizer, groups, config.weight_decay, in_8_bit=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.steps)
    state = {"model": model, "heads": heads, "optimiser": optimiser, "schedule": schedule}
    models = {"brain_model": model.save_pretrained, "heads": heads.save_pretrained}
    first_step = run.restore(state)

    # ---- Eq. 3, step by step
    own = experiment.share(range(config.batch_size), accelerator.process_index, accelerator.num_processes)
    weights = weights_of(config)
    progress = {"desc": "stage 1", "initial": first_step, "total": config.steps, "disable": not chief}
    with Stopping() as stopping, tqdm(range(first_step, config.steps), **progress) as bar:
        for step in bar:
            whole_batch = clips_of_step(split.clips, config.batch_size, config.seed, step)
            clips = whole_batch[own]
            batch = {name: value.to(device) for name, value in train.batch(clips, config.seed, step).items()}
            x = hide_voxels(batch.pop("x"), config.dropout, config.seed, step, clips)  # (B, T, N)
            how = x, batch, weights, config.micro_batch, accelerator.autocast
            losses = losses_and_gradients(model, heads, *how)  # Eq. 3
            ids = [train.clips[clip]["id"] for clip in whole_batch]
            norm = training.update(accelerator, optimiser, schedule, config.max_norm, step, ids)

            stop = stopping.asked(accelerator)
            saving = stop or (step + 1) % config.save_every == 0 or step + 1 == config.steps
            if saving or step % config.log_every == 0:
                row = training.logged(accelerator, losses._asdict())  # of the whole batch
                row |= {"norm": norm, "lr": schedule.get_last_lr()[0]}
                if chief and saving and len(split.held_out):
                    row |= validate(model, heads, train, split.held_out)
                if chief:
                    run.log(step, row)
                    bar.set_postfix(loss=f"{row['loss']:.3f}")
            if saving and chief:
                run.save(step + 1, state, models)
            if saving:
                accelerator.wait_for_everyone()
            if stop:
                raise stopping.stopped(step + 1, config.steps)

    # ---- the held-out clips, once, with the last weights
    if chief:
        names = {"image": "image, Eq. 2", "text": "text, Eq. 2", "action": "action", "category": "category"}
        log = experiment.read_log(run.log_file)
        loss_curves(run.folder / "losses.png", log, names, "Stage 1: the parts of Eq. 3")
        other = far_apart([clip["segment"] for clip in test.clips])
        columns = retrieval.with_controls(model, heads, x_test, test.targets(), other)
        table = retrieval.table(columns, f"{len(test)} held-out clips, {config.data}")
        with written_whole(run.folder / "test.txt") as part:
            part.write_text(table + "\n")
        write_json(run.folder / LAST, columns)
        print(f"\n{table}\n\nwritten: {run.folder}/ (brain_model, heads, losses.png, test.txt, {LAST})")


def validate(model: nn.Module, heads: nn.Module, train: ClipDataset, clips: np.ndarray) -> dict[str, float]:
    """The table's scores of training clips that are held out, with names for the log."""
    other = far_apart([train.clips[clip]["segment"] for clip in clips])
    scores = retrieval.scores(model, heads, train.averaged(clips), train.targets(clips), other)
    shown = [f"{name} {value:.3f}" for name, value in scores.items() if "top" not in name]
    tqdm.write(f"{len(clips)} clips of the segments held out: {', '.join(shown)}")
    return {f"held out, {name}": value for name, value in scores.items()}


if __name__ == "__main__":
    experiment.door(lambda: main(parse(sys.argv[1:])))

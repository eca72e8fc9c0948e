"""Stage 1 (§3.1, Eq. 3): teach the Brain Model the semantics of what was watched.

    python train_stage1.py                                 the toy world, two to three minutes on a laptop
    python train_stage1.py --data cc2017 --subject 1       the paper's size, on a GPU
    accelerate launch train_stage1.py --data cc2017        on several

fMRI x, and of the clip watched e_img, e_txt (CLIP), e_act (ViCLIP) and its categories  ->  Brain Model and heads in
runs/<data>/sub<K>/<run>-s<seed>/stage1/, a table of what can be retrieved from the fMRI of the held-out clips, a picture of the losses.
"""

import json
import os
import shutil
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from scipy.special import gammaln
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import HfArgumentParser

from brain_model import BrainModel
from data import ClipDataset, clips_of_step, far_apart, mean_frames, near_copy_threshold, written_whole
from heads import Stage1Heads, stage1_loss


def option(default, text: str):
    return field(default=default, metadata={"help": text})


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """--help: the text above as it stands, and each option's default."""


@dataclass
class Config:
    """The defaults are the paper's (§4.1); PRESETS holds what differs on a dataset."""

    data: str = option("toy", "toy, cc2017 or cinebrain")
    subject: int = option(1, "K")
    run: str | None = option(None, "name of the run; none: full, or what an ablation switch implies")
    seed: int = option(0, "of the initial weights, the order of the clips and the showings drawn")
    resume: bool = option(False, "go on from the last checkpoint of this run")
    cls: bool = option(True, "category learning, L_cls (Table 4)")
    action: bool = option(True, "action alignment, L_action (Table 4)")
    rois: str | None = option(None, "regions to use, such as visual,hippocampus; none: every voxel prepared")
    val_segments: str | None = option(None, "training segments to hold out and to report on every checkpoint, such as seg17,seg18")

    steps: int = option(8000, "optimiser steps")
    batch_size: int = option(144, "clips a step, over all processes")
    lr: float = option(1e-4, "highest learning rate of OneCycle")
    weight_decay: float = option(0.01, "of AdamW")
    clip_norm: float = option(1.0, "highest norm of the gradient")
    tau: float = option(0.07, "temperature of Eq. 2")
    lambda_1: float = option(1.0, "weight of L_action, Eq. 3")
    lambda_2: float = option(1.0, "weight of L_cls, Eq. 3")

    tokens: int = option(512, "L, as many as the video decoder has text tokens")
    width: int = option(2048, "D', of the Brain Model")
    layers: int = option(24, "of the Brain Model")
    heads: int = option(16, "attention heads of the Brain Model")
    rank: int = option(4, "r, numbers a token keeps of each volume")
    dropout: float = option(0.0, "share of the voxels hidden while training")
    checkpointing: bool = option(False, "recompute the blocks in the backward pass: less memory, a third more work")

    save_every: int = option(500, "steps between checkpoints")
    log_every: int = option(20, "steps between lines of log.jsonl")


PRESETS = {
    "toy": dict(
        steps=700,
        batch_size=128,
        lr=2e-3,
        weight_decay=0.1,
        tokens=16,
        width=128,
        layers=2,
        heads=4,
        rank=16,
        dropout=0.6,
        save_every=200,
    ),
    "cc2017": {},
    "cinebrain": dict(rois="visual,hippocampus"),
}


def parse(argv: list[str]) -> Config:
    """The command line over the dataset's preset over the paper's values. An unknown option or dataset ends the program."""
    parser = HfArgumentParser(Config, description=__doc__, prog="train_stage1.py", formatter_class=Help)
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if known.data not in PRESETS:
        parser.error(f"--data {known.data}: there are {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[known.data])
    config = Config(**vars(parser.parse_args(argv)))
    if config.run is None:
        config.run = "full" + ("" if config.cls else "-no-cls") + ("" if config.action else "-no-action")
    return config


# ---------------------------------------------------------------------------------------------- what the held-out clips show


def retrieval(f: Tensor, e: Tensor, other: np.ndarray, n: int = 50) -> tuple[float, float, float]:
    """Shares of clips whose own e (clips, D) is the most similar to f (clips, D), is among the five most similar, and is the most
    similar among itself and n-1 clips drawn from those of other scenes (`other` (clips, clips) bool).

    Among equals (clips of one caption) the first two take one at random: their expectation. The last is exact: with C candidates,
    k of them less similar than the own clip, the probability is C(k, n-1) / C(C, n-1). ValueError where f is not finite.
    """
    f, e = torch.nn.functional.normalize(f, dim=-1), torch.nn.functional.normalize(e, dim=-1)
    S = (f @ e.T).double().numpy().round(6)  # equal embeddings, up to rounding, are equally similar
    if not np.isfinite(S).all():
        raise ValueError("the Brain Model's output is not finite: training diverged (log.jsonl); train anew with a lower --lr")
    own = S.diagonal()[:, None]
    better, equal = (S > own).sum(1), (S == own).sum(1)  # equal counts the own clip
    C, k = other.sum(1), (other & (S < own)).sum(1)
    n = min(n, int(C.min()) + 1)
    log_p = gammaln(k + 1) - gammaln(np.maximum(k - n + 2, 1)) - gammaln(C + 1) + gammaln(C - n + 2)
    top_1, top_5 = (np.clip((m - better) / equal, 0, 1) for m in (1, 5))
    return float(top_1.mean()), float(top_5.mean()), float(np.where(k >= n - 1, np.exp(log_p), 0).mean())


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the categories (columns) that occur of the precision at each positive clip, best score first."""
    found = []
    for score, true in zip(scores.T, truth.T.astype(bool), strict=True):
        if true.any():
            hits = true[np.argsort(-score, kind="stable")]
            found.append((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return float(np.mean(found))


@torch.inference_mode()
def report(model: BrainModel, heads: Stage1Heads, x: Tensor, target: dict[str, Tensor], segments: list[str]) -> dict[str, float]:
    """Retrieval and category scores of the clips with fMRI x (clips, T, N). Names as in the table."""
    model.eval(), heads.eval()
    device = next(model.parameters()).device
    f_c = torch.cat([model(part.to(device))[0].float().cpu() for part in x.split(64)])
    e_img, f_a, logits = (v.float().cpu() for v in heads(f_c.to(device), target["e_img"].to(device)))
    model.train(), heads.train()
    other, scores = far_apart(segments), {}
    for name, f, e in (("image", f_c, e_img), ("text", f_c, target["e_txt"]), ("action", f_a, target["e_act"])):
        scores |= {f"{name} {k}": v for k, v in zip(("top-1", "top-5", "50-way"), retrieval(f, e, other), strict=True)}
    return scores | {"category mAP": average_precision(logits.numpy(), target["categories"].numpy())}


def table(scores: dict[str, float], shuffled: dict[str, float], chance: dict[str, float], title: str) -> str:
    lines = [f"{title:<28}{'fMRI':>9}{'shuffled':>10}{'chance':>9}"]
    return "\n".join(lines + [f"{k:<28}{v:>9.3f}{shuffled[k]:>10.3f}{chance[k]:>9.3f}" for k, v in scores.items()])


def loss_curves(log: Path, picture: Path) -> None:
    """log.jsonl -> a picture of Eq. 3 and its parts over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in open(log)]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("image", "image, Eq. 2"), ("text", "text, Eq. 2"), ("action", "action"), ("category", "category, BCE + focal")):
        axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=label)
    axis.set(xlabel="step", ylabel="loss", title="Stage 1: the parts of Eq. 3", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- training


def save_whole(folder: Path, write) -> None:
    """write(temporary folder), which then takes the place of `folder`: nothing half-written ever stands there."""
    part, old = folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main(config: Config) -> dict[str, float]:
    # ---- set up
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16" if torch.cuda.is_available() else "no")
    chief = accelerator.is_main_process
    out = Path("runs") / config.data / f"sub{config.subject}" / f"{config.run}-s{config.seed}" / "stage1"
    state_file = out / "state" / "state.pt"
    if config.batch_size % accelerator.num_processes:
        raise ValueError(f"--batch_size {config.batch_size} does not divide among {accelerator.num_processes} processes")

    # ---- data
    with accelerator.main_process_first():  # the toy world is made by the first to ask
        train = ClipDataset(config.data, config.subject, "train", config.rois)
        test = ClipDataset(config.data, config.subject, "test", config.rois)
    segments = np.array([clip["segment"] for clip in train.clips])
    held_out = np.isin(segments, (config.val_segments or "").split(","))
    if config.val_segments and not set(config.val_segments.split(",")) <= set(segments):
        raise ValueError(f"--val_segments {config.val_segments}: the training segments are {', '.join(dict.fromkeys(segments))}")
    clips = np.flatnonzero(~held_out)
    if config.val_segments:  # nor may training see near-copies of what is held out
        frames = mean_frames(train.e_img)
        threshold, _ = near_copy_threshold(frames, list(segments), mean_frames(test.e_img))
        clips = clips[(frames[clips] @ frames[held_out].T).max(1) <= threshold]

    # ---- model
    set_seed(config.seed)
    size = train.sizes
    model = BrainModel(
        size["voxels"],
        size["volumes"],
        config.tokens,
        config.width,
        config.layers,
        config.heads,
        size["embed_dim"],
        config.rank,
        config.dropout,
    )
    model.gradient_checkpointing = config.checkpointing
    heads = Stage1Heads(size["embed_dim"], size["frames"], size["classes"])
    n = sum(p.numel() for p in model.parameters())
    accelerator.print(
        f"{len(clips):,} clips, {size['voxels']:,} voxels, {len(test)} test clips; Brain Model of {n / 1e6:,.1f} M parameters"
    )

    # ---- optimiser
    parameters = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=config.steps)
    first_step = 0
    if config.resume:
        if not state_file.is_file():
            raise FileNotFoundError(f"{state_file}: there is no checkpoint to resume; leave out --resume")
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        different = {
            f.name: (state["config"].get(f.name), getattr(config, f.name))
            for f in fields(Config)
            if f.name not in ("resume", "save_every", "log_every") and state["config"].get(f.name) != getattr(config, f.name)
        }
        if different or state["sizes"] != size:
            raise ValueError(f"{state_file} was made with other settings (there, here): {different or (state['sizes'], size)}")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first_step = state["step"]
    model, heads, optimiser = accelerator.prepare(model, heads, optimiser)

    def save(step: int) -> None:
        plain_model, plain_heads = accelerator.unwrap_model(model), accelerator.unwrap_model(heads)
        states = {"model": plain_model, "heads": plain_heads, "optimiser": optimiser, "schedule": schedule}
        state = {name: part.state_dict() for name, part in states.items()}
        state |= {"step": step, "config": asdict(config), "sizes": size}
        save_whole(out / "brain_model", plain_model.save_pretrained)
        save_whole(out / "heads", plain_heads.save_pretrained)
        with written_whole(state_file) as part:  # last: --resume from it writes the others anew
            torch.save(state, part)

    if chief:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        log_file = out / "log.jsonl"
        lines = list(open(log_file)) if config.resume and log_file.is_file() else []  # a killed process may leave half a line
        log_file.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step))
        board = SummaryWriter(str(out))

    # ---- loop
    rank, world = accelerator.process_index, accelerator.num_processes
    progress = tqdm(range(first_step, config.steps), initial=first_step, total=config.steps, desc="stage 1", disable=not chief)
    for step in progress:
        chosen = clips_of_step(clips, config.batch_size, config.seed, step)[
            rank * config.batch_size // world : (rank + 1) * config.batch_size // world
        ]
        batch = {name: value.to(accelerator.device) for name, value in train.batch(chosen, config.seed, step).items()}
        torch.manual_seed(hash((config.seed, step, rank)) % 2**31)  # the dropout of a step is the same whether it was resumed or not
        with accelerator.autocast():
            f_c, f_e = model(batch["x"])
            losses = stage1_loss(
                heads, f_c, batch["e_img"], batch["e_txt"], batch["e_act"], batch["categories"], config.tau,
                config.lambda_1 * config.action, config.lambda_2 * config.cls,
            )  # fmt: skip
        accelerator.backward(losses.loss)
        norm = accelerator.clip_grad_norm_(parameters, config.clip_norm)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()

        if step % config.log_every == 0 or step + 1 == config.steps:
            mean = accelerator.reduce(torch.stack([v.detach() for v in losses]), "mean").tolist()  # of the whole batch
            row = dict(zip(losses._fields, mean, strict=True)) | {"norm": norm.item(), "lr": schedule.get_last_lr()[0]}
            if chief:
                with open(log_file, "a") as log:
                    log.write(json.dumps({"step": step} | row) + "\n")
                for name, value in row.items():
                    board.add_scalar(f"stage1/{name}", value, step)
                progress.set_postfix(loss=f"{row['loss']:.3f}")
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            if config.val_segments and chief:
                where = np.flatnonzero(held_out)
                seen = report(
                    accelerator.unwrap_model(model),
                    accelerator.unwrap_model(heads),
                    train.averaged(where),
                    train.targets(where),
                    list(segments[where]),
                )
                tqdm.write(
                    f"step {step + 1}, {config.val_segments}: "
                    + ", ".join(f"{k} {v:.3f}" for k, v in seen.items() if "50-way" in k or "mAP" in k)
                )
                for name, value in seen.items():
                    board.add_scalar(f"validation/{name}", value, step)
            if chief:
                save(step + 1)
            accelerator.wait_for_everyone()

    # ---- the held-out clips, once, with the last weights
    scores: dict[str, float] = {}
    if chief:
        x, target, where = test.averaged(), test.targets(), [clip["segment"] for clip in test.clips]
        parts = accelerator.unwrap_model(model), accelerator.unwrap_model(heads)
        scores = report(*parts, x, target, where)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        shuffled = report(*parts, x[order], target, where)
        ways = min(50, int(far_apart(where).sum(1).min()) + 1)  # fewer where the test set is small
        chance = {k: {"top-1": 1, "top-5": 5, "50-way": len(x) / ways}.get(k.split()[-1], 0) / len(x) for k in scores}
        chance["category mAP"] = float(target["categories"].float().mean(0)[target["categories"].bool().any(0)].mean())
        (out / "test.json").write_text(json.dumps({"fmri": scores, "shuffled": shuffled, "chance": chance}, indent=2) + "\n")
        text = table(scores, shuffled, chance, f"{len(x)} held-out clips, {config.data}")
        (out / "test.txt").write_text(text + "\n")
        loss_curves(log_file, out / "losses.png")
        board.close()
        print(f"\n{text}\n\nwritten: {out}/ (brain_model, heads, losses.png, log.jsonl, test.json)")
    accelerator.end_training()
    return scores


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(parse(sys.argv[1:]))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")

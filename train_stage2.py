"""Stage 2 (§3.2, Eq. 10): teach the Mixture-of-Memories and the video decoder to show what was watched.

    python train_stage2.py                                 the toy world, about five minutes on a laptop
    python train_stage2.py --data cc2017 --subject 1       the paper's size, on a GPU
    accelerate launch train_stage2.py --data cc2017        on several

Brain Model and heads of stage 1, and of each clip its fMRI x, embeddings and latents y  ->  Brain Model, Mixture-of-Memories and LoRA in
runs/<data>/sub<K>/<run>-s<seed>/stage2/, samples (stimulus beside reconstruction), a picture of the losses. Only the DiT of the video
decoder is in memory: latents and text tokens come from the prepared data, and its VAE is loaded for the moment of a sample.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import HfArgumentParser

from brain_model import BrainModel
from data import SECONDS, ClipDataset, DecoderData, clips_of_step, mean_frames, memories, near_copy_threshold, written_whole
from heads import Stage1Heads, stage1_loss
from mixture_of_memories import DirectProjection, MemoryPool, MixtureOfMemories, TopTextMemory
from video_decoder import WAN, VideoDecoder, clip_generator, condition_dropout, draw


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """The defaults are the paper's (§4.1) where it gives them; PRESETS holds what differs on a dataset."""

    data: str = option("toy", "toy, cc2017 or cinebrain")
    subject: int = option(1, "K")
    run: str | None = option(None, "name of the run (default: that of stage 1, and what an ablation switch implies)")
    stage1: str | None = option(None, "run whose stage 1 to start from, by name or folder (default: this run's, or full)")
    seed: int = option(0, "of the initial weights, the order of the clips, the showings, noise and times drawn")
    resume: bool = option(False, "go on from the last checkpoint of this run")
    mom: bool = option(True, "Mixture-of-Memories; without it the top-1 text alone conditions the decoder (Table 4)")
    integration: bool = option(True, "retrieval and integration; without them f_e conditions the decoder directly (Table 6)")

    decoder: str = option(WAN, "text-to-video model of diffusers: a folder or a name on the Hub")
    frames: int = option(57, "of a video")
    height: int = option(624, "of a video, in pixels")
    width: int = option(624, "of a video, in pixels")
    lora_rank: int = option(16, "of the LoRA")
    lora_alpha: float = option(16, "scaling factor of the LoRA")
    K: int = option(5, "memories retrieved")
    alpha: float = option(1.0, "weight of z_f, Eq. 8")
    heads: int = option(16, "attention heads of the integration, Eq. 6")

    epochs: int = option(20, "times that each clip is shown")
    batch_size: int = option(32, "clips a step, over all processes")
    micro_batch: int = option(1, "clips that are in the decoder at once")
    checkpointing: bool = option(True, "recompute blocks in the backward pass: less memory, a third more work")
    lr: float = option(1e-6, "highest learning rate of OneCycle, of the Brain Model")
    lr_fusion: float | None = option(None, "of router and integration (default: as the Brain Model)")
    lr_lora: float = option(1e-4, "of the LoRA")
    weight_decay: float = option(0.01, "of AdamW")
    clip_norm: float = option(1.0, "highest norm of the gradient")
    condition_dropout: float = option(0.1, "share of the clips that get the empty prompt")

    guidance: float = option(5.0, "classifier-free guidance of the samples")
    sampling_steps: int = option(50, "of the samples")
    samples: int = option(2, "held-out clips to show every time")
    sample_every: int = option(500, "steps between samples; 0 for none")
    save_every: int = option(100, "steps between checkpoints")
    log_every: int = option(10, "steps between lines of log.jsonl")


PRESETS = {
    "toy": dict(
        decoder="toy/wan", epochs=10, frames=17, height=64, width=64, heads=4, micro_batch=32, checkpointing=False,
        lr=1e-4, lr_fusion=1e-3, lr_lora=1e-4, guidance=3.0, sampling_steps=16, samples=6, sample_every=200,
    ),
    "cc2017": {},
    "cinebrain": dict(frames=33, height=480, width=720),
}  # fmt: skip
PERCENT = (0, 5, 25, 50, 75, 95, 100)  # the quantiles of `near_copy_threshold`
MAY_CHANGE = ("resume", "micro_batch", "checkpointing", "guidance", "sampling_steps", "samples", "sample_every", "save_every", "log_every")


def parse(argv: list[str]) -> Config:
    """The command line over the dataset's preset over the paper's values. An unknown option or dataset ends the program."""
    parser = HfArgumentParser(Config, description=__doc__, prog="train_stage2.py")
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if known.data not in PRESETS:
        parser.error(f"--data {known.data}: there are {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[known.data])
    config = Config(**vars(parser.parse_args(argv)))
    if not (config.mom or config.integration):
        parser.error("--no-mom and --no-integration are two ablations: choose one")
    named = Path(config.stage1).name.removesuffix(f"-s{config.seed}") if config.stage1 else "full"
    config.stage1 = config.stage1 or config.run or named
    config.run = config.run or named + ("" if config.mom else "-no-mom") + ("" if config.integration else "-no-integration")
    config.lr_fusion = config.lr if config.lr_fusion is None else config.lr_fusion
    return config


# ---------------------------------------------------------------------------------------------- one step


class Parts(NamedTuple):
    brain_model: BrainModel
    heads: Stage1Heads  # frozen
    mom: MixtureOfMemories | TopTextMemory | DirectProjection
    decoder: VideoDecoder
    pool: MemoryPool
    empty: Tensor  # (L, D_txt)


def hide_voxels(x: Tensor, share: float, seed: int, step: int, clips: np.ndarray) -> Tensor:
    """The dropout of the Brain Model, on x (B, T, N), drawn from (seed, step, clip) as all else: no process or resumption changes it."""
    if not share:
        return x
    kept = torch.stack([torch.rand(x.shape[1:], generator=clip_generator(seed, step, int(clip), 1)) >= share for clip in clips])
    return x * kept.to(x.device) / (1 - share)  # (B, T, N)


def losses_and_gradients(
    parts: Parts, batch: dict[str, Tensor], clips: np.ndarray, memory: Tensor, weights: dict[str, float],
    seed: int, step: int, micro_batch: int, dropout: float, autocast,
) -> dict[str, Tensor]:  # fmt: skip
    """Eq. 10 of a batch, its gradients added to .grad, in the one-step form: Brain Model and MoM see the batch whole, as InfoNCE wants,
    the DiT a few clips at a time, each part leaving its share of ∂L/∂f_fuse; then one backward through the rest. It equals the plain one.

    batch: x (B, T, N), targets, latents y (B, C, f, h, w). clips: their indices (B,) in the dataset, memory: in the pool. weights: tau,
    lambda_1, lambda_2 of Eq. 3. Returns what is logged.
    """
    brain_model, heads, mom, decoder, pool, empty = parts
    with autocast():
        f_c, f_e = brain_model(batch["x"])  # (B, D) (B, L, D')
        stage1 = stage1_loss(heads, f_c, *(batch[name] for name in ("e_img", "e_txt", "e_act", "categories")), **weights)  # Eq. 3
        q = torch.stack([f_c, f_c, heads.phi_a(f_c)], 1)  # (B, 3, D)
        found = mom(f_e, q, pool, memory)  # Eq. 4-8
        f_fuse = found.f_fuse.float()  # (B, L, D_txt)

    f, diffusion = f_fuse.detach().requires_grad_(), []
    for part in torch.arange(len(clips)).split(micro_batch):
        y = batch["y"][part].to(f.device)  # (b, C, f, h, w)
        noise, u, dropped = draw(seed, step, clips[part.numpy()], y.shape[1:], dropout)
        with autocast():
            loss = decoder(y, condition_dropout(f[part], empty, dropped), noise, u)  # (b,)  Eq. 9
        (loss.sum() / len(clips)).backward()
        diffusion.append(loss.detach())
    diffusion = torch.cat(diffusion).mean()
    ends = [(stage1.loss, torch.ones_like(stage1.loss)), (f_fuse, f.grad)]
    torch.autograd.backward(*zip(*(end for end in ends if end[0].requires_grad), strict=True))  # w/o MoM f_fuse leads nowhere

    logged = stage1._asdict() | {"loss": stage1.loss + diffusion, "diffusion": diffusion}  # Eq. 10
    if found.indices is not None:  # how alike clip and first memory look: cosine of their mean frames
        logged["alike"] = (pool.mean_frame[memory] * pool.mean_frame[found.indices[:, 0]]).sum(1).mean()
        logged |= dict(zip(("w_txt", "w_img", "w_act"), found.W_r.mean(0), strict=True))
    if found.ratio is not None:
        logged["z_f/z_t"] = found.ratio
    return {name: value.detach().float() for name, value in logged.items()}


# ---------------------------------------------------------------------------------------------- looking at it


@torch.no_grad()
def show(parts: Parts, config: Config, x: Tensor, latents: np.ndarray, seconds: float, gif: Path) -> None:
    """A GIF, a row a clip: the stimulus, as the VAE keeps it, beside the reconstruction from its fMRI x (clips, T, N)."""
    from PIL import Image

    brain_model, heads, mom, decoder, pool, empty = parts
    brain_model.eval()
    sampler = VideoDecoder.from_pretrained(
        config.decoder, load_transformer=False, load_vae=True, dtype=decoder.transformer.dtype, tiling=len(latents[0, 0, 0]) > 32
    )
    sampler.transformer = decoder.transformer  # with its LoRA; the sampler's own scheduler leaves training's as it is
    sampler.pipe.register_modules(transformer=decoder.transformer)
    sampler.to(empty.device)
    rows = []
    for i, (x_i, y) in enumerate(zip(x[:, None].to(empty.device), torch.from_numpy(latents)[:, None], strict=True)):
        f_c, f_e = brain_model(x_i)
        f_fuse = mom(f_e, torch.stack([f_c, f_c, heads.phi_a(f_c)], 1), pool).f_fuse
        generator = [clip_generator(config.seed, i)]
        size, how = (config.frames, config.height, config.width), (config.sampling_steps, config.guidance)
        rows.append(torch.cat([sampler.decode_latents(y), sampler.generate(f_fuse, empty, *size, generator, *how)], dim=3)[0])
    brain_model.train()
    video = torch.cat(rows, dim=1).numpy()  # (F, clips H, 2 W, 3)
    images = [Image.fromarray(frame) for frame in video]
    for image in images:
        image.thumbnail((512, 256 * len(rows)))
    gif.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(gif) as part:
        images[0].save(part, save_all=True, append_images=images[1:], duration=round(1000 * seconds / len(images)), loop=0)


def picture(file: Path, curves: dict[str, tuple], **labels) -> None:
    """Named curves (x, y) in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (x, y) in curves.items():
        axis.plot(x, y, label=name, marker="." if len(x) < 20 else None)
    axis.set(**labels)
    axis.legend()
    axis.grid(alpha=0.3)
    with written_whole(file) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------- training


def find_stage1(config: Config) -> Path:
    """The folder of the stage 1 to start from. Raises FileNotFoundError where it is not there, ValueError for another subject's."""
    runs, here = Path("runs") / config.data / f"sub{config.subject}", f"--data {config.data} --subject {config.subject}"
    places = [runs / f"{config.stage1}-s{config.seed}" / "stage1", Path(config.stage1) / "stage1"]
    folder = next((place for place in places if (place / "brain_model" / "config.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{places[0]}/brain_model is not there: python train_stage1.py {here} --seed {config.seed} --run {config.stage1}, "
            "or name another run with --stage1"
        )
    found = json.loads((folder / "config.json").read_text())
    if (found["data"], found["subject"]) != (config.data, config.subject):
        raise ValueError(
            f"{folder} is of {found['data']}, subject {found['subject']}; wanted {config.data}, subject {config.subject}: "
            f"python train_stage1.py {here}, or another --stage1"
        )
    return folder


def check_fit(folder: Path, sizes: dict[str, int], decoder: VideoDecoder) -> dict[str, int]:
    """The sizes of stage 1's Brain Model. Raises ValueError where it or its heads do not fit the prepared data or the decoder."""
    brain_model, heads = (json.loads((folder / name / "config.json").read_text()) for name in ("brain_model", "heads"))
    found = {name: brain_model[name] for name in ("volumes", "voxels", "embed_dim")} | {name: heads[name] for name in ("frames", "classes")}
    if different := {name: (found[name], sizes[name]) for name in found if found[name] != sizes[name]}:
        raise ValueError(
            f"{folder} was trained on other data (there, in data/ now): {different}; train it again with train_stage1.py, or choose the "
            "stage 1 of this subject, these --rois and encoders with --stage1"
        )
    if brain_model["tokens"] != decoder.text_length:
        raise ValueError(
            f"{folder}/brain_model has {brain_model['tokens']} tokens, the text of {decoder.name} {decoder.text_length}: choose another "
            f"--decoder, or train_stage1.py --tokens {decoder.text_length} --run NAME and --stage1 NAME here"
        )
    return brain_model


def save_whole(folder: Path, write) -> None:
    """write(temporary folder), whose files then replace those of `folder` one by one: a kill at any moment leaves whole files."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    folder.mkdir(exist_ok=True)
    for file in part.iterdir():
        file.replace(folder / file.name)
    part.rmdir()


def main(config: Config) -> dict[str, float]:
    # ---- set up, and what can be wrong before anything heavy is loaded
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="bf16" if torch.cuda.is_available() else "no")
    chief, rank, world, device = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes, accelerator.device
    out = Path("runs") / config.data / f"sub{config.subject}" / f"{config.run}-s{config.seed}" / "stage2"
    state_file, log_file, first_step, state = out / "state" / "state.pt", out / "log.jsonl", 0, None
    if config.batch_size % world:
        raise ValueError(f"--batch_size {config.batch_size} does not divide among {world} processes")
    if config.resume:
        if not state_file.is_file():
            raise FileNotFoundError(f"{state_file}: there is no checkpoint to resume; leave out --resume")
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        pairs = {f.name: (state["config"].get(f.name), getattr(config, f.name)) for f in fields(Config) if f.name not in MAY_CHANGE}
        if different := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
            raise ValueError(f"{state_file} was made with other settings (there, here): {different}")
    stage1 = find_stage1(config)
    before = json.loads((stage1 / "config.json").read_text())  # the settings of stage 1: voxels, losses, segments held out

    # ---- data
    with accelerator.main_process_first():  # the toy world is made by the first to ask
        train, test = (ClipDataset(config.data, config.subject, split, before["rois"]) for split in ("train", "test"))
        sizes = check_fit(stage1, train.sizes, VideoDecoder.from_pretrained(config.decoder, load_transformer=False))
        size = (config.frames, config.height, config.width)
        videos, test_videos = (
            DecoderData(config.data, config.decoder, split, size=size, subject=config.subject) for split in ("train", "test")
        )
    segments = np.array([clip["segment"] for clip in train.clips])
    held_out = np.isin(segments, (before["val_segments"] or "").split(","))
    frames, clips = mean_frames(train.e_img), np.flatnonzero(~held_out)
    threshold, quantiles = near_copy_threshold(frames, list(segments), mean_frames(test.e_img))
    if held_out.any():  # as in stage 1: nor may training see near-copies of what is held out
        clips = clips[(frames[clips] @ frames[held_out].T).max(1) <= threshold]
    total_steps = config.epochs * (len(clips) // config.batch_size)
    clips_of_step(clips, config.batch_size, config.seed, 0)  # refuses a batch of more clips than there are

    # ---- model
    heads = Stage1Heads.from_pretrained(stage1 / "heads").requires_grad_(False).eval()
    pool = MemoryPool(**memories(train, videos, heads.phi_v, clips), near_copy=threshold)
    allowed = (~pool.excluded(torch.arange(len(clips)))).sum(1)  # memories that a clip may retrieve in training
    if config.integration and allowed.min() < config.K:
        raise ValueError(
            f"the pool has {len(clips)} memories, of which neighbours and near-copies (cosine > {threshold:.4f}) leave a clip "
            f"{allowed.min()}; wanted K = {config.K}: a lower --K or more training clips"
        )
    accelerator.print(
        f"{len(clips):,} clips and memories; near-copies, not retrieved in training: cosine of mean frames > {threshold:.4f}; "
        f"a clip may retrieve {allowed.min():,} to {allowed.max():,} of them"
    )
    set_seed(config.seed)
    decoder = VideoDecoder.from_pretrained(
        config.decoder, config.lora_rank, config.lora_alpha, gradient_checkpointing=config.checkpointing,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    ).to(device)  # fmt: skip
    brain_model = BrainModel.from_pretrained(stage1 / "brain_model").train()
    brain_model.gradient_checkpointing, brain_model.dropout = config.checkpointing, nn.Identity()  # `hide_voxels` in its place
    if not config.integration:
        mom = DirectProjection(sizes["width"], decoder.text_width)
    elif not config.mom:
        mom = TopTextMemory(decoder.text_length, config.K)
    else:
        mom = MixtureOfMemories(
            decoder.text_length, sizes["width"], sizes["embed_dim"], decoder.text_width, config.K, config.heads, config.alpha,
            before["tau"], pool.text_rms(),
        )  # fmt: skip
    empty = torch.from_numpy(np.array(videos.empty)).to(device)
    parts = Parts(brain_model.to(device), heads.to(device), mom.to(device), decoder, pool.to(device), empty)
    weights = {"tau": before["tau"], "lambda_1": before["lambda_1"] * before["action"], "lambda_2": before["lambda_2"] * before["cls"]}

    # ---- optimiser
    lora = {name: p for name, p in decoder.named_parameters() if p.requires_grad}
    groups = [(brain_model.parameters(), config.lr), (mom.parameters(), config.lr_fusion), (lora.values(), config.lr_lora)]
    groups = [{"params": list(parameters), "lr": lr} for parameters, lr in groups]
    parameters = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [group["lr"] for group in groups], total_steps=total_steps)
    if state:
        brain_model.load_state_dict(state["brain_model"])
        mom.load_state_dict(state["mom"])
        for name, p in lora.items():
            p.data.copy_(state["lora"][name])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        first_step, state = state["step"], None
    counts = [sum(p.numel() for p in group["params"]) / 1e6 for group in groups]
    accelerator.print("trained, in M parameters: Brain Model {:,.2f}, fusion {:,.2f}, LoRA {:,.2f}".format(*counts))

    def save(step: int) -> None:
        state = {"brain_model": brain_model, "mom": mom, "optimiser": optimiser, "schedule": schedule}
        state = {name: part.state_dict() for name, part in state.items()}
        for name, module in (("brain_model", brain_model), ("mixture_of_memories", mom), ("heads", heads)):
            save_whole(out / name, module.save_pretrained)
        decoder.save_lora(out / "lora")
        with written_whole(state_file) as part:  # last: --resume from it writes the others anew
            torch.save(state | {"lora": lora, "step": step, "config": asdict(config)}, part)

    if chief:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config) | {"stage1_config": before}, indent=2) + "\n")
        near = {"threshold": threshold, "percent": PERCENT, "best_match": quantiles}  # DESIGN §6: "Eq. 5, training"
        (out / "near_copies.json").write_text(json.dumps(near, indent=1) + "\n")
        labels = {"xlabel": "highest cosine of a clip's mean frame to a memory's", "ylabel": "% of the clips below"}
        title = f"near-copies, not retrieved in training: cosine > {threshold:.4f}"
        picture(out / "near_copies.png", {name: (x, PERCENT) for name, x in quantiles.items()}, title=title, **labels)
        lines = list(open(log_file)) if config.resume and log_file.is_file() else []  # a killed process may leave half a line
        log_file.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step))
        board = SummaryWriter(str(out), purge_step=first_step)
        # To look at, not to choose by: the segments held out where there are some, else test clips
        data, y, where = (train, videos, np.flatnonzero(held_out)) if held_out.any() else (test, test_videos, np.arange(len(test)))
        some = np.linspace(0, len(where) - 1, min(config.samples, len(where))).round().astype(int)
        shown = data.averaged(where)[some], np.array(y.latents[where[some]]), SECONDS[config.data]

    # ---- loop
    share = slice(rank * config.batch_size // world, (rank + 1) * config.batch_size // world)  # of a process
    progress = tqdm(range(first_step, total_steps), initial=first_step, total=total_steps, desc="stage 2", disable=not chief)
    for step in progress:
        chosen = clips_of_step(clips, config.batch_size, config.seed, step)[share]
        batch = {name: value.to(device) for name, value in train.batch(chosen, config.seed, step).items()}
        batch["x"] = hide_voxels(batch["x"], sizes["dropout"], config.seed, step, chosen)
        batch["y"] = torch.from_numpy(videos.latents[chosen])
        memory = torch.from_numpy(np.searchsorted(clips, chosen)).to(device)  # the clips' indices in the pool
        row = losses_and_gradients(
            parts, batch, chosen, memory, weights, config.seed, step, config.micro_batch, config.condition_dropout, accelerator.autocast
        )
        if world > 1:  # once a step, after every backward
            for p in parameters:
                p.grad = accelerator.reduce(p.grad, "mean")
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        if not norm.isfinite():
            raise ValueError(f"step {step}: the gradient is {norm}, training diverged ({log_file}); train anew with a lower --lr")
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()

        last = step + 1 == total_steps
        if step % config.log_every == 0 or last:
            mean = accelerator.reduce(torch.stack(list(row.values())), "mean").tolist()  # of the whole batch
            row = dict(zip(row, mean, strict=True)) | {"norm": norm.item(), "lr": schedule.get_last_lr()[0]}
            if chief:
                with open(log_file, "a") as log:
                    log.write(json.dumps({"step": step} | row) + "\n")
                for name, value in row.items():
                    board.add_scalar(f"stage2/{name}", value, step)
                progress.set_postfix(loss=f"{row['loss']:.3f}", diffusion=f"{row['diffusion']:.3f}")
        if chief and ((step + 1) % config.save_every == 0 or last):
            save(step + 1)
        if chief and config.sample_every and ((step + 1) % config.sample_every == 0 or last):
            show(parts, config, *shown, out / "samples" / f"step-{step + 1:06d}.gif")
        accelerator.wait_for_everyone()

    if chief:
        rows = [json.loads(line) for line in open(log_file)]
        names = {"diffusion": "diffusion, Eq. 9", "image": "image", "text": "text", "action": "action", "category": "category"}
        curves = {label: ([row["step"] for row in rows], [row[name] for row in rows]) for name, label in names.items()}
        picture(out / "losses.png", curves, xlabel="step", ylabel="loss", yscale="log", title="Stage 2: the parts of Eq. 10")
        board.close()
        print(f"\nwritten: {out}/ (brain_model, mixture_of_memories, heads, lora, samples, losses.png, near_copies.png, log.jsonl)")
        print(f"next: python evaluate.py --data {config.data} --subject {config.subject} --run {config.run} --seed {config.seed}")
    accelerator.end_training()
    return json.loads(log_file.read_text().splitlines()[-1])


if __name__ == "__main__":
    diffusers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(parse(sys.argv[1:]))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")

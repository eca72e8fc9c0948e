"""Stage 2 (§3.2, Eq. 10): teach the Mixture-of-Memories and the video decoder to show what was watched.

    python train_stage2.py                                 the toy world, about four minutes on a laptop
    python train_stage2.py --data cc2017 --subject 1       the paper's size, on a GPU
    accelerate launch train_stage2.py --data cc2017        on several
    python train_stage2.py --data cc2017 --plan            memory, hours and disk, counted (docs/gpus.md)

Brain Model and heads of stage 1, and of each clip its fMRI x, embeddings and latents y  ->  Brain Model,
Mixture-of-Memories and LoRA in runs/<data>/sub<K>/<run>-s<seed>/stage2/, samples (stimulus beside
reconstruction), pictures of what is learnt. After Ctrl-C, or a kill, the same command goes on where it was.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from brain_model import BrainModel
from data import ClipDataset, DecoderData, Split, clips_of_step, held_out_clips, hide_voxels, memories, untold
from extras import steps
from heads import Stage1Heads, stage1_loss
from mixture_of_memories import MemoryPool, condition, make_mom
from prepare.command import prepare_toy
from prepare.facts import SCENE_CLIPS, SECONDS
from support import experiment, training
from support.experiment import RunFolder, Stopping
from support.options import option, parse as parse_options, settings_of
from support.pictures import grid_gif, loss_curves, near_copies
from support.readers import load_model
from video_decoder import WAN, VideoDecoder, clip_generator, condition_dropout, draw


@dataclass
class Config:
    """The defaults are the paper's (§4.1) where it gives them; PRESETS holds what differs on a dataset."""

    data: str = option("toy", "toy, cc2017 or cinebrain")
    subject: int = option(1, "number of the subject", least=1)
    run: str | None = option(None, "name of the run (none: stage 1's, and what an ablation switch implies)")
    stage1: str | None = option(None, "run whose stage 1 to start from, name or folder (none: this, or full)")
    seed: int = option(0, "of the first weights and of all that is drawn", least=0, most=2**32 - 1)
    mom: bool = option(True, "Mixture-of-Memories; without, the top-1 text alone conditions (Table 4)")
    integration: bool = option(True, "retrieval and integration; without, f_e conditions directly (Table 6)")
    decoder: str = option(WAN, "text-to-video model of diffusers: a folder or a name on the Hub")
    frames: int = option(57, "of a video", least=1)
    height: int = option(624, "of a video, in pixels", least=1)
    width: int = option(624, "of a video, in pixels", least=1)
    lora_rank: int = option(16, "of the LoRA", least=1)
    lora_alpha: float = option(16, "scaling factor of the LoRA", above=0)
    K: int = option(5, "memories retrieved", least=1)
    own_captions: float | None = option(None, "share that may retrieve their own caption", least=0, most=1)
    alpha: float = option(1.0, "weight of z_f, Eq. 8")
    attention_heads: int = option(16, "of the integration, Eq. 6", least=1)
    residual: bool = option(False, "add f_e to what Eq. 6 attends to; the paper does not")

    epochs: int = option(20, "times that each clip is shown", least=1)
    batch_size: int = option(32, "clips a step, over all processes", least=1)
    micro_batch: int = option(1, "clips that are in the decoder at once", least=1)
    checkpointing: bool = option(True, "recompute blocks in the backward pass, in less memory")
    optimizer: str = option("adamw", "adamw, or adamw8bit for the Brain Model", choices=training.OPTIMIZERS)
    compile: bool = option(False, "compile the blocks of Brain Model and DiT")
    attention_kernel: str = option("auto", "of torch, on CUDA", choices=training.KERNELS)
    lr: float = option(1e-6, "highest learning rate of OneCycle, of Brain Model and router", above=0)
    lr_fusion: float | None = option(None, "of Eq. 6-7, or of --no-integration's Linear (none: lr)", above=0)
    lr_lora: float = option(1e-4, "of the LoRA", above=0)
    weight_decay: float = option(0.01, "of AdamW", least=0)
    max_norm: float = option(1.0, "highest norm of the gradient", above=0)
    condition_dropout: float = option(0.1, "share of the clips that get the empty prompt", least=0, most=1)
    noise_shift: float = option(1.0, "of the diffusion time; above 1, noisier (1: the decoder's)", above=0)

    guidance: float = option(5.0, "classifier-free guidance of the samples", least=0)
    sampling_steps: int = option(50, "of the samples", least=1)
    samples: int = option(2, "held-out clips to show every time", least=1)
    sample_every: int = option(500, "steps between samples; 0 for none", least=0)
    save_every: int = option(500, "steps between checkpoints", least=1)
    log_every: int = option(10, "steps between lines of log.jsonl", least=1)
    plan: bool = option(False, "print memory, hours and disk of these options, counted, and write nothing")


PRESETS = {
    "toy": dict(
        decoder="toy/wan", epochs=10, batch_size=16, frames=17, height=64, width=64, K=50, attention_heads=4,
        micro_batch=16, checkpointing=False, lr=1e-4, lr_fusion=5e-3, noise_shift=5.0, guidance=3.0,
        sampling_steps=16, samples=6, sample_every=600, save_every=300,
    ),
    "cc2017": {},
    "cinebrain": dict(frames=33, height=480, width=720),
}  # fmt: skip
MAY_CHANGE = (*training.MAY_CHANGE, "samples", "sample_every")
TEXT = (str, type(None))
STAGE1 = {  # what stage 2 reads in the config.json of a stage 1
    "data": str, "subject": int, "rois": TEXT, "val_segments": TEXT, "sizes": dict, "tau": float,
    "lambda_1": float, "lambda_2": float, "action": bool, "cls": bool,
}  # fmt: skip


def parse(argv: list[str]) -> Config:
    """The command line over the dataset's preset over the defaults."""
    config = parse_options(Config, PRESETS, __doc__, "train_stage2.py", argv)
    if not (config.mom or config.integration):
        raise ValueError("--no-mom and --no-integration are two ablations: choose one")
    named = Path(config.stage1).name.removesuffix(f"-s{config.seed}") if config.stage1 else "full"
    config.stage1 = config.stage1 or config.run or named
    ablation = ("" if config.mom else "-no-mom") + ("" if config.integration else "-no-integration")
    config.run = config.run or named + ablation
    config.lr_fusion = config.lr_fusion or config.lr
    return config


class Parts(NamedTuple):
    brain_model: BrainModel
    heads: Stage1Heads  # frozen
    mom: nn.Module  # MixtureOfMemories, or what an ablation has in its place
    decoder: VideoDecoder
    pool: MemoryPool
    empty: Tensor  # (L, D_txt)
    untold: float = 0.0  # share of the training clips that may not retrieve a caption like their own


def losses_and_gradients(
    parts: Parts, x: Tensor, y: Tensor, targets: dict[str, Tensor], clips: np.ndarray, memory: Tensor,
    excluded: Tensor, weights: dict[str, float], seed: int, step: int, micro_batch: int, dropout: float,
    autocast, mean_clips: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Eq. 10 of a batch; its gradients are added to .grad. Returns what is logged.

    Brain Model and MoM see the batch whole, as InfoNCE wants, the DiT `micro_batch` clips at a time: each
    leaves its share of Eq. 9's gradient in f.grad, and one backward pass leads it through the rest.
    x (B, T, N); y (B, C, f, h, w); targets and weights of Eq. 3; clips (B,) in the dataset, memory (B,) in
    the pool, excluded (B, N) of it. mean_clips, of a process: so the mean of all gradients is the batch's.
    """
    brain_model, heads, mom, decoder, pool, empty, _ = parts
    recalled = training.recomputed(condition, brain_model.gradient_checkpointing)  # the DiT has its memory
    with autocast():
        f_c, remembered = recalled(brain_model, heads, mom, pool, x, excluded)  # (B, D), Eq. 4-8
        stage1 = stage1_loss(heads, f_c, **targets, **weights)  # Eq. 3
    f_fuse = remembered.f_fuse.float()  # (B, L, D_txt)
    f = f_fuse.detach().requires_grad_()  # (B, L, D_txt)

    diffusion = 0
    for part in training.parts(len(clips), micro_batch):
        noise, u, dropped = draw(seed, step, clips[part], y.shape[1:], dropout)
        with autocast():
            f_part = condition_dropout(f[part], empty, dropped)  # (b, L, D_txt)
            loss = decoder(y[part].to(f.device), f_part, noise, u).sum() / mean_clips  # Eq. 9
        loss.backward()
        diffusion = diffusion + loss.detach()
    # The gradient of (stage1.loss + diffusion).backward() on one graph: f.grad holds ∂diffusion/∂f_fuse
    (stage1.loss + (f_fuse * f.grad).sum()).backward()  # Eq. 10

    logged = stage1._asdict() | {"loss": stage1.loss + diffusion, "diffusion": diffusion}
    for name, value in remembered.measures(pool, memory).items():
        logged[name] = value * len(clips) / mean_clips
    return {name: value.detach().float() for name, value in logged.items()}


@torch.no_grad()
def show(
    parts: Parts, config: Config, accelerator: Accelerator, gif: Path,
    data: ClipDataset, videos: DecoderData, where: np.ndarray,
) -> None:  # fmt: skip
    """A GIF of held-out clips, a row each: the stimulus after the VAE's round trip, the reconstruction."""
    brain_model, heads, mom, decoder, pool, empty, _ = parts
    brain_model.eval()
    some = np.linspace(0, len(where) - 1, min(config.samples, len(where))).round().astype(int)
    own = experiment.share(some, accelerator.process_index, accelerator.num_processes)
    fmri, rows = data.averaged(where)[some], []
    for part in torch.arange(len(some))[own].split(config.micro_batch):
        f_fuse = condition(brain_model, heads, mom, pool, fmri[part].to(empty.device))[1].f_fuse
        how = [clip_generator(config.seed, i) for i in part.tolist()], config.sampling_steps, config.guidance
        made = decoder.generate(f_fuse, empty, config.frames, config.height, config.width, *how)
        stimuli = decoder.decode_latents(torch.from_numpy(videos.latents[where[some[part.numpy()]]]))
        rows += [[*pair] for pair in zip(stimuli.numpy(), made.numpy(), strict=True)]  # (F, H, W, 3) each
    brain_model.train()
    rows = gather_object(rows) if accelerator.num_processes > 1 else rows
    labels = [[data.clips[clip]["caption"], ""] for clip in where[some]]
    if accelerator.is_main_process:
        grid_gif(gif, rows, labels, ["stimulus", "reconstruction"], SECONDS[config.data], 128)


def main(config: Config) -> None:
    """Stage 1, the data and the folder of the run; `learn` does the rest where the run is not finished."""
    name, subject, size = config.data, config.subject, (config.frames, config.height, config.width)
    runs = Path("runs") / name / f"sub{subject}"
    places = [runs / f"{config.stage1}-s{config.seed}" / "stage1", Path(config.stage1) / "stage1"]
    if config.plan:
        return steps.print_stage2(config, places, Parts, losses_and_gradients)
    accelerator = experiment.start()
    if config.batch_size < accelerator.num_processes:
        raise ValueError(f"--batch_size {config.batch_size}: wanted at least a clip for each process")
    options = f"--data {name} --subject {subject} --seed {config.seed} --run {config.stage1}"
    mend = f"python train_stage1.py {options}, or another --stage1"
    stage1, before = experiment.finished_run(places, {"data": name, "subject": subject}, STAGE1, mend)
    with accelerator.main_process_first():
        if name == "toy":
            prepare_toy(decoder=config.decoder, size=size, subject=subject)
    train, test = (ClipDataset(name, subject, part, before["rois"]) for part in ("train", "test"))
    if before["sizes"] != train.sizes:
        mend = "train it again, or choose the stage 1 of this subject, --rois and encoders with --stage1"
        raise ValueError(f"{stage1}: trained on data of {before['sizes']}, data/ has {train.sizes}: {mend}")
    videos = DecoderData(name, config.decoder, "train", size=size, subject=subject)
    split = held_out_clips(train, test, before["val_segments"])
    clips_of_step(split.clips, config.batch_size, config.seed, 0)  # refuses a batch of more clips than these
    shown = train, videos, split.held_out
    if not len(split.held_out):
        test_videos = DecoderData(name, config.decoder, "test", size=size, subject=subject)
        shown = test, test_videos, np.arange(len(test))

    folder = experiment.run_folder(name, subject, config.run, config.seed) / "stage2"
    settings = settings_of(config, "plan") | {"sizes": train.sizes, "stage1_config": before}
    total = config.epochs * (len(split.clips) // config.batch_size)
    with RunFolder(folder, settings, total, "losses.png", MAY_CHANGE, accelerator.is_main_process) as run:
        if run.finished:
            accelerator.print(f"{folder} is finished; another --run NAME or --seed trains anew")
        else:
            steps.refuse_stage2(config, stage1, train.sizes, Parts, losses_and_gradients)
            parts = load_parts(config, accelerator, stage1, before["tau"], train, videos, split)
            learn(config, accelerator, run, parts, train, videos, split, shown)
    accelerator.end_training()


def load_parts(
    config: Config, accelerator: Accelerator, stage1: Path, tau: float,
    train: ClipDataset, videos: DecoderData, split: Split,
) -> Parts:  # fmt: skip
    """Stage 1's Brain Model and heads, the memories, a Mixture-of-Memories and a LoRA at their start."""
    heads = load_model(Stage1Heads, stage1 / "heads").requires_grad_(False).eval()
    fields = memories(train, videos, heads.phi_v, split.clips)
    pool = MemoryPool(**fields, near_copy=split.threshold, scene=SCENE_CLIPS)
    told = split.told if config.own_captions is None else config.own_captions
    hidden, fewest, most = pool.untold_share(told)
    said = f"{len(pool.e):,} clips and memories; a clip may retrieve {fewest:,} to {most:,} of them"
    if config.integration and fewest < config.K:
        raise ValueError(f"{said}; wanted K = {config.K}: a lower --K or more training clips")
    said += f", no near-copies (cosine of mean frames > {split.threshold:.4f}), its own caption in "
    accelerator.print(f"{said}{1 - hidden:.1%} of the steps (test clips: {split.told:.1%})")

    set_seed(config.seed)
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    decoder = VideoDecoder.from_pretrained(
        config.decoder, config.lora_rank, config.lora_alpha, dtype=dtype, tiling=config.height > 256,
        load_vae=config.sample_every > 0, gradient_checkpointing=config.checkpointing,
    )  # fmt: skip
    decoder.noise_shift = config.noise_shift
    brain_model = load_model(BrainModel, stage1 / "brain_model").train()
    brain_model.gradient_checkpointing = config.checkpointing
    L, D_txt, width = decoder.text_length, decoder.text_width, brain_model.norm.normalized_shape[0]
    mom = make_mom(config, L, width, train.sizes["embed_dim"], D_txt, tau, pool.text_rms())
    training.compile_blocks(config.compile, brain_model.blocks, decoder.transformer)
    training.choose_attention(config.attention_kernel, accelerator, decoder.config["attention_head_dim"])
    parts = brain_model, heads, mom, decoder, pool, torch.from_numpy(np.array(videos.empty))
    return Parts(*(part.to(accelerator.device) for part in parts), hidden)


def learn(
    config: Config, accelerator: Accelerator, run: RunFolder, parts: Parts,
    train: ClipDataset, videos: DecoderData, split: Split, shown: tuple,
) -> None:  # fmt: skip
    """§3.2, from the first step or the last checkpoint to the last sample, of the clips `shown`."""
    device, chief, seed = accelerator.device, accelerator.is_main_process, config.seed
    brain_model, heads, mom, decoder, *_ = parts

    # ---- AdamW and OneCycle (§4.1)
    lora = nn.ParameterList(p for p in decoder.parameters() if p.requires_grad)
    router = getattr(mom, "router", nn.Identity())  # slow: a fast one ends on one modality
    integration = getattr(mom, "integration", mom)
    rates = {brain_model: config.lr, router: config.lr, integration: config.lr_fusion, lora: config.lr_lora}
    groups = [{"params": [*part.parameters()], "lr": lr} for part, lr in rates.items()]
    optimiser = training.adamw(config.optimizer, groups, config.weight_decay, in_8_bit=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [*rates.values()], total_steps=run.total)
    state = {"brain_model": brain_model, "mom": mom, "lora": lora}
    state |= {"optimiser": optimiser, "schedule": schedule}
    models = {"brain_model": brain_model.save_pretrained, "mixture_of_memories": mom.save_pretrained}
    models |= {"heads": heads.save_pretrained, "lora": decoder.save_lora}
    first_step = run.restore(state)

    # ---- Eq. 10, step by step
    before = run.settings["stage1_config"]
    weights = {"tau": before["tau"], "lambda_1": before["lambda_1"] * before["action"]}
    weights["lambda_2"] = before["lambda_2"] * before["cls"]
    own = experiment.share(range(config.batch_size), accelerator.process_index, accelerator.num_processes)
    mean_clips = config.batch_size / accelerator.num_processes
    how = config.micro_batch, config.condition_dropout, accelerator.autocast, mean_clips
    progress = {"desc": "stage 2", "initial": first_step, "total": run.total, "disable": not chief}
    with Stopping() as stopping, tqdm(range(first_step, run.total), **progress) as bar:
        for step in bar:
            whole_batch = clips_of_step(split.clips, config.batch_size, seed, step)
            clips = whole_batch[own]
            batch = {name: value.to(device) for name, value in train.batch(clips, seed, step).items()}
            x = hide_voxels(batch.pop("x"), brain_model.dropout, seed, step, clips)  # (B, T, N)
            y = torch.from_numpy(videos.latents[clips])  # (B, C, f, h, w)
            memory = torch.from_numpy(np.searchsorted(split.clips, clips)).to(device)  # (B,) in the pool
            excluded = parts.pool.excluded(memory, untold(parts.untold, seed, step, clips).to(device))
            row = losses_and_gradients(parts, x, y, batch, clips, memory, excluded, weights, seed, step, *how)
            ids = [train.clips[clip]["id"] for clip in whole_batch]
            norm = training.update(accelerator, optimiser, schedule, config.max_norm, step, ids)

            done, stop = step + 1, stopping.asked(accelerator)
            saving = stop or done % config.save_every == 0 or done == run.total
            if saving or step % config.log_every == 0:
                row = training.logged(accelerator, row)  # of the whole batch
                row |= {"norm": norm, "lr": schedule.get_last_lr()[0]}
                if chief:
                    run.log(step, row)
                    bar.set_postfix(loss=f"{row['loss']:.3f}", diffusion=f"{row['diffusion']:.3f}")
            if chief and saving:
                run.save(done, state, models)
            if config.sample_every and done % config.sample_every == 0 and done < run.total and not stop:
                show(parts, config, accelerator, run.folder / "samples" / f"step-{done:06d}.gif", *shown)
            accelerator.wait_for_everyone()
            if stop:
                raise stopping.stopped(done, run.total)

    # ---- what it has learnt
    if config.sample_every:
        show(parts, config, accelerator, run.folder / "samples" / f"step-{run.total:06d}.gif", *shown)
    if chief:
        near_copies(run.folder, split.threshold, split.best_match, split.told, parts.untold)
        names = {"diffusion": "diffusion, Eq. 9", "w_txt": "W_r, text", "w_img": "W_r, image"}
        names |= {"w_act": "W_r, action", "z_f/z_t": "‖α z_f‖ / ‖z_t‖"}
        log = experiment.read_log(run.log_file)
        loss_curves(run.folder / "losses.png", log, names, "Stage 2: what Eq. 9 teaches")
        options = f"--data {config.data} --subject {config.subject} --run {config.run} --seed {seed}"
        print(f"\nwritten: {run.folder}/ (samples, losses.png)\nnext: python evaluate.py {options}")


if __name__ == "__main__":
    experiment.door(lambda: main(parse(sys.argv[1:])))

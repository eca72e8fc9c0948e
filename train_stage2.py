"""Stage 2 (§3.2, Eq. 10): teach the Mixture-of-Memories and the video decoder to show what was watched.

    python train_stage2.py                                 the toy world, two or three minutes on a laptop
    python train_stage2.py --data cc2017 --subject 1       the paper's size, on a GPU
    accelerate launch train_stage2.py --data cc2017        on several

Brain Model and heads of stage 1, and of each clip its fMRI x, embeddings and latents y  ->  a finished model
in runs/<data>/sub<S>/<run>-s<seed>/stage2/, which evaluate.CineNeuron loads: Brain Model, heads,
Mixture-of-Memories, LoRA, memories; samples (stimulus beside reconstruction), a picture of what is learnt.
After Ctrl-C, or a kill, the same command goes on where it was."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from data import TIMES, Batch, Clips
from evaluate import CineNeuron
from heads import stage1_loss
from mixture_of_memories import Recalled
from prepare.facts import SECONDS, VIDEO_OPTIONS
from support import shared, training
from support.options import check_together, option, parse as parse_options, settings_of
from support.pictures import grid_gif
from support.pipelines import WAN
from support.runs import RunFolder, door, run_folder


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

    epochs: int = option(20, "epochs, each without the remainder of a batch", least=1)
    batch_size: int = option(32, "clips a step, over all processes", least=1)
    micro_batch: int = option(1, "clips that are in the decoder at once", least=1)
    checkpointing: bool = option(True, "recompute blocks in the backward pass, in less memory")
    optimizer: str = option("adamw", "adamw, or adamw8bit for the Brain Model", choices=training.OPTIMIZERS)
    precision: str | None = option(None, "bf16 or fp32; none: by device", choices=training.PRECISIONS)
    device: str | None = option(None, "cpu, cuda or mps; none: cuda, else cpu", choices=training.DEVICES)
    compile: bool = option(False, "compile the blocks of Brain Model and DiT")
    lr: float = option(1e-6, "highest learning rate of OneCycle, of Brain Model and router", above=0)
    lr_fusion: float | None = option(None, "of Eq. 6-7, or of --no-integration's Linear (none: lr)", above=0)
    lr_lora: float = option(1e-4, "of the LoRA", above=0)
    weight_decay: float = option(0.01, "of AdamW", least=0)
    max_norm: float = option(1.0, "highest norm of the gradient", above=0)
    condition_dropout: float = option(0.1, "share of the clips that get the empty prompt", least=0, most=1)
    time_sampling: str = option("uniform", "of the diffusion time, before its shifts", choices=TIMES)
    noise_shift: float = option(1.0, "of the diffusion time; above 1, noisier (1: the decoder's)", above=0)

    guidance: float = option(5.0, "classifier-free guidance of the samples", least=0)
    sampling_steps: int = option(50, "of the samples", least=1, most=1000)
    samples: int = option(2, "held-out clips to show every time", least=1)
    sample_every: int = option(500, "steps between samples; 0 for none", least=0)
    save_every: int = option(500, "steps between checkpoints", least=1)
    log_every: int = option(10, "steps between lines of log.jsonl", least=1)


PRESETS = VIDEO_OPTIONS | {
    "toy": dict(
        decoder="toy/wan", epochs=10, batch_size=16, frames=17, height=64, width=64, K=50, attention_heads=4,
        micro_batch=16, checkpointing=False, lr=1e-4, lr_fusion=5e-3, noise_shift=5.0, guidance=3.0,
        sampling_steps=16, samples=6, sample_every=600, save_every=300,
    ),
}  # fmt: skip
UNUSED = {  # option: the ablations that do not use it
    "K": ["no-integration"],
    "own_captions": ["no-integration"],
    "lr_fusion": ["no-mom"],
    "alpha": ["no-mom", "no-integration"],
    "attention_heads": ["no-mom", "no-integration"],
}
LAST = "losses.png"  # the last file that a run writes
MAY_CHANGE = (*training.MAY_CHANGE, "samples", "sample_every")
CURVES = {"diffusion": "diffusion, Eq. 9", "w_txt": "W_r, text", "w_img": "W_r, image"}
CURVES |= {"w_act": "W_r, action", "z_f/z_t": "‖α z_f‖ / ‖z_t‖"}


def parse(arguments: list[str]) -> Config:
    """The command line over the dataset's preset over the defaults."""
    config = parse_options(Config, PRESETS, __doc__, "train_stage2.py", arguments)
    if not (config.mom or config.integration):
        raise ValueError("--no-mom and --no-integration are two ablations: choose one")
    usual = settings_of(Config(**PRESETS[config.data]))
    check_together(config, UNUSED, {}, usual)
    if not config.sample_every and config.samples != usual["samples"]:
        raise ValueError(f"--samples {config.samples} with --sample_every 0, which shows none")
    name = Path(config.stage1).name.removesuffix(f"-s{config.seed}") if config.stage1 else "full"
    config.stage1 = config.stage1 or config.run or name
    ablation = ("" if config.mom else "-no-mom") + ("" if config.integration else "-no-integration")
    config.run = config.run or name + ablation
    config.lr_fusion = config.lr_fusion or config.lr
    return config


def train_step(model: CineNeuron, batch: Batch, config: Config) -> tuple[dict[str, Tensor], Recalled]:
    r"""Eq. 10: $L_{stage2} = L_{stage1} + L(\theta)$ of a batch of B clips; its gradients are added to .grad.

    InfoNCE needs all B clips at once, but the video decoder has no room for them. So it sees a few clips at
    a time; their backward passes leave gradients of Eq. 9 in the LoRA and at f_fuse. One backward pass then
    carries those at f_fuse through Mixture-of-Memories and Brain Model. The result equals (L_stage1 +
    L_diffusion).backward(). Returns the losses."""
    with training.autocast(batch.x, config.precision):
        f_c, recalled = model(batch.x, batch.excluded)  # (B, D), Eq. 4-8
        losses = stage1_loss(model.heads, f_c, batch, model.tau, model.lambda_1, model.lambda_2)  # Eq. 3
    f_fuse = recalled.f_fuse.float()  # (B, L, D_txt)
    leaf = f_fuse.detach().requires_grad_()  # (B, L, D_txt), gathers the gradient of Eq. 9
    diffusion = 0
    for part in batch.parts(config.micro_batch):  # b clips
        with training.autocast(batch.x, config.precision):
            prompt = torch.where(batch.dropped[part], model.empty, leaf[part])  # (b, L, D_txt)
            noise, u = batch.noise[part], batch.u[part]  # (b, C, f, h, w), (b,)
            error = model.decoder.diffusion_loss(batch.y[part], prompt, noise, u)  # (b,)
        loss = error.sum() / len(batch.x)  # this part's share of Eq. 9
        loss.backward()
        diffusion = diffusion + loss.detach()
    surrogate = (f_fuse * leaf.grad).sum()  # its gradient is that of Eq. 9; its value means nothing
    (losses.loss + surrogate).backward()  # with what the loop left in the LoRA: the gradient of Eq. 10
    loss = losses.loss + diffusion  # Eq. 10, its value
    return losses._asdict() | {"loss": loss, "diffusion": diffusion}, recalled


def measures(model: CineNeuron, recalled: Recalled) -> dict[str, Tensor]:
    """What the log holds beside the losses: the mean W_r (Eq. 4), and ‖α z_f‖ / ‖z_t‖: how much what the fMRI
    finds counts in Eq. 8."""
    if recalled.W_r is None:
        return {}
    w_txt, w_img, w_act = recalled.W_r.mean(0)
    values = {"w_txt": w_txt, "w_img": w_img, "w_act": w_act}
    if recalled.z_f is not None:
        z_f, z_t = recalled.z_f.detach().float(), recalled.z_t.detach().float()
        values["z_f/z_t"] = (model.mom.integration.alpha * z_f).norm() / z_t.norm()
    return values


@torch.no_grad()
def sample(model: CineNeuron, config: Config, accelerator: Accelerator, clips: Clips, file: Path) -> None:
    """A GIF of held-out clips, a row each: the stimulus after the VAE's round trip, the reconstruction."""
    n = len(clips.held_out)
    places = np.linspace(0, n - 1, min(config.samples, n)).round().astype(int)
    x = clips.averaged(clips.held_out)[places]  # (samples, T, N)
    shown, rows = clips.held_out[places], []
    shares = np.array_split(np.arange(len(places)), accelerator.num_processes)
    share = torch.from_numpy(shares[accelerator.process_index])  # neighbours: gathered, all stand in order
    for part in share.split(config.micro_batch) if len(share) else ():
        videos = model.reconstruct(x[part], [(config.seed, i) for i in part.tolist()])
        stimuli = model.decoder.decode_latents(torch.from_numpy(clips.latents[shown[part.numpy()]]))
        rows += [[*pair] for pair in zip(stimuli.numpy(), videos, strict=True)]  # (F, H, W, 3) each
    rows = gather_object(rows) if accelerator.num_processes > 1 else rows
    labels = [[clips.lines[clip]["caption"], ""] for clip in shown]
    if accelerator.is_main_process:
        grid_gif(file, rows, labels, ["stimulus", "reconstruction"], SECONDS[config.data], 128)


def main(config: Config) -> None:
    """Stage 1, the clips and the folder of the run; `learn` does the rest where the run is not finished."""
    accelerator = training.start(config.device)
    training.check_processes(config.batch_size, accelerator)
    stage1, settings, train = starting_point(config, accelerator)
    test = Clips(config.data, config.subject, "test", train.rois, train.decoder, train.size)
    folder = run_folder(config.data, config.subject, config.run, config.seed) / "stage2"
    total = config.epochs * (len(train.trained) // config.batch_size)
    with RunFolder(folder, settings, total, LAST, accelerator, MAY_CHANGE) as run:
        if not run.finished:
            learn(config, run, CineNeuron.from_stage1(stage1, settings, train), train, test)
    accelerator.end_training()


def starting_point(config: Config, accelerator: Accelerator) -> tuple[Path, dict, Clips]:
    """The folder of the finished stage 1, the settings of the run, and the training clips."""
    config.precision = training.precision_of(config, accelerator.device)
    stage1, stage1_config = read_stage1(config)
    rois, size = stage1_config["rois"], (config.frames, config.height, config.width)
    if config.data == "toy":
        from toy.release import prepare_toy

        with accelerator.main_process_first():
            prepare_toy(decoder=config.decoder, size=size, subject=config.subject)
    train = Clips(
        config.data,
        config.subject,
        "train",
        rois,
        config.decoder,
        size,
        seed=config.seed,
        batch_size=config.batch_size,
        voxel_dropout=stage1_config["dropout"],
        condition_dropout=config.condition_dropout,
        time_sampling=config.time_sampling,
        val_segments=stage1_config["val_segments"],
        caption_share=config.own_captions,
    )
    return stage1, settings_of(config) | {"sizes": train.sizes, "stage1_config": stage1_config}, train


def read_stage1(config: Config) -> tuple[Path, dict]:
    """The folder of the finished stage 1, and its config.json."""
    runs = Path("runs") / config.data / f"sub{config.subject}"
    places = [runs / f"{config.stage1}-s{config.seed}" / "stage1", Path(config.stage1) / "stage1"]
    options = f"--data {config.data} --subject {config.subject} --seed {config.seed} --run {config.stage1}"
    advice = f"python train_stage1.py {options}, in {Path.cwd()}, or another --stage1"
    settings = {"data": config.data, "subject": config.subject}
    return shared.finished_run(places, settings, shared.STAGE1, advice)


def learn(config: Config, run: RunFolder, model: CineNeuron, train: Clips, test: Clips) -> None:
    """§4.1: AdamW and OneCycle at one rate, 1e-6. Here Eq. 6-7 and the LoRA may have their own (a choice)."""
    accelerator = run.accelerator
    model.to(accelerator.device)

    # ---- AdamW and OneCycle (§4.1)
    lora = nn.ParameterList(p for p in model.decoder.parameters() if p.requires_grad)
    router = getattr(model.mom, "router", nn.Identity())  # neither ablation has one
    fusion = getattr(model.mom, "integration", model.mom)  # --no-integration: its Linear; --no-mom: nothing
    groups = [
        (model.brain_model.parameters(), config.lr),
        (router.parameters(), config.lr),  # with a faster one W_r ends on one modality (docs/integration.md)
        (fusion.parameters(), config.lr_fusion),
        (lora, config.lr_lora),
    ]
    optimiser, schedule = training.adamw_onecycle(groups, config.optimizer, config.weight_decay, run.total)
    if config.compile:
        training.compile_blocks(model.brain_model.blocks, model.decoder.transformer)
    held_out = train if len(train.held_out) else test
    parts = {"brain_model": model.brain_model, "mom": model.mom, "lora": lora}
    run.restore(
        state=parts | {"optimiser": optimiser, "schedule": schedule},
        models=shared.writers(model),
        write_once=lambda folder: shared.write_memories(folder, model),
        sample=lambda file: sample(model, config, accelerator, held_out, file),
    )
    accelerator.print(train.recall.describe())

    # ---- Eq. 10, step by step
    for step in run.steps():
        batch = train.batch(step, accelerator.process_index, accelerator.num_processes)
        batch = batch.to(accelerator.device)
        losses, recalled = train_step(model, batch, config)  # Eq. 10
        update = training.update(optimiser, schedule, config.max_norm)  # mean over processes, clipped, AdamW
        run.after_step(step, losses | measures(model, recalled), update)

    if accelerator.is_main_process:
        run.finish(CURVES, "Stage 2: what Eq. 9 teaches")
        options = f"--data {config.data} --subject {config.subject} --run {config.run} --seed {config.seed}"
        print(f"\nwritten: {run.folder}/ (samples, losses.png)\nnext: python evaluate.py {options}")


if __name__ == "__main__":
    door(lambda: main(parse(sys.argv[1:])))

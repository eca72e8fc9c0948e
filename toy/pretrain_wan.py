"""Pretrains toy/wan, a text-to-video model of the real Wan classes, small enough to train on two cores.

toy/wan/{vae,text_encoder,tokenizer,transformer,scheduler}, fp16, loads with
`WanPipeline.from_pretrained("toy/wan")`. Only the 752 combinations of attributes that training may show are
used; the gates are measured on the 160 held out.

    python -m toy.pretrain_wan toy/wan [--only vae|dit|classifier|gates]
"""

import argparse
import copy
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from toy.world import (
    ACTIONS,
    BACKGROUNDS,
    COLOURS,
    FRAMES,
    SHAPES,
    SIZE,
    Clip,
    combinations,
    coverage,
    random_clip,
    render,
)

PROCESSES = 2  # of one thread each
Z_DIM, TEXT_LENGTH = 8, 16
ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "action": ACTIONS, "background": tuple(BACKGROUNDS)}


def random_clips(pool: list[tuple], count: int, rng: np.random.Generator) -> list[Clip]:
    return [random_clip(pool[i], rng) for i in rng.integers(len(pool), size=count)]


def to_video(clips: list[Clip]) -> torch.Tensor:
    """(B, 3, 17, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.stack([render(c) for c in clips])).permute(0, 4, 1, 2, 3) / 127.5 - 1


def spawn(function, *args) -> None:
    """Runs function(rank, *args) in PROCESSES processes that share their gradients."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    mp.spawn(start, (function, args), nprocs=PROCESSES)


def start(rank: int, function, args) -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(
        "medium"
    )  # on a CPU: oneDNN in the place of MKL, as exact and twice as fast
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    function(rank, *args)
    dist.destroy_process_group()


def update(loss: torch.Tensor, parameters: list[nn.Parameter], *optimizers: tuple) -> None:
    """One step of each (optimizer, schedule), with the gradients averaged over the processes in one message
    and clipped to norm 1."""
    for p in parameters:
        p.grad = None
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(g.view_as(p) / PROCESSES)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer, schedule in optimizers:
        optimizer.step()
        schedule.step()


# -------------------------------------------------------------------------------------------------------- VAE


def new_vae() -> AutoencoderKLWan:
    """8x smaller in space (patches of 4, then one stride of 2), 2x in time: (3, 17, 64, 64) -> (Z_DIM, 9, 8,
    8)."""
    size = {
        "base_dim": 48,
        "z_dim": Z_DIM,
        "dim_mult": [1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
        "is_residual": True,
    }
    patch = {
        "patch_size": 4,
        "in_channels": 48,
        "out_channels": 48,
        "scale_factor_spatial": 8,
        "scale_factor_temporal": 2,
    }
    vae = AutoencoderKLWan(**size, **patch, latents_mean=[0.0] * Z_DIM, latents_std=[1.0] * Z_DIM)
    for name, parameter in vae.named_parameters():  # with the plain initialisation training stalls
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.constant_(vae.quant_conv.bias[Z_DIM:], -5)  # log-variance: nearly deterministic at the start
    return vae


def resample_whole(
    self: WanResample, x: torch.Tensor, feat_cache: None = None, feat_idx: None = None
) -> torch.Tensor:
    """WanResample.forward for a whole clip at once instead of chunk after chunk with a cache: the same
    numbers, 1.7 times as fast."""
    if self.mode == "upsample3d":
        later = self.time_conv(x[:, :, 1:]).unflatten(
            1, (2, -1)
        )  # (B, 2, C, t - 1, h, w): each but the first becomes two frames
        x = torch.cat([x[:, :, :1], later.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    y = self.resample(x.transpose(1, 2).flatten(0, 1))  # (B t, C, h, w)
    y = y.unflatten(0, (len(x), -1)).transpose(1, 2)  # (B, C, t, h, w)
    return torch.cat([y[:, :, :1], self.time_conv(y)], 2) if self.mode == "downsample3d" else y


@torch.autocast("cpu", torch.bfloat16)
def encode(vae: AutoencoderKLWan, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, 17, 64, 64) -> mean and log-variance, each (B, Z_DIM, 9, 8, 8)."""
    WanResample.forward = resample_whole
    return vae.quant_conv(vae.encoder(patchify(x, 4))).float().clamp(-20, 20).chunk(2, 1)


@torch.autocast("cpu", torch.bfloat16)
def decode(vae: AutoencoderKLWan, z: torch.Tensor) -> torch.Tensor:
    """(B, Z_DIM, 9, 8, 8) -> (B, 3, 17, 64, 64), not clamped."""
    WanResample.forward = resample_whole
    return unpatchify(vae.decoder(vae.post_quant_conv(z), first_chunk=True), 4).float()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / F.mse_loss(a, b)))  # dB, of videos in [-1, 1]


def pretrain_vae(
    rank: int, folder: Path, steps: int = 1600, batch: int = 4, lr: float = 2e-3, kl: float = 5e-4
) -> None:
    """Reconstruction under a weight that tells the shapes, batch clips a process and step. Writes folder/vae
    (fp16)."""
    torch.manual_seed(0)
    seen, rng, t0 = combinations()[0], np.random.default_rng([2, rank]), time.time()
    vae = new_vae()
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 50, 0.5 + 0.5 * np.cos(np.pi * i / steps))
    )
    torch.manual_seed(rank)
    for step in range(steps):
        clips = random_clips(seen, batch, rng)
        x = to_video(clips)
        alpha = torch.from_numpy(np.stack([coverage(c) for c in clips])).float()[
            :, None
        ]  # (B, 1, 17, 64, 64)
        edge = F.max_pool3d(torch.cat([alpha, -alpha], 1), (1, 3, 3), 1, (0, 1, 1)).sum(1, keepdim=True)
        weight = 1 + 2 * alpha + 4 * edge
        mu, logvar = encode(vae, x)
        y = decode(vae, mu + (logvar / 2).exp() * torch.randn_like(mu))
        error = y - x
        dx, dy = (error.diff(dim=d).abs() for d in (-1, -2))
        loss = (
            (weight * (error**2 + 0.3 * error.abs())).mean()
            + (weight[..., 1:] * dx).mean()
            + (weight[..., 1:, :] * dy).mean()
        )
        loss_kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean()
        update(loss + kl * loss_kl, parameters, (optimizer, schedule))
        if rank == 0 and step % 50 == 49:
            print(
                f"vae {step + 1} loss {loss:.4f} kl {loss_kl:.2f} {psnr(y.detach(), x):.2f} dB "
                f"{time.time() - t0:.0f} s",
                flush=True,
            )
    if rank == 0:
        rotate(vae, random_clips(seen, 192, np.random.default_rng([2, 0])))
        vae.half().save_pretrained(folder / "vae")


@torch.no_grad()
def rotate(vae: AutoencoderKLWan, clips: list[Clip]) -> None:
    """Turns the latent space, within the two 1x1x1 convolutions, so that its channels are uncorrelated;
    stores their mean and deviation.

    The trained channels are correlated (to -0.97): noise of one size on each would drown some directions. The
    log-variance becomes a constant of each channel. A deviation below 1 is stored as 1: directions that the
    decoder hardly hears stay small for the DiT too.
    """
    posterior = (encode(vae, to_video([c])) for c in clips)
    mu, logvar = (
        torch.cat(part).transpose(0, 1).flatten(1) for part in zip(*posterior, strict=True)
    )  # (Z_DIM, values)
    variance, U = torch.linalg.eigh(mu.cov())  # mu.cov() = U diag(variance) U^T
    enter, leave = vae.quant_conv, vae.post_quant_conv
    enter.weight[:Z_DIM], enter.bias[:Z_DIM] = (
        torch.einsum("ij,i...->j...", U, enter.weight[:Z_DIM]),
        U.T @ enter.bias[:Z_DIM],
    )
    enter.weight[Z_DIM:], enter.bias[Z_DIM:] = 0, (U.T.square() @ logvar.exp().mean(1)).log()
    leave.weight.copy_(torch.einsum("ki...,ij->kj...", leave.weight, U))
    vae.register_to_config(
        latents_mean=(U.T @ mu.mean(1)).tolist(), latents_std=variance.sqrt().clamp(min=1).tolist()
    )


@torch.inference_mode()
def encode_clips(vae: AutoencoderKLWan, clips: list[Clip], batch: int = 32) -> torch.Tensor:
    """Means of the posterior, (clips, Z_DIM, 9, 8, 8), not normalised."""
    return torch.cat([encode(vae, to_video(clips[i : i + batch]))[0] for i in range(0, len(clips), batch)])


# -------------------------------------------------------------------------------------------------------- DiT


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the captions, lower case, then </s>: ids 0 <pad>, 1 </s>, 2 <unk>, 3... the
    words."""
    words = sorted({word for names in ATTRIBUTES.values() for word in f"a {' '.join(names)}".split()})
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *words])}, unk_token="<unk>")
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": TEXT_LENGTH,
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def new_text_encoder(tokens: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=tokens, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
        )
    )


def new_transformer() -> WanTransformer3DModel:
    """Patches of (3, 2, 2) latents: 3 x 4 x 4 = 48 tokens a clip."""
    size = {
        "num_layers": 5,
        "num_attention_heads": 5,
        "attention_head_dim": 32,
        "ffn_dim": 512,
        "text_dim": 64,
        "rope_max_seq_len": 64,
    }
    dit = WanTransformer3DModel(patch_size=(3, 2, 2), in_channels=Z_DIM, out_channels=Z_DIM, **size)
    for module in dit.modules():  # with the plain initialisation training stalls
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    for weight in (
        dit.condition_embedder.time_proj.weight,
        dit.proj_out.weight,
        *(m.scale_shift_table for m in (dit, *dit.blocks)),
    ):
        nn.init.zeros_(weight)  # every gated branch starts closed (DiT's adaLN-Zero)
    return dit


def embed(text_encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """Token ids (B, 16) -> (B, 16, 64), zero after the caption, as WanPipeline has them."""
    mask = (ids != 0).long()
    return text_encoder(ids, mask).last_hidden_state * mask[..., None]


@sdpa_kernel(SDPBackend.MATH)  # the fastest for 48 tokens
def pretrain_dit(
    rank: int, folder: Path, steps: int = 3800, tail: int = 1200, batch: int = 32, clips: int = 3000
) -> None:
    """Flow matching on latents encoded once: y_t = (1 - sigma) y + sigma eps, target eps - y. Writes the
    moving average of the weights."""
    t0, vae = time.time(), AutoencoderKLWan.from_pretrained(folder / "vae")
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    data = random_clips(combinations()[0], clips, np.random.default_rng([5, rank]))
    latents = (encode_clips(vae, data) - mean) / std  # (clips, Z_DIM, 9, 8, 8)
    tokenizer = new_tokenizer()
    captions = [c.caption for c in data] + [""]
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    print(f"{clips} clips encoded in {time.time() - t0:.0f} s", flush=True)

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"transformer": new_transformer(), "text_encoder": new_text_encoder(len(tokenizer))}
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.997))
    parameters = list(model.parameters())
    matrices = [p for p in model["transformer"].blocks.parameters() if p.ndim == 2]
    others = [p for p in parameters if not any(p is m for m in matrices)]
    flat = steps - tail  # the rate is flat, then falls as a cosine
    rate = lambda i: min((i + 1) / 50, 0.5 + 0.5 * np.cos(np.pi * max(0, i - flat) / tail))  # noqa: E731
    muon = torch.optim.Muon(
        matrices, 4e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )  # loss 0.375 after 250 steps, AdamW 0.447
    adamw = torch.optim.AdamW(others, 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    optimizers = [(o, torch.optim.lr_scheduler.LambdaLR(o, rate)) for o in (muon, adamw)]
    torch.manual_seed(1 + rank)
    losses: list[float] = []
    for step in range(steps):
        i = torch.randint(clips, (batch,))
        y, eps = latents[i], torch.randn(batch, *latents.shape[1:])
        u = torch.special.ndtri(
            (torch.arange(batch) + torch.rand(batch)) / batch
        ).sigmoid()  # logit-normal, one draw a stratum
        sigma = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)
        text = embed(
            model["text_encoder"], ids[torch.where(torch.rand(batch) < 0.1, clips, i)]
        )  # a tenth without a caption
        v = model["transformer"](
            (1 - sigma) * y + sigma * eps, 1000 * sigma.flatten(), text, return_dict=False
        )[0]
        loss = F.mse_loss(v, eps - y)
        update(loss, parameters, *optimizers)
        average.update_parameters(model)
        losses.append(loss.item())
        if rank == 0 and (step % 200 == 199 or step == steps - 1):
            print(f"dit {step + 1} loss {np.mean(losses[-200:]):.4f} {time.time() - t0:.0f} s", flush=True)
            parts = {
                name: copy.deepcopy(part).half() for name, part in (*average.module.items(), ("vae", vae))
            }
            scheduler = UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            )  # as Wan2.1 has it
            WanPipeline(tokenizer=tokenizer, scheduler=scheduler, **parts).save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------ gates


def new_classifier() -> nn.Sequential:
    """Every second frame of a video, (B, 3, 9, 64, 64) -> logits of shape, colour, action and background,
    side by side."""
    stages = [((3, 24), (3, 5, 5), (1, 2, 2)), ((24, 48), 3, 1), ((48, 64), 3, 1)]
    layers = [
        layer for (i, o), k, p in stages for layer in (nn.Conv3d(i, o, k, 2, p), nn.BatchNorm3d(o), nn.ReLU())
    ]
    classes = sum(map(len, ATTRIBUTES.values()))
    return nn.Sequential(
        *layers, nn.AvgPool3d((1, 2, 2)), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 2 * 4 * 4, classes)
    )


def targets(clips: list[Clip]) -> list[torch.Tensor]:
    """Class of each clip in each attribute."""
    columns = zip(*(c.combination for c in clips), strict=True)
    return [
        torch.tensor([names.index(v) for v in column])
        for names, column in zip(ATTRIBUTES.values(), columns, strict=True)
    ]


@torch.inference_mode()
def recognised(classifier: nn.Module, videos: torch.Tensor, clips: list[Clip]) -> dict[str, float]:
    """Share of the videos (B, 3, 17, 64, 64) that show the shape, colour, action and background of their
    clips."""
    logits = torch.cat([classifier(v) for v in videos[:, :, ::2].split(32)]).split(
        [len(n) for n in ATTRIBUTES.values()], 1
    )
    return {
        a: float((part.argmax(1) == t).float().mean())
        for a, part, t in zip(ATTRIBUTES, logits, targets(clips), strict=True)
    }


def train_classifier(rank: int, path: Path, steps: int = 600, batch: int = 32) -> None:
    """Learns from real clips of the seen combinations, blurred and noisy at random so that it judges what is
    shown and not how sharply."""
    torch.manual_seed(0)
    classifier, rng = new_classifier(), np.random.default_rng([3, rank])
    parameters = list(classifier.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        clips = random_clips(combinations()[0], batch, rng)
        x = to_video(clips)[:, :, ::2]
        if rng.random() < 0.5:
            x = F.avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        logits = classifier(x + rng.uniform(0, 0.1) * torch.randn(x.shape)).split(
            [len(n) for n in ATTRIBUTES.values()], 1
        )
        loss = sum(F.cross_entropy(part, t) for part, t in zip(logits, targets(clips), strict=True))
        update(loss, parameters, (optimizer, schedule))
    if rank == 0:
        save_file(classifier.state_dict(), path)


def gates(
    folder: Path, judge: Path, sheet: Path, clips: int = 320, steps: int = 16, guidance: float = 3.5
) -> dict[str, dict[str, float]]:
    """What the files in folder reconstruct and generate of the held-out combinations, as a classifier of real
    clips recognises it."""
    classifier, pool = new_classifier().eval(), combinations()[1]
    classifier.load_state_dict(load_file(judge))
    data = [random_clip(pool[i % len(pool)], np.random.default_rng([6, i])) for i in range(clips)]
    real, pipeline = to_video(data), WanPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        rebuilt = torch.cat([pipeline.vae(x).sample for x in real.split(32)])
    size = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "max_sequence_length": TEXT_LENGTH}
    how = size | {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": torch.Generator().manual_seed(0),
    }
    videos = [
        pipeline([c.caption for c in data[i : i + 32]], output_type="pt", **how).frames
        for i in range(0, clips, 32)
    ]
    generated = torch.cat(videos).transpose(1, 2) * 2 - 1  # (B, 3, 17, 64, 64) in [-1, 1]
    contact_sheet(generated[: len(pool) : 4], data[: len(pool) : 4], sheet)
    return {
        "chance": {attribute: 1 / len(names) for attribute, names in ATTRIBUTES.items()},
        "real": recognised(classifier, real, data),
        "reconstructed": recognised(classifier, rebuilt, data) | {"psnr": psnr(rebuilt, real)},
        "generated": recognised(classifier, generated, data),
    }


def contact_sheet(
    videos: torch.Tensor, clips: list[Clip], path: Path, rows: int = 10, columns: int = 4
) -> None:
    """First, middle and last frame of videos (B, 3, 17, 64, 64) above their captions."""
    scale, caption = 2, 16
    width, height = (3 * SIZE + 4) * scale, SIZE * scale + caption
    page = Image.new("RGB", (columns * width, rows * height), "white")
    for k in range(min(rows * columns, len(clips))):
        corner = (k % columns * width, k // columns * height)
        strip = torch.cat([videos[k, :, f] for f in (0, FRAMES // 2, FRAMES - 1)], -1)  # (3, 64, 192)
        picture = Image.fromarray(((strip + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        page.paste(picture.resize((3 * SIZE * scale, SIZE * scale), Image.Resampling.NEAREST), corner)
        ImageDraw.Draw(page).text(
            (corner[0] + 4, corner[1] + SIZE * scale + 1), clips[k].caption, fill="black"
        )
    page.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("vae", "dit", "classifier", "gates"))
    args = parser.parse_args()
    classifier = args.folder.with_name("wan_classifier.safetensors")
    stages = {
        "vae": (pretrain_vae, args.folder),
        "dit": (pretrain_dit, args.folder),
        "classifier": (train_classifier, classifier),
    }
    for name, stage in stages.items():
        if args.only in (None, name):
            spawn(*stage)
    if args.only in (None, "gates"):
        for name, row in gates(args.folder, classifier, args.folder.with_name("wan_sheet.png")).items():
            print(f"{name:14}" + "".join(f"{k} {v:7.3f}   " for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()

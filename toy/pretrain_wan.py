"""Pretrains toy/wan, a text-to-video model of the real Wan classes, small enough to train on two cores.

toy/wan/{vae,text_encoder,tokenizer,transformer,scheduler}, fp16, loads with
`WanPipeline.from_pretrained("toy/wan")`. Only the 752 combinations of attributes that training may show are
used. Sizes, tokenizer and scheduler are those of toy/wan.

    python -m toy.pretrain_wan toy/wan [--only vae|dit] [--steps N]
    python extras/judge.py --decoder toy/wan           what the classifiers of toy/ see in its videos
"""

import copy
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from toy.fit import HERE, SEEN, configured, fit, flat_then_cosine, parser_of, random_clips, rendered
from toy.world import FRAMES, Clip, coverage

PROCESSES = 2  # of one thread each
Z_DIM, TEXT_LENGTH = 8, 16


def to_video(clips: list[Clip]) -> Tensor:
    """(B, 3, 17, 64, 64) in [-1, 1]."""
    return torch.from_numpy(rendered(clips, FRAMES)).permute(0, 4, 1, 2, 3) / 127.5 - 1


def start(rank: int, training: partial) -> None:
    """training(rank), one of PROCESSES processes that share their gradients."""
    torch.set_num_threads(1)
    # on a CPU: oneDNN in the place of MKL, as exact and twice as fast
    torch.set_float32_matmul_precision("medium")
    WanResample.forward = resample_at_once
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    training(rank)
    dist.destroy_process_group()


# ---------------------------------------------------------------- VAE


def new_vae() -> AutoencoderKLWan:
    """8x smaller in space, 2x in time: (3, 17, 64, 64) -> (Z_DIM, 9, 8, 8)."""
    sizes = AutoencoderKLWan.load_config(HERE / "wan" / "vae")
    vae = AutoencoderKLWan.from_config(sizes, latents_mean=[0.0] * Z_DIM, latents_std=[1.0] * Z_DIM)
    for name, parameter in vae.named_parameters():  # with the plain initialisation training stalls
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.constant_(vae.quant_conv.bias[Z_DIM:], -5)  # log-variance: nearly deterministic at the start
    return vae


def resample_at_once(self: WanResample, x: Tensor, feat_cache: None = None, feat_idx: None = None) -> Tensor:
    """WanResample.forward for a whole clip, without chunks and cache: as exact, 1.7 times as fast."""
    if self.mode == "upsample3d":
        # (B, 2, C, t - 1, h, w): each frame but the first becomes two
        pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
    y = self.resample(x.transpose(1, 2).flatten(0, 1))  # (B t, C, h, w)
    y = y.unflatten(0, (len(x), -1)).transpose(1, 2)  # (B, C, t, h, w)
    return torch.cat([y[:, :, :1], self.time_conv(y)], 2) if self.mode == "downsample3d" else y


@torch.autocast("cpu", torch.bfloat16)
def encode(vae: AutoencoderKLWan, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, 17, 64, 64) -> mean and log-variance, each (B, Z_DIM, 9, 8, 8)."""
    return vae.quant_conv(vae.encoder(patchify(x, 4))).float().clamp(-20, 20).chunk(2, 1)


@torch.autocast("cpu", torch.bfloat16)
def decode(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """(B, Z_DIM, 9, 8, 8) -> (B, 3, 17, 64, 64), not clamped."""
    return unpatchify(vae.decoder(vae.post_quant_conv(z), first_chunk=True), 4).float()


def pretrain_vae(rank: int, folder: Path, steps: int = 1600, batch: int = 4) -> None:
    """Reconstruction, weighing most where shapes end. batch: clips a process and step. Writes folder/vae."""
    torch.manual_seed(0)
    rng = np.random.default_rng([2, rank])
    vae = new_vae()
    optimiser = torch.optim.AdamW(vae.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    torch.manual_seed(rank)

    def losses() -> dict[str, Tensor]:
        clips = random_clips(SEEN, batch, rng)
        x = to_video(clips)
        alpha = torch.from_numpy(np.stack([coverage(clip) for clip in clips])).float()[:, None]
        edge = F.max_pool3d(torch.cat([alpha, -alpha], 1), (1, 3, 3), 1, (0, 1, 1)).sum(1, keepdim=True)
        weight = 1 + 2 * alpha + 4 * edge  # (B, 1, 17, 64, 64)
        mu, logvar = encode(vae, x)
        y = decode(vae, mu + (logvar / 2).exp() * torch.randn_like(mu))
        error = y - x
        dx, dy = error.diff(dim=-1).abs(), error.diff(dim=-2).abs()
        loss = (weight * (error**2 + 0.3 * error.abs())).mean()
        loss = loss + (weight[..., 1:] * dx).mean() + (weight[..., 1:, :] * dy).mean()
        kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).mean()
        psnr = 10 * torch.log10(4 / F.mse_loss(y.detach(), x))  # of videos in [-1, 1]
        return {"loss": loss + 5e-4 * kl, "kl": kl, "dB": psnr}

    fit("vae", losses, [flat_then_cosine(optimiser, steps, steps)], steps)
    if rank == 0:
        rotate(vae, random_clips(SEEN, 192, np.random.default_rng([2, 0])))
        vae.half().save_pretrained(configured(folder, "wan") / "vae")


@torch.no_grad()
def rotate(vae: AutoencoderKLWan, clips: list[Clip]) -> None:
    """Turns the latent space, within the two 1x1x1 convolutions, so that its channels are uncorrelated;
    stores their mean and deviation.

    The trained channels are correlated (to -0.97): noise of one size on each would drown some directions. The
    log-variance becomes a constant of each channel. A deviation below 1 is stored as 1: directions that the
    decoder hardly hears stay small for the DiT too.
    """
    posterior = torch.cat([torch.cat(encode(vae, to_video([clip])), 1) for clip in clips])
    mu, logvar = posterior.transpose(0, 1).flatten(1).split(Z_DIM)  # (Z_DIM, values) each
    variance, U = torch.linalg.eigh(mu.cov())  # mu.cov() = U diag(variance) U^T
    enter, leave = vae.quant_conv, vae.post_quant_conv
    enter.weight[:Z_DIM] = torch.einsum("ij,i...->j...", U, enter.weight[:Z_DIM])
    enter.bias[:Z_DIM] = U.T @ enter.bias[:Z_DIM]
    enter.weight[Z_DIM:] = 0
    enter.bias[Z_DIM:] = (U.T.square() @ logvar.exp().mean(1)).log()
    leave.weight.copy_(torch.einsum("ki...,ij->kj...", leave.weight, U))
    std = variance.sqrt().clamp(min=1)
    vae.register_to_config(latents_mean=(U.T @ mu.mean(1)).tolist(), latents_std=std.tolist())


# ---------------------------------------------------------------- DiT


def new_transformer() -> WanTransformer3DModel:
    """Patches of (3, 2, 2) latents: 3 x 4 x 4 = 48 tokens a clip."""
    dit = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(HERE / "wan" / "transformer"))
    for module in dit.modules():  # with the plain initialisation training stalls
        if isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)
    # every gated branch starts closed (DiT's adaLN-Zero)
    tables = [module.scale_shift_table for module in (dit, *dit.blocks)]
    for weight in (dit.condition_embedder.time_proj.weight, dit.proj_out.weight, *tables):
        nn.init.zeros_(weight)
    return dit


@torch.inference_mode()
def latents_of(vae: AutoencoderKLWan, clips: list[Clip]) -> Tensor:
    """Normalised means of the posterior, (clips, Z_DIM, 9, 8, 8)."""
    means = [encode(vae, to_video(clips[i : i + 32]))[0] for i in range(0, len(clips), 32)]
    mean = torch.tensor(vae.config.latents_mean).view(-1, 1, 1, 1)
    return (torch.cat(means) - mean) / torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)


@sdpa_kernel(SDPBackend.MATH)  # the fastest for 48 tokens
def pretrain_dit(
    rank: int, folder: Path, steps: int = 3800, tail: int = 1200, batch: int = 32, clips: int = 3000
) -> None:
    """Flow matching on latents encoded once: y_t = (1 - sigma) y + sigma eps, target eps - y. Writes the
    moving average of the weights."""
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    data = random_clips(SEEN, clips, np.random.default_rng([5, rank]))
    latents, captions = latents_of(vae, data), [*(clip.caption for clip in data), ""]
    tokenizer = AutoTokenizer.from_pretrained(HERE / "wan" / "tokenizer")
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids

    torch.manual_seed(0)
    transformer = new_transformer()
    text_encoder = UMT5EncoderModel(UMT5Config.from_pretrained(HERE / "wan" / "text_encoder"))
    model = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.997))
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    # loss 0.375 after 250 steps, with AdamW alone 0.447
    muon = torch.optim.Muon(matrices, 4e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    torch.manual_seed(1 + rank)

    def losses() -> dict[str, Tensor]:
        i = torch.randint(clips, (batch,))
        y, eps = latents[i], torch.randn(batch, *latents.shape[1:])
        strata = (torch.arange(batch) + torch.rand(batch)) / batch
        u = torch.special.ndtri(strata).sigmoid()  # logit-normal, one draw a stratum
        sigma = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)
        caption = torch.where(torch.rand(batch) < 0.1, clips, i)  # a tenth without one
        mask = (ids[caption] != 0).long()
        text = text_encoder(ids[caption], mask).last_hidden_state  # (B, 16, 64)
        text = text * mask[..., None]  # zero after the caption, as WanPipeline has it
        y_t = (1 - sigma) * y + sigma * eps
        v = transformer(y_t, 1000 * sigma.flatten(), text, return_dict=False)[0]
        return {"loss": F.mse_loss(v, eps - y)}

    def save(step: int) -> None:
        average.update_parameters(model)
        if rank == 0 and (step % 200 == 199 or step == steps - 1):
            for name, part in average.module.items():
                copy.deepcopy(part).half().save_pretrained(folder / name)

    schedules = [flat_then_cosine(optimiser, steps, tail) for optimiser in (muon, adamw)]
    fit("dit", losses, schedules, steps, after=save)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("vae", "dit"))
    arguments = parser.parse_args()
    folder = arguments.folder
    recipe = {"steps": arguments.steps} if arguments.steps else {}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"})
    for name, training in (("vae", pretrain_vae), ("dit", pretrain_dit)):
        if arguments.only in (None, name):
            mp.spawn(start, (partial(training, folder=folder, **recipe),), nprocs=PROCESSES)


if __name__ == "__main__":
    main()

"""The video decoder: a pretrained text-to-video diffusion transformer (DiT) that reads f_fuse as its prompt.

Paper §3.2, Eq. 9, and §4.1: Wan2.1 1.3B with LoRA (rank 16, scaling factor 16) trained by the diffusion loss.
The framework is model-agnostic, so any one-transformer `WanPipeline` and any CogVideoX 1.0 of diffusers will
do.

    in    f_fuse (B, L, D_txt)      from the Mixture-of-Memories, Eq. 8; L and D_txt are the decoder's own
    in    y      (B, C, f, h, w)    latents of the stimulus as the DiT sees them (`encode_latents`)
    out   diffusion_loss -> (B,)    generate -> uint8 (B, F, H, W, 3)

Training holds only the DiT: latents and text tokens come from the prepared data. Generation adds the VAE;
preparation loads VAE and text encoder without the DiT. A clip's loss and draws depend on no other clip, so
that a batch may pass through the DiT in parts (train_stage2.losses_and_gradients).
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoModel, CogVideoXPipeline, DiffusionPipeline, WanPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.models.auto.tokenization_auto import get_tokenizer_config

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PIPELINES = {"WanPipeline": WanPipeline, "CogVideoXPipeline": CogVideoXPipeline}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self- and cross-attention
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
ATTENTION = [  # of a GPU, and of the CPU
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def clip_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on `key` alone, e.g. (seed, step, clip), whatever the batch or process."""
    entropy = [len(key), *key]  # the length, since a key of (1,) is not (1, 0)
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def draw(
    seed: int, step: int, clips: Sequence[int], latent_shape: Sequence[int], dropout: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """What Eq. 9 draws at a step for `clips` (their indices in the dataset), on the CPU.

    Returns noise ε (B, C, f, h, w), u (B,) uniform in [0, 1) which sets the diffusion time, and dropped (B,)
    bool, true with probability `dropout` (a choice: 10 %), for `condition_dropout`.
    """
    generators = [clip_generator(seed, step, int(clip)) for clip in clips]
    u, chance = torch.stack([torch.rand(2, generator=g) for g in generators]).unbind(1)
    noise = torch.stack([torch.randn(*latent_shape, generator=g) for g in generators])
    return noise, u, chance < dropout


def condition_dropout(f_fuse: Tensor, empty: Tensor, dropped: Tensor) -> Tensor:
    """f_fuse (B, L, D_txt), or the empty prompt's tokens (L, D_txt) in the dropped (B,) clips."""
    return torch.where(dropped.to(f_fuse.device)[:, None, None], empty.to(f_fuse), f_fuse)


def recompute(block: nn.Module, *inputs):
    """A block of the DiT that keeps what attention puts out and computes all else once more in the backward
    pass: attention is most of the work of a long video, and little of its memory."""
    keep_attention = partial(create_selective_checkpoint_contexts, ATTENTION)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=keep_attention)


def load_pipeline(name: str, dtype: torch.dtype, **parts: bool) -> tuple[DiffusionPipeline, int, dict]:
    """A pipeline of diffusers with those of its `parts` that are true, its text length L, its DiT's config.

    Weights come from safetensors alone, and no code comes with them. Raises ValueError where the pipeline is
    of another kind or damaged.
    """
    try:
        index = DiffusionPipeline.load_config(name)  # model_index.json
        kind = index["_class_name"]
        libraries = {value[0] for value in index.values() if isinstance(value, list)}
        second = index.get("transformer_2", [None])[0]  # Wan2.2 has two transformers
        if kind not in PIPELINES or second or not libraries <= {None, "diffusers", "transformers"}:
            raise ValueError(f"a {kind}{' of two transformers' if second else ''}")
        config = AutoModel.load_config(name, subfolder="transformer")
        if config.get("patch_size_t"):
            raise ValueError("a CogVideoXPipeline 1.5, with patch_size_t")
        if kind == "WanPipeline":  # no config of Wan's DiT has L: the pipeline is called with 512
            tokenizer = get_tokenizer_config(name, subfolder="tokenizer")
            L = min(512, int(tokenizer.get("model_max_length", 512)))  # a tiny model says less here
            dtypes = {"default": dtype, "vae": torch.float32}  # this VAE is meant to run in fp32
        else:
            L = config["max_text_seq_length"]
            dtypes = dtype  # this pipeline wants one throughout
        absent = {part: None for part, load in parts.items() if not load}
        pipe = PIPELINES[kind].from_pretrained(name, dtype=dtypes, use_safetensors=True, **absent)
        for module in filter(lambda part: isinstance(part, nn.Module), pipe.components.values()):
            for key, p in module.named_parameters():
                if p.is_meta or not p.isfinite().all():  # so diffusers leaves a weight that the file lacks
                    raise ValueError(f"no finite {key}")
    except Exception as error:  # whatever damage makes diffusers, transformers and safetensors say
        found = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        wanted = "a whole WanPipeline with one transformer or CogVideoXPipeline 1.0, in safetensors"
        mend = f"download it again, or choose another --decoder, e.g. {WAN}"
        raise ValueError(f"{name}: found {found}, wanted {wanted}: {mend}") from error
    return pipe, L, config


class VideoDecoder(nn.Module):
    """A diffusers text-to-video pipeline whose prompt embeddings we supply, with LoRA on its DiT's attention.

    Only `transformer` is a submodule; VAE and text encoder stay in `pipe`, outside parameters() and
    state_dict(). `config` is the DiT's, for where the DiT is not loaded. `lora_rank=0`: no LoRA. Its start is
    drawn from torch's global generator.
    """

    def __init__(
        self, pipe: DiffusionPipeline, text_length: int, config: dict[str, Any] | None = None,
        lora_rank: int = 16, lora_alpha: float = 16, gradient_checkpointing: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.pipe, self.transformer, self.scheduler = pipe, pipe.transformer, pipe.scheduler
        self.config = config if pipe.transformer is None else pipe.transformer.config
        self.name = pipe.config.get("_name_or_path") or type(pipe).__name__
        self.is_wan = isinstance(pipe, WanPipeline)
        self.noise_shift = 1.0  # of the diffusion time in training; above 1, noisier
        self.text_length = text_length  # L
        self.text_width = self.config["text_dim" if self.is_wan else "text_embed_dim"]  # D_txt
        p = self.config["patch_size"]
        self.patch = tuple(p) if self.is_wan else (1, p, p)  # latent frames, rows, columns a token of the DiT
        pipe.set_progress_bar_config(disable=True)
        if self.transformer is None:
            return
        self.transformer.requires_grad_(False)
        if lora_rank:
            lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=LORA_TARGETS)
            self.transformer.add_adapter(lora)
            cast_training_params(self.transformer)  # to fp32: peft gave them the DiT's dtype
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing(recompute)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path = WAN, lora_rank: int = 16, lora_alpha: float = 16, *,
        load_transformer: bool = True, load_vae: bool = False, load_text_encoder: bool = False,
        dtype: torch.dtype = torch.float32, tiling: bool = False, gradient_checkpointing: bool = False,
    ) -> "VideoDecoder":  # fmt: skip
        """A pipeline from a folder or the Hub; what is not loaded is not downloaded either. `tiling`: the VAE
        works in tiles and clip by clip, in less memory. Raises ValueError as `load_pipeline` does."""
        parts = {"transformer": load_transformer, "vae": load_vae}
        parts |= {"text_encoder": load_text_encoder, "tokenizer": load_text_encoder}
        pipe, text_length, config = load_pipeline(str(name_or_dir), dtype, **parts)
        if load_vae and tiling:
            pipe.vae.enable_tiling()
            pipe.vae.enable_slicing()
        return cls(pipe, text_length, config, lora_rank, lora_alpha, gradient_checkpointing)

    def to(self, device: torch.device | str) -> "VideoDecoder":
        """Moves all that is loaded, VAE and text encoder too, to `device` (dtypes are chosen on loading)."""
        self.pipe.to(device)
        return self

    def diffusion_loss(self, y: Tensor, f_fuse: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """Eq. 9, one value a clip: (B,), the mean squared error of what the scheduler has the DiT predict.

        y, noise (B, C, f, h, w), f_fuse (B, L, D_txt), u (B,) of `draw`. ValueError where y or f_fuse does
        not fit the decoder.
        """
        self._check_latents(y)
        self._check_condition("f_fuse", f_fuse)
        y, noise, u = y.float(), noise.to(y.device).float(), u.to(y.device)  # prepared latents are fp16
        u = self.noise_shift * u / (1 + (self.noise_shift - 1) * u)  # (B,)
        scheduler = self.scheduler.config
        if self.is_wan:  # flow matching: the DiT predicts a velocity
            s = scheduler.get("flow_shift") or scheduler.get("shift") or 3.0  # UniPC's (Wan 1.3B: 3), Euler's
            sigma = (s * u / (1 + (s - 1) * u))[:, None, None, None, None]  # (B, 1, 1, 1, 1)
            t = 1000 * sigma.flatten()  # (B,)
            y_t = (1 - sigma) * y + sigma * noise  # (B, C, f, h, w)
            target = noise - y  # (B, C, f, h, w)
        else:  # the noising of CogVideoX's own scheduler, at whole timesteps
            t = (scheduler.num_train_timesteps * u).long()  # (B,)
            y_t = self.scheduler.add_noise(y, noise, t)  # (B, C, f, h, w)
            targets = {
                "epsilon": noise,
                "sample": y,
                "v_prediction": self.scheduler.get_velocity(y, noise, t),
            }
            target = targets[scheduler.prediction_type]  # (B, C, f, h, w)
        error = target - self.predict(y_t, f_fuse, t).float()  # (B, C, f, h, w)
        return error.square().mean(dim=(1, 2, 3, 4))  # Eq. 9

    forward = diffusion_loss  # what accelerate and DDP wrap

    def predict(self, y_t: Tensor, f_fuse: Tensor, t: Tensor) -> Tensor:
        """ϵ_θ(y_t, f_fuse, t) of Eq. 9: the DiT once. y_t and the result (B, C, f, h, w), t (B,) to 1000."""
        y_t, f_fuse = y_t.to(self.transformer.dtype), f_fuse.to(self.transformer.dtype)
        if self.is_wan:
            return self.transformer(y_t, t, f_fuse, return_dict=False)[0]
        y_t, rotary = y_t.transpose(1, 2), None  # (B, f, C, h, w)
        if self.config["use_rotary_positional_embeddings"]:  # CogVideoX 5B; its pipeline wants pixels
            h, w = (n * self.pipe.vae_scale_factor_spatial for n in y_t.shape[3:])
            rotary = self.pipe._prepare_rotary_positional_embeddings(h, w, y_t.shape[1], y_t.device)
        return self.transformer(y_t, f_fuse, t, image_rotary_emb=rotary, return_dict=False)[0].transpose(1, 2)

    def generate(
        self, f_fuse: Tensor, empty: Tensor, frames: int, height: int, width: int,
        generators: list[torch.Generator], steps: int = 50, guidance: float = 5.0,
    ) -> Tensor:  # fmt: skip
        """Videos uint8 (B, F, H, W, 3) on the CPU: the pipeline with f_fuse (B, L, D_txt) for prompt (§3.3).

        `empty` (L, D_txt) is the empty prompt that guidance leads away from. One generator a clip
        (`clip_generator`): so a video does not depend on its batch. ValueError for sizes that do not divide.
        """
        self._check_condition("f_fuse", f_fuse)
        self._check_condition("empty", empty[None])
        self.latent_shape(frames, height, width)
        f_fuse = f_fuse.to(self.pipe.device, self.transformer.dtype)
        prompts = {"prompt_embeds": f_fuse, "negative_prompt_embeds": empty.to(f_fuse).expand_as(f_fuse)}
        size = {"num_frames": frames, "height": height, "width": width}
        sampling = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
        video = self.pipe(**prompts, **size, **sampling, output_type="np").frames
        return (torch.from_numpy(video) * 255).round().byte()

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, f, h, w) of a video's latents. ValueError where sizes do not divide, or without VAE."""
        if self.pipe.vae is None:
            raise ValueError(f"{self.name}: the VAE is not loaded: from_pretrained(..., load_vae=True)")
        time, space = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        f, h, w = (frames - 1) // time + 1, height // space, width // space
        step = 4 if self.is_wan else 8  # frames beyond k steps Wan's VAE drops, and CogVideoX's adds some
        rows, columns = space * self.patch[1], space * self.patch[2]
        if frames % step != 1 or f % self.patch[0] or height % rows or width % columns:
            wanted = f"{step}k+1 frames, a multiple of {self.patch[0]} latent frames (now {f})"
            said = f"{self.name}: a video of {frames} frames, {height}x{width}, does not fit: wanted {wanted}"
            raise ValueError(f"{said}, a height that is a multiple of {rows} and a width of {columns}")
        return self.config["in_channels"], f, h, w

    @torch.no_grad()
    def encode_latents(self, video: Tensor) -> Tensor:
        """uint8 (B, F, H, W, 3) -> latents (B, C, f, h, w) as the DiT sees them: the mode, normalised."""
        vae, shape = self.pipe.vae, self.latent_shape(*video.shape[1:4])
        x = video.to(vae.device).permute(0, 4, 1, 2, 3) / 127.5 - 1  # (B, 3, F, H, W) in [-1, 1]
        z = vae.encode(x.to(vae.dtype)).latent_dist.mode().float()  # (B, C, f, h, w)
        if z.shape[1:] != shape:
            said = (
                f"{self.name}/vae makes latents {tuple(z.shape[1:])}, its config.json and the DiT say {shape}"
            )
            mend = "set scale_factor_temporal and scale_factor_spatial to what it does, or take the DiT's own"
            raise ValueError(f"{said}: {mend}")
        mean, std = self._latent_moments(z)
        return (z - mean) / std

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse: latents (B, C, f, h, w) as the DiT sees them -> uint8 (B, F, H, W, 3) on the CPU."""
        latents = latents.to(self.pipe.vae.device).float()
        mean, std = self._latent_moments(latents)
        x = self.pipe.vae.decode((latents * std + mean).to(self.pipe.vae.dtype)).sample  # (B, 3, F, H, W)
        video = self.pipe.video_processor.postprocess_video(x, output_type="np")
        return (torch.from_numpy(video) * 255).round().byte()

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> list[Tensor]:
        """The decoder's text tokens of each caption, (n_i, D_txt) float32 on the CPU; padded with zeros to
        text_length they are the pipeline's prompt embeddings.

        Wan: n_i counts a caption's real tokens. CogVideoX does not mask its padding, which has values: n_i is
        always text_length.
        """
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.text_length}
        tokens, _ = self.pipe.encode_prompt(captions, **options)  # (B, L, D_txt)
        counts = (tokens != 0).any(-1).sum(-1)  # (B,); a token that was encoded is never all zero
        return [e[:n].float().cpu() for e, n in zip(tokens, counts.tolist(), strict=True)]

    def save_lora(self, folder: str | Path) -> None:
        """Writes LORA_FILE, its rank and scale within, for `load_lora_weights` of diffusers."""
        about = self.transformer.peft_config["default"].to_dict() | {"target_modules": LORA_TARGETS}
        weights = get_peft_model_state_dict(self.transformer)
        how = {"weight_name": LORA_FILE, "transformer_lora_adapter_metadata": about}
        type(self.pipe).save_lora_weights(folder, weights, **how)

    def load_lora(self, folder: str | Path) -> None:
        """Reads what `save_lora` wrote into the present parameters. Raises ValueError where the file is
        damaged or of another model, rank or scale."""
        file, lora = Path(folder) / LORA_FILE, self.transformer.peft_config["default"]
        wanted = get_peft_model_state_dict(self.transformer)
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads(opened.metadata()["lora_adapter_metadata"])
                found = {key.removeprefix("transformer."): opened.get_tensor(key) for key in opened.keys()}
            rank, alpha = about["transformer.r"], about["transformer.lora_alpha"]
            same = {key: x.shape for key, x in found.items()} == {key: x.shape for key, x in wanted.items()}
            if not same or (rank, alpha) != (lora.r, lora.lora_alpha):
                raise ValueError(f"{len(found)} matrices of rank {rank}, alpha {alpha}")
            if broken := [key for key, x in found.items() if not x.isfinite().all()]:
                raise ValueError(f"NaN or infinity in {broken[0]}")
        except Exception as error:  # no such file, a damaged one, none of its metadata
            found = str(error)[:200] or type(error).__name__
            lora = f"{len(wanted)} matrices of rank {lora.r}, alpha {lora.lora_alpha} of {self.name}"
            mend = "load it into the decoder, rank and alpha that it was trained with"
            raise ValueError(f"{file}: found {found}, wanted the {lora}: {mend}") from error
        set_peft_model_state_dict(self.transformer, found)

    def _latent_moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by which the pipeline normalises latents, broadcast over z."""
        config = self.pipe.vae.config
        if not self.is_wan:
            return z.new_zeros(()), z.new_tensor(1 / config.scaling_factor)
        return tuple(z.new_tensor([config.latents_mean, config.latents_std])[:, None, :, None, None, None])

    def _check_condition(self, what: str, tokens: Tensor) -> None:
        L, D_txt = tokens.shape[1:]
        if (L, D_txt) != (self.text_length, self.text_width):
            wanted = f"{self.name} reads {self.text_length} of width {self.text_width}"
            mend = (
                f"train the Brain Model for it, with text of its own (python data.py, --decoder {self.name})"
            )
            raise ValueError(f"{what} has {L} tokens of width {D_txt}, but {wanted}: {mend}")

    def _check_latents(self, y: Tensor) -> None:
        channels = self.config["in_channels"]
        remainders = [n % p for n, p in zip(y.shape[2:], self.patch, strict=True)]
        if y.shape[1] != channels or any(remainders):
            wanted = f"{self.name} reads {channels} channels in patches of {self.patch}"
            mend = f"make latents of its own VAE and size (python data.py, --decoder {self.name})"
            raise ValueError(f"latents {tuple(y.shape[1:])} (C, f, h, w), but {wanted}: {mend}")

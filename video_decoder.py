"""The video decoder: a pretrained text-to-video diffusion transformer (DiT) that reads f_fuse in place of its prompt.

Paper §3.2, Eq. 9, and §4.1: Wan2.1 1.3B with LoRA (rank 16, scaling factor 16) trained by the diffusion loss. The framework is
model-agnostic, so any one-transformer `WanPipeline` and any CogVideoX 1.0 of diffusers will do.

    in    f_fuse (B, L, D_txt)      from the Mixture-of-Memories, Eq. 8; L and D_txt are the decoder's own
    in    y      (B, C, f, h, w)    latents of the stimulus as the DiT sees them (`encode_latents`)
    out   diffusion_loss -> (B,)    generate -> uint8 (B, F, H, W, 3)

Training holds only the DiT: latents and text tokens come from the prepared data. Generation adds the VAE; preparation loads VAE and
text encoder without the DiT. A training step in micro-batches (Eq. 10):

    f = f_fuse.detach().requires_grad_()                        # (B_total, L, D_txt)
    for part in micro_batches:                                  # each frees its activations
        noise, u, dropped = draw(seed, step, clips[part], y.shape[1:])
        loss = decoder(y[part], condition_dropout(f[part], empty, dropped), noise, u)
        (loss.sum() / B_total).backward()
    f_fuse.backward(f.grad)                                     # once through MoM and Brain Model

is the plain backward of the mean, however the clips are split: a clip's loss and draws depend on no other clip.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoModel, CogVideoXPipeline, DiffusionPipeline, WanPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers.models.auto.tokenization_auto import get_tokenizer_config

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PIPELINES = {"WanPipeline": WanPipeline, "CogVideoXPipeline": CogVideoXPipeline}
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self- and cross-attention
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for


def clip_generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on `key` alone, e.g. (seed, step, clip): no order, batch or process changes it."""
    state = np.random.SeedSequence([len(key), *key]).generate_state(1, np.uint64)  # the length: (1,) is not (1, 0)
    return torch.Generator().manual_seed(int(state[0]))


def draw(seed: int, step: int, clips: Sequence[int], latent_shape: Sequence[int], dropout: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """What Eq. 9 draws at a step for `clips` (their indices in the dataset), on the CPU.

    Returns noise ε (B, C, f, h, w), u (B,) uniform in [0, 1) which sets the diffusion time, and dropped (B,) bool, true with
    probability `dropout` (a choice: 10 %), for `condition_dropout`.
    """
    generators = [clip_generator(seed, step, int(clip)) for clip in clips]
    u, chance = torch.stack([torch.rand(2, generator=g) for g in generators]).unbind(1)
    noise = torch.stack([torch.randn(*latent_shape, generator=g) for g in generators])
    return noise, u, chance < dropout


def condition_dropout(f_fuse: Tensor, empty: Tensor, dropped: Tensor) -> Tensor:
    """f_fuse (B, L, D_txt) with the tokens of the empty prompt (L, D_txt) in the dropped (B,) clips, for guidance."""
    return torch.where(dropped.to(f_fuse.device)[:, None, None], empty.to(f_fuse), f_fuse)


class VideoDecoder(nn.Module):
    """A diffusers text-to-video pipeline whose prompt embeddings we supply, with LoRA on the attention of its DiT.

    Only `transformer` is a submodule; VAE and text encoder stay in `pipe`, outside parameters() and state_dict(). `config` is the
    DiT's, for where the DiT is not loaded. `lora_rank=0`: no LoRA. Its start is drawn from torch's global generator.
    """

    def __init__(
        self,
        pipe: WanPipeline | CogVideoXPipeline,
        text_length: int,
        config: dict[str, Any] | None = None,
        lora_rank: int = 16,
        lora_alpha: float = 16,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        self.pipe, self.transformer, self.scheduler = pipe, pipe.transformer, pipe.scheduler
        self.config = config if pipe.transformer is None else pipe.transformer.config
        self.name = pipe.config.get("_name_or_path") or type(pipe).__name__
        self.is_wan = isinstance(pipe, WanPipeline)
        self.text_length = text_length  # L
        self.text_width = self.config["text_dim" if self.is_wan else "text_embed_dim"]  # D_txt
        p = self.config["patch_size"]
        self.patch = tuple(p) if self.is_wan else (1, p, p)  # latent frames, rows, columns to a token of the DiT
        pipe.set_progress_bar_config(disable=True)
        if self.transformer is None:
            return
        self.transformer.requires_grad_(False)
        if lora_rank:
            self.transformer.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=LORA_TARGETS))
            cast_training_params(self.transformer)  # to fp32: peft gave them the DiT's dtype
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path = WAN,
        lora_rank: int = 16,
        lora_alpha: float = 16,
        *,
        load_transformer: bool = True,
        load_vae: bool = False,
        load_text_encoder: bool = False,
        dtype: torch.dtype = torch.float32,
        tiling: bool = False,
        gradient_checkpointing: bool = False,
    ) -> "VideoDecoder":
        """A pipeline from a folder or the Hub; what is not loaded is not downloaded either. `tiling`: the VAE works in tiles and clip
        by clip, in less memory. Raises ValueError for a pipeline of another kind."""
        name = str(name_or_dir)
        index = DiffusionPipeline.load_config(name)  # model_index.json
        kind, second = index["_class_name"], index.get("transformer_2", [None])[0]  # Wan2.2 has two transformers
        known = kind in PIPELINES and not second
        config = AutoModel.load_config(name, subfolder="transformer") if known else {}
        if not known or config.get("patch_size_t"):
            raise ValueError(
                f"{name}/model_index.json: found {kind}, wanted a WanPipeline with one transformer or a CogVideoXPipeline 1.0 "
                f"(without patch_size_t): choose such a model, e.g. --decoder {WAN}"
            )
        if kind == "WanPipeline":
            # No config of Wan's DiT has its text length. WanPipeline is called with 512; a tiny model says less here
            text_length = min(512, int(get_tokenizer_config(name, subfolder="tokenizer").get("model_max_length", 512)))
            dtypes = {"default": dtype, "vae": torch.float32}  # this VAE is meant to run in fp32
        else:
            text_length, dtypes = config["max_text_seq_length"], dtype  # this pipeline wants one dtype throughout
        parts = {"transformer": load_transformer, "vae": load_vae, "text_encoder": load_text_encoder, "tokenizer": load_text_encoder}
        pipe = PIPELINES[kind].from_pretrained(name, dtype=dtypes, **{part: None for part, load in parts.items() if not load})
        if load_vae and tiling:
            pipe.vae.enable_tiling()
            pipe.vae.enable_slicing()
        return cls(pipe, text_length, config, lora_rank, lora_alpha, gradient_checkpointing)

    def to(self, device: torch.device | str) -> "VideoDecoder":
        """Moves all that is loaded, VAE and text encoder too, to `device` (dtypes are chosen on loading)."""
        self.pipe.to(device)
        return self

    def diffusion_loss(self, y: Tensor, f_fuse: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        """Eq. 9, one value a clip: (B,), the mean squared error of what the decoder's scheduler has the DiT predict.

        y, noise (B, C, f, h, w), f_fuse (B, L, D_txt), u (B,) of `draw`. ValueError where y or f_fuse does not fit the decoder.
        """
        self._check_latents(y)
        self._check_condition("f_fuse", f_fuse)
        y, noise, u = y.float(), noise.to(y.device).float(), u.to(y.device)  # prepared latents are fp16
        scheduler = self.scheduler.config
        if self.is_wan:  # flow matching: the DiT predicts a velocity
            s = scheduler.get("flow_shift") or scheduler.get("shift") or 3.0  # of UniPC (Wan 1.3B: 3), of Euler
            sigma = (s * u / (1 + (s - 1) * u))[:, None, None, None, None]  # (B, 1, 1, 1, 1)
            t = 1000 * sigma.flatten()  # (B,)
            y_t = (1 - sigma) * y + sigma * noise  # (B, C, f, h, w)
            target = noise - y  # (B, C, f, h, w)
        else:  # the noising of CogVideoX's own scheduler, at whole timesteps
            t = (scheduler.num_train_timesteps * u).long()  # (B,)
            y_t = self.scheduler.add_noise(y, noise, t)  # (B, C, f, h, w)
            targets = {"v_prediction": self.scheduler.get_velocity(y, noise, t), "epsilon": noise, "sample": y}
            target = targets[scheduler.prediction_type]  # (B, C, f, h, w)
        error = target - self.predict(y_t, f_fuse, t).float()  # (B, C, f, h, w)
        return error.square().mean(dim=(1, 2, 3, 4))  # Eq. 9

    forward = diffusion_loss  # what accelerate and DDP wrap

    def predict(self, y_t: Tensor, f_fuse: Tensor, t: Tensor) -> Tensor:
        """ϵ_θ(y_t, f_fuse, t) of Eq. 9: the DiT once. y_t and the result (B, C, f, h, w), t (B,) in 0 ... 1000."""
        y_t, f_fuse = y_t.to(self.transformer.dtype), f_fuse.to(self.transformer.dtype)
        if self.is_wan:
            return self.transformer(y_t, t, f_fuse, return_dict=False)[0]
        y_t, rotary = y_t.transpose(1, 2), None  # (B, f, C, h, w)
        if self.config["use_rotary_positional_embeddings"]:  # CogVideoX 5B; the pipeline wants the size in pixels
            h, w = (n * self.pipe.vae_scale_factor_spatial for n in y_t.shape[3:])
            rotary = self.pipe._prepare_rotary_positional_embeddings(h, w, y_t.shape[1], y_t.device)
        return self.transformer(y_t, f_fuse, t, image_rotary_emb=rotary, return_dict=False)[0].transpose(1, 2)

    def generate(
        self,
        f_fuse: Tensor,
        empty: Tensor,
        frames: int,
        height: int,
        width: int,
        generators: list[torch.Generator],
        steps: int = 50,
        guidance: float = 5.0,
    ) -> Tensor:
        """Videos uint8 (B, F, H, W, 3) on the CPU: the pipeline with f_fuse (B, L, D_txt) as its prompt (§3.3).

        `empty` (L, D_txt) is the empty prompt that guidance leads away from. One generator a clip (`clip_generator`), so that a
        video does not depend on its batch. Raises ValueError for a size that the pipeline would round.
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
        """(C, f, h, w) of the latents of a video. Raises ValueError where the sizes do not divide or the VAE is not loaded."""
        if self.pipe.vae is None:
            raise ValueError(f"{self.name}: the VAE is not loaded; VideoDecoder.from_pretrained(..., load_vae=True)")
        time, space = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        f, h, w = (frames - 1) // time + 1, height // space, width // space
        step = 4 if self.is_wan else 8  # after the first frame; Wan's VAE drops what is over, CogVideoX's adds frames
        rows, columns = space * self.patch[1], space * self.patch[2]
        if frames % step != 1 or f % self.patch[0] or height % rows or width % columns:
            raise ValueError(
                f"{self.name}: a video of {frames} frames, {height}x{width}, does not fit: wanted {step}k+1 frames, "
                f"their latent frames (now {f}) a multiple of {self.patch[0]}, height of {rows} and width of {columns}"
            )
        return self.config["in_channels"], f, h, w

    @torch.no_grad()
    def encode_latents(self, video: Tensor) -> Tensor:
        """uint8 (B, F, H, W, 3) -> latents (B, C, f, h, w) as the DiT sees them: the posterior's mode, normalised."""
        vae, shape = self.pipe.vae, self.latent_shape(*video.shape[1:4])
        x = video.to(vae.device).permute(0, 4, 1, 2, 3) / 127.5 - 1  # (B, 3, F, H, W) in [-1, 1]
        z = vae.encode(x.to(vae.dtype)).latent_dist.mode().float()  # (B, C, f, h, w)
        if z.shape[1:] != shape:
            raise ValueError(
                f"{self.name}/vae makes latents {tuple(z.shape[1:])}, its config.json and the DiT say {shape}: set "
                f"scale_factor_temporal and scale_factor_spatial there to what it does, or pair it with its own DiT"
            )
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
        """The decoder's text tokens of each caption, (n_i, D_txt) float32 on the CPU, by the pipeline's own encoder.

        Padded with zeros to text_length they are the pipeline's prompt embeddings. Wan: n_i counts a caption's real tokens, the
        rest is zero. CogVideoX does not mask its padding, which has values: n_i is always text_length.
        """
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.text_length}
        tokens, _ = self.pipe.encode_prompt(captions, **options)  # (B, L, D_txt)
        counts = (tokens != 0).any(-1).sum(-1)  # (B,); a token that was encoded is never all zero
        return [e[:n].float().cpu() for e, n in zip(tokens, counts.tolist(), strict=True)]

    def save_lora(self, folder: str | Path) -> None:
        """Writes pytorch_lora_weights.safetensors, its rank and scale within, for `load_lora_weights` of diffusers."""
        lora = self.transformer.peft_config["default"]
        unfinished = Path(folder) / f"{LORA_FILE}.tmp"  # a killed process leaves no half file under the real name
        type(self.pipe).save_lora_weights(
            folder,
            get_peft_model_state_dict(self.transformer),
            weight_name=unfinished.name,
            transformer_lora_adapter_metadata=lora.to_dict() | {"target_modules": LORA_TARGETS},  # peft's set has no order
        )
        unfinished.replace(unfinished.with_suffix(""))

    def load_lora(self, folder: str | Path) -> None:
        """Reads what `save_lora` wrote into the present parameters. Raises ValueError for the LoRA of another model."""
        found, about = self.pipe.lora_state_dict(folder, weight_name=LORA_FILE, use_safetensors=True, return_lora_metadata=True)
        found = {key.removeprefix("transformer."): value for key, value in found.items()}
        wanted, lora = get_peft_model_state_dict(self.transformer), self.transformer.peft_config["default"]
        same_shapes = {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
        rank, alpha = ((about or {}).get(f"transformer.{name}") for name in ("r", "lora_alpha"))
        if not same_shapes or alpha != lora.lora_alpha:
            raise ValueError(
                f"{Path(folder) / LORA_FILE}: {len(found)} matrices of rank {rank}, alpha {alpha}; {self.name} wants {len(wanted)} of "
                f"rank {lora.r}, alpha {lora.lora_alpha}: load it into the decoder, rank and alpha it was trained with"
            )
        set_peft_model_state_dict(self.transformer, found)

    def _latent_moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, broadcast over z (B, C, f, h, w), by which the pipeline normalises latents."""
        config = self.pipe.vae.config
        if not self.is_wan:
            return z.new_zeros(()), z.new_tensor(1 / config.scaling_factor)
        return tuple(z.new_tensor([config.latents_mean, config.latents_std])[:, None, :, None, None, None])

    def _check_condition(self, what: str, tokens: Tensor) -> None:
        if tokens.shape[1:] != (self.text_length, self.text_width):
            raise ValueError(
                f"{what} has {tokens.shape[1]} tokens of width {tokens.shape[2]}, but {self.name} reads {self.text_length} of width "
                f"{self.text_width}: prepare text tokens and train the Brain Model for it (python data.py, --decoder {self.name})"
            )

    def _check_latents(self, y: Tensor) -> None:
        if y.shape[1] != self.config["in_channels"] or any(n % p for n, p in zip(y.shape[2:], self.patch, strict=True)):
            raise ValueError(
                f"latents {tuple(y.shape[1:])} (C, f, h, w), but {self.name} reads {self.config['in_channels']} channels in patches "
                f"of {self.patch}: they are of another VAE or size; make them anew (python data.py, --decoder {self.name})"
            )

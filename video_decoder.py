r"""The video decoder: a pretrained text-to-video diffusion transformer (DiT) that reads f_fuse as its prompt.

Paper §3.2, Eq. 9, and §4.1: Wan2.1 1.3B with LoRA (rank 16, scaling factor 16), trained by the diffusion
loss. The framework is model-agnostic: any `WanPipeline` of one transformer will do, and any CogVideoX 1.0.

    in    f_fuse (B, L, D_txt)      of the Mixture-of-Memories, Eq. 8; L and D_txt are the decoder's
    in    y      (B, C, f, h, w)    latents of the paper's video y, as the DiT sees them (`encode_latents`)
    out   diffusion_loss -> (B,)    generate -> uint8 (B, F, H, W, 3)

Why latents? A DiT works in the compressed space of a VAE, here 8 x 8 pixels and 4 frames a cell. Training
holds the DiT alone: latents and text tokens are prepared once. A clip's loss depends on no other clip, so
that a batch may pass through the DiT in parts."""

from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self- and cross-attention
ATTENTION = [  # its kernels on a GPU, and on the CPU
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def recompute(block: nn.Module, *inputs):
    """A block of the DiT that keeps the output of attention and computes all else again in the backward pass:
    attention is most of the work of a long video, and little of its memory."""
    keep_attention = partial(create_selective_checkpoint_contexts, ATTENTION)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=keep_attention)


def shifted(u: Tensor, s: float) -> Tensor:
    """A time in [0, 1] moved towards noise where s > 1: u -> s u / (1 + (s - 1) u)."""
    return s * u / (1 + (s - 1) * u)


class VideoDecoder(nn.Module):
    """A diffusers pipeline whose prompt embeddings we supply, with LoRA on its DiT's attention.

    Only `transformer` is a submodule; VAE and text encoder stay in `pipe`, outside parameters(). config is
    the DiT's. lora_rank 0: no LoRA. LoRA's first weights are drawn from torch's global generator."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        text_length: int,  # L
        config: dict[str, Any],
        lora_rank: int = 16,
        lora_alpha: float = 16,
        gradient_checkpointing: bool = False,
        noise_shift: float = 1.0,  # of the diffusion time in training; above 1, noisier
    ):
        super().__init__()
        self.pipe, self.transformer, self.scheduler = pipe, pipe.transformer, pipe.scheduler
        self.config, self.noise_shift, self.text_length = config, noise_shift, text_length
        self.is_wan = isinstance(pipe, WanPipeline)
        self.text_width = config["text_dim" if self.is_wan else "text_embed_dim"]  # D_txt
        pipe.set_progress_bar_config(disable=True)
        if self.transformer is not None:
            self.transformer.requires_grad_(False)
            if gradient_checkpointing:
                self.transformer.enable_gradient_checkpointing(recompute)
            if lora_rank:  # "trained with LoRA": W + (alpha / rank) B A, where B starts at 0
                lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=LORA_TARGETS)
                self.transformer.add_adapter(lora)
                cast_training_params(self.transformer)  # to fp32: peft gave them the DiT's dtype

    def to(self, device: torch.device | str) -> "VideoDecoder":
        """Moves all that is loaded, VAE and text encoder too (dtypes are chosen on loading)."""
        self.pipe.to(device)
        return self

    def diffusion_loss(self, y: Tensor, f_fuse: Tensor, noise: Tensor, u: Tensor) -> Tensor:
        r"""Eq. 9: $L(\theta) = E_{y, \epsilon, f^{fuse}, t}
        [ \| \epsilon - \epsilon_\theta(y_t, f^{fuse}, t) \|_2^2 ]$

        The decoder learns to predict the noise in a noisy video, with f_fuse as its prompt. What it cannot
        see in y_t it must take from f_fuse: so Eq. 9 teaches the Mixture-of-Memories. Wan predicts a
        velocity, noise less video, in place of the noise. Choices: how u is drawn; the mean, not the paper's
        sum, over a clip's latents: a sum would outweigh L_stage1 a million times in Eq. 10.

        y, noise (B, C, f, h, w), f_fuse (B, L, D_txt), u (B,) in [0, 1) -> (B,), one value a clip.
        """
        y = y.float()  # prepared latents are fp16
        u = shifted(u, self.noise_shift)  # ours; the scheduler's own shift comes below
        scheduler = self.scheduler.config
        if self.is_wan:  # flow matching
            # UniPC's name for it, or Euler's; 3 is Wan 1.3B's
            s = scheduler.get("flow_shift") or scheduler.get("shift") or 3.0
            sigma = shifted(u, s)[:, None, None, None, None]  # (B, 1, 1, 1, 1)
            t = 1000 * sigma.flatten()  # (B,)
            y_t = (1 - sigma) * y + sigma * noise  # (B, C, f, h, w)
            target = noise - y  # (B, C, f, h, w)
        else:  # the noising of CogVideoX's scheduler, at whole timesteps
            last = scheduler.num_train_timesteps - 1
            t = ((last + 1) * u).long().clamp(max=last)  # (B,); a shifted u may round to 1
            y_t = self.scheduler.add_noise(y, noise, t)  # (B, C, f, h, w)
            velocity = self.scheduler.get_velocity(y, noise, t)  # (B, C, f, h, w)
            target = {"epsilon": noise, "sample": y, "v_prediction": velocity}[scheduler.prediction_type]
        error = target - self.predict(y_t, f_fuse, t).float()  # (B, C, f, h, w)
        return error.square().mean(dim=(1, 2, 3, 4))  # (B,)  Eq. 9

    def predict(self, y_t: Tensor, f_fuse: Tensor, t: Tensor) -> Tensor:
        r"""$\epsilon_\theta(y_t, f^{fuse}, t)$: the DiT once. y_t and the result (B, C, f, h, w), t (B,) to
        1000."""
        y_t, f_fuse = y_t.to(self.transformer.dtype), f_fuse.to(self.transformer.dtype)
        if self.is_wan:
            return self.transformer(y_t, t, f_fuse, return_dict=False)[0]
        y_t, rotary = y_t.transpose(1, 2), None  # (B, f, C, h, w)
        if self.config["use_rotary_positional_embeddings"]:  # CogVideoX 5B; its pipeline wants pixels
            h, w = (n * self.pipe.vae_scale_factor_spatial for n in y_t.shape[3:])
            rotary = self.pipe._prepare_rotary_positional_embeddings(h, w, y_t.shape[1], y_t.device)
        return self.transformer(y_t, f_fuse, t, image_rotary_emb=rotary, return_dict=False)[0].transpose(1, 2)

    def generate(
        self,
        f_fuse: Tensor,
        empty: Tensor,
        size: tuple[int, int, int],
        generators: list[torch.Generator],
        steps: int = 50,
        guidance: float = 5.0,
    ) -> Tensor:
        """f_fuse (B, L, D_txt) -> videos uint8 (B, F, H, W, 3) on the CPU (§3.3): from noise to video, in
        sampling steps that follow the prompt and lead away from the empty one (L, D_txt).

        size: F, H, W. One generator a clip, so that a video does not depend on its batch.
        """
        frames, height, width = size
        f_fuse = f_fuse.to(self.pipe.device, self.transformer.dtype)
        video = self.pipe(
            prompt_embeds=f_fuse,
            negative_prompt_embeds=empty.to(f_fuse).expand_as(f_fuse),
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        )
        return (torch.from_numpy(video.frames) * 255).round().byte()

    @torch.no_grad()
    def encode_latents(self, video: Tensor) -> Tensor:
        """uint8 (B, F, H, W, 3) -> latents y (B, C, f, h, w) as the DiT sees them: the mode, normalised."""
        vae = self.pipe.vae
        x = video.to(vae.device).permute(0, 4, 1, 2, 3) / 127.5 - 1  # (B, 3, F, H, W) in [-1, 1]
        z = vae.encode(x.to(vae.dtype)).latent_dist.mode().float()  # (B, C, f, h, w)
        mean, std = self.latent_moments(z)
        return (z - mean) / std

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """The inverse: latents (B, C, f, h, w) as the DiT sees them -> uint8 (B, F, H, W, 3) on the CPU."""
        latents = latents.to(self.pipe.vae.device).float()
        mean, std = self.latent_moments(latents)
        x = self.pipe.vae.decode((latents * std + mean).to(self.pipe.vae.dtype)).sample  # (B, 3, F, H, W)
        video = self.pipe.video_processor.postprocess_video(x, output_type="np")
        return (torch.from_numpy(video) * 255).round().byte()

    def latent_moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation by which the pipeline normalises latents, broadcast over z."""
        config = self.pipe.vae.config
        if not self.is_wan:
            return z.new_zeros(()), z.new_tensor(1 / config.scaling_factor)
        mean, std = z.new_tensor(config.latents_mean), z.new_tensor(config.latents_std)  # (C,), (C,)
        return mean[:, None, None, None], std[:, None, None, None]

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> list[Tensor]:
        """The decoder's text tokens of each caption, (n_i, D_txt) float32 on the CPU; padded with zeros to L
        they are the pipeline's prompt embeddings.

        Wan: n_i counts a caption's real tokens. CogVideoX does not mask its padding, which has values: n_i
        is L."""
        tokens, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )  # (B, L, D_txt)
        counts = (tokens != 0).any(-1).sum(-1)  # (B,); a token that was encoded is never all zero
        return [e[:n].float().cpu() for e, n in zip(tokens, counts.tolist(), strict=True)]

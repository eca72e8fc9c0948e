"""Folders of diffusers pipelines, and files of LoRA weights: read whole and finite, or refused in one error.
Weights come from safetensors alone, and no code comes with them."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoModel, CogVideoXPipeline, DiffusionPipeline, WanPipeline
from huggingface_hub import constants
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from support.files import check_room, find_weights
from support.readers import read_tensors, reading
from support.videos import LIMIT

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PIPELINES = {"WanPipeline": WanPipeline, "CogVideoXPipeline": CogVideoXPipeline}
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
WANTED = "a WanPipeline with one transformer or a CogVideoXPipeline 1.0, all of it as plain safetensors"
ADVICE = f"download it again, or choose another --decoder, e.g. {WAN}"


def load_pipeline(
    name: str,
    dtype: torch.dtype = torch.float32,
    transformer: bool = False,
    vae: bool = False,
    text_encoder: bool = False,
    tiling: bool = False,
) -> tuple[DiffusionPipeline, int, dict]:
    """A folder, or NAME or NAME@REVISION on the Hub -> the pipeline with these parts, its text length L, its
    DiT's config.

    What is not loaded is not downloaded either. tiling: the VAE works in tiles and clip by clip, in less
    memory. Raises ValueError where the pipeline is of another kind or damaged."""
    name, revision = find_weights(name), None
    with reading(name, WANTED, ADVICE):  # whatever damage makes diffusers, transformers and safetensors say
        if not Path(name).exists():
            name, _, revision = name.partition("@")
        # without the first, diffusers tells that it is offline
        hub = {"local_files_only": constants.HF_HUB_OFFLINE, "revision": revision or None}
        kind, config, L = read_configs(name, **hub)
        D_txt = config["text_dim" if kind == "WanPipeline" else "text_embed_dim"]
        dtypes = {  # Wan's VAE is meant to run in fp32; T5-XXL takes 11 GB in bf16, 23 in fp32
            "default": dtype,
            "vae": torch.float32 if kind == "WanPipeline" else dtype,
            "text_encoder": torch.bfloat16 if D_txt >= 4096 else dtype,
        }
        parts = dict(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=text_encoder)
        absent = {part: None for part, load in parts.items() if not load}
        hub["variant"] = "fp16" if any(_in_fp16(Path(name, part)) for part in parts.keys() - absent) else None
        pipe = PIPELINES[kind].from_pretrained(name, dtype=dtypes, use_safetensors=True, **hub, **absent)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                _check_finite(part)
    if vae and tiling:
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
    return pipe, L, config


def read_configs(name: str, **hub) -> tuple[str, dict, int]:
    """Of a folder or a name on the Hub the pipeline's class, its DiT's config and its text length L; hub:
    options of the Hub. Raises ValueError for a pipeline of another kind."""
    index = DiffusionPipeline.load_config(name, **hub)  # model_index.json
    kind, second = index["_class_name"], index.get("transformer_2", [None])[0]  # Wan2.2 has two
    libraries = {value[0] for value in index.values() if isinstance(value, list)}
    if kind not in PIPELINES or second or not libraries <= {None, "diffusers", "transformers"}:
        raise ValueError(f"a {kind}{' of two transformers' if second else ''}")
    config = AutoModel.load_config(name, subfolder="transformer", **hub)
    if config.get("patch_size_t"):
        raise ValueError("a CogVideoXPipeline 1.5, with patch_size_t")
    if kind != "WanPipeline":
        return kind, config, config["max_text_seq_length"]
    # no config of Wan's DiT has L: the pipeline is called with 512; a tiny model says less here
    tokenizer = get_tokenizer_config(name, subfolder="tokenizer", **hub)
    return kind, config, min(512, int(tokenizer.get("model_max_length", 512)))


def _in_fp16(folder: Path) -> bool:
    """Are the weights of a part there in this variant alone?"""
    files = [*folder.glob("*.safetensors")]
    return bool(files) and all(".fp16" in file.name for file in files)


def _check_finite(model: nn.Module) -> None:
    for key, weight in model.named_parameters():
        if weight.is_meta:  # so diffusers leaves a weight that the file lacks
            raise ValueError(f"no {key}")
        # in blocks: a text encoder's embedding would double its memory
        if not all(block.isfinite().all() for block in weight.split(4096)):
            raise ValueError(f"no finite {key}")


def latent_shape(decoder, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(C, f, h, w) of a video's latents, of a video_decoder.VideoDecoder with its VAE. Raises ValueError,
    naming the pipeline, where sizes do not divide."""
    time, space = decoder.pipe.vae_scale_factor_temporal, decoder.pipe.vae_scale_factor_spatial
    f, h, w = (frames - 1) // time + 1, height // space, width // space
    step = 4 if decoder.is_wan else 8  # frames beyond k steps Wan's VAE drops, and CogVideoX's adds some
    p, *patch = patch_of(decoder)
    rows, columns = (space * n for n in patch)
    most = decoder.config.get("rope_max_seq_len", LIMIT)  # positions a side that Wan's DiT knows
    wanted = ""
    if frames % step != 1 or f % p or height % rows or width % columns:
        wanted = f"{step}k+1 frames, a multiple of {p} latent frames (now {f})"
        wanted += f", a height that is a multiple of {rows} and a width of {columns}"
    elif 3 * frames * height * width > LIMIT or max(f // p, height // rows, width // columns) > most:
        wanted = f"at most {LIMIT:,} bytes of frames, {most:,} patches a side"
    if wanted:
        video = f"a video of {frames} frames, {height}x{width}"
        raise ValueError(f"{name_of(decoder)}: {video}, does not fit: wanted {wanted}")
    return decoder.config["in_channels"], f, h, w


def check_prepared(decoder, latents: tuple[int, ...], empty: tuple[int, ...]) -> None:
    """Raises ValueError where prepared latents (C, f, h, w) or text (L, D_txt) are not this decoder's."""
    C, L, D_txt = decoder.config["in_channels"], decoder.text_length, decoder.text_width
    patch, name = patch_of(decoder), name_of(decoder)
    if (latents[0], *empty) != (C, L, D_txt) or np.mod(latents[1:], patch).any():
        prepared = f"prepared latents {tuple(latents)} and text tokens {tuple(empty)}"
        wanted = f"{C} channels in patches of {patch}, {L} tokens of width {D_txt}"
        advice = f"prepare them for it: python data.py, --decoder {name}"
        raise ValueError(f"{prepared}, but {name} reads {wanted}: {advice}")


def patch_of(decoder) -> tuple[int, int, int]:
    """Latent frames, rows and columns a token of the DiT."""
    p = decoder.config["patch_size"]
    return tuple(p) if decoder.is_wan else (1, p, p)


def name_of(decoder) -> str:
    return decoder.pipe.config.get("_name_or_path") or type(decoder.pipe).__name__


def save_lora(decoder, folder: Path) -> None:
    """Writes LORA_FILE, its rank and scale within, for `load_lora_weights` of diffusers."""
    lora = decoder.transformer.peft_config["default"].to_dict()
    lora["target_modules"] = sorted(lora["target_modules"])
    weights = get_peft_model_state_dict(decoder.transformer)
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, weights)
    save = type(decoder.pipe).save_lora_weights
    save(folder, weights, weight_name=LORA_FILE, transformer_lora_adapter_metadata=lora)


def lora_scale(folder: Path) -> tuple[int, float]:
    """Rank and alpha of what `save_lora` wrote."""
    file = Path(folder) / LORA_FILE
    with reading(file, "a LoRA of this program"), safe_open(file, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        return metadata["transformer.r"], metadata["transformer.lora_alpha"]


def load_lora(decoder, folder: Path) -> None:
    """Reads what `save_lora` wrote into the present parameters. Raises ValueError where the file is damaged
    or of another model, rank or scale."""
    file, lora = Path(folder) / LORA_FILE, decoder.transformer.peft_config["default"]
    expected = get_peft_model_state_dict(decoder.transformer)
    matrices = f"the {len(expected)} matrices of rank {lora.r}, alpha {lora.lora_alpha} of {name_of(decoder)}"
    with reading(file, matrices, "load it into the decoder, rank and alpha that it was trained with"):
        rank, alpha = lora_scale(folder)
        if (rank, alpha) != (lora.r, lora.lora_alpha):
            raise ValueError(f"matrices of rank {rank}, alpha {alpha}")
        weights = read_tensors(file, {f"transformer.{key}": x.shape for key, x in expected.items()})
    weights = {key.removeprefix("transformer."): x for key, x in weights.items()}
    set_peft_model_state_dict(decoder.transformer, weights)

"""The frozen encoders: CLIP of frames and captions, ViCLIP of clips -> unit vectors (§3.1)."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from prepare.viclip import ViCLIP, read_weights
from support.readers import MissingFile, check_keys, damaged, read_json, reading

CONFIG, WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
Tokenizer = Callable[[list[str]], Tensor]


def load_clip(name: str) -> tuple[nn.Module, dict, Tokenizer]:
    """A frozen open_clip model, its image statistics {"size", "mean", "std"} and its tokenizer.

    name: "MODEL/PRETRAINED" ("ViT-L-14-quickgelu/openai"), or "local-dir:FOLDER" of open_clip_config.json,
    open_clip_model.safetensors and the tokenizer's files, of which no code is ever run. Raises
    FileNotFoundError for what is missing, ValueError for an unknown name and a damaged file.
    """
    schema, _, place = name.partition(":")
    model_name, _, pretrained = name.partition("/")
    if schema == "local-dir":
        with reading(place, advice="download the folder again"):
            model, tokenizer = _load_folder(Path(place))
    elif model_name not in open_clip.list_models():
        raise ValueError(f"--clip {name}: open_clip has no model {model_name}")
    else:
        try:
            model = open_clip.create_model_from_pretrained(model_name, pretrained, return_transform=False)
        except RuntimeError as error:
            raise ValueError(f"--clip {name}: {error}") from error
        tokenizer = _load_tokenizer(model_name, open_clip.get_model_config(model_name)["text_cfg"])
    return model.eval().requires_grad_(False), image_stats(model), tokenizer


def _load_tokenizer(name: str, text_cfg: dict) -> Tokenizer:
    """By open_clip; one of transformers runs no code of the folder that it is read from."""
    safely = {"trust_remote_code": False} if text_cfg.get("hf_tokenizer_name") else {}
    return open_clip.get_tokenizer(name, **safely)


def _load_folder(folder: Path) -> tuple[nn.Module, Tokenizer]:
    config, name = folder / CONFIG, f"local-dir:{folder}"
    if not config.is_file():
        raise MissingFile(f"CLIP: {config} not found, wanted with {WEIGHTS[0]} and tokenizer.json")
    model_cfg = read_json(config, keys={"model_cfg": dict})["model_cfg"]
    check_keys(model_cfg, config, {"text_cfg": dict, "vision_cfg": dict})
    _refuse_code(model_cfg, config)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # open_clip warns that it reads no weights: they are read below
    try:
        with reading(config, "the sizes and the tokenizer of a CLIP"):
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
            tokenizer = _load_tokenizer(name, model_cfg["text_cfg"])
    finally:
        logging.disable(level)
    files = [folder / name for name in WEIGHTS if (folder / name).is_file()] or [folder / WEIGHTS[0]]
    model.load_state_dict(read_weights(files[0], model))
    return model, tokenizer


def _refuse_code(value: object, config: Path) -> None:
    """Raises ValueError where a config, at any depth, asks to run code of its folder or of another one."""
    if isinstance(value, dict):
        folder = str(value.get("hf_model_name") or "")
        if value.get("trust_remote_code"):
            raise damaged(config, "trust_remote_code", "a CLIP without code of its own", "choose another")
        if folder and Path(folder).exists():
            raise damaged(config, f"hf_model_name {folder}", "no model of another folder", "choose another")
        value = [*value.values()]
    for item in value if isinstance(value, list) else ():
        _refuse_code(item, config)


def image_stats(model: nn.Module) -> dict:
    """{"size": pixels, "mean": [r, g, b], "std": [r, g, b]} of the images that a CLIP wants."""
    stats = model.visual.preprocess_cfg
    return {"size": model.visual.image_size[0], "mean": stats["mean"], "std": stats["std"]}


def prepare_frames(
    frames: Tensor, size: int, mean: Sequence[float], std: Sequence[float], squash: bool = False
) -> Tensor:
    """uint8 RGB (..., H, W, 3) -> normalised float (..., 3, size, size), bicubic, antialiased.

    The short side is resized and the centre cropped, as open_clip's transform does to one PIL image at a
    time; or, to squash, both sides are resized, as InternVid trained and tests its ViCLIP.
    """
    if frames.dtype != torch.uint8 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, wanted uint8 (..., H, W, 3)")
    *lead, H, W, _ = frames.shape
    short = min(H, W)
    h, w = (size, size) if squash else (size * H // short, size * W // short)
    x = frames.reshape(-1, H, W, 3).permute(0, 3, 1, 2).float()
    x = nn.functional.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 255)  # it overshoots
    top, left = round((h - size) / 2), round((w - size) / 2)
    x = x[:, :, top : top + size, left : left + size] / 255
    x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
    return x.reshape(*lead, 3, size, size)


def encode_images(model: nn.Module, frames: np.ndarray, batch: int = 128) -> np.ndarray:
    """e_img, CLIP of `batch` frames at once: uint8 (n, F, H, W, 3) -> unit vectors (n, F, D) float32."""
    n, F = frames.shape[:2]
    stats, images = image_stats(model), frames.reshape(n * F, *frames.shape[2:])
    e = _unit_vectors(model, lambda x: model.encode_image(prepare_frames(x, **stats)), images, batch)
    return e.reshape(n, F, -1)


def encode_texts(model: nn.Module, tokenizer: Tokenizer, captions: list[str], batch: int = 256) -> np.ndarray:
    """e_txt, CLIP of each caption: n strings -> unit vectors (n, D) float32."""
    return _unit_vectors(model, model.encode_text, tokenizer(captions).numpy(), batch)


def encode_actions(viclip: ViCLIP, frames: np.ndarray, batch: int = 16) -> np.ndarray:
    """e_act, ViCLIP of `batch` clips at once: uint8 (n, F, H, W, 3) -> unit vectors (n, D) float32."""
    c = viclip.config

    def encode(x: Tensor) -> Tensor:
        return viclip.encode_video(prepare_frames(x, c.image_size, c.image_mean, c.image_std, squash=True))

    return _unit_vectors(viclip, encode, frames, batch)


@torch.inference_mode()
def _unit_vectors(model: nn.Module, encode: Callable, items: np.ndarray, batch: int) -> np.ndarray:
    """encode(items), a batch at a time on the model's device (bf16 autocast on a GPU), normalised."""
    device = next(model.parameters()).device
    e = []
    for i in range(0, len(items), batch):
        copy = np.array(items[i : i + batch])  # memory maps are read-only
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            e.append(encode(torch.from_numpy(copy).to(device)).float().cpu())
    return nn.functional.normalize(torch.cat(e), dim=-1).numpy()

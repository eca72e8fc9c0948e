"""Is a video one scene? Cosines between unit vectors e (F, D) of its frames, by CLIP and by DINO (§4.1).

Three definitions of "CLIP-pcc" circulate: adjacent frames, all pairs (NEURONS), gated (Mind-Animator).
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from torchvision.transforms.functional import normalize, resize
from transformers import AutoImageProcessor, ViTModel

from metrics.classes import load_published
from prepare.encoders import encode_images, load_clip
from support.readers import advising, check_tensors


def adjacent(e: np.ndarray) -> float:
    """Mean cosine of adjacent frames."""
    return (e[1:] * e[:-1]).sum(1).mean()


def all_pairs(e: np.ndarray) -> float:
    """Mean cosine of all pairs of frames."""
    return ((e @ e.T).sum() - (e * e).sum()) / (len(e) * (len(e) - 1))


def gated(e: np.ndarray, e_gt: np.ndarray) -> float:
    """As `adjacent`, but 0 where the mean vectors of prediction and GT have a cosine of 0.6 or less."""
    means = np.stack([e.mean(0), e_gt.mean(0)])  # (2, D)
    cosine = means[0] @ means[1] / np.prod(np.linalg.norm(means, axis=1))
    return adjacent(e) if cosine > 0.6 else 0.0


def dtc(e: np.ndarray) -> float:
    """VBench's subject consistency: cosines to the frame before and to the first, each at least 0."""
    return np.mean([(e[1:] * e[:-1]).sum(1).clip(0), (e[1:] @ e[0]).clip(0)])


def clip_frames(weights: str, device: torch.device | str) -> Callable:
    """CLIP of open_clip: frames uint8 (F, H, W, 3) -> unit vectors (F, D)."""
    model, *_ = load_clip(weights)
    with advising("download it again"):
        check_tensors(model.to(device).state_dict(), weights)
    return lambda frames: encode_images(model, frames[None]).squeeze(0)


def dino_frames(weights: str, device: torch.device | str) -> Callable:
    """DINO of transformers: frames uint8 (F, H, W, 3) -> unit vectors (F, D)."""
    model = load_published(ViTModel, weights, "auto", add_pooling_layer=False).to(device)
    p = AutoImageProcessor.from_pretrained(weights, trust_remote_code=False)
    return partial(dino_features, model, p.size["height"], p.image_mean, p.image_std)


def dino_features(
    model: nn.Module, size: int, mean: Sequence[float], std: Sequence[float], frames: np.ndarray
) -> np.ndarray:
    """Unit vectors (F, D) of frames uint8 (F, H, W, 3), prepared as VBench does: the short side becomes
    `size`, bilinear, not antialiased, and nothing is cut off. transformers interpolates the positions."""
    x = resize(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size, antialias=False) / 255
    x = normalize(x, mean, std).to(model.device)  # (F, 3, h, w)
    tokens = [model(batch, interpolate_pos_encoding=True).last_hidden_state for batch in x.split(32)]
    return nn.functional.normalize(torch.cat(tokens)[:, 0], dim=-1).cpu().numpy()

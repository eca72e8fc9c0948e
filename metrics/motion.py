"""How a video moves: optical flow w (pairs, 2, H, W), in pixels to the right and down, and what is read from
it (§4.1). Motion smoothness and dynamic degree are VBench's, of videos at their own size."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

from support.readers import check_tensors, read_state, reading

FLOWS = {"raft": "torchvision raft_large C_T_V1", "farneback": "none: Farneback flow (OpenCV)"}
RAFT_LEAST = 128  # pixels: its features at 1/8, halved three times, must be two pixels high and wide
AMT_HUB = "lalala125/AMT"


def epe(w: np.ndarray, w_gt: np.ndarray) -> float:
    """EPE: mean distance, in pixels, between the flows of prediction and GT."""
    return np.hypot(*np.moveaxis(w - w_gt, 1, 0)).mean()


def dynamic(w: np.ndarray) -> float:
    """VBench's: 1 where of enough pairs of frames, at 8 a second, the fastest 5 % of the pixels move more
    than 6 of 256 pixels on average, else 0."""
    pairs, _, H, W = w.shape
    speed = np.sort(np.hypot(w[:, 0], w[:, 1]).reshape(pairs, H * W), 1)
    fastest = speed[:, -int(0.05 * H * W) :].mean(1)  # (pairs,)
    return float(pairs > 0 and (fastest > 6 * min(H, W) / 256).sum() >= round(4 * (pairs + 1) / 16))


def delta_dynamic(w: np.ndarray, w_gt: np.ndarray) -> float:
    """The dynamic degree of a prediction less that of its GT: -1, 0 or 1."""
    return dynamic(w) - dynamic(w_gt)


def smoothness(between: np.ndarray, frames: np.ndarray) -> float:
    """VBench's motion smoothness: how well pictures put `between` the even frames agree with the odd ones."""
    odd = frames[1::2][: len(between)]
    errors = np.abs(np.subtract(between, odd, dtype=np.int16)).mean((1, 2, 3))  # (pictures,)
    return 1 - errors.mean() / 255


def flow_smoothness(w: np.ndarray, frames: np.ndarray) -> float:
    """The same, with the even frames moved half way along their flow w."""
    return smoothness(warped_half_way(w, frames[::2]), frames)


def warped_half_way(w: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (K, H, W, 3) and the next, moved half way along w (K - 1, 2, H, W) and averaged: uint8."""
    half = torch.from_numpy(w).float() / 2  # (K - 1, 2, H, W)
    x = tensor(frames)  # (K, 3, H, W)
    *_, H, W = half.shape
    grid = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy"))  # (2, H, W)
    scale = torch.tensor([max(W - 1, 1), max(H - 1, 1)]) / 2

    def moved(frames: Tensor, half: Tensor) -> Tensor:
        places = (grid + half).permute(0, 2, 3, 1) / scale - 1  # (K - 1, H, W, 2) in -1 ... 1
        return nn.functional.grid_sample(frames, places, padding_mode="border", align_corners=True)

    between = (moved(x[:-1], -half) + moved(x[1:], half)) / 2
    return between.round().byte().permute(0, 2, 3, 1).numpy()


def load_flow(kind: str, device: torch.device | str) -> Callable:
    """Frames uint8 (F, H, W, 3) -> flow (F - 1, 2, H, W) from each to the next, by "raft" or "farneback"."""
    if kind == "farneback":
        return farneback_flow
    return partial(raft_flow, raft_large(weights=Raft_Large_Weights.C_T_V1).eval().to(device))


def farneback_flow(frames: np.ndarray) -> np.ndarray:
    """OpenCV's, with the settings of Mind-Animator's public code."""
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    w = np.zeros((len(gray) - 1, *gray[0].shape, 2), np.float32)
    for t in range(len(w)):
        w[t] = cv2.calcOpticalFlowFarneback(gray[t], gray[t + 1], None, 0.5, 3, 15, 3, 5, 1.2, 0)
    return w.transpose(0, 3, 1, 2)


def raft_flow(model: nn.Module, frames: np.ndarray) -> np.ndarray:
    """RAFT's, after 20 iterations, as VBench."""
    if len(frames) < 2:
        return np.zeros((0, 2, *frames.shape[1:3]), np.float32)
    x = tensor(frames).to(next(model.parameters()).device) / 127.5 - 1
    return of_neighbours(lambda a, b: model(a, b, num_flow_updates=20)[-1], x, 8, 16, RAFT_LEAST).numpy()


def load_amt(weights: str, device: torch.device | str) -> Callable:
    """AMT-S of the package vbench (docs/metrics.md says how to install it): `amt_between`."""
    file = Path(weights).expanduser()
    advice = f"hf download {AMT_HUB} amt-s.pth --local-dir {Path(weights).parent}"
    with reading(file, "the weights of AMT-S", advice):
        state = read_state(file, {"state_dict": dict})["state_dict"]
        model = importlib.import_module("vbench.third_party.amt.networks.AMT-S").Model()
        model.load_state_dict(check_tensors(state, file))
    return partial(amt_between, model.eval().to(device))


def amt_between(model: nn.Module, frames: np.ndarray) -> np.ndarray:
    """AMT's picture between each frame uint8 (K, H, W, 3) and the next, cut to whole numbers as VBench's."""
    x = tensor(frames).to(next(model.parameters()).device) / 255
    half = x.new_full((1, 1, 1, 1), 0.5)
    between = of_neighbours(lambda a, b: model(a, b, half, eval=True)["imgt_pred"], x, 16, 1)
    return (between * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def tensor(frames: np.ndarray) -> Tensor:
    """uint8 (F, H, W, 3) -> float (F, 3, H, W) in 0 ... 255."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float()


def of_neighbours(network: Callable, x: Tensor, multiple: int, batch: int, least: int = 1) -> Tensor:
    """network(frames, next frames) of a video x (F, 3, H, W), so many at once -> (F - 1, C, H, W). Borders
    are repeated on all sides until H and W are such multiples, at least `least`, and cut off again."""
    *_, H, W = x.shape
    h, w = max(-H % multiple, least - H), max(-W % multiple, least - W)
    top, left = h // 2, w // 2
    x = nn.functional.pad(x, (left, w - left, top, h - top), mode="replicate")
    outputs = []
    for a, b in zip(x[:-1].split(batch), x[1:].split(batch), strict=True):
        outputs.append(network(a, b)[..., top : top + H, left : left + W].cpu())
    return torch.cat(outputs)

"""How a video moves: optical flow w (pairs, 2, H, W), in pixels to the right and down, and what is read from
it (§4.1).

Motion smoothness and dynamic degree are VBench's, which measures videos at their own size: so does --size
native. At 256 x 256, the default of cc2017, every method's videos are measured at one size instead.
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

from support.readers import check_tensors, damaged, read_state

FLOWS = {"raft": "torchvision raft_large C_T_V1", "farneback": "none: Farneback flow (OpenCV)"}
AMT_HUB = "lalala125/AMT"


def epe(w: np.ndarray, w_gt: np.ndarray) -> float:
    """EPE: mean distance, in pixels, between the flows of prediction and GT."""
    return np.hypot(*np.moveaxis(w - w_gt, 1, 0)).mean()


def dynamic(w: np.ndarray) -> float:
    """VBench's: 1 where of enough pairs of frames, at 8 a second, the fastest 5 % of the pixels move more
    than 6 of 256 pixels on average, else 0."""
    pairs, _, H, W = w.shape
    if not pairs:
        return 0.0
    speed = np.hypot(w[:, 0], w[:, 1]).reshape(pairs, -1)
    fastest = np.sort(speed, 1)[:, -int(0.05 * H * W) :].mean(1)  # (pairs,)
    return float((fastest > 6 * min(H, W) / 256).sum() >= round(4 * (pairs + 1) / 16))


def delta_dynamic(w: np.ndarray, w_gt: np.ndarray) -> float:
    """The dynamic degree of a prediction less that of its GT: -1, 0 or 1."""
    return dynamic(w) - dynamic(w_gt)


def smoothness(between: np.ndarray, frames: np.ndarray) -> float:
    """VBench's motion smoothness: how well what was put `between` the even frames agrees with the odd
    frames."""
    errors = [
        np.abs(np.subtract(x, y, dtype=np.int16)).mean() for x, y in zip(between, frames[1::2], strict=False)
    ]
    return 1 - np.mean(errors) / 255


def flow_smoothness(w: np.ndarray, frames: np.ndarray) -> float:
    """The same, where the even frames are moved half way along their flow w."""
    return smoothness(warped_half_way(w, frames[::2]), frames)


def warped_half_way(w: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """What lies between each frame uint8 (K, H, W, 3) and the next, both moved half way along the flow w
    (K - 1, 2, H, W): uint8 (K - 1, H, W, 3)."""
    half = torch.from_numpy(w).float() / 2  # (K - 1, 2, H, W)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()  # (K, 3, H, W)
    *_, H, W = half.shape
    here = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy"))  # (2, H, W)
    scale = torch.tensor([max(W - 1, 1), max(H - 1, 1)]) / 2
    moved = 0
    for sign, y in ((-1, x[:-1]), (1, x[1:])):
        there = (here + sign * half).permute(0, 2, 3, 1) / scale - 1  # (K - 1, H, W, 2) in -1 ... 1
        moved = moved + nn.functional.grid_sample(y, there, padding_mode="border", align_corners=True)
    return (moved / 2).round().byte().permute(0, 2, 3, 1).numpy()


# ---------------------------------------------------------------- the networks, and the flow without one


def load_flow(kind: str, device: torch.device | str) -> Callable:
    """Frames uint8 (F, H, W, 3) -> flow (F - 1, 2, H, W) from each to the next, by "raft" or "farneback"."""
    if kind == "farneback":
        return farneback_flow
    return partial(raft_flow, raft_large(weights=Raft_Large_Weights.C_T_V1).eval().to(device))


def farneback_flow(frames: np.ndarray) -> np.ndarray:
    """OpenCV's, with the settings of Mind-Animator's public code."""
    gray = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    flows = [
        cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        for a, b in zip(gray[:-1], gray[1:], strict=True)
    ]
    _, H, W, _ = frames.shape
    return np.reshape(flows, (len(flows), H, W, 2)).transpose(0, 3, 1, 2).astype(np.float32)


def raft_flow(model: nn.Module, frames: np.ndarray) -> np.ndarray:
    """RAFT's, after 20 iterations, as VBench."""
    if len(frames) < 2:
        return np.zeros((0, 2, *frames.shape[1:3]), np.float32)
    device = next(model.parameters()).device
    x, inside = padded(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1, 8)
    flows = []
    for a, b in zip(x[:-1].split(16), x[1:].split(16), strict=True):
        flows.append(model(a.to(device), b.to(device), num_flow_updates=20)[-1][inside].cpu())
    return torch.cat(flows).numpy()


def load_amt(weights: str, device: torch.device | str) -> Callable:
    """AMT-S of the package vbench: see `amt_between`. docs/metrics.md says how to install it."""
    file = Path(weights).expanduser()
    mend = f"hf download {AMT_HUB} amt-s.pth --local-dir {Path(weights).parent}"
    state = read_state(file, {"state_dict": dict}, mend)["state_dict"]
    model = importlib.import_module("vbench.third_party.amt.networks.AMT-S").Model()
    try:
        model.load_state_dict(check_tensors(state, file, mend=mend))
    except RuntimeError as error:
        raise damaged(file, error, "the weights of AMT-S", mend) from error
    return partial(amt_between, model.eval().to(device))


def amt_between(model: nn.Module, frames: np.ndarray) -> np.ndarray:
    """What AMT puts between each frame uint8 (K, H, W, 3) and the next: uint8 (K - 1, H, W, 3), cut to whole
    numbers as VBench does."""
    device = next(model.parameters()).device
    x, inside = padded(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255, 16)
    half = torch.full((1, 1, 1, 1), 0.5, device=device)
    made = []
    for a, b in zip(x[:-1].split(1), x[1:].split(1), strict=True):
        made.append(model(a.to(device), b.to(device), half, eval=True)["imgt_pred"])
    return (torch.cat(made)[inside] * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def padded(x: Tensor, to: int) -> tuple[Tensor, tuple]:
    """x (..., H, W) with its border repeated on all sides until `to` divides both, and where the picture lies
    in it."""
    *_, H, W = x.shape
    top, left, h, w = -H % to // 2, -W % to // 2, -H % to, -W % to
    x = nn.functional.pad(x, (left, w - left, top, h - top), mode="replicate")
    return x, (..., slice(top, top + H), slice(left, left + W))

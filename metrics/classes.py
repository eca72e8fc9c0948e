"""N-way accuracy: would a frozen classifier find in the prediction what it finds in the stimulus (§4.1)?"""

from copy import deepcopy
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
)

from support.readers import check_tensors, damaged, reading


def n_way_top_k(
    pred_probs: np.ndarray | Tensor, gt_classes: np.ndarray | Tensor, n: int, k: int = 1
) -> np.ndarray:
    """Probability (clips,) that a GT class is among the k likeliest of itself and n-1 drawn of the M others.
    pred_probs (clips, classes), gt_classes (clips, G): fewer than k of those drawn may score as high as the
    best GT class, hypergeometrically; k = 1: C(below, n-1) / C(M, n-1), by chance G / (n - 1 + G). Raises
    ValueError where M < n-1."""
    probs, gt = np.asarray(pred_probs, np.float64), np.asarray(gt_classes)
    M = probs.shape[1] - gt.shape[1]
    if M < n - 1:
        classes = f"only {M} classes beside those of the GT, wanted {n - 1}"
        raise ValueError(f"{n}-way: {classes}: a classifier of more classes")
    best = np.take_along_axis(probs, gt, 1).max(1, keepdims=True)  # (clips, 1)
    candidates = np.ones(probs.shape, bool)
    np.put_along_axis(candidates, gt, False, 1)
    above = (candidates & ~(probs < best)).sum(1)  # (clips,) M minus those below
    return scipy.stats.hypergeom.cdf(k - 1, M, above, n - 1).clip(0, 1)  # its rounding may exceed 1


def accuracy(n: int, p: np.ndarray, p_gt: np.ndarray) -> np.ndarray:
    """n-way top-1 of prediction and GT, probabilities (1 or frames, classes) each; the GT's classes are its
    top 3, as in the public code of MinD-Video."""
    return n_way_top_k(p, p_gt.argsort(1)[:, -3:], n)


class Classifier:
    """Frames uint8 (n, H, W, 3) -> probabilities (1, classes) of all together, by a classifier of videos, or
    (n, classes) of each, by one of pictures. That of videos takes any n from `least` on, as in MinD-Video's
    public code: the positions of VideoMAE are sines of the patch's number, not weights."""

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu"):
        config = AutoConfig.from_pretrained(weights, trust_remote_code=False)
        self.of_video = type(config) in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING
        self.least = int(np.ravel(getattr(config, "tubelet_size", 1))[0])  # frames that become one
        kind = AutoModelForVideoClassification if self.of_video else AutoModelForImageClassification
        self.model = load_published(kind, weights).to(device)
        self.processor = AutoImageProcessor.from_pretrained(weights, trust_remote_code=False)
        self.names = list(self.model.config.id2label.values())
        self.trained = getattr(self.model.config, "num_frames", None)
        self.models = {self.trained: self.model}  # by the number of frames

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        inputs = self.processor(list(frames), return_tensors="pt").to(self.model.device)
        model = self._model_for(len(frames)) if self.of_video and self.trained else self.model
        return model(**inputs).logits.softmax(-1).cpu().numpy()

    def _model_for(self, frames: int) -> nn.Module:
        """The same weights in a model for so many frames. Raises ValueError where they depend on it."""
        if frames not in self.models:
            config = deepcopy(self.model.config)
            config.num_frames = frames
            model = type(self.model)(config).eval()
            try:
                model.load_state_dict(self.model.state_dict(), assign=True)
            except RuntimeError as error:  # positions that were learnt
                takes = f"a classifier of {self.trained} frames got {frames}"
                raise ValueError(f"{takes}: --classifier-frames 16, or another --video-classifier") from error
            self.models[frames] = model
        return self.models[frames]


def load_published(
    kind: type, weights: str | Path, dtype: torch.dtype | str = torch.float32, **options
) -> nn.Module:
    """kind.from_pretrained of a transformers folder or a name on the Hub, with all its weights, finite; no
    code of it is run, and of a folder only .safetensors are read. Raises ValueError, naming it."""
    folder = Path(weights)
    with reading(folder, f"a model for {kind.__name__}", "download it again"):
        model, info = kind.from_pretrained(
            weights,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True if folder.is_dir() else None,
            output_loading_info=True,
            **options,
        )
        if missing := sorted(info["missing_keys"]):
            lacking = f"no {', '.join(missing[:3])} ({len(missing)} in all)"
            raise damaged(folder, lacking, f"all weights of {type(model).__name__}")
        check_tensors(model.state_dict(), folder)
    return model.eval().requires_grad_(False)

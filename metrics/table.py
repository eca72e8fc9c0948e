"""The table of metrics (§4.1; docs/metrics.md has the glossary). A row says who judges (the option that names
a frozen network), which frames are picked, and the formula of what the judge makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from metrics import classes, features, motion, pixels
from support.options import option

# ---------------------------------------------------------------- which frames
# (judge, config, videos) -> an array of each. Videos (metrics.pairs.Watched) are the prediction and, for a
# metric that compares, the GT.


def all_frames(judge: Callable, config, *videos) -> list[np.ndarray]:
    """All frames, as large as they are: the judge has a size of its own."""
    return [video.seen(judge=judge) for video in videos]


def common_times(judge: Callable | None, config, *videos) -> list[np.ndarray]:
    """The smaller number of frames, uniform in time, at one size (--size): the GT's is "native"."""
    n = min(map(len, videos))
    size = videos[-1].frames.shape[1:3] if config.size == "native" else (int(config.size),) * 2
    return [video.seen(video.uniform(n), size, judge) for video in videos]


def class_frames(judge: classes.Classifier, config, *videos) -> list[np.ndarray]:
    """Frames at common times; for a classifier of videos so many as --classifier-frames says."""
    n = min(map(len, videos))
    if judge.of_video:
        n = max(n, judge.least) if config.classifier_frames == "own" else int(config.classifier_frames)
    return [video.seen(video.uniform(n), judge=judge) for video in videos]


def eight_a_second(judge: Callable, config, *videos) -> list[np.ndarray]:
    """Every so many frames that eight a second remain, as large as they are, as VBench takes them."""
    return [video.seen(range(0, len(video), max(1, round(video.fps / 8))), judge=judge) for video in videos]


def even_frames(judge: Callable, config, video) -> list[np.ndarray]:
    """What the judge makes of the even frames, and all frames, as VBench takes them."""
    return [video.seen(range(0, len(video), 2), judge=judge), video.seen()]


# ---------------------------------------------------------------- the rows


class Metric(NamedTuple):
    title: str
    better: str  # the direction
    judge: str  # the option that names its weights, or ""
    picks: Callable
    formula: Callable  # of the arrays picked -> a number, or one a frame, whose mean counts
    of_gt: bool = False  # is the prediction compared with the GT? Else shuffling changes nothing
    least: int = 1  # frames that a video needs
    bounds: tuple[float, float] = (-1, 1)
    chance: float | None = None
    signed: bool = False  # a clip's value has a sign, and that of the set is the absolute value of their mean
    note: str = ""

    @property
    def block(self) -> str:
        """The block of the printed table that it stands in."""
        if self.chance:
            return "semantic"
        return "motion and pixels" if self.picks in (eight_a_second, common_times) else "consistency"

    @property
    def of_neighbours(self) -> bool:
        """Does it compare frames of a video with each other? Then it depends on the time between them."""
        return self.least > 1

    def of_clip(self, judge: Callable | None, config, pred, stimulus, frames=None) -> float | None:
        """The metric of two metrics.pairs.Watched; None where one is missing or has too few frames. One of
        neighbours is measured at `frames` common times, where given."""
        videos = [pred, stimulus] if self.of_gt else [pred]
        if frames and self.of_neighbours:
            videos = [video and video.thinned(frames) for video in videos]
        if any(video is None or len(video) < self.least for video in videos):
            return None
        return float(np.mean(self.formula(*self.picks(judge, config, *videos))))


GATE = "; mean-pooled in the gate, in ViFi-CLIP's place"
VIDEO, IMAGE, LARGE = "video_classifier", "image_classifier", "clip_large"
SHARE, ANY = (0, 1), (0, 1e9)  # a metric's range
two_way, fifty_way = partial(classes.accuracy, 2), partial(classes.accuracy, 50)
METRICS = {
    "video_2way": Metric("2-way video", "↑", VIDEO, class_frames, two_way, True, 1, SHARE, 3 / 4),
    "video_50way": Metric("50-way video", "↑", VIDEO, class_frames, fifty_way, True, 1, SHARE, 3 / 52),
    "frame_2way": Metric("2-way frame", "↑", IMAGE, class_frames, two_way, True, 1, SHARE, 3 / 4),
    "frame_50way": Metric("50-way frame", "↑", IMAGE, class_frames, fifty_way, True, 1, SHARE, 3 / 52),
    "clip_pcc": Metric("CLIP-pcc", "↑", "clip", all_frames, features.adjacent, False, 2),
    "clip_pcc_all_pairs": Metric("... all pairs", "↑", LARGE, all_frames, features.all_pairs, False, 2),
    "clip_pcc_gated": Metric("... gated", "↑", "clip", all_frames, features.gated, True, 2, note=GATE),
    "dtc": Metric("DTC", "↑", "dino", all_frames, features.dtc, False, 2, SHARE),
    "ms": Metric("MS", "↑", "amt", even_frames, motion.smoothness, False, 3, SHARE),
    "ms_flow": Metric("MS-flow", "↑", "flow", even_frames, motion.flow_smoothness, False, 3, SHARE,
                      note="; warped half way"),
    "dynamic_degree": Metric("Dyn. Degree", "", "flow", eight_a_second, motion.dynamic, False, 2, SHARE),
    "delta_dynamic_degree": Metric("Δ Dyn. Degree", "↓", "flow", eight_a_second, motion.delta_dynamic,
                                   True, 2, signed=True),
    "epe": Metric("EPE", "↓", "flow", common_times, motion.epe, True, 2, ANY),
    "ssim": Metric("SSIM", "↑", "", common_times, pixels.ssim, True),
    "ssim_gray": Metric("SSIM gray", "↑", "", common_times, pixels.ssim_gray, True),
    "psnr": Metric("PSNR", "↑", "", common_times, pixels.psnr, True, 1, ANY),
}  # fmt: skip
NAMES = list(METRICS)
BLOCKS = list(dict.fromkeys(metric.block for metric in METRICS.values()))

LOADERS = {  # of a judge: (weights, device) -> a function of frames uint8 (F, H, W, 3)
    "video_classifier": classes.Classifier,
    "image_classifier": classes.Classifier,
    "clip": features.clip_frames,
    "clip_large": features.clip_frames,
    "dino": features.dino_frames,
    "flow": motion.load_flow,
    "amt": motion.load_amt,
}


# ---------------------------------------------------------------- the options of whoever scores


@dataclass
class Judging:
    """Who judges, and how. The weights are the published ones."""

    metrics: str = option(",".join(name for name in NAMES if name != "ms_flow"), "which, with commas between")
    size: str = option("256", "of SSIM, PSNR and EPE (256 x 256)", choices=("256", "native"))
    classifier_frames: str = option("own", "of a clip that a video classifier sees", choices=("own", "16"))
    trials: int = option(0, "of n-way accuracies, as the peers' code (100); 0: exact", least=0)
    video_classifier: str = option("MCG-NJU/videomae-base-finetuned-kinetics", "a folder or Hub name")
    image_classifier: str = option("google/vit-base-patch16-224", "likewise")
    clip: str = option("ViT-B-32-quickgelu/openai", "open_clip MODEL/PRETRAINED or local-dir:PATH")
    clip_large: str = option("ViT-L-14-quickgelu/openai", "likewise, of clip_pcc_all_pairs")
    dino: str = option("facebook/dino-vitb16", "a folder or Hub name")
    flow: str = option("raft", "torchvision's raft_large; farneback: OpenCV's", choices=tuple(motion.FLOWS))
    amt: str = option("~/.cache/vbench/amt_model/amt-s.pth", f"AMT-S (huggingface.co/{motion.AMT_HUB})")


TOY = dict(
    metrics=",".join(name for name in NAMES if name != "ms"),  # AMT-S saw nothing like it; ms_flow stands in
    size="native",
    classifier_frames="16",  # as its classifier was trained
    video_classifier="toy/videomae",
    image_classifier="toy/vit",
    clip="local-dir:toy/clip",
    clip_large="local-dir:toy/clip",
    dino="toy/dino",
    flow="farneback",
)


def asked(config) -> list[str]:
    """The names of --metrics, in the table's order. Raises ValueError for an unknown one."""
    names = {name.strip() for name in config.metrics.split(",")}
    unknown = sorted(names - set(NAMES))
    if unknown:
        raise ValueError(f"--metrics {', '.join(unknown) or repr('')}: there are {', '.join(NAMES)}")
    return [name for name in NAMES if name in names]

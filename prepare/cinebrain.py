"""CineBrain as published (Gao et al. 2025): CIFTI runs and CSV files, or the volumes of its authors."""

import csv
import warnings
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prepare import facts
from prepare.cifti import mmp_areas, read_cifti
from prepare.release import Release, only, visible
from support.readers import damaged, read_array, read_text, reading
from support.videos import check_film, read_clip


class CineBrainRelease(Release):
    """20 episodes of one subject, recorded every 0.8 s, and their clips of 4 s.

        raw/sub_0001/dtseries/*_run-1_*.dtseries.nii   runs 1-20 of fMRIPrep (91k), an episode each
        raw/sub_0001/beh_data/sub_0001_1.csv           videoStartTime, videoStopTime: s after the run's start
        raw/sub-0001/visual_audio/0.npy ...            in place of both: the authors' 27,000 volumes
        raw/videos/000000.mp4 ...                      270 an episode, 10 episodes a season; 33 frames, 8 fps
        raw/captions-qwen-2.5-vl-7b.json               a list of {"video": ".../000000.mp4", "text": ...}

    Runs, CSV files, the window and the z-score over all of a subject's volumes are those of the authors'
    cifit2npy.py; test clips 7560-8099, stated for subject 5, those of their get_metric.py. Assumed: runs are
    in the order of the episodes; every subject's test clips are the last two episodes. A subject's folder may
    also be sub-0001, sub-001 or sub_001, its volumes in there. They have neither hippocampus nor mPFC.

    delay: in volumes of 0.8 s (5: 4 s). Raises FileNotFoundError for what is missing, ValueError for a delay
    of preprocessed volumes and for two files where one is wanted.
    """

    preprocessed = True
    volumes = facts.CLIP_VOLUMES
    film = facts.CINEBRAIN_FPS, facts.SECONDS["cinebrain"], 1

    def __post_init__(self):
        second = 11 if self.subject in facts.NINTH_SEASON else 21
        episodes = [f"episode{n:02d}" for n in (*range(1, 11), *range(second, second + 10))]
        train, test = episodes[:18], episodes[18:]
        self.splits = {"train": train[: self.train_segments], "test": test[: self.test_segments]}
        self.run_of = {episode: run for run, episode in enumerate(episodes, 1)}
        self.cifti = bool(self._find(self.subject, "dtseries/*.dtseries.nii"))
        if self.cifti:
            self.delay = facts.CINEBRAIN_DELAY if self.delay is None else self.delay
        elif self.delay is not None:
            text = f"the preprocessed volumes of {self.raw} are delayed already"
            raise ValueError(f"--delay {self.delay}: {text}; leave it out")
        else:
            missing = f"{self.raw} has no CIFTI runs of subject {self.subject}"
            warnings.warn(f"{missing}: visual areas only, and no hippocampus", stacklevel=2)
        for episode in self.segments:
            missing = [file for file in self.stimulus(episode) if not file.is_file()]
            if missing:
                text = f"{missing[0]} is not there ({len(missing)} clips of {episode})"
                raise FileNotFoundError(f"{text}: unpack videos.tar")
            if not self.files(episode):
                run = self.run_of[episode]
                names = f"visual_audio/{self._numbers(run)[0]}.npy to {self._numbers(run)[-1]}.npy"
                if self.cifti:
                    names = f"dtseries/*_run-{run}_*.dtseries.nii and beh_data/*_{run}.csv"
                text = f"{episode} is not there whole: wanted {self.raw}/sub_{self.subject:04d}/{names}"
                raise FileNotFoundError(f"{text}; download it (or --train-segments FEWER)")

    def _find(self, subject: int, pattern: str) -> list[Path]:
        names = [f"sub{dash}{subject:0{digits}d}" for digits in (4, 3) for dash in "_-"]
        return [*chain(*(visible(self.raw / name, pattern) for name in names))]

    def _numbers(self, run: int) -> range:
        """Those of the volumes of a run."""
        return range((run - 1) * facts.EPISODE_VOLUMES, run * facts.EPISODE_VOLUMES)

    def _run(self, subject: int, run: int) -> list[Path]:
        """CIFTI and CSV file of a run, or its volumes in order; nothing where one is missing."""
        if self.cifti:
            series = only(self._find(subject, f"dtseries/*_run-{run}_*.dtseries.nii"), f"run {run}")
            times = only(self._find(subject, f"beh_data/*_{run}.csv"), f"the times of run {run}")
            return [*series, *times] if series and times else []
        first = self._find(subject, "visual_audio/0.npy") or self._find(subject, "0.npy")
        (first,) = only(first or [self.raw / "0.npy"], f"the first volume of subject {subject}")
        volumes = [first.with_name(f"{n}.npy") for n in self._numbers(run)]
        return volumes if all(file.is_file() for file in volumes) else []

    def files(self, segment: str) -> list[Path]:
        return self._run(self.subject, self.run_of[segment])

    def recording(self, subject: int) -> list[Path]:
        return self._run(subject, 1)[: 1 if self.cifti else None]

    @property
    def recipe(self) -> dict:
        return super().recipe | ({} if self.cifti else {"recordings": "preprocessed volumes"})

    @property
    def captions(self) -> dict[str, Path]:
        return dict.fromkeys(self.splits, self.raw / "captions-qwen-2.5-vl-7b.json")

    def video(self, segment: str, clip: int) -> tuple[Path, float]:
        number = (int(segment[-2:]) - 1) * facts.EPISODE_CLIPS + clip
        return self.raw / "videos" / f"{number:06d}.mp4", 0.0

    def stimulus(self, segment: str) -> list[Path]:
        return [self.video(segment, clip)[0] for clip in range(facts.EPISODE_CLIPS)]

    def repeats(self, segment: str) -> int:
        return 1

    @cached_property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        """The grayordinates of every ROI (CIFTI), or the visual ones, and their areas."""
        areas, names = mmp_areas(), [*chain(*facts.ROIS.values())] if self.cifti else facts.ROIS["visual"]
        index = np.flatnonzero(facts.in_areas(areas, names))
        return index, areas[index]

    @cached_property
    def columns(self) -> dict[int, slice | np.ndarray]:
        """Where the visual areas are in a published volume, by its length."""
        areas, visual = mmp_areas(), facts.ROIS["visual"]
        areas = areas[facts.in_areas(areas, visual + facts.AUDITORY_AND_LANGUAGE.split())]  # (18946,)
        return {8405: slice(None), len(areas): facts.in_areas(areas, visual)}

    def window(self, segment: str) -> tuple[int, int]:
        """As cifit2npy.py cuts a run; ValueError where the CSV does not say 18 minutes."""
        if not self.cifti:
            return 0, facts.EPISODE_VOLUMES
        (_, file), TR = self.files(segment), facts.CINEBRAIN_TR
        with reading(file, "a line of numbers videoStartTime and videoStopTime", "download it again"):
            row = next(csv.DictReader(read_text(file).splitlines()), {})
            start, stop = float(row["videoStartTime"]), float(row["videoStopTime"])
        length = facts.EPISODE_VOLUMES * TR
        if not (start >= 0 and abs(stop - start - length) <= 2 * TR):
            text = f"the video lasts {stop - start:.1f} s from {start:.1f} s on, wanted {length:.1f} s"
            raise ValueError(f"{file}: {text}: is it the CSV of this run?")
        return int((start + self.delay * TR) / TR) + 1, facts.EPISODE_VOLUMES

    def _volumes(self, segment: str) -> np.ndarray:
        """The volumes of an episode, float32 (1350, N), as they are in the release."""
        files = self.files(segment)
        index, _ = self.voxels
        if self.cifti:
            start, length = self.window(segment)
            run = read_cifti(files[0], index, facts.CINEBRAIN_TR)
            if len(run) < start + length:
                number = f"{start + length}: start, delay and 18 minutes of video"
                raise ValueError(f"{files[0]} has {len(run)} volumes, wanted {number}")
            return run[start : start + length]
        response = np.empty((len(files), len(index)), np.float32)
        for row, file in zip(response, files, strict=True):
            with reading(file, advice="unpack the archive again"):
                volume = read_array(file, shape=(None,), finite=True)
                if len(volume) not in self.columns:
                    raise damaged(file, f"{len(volume):,} numbers", "8,405 or 18,946")
            row[:] = volume[self.columns[len(volume)]]
        return response

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each voxel over all episodes, (N,) float64 each; one run in memory."""
        means, variances = [], []
        for segment in tqdm(self.segments, desc="mean and deviation", unit="episode"):
            x = self._volumes(segment).astype(np.float64)  # (1350, N): all episodes are equally long
            means.append(x.mean(0))
            variances.append(x.var(0))
        n = len(means) * facts.EPISODE_VOLUMES
        variance = np.mean(variances, 0) + np.var(means, 0)  # within an episode, and between episodes
        return np.mean(means, 0), np.sqrt(variance * n / (n - 1))

    def load_run(self, segment: str, repeat: int) -> np.ndarray:
        """(1350, N) z-scores; 0 for a voxel that is constant or not finite somewhere, as published."""
        volumes = self._volumes(segment)
        if not self.cifti:
            return volumes
        mean, deviation = self.moments
        varies = deviation > 1e-6 * np.abs(mean)  # false for NaN, too
        response = np.zeros_like(volumes)
        response[:, varies] = (volumes[:, varies] - mean[varies]) / deviation[varies]
        return response

    def read_clips(self, segment: str) -> Iterator[np.ndarray]:
        for file in self.stimulus(segment):
            check_film(file, *self.film)
            yield read_clip(file, 0.0, facts.SECONDS["cinebrain"])

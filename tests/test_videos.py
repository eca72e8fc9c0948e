"""support/videos.py: what a player shows, upright and in time, whatever the container says; frames picked, cut, written."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from support import videos
from support.readers import FileFault
from support.videos import read_clip, read_clips, read_video, uniform_frames, video_info, write_video

H, W, TICKS = 48, 64, 100_000  # ticks a second
GAP = np.array([*range(4), *range(10, 20)])  # frames of twenty: the fourth is shown until the eleventh


def film(n: int = 20, still: tuple[int, int] = (0, 0)) -> np.ndarray:
    """uint8 (n, H, W, 3): each frame is brighter than the last, but those of `still`; the top left is red."""
    level = np.array([still[0] if still[0] <= t < still[1] else t for t in range(n)], np.uint8)
    frames = np.zeros((n, H, W, 3), np.uint8) + (20 + 220 // n * level)[:, None, None, None]
    frames[:, : H // 2, : W // 2] = (200, 40, 30)
    return frames


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Every frame alike, but for what coding loses: a neighbour is farther."""
    return a.shape == b.shape and np.abs(a.astype(float) - b).mean((1, 2, 3)).max() < 3


def write(
    path: Path, frames, times=None, rate=10, turned=0, options=None, sound=0, ticks=TICKS, **codecs
) -> None:
    """A video by libav, frames at `times` in s or at a rate, `turned` by degrees, with so much silence."""
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    with av.open(str(path), "w", options=options or {}) as out:
        silence = sound and out.add_stream("libopus", rate=48_000)
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, ticks)
        if turned:
            stream.set_display_rotation(turned)
        for name, value in codecs.items():
            setattr(stream.codec_context, name, value)
        for start in range(0, int(48_000 * sound), 960):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48_000, start
            out.mux(silence.encode(frame))
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(ticks * times[i]), Fraction(1, ticks)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


SHOWN = [  # file, its frames, settings, the frames that a player shows
    *[(f"a{suffix}", film(), {}, film()) for suffix in (".mp4", ".mov", ".mkv", ".avi", ".webm", ".MP4")],
    ("a.mp4", np.rot90(film(), -1, axes=(1, 2)), {"turned": 90}, film()),
    ("a.mkv", film(), {"sample_aspect_ratio": Fraction(2)}, film().repeat(2, 2)),
    ("a.mp4", film(), {"sample_aspect_ratio": Fraction(1, 3)}, film().repeat(3, 1)),
    ("a.mkv", film(), {"sound": 3}, film()),  # which is longer
    ("a.mkv", film(), {"options": {"live": "1"}}, film()),  # whose header does not say how long it is
    ("a.avi", film(), {"max_b_frames": 2}, film()),
    *[
        ("a.avi", film()[GAP], {"times": GAP / 10, "ticks": 10, "max_b_frames": n}, film(20, still=(3, 10)))
        for n in (0, 2)
    ],
]


@pytest.mark.parametrize(("name", "frames", "settings", "shown"), SHOWN)
def test_what_a_player_shows(name, frames, settings, shown, tmp_path):
    write(tmp_path / name, frames, **settings)
    video = read_video(tmp_path / name)
    assert abs(video.fps - 10) < 0.01 and near(video.frames, shown)
    assert near(read_clip(tmp_path / name, 1.0, 1.0), shown[10:])
    assert video_info(tmp_path / name).duration == pytest.approx(2.0, abs=0.02)


def test_a_gif_has_its_times_and_an_array_lasts_as_long_as_it_is_told(tmp_path):
    write_video(tmp_path / "a.gif", film(), 10)
    np.save(tmp_path / "a.npy", film())
    gif, array = read_video(tmp_path / "a.gif"), read_video(tmp_path / "a.npy", 4)
    assert abs(gif.fps - 10) < 0.01 and near(gif.frames, film())
    assert array.fps == 5 and np.array_equal(array.frames, film())
    Image.fromarray(film(1)[0]).save(tmp_path / "b.gif")  # a still picture
    write_video(tmp_path / "c.gif", film(12, still=(0, 12)), 4)  # three seconds of the same
    for name, seconds, n in (("b.gif", 2.0, 16), ("c.gif", 2.0, 24), ("b.gif", 5.0, 40)):
        video = read_video(tmp_path / name, seconds)
        assert video.fps == 8 and near(video.frames, film(1).repeat(n, 0))


@pytest.mark.parametrize("suffix", [".webm", ".mp4"])
def test_irregular_times_give_what_a_player_shows(suffix: str, tmp_path):
    frames, jitter = film(20, still=(3, 10)), np.random.default_rng(0).uniform(0, 0.01, 20)
    write(tmp_path / f"a{suffix}", frames[GAP], GAP / 10 + jitter[GAP])
    video = read_video(tmp_path / f"a{suffix}")
    assert abs(video.fps - 10) < 0.3 and near(video.frames, frames)


def test_equal_frames_that_a_gif_merged_are_there_again(tmp_path):
    """Most of its frames last three times as long as the shortest, the last even longer."""
    frames = film(7).repeat([1, 3, 3, 3, 3, 3, 4], 0)
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=60, loop=0)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 7  # Pillow merged the rest
    video = read_video(tmp_path / "a.gif")
    assert len(video.frames) == 20 and abs(video.fps - 1000 / 60) < 0.1 and near(video.frames, frames)


def test_a_trimmed_film_is_whole(tmp_path):
    """It holds all samples, but an edit list shows only those from the fifth on, and calls that the beginning."""
    write(tmp_path / "a.mp4", film(), options={"movflags": "faststart"})
    with av.open(str(tmp_path / "a.mp4")) as source:
        with av.open(str(tmp_path / "b.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in [packet for packet in source.demux(video=0) if packet.size]:
                later = round(0.5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - later, packet.dts - later, stream
                out.mux(packet)
    assert b"elst" in (tmp_path / "b.mp4").read_bytes()
    assert near(read_video(tmp_path / "b.mp4").frames, film()[5:])
    assert near(read_clip(tmp_path / "b.mp4", 0.5, 0.5), film()[10:15])


def big_gif(side: int, ticks: int) -> bytes:
    """A GIF that is so high and wide, with one pixel in it, shown for so many 1/100 s."""
    size, lasts = (n.to_bytes(2, "little") for n in (side, ticks))
    picture = b",\0\0\0\0" + 2 * size + b"\0\x02\x02\x44\x01\0;"
    return b"GIF89a" + 2 * size + b"\x80\0\0" + b"\0" * 6 + b"!\xf9\x04\0" + lasts + b"\0\0" + picture


def cut(path: Path) -> None:
    """A video without its last 200 bytes."""
    write_video(path, film(), 10) if path.suffix == ".gif" else write(path, film())
    path.write_bytes(path.read_bytes()[:-200])


def more(path: Path) -> None:
    """A GIF, and 8 GB of zeros after its end."""
    write_video(path, film(), 10)
    os.truncate(path, 1 << 33)


BAD = {
    "empty.mp4": b"",
    "big.gif": big_gif(60_000, 1),
    "long.gif": big_gif(1600, 65_535),  # one picture, shown for 655 s
    "index.mov": cut,
    "half.gif": cut,
    "more.gif": more,
    "none.npy": lambda path: np.save(path, np.zeros((0, H, W, 3), np.uint8)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_video_is_one_error(name: str, tmp_path):
    content, path = BAD[name], tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    with pytest.raises(FileFault, match=f"{name}: found .*, wanted .*: "):
        read_video(path)


def test_a_video_larger_than_memory_is_refused_early(tmp_path, monkeypatch):
    times = [*(0.1 * t for t in range(19)), 4.9]  # five seconds of few frames
    write(tmp_path / "a.webm", film(), times)
    np.save(tmp_path / "a.npy", film(31))
    assert near(read_video(tmp_path / "a.webm").frames[[0, 18, 48, 49]], film()[[0, 18, 18, 19]])
    for limit, fault in (
        (10, "more than .* bytes of frames"),
        (30, "50 frames of"),
        (1, "frames of 64 x 48"),
    ):
        monkeypatch.setattr("support.videos.LIMIT", limit * H * W * 3)
        with pytest.raises(ValueError, match=f"a.webm: found {fault}"):
            read_video(tmp_path / "a.webm")
        with pytest.raises(ValueError, match=f"a.npy: found uint8 .* of at most {limit * H * W * 3:,} bytes"):
            read_video(tmp_path / "a.npy")


def test_clips_hold_the_frames_of_their_seconds(tmp_path):
    rate, frames = Fraction(30_000, 1001), np.concatenate([film(90), film(90)])  # levels are few
    write(tmp_path / "a.mp4", frames, rate=rate, options={"movflags": "faststart"})
    clips = list(read_clips(tmp_path / "a.mp4", 3))
    for k, clip in enumerate(clips):
        assert near(clip, frames[[2 * k <= t / rate < 2 * k + 2 for t in range(len(frames))]])
        assert np.array_equal(clip, read_clip(tmp_path / "a.mp4", 2 * k))
    assert len(clips) == 3 and len(list(read_clips(tmp_path / "a.mp4", 4, 1.5))) == 4
    with pytest.raises(ValueError, match=r"a.mp4: found 6.0 s, wanted 8.0 s: download it again"):
        next(read_clips(tmp_path / "a.mp4", 4))
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match="a.mp4: found .*, wanted .*: download it again"):
        list(read_clips(tmp_path / "a.mp4", 3))


def test_a_clip_may_lack_one_frame_in_twenty_and_times_are_rounded(tmp_path):
    """A film begins with its first frame."""
    write(tmp_path / "a.mp4", film(), [0.5 + 0.1 * t - 0.00001 * (t > 0) for t in range(20)])
    first, second = read_clips(tmp_path / "a.mp4", 2, 1.0)
    assert near(first, film()[:10]) and near(second, film()[10:])
    assert near(read_clip(tmp_path / "a.mp4", 1.0, 1.0), film()[10:])
    write(tmp_path / "a.mp4", film(40), [0.1 * t + 2 * (t >= 20) for t in range(40)])  # and not all of them
    with pytest.raises(ValueError, match="a.mp4: found 0 frames in the 2 s from 2.0 s on, wanted 1"):
        list(read_clips(tmp_path / "a.mp4", 3))
    write(tmp_path / "a.mp4", film(60)[:38], rate=20)
    assert len(read_clip(tmp_path / "a.mp4", 0)) == len(*read_clips(tmp_path / "a.mp4", 1)) == 38
    write(tmp_path / "a.mp4", film(60)[:37], rate=20)
    with pytest.raises(ValueError, match="37 frames in the 2 s from 0.0 s on, wanted 40 of a film of 1.9 s"):
        read_clip(tmp_path / "a.mp4", 0.0)


def test_a_film_of_another_rate_or_length_is_an_error(tmp_path):
    write(tmp_path / "a.mp4", film(50), rate=5)
    for seconds in (9, 10.1):
        videos.check_film(tmp_path / "a.mp4", fps=5.04, seconds=seconds, over=1)
    for fps, seconds in ((5.1, 10), (5, 10.2), (5, 8.9)):
        with pytest.raises(FileFault, match="a.mp4: found 10.0 s at 5.00 frames a second, wanted"):
            videos.check_film(tmp_path / "a.mp4", fps, seconds, over=1)


def test_frames_are_picked_at_even_distances():
    assert uniform_frames(60, 8).tolist() == [3, 11, 18, 26, 33, 41, 48, 56]
    assert uniform_frames(1, 3).tolist() == [0] * 3 and uniform_frames(3, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("shape", "size", "frames", "rows", "columns"), [
    ((60, 48, 64), (57, 48, 64), range(1, 58), slice(0, 48), slice(0, 64)),
    ((20, 30, 60), (9, 32, 48), range(1, 18, 2), slice(0, 30), slice(7, 52)),  # too wide
    ((10, 60, 30), (3, 32, 48), (1, 4, 7), slice(20, 40), slice(0, 30)),  # too tall
])  # fmt: skip
def test_videos_are_the_middle_of_a_clip_in_time_and_space(shape, size, frames, rows, columns):
    clip = np.random.default_rng(0).integers(60, 190, (*shape, 3), np.uint8)
    video = videos.video_frames(clip, *size)
    assert video.shape == (*size, 3) and video.dtype == np.uint8
    for frame, i in zip(video, frames, strict=True):
        pillows = Image.fromarray(clip[i, rows, columns]).resize(size[:0:-1], Image.Resampling.BICUBIC)
        assert np.abs(frame.astype(int) - np.array(pillows)).max() <= 1
    with pytest.raises(ValueError, match=f"{shape[0]} frames, wanted {shape[0] + 1}"):
        videos.video_frames(clip, shape[0] + 1, *size[1:])
    smaller = (shape[0], 20, shape[2], 3)
    assert videos.resized(clip, shape[1:]) is clip and videos.resized(clip, smaller[1:3]).shape == smaller
    bold = clip // 100 * 255
    assert videos.resized(bold, (90, 90)).mean() == pytest.approx(bold.mean(), abs=3)


def test_an_mp4_has_its_rate_its_key_frames_and_nearly_its_colours(tmp_path):
    noise = np.random.default_rng(0).integers(60, 190, (1, H, W, 3), np.uint8).repeat(12, 0)  # of one scene
    large, odd = (videos.resized(film(12), size) for size in ((256, 260), (257, 300)))
    for frames, pix_fmt in ((large, "yuv420p"), (odd, "yuv444p"), (noise, "yuv444p")):
        write_video(tmp_path / "a.mp4", frames, 10_000 / 1001, keyframe_every=5)
        with av.open(str(tmp_path / "a.mp4")) as video:
            stream = video.streams.video[0]
            assert stream.average_rate == Fraction(10_000, 1001) and stream.codec_context.pix_fmt == pix_fmt
            keys = [t for t, frame in enumerate(video.decode(video=0)) if frame.key_frame]
        assert np.abs(read_video(tmp_path / "a.mp4").frames.astype(float) - frames).mean() < 1.5
    assert keys == [0, 5, 10]


def test_only_mp4_and_gif_are_written(tmp_path):
    (tmp_path / "b.mp4").mkdir()
    for name, fault in (("a.avi", "wanted .mp4 or .gif"), ("b.mp4", "found a folder")):
        with pytest.raises(FileFault, match=fault):
            write_video(tmp_path / name, film(), 10)
    videos.check_writable(tmp_path / "a.GIF")


def test_a_gif_repeats_and_lasts(tmp_path):
    for fps, milliseconds in ((8, 120), (200, 20)):  # ticks of 10 ms, 20 at least
        write_video(tmp_path / "a.gif", film(5), fps)
        with Image.open(tmp_path / "a.gif") as image:
            assert image.info["loop"] == 0 and image.info["duration"] == milliseconds and image.n_frames == 5

"""support/videos.py: what a player shows, upright and in time, whatever the container says."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import REPO
from PIL import Image

from support.readers import FileFault, MissingFile
from support.videos import (
    LIMIT,
    SUFFIXES,
    check_writable,
    read_clip,
    read_clips,
    read_video,
    resized,
    uniform_frames,
    video_frames,
    write_video,
)

H, W = 48, 64
CASES = REPO.parent / "shared" / "cases" / "videos"  # read where it is there; each case has a stand-in here


def film(n: int = 20, still: tuple[int, int] = (0, 0)) -> np.ndarray:
    """uint8 (n, H, W, 3): a bar moves right, but not in the frames of `still`; the top left is brighter."""
    frames = np.full((n, H, W, 3), 40, np.uint8)
    frames[:, : H // 2, : W // 2] = 90
    for t in range(n):
        shown = still[0] if still[0] <= t < still[1] else t
        frames[t, 10:30, 2 * shown : 2 * shown + 12] = (220, 60, 30)
    return frames


def near(a: np.ndarray, b: np.ndarray, bound: float = 8) -> bool:
    """Alike but for what coding loses."""
    return a.shape == b.shape and np.abs(a.astype(float) - b).mean() < bound


def write_turned(path: Path, frames: np.ndarray, degrees: int) -> None:
    """An mp4 whose frames lie, and whose header turns them upright."""
    lying = np.rot90(frames, {90: 1, 180: 2, 270: 3}[degrees], axes=(1, 2))
    write_video(path, np.ascontiguousarray(lying), 10)
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data = bytearray(path.read_bytes())
    tkhd = (
        data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8
    )  # version and flags, times and numbers, reserved, layer ...
    for row, (x, y) in enumerate((matrix[:2], matrix[2:])):
        for column, value in enumerate((x, y)):
            at = tkhd + 4 * (3 * row + column)
            data[at : at + 4] = int(value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)


def write_at_times(path: Path, frames: np.ndarray, times: list[float]) -> None:
    """A video of irregular rate, as a browser's recorder makes it: ticks of 1 ms."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libvpx" if path.suffix == ".webm" else "libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = W, H, "yuv420p", 2_000_000
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(frames, times, strict=True):
            image = av.VideoFrame.from_ndarray(frame, format="rgb24")
            image.pts, image.time_base = round(1000 * time), Fraction(1, 1000)
            out.mux(stream.encode(image))
        out.mux(stream.encode())


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_are_upright(degrees: int, tmp_path):
    write_turned(tmp_path / "a.mp4", film(), degrees)
    assert near(read_video(tmp_path / "a.mp4").frames, film())
    assert near(read_clip(tmp_path / "a.mp4", 0.0, 1.0), film()[:10])


@pytest.mark.parametrize("suffix", [".webm", ".mp4"])
def test_irregular_times_give_what_a_player_shows(suffix: str, tmp_path):
    rng = np.random.default_rng(0)
    times = np.arange(20) * 0.1 + rng.uniform(0, 0.01, 20)
    write_at_times(tmp_path / f"a{suffix}", film(), times.tolist())
    video = read_video(tmp_path / f"a{suffix}")
    assert abs(video.fps - 10) < 0.5 and near(video.frames, film(), 12)


def test_a_frame_that_lasts_is_shown_as_long(tmp_path):
    """Frames 3 to 9 are one frame in the file: what follows keeps its time."""
    frames = film(20, still=(3, 10))
    kept = [t for t in range(20) if not 3 < t < 10]
    write_at_times(tmp_path / "a.webm", frames[kept], [0.1 * t for t in kept])
    assert near(read_video(tmp_path / "a.webm").frames, frames, 12)


def test_equal_frames_that_a_gif_merged_are_there_again(tmp_path):
    frames = film(20, still=(4, 16))
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=60, loop=0)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 9  # Pillow merged the rest
    video = read_video(tmp_path / "a.gif")
    assert len(video.frames) == 20 and abs(video.fps - 1000 / 60) < 0.1 and near(video.frames, frames)


def test_a_still_picture_lasts(tmp_path):
    Image.fromarray(film(1)[0]).save(tmp_path / "a.gif")
    write_video(tmp_path / "b.gif", film(8, still=(0, 8)), 4)  # two seconds of the same
    for name in ("a.gif", "b.gif"):
        video = read_video(tmp_path / name)
        assert len(video.frames) == 16 and video.fps == 8 and (video.frames == video.frames[0]).all()


@pytest.mark.parametrize("tail", [b"", b"\0\0", b"anything"])
def test_what_follows_the_end_of_a_gif_does_not_matter(tail: bytes, tmp_path):
    write_video(tmp_path / "a.gif", film(), 10)
    with open(tmp_path / "a.gif", "ab") as file:
        file.write(tail)
    assert near(read_video(tmp_path / "a.gif").frames, film())


def test_a_trimmed_film_is_whole(tmp_path):
    """Its header counts all samples, but an edit list shows only those from the fifth on."""
    write_video(tmp_path / "a.mp4", film(), 10)
    data = (tmp_path / "a.mp4").read_bytes()
    if (at := data.find(b"elst")) < 0:
        pytest.skip("this libav writes no edit list")
    version = data[at + 4]
    size, ticks = (8, 8) if version else (4, 4)
    start = at + 12 + size
    seconds = int.from_bytes(data[at + 12 : start], "big")  # of the film, in its own ticks
    data = data[: at + 12] + (seconds * 3 // 4).to_bytes(size, "big") + data[start:]
    old = int.from_bytes(data[start : start + ticks], "big")
    with av.open(str(tmp_path / "a.mp4")) as container:
        five = round(0.5 / float(container.streams.video[0].time_base))
    trimmed = data[:start] + (old + five).to_bytes(ticks, "big") + data[start + ticks :]
    (tmp_path / "a.mp4").write_bytes(trimmed)
    frames = read_video(tmp_path / "a.mp4").frames
    assert near(frames, film()[5:])


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webm", ".mkv", ".mov", ".avi", ".MP4"])
def test_formats(suffix: str, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix in (".mp4", ".gif"):
        write_video(path, film(), 10)
    else:
        with av.open(str(path), "w") as out:
            stream = out.add_stream(
                "libvpx" if suffix == ".webm" else "libx264" if suffix != ".avi" else "mpeg4", rate=10
            )
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = W, H, "yuv420p", 2_000_000
            for frame in film():
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
    video = read_video(path)
    assert suffix.lower() in SUFFIXES and abs(video.fps - 10) < 0.1 and near(video.frames, film(), 12)


def test_an_array_lasts_as_long_as_it_is_told(tmp_path):
    np.save(tmp_path / "a.npy", film())
    assert read_video(tmp_path / "a.npy", 4).fps == 5
    assert np.array_equal(read_video(tmp_path / "a.npy").frames, film())


def big_gif() -> bytes:
    """The header of a GIF of 60,000 x 60,000 pixels, and one pixel."""
    size = (60_000).to_bytes(2, "little") * 2
    picture = b",\0\0\0\0" + size + b"\0\x02\x02\x44\x01\0;"
    return b"GIF89a" + size + b"\x80\0\0" + b"\0" * 6 + picture


def array(*shape: int, dtype: type = np.uint8):
    def write(path):
        np.save(path, np.zeros(shape, dtype))

    return write


BAD = {
    "empty.mp4": lambda path: path.write_bytes(b""),
    "garbage.mp4": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "text.webm": lambda path: path.write_text("<html>"),
    "cut.mp4": lambda path: (write_video(path, film(), 10), path.write_bytes(path.read_bytes()[:-2000])),
    "cut.gif": lambda path: (write_video(path, film(), 10), path.write_bytes(path.read_bytes()[:-200])),
    "header.gif": lambda path: path.write_bytes(b"GIF89a"),
    "big.gif": lambda path: path.write_bytes(big_gif()),
    "float.npy": array(4, H, W, 3, dtype=float),
    "gray.npy": array(4, H, W),
    "flat.npy": array(4, 0, W, 3),
    "none.npy": array(0, H, W, 3),
    "int32.npy": array(2, H, W, 3, dtype=np.uint32),
    "folder.mp4": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_video_is_one_error(name: str, tmp_path):
    BAD[name](tmp_path / name)
    with pytest.raises((ValueError, OSError), match=name) as error:
        read_video(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def test_frames_of_several_sizes_are_one_error(tmp_path):
    for size in (1, 2):  # raw MPEG-1 may be joined
        with av.open(str(tmp_path / f"{size}.mpg"), "w", format="mpeg1video") as out:
            stream = out.add_stream("mpeg1video", rate=25)
            stream.width, stream.height, stream.pix_fmt = size * W, size * H, "yuv420p"
            for frame in film(5).repeat(size, 1).repeat(size, 2):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
    joined = tmp_path / "a.mp4"
    joined.write_bytes((tmp_path / "1.mpg").read_bytes() + (tmp_path / "2.mpg").read_bytes())
    with pytest.raises(FileFault, match="a.mp4: found frames of several sizes"):
        read_video(joined)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.npy"])
def test_a_video_that_is_not_there_is_missing(name: str, tmp_path):
    with pytest.raises(MissingFile, match=f"{name} is not there: "):
        read_video(tmp_path / name)


def test_a_video_larger_than_memory_is_refused_early(tmp_path, monkeypatch):
    assert LIMIT == 4 << 30
    write_video(tmp_path / "a.mp4", film(), 10)
    monkeypatch.setattr("support.videos.LIMIT", 10 * H * W * 3)
    with pytest.raises(ValueError, match=r"a.mp4: found more than .* bytes of frames"):
        read_video(tmp_path / "a.mp4")


def test_clips_of_a_film(tmp_path):
    frames = film(30)
    write_video(tmp_path / "a.mp4", frames, 10)
    clips = list(read_clips(tmp_path / "a.mp4", 3, 1.0))
    assert [len(clip) for clip in clips] == [10, 10, 10] and near(np.concatenate(clips), frames)
    assert near(read_clip(tmp_path / "a.mp4", 1.0, 1.0), frames[10:20])
    with pytest.raises(ValueError, match=r"a.mp4: found 3.0 s, wanted 4.0 s"):
        list(read_clips(tmp_path / "a.mp4", 4, 1.0))


def test_frames_are_picked_and_resized():
    assert (
        uniform_frames(60, 8).tolist() == [3, 11, 18, 26, 33, 41, 48, 56]
        and uniform_frames(1, 3).tolist() == [0] * 3
    )
    with pytest.raises(ValueError, match="0 frames"):
        uniform_frames(0, 3)
    frames = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    assert video_frames(frames, 57, 48, 64).shape == (57, 48, 64, 3)
    assert np.array_equal(video_frames(frames, 57, 48, 64), frames[1:58])
    one = resized(frames[:1], (24, 24))
    assert np.array_equal(resized(frames, (24, 24))[0], one[0])  # a frame does not depend on its neighbours
    with pytest.raises(ValueError, match="60 frames, wanted 61"):
        video_frames(frames, 61, 48, 64)


@pytest.mark.parametrize("name", ["a.avi", "a.npy", "a", "a.mp4.txt"])
def test_only_mp4_and_gif_are_written(name: str, tmp_path):
    with pytest.raises(ValueError, match="wanted .mp4 or .gif"):
        check_writable(tmp_path / name)


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases of others are not here")
def test_the_cases_of_others_agree():
    turned, webm, gif = (
        read_video(CASES / name)
        for name in ("turned-90.mp4", "irregular-times.webm", "equal-frames-merged.gif")
    )
    assert near(turned.frames[0], webm.frames[0]) and near(turned.frames[0], gif.frames[0])
    assert len(gif.frames) == 20 and abs(webm.fps - 25) < 0.1

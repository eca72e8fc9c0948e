"""extras/human_eval.py: the page and its blindness, the counting of votes, bad input, the page in a browser."""

import contextlib
import io
import json
import re
import shutil
import signal
import time
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import press, run_script, wait
from PIL import Image

from extras import human_eval
from support.runs import door

QUESTIONS = human_eval.QUESTIONS
METHODS = ("wholemethod-s0", "secondmethod-s0", "thirdmethod-s0")


def write_mp4(path: Path, frames: np.ndarray, fps: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "4"}
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def level(clip: int, m: int) -> int:
    """The grey of a method's video, by which the tests know whose a video is; the stimulus' is that of m = -1."""
    return 60 + 40 * m + 3 * clip


def write_runs(root: Path, clips: int = 3, names=METHODS) -> list[Path]:
    for m, name in enumerate(names):
        for i in range(clips):
            for kind, value in (("gt", level(i, -1)), ("recon", level(i, m))):
                write_mp4(
                    root / name / "eval" / kind / f"{i:04d}.mp4", np.full((8, 16, 16, 3), value, np.uint8)
                )
    return [root / name for name in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    return write_runs(tmp_path_factory.mktemp("runs") / "toy" / "sub1")


@pytest.fixture(scope="module")
def study(tmp_path_factory, runs) -> Path:
    out = tmp_path_factory.mktemp("study") / "study"
    make(*runs, "--out", out, "--height", 64)
    return out


def page_of(study: Path) -> dict:
    text = (study / "page" / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text).group(1))


def key_of(study: Path) -> dict:
    return json.loads((study / "key.json").read_text())


def decoded(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, len(frames) / float(stream.average_rate)


def make(*arguments) -> None:
    human_eval.main(["make", *map(str, arguments)])


def fails(*arguments, status: int = 1) -> str:
    """What the command says when it ends with an error: one line, after the progress bar."""
    said, handler = io.StringIO(), signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stopped:
        door(lambda: human_eval.main([*map(str, arguments)]))
    signal.signal(signal.SIGTERM, handler)
    lines = [line for line in said.getvalue().splitlines() if "group/s" not in line and line.strip()]
    assert stopped.value.code == status and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---------------------------------------------------------------- make


def test_page_and_key_fit_the_videos(study):
    page, key = page_of(study), key_of(study)
    assert page["id"] == key["study"] and (page["width"], page["height"], page["each"]) == (64, 64, 3)
    assert sorted(g["clip"] for g in key["groups"]) == ["0000", "0001", "0002"] and key["methods"] == sorted(
        METHODS
    )
    files = set()
    for shown, group in zip(page["groups"], key["groups"], strict=True):
        assert shown["id"] == group["id"] and shown["videos"] == list(group["videos"])
        assert sorted(group["videos"].values()) == sorted(METHODS)
        for video, m in (
            (shown["stimulus"], -1),
            *((v, METHODS.index(name)) for v, name in group["videos"].items()),
        ):
            frames, seconds = decoded(study / "page" / "videos" / f"{video}.mp4")
            assert frames.shape == (8, 64, 64, 3) and seconds == pytest.approx(1)
            assert abs(frames.mean() - level(int(group["clip"]), m)) < 3
            files.add(f"{video}.mp4")
    assert len(files) == 12 and {f.name for f in (study / "page" / "videos").iterdir()} == files
    assert sorted(f.name for f in study.iterdir()) == ["key.json", "page"]


def test_nothing_in_the_page_tells_a_method(study, runs):
    tells = [*METHODS, "wholemethod", "recon", "eval", str(runs[0].parent), "0001", "sub1", "toy"]
    files = [f for f in (study / "page").rglob("*") if f.is_file()]
    for file in files:
        content = file.read_bytes().lower().replace(b"human-eval-", b"").replace(b"human_eval", b"")
        for word in tells if file.suffix == ".html" else METHODS:
            assert word not in file.name and word.encode() not in content, f"{word} in {file}"
    assert "seed" not in page_of(study)
    videos = [f for f in files if f.suffix == ".mp4"]
    assert len({f.stat().st_mtime for f in videos}) == 1
    assert all(re.fullmatch(r"[0-9a-f]{16}\.mp4", f.name) for f in videos)
    metadata = set()
    for file in videos:
        with av.open(str(file)) as container:
            metadata.add(
                json.dumps([container.metadata, container.streams.video[0].metadata], sort_keys=True)
            )
    assert len(metadata) == 1


def test_page_loads_nothing_from_elsewhere(study):
    text = (study / "page" / "index.html").read_text()
    assert not re.search(r"https?:|//cdn|@import|<link|fetch\(|XMLHttp|WebSocket", text)


def test_order_is_random_but_reproducible(tmp_path):
    runs = write_runs(tmp_path / "runs", clips=12)
    of = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(*runs, "--out", tmp_path / name, "--height", 16, "--seed", seed)
        of[name] = key_of(tmp_path / name)
    assert of["a"] == of["b"] and of["a"]["study"] != of["c"]["study"]
    orders = [[METHODS.index(m) for m in g["videos"].values()] for g in of["a"]["groups"]]
    assert {order[0] for order in orders} == {0, 1, 2} and len(set(map(tuple, orders))) > 2
    clips = [g["clip"] for g in of["a"]["groups"]]
    assert clips != sorted(clips) and clips != [g["clip"] for g in of["c"]["groups"]]
    ids = [v for key in (of["a"], of["c"]) for g in key["groups"] for v in (g["id"], *g["videos"])]
    assert len(set(ids)) == len(ids)


def test_pairs_of_any_kind_and_shape(tmp_path):
    rng, pairs, out = np.random.default_rng(0), tmp_path / "pairs", tmp_path / "out"
    stimulus = rng.integers(0, 256, (6, 24, 36, 3), dtype=np.uint8)
    for name in ("gt", "square", "wide", "array", ".cache", "metrics"):
        (pairs / name).mkdir(parents=True)
    images = [Image.fromarray(frame) for frame in stimulus]
    images[0].save(pairs / "gt/x.gif", save_all=True, append_images=images[1:], duration=500)
    write_mp4(pairs / "square/x.MP4", np.full((10, 24, 24, 3), 200, np.uint8), 24)
    write_mp4(pairs / "wide/x.mp4", np.full((16, 90, 136, 3), 200, np.uint8), 8)
    np.save(pairs / "array/x.npy", stimulus)
    # what other programs leave is no video, and what evaluate.py --pairs leaves is no method
    for stray in ("gt/._x.mp4", "square/.x.mp4", ".cache/x.mp4", "metrics/metrics.json"):
        (pairs / stray).write_bytes(b"no video")
    make("--pairs", pairs, "--out", out, "--height", 96)
    (group,) = key_of(out)["groups"]
    films = {name: decoded(out / "page/videos" / f"{v}.mp4") for v, name in group["videos"].items()}
    sizes = {name: (frames.shape, round(seconds, 2)) for name, (frames, seconds) in films.items()}
    assert sizes == {
        "square": ((10, 96, 144, 3), 3),
        "wide": ((16, 96, 144, 3), 3),
        "array": ((6, 96, 144, 3), 3),
    }
    square = films["square"][0].mean((0, 1, 3))  # bars left and right: 96 of 144 columns are filled
    assert square[:22].max() < 20 and square[-22:].max() < 20 and abs(square[26:-26] - 200).max() < 4
    enlarged = films["array"][0].reshape(6, 24, 4, 36, 4, 3)  # each pixel to 4 x 4
    middles = enlarged[:, :, 1:3, :, 1:3].mean((2, 4))
    assert np.abs(middles - stimulus).mean() < 12  # at the size they come in, 4:2:0 alone would leave 44


def test_a_still_in_the_middle_of_a_gif_lasts_as_long_as_it_should(tmp_path):
    """Equal frames of a GIF are one with a longer time: all that is shown is in time, whatever the file holds."""
    grey = [Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (20, 120, 220)]
    for name in ("gt", "a", "b"):
        folder = tmp_path / "pairs" / name
        folder.mkdir(parents=True)
        times = [100, 600, 100]
        grey[0].save(folder / "x.gif", save_all=True, append_images=grey[1:], duration=times)
    make("--pairs", tmp_path / "pairs", "--out", tmp_path / "out", "--height", 16)
    for video in (tmp_path / "out" / "page" / "videos").iterdir():
        frames, seconds = decoded(video)
        assert seconds == pytest.approx(0.8, abs=0.02)
        levels = frames.mean((1, 2, 3))
        assert np.abs(levels - [20, *[120] * 6, 220]).max() < 4


def test_seconds_are_those_of_an_array(tmp_path):
    for name in ("gt", "a", "b"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
        np.save(tmp_path / "pairs" / name / "x.npy", np.full((6, 16, 16, 3), 9, np.uint8))
    make("--pairs", tmp_path / "pairs", "--out", tmp_path / "out", "--height", 16, "--seconds", 4)
    for video in (tmp_path / "out" / "page" / "videos").iterdir():
        assert decoded(video)[1] == pytest.approx(4)


def test_groups_and_each(tmp_path, runs):
    out = tmp_path / "a"
    make(*runs, "--out", out, "--height", 16, "--groups", 2, "--each", 1)
    assert sorted(group["clip"] for group in key_of(out)["groups"]) == ["0000", "0002"]
    assert page_of(out)["each"] == 1 and len(page_of(out)["groups"]) == 2


@pytest.mark.parametrize(
    "option, value, status",
    [
        ("--groups", "4", 1),
        ("--each", "4", 1),
        ("--height", "33", 1),
        ("--groups", "0", 2),
        ("--groups", "two", 2),
        ("--each", "-1", 2),
        ("--each", "1.5", 2),
        ("--height", "0", 2),
        ("--height", "1e9", 2),
        ("--height", "100000", 2),
        ("--seconds", "0", 2),
        ("--seconds", "-1", 2),
        ("--seconds", "nan", 2),
        ("--seconds", "inf", 2),
        ("--seconds", "1e-30", 2),
        ("--seed", "-1", 2),
        ("--seed", "x", 2),
        ("--shuffle", "1", 2),
    ],
)
def test_an_option_out_of_range_is_named(tmp_path, runs, option, value, status):
    assert option in fails("make", *runs, "--out", tmp_path / "b", f"{option}={value}", status=status)
    assert not list(tmp_path.iterdir())


def test_what_is_compared(tmp_path):
    runs, out = write_runs(tmp_path / "sub1", clips=2), tmp_path / "out"
    assert "wanted two or more" in fails("make", runs[0], "--out", out)
    one_way = "either two or more RUN folders or --pairs"
    assert one_way in fails("make", "--out", out, status=2)
    assert one_way in fails("make", *runs, "--pairs", tmp_path, "--out", out, status=2)
    said = fails("make", runs[0], tmp_path / "nowhere", "--out", out)
    assert "evaluate.py" in said and str(tmp_path / "nowhere") in said
    said = fails("make", "--pairs", tmp_path / "nowhere", "--out", out)
    assert "DIR/gt/NAME.*" in said and str(tmp_path / "nowhere") in said and "--skip-bad" not in said
    assert "different names" in fails("make", runs[0], runs[0], "--out", out)
    other = write_runs(tmp_path / "sub2", clips=2, names=("wholemethod-s0",))[0]
    make(runs[0], other, "--out", tmp_path / "two", "--height", 16)
    assert key_of(tmp_path / "two")["methods"] == ["sub1/wholemethod-s0", "sub2/wholemethod-s0"]
    before = {file: file.read_bytes() for file in (tmp_path / "two").rglob("*") if file.is_file()}
    assert "is there already" in fails("make", *runs, "--out", tmp_path / "two")
    assert before == {file: file.read_bytes() for file in (tmp_path / "two").rglob("*") if file.is_file()}
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_clips_that_differ(tmp_path):
    runs, out = write_runs(tmp_path / "sub1", clips=2), tmp_path / "out"
    video = runs[1] / "eval" / "recon" / "0001.mp4"
    kept = video.read_bytes()
    video.unlink()
    said = fails("make", *runs, "--out", out)
    assert "0001" in said and str(runs[1]) in said and "--skip-bad" not in said
    (runs[1] / "eval" / "gt" / "0001.mp4").unlink()
    said = fails("make", *runs, "--out", out)
    assert "0001 of wholemethod-s0 has no counterpart in secondmethod-s0" in said
    video.write_bytes(kept)
    write_mp4(runs[1] / "eval" / "gt" / "0001.mp4", np.full((8, 16, 16, 3), level(1, -1), np.uint8))
    write_mp4(runs[2] / "eval" / "gt" / "0001.mp4", np.full((8, 16, 16, 3), 200, np.uint8))
    assert "show different stimuli" in fails("make", *runs, "--out", out)
    np.save(video.with_suffix(".npy"), np.zeros((2, 8, 8, 3), np.uint8))
    assert "two videos of one name" in fails("make", *runs, "--out", out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def cut_gif(path: Path) -> None:
    """A GIF of which the end is missing: its frames can be decoded, all but one."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(8)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=125)
    path.write_bytes(path.read_bytes()[:-300])


def cut_mp4(path: Path) -> None:
    write_mp4(path, np.full((8, 16, 16, 3), 100, np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "gif": cut_gif,
    "mp4": cut_mp4,
    "mov": lambda path: path.write_bytes(b""),
    "webm": lambda path: path.write_bytes(b"no video " * 50),
    "npy": lambda path: np.save(path, np.zeros((2, 8, 8), np.float32)),
    "NPY": lambda path: path.write_bytes(b"\x93NUMPY"),
}


@pytest.mark.parametrize("suffix", DAMAGES)
@pytest.mark.parametrize("kind", ["gt", "recon"])
def test_a_damaged_video_is_named_and_leaves_nothing(tmp_path, kind, suffix):
    runs, out = write_runs(tmp_path / "sub1", clips=2, names=METHODS[:2]), tmp_path / "out"
    video = runs[1] / "eval" / kind / "0001.mp4"
    video.unlink()
    DAMAGES[suffix](video.with_suffix(f".{suffix}"))
    said = fails("make", *runs, "--out", out, "--height", 16)
    assert str(video.with_suffix(f".{suffix}")) in said and "pickle" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["sub1"]


# ---------------------------------------------------------------- tally


def vote_file(folder: Path, file: Path, participant: str, answers, **other) -> Path:
    """answers: (clip, question, method) of each vote."""
    key = key_of(folder)
    groups = {g["clip"]: (g["id"], {m: v for v, m in g["videos"].items()}) for g in key["groups"]}
    votes = [{"group": groups[c][0], "question": q, "video": groups[c][1][m]} for c, q, m in answers]
    file.write_text(json.dumps({"study": key["study"], "participant": participant, "votes": votes} | other))
    return file


def test_tally_against_a_count_by_hand(study, tmp_path):
    a, b, c = METHODS
    chosen = {  # semantic alignment of clips 0, 1, 2, by participant; what is not there was not answered
        "p1": [a, a, b],
        "p2": [a, b, b],
        "p3": [a, c],
    }
    files = []
    for who, choices in chosen.items():
        answers = [(f"{i:04d}", QUESTIONS[0], m) for i, m in enumerate(choices)]
        answers += [(f"{i:04d}", q, a) for q in QUESTIONS[1:] for i in range(3)]
        files.append(str(vote_file(study, tmp_path / f"{who}.json", who, answers)))
    result = human_eval.tally(study, [Path(f) for f in files])
    assert result == json.loads((study / "tally.json").read_text())
    assert (result["participants"], result["groups"], result["votes"]) == (3, 3, 8 + 27)
    share = {m: result["share"][m]["semantic_alignment"] for m in METHODS}
    assert share == pytest.approx({a: 4 / 8, b: 3 / 8, c: 1 / 8})
    assert result["pairs_alike"]["semantic_alignment"] == pytest.approx(
        (3 + 0 + 1) / (3 + 3 + 1)
    )  # pairs of p1 p2 p3 that agree
    assert result["share"][a]["visual_quality"] == 1 and result["ci95_low"][a]["visual_quality"] == 1
    assert (
        result["krippendorff_alpha"]["visual_quality"] is None
        and result["pairs_alike"]["visual_quality"] == 1
    )
    assert (
        0
        <= result["ci95_low"][a]["semantic_alignment"]
        < 0.5
        < result["ci95_high"][a]["semantic_alignment"]
        <= 1
    )
    places = np.zeros(3)
    of = {g["clip"]: list(g["videos"].values()) for g in key_of(study)["groups"]}
    for choices in chosen.values():
        for i, m in enumerate(choices):
            places[of[f"{i:04d}"].index(m)] += 1
    for i in range(3):
        places[of[f"{i:04d}"].index(a)] += 9
    np.testing.assert_allclose(result["share_by_place"], places / 35)

    done = run_script("extras/human_eval.py", "tally", study, *files, cwd=tmp_path)
    assert done.returncode == 0 and "3 participants, 3 groups, 35 votes" in done.stdout
    rows = {line[:22].strip(): line[22:].split("%")[0].strip() for line in done.stdout.splitlines()}
    assert [rows[m] for m in METHODS] == ["50.0", "37.5", "12.5"] and rows["chance"] == "33.3"
    assert rows["pairs who agree"] == "57.1"  # 4 of 7
    done = run_script("extras/human_eval.py", "tally", study, "nowhere.json", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: nowhere.json is not there")


def test_alpha_against_a_published_example():
    """Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: nominal data, missing values, alpha = 0.743."""
    nothing = -1
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, nothing, nothing, nothing],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nothing, 3],
        [nothing, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nothing],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nothing],
    ]
    ratings = np.array(ratings)
    pairs, alpha = human_eval.agreement(ratings)
    assert alpha == pytest.approx(0.743, abs=5e-4)
    alike = [x == y for column in ratings.T for x, y in combinations(column[column >= 0], 2)]
    assert pairs == pytest.approx(np.mean(alike))
    assert np.isnan(human_eval.agreement(np.full((1, 4), 2))).all()
    assert human_eval.agreement(np.array([[0, 1, 0], [0, 1, 0]])) == (1, 1)
    rng = np.random.default_rng(0)
    assert abs(human_eval.agreement(rng.integers(0, 4, (10, 400)))[1]) < 0.02


def test_interval_against_a_loop():
    """The weighted count is that of a sample drawn vote by vote; the interval covers participants and groups alike."""
    rng = np.random.default_rng(1)
    choice = rng.choice(3, (4, 6, 9), p=[0.6, 0.3, 0.1])
    choice[rng.random(choice.shape) < 0.2] = -1
    share, (low, high) = human_eval.shares(choice, 3, 4000)
    np.testing.assert_allclose(share[2], [np.mean(choice[2][choice[2] >= 0] == m) for m in range(3)])
    drawn = []
    for _ in range(4000):
        sample = choice[0][rng.integers(6, size=6)][:, rng.integers(9, size=9)]
        drawn.append(np.mean(sample[sample >= 0] == 0))
    np.testing.assert_allclose([low[0, 0], high[0, 0]], np.percentile(drawn, [2.5, 97.5]), atol=0.02)
    one_sided = np.where(np.arange(6)[:, None] < 3, 0, 1) * np.ones(
        (4, 1, 9), int
    )  # each participant has a favourite
    _, (low, high) = human_eval.shares(one_sided, 2, 2000)
    assert low[0, 0] < 0.2 and high[0, 0] > 0.8


def test_bad_votes(study, tmp_path):
    every = [(f"{i:04d}", q, METHODS[0]) for i in range(3) for q in QUESTIONS]
    good = vote_file(study, tmp_path / "good.json", "p1", every)

    def said(*files) -> str:
        return fails("tally", study, good, *files)

    other = vote_file(study, tmp_path / "other.json", "p2", every, study="0123456789ab")
    assert str(other) in said(other) and "0123456789ab" in said(other)
    again = vote_file(study, tmp_path / "again.json", "p1", every)
    assert f"{again} and {good} are both of participant p1" in said(again)
    twice = vote_file(study, tmp_path / "twice.json", "p2", [*every, every[5]])
    assert "two answers to one question" in said(twice) and str(twice) in said(twice)
    empty = vote_file(study, tmp_path / "empty.json", "p2", [])
    assert "no vote" in said(empty) and str(empty) in said(empty)
    assert "nowhere.json is not there" in said(tmp_path / "nowhere.json")
    half = vote_file(study, tmp_path / "half.json", "p3", every[:2])
    assert "no vote on visual_quality, overall_fidelity" in fails("tally", study, half)
    assert f"{tmp_path / 'key.json'} is not there" in fails("tally", tmp_path, good)
    hidden = tmp_path / "._good.json"
    hidden.write_bytes(b"of another system")
    assert human_eval.tally(study, [good, hidden])["participants"] == 1


DAMAGED_VOTES = {
    "half": lambda text, group, stranger: text[: len(text) // 2],
    "a list": lambda text, group, stranger: "[]",
    "a number": lambda text, group, stranger: "3",
    "deep": lambda text, group, stranger: "[" * 100_000,
    "another key": lambda text, group, stranger: text.replace('"votes"', '"vote"'),
    "another question": lambda text, group, stranger: text.replace("visual_quality", "beauty"),
    "another video": lambda text, group, stranger: text.replace(*stranger),
    "another group": lambda text, group, stranger: text.replace(group, "feedfeedfeedfeed"),
    "a list as group": lambda text, group, stranger: text.replace(f'"{group}"', "[1]"),
    "votes of text": lambda text, group, stranger: re.sub(r'"votes": .*]', '"votes": ["a"]', text),
    "votes as text": lambda text, group, stranger: re.sub(r'"votes": .*]', '"votes": "a"', text),
    "a nameless participant": lambda text, group, stranger: text.replace('"p2"', "null"),
    "no text": lambda text, group, stranger: b"\xff\xfe\x00",
    "nothing": lambda text, group, stranger: "",
}


@pytest.mark.parametrize("damage", DAMAGED_VOTES)
def test_a_damaged_file_of_votes_is_named(study, tmp_path, damage):
    every = [(f"{i:04d}", q, METHODS[0]) for i in range(3) for q in QUESTIONS]
    good = vote_file(study, tmp_path / "good.json", "p1", every)
    file, result = vote_file(study, tmp_path / "damaged.json", "p2", every), study / "tally.json"
    first, second, _ = key_of(study)["groups"]
    of_first = next(video for video, method in first["videos"].items() if method == METHODS[0])
    stranger = of_first, next(iter(second["videos"]))  # a video of another group
    text = DAMAGED_VOTES[damage](file.read_text(), first["id"], stranger)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = result.read_bytes() if result.exists() else None
    assert str(file) in fails("tally", study, good, file)
    assert (result.read_bytes() if result.exists() else None) == before


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        {"study": 3},
        {"groups": 3},
        {"groups": [3]},
        {"groups": [{"id": "a"}]},
        {"methods": ["wholemethod-s0"]},
        {"methods": [1, 2, 3]},
        {"groups": [{"id": "a", "videos": {"b": ["c"]}}]},
    ],
    ids=str,
)
def test_a_damaged_key_is_named(study, tmp_path, damage):
    every = [(f"{i:04d}", q, METHODS[0]) for i in range(3) for q in QUESTIONS]
    votes = vote_file(study, tmp_path / "votes.json", "p1", every)
    key = tmp_path / "key.json"
    key.write_text(damage if isinstance(damage, str) else json.dumps(key_of(study) | damage))
    assert str(key) in fails("tally", tmp_path, votes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "votes.json"]


def test_votes_are_never_overwritten(study, tmp_path):
    shutil.copy(study / "key.json", tmp_path)
    every = [(f"{i:04d}", q, METHODS[0]) for i in range(3) for q in QUESTIONS]
    votes = vote_file(study, tmp_path / "tally.json", "p1", every)  # named as the result is
    before = votes.read_bytes()
    assert "would be overwritten" in fails("tally", tmp_path, votes)
    assert votes.read_bytes() == before


# ---------------------------------------------------------------- in a browser


def test_the_page_can_be_paused_and_keeps_its_films_in_sight(study):
    """What the tests in a browser try, where there is none: WCAG 2.2.2, and a phone."""
    text = (study / "page" / "index.html").read_text()
    assert 'id="pause"' in text and "(prefers-reduced-motion: reduce)" in text and "autoplay" not in text
    phone = text[text.index("@media (max-width: 50rem)") :]
    assert re.search(r"#videos {\s*position: sticky; top: 0;", phone)


def begin(browser, study: Path, code: str) -> None:
    browser.get((study / "page" / "index.html").as_uri())
    field = browser.find_element("id", "code")
    field.clear()
    field.send_keys(code)
    browser.find_element("id", "begin").click()


def of_films(browser, what: str) -> list:
    """A property of each film on the page, the stimulus first."""
    return browser.execute_script(
        f"return [...document.querySelectorAll('#videos video')].map(v => v.{what})"
    )


def answer_all(browser, n: int, choices: list[int]) -> None:
    """The four questions of the n-th group: by mouse, by letters, by numbers."""
    for q, choice in enumerate(choices):
        if n == 0:
            place = f"#questions fieldset:nth-child({q + 1}) label:nth-child({choice + 1})"
            browser.find_element("css selector", place).click()
        else:
            press(browser, "abc"[choice] if n == 1 else "123"[choice])


def saved_votes(browser, file: Path) -> dict:
    browser.find_element("id", "download").click()
    wait(file.exists)
    return json.loads(file.read_text())


def test_vote_in_a_browser(browser, study, tmp_path):
    begin(browser, study, "P 1")
    key, expected = {group["id"]: group["videos"] for group in key_of(study)["groups"]}, {}
    for n in range(3):
        ids = [Path(source.split("#")[0]).stem for source in of_films(browser, "src")[1:]]
        (group,) = [name for name, videos in key.items() if list(videos) == ids]
        assert browser.find_element("id", "where").text == f"Film {n + 1} of 3"
        assert not browser.find_element("id", "next").is_enabled()
        choices = [(n + q) % 3 for q in range(4)]
        answer_all(browser, n, choices)
        expected |= {(group, question): ids[c] for question, c in zip(QUESTIONS, choices, strict=True)}
        assert browser.find_element("id", "next").is_enabled()
        if n == 0:
            browser.find_element("id", "next").click()
        elif n == 1:  # what was answered outlives a reload
            browser.refresh()
            assert browser.find_element("id", "code").get_attribute("value") == "P 1"
            browser.find_element("id", "begin").click()
        else:
            press(browser, "\ue007")  # Enter
    assert browser.find_element("id", "summary").text == "You answered 3 of 3 films."
    file = tmp_path / f"votes-{key_of(study)['study']}-P_1.json"
    ballot = saved_votes(browser, file)
    assert ballot["participant"] == "P 1" and len(ballot["votes"]) == 12
    votes = {(vote["group"], vote["question"]): vote["video"] for vote in ballot["votes"]}
    assert votes == expected
    result = human_eval.tally(study, [file])
    for q in QUESTIONS:
        for m in METHODS:
            wanted = np.mean([key[g][v] == m for (g, asked), v in expected.items() if asked == q])
            assert result["share"][m][q] == pytest.approx(wanted)


def test_one_participant_does_not_overwrite_another(browser, study, tmp_path):
    begin(browser, study, "first")
    answer_all(browser, 0, [0, 1, 2, 0])
    first = browser.execute_script("return JSON.stringify(state.answers)")
    begin(browser, study, "second")
    assert browser.execute_script("return state.answers") == {}
    answer_all(browser, 0, [2, 2, 2, 2])
    begin(browser, study, "first")
    assert browser.execute_script("return JSON.stringify(state.answers)") == first
    browser.execute_script("localStorage.setItem(KEY + '-third', '{')")
    begin(browser, study, "third")  # damaged: it is as if nothing was kept
    assert browser.execute_script("return state.answers") == {}


def test_films_play_again_and_again_until_they_are_paused(browser, study):
    begin(browser, study, "p")
    wait(lambda: min(of_films(browser, "currentTime")) > 0.1)
    assert of_films(browser, "videoWidth") == [64] * 4 and of_films(browser, "duration") == [1] * 4
    fits = "document.documentElement.scrollHeight <= innerHeight && document.documentElement.scrollWidth <= innerWidth"
    assert browser.execute_script(f"return {fits}")
    count = "document.querySelectorAll('#videos video').forEach(v => { v.n = 0; v.onplay = () => v.n++; })"
    browser.execute_script(count)
    wait(lambda: of_films(browser, "n") == [1] * 4)  # by themselves, a moment after they have ended
    button = browser.find_element("id", "pause")
    assert button.text == "Pause"
    button.click()
    stopped = of_films(browser, "currentTime")
    assert button.text == "Play" and all(of_films(browser, "paused"))
    time.sleep(1.8)
    assert of_films(browser, "currentTime") == stopped and of_films(browser, "n") == [1] * 4
    press(browser, "p")
    assert button.text == "Pause"
    wait(lambda: of_films(browser, "currentTime") != stopped)
    browser.find_element("css selector", "#videos video").click()  # as one does on a phone
    assert button.text == "Play" and all(of_films(browser, "paused"))
    answer_all(browser, 0, [0, 0, 0, 0])
    browser.find_element("id", "next").click()  # who has paused them sees the next still, too
    time.sleep(0.5)
    assert button.text == "Play" and all(of_films(browser, "paused"))
    press(browser, " ")
    wait(lambda: min(of_films(browser, "currentTime")) > 0.1)
    assert button.text == "Pause"


def test_less_motion(browser, study):
    wanted = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    begin(browser, study, "p")
    button = browser.find_element("id", "pause")
    time.sleep(1)
    assert button.text == "Play" and all(of_films(browser, "paused"))
    assert max(of_films(browser, "currentTime")) < 0.01 and min(of_films(browser, "readyState")) >= 2
    button.click()
    assert button.text == "Pause"
    wait(lambda: all(of_films(browser, "ended")))
    time.sleep(0.8)
    assert button.text == "Play" and all(of_films(browser, "ended"))  # once, and no more
    button.click()
    wait(lambda: 0 < min(of_films(browser, "currentTime")) < 0.9)
    assert button.text == "Pause"
    answer_all(browser, 0, [0, 0, 0, 0])
    browser.find_element("id", "next").click()
    time.sleep(0.5)
    assert button.text == "Play" and all(of_films(browser, "paused"))


@pytest.mark.parametrize("width, height", [(360, 640), (390, 844), (740, 360)])
def test_a_phone_keeps_the_films_in_sight(browser, study, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    begin(browser, study, "p")
    boxes = "[...document.querySelectorAll('#videos video, #pause, #next')].map(v => v.getBoundingClientRect().toJSON())"
    fields = "[...document.querySelectorAll('fieldset')].map(f => f.getBoundingClientRect().toJSON())"
    for n in range(4):
        last = f"document.querySelectorAll('fieldset')[{n}].querySelector('input').focus()"
        browser.execute_script(last)
        time.sleep(0.2)
        *films, pause, following = browser.execute_script(f"return {boxes}")
        for box in (*films, pause, following):
            assert box["top"] >= 0 and box["bottom"] <= height and box["left"] >= 0 and box["right"] <= width
        assert min(box["width"] for box in films) >= 60
        bottom = max(box["bottom"] for box in films)
        assert bottom < 0.5 * height
        field = browser.execute_script(f"return {fields}")[n]
        assert field["bottom"] > bottom + 20 and field["top"] < pause["top"] - 20  # it is not behind them
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")

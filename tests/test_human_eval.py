"""extras/human_eval.py: the page and its blindness, the counting of votes, bad input, and the page in a browser."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parent.parent / "extras" / "human_eval.py"
spec = importlib.util.spec_from_file_location("human_eval", SCRIPT)
human_eval = importlib.util.module_from_spec(spec)
spec.loader.exec_module(human_eval)
QUESTIONS, METHODS = human_eval.QUESTIONS, ("wholemethod-s0", "secondmethod-s0", "thirdmethod-s0")


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
                write_mp4(root / name / "eval" / kind / f"{i:04d}.mp4", np.full((8, 16, 16, 3), value, np.uint8))
    return [root / name for name in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    return write_runs(tmp_path_factory.mktemp("runs") / "toy" / "sub1")


@pytest.fixture(scope="module")
def study(tmp_path_factory, runs) -> Path:
    out = tmp_path_factory.mktemp("study") / "study"
    human_eval.main(["make", *map(str, runs), "--out", str(out), "--height", "64"])
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


def fails(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        human_eval.main([*map(str, arguments)])
    assert isinstance(stopped.value.code, str) and stopped.value.code.startswith("error: ")
    return stopped.value.code


# ---------------------------------------------------------------------------------------------- make


def test_page_and_key_fit_the_videos(study):
    page, key = page_of(study), key_of(study)
    assert page["id"] == key["study"] and (page["width"], page["height"], page["each"]) == (64, 64, 3)
    assert sorted(g["clip"] for g in key["groups"]) == ["0000", "0001", "0002"] and key["methods"] == sorted(METHODS)
    files = set()
    for shown, group in zip(page["groups"], key["groups"], strict=True):
        assert shown["id"] == group["id"] and shown["videos"] == list(group["videos"])
        assert sorted(group["videos"].values()) == sorted(METHODS)
        for video, m in ((shown["stimulus"], -1), *((v, METHODS.index(name)) for v, name in group["videos"].items())):
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
            metadata.add(json.dumps([container.metadata, container.streams.video[0].metadata], sort_keys=True))
    assert len(metadata) == 1


def test_page_loads_nothing_from_elsewhere(study):
    text = (study / "page" / "index.html").read_text()
    assert not re.search(r"https?:|//cdn|@import|<link|fetch\(|XMLHttp|WebSocket", text)


def test_order_is_random_but_reproducible(tmp_path):
    runs = write_runs(tmp_path / "runs", clips=12)
    of = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        human_eval.main(["make", *map(str, runs), "--out", str(tmp_path / name), "--height", "16", "--seed", str(seed)])
        of[name] = key_of(tmp_path / name)
    assert of["a"] == of["b"] and of["a"]["study"] != of["c"]["study"]
    orders = [[METHODS.index(m) for m in g["videos"].values()] for g in of["a"]["groups"]]
    assert {order[0] for order in orders} == {0, 1, 2} and len(set(map(tuple, orders))) > 2
    clips = [g["clip"] for g in of["a"]["groups"]]
    assert clips != sorted(clips) and clips != [g["clip"] for g in of["c"]["groups"]]
    ids = [v for key in (of["a"], of["c"]) for g in key["groups"] for v in (g["id"], *g["videos"])]
    assert len(set(ids)) == len(ids)


def test_pairs_of_any_kind_and_shape(tmp_path):
    rng = np.random.default_rng(0)
    stimulus = rng.integers(0, 256, (6, 24, 36, 3), dtype=np.uint8)
    for name in ("gt", "square", "wide", "array"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
    images = [Image.fromarray(f) for f in stimulus]
    images[0].save(tmp_path / "pairs/gt/x.gif", save_all=True, append_images=images[1:], duration=500)
    write_mp4(tmp_path / "pairs/square/x.mp4", np.full((10, 24, 24, 3), 200, np.uint8), 24)
    write_mp4(tmp_path / "pairs/wide/x.mp4", np.full((16, 90, 136, 3), 200, np.uint8), 8)
    np.save(tmp_path / "pairs/array/x.npy", stimulus)
    human_eval.main(["make", "--pairs", str(tmp_path / "pairs"), "--out", str(tmp_path / "out"), "--height", "96"])
    (group,) = key_of(tmp_path / "out")["groups"]
    frames = {name: decoded(tmp_path / "out/page/videos" / f"{v}.mp4") for v, name in group["videos"].items()}
    assert {name: (f.shape, round(s, 2)) for name, (f, s) in frames.items()} == {
        "square": ((10, 96, 144, 3), 3), "wide": ((16, 96, 144, 3), 3), "array": ((6, 96, 144, 3), 3)
    }  # fmt: skip
    square = frames["square"][0].mean((0, 1, 3))  # bars left and right: 96 of 144 columns are filled
    assert square[:22].max() < 20 and square[-22:].max() < 20 and abs(square[26:-26] - 200).max() < 4
    middles = frames["array"][0].reshape(6, 24, 4, 36, 4, 3)[:, :, 1:3, :, 1:3].mean((2, 4))  # of pixels enlarged to 4 x 4
    assert np.abs(middles - stimulus).mean() < 12  # at the size they come in, 4:2:0 alone would leave 44


def test_groups_and_each(tmp_path, runs):
    human_eval.main(["make", *map(str, runs), "--out", str(tmp_path / "a"), "--height", "16", "--groups", "2", "--each", "1"])
    assert sorted(g["clip"] for g in key_of(tmp_path / "a")["groups"]) == ["0000", "0002"] and page_of(tmp_path / "a")["each"] == 1
    for options in (["--groups", "4"], ["--groups", "0"], ["--each", "4"], ["--height", "33"], ["--seconds", "0"]):
        assert "wanted 1 <= each <= groups <= 3 clips" in fails("make", *runs, "--out", tmp_path / "b", *options)
    assert not (tmp_path / "b").exists()


def test_bad_sources_leave_nothing(tmp_path):
    runs, out = write_runs(tmp_path / "sub1", clips=2), tmp_path / "out"
    assert "wanted two or more" in fails("make", runs[0], "--out", out)
    assert "either two or more RUN folders or --pairs" in fails("make", "--out", out)
    assert "either two or more RUN folders or --pairs" in fails("make", *runs, "--pairs", tmp_path, "--out", out)
    assert "evaluate.py" in (said := fails("make", runs[0], tmp_path / "nowhere", "--out", out)) and "nowhere/eval/gt" in said
    assert "different names" in fails("make", runs[0], runs[0], "--out", out)
    other = write_runs(tmp_path / "sub2", clips=2, names=("wholemethod-s0",))[0]
    human_eval.main(["make", str(runs[0]), str(other), "--out", str(tmp_path / "two"), "--height", "16"])
    assert key_of(tmp_path / "two")["methods"] == ["sub1/wholemethod-s0", "sub2/wholemethod-s0"]
    assert "is there already" in fails("make", *runs, "--out", tmp_path / "two")

    video = runs[1] / "eval" / "recon" / "0001.mp4"
    kept = video.read_bytes()
    video.write_bytes(kept[: len(kept) // 2])
    assert f"{video} cannot be read as a video" in fails("make", *runs, "--out", out)
    video.unlink()
    assert "0001.mp4 has no counterpart in" in (said := fails("make", *runs, "--out", out)) and "secondmethod-s0/eval/recon" in said
    video.write_bytes(kept)
    write_mp4(runs[2] / "eval" / "gt" / "0001.mp4", np.full((8, 16, 16, 3), 200, np.uint8))
    assert "show different stimuli" in fails("make", *runs, "--out", out)
    np.save(video.with_suffix(".npy"), np.zeros((2, 8, 8, 3), np.uint8))
    assert "have the same name" in fails("make", *runs, "--out", out)
    video.unlink()
    np.save(video.with_suffix(".npy"), np.zeros((2, 8, 8), np.float32))
    write_mp4(runs[2] / "eval" / "gt" / "0001.mp4", np.full((8, 16, 16, 3), level(1, -1), np.uint8))
    assert "holds float32 (2, 8, 8), wanted uint8" in fails("make", *runs, "--out", out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------- tally


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
    assert result["pairs_alike"]["semantic_alignment"] == pytest.approx((3 + 0 + 1) / (3 + 3 + 1))  # pairs of p1 p2 p3 that agree
    assert result["share"][a]["visual_quality"] == 1 and result["ci95_low"][a]["visual_quality"] == 1
    assert result["krippendorff_alpha"]["visual_quality"] is None and result["pairs_alike"]["visual_quality"] == 1
    assert 0 <= result["ci95_low"][a]["semantic_alignment"] < 0.5 < result["ci95_high"][a]["semantic_alignment"] <= 1
    places = np.zeros(3)
    of = {g["clip"]: list(g["videos"].values()) for g in key_of(study)["groups"]}
    for choices in chosen.values():
        for i, m in enumerate(choices):
            places[of[f"{i:04d}"].index(m)] += 1
    for i in range(3):
        places[of[f"{i:04d}"].index(a)] += 9
    np.testing.assert_allclose(result["share_by_place"], places / 35)

    run = subprocess.run([sys.executable, SCRIPT, "tally", study, *files], capture_output=True, text=True, check=True)
    assert re.search(r"wholemethod-s0 +50\.0% \[", run.stdout) and "3 participants, 3 groups, 35 votes" in run.stdout


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
    one_sided = np.where(np.arange(6)[:, None] < 3, 0, 1) * np.ones((4, 1, 9), int)  # each participant has a favourite
    _, (low, high) = human_eval.shares(one_sided, 2, 2000)
    assert low[0, 0] < 0.2 and high[0, 0] > 0.8


def test_bad_votes(study, tmp_path):
    every = [(f"{i:04d}", q, METHODS[0]) for i in range(3) for q in QUESTIONS]
    good = vote_file(study, tmp_path / "good.json", "p1", every)
    before = (study / "tally.json").read_bytes() if (study / "tally.json").exists() else None

    def said(*files) -> str:
        return fails("tally", study, good, *files)

    other = vote_file(study, tmp_path / "other.json", "p2", every, study="0123456789ab")
    assert f"{other} has votes of study 0123456789ab" in said(other)
    again = vote_file(study, tmp_path / "again.json", "p1", every)
    assert f"{again} and {good} are both of participant p1" in said(again)
    twice = vote_file(study, tmp_path / "twice.json", "p2", [*every, every[5]])
    assert "answers temporal_consistency of group" in said(twice) and str(twice) in said(twice)
    empty = vote_file(study, tmp_path / "empty.json", "p2", [])
    assert "holds no vote" in said(empty)
    text = good.read_text().replace('"p1"', '"p2"')
    damaged = tmp_path / "damaged.json"
    group, stranger = key_of(study)["groups"][0], next(iter(key_of(study)["groups"][1]["videos"]))
    for broken in (
        text[: len(text) // 2],
        "[]",
        "3",
        text.replace('"votes"', '"vote"'),
        text.replace("visual_quality", "beauty"),
        text.replace(next(v for v, m in group["videos"].items() if m == METHODS[0]), stranger),  # a video of another group
        text.replace(group["id"], "feedfeedfeedfeed"),
        text.replace(f'"{group["id"]}"', "[1]"),
    ):
        damaged.write_text(broken)
        assert f"{damaged} is" in said(damaged)
    damaged.write_bytes(b"\xff\xfe\x00")
    assert f"{damaged} is no file of votes" in said(damaged)
    assert "nowhere.json" in said(tmp_path / "nowhere.json")
    half = vote_file(study, tmp_path / "half.json", "p3", every[:2])
    assert "no vote on visual_quality, overall_fidelity" in fails("tally", study, half)
    assert "key.json is no key" in fails("tally", tmp_path, good)
    assert ((study / "tally.json").read_bytes() if (study / "tally.json").exists() else None) == before


# ---------------------------------------------------------------------------------------------- in a browser


@pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no chromium and chromedriver here")
def test_vote_in_a_browser(study, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
    for flag in (*flags.split(), f"user-data-dir={tmp_path / 'profile'}", "window-size=1280,720"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.implicitly_wait(5)
        browser.get((study / "page" / "index.html").as_uri())
        find = browser.find_element
        code = find("id", "code")
        code.clear()
        code.send_keys("P 1")
        find("id", "begin").click()
        key, expected = {g["id"]: g["videos"] for g in key_of(study)["groups"]}, {}
        for n in range(3):
            sources = browser.execute_script("return [...document.querySelectorAll('#videos figure:not(.stimulus) video')].map(v => v.src)")
            ids = [Path(s).stem for s in sources]
            (group,) = [g for g, videos in key.items() if list(videos) == ids]
            assert find("id", "where").text == f"Film {n + 1} of 3" and not find("id", "next").is_enabled()
            for q, question in enumerate(QUESTIONS):
                choice = (n + q) % 3
                if n == 0:  # by mouse, then by keys
                    find("css selector", f"#questions fieldset:nth-child({q + 1}) label:nth-child({choice + 1})").click()
                else:
                    find("tag name", "body").send_keys("abc"[choice] if n == 1 else "123"[choice])
                expected[group, question] = ids[choice]
            assert find("id", "next").is_enabled()
            if n == 0:  # videos can be decoded, and play again and again
                time.sleep(1.2)
                state = "return [...document.querySelectorAll('#videos video')].map(v => [v.videoWidth, v.duration, v.error])"
                assert browser.execute_script(state) == [[64, 1, None]] * 4
                scroll = "return document.documentElement.scrollHeight <= innerHeight && document.documentElement.scrollWidth <= innerWidth"
                assert browser.execute_script(scroll)
                plays = "const v = document.querySelector('#videos video'); v.seen = 0; v.addEventListener('play', () => v.seen++)"
                browser.execute_script(plays)
                time.sleep(2)
                assert browser.execute_script("return document.querySelector('#videos video').seen") >= 1
                find("id", "next").click()
            elif n == 1:  # what was answered outlives a reload
                browser.refresh()
                assert find("id", "code").get_attribute("value") == "P 1"
                find("id", "begin").click()
            else:
                find("tag name", "body").send_keys(webdriver.Keys.ENTER)
        assert find("id", "summary").text == "You answered 3 of 3 films."
        find("id", "download").click()
        file = tmp_path / f"votes-{key_of(study)['study']}-P_1.json"
        for _ in range(50):
            if file.exists():
                break
            time.sleep(0.1)
        votes = json.loads(file.read_text())
        assert votes["participant"] == "P 1"
        assert {(v["group"], v["question"]): v["video"] for v in votes["votes"]} == expected and len(votes["votes"]) == 12
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
    result = human_eval.tally(study, [file])
    for q in QUESTIONS:
        for m in METHODS:
            assert result["share"][m][q] == pytest.approx(np.mean([key[g][v] == m for (g, asked), v in expected.items() if asked == q]))

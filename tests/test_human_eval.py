"""extras/human_eval.py: the page and its blindness, the counting of votes, bad input, the page in a browser."""

import json
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import press, wait

from extras import human_eval
from support.videos import read_video, write_video

QUESTIONS = human_eval.QUESTIONS
METHODS = ("wholemethod-s0", "secondmethod-s0", "thirdmethod-s0")


def level(clip: int, m: int) -> int:
    """The grey of a method's video, by which the tests know whose a video is; the stimulus' is that of m = -1."""
    return 60 + 40 * m + 3 * clip


def write_runs(root: Path, clips: int = 3) -> list[Path]:
    for (m, name), i in product(enumerate(METHODS), range(clips)):
        for kind, value in (("gt", level(i, -1)), ("recon", level(i, m))):
            file = root / name / "eval" / kind / f"{i:04d}.mp4"
            write_video(file, np.full((8, 16, 16, 3), value, np.uint8), 8)
    return [root / name for name in METHODS]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    make(*write_runs(root / "runs" / "toy" / "sub1"), "--out", root / "study", "--height", 64)
    return root / "study"


def page_of(study: Path) -> dict:
    text = (study / "page" / "index.html").read_text()
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text).group(1))


def key_of(study: Path) -> dict:
    return json.loads((study / "key.json").read_text())


def make(*arguments) -> None:
    human_eval.main(["make", *map(str, arguments)])


def test_page_and_key_fit_the_videos_and_the_page_tells_nothing(study):
    page, key = page_of(study), key_of(study)
    assert page.keys() == {"id", "width", "height", "groups", "each"} and page["id"] == key["study"]
    assert (page["width"], page["height"], page["each"]) == (64, 64, 3)
    files, dates = set(), set()
    for shown, group in zip(page["groups"], key["groups"], strict=True):
        assert shown["id"] == group["id"] and shown["videos"] == list(group["videos"])
        levels = {v: level(int(group["clip"]), METHODS.index(name)) for v, name in group["videos"].items()}
        for video, value in {shown["stimulus"]: level(int(group["clip"]), -1), **levels}.items():
            file = study / "page" / "videos" / f"{video}.mp4"
            frames, fps = read_video(file)
            assert frames.shape == (8, 64, 64, 3) and fps == pytest.approx(8)
            assert abs(frames.mean() - value) < 2.5  # clips are 3 levels apart, H.264 rounds by 1
            dates.add(file.stat().st_mtime)
            files.add(file)
    assert len(files) == 12 and {*(study / "page" / "videos").iterdir()} == files and len(dates) == 1
    text = (study / "page" / "index.html").read_text()
    for word in (*METHODS, "recon", "eval/", str(study.parent), "0001", "sub1", "toy"):
        assert word not in text, word
    assert not any(name.encode() in file.read_bytes() for name in METHODS for file in files)
    assert not re.search(r"https?:|//cdn|@import|<link|fetch\(|XMLHttp|WebSocket", text)
    assert re.findall(r'^  \["(\w+)", "', text, re.M) == list(QUESTIONS)  # it asks what is counted


def test_pairs_of_any_kind_and_shape_in_an_order_of_the_seed(tmp_path):
    pairs, stimuli = tmp_path / "pairs", np.arange(8 * 6 * 24 * 36 * 3).reshape(8, 6, 24, 36, 3)
    for i, stimulus in enumerate(stimuli.astype(np.uint8)):
        for name in ("gt", "array"):
            (pairs / name).mkdir(parents=True, exist_ok=True)
            np.save(pairs / name / f"{i:04d}.npy", stimulus)
        write_video(pairs / "square" / f"{i:04d}.mp4", np.full((10, 24, 24, 3), 200, np.uint8), 24)
    for name, seed, n in (("a", 0, 8), ("b", 0, 8), ("c", 1, 2)):
        options = ("--height", 96, "--seconds", 3, "--seed", seed, "--groups", n, "--each", 2)
        make("--pairs", pairs, "--out", tmp_path / name, *options)
    a, b, c = (key_of(tmp_path / name) for name in "abc")
    assert a == b and a["study"] != c["study"] and page_of(tmp_path / "a")["each"] == 2
    assert sorted(group["clip"] for group in c["groups"]) == ["0000", "0007"]
    orders, clips = {tuple(g["videos"].values()) for g in a["groups"]}, [g["clip"] for g in a["groups"]]
    assert orders == {("square", "array"), ("array", "square")} and clips != sorted(clips)
    for video, name in c["groups"][0]["videos"].items():  # of the stimulus' size and length
        frames, fps = read_video(tmp_path / "c/page/videos" / f"{video}.mp4")
        assert frames.shape == ({"square": 10, "array": 6}[name], 96, 144, 3)
        assert len(frames) / fps == pytest.approx(3, abs=0.01)


def test_what_cannot_be_compared_is_refused_and_nothing_is_written(tmp_path):
    runs, out = write_runs(tmp_path / "sub1", clips=2), tmp_path / "out"

    def refused(text: str, *arguments) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=text):
            make(*arguments, "--out", out)

    refused("wanted two or more", runs[0])
    refused("nowhere/eval has videos in no folder", runs[0], tmp_path / "nowhere")
    refused("--groups 4: there are 2 clips", *runs, "--groups=4")
    (runs[1] / "eval/recon/0001.mp4").unlink()
    refused("secondmethod-s0 has no video of clip 0001", *runs)
    assert [path.name for path in tmp_path.iterdir()] == ["sub1"]
    make(runs[0], runs[2], "--out", out, "--height", 16)
    assert key_of(out)["methods"] == [METHODS[2], METHODS[0]]
    refused("is there already", runs[0], runs[2])
    write_video(runs[2] / "eval/gt/0001.mp4", np.full((8, 16, 16, 3), 200, np.uint8), 8)
    shutil.rmtree(out)
    refused("show different stimuli", runs[0], runs[2])


def vote_file(folder: Path, file: Path, participant: str, answers) -> Path:
    """answers: (clip, question, method) of each vote."""
    key = key_of(folder)
    groups = {g["clip"]: (g["id"], {m: v for v, m in g["videos"].items()}) for g in key["groups"]}
    votes = [{"group": groups[c][0], "question": q, "video": groups[c][1][m]} for c, q, m in answers]
    file.write_text(json.dumps({"study": key["study"], "participant": participant, "votes": votes}))
    return file


EVERY = [(f"{i:04d}", q, METHODS[0]) for i in range(3) for q in QUESTIONS]


def test_tally_against_a_count_by_hand(study, tmp_path, capsys):
    a, b, c = METHODS
    # semantic alignment of clips 0, 1, 2, by participant; what is missing was not answered
    files = []
    for who, choices in {"p1": [a, a, b], "p2": [a, b, b], "p3": [a, c]}.items():
        answers = [(f"{i:04d}", QUESTIONS[0], m) for i, m in enumerate(choices)]
        answers += [(f"{i:04d}", q, a) for q in QUESTIONS[1:] for i in range(3)]
        files.append(vote_file(study, tmp_path / f"{who}.json", who, answers))
    human_eval.main(["tally", str(study), *map(str, files)])
    result = json.loads((study / "tally.json").read_text())
    assert (result["participants"], result["groups"], result["votes"]) == (3, 3, 8 + 27)
    first, third = "semantic_alignment", "visual_quality"
    assert [result["share"][m][first] for m in METHODS] == pytest.approx([4 / 8, 3 / 8, 1 / 8])
    assert [result["share"][m][third] for m in METHODS] == [1, 0, 0] and result["ci95_low"][a][third] == 1
    assert result["pairs_alike"][first] == pytest.approx((3 + 0 + 1) / (3 + 3 + 1))  # of p1 p2 p3
    assert result["pairs_alike"][third] == 1 and result["krippendorff_alpha"][third] is None
    assert "50.0%" in capsys.readouterr().out


def test_agreement_against_a_published_example():
    """Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: nominal data, missing values, alpha = 0.743."""
    rows = ["123321412___", "1233224125_3", "_3332342251_", "12332441251_"]
    ratings = np.array([[-1 if rating == "_" else int(rating) for rating in row] for row in rows])
    assert human_eval.agreement(ratings)[1] == pytest.approx(0.743, abs=5e-4)
    assert np.isnan(human_eval.agreement(np.full((1, 4), 2))).all()


BAD_VOTES = {  # of participant p2: a text of the file -> what it becomes, and the error's words
    '"votes": ': ("", ""),
    "VIDEO": ("STRANGE", "wanted votes {group, question, video}"),
    r"(?<=study.: .)\w+": ("0123456789ab", "of study 0123456789ab"),
    "overall_fidelity": ("visual_quality", "two answers to visual_quality"),
    '"p2"': ('"p1"', "are both of participant p1"),
}


def test_damaged_votes_are_named_and_what_cannot_be_counted_is_refused(study, tmp_path):
    (tmp_path / "key.json").write_bytes((study / "key.json").read_bytes())
    good = vote_file(study, tmp_path / "good.json", "p1", EVERY)
    first, second, _ = key_of(study)["groups"]
    (video,) = [video for video, method in first["videos"].items() if method == METHODS[0]]
    names = {"VIDEO": video, "STRANGE": next(iter(second["videos"]))}
    for old, (new, problem) in BAD_VOTES.items():
        bad = vote_file(study, tmp_path / "bad.json", "p2", EVERY)
        bad.write_text(re.sub(names.get(old, old), names.get(new, new), bad.read_text()))
        with pytest.raises(ValueError, match=re.escape(str(bad))) as refused:
            human_eval.tally(tmp_path, [good, bad])
        assert problem in str(refused.value)
    half = vote_file(study, tmp_path / "half.json", "p3", EVERY[:2])
    with pytest.raises(ValueError, match="no vote on visual_quality, overall_fidelity"):
        human_eval.tally(tmp_path, [half])
    (tmp_path / "key.json").write_text(json.dumps(key_of(study) | {"methods": METHODS[:1]}))
    with pytest.raises(ValueError, match="key.json.*human_eval.py make"):
        human_eval.tally(tmp_path, [half])
    assert not (tmp_path / "tally.json").exists()


@pytest.mark.slow
def test_vote_in_a_browser(browser, study, tmp_path):
    key, expected = {group["id"]: group["videos"] for group in key_of(study)["groups"]}, {}
    for n in range(3):
        browser.get((study / "page" / "index.html").as_uri())  # what was answered outlives a reload
        browser.find_element("id", "code").clear()
        browser.find_element("id", "code").send_keys("P 1")
        browser.find_element("id", "begin").click()
        sources = "return [...document.querySelectorAll('#videos video')].map(v => v.src)"
        ids = [Path(source.split("#")[0]).stem for source in browser.execute_script(sources)[1:]]
        (group,) = [name for name, videos in key.items() if list(videos) == ids]
        for q, question in enumerate(QUESTIONS):
            expected[group, question] = ids[(n + q) % 3]
            press(browser, "abc"[(n + q) % 3])
    browser.find_element("id", "next").click()
    browser.find_element("id", "download").click()
    file = tmp_path / f"votes-{key_of(study)['study']}-P_1.json"
    wait(file.exists)
    ballot = json.loads(file.read_text())
    assert ballot["participant"] == "P 1" and len(ballot["votes"]) == 12
    assert {(vote["group"], vote["question"]): vote["video"] for vote in ballot["votes"]} == expected

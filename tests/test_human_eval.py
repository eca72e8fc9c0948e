"""extras/human_eval.py: the page and its blindness, the counting of votes."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

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
    assert (page["id"], page["width"], page["height"], page["each"]) == (key["study"], 64, 64, 3)
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
    for word in (*METHODS, "recon", "eval/", str(study.parent), "0001", "sub1", "toy", "http", "fetch("):
        assert word not in text, word
    assert not any(name.encode() in file.read_bytes() for name in METHODS for file in files)
    assert re.findall(r'^  \["(\w+)", "', text, re.M) == list(QUESTIONS)  # it asks what is counted


def test_runs_of_other_stimuli_are_refused_and_nothing_is_written(tmp_path):
    first, _, third = write_runs(tmp_path / "sub1", clips=2)
    write_video(third / "eval/gt/0001.mp4", np.full((8, 16, 16, 3), 200, np.uint8), 8)
    with pytest.raises(ValueError, match="different stimuli"):
        make(first, third, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sub1"]


def vote_file(folder: Path, file: Path, participant: str, answers) -> Path:
    """answers: (clip, question, method) of each vote."""
    key = key_of(folder)
    groups = {g["clip"]: (g["id"], {m: v for v, m in g["videos"].items()}) for g in key["groups"]}
    votes = [{"group": groups[c][0], "question": q, "video": groups[c][1][m]} for c, q, m in answers]
    file.write_text(json.dumps({"study": key["study"], "participant": participant, "votes": votes}))
    return file


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
    twice = vote_file(study, tmp_path / "p4.json", "p4", [("0000", first, m) for m in (a, b)])
    with pytest.raises(ValueError, match="p4.json: .*two answers to semantic_alignment"):
        human_eval.tally(study, [twice])


def test_agreement_against_a_published_example():
    """Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: nominal data, missing values, alpha = 0.743."""
    rows = ["123321412___", "1233224125_3", "_3332342251_", "12332441251_"]
    ratings = np.array([[-1 if rating == "_" else int(rating) for rating in row] for row in rows])
    assert human_eval.agreement(ratings)[1] == pytest.approx(0.743, abs=5e-4)

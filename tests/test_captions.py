"""Lists of captions in the formats of the field, what is refused, and how many captions recur."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny import unit

from prepare.captions import caption_copies, captions_that_fit, read_captions

CC2017 = Path(__file__).parents[2] / "shared" / "data" / "cc2017"
CAPTIONS = ["a dog runs", "zwei Männer", "a red car"]
RECORDS = [{"caption": caption, "tags": ["dog"]} for caption in CAPTIONS]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def of_segments(*names: str) -> list[dict]:
    return [{"segment": name, "clip": i, "caption": c} for name in names for i, c in enumerate(CAPTIONS)]


def told(path: Path, segment: str = "seg1") -> list[str]:
    return [row["caption"] for row in read_captions(path, [segment])]


# ---------------------------------------------------------------- formats


def test_each_format(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(CAPTIONS))
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    rows = of_segments("test1", "seg1")
    rows[0]["caption"] = "only in the test set"
    (tmp_path / "captions.jsonl").write_text(lines(rows))
    with h5py.File(tmp_path / "strings.h5", "w") as file:
        file["Train_captions"] = [caption.encode() for caption in CAPTIONS]  # as Mind-Animator names it
    with h5py.File(tmp_path / "column.hdf5", "w") as file:
        column = np.array([[caption] for caption in CAPTIONS], object)
        file.create_dataset("group/Test_captions", data=column, dtype=h5py.string_dtype())
    torch.save(CAPTIONS, tmp_path / "list.pt")
    torch.save(np.array(CAPTIONS), tmp_path / "array.pt")
    videos = [{"video": f"/made/{i}.mp4", "text": caption} for i, caption in enumerate(CAPTIONS)]
    (tmp_path / "videos.json").write_text(json.dumps(videos))
    assert len([*tmp_path.iterdir()]) == 8
    for file in tmp_path.iterdir():
        assert told(file) == CAPTIONS, file.name
    assert read_captions(tmp_path / "records.json", ["seg1"])[1]["tags"] == ["dog"]
    assert told(tmp_path / "captions.jsonl", "test1")[0] == "only in the test set"
    assert read_captions(tmp_path / "videos.json", ["seg1"])[2]["video"] == "/made/2.mp4"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("key", ["clip", "idx"])
def test_numbers_order_a_list_and_a_segment(tmp_path, first, key):
    order = np.random.default_rng(0).permutation(30)
    records = [{"caption": f"clip {i}", key: int(i) + first} for i in order]
    (tmp_path / "list.json").write_text(json.dumps(records))
    rows = [{"segment": name, **record} for name in ("seg2", "seg1") for record in records]
    np.random.default_rng(1).shuffle(rows)
    (tmp_path / "lines.jsonl").write_text(lines(rows))
    wanted = [f"clip {i}" for i in range(30)]
    assert told(tmp_path / "list.json") == told(tmp_path / "lines.jsonl") == wanted
    both = read_captions(tmp_path / "lines.jsonl", ["seg1", "seg2"])
    assert [row["segment"] for row in both] == ["seg1"] * 30 + ["seg2"] * 30


def test_segments_without_numbers_keep_their_order(tmp_path):
    rows = [{"segment": f"seg{1 + i % 2}", "caption": f"clip {i}"} for i in range(6)]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    assert told(tmp_path / "a.jsonl", "seg2") == ["clip 1", "clip 3", "clip 5"]


@pytest.mark.parametrize("what", ["byte order mark", "line separator", "blank last line", "escaped"])
def test_what_is_valid_is_read(tmp_path, what):
    rows, wanted = of_segments("seg1"), [*CAPTIONS]
    if what in ("line separator", "escaped"):
        rows[1]["caption"] = wanted[1] = "two\u2028lines of text"
    text = (
        json.dumps(rows[0]) + "\n" + lines(rows[1:])
        if what != "escaped"
        else "\n".join(map(json.dumps, rows))
    )
    if what == "blank last line":
        text += "\n \n"
    encoding = "utf-8-sig" if what == "byte order mark" else "utf-8"
    (tmp_path / "captions.jsonl").write_text(text, encoding=encoding)
    assert told(tmp_path / "captions.jsonl") == wanted
    (tmp_path / "captions.json").write_text(json.dumps(wanted), encoding=encoding)
    assert told(tmp_path / "captions.json") == wanted


# ---------------------------------------------------------------- what is refused


def numbered(numbers: list, key: str = "idx") -> str:
    return json.dumps([{"caption": "a dog", key: n} for n in numbers])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", json.dumps({"0": "a dog"}), r"a.json: found dict .*, wanted a list"),
        ("a.json", "[]", "a.json: found no caption"),
        ("a.json", '["a dog", "a c', "a.json: found .*, wanted JSON"),
        ("a.json", '["a dog", NaN]', "a.json, entry 2: found caption = 'nan', wanted caption as str"),
        ("a.json", '["a dog", null]', "a.json, entry 2: found caption = 'None'"),
        ("a.json", '["a dog", ["a cat"]]', "a.json, entry 2: found caption = "),
        ("a.json", '["a dog", " "]', "a.json, entry 2: found an empty caption"),
        ("a.json", '[{"title": "a dog"}]', "a.json, entry 1: found no caption"),
        (
            "a.json",
            '[{"caption": "a dog", "tags": "dog"}]',
            "entry 1: found tags = 'dog', wanted tags as a list",
        ),
        (
            "a.json",
            '[{"caption": "a dog", "tags": [3]}]',
            r"entry 1: found tags = \[3\], wanted a list of strings",
        ),
        ("a.json", '[{"video": "0.mp4", "text": 3}]', "entry 1: found caption = '3'"),
        ("a.json", numbered([0, 1, 1, 2]), "a.json: found idx 1 twice, wanted numbers 0 to 3, each once"),
        (
            "a.json",
            numbered([1, 2, 4, 5], "clip"),
            "a.json: found no clip 3, wanted numbers 1 to 4, each once",
        ),
        ("a.json", numbered([0, None]), "a.json: found no idx in entry 2"),
        ("a.json", numbered([0, True]), "a.json, entry 2: found idx = 'True'"),
        ("a.json", numbered([0, 1.5]), "a.json, entry 2: found idx = '1.5'"),
        ("a.json", numbered([-1, 0]), "a.json: found no idx 1"),
        ("a.jsonl", lines([{"caption": "a dog"}]), "a.jsonl, line 1: found no segment"),
        ("a.jsonl", lines([{"segment": "seg1"}]), "a.jsonl, line 1: found no caption"),
        ("a.jsonl", lines([*of_segments("seg1"), *of_segments("seg1")]), "a.jsonl, seg1: found clip 0 twice"),
        (
            "a.jsonl",
            lines(of_segments("seg1")[:1] + of_segments("seg1")[2:]),
            "a.jsonl, seg1: found no clip 1",
        ),
        ("a.jsonl", '{"segment": "seg1", "caption": "a dog"}\n\n["a cat"]', "a.jsonl, line 2: "),
        ("a.jsonl", "", "a.jsonl, line 1: "),
        *[
            (f"a.{kind}", "<html>not here</html>", f"a.{kind}")
            for kind in ("json", "jsonl", "h5", "pt", "html")
        ],
        ("a.txt", "a dog", "a.txt: found the suffix .txt, wanted captions.jsonl"),
    ],
)
def test_what_is_no_list_of_captions_is_one_error(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        read_captions(tmp_path / name, ["seg1"])
    assert len(str(error.value).splitlines()) == 1 and str(tmp_path / name) in str(error.value)


def test_other_contents_are_one_error(tmp_path):
    with h5py.File(tmp_path / "two.h5", "w") as file:
        file["captions_a"], file["captions_b"] = ["a"], ["b"]
    with pytest.raises(ValueError, match="two.h5: found datasets captions_a, captions_b, wanted one dataset"):
        told(tmp_path / "two.h5")
    with h5py.File(tmp_path / "numbers.h5", "w") as file:
        file["captions"] = np.arange(3)
    with pytest.raises(ValueError, match="numbers.h5, entry 1: found caption = '0'"):
        told(tmp_path / "numbers.h5")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="tensor.pt: found Tensor, wanted a list of captions"):
        told(tmp_path / "tensor.pt")
    (tmp_path / "latin.json").write_bytes('["zwei Männer"]'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.json: found .*, wanted a file of UTF-8 text"):
        told(tmp_path / "latin.json")
    with pytest.raises(
        FileNotFoundError, match="gone.json is not there: --captions takes captions.jsonl, or"
    ):
        told(tmp_path / "gone.json")


# ---------------------------------------------------------------- how many recur, and whether they fit


def rows(*pairs: tuple[str, str]) -> list[dict]:
    return [{"caption": caption, "segment": segment} for caption, segment in pairs]


def test_caption_copies_by_hand():
    train = rows(("a", "X"), ("b", "X"), ("b", "Y"), ("c", "Y"), ("c", "Y"))
    assert caption_copies(train, rows(("c", "Z"), ("d", "Z"))) == (0.4, 0.5)


def test_case_punctuation_and_spaces_do_not_matter():
    train = rows(("A dog.", "X"), ("a  dog", "X"), ("a cat", "X"), ("a dog!", "Y"), ("a cow, two dogs", "Y"))
    test = rows(("A CAT", "Z"), ("a bird", "Z"), ("a fox", "Z"), ("a cow two dogs", "Z"))
    assert caption_copies(train, test) == (0.6, 0.5)


@pytest.mark.skipif(not CC2017.is_dir(), reason="the public captions are not there")
def test_film_recurs_in_cc2017():
    for key, measured in (("caption_blip", (0.576, 0.061)), ("caption", (0.371, 0.0575))):
        split = []
        for name in ("train", "test"):
            told = read_captions(CC2017 / f"captions_{name}.json", [])
            split.append([{"caption": row[key], "segment": row["clip"] // 240} for row in told])
        assert caption_copies(*split) == pytest.approx(measured, abs=5e-4)


def test_captions_one_clip_late_are_noticed():
    rng = np.random.default_rng(0)
    scenes = np.repeat(rng.normal(size=(30, 16)), 8, 0)  # a scene lasts 8 clips
    own = rng.normal(size=(240, 16))
    e_img, e_txt = (unit(scenes + 0.3 * rng.normal(size=(240, 16)) + 0.3 * own) for _ in range(2))
    segments = ["a"] * 120 + ["b"] * 120
    assert captions_that_fit(e_img[:, None], e_txt, segments)[1] == []
    assert captions_that_fit(e_img[:, None], np.roll(e_txt, 1, 0), segments)[1] == ["a", "b"]
    swapped = np.concatenate([e_txt[120:180], e_txt[60:120], e_txt[:60], e_txt[180:]])
    assert captions_that_fit(e_img[:, None], swapped, segments)[1]

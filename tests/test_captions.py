"""Lists of captions in the formats of the field, what is refused, and how many captions recur."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import unit

from prepare.captions import caption_copies, captions_that_fit, describe_clips, read_captions
from prepare.release import Release

CAPTIONS = ["a dog runs", "zwei\u2028Männer", "a red car"]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path, segment: str = "seg1") -> list[str]:
    return [row["caption"] for row in read_captions(path, [segment])]


def test_each_format(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(CAPTIONS), encoding="utf-8-sig")
    records = [{"caption": caption, "tags": ["dog"]} for caption in CAPTIONS]
    (tmp_path / "RECORDS.JSON").write_text(json.dumps(records))
    rows = [{"segment": name, "caption": caption} for name in ("test1", "seg1") for caption in CAPTIONS]
    rows[0]["caption"] = "only in the test set"
    (tmp_path / "captions.jsonl").write_text(lines(rows) + "\n \n", encoding="utf-8-sig")
    torch.save(CAPTIONS, tmp_path / "list.pt")
    torch.save(np.array(CAPTIONS), tmp_path / "array.pt")
    videos = [{"video": f"/films/{i}.mp4", "text": caption} for i, caption in enumerate(CAPTIONS)]
    (tmp_path / "videos.json").write_text(json.dumps(videos))
    for file in tmp_path.iterdir():
        assert read(file) == CAPTIONS, file.name
    assert read_captions(tmp_path / "RECORDS.JSON", ["seg1"])[1]["tags"] == ["dog"]
    assert read(tmp_path / "captions.jsonl", "test1")[0] == "only in the test set"
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="tensor.pt: found Tensor, wanted a list"):
        read(tmp_path / "tensor.pt")


@pytest.mark.parametrize(("key", "first"), [("clip", 0), ("idx", 1)])
def test_numbers_order_a_list_and_a_segment(tmp_path, first, key):
    order = np.random.default_rng(0).permutation(30)
    records = [{"caption": f"clip {i}", key: int(i) + first} for i in order]
    (tmp_path / "list.json").write_text(json.dumps(records))
    rows = [{"segment": name, **record} for name in ("seg2", "seg1") for record in records]
    np.random.default_rng(1).shuffle(rows)
    (tmp_path / "lines.jsonl").write_text(lines(rows))
    wanted = [f"clip {i}" for i in range(30)]
    assert read(tmp_path / "list.json") == read(tmp_path / "lines.jsonl") == wanted
    both = read_captions(tmp_path / "lines.jsonl", ["seg1", "seg2"])
    assert [row["segment"] for row in both] == ["seg1"] * 30 + ["seg2"] * 30


@pytest.mark.parametrize(("name", "rows", "message"), [
    ("a.json", {"0": "a dog"}, r"a.json: found dict .*, wanted a list"),
    ("a.json", [], r"a.json: found no caption"),
    ("a.json", ["a dog", " "], "a.json, entry 2: found an empty caption"),
    ("a.json", [{"title": "a dog"}], "a.json, entry 1: found no caption"),
    ("a.json", [{"caption": "a dog", "tags": [3]}], r"entry 1: found tags = \[3\], wanted a list of strings"),
    ("a.json", [{"caption": "a", "idx": i} for i in (0, 1, 1, 3)], "found no idx 2, wanted numbers 0 to 3"),
    ("a.json", [{"caption": "a", "clip": i} for i in (1, 2, 4, None)], "found no clip 3, wanted numbers 1 to 4"),
    ("a.jsonl", {"caption": "a dog"}, "a.jsonl, line 1: found no segment"),
    ("a.txt", "a dog", "a.txt: found the suffix .txt, wanted captions.jsonl"),
])  # fmt: skip
def test_what_is_no_list_of_captions_is_one_error(tmp_path, name, rows, message):
    (tmp_path / name).write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name, ["seg1"])


class Films(Release):
    """Two segments of two clips, each clip a film of its own."""

    splits = {"train": ["seg1", "seg2"], "test": []}

    def __init__(self, one_film: bool = False):
        self.one_film = one_film

    def clips_of(self, segment):
        return 2

    def video(self, segment, clip):
        return Path("films", f"{segment}.mp4" if self.one_film else f"{segment}_{clip}.mp4"), 2.0 * clip


NAMES = ["seg1_0.mp4", "seg1_1.mp4", "seg2_0.mp4", "seg2_1.mp4"]


def test_captions_of_videos_go_to_the_clips_of_that_name(tmp_path):
    rows = [{"video": f"any/{name}", "text": f"a dog of {name}"} for name in ["other.mp4", *NAMES[::-1]]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    described = describe_clips(Films(), "train", tmp_path / "a.json")
    assert [line["caption"] for line in described] == [f"a dog of {name}" for name in NAMES]
    assert described[3] == {
        "id": "seg2-001", "segment": "seg2", "video": "seg2_1.mp4", "start_s": 2.0, "tags": [],
        "caption": "a dog of seg2_1.mp4", "categories": ["animal"],
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows + rows[:1]))
    with pytest.raises(ValueError, match="a.json, entry 6: found other.mp4 again"):
        describe_clips(Films(), "train", tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(rows[:-2]))
    with pytest.raises(ValueError, match="has no caption of seg1_0.mp4 and 1 other train clips: download it"):
        describe_clips(Films(), "train", tmp_path / "a.json")


def test_rows_keep_their_tags_and_of_a_list_for_the_complete_release_the_first_are_taken(tmp_path):
    films, file = Films(one_film=True), tmp_path / "a.json"
    films.complete = {"train": (3, 2)}
    rows = [{"caption": f"a cat {k}", "tags": ["car"], "mood": "calm", "idx": 5 - k} for k in range(6)]
    rows[5] |= {"categories": ["food"], "tags": None}
    file.write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="a.json: the first 4 of 6 captions are taken, for 2 segments"):
        described = describe_clips(films, "train", file)
    assert [line["caption"] for line in described] == [f"a cat {k}" for k in (5, 4, 3, 2)]
    assert [line["categories"] for line in described] == [["food"]] + [["animal", "vehicle"]] * 3
    assert [line["tags"] for line in described] == [[]] + [["car"]] * 3
    assert described[0]["mood"] == "calm" and "idx" not in described[0]
    file.write_text(json.dumps(rows[1:]))
    with pytest.raises(ValueError, match="a.json has 5 captions for the 4 train clips of 2 segments"):
        describe_clips(films, "train", file)


def of(*pairs: tuple[str, str]) -> list[dict]:
    return [{"caption": caption, "segment": segment} for caption, segment in pairs]


def test_caption_copies_by_hand():
    train = of(("a", "X"), ("b", "X"), ("b", "Y"), ("c", "Y"), ("c", "Y"))
    assert caption_copies(train, of(("c", "Z"), ("d", "Z"))) == (0.4, 0.5)
    train = of(("A dog.", "X"), ("a  dog", "X"), ("a cat", "X"), ("a dog!", "Y"), ("a cow, two dogs", "Y"))
    test = of(("A CAT", "Z"), ("a bird", "Z"), ("a fox", "Z"), ("a cow two dogs", "Z"))
    assert caption_copies(train, test) == (0.6, 0.5)  # case, punctuation and spaces do not matter


def test_captions_one_clip_late_or_early_are_noticed():
    rng = np.random.default_rng(0)
    scenes = np.repeat(rng.normal(size=(30, 16)), 8, 0)  # a scene lasts 8 clips
    clips = scenes + 0.3 * rng.normal(size=(240, 16))
    e_img, e_txt = (unit(clips + 0.3 * rng.normal(size=(240, 16))) for _ in range(2))
    segments = ["a"] * 120 + ["b"] * 120
    report, doubtful = captions_that_fit(e_img[:, None], e_txt, segments)
    cosines = [(e_img * np.roll(e_txt, n, 0)).sum(1) for n in (0, 1, -1, 120)]
    own, previous, following = (f"{cosine.mean():.3f}" for cosine in cosines[:3])
    assert f"own caption {own}, the caption before {previous}, after {following}," in report and not doubtful
    assert f"in {(cosines[0] > cosines[3]).mean():.0%} of the clips" in report
    for shift in (1, -1):
        assert captions_that_fit(e_img[:, None], np.roll(e_txt, shift, 0), segments)[1] == ["a", "b"]
    swapped = np.concatenate([e_txt[120:180], e_txt[60:120], e_txt[:60], e_txt[180:]])
    assert captions_that_fit(e_img[:, None], swapped, segments)[1] == ["a", "b"]
    mixed = np.concatenate([e_txt[:120], e_txt[rng.permutation(120) + 120]])
    assert captions_that_fit(e_img[:, None], mixed, segments)[1] == ["b"]

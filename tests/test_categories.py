"""Categories: nouns of captions and tags -> COCO supercategories -> classes of the category head (§3.1)."""

import json
from pathlib import Path

import numpy as np
import pytest

from prepare.categories import COCO, SYNONYMS, category_matrix, category_table, clip_categories, merge_rare

HAND_LABELS = Path(__file__).with_name("hand_labels.json")


def test_every_coco_name_is_its_supercategory():
    assert len(COCO) == 12 and sum(map(len, COCO.values())) == 80
    for supercategory, names in COCO.items():
        for name in names:
            assert clip_categories(f"a close-up of a {name}", None) == [supercategory], name
            assert clip_categories("", [name]) == [supercategory], name


def test_synonyms_are_single_meanings():
    assert set(SYNONYMS.values()) <= {*COCO, "none"}
    assert not set(SYNONYMS) & {name for names in COCO.values() for name in names} - {"cup", "sandwich"}


@pytest.mark.parametrize(
    ("caption", "tags", "expected"),
    [
        # two meanings of a word
        ("an orange cat on orange leaves", None, "animal"),
        ("an orange and white cat", None, "animal"),
        ("a hand holding an orange over oranges", None, "food person"),
        ("a bat hanging in a cave", ["bat"], "animal"),
        ("children playing cricket in a street", ["child", "bat"], "person sports"),
        ("a man in a baseball uniform holding a bat", ["man", "uniform", "bat"], "person sports"),
        ("a baseball player wearing a uniform", None, "person"),
        ("a woman wearing glasses", None, "accessory person"),
        ("wine glasses on a table", None, "furniture kitchen"),
        ("a bottle pouring liquid into glasses", ["bottle", "glass"], "kitchen"),
        ("a man in glasses talking", ["man", "glass"], "accessory person"),
        ("a man walking through a glass door", ["man", "glass"], "person"),
        ("a mouse next to a keyboard", None, "electronic"),
        ("a mouse in the grass", None, "animal"),
        ("a woman wearing a tank top", ["woman", "tank"], "person"),
        ("two fish swimming in a tank", ["fish", "tank"], "animal"),
        ("a tank rolling over a field", ["tank"], "vehicle"),
        ("a crane lifting heavy materials", ["crane"], "vehicle"),
        ("a crane wading in a marsh", ["crane"], "animal"),
        ("a seal lying on a beach", None, "animal"),
        ("a statue holding a tablet", ["statue", "tablet"], ""),
        ("a roasted turkey on a plate", ["turkey", "plate"], "food kitchen"),
        ("a cat looking at the camera", None, "animal"),
        ("a man holding a camera", None, "electronic person"),
        # verbs
        ("a man holding a sword while another man watches", None, "person"),
        ("people gathering to watch an airplane", None, "person vehicle"),
        ("a person wearing a watch", None, "accessory person"),
        ("a man holding a sword while another man watches", ["man", "watch"], "accessory person"),
        ("a dog and a cat watch the tv", None, "animal electronic"),
        ("a boy ducks under a bridge", None, "person"),
        ("ducks swimming in a pond", None, "animal"),
        ("soldiers train a dog in a park", None, "animal person"),
        ("a train parked at a station with lights", None, "vehicle"),
        ("an airplane flying above people who fly kites", None, "person sports vehicle"),
        ("a fly on a leaf", None, "animal"),
        ("bears walking along a beach", None, "animal"),
        # names of two or three words
        ("a hot dog on a bench", ["dog", "bench"], "food outdoor"),
        ("a teddy bear on a bed", ["bear", "bed"], "furniture indoor"),
        ("hot air balloons in the sky", ["balloon"], "vehicle"),
        ("a street with traffic lights", ["light"], "outdoor"),
        ("a child eating an ice cream cone", ["child", "cone"], "food person"),
        ("a toy car on the floor", ["car"], "indoor"),
        ("a baby elephant", ["elephant", "baby"], "animal"),
        ("a bird's-eye view of a city", None, ""),
        ("a bird\u2019s-eye view of a city", None, ""),
        ("a statue with its face in shadow", None, ""),
        ("a woman wearing a bow tie", ["woman", "bow"], "accessory person"),
        # plurals
        ("men, women and children with knives", None, "kitchen person"),
        ("people feeding mice, geese and wolves", None, "animal person"),
        ("buses and benches under clear skies", None, "outdoor vehicle"),
        ("strawberries, glasses of juice and dishes", None, "food kitchen"),
        # parts of a person, scenery, clothes, nothing
        ("a person's hand on a rock", None, "person"),
        ("legs walking on railway tracks", ["leg", "track"], "person"),
        ("an elephant's legs", ["elephant", "leg"], "animal"),
        ("a mountain road with trees near a lake and buildings in the kitchen room", None, ""),
        ("a man in a jacket and shirt", ["man", "jacket"], "person"),
        ("a blank white image", [""], ""),
        ("", None, ""),
        # tags name what the caption leaves out, and the other way round
        ("people dining together", ["man", "table", "glass"], "furniture kitchen person"),
        ("a soldier with a backpack", ["soldier"], "accessory person"),
    ],
)
def test_clip_categories(caption: str, tags: list[str] | None, expected: str):
    assert clip_categories(caption, tags) == expected.split()


def test_rare_classes_are_merged_into_other():
    labels = [["person"]] * 150 + [["animal", "person"]] * 49 + [["food"]] + [["sports", "person"]] * 2
    classes = merge_rare(labels)
    assert classes == ["person", "animal", "other"]
    targets = category_matrix(labels, classes)
    assert targets.dtype == np.uint8 and targets.shape == (202, 3)
    assert targets.sum(0).tolist() == [201, 49, 3]
    assert targets[199].tolist() == [0, 0, 1] and targets[-1].tolist() == [1, 0, 1]
    table = [line.split() for line in category_table(labels, classes).splitlines()]
    assert table[0] == ["class", "clips", "share"] and table[1] == ["person", "201", "99.505%"]
    assert ["sports", "2", "0.990%", "merged"] in table and ["food", "1", "0.495%", "merged"] in table
    assert ["vehicle", "0", "0.000%", "absent"] in table and table[-1] == ["other", "3", "1.485%"]
    assert len(table) == 1 + 12 + 1


def test_nothing_rare_gives_no_other():
    labels = [["person"], ["animal"], []]
    classes = merge_rare(labels)
    assert classes == ["person", "animal"]
    assert category_matrix(labels, classes).tolist() == [[1, 0], [0, 1], [0, 0]]
    assert category_matrix([["food"]], classes).tolist() == [[0, 0]]
    assert merge_rare([["person"]] * 99 + [["food"]]) == ["person", "food"]  # exactly 1 % is frequent
    assert category_matrix([], classes).shape == (0, 2)
    assert merge_rare([["red"], ["blue", "animal"]]) == ["animal", "blue", "red"]  # names that COCO lacks
    table = category_table([["red"], ["blue"]], ["blue", "red"]).splitlines()
    assert [line.split()[0] for line in table] == ["class", "blue", "red"]


def test_agreement_with_hand_labels():
    """190 of the 200 clips of cc2017 labelled by hand get exactly the same set; nine in ten from the tags alone and
    the caption alone."""
    clips = json.loads(HAND_LABELS.read_text(encoding="utf-8"))["clips"]
    labels = [clip_categories(clip["caption"], clip["tags"]) for clip in clips]
    wrong = [
        clip | {"ours": label}
        for clip, label in zip(clips, labels, strict=True)
        if label != clip["categories"]
    ]
    assert len(clips) == 200 and len(wrong) == 10, "\n".join(map(str, wrong))
    same = [clip_categories("", clip["tags"]) == clip_categories(clip["caption"], None) for clip in clips]
    assert 0.85 < np.mean(same) < 1

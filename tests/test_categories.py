"""Categories: nouns of captions and tags -> COCO supercategories -> classes of the category head (§3.1)."""

import json
import os
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
    assert set(SYNONYMS.values()) <= {*COCO, "none"}
    assert not set(SYNONYMS) & {name for names in COCO.values() for name in names} - {"cup", "sandwich"}


CAPTIONS = [
    ("a hand holding an orange over oranges", None, "food person"),
    ("children playing cricket in a street", ["child", "bat"], "person sports"),
    ("wine glasses on a table", None, "furniture kitchen"),
    ("a bottle pouring liquid into glasses", ["bottle", "glass"], "kitchen"),
    ("a man walking through a glass door", ["man", "glass"], "person"),
    ("a mouse next to a keyboard", None, "electronic"),
    ("a woman wearing a tank top", ["woman", "tank"], "person"),
    ("a statue holding a tablet", ["statue", "tablet"], ""),
    ("people gathering to watch an airplane", None, "person vehicle"),
    ("a boy ducks under a bridge", None, "person"),
    ("soldiers train a dog in a park", None, "animal person"),
    ("an airplane flying above people who fly kites", None, "person sports vehicle"),
    ("a hot dog on a bench", ["dog", "bench"], "food outdoor"),
    ("a teddy bear on a bed", ["bear", "bed"], "furniture indoor"),
    ("a street with traffic lights", ["light"], "outdoor"),
    ("a toy car on the floor", ["car"], "indoor"),
    ("a baby elephant", ["elephant", "baby"], "animal"),
    ("a baby sleeps", None, "person"),
    ("a bird's-eye view of a city", None, ""),
    ("a woman wearing a bow tie", ["woman", "bow"], "accessory person"),
    ("men, women and children with knives", None, "kitchen person"),
    ("people feeding mice, geese and wolves", None, "animal person"),
    ("a person's hand on a rock", None, "person"),
    ("an elephant's legs", ["elephant", "leg"], "animal"),
    ("", None, ""),
    ("people dining together", ["man", "table", "glass"], "furniture kitchen person"),
]


@pytest.mark.parametrize(("caption", "tags", "expected"), CAPTIONS)
def test_clip_categories(caption: str, tags: list[str] | None, expected: str):
    assert clip_categories(caption, tags) == expected.split()


def test_rare_classes_are_merged_into_other():
    labels = [["person"]] * 150 + [["animal", "person"]] * 49 + [["food"]] + [["sports", "person"]] * 2
    classes = merge_rare(labels)
    assert classes == ["person", "animal", "other"]
    targets = category_matrix(labels, classes)
    assert targets.dtype == np.uint8 and targets.sum(0).tolist() == [201, 49, 3]
    assert targets[199].tolist() == [0, 0, 1] and targets[-1].tolist() == [1, 0, 1]
    table = [line.split() for line in category_table(labels, classes).splitlines()]
    assert table[0] == ["class", "clips", "share"] and table[1] == ["person", "201", "99.505%"]
    assert ["sports", "2", "0.990%", "merged"] in table and ["food", "1", "0.495%", "merged"] in table
    assert ["vehicle", "0", "0.000%", "absent"] in table and table[-1] == ["other", "3", "1.485%"]
    labels = [["person"], ["animal"], []]  # nothing is rare
    assert (classes := merge_rare(labels)) == ["person", "animal"]
    assert category_matrix([*labels, ["food"]], classes).tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]
    assert merge_rare([["person"]] * 99 + [["food"]]) == ["person", "food"]  # exactly 1 % is frequent
    assert merge_rare([["red"], ["blue", "animal"]]) == ["animal", "blue", "red"]  # names that COCO lacks
    table = category_table([["red"], ["blue"]], ["blue", "red"]).splitlines()
    assert [line.split()[0] for line in table] == ["class", "blue", "red"]


@pytest.mark.skipif("CINENEURON_CAPTIONS" not in os.environ, reason="the folder of the published captions")
def test_agreement_with_hand_labels():
    """190 of 200 clips get exactly the set of the labels by hand. The captions are not ours to publish."""
    hand, same = json.loads(HAND_LABELS.read_text(encoding="utf-8")), []
    for split in ("train", "test"):
        rows = json.loads(Path(os.environ["CINENEURON_CAPTIONS"], f"captions_{split}.json").read_text())
        for row, labels in ((rows[int(clip)], labels) for clip, labels in hand[split].items()):
            same.append(clip_categories(row["caption"], row["tags"]) == labels)
    assert (len(same), sum(same)) == (200, 190)

"""Nouns of captions and tags -> supercategories of COCO -> classes of the category head (§3.1).

coco_nouns.txt beside this file holds COCO's names, their synonyms and the words of several meanings.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np


def _noun_tables(text: str) -> list[dict[str, str]]:
    """The sections of coco_nouns.txt, {key: what stands after the colon}."""
    sections = [re.sub(r"\n +", " ", section) for section in re.split(r"^\[\w+\]\n", text, flags=re.M)[1:]]
    return [dict(re.findall(r"^(\w+): (.+)$", section, re.M)) for section in sections]


_OBJECT_NAMES, _NOUNS, _MEANINGS = _noun_tables(Path(__file__).with_name("coco_nouns.txt").read_text("utf-8"))
COCO = {k: tuple(names.split(", ")) for k, names in _OBJECT_NAMES.items()}
SYNONYMS = {noun: k for k, nouns in _NOUNS.items() for noun in nouns.split(", ")}
_NAMES = SYNONYMS | {name: k for k, names in COCO.items() for name in names}
_SENSES = {}  # word: another category, and the pattern of the captions in which it has that
for _words, _meaning in _MEANINGS.items():
    _SENSES |= dict.fromkeys(_words.split("_"), _meaning.split(" where ", 1))
# Verbs spelled like an object, after a subject or before an object: "others watch", "watch a game".
_VERBS = "bat bear book dish duck fish fly seal ship sink skate ski train watch".split()
_SUBJECTS = "to who that other others they he she".split()
_OBJECTS = "a an the his her their him them tv".split()
_PARTS = re.compile(r"\b(leg|legs|foot|feet|arm|arms|face|faces|head|hair(?! dr| br)|mouth|lips?)\b")
# a possessive, a likeness, the camera that films, a game before its players, a colour
_NO_OBJECT = re.compile(
    r"'s\b|\b\w+[- ]like\b|\b(at|to|towards?|from|for|facing) the camera"
    r"|\b((base|basket|foot|volley)ball|soccer|tennis) (?=player|court|field|team|uniform|cap|stadium)"
    r"|\borange ((?=and \w+ (cat|dog|fish|fur|colou?r|lea|flower))"
    r"|(?!(and|at|from|in|near|on|over|with)\b)(?=\w))"
)
_PLURALS = {"people": "person", "children": "child", "geese": "goose", "oxen": "ox"}
_ENDINGS = [("men", "man"), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("s", "")]
_ENDINGS += [(end + "es", end) for end in ("s", "x", "ch", "sh", "o")]


def _singulars(name: str) -> list[str]:
    """The name itself and all that it may be the plural of."""
    name = _PLURALS.get(name, name)
    return [name] + [name.removesuffix(plural) + end for plural, end in _ENDINGS if name.endswith(plural)]


def _longest_name(words: list[str]) -> tuple[int, str]:
    """How many of the first words are a name, and which; 1 and "" where they are none."""
    for n in (3, 2, 1):
        for name in _singulars(" ".join(words[:n])):
            if name in _NAMES:
                return n, name
    return 1, ""


def _read(text: str, caption: str) -> Iterator[tuple[list[str], str]]:
    """Names in `text` from left to right, the longest first: their words, and supercategory or 'none'."""
    words = re.findall(r"[a-z]+", text)
    i, last = 0, "none"
    while i < len(words):
        n, name = _longest_name(words[i:])
        sense, pattern = _SENSES.get(name, ("none", "(?!)"))
        category = sense if re.search(pattern, caption) else _NAMES.get(name, "none")
        previous = words[i - 1] if i else ""
        following = words[i + n] if i + n < len(words) else ""
        if name in _VERBS and (last == "person" or previous in _SUBJECTS or following in _OBJECTS):
            category = "none"
        if words[i] == "toy" and following:  # a toy gun
            n += 1
        animal = "animal" in map(_NAMES.get, _singulars(following))
        if name in ("baby", "mother", "adult") and animal:  # a baby elephant
            n, category = n + 1, "animal"
        yield words[i : i + n], category
        i, last = i + n, category


def clip_categories(caption: str, tags: Sequence[str] | None) -> list[str]:
    """Sorted supercategories of the objects that a clip's caption and tags name (§3.1).

    Their union: tags add what "people dining together" leaves out, the caption what few tags leave out, and
    the context that a tag lacks (bat, tank, orange). On cc2017 either alone gives the same for 92.6 % of
    clips."""
    caption = caption.lower().replace("\u2019", "'")
    categories, hidden = set(), set()
    for words, category in _read(_NO_OBJECT.sub("", caption), caption):
        categories.add(category)
        hidden.update(name for word in words[:-1] + words[1:] for name in _singulars(word))
    for tag in tags or ():  # a tag that is part of a longer name ("bow" of "bow tie") says nothing new
        if tag.lower() not in hidden:
            categories.update(category for _, category in _read(tag.lower(), caption))
    if "animal" not in categories and _PARTS.search(caption) and not re.search("statue|robot|clock", caption):
        categories.add("person")
    return sorted(categories - {"none"})


def merge_rare(labels: Sequence[Sequence[str]], minimum: float = 0.01) -> list[str]:
    """Classes of the training clips: supercategories of share >= `minimum`, 'other' if a rarer one occurs."""
    names = [*COCO, *sorted({k for clip in labels for k in clip} - set(COCO))]
    share = {k: sum(k in clip for clip in labels) / max(len(labels), 1) for k in names}
    frequent = [k for k in names if share[k] >= minimum]
    return frequent + ["other"] * any(0 < share[k] < minimum for k in names)


def category_matrix(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """Targets of the category head, (clips, K) uint8; a label that is no class counts as 'other'."""
    rows = [{k if k in classes else "other" for k in clip} for clip in labels]
    return np.array([[k in row for k in classes] for row in rows], np.uint8)


def category_table(labels: Sequence[Sequence[str]], classes: Sequence[str]) -> str:
    """Plain text: each supercategory and class, its training clips, their share; is it merged or absent?"""
    lines = [f"{'class':<12}{'clips':>6}{'share':>9}"]
    for k in dict.fromkeys([*COCO, *classes] if set(classes) & set(COCO) else classes):
        n = sum(k in clip or (k == "other" and not set(clip) <= set(classes)) for clip in labels)
        note = "" if k in classes else "  merged" if n else "  absent"
        lines.append(f"{k:<12}{n:>6}{n / max(len(labels), 1):>9.3%}{note}")
    return "\n".join(lines)

"""Lists of captions, in the formats that the field publishes them -> the lines of clips.jsonl.

    .jsonl    a line a clip, of both splits: {"segment": "seg1", "caption": "a dog runs", "tags": [...]}
    .json     a list for each split, of captions or of {"caption", "tags"} (NEURONS); or a list of
              {"video", "text"}, in any order and of more clips than the split has (CineBrain)
    .pt       a list for each split: strings in a list or array (NeuroClips)

A row's `clip` (or `idx`) orders a segment or a list; its numbers count from 0 or 1, each once.
"""

import warnings
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from prepare.categories import clip_categories
from prepare.cc2017 import load_pt
from prepare.copies import mean_frames
from prepare.facts import words_of
from prepare.release import Release
from support.readers import advising, check_keys, damaged, read_json, read_json_lines, reading

WANTED = "captions.jsonl, or the training and the test list of captions (.json or .pt)"
ADVICE = "mend the list, or give --captions another one"
NOT_COPIED = {"id", "segment", "clip", "split", "idx", "text"}  # of a row to clips.jsonl
OPTIONAL = {"tags": list, "categories": list, "clip": int, "idx": int}
SHARE = 0.75  # of the clips must be nearer to their own caption than to that of a clip far away


def read_captions(path: Path, segments: Sequence[str]) -> list[dict]:
    """The clips of a split in order: `caption` and, where the file has them, `tags` or `categories`.

    segments: those of the split, in order; a .jsonl file is searched for them. Raises FileNotFoundError, or a
    ValueError that names file and row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: --captions takes {WANTED}")
    with reading(path, WANTED, ADVICE):
        rows = [value if isinstance(value, dict) else {"caption": value} for value in _read_list(path)]
        rows = [{"caption": row["text"], **row} if "text" in row else row for row in rows]
        _check(path, rows)
        if path.suffix.lower() != ".jsonl":
            return _in_order(path, rows)
        split = []
        for segment in segments:
            of_segment = [row for row in rows if row["segment"] == segment]
            split += _in_order(f"{path}, {segment}", of_segment)
        return split


def _read_list(path: Path) -> list:
    match path.suffix.lower():
        case ".jsonl":
            return read_json_lines(path, {"segment": str, "caption": str})
        case ".json":
            return read_json(path, list)
        case ".pt":
            return load_pt(path, list)
        case suffix:
            raise damaged(path, f"the suffix {suffix or '(none)'}", WANTED)


def _check(path: Path, rows: list[dict]) -> None:
    """Raises ValueError for no row, one without a caption, and tags that are no list of strings."""
    if not rows:
        raise damaged(path, "no caption", "one for each clip")
    for number, row in enumerate(rows, 1):
        place = f"{path}, entry {number}"
        optional = {key: kind for key, kind in OPTIONAL.items() if row.get(key) is not None}
        check_keys(row, place, {"caption": str, **optional})
        if not row["caption"].strip():
            raise damaged(place, "an empty caption", "a sentence")
        for key in ("tags", "categories"):
            if not all(isinstance(word, str) for word in row.get(key) or ()):
                raise damaged(place, f"{key} = {row[key]!r}", "a list of strings")


def _in_order(place: Path | str, rows: list[dict]) -> list[dict]:
    """The rows by their `clip` or `idx`, if any. Raises ValueError for a number missing or there twice."""
    key = next((key for key in ("clip", "idx") if any(row.get(key) is not None for row in rows)), None)
    if key is None:
        return rows
    numbers = {row.get(key) for row in rows}
    first = 0 if 0 in numbers else 1
    missing = {*range(first, first + len(rows))} - numbers
    if missing:
        numbers_wanted = f"numbers {first} to {first + len(rows) - 1}, each once"
        raise damaged(place, f"no {key} {min(missing)}", numbers_wanted)
    return sorted(rows, key=lambda row: row[key])


def describe_clips(source: Release, split: str, captions: Path) -> list[dict]:
    """The lines of clips.jsonl; of a list for the complete release the first captions, with a warning. Raises
    ValueError where number or names show captions of other clips."""
    segments = source.splits[split]
    clips = [(segment, k) for segment in segments for k in range(source.clips_of(segment))]
    videos = [source.video(segment, k) for segment, k in clips]
    rows = read_captions(captions, segments)
    files = [path.name for path, _ in videos]
    if rows and "video" in rows[0] and len(set(files)) == len(files):  # a file a clip
        rows = _of_videos(captions, rows, split, files)
    if len(clips) < len(rows) == prod(source.complete.get(split, [0])):
        part = f"the first {len(clips):,} of {len(rows):,} captions are taken, for {len(segments)} segments"
        warnings.warn(f"{captions}: {part}", stacklevel=2)
        rows = rows[: len(clips)]
    if len(rows) != len(clips):
        clips_of_split = f"{len(clips)} {split} clips of {len(segments)} segments"
        raise ValueError(f"{captions} has {len(rows)} captions for the {clips_of_split}")
    lines = []
    for (segment, k), (path, start), row in zip(clips, videos, rows, strict=True):
        line = {"id": f"{segment}-{k:03d}", "segment": segment}
        line.update((key, value) for key, value in row.items() if key not in NOT_COPIED)
        line.update(video=path.name, start_s=start, tags=row.get("tags") or [])
        line["categories"] = row.get("categories") or clip_categories(row["caption"], row.get("tags"))
        lines.append(line)
    return lines


@advising(ADVICE)
def _of_videos(captions: Path, rows: list[dict], split: str, files: list[str]) -> list[dict]:
    """The rows of the videos with these names, in their order."""
    by_video = {}
    for number, row in enumerate(rows, 1):
        place = f"{captions}, entry {number}"
        name = Path(check_keys(row, place, {"video": str})["video"]).name
        if name in by_video:
            raise damaged(place, f"{name} again", "each video once")
        by_video[name] = row
    missing = [name for name in files if name not in by_video]
    if missing:
        count = f"{missing[0]} and {len(missing) - 1} other {split} clips"
        raise ValueError(f"{captions} has no caption of {count}: download it again")
    return [by_video[name] for name in files]


def caption_copies(train: Sequence[dict], test: Sequence[dict]) -> tuple[float, float]:
    """Shares of training clips whose caption another training segment has, and of test clips whose caption a
    training clip has, by `words_of`. train, test: rows of segment and caption."""
    segments: dict[str, set] = {}
    for row in train:
        segments.setdefault(words_of(row["caption"]), set()).add(row["segment"])
    recurs = [len(segments[words_of(row["caption"])]) > 1 for row in train]
    known = [words_of(row["caption"]) in segments for row in test]
    return float(np.mean(recurs)), float(np.mean(known))


def captions_that_fit(e_img: np.ndarray, e_txt: np.ndarray, segments: Sequence[str]) -> tuple[str, list[str]]:
    """Are the captions in the clips' order? What CLIP says, in words, and the segments where it says no.

    e_img: (clips, F, D), e_txt: (clips, D). A clip's mean frame should be nearer to its own caption than to
    that of the clip half the set away, for 3 of 4 clips at least (by chance 1 of 2), and on average nearer
    than to its neighbours' captions.
    """
    frames = mean_frames(e_img)  # (clips, D)
    shifts = (0, len(frames) // 2, 1, -1)
    matching, far, previous, following = ((frames * np.roll(e_txt, n, 0)).sum(1) for n in shifts)  # (clips,)
    nearer = matching > far  # (clips,)
    report = f"CLIP cosine of a clip and its own caption {matching.mean():.3f}"
    report += f", the caption before {previous.mean():.3f}, after {following.mean():.3f}"
    report += f", of one far away {far.mean():.3f}; own above far away in {nearer.mean():.0%} of the clips"
    shifted, names = matching.mean() < max(previous.mean(), following.mean()), np.array(segments)
    return report, [n for n in dict.fromkeys(segments) if shifted or nearer[names == n].mean() < SHARE]

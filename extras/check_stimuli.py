"""The second half of extras/check.py's page: embeddings, categories, near-copies, and what the video decoder
needs (§3.1, §3.2, §4.1).

Each check takes the `Prepared` files of a subject and yields lines of the page. Arrays are read a few hundred
clips at a time.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from data import mean_frames, near_copy_threshold
from extras.prepared import FAIL, OK, PER_CLIP, WARNING, Line, Prepared, blocks, digest
from prepare.captions import caption_copies
from prepare.categories import category_matrix, category_table, merge_rare
from support.files import read_manifest


def embeddings(p: Prepared) -> Iterator[Line]:
    """Unit vectors, not all one; no clip with the frames of another split's."""
    frames, equal = {}, []
    for name in PER_CLIP[1:]:
        off, alike = 0.0, []
        for split in p.clips:
            mean = 0.0
            for first, e in blocks(p.array(split, name)):
                length = np.nan_to_num(
                    np.linalg.norm(e, axis=-1).reshape(len(e), -1), nan=9.0
                )  # (clips, F or 1)
                off, mean = (
                    max(off, abs(length - 1).max()),
                    mean + e.reshape(len(e), -1, e.shape[-1]).mean(1).sum(0),
                )
                if (bad := abs(length - 1).max(1) > 1e-3).any():
                    clip = p.clips[split][first + int(bad.argmax())]["id"]
                    yield Line(
                        FAIL,
                        "embeddings",
                        f"{p.of(split, name)}: not unit vectors from {clip} on (off by {off:.2g}; 8: not "
                        "finite)",
                    )
                    break
                for i, row in enumerate(e if name == "e_img.npy" else ()):
                    before = frames.setdefault(digest(row), (split, p.clips[split][first + i]["id"]))
                    equal += (
                        [f"{before[1]} = {p.clips[split][first + i]['id']}"] if before[0] != split else []
                    )
            alike.append(np.linalg.norm(mean) / len(p.clips[split]))
        yield Line(
            FAIL if max(alike) > 0.999 else OK,
            "embeddings",
            f"{name}: unit vectors, |mean| {max(alike):.2f} (1: all alike)",
        )
    n = len(p.clips["test"])
    level = OK if not equal else WARNING if len(equal) < 0.01 * n else FAIL
    found = f"; {equal[0]}; is a segment there under two names, or in both splits?" if equal else ""
    yield Line(
        level,
        "leakage, frames",
        f"{len(equal)} of {n:,} test clips have bit-equal frames in training (e_img){found}",
    )


def categories(p: Prepared) -> Iterator[Line]:
    """Are categories.npy and the classes in its manifest those of clips.jsonl?"""
    labels = {split: [clip["categories"] for clip in clips] for split, clips in p.clips.items()}
    classes = merge_rare(labels["train"])
    for split in labels:
        file, known = (
            p.of(split, "categories.npy"),
            (read_manifest(p.of(split, "categories.npy")) or {"recipe": {}})["recipe"].get("classes"),
        )
        wanted = category_matrix(labels[split], known or classes)
        if wanted.shape != p.arrays[file].shape or (differ := (wanted != p.arrays[file]).any(1)).any():
            first = (
                ""
                if wanted.shape != p.arrays[file].shape
                else f": {differ.sum():,} clips, the first {p.clips[split][differ.argmax()]['id']}"
            )
            yield Line(FAIL, "categories", f"{file} is not what clips.jsonl says{first}")
        if missing := [
            name
            for name, n in zip(known or classes, np.asarray(p.arrays[file]).sum(0), strict=False)
            if not n
        ]:
            yield Line(WARNING, "categories", f"{split}: no clip is of {', '.join(missing)}")
    yield Line(
        OK,
        "categories",
        f"those of clips.jsonl, in {len(classes)} classes:\n" + category_table(labels["train"], classes),
    )


def caption_copies_in_words(train: Sequence[dict], test: Sequence[dict]) -> str:
    """`caption_copies` of rows of caption and segment, as a sentence."""
    again, known = caption_copies(train, test)
    return (
        f"{again:.1%} of training clips have a word-identical one in another training segment, "
        f"{known:.1%} of test clips in training"
    )


def near_copies(p: Prepared) -> Iterator[Line]:
    """How much film and how many captions recur: what a training clip must not retrieve (Eq. 5), as
    `data.near_copy_threshold` finds."""
    segments = [clip["segment"] for clip in p.clips["train"]]
    yield Line(OK, "near-copies", "captions: " + caption_copies_in_words(p.clips["train"], p.clips["test"]))
    if empty := sum(not clip["caption"].strip() for clips in p.clips.values() for clip in clips):
        yield Line(WARNING, "near-copies", f"{empty} captions are empty")
    train, test = (mean_frames(p.array(split, "e_img.npy")) for split in ("train", "test"))
    threshold, best = near_copy_threshold(train, segments, test)
    table = "".join(
        f"\n{name:<16}" + "".join(f"{value:8.3f}" for value in values) for name, values in best.items()
    )
    head = f"\n{'best match of':<16}" + "".join(f"{q:>7}%" for q in (0, 5, 25, 50, 75, 95, 100))
    yield Line(
        OK,
        "near-copies",
        f"frames: training clips do not retrieve mean frames of cosine above {threshold:.3f}{head}{table}",
    )


def decoders(p: Prepared) -> Iterator[Line]:
    """Latents finite and of unit-ish scale, text tokens where the offsets say."""
    for folder in sorted(
        {file.parent for file in p.arrays if file.name in ("latents.npy", "text_offsets.npy")}
    ):
        split, n = folder.parent.name, len(p.clips[folder.parent.name])
        names = [folder / name for name in ("latents.npy", "text_tokens.npy", "text_offsets.npy")] + [
            p.stimuli / folder.name / "empty_prompt.npy"
        ]
        if absent := [str(file) for file in names if file not in p.arrays]:
            yield Line(FAIL, "decoder", f"{', '.join(absent)} not there; {p.command} --decoder ID")
            continue
        latents, tokens, offsets, empty = (p.arrays[file] for file in names)
        if (
            len(latents) != n
            or len(offsets) != n + 1
            or offsets[0]
            or offsets[-1] != len(tokens)
            or (np.diff(offsets) < 1).any()
        ):
            yield Line(
                FAIL,
                "decoder",
                f"{folder}: latents of {len(latents)} clips, offsets of {len(offsets) - 1}, wanted {n}, "
                f"rising to {len(tokens)}",
            )
        bad = [
            file
            for file in names
            if not all(np.isfinite(block).all() for _, block in blocks(p.arrays[file], 16))
        ]
        moments = np.array(
            [(z.mean(), (z**2).mean(), (z**2).mean((1, 2, 3, 4)).min()) for _, z in blocks(latents, 16)]
        )
        mean, deviation, least = moments[:, 0].mean(), moments[:, 1].mean() ** 0.5, moments[:, 2].min()
        if bad or not least > 0:
            yield Line(
                FAIL,
                "decoder",
                f"{', '.join(map(str, bad)) or names[0]}: "
                + ("not finite" if bad else "a clip of zeros only"),
            )
        level = OK if abs(mean) < 1 and 0.3 < deviation < 3 else WARNING
        found = f"latents {latents.shape}, {mean:.2f} +- {deviation:.2f}; {len(tokens):,} text tokens"
        found += f", empty prompt {empty.shape}"
        yield Line(level, "decoder", f"{folder.name}, {split}: {found}")


CHECKS = (categories, decoders, embeddings, near_copies)  # near-copies of unit vectors only

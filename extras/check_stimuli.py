"""The second half of extras/check.py's page: embeddings, categories, near-copies, and what the video decoder
needs (§3.1, §3.2, §4.1). Arrays are read a few hundred clips at a time."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np

from extras.prepared import EMBEDDINGS, Line, Prepared, digest, fail, ok, warning
from prepare.captions import caption_copies
from prepare.categories import category_matrix, category_table, merge_rare
from prepare.copies import QUANTILES
from support.files import read_manifest, sha256

STIMULI = ("categories.npy", *EMBEDDINGS)


def blocks(array: np.ndarray, size: int = 256) -> Iterator[np.ndarray]:
    """`size` rows at a time, in float32."""
    for i in range(0, len(array), size):
        yield np.array(array[i : i + size], np.float32)


def embeddings(p: Prepared) -> Iterator[Line]:
    """Unit vectors, not all one; no clip with the frames of another split's."""
    for name in EMBEDDINGS:
        yield from _unit_vectors(p, name)
    yield _equal_frames(p)


def _unit_vectors(p: Prepared, name: str) -> Iterator[Line]:
    off, means = 0.0, []
    for split, clips in p.clips.items():
        total, n = 0.0, 0
        for e in blocks(p.array(split, name)):
            e = e.reshape(len(e), -1, e.shape[-1])  # (clips, F or 1, D)
            length = np.nan_to_num(np.linalg.norm(e, axis=-1), nan=9.0)
            off = max(off, abs(length - 1).max())
            total += e.mean(1).sum(0)
            bad = abs(length - 1).max(1) > 1e-3
            if bad.any():
                clip = clips[n + bad.argmax()]["id"]
                text = f"not unit vectors from {clip} on (off by {off:.2g}; 8: not finite)"
                yield fail("embeddings", f"{p.of(split, name)}: {text}")
                break
            n += len(e)
        means.append(np.linalg.norm(total) / len(clips))
    line = fail if max(means) > 0.999 else ok
    yield line("embeddings", f"{name}: unit vectors, |mean| {max(means):.2f} (1: all alike)")


def _equal_frames(p: Prepared) -> Line:
    first_of: dict[bytes, str] = {}  # of the frames: the first training clip that has them
    for clip, row in zip(p.clips["train"], p.array("train", "e_img.npy"), strict=True):
        first_of.setdefault(digest(row), clip["id"])
    equal, n = [], len(p.clips["test"])
    for clip, row in zip(p.clips["test"], p.array("test", "e_img.npy"), strict=True):
        if train := first_of.get(digest(row)):
            equal.append(f"{train} = {clip['id']}")
    text = f"{len(equal)} of {n:,} test clips have bit-equal frames in training (e_img)"
    if not equal:
        return ok("leakage, frames", text)
    line = warning if len(equal) < 0.01 * n else fail
    question = "is a segment there under two names, or in both splits?"
    return line("leakage, frames", f"{text}; {equal[0]}; {question}")


def categories(p: Prepared) -> Iterator[Line]:
    """Are categories.npy and the classes in its manifest those of clips.jsonl?"""
    labels = {split: [clip["categories"] for clip in clips] for split, clips in p.clips.items()}
    classes = merge_rare(labels["train"])
    for split in labels:
        file, array = p.of(split, "categories.npy"), p.array(split, "categories.npy")
        manifest = read_manifest(file) or {"recipe": {}}
        names = manifest["recipe"].get("classes") or classes
        expected = category_matrix(labels[split], names)
        if expected.shape != array.shape:
            yield fail("categories", f"{file} is not what clips.jsonl says")
        elif (differ := (expected != array).any(1)).any():
            first = f"{differ.sum():,} clips, the first {p.clips[split][differ.argmax()]['id']}"
            yield fail("categories", f"{file} is not what clips.jsonl says: {first}")
        empty = [name for name, n in zip(names, array.sum(0), strict=False) if not n]
        if empty:
            yield warning("categories", f"{split}: no clip is of {', '.join(empty)}")
    table = category_table(labels["train"], classes)
    yield ok("categories", f"those of clips.jsonl, in {len(classes)} classes:\n{table}")


def caption_copies_in_words(train: Sequence[dict], test: Sequence[dict]) -> str:
    """`caption_copies` of rows of caption and segment, as a sentence."""
    recurring, known = caption_copies(train, test)
    return (
        f"{recurring:.1%} of training clips have a word-identical one in another training segment, "
        f"{known:.1%} of test clips in training"
    )


def near_copies(p: Prepared) -> Iterator[Line]:
    """How much film and how many captions recur (Eq. 5), as prepare/copies.py computed it."""
    yield ok("near-copies", "captions: " + caption_copies_in_words(p.clips["train"], p.clips["test"]))
    empty = sum(not clip["caption"].strip() for clips in p.clips.values() for clip in clips)
    if empty:
        yield warning("near-copies", f"{empty} captions are empty")
    inputs = [p.of(split, name) for split in ("train", "test") for name in ("e_img.npy", "clips.jsonl")]
    digests = [sha256(file) for file in inputs]
    for split, name in product(p.clips, ("near_copies.npy", "captions.npy")):
        manifest = read_manifest(p.of(split, name))
        if manifest and manifest["recipe"].get("of") != digests:
            text = "was computed from other frames or captions than these"
            yield fail("near-copies", f"{p.of(split, name)} {text}")
            break
    table = [
        f"frames: training clips do not retrieve mean frames of cosine above {p.copies['threshold']:.3f}"
    ]
    table.append(f"{'best match of':<16}" + "".join(f"{100 * q:>7g}%" for q in QUANTILES))
    for name, values in p.copies["best_match"].items():
        table.append(f"{name:<16}" + "".join(f"{value:8.3f}" for value in values))
    yield ok("near-copies", "\n".join(table))


def decoders(p: Prepared) -> Iterator[Line]:
    """Latents finite and of unit-ish scale, text tokens where the offsets say."""
    latents = {file for file in p.arrays if file.name.startswith("latents")}
    folders = {file.parent for file in p.arrays if file.name == "text_offsets.npy"}
    latents |= {folder / "latents.npy" for folder in folders - {file.parent for file in latents}}
    for file in sorted(latents):
        folder = file.parent
        files = [file, *(folder / name for name in ("text_tokens.npy", "text_offsets.npy"))]
        files.append(p.stimuli / folder.name / "empty_prompt.npy")
        missing = [str(file) for file in files if file not in p.arrays]
        if missing:
            yield fail("decoder", f"{', '.join(missing)} not there; {p.command} --decoder ID")
        else:
            yield from _decoder(p, folder, files)


def _decoder(p: Prepared, folder: Path, files: list[Path]) -> Iterator[Line]:
    latents, tokens, offsets, empty = (p.arrays[file] for file in files)
    n = len(p.clips[folder.parent.name])
    rise = offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) >= 1).all()
    if len(latents) != n or len(offsets) != n + 1 or not rise:
        counts = f"latents of {len(latents)} clips, offsets of {len(offsets) - 1}"
        yield fail("decoder", f"{folder}: {counts}, wanted {n}, rising to {len(tokens)}")
    infinite = []
    for file in files:
        if not all(np.isfinite(block).all() for block in blocks(p.arrays[file], 16)):
            infinite.append(str(file))
    moments = [((z**2).mean((1, 2, 3, 4)), z.mean((1, 2, 3, 4))) for z in blocks(latents, 16)]
    squares, means = np.concatenate(moments, axis=1)  # (clips,) each
    if infinite:
        yield fail("decoder", f"{', '.join(infinite)}: not finite")
    elif not squares.min() > 0:
        yield fail("decoder", f"{files[0]}: a clip of zeros only")
    mean, deviation = means.mean(), squares.mean() ** 0.5
    line = ok if abs(mean) < 1 and 0.3 < deviation < 3 else warning
    text = f"latents {latents.shape}, {mean:.2f} +- {deviation:.2f}"
    prompts = f"{len(tokens):,} text tokens, empty prompt {empty.shape}"
    yield line("decoder", f"{folder.name}, {folder.parent.name}: {text}; {prompts}")


CHECKS = (categories, decoders, embeddings, near_copies)  # near-copies of unit vectors only

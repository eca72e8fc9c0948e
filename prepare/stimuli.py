"""Stimuli and captions -> clips.jsonl, categories.npy, e_txt.npy, e_img.npy, e_act.npy (§3.1, §4.1)."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
from torch import nn
from tqdm import tqdm

from prepare.captions import captions_that_fit, describe_clips
from prepare.categories import category_matrix, category_table, merge_rare
from prepare.encoders import Tokenizer, encode_actions, encode_images, encode_texts, load_clip
from prepare.release import Release
from prepare.viclip import ViCLIP
from support.files import (
    find_weights,
    hashes,
    is_made_by,
    read_manifest,
    resumable_arrays,
    write_text,
    writing_array,
)
from support.readers import damaged
from support.training import device_type
from support.videos import uniform_frames

FRAMES = 8  # F, of a clip, for both encoders
BETWEEN = re.compile(  # of two sentences; "Dr." ends none
    r"(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)"
    r"(?:(?<=[.!?])|(?<=[.!?][\"')\u201d\u2019]))\s+(?=[\"'(\u201c\u2018]?[A-Z0-9])"
)


def first_sentences(caption: str, n: int | None) -> str:
    """The first n sentences of a caption, or the caption as it is where n is None."""
    return caption if n is None else " ".join(BETWEEN.split(caption.strip())[:n])


def clips_from(source: Release, rows: Sequence[dict], first: int) -> Iterator[np.ndarray]:
    """The clips of a split from number `first` on, uint8 (frames, H, W, 3); no segment before it is decoded.
    rows: the lines of the split's clips.jsonl."""
    for segment, n in Counter(row["segment"] for row in rows).items():
        if first < n:
            yield from islice(source.read_clips(segment), max(0, first), None)
        first -= n


def encode_all(
    clips: Iterator[np.ndarray],
    encode: Callable[[np.ndarray], Sequence[np.ndarray]],
    arrays: Sequence[np.ndarray],
    done: int,
    filled: Callable[[int], None],
    title: str,
    at_once: int,
) -> None:
    """Fill the arrays side by side: encode(batch of clips) gives the same rows of each.

    clips: (F, H, W, 3) uint8 each, from number `done` on. arrays, done, filled: of `resumable_arrays`.
    at_once: clips of a batch. Raises ValueError where clips are missing.
    """
    n = len(arrays[0])
    if done == n:
        return
    with tqdm(total=n, initial=done, desc=title, unit="clip") as progress:
        while done < n:
            batch = [*islice(clips, at_once)]
            if not batch:
                raise ValueError(f"{title}: the films have {done} clips, wanted {n}: download them again")
            for array, rows in zip(arrays, encode(np.stack(batch)), strict=True):
                array[done : done + len(batch)] = rows
            done += len(batch)
            filled(done)
            progress.update(len(batch))


def prepare_stimuli(
    source: Release,
    folder: Path,
    captions: dict[str, Path],
    clip_name: str,
    viclip_name: str,
    sentences: int | None = None,
) -> None:
    """The files named above, in folder/{train,test}/; what is whole is kept.

    captions: the file of each split. sentences: of a caption that CLIP sees, from its first on; None for all.
    Raises ValueError where an array was made by another recipe.
    """
    rows = {split: describe_clips(source, split, captions[split]) for split in source.splits}
    labels = {split: [row["categories"] for row in rows[split]] for split in rows}
    classes = merge_rare(labels["train"])
    table = category_table(labels["train"], classes)
    write_text(folder / "categories.txt", table + "\n")
    tqdm.write(table)
    encoders, weights = None, {}
    for split in source.splits:
        recipe = {"clip": clip_name, "viclip": viclip_name, "frames": FRAMES, "caption_sentences": sentences}
        recipe["captions"] = hashes([[captions[split]]])
        files = [folder / split / f"{name}.npy" for name in ("e_txt", "e_img", "e_act")]
        encoded = all([is_made_by(file, recipe) for file in files])
        write_text(folder / split / "clips.jsonl", "".join(json.dumps(row) + "\n" for row in rows[split]))
        matrix = category_matrix(labels[split], classes)
        file = folder / split / "categories.npy"
        with writing_array(file, matrix.shape, "uint8", {"classes": classes}) as array:
            array[:] = matrix
        if encoded:
            continue
        encoders = encoders or _load(clip_name, viclip_name)
        others = [folder / other / "e_img.npy" for other in source.splits if other != split]
        weights = weights or _digests(encoders, others)
        report, doubtful = _encode_split(source, folder / split, rows[split], encoders, recipe, weights)
        tqdm.write(f"{split}: {report}")
        if doubtful:
            doubt = f"the captions of {', '.join(doubtful)} may be in another order than the clips"
            warnings.warn(f"{captions[split]}: {doubt} ({report})", stacklevel=2)


def _load(clip_name: str, viclip_name: str) -> tuple[nn.Module, Tokenizer, ViCLIP]:
    """CLIP, its tokenizer and ViCLIP, on the GPU where there is one."""
    device = device_type()
    clip, _, tokenizer = load_clip(find_weights(clip_name))
    return clip.to(device), tokenizer, ViCLIP.from_pretrained(find_weights(viclip_name)).to(device)


def _digests(encoders: tuple[nn.Module, Tokenizer, ViCLIP], files: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of the weights of CLIP and ViCLIP. Raises FileFault where one of the files was made by
    others, of the same names: what a name stands for may change."""
    clip, _, viclip = encoders
    digests = {}
    for name, model in (("clip", clip), ("viclip", viclip)):
        sha = sha256()
        for weight in model.state_dict().values():
            sha.update(weight.cpu().contiguous().numpy())
        digests[name] = sha.hexdigest()
    for file in files:
        inputs = (read_manifest(file) or {"inputs": {}})["inputs"]
        for name in digests:
            if inputs.get(name, digests[name]) != digests[name]:
                stored = f"the output of a {name} of sha256 {inputs[name]}"
                raise damaged(file, stored, f"{digests[name]}, the {name} of the other clips")
    return digests


def _encode_split(
    source: Release,
    folder: Path,
    rows: list[dict],
    encoders: tuple[nn.Module, Tokenizer, ViCLIP],
    recipe: dict,
    weights: dict[str, str],
) -> tuple[str, list[str]]:
    """folder/e_txt.npy, e_img.npy and e_act.npy of a split; weights: the digests of both encoders, for the
    manifest. Returns `captions_that_fit`."""
    split, n = folder.name, len(rows)
    clip, tokenizer, viclip = encoders
    inputs = hashes(map(source.stimulus, source.splits[split])) | weights
    captions = [first_sentences(row["caption"], recipe["caption_sentences"]) for row in rows]
    e_txt = encode_texts(clip, tokenizer, captions)  # (n, D)
    with writing_array(folder / "e_txt.npy", e_txt.shape, "float32", recipe, inputs) as array:
        array[:] = e_txt

    def encode(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (b, F, H, W, 3) uint8
        return encode_images(clip, clips), encode_actions(viclip, clips)  # (b, F, D), (b, D)

    shapes = {folder / "e_img.npy": (n, FRAMES, e_txt.shape[1]), folder / "e_act.npy": e_txt.shape}
    with resumable_arrays(shapes, "float32", recipe, inputs) as (arrays, done, filled):
        clips = (frames[uniform_frames(len(frames), FRAMES)] for frames in clips_from(source, rows, done))
        encode_all(clips, encode, arrays, done, filled, f"CLIP and ViCLIP, {split}", at_once=16)
        return captions_that_fit(arrays[0], e_txt, [row["segment"] for row in rows])

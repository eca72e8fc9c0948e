"""Stimuli and captions -> clips.jsonl, categories.npy, e_txt.npy, e_img.npy, e_act.npy (§3.1, §4.1)."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from prepare.captions import caption_copies, captions_that_fit, describe_clips
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
    writing_array,
    written_whole,
)
from support.readers import damaged
from support.training import device_type
from support.videos import uniform_frames

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


def plan(title: str, encode: Callable[[], object], clips: int, on_cpu: int) -> int:
    """Encode one clip to see what it takes, and print it. Returns how many to encode at once: as many as fit
    into half of the GPU's free memory, 64 at most; `on_cpu` where there is no GPU."""
    encode()  # the first takes longer
    gpu = device_type() == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    start = perf_counter()
    encode()
    if gpu:
        torch.cuda.synchronize()
    minutes = (perf_counter() - start) * clips / 60
    if gpu:
        memory = max(torch.cuda.max_memory_allocated() - weights, 1)
        torch.cuda.empty_cache()  # what a model before this one took is free, too
        free, _ = torch.cuda.mem_get_info()
        at_once = int(np.clip(free / 2 / memory, 1, 64))
        room = f"{memory / 1e9:.2f} GB of GPU memory a clip, beside {weights / 1e9:.1f} GB of weights"
    else:
        import psutil  # comes with accelerate, and knows each system

        at_once = on_cpu
        room = f"{psutil.Process().memory_info().rss / 1e9:.1f} GB of memory in all"
    tqdm.write(f"{title}: {room}; {clips:,} clips take about {minutes:,.1f} minutes; {at_once} at once")
    return at_once


def encode_all(
    clips: Iterator[np.ndarray],
    encode: Callable[[np.ndarray], Sequence[np.ndarray]],
    arrays: Sequence[np.ndarray],
    done: int,
    filled: Callable[[int], None],
    title: str,
    on_cpu: int,
) -> None:
    """Fill the arrays side by side: encode(batch of clips) gives the same rows of each.

    clips: (F, H, W, 3) uint8 each, from number `done` on. arrays, done, filled: of `resumable_arrays`.
    on_cpu: clips at once where there is no GPU. Raises ValueError where clips are missing.
    """
    n = len(arrays[0])
    if done == n:
        return
    first = next(clips)
    at_once = plan(title, lambda: encode(first[None]), n - done, on_cpu)
    clips = chain([first], clips)
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
    frames: int = 8,
    sentences: int | None = None,
) -> None:
    """The files named above, in folder/{train,test}/; what is whole is kept.

    captions: the file of each split. frames: F, of a clip. sentences: of a caption that CLIP sees, from its
    first on; None for all. Raises ValueError where an array was made by another recipe.
    """
    rows = {split: describe_clips(source, split, captions[split]) for split in source.splits}
    labels = {split: [row["categories"] for row in rows[split]] for split in rows}
    classes = merge_rare(labels["train"])
    _report(folder / "categories.txt", category_table(labels["train"], classes), rows)
    encoders, weights = None, {}
    for split in source.splits:
        recipe = {"clip": clip_name, "viclip": viclip_name, "frames": frames, "caption_sentences": sentences}
        recipe["captions"] = hashes([[captions[split]]])
        files = [folder / split / f"{name}.npy" for name in ("e_txt", "e_img", "e_act")]
        encoded = all([is_made_by(file, recipe) for file in files])
        with written_whole(folder / split / "clips.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
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


def _report(file: Path, table: str, rows: dict[str, list[dict]]) -> None:
    """The table of categories to `file` and to the screen, and how many captions recur."""
    with written_whole(file) as part:
        part.write_text(table + "\n", encoding="utf-8")
    train, test = caption_copies(rows["train"], rows["test"])
    tqdm.write(table)
    tqdm.write(f"{train:.1%} of the training clips share their caption with another training segment")
    tqdm.write(f"{test:.1%} of the test clips share theirs with training")


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
    split, n, F = folder.name, len(rows), recipe["frames"]
    clip, tokenizer, viclip = encoders
    inputs = hashes(map(source.stimulus, source.splits[split])) | weights
    captions = [first_sentences(row["caption"], recipe["caption_sentences"]) for row in rows]
    e_txt = encode_texts(clip, tokenizer, captions)  # (n, D)
    with writing_array(folder / "e_txt.npy", e_txt.shape, "float32", recipe, inputs) as array:
        array[:] = e_txt

    def encode(clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (b, F, H, W, 3) uint8
        b = len(clips)
        e_img = encode_images(clip, clips, batch=max(128, b * F))  # (b, F, D)
        return e_img, encode_actions(viclip, clips, batch=max(16, b))  # (b, D)

    shapes = {folder / "e_img.npy": (n, F, e_txt.shape[1]), folder / "e_act.npy": e_txt.shape}
    with resumable_arrays(shapes, "float32", recipe, inputs) as (arrays, done, filled):
        clips = (frames[uniform_frames(len(frames), F)] for frames in clips_from(source, rows, done))
        encode_all(clips, encode, arrays, done, filled, f"CLIP and ViCLIP, {split}", on_cpu=16)
        return captions_that_fit(arrays[0], e_txt, [row["segment"] for row in rows])

"""Which clips are alike (§3.2): near-copies, captions that recur, and which showings were recorded.

stimuli/train/near_copies.npy   uint8 (clips, clips / 8): packed bits, may the clip (row) copy that memory?
stimuli/test/near_copies.npy    uint8 (test clips, clips / 8), likewise
stimuli/train/captions.npy      int64 (clips,), equal where two captions are identical word for word
stimuli/test/captions.npy       int64 (test clips,), the number of the training caption alike, or -1
stimuli/train/near_copies.json  the threshold, and the distributions behind it; near_copies.png draws them
sub<S>/{train,test}/recorded.npy    bool (clips, repeats)

A held-out clip finds in the memories neither itself nor its scene. A training clip would: it is barred from
them, and from what is more alike than a held-out clip's best memory. Of the test clips only stimuli and
captions enter."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prepare.facts import SCENE_CLIPS, words_of
from support.files import read_manifest, read_prepared, sha256, write_json, writing_array
from support.readers import damaged, read_array, read_json_lines

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
BLOCK = 1024  # rows of a matrix of all clips against all clips that are in memory at once
EQUAL = 1 - 1e-5  # the cosine of equal clips, up to rounding
CLIP = {"segment": str, "caption": str}


def blocks(n: int) -> Iterator[slice]:
    """n rows, BLOCK at a time."""
    for start in range(0, n, BLOCK):
        yield slice(start, start + BLOCK)


def far_apart(segments: Sequence, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
    """(rows, n) bool: are two clips of two scenes, that is of two segments, or SCENE_CLIPS apart?"""
    segment = np.unique(segments, return_inverse=True)[1]
    i = np.arange(len(segment))
    return (segment[rows, None] != segment) | (abs(i[rows, None] - i) > SCENE_CLIPS)


def mean_frames(e_img: np.ndarray) -> np.ndarray:
    """e_img (clips, F, D) -> unit mean frames (clips, D)."""
    mean = np.asarray(e_img, np.float32).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def best_match(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) of each row of a (n, D) its highest cosine to a row of b (m, D), unit rows all."""
    return np.concatenate([(a[rows] @ b.T).max(1) for rows in blocks(len(a))])


def near_copy_threshold(
    train: np.ndarray, segments: Sequence[str], held_out: np.ndarray
) -> tuple[float, dict[str, list[float]]]:
    """The cosine of two mean frames above which one clip copies the other, and the distributions behind it.

    train (N, D) and held_out (M, D) unit mean frames. A clip's best match is its highest cosine: a held-out
    clip's to all training clips, a training clip's to those left without its neighbours (`far_apart`) and
    without matches above the threshold. Of the held-out best matches that one becomes the threshold which
    makes both distributions most alike (least Wasserstein-1 distance); 1.01, above every cosine, where none
    need go (a choice). Training segments cannot stand in for the test clips, as film recurs among them.
    Distributions as quantiles at 0, 5, 25, 50, 75, 95, 100 %.
    """
    levels = np.linspace(0, 1, 41)  # every 2.5 %
    of_held_out = best_match(held_out, train)  # (M,)
    aim = np.quantile(of_held_out, levels)
    thresholds = [1.01, *aim[::-1].tolist()]  # falling
    remaining = np.empty((len(thresholds), len(train)), train.dtype)  # the best matches, by threshold
    for rows in blocks(len(train)):
        cosines = train[rows] @ train.T  # (rows, N)
        cosines[~far_apart(segments, rows)] = -1
        for best, threshold in zip(remaining, thresholds, strict=True):
            cosines[cosines > threshold] = -1  # in place: thresholds fall, so what is gone stays gone
            best[rows] = cosines.max(1)
    distances = [abs(np.quantile(best, levels) - aim).mean() for best in remaining]
    k = int(np.argmin(distances))  # of equals the highest
    best = {"held out": of_held_out, "training, all": remaining[0], "training, left": remaining[k]}
    return thresholds[k], {name: np.quantile(x, QUANTILES).tolist() for name, x in best.items()}


def prepare_copies(stimuli: Path) -> None:
    """Writes near_copies and captions of both splits, from their e_img.npy and clips.jsonl."""
    splits = ("train", "test")
    inputs = [stimuli / split / name for split in splits for name in ("e_img.npy", "clips.jsonl")]
    recipe = {"scene_clips": SCENE_CLIPS, "of": [*map(sha256, inputs)]}
    names = ("near_copies.npy", "captions.npy")
    if all(is_current(stimuli / split / name, recipe) for split in splits for name in names):
        return
    frames, lines, captions = {}, {}, {}
    for split in splits:
        frames[split] = mean_frames(read_array(stimuli / split / "e_img.npy", finite=True))
        lines[split] = read_json_lines(stimuli / split / "clips.jsonl", CLIP)
        captions[split] = [words_of(line["caption"]) for line in lines[split]]
    segments = [line["segment"] for line in lines["train"]]
    threshold, distributions = near_copy_threshold(frames["train"], segments, frames["test"])
    number = {caption: n for n, caption in enumerate(sorted({*captions["train"]}))}
    for split in splits:
        n, N = len(frames[split]), len(frames["train"])
        with writing_array(stimuli / split / "near_copies.npy", (n, -(-N // 8)), "uint8", recipe) as array:
            for rows in blocks(n):
                array[rows] = np.packbits(frames[split][rows] @ frames["train"].T > threshold, axis=1)
        with writing_array(stimuli / split / "captions.npy", (n,), "int64", recipe) as array:
            array[:] = [number.get(caption, -1) for caption in captions[split]]

    percent = [100 * quantile for quantile in QUANTILES]
    recurring = float(np.mean([caption in number for caption in captions["test"]]))
    facts = {"threshold": threshold, "percent": percent, "best_match": distributions}
    facts["test clips with a caption of training"] = recurring
    write_json(stimuli / "train" / "near_copies.json", facts)
    from support.pictures import near_copies  # matplotlib

    near_copies(stimuli / "train" / "near_copies.png", threshold, percent, distributions)
    tqdm.write(f"near-copies: mean frames with a cosine above {threshold:.4f} (near_copies.png)")


def prepare_recorded(folder: Path) -> None:
    """Writes recorded.npy of both splits, from fmri.npy: NaN throughout where a showing was not recorded.
    Raises ValueError for a clip without any."""
    for split in ("train", "test"):
        file, source = folder / split / "recorded.npy", folder / split / "fmri.npy"
        recipe = {"of": sha256(source)}
        if not is_current(file, recipe):
            fmri = read_array(source, shape=(None, None, None, None))
            recorded = np.stack([~np.isnan(clip).all((1, 2)) for clip in fmri])  # (clips, repeats)
            for clip in np.flatnonzero(~recorded.any(1)):
                raise damaged(source, f"no showing of clip {clip}", "one or more")
            with writing_array(file, recorded.shape, "bool", recipe) as array:
                array[:] = recorded


def is_current(file: Path, recipe: dict) -> bool:
    """Was `file` made by this recipe? If not, it is made anew: it holds what its inputs say, and no more."""
    entry = read_manifest(file)
    return entry is not None and entry["recipe"] == recipe


# ---------------------------------------------------------------- training


class FairRecall:
    """Train as one tests: which memories, of the clips trained on, a training clip may retrieve.

    val_segments, "seg17,seg18", are held out of training, and every near-copy of their clips with them.
    caption_share: the share of the training clips that may retrieve their own caption, word for word; None:
    as many as test clips can. Else stage 2 would learn that the best memory's text is right."""

    def __init__(
        self, stimuli: Path, segments: list[str], val_segments: str | None, caption_share: float | None
    ):
        n = len(segments)
        self.near_copies = read_prepared(stimuli / "near_copies.npy", "u", (n, -(-n // 8)))
        self.captions = read_prepared(stimuli / "captions.npy", "iu", (n,))
        self.segment = np.unique(segments, return_inverse=True)[1]
        validation = val_segments.split(",") if val_segments else []
        if not set(validation) <= set(segments):
            names = ", ".join(dict.fromkeys(segments))
            raise ValueError(f"--val_segments {val_segments}: the training segments are {names}")
        is_held_out = np.isin(segments, validation)
        self.held_out = np.flatnonzero(is_held_out)  # indices of clips
        copies = self.copies_of(self.held_out).any(0)  # (clips,)
        self.trained = np.flatnonzero(~is_held_out & ~copies)  # indices of clips, and of the memories
        in_test = read_prepared(stimuli.parent / "test" / "captions.npy", "iu", (None,))
        self.test_share = float(np.isin(in_test, self.captions[self.trained]).mean())
        self.caption_share = self.test_share if caption_share is None else caption_share

    def count_choices(self) -> None:
        """p_hidden: the probability that in a step a clip may not retrieve its own caption. fewest and most:
        how many memories a clip may retrieve."""
        choices, recurring = [], []  # how many memories a clip may retrieve, and how many have its caption
        for rows in blocks(len(self.trained)):
            clips = self.trained[rows]
            allowed = ~self.excluded(clips)
            choices.append(allowed.sum(1))
            recurring.append((allowed & self.same_caption(clips)).sum(1))
        choices, recurring = np.concatenate(choices), np.concatenate(recurring)
        # (share of the clips whose caption recurs) x (1 - p_hidden) = caption_share
        self.p_hidden = 1 - min(1.0, self.caption_share / max((recurring > 0).mean(), 1e-9))
        self.fewest = int((choices - recurring * (self.p_hidden > 0)).min())
        self.most = int(choices.max())

    def describe(self) -> str:
        """How many memories there are, and how many of them a clip may retrieve."""
        choices = f"a clip may retrieve {self.fewest:,} to {self.most:,} of them, no near-copies"
        caption = (
            f"its own caption in {1 - self.p_hidden:.1%} of the steps (test clips: {self.test_share:.1%})"
        )
        return f"{len(self.trained):,} clips and memories; {choices}, {caption}"

    def copies_of(self, clips: np.ndarray) -> np.ndarray:
        """(B, training clips) bool: which training clips are near-copies of these?"""
        return np.unpackbits(self.near_copies[clips], axis=1, count=len(self.segment)).astype(bool)

    def same_caption(self, clips: np.ndarray) -> np.ndarray:
        """(B, memories) bool: which memories have the same caption, word for word?"""
        return self.captions[clips, None] == self.captions[self.trained]

    def excluded(self, clips: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
        """Of clips (B,) the memories that they may not retrieve, (B, memories) bool. hidden (B,) bool: nor
        their own caption."""
        alike = (~far_apart(self.segment, clips) | self.copies_of(clips))[:, self.trained]
        return alike if hidden is None else alike | (self.same_caption(clips) & hidden[:, None])


def has_near_copy(stimuli: Path, clips: np.ndarray) -> np.ndarray:
    """Clips of the split whose folder is stimuli -> (clips,) bool: is a training clip a near-copy, or equal,
    whatever the threshold is?"""
    copied = read_prepared(stimuli / "near_copies.npy", "u", (None, None))[clips].any(1)
    files = [stimuli / "e_img.npy", stimuli.parent / "train" / "e_img.npy"]
    held_out, train = (mean_frames(read_prepared(file, "f", (None, None, None))) for file in files)
    return copied | (best_match(held_out[clips], train) > EQUAL)

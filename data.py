"""What lies in data/ and how it is read (§4.1): the clips of a subject, their batches, and which are alike.

    python data.py toy                                     the toy world (train_stage1.py makes it by itself)
    python data.py cc2017 --raw DIR --subject 1            the Purdue release: CIFTI recordings, mp4 films
    python data.py cc2017 --fmri-release DIR --subject 1   the NeuroClips release: .pt files, frames at 3 fps
    python data.py cinebrain --raw DIR --subject 1         CIFTI runs, or the published volumes (visual areas)

They hand over to prepare/, which makes, for N voxels of a subject (cc2017: 4,320 + 1,200 clips, T = 1;
CineBrain: 4,860 + 540, T = 5), with a manifest.json beside the arrays that says what made each:
    data/cc2017/sub1/{train,test}/fmri.npy         float32 (clips, repeats, T, N); NaN where not recorded
    data/cc2017/sub1/voxels.npz                    of each voxel its index in the source, and its area: roi
    data/cc2017/stimuli/{train,test}/clips.jsonl   id, segment, video, start_s, caption, tags, categories
      e_img.npy (clips, F, D), e_txt.npy and e_act.npy (clips, D), categories.npy (clips, K) beside it
      <decoder>/                                   latents and text tokens for a video decoder (--decoder)
Subjects of a dataset share its stimuli, but for CineBrain, whose subjects 1, 2, 6 saw other films.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prepare import facts
from support.files import MissingData, is_made_by, read_manifest, read_prepared
from support.readers import check_array, damaged, read_json_lines, read_npz

LINE = {"id": str, "segment": str, "caption": str, "video": str, "start_s": float, "categories": list}
ROOT = Path("data")
Size = tuple[int, int, int] | None  # frames, height, width; None: those of §4.1
EMBEDDINGS = ("e_img", "e_txt", "e_act")
SHOWN = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)  # quantiles
BLOCK = 1024  # rows of a matrix of all clips against all clips that are in memory at once


class ClipDataset:
    """The clips of one subject and split, as prepared; arrays are memory-mapped.

    fmri (clips, repeats, T, N), e_img (clips, F, D), e_txt and e_act (clips, D), categories (clips, K),
    clips: the lines of clips.jsonl, roi (N,) the area of each voxel and index (N,) its place in the source,
    classes: the names of the K categories. rois: "visual,hippocampus" restricts the voxels; None takes all.
    Raises MissingData where something is not prepared, ValueError that names a damaged file.
    """

    def __init__(self, name: str, subject: int, split: str, rois: str | None = None, root: Path = ROOT):
        folder, stimuli = root / name / f"sub{subject}", facts.stimuli_folder(name, subject, root) / split
        self.split, self.fmri_file = split, folder / split / "fmri.npy"
        files = {array: stimuli / f"{array}.npy" for array in (*EMBEDDINGS, "categories")}
        for file in (folder / "voxels.npz", self.fmri_file, stimuli / "clips.jsonl", *files.values()):
            if not file.exists():
                raise facts.not_prepared(name, subject, file)
        command = f"python data.py {name} --raw DIR --subject {subject}"
        self.mend = mend = f"delete it and run {'train_stage1.py' if name == 'toy' else command}"
        self.clips = read_json_lines(stimuli / "clips.jsonl", LINE, mend)
        voxels = read_npz(folder / "voxels.npz", {"index": "iu", "roi": "U"}, mend)
        self.roi, self.index = voxels["roi"], voxels["index"]
        clips = len(self.clips)
        self.fmri = read_prepared(self.fmri_file, "f", (clips, None, None, len(self.roi)), mend=mend)
        self.e_img = read_prepared(files["e_img"], "f", (clips, None, None), True, mend)  # small
        flat = clips, self.e_img.shape[2]  # (clips, D)
        self.e_txt = read_prepared(files["e_txt"], "f", flat, True, mend)
        self.e_act = read_prepared(files["e_act"], "f", flat, True, mend)
        self.classes = self._read_classes(files["categories"])
        self.categories = read_prepared(files["categories"], "iu", (clips, len(self.classes)), mend=mend)
        if not np.isin(self.categories, (0, 1)).all():
            raise damaged(files["categories"], "other numbers", "0 and 1", mend)
        self.voxels = self._choose(rois, folder) if rois else slice(None)
        self.roi, self.index = self.roi[self.voxels], self.index[self.voxels]

    def _read_classes(self, file: Path) -> list[str]:
        """The names of the categories, of the manifest."""
        classes = (read_manifest(file) or {"recipe": {}})["recipe"].get("classes")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise damaged(file.with_name("manifest.json"), f"classes {classes}", "a list of names", self.mend)
        return classes

    def _choose(self, rois: str, folder: Path) -> np.ndarray:
        """Indices of the voxels in these regions. Raises ValueError for an unknown region and for one without
        a voxel."""
        unknown = sorted(set(rois.split(",")) - set(facts.ROIS))
        if unknown:
            raise ValueError(f"--rois {rois}: {unknown} unknown; there are {', '.join(facts.ROIS)}")
        inside = {region: facts.in_areas(self.roi, facts.ROIS[region]) for region in rois.split(",")}
        absent = [region for region, here in inside.items() if not here.any()]
        if absent:
            said = f"--rois {rois}: none of the voxels of {folder} lies in {', '.join(absent)}"
            mend = "; prepare the CIFTI runs, or" if folder.parent.name == "cinebrain" else ":"
            areas = ", ".join(sorted(set(self.roi))[:9])
            raise ValueError(f"{said}, they are in {areas} ...{mend} leave it out")
        return np.flatnonzero(np.any([*inside.values()], 0))

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def sizes(self) -> dict[str, int]:
        """T, N of the fMRI, F and D of the embeddings, K categories."""
        (_, _, T, _), (_, F, D) = self.fmri.shape, self.e_img.shape
        return dict(volumes=T, voxels=len(self.roi), frames=F, embed_dim=D, classes=len(self.classes))

    def showings(self, clips: np.ndarray) -> np.ndarray:
        """(B, repeats) bool: which were recorded? One that was not is NaN throughout; whether one may be is
        seen at three voxels. Raises ValueError for a clip of which none was."""
        repeats, three = np.arange(self.fmri.shape[1]), [0, self.fmri.shape[3] // 2, -1]
        recorded = ~np.isnan(self.fmri[clips[:, None, None], repeats[:, None], 0, three]).all(-1)
        for b, repeat in np.argwhere(~recorded):
            recorded[b, repeat] = not np.isnan(self.fmri[clips[b], repeat]).all()
        for clip in clips[~recorded.any(1)]:
            raise damaged(self.fmri_file, f"no showing of {self.clips[clip]['id']}", "one", self.mend)
        return recorded

    def batch(self, clips: np.ndarray, seed: int, step: int) -> dict[str, Tensor]:
        """x (B, T, N) of one showing a clip and its `targets`. The showing is drawn from (seed, step, clip),
        whichever process asks."""
        draws = [np.random.default_rng([seed, step, clip]) for clip in clips]
        recorded = [np.flatnonzero(row) for row in self.showings(clips)]
        showing = [draw.choice(some) for draw, some in zip(draws, recorded, strict=True)]
        x = self.fmri[clips, showing][..., self.voxels]  # (B, T, N)
        self.check(x, clips)
        return {"x": torch.from_numpy(np.ascontiguousarray(x)), **self.targets(clips)}

    def targets(self, clips: np.ndarray | slice = slice(None)) -> dict[str, Tensor]:
        """e_img (B, F, D), e_txt (B, D), e_act (B, D), categories (B, K) of the clips."""
        names = (*EMBEDDINGS, "categories")
        return {name: torch.from_numpy(np.array(getattr(self, name)[clips])) for name in names}

    def averaged(self, clips: np.ndarray | slice = slice(None)) -> Tensor:
        """x (clips, T, N): the mean over the showings, z-scored again over these clips, since a mean of ten
        varies less than one."""
        clips = np.arange(len(self))[clips]
        pairs = zip(clips, self.showings(clips), strict=True)
        x = np.stack([self.fmri[clip][recorded].mean(0)[..., self.voxels] for clip, recorded in pairs])
        self.check(x, clips)
        return torch.from_numpy((x - x.mean(0)) / x.std(0).clip(1e-6))

    def check(self, x: np.ndarray, clips: np.ndarray) -> None:
        """Raises ValueError, naming clip and voxel, where x (B, T, N) of these clips is not finite."""
        if not np.isfinite(x).all():
            b, t, n = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
            clip = f"{x[b, t, n]} at clip {clips[b]} ({self.clips[clips[b]]['id']})"
            voxel = f"voxel {n} (source index {self.index[n]}, {self.roi[n]})"
            mend = "the file is damaged: delete it and prepare the subject again"
            raise ValueError(f"{self.fmri_file}: {clip}, volume {t}, {voxel}; {mend}")


class DecoderData:
    """What the video decoder needs of the clips of a split, as prepared; arrays are memory-mapped.

    latents (clips, C, f, h, w) float16 of videos of `size` = frames, height, width; text_tokens (rows, D_txt)
    and text_offsets (clips + 1,), ragged; empty (L, D_txt), the empty prompt. Raises MissingData where
    something is not prepared, ValueError for another decoder, VAE, text encoder or size, or a damaged file.
    """

    def __init__(
        self, name: str, decoder: str, split: str, root: Path = ROOT, size: Size = None, subject: int = 1
    ):
        stimuli, folder = facts.stimuli_folder(name, subject, root), Path(decoder).name
        self.size = size or facts.VIDEO[name]
        here = stimuli / split / folder
        latents, tokens, offsets = (here / f"{n}.npy" for n in ("latents", "text_tokens", "text_offsets"))
        empty = stimuli / folder / "empty_prompt.npy"
        latent_recipe, text_recipe = facts.decoder_recipes(decoder, self.size)
        by_hand = f"python data.py {name} --raw DIR --subject {subject} --decoder {decoder}"
        command = "train_stage2.py" if name == "toy" else by_hand
        self.tokens_file, self.mend = tokens, f"delete it and run {command}"
        for file in (latents, tokens, offsets, empty):
            if not is_made_by(file, latent_recipe if file == latents else text_recipe):
                raise MissingData(f"{file}, for {decoder}, is not there: run {command}")
        clips = len(read_json_lines(stimuli / split / "clips.jsonl", {"caption": str}))
        how = {"mend": self.mend}
        self.latents = read_prepared(latents, "f", (clips, None, None, None, None), **how)
        self.empty = read_prepared(empty, "f", (None, None), finite=True, **how)
        self.text_tokens = read_prepared(tokens, "f", (None, self.empty.shape[1]), **how)
        self.text_offsets = read_prepared(offsets, "iu", (None,), **how)
        lengths, rows = np.diff(self.text_offsets.astype(np.int64)), len(self.text_tokens)
        if len(lengths) != clips:
            raise damaged(offsets, f"{len(lengths)} captions", f"those of {clips} clips", self.mend)
        if lengths.min() < 1 or self.text_offsets[[0, -1]].tolist() != [0, rows]:
            wanted = f"numbers that rise from 0 to {rows}, the rows of text_tokens.npy"
            raise damaged(offsets, self.text_offsets, wanted, self.mend)


def clips_of_step(clips: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The clips of a step's whole batch: epoch after epoch, each in an order drawn from (seed, epoch),
    without the remainder."""
    steps = len(clips) // batch_size
    if not steps:
        said = f"a batch of {batch_size} clips, but only {len(clips)} clips to train on"
        raise ValueError(f"{said}; choose a smaller --batch_size")
    epoch, k = divmod(step, steps)
    order = np.random.default_rng([seed, epoch]).permutation(len(clips))
    return clips[order[k * batch_size : (k + 1) * batch_size]]


def hide_voxels(x: Tensor, share: float, seed: int, step: int, clips: np.ndarray) -> Tensor:
    """x (B, T, N) with a share of its voxels hidden, drawn from (seed, step, clip) in whatever batch."""
    if not share:
        return x
    draws = [np.random.default_rng([seed, step, int(clip), 1]) for clip in clips]  # 1: not the showing's draw
    kept = np.stack([draw.random(x.shape[1:], np.float32) >= share for draw in draws])  # (B, T, N)
    return x * torch.from_numpy(kept).to(x.device) / (1 - share)


def untold(share: float, seed: int, step: int, clips: np.ndarray) -> Tensor:
    """(B,) bool, of a `share` of the clips: these retrieve no caption that is their own, word for word."""
    draws = [np.random.default_rng([seed, step, int(clip), 2]) for clip in clips]
    return torch.tensor([draw.random() < share for draw in draws])


# ---------------------------------------------------------------- scenes and near-copies


def _far_rows(rows: slice, segment: np.ndarray, clips: int) -> np.ndarray:
    """Some rows of `far_apart`: segment (n,) is a number for each clip's."""
    i = np.arange(len(segment))
    return (segment[rows, None] != segment) | (abs(i[rows, None] - i) > clips)


def far_apart(segments: Sequence[str], clips: int = facts.SCENE_CLIPS) -> np.ndarray:
    """(n, n) bool: are two clips of two scenes, that is of two segments or more than `clips` clips apart?"""
    return _far_rows(slice(None), np.unique(segments, return_inverse=True)[1], clips)


def mean_frames(e_img: np.ndarray) -> np.ndarray:
    """e_img (clips, F, D) -> unit mean frames (clips, D)."""
    mean = np.asarray(e_img, np.float32).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def best_match(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) of each row of a (n, D) its highest cosine to a row of b (m, D), unit rows all."""
    blocks = [(a[k : k + BLOCK] @ b.T).max(1) for k in range(0, len(a), BLOCK)]
    return np.concatenate(blocks) if blocks else np.empty(0, a.dtype)


def near_copy_threshold(
    train: np.ndarray, segments: Sequence[str], held_out: np.ndarray
) -> tuple[float, dict[str, list[float]]]:
    """The cosine of two mean frames above which one clip copies the other, and the distributions behind it.

    train (N, D) and held_out (M, D) unit mean frames. A clip's best match is its highest cosine: a held-out
    clip's to all training clips, a training clip's to those left without its neighbours (`far_apart`) and
    without matches above the threshold. Of the held-out best matches that one becomes the threshold which
    makes both distributions most alike (least Wasserstein-1 distance); 1.01, above every cosine, where none
    need go (a choice). Held out are the test clips: only their stimuli enter. Training segments cannot stand
    in, as film recurs among them (BLIP captions word for word: 58 % of cc2017's training clips, 6 % of its
    test clips). Distributions as quantiles at 0, 5, 25, 50, 75, 95, 100 %.
    """
    levels = np.linspace(0, 1, 41)  # every 2.5 %
    best_held_out = best_match(held_out, train)  # (M,)
    wanted = np.quantile(best_held_out, levels)
    thresholds = [1.01, *wanted[::-1].tolist()]  # falling
    segment = np.unique(segments, return_inverse=True)[1]
    best_left = np.empty((len(thresholds), len(train)), train.dtype)  # the best matches, by threshold
    for rows in (slice(k, k + BLOCK) for k in range(0, len(train), BLOCK)):
        cosines = train[rows] @ train.T  # (rows, N)
        cosines[~_far_rows(rows, segment, facts.SCENE_CLIPS)] = -1
        for best, threshold in zip(best_left, thresholds, strict=True):
            cosines[cosines > threshold] = -1
            best[rows] = cosines.max(1)
    distances = [abs(np.quantile(best, levels) - wanted).mean() for best in best_left]
    k = int(np.argmin(distances))  # of equals the highest
    best = {"held out": best_held_out, "training, all": best_left[0], "training, left": best_left[k]}
    return thresholds[k], {name: np.quantile(x, SHOWN).tolist() for name, x in best.items()}


class Split(NamedTuple):
    """Which training clips are trained on, and which are held out of training."""

    clips: np.ndarray  # indices to train on, rising
    held_out: np.ndarray  # indices of the clips of the segments held out
    threshold: float  # of `near_copy_threshold`, as the distributions
    best_match: dict[str, list[float]]
    told: float  # share of the test clips whose caption a training clip has, word for word


def held_out_clips(train: ClipDataset, test: ClipDataset, val_segments: str | None) -> Split:
    """Hold the segments val_segments, "seg17,seg18", out of training, and with them every near-copy of their
    clips. Raises ValueError for a segment that the training clips do not have."""
    segments = [clip["segment"] for clip in train.clips]
    named = val_segments.split(",") if val_segments else []
    if not set(named) <= set(segments):
        names = ", ".join(dict.fromkeys(segments))
        raise ValueError(f"--val_segments {val_segments}: the training segments are {names}")
    frames = mean_frames(train.e_img)
    threshold, distributions = near_copy_threshold(frames, segments, mean_frames(test.e_img))
    out = np.isin(segments, named)
    clips, held_out = np.flatnonzero(~out), np.flatnonzero(out)
    if len(held_out):
        clips = clips[best_match(frames[clips], frames[held_out]) <= threshold]
    captions = {facts.words_of(train.clips[clip]["caption"]) for clip in clips}
    told = [facts.words_of(clip["caption"]) in captions for clip in test.clips]
    return Split(clips, held_out, threshold, distributions, float(np.mean(told)))


def memories(train: ClipDataset, decoder: DecoderData, phi_v: nn.Module, clips: np.ndarray) -> dict:
    """The arguments of `MemoryPool`: the memories of these training clips (indices, rising), φ_v the frozen
    one of stage 1 (§3.2)."""
    e_img = np.array(train.e_img[clips], np.float32)  # (N, F, D)
    with torch.no_grad():
        image = phi_v(torch.from_numpy(e_img).to(next(phi_v.parameters()).device)).cpu()  # (N, D)
    text, action = (torch.from_numpy(np.array(e[clips], np.float32)) for e in (train.e_txt, train.e_act))
    segments = [clip["segment"] for clip in train.clips]
    captions = [facts.words_of(train.clips[clip]["caption"]) for clip in clips]
    names, segment = np.unique(segments, return_inverse=True)
    first = np.array([segments.index(name) for name in names])  # its first clip
    starts, ends = decoder.text_offsets[clips], decoder.text_offsets[clips + 1]
    rows = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    tokens = check_array(decoder.text_tokens[rows], decoder.tokens_file, finite=True, mend=decoder.mend)
    return {
        "e": nn.functional.normalize(torch.stack([text, image, action], 1), dim=-1),  # (N, 3, D)
        "text_tokens": torch.from_numpy(tokens),  # (rows, D_txt)
        "text_offsets": torch.from_numpy(np.cumsum([0, *(ends - starts)])),  # (N + 1,)
        "caption": torch.from_numpy(np.unique(captions, return_inverse=True)[1]),  # equal words, equal number
        "segment": torch.from_numpy(segment[clips]),
        "position": torch.from_numpy((np.arange(len(segments)) - first[segment])[clips]),
        "mean_frame": torch.from_numpy(mean_frames(e_img)),  # (N, D)
    }


if __name__ == "__main__":
    from prepare.command import main
    from support.experiment import door

    door(lambda: main(sys.argv[1:], __doc__))

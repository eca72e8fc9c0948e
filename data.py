"""What lies in data/ and how it is read (§4.1): the clips of a subject, and the batch of a training step.

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
      near_copies.npy, captions.npy                which clips are alike (prepare/copies.py); beside fmri.npy
                                                   recorded.npy: which showings were recorded
      <decoder>/                                   latents and text tokens for a video decoder (--decoder)

Subjects of a dataset share its stimuli, but for CineBrain, whose subjects 1, 2, 6 saw other films.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from prepare import facts
from prepare.copies import FairRecall
from support.files import MissingData, is_made_by, read_prepared
from support.readers import advising, check_array, damaged, read_json_lines, read_npz

LINE = {"id": str, "segment": str, "caption": str, "video": str, "start_s": float, "categories": list}
ROOT = Path("data")
SHOWING, VOXELS, CAPTION = range(3)  # what is drawn for a clip


def rng(seed: int, step: int, clip: int, what: int = 0) -> np.random.Generator:
    """The generator of one thing that a step draws for a clip, whatever the batch, process or restart."""
    return np.random.default_rng([seed, step, clip, what])


def noise_generator(*key: int) -> torch.Generator:
    """As `rng`, of torch: for the noise of a (seed, step, clip) in training, of a (seed, clip) in
    sampling."""
    entropy = [len(key), *key]  # the length, since numpy takes (1,) and (1, 0) for the same
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


class Batch(NamedTuple):
    """One training step of B clips. Whatever is random in it was drawn from (seed, step, clip)."""

    clips: Tensor  # (B,) indices into the data set
    x: Tensor | None  # (B, T, N) fMRI of one showing, a share of its voxels zeroed
    e_img: Tensor  # (B, F, D) CLIP of F frames
    e_txt: Tensor  # (B, D) CLIP of the caption
    e_act: Tensor  # (B, D) ViCLIP of the video
    categories: Tensor  # (B, classes) 0 or 1
    # stage 2
    excluded: Tensor | None = None  # (B, memories) bool: they may not be retrieved
    y: Tensor | None = None  # (B, C, f, h, w) latents of the video
    noise: Tensor | None = None  # (B, C, f, h, w) ε of Eq. 9
    u: Tensor | None = None  # (B,) the diffusion time, uniform in [0, 1)
    dropped: Tensor | None = None  # (B, 1, 1) bool: these clips get the empty prompt

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(None if field is None else field.to(device) for field in self))

    def parts(self, size: int | None) -> list[slice]:
        """The batch in slices of `size` clips; None: all at once."""
        B = len(self.x)
        return [slice(start, start + (size or B)) for start in range(0, B, size or B)]


class Clips:
    """The clips of one subject and split, as prepared; arrays are memory-mapped.

    lines: of clips.jsonl; fmri (clips, repeats, T, N) and recorded (clips, repeats), e_img (clips, F, D),
    e_txt and e_act (clips, D), categories (clips, K) of `classes`; of each voxel its area, roi (N,), and its
    place in the source, index (N,). With a decoder also latents (clips, C, f, h, w), texts (clips,) of (n_i,
    D_txt) and the empty prompt (L, D_txt).

    Raises MissingData where something is not prepared, ValueError that names a damaged file, or an option
    that does not fit."""

    def __init__(
        self,
        name: str,
        subject: int,
        split: str,
        rois: str | None = None,  # "visual,hippocampus" restricts the voxels; None takes all
        decoder: str | None = None,  # of the latents and text tokens; None: without
        size: tuple[int, int, int] | None = None,  # frames, height, width of the videos; None: those of §4.1
        root: Path = ROOT,
        # what a training step draws
        seed: int = 0,
        batch_size: int = 1,  # clips a step, over all processes
        voxel_dropout: float = 0.0,  # share of the voxels hidden
        condition_dropout: float = 0.0,  # share of the clips that get the empty prompt
        val_segments: str | None = None,  # "seg17,seg18" holds these out of training
        caption_share: float | None = None,  # that may retrieve their own caption; None: as the test clips
    ):
        self.name, self.subject, self.split, self.seed = name, subject, split, seed
        self.batch_size, self.voxel_dropout = batch_size, voxel_dropout
        self.condition_dropout = condition_dropout
        self.folder = root / name / f"sub{subject}"
        self.stimuli = facts.stimuli_folder(name, subject, root) / split
        self.advice = f"delete it and run {facts.prepare_command(name, subject)}"
        with advising(self.advice):
            self._read_clips(rois)
            if decoder:
                self._read_decoder(decoder, size or facts.VIDEO[name])
        self.recall, self.trained, self.held_out = None, None, np.arange(len(self))
        if split == "train":
            segments = [line["segment"] for line in self.lines]
            self.recall = FairRecall(self.stimuli, segments, val_segments, caption_share)
            self.trained, self.held_out = self.recall.trained, self.recall.held_out  # indices of clips
            facts.check_batch(batch_size, len(self.trained))
            if decoder:
                self.recall.count_choices()

    # ---- files

    def _read_clips(self, rois: str | None) -> None:
        folder, stimuli = self.folder / self.split, self.stimuli
        names = ("clips.jsonl", "e_img.npy", "e_txt.npy", "e_act.npy", "categories.npy")
        files = [self.folder / "voxels.npz", folder / "fmri.npy", *(stimuli / name for name in names)]
        derived = [folder / "recorded.npy", stimuli / "near_copies.npy", stimuli / "captions.npy"]
        facts.check_prepared(self.name, self.subject, files, derived)
        self.lines = read_json_lines(stimuli / "clips.jsonl", LINE)
        voxels = read_npz(self.folder / "voxels.npz", {"index": "iu", "roi": "U"})
        n, N = len(self.lines), len(voxels["roi"])
        self.fmri = read_prepared(folder / "fmri.npy", "f", (n, None, None, N))
        self.recorded = read_prepared(folder / "recorded.npy", "b", (n, self.fmri.shape[1]))
        self.e_img = read_prepared(stimuli / "e_img.npy", "f", (n, None, None), finite=True)
        D = self.e_img.shape[2]
        self.e_txt = read_prepared(stimuli / "e_txt.npy", "f", (n, D), finite=True)
        self.e_act = read_prepared(stimuli / "e_act.npy", "f", (n, D), finite=True)
        self.classes = facts.classes_of(stimuli / "categories.npy")
        self.categories = read_prepared(stimuli / "categories.npy", "iu", (n, len(self.classes)))
        if not np.isin(self.categories, (0, 1)).all():
            raise damaged(stimuli / "categories.npy", "other numbers", "0 and 1")
        self.latents = None
        self.voxels = facts.voxels_of(rois, voxels["roi"], self.folder) if rois else slice(None)
        self.roi, self.index = voxels["roi"][self.voxels], voxels["index"][self.voxels]

    def _read_decoder(self, decoder: str, size: tuple[int, int, int]) -> None:
        folder = self.stimuli / Path(decoder).name
        latent_recipe, text_recipe = facts.decoder_recipes(decoder, size)
        recipes = {folder / "latents.npy": latent_recipe, folder / "text_tokens.npy": text_recipe}
        recipes |= {folder / "text_offsets.npy": text_recipe}
        empty = self.stimuli.parent / folder.name / "empty_prompt.npy"
        for file, recipe in (recipes | {empty: text_recipe}).items():
            if not is_made_by(file, recipe):
                command = facts.prepare_command(self.name, self.subject, decoder)
                raise MissingData(f"{file}, for {decoder}, is not there: run {command}")
        self.size = size
        self.latents = read_prepared(folder / "latents.npy", "f", (len(self), None, None, None, None))
        self.empty = read_prepared(empty, "f", (None, None), finite=True)
        tokens = read_prepared(folder / "text_tokens.npy", "f", (None, self.empty.shape[1]))
        offsets = read_prepared(folder / "text_offsets.npy", "iu", (len(self) + 1,))
        lengths = np.diff(offsets.astype(np.int64))
        if lengths.min() < 1 or lengths.max() > len(self.empty) or [*offsets[[0, -1]]] != [0, len(tokens)]:
            wanted = f"numbers that rise from 0 to {len(tokens)}, the rows of text_tokens.npy"
            raise damaged(folder / "text_offsets.npy", offsets, f"{wanted}, by {len(self.empty)} at most")
        self.texts = np.split(tokens, offsets[1:-1])
        self.text_file = folder / "text_tokens.npy"

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def sizes(self) -> dict[str, int]:
        """T, N of the fMRI, F and D of the embeddings, K categories."""
        (_, _, T, _), (_, F, D) = self.fmri.shape, self.e_img.shape
        return dict(volumes=T, voxels=len(self.roi), frames=F, embed_dim=D, classes=len(self.classes))

    # ---- batches

    def clips_of_step(self, step: int) -> np.ndarray:
        """The clips of a step's batch: epoch after epoch, each in an order drawn from (seed, epoch), without
        the remainder."""
        epoch, k = divmod(step, len(self.trained) // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.trained))
        return self.trained[order[k * self.batch_size : (k + 1) * self.batch_size]]

    def batch(self, step: int, process: int = 0, processes: int = 1) -> Batch:
        """A training step, or one process's share of it. Whatever is random is drawn here."""
        b = self.batch_size // processes
        clips = self.clips_of_step(step)[process * b : (process + 1) * b]
        batch = self.targets(clips)._replace(x=self._draw_fmri(step, clips))
        return batch if self.latents is None else self._draw_stage2(batch, step)

    def targets(self, clips: np.ndarray | slice = slice(None)) -> Batch:
        """What the fMRI of these clips is to tell: a Batch without x."""
        clips = np.arange(len(self))[clips]
        return Batch(
            clips=torch.from_numpy(clips),
            x=None,
            e_img=torch.from_numpy(self.e_img[clips]),
            e_txt=torch.from_numpy(self.e_txt[clips]),
            e_act=torch.from_numpy(self.e_act[clips]),
            categories=torch.from_numpy(self.categories[clips]),
        )

    def _draw_fmri(self, step: int, clips: np.ndarray) -> Tensor:
        """x (B, T, N) of one showing a clip, a share of its voxels hidden."""
        T, N = self.fmri.shape[2], len(self.roi)
        showing, visible = np.empty(len(clips), int), np.ones((len(clips), T, N), bool)
        for b, clip in enumerate(clips):
            recorded = np.flatnonzero(self.recorded[clip])
            showing[b] = rng(self.seed, step, clip, SHOWING).choice(recorded)
            if self.voxel_dropout:
                visible[b] = (
                    rng(self.seed, step, clip, VOXELS).random((T, N), np.float32) >= self.voxel_dropout
                )
        x = torch.from_numpy(self._finite(self.fmri[clips, showing][..., self.voxels], clips))  # (B, T, N)
        return x * torch.from_numpy(visible) / (1 - self.voxel_dropout) if self.voxel_dropout else x

    def _draw_stage2(self, batch: Batch, step: int) -> Batch:
        """The batch with what Eq. 5 may not retrieve, and what Eq. 9 draws. In training a clip may not recall
        itself or its copies: at test it has no such memory, either (a choice)."""
        clips = batch.clips.numpy()
        shape = self.latents.shape[1:]  # (C, f, h, w)
        hidden = np.empty(len(clips), bool)  # these clips may not retrieve their own caption
        noise, chance = torch.empty(len(clips), *shape), torch.empty(len(clips), 2)
        for b, clip in enumerate(clips.tolist()):
            hidden[b] = rng(self.seed, step, clip, CAPTION).random() < self.recall.p_hidden
            generator = noise_generator(self.seed, step, clip)
            chance[b] = torch.rand(2, generator=generator)
            noise[b] = torch.randn(*shape, generator=generator)
        return batch._replace(
            excluded=torch.from_numpy(self.recall.excluded(clips, hidden)),
            y=torch.from_numpy(self.latents[clips]),
            noise=noise,
            u=chance[:, 0],
            dropped=(chance[:, 1] < self.condition_dropout)[:, None, None],
        )

    def averaged(self, clips: np.ndarray | slice = slice(None)) -> Tensor:
        """x (clips, T, N): the mean over the showings, z-scored again over these clips, since a mean of ten
        varies less than one (a choice)."""
        clips = np.arange(len(self))[clips]
        x = np.empty((len(clips), self.fmri.shape[2], len(self.roi)), np.float32)
        for b, clip in enumerate(clips):
            x[b] = self.fmri[clip][self.recorded[clip]].mean(0)[..., self.voxels]
        self._finite(x, clips)
        return torch.from_numpy((x - x.mean(0)) / x.std(0).clip(1e-6))

    def _finite(self, x: np.ndarray, clips: np.ndarray) -> np.ndarray:
        """x (B, T, N) of these clips. Raises ValueError, naming clip and voxel, where a number is not
        finite."""
        if not np.isfinite(x).all():
            b, t, n = np.argwhere(~np.isfinite(x))[0].tolist()
            voxel = f"voxel {n} (source index {self.index[n]}, {self.roi[n]})"
            place = f"clip {clips[b]} ({self.lines[clips[b]]['id']}), volume {t}, {voxel}"
            file, found = self.folder / self.split / "fmri.npy", f"{x[b, t, n]} at {place}"
            raise damaged(file, found, "finite numbers", self.advice)
        return x


def memories(clips: Clips, phi_v: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """e (N, 3, D) and captions (n_i, D_txt) of the clips trained on, for mixture_of_memories.MemoryPool
    (§3.2). φ_v is the one of stage 1, frozen."""
    e_img = torch.from_numpy(clips.e_img[clips.trained]).float()  # (N, F, D)
    e_txt = torch.from_numpy(clips.e_txt[clips.trained]).float()  # (N, D)
    e_act = torch.from_numpy(clips.e_act[clips.trained]).float()  # (N, D)
    with torch.no_grad():
        e_img_hat = phi_v(e_img)  # (N, D)
    captions = []
    for clip in clips.trained:
        tokens = check_array(np.array(clips.texts[clip]), clips.text_file, finite=True)
        captions.append(torch.from_numpy(tokens))
    return normalize(torch.stack([e_txt, e_img_hat, e_act], 1), dim=-1), captions


if __name__ == "__main__":
    from prepare.command import main
    from support.runs import door

    door(lambda: main(sys.argv[1:], __doc__))

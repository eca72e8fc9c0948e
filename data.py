"""What lies in data/ and how it is read (§4.1): the clips of a subject, and the batch of a training step.

    python data.py toy                                     the toy world (train_stage1.py makes it by itself)
    python data.py cc2017 --raw DIR --subject 1            the Purdue release: CIFTI recordings, mp4 films
    python data.py cc2017 --fmri-release DIR --subject 1   the NeuroClips release: .pt files, frames at 3 fps
    python data.py cc2017 ... --decoder ID --frames 17 --height 256 --width 256    smaller videos for stage 2
    python data.py cinebrain --raw DIR --subject 1         CIFTI runs, or the published volumes (visual areas)

prepare/ makes (cc2017: 4,320 + 1,200 clips, T = 1; CineBrain: 4,860 + 540, T = 5), with a manifest.json each:

    data/cc2017/sub1/{train,test}/fmri.npy         float32 (clips, showings, T, N), and recorded.npy (clips,
                                                   showings): False where a showing is missing (NaN)
    data/cc2017/sub1/voxels.npz                    of each voxel its index in the source, and its area: roi
    data/cc2017/stimuli/{train,test}/clips.jsonl   id, segment, video, start_s, caption, tags, categories
      e_img.npy (clips, F, D), e_txt.npy, e_act.npy (clips, D), categories.npy (clips, classes)
      near_copies.npy, captions.npy                which clips are alike (prepare/copies.py)
      <decoder>/                                   latents and text tokens for a video decoder (--decoder)

Subjects share the stimuli of a dataset, but for CineBrain's 1, 2, 6 and the toy's, who saw other films.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from prepare import facts
from prepare.copies import FairRecall
from support.files import read_prepared
from support.readers import advising, check_array, damaged, read_json_lines, read_npz

LINE = {"id": str, "segment": str, "caption": str, "video": str, "start_s": float, "categories": list}
ROOT = Path("data")
STIMULI = ["clips.jsonl", "e_img.npy", "e_txt.npy", "e_act.npy", "categories.npy"]
SHOWING, VOXELS, CAPTION = range(3)  # the `draw` of rng: a stream each
TIMES = ("uniform", "logit_normal")  # how the diffusion time of Eq. 9 is drawn


def rng(seed: int, step: int, clip: int, draw: int = 0) -> np.random.Generator:
    """A generator for one `draw` of a clip in a step: the same in any batch, process or restart."""
    return np.random.default_rng([seed, step, clip, draw])


def noise_generator(*key: int) -> torch.Generator:
    """As `rng`, of torch: for the noise of (seed, step, clip) in training, (seed, clip) in sampling."""
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
    excluded: Tensor | None = None  # (B, memories) bool: may not be retrieved. This and the rest: stage 2
    y: Tensor | None = None  # (B, C, f, h, w) latents of the video
    noise: Tensor | None = None  # (B, C, f, h, w) ε of Eq. 9
    u: Tensor | None = None  # (B,) the diffusion time in [0, 1)
    dropped: Tensor | None = None  # (B, 1, 1) bool: these clips get the empty prompt

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(None if field is None else field.to(device) for field in self))

    def parts(self, size: int | None) -> list[slice]:
        """The batch in slices of `size` clips; None: all at once."""
        size = size or len(self.x)
        return [slice(start, start + size) for start in range(0, len(self.x), size)]


@dataclass(eq=False)
class Clips:
    """The clips of one subject and split: the files above, by their names; arrays are memory-mapped.

    With a decoder also latents (clips, C, f, h, w), texts (clips,) of (n_i, D_txt) and empty (L, D_txt).
    Raises MissingData for what is not prepared, ValueError for a damaged file or an option."""

    name: str
    subject: int
    split: str
    rois: str | None = None  # "visual,hippocampus" restricts the voxels; None takes all
    decoder: str | None = None  # of the latents and text tokens; None: without
    size: tuple[int, int, int] | None = None  # frames, height, width of the videos; None: those of §4.1
    root: Path = ROOT
    seed: int = 0  # of what a training step draws, as all below
    batch_size: int = 1  # clips a step, over all processes
    voxel_dropout: float = 0.0  # share of the voxels hidden
    condition_dropout: float = 0.0  # share of the clips that get the empty prompt
    time_sampling: str = "uniform"  # of TIMES: how u is drawn
    val_segments: str | None = None  # "seg17,seg18" holds these out of training
    caption_share: float | None = None  # of clips that may retrieve their own caption; None: as in the test

    def __post_init__(self):
        self.folder = self.root / self.name / f"sub{self.subject}"
        self.stimuli = facts.stimuli_folder(self.name, self.subject, self.root) / self.split
        self.command = facts.prepare_command(self.name, self.subject, self.decoder, self.size)
        self.advice = f"delete it and run {self.command}"
        self.latents = None
        with advising(self.advice):
            self._read_clips()
            if self.decoder:
                self._read_decoder()
        self.recall = None
        self.trained = None  # clips trained on, of the train split
        self.held_out = np.arange(len(self))  # all of the test split
        if self.split == "train":
            segments = [line["segment"] for line in self.lines]
            self.recall = FairRecall(self.stimuli, segments, self.val_segments, self.caption_share)
            self.trained = self.recall.trained
            self.held_out = self.recall.held_out
            facts.check_batch(self.batch_size, len(self.trained))
            if self.decoder:
                self.recall.count_choices()

    def _read_clips(self) -> None:
        folder = self.folder / self.split
        stimuli = self.stimuli
        facts.check_prepared(
            self.name,
            self.subject,
            [self.folder / "voxels.npz", folder / "fmri.npy", *(stimuli / name for name in STIMULI)],
            [folder / "recorded.npy", stimuli / "near_copies.npy", stimuli / "captions.npy"],
        )
        self.lines = read_json_lines(stimuli / "clips.jsonl", LINE)
        n = len(self.lines)
        voxels = read_npz(self.folder / "voxels.npz", {"index": "iu", "roi": "U"})
        self.fmri = read_prepared(folder / "fmri.npy", "f", (n, None, None, len(voxels["roi"])))
        self.recorded = read_prepared(folder / "recorded.npy", "b", (n, self.fmri.shape[1]))
        self.e_img = read_prepared(stimuli / "e_img.npy", "f", (n, None, None), finite=True)
        D = self.e_img.shape[2]
        self.e_txt = read_prepared(stimuli / "e_txt.npy", "f", (n, D), finite=True)
        self.e_act = read_prepared(stimuli / "e_act.npy", "f", (n, D), finite=True)
        categories_file = stimuli / "categories.npy"
        self.classes = facts.classes_of(categories_file)
        self.categories = read_prepared(categories_file, "iu", (n, len(self.classes)))
        if not np.isin(self.categories, (0, 1)).all():
            raise damaged(categories_file, "other numbers", "0 and 1")
        self.voxels = facts.voxels_of(self.rois, voxels["roi"], self.folder) if self.rois else slice(None)
        self.roi = voxels["roi"][self.voxels]
        self.index = voxels["index"][self.voxels]
        for clip in range(n):  # NaN or infinity is an error now, not when a step draws it
            self._showings(clip)

    def _read_decoder(self) -> None:
        folder = facts.decoder_folder(self.stimuli, self.decoder)
        self.size = self.size or facts.VIDEO[self.name]
        latents_file = folder / facts.latents_name(self.size)
        offsets_file = folder / "text_offsets.npy"
        empty_file = self.stimuli.parent / folder.name / "empty_prompt.npy"
        self.text_file = folder / "text_tokens.npy"
        latents, text = facts.decoder_recipes(self.decoder, self.size)
        for file, recipe in ((latents_file, latents), (self.text_file, text), (empty_file, text)):
            facts.check_decoded(file, recipe, self.decoder, self.command)
        self.latents = read_prepared(latents_file, "f", (len(self), None, None, None, None))
        self.empty = read_prepared(empty_file, "f", (None, None), finite=True)
        L, D_txt = self.empty.shape
        tokens = read_prepared(self.text_file, "f", (None, D_txt))
        offsets = read_prepared(offsets_file, "iu", (len(self) + 1,))
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(tokens) or lengths.min() < 1 or lengths.max() > L:
            raise damaged(offsets_file, offsets, f"numbers that rise by 1 to {L}, from 0 to {len(tokens)}")
        self.texts = np.split(tokens, offsets[1:-1])

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def sizes(self) -> dict[str, int]:
        """T, N of the fMRI, F and D of the embeddings, the number of classes."""
        _, _, T, _ = self.fmri.shape
        _, F, D = self.e_img.shape
        return dict(volumes=T, voxels=len(self.roi), frames=F, embed_dim=D, classes=len(self.classes))

    def clips_of_step(self, step: int) -> np.ndarray:
        """The clips of a batch. Each epoch has an order drawn from (seed, epoch), and leaves out the rest."""
        B = self.batch_size
        epoch, k = divmod(step, len(self.trained) // B)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.trained)
        return order[k * B : (k + 1) * B]

    def batch(self, step: int, process: int = 0, processes: int = 1) -> Batch:
        """A training step, or one process's share of it. Whatever is random is drawn here."""
        clips = self.clips_of_step(step).reshape(processes, -1)[process]
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
        p = self.voxel_dropout
        x = []
        for clip in clips:
            showing = rng(self.seed, step, clip, SHOWING).choice(self._showings(clip))  # (T, N)
            if p:
                uniform = rng(self.seed, step, clip, VOXELS).random(showing.shape, np.float32)
                showing = showing * (uniform >= p) / (1 - p)
            x.append(showing)
        return torch.from_numpy(np.stack(x))

    def _draw_stage2(self, batch: Batch, step: int) -> Batch:
        """Adds what Eq. 5 may not retrieve (itself, its copies: a choice), and what Eq. 9 draws."""
        clips = batch.clips.numpy()
        own_hidden = np.empty(len(clips), bool)  # may these not retrieve their own caption?
        u = torch.empty(len(clips))
        uniform = torch.empty(len(clips))
        noise = torch.empty(len(clips), *self.latents.shape[1:])  # (B, C, f, h, w)
        for b, clip in enumerate(clips.tolist()):
            own_hidden[b] = rng(self.seed, step, clip, CAPTION).random() < self.recall.p_hidden
            generator = noise_generator(self.seed, step, clip)
            u[b], uniform[b] = torch.rand(2, generator=generator)
            noise[b] = torch.randn(noise.shape[1:], generator=generator)
        if self.time_sampling == "logit_normal":
            u = torch.special.ndtri(u).sigmoid()  # ndtri: of a uniform number a normal one
        return batch._replace(
            excluded=torch.from_numpy(self.recall.excluded(clips, own_hidden)),
            y=torch.from_numpy(self.latents[clips]),
            noise=noise,
            u=u,
            dropped=(uniform < self.condition_dropout)[:, None, None],
        )

    def averaged(self, clips: np.ndarray | slice = slice(None)) -> Tensor:
        """x (clips, T, N), means over the showings, z-scored again over these clips (a choice)."""
        clips = np.arange(len(self))[clips]
        x = np.stack([self._showings(clip).mean(0) for clip in clips])
        z = (x - x.mean(0)) / x.std(0).clip(1e-6)
        return torch.from_numpy(z)

    def _showings(self, clip: int) -> np.ndarray:
        """(recorded showings, T, N) of a clip. Raises ValueError that names the voxel of NaN or infinity."""
        fmri = self.fmri[clip][self.recorded[clip]][..., self.voxels]
        for showing, t, n in np.argwhere(~np.isfinite(fmri)):
            voxel = f"volume {t}, voxel {n} (source index {self.index[n]}, {self.roi[n]})"
            number = f"{fmri[showing, t, n]} at clip {clip} ({self.lines[clip]['id']}), {voxel}"
            raise damaged(self.folder / self.split / "fmri.npy", number, "finite numbers", self.advice)
        return fmri


def memories(clips: Clips, phi_v: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """e (N, 3, D) and captions (n_i, D_txt) of the clips trained on, for mixture_of_memories.MemoryPool
    (§3.2). φ_v is the one of stage 1, frozen."""
    targets = clips.targets(clips.trained)
    with torch.no_grad():
        e_img = phi_v(targets.e_img.float())  # (N, D)
    e = torch.stack([targets.e_txt.float(), e_img, targets.e_act.float()], dim=1)  # (N, 3, D)
    captions = []
    for clip in clips.trained:
        tokens = check_array(np.array(clips.texts[clip]), clips.text_file, finite=True)
        captions.append(torch.from_numpy(tokens))
    return normalize(e, dim=-1), captions


if __name__ == "__main__":
    from prepare.command import main
    from support.runs import door

    door(lambda: main(sys.argv[1:], __doc__))

"""Evaluation (§3.3, §4.1-4.2): reconstruct what was watched from the fMRI of held-out clips, and score it.

    python evaluate.py                              the toy world, a few minutes on a laptop
    python evaluate.py --data cc2017 --subject 1    the paper's size, on a GPU
    accelerate launch evaluate.py --data cc2017     on several
    python evaluate.py --shuffle                    the control: each clip from the fMRI of another scene
    python evaluate.py --pairs DIR                  anyone's videos, DIR/METHOD/NAME.* against DIR/gt/NAME.*
    python evaluate.py --compare full full-no-mom   runs side by side, over subjects and seeds, paired
    python evaluate.py --fmri x.npy --out out.mp4   one recording (T, N) or (N,), in z-scores -> mp4 or gif

In:  a run of stage 2, and the test fMRI: averaged over the showings, z-scored over the clips.
Out: runs/<data>/sub<K>/<run>-s<seed>/eval/ (the control eval-shuffled/, pairs DIR/metrics/, and a smaller
     evaluation a folder of its own: eval-4-clips/, eval-steps10/, eval-ssim/)
     gt/NNNN.mp4, recon/NNNN.mp4     stimulus and reconstruction of clip NNNN; existing files are kept
     retrieved.jsonl                 a line a clip: the memories i_1 ... i_K (lines of stage2/memories.json) and W_r
     metrics.json, metrics.csv       of the set and (json) of each clip, and of those whose like was seen in
                                     training and the others; null with a reason where none is
     values/*.jsonl                  the value of each clip and metric; existing values are kept
     sheet.png, grid.gif             stimulus | top-1 memory | reconstruction, of six clips: half of those
                                     whose like was seen in training, half of the others, evenly spread
     ranked.png                      the best, median and worst clips by video_50way
     recognised.json                 toy world: is what classifiers see in the reconstruction what was shown?
Exit status: 0; 1 after an error; 3 where weights of a metric could not be had (it is n/a).
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from brain_model import BrainModel
from data import Clips, memories, noise_generator
from heads import Stage1Heads
from metrics import card
from metrics.compare import compare
from metrics.held_out import Films, describe, pairs_of, write_retrieved
from metrics.pairs import find_pairs, other_scenes
from metrics.parallel import in_processes
from metrics.report import Evaluation, pictures, report
from metrics.score import score_all
from metrics.table import TOY, Judging, asked
from mixture_of_memories import (
    DirectProjection,
    MemoryPool,
    MixtureOfMemories,
    Recalled,
    TopTextMemory,
    condition,
)
from prepare.copies import far_apart, has_near_copy
from prepare.facts import CC2017_FPS, CINEBRAIN_FPS, SECONDS
from support import shared
from support.files import sha256
from support.options import check_options, check_together, option, parse as parse_options
from support.pipelines import load_lora, load_pipeline, save_lora
from support.readers import damaged, load_model, reading
from support.runs import claim, door, evaluation_folder, run_folder
from support.training import start
from support.videos import check_writable, write_video
from video_decoder import VideoDecoder

# ---------------------------------------------------------------- a trained run (§3.3)


class CineNeuron(nn.Module):
    """The whole model, in training and inference alike: fMRI in, videos out.

    >>> from data import Clips
    >>> from evaluate import CineNeuron
    >>> model = CineNeuron.from_pretrained("runs/toy/sub1/full-s0")
    >>> x = Clips("toy", 1, "test").averaged()[:2]  # (2, T, N): two clips, each the mean of its ten showings
    >>> videos = model.reconstruct(x)  # uint8 (2, F, H, W, 3)
    """

    def __init__(
        self,
        settings: dict,  # the options of stage 2, with those of stage 1 as stage1_config
        brain_model: BrainModel,
        heads: Stage1Heads,
        mom: MixtureOfMemories | TopTextMemory | DirectProjection,
        pool: MemoryPool,
        decoder: VideoDecoder,
        empty: Tensor,  # (L, D_txt), the empty prompt
        lines: list[dict],  # of clips.jsonl, one a memory
        voxels: dict[str, np.ndarray],  # of each voxel of x its index in the source, and its area: roi
    ):
        super().__init__()
        self.settings, self.lines, self.voxels, self.folder = settings, lines, voxels, None
        self.brain_model, self.heads, self.mom = brain_model, heads.requires_grad_(False), mom
        self.pool, self.decoder = pool, decoder
        self.register_buffer("empty", empty)
        self.size = (settings["frames"], settings["height"], settings["width"])
        stage1 = settings["stage1_config"]
        self.tau, self.lambda_1, self.lambda_2 = (
            stage1["tau"],
            stage1["lambda_1"],
            stage1["lambda_2"],
        )  # Eq. 2, 3

    @classmethod
    def from_stage1(cls, stage1: Path, settings: dict, clips: Clips) -> "CineNeuron":
        """Stage 1's Brain Model and heads, the memories of the clips, a Mixture-of-Memories and a LoRA at their
        start. Raises ValueError where they do not fit each other."""
        heads = load_model(Stage1Heads, stage1 / "heads")
        e, captions = memories(clips, heads.phi_v)
        text_rms = torch.cat(captions).float().square().mean().sqrt().item()
        set_seed(settings["seed"])
        decoder = load_decoder(settings, vae=settings["sample_every"] > 0)
        brain_model = load_model(BrainModel, stage1 / "brain_model")
        L, width = brain_model.position.shape[1] - 1, brain_model.position.shape[2]
        if L != decoder.text_length:
            wanted = f"the decoder's {decoder.text_length}: train_stage1.py --tokens {decoder.text_length}"
            raise ValueError(f"{stage1}: a Brain Model of {L} tokens, wanted {wanted}")
        if not settings["integration"]:
            mom = DirectProjection(width, decoder.text_width)
        elif not settings["mom"]:
            mom = TopTextMemory(L, settings["K"])
        else:
            mom = MixtureOfMemories(
                tokens=L,
                width=width,
                embed_dim=e.shape[2],
                text_dim=decoder.text_width,
                K=settings["K"],
                attention_heads=settings["attention_heads"],
                alpha=settings["alpha"],
                tau=settings["stage1_config"]["tau"],
                text_rms=text_rms,
            )
        lines = [clips.lines[clip] for clip in clips.recall.trained]
        empty, voxels = torch.from_numpy(np.array(clips.empty)), {"index": clips.index, "roi": clips.roi}
        return cls(settings, brain_model, heads, mom, MemoryPool(e, captions), decoder, empty, lines, voxels)

    @classmethod
    def from_pretrained(cls, name: Path | str, device: torch.device | str = "cpu") -> "CineNeuron":
        """A run, a shared folder or its name on the Hub, for inference. It needs no data/. Raises FileNotFoundError
        where a file is missing, ValueError where one is damaged or does not fit the others."""
        folder = shared.locate(name)
        with reading(folder, advice="train stage 2 anew, or download the folder again"):
            settings = shared.read_settings(folder)
            brain_model = load_model(BrainModel, folder / "brain_model")
            heads = load_model(Stage1Heads, folder / "heads")
            kind = MixtureOfMemories if settings["mom"] else TopTextMemory
            mom = load_model(
                kind if settings["integration"] else DirectProjection, folder / "mixture_of_memories"
            )
            e, captions, empty, lines = shared.read_memories(folder)
            voxels = shared.read_voxels(folder, brain_model.voxels)
            on_gpu = torch.device(device).type == "cuda"
            decoder = load_decoder(settings, vae=True, dtype=torch.bfloat16 if on_gpu else torch.float32)
            load_lora(decoder, folder / "lora")
        pool = MemoryPool(e, captions)
        model = cls(settings, brain_model, heads, mom, pool, decoder, empty, lines, voxels)
        model.folder = folder
        return model.to(device).eval().requires_grad_(False)

    def forward(self, x: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Recalled]:
        """fMRI x (B, T, N) -> f_c (B, D), and f_fuse with what it was made of (Eq. 4-8)."""
        if (
            self.brain_model.gradient_checkpointing and torch.is_grad_enabled()
        ):  # the decoder needs the memory
            return checkpoint(
                condition, self.brain_model, self.heads, self.mom, self.pool, x, excluded, use_reentrant=False
            )
        return condition(self.brain_model, self.heads, self.mom, self.pool, x, excluded)

    def to(self, device: torch.device | str) -> "CineNeuron":
        self.decoder.to(device)
        return super().to(device)

    def writers(self) -> dict[str, Callable[[Path], object]]:
        """What writes each folder of weights."""
        return {
            "brain_model": self.brain_model.save_pretrained,
            "heads": self.heads.save_pretrained,
            "mixture_of_memories": self.mom.save_pretrained,
            "lora": partial(save_lora, self.decoder),
        }

    def save_memories(self, folder: Path) -> None:
        """What else a shared folder holds: memories.safetensors, memories.json and voxels.npz."""
        shared.write_memories(folder, self.pool.e, self.pool.captions, self.empty, self.lines, self.voxels)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes a folder that `from_pretrained` reads without data/, with a model card."""
        card.save(self, Path(folder))

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Uploads such a folder to the Hugging Face Hub as "user/name"; returns the commit's address."""
        return card.push(self, repo_id, private)

    @torch.inference_mode()
    def remember(self, x: Tensor | np.ndarray) -> Recalled:
        """fMRI x (B, T, N) -> f_fuse and the memories behind it; a held-out clip may retrieve any."""
        x = shared.check_fmri(x, self.brain_model.volumes, self.brain_model.voxels)
        _, recalled = self(x.to(self.empty.device))
        return recalled

    @torch.inference_mode()
    def reconstruct(self, x: Tensor, keys=None, steps: int | None = None, guidance: float | None = None):
        """fMRI x (B, T, N), z-scored -> videos, np.ndarray uint8 (B, F, H, W, 3), end to end (§3.3).

        keys: of each clip the numbers (seed, clip) that its noise is drawn from, so that no video depends on its
        batch; (0, 0), (0, 1) ... if not given. steps, guidance: the run's if not given. Raises ValueError where x
        is no z-scored fMRI of this brain.
        """
        f_fuse = self.remember(x).f_fuse  # (B, L, D_txt)
        generators = [noise_generator(*key) for key in keys or [(0, i) for i in range(len(f_fuse))]]
        steps = self.settings["sampling_steps"] if steps is None else steps
        guidance = self.settings["guidance"] if guidance is None else guidance
        return self.decoder.generate(f_fuse, self.empty, self.size, generators, steps, guidance).numpy()


def load_decoder(settings: dict, vae: bool, dtype: torch.dtype = torch.float32) -> VideoDecoder:
    """The pretrained DiT of a run, with a LoRA at its start."""
    pipe, text_length, config = load_pipeline(
        settings["decoder"], dtype, transformer=True, vae=vae, tiling=settings["height"] > 256
    )
    return VideoDecoder(
        pipe,
        text_length,
        config,
        lora_rank=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        gradient_checkpointing=settings["checkpointing"],
        noise_shift=settings["noise_shift"],
    )


# ---------------------------------------------------------------- the options


@dataclass
class Config(Judging):
    """What is not given here (decoder, size of the videos, K ...) is as the run was trained."""

    data: str = option("toy", "toy, cc2017 or cinebrain (with --pairs cc2017, for its weights)")
    subject: int = option(1, "number of the subject", least=1)
    run: str = option("full", "name of the run")
    seed: int = option(0, "of the run, and of the noise that the videos start from", least=0)
    shuffle: bool = option(False, "the control: reconstruct each clip from the fMRI of another scene")
    fmri: str | None = option(None, "one recording, .npy (T, N) or (N,), in place of the test set")
    pairs: str | None = option(None, "score the videos DIR/METHOD/NAME.* against DIR/gt/NAME.*")
    split: bool = option(False, "with --pairs: a video shows stimulus (left) and reconstruction side by side")
    skip_bad: bool = option(False, "with --pairs: what cannot be read or has no partner is a missing value")
    compare: list[str] = option([], "runs (NAME: all subjects and seeds; NAME/eval-shuffled) or folders")
    out: str | None = option(None, "with --fmri the video (out.mp4), with --pairs the folder (DIR/metrics)")
    clips: int | None = option(None, "so many, spread over the test set (default: all)", least=1)
    batch_size: int = option(1, "clips that are in the decoder at once", least=1)
    processes: int = option(1, "on a CPU, a thread each: for small networks", least=1)
    steps: int | None = option(None, "of sampling (default: the run's)", least=1)
    guidance: float | None = option(None, "classifier-free guidance (default: the run's)", least=0)
    stimuli: str | None = option(None, "folder of the films (default: raw/stimuli in data/<data>)")
    seconds: float = option(SECONDS["cc2017"], "length of a clip", above=0)
    fps: float = option(CC2017_FPS, "frames a second of the videos", above=0, most=1000)


PRESETS = {
    "cc2017": {},
    "toy": dict(batch_size=16, fps=8.5, processes=min(4, os.cpu_count() or 1)) | TOY,
    "cinebrain": dict(seconds=SECONDS["cinebrain"], fps=CINEBRAIN_FPS, size="native"),
}
MODES = ("fmri", "pairs", "compare")  # in place of a run's held-out clips
UNUSED = {  # option: the modes that do not use it
    "fmri": ("pairs", "compare"),
    "pairs": ("compare",),
    "steps": ("pairs", "compare"),
    "guidance": ("pairs", "compare"),
    "shuffle": MODES,
    "clips": MODES,
    "stimuli": MODES,
}
NEEDED = {"split": ("pairs",), "skip_bad": ("pairs",), "out": ("fmri", "pairs")}


def parse(arguments: list[str]) -> Config:
    """The command line over the dataset's preset. --pairs takes cc2017's, for its weights, unless told."""
    given = {word.split("=")[0] for word in arguments}
    if "--pairs" in given and "--data" not in given:
        arguments = [*arguments, "--data", "cc2017"]
    config = parse_options(Config, PRESETS, __doc__, "evaluate.py", arguments)
    check_options(config)
    check_together(config, UNUSED, NEEDED)
    asked(config)  # --metrics
    return config


# ---------------------------------------------------------------- the commands


def load_run(config: Config, accelerator: Accelerator) -> CineNeuron:
    """The run that is asked for. Raises ValueError where its folder holds the run of another subject."""
    folder = run_folder(config.data, config.subject, config.run, config.seed)
    model = CineNeuron.from_pretrained(folder, accelerator.device)
    data, subject = model.settings["data"], model.settings["subject"]
    if (data, subject) != (config.data, config.subject):
        found, wanted = f"a run of {data} sub{subject}", f"one of {config.data} sub{config.subject}"
        raise damaged(folder / "stage2" / "config.json", found, wanted, "put it into its folder")
    step, steps = model.settings.get("step"), model.settings.get("steps_in_all")
    if accelerator.is_main_process and step != steps:
        tqdm.write(f"{folder}: stage 2 is at step {step} of {steps}: its videos are not yet its best")
    return model


def made_by(config: Config, settings: dict, run: Path) -> dict:
    """What the videos of an evaluation are made by."""
    return {
        "steps": settings["sampling_steps"] if config.steps is None else config.steps,
        "guidance": settings["guidance"] if config.guidance is None else config.guidance,
        "fps": config.fps,
        "weights": sha256(*sorted((run / "stage2").glob("*/*.safetensors")))[:16],
    }


def evaluate_recording(config: Config) -> int:
    """--fmri: one recording -> one video. Returns the exit status, as all commands."""
    file = Path(config.out or "out.mp4")
    check_writable(file)
    model = load_run(config, start())
    x = shared.read_fmri(Path(config.fmri), model)
    write_video(file, model.reconstruct(x, [(config.seed, 0)], config.steps, config.guidance)[0], config.fps)
    memory = model.remember(x).indices
    recalls = "" if memory is None else f"; it recalls: {model.lines[memory[0, 0]]['caption']}"
    print(f"written: {file}{recalls}")
    return 0


def evaluate_pairs(config: Config) -> int:
    """--pairs: score anyone's videos."""
    accelerator, folder = start(), Path(config.pairs)
    out = Path(config.out or folder / "metrics")
    sets = find_pairs(folder, config.split, config.skip_bad, out)
    unavailable = score_all(sets, config, out, accelerator)
    if accelerator.is_main_process:
        source = {"pairs": folder.resolve().name, "data": config.data}
        evaluation = Evaluation(sets, out, config, unavailable, source)
        results, table = report(evaluation)
        pictures(evaluation, results)
        print(
            f"{table}\n\nwritten: {out}/ (METHOD/metrics.json, metrics.csv, sheet.png, grid.gif, ranked.png)"
        )
    accelerator.end_training()
    return 3 if unavailable else 0


def evaluate_run(config: Config) -> int:
    """The held-out clips of a run: reconstruct, score, report."""
    accelerator = start()
    model = load_run(config, accelerator)
    run = run_folder(config.data, config.subject, config.run, config.seed)
    test = Clips(config.data, config.subject, "test", model.settings["stage1_config"]["rois"])
    clips = np.unique(np.linspace(0, len(test) - 1, config.clips or len(test)).round().astype(int))
    out = evaluation_folder(
        run,
        config,
        model.settings,
        len(clips) == len(test),
        asked(config),
        asked(Config(**PRESETS[config.data])),
    )
    lines = {int(clip): test.lines[clip] for clip in clips}
    films = Films(config, model.size, [*lines.values(), *model.lines])
    claim(out, made_by(config, model.settings, run), accelerator.is_main_process)

    # ---- videos
    x = test.averaged()  # (test clips, T, N)
    if config.shuffle:
        x = x[other_scenes(far_apart([line["segment"] for line in test.lines]))]

    def make(rank: int, world: int) -> None:
        films.write(out / "gt", {clip: lines[clip] for clip in clips[rank::world].tolist()}, silent=rank > 0)
        reconstruct(model, x, clips, out / "recon", config, rank, world)

    in_processes(make, accelerator, config.processes)
    accelerator.wait_for_everyone()

    # ---- numbers and pictures
    sets = pairs_of(out, lines, "from shuffled fMRI" if config.shuffle else "reconstruction")
    unavailable = score_all(sets, config, out, accelerator)
    if accelerator.is_main_process:
        top_1 = write_retrieved(model, x[clips], lines, out / "retrieved.jsonl")
        near_copy = has_near_copy(test.stimuli, clips)
        described, recognised = describe(config, out, lines, model.lines, top_1, near_copy, films)
        source = {name: getattr(config, name) for name in ("data", "subject", "run", "seed", "shuffle")}
        evaluation = Evaluation(sets, out, config, unavailable, source, described)
        results, table = report(evaluation)
        pictures(evaluation, results)
        print(f"{recognised}{table}\n\nwritten: {out}/ (gt, recon, retrieved.jsonl, metrics.json, ...)")
    accelerator.end_training()
    return 3 if unavailable else 0


def reconstruct(
    model: CineNeuron, x: Tensor, clips: np.ndarray, folder: Path, config: Config, rank: int, world: int
) -> None:
    """x (test clips, T, N) -> the missing folder/NNNN.mp4 of `clips`, this process's share.

    A clip's noise comes from (seed, clip). Batches are cut before they are shared out, and one that lacks a
    clip is done whole: even the rounding, which depends on a batch's size, stays the same after a kill.
    """
    batches = [clips[i : i + config.batch_size] for i in range(0, len(clips), config.batch_size)]
    for batch in tqdm(batches[rank::world], desc="reconstructing", unit="batch", disable=rank > 0):
        files = [folder / f"{clip:04d}.mp4" for clip in batch]
        if all(file.is_file() for file in files):
            continue
        keys = [(config.seed, int(clip)) for clip in batch]
        videos = model.reconstruct(x[batch], keys, config.steps, config.guidance)  # (B, F, H, W, 3)
        for file, video in zip(files, videos, strict=True):
            if not file.is_file():
                write_video(file, video, config.fps)


@torch.inference_mode()
def main(config: Config) -> int:
    """Returns the exit status."""
    if config.compare:
        print(compare(config.compare, config.data))
        return 0
    if config.pairs:
        return evaluate_pairs(config)
    return evaluate_recording(config) if config.fmri else evaluate_run(config)


if __name__ == "__main__":
    door(lambda: main(parse(sys.argv[1:])))

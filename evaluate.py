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
     retrieved.jsonl                 a line a clip: the memories i_1 ... i_K and the router's weights W_r
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

import mixture_of_memories as mixture
from brain_model import BrainModel
from data import ClipDataset, DecoderData, best_match, far_apart, held_out_clips, mean_frames, memories
from heads import Stage1Heads
from metrics import run as reading
from metrics.attributes import agreement, shown_in_training
from metrics.compare import compare
from metrics.pairs import Pair, Source, other_scenes
from metrics.parallel import in_processes
from metrics.report import Evaluation, pictures, report
from metrics.score import score_all
from metrics.table import TOY, Judging, asked
from prepare.facts import CC2017_FPS, CINEBRAIN_FPS, SECONDS, raw_folder
from support import sharing
from support.experiment import door, run_folder, start
from support.options import check_options, check_together, option, parse as parse_options
from support.readers import load_model, read_tensors
from support.videos import check_writable, read_clip, video_frames, write_video
from video_decoder import LORA_FILE, VideoDecoder, clip_generator


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
UNUSED = {"fmri": MODES[1:], "pairs": MODES[2:], "steps": MODES[1:], "guidance": MODES[1:]}
UNUSED |= dict.fromkeys(("shuffle", "clips", "stimuli"), MODES)  # option: the modes that do not use it
NEEDED = {"split": ("pairs",), "skip_bad": ("pairs",), "out": ("fmri", "pairs")}


def parse(argv: Sequence[str]) -> Config:
    """The command line over the dataset's preset. --pairs takes cc2017's, for its weights, unless told."""
    given = {word.split("=")[0] for word in argv}
    argv = [*argv, "--data", "cc2017"] if "--pairs" in given and "--data" not in given else argv
    return parse_options(Config, PRESETS, __doc__, "evaluate.py", argv)


# ---------------------------------------------------------------- a trained run (§3.3)


@dataclass
class CineNeuron:
    """A trained run: fMRI in, videos out.

    >>> from data import ClipDataset
    >>> from evaluate import CineNeuron
    >>> model = CineNeuron.from_pretrained("runs/toy/sub1/full-s0")
    >>> test = ClipDataset("toy", 1, "test", model.settings["stage1_config"]["rois"])
    >>> x = test.averaged()[:2]  # (2, T, N): two clips, each the mean of its ten showings
    >>> videos = model.reconstruct(x)  # uint8 (2, F, H, W, 3)
    """

    settings: dict  # stage2/config.json
    train: ClipDataset | sharing.Shown
    brain_model: BrainModel
    heads: Stage1Heads
    mom: mixture.MixtureOfMemories | mixture.TopTextMemory | mixture.DirectProjection
    pool: mixture.MemoryPool  # all training clips, so that its indices are theirs
    decoder: VideoDecoder
    empty: Tensor  # (L, D_txt)
    folder: Path  # where it was read

    @classmethod
    def from_pretrained(cls, run: Path | str, device: torch.device | str = "cpu") -> "CineNeuron":
        """A run, or what `save_pretrained` wrote (a folder, or its name on the Hub), for inference. Raises
        FileNotFoundError where a file is missing, ValueError where one is damaged or of another subject."""
        folder, shared = sharing.locate(run)
        settings, parts = reading.read_settings(folder, shared), folder if shared else folder / "stage2"
        mend = sharing.MEND if shared else "train stage 2 anew"
        name, subject, decoder = (settings[key] for key in ("data", "subject", "decoder"))
        brain_model = load_model(BrainModel, parts / "brain_model", mend)
        heads = load_model(Stage1Heads, parts / "heads", mend)
        kind = mixture.MixtureOfMemories if settings["integration"] else mixture.DirectProjection
        kind = kind if settings["mom"] else mixture.TopTextMemory
        mom = load_model(kind, parts / "mixture_of_memories", mend)
        if shared:
            train, pool, empty = sharing.load(folder, mixture.MemoryPool)
            decoder = sharing.decoder_at(decoder, folder)
        else:
            train = ClipDataset(name, subject, "train", settings["stage1_config"]["rois"])
            text = DecoderData(name, decoder, "train", size=video_size(settings), subject=subject)
            pool = mixture.MemoryPool(**memories(train, text, heads.phi_v, np.arange(len(train))))
            empty = torch.from_numpy(np.array(text.empty))
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        lora = settings["lora_rank"], settings["lora_alpha"]
        decoder = VideoDecoder.from_pretrained(decoder, *lora, load_vae=True, dtype=dtype).to(device)
        read_tensors(parts / "lora" / LORA_FILE, mend=mend)  # whole and finite
        decoder.load_lora(parts / "lora")
        models = [model.to(device).eval().requires_grad_(False) for model in (brain_model, heads, mom)]
        return cls(settings, train, *models, pool.to(device), decoder, empty, folder)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes a folder that `from_pretrained` reads without data/, with a model card."""
        sharing.save(self, Path(folder))

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Uploads such a folder to the Hugging Face Hub as "user/name"; returns the commit's address."""
        return sharing.push(self, repo_id, private)

    @torch.inference_mode()
    def remember(self, x: Tensor) -> mixture.Remembered:
        """fMRI x (B, T, N) -> f_fuse and the memories behind it; a held-out clip may retrieve any."""
        return mixture.condition(self.brain_model, self.heads, self.mom, self.pool, x.to(self.pool.e.device))[
            1
        ]

    @torch.inference_mode()
    def reconstruct(self, x: Tensor, seeds=None, steps: int | None = None, guidance: float | None = None):
        """fMRI x (B, T, N) -> videos, np.ndarray uint8 (B, F, H, W, 3), end to end.

        seeds: of each clip the numbers (seed, clip) that its noise is drawn from, so that no video depends on
        its batch; (0, 0), (0, 1) ... if not given. steps, guidance: the run's if not given.
        """
        generators = [clip_generator(*key) for key in seeds or [(0, i) for i in range(len(x))]]
        steps = self.settings["sampling_steps"] if steps is None else steps
        guidance = self.settings["guidance"] if guidance is None else guidance
        f_fuse, size = self.remember(x).f_fuse, video_size(self.settings)  # (B, L, D_txt)
        return self.decoder.generate(f_fuse, self.empty, *size, generators, steps, guidance).numpy()


def video_size(settings: dict) -> tuple[int, int, int]:
    return settings["frames"], settings["height"], settings["width"]


# ---------------------------------------------------------------- the held-out clips


def stimulus(clip: dict, films: Path, seconds: float, settings: dict) -> np.ndarray:
    """A line of clips.jsonl -> its frames, uint8 (F, H, W, 3), as the decoder saw them in training."""
    return video_frames(read_clip(films / clip["video"], clip["start_s"], seconds), *video_size(settings))


def reconstruct(
    model: CineNeuron, x: Tensor, clips: np.ndarray, folder: Path, config: Config, rank=0, world=1
) -> None:
    """x (clips of the test set, T, N) writes the missing folder/NNNN.mp4 of `clips`, this process's share.

    A clip's noise comes from (seed, clip). Batches are cut before they are shared out, and one that lacks a
    clip is done whole: even the rounding, which depends on a batch's size, stays the same after a kill.
    """
    batches = [clips[i : i + config.batch_size] for i in range(0, len(clips), config.batch_size)]
    for batch in tqdm(batches[rank::world], desc="reconstructing", unit="batch", disable=rank > 0):
        files = [folder / f"{i:04d}.mp4" for i in batch]
        if all(file.is_file() for file in files):
            continue
        seeds = [(config.seed, int(i)) for i in batch]
        videos = model.reconstruct(x[batch], seeds, config.steps, config.guidance)  # (B, F, H, W, 3)
        for file, video in zip(files, videos, strict=True):
            if not file.is_file():
                write_video(file, video, config.fps)


def groups_of(train: ClipDataset, test: ClipDataset, clips: np.ndarray) -> dict[str, np.ndarray]:
    """Test clips whose like was seen in training, and those whose was not: {name: (clips,) bool}. In the toy
    world the like is the same combination of attributes, else a near-copy (data.near_copy_threshold)."""
    named = shown_in_training([test.clips[i] for i in clips], train.clips)
    if not named:
        alike = best_match(mean_frames(test.e_img[clips]), mean_frames(train.e_img))
        copied = alike > held_out_clips(train, test, None).threshold
        named = {"with a near-copy": copied, "without a near-copy": ~copied}
    return {name: inside for name, inside in named.items() if inside.any()}


# ---------------------------------------------------------------- the commands


def evaluate_recording(config: Config, model: CineNeuron) -> int:
    """Reconstruct one recording. Returns the exit status."""
    x, file = reading.read_recording(Path(config.fmri), model), Path(config.out or "out.mp4")
    write_video(file, model.reconstruct(x, [(config.seed, 0)], config.steps, config.guidance)[0], config.fps)
    memory = model.remember(x).indices
    recalls = "" if memory is None else f"; it recalls: {model.train.clips[memory[0, 0]]['caption']}"
    print(f"written: {file}{recalls}")
    return 0


def evaluate_run(config: Config, accelerator: Accelerator) -> int:
    """Reconstruct one recording, or the held-out clips and score them. Returns the exit status."""
    chief = accelerator.is_main_process
    folder = run_folder(config.data, config.subject, config.run, config.seed)
    model = CineNeuron.from_pretrained(folder, accelerator.device)
    settings, train = model.settings, model.train.clips
    step, steps = settings.get("step"), settings.get("steps_in_all")
    if chief and step != steps:
        tqdm.write(f"{folder}: stage 2 is at step {step} of {steps}: its videos are not yet its best")
    if config.fmri:
        return evaluate_recording(config, model) if chief else 0
    test = ClipDataset(config.data, config.subject, "test", settings["stage1_config"]["rois"])
    clips = np.unique(np.linspace(0, len(test) - 1, config.clips or len(test)).round().astype(int))
    every = PRESETS[config.data].get("metrics", Config.metrics)
    out = reading.evaluation_folder(folder, config, settings, len(clips) == len(test), every)
    films = Path(config.stimuli or raw_folder(config.data, config.subject) / "stimuli")
    lacking = sorted({clip["video"] for clip in test.clips + train if not (films / clip["video"]).is_file()})
    if lacking:
        missing = f"{films / lacking[0]} is not there ({len(lacking)} stimuli are missing)"
        raise FileNotFoundError(f"{missing}: --stimuli FOLDER")
    reading.claim(out, folder / "stage2", config, settings, write=chief)
    shown, scenes = {int(i): test.clips[i] for i in clips}, [clip["segment"] for clip in test.clips]
    x = test.averaged()  # (clips, T, N)
    x = x[other_scenes(far_apart(scenes))] if config.shuffle else x

    def videos(rank: int, world: int) -> None:
        for i in tqdm(clips[rank::world], desc="stimuli", unit="clip", disable=rank > 0):
            if not (file := out / "gt" / f"{i:04d}.mp4").is_file():
                write_video(file, stimulus(shown[i], films, config.seconds, settings), config.fps)
        reconstruct(model, x, clips, out / "recon", config, rank, world)

    in_processes(videos, accelerator, config.processes)
    accelerator.wait_for_everyone()

    # ---- numbers
    files = [f"{i:04d}.mp4" for i in shown]
    gt, recon = ([Source(out / kind / file) for file in files] for kind in ("gt", "recon"))
    try:
        others = [gt[k] for k in other_scenes(far_apart([scenes[i] for i in clips]))]
    except ValueError:  # too few clips for a control
        others = [None] * len(clips)
    title = "from shuffled fMRI" if config.shuffle else "reconstruction"
    sets = {title: [Pair(f"{i:04d}", *of) for i, *of in zip(shown, recon, gt, others, strict=True)]}
    absent = score_all(sets, config, out, accelerator)
    if not chief:
        return 0

    # ---- what was remembered, and what is recognised
    groups = groups_of(model.train, test, clips)
    lines, top_1 = (
        list(shown.values()),
        reading.write_retrieved(model, x[clips], shown, out / "retrieved.jsonl"),
    )
    judges = config.video_classifier, config.image_classifier
    recognised = agreement(out, judges, shown, train, top_1, groups)
    texts = []
    for i, line in enumerate(lines):
        memory = [] if top_1 is None else [train[top_1[i]]["caption"]]
        as_seen = " ".join(values[i] for values in recognised.values.values())
        texts.append([line["caption"], *memory, f"seen as {as_seen}" if as_seen else ""])
    values = {} if recognised.right is None else {"all_attributes": recognised.right}
    recalled = None if top_1 is None else lambda i: stimulus(train[top_1[i]], films, config.seconds, settings)
    what = {name: getattr(config, name) for name in ("data", "subject", "run", "seed", "shuffle")}
    evaluation = Evaluation(sets, out, config, absent, what, groups, values, texts, recalled)
    results, text = report(evaluation)
    pictures(evaluation, results)
    text = f"{recognised.table}{text}"
    print(f"{text}\n\nwritten: {out}/ (gt, recon, retrieved.jsonl, metrics.json, sheet.png ...)")
    return 3 if absent else 0


@torch.inference_mode()
def main(config: Config) -> int:
    """Returns the exit status. Options that clash, or an --out that no video can have, end it first."""
    check_options(config)
    check_together(config, UNUSED, NEEDED)
    asked(config)  # --metrics
    if config.compare:
        print(compare(config.compare, config.data))
        return 0
    if config.fmri:
        check_writable(Path(config.out or "out.mp4"))
    accelerator = start(mixed_precision=False)
    status = (
        reading.evaluate_pairs(config, accelerator) if config.pairs else evaluate_run(config, accelerator)
    )
    accelerator.end_training()
    return status


if __name__ == "__main__":
    door(lambda: main(parse(sys.argv[1:])))

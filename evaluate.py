"""The whole model, CineNeuron (§3.3), and its evaluation (§4.1-4.2): fMRI -> videos -> scores.

    python evaluate.py                              the toy world, a minute on a laptop
    python evaluate.py --data cc2017 --subject 1    the paper's size, on a GPU
    accelerate launch evaluate.py --data cc2017     on several
    python evaluate.py --shuffle                    the control: each clip from the fMRI of another scene
    python evaluate.py --no-stage2                  the decoder as it came draws the best memory's caption
    python evaluate.py --pairs DIR                  anyone's videos, DIR/METHOD/NAME.* against DIR/gt/NAME.*
    python evaluate.py --compare full full-no-mom   runs side by side, over subjects and seeds, paired
    python evaluate.py --fmri x.npy --out out.mp4   one recording (T, N) or (N,), in z-scores -> mp4 or gif
    python evaluate.py --run toy/trained --fmri toy/trained/x.npy    without training: a run by its folder

In:  a run of stage 2, and the test fMRI: averaged over the showings, z-scored over the clips.
Out: runs/<data>/sub<S>/<run>-s<seed>/eval/ (the control eval-shuffled/, pairs DIR/metrics/; others have a
     folder of their own: eval-no-stage2/, eval-4-clips/, eval-steps10/, eval-ssim/). Files in it are kept.
     gt/, recon/, memory/NNNN.mp4    stimulus, reconstruction and best memory of clip NNNN
     retrieved.jsonl                 a line a clip: W_r, and the memories, lines of stage2/memories.json
     metrics.json                    of the set, of each clip, of clips like those of training and the others
     sheet.png, grid.gif             stimulus | top-1 memory | reconstruction, of six clips evenly spread
     ranked.png                      the best, median and worst clips by video_50way
     recognised.json                 toy world: do classifiers see in the reconstruction what was shown?
Exit status: 0; 1 after an error; 3 where a metric, or a clip's, could not be had (it is n/a).
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brain_model import BrainModel
from data import Clips, memories, noise_generator
from heads import Stage1Heads
from metrics import card, held_out
from metrics.compare import compare
from metrics.options import PRESETS, Config, parse
from metrics.parallel import in_processes
from metrics.report import Evaluation, report, report_pairs
from metrics.score import score_all
from metrics.table import asked
from mixture_of_memories import (
    DirectProjection,
    MemoryPool,
    MixtureOfMemories,
    Recalled,
    TopTextMemory,
    condition,
)
from prepare.copies import has_near_copy
from support import shared
from support.pipelines import load_lora, load_pipeline
from support.readers import advising, load_model
from support.runs import FolderLock, door, run_folder
from support.training import start
from support.videos import check_writable, write_video
from video_decoder import VideoDecoder


class CineNeuron(nn.Module):
    """The whole model, in training and inference alike: fMRI in, videos out (README: Use a trained run)."""

    def __init__(
        self,
        settings: dict,  # the options of stage 2, with those of stage 1 as stage1_config
        brain_model: BrainModel,
        heads: Stage1Heads,
        mom: MixtureOfMemories | TopTextMemory | DirectProjection,
        pool: MemoryPool,
        decoder: VideoDecoder,
        empty: Tensor,  # (L, D_txt), the empty prompt
        lines: list[dict],  # one line of clips.jsonl per memory
        voxels: dict[str, np.ndarray],  # of each voxel of x its index in the source, and its area: roi
    ):
        super().__init__()
        self.settings, self.lines, self.voxels, self.folder = settings, lines, voxels, None
        self.brain_model, self.heads, self.mom = brain_model, heads, mom
        self.pool, self.decoder = pool, decoder
        heads.requires_grad_(False)  # §3.2 trains Brain Model, router, fusion and LoRA
        brain_model.gradient_checkpointing = settings["checkpointing"]
        self.register_buffer("empty", empty)
        self.size = (settings["frames"], settings["height"], settings["width"])
        stage1 = settings["stage1_config"]
        self.tau = stage1["tau"]  # Eq. 2
        self.lambda_1, self.lambda_2 = stage1["lambda_1"], stage1["lambda_2"]  # Eq. 3

    @classmethod
    def from_stage1(cls, stage1: Path, settings: dict, clips: Clips) -> "CineNeuron":
        """Stage 1's Brain Model and heads, the memories of the clips, a Mixture-of-Memories and a LoRA at
        their start. Raises ValueError where they do not fit each other."""
        heads = load_model(Stage1Heads, stage1 / "heads")
        e, captions = memories(clips, heads.phi_v)
        set_seed(settings["seed"])
        dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
        decoder = load_decoder(settings, settings["sample_every"] > 0, dtype)
        brain_model = load_model(BrainModel, stage1 / "brain_model")
        shared.check_parts(stage1, settings, clips, brain_model, decoder)
        L, width = decoder.text_length, brain_model.norm.normalized_shape[0]
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
                text_rms=torch.cat(captions).float().square().mean().sqrt().item(),
            )
        lines = [clips.lines[clip] for clip in clips.trained]
        empty, voxels = torch.from_numpy(np.array(clips.empty)), {"index": clips.index, "roi": clips.roi}
        return cls(settings, brain_model, heads, mom, MemoryPool(e, captions), decoder, empty, lines, voxels)

    @classmethod
    def from_pretrained(cls, name: Path | str, device: torch.device | str = "cpu") -> "CineNeuron":
        """A run, a shared folder or its name on the Hub, for inference; it needs no data/. Raises ValueError
        where a file is damaged or does not fit the others, FileNotFoundError where one is missing."""
        folder = shared.locate(name)
        with advising("train stage 2 anew, or download the folder again"):
            settings = shared.read_settings(folder)
            brain_model = load_model(BrainModel, folder / "brain_model")
            heads = load_model(Stage1Heads, folder / "heads")
            kind = MixtureOfMemories if settings["mom"] else TopTextMemory
            kind = kind if settings["integration"] else DirectProjection
            mom = load_model(kind, folder / "mixture_of_memories")
            voxels = shared.read_voxels(folder, brain_model.voxels)
            on_gpu = torch.device(device).type == "cuda"
            decoder = load_decoder(settings, vae=True, dtype=torch.bfloat16 if on_gpu else torch.float32)
            prompt = decoder.text_length, decoder.text_width
            e, captions, empty, lines = shared.read_memories(folder, brain_model.to_f_c.out_features, prompt)
            shared.check_model(folder, settings, brain_model, decoder, len(e))
            load_lora(decoder, folder / "lora")
        model = cls(settings, brain_model, heads, mom, MemoryPool(e, captions), decoder, empty, lines, voxels)
        model.folder = folder
        return model.to(device).eval().requires_grad_(False)

    def forward(self, x: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Recalled]:
        """fMRI x (B, T, N) -> f_c (B, D), and f_fuse with what it was made of (Eq. 4-8)."""
        work = condition
        if self.brain_model.gradient_checkpointing and torch.is_grad_enabled():
            work = partial(checkpoint, condition, use_reentrant=False)  # leaves the memory to the DiT
        return work(self.brain_model, self.heads, self.mom, self.pool, x, excluded)

    def to(self, device: torch.device | str) -> "CineNeuron":
        self.decoder.to(device)
        return super().to(device)

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

        keys: of each clip the numbers (seed, clip) that its noise is drawn from; else (0, 0), (0, 1) ...
        steps, guidance: else the run's. Raises ValueError where x is no z-scored fMRI of this brain."""
        f_fuse = self.remember(x).f_fuse  # (B, L, D_txt)
        generators = [noise_generator(*key) for key in keys or [(0, i) for i in range(len(f_fuse))]]
        steps = self.settings["sampling_steps"] if steps is None else steps
        guidance = self.settings["guidance"] if guidance is None else guidance
        return self.decoder.generate(f_fuse, self.empty, self.size, generators, steps, guidance).numpy()


def load_decoder(settings: dict, vae: bool, dtype: torch.dtype) -> VideoDecoder:
    """The pretrained DiT of a run, with a LoRA at its start."""
    pipe, text_length, config = load_pipeline(
        settings["decoder"], dtype, transformer=True, vae=vae, tiling=settings["height"] > 256
    )  # tiles only where videos are decoded: prepared latents are encoded whole
    return VideoDecoder(
        pipe,
        text_length,
        config,
        lora_rank=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        gradient_checkpointing=settings["checkpointing"],
        noise_shift=settings["noise_shift"],
    )


def load_run(config: Config, accelerator: Accelerator) -> tuple[CineNeuron, Path]:
    """The run of this name or place, and the folder of its results. Without stage 2, or with --no-stage2: the
    model as stage 2 starts. Then f_fuse = e_mem_txt (zero-convolutions), the decoder is the pretrained one
    (LoRA's B = 0), and W_r = (1/3, 1/3, 1/3)."""
    name = Path(config.run).name.partition("@")[0]  # --run: a name, a folder, or NAME@REVISION on the Hub
    run = run_folder(config.data, config.subject, name, config.seed)
    place = run if name == config.run else Path(config.run)
    has_stage1, has_stage2 = ((place / stage / "config.json").is_file() for stage in ("stage1", "stage2"))
    config.stage2 = config.stage2 and (has_stage2 or not has_stage1)
    if config.stage2:
        model = CineNeuron.from_pretrained(place, accelerator.device)
    else:
        stage1, settings, clips = held_out.untrained(config, accelerator)
        model = CineNeuron.from_stage1(stage1, settings, clips)
        for zero in model.mom.router.R[-1].parameters():
            nn.init.zeros_(zero)
        model.folder = stage1
        model.to(accelerator.device).eval().requires_grad_(False)
        accelerator.print(f"{run}: no stage 2: the decoder as it came draws the best memory's caption")
    shared.check_place(model.settings, run, model.folder)
    return model, run


def evaluate_recording(config: Config) -> int:
    """--fmri: one recording -> one video. Returns the exit status, as all commands."""
    file = Path(config.out or "out.mp4")
    check_writable(file)
    accelerator = start(config.device)
    if not accelerator.is_main_process:
        return 0
    with FolderLock(file.with_name(f".{file.name}.lock"), "wait for it, or choose another --out"):
        model, _ = load_run(config, accelerator)
        x = shared.read_fmri(config.fmri, model)
        [video] = model.reconstruct(x, [(config.seed, 0)], config.steps, config.guidance)
        write_video(file, video, config.fps)
    memory = model.remember(x).indices
    recalls = "" if memory is None else f"; it recalls: {model.lines[memory[0, 0]]['caption']}"
    print(f"written: {file}{recalls}")
    return 0


def evaluate_run(config: Config) -> int:
    """The held-out clips of a run: reconstruct, score, report."""
    accelerator = start(config.device)
    order = held_out.order_of(config)  # asked before models are loaded
    model, run = load_run(config, accelerator)
    test = Clips(config.data, config.subject, "test", model.settings["stage1_config"]["rois"])
    clips = np.unique(np.linspace(0, len(test) - 1, config.clips or len(test)).round().astype(int))
    complete, usual = len(clips) == len(test), asked(Config(**PRESETS[config.data]))
    out = held_out.evaluation_folder(run, config, model.settings, complete, asked(config), usual)
    lines = {int(clip): test.lines[clip] for clip in clips}
    films = held_out.Films(config, model.size, [*lines.values(), *model.lines])
    made_by = held_out.made_by(config, model.settings, model.folder)
    x = test.averaged()[order]  # (test clips, T, N), also where --clips asks for fewer
    stimuli = {"gt": lines}  # folder of `out`: of each clip the line of what its video shows

    def make(rank: int, world: int) -> None:
        for kind, line in stimuli.items():
            share = {clip: line[clip] for clip in clips[rank::world].tolist()}
            films.write(out / kind, share, silent=rank > 0)
        held_out.reconstruct(model, x, clips, out / "recon", config, rank, world)

    with FolderLock(out, take=accelerator.is_main_process):
        held_out.claim(out, made_by, accelerator.is_main_process)
        retrieved = out / "retrieved.jsonl" if accelerator.is_main_process else None
        top_1 = held_out.write_retrieved(model, x[clips], lines, retrieved)
        played = top_1 is not None and not config.shuffle  # the best memories, beside the reconstructions
        if played:
            stimuli["memory"] = {clip: model.lines[i] for clip, i in zip(lines, top_1, strict=True)}
        in_processes(make, accelerator, config.processes)
        accelerator.wait_for_everyone()
        method = "from shuffled fMRI" if config.shuffle else "reconstruction"
        sets = held_out.pairs_of(out, lines, method, played)
        unavailable = score_all(sets, config, out, accelerator)
        if accelerator.is_main_process:
            near_copy = has_near_copy(test.stimuli, clips)
            names = ("data", "subject", "run", "seed", "shuffle", "stage2")
            source = {name: getattr(config, name) for name in names}
            evaluation = Evaluation(sets, out, config, unavailable, source)
            print(report(held_out.describe(evaluation, lines, model.lines, top_1, near_copy, films)))
    accelerator.end_training()
    return 3 if unavailable else 0


@torch.inference_mode()
def main(config: Config) -> int:
    """Returns the exit status."""
    if config.compare:
        print(compare(config.compare, config.data, config.subject, config.seed))
        return 0
    if config.pairs:
        return report_pairs(config)
    return evaluate_recording(config) if config.fmri else evaluate_run(config)


if __name__ == "__main__":
    door(lambda: main(parse(sys.argv[1:], __doc__)))

"""Evaluation (§3.3, §4.2), its first part: reconstruct what was watched from the fMRI of the held-out clips, and look at it.

    python evaluate.py                                     the toy world, a few minutes on a laptop
    python evaluate.py --data cc2017 --subject 1           the paper's size, on a GPU
    accelerate launch evaluate.py --data cc2017            on several
    python evaluate.py --shuffle                           the control: each clip from the fMRI of another scene
    python evaluate.py --fmri x.npy --run full --out out.mp4      one recording (T, N) or (N,), in z-scores as prepared -> one video

In:  a run of stage 2, and the test fMRI: averaged over the showings, z-scored over the clips.
Out: runs/<data>/sub<K>/<run>-s<seed>/eval/ (eval-shuffled/ of the control)
     gt/NNNN.mp4, recon/NNNN.mp4     stimulus and reconstruction of clip NNNN of the test set; what is there is not made again
     retrieved.jsonl                 a line a clip: the memories i_1 ... i_K and the router's weights W_r
     sheet.png, grid.gif             stimulus | top-1 memory | reconstruction, of clips spread over the test set
     recognised.json                 toy world: is what classifiers see in the reconstruction what was shown?
"""

import hashlib
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, AutoModelForVideoClassification, HfArgumentParser

from brain_model import BrainModel
from data import SECONDS, ClipDataset, DecoderData, far_apart, memories, read_clip, uniform_frames, video_frames, written_whole
from heads import Stage1Heads
from mixture_of_memories import DirectProjection, MemoryPool, MixtureOfMemories, Remembered, TopTextMemory
from video_decoder import LORA_FILE, VideoDecoder, clip_generator


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """What is not given here (decoder, size of the videos, K ...) is as the run was trained."""

    data: str = option("toy", "toy, cc2017 or cinebrain")
    subject: int = option(1, "K")
    run: str = option("full", "name of the run")
    seed: int = option(0, "of the run, and of the noise that the videos start from")
    shuffle: bool = option(False, "the control: reconstruct each clip from the fMRI of another scene, into eval-shuffled/")
    fmri: str | None = option(None, "one recording, .npy (T, N) or (N,) of z-scores, in place of the test set")
    out: str = option("out.mp4", "with --fmri: the video to write")
    clips: int | None = option(None, "reconstruct so many, spread over the test set (default: all)")
    batch_size: int = option(1, "clips that are in the decoder at once")
    steps: int | None = option(None, "of sampling (default: the run's; the paper's size: 50)")
    guidance: float | None = option(None, "classifier-free guidance (default: the run's; the paper's size: 5)")
    stimuli: str | None = option(None, "folder of the stimuli's videos (default: data/<data>/raw/stimuli)")
    seconds: float = option(2.0, "length of a clip")
    fps: float = option(30.0, "frames a second of the videos")
    classifiers: str | None = option(None, "folders of classifiers that name what a clip shows, with commas between")


PRESETS = {
    "toy": dict(batch_size=16, fps=8.5, classifiers="toy/videomae,toy/vit"),
    "cc2017": {},
    "cinebrain": dict(seconds=SECONDS["cinebrain"], fps=8.0),  # 33 frames
}


def parse(argv: list[str]) -> Config:
    """The command line over the dataset's preset. An unknown option or dataset ends the program."""
    parser = HfArgumentParser(Config, description=__doc__, prog="evaluate.py")
    known, _ = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])
    if known.data not in PRESETS:
        parser.error(f"--data {known.data}: there are {', '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[known.data])
    return Config(**vars(parser.parse_args(argv)))


# ---------------------------------------------------------------------------------------------- a trained run


class Run(NamedTuple):
    settings: dict  # its stage2/config.json
    train: ClipDataset
    brain_model: BrainModel
    heads: Stage1Heads
    mom: MixtureOfMemories | TopTextMemory | DirectProjection
    pool: MemoryPool  # all training clips, so that its indices are theirs
    decoder: VideoDecoder
    empty: Tensor  # (L, D_txt)


def load_run(folder: Path, device: torch.device | str = "cpu") -> Run:
    """A run from its folder, ready for inference. Raises FileNotFoundError where its stage 2 is not there."""
    stage2 = folder / "stage2"
    parts = [stage2 / part / "config.json" for part in ("brain_model", "heads", "mixture_of_memories")]
    for file in (stage2 / "config.json", *parts, stage2 / "lora" / LORA_FILE):
        if not file.is_file():
            there = ", ".join(sorted(f.parent.name for f in folder.parent.glob("*/stage2"))) or "none"
            raise FileNotFoundError(f"{file} is not there: python train_stage2.py comes first; trained here: {there}")
    settings = json.loads((stage2 / "config.json").read_text())
    train = ClipDataset(settings["data"], settings["subject"], "train", settings["stage1_config"]["rois"])
    size = settings["frames"], settings["height"], settings["width"]
    text = DecoderData(settings["data"], settings["decoder"], "train", size=size, subject=settings["subject"])
    brain_model, heads = BrainModel.from_pretrained(stage2 / "brain_model"), Stage1Heads.from_pretrained(stage2 / "heads")
    kind = MixtureOfMemories if settings["mom"] and settings["integration"] else DirectProjection if settings["mom"] else TopTextMemory
    mom = kind.from_pretrained(stage2 / "mixture_of_memories")
    pool = MemoryPool(**memories(train, text, heads.phi_v, np.arange(len(train))))
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    decoder = VideoDecoder.from_pretrained(settings["decoder"], lora_rank=0, load_vae=True, dtype=dtype)
    decoder.pipe.load_lora_weights(stage2 / "lora")  # rank and scale are in the file
    models = (model.to(device).eval().requires_grad_(False) for model in (brain_model, heads, mom))
    return Run(settings, train, *models, pool.to(device), decoder.to(device), torch.from_numpy(np.array(text.empty)))


def remember(run: Run, x: Tensor) -> Remembered:
    """fMRI x (B, T, N) -> f_fuse and how it was found; a held-out clip may retrieve any memory (§3.3)."""
    f_c, f_e = run.brain_model(x.to(run.pool.e.device))  # (B, D) (B, L, D')
    q = torch.stack([f_c, f_c, run.heads.phi_a(f_c)], 1)  # (B, 3, D)
    return run.mom(f_e, q, run.pool)


def videos_of(run: Run, x: Tensor, generators: list[torch.Generator], steps: int, guidance: float) -> np.ndarray:
    """fMRI x (B, T, N) -> videos uint8 (B, F, H, W, 3), end to end (§3.3)."""
    size = run.settings["frames"], run.settings["height"], run.settings["width"]
    f_fuse = remember(run, x).f_fuse  # (B, L, D_txt)
    return run.decoder.generate(f_fuse, run.empty, *size, generators, steps, guidance).numpy()


def read_recording(file: Path, run: Run) -> Tensor:
    """One recording, .npy -> x (1, T, N), the run's voxels of those prepared. Raises ValueError, naming the file, where it does not fit."""
    T, N, prepared = run.brain_model.volumes, run.brain_model.voxels, run.train.fmri.shape[3]
    like = f"like one clip of {run.train.fmri_file}"
    try:
        x = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is not there: --fmri wants an array {like}") from error
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} is no array of numbers, wanted one {like}, saved by np.save") from error
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fiu":
        raise ValueError(f"{file} holds {getattr(x, 'dtype', 'several arrays')}, wanted one array of numbers {like}")
    volumes = x[None] if x.ndim == 1 else x  # (T, N)
    if volumes.shape not in ((T, N), (T, prepared)):
        wanted = " or ".join(f"({T}, {n})" + f" or ({n},)" * (T == 1) for n in dict.fromkeys((prepared, N)))
        raise ValueError(f"{file} has the shape {x.shape}, wanted {wanted}, volumes and voxels {like}: prepare it with data.py")
    if bad := (~np.isfinite(volumes)).sum():
        t, n = (int(i) for i in np.argwhere(~np.isfinite(volumes))[0])
        raise ValueError(f"{file}: {volumes[t, n]} at volume {t}, voxel {n}; {bad} such values in all, wanted none")
    if abs(x.mean()) > 3 or x.std() > 5:
        raise ValueError(f"{file} has values of {x.mean():.4g} ± {x.std():.4g}, wanted z-scores, about 0 ± 1, {like}: data.preprocess_run")
    return torch.from_numpy(volumes if len(volumes[0]) == N else volumes[:, run.train.voxels])[None].float()


# ---------------------------------------------------------------------------------------------- reconstruction


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """frames uint8 (F, H, W, 3) -> H.264, nearly lossless; small videos in 4:4:4, since 4:2:0 would halve their colours' resolution."""
    import av

    _, H, W, _ = frames.shape
    with written_whole(path) as part, av.open(str(part), "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = H, W
        stream.options = {"crf": "8", "preset": "veryfast", "mbtree": "0"}  # with mbtree the same frames give other bytes now and then
        stream.pix_fmt = "yuv444p" if min(H, W) < 256 or H % 2 or W % 2 else "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def read_video(path: Path) -> np.ndarray:
    """All frames, uint8 (F, H, W, 3). Raises ValueError, naming the file, where it cannot be read."""
    import av

    try:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): delete it, it is made again") from error


def other_scenes(segments: Sequence[str]) -> np.ndarray:
    """(clips,) for each clip another, of another scene (`data.far_apart`), each once: the test set turned round by half of it.

    Raises ValueError where the clips are too few for that.
    """
    n, far = len(segments), far_apart(list(segments))
    for shift in sorted(range(1, n), key=lambda shift: abs(2 * shift - n)):
        order = (np.arange(n) + shift) % n
        if far[np.arange(n), order].all():
            return order
    raise ValueError(f"--shuffle: {n} clips of {len(set(segments))} segments cannot be paired with other scenes, more than 15 clips away")


def reconstruct(run: Run, x: Tensor, clips: np.ndarray, folder: Path, config: Config, rank: int = 0, world: int = 1) -> None:
    """fMRI x (clips of the test set, T, N) -> folder/NNNN.mp4 of `clips`, this process's share; those that are there are left alone.

    A clip's noise comes from (seed, clip). Batches are cut before they are shared out, and one of which a clip is missing is done whole:
    even the rounding, which depends on a batch's size, does not change with the number of processes or an interruption.
    """
    batches = [clips[i : i + config.batch_size] for i in range(0, len(clips), config.batch_size)][rank::world]
    for batch in tqdm(batches, desc="reconstructing", unit="batch", disable=rank > 0):
        if missing := [int(i) for i in batch if not (folder / f"{i:04d}.mp4").is_file()]:
            generators = [clip_generator(config.seed, int(i)) for i in batch]
            videos = videos_of(run, x[batch], generators, config.steps, config.guidance)  # (B, F, H, W, 3)
            for i, video in zip(batch, videos, strict=True):
                if i in missing:
                    write_video(folder / f"{i:04d}.mp4", video, config.fps)


def stimulus(clip: dict, films: Path, config: Config, settings: dict) -> np.ndarray:
    """A line of clips.jsonl -> its frames, uint8 (F, H, W, 3), as the decoder saw them in training."""
    frames = read_clip(films / clip["video"], clip["start_s"], config.seconds)
    return video_frames(frames, settings["frames"], settings["height"], settings["width"])


def claim(out: Path, stage2: Path, how: dict, write: bool) -> None:
    """out/config.json: what the videos there were made by. Raises ValueError where others, of other weights too, would join them."""
    file, weights = out / "config.json", hashlib.sha256()
    for path in sorted(stage2.glob("*/*.safetensors")):
        with open(path, "rb") as opened:
            weights.update(hashlib.file_digest(opened, "sha256").digest())
    how = how | {"weights": weights.hexdigest()[:16]}
    found = json.loads(file.read_text()) if file.is_file() else how
    if differ := {key: (found.get(key), value) for key, value in how.items() if found.get(key) != value}:
        raise ValueError(f"{out} has videos made otherwise (there, here): {differ}; to make them anew delete the folder: rm -r {out}")
    if write:
        with written_whole(file) as part:
            part.write_text(json.dumps(how, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- pictures


def page(cells: list[list[np.ndarray]], labels: list[list[str]], titles: list[str], height: int):
    """Pictures uint8 (H, W, 3) in rows and columns, a label below each (three lines at most), a title above each column -> PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    font, gap, line = ImageFont.load_default(13), 8, 16
    H, W, _ = cells[0][0].shape
    width, how = round(W * height / H), Image.Resampling.NEAREST if H < height else Image.Resampling.LANCZOS
    lines = [[textwrap.wrap(label, max(12, width // 7), max_lines=3, placeholder=" ...") for label in row] for row in labels]
    below = line * max(len(text) for row in lines for text in row) + gap
    image = Image.new("RGB", ((width + gap) * len(titles) + gap, (height + below) * len(cells) + line + 2 * gap), "white")
    draw = ImageDraw.Draw(image)
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        draw.text((left, gap), title, "black", ImageFont.load_default(14))
        for row, (pictures, texts) in enumerate(zip(cells, lines, strict=True)):
            top = line + 2 * gap + row * (height + below)
            image.paste(Image.fromarray(pictures[column]).resize((width, height), how), (left, top))
            draw.multiline_text((left, top + height + 1), "\n".join(texts[column]), (70, 70, 70), font, spacing=2)
    return image


def pictures(out: Path, rows: list[list[np.ndarray]], labels: list[list[str]], titles: list[str], fps: float) -> None:
    """rows[clip][column], videos uint8 (F, H, W, 3) -> out/sheet.png (first, middle and last frame) and out/grid.gif (all frames)."""
    F, edge = len(rows[0][0]), ((0, 0), (0, 0), (1, 1), (0, 0))  # a white column either side parts the moments
    strips = [[np.concatenate(list(np.pad(video[[0, F // 2, -1]], edge, constant_values=255)), 1) for video in row] for row in rows]
    sheet = page(strips, labels, titles, 112)
    frames = [page([[video[t] for video in row] for row in rows], labels, titles, 144) for t in range(F)]
    with written_whole(out / "sheet.png") as part:
        sheet.save(part)
    with written_whole(out / "grid.gif") as part:
        frames[0].save(part, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)


# ---------------------------------------------------------------------------------------------- classes of videos and frames (DESIGN §7)


def n_way_top_k(pred_probs: np.ndarray | Tensor, gt_classes: np.ndarray | Tensor, n: int, k: int = 1) -> np.ndarray:
    """Probability (clips,) that a GT class is among the k most probable of itself and n-1 other classes drawn without replacement.

    pred_probs (clips, classes) of the prediction, gt_classes (clips, G) the classes of the GT: its top 3. M classes are others; of the
    n-1 drawn fewer than k may score as high as the best GT class: the hypergeometric distribution, for k = 1 simply
    C(below, n-1) / C(M, n-1). Chance for k = 1: G / (n - 1 + G). Raises ValueError where there are fewer than n-1 others.
    """
    probs, gt = np.asarray(pred_probs, np.float64), np.asarray(gt_classes)
    others = np.ones(probs.shape, bool)
    np.put_along_axis(others, gt, False, 1)
    M = others.sum(1)  # (clips,)
    if M.min() < n - 1:
        raise ValueError(f"{n}-way: only {M.min()} classes beside those of the GT, wanted {n - 1}: a classifier of more classes")
    best = np.take_along_axis(probs, gt, 1).max(1, keepdims=True)  # (clips, 1)
    above = (others & ~(probs < best)).sum(1)  # (clips,) M minus those below
    return scipy.stats.hypergeom.cdf(k - 1, M, above, n - 1)


@torch.inference_mode()
def class_probabilities(videos: Iterable[np.ndarray], classifier: str | Path) -> tuple[np.ndarray, list[str]]:
    """Videos uint8 (F, H, W, 3) -> probabilities (clips, classes) and the classes' names.

    A video classifier sees 16 uniform frames at once, an image classifier one by one (the mean of the probabilities).
    """
    of_video = "video" in AutoConfig.from_pretrained(classifier).model_type
    kind = AutoModelForVideoClassification if of_video else AutoModelForImageClassification
    model, processor = kind.from_pretrained(classifier, dtype=torch.float32).eval(), AutoImageProcessor.from_pretrained(classifier)
    probabilities = []
    for video in videos:
        frames = list(video[uniform_frames(len(video), 16)])
        probabilities.append(model(**processor(frames, return_tensors="pt")).logits.softmax(-1).mean(0))  # (classes,)
    return torch.stack(probabilities).numpy(), list(model.config.id2label.values())


def recognise(videos: Sequence[Path], classifiers: Sequence[str], values: dict[str, list[str]]) -> dict[str, list[str]]:
    """What each video shows: of each attribute the most probable of its `values`, where P(red) is the sum over the red classes.

    The first classifier whose classes' names hold an attribute's values is asked for it.
    """
    seen: dict[str, list[str]] = {}
    for classifier in classifiers:
        p, names = class_probabilities(map(read_video, videos), classifier)  # (clips, classes)
        for attribute in values.keys() - seen.keys():
            holds = np.array([[f" {value} " in f" {name} " for value in values[attribute]] for name in names])  # (classes, values)
            if holds.any():
                seen[attribute] = [values[attribute][i] for i in (p @ holds).argmax(1)]
    return {attribute: seen[attribute] for attribute in values if attribute in seen}


def shares(seen: dict[str, list[str]], shown: Sequence[dict]) -> dict[str, float]:
    """Share of the clips whose attribute is seen as it was shown, of each attribute and of all together."""
    right = {name: np.array([value == clip[name] for value, clip in zip(seen[name], shown, strict=True)]) for name in seen}
    return {name: float(hits.mean()) for name, hits in (right | {"all of them": np.all(list(right.values()), 0)}).items()}


def agreement(config: Config, out: Path, shown: list[dict], train: list[dict], files: list[str], top_1: np.ndarray | None) -> dict:
    """recognised.json and its table, beside chance and the run's other reconstructions. Returns what is seen in the reconstructions."""
    attributes = [name for name in ("colour", "shape", "action", "background") if name in train[0]]  # in clips.jsonl of the toy world
    classifiers = config.classifiers.split(",") if config.classifiers and attributes else []
    if absent := [name for name in classifiers if not Path(name).is_dir()]:
        print(f"recognised attributes: n/a, {', '.join(absent)} is not there (--classifiers)")
    if absent or not classifiers:
        return {}
    values = {name: sorted({clip[name] for clip in train}) for name in attributes}
    seen, real = (recognise([out / kind / file for file in files], classifiers, values) for kind in ("recon", "gt"))
    columns = {"shuffled fMRI" if config.shuffle else "reconstruction": shares(seen, shown), "stimulus": shares(real, shown)}
    if top_1 is not None:
        columns["top-1 memory"] = shares({name: [train[i][name] for i in top_1] for name in seen}, shown)
    chance = {name: 1 / len(values[name]) for name in seen}
    columns["chance"] = chance | {"all of them": float(np.prod(list(chance.values())))}
    with written_whole(out / "recognised.json") as part:
        part.write_text(json.dumps({"shares": columns, "videos": files, "seen": seen}, indent=1) + "\n")
    other = out.with_name("eval" if config.shuffle else "eval-shuffled") / "recognised.json"
    theirs = json.loads(other.read_text())["shares"] if other.is_file() else {}
    columns = columns | theirs if config.shuffle else theirs | columns  # memories and stimuli are those of the reconstruction
    names = [n for n in ("reconstruction", "top-1 memory", "shuffled fMRI", "stimulus", "chance") if n in columns]
    print(f"\n{f'{len(files)} held-out clips, seen as shown':<36}" + "".join(f"{name:>16}" for name in names))
    print("\n".join(f"{row:<36}" + "".join(f"{columns[n].get(row, np.nan):>16.3f}" for n in names) for row in columns["chance"]))
    return seen


# ---------------------------------------------------------------------------------------------- the command


@torch.inference_mode()
def main(config: Config) -> None:
    patient = InitProcessGroupKwargs(timeout=timedelta(days=30))  # after an interruption one process may have far more left to do
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patient])
    chief, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    folder = Path("runs") / config.data / f"sub{config.subject}" / f"{config.run}-s{config.seed}"
    run = load_run(folder, accelerator.device)
    config.steps = run.settings["sampling_steps"] if config.steps is None else config.steps
    config.guidance = run.settings["guidance"] if config.guidance is None else config.guidance

    # ---- one recording
    if config.fmri:
        x = read_recording(Path(config.fmri), run)
        write_video(Path(config.out), videos_of(run, x, [clip_generator(config.seed, 0)], config.steps, config.guidance)[0], config.fps)
        found = remember(run, x).indices
        return print(f"written: {config.out}" + ("" if found is None else f"; it recalls: {run.train.clips[found[0, 0]]['caption']}"))

    # ---- the held-out clips
    test = ClipDataset(config.data, config.subject, "test", run.settings["stage1_config"]["rois"])
    out = folder / ("eval-shuffled" if config.shuffle else "eval")
    films = Path(config.stimuli or Path("data") / config.data / "raw" / "stimuli")
    if absent := sorted({clip["video"] for clip in test.clips + run.train.clips if not (films / clip["video"]).is_file()}):
        raise FileNotFoundError(f"{films / absent[0]} is not there ({len(absent)} stimuli are missing): --stimuli FOLDER")
    x = test.averaged()  # (clips, T, N)
    if config.shuffle:
        x = x[other_scenes([clip["segment"] for clip in test.clips])]
    clips = np.unique(np.linspace(0, len(test) - 1, config.clips or len(test)).round().astype(int))
    claim(out, folder / "stage2", {name: getattr(config, name) for name in ("steps", "guidance", "fps")}, write=chief)
    for i in tqdm(clips[rank::world], desc="stimuli", unit="clip", disable=not chief):
        if not (file := out / "gt" / f"{i:04d}.mp4").is_file():
            write_video(file, stimulus(test.clips[i], films, config, run.settings), config.fps)
    reconstruct(run, x, clips, out / "recon", config, rank, world)
    accelerator.wait_for_everyone()
    if not chief:
        return accelerator.end_training()

    # ---- what was remembered
    parts = (remember(run, x[part]) for part in np.array_split(clips, -(-len(clips) // 16)))
    found, top_1 = [(part.indices, part.W_r) for part in parts], None
    if found[0][0] is not None:  # without integration nothing is sought
        retrieved, W_r = (torch.cat(rows).cpu().numpy() for rows in zip(*found, strict=True))
        top_1 = retrieved[:, 0]
        with written_whole(out / "retrieved.jsonl") as part:
            rows = zip(clips.tolist(), retrieved.tolist(), W_r.astype(float).round(4).tolist(), strict=True)
            lines = [{"clip": i, "id": test.clips[i]["id"], "retrieved": indices, "W_r": w} for i, indices, w in rows]
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))

    # ---- numbers and pictures
    shown, files = [test.clips[i] for i in clips], [f"{i:04d}.mp4" for i in clips]
    seen, rows, labels = agreement(config, out, shown, run.train.clips, files, top_1), [], []
    for k in np.unique(np.linspace(0, len(clips) - 1, 6).round().astype(int)):
        gt, recon = (read_video(out / kind / files[k]) for kind in ("gt", "recon"))
        memory = None if top_1 is None else run.train.clips[top_1[k]]
        rows.append([gt, np.full_like(gt, 255) if memory is None else stimulus(memory, films, config, run.settings), recon])
        said = "seen as " + " ".join(values[k] for values in seen.values()) if seen else ""
        labels.append([shown[k]["caption"], memory["caption"] if memory else "", said])
    pictures(out, rows, labels, ["stimulus", "top-1 memory", "from shuffled fMRI" if config.shuffle else "reconstruction"], config.fps)
    print(f"\nwritten: {out}/ (gt, recon, retrieved.jsonl, sheet.png, grid.gif)")
    accelerator.end_training()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(parse(sys.argv[1:]))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")

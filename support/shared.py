"""The folder of a finished model: what stage 2 writes, evaluation loads, and a lab shares.

    config.json                  the settings, written last: a folder with it is whole
    brain_model/ heads/ mixture_of_memories/ lora/
    memories.safetensors         e and the captions' tokens of the memories, and the decoder's empty prompt;
                                 a caption that many clips have stands there once
    memories.json                of each memory its line of clips.jsonl
    voxels.npz                   of each voxel of x its index in the source, and its area: roi

Where it is shared also README.md and eval/metrics.json. The video decoder is not copied, only named."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from support.files import check_room, find_weights, follow_umask, save_model, write_json, written_whole
from support.options import lies_within, range_text
from support.pipelines import check_prepared, latent_shape, lora_scale, save_lora
from support.readers import (
    advising,
    check_array,
    check_keys,
    damaged,
    read_array,
    read_json,
    read_npz,
    read_tensors,
    reading,
)

MEMORIES = "memories.safetensors"
TENSORS = "e", "text_tokens", "text_offsets", "caption", "empty"  # of it
PROJECT = Path(__file__).parents[1]
HUB_ID = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"  # at a branch, a tag, a commit or refs/pr/1
KEYS = {"data": str, "subject": int, "decoder": str, "mom": bool, "integration": bool, "stage1_config": dict}
KEYS |= dict.fromkeys(("frames", "height", "width", "sampling_steps", "lora_rank"), int)
KEYS |= {"guidance": float, "lora_alpha": float, "noise_shift": float, "checkpointing": bool}
TEXT = (str, type(None))
STAGE1 = {"data": str, "subject": int, "rois": TEXT, "val_segments": TEXT, "sizes": dict, "precision": str}
STAGE1 |= dict.fromkeys(("tau", "lambda_1", "lambda_2", "dropout"), float)
PREPARE = "prepare it with data.py, as the clips of fmri.npy"
PARTS = "brain_model", "heads", "mixture_of_memories"
SIZES = "voxels volumes tokens width layers attention_heads embed_dim rank dim frames classes text_dim K"
PART = dict.fromkeys(SIZES.split(), int) | dict.fromkeys(("alpha", "tau", "text_rms"), float)
LINE = {"id": str, "caption": str, "segment": str, "video": str, "start_s": float, "categories": list}
# of options and sizes, by name: what the options themselves allow
RANGES = {name: {"least": 1} for name, kind in (KEYS | PART).items() if kind is int}
RANGES |= {"lora_alpha": {"above": 0}, "noise_shift": {"above": 0}, "tau": {"least": 1e-3}}
RANGES["sampling_steps"] = {"least": 1, "most": 1000}
RANGES |= dict.fromkeys(("guidance", "lambda_1", "lambda_2"), {"least": 0})


def locate(name: Path | str) -> Path:
    """A run, its stage2/, a shared folder, or NAME or NAME@REVISION on the Hub, which is downloaded -> the
    folder of the model. Raises FileNotFoundError."""
    folder = Path(find_weights(name))
    if not folder.exists() and re.fullmatch(HUB_ID, str(name)) and not folder.parent.exists():
        repo, _, revision = str(name).partition("@")
        return Path(snapshot_download(repo, revision=revision or None))
    if any([(folder / part).exists() for part in (MEMORIES, "config.json", *PARTS)]):
        return folder
    if not (folder / "stage2" / "config.json").is_file():
        trained = ", ".join(sorted(stage2.parent.name for stage2 in folder.parent.glob("*/stage2"))) or "none"
        data, subject = folder.absolute().parts[-3:-1]
        options = f" --data {data} --subject {subject[3:]}" if re.fullmatch(r"sub\d+", subject) else ""
        comes_first = f"python train_stage2.py{options} comes first; trained here: {trained}"
        raise FileNotFoundError(f"{folder.absolute()}/stage2/config.json is not there: {comes_first}")
    return folder / "stage2"


def read_settings(folder: Path) -> dict:
    """config.json, checked."""
    file = folder / "config.json"
    settings = check_settings(read_json(file), file, KEYS)
    keys = {key: STAGE1[key] for key in ("rois", "tau", "lambda_1", "lambda_2")}
    check_settings(settings["stage1_config"], f"{file}, stage1_config", keys)
    lora, scale = folder / "lora", (settings["lora_rank"], settings["lora_alpha"])
    if lora.is_dir() and scale != lora_scale(lora):  # asked before a LoRA of that rank takes memory
        raise damaged(file, f"lora_rank, lora_alpha = {scale}", f"{lora_scale(lora)}, as lora/ has")
    settings["decoder"] = decoder_at(settings["decoder"], folder)
    return settings


def check_settings(settings: dict, file: Path | str, keys: dict[str, type | tuple]) -> dict:
    """The settings themselves, where these `keys` are there, of their types and in their RANGES."""
    check_keys(settings, file, keys)
    for name in keys.keys() & RANGES.keys():
        if not lies_within(settings[name], RANGES[name]):
            raise damaged(file, f"{name} = {settings[name]}", f"{name} {range_text(RANGES[name])}")
    return settings


def check_model(folder: Path, settings: dict, brain_model, decoder, memories: int) -> None:
    """Raises ValueError where config.json of a part is out of range, or does not fit the Brain Model, the
    decoder or the number of memories."""
    with reading(folder / "config.json", "a video that the decoder makes"):
        latent_shape(decoder, settings["frames"], settings["height"], settings["width"])
    D, width = brain_model.to_f_c.out_features, brain_model.norm.normalized_shape[0]
    wanted = {"tokens": decoder.text_length, "text_dim": decoder.text_width}
    wanted |= {"width": width, "embed_dim": D, "dim": D}
    recall = ["tokens", "K"] if settings["integration"] else []  # what no weight has the shape of
    recall += ["attention_heads", "tau", "alpha"] if settings["integration"] and settings["mom"] else []
    for part, needed in zip(PARTS, (["attention_heads"], [], recall), strict=True):
        file = folder / part / "config.json"
        config = read_json(file)
        check_settings(config, file, {name: PART[name] for name in {*config, *needed} & {*PART}})
        for name in config.keys() & wanted.keys():
            if config[name] != wanted[name]:
                raise damaged(file, f"{name} = {config[name]}", f"{wanted[name]}, as the others have")
        if width % config.get("attention_heads", 1):
            raise damaged(file, f"attention_heads = {config['attention_heads']}", f"a divisor of {width}")
        if config.get("K", 1) > memories:
            raise damaged(file, f"K = {config['K']}", f"at most {memories}, the memories of the folder")


def decoder_at(name: str, folder: Path) -> str:
    """A decoder: a folder here, in the project (toy/wan) or where the run in `folder` was trained, or a name
    on the Hub. Raises ValueError for a folder that another machine had."""
    origin = folder.absolute().parents[4:5] if folder.name == "stage2" else ()  # ORIGIN/runs/data/sub1/run/
    for place in (Path(), PROJECT, *origin):
        if (place / name).is_dir():
            return str(place / name)
    if not re.fullmatch(HUB_ID, name):
        content, advice = f"decoder = {name!r}", "write into that file where this decoder lies here"
        raise damaged(folder / "config.json", content, "a folder here, or a name on the Hub", advice)
    return name


def finished_run(places: Sequence[Path], settings: dict, keys: dict, advice: str) -> tuple[Path, dict]:
    """The first of these folders that holds a run, and its config.json with these `keys` and settings. Raises
    FileNotFoundError where none does, ValueError where steps are left."""
    folder = next((place for place in places if (place / "config.json").is_file()), places[0])
    with advising(advice):
        stored = read_json(folder / "config.json", keys=keys | {"step": int, "steps_in_all": int})
        expected = settings | {"step": stored["steps_in_all"]}
        actual = {name: stored[name] for name in expected}
        if actual != expected:
            raise damaged(folder, actual, f"{expected}, a finished run")
    return folder, stored


def check_place(settings: dict, run: Path, folder: Path) -> None:
    """Raises ValueError where the run in `folder` is of another subject than the place of its results; says
    where it is not finished."""
    place, origin = run.absolute().parts[-3:-1], (settings["data"], f"sub{settings['subject']}")
    if place != origin:
        file, wanted = folder / "config.json", f"one of {' '.join(place)}"
        advice = "put it into its folder, or choose its --data and --subject"
        raise damaged(file, f"a run of {' '.join(origin)}", wanted, advice)
    step, steps = settings.get("step"), settings.get("steps_in_all")
    if step != steps:
        tqdm.write(f"{run}: stage 2 is at step {step} of {steps}: its videos are not yet its best")


def check_parts(stage1: Path, settings: dict, clips, brain_model, decoder) -> None:
    """Raises ValueError where stage 1, data.Clips, Brain Model and decoder do not fit each other."""
    trained, L = settings["stage1_config"]["sizes"], brain_model.position.shape[1] - 1
    width, heads, recall = brain_model.norm.normalized_shape[0], settings["attention_heads"], clips.recall
    if trained != clips.sizes:
        advice = "train it again, or choose the stage 1 of this subject, --rois and encoders with --stage1"
        raise ValueError(f"{stage1}: trained on data of {trained}, data/ has {clips.sizes}: {advice}")
    if L != decoder.text_length:
        wanted = f"the decoder's {decoder.text_length}: train_stage1.py --tokens {decoder.text_length}"
        raise ValueError(f"{stage1}: a Brain Model of {L} tokens, wanted {wanted}")
    if settings["mom"] and settings["integration"] and width % heads:
        raise ValueError(f"--attention_heads {heads}: wanted a divisor of {width}, the Brain Model's width")
    if settings["integration"] and recall.fewest < settings["K"]:
        fewest = f"a clip may retrieve {recall.fewest} of {len(recall.trained)} memories"
        raise ValueError(f"--K {settings['K']}: {fewest}: a lower --K or more training clips")
    check_prepared(decoder, clips.latents.shape[1:], clips.empty.shape)


def writers(model) -> dict[str, Callable[[Path], object]]:
    """What writes each folder of weights of an evaluate.CineNeuron."""
    return {
        "brain_model": partial(save_model, model.brain_model),
        "heads": partial(save_model, model.heads),
        "mixture_of_memories": partial(save_model, model.mom),
        "lora": partial(save_lora, model.decoder),
    }


def write_memories(folder: Path, model) -> None:
    """memories.safetensors, memories.json and voxels.npz of an evaluate.CineNeuron."""
    keys = [tokens.numpy().tobytes() for tokens in model.pool.captions]
    captions = dict(zip(keys, model.pool.captions, strict=True))  # each once
    number = {key: i for i, key in enumerate(captions)}
    tensors = {
        "e": model.pool.e.detach().cpu().contiguous(),
        "text_tokens": torch.cat([*captions.values()]),
        "text_offsets": torch.from_numpy(np.cumsum([0, *map(len, captions.values())])),
        "caption": torch.tensor([number[key] for key in keys]),
        "empty": model.empty.detach().cpu().contiguous(),
    }
    with written_whole(folder / MEMORIES) as part:
        check_room(folder, tensors)
        save_file(tensors, part)
        follow_umask(part)
    write_json(folder / "memories.json", model.lines)
    with written_whole(folder / "voxels.npz") as part:
        np.savez_compressed(part, **model.voxels)


def read_memories(
    folder: Path, D: int, prompt: tuple[int | None, int | None] = (None, None)
) -> tuple[Tensor, list[Tensor], Tensor, list[dict]]:
    """e (N, 3, D), N captions (n_i, D_txt), the empty prompt (L, D_txt), N lines of clips.jsonl. prompt: the
    decoder's L and D_txt, where it is at hand."""
    file = folder / MEMORIES
    with reading(file, "the memories of a model"):
        # memory of their own, which is aligned as the run's is: products round otherwise where it is not
        tensors = {name: x.clone() for name, x in read_tensors(file).items()}
        if tensors.keys() != {*TENSORS}:
            raise damaged(file, f"tensors {', '.join(tensors)}", ", ".join(TENSORS))
        e, tokens, offsets, caption, empty = (tensors[name] for name in TENSORS)
        check_array(e.numpy(), f"{file}, e", "f", (None, 3, D))
        check_array(empty.numpy(), f"{file}, empty", "f", prompt)
        check_array(tokens.numpy(), f"{file}, text_tokens", "f", (None, empty.shape[1]))
        check_array(offsets.numpy(), f"{file}, text_offsets", "iu", (None,))
        N, different = len(e), len(offsets) - 1
        check_array(caption.numpy(), f"{file}, caption", "iu", (N,))
        if not {e.dtype, empty.dtype} <= {torch.float32, torch.float16}:
            raise damaged(file, f"{e.dtype} of e, {empty.dtype} of empty", "float32 or float16")
        e, empty = e.float(), empty.float()
        lengths = offsets.diff()
        spans = N and different > 0 and (offsets[0], offsets[-1]) == (0, len(tokens))
        if not spans or lengths.min() < 1 or lengths.max() > len(empty):
            wanted = f"numbers that rise from 0 to {len(tokens)}, by {len(empty)} at most"
            raise damaged(file, f"text_offsets {offsets.tolist()[:4]} ...", wanted)
        if caption.min() < 0 or caption.max() >= different:
            raise damaged(file, f"caption {int(caption.max())}", f"0 to {different - 1}, as text_offsets has")
        if not ((e.norm(dim=-1) - 1).abs() < 1e-3).all():
            raise damaged(file, "rows of e of another length", "unit vectors")
    file = folder / "memories.json"
    lines = read_json(file, list)
    if len(lines) != N:
        raise damaged(file, f"{len(lines)} lines", f"one for each of the {N} memories")
    for number, line in enumerate(lines):
        check_keys(line, f"{file}, line {number}", LINE)
    captions = tokens.split(lengths.tolist())
    return e, [captions[i] for i in caption.tolist()], empty, lines


def read_voxels(folder: Path, N: int) -> dict[str, np.ndarray]:
    """voxels.npz of a model of N voxels."""
    file = folder / "voxels.npz"
    voxels = read_npz(file, {"index": "iu", "roi": "U"})
    if len(voxels["roi"]) != N:
        raise damaged(file, f"{len(voxels['roi'])} voxels", f"the {N} of the Brain Model")
    return voxels


def check_fmri(x: Tensor | np.ndarray, T: int, N: int, name: Path | str = "x") -> Tensor:
    """x (B, T, N), or (T, N), or (B, N) where T is 1 -> float32 (B, T, N). Raises ValueError for others, what
    is not finite, and what are no z-scores."""
    wanted = "z-scores over the clips of a run, about 0 ± 1"
    with reading(name, wanted, PREPARE):
        if not isinstance(x, Tensor):
            x = np.ma.filled(x, np.nan)  # what is masked was not measured
            x = torch.from_numpy(x.astype(np.float32) if x.dtype.kind in "fiu" else x)
        if x.ndim == 2:
            x = x[:, None] if T == 1 else x[None]
        if x.ndim != 3 or x.shape[1:] != (T, N) or not len(x):
            shape = f"the shape {tuple(x.shape)}"
            raise damaged(name, shape, f"(B, {T}, {N}): clips, volumes, voxels")
        real = not x.dtype.is_complex and x.dtype != torch.bool
        if not real or not torch.isfinite(x.float()).all():
            raise damaged(name, "NaN, infinity or no real numbers", "z-scored fMRI")
        x = x.float()
        mean, deviation = x.mean((1, 2)), x.std((1, 2))  # (B,)
        for b in torch.nonzero((mean.abs() > 3) | (deviation > 5) | (deviation < 0.05)).flatten().tolist():
            raise damaged(name, f"{mean[b]:.4g} ± {deviation[b]:.4g} in clip {b}", wanted)
    return x


def read_fmri(name: Path | str, model) -> Tensor:
    """One recording, .npy (T, N) or (N,) -> x (1, T, N): the voxels of an evaluate.CineNeuron, or all those
    that are prepared of its subject. Raises FileNotFoundError, ValueError."""
    T, N, settings = model.brain_model.volumes, model.brain_model.voxels, model.settings
    file = Path(find_weights(name))
    with advising("--fmri wants an array (T, N) like one clip of fmri.npy, saved by np.save"):
        x = read_array(file, "fiu")
    volumes = x[None] if x.ndim == 1 else x  # (T, N)
    prepared = Path("data") / settings["data"] / f"sub{settings['subject']}" / "voxels.npz"
    if prepared.is_file() and volumes.shape != (T, N):
        index = read_npz(prepared, {"index": "iu", "roi": "U"})["index"]
        if volumes.shape == (T, len(index)):
            volumes = volumes[:, np.isin(index, model.voxels["index"])]
    with advising(PREPARE):
        check_array(volumes, file, "fiu", (T, N), finite=True)
    return check_fmri(volumes.astype(np.float32)[None], T, N, file)

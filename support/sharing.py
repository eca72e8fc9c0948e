"""A trained run as a folder that needs no data/: models, memories, and a model card for the Hugging Face Hub.

    README.md                    the model card
    config.json                  the run's settings, written last: a folder with it is whole
    brain_model/ heads/ mixture_of_memories/ lora/
    memories.safetensors         the tensors of the MemoryPool, and `empty`, the decoder's empty prompt
    memories.json                of each memory a line of clips.jsonl: its id, its caption
    voxels.npz                   of each voxel of x its index in the source, and its area: roi
    eval/metrics.json            of the run, where it was evaluated

The video decoder is not copied: its name stands in config.json.
"""

import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from safetensors.torch import save_file
from torch import Tensor

from support.files import save_folder, write_json, written_whole
from support.readers import damaged, read_json, read_npz, read_tensors

MEMORIES, METRICS = "memories.safetensors", Path("eval", "metrics.json")
PROJECT = Path(__file__).parents[1]
MEND = "share the run anew, or download the folder again"
HUB_ID = r"[\w.-]+/[\w.-]+"
SOURCES = {
    "toy": "The toy world: rendered films and a simulated brain, made by a program. No person was recorded.",
    "cc2017": "cc2017, Wen et al. 2018 (doi 10.4231/R71Z42KK): films, and the fMRI of people who saw them.",
    "cinebrain": "CineBrain, Gao et al. 2025 (Hugging Face: Fudan-fMRI/CineBrain): a television series, "
    "and the fMRI of people who saw it.",
}
CARD = """---
{{ card_data }}
---

# CineNeuron, {{ data }}, subject {{ subject }}

It reconstructs the video that a person watched from their fMRI, by the method of *Bridging Brain and
Semantics: A Hierarchical Framework for Semantically Enhanced fMRI-to-Video Reconstruction* (CineNeuron). It
belongs to one brain: it reads the {{ voxels }} voxels of subject {{ subject }} that `voxels.npz` lists, in
z-scores, {{ volumes }} volume(s) a clip.

## How to load it

In a clone of the code, with its requirements installed:

```python
from evaluate import CineNeuron

model = CineNeuron.from_pretrained("{{ place }}")
videos = model.reconstruct(x)  # x (B, {{ volumes }}, {{ voxels }}) float32 -> uint8 (B, {{ size }}, 3)
```

`model.remember(x).indices` names the memories behind a video: lines of `memories.json`.

## What is here

Brain Model, heads, Mixture-of-Memories, LoRA (rank {{ rank }}), and the {{ memories }} memories of the
training clips. The video decoder, `{{ decoder }}`, is not here: it is loaded by its name.

## Metrics

{{ metrics }}

## Data and licence

{{ source }} The captions in `memories.json` describe clips of those films. This folder holds no recording and
no film. {{ licence }}
"""


class Shown(NamedTuple):
    """What a shared folder knows of the training clips and voxels, in place of a ClipDataset."""

    clips: list[dict]  # of each memory its id and caption
    index: np.ndarray  # (N,) of each voxel its index in the source
    roi: np.ndarray  # (N,) its area


def locate(name: Path | str) -> tuple[Path, bool]:
    """A folder, or where it is none a name on the Hub, which is downloaded -> the folder, and whether it is a
    shared one (and not a run)."""
    folder = Path(name)
    if not folder.exists() and re.fullmatch(HUB_ID, str(name)) and not folder.parent.exists():
        folder = Path(snapshot_download(str(name)))
    return folder, (folder / MEMORIES).is_file()


def decoder_at(name: str, shared: Path) -> str:
    """The decoder of a shared folder: a folder here or in the project (toy/wan), or a name on the Hub. Raises
    ValueError, naming config.json, for a folder that another machine had."""
    for place in (Path(name), PROJECT / name):
        if place.is_dir():
            return str(place)
    if not re.fullmatch(HUB_ID, name):
        wanted = "a folder here, or a name on the Hub"
        mend = "write into that file where this decoder lies here"
        raise damaged(shared / "config.json", f"decoder = {name!r}", wanted, mend)
    return name


def save(model, folder: Path, name: str | None = None) -> None:
    """Writes the shared folder of an evaluate.CineNeuron. name: what the card loads it by, if not its
    own name. Raises ValueError where the folder holds something else."""
    here = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if here and MEMORIES not in here:
        raise damaged(folder, f"{len(here)} other files", "a new or an empty folder", "choose another")
    evaluated, shown = model.folder / METRICS, model.train
    metrics = read_json(evaluated, keys={"metrics": dict}) if evaluated.is_file() else None
    clips = [{key: clip[key] for key in ("id", "caption") if key in clip} for clip in shown.clips]
    card = model_card(model, name or folder.resolve().name, metrics)
    parts = {"brain_model": model.brain_model, "heads": model.heads, "mixture_of_memories": model.mom}
    tensors = {name: x for name, x in vars(model.pool).items() if isinstance(x, Tensor)}
    tensors["empty"] = model.empty

    (folder / "config.json").unlink(missing_ok=True)
    for name, part in parts.items():
        save_folder(folder / name, part.save_pretrained)
    save_folder(folder / "lora", model.decoder.save_lora)
    with written_whole(folder / MEMORIES) as part:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, part)
    write_json(folder / "memories.json", clips)
    with written_whole(folder / "voxels.npz") as part:
        np.savez(part, index=shown.index, roi=shown.roi)
    (folder / METRICS).unlink(missing_ok=True)  # of an earlier run
    if metrics:
        write_json(folder / METRICS, metrics)
    with written_whole(folder / "README.md") as part:
        part.write_text(str(card))
    write_json(folder / "config.json", model.settings)


def load(folder: Path, pool: type) -> tuple[Shown, object, Tensor]:
    """What `save` wrote beside the models: the training clips, the MemoryPool (`pool`, its class), and the
    empty prompt. Raises FileNotFoundError, ValueError."""
    tensors = read_tensors(folder / MEMORIES, mend=MEND)
    # memory of their own, which is aligned as the run's is: products round otherwise where it is not
    tensors = {name: x.clone() for name, x in tensors.items()}
    try:
        empty, memories = tensors.pop("empty"), pool(**tensors)
    except (KeyError, TypeError, ValueError) as error:  # other names, other lengths
        raise damaged(folder / MEMORIES, error, "the tensors of a MemoryPool, and empty", MEND) from error
    clips = read_json(folder / "memories.json", list, mend=MEND)
    if len(clips) != len(memories.e) or not all("caption" in clip for clip in clips):
        wanted = f"a caption for each memory of {MEMORIES}"
        raise damaged(folder / "memories.json", f"{len(clips)} lines", wanted, MEND)
    voxels = read_npz(folder / "voxels.npz", {"index": "iu", "roi": "U"}, MEND)
    return Shown(clips, voxels["index"], voxels["roi"]), memories, empty


def push(model, repo_id: str, private: bool) -> str:
    """Uploads what `save` writes to the Hub, as the user that `hf auth login` named. Returns the address of
    the commit."""
    api = HfApi()
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), repo_id)
        return api.upload_folder(repo_id=repo.repo_id, folder_path=folder).commit_url


# ---------------------------------------------------------------- the model card


def model_card(model, place: str, metrics: dict | None) -> ModelCard:
    """The card, with front matter that the Hub can read. place: what it is loaded by."""
    settings = model.settings
    data, decoder = settings["data"], settings["decoder"]
    about = {"tags": ["fmri", "brain-decoding", "video-reconstruction", "cineneuron"], "license": "mit"}
    licence = "The code and these weights are under the MIT licence."
    if data != "toy":
        about |= {"license": "other", "license_name": "as-the-data"}
        licence = "The code is under the MIT licence. These weights are bound by the licences of the data "
        licence += "that they were trained on, and of the decoder."
    if data == "cinebrain":
        about["datasets"] = ["Fudan-fMRI/CineBrain"]
    if re.fullmatch(HUB_ID, decoder) and not (PROJECT / decoder).exists():
        about["base_model"] = decoder
    size = ", ".join(str(settings[name]) for name in ("frames", "height", "width"))
    return ModelCard.from_template(
        ModelCardData(**about), template_str=CARD, place=place, data=data, subject=settings["subject"],
        voxels=model.brain_model.voxels, volumes=model.brain_model.volumes, size=size,
        rank=settings["lora_rank"], memories=len(model.pool.e), decoder=decoder, metrics=_table(metrics),
        source=SOURCES.get(data, data), licence=licence,
    )  # fmt: skip


def _table(metrics: dict | None) -> str:
    if metrics is None:
        return "This run was shared before it was evaluated: no numbers."
    rows = ["| metric | mean | 95 % interval | chance | shuffled | clips |", "|---|---|---|---|---|---|"]
    for name, entry in metrics["metrics"].items():
        if entry.get("mean") is not None:
            interval = "to".join(f" {x:.3f} " for x in entry.get("ci95") or []).strip()
            numbers = [_number(entry[key]) for key in ("chance", "shuffled")]
            cells = [f"`{name}`", _number(entry["mean"]), interval, *numbers, str(entry["n"])]
            rows.append(f"| {' | '.join(cells)} |")
    said = "Reconstructions of held-out clips against their stimuli. *Shuffled* compares each reconstruction "
    return f"{said}with the stimulus of another scene.\n\n" + "\n".join(rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"

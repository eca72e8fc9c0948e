"""Sharing a trained model: its folder with a model card, here or on the Hugging Face Hub."""

import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from metrics.report import interval, number
from support.files import save_folder, write_json, written_whole
from support.readers import damaged, read_json
from support.shared import HUB_ID, MEMORIES, PROJECT, write_memories, writers

METRICS = Path("eval", "metrics.json")
SOURCES = {
    "toy": "The toy world: rendered films and a simulated brain, made by a program. No person was recorded.",
    "cc2017": "cc2017, Wen et al. 2018 (doi 10.4231/R71Z42KK): films, and the fMRI of people who saw them.",
    "cinebrain": "CineBrain, Gao et al. 2025 (Hugging Face: Fudan-fMRI/CineBrain): a television series, "
    "and the fMRI of people who saw it.",
}
CODE_LICENCE = "The code and these weights are under the MIT licence."
DATA_LICENCE = (
    "The code is under the MIT licence. These weights are bound by the licences of the data that they were "
    "trained on, and of the decoder."
)


def save(model, folder: Path, place: str | None = None) -> None:
    """Writes the shared folder of an evaluate.CineNeuron, its card and its metrics. place: what the card
    loads it by, if not its folder. Raises ValueError where the folder holds something else."""
    present = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if present and MEMORIES not in present:
        raise damaged(folder, f"{len(present)} other files", "a new or an empty folder", "choose another")
    run = model.folder.parent if model.folder.name == "stage2" else model.folder
    evaluated = run / METRICS
    metrics = read_json(evaluated, keys={"metrics": dict}) if evaluated.is_file() else None
    (folder / "config.json").unlink(missing_ok=True)
    for name, write in writers(model).items():
        save_folder(folder / name, write)
    write_memories(folder, model)
    (folder / METRICS).unlink(missing_ok=True)  # of an earlier run
    if metrics:
        write_json(folder / METRICS, metrics)
    with written_whole(folder / "README.md") as part:
        model_card(model, place or folder.resolve().name, metrics).save(part)
    write_json(folder / "config.json", model.settings)


def push(model, repo_id: str, private: bool) -> str:
    """Uploads what `save` writes, as the user of `hf auth login`. Returns the commit's address."""
    api = HfApi()
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), repo.repo_id)
        return api.upload_folder(repo_id=repo.repo_id, folder_path=folder).commit_url


def model_card(model, place: str, metrics: dict | None) -> ModelCard:
    """The card, with front matter that the Hub can read. place: what it is loaded by."""
    settings = model.settings
    data, decoder = settings["data"], settings["decoder"]
    on_hub = re.fullmatch(HUB_ID, decoder) and not (PROJECT / decoder).exists()
    data_card = ModelCardData(
        tags=["fmri", "brain-decoding", "video-reconstruction", "cineneuron"],
        license="mit" if data == "toy" else "other",
        license_name=None if data == "toy" else "as-the-data",
        datasets=["Fudan-fMRI/CineBrain"] if data == "cinebrain" else None,
        base_model=decoder.partition("@")[0] if on_hub else None,
    )
    return ModelCard.from_template(
        data_card,
        template_path=Path(__file__).with_name("card.md"),
        place=place,
        data=data,
        subject=settings["subject"],
        voxels=model.brain_model.voxels,
        volumes=model.brain_model.volumes,
        size=", ".join(map(str, model.size)),
        rank=settings["lora_rank"],
        memories=len(model.lines),
        decoder=decoder,
        metrics=metrics_table(metrics),
        source=SOURCES.get(data, data),
        licence=CODE_LICENCE if data == "toy" else DATA_LICENCE,
    )


def metrics_table(metrics: dict | None) -> str:
    """metrics.json as a table in Markdown."""
    if metrics is None:
        return "This run was shared before it was evaluated: no numbers."
    rows = ["| metric | mean | 95 % interval | chance | shuffled | clips |", "|---|---|---|---|---|---|"]
    for name, entry in metrics["metrics"].items():
        if entry.get("mean") is not None:
            mean, chance, shuffled = (number(entry[key]) for key in ("mean", "chance", "shuffled"))
            ends = interval(entry.get("ci95"))
            rows.append(f"| `{name}` | {mean} | {ends} | {chance} | {shuffled} | {entry['n']} |")
    text = "Reconstructions of held-out clips against their stimuli. *Shuffled* compares each reconstruction "
    return text + "with the stimulus of another scene.\n\n" + "\n".join(rows)

"""What the pictures of extras/figures.py read of a run: its settings, its videos, which clips to show."""

import re
from pathlib import Path

import numpy as np

from brain_model import BrainModel
from data import Clips
from heads import Stage1Heads
from metrics.compare import read_metrics
from mixture_of_memories import MemoryPool, MixtureOfMemories, TopTextMemory
from prepare.facts import SECONDS
from support.files import written_whole
from support.pictures import spread
from support.readers import damaged, load_model, read_json, reading
from support.runs import run_folder
from support.shared import MEMORIES, read_memories
from support.videos import read_video

STAGE1_KEYS = {"data": str, "subject": int}
STAGE2_KEYS = {**STAGE1_KEYS, "frames": int, "height": int, "width": int, "stage1_config": dict}


def evaluation_of(run: Path) -> Path:
    """RUN/eval, or RUN itself where it is another evaluation, such as full-s0/eval-shuffled. That of a shared
    folder, such as toy/trained, stands in runs/."""
    if (run / MEMORIES).is_file():
        settings = read_json(run / "config.json", keys=STAGE1_KEYS)
        return run_folder(settings["data"], settings["subject"], run.name, 0) / "eval"
    return run if re.match(r"eval(?!.*-s\d+$)", run.name) else run / "eval"


class Run:
    """A folder runs/<data>/sub<S>/<NAME>-s<seed>, or an evaluation in it, by the config.json of its stage1 or
    stage2; or a shared folder, which is a stage2. Raises FileNotFoundError, naming the command that makes it,
    or ValueError where it is damaged."""

    def __init__(self, folder: Path, stage: str):
        self.evaluation = evaluation_of(folder)
        self.folder = self.evaluation.parent
        self.stage = folder if (folder / MEMORIES).is_file() else self.folder / stage
        file = self.stage / "config.json"
        with reading(file, advice=f"RUN is runs/<data>/sub<S>/<NAME>-s<seed> after python train_{stage}.py"):
            settings = read_json(file, keys=STAGE1_KEYS if stage == "stage1" else STAGE2_KEYS)
            if settings["data"] not in SECONDS:
                raise damaged(file, f"data = {settings['data'][:60]!r}", f"one of {', '.join(SECONDS)}")
        self.settings = settings
        self.data, self.subject = settings["data"], settings["subject"]
        self.rois = settings.get("stage1_config", settings).get("rois")

    def parts(self) -> tuple:
        """What remembers: Brain Model, heads, Mixture-of-Memories, its pool; and of each memory its line of
        clips.jsonl. Raises ValueError for a run without memories."""
        if not self.settings.get("integration", True):
            raise ValueError(f"{self.folder} has no memories (--no-integration): name a run that has")
        kind = MixtureOfMemories if self.settings.get("mom", True) else TopTextMemory
        with reading(self.stage, advice="python train_stage2.py makes it"):
            brain_model = load_model(BrainModel, self.stage / "brain_model").eval()
            heads = load_model(Stage1Heads, self.stage / "heads").eval()
            mom = load_model(kind, self.stage / "mixture_of_memories").eval()
            e, captions, _, lines = read_memories(self.stage, brain_model.to_f_c.out_features)
        return brain_model, heads, mom, MemoryPool(e, captions), lines

    def test_clips(self) -> Clips:
        return Clips(self.data, self.subject, "test", self.rois)


def judged(evaluation: Path) -> dict[str, dict[str, str]]:
    """What the classifiers read in each reconstruction, {NNNN.mp4: {attribute: value}}; {} where none did."""
    file = evaluation / "recognised.json"
    if not file.is_file():
        return {}
    with reading(file, advice="delete it; python evaluate.py"):
        values = read_json(file, keys={"videos": list, "seen": dict})
        rows = zip(values["videos"], *values["seen"].values(), strict=True)
        return {video: dict(zip(values["seen"], row, strict=True)) for video, *row in rows}


def names_of(runs: list[Path]) -> list[str]:
    """The runs' folders, with the subject's where two are called alike, or full-s0/eval-shuffled."""
    folders = [evaluation_of(run).parent for run in runs]
    names = [
        run.name if (run / MEMORIES).is_file() else str(run.relative_to(folder.parent))
        for run, folder in zip(runs, folders, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{folder.parent.name}/{name}"
        for name, folder in zip(names, folders, strict=True)
    ]


def choose_clips(run: Path, clips: list[int] | None, n: int) -> dict[int, str]:
    """Numbers of test clips, each with the name of its group (shown in training, or not): those asked for, or
    `n` of those reconstructed, chosen by `spread`. Raises ValueError where one of them was not,
    FileNotFoundError where none was."""
    run = evaluation_of(run)
    reconstructed = sorted(int(file.stem) for file in (run / "recon").glob("[0-9]*.mp4"))
    if not reconstructed:
        raise FileNotFoundError(f"{run}/recon holds no video: python evaluate.py comes first")
    file, first, last = run / "metrics.json", reconstructed[0], reconstructed[-1]
    names = [f"{clip:04d}" for clip in range(last + 1)]
    groups = read_metrics(file).get("groups", {}) if file.is_file() else {}
    members = {name: np.isin(names, of["clips"]) for name, of in groups.items()}
    if clips is None:
        clips = spread(reconstructed, n, members)
    if missing := sorted(set(clips) - set(reconstructed)):
        range_of_run = f"{len(reconstructed)} clips of {first} to {last} were reconstructed in {run}"
        raise ValueError(f"--clips {', '.join(map(str, missing))}: {range_of_run}: choose of these")
    return {clip: next((name for name in members if members[name][clip]), "") for clip in clips}


def caption_of(line: dict, group: str) -> str:
    """Of a line of clips.jsonl, with the group of the clip."""
    return f"{line['caption']} [{group}]" if group else line["caption"]


def video_file(run: Path, kind: str, clip: int) -> Path:
    """kind: gt or recon. Raises FileNotFoundError."""
    file = evaluation_of(run) / kind / f"{clip:04d}.mp4"
    if not file.is_file():
        advice = "evaluate the same clips of each run, or choose others with --clips"
        raise FileNotFoundError(f"{file} is not there: {advice}")
    return file


def frames_of(run: Path, kind: str, clip: int) -> np.ndarray:
    """The video of a clip, uint8 (F, H, W, 3)."""
    return read_video(video_file(run, kind, clip)).frames


def save_figure(out: Path, figure) -> None:
    """And close it."""
    from matplotlib import pyplot as plt

    with written_whole(out) as part:
        figure.savefig(part, dpi=130, facecolor="white")
    plt.close(figure)

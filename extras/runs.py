"""What the pictures of extras/figures.py read of a run: its settings, its videos, which clips to show."""

from pathlib import Path

import numpy as np

from metrics.compare import read_metrics
from prepare.facts import SECONDS
from support.files import written_whole
from support.pictures import spread
from support.readers import damaged, read_json
from support.videos import read_video


def settings_of(run: Path, stage: str) -> dict:
    """The run's config.json of stage1 or stage2. Raises FileNotFoundError, naming the command that makes it,
    or ValueError where it is damaged."""
    file = run / stage / "config.json"
    keys = {"data": str, "subject": int}
    keys |= {"frames": int, "height": int, "width": int, "stage1_config": dict} if stage == "stage2" else {}
    mend = f"RUN is runs/<data>/sub<K>/<NAME>-s<seed> after python train_{stage}.py"
    settings = read_json(file, keys=keys, mend=mend)
    if settings["data"] not in SECONDS:
        raise damaged(file, f"data = {settings['data'][:60]!r}", f"one of {', '.join(SECONDS)}", mend)
    return settings


def names_of(runs: list[Path]) -> list[str]:
    """The runs' folders, with the subject's where two are called alike."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.parent.name}/{run.name}" for run in runs]


def groups_of(run: Path) -> dict[str, set[int]]:
    """The clips whose like was seen in training and the others, by number, as evaluate.py tells them apart;
    none where it did not."""
    file = run / "eval" / "metrics.json"
    groups = read_metrics(file).get("groups", {}) if file.is_file() else {}
    named = {}
    for name, of in groups.items():
        named[name] = {int(clip) for clip in of["clips"] if clip.isdecimal()}
    return named


def chosen(run: Path, clips: list[int] | None, rows: int) -> dict[int, str]:
    """Numbers of test clips, each with the name of its group: those asked for, or `rows` of those
    reconstructed, chosen by `spread`. Raises ValueError where one of them was not, FileNotFoundError where
    none was."""
    files = (run / "eval" / "recon").glob("[0-9]*.mp4")
    made = sorted(int(file.stem) for file in files if file.stem.isdecimal())
    if not made:
        raise FileNotFoundError(f"{run}/eval/recon holds no video: python evaluate.py comes first")
    groups = groups_of(run)
    if clips is None:
        inside = {name: np.isin(np.arange(made[-1] + 1), [*of]) for name, of in groups.items()}
        clips = spread(made, rows, inside)
    if absent := sorted(set(clips) - set(made)):
        of_run = f"{len(made)} clips of {made[0]} to {made[-1]} were reconstructed in {run}/eval"
        raise ValueError(f"--clips {', '.join(map(str, absent))}: {of_run}: choose of these")
    return {clip: next((name for name, of in groups.items() if clip in of), "") for clip in clips}


def video_file(run: Path, kind: str, clip: int) -> Path:
    """kind: gt or recon. Raises FileNotFoundError."""
    file = run / "eval" / kind / f"{clip:04d}.mp4"
    if not file.is_file():
        mend = "evaluate the same clips of each run, or choose others with --clips"
        raise FileNotFoundError(f"{file} is not there: {mend}")
    return file


def frames_of(run: Path, kind: str, clip: int) -> np.ndarray:
    """The video of a clip, uint8 (F, H, W, 3)."""
    return read_video(video_file(run, kind, clip)).frames


def save(out: Path, figure) -> None:
    with written_whole(out) as part:
        figure.savefig(part, dpi=130, facecolor="white")

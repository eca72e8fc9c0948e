"""The options of evaluate.py."""

import os
from dataclasses import dataclass

from metrics.table import TOY, Judging, asked
from prepare.facts import CC2017_FPS, DATASETS, SECONDS
from support.options import check_together, option, parse as parse_options, settings_of
from support.training import DEVICES


@dataclass
class Config(Judging):
    """What is not given here (decoder, size of the videos, K ...) is as the run was trained."""

    data: str = option("toy", "toy, cc2017 or cinebrain (with --pairs cc2017, for its weights)")
    subject: int = option(1, "number of the subject", least=1)
    run: str = option("full", "name of the run, or a folder or name on the Hub of a finished one")
    seed: int = option(0, "of the run, and of the noise that the videos start from", least=0)
    shuffle: bool = option(False, "the control: reconstruct each clip from the fMRI of another scene")
    stage2: bool = option(True, "without: the decoder as it came draws the best memory's caption")
    fmri: str | None = option(None, "one recording, .npy (T, N) or (N,), in place of the test set")
    pairs: str | None = option(None, "score the videos DIR/METHOD/NAME.* against DIR/gt/NAME.*")
    split: bool = option(False, "with --pairs: a video shows stimulus (left) and reconstruction side by side")
    skip_bad: bool = option(False, "with --pairs: what cannot be read or has no partner is a missing value")
    frames: str | None = option(
        None,
        "with --pairs: motion at common times of all METHODs (default), or own",
        choices=("common", "own"),
    )
    compare: list[str] = option(
        [], "runs (NAME: all subjects and seeds, or those given; NAME/eval-shuffled) or folders"
    )
    out: str | None = option(None, "with --fmri the video (out.mp4), with --pairs the folder (DIR/metrics)")
    clips: int | None = option(None, "so many, spread over the test set (default: all)", least=1)
    batch_size: int = option(1, "clips that are in the decoder at once", least=1)
    device: str | None = option(None, "cpu, cuda or mps; none: cuda, else cpu", choices=DEVICES)
    processes: int = option(1, "on a CPU, a thread each: for small networks", least=1)
    steps: int | None = option(None, "of sampling (default: the run's)", least=1, most=1000)
    guidance: float | None = option(None, "classifier-free guidance (default: the run's)", least=0)
    stimuli: str | None = option(None, "folder of the films (default: raw/stimuli in data/<data>)")
    seconds: float = option(SECONDS["cc2017"], "length of a clip", above=0)
    fps: float = option(CC2017_FPS, "frames a second of the videos", above=0, most=1000)


PRESETS = {name: dict(seconds=row.seconds, fps=row.fps) for name, row in DATASETS.items()}
PRESETS["toy"] |= dict(batch_size=16, processes=min(4, os.cpu_count() or 1)) | TOY
PRESETS["cinebrain"] |= dict(size="native")
MODES = ("fmri", "pairs", "compare")  # in place of a run's held-out clips
UNUSED = {  # option: the modes that do not use it
    "fmri": ("pairs", "compare"),
    "pairs": ("compare",),
    "steps": ("pairs", "compare"),
    "guidance": ("pairs", "compare"),
    "device": ("compare",),
    "shuffle": MODES,
    "no-stage2": ("pairs", "compare"),
    "clips": MODES,
    "stimuli": MODES,
}
NEEDED = {"split": ("pairs",), "skip_bad": ("pairs",), "frames": ("pairs",), "out": ("fmri", "pairs")}


def parse(arguments: list[str], doc: str) -> Config:
    """The command line over the dataset's preset: cc2017's, for its weights, of --pairs without --data."""
    given = {word.split("=")[0] for word in arguments}
    if "--pairs" in given and "--data" not in given:
        arguments = [*arguments, "--data", "cc2017"]
    config = parse_options(Config, PRESETS, doc, "evaluate.py", arguments)
    for name in {"subject", "seed"} if config.compare else ():
        if f"--{name}" not in given:
            setattr(config, name, None)  # all of them
    check_together(config, UNUSED, NEEDED, settings_of(Config(**PRESETS[config.data])))
    asked(config)  # --metrics
    return config

"""The command line of data.py: a release of recordings and films -> data/<name>/ (§4.1).

Modules that load open_clip or diffusers are imported where something is made, so that --help is quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prepare import facts
from prepare.release import Release
from support.files import MissingData
from support.options import check_together, option, parse
from support.readers import advising, reading
from support.runs import FolderLock

PRESETS = {
    name: dict(train_segments=row.train[0], test_segments=row.test[0], window=row.window)
    for name, row in facts.DATASETS.items()
} | {"toy": {}}
DELAYS = f"cc2017: {facts.CC2017_DELAY}, of 2 s; cinebrain: {facts.CINEBRAIN_DELAY}, of 0.8 s"


@dataclass
class Config:
    """The options of data.py. Its first word is the value of --data."""

    data: str | None = option(None, f"{', '.join(PRESETS)} (train_stage1.py prepares toy by itself)")
    subject: int = option(1, "whose recordings; each subject of the toy world has films of its own")
    raw: Path | None = option(None, "folder of the release, as its page in docs/ shows it")
    fmri_release: Path | None = option(None, "cc2017: the NeuroClips release (.pt files); --raw: its films")
    delay: int | None = option(None, f"of the response, in volumes ({DELAYS}; none if preprocessed)", least=0)
    window: int = option(1, "T, volumes a clip", least=1, most=facts.SEGMENT_VOLUMES)
    train_segments: int = option(18, "only so many, from the first on", least=1)
    test_segments: int = option(2, "likewise", least=1)
    allow_duplicate_subject: bool = option(False, "go on where another subject has the same recordings")
    captions: list[Path] = option([], "a file, or the training and the test list (default: the release's)")
    caption_sentences: int | None = option(
        None, "only so many reach the text encoders; CLIP sees the first 77 tokens of them", least=1
    )
    clip: str = option(facts.CLIP, "open_clip MODEL/PRETRAINED or local-dir:FOLDER")
    viclip: str = option(facts.VICLIP_HUB, "a folder, the published .pth, or the name on the Hub")
    decoder: str | None = option(
        None, "also what stage 2 needs, for this text-to-video model (Wan-AI/Wan2.1-T2V-1.3B-Diffusers)"
    )
    frames: int | None = option(None, "of the decoder's videos (default: as train_stage2.py)", least=1)
    height: int | None = option(None, "likewise", least=1)
    width: int | None = option(None, "likewise", least=1)

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height, width of the decoder's videos."""
        options = self.frames, self.height, self.width
        return tuple(given or usual for given, usual in zip(options, facts.VIDEO[self.data], strict=True))

    @property
    def folders(self) -> list[Path]:
        """Those of the release."""
        return [folder for folder in (self.fmri_release, self.raw) if folder]


UNUSED = dict.fromkeys(PRESETS, {"fmri_release"}) | {"cc2017": set()}
UNUSED["toy"] = {f.name for f in fields(Config)} - {"data", "subject"}


def read(argv: Sequence[str], doc: str | None = __doc__) -> Config:
    """The options. Raises ValueError, naming the option, for what the dataset does not have."""
    words = [*argv]
    if words and not words[0].startswith("-"):
        words.insert(0, "--data")
    config = parse(Config, PRESETS, doc, "data.py", words)
    name, n = config.data, len(config.captions)
    if name is None:
        raise ValueError(f"which dataset? wanted python data.py {' or '.join(PRESETS)}")
    facts.check_subject(name, config.subject)
    for key in sorted(UNUSED.get(name, ())):
        if getattr(config, key) != getattr(Config(), key):
            raise ValueError(f"--{key}: {name} does not use it")
    check_together(config, {}, dict.fromkeys(("frames", "height", "width"), ["decoder"]))
    for split, (most, _) in facts.SIZES[name].items():
        segments = getattr(config, f"{split}_segments")
        if segments > most:
            raise ValueError(f"--{split}_segments {segments}: {name} has {most}")
    if n > 2:
        raise ValueError(f"--captions: {n} files are given, wanted one, or the training and the test list")
    return config


def check_release(config: Config) -> None:
    """Raises MissingData where no release is given, FileNotFoundError for a folder that is not there."""
    name = config.data
    if name != "toy" and not config.folders:
        either = ", --fmri-release (NeuroClips release), or both" if name == "cc2017" else ""
        raise MissingData(f"give --raw (the release){either}\n\n{facts.guide(name, config.subject)}")
    for folder in config.folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there: give the folder that you unpacked")


def open_release(config: Config) -> Release:
    """The release that the options name."""
    neuroclips = "NeuroClipsWithFilms" if config.raw else "NeuroClipsRelease"
    cc2017 = f"prepare.cc2017.{neuroclips if config.fmri_release else 'PurdueRelease'}"
    module, _, kind = (facts.DATASETS[config.data].release or cc2017).rpartition(".")
    kind = getattr(import_module(module), kind)
    with advising("correct it, or take it from its source again"):
        return kind(
            *config.folders, config.subject, config.delay, config.train_segments, config.test_segments
        )


def prepare(config: Config, root: Path = Path("data")) -> None:
    """Recordings, stimuli and, where asked for, what the video decoder needs; then the list of the arrays."""
    from prepare.copies import prepare_copies, prepare_recorded
    from prepare.fmri import prepare_fmri, refuse_twins
    from prepare.stimuli import describe_clips, prepare_stimuli

    source, sentences = open_release(config), config.caption_sentences
    folder = root / config.data / f"sub{config.subject}"
    stimuli = facts.stimuli_folder(config.data, config.subject, root)
    lists = config.captions
    captions = {"train": lists[0], "test": lists[-1]} if lists else source.captions
    source.check()
    for split in source.splits:  # what the captions lack is an error now, not after the recordings
        describe_clips(source, split, captions[split])
    encoded = all((stimuli / split / "e_act.npy").is_file() for split in source.splits)
    if config.viclip.endswith(".pth") and not encoded and not Path(config.viclip).is_file():
        raise FileNotFoundError(f"--viclip {config.viclip} is not there: docs/cc2017.md says where it is had")
    if config.decoder:
        from prepare.decoder import check_decoder, prepare_decoder

        check_decoder(config.decoder, config.size)
    if not config.allow_duplicate_subject:
        refuse_twins(source, folder)
    prepare_fmri(source, folder, source.recipe | {"window": config.window}, config.window)
    prepare_recorded(folder)
    prepare_stimuli(source, stimuli, captions, config.clip, config.viclip, sentences=sentences)
    prepare_copies(stimuli)
    if config.decoder:
        prepare_decoder(source, stimuli, config.decoder, config.size, sentences)
    for file in sorted([*folder.rglob("*.npy"), *stimuli.rglob("*.npy")]):
        with reading(file, "a whole .npy file"):
            array = np.load(file, mmap_mode="r")
        tqdm.write(f"{file}  {array.dtype} {array.shape}  {file.stat().st_size / 1e6:,.1f} MB")
    tqdm.write(f"next: python train_stage1.py --data {config.data} --subject {config.subject}")


def main(argv: Sequence[str], doc: str | None = __doc__) -> None:
    """python data.py ARGV: prepare a subject of a dataset below data/, and print what is there then."""
    config = read(argv, doc)
    check_release(config)
    if config.data == "toy":
        from toy.release import prepare_toy

        prepare_toy(subject=config.subject)
    else:
        with FolderLock(Path("data") / config.data):  # subjects share its stimuli
            prepare(config)

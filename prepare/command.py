"""The command line of data.py: a release of recordings and films -> data/<name>/ (§4.1).

Modules that load open_clip or diffusers are imported where something is made, so that --help is quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm

from prepare.facts import (
    CC2017_DELAY,
    CINEBRAIN_DELAY,
    CLIP,
    CLIP_VOLUMES,
    MISSING,
    SEGMENT_VOLUMES,
    SIZES,
    VICLIP_HUB,
    VIDEO,
    check_subject,
    stimuli_folder,
)
from prepare.release import Release
from support.files import MissingData
from support.options import option, parse
from support.readers import read_array

PRESETS = {"toy": {}, "cc2017": {"test_segments": 5}, "cinebrain": {"window": CLIP_VOLUMES}}
DELAYS = f"cc2017: {CC2017_DELAY}, of 2 s each; cinebrain: {CINEBRAIN_DELAY}, of 0.8 s each"


@dataclass
class Config:
    """The options of data.py; the first word of its command line is --data."""

    data: str | None = option(None, "toy (train_stage1.py prepares it by itself), cc2017 or cinebrain")
    subject: int = option(1, "whose recordings; each subject of the toy world has films of its own")
    raw: Path | None = option(None, "folder of the release, as docs/cc2017.md and docs/cinebrain.md show it")
    fmri_release: Path | None = option(
        None, "cc2017: recordings of the NeuroClips release (subj01_train_fmri.pt ...); --raw: its films"
    )
    delay: int | None = option(
        None, f"haemodynamic delay in volumes ({DELAYS}; none where they come preprocessed)", least=0
    )
    window: int = option(1, "T, volumes a clip", least=1, most=SEGMENT_VOLUMES)
    train_segments: int = option(18, "only so many, from the first on", least=1)
    test_segments: int = option(2, "likewise", least=1)
    allow_duplicate_subject: bool = option(False, "go on where another subject has the same recordings")
    captions: list[Path] = option(
        [], "one file of captions, or the training and the test list (default: the release's)"
    )
    caption_sentences: int | None = option(
        None,
        "CLIP and the decoder's text encoder get the first N sentences of a caption (default: all); "
        "CLIP sees the first 77 tokens of what it gets",
        least=1,
    )
    clip: str = option(CLIP, "open_clip MODEL/PRETRAINED or local-dir:FOLDER")
    viclip: str = option(VICLIP_HUB, "a folder, the published .pth, or the name on the Hub")
    decoder: str | None = option(
        None,
        "also latents and text tokens for this text-to-video model, for stage 2 "
        "(Wan-AI/Wan2.1-T2V-1.3B-Diffusers)",
    )

    @property
    def folders(self) -> list[Path]:
        """Those of the release that are given."""
        return [folder for folder in (self.fmri_release, self.raw) if folder]


UNUSED = {"toy": {f.name for f in fields(Config)} - {"data", "subject"}, "cinebrain": {"fmri_release"}}


def check(config: Config) -> None:
    """Raises ValueError, naming the option, for what the dataset does not have, MissingData for no release,
    FileNotFoundError for a folder that is not there."""
    name, default = config.data, Config()
    if name is None:
        raise ValueError(f"which dataset? wanted python data.py {' or '.join(PRESETS)}")
    check_subject(name, config.subject)
    for option_name in sorted(UNUSED.get(name, ())):
        if getattr(config, option_name) != getattr(default, option_name):
            raise ValueError(f"--{option_name}: {name} does not use it")
    for split, (n, _) in SIZES[name].items():
        segments = getattr(config, f"{split}_segments")
        if segments > n:
            raise ValueError(f"--{split}_segments {segments}: {name} has {n}")
    if len(config.captions) > 2:
        raise ValueError(
            "--captions takes one file, or the training and the test list; "
            f"{len(config.captions)} files are given"
        )
    if name != "toy" and not config.folders:
        either = ", --fmri-release (NeuroClips release), or both" if name == "cc2017" else ""
        guide = MISSING[name].format(subject=config.subject)
        raise MissingData(f"give --raw (the release){either}\n\n{guide}")
    for folder in config.folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there: give the folder of what you downloaded and unpacked"
            )


# ---------------------------------------------------------------- python data.py ...


def open_release(config: Config) -> Release:
    """The release that is asked for."""
    from prepare.cc2017 import NeuroClipsRelease, NeuroClipsWithFilms, PurdueRelease
    from prepare.cinebrain import CineBrainRelease

    if config.data == "cinebrain":
        kind = CineBrainRelease
    elif config.fmri_release is None:
        kind = PurdueRelease
    else:
        kind = NeuroClipsWithFilms if config.raw else NeuroClipsRelease
    return kind(*config.folders, config.subject, config.delay, config.train_segments, config.test_segments)


def main(argv: Sequence[str], doc: str | None = __doc__) -> None:
    """python data.py ARGV: prepare a subject of a dataset below data/, and print what is there then."""
    words = [*argv]
    if words and not words[0].startswith("-"):
        words.insert(0, "--data")
    config = parse(Config, PRESETS, doc, "data.py", words)
    check(config)
    if config.data == "toy":
        prepare_toy(subject=config.subject)
    else:
        prepare(config)


def prepare(config: Config, root: Path = Path("data")) -> None:
    """Recordings, stimuli and, where asked for, what the video decoder needs; then the list of the arrays."""
    from prepare.copies import prepare_copies, prepare_recorded
    from prepare.fmri import prepare_fmri, refuse_twins
    from prepare.stimuli import describe_clips, prepare_stimuli

    source, sentences = open_release(config), config.caption_sentences
    folder = root / config.data / f"sub{config.subject}"
    stimuli = stimuli_folder(config.data, config.subject, root)
    captions = source.captions
    if config.captions:
        captions = {"train": config.captions[0], "test": config.captions[-1]}
    source.check()
    for split in source.splits:  # what the captions lack is told now, not after the recordings
        describe_clips(source, split, captions[split])
    encoded = all((stimuli / split / "e_act.npy").is_file() for split in source.splits)
    if config.viclip.endswith(".pth") and not encoded and not Path(config.viclip).is_file():
        raise FileNotFoundError(
            f"--viclip {config.viclip} is not there: docs/cc2017.md says how to download it"
        )
    if not config.allow_duplicate_subject:
        refuse_twins(source, folder)
    prepare_fmri(source, folder, source.recipe | {"window": config.window}, config.window)
    prepare_recorded(folder)
    prepare_stimuli(source, stimuli, captions, config.clip, config.viclip, sentences=sentences)
    prepare_copies(stimuli)
    if config.decoder:
        from prepare.decoder import prepare_decoder

        prepare_decoder(source, stimuli, config.decoder, VIDEO[config.data], sentences)
    for file in sorted([*folder.rglob("*.npy"), *stimuli.rglob("*.npy")]):
        array = read_array(file, "fiu")
        tqdm.write(f"{file}  {array.dtype} {array.shape}  {file.stat().st_size / 1e6:,.1f} MB")
    tqdm.write(f"next: python train_stage1.py --data {config.data} --subject {config.subject}")


# ---- toy, to go
TOY = Path(__file__).parents[1] / "toy"
from prepare.facts import decoder_recipes, raw_folder
from support.files import is_made_by


def prepare_toy(
    root: Path = Path("data"), decoder: str | None = None, size: tuple[int, int, int] | None = None,
    subject: int = 1,
) -> None:  # fmt: skip
    """Make the toy world and prepare it as a real release, in about a minute; what is whole is kept. Each
    subject has voxels and films of its own.

    With a decoder also its latents of videos of `size` = frames, height, width, and its text tokens. Raises
    ValueError where these were made by another decoder or of another size.
    """
    check_subject("toy", subject)
    folder, raw = root / "toy" / f"sub{subject}", raw_folder("toy", subject, root)
    stimuli = stimuli_folder("toy", subject, root)
    wanted = [folder / "voxels.npz"]
    for split in ("train", "test"):
        names = ("clips.jsonl", "categories.npy", "e_txt.npy", "e_img.npy", "e_act.npy")
        wanted += [stimuli / split / name for name in names]
    recipe = toy_recipe(subject)
    recordings = [is_made_by(folder / split / "fmri.npy", recipe) for split in ("train", "test")]
    if not all(recordings) or not all(file.is_file() for file in wanted):
        from prepare.fmri import prepare_fmri
        from prepare.stimuli import prepare_stimuli
        from toy.release import ToyRelease, make_toy

        make_toy(raw, seed=subject - 1)
        source = ToyRelease(raw, subject)
        prepare_fmri(source, folder, recipe)
        captions = dict.fromkeys(source.splits, raw / "captions.jsonl")
        prepare_stimuli(source, stimuli, captions, f"local-dir:{TOY / 'clip'}", str(TOY / "viclip"))
    if decoder is not None and not _decoder_is_prepared(stimuli, decoder, size or VIDEO["toy"]):
        from prepare.decoder import prepare_decoder
        from toy.release import ToyRelease, make_toy

        make_toy(raw, seed=subject - 1)
        prepare_decoder(ToyRelease(raw, subject), stimuli, decoder, size or VIDEO["toy"])


def toy_recipe(subject: int) -> dict:
    """What makes fmri.npy of the toy world. world: the version of its films and recordings."""
    return {"release": "toy", "subject": subject, "delay": 2, "window": 1, "world": 2}


def _decoder_is_prepared(stimuli: Path, decoder: str, size: tuple[int, int, int]) -> bool:
    latents, text = decoder_recipes(decoder, size)
    folder = Path(decoder).name
    made = [is_made_by(stimuli / folder / "empty_prompt.npy", text)]
    for split in ("train", "test"):
        made.append(is_made_by(stimuli / split / folder / "latents.npy", latents))
        made += [
            is_made_by(stimuli / split / folder / f"text_{name}.npy", text) for name in ("tokens", "offsets")
        ]
    return all(made)

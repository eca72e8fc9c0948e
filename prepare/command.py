"""The command line of data.py, and the toy world, which the training scripts make where it is not there.

Modules that load open_clip or diffusers are imported where something is made, so that a training script whose
data is prepared starts without them.
"""

import argparse
from collections.abc import Callable, Sequence
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
    SUBJECTS,
    VICLIP_HUB,
    VIDEO,
    check_subject,
    decoder_recipes,
    raw_folder,
    stimuli_folder,
)
from prepare.release import Release
from support.files import is_made_by
from support.options import Parser
from support.readers import read_array

TOY = Path(__file__).parents[1] / "toy"
DELAYS = {"cc2017": f"{CC2017_DELAY}, of 2 s each", "cinebrain": f"{CINEBRAIN_DELAY}, of 0.8 s each"}


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
        prepare_decoder("toy", ToyRelease(raw, subject), root, decoder, *(size or VIDEO["toy"]), subject)


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


# ---------------------------------------------------------------- options


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number of at least `least`, and at most `most`."""

    def number(text: str) -> int:
        wanted = f"a whole number of at least {least}" + ("" if most is None else f" and at most {most}")
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{text}: wanted {wanted}")
        return value

    return number


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    parser = Parser("data.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    text = "make and prepare the toy world (train_stage1.py does it by itself)"
    toy = commands.add_parser("toy", help=text, allow_abbrev=False)
    _add_subject(toy, "toy", "who has voxels and films of its own")
    for name, volumes in (("cc2017", 1), ("cinebrain", CLIP_VOLUMES)):
        command = commands.add_parser(name, help=f"prepare a subject of {name}", allow_abbrev=False)
        _add_recordings(command, name, volumes)
        _add_stimuli(command)
    return parser


def _add_subject(parser: argparse.ArgumentParser, name: str, text: str) -> None:
    numbers = range(1, SUBJECTS[name] + 1)
    parser.add_argument("--subject", type=int, choices=numbers, default=1, help=f"{text} (default: 1)")


def _add_recordings(parser: argparse.ArgumentParser, name: str, volumes: int) -> None:
    add = parser.add_argument
    text = "folder of the release, as docs/cc2017.md and docs/cinebrain.md show it"
    add("--raw", type=Path, required=name == "cinebrain", help=text)
    if name == "cc2017":
        text = "recordings of the NeuroClips release (subj01_train_fmri.pt ...); --raw: its films"
        add("--fmri-release", type=Path, help=text)
    _add_subject(parser, name, "whose recordings")
    text = f"haemodynamic delay in volumes (default: {DELAYS[name]}; none where they come preprocessed)"
    add("--delay", type=whole_number(0), help=text)
    text = f"T, volumes a clip (default: {volumes})"
    add("--window", type=whole_number(1, SEGMENT_VOLUMES), default=volumes, help=text)
    for split, (n, _) in SIZES[name].items():
        text = f"only so many, from the first on (default: {n})"
        add(f"--{split}-segments", type=whole_number(1, n), default=n, help=text)
    text = "go on where another subject has the same recordings"
    add("--allow-duplicate-subject", action="store_true", help=text)


def _add_stimuli(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "one file of captions, or the training and the test list (default: the release's)"
    add("--captions", type=Path, nargs="+", help=text)
    text = "CLIP and the decoder's text encoder get the first N sentences of a caption (default: all); "
    text += "CLIP sees the first 77 tokens of what it gets"
    add("--caption-sentences", type=whole_number(1), metavar="N", help=text)
    add("--clip", default=CLIP, help=f"open_clip MODEL/PRETRAINED or local-dir:FOLDER (default: {CLIP})")
    text = f"a folder, the published .pth, or the name on the Hub (default: {VICLIP_HUB})"
    add("--viclip", default=VICLIP_HUB, help=text)
    text = "also latents and text tokens for this text-to-video model, for stage 2 "
    add("--decoder", help=text + "(Wan-AI/Wan2.1-T2V-1.3B-Diffusers)")


# ---------------------------------------------------------------- python data.py ...


def open_release(args: argparse.Namespace) -> tuple[Release, list[Path], int | None]:
    """The release that is asked for, its captions, and the delay; None: recordings are taken as they are."""
    segments = {"train_segments": args.train_segments, "test_segments": args.test_segments}
    if args.name == "cinebrain":
        from prepare.cinebrain import CineBrainRelease

        brain = CineBrainRelease(args.raw, args.subject, args.delay, **segments)
        captions = [args.raw / "captions-qwen-2.5-vl-7b.json"]
        return brain, captions, brain.delay if brain.cifti else None
    if args.name != "cc2017":
        raise ValueError(f"{args.name}: no release of this name")
    from prepare.cc2017 import NeuroClipsRelease, NeuroClipsWithFilms, PurdueRelease

    if not args.fmri_release:
        purdue = PurdueRelease(args.raw, args.subject, args.delay, **segments)
        return purdue, [args.raw / "captions.jsonl"], purdue.delay
    places = [args.fmri_release, *([args.raw] if args.raw else [])]
    kind = NeuroClipsWithFilms if args.raw else NeuroClipsRelease
    neuroclips = kind(*places, args.subject, args.delay, **segments)
    captions = [args.fmri_release / f"GT_{split}_caption.pt" for split in neuroclips.splits]
    return neuroclips, captions, neuroclips.delay


def main(argv: Sequence[str] | None = None, doc: str | None = __doc__) -> None:
    """python data.py ARGV: prepare a subject of a dataset below data/, and print what is there then."""
    parser = parser_of(doc)
    args, root = parser.parse_args(argv), Path("data")
    if args.name == "toy":
        return prepare_toy(root, subject=args.subject)
    if args.captions and len(args.captions) > 2:
        n = len(args.captions)
        parser.error(f"--captions takes one file, or the training and the test list; {n} files are given")
    if args.name == "cc2017" and args.raw is None and args.fmri_release is None:
        guide = MISSING["cc2017"].format(subject=args.subject)
        said = "error: give --raw (Purdue release), --fmri-release (NeuroClips release), or both"
        parser.exit(2, f"{said}\n\n{guide}".rstrip() + "\n")
    for folder in (args.raw, getattr(args, "fmri_release", None)):
        if folder and not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there: give the folder of what you downloaded and unpacked"
            )
    source, captions, delay = open_release(args)
    captions = args.captions or captions
    prepare(source, root, args, {"train": captions[0], "test": captions[-1]}, delay)


def prepare(
    source: Release, root: Path, args: argparse.Namespace, captions: dict[str, Path], delay: int | None
) -> None:
    """Recordings, stimuli and, where asked for, what the video decoder needs; then the list of the arrays."""
    from prepare.fmri import prepare_fmri, refuse_twins
    from prepare.stimuli import describe_clips, prepare_stimuli

    folder, stimuli = root / args.name / f"sub{args.subject}", stimuli_folder(args.name, args.subject, root)
    source.check()
    for split in source.splits:  # what the captions lack is told now, not after the recordings
        describe_clips(source, split, captions[split])
    encoded = all((stimuli / split / "e_act.npy").is_file() for split in source.splits)
    if args.viclip.endswith(".pth") and not encoded and not Path(args.viclip).is_file():
        raise FileNotFoundError(
            f"--viclip {args.viclip} is not there: docs/cc2017.md says how to download it"
        )
    if not args.allow_duplicate_subject:
        refuse_twins(source, folder)
    recipe = {
        "release": source.name,
        "subject": args.subject,
        "delay": delay,
        "window": args.window,
    }
    if args.name == "cinebrain" and delay is None:
        recipe["recordings"] = "preprocessed volumes"
    prepare_fmri(source, folder, recipe, args.window)
    sentences = args.caption_sentences
    prepare_stimuli(source, stimuli, captions, args.clip, args.viclip, sentences=sentences)
    if args.decoder:
        from prepare.decoder import prepare_decoder

        size = VIDEO[args.name]
        prepare_decoder(args.name, source, root, args.decoder, *size, args.subject, sentences)
    for file in sorted([*folder.rglob("*.npy"), *stimuli.rglob("*.npy")]):
        array = read_array(file, "fiu")
        tqdm.write(f"{file}  {array.dtype} {array.shape}  {file.stat().st_size / 1e6:,.1f} MB")
    tqdm.write(f"next: python train_stage1.py --data {args.name} --subject {args.subject}")

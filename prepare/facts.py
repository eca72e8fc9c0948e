"""Numbers and names of the datasets, as published (§4.1), and where each dataset is had.

cc2017      Wen et al. 2018: doi 10.4231/R7SF2TCW, a series of one archive a subject and one of the stimuli
CineBrain   Gao et al. 2025: Hugging Face Fudan-fMRI/CineBrain
toy         toy/world.py, toy/subject.py
"""

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import try_to_load_from_cache

from support.files import MissingData, find_weights, is_made_by, read_manifest
from support.readers import FileFault, damaged

# ---------------------------------------------------------------- clips

SCENE_CLIPS = 15  # clips of a segment this near in time count as one scene

# cc2017: a volume of 2 s is a clip, and a segment lasts 8 minutes
SEGMENT_VOLUMES, CC2017_TR, CC2017_DELAY, CC2017_FPS = 240, 2.0, 2, 30.0
# CineBrain: 18 minutes an episode, in clips of 4 s, of five volumes each
EPISODE_CLIPS, EPISODE_VOLUMES, CLIP_VOLUMES = 270, 1350, 5
CINEBRAIN_TR, CINEBRAIN_DELAY, CINEBRAIN_FPS = 0.8, 5, 8.0


class Dataset(NamedTuple):
    """All that the scripts must know of a dataset; its class knows the rest (docs/your-own-data.md)."""

    train: tuple[int, int]  # segments, and clips of each
    test: tuple[int, int]
    subjects: int
    video: tuple[int, int, int]  # frames, height, width of the decoder's videos
    seconds: float  # of a clip's video; CineBrain: 4 s and one frame
    fps: float  # of its reconstruction
    window: int = 1  # T, the volumes that a clip gets
    release: str = ""  # its class, and the module before it; "": prepare/command.py chooses
    grayordinates: bool = True  # are its voxels those of the HCP, in areas of its MMP atlas?


DATASETS = {
    "toy": Dataset((20, 100), (2, 80), 9, (17, 64, 64), 2.0, 8.5),
    "cc2017": Dataset((18, 240), (5, 240), 3, (57, 624, 624), CC2017_TR, CC2017_FPS),
    "cinebrain": Dataset(
        (18, 270), (2, 270), 6, (33, 480, 720), 33 / 8, CINEBRAIN_FPS, CLIP_VOLUMES,
        "prepare.cinebrain.CineBrainRelease",
    ),
    "mine": Dataset(
        (6, 15), (2, 15), 1, (17, 64, 64), 3.0, 17 / 3, 3, "extras.own_dataset.MyRelease", False
    ),
}  # fmt: skip
SIZES = {name: {"train": row.train, "test": row.test} for name, row in DATASETS.items()}
SUBJECTS = {name: row.subjects for name, row in DATASETS.items()}
VIDEO = {name: row.video for name, row in DATASETS.items()}
SECONDS = {name: row.seconds for name, row in DATASETS.items()}
VIDEO_OPTIONS = {
    name: dict(zip(("frames", "height", "width"), size, strict=True)) for name, size in VIDEO.items()
}
NINTH_SEASON = (1, 2, 6)  # the subjects of CineBrain who saw seasons 7 and 9; the others saw 7 and 11


def cc2017_splits(train_segments: int, test_segments: int) -> dict[str, list[str]]:
    """{"train": ["seg1", ...], "test": ["test1", ...]}"""
    train = [f"seg{n}" for n in range(1, train_segments + 1)]
    return {"train": train, "test": [f"test{n}" for n in range(1, test_segments + 1)]}


def stimuli_folder(name: str, subject: int, root: Path = Path("data")) -> Path:
    """Where the clips that a subject saw are prepared: data/<name>/stimuli; for subjects who saw other films
    data/cinebrain/stimuli-1-2-6, and data/toy/stimuli-K from the toy's second subject on."""
    if name == "cinebrain" and subject in NINTH_SEASON:
        return root / name / "stimuli-1-2-6"
    return root / name / ("stimuli" + _own_films(name, subject))


def raw_folder(name: str, subject: int, root: Path = Path("data")) -> Path:
    """The release, with its films in stimuli/: data/<name>/raw, and data/toy/raw-K as in `stimuli_folder`."""
    return root / name / ("raw" + _own_films(name, subject))


def _own_films(name: str, subject: int) -> str:
    return f"-{subject}" if name == "toy" and subject > 1 else ""


def check_subject(name: str, subject: int) -> None:
    """Raises ValueError where a dataset has no such subject."""
    if name in SUBJECTS and not 1 <= subject <= SUBJECTS[name]:
        raise ValueError(f"--subject {subject}: {name} has subjects 1 to {SUBJECTS[name]}")


def words_of(caption: str) -> str:
    """A caption without case and punctuation: two that are equal then are identical word for word."""
    return " ".join(re.findall(r"[^\W_]+", caption.casefold()))


# ---------------------------------------------------------------- the brain

CORTEX, GRAYORDINATES = 59_412, 91_282  # fs_LR 32k of the HCP: the cortex comes first, left then right
ROIS = {  # areas of the HCP MMP atlas, of both hemispheres, and the subcortical structures beside it
    "visual": (  # as CineBrain's authors: 8,405 grayordinates
        "V1 V2 V3 V3A V3B V3CD V4 LO1 LO2 LO3 PIT V4t V6 V6A V7 V8 PH FFC IP0 MT MST FST VVC VMV1 VMV2 VMV3 "
        "PHA1 PHA2 PHA3"
    ).split(),
    "hippocampus": ["hippocampus_left", "hippocampus_right"],
    # region 19, "anterior cingulate and medial prefrontal", of Glasser et al. 2016, Supplementary Results
    "mpfc": "33pr p24pr a24pr p24 a24 p32pr a32pr d32 p32 s32 8BM 9m 10v 10r 25".split(),
}
# CineBrain's preprocessed volumes hold the visual areas alone, or these beside them (numbers of the authors'
# cifit2npy.py, by name)
AUDITORY_AND_LANGUAGE = (
    "4 IPS1 A1 7Pm 7m 7AL 7Am 7PL 7PC 8BM p32 47m 8Av 8Ad 9p 10d 8C 44 45 46 9a 10v STGa STSda STSdp STSvp "
    "TPOJ1 TPOJ2 TPOJ3 PGp R_s32 R_STSva"
)


def without_side(areas: np.ndarray) -> np.ndarray:
    """Areas (N,) without their hemisphere: 'L_V1' -> 'V1'."""
    return np.array([area.removeprefix("L_").removeprefix("R_") for area in areas])


def in_areas(areas: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(N,) bool: has each area ('L_V1') one of the names, with ('L_V1') or without its hemisphere ('V1')?"""
    return np.isin(areas, names) | np.isin(without_side(areas), names)


# ---------------------------------------------------------------- models, and where the data is had

CLIP = "ViT-L-14-quickgelu/openai"  # of open_clip, which downloads it
VICLIP_HUB, VICLIP_FILE = "OpenGVLab/ViCLIP", "ViClip-InternVid-10M-FLT.pth"  # 1.71 GB

MISSING = {
    "cc2017": """
1. Download two archives of the Purdue University Research Repository to one folder RAW: the stimuli,
   doi.org/10.4231/R71Z42KK, and the recordings: doi.org/10.4231/R7X63K3M (subject 1, 15.3 GB),
   doi.org/10.4231/R7NS0S1F (subject 2) or doi.org/10.4231/R7J101BV (subject 3).
2. Unpack each archive in RAW, and the bundle.zip in it where it lies. Leave the folders as they are: RAW is
   searched for subject{subject}/fmri and stimuli. Subject {subject}'s first run is then, for instance,
   RAW/10_4231_.../video_fmri_dataset/subject{subject}/fmri/seg1/cifti/seg1_1_Atlas.dtseries.nii
3. Captions are not in the archives: take the training and the test list of NEURONS (.json).
4. python data.py cc2017 --raw RAW --subject {subject} --captions TRAIN TEST
   and, for stage 2, --decoder Wan-AI/Wan2.1-T2V-1.3B-Diffusers. docs/cc2017.md has all of it.
5. python train_stage1.py --data cc2017 --subject {subject}""",
    "cinebrain": """
1. Download from Hugging Face, Fudan-fMRI/CineBrain, to one folder RAW: captions-qwen-2.5-vl-7b.json, and
   videos.tar, which you unpack there.
2. Download the recordings of subject {subject}. Either the CIFTI runs and the behavioural CSV files
   (ModelScope, CineBrain_fMRI_CIFTI): RAW/sub_{subject:04d}/dtseries and RAW/sub_{subject:04d}/beh_data.
   Or, for the visual areas alone, sub-{subject:04d}/fMRI_preprocessed_data.tar of Hugging Face:
   RAW/sub-{subject:04d}/visual_audio.
3. python data.py cinebrain --raw RAW --subject {subject}
   and, for stage 2, --decoder Wan-AI/Wan2.1-T2V-1.3B-Diffusers. docs/cinebrain.md has all of it.
4. python train_stage1.py --data cinebrain --subject {subject} [--rois visual]""",
}


def guide(name: str, subject: int) -> str:
    """How to prepare a dataset: one screen."""
    command = f"{prepare_command(name, subject)} prepares it: docs/your-own-data.md"
    steps = MISSING.get(name, command).format(subject=subject)
    missing = f"{Path('data', name).absolute()} is not prepared for subject {subject}"
    return f"{missing}: data/ and runs/ are those of the current folder.\n{steps}"


def decoder_recipes(decoder: str, size: Sequence[int]) -> tuple[dict, dict]:
    """What makes the latents of videos of `size` (frames, height, width), and what makes the text tokens.

    Each recipe has the decoder's name and, where its files are here, a digest of its VAE or text encoder.
    """
    folder = Path(find_weights(decoder))
    name = folder.resolve().name if folder.is_dir() else decoder
    latents = {"decoder": name, "vae": _digest(folder / "vae")}
    latents |= zip(("frames", "height", "width"), size, strict=True)
    return latents, {"decoder": name, "text_encoder": _digest(folder / "text_encoder")}


def _digest(folder: Path) -> str | None:
    """SHA-256 of config.json and of the first 64 MB of each file of weights: of a model's local folder, or
    of what the Hub's cache has of it. None where it is not whole there."""
    if not folder.parent.is_dir():
        repo, _, revision = folder.parent.as_posix().partition("@")
        with suppress(ValueError):  # it can be no name on the Hub
            config = try_to_load_from_cache(repo, f"{folder.name}/config.json", revision=revision or None)
            folder = Path(config).parent if isinstance(config, str) else folder
    weights = sorted(folder.glob("*.safetensors"))
    shards = [int(n) for file in weights[:1] for n in re.findall(r"-of-(\d+)\.", file.name)]
    if len(weights) < max([1, *shards]):
        return None
    sha = hashlib.sha256()
    for file in sorted([folder / "config.json", *weights]):
        with open(file, "rb") as opened:
            sha.update(opened.read(1 << 26))
    return sha.hexdigest()[:16]


def latents_name(size: Sequence[int]) -> str:
    """The file of latents, by frames, height and width of the videos: several sizes lie side by side."""
    return "latents-{}x{}x{}.npy".format(*size)


def decoder_folder(stimuli: Path, decoder: str) -> Path:
    """Where a split's latents and text tokens for a decoder lie: by its name, or by that of another copy of
    its VAE and text encoder."""
    folder = stimuli / Path(decoder).name
    if folder.is_dir():
        return folder
    latents, text = decoder_recipes(decoder, (0, 0, 0))
    for other in sorted(stimuli.glob("*/latents-*.npy")):
        entries = [read_manifest(file) for file in (other, other.with_name("text_tokens.npy"))]
        vae, encoder = ((entry or {"recipe": {}})["recipe"] for entry in entries)
        stored = vae.get("vae"), encoder.get("text_encoder")
        if all(stored) and stored == (latents["vae"], text["text_encoder"]):
            return other.parent
    return folder


def is_made_for(file: Path, recipe: dict) -> bool:
    """`is_made_by` of one of `decoder_recipes`. A decoder is its bytes, not its name: where both digests are
    known the names do not count; else they do, and a local folder has the last part of the Hub's."""
    stored = (read_manifest(file) or {"recipe": {}})["recipe"]
    part = "vae" if "vae" in recipe else "text_encoder"
    names = recipe["decoder"], str(stored.get("decoder"))
    local = "/" not in names[0] or "/" not in names[1]
    free = ["decoder"] if local and Path(names[0]).name == Path(names[1]).name else []
    free = ["decoder"] if recipe[part] and stored.get(part) else [*free, part]
    return is_made_by(file, {name: value for name, value in recipe.items() if name not in free})


def prepare_command(
    name: str, subject: int, decoder: str | None = None, size: Sequence[int] | None = None
) -> str:
    """What prepares a dataset, for a video decoder and videos of `size` (frames, height, width)."""
    if name == "toy":
        return "train_stage2.py" if decoder else "train_stage1.py"
    option = f" --decoder {decoder}" if decoder else ""
    if decoder and size and tuple(size) != VIDEO[name]:
        option += " --frames {} --height {} --width {}".format(*size)
    return f"python data.py {name} --raw DIR --subject {subject}{option}"


def check_decoded(file: Path, recipe: dict, decoder: str, command: str) -> None:
    """Raises MissingData where a file for a decoder is not there, FileFault where another recipe, as of
    another size, made it. command: what makes it."""
    try:
        is_there = is_made_for(file, recipe)
    except FileFault as fault:
        raise FileFault(f"{fault}: {command}") from None
    if not is_there:
        raise MissingData(f"{file}, for {decoder}, is not there: run {command}")


def check_batch(batch_size: int, clips: int) -> None:
    """Raises ValueError where a batch has more clips than the data."""
    if clips < batch_size:
        text = f"a batch of {batch_size} clips, but only {clips} clips to train on"
        raise ValueError(f"{text}; choose a smaller --batch_size")


def classes_of(file: Path) -> list[str]:
    """The names of the categories of categories.npy, of its manifest. Raises ValueError where it has none."""
    classes = (read_manifest(file) or {"recipe": {}})["recipe"].get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise damaged(file.with_name("manifest.json"), f"classes {classes}", "a list of names")
    return classes


def voxels_of(rois: str, areas: np.ndarray, folder: Path) -> np.ndarray:
    """Indices of the voxels in regions such as "visual,hippocampus"; areas (N,) of each voxel, prepared in
    folder. Raises FileFault, complete as it is, for an unknown region and for one without a voxel."""
    regions = rois.split(",")
    unknown = sorted(set(regions) - set(ROIS))
    if unknown:
        raise FileFault(f"--rois {rois}: {unknown} unknown; there are {', '.join(ROIS)}")
    for region in regions:
        if not in_areas(areas, ROIS[region]).any():
            prepared = f"they are in {', '.join(sorted(set(areas))[:9])} ..."
            prepared += "; prepare the CIFTI runs, or" if folder.parent.name == "cinebrain" else ":"
            text = f"--rois {rois}: none of the voxels of {folder} lies in {region}"
            raise FileFault(f"{text}, {prepared} leave it out")
    return np.flatnonzero(in_areas(areas, [name for region in regions for name in ROIS[region]]))


def check_prepared(name: str, subject: int, files: Sequence[Path], derived: Sequence[Path]) -> None:
    """Raises MissingData where a file is not there: the guide to the dataset; one line for what is derived
    from the others, which an older version did not make."""
    missing = next((file for file in (*files, *derived) if not file.exists()), None)
    if missing in derived:
        raise MissingData(f"{missing} is not there: {prepare_command(name, subject)} makes it")
    if missing:
        check_subject(name, subject)
        makes = f"python data.py toy --subject {subject} makes the toy world, as train_stage1.py does"
        steps = f"{guide(name, subject)}\n\n{missing} is not there."
        raise MissingData(f"{missing} is not there: {makes}" if name == "toy" else steps)

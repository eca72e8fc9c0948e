"""The toy world as a release: its files, made here, and read as cc2017's are."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prepare.copies import prepare_copies, prepare_recorded
from prepare.facts import VIDEO, check_subject, decoder_recipes, raw_folder, stimuli_folder
from prepare.release import Release, visible
from support.files import is_made_by, write_json
from support.readers import read_array, read_json, read_json_lines, read_npz
from support.videos import write_video
from toy.subject import VERSION, VOLUMES_BEFORE, VOXELS, recordings, responses
from toy.world import (
    FRAMES,
    SECONDS,
    TEST_CLIPS,
    TEST_REPEATS,
    TEST_SEGMENTS,
    TRAIN_CLIPS,
    TRAIN_REPEATS,
    TRAIN_SEGMENTS,
    combinations,
    film,
    render,
)

MEND = "delete the folder and run the command again: it makes the toy world anew"


class ToyRelease(Release):
    """fmri/seg1_1.npy (volumes, voxels), stimuli/seg1.mp4, captions.jsonl. delay: in volumes of 2 s."""

    def __init__(self, raw: Path, subject: int = 1, delay: int = 2):
        self.raw, self.subject, self.delay = raw, subject, delay
        rows = read_json_lines(raw / "captions.jsonl", {"split": str, "segment": str}, MEND)
        self.clips = Counter(row["segment"] for row in rows)
        self.splits = {}
        for split in ("train", "test"):
            segments = [row["segment"] for row in rows if row["split"] == split]
            self.splits[split] = list(dict.fromkeys(segments))

    def repeats(self, segment: str) -> int:
        return TEST_REPEATS if segment in self.splits["test"] else TRAIN_REPEATS

    def window(self, segment: str) -> tuple[int, int]:
        return VOLUMES_BEFORE + self.delay, self.clips[segment]

    @property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        table = read_npz(VOXELS, {"index": "iu", "roi": "U"})
        return table["index"], table["roi"]

    def run_file(self, segment: str, repeat: int) -> Path:
        return self.raw / "fmri" / f"{segment}_{repeat + 1}.npy"

    def load_run(self, segment: str, repeat: int) -> np.ndarray:
        return read_array(self.run_file(segment, repeat), shape=(None, None), mend=MEND)

    def files(self, segment: str) -> list[Path]:
        return visible(self.raw / "fmri", f"{segment}_*.npy")

    def recording(self, subject: int) -> list[Path]:
        return [self.run_file("seg1", 0)] if subject == self.subject else []

    def stimulus(self, segment: str) -> list[Path]:
        return [self.raw / "stimuli" / f"{segment}.mp4"]


def write_release(folder: Path, seed: int = 0) -> Iterator[str]:
    """Writes the films and the recordings under `folder`; yields the name of each run as it is done, 60 in
    all.

    stimuli/seg1.mp4, fmri/seg1_1.npy float32 (volumes, voxels), captions.jsonl (a line a clip, in order).
    """
    roi = np.load(VOXELS)["roi"]
    (folder / "stimuli").mkdir(parents=True)
    (folder / "fmri").mkdir()
    seen = set(combinations()[0])
    film_of = {split: film(split, seed) for split in ("train", "test")}
    response = responses(film_of["train"] + film_of["test"], roi, seed)
    with open(folder / "captions.jsonl", "w") as captions:
        start = 0
        for split, prefix, segments, clips, repeats in (
            ("train", "seg", TRAIN_SEGMENTS, TRAIN_CLIPS, TRAIN_REPEATS),
            ("test", "test", TEST_SEGMENTS, TEST_CLIPS, TEST_REPEATS),
        ):
            for s in range(segments):
                segment = f"{prefix}{s + 1}"
                shown = film_of[split][s * clips : (s + 1) * clips]
                for i, clip in enumerate(shown):
                    facts = {
                        "split": split,
                        "segment": segment,
                        "clip": i,
                        "caption": clip.caption,
                        "categories": [clip.shape],
                    }
                    captions.write(
                        json.dumps(facts | {"seen": clip.combination in seen} | asdict(clip)) + "\n"
                    )
                frames = np.concatenate([render(clip) for clip in shown])
                film_file = folder / "stimuli" / f"{segment}.mp4"
                write_video(film_file, frames, FRAMES / SECONDS, keyframe_every=FRAMES)
                for k, run in enumerate(
                    recordings(response[start : start + clips], repeats, [seed, split == "test", s])
                ):
                    np.save(folder / "fmri" / f"{segment}_{k + 1}.npy", run)
                    yield f"{segment}_{k + 1}"
                start += clips


def make_toy(raw: Path, seed: int = 0) -> None:
    """Render the films and recordings to `raw`, whole or not at all; nothing where the folder is there.
    seed: of the films, of what the voxels prefer, and of the noise. Raises ValueError where an older toy
    world made the folder."""
    if raw.is_dir():
        version, wanted = raw / "version.json", {"version": VERSION}
        if not version.is_file() or read_json(version) != wanted:
            data, runs = raw.parent, Path("runs") / "toy"
            mend = f"delete {data}, and {runs}, whose runs saw those films"
            raise ValueError(f"{raw} is of another version of the toy world, wanted {VERSION}: {mend}")
        return
    part = raw.with_name(f".{raw.name}-{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for _ in tqdm(
            write_release(part, seed), total=60, desc="toy world: films and recordings", unit="run"
        ):
            pass
        write_json(part / "version.json", {"version": VERSION})
        part.rename(raw)
    except OSError:
        if not raw.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


TOY = Path(__file__).parents[1] / "toy"


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
        names = ("clips.jsonl", "categories.npy", "e_txt.npy", "e_img.npy", "e_act.npy", "near_copies.npy")
        wanted.append(folder / split / "recorded.npy")
        wanted += [stimuli / split / name for name in names]
    recipe = toy_recipe(subject)
    recordings = [is_made_by(folder / split / "fmri.npy", recipe) for split in ("train", "test")]
    if not all(recordings) or not all(file.is_file() for file in wanted):
        from prepare.fmri import prepare_fmri
        from prepare.stimuli import prepare_stimuli

        make_toy(raw, seed=subject - 1)
        source = ToyRelease(raw, subject)
        prepare_fmri(source, folder, recipe)
        prepare_recorded(folder)
        captions = dict.fromkeys(source.splits, raw / "captions.jsonl")
        prepare_stimuli(source, stimuli, captions, f"local-dir:{TOY / 'clip'}", str(TOY / "viclip"))
        prepare_copies(stimuli)
    if decoder is not None and not _decoder_is_prepared(stimuli, decoder, size or VIDEO["toy"]):
        from prepare.decoder import prepare_decoder

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

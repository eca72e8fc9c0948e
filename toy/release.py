"""The toy world as a release: its files are made here, and read and prepared as those of cc2017 are."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prepare.copies import prepare_copies, prepare_recorded
from prepare.facts import VIDEO, check_subject, decoder_recipes, latents_name, raw_folder, stimuli_folder
from prepare.release import Release, visible
from support.files import is_made_by, write_json, written_whole
from support.readers import advising, read_array, read_json, read_json_lines, read_npz
from support.runs import FolderLock
from support.videos import write_video
from toy import world
from toy.subject import VERSION, VOLUMES_BEFORE, VOXELS, recordings, responses
from toy.world import FRAMES, SECONDS, combinations, film, render

ANEW = "delete the folder and run the command again: it makes the toy world anew"


class ToyRelease(Release):
    """fmri/seg1_1.npy (volumes, voxels), stimuli/seg1.mp4, captions.jsonl. delay: in volumes of 2 s."""

    def __init__(self, raw: Path, subject: int = 1, delay: int = 2):
        self.raw, self.subject, self.delay = raw, subject, delay
        with advising(ANEW):
            rows = read_json_lines(raw / "captions.jsonl", {"split": str, "segment": str})
        self.clips = Counter(row["segment"] for row in rows)
        of_split = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
        self.splits = {split: [*Counter(row["segment"] for row in of_split[split])] for split in of_split}

    def repeats(self, segment: str) -> int:
        return world.TEST_REPEATS if segment in self.splits["test"] else world.TRAIN_REPEATS

    def window(self, segment: str) -> tuple[int, int]:
        return VOLUMES_BEFORE + self.delay, self.clips[segment]

    @property
    def voxels(self) -> tuple[np.ndarray, np.ndarray]:
        table = read_npz(VOXELS, {"index": "iu", "roi": "U"})
        return table["index"], table["roi"]

    def run_file(self, segment: str, repeat: int) -> Path:
        return self.raw / "fmri" / f"{segment}_{repeat + 1}.npy"

    def load_run(self, segment: str, repeat: int) -> np.ndarray:
        with advising(ANEW):
            return read_array(self.run_file(segment, repeat), shape=(None, None))

    def files(self, segment: str) -> list[Path]:
        return visible(self.raw / "fmri", f"{segment}_*.npy")

    def recording(self, subject: int) -> list[Path]:
        return [self.run_file("seg1", 0)] if subject == self.subject else []

    def stimulus(self, segment: str) -> list[Path]:
        return [self.raw / "stimuli" / f"{segment}.mp4"]


def write_release(folder: Path, seed: int = 0) -> None:
    """Writes films, 60 recordings and captions.jsonl (a line a clip, in order)."""
    (folder / "stimuli").mkdir(parents=True)
    (folder / "fmri").mkdir()
    seen = set(combinations()[0])
    clips = film("train", seed) + film("test", seed)
    response = responses(clips, np.load(VOXELS)["roi"], seed)
    start = 0
    progress = tqdm(total=60, desc="toy world: films and recordings", unit="run")
    with open(folder / "captions.jsonl", "w", encoding="utf-8") as captions, progress:
        for split, prefix, segments, length, repeats in (
            ("train", "seg", world.TRAIN_SEGMENTS, world.TRAIN_CLIPS, world.TRAIN_REPEATS),
            ("test", "test", world.TEST_SEGMENTS, world.TEST_CLIPS, world.TEST_REPEATS),
        ):
            for s in range(segments):
                segment, part = f"{prefix}{s + 1}", slice(start, start + length)
                for i, clip in enumerate(clips[part]):
                    line = {"split": split, "segment": segment, "clip": i, "caption": clip.caption}
                    line |= {"categories": [clip.shape], "seen": clip.combination in seen, **asdict(clip)}
                    captions.write(json.dumps(line) + "\n")
                frames = np.concatenate([*map(render, clips[part])])
                mp4 = folder / "stimuli" / f"{segment}.mp4"
                write_video(mp4, frames, FRAMES / SECONDS, keyframe_every=FRAMES)
                runs = recordings(response[part], repeats, [seed, split == "test", s])
                for k, volumes in enumerate(runs, 1):
                    np.save(folder / "fmri" / f"{segment}_{k}.npy", volumes)
                    progress.update()
                start += length


def make_toy(raw: Path, seed: int = 0) -> None:
    """Render films and recordings to `raw`, whole or not at all; nothing where the folder is there. seed: of
    films, tuning and noise. Raises ValueError where another version of the toy world made the folder."""
    if raw.is_dir():
        version = raw / "version.json"
        if not version.is_file() or read_json(version) != {"version": VERSION}:
            advice = f"delete {raw.parent}, and {Path('runs/toy')}, whose runs saw those films"
            raise ValueError(f"{raw} is of another version of the toy world, wanted {VERSION}: {advice}")
        return
    with written_whole(raw) as part:
        write_release(part, seed)
        write_json(part / "version.json", {"version": VERSION})


def toy_recipe(subject: int) -> dict:
    """What makes fmri.npy of the toy world. world: the version of its films and recordings."""
    return {"release": "toy", "subject": subject, "delay": 2, "window": 1, "world": VERSION}


def prepare_toy(
    root: Path = Path("data"), decoder: str | None = None, size: tuple | None = None, subject: int = 1
) -> None:
    """Make the toy world and prepare it as a real release, in about a minute; what is whole is kept. With a
    decoder also its latents of videos of `size` = frames, height, width, and its text tokens. Raises
    ValueError where another decoder or size made these."""
    check_subject("toy", subject)
    raw, stimuli = raw_folder("toy", subject, root), stimuli_folder("toy", subject, root)
    folder, recipe = root / "toy" / f"sub{subject}", toy_recipe(subject)
    size = size or VIDEO["toy"]
    ready = _is_prepared(folder, stimuli, recipe)
    decoded = decoder is None or _decoder_is_prepared(stimuli, decoder, size)
    if ready and decoded:
        return
    # what loads open_clip or diffusers is imported only where something is to be made
    with FolderLock(root / "toy"):
        make_toy(raw, seed=subject - 1)
        release, captions = ToyRelease(raw, subject), raw / "captions.jsonl"
        if not ready:
            from prepare.fmri import prepare_fmri
            from prepare.stimuli import prepare_stimuli

            prepare_fmri(release, folder, recipe)
            prepare_recorded(folder)
            lists = {"train": captions, "test": captions}
            prepare_stimuli(release, stimuli, lists, "local-dir:toy/clip", "toy/viclip")
            prepare_copies(stimuli)
        if not decoded:
            from prepare.decoder import prepare_decoder

            prepare_decoder(release, stimuli, decoder, size)


def _is_prepared(folder: Path, stimuli: Path, recipe: dict) -> bool:
    names = "clips.jsonl categories.npy e_txt.npy e_img.npy e_act.npy near_copies.npy captions.npy".split()
    files = [folder / "voxels.npz"]
    for split in ("train", "test"):
        files += [folder / split / "recorded.npy", *(stimuli / split / name for name in names)]
        if not is_made_by(folder / split / "fmri.npy", recipe):
            return False
    return all(file.is_file() for file in files)


def _decoder_is_prepared(stimuli: Path, decoder: str, size: tuple[int, int, int]) -> bool:
    (latents, text), name = decoder_recipes(decoder, size), Path(decoder).name
    recipes = {stimuli / name / "empty_prompt.npy": text}
    for split in ("train", "test"):
        folder = stimuli / split / name
        recipes[folder / latents_name(size)] = latents
        recipes[folder / "text_tokens.npy"] = recipes[folder / "text_offsets.npy"] = text
    return all([is_made_by(file, recipe) for file, recipe in recipes.items()])

"""Captions, and the MSCOCO objects they name (§3.1), for a dataset whose release has none: for L_cls.

    python extras/caption.py --data cc2017 --raw RAW         RAW/stimuli/seg1.mp4 ... -> RAW/captions.jsonl
    python extras/caption.py --videos 'RAW/videos/*.mp4' --out RAW/captions.json     a clip a file
    python extras/caption.py --videos FOLDER --seconds 2 --out NEW.jsonl         files that are cut into clips

Qwen2.5-VL is asked twice: for a sentence on frames of a clip, then, as in the paper, which objects of
MSCOCO's list that sentence names. It writes what prepare/captions.py reads, a line a clip in order (--out
X.json: one list): segment, clip, video, caption, tags (the names as answered), categories (by the words of
coco_nouns.txt), by (the model). An answer that is no list of names is kept as `answer`, and
`categories_by` is then "rules". A run that was killed goes on and ends with the same file.
"""

import glob
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from prepare.categories import COCO, clip_categories  # noqa: E402
from prepare.cc2017 import PurdueFilms  # noqa: E402
from support.files import write_json, written_whole  # noqa: E402
from support.options import option, parse  # noqa: E402
from support.readers import read_json_lines  # noqa: E402
from support.runs import door, read_settings  # noqa: E402
from support.videos import read_clips, uniform_frames, video_info  # noqa: E402
from toy.release import ToyRelease  # noqa: E402

CAPTION = "Describe in one short sentence what this video shows: who or what, where, and what happens."
OBJECTS = (
    'Caption: "{caption}"\nWhich of these objects does the caption name, in these or in other words? '
    + ", ".join(chain(*COCO.values()))
    + ".\nAnswer with a JSON list of names from the list and nothing else; with [] if it names none."
)
SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 448 * 448}  # pixels of a frame
PRESETS = {"cc2017": {}, "toy": {"raw": Path("data/toy/raw")}}


@dataclass
class Config:
    data: str | None = option(None, "cc2017 or toy: take the videos of this release's folder, --raw")
    raw: Path | None = option(None, "folder of the release, with stimuli/")
    videos: str | None = option(None, "in place of --data a folder of videos, or a pattern in quotes")
    seconds: float | None = option(None, "length of a clip of --videos (default: a video is one)", least=0.1)
    out: Path | None = option(None, "a .jsonl, or for --videos a .json list (default: RAW/captions.jsonl)")
    model: str = option("Qwen/Qwen2.5-VL-7B-Instruct", "name on the Hub or folder of a Qwen2.5-VL")
    frames: int = option(8, "frames of a clip that are shown", least=1)
    batch: int = option(16, "clips at once", least=1)


class Film(NamedTuple):
    """A video and the clips in it, one after the other. In --videos the segment is the file's name."""

    segment: str
    split: str | None
    file: Path
    clips: int
    seconds: float  # of a clip


# ---------------------------------------------------------------- what was answered

BULLET = r"\s*(?:[-*•]|\d+[.)])\s+(.+)"
NAME = r"[a-z][a-z'’-]*( [a-z'’-]+){0,2}"


def parse_objects(answer: str) -> list[str] | None:
    """The names in a model's answer, lower case, each once; None where it is no list of names.

    A JSON list of strings, also in a fenced block; a bullet or a numbered list; names between commas; "none".
    A name has one to three words. More than 20 names are the list recited, not what a caption names.
    """
    text = re.sub(r"^```(?:json)?\s*(.*?)\s*```$", r"\1", answer.strip(), flags=re.DOTALL)
    items = [re.fullmatch(BULLET, line) for line in text.splitlines() if line.strip()]
    if text.startswith("["):
        try:
            names = json.loads(text)
        except json.JSONDecodeError:
            return None
    elif re.fullmatch(r"(none|no objects?|nothing)\.?", text.lower()):
        names = []
    elif items and all(items):
        names = [item[1] for item in items]
    else:
        names = text.split(",") if len(items) == 1 else [text]
    if len(names) > 20 or not all(isinstance(name, str) for name in names):
        return None
    names = [re.sub(r"^(an?|the) ", "", name.strip().strip("\"'`*.").lower()) for name in names]
    return list(dict.fromkeys(names)) if all(re.fullmatch(NAME, name) for name in names) else None


def answered_row(film: Film, clip: int, caption: str, answer: str, model: str) -> dict:
    """The line of captions.jsonl of a clip, of the model's two answers."""
    row = {"segment": film.segment, "clip": clip, "video": film.file.name}
    if film.split:
        row["split"] = film.split
    text, names = " ".join(caption.split()).strip('"'), parse_objects(answer)
    row |= {"caption": text, "tags": names or [], "categories": clip_categories(text, names), "by": model}
    return row if names is not None else {**row, "categories_by": "rules", "answer": answer}


class Captioner:
    """Qwen2.5-VL of the Hub or a folder, on a GPU in bf16 or on the CPU in float32."""

    def __init__(self, name: str):
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
        self.processor.tokenizer.padding_side = "left"  # so that the answers begin together
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        self.model = kind.from_pretrained(name, dtype=dtype, trust_remote_code=False).eval().to(device)

    @torch.inference_mode()
    def ask(
        self, questions: Sequence[str], clips: Sequence[np.ndarray] = (), fps: float = 4.0, tokens: int = 96
    ) -> list[str]:
        """An answer of at most `tokens` tokens to each question, on its clip, uint8 (F, H, W, 3), if any."""
        prompts, videos, times = [], [], []
        for question in questions:
            content = [{"type": "video"}] * bool(clips) + [{"type": "text", "text": question}]
            turns = [{"role": "user", "content": content}]
            prompts.append(self.processor.apply_chat_template(turns, add_generation_prompt=True))
        for clip in clips:
            videos.append(torch.from_numpy(clip).permute(0, 3, 1, 2))  # (F, 3, H, W)
            times.append({"total_num_frames": len(clip), "fps": fps, "frames_indices": [*range(len(clip))]})
        about = {"video_metadata": times or None, "do_sample_frames": False, "size": SIZE}
        inputs = self.processor(
            text=prompts, videos=videos or None, videos_kwargs=about, padding=True, return_tensors="pt"
        ).to(self.model.device)
        out = self.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def films_of(config: Config) -> list[Film]:
    """The videos of a release, in the order of the clips. Raises FileNotFoundError or FileFault."""
    if config.data == "toy":
        release = ToyRelease(config.raw)
    else:
        release = PurdueFilms(config.raw, 1)
        release.find_films(config.raw)
    films = []
    for split, segments in release.splits.items():
        for segment in segments:
            (file,) = release.stimulus(segment)
            video_info(file)  # one that is missing is an error now, not after hours
            films.append(Film(segment, split, file, release.clips_of(segment), 2.0))
    return films


def films_of_videos(videos: str, seconds: float | None) -> list[Film]:
    """The --videos, by name: of a folder all but JSON. Raises FileNotFoundError for none."""
    files, films = Path(videos).glob("*.*") if Path(videos).is_dir() else map(Path, glob.glob(videos)), []
    for file in sorted(files):
        if not file.is_file() or file.name.startswith(".") or file.suffix.startswith(".json"):
            continue
        duration = video_info(file).duration
        clips = int((duration + 0.05) // seconds) if seconds else int(duration > 0)
        if not clips:
            tqdm.write(f"warning: {file} of {duration:.2f} s is shorter than a clip: it gets no caption")
        films.append(Film(file.stem, None, file, clips, seconds or duration))
    if not films:
        raise FileNotFoundError(f"--videos {videos}: no video; give a folder or a pattern in quotes")
    return films


def clips_from(films: list[Film], done: int, frames: int) -> Iterator[tuple[Film, int, np.ndarray]]:
    """Film, number in it and `frames` frames, uint8 (F, H, W, 3), of each clip but the first `done`."""
    for film in films:
        if done < film.clips:
            for k, clip in enumerate(read_clips(film.file, film.clips, film.seconds)):
                if k >= done:
                    yield film, k, clip[uniform_frames(len(clip), frames)]
        done = max(0, done - film.clips)


# ---------------------------------------------------------------- commands


def begin(part: Path, note: Path, recipe: dict) -> int:
    """How many clips an earlier start left in `part`, in whole batches, since answers depend in their last
    bits on their padding; the rest is cut off. Raises ValueError where `note` tells of another recipe."""
    lines = part.read_bytes().splitlines(keepends=True) if part.is_file() else []
    complete = [line for line in lines if line.endswith(b"\n")]  # a kill leaves half a line
    done = len(complete) // recipe["batch"] * recipe["batch"]
    if done:
        read_settings(note, recipe, ["versions"], f"delete {part} to begin anew")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(note, {**recipe, "versions": versions})
    with written_whole(part) as file:
        file.write_bytes(b"".join(complete[:done]))
    return done


def caption(config: Config) -> None:
    """Captions all clips into `config.out`; until all are there, lines go to a file of another name."""
    out, model = config.out, config.model
    films = films_of_videos(config.videos, config.seconds) if config.videos else films_of(config)
    part, total = out.with_name(f".{out.stem}.part.jsonl"), sum(film.clips for film in films)
    recipe = {"model": model, "frames": config.frames, "batch": config.batch, "prompts": [CAPTION, OBJECTS]}
    recipe["videos"] = [f"{film.file.name} {film.clips} x {film.seconds:g} s" for film in films]
    done = begin(part, out.with_name(f"{out.stem}.recipe.json"), recipe)
    counted = f"{total:,} clips of {len(films)} videos, {done:,} of them done"
    tqdm.write(f"{model}: {counted}; {config.frames} frames a clip -> {out}")
    captioner = Captioner(model)
    stream = clips_from(films, done, config.frames)
    with open(part, "a", encoding="utf-8") as file, tqdm(total=total, initial=done, unit="clip") as progress:
        while batch := list(islice(stream, config.batch)):
            frames = [clip for *_, clip in batch]
            first, *_ = batch
            captions = captioner.ask([CAPTION] * len(batch), frames, config.frames / first[0].seconds)
            answers = captioner.ask([OBJECTS.format(caption=" ".join(text.split())) for text in captions])
            for (film, k, _), text, answer in zip(batch, captions, answers, strict=True):
                file.write(json.dumps(answered_row(film, k, text, answer, model)) + "\n")
            file.flush()
            progress.update(len(batch))
    if out.suffix == ".jsonl":
        part.rename(out)
        return
    rows = read_json_lines(part)
    for row in rows:
        del row["clip"]  # a number in its video; in a list the place says which clip it is
    with written_whole(out) as file:
        file.write_text(json.dumps(rows, indent=0), encoding="utf-8")
    part.unlink()


def check(config: Config) -> None:
    """Sets the default of --out. Raises ValueError where options do not go together, or --out is there."""
    if config.data and config.raw and not config.out:
        config.out = config.raw / "captions.jsonl"
    out, endings = config.out or Path(".jsonl"), (".jsonl", ".json") if config.videos else (".jsonl",)
    for is_wrong, problem in [
        (bool(config.data) == bool(config.videos), "give one of --data and --videos"),
        (config.data and not config.raw, f"--data {config.data} wants --raw, the folder of the release"),
        (config.seconds and not config.videos, "--seconds is of --videos: a release has clips of 2 s"),
        (not config.out, "--out says where the captions go"),
        (out.suffix not in endings, f"--out {out}: wanted a name that ends in .jsonl, or .json for --videos"),
        (out.is_file(), f"{out} is there already: delete it to make it anew, or give another --out"),
    ]:
        if is_wrong:
            raise ValueError(problem)


def main(argv: Sequence[str]) -> None:
    config = parse(Config, PRESETS, __doc__, "extras/caption.py", argv)
    check(config)
    caption(config)
    print(f"written: {config.out}")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

"""Captions, and the MSCOCO objects they name (§3.1), for a dataset whose release has none: for L_cls.

    python extras/caption.py --data cc2017 --raw RAW         RAW/stimuli/seg1.mp4 ... -> RAW/captions.jsonl
    python extras/caption.py --videos 'RAW/videos/*.mp4' --out RAW/captions.json     a clip a file
    python extras/caption.py --videos FOLDER --seconds 2 --out NEW.jsonl         files that are cut into clips
    python extras/caption.py --rules captions.jsonl --out NEW.jsonl   no model: the nouns of its captions

Qwen2.5-VL is asked twice: for a sentence on frames of a clip, then, as in the paper, which objects of
MSCOCO's list that sentence names. It writes what prepare/captions.py reads, a line a clip in order (--out
X.json: one list): segment, clip, video, caption, tags (the names as answered), categories (the
supercategories that prepare/coco_nouns.txt maps them to), by (the model, or "rules"). An answer that is no
list of names is kept as `answer`, and the categories of that clip are the rules', as `categories_by` says.
Greedy decoding in the same batches: a run that was killed goes on and ends with the same file.
"""

import glob
import json
import re
import sys
from collections import Counter
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
from prepare.captions import read_captions  # noqa: E402
from prepare.categories import COCO, category_table, clip_categories, merge_rare  # noqa: E402
from prepare.facts import SEGMENT_VOLUMES, cc2017_splits  # noqa: E402
from support.files import write_json, written_whole  # noqa: E402
from support.options import option, parse  # noqa: E402
from support.readers import advising, read_json, read_json_lines  # noqa: E402
from support.runs import door  # noqa: E402
from support.videos import read_clips, uniform_frames, video_info  # noqa: E402
from toy.release import ToyRelease  # noqa: E402

CAPTION = "Describe in one short sentence what this video shows: who or what, where, and what happens."
OBJECTS = (
    'Caption: "{caption}"\nWhich of these objects does the caption name, in these or in other words? '
    + ", ".join(chain(*COCO.values()))
    + ".\nAnswer with a JSON list of names from the list and nothing else; with [] if it names none."
)
NOTICE = (
    "rule-based: no model has looked at any frame; categories are those of the nouns in captions and tags "
    "(coco_nouns.txt)"
)
PRESETS = {"cc2017": {}, "toy": {"raw": Path("data/toy/raw")}}


@dataclass
class Config:
    data: str | None = option(None, "cc2017 or toy: take the videos of this release's folder, --raw")
    raw: Path | None = option(None, "folder of the release, with stimuli/")
    videos: str | None = option(
        None, "a folder of videos or a pattern in quotes, in place of --data; the segment is the file's name"
    )
    seconds: float | None = option(
        None, "cut the --videos into clips of so many seconds (default: a video is one clip)", above=0
    )
    rules: list[Path] = option([], "captions.jsonl, or cc2017's training and test list; no model is run")
    out: Path | None = option(None, "a .jsonl, or for --videos a .json list (default: RAW/captions.jsonl)")
    model: str = option("Qwen/Qwen2.5-VL-7B-Instruct", "name on the Hub or folder of a Qwen2.5-VL")
    frames: int = option(8, "frames of a clip that are shown", least=1)
    pixels: int = option(448 * 448, "of a frame, at most", least=56 * 56)
    batch: int = option(16, "clips at once", least=1)
    train_segments: int = option(18, "of cc2017", least=0)
    test_segments: int = option(5, "of cc2017", least=0)


class Film(NamedTuple):
    """A video and the clips in it, one after the other."""

    segment: str
    split: str | None
    file: Path
    clips: int
    seconds: float


# ---------------------------------------------------------------- what was answered


def parse_objects(answer: str) -> list[str] | None:
    """The names in a model's answer, lower case, each once; None where it is no list of names.

    A JSON list of strings, also in a fenced block; a bullet or a numbered list; names between commas; "none".
    A name has one to three words. More than 20 names are the list recited, not what a caption names.
    """
    text = answer.strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL):
        text = fenced[1]
    bullet = r"\s*(?:[-*•]|\d+[.)])\s+(.+)"
    lines = [line for line in text.splitlines() if line.strip()]
    if text.startswith("["):
        try:
            names = json.loads(text)
        except json.JSONDecodeError:
            return None
    elif re.fullmatch(r"(none|no objects?|nothing)\.?", text.lower()):
        names = []
    elif lines and all(re.fullmatch(bullet, line) for line in lines):
        names = re.findall(bullet, text)
    else:
        names = text.split(",") if len(lines) == 1 else [text]
    if len(names) > 20 or not all(isinstance(name, str) for name in names):
        return None
    names = [re.sub(r"^(an?|the) ", "", name.strip().strip("\"'`*.").lower()) for name in names]
    if not all(re.fullmatch(r"[a-z][a-z'’-]*( [a-z'’-]+){0,2}", name) for name in names):
        return None
    return list(dict.fromkeys(names))


def row_of(place: dict, caption: str, tags: Sequence[str] | None, by: str) -> dict:
    """A line of captions.jsonl; place: segment, clip and what else says which clip it is."""
    categories = clip_categories(caption, tags)
    return {**place, "caption": caption, "tags": tags or [], "categories": categories, "by": by}


def answered_row(film: Film, clip: int, caption: str, answer: str, model: str) -> dict:
    """The line of a clip, of the model's two answers."""
    place = {"segment": film.segment, "clip": clip, "video": film.file.name}
    if film.split:
        place["split"] = film.split
    names = parse_objects(answer)
    row = row_of(place, " ".join(caption.split()).strip('"'), names, model)
    return row if names is not None else {**row, "categories_by": "rules", "answer": answer}


# ---------------------------------------------------------------- the model


class Captioner:
    """Qwen2.5-VL on a GPU in bf16, or on the CPU in float32. name: of the Hub, or a folder. pixels: of a
    frame, at most."""

    def __init__(self, name: str, pixels: int):
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
        self.processor.tokenizer.padding_side = "left"  # so that the answers begin together
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        self.model = kind.from_pretrained(name, dtype=dtype, trust_remote_code=False).eval().to(device)
        self.size = {"shortest_edge": min(pixels, 128 * 28 * 28), "longest_edge": pixels}

    @torch.inference_mode()
    def ask(
        self, questions: Sequence[str], clips: Sequence[np.ndarray] = (), fps: float = 4.0, tokens: int = 96
    ) -> list[str]:
        """An answer of at most `tokens` tokens to each question, on its clip, uint8 (F, H, W, 3), where
        `clips` are given."""
        prompts, videos, times = [], [], []
        for question in questions:
            content = [{"type": "video"}] * bool(clips) + [{"type": "text", "text": question}]
            turns = [{"role": "user", "content": content}]
            prompts.append(self.processor.apply_chat_template(turns, add_generation_prompt=True))
        for clip in clips:
            videos.append(torch.from_numpy(clip).permute(0, 3, 1, 2))  # (F, 3, H, W)
            times.append({"total_num_frames": len(clip), "fps": fps, "frames_indices": [*range(len(clip))]})
        about = {"video_metadata": times or None, "do_sample_frames": False, "size": self.size}
        inputs = self.processor(
            text=prompts, videos=videos or None, videos_kwargs=about, padding=True, return_tensors="pt"
        ).to(self.model.device)
        out = self.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------- which clips


def films_of(config: Config) -> list[Film]:
    """The videos to caption, in the order of the clips. Raises FileNotFoundError or ValueError where there is
    none."""
    if config.videos:
        return films_of_videos(config)
    toy = ToyRelease(config.raw) if config.data == "toy" else None
    splits = toy.splits if toy else cc2017_splits(config.train_segments, config.test_segments)
    films = []
    for split, segments in splits.items():
        for segment in segments:
            clips = toy.clips[segment] if toy else SEGMENT_VOLUMES
            films.append(Film(segment, split, config.raw / "stimuli" / f"{segment}.mp4", clips, 2.0))
    if missing := [str(film.file) for film in films if not film.file.is_file()]:
        advice = "download it, or give --train-segments, --test-segments"
        raise FileNotFoundError(f"{', '.join(missing)} not there: {advice}")
    return films


def films_of_videos(config: Config) -> list[Film]:
    videos, films = config.videos, []
    is_pattern = glob.has_magic(videos) or Path(videos).is_file()
    for file in sorted(map(Path, glob.glob(videos if is_pattern else str(Path(videos, "*.*"))))):
        seconds = video_info(file).duration
        clips = int((seconds + 0.05) // config.seconds) if config.seconds else 1
        films.append(Film(file.stem, None, file, clips, config.seconds or seconds))
    if not sum(film.clips for film in films):
        problem = f"--videos {videos}: no video of {config.seconds or 0} s or more"
        raise FileNotFoundError(f"{problem}; give a folder or a pattern in quotes")
    for segment, n in Counter(film.segment for film in films).items():
        if n > 1:
            problem = f"--videos {videos}: two files are called {segment}"
            raise ValueError(f"{problem}; their clips could not be told apart")
    return films


def clips_from(films: list[Film], done: int, frames: int) -> Iterator[tuple[Film, int, np.ndarray]]:
    """Film, number in it and `frames` frames, uint8 (F, H, W, 3), of each clip but the first `done`; one clip
    is decoded at a time."""
    for film in films:
        if done < film.clips:
            for k, clip in enumerate(read_clips(film.file, film.clips, film.seconds)):
                if k >= done:
                    yield film, k, clip[uniform_frames(len(clip), frames)]
        done = max(0, done - film.clips)


# ---------------------------------------------------------------- commands


def begin(part: Path, note: Path, recipe: dict) -> int:
    """How many clips an earlier start left in `part`. Whole batches count, since an answer depends in its
    last bits on what it was padded to; the rest is cut off. Raises ValueError where `note` says that it was
    begun by another recipe."""
    lines = part.read_bytes().splitlines(keepends=True) if part.is_file() else []
    complete = [line for line in lines if line.endswith(b"\n")]  # a kill leaves half a line
    done = len(complete) // recipe["batch"] * recipe["batch"]
    with advising(f"delete {part} to begin anew"):
        begun = read_json(note) if done else recipe
    for key, value in recipe.items():
        if begun.get(key) != value:
            problem = f"{part} was begun with {key} = {begun.get(key)!r}, but {key} = {value!r} is asked for"
            raise ValueError(f"{problem}; delete it to begin anew")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(note, {**recipe, "versions": versions})
    with written_whole(part) as file:
        file.write_bytes(b"".join(complete[:done]))
    return done


def caption(config: Config) -> None:
    """Captions all clips into `config.out`; until it is whole, lines are appended to a file of another
    name."""
    films, out = films_of(config), config.out
    part, total = out.with_name(f".{out.stem}.part.jsonl"), sum(film.clips for film in films)
    recipe = {
        "model": config.model,
        "frames": config.frames,
        "batch": config.batch,
        "pixels": config.pixels,
        "prompts": [CAPTION, OBJECTS],
        "videos": [f"{film.file.name} {film.clips} x {film.seconds:g} s" for film in films],
    }
    done = begin(part, out.with_name(f"{out.stem}.recipe.json"), recipe)
    counted = f"{total:,} clips of {len(films)} videos, {done:,} of them done"
    tqdm.write(f"{config.model}: {counted}; {config.frames} frames a clip -> {out}")
    captioner = Captioner(config.model, config.pixels)
    stream = clips_from(films, done, config.frames)
    with open(part, "a") as file, tqdm(total=total, initial=done, unit="clip") as progress:
        while batch := list(islice(stream, config.batch)):
            in_films, numbers, frames = zip(*batch, strict=True)
            captions = captioner.ask([CAPTION] * len(batch), frames, config.frames / in_films[0].seconds)
            answers = captioner.ask([OBJECTS.format(caption=" ".join(text.split())) for text in captions])
            for film, k, text, answer in zip(in_films, numbers, captions, answers, strict=True):
                file.write(json.dumps(answered_row(film, k, text, answer, config.model)) + "\n")
            file.flush()
            progress.update(len(batch))
    if out.suffix == ".jsonl":
        part.rename(out)
        return
    rows = read_json_lines(part)
    for row in rows:
        del row["clip"]  # a number in its video; in a list the place says which clip it is
    with written_whole(out) as file:
        file.write_text(json.dumps(rows, indent=0))
    part.unlink()


def rows_of_list(file: Path, split: str) -> list[dict]:
    """The captions of a list; one that names no segments is of cc2017, in order."""
    if file.suffix == ".jsonl":
        segments = dict.fromkeys(row["segment"] for row in read_json_lines(file, {"segment": str}))
        return read_captions(file, list(segments))
    rows = read_captions(file, [])
    if len(rows) % SEGMENT_VOLUMES:
        wanted = f"a multiple of {SEGMENT_VOLUMES} (cc2017), or a .jsonl"
        raise ValueError(f"{file} has {len(rows)} captions, wanted {wanted}")
    segments = cc2017_splits(len(rows), len(rows))[split]
    for i, row in enumerate(rows):
        row["segment"], row["clip"] = segments[i // SEGMENT_VOLUMES], i % SEGMENT_VOLUMES
        row["split"] = split
    return rows


def rules(config: Config) -> None:
    """The rule-based fallback alone: the captions (and tags) of `config.rules`, with the categories of their
    nouns, into `config.out`."""
    with written_whole(config.out) as part, open(part, "w") as out:
        for split, file in zip(("train", "test"), config.rules, strict=False):
            for row in rows_of_list(file, split):
                place = {key: row[key] for key in ("segment", "clip", "split") if key in row}
                out.write(json.dumps(row_of(place, row["caption"], row.get("tags"), "rules")) + "\n")
    tqdm.write(NOTICE)


def summary(path: Path) -> str:
    """What is in a captions.jsonl: clips, answers that were no list, names that map to nothing, and the table
    of categories."""
    rows = read_json(path, list) if path.suffix == ".json" else read_json_lines(path)
    labels = [row["categories"] for row in rows]
    unknown = Counter(name for row in rows for name in row["tags"] if not clip_categories("", [name]))
    malformed, empty = sum("answer" in row for row in rows), sum(not row["caption"] for row in rows)
    authors = ", ".join(sorted({row["by"] for row in rows}))
    names = ", ".join(f"{name} ({n})" for name, n in unknown.most_common(8)) or "none"
    return f"""{path}: {len(rows):,} clips, captioned by {authors}; {empty} captions are empty
{malformed} answers were no list of names: kept in `answer`, and rule-based categories taken in their place
names without a category: {names}
{category_table(labels, merge_rare(labels))}"""


def check(config: Config) -> None:
    """Sets the default of --out. Raises ValueError where options do not go together, or --out is there."""
    if (config.data is not None) + (config.videos is not None) + bool(config.rules) != 1:
        raise ValueError("give one of --data, --videos and --rules")
    if len(config.rules) > 2:
        problem = f"{len(config.rules)} files are given"
        raise ValueError(f"--rules takes captions.jsonl, or the training and the test list; {problem}")
    if config.data and not config.raw:
        raise ValueError(f"--data {config.data} wants --raw, the folder of the release")
    if not config.data and not config.out:
        raise ValueError("--out says where the captions go")
    out = config.out = config.out or config.raw / "captions.jsonl"
    if out.suffix not in (".jsonl", ".json") or (out.suffix == ".json" and not config.videos):
        wanted = "wanted a name that ends in .jsonl, or in .json for a list of --videos"
        raise ValueError(f"--out {out}: {wanted}")
    if out.is_file():
        raise ValueError(f"{out} is there already: delete it to make it anew, or give another --out")


def main(argv: Sequence[str]) -> None:
    config = parse(Config, PRESETS, __doc__, "extras/caption.py", argv)
    check(config)
    rules(config) if config.rules else caption(config)
    print(summary(config.out))


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

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
Greedy decoding in the same batches, so a run that was killed goes on where it was and ends with the same
file.
"""

import argparse
import glob
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
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
from support.options import Parser  # noqa: E402
from support.readers import read_json, read_json_lines  # noqa: E402
from support.runs import door  # noqa: E402
from support.videos import read_clips, uniform_frames, video_info  # noqa: E402
from toy.release import ToyRelease  # noqa: E402

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
CAPTION = "Describe in one short sentence what this video shows: who or what, where, and what happens."
OBJECTS = (
    'Caption: "{caption}"\nWhich of these objects does the caption name, in these or in other words? '
    + ", ".join(name for names in COCO.values() for name in names)
    + ".\nAnswer with a JSON list of names from the list and nothing else; with [] if it names none."
)
NOTICE = (
    "rule-based: no model has looked at any frame; categories are those of the nouns in captions and tags "
    "(coco_nouns.txt)"
)


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
    if text.startswith("["):
        try:
            names = json.loads(text)
        except json.JSONDecodeError:
            return None
        if not all(isinstance(name, str) for name in names):
            return None
    elif re.fullmatch(r"(none|no objects?|nothing)\.?", text.lower()):
        names = []
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        bullets = [re.match(r"(?:[-*•]|\d+[.)])\s+(.+)", line) for line in lines]
        names = (
            [bullet[1] for bullet in bullets]
            if bullets and all(bullets)
            else text.split(",")
            if len(lines) == 1
            else [text]
        )
    names = [re.sub(r"^(an?|the) ", "", name.strip().strip("\"'`*.").lower()) for name in names]
    if len(names) > 20 or not all(re.fullmatch(r"[a-z][a-z'’-]*( [a-z'’-]+){0,2}", name) for name in names):
        return None
    return list(dict.fromkeys(names))


def row_of(film: Film, clip: int, caption: str, answer: str, model: str) -> dict:
    """The line of captions.jsonl of a clip."""
    caption, names = " ".join(caption.split()).strip('"'), parse_objects(answer)
    row = {"segment": film.segment, "clip": clip, "video": film.file.name} | (
        {"split": film.split} if film.split else {}
    )
    row |= {
        "caption": caption,
        "tags": names or [],
        "categories": clip_categories(caption, names),
        "by": model,
    }
    return row | ({"categories_by": "rules", "answer": answer} if names is None else {})


# ---------------------------------------------------------------- the model


class Captioner:
    """Qwen2.5-VL on a GPU in bf16, or on the CPU in float32. name: of the Hub, or a folder. pixels: of a
    frame, at most."""

    def __init__(self, name: str, pixels: int):
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
        self.processor.tokenizer.padding_side = "left"  # so that the answers begin together
        self.model = (
            transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
                name, dtype=dtype, trust_remote_code=False
            )
            .eval()
            .to(device)
        )
        self.size = {"shortest_edge": min(pixels, 128 * 28 * 28), "longest_edge": pixels}

    @torch.inference_mode()
    def ask(
        self,
        questions: Sequence[str],
        clips: Sequence[np.ndarray] | None = None,
        fps: float = 4.0,
        tokens: int = 96,
    ) -> list[str]:
        """An answer of at most `tokens` tokens to each question, on its clip, uint8 (F, H, W, 3), where
        `clips` are given."""
        video = [{"type": "video"}] if clips else []
        talk = [
            [{"role": "user", "content": [*video, {"type": "text", "text": question}]}]
            for question in questions
        ]
        prompts = [
            self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            for turns in talk
        ]
        more = {}
        if clips:
            frames = [torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in clips]  # (F, 3, H, W)
            times = [
                {"total_num_frames": len(clip), "fps": fps, "frames_indices": list(range(len(clip)))}
                for clip in clips
            ]
            more = {
                "videos": frames,
                "videos_kwargs": {"video_metadata": times, "do_sample_frames": False, "size": self.size},
            }
        inputs = self.processor(text=prompts, padding=True, return_tensors="pt", **more).to(self.model.device)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = self.model.generate(**inputs, max_new_tokens=tokens, **greedy)
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------- which clips


def films_of(args: argparse.Namespace) -> list[Film]:
    """The videos to caption, in the order of the clips. Raises FileNotFoundError or ValueError where there is
    none."""
    if args.data == "cc2017":
        splits = cc2017_splits(args.train_segments, args.test_segments)
        named = [
            (segment, split, args.raw / "stimuli" / f"{segment}.mp4")
            for split in splits
            for segment in splits[split]
        ]
        if missing := [str(file) for _, _, file in named if not file.is_file()]:
            raise FileNotFoundError(
                f"{', '.join(missing)} not there: download it, or give --train-segments, --test-segments"
            )
        return [Film(segment, split, file, SEGMENT_VOLUMES, 2.0) for segment, split, file in named]
    if args.data == "toy":
        toy = ToyRelease(args.raw)
        return [
            Film(name, split, toy.stimulus(name)[0], toy.window(name)[1], 2.0)
            for split, segments in toy.splits.items()
            for name in segments
        ]
    pattern = (
        args.videos
        if glob.has_magic(args.videos) or Path(args.videos).is_file()
        else str(Path(args.videos, "*.*"))
    )
    films = []
    for file in sorted(Path(name) for name in glob.glob(pattern)):
        seconds = video_info(file).duration
        clips = int((seconds + 0.05) // args.seconds) if args.seconds else 1
        films.append(Film(file.stem, None, file, clips, args.seconds or seconds))
    if not sum(film.clips for film in films):
        raise FileNotFoundError(
            f"--videos {args.videos}: no video of {args.seconds or 0} s or more; give a folder or a "
            "pattern in quotes"
        )
    if repeated := [name for name, n in Counter(film.segment for film in films).items() if n > 1]:
        raise ValueError(
            f"--videos {args.videos}: two files are called {repeated[0]}; their clips could not be told apart"
        )
    return films


def clips_from(films: list[Film], done: int, frames: int) -> Iterator[tuple[Film, int, np.ndarray]]:
    """Film, number in it and `frames` frames, uint8 (F, H, W, 3), of each clip but the first `done`; one clip
    is decoded at a time."""
    for film in films:
        skipped, done = min(done, film.clips), done - min(done, film.clips)
        if skipped < film.clips:
            for k, clip in enumerate(read_clips(film.file, film.clips, film.seconds)):
                if k >= skipped:
                    yield film, k, clip[uniform_frames(len(clip), frames)]


# ---------------------------------------------------------------- commands


def caption(args: argparse.Namespace) -> Path:
    """Captions all clips into `args.out`; until it is whole, lines are appended to a file of another name."""
    films, out = films_of(args), args.out
    part, note = out.with_name(f".{out.stem}.part.jsonl"), out.with_name(f"{out.stem}.recipe.json")
    recipe = {
        "model": args.model,
        "frames": args.frames,
        "batch": args.batch,
        "pixels": args.pixels,
        "prompts": [CAPTION, OBJECTS],
    }
    recipe |= {"videos": [f"{film.file.name} {film.clips} x {film.seconds:g} s" for film in films]}
    if out.is_file():
        raise ValueError(f"{out} is there already: delete it to make it anew, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    lines = part.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]  # a kill leaves half a line
    done = (
        len(whole) // args.batch * args.batch
    )  # whole batches, since an answer depends in its last bits on what it was padded to
    begun = read_json(note, mend=f"delete {part} to begin anew") if done else recipe
    for key, asked in recipe.items():
        if begun.get(key) != asked:
            said = f"{part} was begun with {key} = {begun.get(key)!r}, but {key} = {asked!r} is asked for"
            raise ValueError(f"{said}; delete it to begin anew")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(note, recipe | {"versions": versions})
    with written_whole(part) as file:
        file.write_bytes(b"".join(whole[:done]))

    total = sum(film.clips for film in films)
    tqdm.write(
        f"{args.model}: {total:,} clips of {len(films)} videos, {done:,} of them done; {args.frames} "
        f"frames a clip -> {out}"
    )
    captioner = Captioner(args.model, args.pixels)
    stream = clips_from(films, done, args.frames)
    with open(part, "a") as file, tqdm(total=total, initial=done, unit="clip") as progress:
        while group := list(islice(stream, args.batch)):
            fps = args.frames / group[0][0].seconds
            captions = captioner.ask([CAPTION] * len(group), [frames for _, _, frames in group], fps)
            answers = captioner.ask([OBJECTS.format(caption=" ".join(c.split())) for c in captions])
            rows = [
                row_of(film, k, *said, args.model)
                for (film, k, _), *said in zip(group, captions, answers, strict=True)
            ]
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            progress.update(len(rows))
    if out.suffix == ".json":
        rows = read_json_lines(part)
        for row in rows:
            del row["clip"]  # a number in its video; in a list the place says which clip it is
        with written_whole(out) as file:
            file.write_text(json.dumps(rows, indent=0))
        part.unlink()
    else:
        part.rename(out)
    return out


def rules(args: argparse.Namespace) -> Path:
    """The rule-based fallback alone: the captions (and tags) of `args.rules`, with the categories of their
    nouns, into `args.out`."""
    if args.out.is_file():
        raise ValueError(f"{args.out} is there already: delete it to make it anew, or give another --out")
    with written_whole(args.out) as part, open(part, "w") as file:
        for split, path in zip(("train", "test"), args.rules, strict=False):
            if path.suffix == ".jsonl":
                segments = list(
                    dict.fromkeys(row["segment"] for row in read_json_lines(path, {"segment": str}))
                )
                rows = read_captions(path, segments)
            else:
                rows = read_captions(path, [])
                if len(rows) % SEGMENT_VOLUMES:
                    raise ValueError(
                        f"{path} has {len(rows)} captions, wanted a multiple of {SEGMENT_VOLUMES} "
                        "(cc2017), or a .jsonl"
                    )
                of = [divmod(i, SEGMENT_VOLUMES) for i in range(len(rows))]
                name = {"train": "seg", "test": "test"}[split]
                rows = [
                    row | {"segment": f"{name}{s + 1}", "clip": k, "split": split}
                    for row, (s, k) in zip(rows, of, strict=True)
                ]
            for row in rows:
                kept = {key: row[key] for key in ("segment", "clip", "split") if key in row}
                categories = clip_categories(row["caption"], row.get("tags"))
                kept |= {
                    "caption": row["caption"],
                    "tags": row.get("tags") or [],
                    "categories": categories,
                    "by": "rules",
                }
                file.write(json.dumps(kept) + "\n")
    tqdm.write(NOTICE)
    return args.out


def summary(path: Path) -> str:
    """What is in a captions.jsonl: clips, answers that were no list, names that map to nothing, and the table
    of categories."""
    rows = read_json(path, list) if path.suffix == ".json" else read_json_lines(path)
    labels = [row["categories"] for row in rows]
    unknown = Counter(name for row in rows for name in row["tags"] if not clip_categories("", [name]))
    malformed, empty = sum("answer" in row for row in rows), sum(not row["caption"] for row in rows)
    return "\n".join(
        [
            f"{path}: {len(rows):,} clips, captioned by {', '.join(sorted({row['by'] for row in rows}))}; "
            f"{empty} captions are empty",
            f"{malformed} answers were no list of names: kept in `answer`, and rule-based categories taken "
            "in their place",
            "names without a category: "
            + (", ".join(f"{name} ({n})" for name, n in unknown.most_common(8)) or "none"),
            category_table(labels, merge_rare(labels)),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", choices=["cc2017", "toy"], help="take the videos of this release's folder, --raw")
    add("--raw", type=Path, help="folder of the release, with stimuli/ (toy: data/toy/raw)")
    add(
        "--videos",
        metavar="GLOB",
        help="a folder of videos or a pattern in quotes, in place of --data; the segment is the file's name",
    )
    add(
        "--seconds",
        type=float,
        help="cut the --videos into clips of so many seconds (default: a video is one clip)",
    )
    add(
        "--rules",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="captions.jsonl, or cc2017's training and test list; no model is run",
    )
    add("--out", type=Path, help="a .jsonl, or for --videos a .json list (default: RAW/captions.jsonl)")
    add("--model", default=MODEL, help=f"name on the Hub or folder of a Qwen2.5-VL (default: {MODEL})")
    add("--frames", type=int, default=8, help="frames of a clip that are shown (default: 8)")
    add("--pixels", type=int, default=448 * 448, help="of a frame, at most (default: 448 * 448)")
    add("--batch", type=int, default=16, help="clips at once (default: 16)")
    add("--train-segments", type=int, default=18, help="of cc2017 (default: 18)")
    add("--test-segments", type=int, default=5, help="of cc2017 (default: 5)")
    args = parser.parse_args(argv)
    if (args.data is not None) + (args.videos is not None) + (args.rules is not None) != 1:
        parser.error("give one of --data, --videos and --rules")
    if args.rules and len(args.rules) > 2:
        parser.error(
            f"--rules takes captions.jsonl, or the training and the test list; {len(args.rules)} files are "
            "given"
        )
    if args.data == "toy":
        args.raw = args.raw or Path("data/toy/raw")
    if args.data and not args.raw:
        parser.error(f"--data {args.data} wants --raw, the folder of the release")
    if not args.data and not args.out:
        parser.error("--out says where the captions go")
    args.out = args.out or args.raw / "captions.jsonl"
    if args.out.suffix not in (".jsonl", ".json") or (args.out.suffix == ".json" and not args.videos):
        parser.error(
            f"--out {args.out}: wanted a name that ends in .jsonl, or in .json for a list of --videos"
        )
    if min(args.frames, args.batch) < 1 or args.pixels < 56 * 56:
        parser.error(
            f"--frames {args.frames} --batch {args.batch} --pixels {args.pixels}: wanted at least 1, 1 and "
            f"{56 * 56}"
        )
    print(summary(rules(args) if args.rules else caption(args)))


if __name__ == "__main__":
    door(main)

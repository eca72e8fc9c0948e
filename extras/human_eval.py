"""A blind study of reconstructions by people (Table 3): which method's video is best, by four questions.

    python extras/human_eval.py make RUN RUN ... --out study    RUN is runs/<data>/sub<K>/<NAME>-s<seed>
    python extras/human_eval.py make --pairs DIR --out study    DIR/gt/NAME.* and DIR/METHOD/NAME.*
    python extras/human_eval.py tally study votes/*.json        the table, and study/tally.json

In:  of each clip the stimulus and a video of each method, as evaluate.py makes or reads them.
Out: study/page/      for the participants, as a folder or on any web server: index.html and videos/ID.mp4. It
                      opens by a double click, loads nothing else and sends nothing; a participant saves a
                      file of votes and sends it back. It is a folder and not one file, because 360 groups of
                      five videos, as in the paper, take 370 MB
     study/key.json   which video is whose; keep it back. The page has opaque names only, the videos neither
                      names nor dates; all are of one size and play as long as the stimulus does: only what
                      they show tells them apart
     study/tally.json
Videos are rewritten as H.264 4:2:0, which browsers play; small ones are enlarged by a whole factor first, so
that thin colours survive.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this file sees the project
from extras.figures import names_of  # noqa: E402
from metrics.pairs import Pair, find_pairs  # noqa: E402
from support.files import write_json  # noqa: E402
from support.options import Parser, within  # noqa: E402
from support.readers import check_keys, damaged, read_json  # noqa: E402
from support.runs import door  # noqa: E402
from support.videos import read_video  # noqa: E402

# as in human_eval.html, and Table 3
QUESTIONS = ("semantic_alignment", "temporal_consistency", "visual_quality", "overall_fidelity")
SAME = 5  # grey levels of 255: where two stimuli differ by more on average, they are not the same clip
LONG_AGO = 946_684_800  # 1 January 2000, s


# ---------------------------------------------------------------- what is compared


@dataclass
class Clip:
    """One clip, to be shown as one group."""

    name: str
    stimuli: list[Path]  # of each run one, which must show the same; the first is shown
    videos: dict[str, Path]  # by method


def read_pairs(folder: Path, mend: str) -> dict[str, list[Pair]]:
    """Of each method the pairs of a folder. Raises FileNotFoundError or ValueError that ends with `mend`."""
    try:
        return find_pairs(folder)
    except (FileNotFoundError, ValueError) as error:
        found = re.split("; wanted|; --skip-bad", str(error))[0]  # those are options of evaluate.py
        raise type(error)(f"{found}: {mend}") from error


def clips_of_pairs(folder: Path) -> list[Clip]:
    """folder/gt/NAME.* and folder/METHOD/NAME.*"""
    sets = read_pairs(folder, "--pairs DIR wants DIR/gt/NAME.* and DIR/METHOD/NAME.*")
    return clips_of(sets)


def clips_of_runs(runs: list[Path]) -> list[Clip]:
    """RUN/eval/gt/NNNN.mp4 and RUN/eval/recon/NNNN.mp4 of several runs."""
    names = names_of(runs)
    if len(set(names)) < len(names):
        raise ValueError(f"the runs are named {', '.join(names)}, wanted different names")
    sets = {}
    for name, run in zip(names, runs, strict=True):
        mend = "python evaluate.py makes the videos of a run"
        pairs = read_pairs(run / "eval", mend)
        if "recon" not in pairs:
            raise FileNotFoundError(f"{run}/eval/recon holds no video: {mend}")
        sets[name] = pairs["recon"]
    return clips_of(sets)


def clips_of(sets: dict[str, list[Pair]]) -> list[Clip]:
    """Of each method its pairs -> the clips, in the order of their names. Raises ValueError where the methods
    are fewer than two, or their clips differ."""
    if len(sets) < 2:
        raise ValueError(f"one method, {', '.join(sets)}: wanted two or more, since people say which is best")
    by_name = {method: {pair.name: pair for pair in pairs} for method, pairs in sets.items()}
    (first, names), *others = by_name.items()
    for method, pairs in others:
        if differ := sorted(names.keys() ^ pairs.keys()):
            has, lacks = (first, method) if differ[0] in names else (method, first)
            of_these = f"{differ[0]} of {has} has no counterpart in {lacks} ({len(differ)} such)"
            raise ValueError(f"clips differ: {of_these}: evaluate the same clips of each run")
    clips = []
    for name in sorted(names):
        pairs = {method: by_name[method][name] for method in sets}
        stimuli = list(dict.fromkeys(pair.gt.path for pair in pairs.values()))
        clips.append(Clip(name, stimuli, {method: pair.pred.path for method, pair in pairs.items()}))
    return clips


# ---------------------------------------------------------------- make


def read_stimulus(clip: Clip, seconds: float) -> tuple[np.ndarray, float]:
    """Its frames uint8 (F, H, W, 3), and how long it plays (s). Raises ValueError where the runs' differ."""
    first, *others = clip.stimuli
    stimulus = read_video(first, seconds)
    for other in others:
        again = read_video(other, seconds).frames
        same = again.shape == stimulus.frames.shape
        if not same or np.abs(again.astype(np.int16) - stimulus.frames).mean() > SAME:
            why = "the runs are of other data or clips"
            raise ValueError(f"{first} and {other} show different stimuli: {why}")
    return stimulus.frames, len(stimulus.frames) / stimulus.fps


def write_for_browsers(path: Path, frames: np.ndarray, seconds: float, width: int, height: int) -> None:
    """uint8 (F, H, W, 3) -> H.264 of the given size, with bars where its shape is another, over `seconds`."""
    import av
    from PIL import Image, ImageOps

    F, H, W, _ = frames.shape
    k = max(1, min(height // H, width // W))
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as out:
        stream = out.add_stream("libx264", rate=Fraction(F / seconds).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # with mbtree the same frames give other bytes now and then
        stream.options = {"crf": "18", "preset": "veryfast", "mbtree": "0"}
        for frame in frames:
            large = Image.fromarray(frame.repeat(k, 0).repeat(k, 1))
            image = ImageOps.pad(large, (width, height), Image.Resampling.BICUBIC)
            out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())
    os.utime(path, (LONG_AGO, LONG_AGO))  # the date tells nothing either


@dataclass
class Study:
    """What `make` was asked for."""

    groups: int | None = None  # so many of the clips, spread evenly; None: all
    each: int | None = None  # so many groups a participant sees; None: all
    height: int = 512  # of the videos, pixels, even
    seconds: float = 2.0  # a clip lasts, where its stimulus is an .npy array and does not say it
    seed: int = 0  # of the order and the opaque names


def make(clips: list[Clip], out: Path, study: Study) -> str:
    """Write the study, whole or not at all, and say what it has. Raises FileExistsError where there is one,
    as votes may refer to it; ValueError for a video that cannot be read."""
    if out.exists():
        raise FileExistsError(f"{out} is there already, and votes may refer to it: choose another --out")
    n = study.groups or len(clips)
    each = study.each or n
    if n > len(clips):
        raise ValueError(f"--groups {n}: there are {len(clips)} clips, wanted at most as many")
    if each > n:
        raise ValueError(f"--each {each}: the study has {n} groups, wanted at most as many")
    if study.height % 2:
        raise ValueError(f"--height {study.height}: wanted an even number")
    clips = [clips[i] for i in np.linspace(0, len(clips) - 1, n).round().astype(int)]
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        (part / "page" / "videos").mkdir(parents=True)
        page, key = write_groups(clips, part / "page" / "videos", study)
        page = json.dumps(page | {"each": each})
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        text = template.replace(">STUDY<", f">{page}<")
        (part / "page" / "index.html").write_text(text, encoding="utf-8")
        write_json(part / "key.json", key)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{n} groups, {each} a participant, of {', '.join(key['methods'])}"


def write_groups(clips: list[Clip], folder: Path, study: Study) -> tuple[dict, dict]:
    """Write the videos in a random order under opaque names; returns what the page knows and what the key
    knows."""
    rng, content, methods = np.random.default_rng(study.seed), hashlib.sha256(), sorted(clips[0].videos)
    shown, key, width = [], [], 0
    for i in tqdm(rng.permutation(len(clips)), desc="groups", unit="group"):
        clip, names = clips[i], [str(name) for name in rng.permutation(methods)]
        group, *ids = [rng.bytes(8).hex() for _ in range(len(names) + 2)]
        stimulus, plays = read_stimulus(clip, study.seconds)
        if not width:  # even, and one for all
            width = max(2, 2 * round(study.height * stimulus.shape[2] / stimulus.shape[1] / 2))
        files = [None, *(clip.videos[name] for name in names)]
        for video, file in zip(ids, files, strict=True):
            frames = read_video(file, study.seconds).frames if file else stimulus
            written = folder / f"{video}.mp4"
            write_for_browsers(written, frames, plays, width, study.height)
            content.update(video.encode() + written.read_bytes())
        shown.append({"id": group, "stimulus": ids[0], "videos": ids[1:]})
        key.append({"id": group, "clip": clip.name, "videos": dict(zip(ids[1:], names, strict=True))})
    content.update(json.dumps(key).encode())
    name = content.hexdigest()[:12]
    page = {"id": name, "width": width, "height": study.height, "groups": shown}
    return page, {"study": name, "seed": study.seed, "methods": methods, "groups": key}


# ---------------------------------------------------------------- tally


def read_key(study: Path) -> dict:
    """study/key.json: study, methods, groups [{id, clip, videos {id: method}}]. Raises FileNotFoundError or
    ValueError, naming it."""
    file, mend = study / "key.json", "wanted the one that `human_eval.py make` wrote"
    key = read_json(file, keys={"study": str, "methods": list, "groups": list}, mend=mend)
    for group in key["groups"]:
        if not isinstance(group, dict):
            raise damaged(file, f"a group {group!r}", "groups {...}", mend)
        videos = check_keys(group, file, {"id": str, "videos": dict}, mend)["videos"]
        if sorted(videos.values(), key=str) != sorted(key["methods"], key=str):
            raise damaged(file, f"a group of {list(videos.values())}", f"of {key['methods']}", mend)
    return key


def read_ballot(file: Path, key: dict) -> tuple[str, list[tuple[str, str, str]]]:
    """A participant and their votes: group, question, video. Raises FileNotFoundError or ValueError, naming
    the file, where it is damaged or of another study."""
    mend = "ask the participant for it again, or leave it out"
    ballot = read_json(file, keys={"study": str, "participant": str, "votes": list}, mend=mend)
    if ballot["study"] != key["study"]:
        found = f"votes of study {ballot['study']}"
        raise damaged(file, found, f"those of study {key['study']}", "tally it with its own")
    if not ballot["votes"]:
        raise damaged(file, "no vote", "one or more", "leave it out")
    videos, votes = {group["id"]: group["videos"] for group in key["groups"]}, []
    for vote in ballot["votes"]:
        if not isinstance(vote, dict):
            raise damaged(file, f"a vote {vote!r}", "votes {...}", mend)
        check_keys(vote, file, {"group": str, "question": str, "video": str}, mend)
        group, question, video = vote["group"], vote["question"], vote["video"]
        if question not in QUESTIONS or video not in videos.get(group, {}):
            wanted = "a group, a question and a video of this study"
            raise damaged(file, f"a vote {group}, {question}, {video}", wanted, mend)
        votes.append((group, question, video))
    if len({vote[:2] for vote in votes}) < len(votes):
        raise damaged(file, "two answers to one question of a group", "one", mend)
    return ballot["participant"], votes


def read_votes(study: Path, files: list[Path]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The methods, and of the groups that were voted on choice and place, int (questions, participants,
    groups), -1 where there is no vote: which method was chosen, and where on the page it stood. Raises
    FileNotFoundError or ValueError, naming the file, where one is damaged, of another study, or its
    participant has another."""
    key, seen = read_key(study), {}
    methods, number = key["methods"], {group["id"]: i for i, group in enumerate(key["groups"])}
    choice = np.full((len(QUESTIONS), len(files), len(number)), -1)
    place = choice.copy()
    for p, file in enumerate(files):
        who, votes = read_ballot(file, key)
        if who in seen:
            mend = "leave out the one with fewer votes"
            raise ValueError(f"{file} and {seen[who]} are both of participant {who}: {mend}")
        seen[who] = file
        for group, question, video in votes:
            at = QUESTIONS.index(question), p, number[group]
            videos = key["groups"][number[group]]["videos"]
            choice[at] = methods.index(videos[video])
            place[at] = list(videos).index(video)
    voted = (choice >= 0).any((0, 1))  # (groups,)
    return methods, choice[..., voted], place[..., voted]


def agreement(choice: np.ndarray) -> tuple[float, float]:
    """One question's choices (participants, groups), -1 for none -> share of pairs of participants who chose
    alike, Krippendorff's alpha.

    alpha = 1 - observed / expected disagreement, nominal (Krippendorff 2011): 1 when all agree, 0 when as
    chance would have it, given how often each method is chosen at all. So it is low where one method wins
    nearly everywhere, and the first number is to be read beside it. NaN where no group has two votes; alpha
    too where only one method was ever chosen.
    """
    counts = np.stack([(choice == m).sum(0) for m in range(choice.max() + 1)])  # (methods, groups)
    counts = counts[:, counts.sum(0) > 1].astype(float)
    raters, total = counts.sum(0), counts.sum(1)  # (groups,) (methods,)
    n = total.sum()
    if n == 0:
        return np.nan, np.nan
    alike = (counts * (counts - 1)).sum(0)  # (groups,) ordered pairs
    observed = 1 - (alike / (raters - 1)).sum() / n
    expected = 1 - (total * (total - 1)).sum() / (n * (n - 1))
    pairs = alike.sum() / (raters * (raters - 1)).sum()
    return float(pairs), float(1 - observed / expected) if expected > 0 else np.nan


def shares(choice: np.ndarray, methods: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices as of `read_votes` -> share of the votes (questions, methods), and its 95 % interval (2,
    questions, methods).

    The bootstrap draws participants and groups, both with replacement and independently (Owen 2007,
    pigeonhole bootstrap): the interval speaks of other participants and other clips. A vote counts as often
    as its participant was drawn times its group was.
    """
    rng, (_, P, G) = np.random.default_rng(0), choice.shape
    of = np.stack([choice == m for m in range(methods)], 1).astype(float)  # (questions, methods, P, G)
    drawn_p = rng.multinomial(P, np.full(P, 1 / P), resamples).astype(float)  # (resamples, P)
    drawn_g = rng.multinomial(G, np.full(G, 1 / G), resamples).astype(float)  # (resamples, G)
    counted = np.einsum("rp,qmpg,rg->rqm", drawn_p, of, drawn_g, optimize=True)
    with np.errstate(invalid="ignore"):  # a draw may hold no vote, where participants see few of the groups
        sampled = counted / counted.sum(-1, keepdims=True)
    share = of.mean((2, 3)) / of.mean((2, 3)).sum(1, keepdims=True)
    return share, np.nanpercentile(sampled, [2.5, 97.5], axis=0)


def tally(study: Path, files: list[Path], resamples: int = 2000) -> dict:
    """Count the votes; writes study/tally.json and returns it. Files whose names begin with a dot are passed
    over."""
    out, files = study / "tally.json", [file for file in files if not file.name.startswith(".")]
    if any(file.resolve() == out.resolve() for file in files):
        raise ValueError(f"{out} would be overwritten: it is the result, not a file of votes")
    methods, choice, place = read_votes(study, files)
    if absent := [q for q, votes in zip(QUESTIONS, choice, strict=True) if votes.max(initial=-1) < 0]:
        raise ValueError(f"no vote on {', '.join(absent)} in {len(files)} files: wanted all four answered")
    share, (low, high) = shares(choice, len(methods), resamples)
    pairs, alpha = zip(*map(agreement, choice), strict=True)
    _, participants, groups = choice.shape
    result = {"participants": participants, "groups": groups, "votes": int((choice >= 0).sum())}
    result["chance"] = 1 / len(methods)
    for name, values in (("share", share), ("ci95_low", low), ("ci95_high", high)):
        result[name] = {method: by_question(values[:, m]) for m, method in enumerate(methods)}
    result |= {"pairs_alike": by_question(pairs), "krippendorff_alpha": by_question(alpha)}
    result["share_by_place"] = [float((place == k).sum() / (place >= 0).sum()) for k in range(len(methods))]
    write_json(out, result)
    return result


def by_question(values) -> dict[str, float | None]:
    return {q: None if np.isnan(v) else float(v) for q, v in zip(QUESTIONS, values, strict=True)}


def table(result: dict) -> str:
    """What `tally` returns, as text."""
    counted = f"{result['participants']} participants, {result['groups']} groups, {result['votes']} votes"
    lines = [f"{counted}; share of votes and 95 % interval"]

    def line(name: str, cells: list[str]) -> None:
        lines.append(f"{name:<22}" + "".join(f"{cell:>24}" for cell in cells))

    line("", [question.replace("_", " ") for question in QUESTIONS])
    for method, share in result["share"].items():
        low, high = result["ci95_low"][method], result["ci95_high"][method]
        line(method, [f"{share[q]:.1%} [{low[q]:.1%}, {high[q]:.1%}]" for q in QUESTIONS])
    line("chance", [f"{result['chance']:.1%}"] * len(QUESTIONS))
    pairs, alpha = result["pairs_alike"], result["krippendorff_alpha"]
    line("pairs who agree", ["n/a" if pairs[q] is None else f"{pairs[q]:.1%}" for q in QUESTIONS])
    line("Krippendorff's alpha", ["n/a" if alpha[q] is None else f"{alpha[q]:.3f}" for q in QUESTIONS])
    places = [f"{chr(65 + k)} {share:.1%}" for k, share in enumerate(result["share_by_place"])]
    lines.append(f"by place on the page: {', '.join(places)}")
    if 1 in (result["participants"], result["groups"]):
        lines.append("the interval says nothing of other participants, or clips, where there is one alone")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "human_eval.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    new = commands.add_parser("make", help="write the study", **shown)
    new.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs/<data>/sub<K>/<NAME>-s<seed>")
    new.add_argument("--pairs", type=Path, metavar="DIR", help="in place of runs: DIR/gt and DIR/METHOD")
    new.add_argument("--out", type=Path, required=True, help="the folder to write")
    for name, kind, text in (
        ("groups", within(int, least=1), "so many clips, spread over all (all where not given)"),
        ("each", within(int, least=1), "so many groups a participant (all where not given)"),
        ("height", within(int, least=16, most=2160), "of the videos, pixels, even; the width follows"),
        ("seconds", within(float, least=0.1, most=600), "length of a clip whose stimulus is an npy array"),
        ("seed", within(int, least=0), "of the order and the opaque names"),
    ):
        new.add_argument(f"--{name}", type=kind, default=getattr(Study, name), help=text)
    count = commands.add_parser("tally", help="count the votes", **shown)
    count.add_argument("study", type=Path, help="the folder that make wrote")
    count.add_argument("votes", nargs="+", type=Path, help="participants' files")
    args = parser.parse_args(argv)
    if args.command == "make" and bool(args.runs) == bool(args.pairs):
        new.error("wanted either two or more RUN folders or --pairs DIR")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.command == "tally":
        print(table(tally(args.study, args.votes)))
        return
    clips = clips_of_pairs(args.pairs) if args.pairs else clips_of_runs(args.runs)
    asked = Study(args.groups, args.each, args.height, args.seconds, args.seed)
    print(make(clips, args.out, asked))
    print(f"written: {args.out}/page/ (give participants this folder: index.html)")
    print(f"         {args.out}/key.json (keep it back)")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

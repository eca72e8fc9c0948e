"""A blind study of reconstructions by people (Table 3): which method's video is best, by four questions.

    python extras/human_eval.py make RUN RUN ... --out study    RUN is runs/<data>/sub<S>/<NAME>-s<seed>
    python extras/human_eval.py make --pairs DIR --out study    DIR/gt/NAME.* and DIR/METHOD/NAME.*
    python extras/human_eval.py tally study votes/*.json        the table, and study/tally.json

In:  of each clip the stimulus and a video of each method, as evaluate.py makes or reads them.
Out: study/page/    for the participants, as a folder or on any web server: index.html and videos/ID.mp4. It
                    opens by a double click, loads nothing else and sends nothing; a participant saves a file
                    of votes and sends it back. 360 groups of five videos, as in the paper, take 370 MB
     study/key.json which video is whose; keep it back. The page has opaque names only, the videos neither
                    names nor dates; all are of one size and last as long as the stimulus
"""

import argparse
import hashlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this file sees the project
from extras.runs import names_of  # noqa: E402
from metrics.pairs import Pair, find_pairs  # noqa: E402
from support.files import save_folder, write_json  # noqa: E402
from support.options import Parser, within  # noqa: E402
from support.readers import damaged, read_json, reading  # noqa: E402
from support.runs import door  # noqa: E402
from support.videos import Video, read_video, write_for_browsers  # noqa: E402

# as in human_eval.html, and Table 3
QUESTIONS = ("semantic_alignment", "temporal_consistency", "visual_quality", "overall_fidelity")
PAPER = {"MindVideo": "8.31 7.74 9.08 7.79", "NeuroClips": "16.30 18.13 13.79 15.80"}  # Table 3, % of votes
PAPER |= {"Mind-Animator": "11.62 8.23 6.46 8.82", "CineNeuron": "63.77 65.90 70.67 67.59"}
SAME = 5  # grey levels of 255: where two stimuli differ by more on average, they are not the same clip
LONG_AGO = 946_684_800  # 1 January 2000, s


# ---------------------------------------------------------------- make


def pairs_of_runs(runs: list[Path]) -> dict[str, list[Pair]]:
    """RUN/eval/gt/NNNN.mp4 and RUN/eval/recon/NNNN.mp4 of several runs, by the runs' names."""
    names = zip(names_of(runs), runs, strict=True)
    return {name: find_pairs(run / "eval", skip_bad=True).get("recon", []) for name, run in names}


def clips_of(pairs: dict[str, list[Pair]]) -> list[dict[str, Pair]]:
    """The pairs of each method -> of each clip {method: pair}, in the order of the clips' names. Raises
    ValueError where the methods are fewer than two, or their clips differ."""
    if len(pairs) < 2:
        raise ValueError(f"one method, {', '.join(pairs)}: wanted two or more, of which one is best")
    clips: dict[str, dict[str, Pair]] = defaultdict(dict)
    for method, of_method in pairs.items():
        for pair in of_method:
            clips[pair.name] |= {method: pair} if pair.pred else {}
    for name, of_clip in clips.items():
        if lacking := pairs.keys() - of_clip:
            text = f"{', '.join(sorted(lacking))} has no video of clip {name}"
            raise ValueError(f"{text}: wanted the same clips of each run, or method")
    return [clips[name] for name in sorted(clips)]


def read_stimulus(clip: dict[str, Pair], seconds: float) -> Video:
    """An .npy array lasts `seconds`. Raises ValueError where the runs' stimuli differ."""
    first, *copies = dict.fromkeys(pair.gt for pair in clip.values())
    stimulus = read_video(first.path, seconds, first.clip)
    for copy in copies:
        frames = read_video(copy.path, seconds, copy.clip).frames
        same = frames.shape == stimulus.frames.shape
        if not same or np.abs(frames.astype(np.int16) - stimulus.frames).mean() > SAME:
            text = "show different stimuli: the runs are of other data or clips"
            raise ValueError(f"{first.path} and {copy.path} {text}")
    return stimulus


def make(clips: list[dict[str, Pair]], args: argparse.Namespace) -> None:
    """Write the study, whole or not at all. Raises ValueError where there is one, an option does not fit or a
    video cannot be read."""
    out, n = args.out, args.groups or len(clips)
    for is_wrong, problem in [
        (out.exists(), f"{out} is there already, and votes may refer to it: choose another --out"),
        (n > len(clips), f"--groups {n}: there are {len(clips)} clips, wanted at most as many"),
        ((args.each or n) > n, f"--each {args.each}: the study has {n} groups, wanted at most as many"),
        (args.height % 2, f"--height {args.height}: wanted an even number"),
    ]:
        if is_wrong:
            raise ValueError(problem)
    spread = np.linspace(0, len(clips) - 1, n).round().astype(int)

    def write(folder: Path) -> None:
        (folder / "page" / "videos").mkdir(parents=True)
        page, key = write_groups([clips[i] for i in spread], folder / "page" / "videos", args)
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        text = template.replace(">STUDY<", f">{json.dumps(page)}<")
        (folder / "page" / "index.html").write_text(text, encoding="utf-8")
        write_json(folder / "key.json", key)

    save_folder(out, write)


def write_groups(clips: list[dict[str, Pair]], folder: Path, args: argparse.Namespace) -> tuple[dict, dict]:
    """Write the videos in a random order under opaque names; returns what page and key know."""
    rng, content, methods = np.random.default_rng(args.seed), hashlib.sha256(), sorted(clips[0])
    groups, key, width = [], [], 0
    for i in tqdm(rng.permutation(len(clips)), desc="groups", unit="group"):
        names = rng.permutation(methods).tolist()
        group, stimulus_id, *ids = [rng.bytes(8).hex() for _ in range(len(names) + 2)]
        stimulus = read_stimulus(clips[i], args.seconds)
        F, H, W, _ = stimulus.frames.shape
        width = width or max(2, 2 * round(args.height * W / H / 2))  # even, and one for all
        videos = {stimulus_id: stimulus.frames}
        for video, name in zip(ids, names, strict=True):
            pred = clips[i][name].pred
            videos[video] = read_video(pred.path, args.seconds, pred.clip).frames
        for video, frames in videos.items():
            file = folder / f"{video}.mp4"
            write_for_browsers(file, frames, F / stimulus.fps, (width, args.height))
            os.utime(file, (LONG_AGO, LONG_AGO))  # the date tells nothing either
            content.update(video.encode() + file.read_bytes())
        method_of = dict(zip(ids, names, strict=True))
        groups.append({"id": group, "stimulus": stimulus_id, "videos": ids})
        key.append({"id": group, "clip": clips[i][names[0]].name, "videos": method_of})
    content.update(json.dumps(key).encode())
    study_id, each = content.hexdigest()[:12], args.each or len(clips)
    page = {"id": study_id, "width": width, "height": args.height, "each": each, "groups": groups}
    return page, {"study": study_id, "seed": args.seed, "methods": methods, "groups": key}


# ---------------------------------------------------------------- tally


def read_key(file: Path) -> tuple[dict, dict[tuple, tuple]]:
    """What key.json says, and what a vote (group, question, video) means: the number of the question, of the
    group and of the method that was chosen."""
    key = read_json(file, keys={"study": str, "methods": list, "groups": list})
    meaning = {}
    for g, group in enumerate(key["groups"]):
        methods = [*group["videos"].values()]
        if sorted(methods) != sorted(key["methods"]):
            raise damaged(file, f"a group of {methods}", f"of {key['methods']}")
        for video, method in group["videos"].items():
            for q, question in enumerate(QUESTIONS):
                meaning[group["id"], question, video] = q, g, key["methods"].index(method)
    return key, meaning


def read_votes(study: Path, files: list[Path]) -> tuple[list[str], np.ndarray]:
    """The methods, and which was chosen, int (questions, participants, groups that were voted on), -1 for no
    vote. Raises FileNotFoundError or ValueError, naming the file, where one is damaged, of another study, or
    its participant has another."""
    wrote = "wanted the one that `human_eval.py make` wrote"
    with reading(study / "key.json", "methods, and groups of an id and videos", wrote):
        key, meaning = read_key(study / "key.json")
    choice = np.full((len(QUESTIONS), len(files), len(key["groups"])), -1)
    file_of: dict[str, Path] = {}
    wanted = f"votes {{group, question, video}} of study {key['study']}, one a question of a group"
    for p, file in enumerate(files):
        with reading(file, wanted, "ask the participant for it again, or leave it out"):
            ballot = read_json(file, keys={"study": str, "participant": str, "votes": list})
            if ballot["study"] != key["study"] or not ballot["votes"]:
                raise ValueError(f"{len(ballot['votes'])} votes of study {ballot['study']}")
            for row in ballot["votes"]:
                q, g, method = meaning[row["group"], row["question"], row["video"]]
                if choice[q, p, g] >= 0:
                    raise ValueError(f"two answers to {row['question']} of group {row['group']}")
                choice[q, p, g] = method
        if (first := file_of.setdefault(ballot["participant"], file)) != file:
            problem = f"{file} and {first} are both of participant {ballot['participant']}"
            raise ValueError(f"{problem}: leave out the one with fewer votes")
    return key["methods"], choice[..., (choice >= 0).any((0, 1))]


def agreement(choice: np.ndarray) -> tuple[float, float]:
    """One question's choices (participants, groups), -1 for none -> share of pairs of participants who chose
    alike, Krippendorff's alpha (2011), which is 0 by chance, 1 when all agree, and low where one method wins
    nearly everywhere. NaN where no group has two votes; alpha too where one method alone is chosen."""
    import krippendorff

    counts = (choice[..., None] == np.arange(choice.max() + 1)).sum(0)  # (groups, methods)
    counts = counts[counts.sum(1) > 1]
    if not len(counts):
        return np.nan, np.nan
    raters = counts.sum(1)  # (groups,)
    alike = (counts * (counts - 1)).sum() / (raters * (raters - 1)).sum()
    if np.count_nonzero(counts.sum(0)) == 1:
        return float(alike), np.nan
    return float(alike), float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def shares(choice: np.ndarray, methods: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices as of `read_votes` -> share of the votes (questions, methods), and its 95 % interval (2,
    questions, methods), which speaks of other participants and other clips: the pigeonhole bootstrap (Owen
    2007). A vote counts as often as its participant was drawn times its group was."""
    rng, (_, P, G) = np.random.default_rng(0), choice.shape
    votes = np.stack([choice == m for m in range(methods)], 1).astype(float)  # (questions, methods, P, G)
    drawn_p = rng.multinomial(P, np.full(P, 1 / P), resamples).astype(float)  # (resamples, P)
    drawn_g = rng.multinomial(G, np.full(G, 1 / G), resamples).astype(float)  # (resamples, G)
    counted = np.einsum("rp,qmpg,rg->rqm", drawn_p, votes, drawn_g, optimize=True)
    with np.errstate(invalid="ignore"):  # a draw may hold no vote, where participants see few of the groups
        sampled = counted / counted.sum(-1, keepdims=True)
    mean = votes.mean((2, 3))
    return mean / mean.sum(1, keepdims=True), np.nanpercentile(sampled, [2.5, 97.5], axis=0)


def tally(study: Path, files: list[Path], resamples: int = 2000) -> dict:
    """Count the votes; writes study/tally.json and returns it."""
    methods, choice = read_votes(study, files)
    if absent := [q for q, of_question in zip(QUESTIONS, choice, strict=True) if (of_question < 0).all()]:
        raise ValueError(f"no vote on {', '.join(absent)} in {len(files)} files: wanted all four answered")
    share, (low, high) = shares(choice, len(methods), resamples)
    alike, alpha = np.transpose([agreement(of_question) for of_question in choice])
    result = {"participants": choice.shape[1], "groups": choice.shape[2], "votes": int((choice >= 0).sum())}
    result["chance"] = 1 / len(methods)
    for name, values in (("share", share), ("ci95_low", low), ("ci95_high", high)):
        result[name] = {method: by_question(values[:, m]) for m, method in enumerate(methods)}
    result["pairs_alike"] = by_question(alike)
    result["krippendorff_alpha"] = by_question(alpha)
    write_json(study / "tally.json", result)
    return result


def by_question(values: np.ndarray) -> dict[str, float | None]:
    return {q: None if np.isnan(v) else float(v) for q, v in zip(QUESTIONS, values, strict=True)}


def table(result: dict) -> str:
    """What `tally` returns, as text."""
    rows = {"": [question.replace("_", " ") for question in QUESTIONS]}
    for method, share in result["share"].items():
        low, high = result["ci95_low"][method], result["ci95_high"][method]
        rows[method] = [f"{share[q]:.1%} [{low[q]:.1%}, {high[q]:.1%}]" for q in QUESTIONS]
    rows["chance"] = [f"{result['chance']:.1%}"] * len(QUESTIONS)
    rows |= {f"{name}, quoted": [f"{x}%" for x in percent.split()] for name, percent in PAPER.items()}
    for name, key in (("pairs who agree", "pairs_alike"), ("Krippendorff's alpha", "krippendorff_alpha")):
        rows[name] = ["n/a" if value is None else f"{value:.3f}" for value in result[key].values()]
    counted = f"{result['participants']} participants, {result['groups']} groups, {result['votes']} votes"
    lines = [f"{counted}; share of votes and 95 % interval"]
    for name, cells in rows.items():
        lines.append(f"{name:<22}" + "".join(f"{cell:>24}" for cell in cells))
    if 1 in (result["participants"], result["groups"]):
        lines.append("the interval says nothing of other participants, or clips, where there is one alone")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    raw, defaults = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    parser = Parser("human_eval.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("make", help="write the study", formatter_class=defaults, allow_abbrev=False)
    new.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs/<data>/sub<S>/<NAME>-s<seed>")
    new.add_argument("--pairs", type=Path, metavar="DIR", help="in place of runs: DIR/gt and DIR/METHOD")
    new.add_argument("--out", type=Path, required=True, help="the folder to write")
    for name, default, number, text in [
        ("groups", None, within(int, least=1), "so many clips, spread over all (all where not given)"),
        ("each", None, within(int, least=1), "so many groups a participant (all where not given)"),
        ("height", 512, within(int, least=16, most=2160), "of the videos, pixels, even; the width follows"),
        ("seconds", 2.0, within(float, least=0.1, most=600), "length of a clip whose stimulus is an array"),
        ("seed", 0, within(int, least=0), "of the order and the opaque names"),
    ]:
        new.add_argument(f"--{name}", type=number, default=default, help=text)
    count = commands.add_parser("tally", help="count the votes", allow_abbrev=False)
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
    make(clips_of(find_pairs(args.pairs, skip_bad=True) if args.pairs else pairs_of_runs(args.runs)), args)
    print(f"written: {args.out}/page/ (give participants this folder: index.html)")
    print(f"         {args.out}/key.json (keep it back)")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

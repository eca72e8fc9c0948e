"""A blind study of reconstructions by people, as Table 3 of the paper: which method's video is best, by four questions.

    python extras/human_eval.py make RUN RUN ... --out study      RUN is runs/<data>/sub<K>/<NAME>-s<seed>, after evaluate.py
    python extras/human_eval.py make --pairs DIR --out study      DIR/gt/NAME.* and DIR/METHOD/NAME.* (mp4, gif, npy uint8 (F, H, W, 3))
    python extras/human_eval.py tally study votes/*.json          the table, and study/tally.json

In:  of each clip the stimulus and a video of each method.
Out: study/page/     for the participants, as a folder or on any web server: index.html and videos/ID.mp4. It opens by a double click, loads
                     nothing else and sends nothing; a participant saves a file of votes and sends it back. A folder and not one file:
                     360 groups of five videos, as in the paper, take 370 MB, to be read whole before the first is shown if they were in it
     study/key.json  which video is whose; keep it back. The page has opaque names only, the videos neither names nor dates; all are of
                     one size and play as long as the stimulus does: only what they show tells them apart
     study/tally.json
Videos are rewritten as H.264 4:2:0, which browsers play; small ones are enlarged by a whole factor first, so that thin colours survive.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

QUESTIONS = ("semantic_alignment", "temporal_consistency", "visual_quality", "overall_fidelity")  # as in human_eval.html, and Table 3
KINDS = (".mp4", ".gif", ".npy")
SAME = 5  # grey levels of 255: where two runs' stimuli differ by more on average, they are not the same clip


# ---------------------------------------------------------------------------------------------- the videos


def read_video(path: Path) -> tuple[np.ndarray, float | None]:
    """mp4, gif or npy -> frames uint8 (F, H, W, 3), and the seconds it plays (npy: None). Raises ValueError where it is no video."""
    import av

    try:
        if path.suffix == ".npy":
            frames = np.load(path, allow_pickle=False)
            if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
                raise ValueError(f"it holds {frames.dtype} {frames.shape}, wanted uint8 (F, H, W, 3)")
            return frames, None
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            times, frames = zip(*((f.time, f.to_ndarray(format="rgb24")) for f in container.decode(stream)), strict=True)
            last = float(np.median(np.diff(times))) if len(times) > 1 else 1 / float(stream.average_rate)
    except (av.FFmpegError, IndexError, TypeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): make it anew") from error
    return np.stack(frames), times[-1] - times[0] + last


def write_video(path: Path, frames: np.ndarray, seconds: float, width: int, height: int) -> None:
    """For browsers: of the given size, with bars where its shape is another, spread over `seconds`."""
    import av
    from PIL import Image, ImageOps

    F, H, W, _ = frames.shape
    k = max(1, min(height // H, width // W))
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as out:
        stream = out.add_stream("libx264", rate=Fraction(F / seconds).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast", "mbtree": "0"}  # with mbtree the same frames give other bytes now and then
        for frame in frames:
            image = ImageOps.pad(Image.fromarray(frame.repeat(k, 0).repeat(k, 1)), (width, height), Image.Resampling.BICUBIC)
            out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())
    os.utime(path, (946_684_800, 946_684_800))  # 1 January 2000: the date tells nothing either


# ---------------------------------------------------------------------------------------------- make


def videos_in(folder: Path, mends: str) -> dict[str, Path]:
    """The videos of a folder by name. Raises FileNotFoundError or ValueError where there are none, or two of a name."""
    files = sorted(f for f in folder.glob("*") if f.suffix in KINDS and not f.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"{folder} holds no video ({', '.join(KINDS)}): {mends}")
    for a, b in pairwise(files):
        if a.stem == b.stem:
            raise ValueError(f"{a} and {b} have the same name, wanted one video of each clip: delete one")
    return {f.stem: f for f in files}


def sources(runs: list[Path], pairs: Path | None) -> tuple[list[dict[str, Path]], dict[str, dict[str, Path]]]:
    """The stimuli by clip, of --pairs or of each run, and of each method the videos by clip. Raises ValueError where clips differ, or
    fewer than two methods are to be compared."""
    if bool(runs) == bool(pairs):
        raise ValueError("wanted either two or more RUN folders or --pairs DIR")
    if pairs:
        mends = "--pairs DIR wants DIR/gt/NAME.* and DIR/METHOD/NAME.*"
        stimuli = [videos_in(pairs / "gt", mends)]
        folders = {f.name: f for f in sorted(pairs.iterdir()) if f.is_dir() and f.name != "gt"}
    else:
        mends = "python evaluate.py makes the videos of a run"
        stimuli = [videos_in(run / "eval" / "gt", mends) for run in runs]
        names = [run.name if [r.name for r in runs].count(run.name) == 1 else f"{run.parent.name}/{run.name}" for run in runs]
        folders = {name: run / "eval" / "recon" for name, run in zip(names, runs, strict=True)}
        if len(folders) < len(runs):
            raise ValueError(f"runs are named {', '.join(names)}, wanted different names")
    if len(folders) < 2:
        raise ValueError(f"methods found: {', '.join(folders) or 'none'}; wanted two or more, since people say which is best")
    methods = {name: videos_in(folder, mends) for name, folder in folders.items()}
    first = stimuli[0]
    for found in (*stimuli, *methods.values()):
        if differ := sorted(first.keys() ^ found.keys()):
            has, lacks = (first, found) if differ[0] in first else (found, first)
            there = f"{has[differ[0]]} has no counterpart in {next(iter(lacks.values())).parent} ({len(differ)} such)"
            raise ValueError(f"clips differ: {there}, wanted the same {len(first)} of each: {mends}")
    return stimuli, methods


def make(stimuli, methods, out: Path, groups: int | None, each: int | None, height: int, seconds: float, seed: int) -> None:
    """Writes the study, whole or not at all. stimuli and methods as of `sources`; groups: so many of the clips, spread evenly; each: so
    many groups a participant sees; seconds: where the stimulus does not say how long it plays."""
    if out.exists():
        raise FileExistsError(f"{out} is there already, and votes may refer to it: choose another --out, or rm -r {out}")
    clips, rng = sorted(stimuli[0]), np.random.default_rng(seed)
    n = len(clips) if groups is None else groups
    each = n if each is None else each
    if not 1 <= each <= n <= len(clips) or height < 16 or height % 2 or seconds <= 0:
        wanted = f"wanted 1 <= each <= groups <= {len(clips)} clips, an even height of 16 or more, seconds above 0"
        raise ValueError(f"--each {each} --groups {n} --height {height} --seconds {seconds}: {wanted}")
    clips = [clips[i] for i in np.linspace(0, len(clips) - 1, n).round().astype(int)]
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        (part / "page" / "videos").mkdir(parents=True)
        shown, key, content, width = [], [], hashlib.sha256(), 0
        for i in tqdm(rng.permutation(n), desc="groups", unit="group"):
            clip, names = clips[i], [str(name) for name in rng.permutation(sorted(methods))]
            group, *ids = (rng.bytes(8).hex() for _ in range(len(names) + 2))
            stimulus, plays = read_video(stimuli[0][clip])
            for other in (run[clip] for run in stimuli[1:]):
                again, _ = read_video(other)
                if again.shape != stimulus.shape or np.abs(again.astype(np.int16) - stimulus).mean() > SAME:
                    raise ValueError(f"{stimuli[0][clip]} and {other} show different stimuli: the runs are of other data or clips")
            width = width or 2 * round(height * stimulus.shape[2] / stimulus.shape[1] / 2)  # even, and one for all
            for id, frames in zip(ids, (stimulus, *(read_video(methods[name][clip])[0] for name in names)), strict=True):
                file = part / "page" / "videos" / f"{id}.mp4"
                write_video(file, frames, plays or seconds, width, height)
                content.update(id.encode() + file.read_bytes())
            shown.append({"id": group, "stimulus": ids[0], "videos": ids[1:]})
            key.append({"id": group, "clip": clip, "videos": dict(zip(ids[1:], names, strict=True))})
        content.update(json.dumps(key).encode())
        study = content.hexdigest()[:12]
        page = json.dumps({"id": study, "width": width, "height": height, "each": each, "groups": shown})
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        (part / "page" / "index.html").write_text(template.replace(">STUDY<", f">{page}<"), encoding="utf-8")
        key = {"study": study, "seed": seed, "methods": sorted(methods), "groups": key}
        (part / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{n} groups, {each} a participant, of {', '.join(sorted(methods))}")
    print(f"written: {out}/page/ (give participants this folder: index.html), {out}/key.json (keep it back)")


# ---------------------------------------------------------------------------------------------- tally


def read_votes(study: Path, files: list[Path]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The methods, and of the groups that were voted on choice and place, int (questions, participants, groups), -1 where there is no vote:
    which method was chosen, and where on the page it stood. Raises ValueError, naming the file, where one is damaged, of another study,
    or its participant has another.
    """
    try:
        key = json.loads((study / "key.json").read_text(encoding="utf-8"))
        of_study, methods, groups = key["study"], key["methods"], {g["id"]: (i, g["videos"]) for i, g in enumerate(key["groups"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{study / 'key.json'} is no key ({error!r}): wanted the one that `human_eval.py make` wrote") from error
    choice, place = np.full((2, len(QUESTIONS), len(files), len(groups)), -1)
    seen: dict[str, Path] = {}
    for p, file in enumerate(files):
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
            of, who = given["study"], str(given["participant"])
            votes = [(str(v["group"]), str(v["question"]), str(v["video"])) for v in given["votes"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no file of votes ({error!r}): ask the participant for it again or leave it out") from error
        if of != of_study:
            raise ValueError(f"{file} has votes of study {of}, {study} is study {of_study}: tally it with its own")
        if who in seen:
            raise ValueError(f"{file} and {seen[who]} are both of participant {who}: leave out the one with fewer votes")
        if not votes:
            raise ValueError(f"{file} holds no vote: leave it out")
        seen[who] = file
        for vote in votes:
            (g, shown), question, video = groups.get(vote[0], (0, {})), *vote[1:]
            if question not in QUESTIONS or video not in shown:
                raise ValueError(f"{file} is damaged: {', '.join(vote)} are no group, question and video of this study: leave it out")
            at = QUESTIONS.index(question), p, g
            if choice[at] >= 0:
                raise ValueError(f"{file} is damaged: it answers {question} of group {vote[0]} twice: leave it out")
            choice[at], place[at] = methods.index(shown[video]), list(shown).index(video)
    voted = (choice >= 0).any((0, 1))  # (groups,)
    return methods, choice[..., voted], place[..., voted]


def agreement(choice: np.ndarray) -> tuple[float, float]:
    """One question's choices (participants, groups), -1 for none -> share of pairs of participants who chose alike, Krippendorff's alpha.

    alpha = 1 - observed / expected disagreement, nominal (Krippendorff 2011): 1 when all agree, 0 when as chance would have it, given how
    often each method is chosen at all. So it is low where one method wins nearly everywhere, and the first number is to be read beside
    it. NaN where no group has two votes; alpha too where only one method was ever chosen.
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
    """Choices as of `read_votes` -> share of the votes (questions, methods), and its 95 % interval (2, questions, methods).

    The bootstrap draws participants and groups, both with replacement and independently (Owen 2007, pigeonhole bootstrap): the interval
    speaks of other participants and other clips. A vote counts as often as its participant was drawn times its group was.
    """
    rng, (_, P, G) = np.random.default_rng(0), choice.shape
    of = np.stack([choice == m for m in range(methods)], 1).astype(float)  # (questions, methods, P, G)
    drawn_p, drawn_g = (rng.multinomial(n, np.full(n, 1 / n), resamples).astype(float) for n in (P, G))  # (resamples, P) and (resamples, G)
    counted = np.einsum("rp,qmpg,rg->rqm", drawn_p, of, drawn_g, optimize=True)
    with np.errstate(invalid="ignore"):  # a draw may hold no vote, where participants see few of the groups
        sampled = counted / counted.sum(-1, keepdims=True)
    return of.mean((2, 3)) / of.mean((2, 3)).sum(1, keepdims=True), np.nanpercentile(sampled, [2.5, 97.5], axis=0)


def tally(study: Path, files: list[Path], resamples: int = 2000) -> dict:
    """Prints the table, writes study/tally.json and returns it."""
    methods, choice, place = read_votes(study, files)
    if absent := [q for q, votes in zip(QUESTIONS, choice, strict=True) if votes.max() < 0]:
        raise ValueError(f"no vote on {', '.join(absent)} in {len(files)} files: wanted all four questions answered")
    share, (low, high) = shares(choice, len(methods), resamples)
    pairs, alpha = zip(*map(agreement, choice), strict=True)
    at = [float((place == k).sum() / (place >= 0).sum()) for k in range(len(methods))]
    of_each = lambda values: dict(zip(QUESTIONS, [None if np.isnan(v) else float(v) for v in values], strict=True))  # noqa: E731
    result = {"participants": len(files), "groups": choice.shape[2], "votes": int((choice >= 0).sum()), "chance": 1 / len(methods)}
    for name, values in (("share", share), ("ci95_low", low), ("ci95_high", high)):
        result[name] = {method: of_each(values[:, m]) for m, method in enumerate(methods)}
    result |= {"pairs_alike": of_each(pairs), "krippendorff_alpha": of_each(alpha), "share_by_place": at}
    part = study / ".tally.json.part"
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, study / "tally.json")

    def line(name: str, cells: list[str]) -> None:
        print(f"{name:<22}" + "".join(f"{cell:>24}" for cell in cells))

    print(f"{len(files)} participants, {choice.shape[2]} groups, {result['votes']} votes; share of votes and 95 % interval")
    line("", [q.replace("_", " ") for q in QUESTIONS])
    for m, method in enumerate(methods):
        line(method, [f"{s:.1%} [{a:.1%}, {b:.1%}]" for s, a, b in zip(share[:, m], low[:, m], high[:, m], strict=True)])
    line("chance", [f"{1 / len(methods):.1%}"] * 4)
    line("pairs who agree", ["n/a" if np.isnan(a) else f"{a:.1%}" for a in pairs])
    line("Krippendorff's alpha", ["n/a" if np.isnan(a) else f"{a:.3f}" for a in alpha])
    print("by place on the page: " + ", ".join(f"{chr(65 + k)} {a:.1%}" for k, a in enumerate(at)))
    if 1 in choice.shape[1:]:
        print("the interval says nothing of other participants, or of other clips, where there is one alone")
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    new = commands.add_parser("make", help="write the study", **shown)
    new.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs/<data>/sub<K>/<NAME>-s<seed>")
    new.add_argument("--pairs", type=Path, metavar="DIR", help="in place of runs: DIR/gt/NAME.* and DIR/METHOD/NAME.*")
    new.add_argument("--out", type=Path, required=True, help="the folder to write")
    new.add_argument("--groups", type=int, help="so many clips, spread over all (all where not given)")
    new.add_argument("--each", type=int, help="so many groups a participant (all where not given)")
    new.add_argument("--height", type=int, default=512, help="of the videos, pixels, even; the width follows the stimulus")
    new.add_argument("--seconds", type=float, default=2.0, help="length of a clip where the stimulus is npy")
    new.add_argument("--seed", type=int, default=0, help="of the order and the opaque names")
    count = commands.add_parser("tally", help="count the votes", **shown)
    count.add_argument("study", type=Path, help="the folder that make wrote")
    count.add_argument("votes", nargs="+", type=Path, help="participants' files")
    args = parser.parse_args(argv)
    try:
        if args.command == "tally":
            tally(args.study, args.votes)
        else:
            make(*sources(args.runs, args.pairs), args.out, args.groups, args.each, args.height, args.seconds, args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

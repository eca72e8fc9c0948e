"""Is a prepared dataset whole and sound, and what does a clip in it look like (§4.1)?

    python extras/check.py --data cc2017 --subject 1                   a page, a line a check
    python extras/check.py --data cc2017 --subject 1 --show seg1-012   a picture of a clip (extras/show.py)
    python extras/check.py --captions TRAIN TEST                       how many captions recur, in bare lists

A line begins with ok, warning or FAIL; the exit status is 1 where one fails. The picture shows frames,
caption, responses by area and the cortex. Reads data/<name>/sub<S> and data/<name>/stimuli as data.py wrote
them, a run or a few hundred clips at a time; the lists need nothing prepared. Writes the picture alone.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import Clips  # noqa: E402
from extras import check_stimuli, show  # noqa: E402
from extras.cortex import atlas_areas, on_cortex  # noqa: E402
from extras.prepared import FAIL, OF_CLIPS, OK, Line, Prepared, digest, fail, ok, warning  # noqa: E402
from prepare import facts  # noqa: E402
from prepare.captions import read_captions  # noqa: E402
from prepare.cifti import mmp_areas  # noqa: E402
from prepare.facts import SIZES  # noqa: E402
from support.files import read_manifest  # noqa: E402
from support.options import check_together, option, parse  # noqa: E402
from support.readers import read_array, read_json  # noqa: E402
from support.runs import door  # noqa: E402


@dataclass
class Config:
    data: str = option("toy", ", ".join(SIZES))
    subject: int = option(1, "its number")
    root: Path = option(Path("data"), "folder of the prepared datasets")
    captions: list[Path] = option(
        [], "TRAIN TEST: cc2017's lists (.json, .h5, .pt), or a captions.jsonl twice"
    )
    show: str | None = option(None, "the id of a clip: make a picture of it in place of the page")
    stimuli: Path | None = option(None, "folder of the videos, for --show (default: data/<data>/raw/stimuli)")
    out: Path | None = option(None, "the picture (default: data/<data>/sub<S>/<CLIP>.png)")


def files(p: Prepared) -> Iterator[Line]:
    """Is all there that training reads? The other checks are made only where this one finds no fault."""
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
    for manifest in p.manifests:
        for name in read_json(manifest):
            if not manifest.with_name(name).is_file():
                yield fail("manifests", f"{manifest} tells of {name}, which is not there")
    yield ok("manifests", f"{len(p.arrays)} arrays are as their manifests say; both splits by one recipe")


def shapes(p: Prepared) -> Iterator[Line]:
    """As many clips as published, in every array; the same voxels, frames, widths in both splits."""
    rows = {}
    for split, clips in p.clips.items():
        yield _clip_counts(p, split)
        lengths = {name: len(p.array(split, name)) for name in OF_CLIPS}
        if set(lengths.values()) != {len(clips)}:
            wrong = {name: n for name, n in lengths.items() if n != len(clips)}
            yield fail("shapes", f"{split}: clips.jsonl has {len(clips)} clips, but {wrong}")
        rows[split] = {"fmri.npy": p.array(split, "fmri.npy").shape[2:]}
        for name in check_stimuli.STIMULI:
            rows[split][name] = p.array(split, name).shape[1:]
    N = len(p.voxels["index"])
    sizes = [*rows["train"].values()]
    if rows["train"] != rows["test"] or [*map(len, sizes)] != [2, 1, 2, 1, 1] or sizes[0][1] != N:
        form = f"both alike: (T, N), N = {N} as in voxels.npz, (K,), (F, D), (D,), (D,)"
        yield fail("shapes", f"of a clip: {rows}; wanted {form}")
        return
    (T, _), (K,), (F, D), *_ = sizes
    text = f"T = {T} volumes of N = {N:,} voxels, F = {F} frames of D = {D}, {K} classes"
    yield ok("shapes", f"a clip has {text}")


def _clip_counts(p: Prepared, split: str) -> Line:
    segments, length = SIZES[p.name][split]
    clips = p.clips[split]
    runs = [name for name, _ in groupby(clip["segment"] for clip in clips)]
    counts = Counter(clip["segment"] for clip in clips)
    if len(counts) < len(runs) or len({clip["id"] for clip in clips}) < len(clips):
        return fail("clip counts", f"{p.of(split, 'clips.jsonl')} mixes segments or repeats an id")
    odd = {name: n for name, n in counts.items() if n != length}
    if odd:
        return fail("clip counts", f"{split}: wanted {length} clips a segment, found {odd}")
    text = f"{len(clips):,} {split} clips, {length} of each of {len(runs)} segments"
    if len(runs) != segments:
        return warning("clip counts", f"{text}; the whole dataset has {segments}")
    return ok("clip counts", text)


def voxels(p: Prepared) -> Iterator[Line]:
    """Are the voxels grayordinates, each once, in the areas that the HCP MMP atlas has there?"""
    file, index, roi = p.folder / "voxels.npz", p.voxels["index"], p.voxels["roi"]
    if set(roi) == {"unknown"}:
        text = f"where the {len(roi):,} voxels lie was not published: no --rois, no picture of the cortex"
        yield warning("voxels", text)
        return
    if not (
        facts.DATASETS[p.name].grayordinates and np.isin(roi, mmp_areas()).any() or on_cortex(index, roi)
    ):
        text = f"{len(roi):,} in {len(set(roi))} areas of another atlas or space: no picture of the cortex"
        yield warning("voxels", text)
        return
    if len(np.unique(index)) < len(index) or not 0 <= index.min() <= index.max() < facts.GRAYORDINATES:
        yield fail("voxels", f"{file}: a grayordinate twice, or beyond {facts.GRAYORDINATES:,}")
        return
    atlas = atlas_areas(index)
    wrong = np.flatnonzero(roi != atlas)
    if len(wrong):
        v = wrong[0]
        first = f"voxel {v}, grayordinate {index[v]}, is {roi[v]} here and {atlas[v]} there"
        yield fail("voxels", f"{file}: {len(wrong):,} areas are not those of the HCP MMP atlas: {first}")
    below = (index >= facts.CORTEX).sum()
    text = f"{len(roi):,} in {len(set(roi))} areas of the HCP MMP atlas, {below:,} below the cortex"
    yield ok("voxels", text)


def fmri(p: Prepared) -> Iterator[Line]:
    """Finite but for whole showings; standardised, by run or by subject; no recording twice."""
    N = len(p.voxels["index"])
    sums, squares, volumes = np.zeros(N), np.zeros(N), 0  # over all finite showings
    off, constant = 0.0, np.zeros(N, bool)  # how far a voxel is from mean 0 and deviation 1 in a run
    first_of: dict[bytes, tuple[str, str]] = {}  # these values: a split, and a showing of a clip
    equal: dict[tuple[str, str], list[str]] = defaultdict(list)  # pairs, by their two splits
    for split in p.clips:
        recorded = Counter()
        for ids, number, x in p.showings(split):  # x (clips, T, N)
            recorded.update(ids)
            if (bad := ~np.isfinite(x)).any():
                clip, _, voxel = np.argwhere(bad)[0]
                values = f"{bad.sum():,} values of showing {number}, the first at {ids[clip]}, voxel {voxel}"
                text = f"{p.of(split, 'fmri.npy')}: not finite, and no whole showing: {values}"
                yield fail("fMRI values", text)
                continue
            first = x[:, 0].astype(np.float64)  # (clips, N): of each clip volume 0, since windows may overlap
            moves = first.std(0) > 1e-6
            constant |= ~moves
            off = max(off, abs(first.mean(0)).max(), abs(first.std(0)[moves] - 1).max(initial=0))
            sums += x.sum((0, 1), np.float64)
            squares += np.square(x, dtype=np.float64).sum((0, 1))
            volumes += x.shape[0] * x.shape[1]
            for id, row in zip(ids, x, strict=True):
                recording = split, f"{id}, showing {number}"
                earlier = first_of.setdefault(digest(row), recording)
                if earlier != recording and row.any():
                    equal[earlier[0], split].append(f"{earlier[1]} = {recording[1]}")
        yield from _showings(p, split, recorded)
    yield ok("fMRI values", "finite in every showing that was recorded")
    mean = sums / max(volumes, 1)
    deviation = np.sqrt(np.maximum(squares / max(volumes, 1) - mean**2, 0))
    off_in_all = max(abs(mean).max(), abs(deviation[deviation > 1e-6] - 1).max(initial=0))
    text = f"of mean 0 and deviation 1, a voxel is off by at most {off:.2g} in a run, {off_in_all:.2g} in all"
    if off < 0.01 or off_in_all < 0.05:
        yield ok("z-scores", text)
    else:
        line = fail if off_in_all > 1 else warning
        yield line("z-scores", f"{text}: {p.folder} has no z-scores, by run or by subject")
    if constant.any():
        text = f"are constant in some run, the first voxel {constant.argmax()}: no signal"
        yield warning("z-scores", f"{constant.sum():,} voxels {text}")
    for (a, b), pairs in equal.items():
        text = f"{len(pairs):,} recordings of a clip are bit-equal to another's: {pairs[0]}"
        check_name = "repeated runs" if a == b else "leakage, fMRI"
        yield fail(check_name, f"{a} and {b}: {text}; is a run there under two names?")
    yield ok("leakage, fMRI", f"of {len(first_of):,} recordings of a clip no two are equal")


def _showings(p: Prepared, split: str, recorded: Counter) -> Iterator[Line]:
    """recorded: of each clip's id the number of its showings in fmri.npy."""
    file, ids = p.of(split, "fmri.npy"), [clip["id"] for clip in p.clips[split]]
    R = p.arrays[file].shape[1]
    never = [id for id in ids if not recorded[id]]
    fewer = {clip["segment"]: recorded[clip["id"]] for clip in p.clips[split] if recorded[clip["id"]] < R}
    if never:
        yield fail("fMRI values", f"{file}: {len(never)} clips have no recording, the first {never[0]}")
    elif fewer:
        counts = ", ".join(f"{segment} has {n} of {R}" for segment, n in fewer.items())
        yield warning("fMRI values", f"{split}: showings that were not recorded are masked: {counts}")
    stored = p.array(split, "recorded.npy").reshape(len(ids), -1).sum(1)
    differ = np.flatnonzero(stored != [recorded[id] for id in ids])
    if len(differ):
        text = f"other showings than fmri.npy has of {len(differ):,} clips, the first {ids[differ[0]]}"
        yield fail("fMRI values", f"{p.of(split, 'recorded.npy')}: {text}")


COPIED = {"cinebrain": ". CineBrain publishes as preprocessed sub_005 a copy of sub_001: take its CIFTI runs"}


def duplicates(p: Prepared) -> Iterator[Line]:
    """Is another prepared subject this one under another name, or with its voxels in another order?"""
    mine, subjects = _fingerprints(p.folder, p.name), []
    for folder in sorted(set(p.folder.parent.glob("sub*[0-9]")) - {p.folder}):
        if not all((folder / split / "fmri.npy").is_file() for split in SIZES[p.name]):
            continue  # not prepared yet
        subjects.append(folder.name)
        theirs = _fingerprints(folder, p.name)
        if same := mine.keys() & theirs.keys():
            order = "" if any(mine[key] == theirs[key] for key in same) else ", the voxels in another order"
            text = (
                f"{len(same)} of {len(mine)} recordings compared are equal{order}: one is a copy of the other"
            )
            yield fail("duplicate subjects", f"{p.folder} and {folder}: {text}{COPIED.get(p.name, '')}")
    names = ", ".join(subjects) or "another: this is the only one prepared"
    yield ok("duplicate subjects", f"none equals {names}")


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


CHECKS = (manifests, shapes, voxels, fmri, duplicates, *check_stimuli.CHECKS)


def check(name: str, subject: int, root: Path = Path("data")) -> list[Line]:
    """All lines of the page. Where files are missing or shapes wrong, what needs them is not looked at. What
    passes all checks is read as the scripts do."""
    p = Prepared(name, subject, root)
    lines = list(files(p))
    for one in CHECKS:
        if any(line.level == FAIL and line.check in ("files", "shapes", "embeddings") for line in lines):
            lines.append(warning(one.__name__, "not looked at, for the faults above"))
        else:
            lines += one(p)
    failed = {line.check for line in lines if line.level == FAIL}
    if not failed:
        try:
            for split in p.clips:
                Clips(name, subject, split, root=root)
        except (OSError, ValueError) as error:
            lines.append(fail("training", str(error)))
        return lines
    page = []
    for level, check_name, text in lines:
        if level == FAIL:
            delete = "" if text.endswith(" not there") else "delete what is named and "
            text = f"{text}; to mend it, {delete}run {p.command}"
        if level != OK or check_name not in failed:
            page.append(Line(level, check_name, text))
    return page


def print_page(lines: list[Line], title: str) -> None:
    for level, check_name, text in lines:
        print(f"{level:<8}{check_name:<19}" + text.replace("\n", "\n" + " " * 27))
    counts = Counter(line.level for line in lines)
    print(f"{title}: {counts['FAIL']} failed, {counts['warning']} warnings, {counts['ok']} ok")


def print_caption_copies(lists: list[Path]) -> None:
    """Of cc2017's lists, for each of the captions in them, or of captions.jsonl."""
    if len(lists) != 2:
        raise ValueError(f"--captions: {len(lists)} lists, wanted the training and the test list")
    splits = facts.cc2017_splits(18, 5)
    train, test = (read_captions(file, splits[split]) for file, split in zip(lists, splits, strict=True))
    segments = [row.get("segment", i // facts.SEGMENT_VOLUMES) for i, row in enumerate(train)]
    print(f"{len(train):,} training and {len(test):,} test clips of {len(set(segments))} training segments")
    for key in train[0]:
        if key.startswith("caption"):
            rows = [{"caption": row[key], "segment": name} for row, name in zip(train, segments, strict=True)]
            text = check_stimuli.caption_copies_in_words(rows, [{"caption": row[key]} for row in test])
            print(f"{key}: {text}")


def main(argv: list[str]) -> int:
    config = parse(Config, dict.fromkeys(SIZES, {}), __doc__, "extras/check.py", argv)
    check_together(config, {"captions": ("show",)}, {"stimuli": ("show",), "out": ("show",)})
    name, subject, root = config.data, config.subject, config.root
    if config.captions:
        print_caption_copies(config.captions)
    elif config.show:
        if config.stimuli and not config.stimuli.is_dir():
            raise FileNotFoundError(f"--stimuli {config.stimuli}: no such folder, wanted that of the videos")
        out = config.out or root / name / f"sub{subject}" / f"{config.show}.png"
        films = config.stimuli or facts.raw_folder(name, subject, root) / "stimuli"
        splits = {split: Clips(name, subject, split, root=root) for split in SIZES[name]}
        show.picture(splits, config.show, films, out)
        print(out)
    else:
        lines = check(name, subject, root)
        print_page(lines, f"{name}, subject {subject}")
        return int(any(line.level == FAIL for line in lines))
    return 0


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

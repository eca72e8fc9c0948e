"""Is a prepared dataset sound, and what does a clip in it look like (§4.1)?

    python extras/check.py --data cc2017 --subject 1                   a page, a line a check
    python extras/check.py --data cc2017 --subject 1 --show seg1-012   a picture of a clip (extras/show.py)

A line begins with ok, warning or FAIL; the exit status is 1 where one fails. data.Clips reads the files: what
it refuses is the page's one line. The checks are of what Clips and training cannot see. Writes the picture
alone.
"""

import hashlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product, repeat
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import Clips  # noqa: E402
from extras import show  # noqa: E402
from extras.cortex import atlas_areas, on_cortex  # noqa: E402
from prepare import facts  # noqa: E402
from prepare.captions import caption_copies  # noqa: E402
from prepare.categories import category_matrix  # noqa: E402
from prepare.cifti import mmp_areas  # noqa: E402
from prepare.facts import SIZES  # noqa: E402
from support.files import read_manifest  # noqa: E402
from support.options import check_together, option, parse  # noqa: E402
from support.readers import FileFault, MissingFile  # noqa: E402
from support.runs import door  # noqa: E402


@dataclass
class Config:
    data: str = option("toy", ", ".join(SIZES))
    subject: int = option(1, "its number")
    root: Path = option(Path("data"), "folder of the prepared datasets")
    show: str | None = option(None, "the id of a clip: in place of the page data/<data>/sub<S>/<CLIP>.png")
    stimuli: Path | None = option(None, "folder of the videos, for --show (default: data/<data>/raw/stimuli)")


OK, WARNING, FAIL = "ok", "warning", "FAIL"
EMBEDDINGS = ("e_img", "e_txt", "e_act")
Splits = dict[str, Clips]
Lines = Iterator[tuple[str, str, str]]  # level, check, text


def files(splits: Splits) -> Lines:
    """What a stopped run left; both splits by one recipe, and of this subject."""
    clips = splits["train"]
    for folder in (clips.folder, clips.stimuli.parent):
        for file in sorted(folder.rglob(".*.part*")):
            yield WARNING, "files", f"{file} is what a stopped run left: run it again, or delete it"
    for name in ("fmri", "categories", *EMBEDDINGS):
        train, test = (Path(getattr(clips, name).filename) for clips in splits.values())
        expected, recipe = ((read_manifest(file) or {"recipe": {}})["recipe"] for file in (train, test))
        for key in sorted((recipe | expected).keys() - {"captions"}):
            if recipe.get(key) != expected.get(key):
                values = f"{key} = {recipe.get(key)!r}, {train} with {expected.get(key)!r}"
                yield FAIL, "files", f"{test} was made with {values}"
        if expected.get("subject", clips.subject) != clips.subject:
            yield FAIL, "files", f"{train} is of subject {expected['subject']}: were folders swapped?"


def counts(splits: Splits) -> Lines:
    """As many clips as published; the same sizes in both splits."""
    for split, clips in splits.items():
        segments, length = SIZES[clips.name][split]
        runs = [name for name, _ in groupby(line["segment"] for line in clips.lines)]
        sizes = Counter(line["segment"] for line in clips.lines)
        odd = {name: n for name, n in sizes.items() if n != length}
        text = f"{len(clips):,} {split} clips, {length} of each of {len(runs)} segments"
        if len(sizes) < len(runs) or len({line["id"] for line in clips.lines}) < len(clips):
            yield FAIL, "clip counts", f"{clips.stimuli}/clips.jsonl mixes segments or repeats an id"
        elif odd:
            yield FAIL, "clip counts", f"{split}: wanted {length} clips a segment, found {odd}"
        elif len(runs) != segments:
            yield WARNING, "clip counts", f"{text}; the whole dataset has {segments}"
        else:
            yield OK, "clip counts", text
    train, test = (clips.sizes for clips in splits.values())
    text = f"{train}" if train == test else f"{train} in training, {test} in test"
    yield OK if train == test else FAIL, "shapes", f"of a clip: {text}"


def voxels(splits: Splits) -> Lines:
    """Are the voxels grayordinates, each once, in the areas that the HCP MMP atlas has there?"""
    clips = splits["train"]
    file, index, roi = clips.folder / "voxels.npz", clips.index, clips.roi
    of_atlas = facts.DATASETS[clips.name].grayordinates and np.isin(roi, mmp_areas()).any()
    atlas = atlas_areas(index)
    wrong = np.flatnonzero(roi != atlas)
    text = f"{len(roi):,} in {len(set(roi))} areas"
    if not (of_atlas or on_cortex(index, roi)):
        yield WARNING, "voxels", f"{text}, unknown or of another atlas or space: no picture of the cortex"
    elif len(wrong):
        v = wrong[0]
        first = f"voxel {v}, grayordinate {index[v]}, is {roi[v]} here and {atlas[v] or 'nothing'} there"
        yield FAIL, "voxels", f"{file}: {len(wrong):,} areas are not those of the HCP MMP atlas: {first}"
    elif len(np.unique(index)) < len(index):
        yield FAIL, "voxels", f"{file}: a grayordinate twice"
    else:
        below = (index >= facts.CORTEX).sum()
        yield OK, "voxels", f"{text} of the HCP MMP atlas, {below:,} below the cortex"


def showings(splits: Splits) -> Lines:
    """Has each clip one, and are those that recorded.npy masks NaN in fmri.npy? Clips finds NaN in others."""
    for split, clips in splits.items():
        recorded, ids = clips.recorded, [line["id"] for line in clips.lines]
        masked = np.flatnonzero(~recorded.all(1))
        never = np.flatnonzero(~recorded.any(1))
        stored = [clip for clip in masked if np.isfinite(clips.fmri[clip][~recorded[clip]]).any()]
        file = clips.folder / split / "recorded.npy"
        if len(stored):
            yield FAIL, "showings", f"{file} masks what fmri.npy has, first of {ids[stored[0]]}"
        if len(never):
            yield FAIL, "showings", f"{file}: {len(never)} clips have none, the first {ids[never[0]]}"
        elif len(masked):
            text = f"{len(masked):,} clips have some that were not recorded, the first {ids[masked[0]]}"
            yield WARNING, "showings", f"{split}: {text}"


def z_scores(splits: Splits) -> Lines:
    """Standardised, by run or by subject? A run is in memory at a time."""
    N = len(splits["train"].roi)
    sums, squares, volumes = np.zeros(N), np.zeros(N), 0
    off, constant = 0.0, np.zeros(N, bool)  # how far a voxel is from mean 0 and deviation 1 in a run
    for clips in splits.values():
        names = np.array([line["segment"] for line in clips.lines])
        for name, k in product(dict.fromkeys(names), range(clips.recorded.shape[1])):
            x = clips.fmri[(names == name) & clips.recorded[:, k], k]  # (clips, T, N)
            if not len(x):
                continue
            first = x[:, 0].astype(np.float64)  # (clips, N): volume 0, since windows may overlap
            moves = first.std(0) > 1e-6
            constant |= ~moves
            off = max(off, abs(first.mean(0)).max(), abs(first.std(0)[moves] - 1).max(initial=0))
            sums += x.sum((0, 1), np.float64)
            squares += np.square(x, dtype=np.float64).sum((0, 1))
            volumes += x.shape[0] * x.shape[1]
    mean = sums / volumes
    deviation = np.sqrt(np.maximum(squares / volumes - mean**2, 0))
    in_all = max(abs(mean).max(), abs(deviation[deviation > 1e-6] - 1).max(initial=0))
    level = OK if off < 0.01 or in_all < 0.05 else FAIL if in_all > 1 else WARNING
    text = f"off mean 0 and deviation 1 by {off:.2g} at most in a run, {in_all:.2g} in all"
    yield level, "z-scores", f"{clips.folder}: a voxel is {text}"
    if constant.any():
        text = f"are constant in some run, the first voxel {constant.argmax()}: no signal"
        yield WARNING, "z-scores", f"{constant.sum():,} voxels {text}"


def bit_equal(rows: Iterable[tuple[str, str, np.ndarray]]) -> dict[tuple[str, str], list[str]]:
    """rows: split, name, array. Returns of two splits the pairs of names whose arrays are equal, not zero."""
    first_of: dict[bytes, tuple[str, str]] = {}
    equal: dict[tuple[str, str], list[str]] = defaultdict(list)
    for split, name, array in rows:
        digest = hashlib.blake2b(np.ascontiguousarray(array), digest_size=16).digest()
        first, first_name = first_of.setdefault(digest, (split, name))
        if name != first_name and array.any():
            equal[first, split].append(f"{first_name} = {name}")
    return equal


def leakage(splits: Splits) -> Lines:
    """No recording twice, and no frames of a training clip in a test clip."""
    recordings, frames = [], []
    for split, clips in splits.items():
        ids = [line["id"] for line in clips.lines]
        frames += zip(repeat(split), ids, clips.e_img)
        for clip, k in np.argwhere(clips.recorded):
            recordings.append((split, f"{ids[clip]}, showing {k + 1}", clips.fmri[clip, k]))
    equal = bit_equal(recordings)
    for (a, b), pairs in equal.items():
        text = f"{len(pairs):,} recordings of a clip are bit-equal to another's: {pairs[0]}"
        name = "repeated runs" if a == b else "leakage, fMRI"
        yield FAIL, name, f"{a} and {b}: {text}; is a run there under two names?"
    if not equal:
        yield OK, "leakage, fMRI", f"of {len(recordings):,} recordings of a clip no two are equal"
    pairs, n = bit_equal(frames)["train", "test"], len(splits["test"])
    level = OK if not pairs else WARNING if len(pairs) < 0.01 * n else FAIL
    text = f"{len(pairs)} of {n:,} test clips have bit-equal frames in training (e_img)"
    first = f"; {pairs[0]}; is a segment there under two names, or in both splits?" if pairs else ""
    yield level, "leakage, frames", text + first


def categories(splits: Splits) -> Lines:
    """Are those of categories.npy those of clips.jsonl, and has each class a clip?"""
    for split, clips in splits.items():
        expected = category_matrix([line["categories"] for line in clips.lines], clips.classes)
        differ = np.flatnonzero((expected != clips.categories).any(1))
        if len(differ):
            first = f"{len(differ):,} clips, the first {clips.lines[differ[0]]['id']}"
            text = f"{clips.stimuli}/categories.npy is not what clips.jsonl says: {first}"
            yield FAIL, "categories", text
        empty = [clips.classes[k] for k in np.flatnonzero(~clips.categories.any(0))]
        if empty:
            yield WARNING, "categories", f"{split}: no clip is of {', '.join(empty)}"


def embeddings(splits: Splits) -> Lines:
    """Unit vectors, not all one; how many captions recur."""
    for name, clips in product(EMBEDDINGS, splits.values()):
        e = np.array(getattr(clips, name), np.float32).reshape(len(clips), -1, clips.sizes["embed_dim"])
        off = abs(np.linalg.norm(e, axis=-1) - 1).max(1)  # (clips,)
        alike = np.linalg.norm(e.mean((0, 1)))
        level = OK if off.max() < 1e-3 and alike < 0.999 else FAIL
        first = f"lengths are off 1 by {off.max():.2g} at most, in {clips.lines[off.argmax()]['id']}"
        text = f"{clips.stimuli / name}.npy: {first}; |mean| {alike:.2f} (1: all alike)"
        yield level, "embeddings", text
    recurring, known = caption_copies(*(clips.lines for clips in splits.values()))
    text = f"{recurring:.1%} of training clips share theirs with another segment, {known:.1%} of test clips"
    yield OK, "captions", f"{text} with training"


def latents(splits: Splits) -> Lines:
    """Of each decoder: finite, and no clip all one value."""
    for file in sorted(file for clips in splits.values() for file in clips.stimuli.glob("*/latents-*.npy")):
        y = np.load(file, mmap_mode="r")  # (clips, C, f, h, w)
        bad = [i for i, clip in enumerate(y) if not clip.astype(np.float32).std() > 1e-3]  # NaN is not
        first = f"{len(bad)} of {len(y):,} clips are not finite, or all one value{f': {bad[:3]}' * bool(bad)}"
        yield FAIL if bad else OK, "latents", f"{file}: {first}"


CHECKS = (files, counts, voxels, showings, z_scores, leakage, categories, embeddings, latents)


def check(name: str, subject: int, root: Path = Path("data")) -> list[tuple[str, str, str]]:
    """All lines of the page; one where data.Clips refuses a file."""
    try:
        splits = {split: Clips(name, subject, split, root=root) for split in SIZES[name]}
    except (FileFault, MissingFile) as error:
        *_, text = str(error).splitlines()  # the guide to a dataset stands before the file's name
        return [(FAIL, "files", text)]
    return [line for one in CHECKS for line in one(splits)]


def main(argv: list[str]) -> int:
    config = parse(Config, dict.fromkeys(SIZES, {}), __doc__, "extras/check.py", argv)
    check_together(config, {}, {"stimuli": ("show",)})
    name, subject, root = config.data, config.subject, config.root
    if config.show:
        out = root / name / f"sub{subject}" / f"{config.show}.png"
        films = config.stimuli or facts.raw_folder(name, subject, root) / "stimuli"
        splits = {split: Clips(name, subject, split, root=root) for split in SIZES[name]}
        show.picture(splits, config.show, films, out)
        print(out)
        return 0
    lines = check(name, subject, root)
    for level, about, text in lines:
        print(f"{level:<8}{about:<19}{text}")
    levels = Counter(level for level, _, _ in lines)
    print(f"{name}, subject {subject}: {levels[FAIL]} failed, {levels[WARNING]} warnings, {levels[OK]} ok")
    if levels[FAIL]:
        print(f"to mend it, delete what is damaged and run {facts.prepare_command(name, subject)}")
    return int(levels[FAIL] > 0)


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

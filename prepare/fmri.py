"""One run of fMRI -> z-scores; which voxels respond reproducibly; sub<S>/{train,test}/fmri.npy (§4.1).

A run is trimmed to its film, delayed by the haemodynamic response, freed of a slow trend and z-scored. Voxels
are kept whose response to a film repeats (Wen et al. 2018). One run is in memory at a time.
"""

import filecmp
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.stats
from tqdm import tqdm

from prepare.release import Release
from support.files import hashes, is_made_by, read_manifest, writing_array, written_whole
from support.readers import FileFault, advising, check_array, damaged

CORRECT = "correct it, or move it away: a showing without its file is masked"
MANY = 100  # files of a segment, from here on, have one SHA-256 together: a file a volume


def detrending_degree(seconds: float) -> int:
    """Of the polynomial that removes a run's slow trend, by the rule of AFNI (3dDetrend -polort A): 4 for the
    480 s of cc2017, as §4.1. A higher one takes more of what a scene at the run's edge leaves."""
    return 1 + int(seconds // 150)


def preprocess_run(run: np.ndarray, start: int, length: int, order: int = 4) -> np.ndarray:
    """Trim a run, remove from each voxel its least-squares polynomial of degree `order`, z-score it (§4.1).

    With an orthonormal basis Q of the polynomials the residual is y - Q Qᵀ y, for a block of voxels at once.
    run: (V, N). start, length: the window, in volumes. Returns (length, N) float32; NaN throughout a voxel
    that is constant, a polynomial (only rounding is left) or not finite somewhere.
    """
    legendre = np.polynomial.legendre.legvander(np.linspace(-1, 1, length), order)
    Q = np.linalg.qr(legendre)[0].astype(np.float32)  # (length, order+1)
    response = np.empty((length, run.shape[1]), np.float32)
    for first in range(0, run.shape[1], 1024):
        voxels = slice(first, first + 1024)
        raw = run[start : start + length, voxels]  # (length, n)
        with np.errstate(invalid="ignore", over="ignore"):
            y = raw - raw.mean(0)  # first, since BOLD is 1e4 +- 1e2: float32 would lose the signal in Qᵀ y
            y -= Q @ (Q.T @ y)
            level = np.sqrt(np.einsum("tn,tn->n", raw, raw) / length)
            deviation = np.sqrt(np.einsum("tn,tn->n", y, y) / length)
            varies = deviation > 1e-6 * level  # float32 rounds at 6e-8 of the level; false for NaN, too
            np.divide(y, np.where(varies, deviation, np.float32(np.nan)), out=response[:, voxels])
    return response


def fisher_z(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two showings of a segment, (V, N) from `preprocess_run` -> (N,) Fisher z of each voxel's Pearson r."""
    products = np.einsum("tn,tn->n", first, second).astype(np.float64)
    r = products / len(first)  # of z-scores: the mean product is r
    return np.arctanh(np.clip(r, -1 + 1e-6, 1 - 1e-6))  # r = 1 would be infinite


def reproducible_voxels(z: list[np.ndarray], alpha: float = 0.05) -> tuple[np.ndarray, int]:
    """Which voxels respond alike to two showings of a film (§4.1)? z: a (N,) Fisher z per segment. Returns
    (N,) bool, and how many voxels are finite in every segment: those tested.

    One-sample two-sided t-test over the segments against 0, Bonferroni over the voxels tested, mean z > 0.
    """
    if len(z) < 2:
        raise ValueError(
            f"{len(z)} training segments were shown twice, wanted 2 or more: add --train-segments"
        )
    z = np.where(np.isfinite(z).all(0), z, np.nan)  # (segments, N)
    mean_z = z.mean(0)
    tested = int(np.isfinite(mean_z).sum())
    if tested == 0:
        fault = "is constant or not finite in some segment: check the files"
        raise ValueError(f"each of the {len(mean_z)} voxels {fault}")
    with np.errstate(invalid="ignore", divide="ignore"):
        p = scipy.stats.ttest_1samp(z, 0).pvalue  # NaN where not tested
    return (p * tested < alpha) & (mean_z > 0), tested


def load_response(source: Release, segment: str, repeat: int, voxels=slice(None)) -> np.ndarray | None:
    """One showing of one segment, preprocessed: float32 (volumes, voxels asked for); None where missing."""
    run = load_run(source, segment, repeat)
    if run is None or source.preprocessed:
        return run if run is None else run[:, voxels]
    start, length = source.window(segment)
    return preprocess_run(run[:, voxels], start, length, detrending_degree(length * source.TR))


def load_run(source: Release, segment: str, repeat: int) -> np.ndarray | None:
    """One showing as the release has it, (volumes, N), in float32 at least; None where missing. Raises
    FileFault, naming its file, for one of other voxels or of too few volumes."""
    with advising(CORRECT):
        run = source.load_run(segment, repeat) if repeat < source.repeats(segment) else None
        if run is None:
            return None
        (start, length), N = source.window(segment), len(source.voxels[0])
        least = length if source.preprocessed else start + length
        fits = run.ndim == 2 and run.shape[1] == N and len(run) >= least and run.dtype.kind in "fiu"
        if not fits:
            found = f"{run.dtype} of shape {run.shape}"
            wanted = f"numbers of shape (volumes, voxels): {least} volumes or more, {N} voxels"
            raise damaged(source.run_file(segment, repeat), found, wanted)
    return run.astype(np.result_type(run, np.float32), copy=False)


def select_voxels(source: Release) -> tuple[np.ndarray, int]:
    """`reproducible_voxels` on the first two showings of the training segments that have both."""
    z = []  # one (N,) a segment
    for segment in tqdm(source.splits["train"], desc="which voxels respond reproducibly", unit="segment"):
        first, second = (load_response(source, segment, repeat) for repeat in (0, 1))
        if first is not None and second is not None:
            z.append(fisher_z(first, second))
    return reproducible_voxels(z)


def prepare_fmri(source: Release, folder: Path, recipe: dict, window: int = 1) -> None:
    """Recordings -> folder/{train,test}/fmri.npy (clips, repeats, T, N) and folder/voxels.npz.

    window: T, the volumes a clip gets (from that of its delay on; at the end of a segment its last is
    repeated). Raises FileFault where an array was made by another recipe, or of another number of clips.
    """
    files = {split: folder / split / "fmri.npy" for split in source.splits}
    sizes = {split: sum(map(source.clips_of, segments)) for split, segments in source.splits.items()}
    missing = [split for split, file in files.items() if not _is_prepared(file, recipe, sizes[split])]
    if not missing and (folder / "voxels.npz").is_file():
        return
    mask = _choose_voxels(source, folder)
    for split in missing:
        segments = source.splits[split]
        shape = (sizes[split], max(map(source.repeats, segments)), window, int(mask.sum()))
        inputs = _input_hashes(map(source.files, segments))
        with writing_array(files[split], shape, "float32", recipe, inputs) as fmri:
            start = 0
            for segment in tqdm(segments, desc=f"fMRI, {split}", unit="segment"):
                end = start + source.clips_of(segment)
                _fill_segment(fmri[start:end], source, segment, mask)
                start = end


def _is_prepared(file: Path, recipe: dict, clips: int) -> bool:
    """Is it there? Raises FileFault where another recipe made it, or other --train-segments."""
    ready = is_made_by(file, recipe)
    if ready and (n := len(np.load(file, mmap_mode="r"))) != clips:
        raise FileFault(f"{file} has {n:,} clips, but {clips:,} are asked for; delete it and make it anew")
    return ready


def _fill_segment(fmri: np.ndarray, source: Release, segment: str, mask: np.ndarray) -> None:
    """The rows of a segment, (clips, repeats, T, N); NaN for a showing that was not recorded. Raises
    ValueError, naming the release's file, where a chosen voxel has no signal in it."""
    _, length = source.window(segment)
    first = source.volumes * np.arange(len(fmri))  # volume of each clip
    volumes = np.minimum(first[:, None] + np.arange(fmri.shape[2]), length - 1)  # (clips, T)
    for repeat in range(fmri.shape[1]):
        response = load_response(source, segment, repeat, mask)  # (length, N)
        if response is None:
            fmri[:, repeat] = np.nan
            continue
        lost = np.flatnonzero(~np.isfinite(response).all(0))
        if len(lost):  # the selection looks at the training runs alone
            index, _ = source.voxels
            raise ValueError(
                f"{source.run_file(segment, repeat)}: {len(lost):,} of the {mask.sum():,} voxels kept are "
                f"constant or not finite in showing {repeat + 1} of {segment}, the first at index "
                f"{index[mask][lost[0]]}: download it again, or move it away"
            )
        fmri[:, repeat] = response[volumes]


def _choose_voxels(source: Release, folder: Path) -> np.ndarray:
    """(N,) bool, and voxels.npz of the ones kept."""
    index, roi = map(np.asarray, source.voxels)
    with advising("correct the areas: one of each voxel, or 'unknown'"):
        check_array(roi, f"voxels of {source.name}", "U", index.shape)
    if source.preprocessed:  # chosen by the release's authors, or by the names of their areas
        mask, note = np.ones(len(index), bool), f"{len(index):,} voxels, as the release has them"
    else:
        mask, tested = select_voxels(source)
        note = f"{mask.sum():,} of {tested:,} voxels respond reproducibly"
        note += f"; {len(mask) - tested:,} constant or not finite, dropped"
        if not mask.any():
            doubt = "the two showings of a segment do not correlate: are the runs in the right folders?"
            raise ValueError(f"{folder}: {note}; {doubt}")
    tqdm.write(note)
    with written_whole(folder / "voxels.npz") as part:
        np.savez_compressed(part, index=index[mask], roi=roi[mask])
    return mask


def _input_hashes(segments: Iterable[list[Path]]) -> dict[str, str]:
    """A SHA-256 for each file; one for all of a segment that has a file a volume."""
    groups = []
    for files in segments:
        groups += [files] if len(files) >= MANY else [[file] for file in files]
    return hashes(groups)


def refuse_twins(source: Release, folder: Path) -> None:
    """Raises ValueError where this subject's first recording is another's, in the release or prepared beside
    `folder`, data/<name>/sub<S>: folders were swapped, or the release is at fault."""
    ours = source.recording(source.subject)
    digests = set(_input_hashes([ours] if ours else []).values())
    for subject in {*range(1, 7)} - {source.subject}:
        theirs, prepared = source.recording(subject), folder.with_name(f"sub{subject}") / "train" / "fmri.npy"
        manifest = read_manifest(prepared) or {"inputs": {}}
        pairs = zip(ours, theirs, strict=False)
        raw = bool(ours) and theirs not in ([], ours) and all(filecmp.cmp(*pair, False) for pair in pairs)
        if raw or digests & {*manifest["inputs"].values()}:
            raise ValueError(
                f"subjects {source.subject} and {subject} have identical recordings, {ours[0]} and "
                f"{theirs[0] if raw else prepared}: one is a copy of the other. Download both again "
                "(CineBrain's preprocessed sub_005 is published as a copy of sub_001: take the CIFTI runs), "
                "delete what was prepared of the wrong one, or go on with --allow-duplicate-subject"
            )

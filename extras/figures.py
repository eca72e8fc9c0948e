"""Pictures of runs: reconstructions side by side (Fig. 3, 4, 6), voxel weights (Fig. 5), memories (Eq. 5, 6).

    python extras/figures.py compare RUN RUN ...   the stimulus beside what several runs made of it
    python extras/figures.py weights RUN RUN ...   which voxels the first layer of each Brain Model listens to
    python extras/figures.py memories RUN          a clip's memories, their scores (Eq. 5), attention (Eq. 6)
    python extras/figures.py memories RUN --html   the same as a page, clip by clip: films that move
    python extras/figures.py map RUN               queries among the memories (Eq. 5), the streams of Eq. 8
    python extras/figures.py terms RUN RUN ...     a page: what each term does, by runs that lack one

In:  runs/<data>/sub<S>/<NAME>-s<seed>, after evaluate.py (`weights`: after train_stage1.py), and the
     prepared data they were trained on; or an evaluation beside eval, such as <NAME>-s<seed>/eval-shuffled;
     or a shared folder, such as toy/trained.
Out: a picture, --out; by default COMMAND.png in the folder of the first run, of `terms` docs/terms.html.
Clips that --clips does not name are spread evenly over the test set, half of them such whose like was seen in
training, half of them others, as evaluate.py tells them apart.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this file sees the project
from brain_model import BrainModel  # noqa: E402
from extras import maps, memories, terms  # noqa: E402
from extras.cortex import draw_cortex  # noqa: E402
from extras.runs import Run, caption_of, choose_clips, evaluation_of, frames_of, names_of, save_figure  # noqa: E402
from prepare.facts import DATASETS, without_side  # noqa: E402
from support.options import Parser, within  # noqa: E402
from support.pictures import contact_sheet  # noqa: E402
from support.readers import load_model, reading  # noqa: E402
from support.runs import door  # noqa: E402

# of Glasser et al. 2016: "MT+ complex and neighbouring visual areas", and "ventral stream visual cortex"
OUTLINED = {
    "lateral occipital": "MT MST FST V4t V3CD LO1 LO2 LO3 PH".split(),
    "ventral": "FFC PIT V8 VVC VMV1 VMV2 VMV3".split(),
}
GROUPS = {
    "early visual (V1-V4)": "V1 V2 V3 V4".split(),
    **OUTLINED,
    "hippocampus": ["hippocampus_left", "hippocampus_right"],
    "other areas": [],
}
LEAST = 5  # voxels that an area needs for a bar
ROWS = {"compare": 6, "memories": 4, "terms": 12}  # clips of a picture
BARS = ("#b9c0c9", "#33608c", "#c46a2b", "#4d8a57")  # colours of the runs

# ---------------------------------------------------------------- Fig. 3, 4, 6


def compare(runs: dict[str, Path], clips: dict[int, str], out: Path) -> None:
    """A row a clip; columns: the stimulus, its caption and its group, then what each run, {title: folder},
    made of it. Of each video three moments."""
    first = Run(next(iter(runs.values())), "stage2")
    lines = first.test_clips().lines
    videos, labels = [], []
    for clip, group in clips.items():
        reconstructions = [frames_of(run, "recon", clip) for run in runs.values()]
        videos.append([frames_of(first.folder, "gt", clip), *reconstructions])
        labels.append([caption_of(lines[clip], group), *[""] * len(runs)])
    contact_sheet(out, videos, labels, ["stimulus", *runs], height=144)


# ---------------------------------------------------------------- Fig. 5


def voxel_weights(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a run's N voxels: the norm of their weights in the first regression layer of stage 1, their
    grayordinates, their areas without the hemisphere. Raises ValueError where the recordings do not say where
    their voxels lie, or are not those the run was trained on."""
    run = Run(folder, "stage1")
    with reading(folder, advice="python train_stage1.py makes it"):
        model = load_model(BrainModel, run.stage / "brain_model")
    norm = model.regression.contract.weight.detach().norm(dim=0).numpy()  # of (L r, N)
    clips = run.test_clips()
    if (np.asarray(clips.roi) == "unknown").all() or not DATASETS[run.data].grayordinates:
        advice = "prepare the CIFTI files (python data.py --help)"
        raise ValueError(f"{folder}: its recordings do not say where their voxels lie: {advice}")
    if len(norm) != len(clips.index):
        voxels = f"{len(norm)} voxels, its prepared data {len(clips.index)}"
        raise ValueError(f"{folder} has {voxels}: train it anew on this data")
    return norm, clips.index, without_side(clips.roi)


class Area(NamedTuple):
    """An area of enough voxels, and its weights by each run."""

    name: str
    group: str
    voxels: int
    weights: np.ndarray  # (runs, 2) mean and deviation; NaN where a run has no voxel there


def by_area(values: list[np.ndarray], areas: list[np.ndarray]) -> list[Area]:
    """Every area of at least 5 voxels, group after group, in each the greatest first. values and areas: of
    each run's voxels."""
    rows, groups = [], [*GROUPS]
    for name in np.unique(np.concatenate(areas)).tolist():
        members = [value[area == name] for value, area in zip(values, areas, strict=True)]
        voxels = max(map(len, members))
        if voxels >= LEAST:
            group = next((group for group in groups if name in GROUPS[group]), "other areas")
            moments = [(x.mean(), x.std()) if len(x) else (np.nan, np.nan) for x in members]
            rows.append(Area(name, group, voxels, np.array(moments)))
    return sorted(rows, key=lambda row: (groups.index(row.group), -np.nanmax(row.weights[:, 0])))


def weights(runs: dict[str, Path], out: Path) -> None:
    """A row a run, {title: folder}: the cortex; beside them a bar an area and run. Norms are scaled to [0, 1]
    over all the runs together, so that they can be compared; the colours span 0.25 to 0.75, as in the
    paper."""
    from matplotlib.figure import Figure

    from toy.subject import AREAS

    norms, indices, roi = zip(*map(voxel_weights, runs.values()), strict=True)
    low, high = min(map(np.min, norms)), max(map(np.max, norms))
    values = [(norm - low) / (high - low) for norm in norms]
    areas = by_area(values, roi)
    height = max(4.6 * len(runs), 0.21 * len(areas) + 1.6)
    figure = Figure(figsize=(13, height), layout="constrained")
    grid = figure.add_gridspec(len(runs), 2)
    for i, title in enumerate(runs):
        ax = figure.add_subplot(grid[i, 0])
        dots = draw_cortex(ax, indices[i], values[i], "inferno", (0.25, 0.75), OUTLINED)
        ax.set_title(f"{title} (left, right hemisphere)")
        figure.colorbar(dots, ax=ax, shrink=0.6, extend="both", label="weight")
    is_toy = Run(next(iter(runs.values())), "stage1").data == "toy"  # nothing is known of others
    drives = {area: drive for drive, (areas_of, _) in AREAS.items() for area in areas_of if is_toy}
    draw_areas(figure.add_subplot(grid[:, 1]), areas, [*runs], drives)
    save_figure(out, figure)


def draw_areas(ax, areas: list[Area], titles: list[str], drives: dict[str, str]) -> None:
    """A bar an area and run: mean ± deviation over its voxels. Beside it what drives the area."""
    height = 0.8 / len(titles)
    groups = list(dict.fromkeys(area.group for area in areas))
    y = np.array([i + 1.3 * groups.index(area.group) for i, area in enumerate(areas)])
    for k, title in enumerate(titles):
        mean, deviation = np.array([area.weights[k] for area in areas]).T
        place = y + (k + 0.5) * height - 0.4
        ax.barh(place, mean, height, label=title, color=BARS[k % len(BARS)])
        ax.errorbar(mean, place, xerr=deviation, fmt="none", ecolor="#777777", lw=0.7)
    margin = ax.get_yaxis_transform()
    for i, area in enumerate(areas):
        if i == 0 or area.group != areas[i - 1].group:
            ax.text(0, y[i] - 0.55, area.group, fontsize=8, weight="bold", va="bottom")
        ax.text(1.01, y[i], drives.get(area.name, ""), fontsize=7, va="center", transform=margin)
    if drives:
        ax.text(1.01, y[0] - 1.1, "driven by", fontsize=7, style="italic", transform=margin)
    ax.set_yticks(y, [f"{area.name.replace('_', ' ')} ({area.voxels})" for area in areas], fontsize=7)
    ax.set(xlabel="weight, mean ± deviation over the voxels (their number in brackets)", xlim=(0, 1))
    ax.set_ylim(y[-1] + 0.8, y[0] - 1.8)
    ax.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------- the command


def clip_numbers(text: str) -> list[int]:
    """ "3,15,40" -> the numbers, for argparse."""
    return [within(int, least=0)(word) for word in text.split(",")]


def parse(argv: list[str]) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("figures.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("compare", "weights", "memories", "map", "terms"):
        command = commands.add_parser(name, allow_abbrev=False)
        command.set_defaults(html=name == "terms")
        add = command.add_argument
        number = 1 if name in ("memories", "map") else "+"
        add("runs", nargs=number, type=Path, metavar="RUN", help="runs/<data>/sub<S>/<NAME>-s<seed>")
        folder = "docs" if name == "terms" else "the first run's folder"
        add(
            "--out",
            type=Path,
            help=f"png, pdf or, of a page, html [default: COMMAND.png or .html in {folder}]",
        )
        if name in ("memories", "terms"):
            text = "folder of the stimuli's videos [default: raw/stimuli in data/<data>]"
            add("--stimuli", type=Path, help=text)
        if name == "memories":
            add("--html", action="store_true", help="a page that opens by a double click and loads nothing")
        if name in ROWS:
            text = f"numbers of test clips, with commas between [default: {ROWS[name]}, of a page 12, spread]"
            add("--clips", type=clip_numbers, help=text)
    args = parser.parse_args(argv)
    endings = (".html",) if args.html else (".png", ".pdf")
    if args.out and args.out.suffix.lower() not in endings:
        parser.error(f"--out {args.out}: wanted a name in {' or '.join(endings)}")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    runs = dict(zip(names_of(args.runs), args.runs, strict=True))
    first = next(iter(runs.values()))
    folder = first if evaluation_of(first) == first else evaluation_of(first).parent
    folder = terms.FOLDER if args.command == "terms" else folder
    out = args.out or folder / f"{args.command}.{'html' if args.html else 'png'}"
    if args.command in ROWS:
        clips = choose_clips(first, args.clips, 12 if args.html else ROWS[args.command])
    if args.command == "compare":
        compare(runs, clips, out)
    elif args.command == "weights":
        weights(runs, out)
    elif args.command == "map":
        maps.draw(first, out)
    elif args.command == "terms":
        terms.page(runs, clips, args.stimuli, out)
    else:
        draw = memories.page if args.html else memories.picture
        draw(memories.Remembered(first, clips, args.stimuli), out)
    print(f"written: {out}")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

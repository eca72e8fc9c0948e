"""The runs of extras/ablations.py -> docs/results/*.json; those -> the terminal and the tables of
docs/ablations.md."""

import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev

from metrics.compare import Runs, check_alike, read_runs
from metrics.table import METRICS
from support.files import written_whole
from support.readers import damaged, read_json

RESULTS, PAGE = Path("docs", "results"), Path("docs", "ablations.md")
MARKS = "<!-- tables: extras/ablations.py --page writes what follows -->", "<!-- end of the tables -->"
COLUMNS = ("video_2way", "video_50way", "clip_pcc", "dtc", "ms")  # of the paper's tables
ALL = "all_attributes"  # toy world: share of the clips whose every attribute is recognised
OF_GROUPS = ("video_50way", ALL)
# from the fMRI, before any video
OF_STAGE1 = ("image 50-way", "text 50-way", "action 50-way", "category mAP")
TITLES = {name: f"{METRICS[name].title} {METRICS[name].better}" for name in METRICS}
TITLES |= {ALL: "all attributes ↑"}
MODEL = "paper's model, shuffled fMRI"


# ---------------------------------------------------------------- what is known of a table


def cells(runs: Runs, before: Runs | None, names: Sequence[str], group: str | None = None) -> dict[str, dict]:
    """Of each metric that has a value: mean and std over the seeds, and how much `more` it is than by the
    runs before, with its paired 95 % interval; of all clips or of a group."""
    of = {}
    for name in names:
        if mean_and_std := runs.summary(name, group):
            of[name] = dict(zip(("mean", "std"), mean_and_std, strict=True))
            if before:
                of[name]["more"], of[name]["ci95"] = runs.less(name, before, group)
    return of


def stage1_cells(files: list[Path], whose: str) -> dict[str, dict]:
    """Mean and std over the seeds of what stage 1's test.json says of the fMRI, or of the shuffled fMRI."""
    mend = "python train_stage1.py makes it anew"
    tests = [read_json(file, keys={"fmri": dict, "shuffled": dict}, mend=mend)[whose] for file in files]
    of = {}
    for name in OF_STAGE1:
        if values := [test[name] for test in tests if name in test]:
            of[name] = {"mean": fmean(values), "std": pstdev(values) if len(values) > 1 else None}
    return of


def result_of(
    rows: Sequence, tests: dict[str, list[Path]], files: dict[str, list[Path]], controls: list[Path],
    asked: list[str],
) -> dict:  # fmt: skip
    """What was measured of a table's rows. tests: row's label -> stage 1's test.json, one a seed; files:
    likewise metrics.json; controls: of the shuffled runs; asked: the metrics that were asked for."""
    of_rows = [read_runs(row.label, files[row.label]) for row in rows if not row.lacks]
    shuffled = read_runs(MODEL, controls)
    check_alike([*of_rows, shuffled])
    first = of_rows[0].results[0]
    groups = {name: len(of["clips"]) for name, of in first["groups"].items()}
    columns = ["ms_flow" if name == "ms" and "ms" not in asked else name for name in COLUMNS]
    columns += [ALL] * (ALL in first["clips"][0])
    of_groups = [name for name in OF_GROUPS if name in columns]

    def entry(runs: Runs, before: Runs | None) -> dict:
        within = {group: cells(runs, before, of_groups, group) for group in groups}
        return {"metrics": cells(runs, before, columns), "groups": within}

    told = []
    trained = [row for row in rows if not row.lacks]
    for row, runs, before in zip(trained, of_rows, [None, *of_rows[:-1]], strict=True):
        run = runs.results[0]["provenance"]["run"]
        about = {"label": row.label, "run": run, "quoted": row.quoted.split()}
        about["stage1"] = stage1_cells(tests[row.label], "fmri")
        told.append(about | entry(runs, before))
    for row in (row for row in rows if row.lacks):
        told.insert(rows.index(row), {"label": row.label, "quoted": row.quoted.split(), "lacks": row.lacks})
    chance = {name: METRICS[name].chance for name in columns if name in METRICS}
    return {
        "clips": len(first["clips"]),
        "groups": groups,
        "columns": columns,
        "rows": told,
        "shuffled": entry(shuffled, None),
        "stage1 shuffled": stage1_cells(tests[trained[-1].label], "shuffled"),
        "chance": {name: value for name, value in chance.items() if value},
    }


def made_by(repository: Path) -> dict:
    """Date, commit (with a + where files differ from it) and versions."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=repository, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    names = ("torch", "diffusers", "transformers", "numpy")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit + "+" * bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {name: version(name) for name in names},
    }


# ---------------------------------------------------------------- as text


def number(x: float) -> str:
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.2f}"


def mean(of: dict | None) -> str:
    """A cell of `cells`: 0.384±0.012."""
    if not of:
        return "-"
    return number(of["mean"]) + ("" if of["std"] is None else f"±{of['std']:.3f}")


def more(of: dict | None) -> str:
    """+0.085 [0.026, 0.144]"""
    if not of or of.get("more") is None:
        return ""
    return f"{of['more']:+.3f}" + (" [{:.3f}, {:.3f}]".format(*of["ci95"]) if of["ci95"] else "")


def judged(columns: Sequence[str], file: Path) -> list[list[str]]:
    """Rows of what the toy world's judges read right in videos whose content is known (extras/judge.py): no
    reconstruction can be expected to do better. None where there is no such column or file."""
    if ALL not in columns or not file.is_file():
        return []
    right = read_json(file, keys={"right": dict}, mend="python extras/judge.py makes it anew")["right"]
    of = {name: shares["all of them"] for name, shares in right.items()}
    return [
        [f"judges on: {name}", *(number(x) if column == ALL else "-" for column in columns)]
        for name, x in of.items()
    ]


def lines_of(result: dict) -> list[list[str]]:
    """A table's rows of cells, the titles first; a row with empty cells is a heading."""
    columns, shuffled = result["columns"], result["shuffled"]
    empty = [""] * len(columns)

    def block(named: list[tuple[str, dict]]) -> None:
        for label, of in named:
            lines.append([label, *(mean(of.get(name)) for name in columns)])
            if any("more" in cell for cell in of.values()):
                lines.append(["   more than the row before", *(more(of.get(name)) for name in columns)])

    lines = [["", *(TITLES[name] for name in columns)]]
    trained = [row for row in result["rows"] if "metrics" in row]
    block([(row["label"], row["metrics"]) for row in trained])
    for row in result["rows"]:
        if "lacks" in row:
            lines.append([f"{row['label']}: {row['lacks']}", *empty])
    block([(MODEL, shuffled["metrics"])])
    chance = result["chance"]
    lines.append(["chance", *(number(chance[name]) if name in chance else "-" for name in columns)])
    lines += judged(columns, RESULTS / "judges.json")
    for group, clips in result["groups"].items():
        lines.append([f"{group}, {clips} clips:", *empty])
        block([(row["label"], row["groups"][group]) for row in trained])
        block([(MODEL, shuffled["groups"][group])])
    lines.append([f"quoted from the paper ({result['quoted_of']}):", *empty])
    for row in result["rows"]:
        lines.append([row["label"], *(row["quoted"] + empty)[: len(columns)]])
    return lines


def stage1_lines(result: dict) -> list[list[str]]:
    """What the fMRI of each row's stage 1 tells, a row of cells each, the titles first."""
    lines = [["stage 1", *OF_STAGE1]]
    told = [(row["label"], row["stage1"]) for row in result["rows"] if "stage1" in row]
    for label, of in [*told, ("shuffled fMRI", result["stage1 shuffled"])]:
        lines.append([label, *(mean(of.get(name)) for name in OF_STAGE1)])
    return lines


def heading(result: dict) -> str:
    seeds = " ".join(map(str, result["seeds"]))
    of = f"Table {result['table']} on {result['data']}, subject {result['subject']}"
    return f"{of}: {result['clips']} held-out clips, mean ± deviation over the seeds {seeds}"


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows if any(row[1:])) + 2 for k in range(len(rows[0]))]
    text = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        text.append((f"{first:<{widths[0]}}" + "".join(cells)).rstrip())
    return text


def as_text(result: dict) -> str:
    why = "Intervals: 95 %, paired, over blocks of 20 clips, each clip the mean over the seeds."
    tables = *aligned(lines_of(result)), "", *aligned(stage1_lines(result))
    return "\n".join([heading(result), "", *tables, "", why])


def markdown_table(rows: list[list[str]]) -> list[str]:
    titles, *rows = rows
    rows = [[f"*{row[0]}*", *row[1:]] if not any(row[1:]) else row for row in rows]
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]


def as_markdown(result: dict) -> str:
    """The table, and what made it."""
    took = [minutes for minutes in result["minutes"].values() if minutes is not None]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    made = f"`{result['command']}`, {result['date']}, commit {result['commit'][:10]}, {versions}"
    took = f"{len(took)} commands took {sum(took):.0f} minutes, one after the other"
    tables = *markdown_table(lines_of(result)), "", *markdown_table(stage1_lines(result))
    return "\n".join([f"### {heading(result)}", "", *tables, "", f"{made}; {took}."])


KEYS = dict.fromkeys(("table", "subject", "clips"), int) | dict.fromkeys(("seeds", "rows", "columns"), list)
KEYS |= dict.fromkeys(("data", "quoted_of", "command", "date", "commit"), str)
KEYS |= dict.fromkeys(("groups", "shuffled", "stage1 shuffled", "chance", "versions", "minutes"), dict)


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """The tables of docs/ablations.md between its two marks; the words around them stay. Raises
    FileNotFoundError or ValueError where there is no result, or the page has no marks."""
    files = sorted(results.glob("table*.json"))
    if not files:
        raise FileNotFoundError(f"{results}/table*.json is not there: python extras/ablations.py makes it")
    mend = "python extras/ablations.py makes it anew"
    tables = [as_markdown(read_json(file, keys=KEYS, mend=mend)) for file in files]
    text = page.read_text() if page.is_file() else "\n".join((*MARKS, ""))
    places = [text.find(mark) for mark in MARKS]
    if not 0 <= places[0] < places[1]:
        raise damaged(page, "other text", f"the lines {' and '.join(MARKS)}", "put them back")
    before, after = text[: places[0] + len(MARKS[0])], text[places[1] :]
    with written_whole(page) as part:
        part.write_text(f"{before}\n\n" + "\n\n".join(tables) + f"\n\n{after}")

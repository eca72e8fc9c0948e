"""The runs of extras/ablations.py -> docs/results/*.json; those -> the terminal and the tables of
docs/ablations.md."""

import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev

from metrics.compare import Runs, check_alike, read_runs
from metrics.report import number
from metrics.table import METRICS
from support.files import written_whole
from support.readers import damaged, read_json, reading

RESULTS, PAGE = Path("docs", "results"), Path("docs", "ablations.md")
MARKS = "<!-- tables: extras/ablations.py --page writes what follows -->", "<!-- end of the tables -->"
COLUMNS = ("video_2way", "video_50way", "clip_pcc", "dtc", "ms")  # of the paper's tables
ALL = "all_attributes"  # toy world: share of the clips whose every attribute is recognised
OF_GROUPS = ("video_50way", ALL)
OF_STAGE1 = ("image 50-way", "text 50-way", "action 50-way", "category mAP")  # of the fMRI, before any video
TITLES = {name: f"{METRICS[name].title} {METRICS[name].better}" for name in METRICS}
TITLES[ALL] = "all attributes ↑"
MODEL = "paper's model, shuffled fMRI"
KEYS = {
    **dict.fromkeys(("table", "subject", "clips"), int),
    **dict.fromkeys(("seeds", "rows", "columns"), list),
    **dict.fromkeys(("data", "quoted_of", "command", "date", "commit"), str),
    **dict.fromkeys(("groups", "shuffled", "stage1 shuffled", "chance", "versions", "minutes"), dict),
}


# ---------------------------------------------------------------- what is known of a table


def cells(runs: Runs, previous: Runs | None, names: Sequence[str], group: str | None = None) -> dict:
    """Of each metric that has a value: mean and std over the seeds, and how much `more` it is than by the
    previous runs, with its paired 95 % interval; of all clips or of a group."""
    entries = {}
    for name in names:
        if summary := runs.summary(name, group):
            entries[name] = dict(zip(("mean", "std"), summary, strict=True))
            if previous:
                more = runs.less(name, previous, group)
                entries[name].update(more=more.mean, ci95=more.ci95)
    return entries


def stage1_cells(files: list[Path], column: str) -> dict[str, dict]:
    """Mean and std over the seeds of what stage 1's test.json says of the fMRI, or of the shuffled fMRI."""
    entries, scores = {}, []
    for file in files:
        with reading(file, advice="python train_stage1.py makes it anew"):
            scores.append(read_json(file, keys={"fmri": dict, "shuffled": dict})[column])
    for name in OF_STAGE1:
        if values := [score[name] for score in scores if name in score]:
            entries[name] = {"mean": fmean(values), "std": pstdev(values) if len(values) > 1 else None}
    return entries


def result_of(
    rows: Sequence,
    tests: dict[str, list[Path]],
    files: dict[str, list[Path]],
    controls: list[Path],
    metrics: list[str],
) -> dict:
    """What was measured of a table's rows. tests: row's label -> stage 1's test.json, one a seed; files:
    likewise metrics.json; controls: of the shuffled runs; metrics: that were asked for."""
    trained = {row.label: read_runs(row.label, files[row.label]) for row in rows if not row.lacks}
    shuffled = read_runs(MODEL, controls)
    check_alike([*trained.values(), shuffled])
    first = next(iter(trained.values())).results[0]
    groups = {name: len(group["clips"]) for name, group in first["groups"].items()}
    columns = ["ms_flow" if name == "ms" and "ms" not in metrics else name for name in COLUMNS]
    columns += [ALL] * (ALL in first["clips"][0])
    of_groups = [name for name in OF_GROUPS if name in columns]

    def entry(runs: Runs, previous: Runs | None) -> dict:
        by_group = {group: cells(runs, previous, of_groups, group) for group in groups}
        return {"metrics": cells(runs, previous, columns), "groups": by_group}

    entries, previous = [], None
    for row in rows:
        quoted = row.quoted.split()
        if row.lacks:
            entries.append({"label": row.label, "quoted": quoted, "lacks": row.lacks})
            continue
        runs = trained[row.label]
        about = {"label": row.label, "run": runs.results[0]["provenance"]["run"], "quoted": quoted}
        about["stage1"] = stage1_cells(tests[row.label], "fmri")
        entries.append(about | entry(runs, previous))
        previous = runs
    return {
        "clips": len(first["clips"]),
        "groups": groups,
        "columns": columns,
        "rows": entries,
        "shuffled": entry(shuffled, None),
        "stage1 shuffled": stage1_cells(tests[[*trained][-1]], "shuffled"),
        "chance": {name: METRICS[name].chance for name in columns if name != ALL and METRICS[name].chance},
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


def mean(cell: dict | None) -> str:
    """A cell of `cells`: 0.384±0.012."""
    if not cell:
        return "-"
    return number(cell["mean"]) + ("" if cell["std"] is None else f"±{cell['std']:.3f}")


def more(cell: dict | None) -> str:
    """+0.085 [0.026, 0.144]"""
    if not cell or cell.get("more") is None:
        return ""
    return f"{cell['more']:+.3f}" + (" [{:.3f}, {:.3f}]".format(*cell["ci95"]) if cell["ci95"] else "")


def judged(columns: Sequence[str], file: Path) -> list[list[str]]:
    """Rows of what the toy world's judges read right in videos whose content is known (extras/judge.py): no
    reconstruction can be expected to do better. None where there is no such column or file."""
    if ALL not in columns or not file.is_file():
        return []
    with reading(file, advice="python extras/judge.py makes it anew"):
        right = read_json(file, keys={"right": dict})["right"]
    rows = []
    for name, shares in right.items():
        texts = [number(shares["all of them"]) if column == ALL else "-" for column in columns]
        rows.append([f"judges on: {name}", *texts])
    return rows


def lines_of(result: dict) -> list[list[str]]:
    """A table's rows of cells, the titles first; a row with empty cells is a heading."""
    columns, shuffled = result["columns"], result["shuffled"]
    empty = [""] * len(columns)
    lines = [["", *(TITLES[name] for name in columns)]]

    def add(label: str, entry: dict) -> None:
        lines.append([label, *(mean(entry.get(name)) for name in columns)])
        if any("more" in cell for cell in entry.values()):
            lines.append(["   more than the row before", *(more(entry.get(name)) for name in columns)])

    trained = [row for row in result["rows"] if "metrics" in row]
    for row in trained:
        add(row["label"], row["metrics"])
    for row in result["rows"]:
        if "lacks" in row:
            lines.append([f"{row['label']}: {row['lacks']}", *empty])
    add(MODEL, shuffled["metrics"])
    chance = result["chance"]
    lines.append(["chance", *(number(chance[name]) if name in chance else "-" for name in columns)])
    lines += judged(columns, RESULTS / "judges.json")
    for group, clips in result["groups"].items():
        lines.append([f"{group}, {clips} clips:", *empty])
        for row in trained:
            add(row["label"], row["groups"][group])
        add(MODEL, shuffled["groups"][group])
    lines.append([f"quoted from the paper ({result['quoted_of']}):", *empty])
    for row in result["rows"]:
        lines.append([row["label"], *(row["quoted"] + empty)[: len(columns)]])
    return lines


def stage1_lines(result: dict) -> list[list[str]]:
    """What the fMRI of each row's stage 1 tells, a row of cells each, the titles first."""
    rows = [(row["label"], row["stage1"]) for row in result["rows"] if "stage1" in row]
    lines = [["stage 1", *OF_STAGE1]]
    for label, entry in [*rows, ("shuffled fMRI", result["stage1 shuffled"])]:
        lines.append([label, *(mean(entry.get(name)) for name in OF_STAGE1)])
    return lines


def heading(result: dict) -> str:
    seeds = " ".join(map(str, result["seeds"]))
    table = f"Table {result['table']} on {result['data']}, subject {result['subject']}"
    return f"{table}: {result['clips']} held-out clips, mean ± deviation over the seeds {seeds}"


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows if any(row[1:])) + 2 for k in range(len(rows[0]))]
    lines = []
    for label, *texts in rows:
        columns = [f"{text:>{width}}" for text, width in zip(texts, widths[1:], strict=True)]
        lines.append((f"{label:<{widths[0]}}" + "".join(columns)).rstrip())
    return lines


def as_text(result: dict) -> str:
    remark = "Intervals: 95 %, paired, over blocks of 20 clips, each clip the mean over the seeds."
    tables = [*aligned(lines_of(result)), "", *aligned(stage1_lines(result))]
    return "\n".join([heading(result), "", *tables, "", remark])


def markdown_table(rows: list[list[str]]) -> list[str]:
    titles, *rows = rows
    rows = [[f"*{row[0]}*", *row[1:]] if not any(row[1:]) else row for row in rows]
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]


def as_markdown(result: dict) -> str:
    """The table, and what made it."""
    minutes = [value for value in result["minutes"].values() if value is not None]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    source = f"`{result['command']}`, {result['date']}, commit {result['commit'][:10]}, {versions}"
    duration = f"{len(minutes)} commands took {sum(minutes):.0f} minutes, one after the other"
    tables = [*markdown_table(lines_of(result)), "", *markdown_table(stage1_lines(result))]
    return "\n".join([f"### {heading(result)}", "", *tables, "", f"{source}; {duration}."])


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """The tables of docs/ablations.md between its two marks; the words around them stay. Raises
    FileNotFoundError or ValueError where there is no result, or the page has no marks."""
    files, tables = sorted(results.glob("table*.json")), []
    if not files:
        raise FileNotFoundError(f"{results}/table*.json is not there: python extras/ablations.py makes it")
    for file in files:
        with reading(file, advice="python extras/ablations.py makes it anew"):
            tables.append(as_markdown(read_json(file, keys=KEYS)))
    text = page.read_text() if page.is_file() else "\n".join((*MARKS, ""))
    start, end = (text.find(mark) for mark in MARKS)
    if not 0 <= start < end:
        raise damaged(page, "another text", f"the lines {' and '.join(MARKS)}", "put them back")
    with written_whole(page) as part:
        part.write_text("\n\n".join([text[: start + len(MARKS[0])], *tables, text[end:]]))

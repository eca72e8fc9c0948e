"""The runs of extras/ablations.py -> docs/results/*.json; those -> the terminal and the tables of
docs/ablations.md."""

import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, pstdev
from typing import NamedTuple

from metrics.compare import Runs, check_alike, read_runs
from metrics.report import number
from metrics.table import METRICS
from support.files import written_whole
from support.readers import Type, check_keys, damaged, read_json, reading

RESULTS, PAGE = Path("docs", "results"), Path("docs", "ablations.md")
MARKS = "<!-- tables: extras/ablations.py --page writes what follows -->", "<!-- end of the tables -->"
COLUMNS = ("video_2way", "video_50way", "clip_pcc", "dtc", "ms")  # of the paper's tables
ALL = "all_attributes"  # toy world: share of the clips whose every attribute is recognised
OF_GROUPS = ("video_50way", ALL)
OF_STAGE1 = ("image 50-way", "text 50-way", "action 50-way", "category mAP")  # of the fMRI, before any video
TITLES = {name: f"{metric.title} {metric.better}" for name, metric in METRICS.items()}
TITLES[ALL] = "all attributes ↑"
MODEL = "paper's model, shuffled fMRI"
KEYS = dict.fromkeys(("table", "subject", "clips"), int)  # of docs/results/table*.json
KEYS |= dict.fromkeys(("data", "quoted_of", "command", "date", "commit"), str)
KEYS |= dict.fromkeys(("groups", "shuffled", "stage1 shuffled", "chance", "minutes", "versions"), dict)
KEYS |= dict.fromkeys(("seeds", "columns", "rows"), list)

# ---------------------------------------------------------------- what is known of a table


class Files(NamedTuple):
    """What the runs of a table write: of each row's label a file a seed."""

    stage1: dict[str, list[Path]]  # test.json of stage 1
    evaluations: dict[str, list[Path]]  # metrics.json
    controls: list[Path]  # metrics.json of the paper's model on shuffled fMRI, one a seed


def cells(runs: Runs, previous: Runs | None, names: Sequence[str], group: str | None = None) -> dict:
    """Of each metric that has a value: mean and std over the seeds, and how much `more` it is than by the
    previous runs, with its paired 95 % interval; of all clips or of a group."""
    entries = {}
    for name in names:
        if summary := runs.summary(name, group):
            entries[name] = {"mean": summary[0], "std": summary[1]}
            if previous:
                more, ci95 = runs.less(name, previous, group)
                entries[name] |= {"more": more, "ci95": ci95}
    return entries


def stage1_cells(files: list[Path], column: str) -> dict[str, dict]:
    """Mean and std over the seeds of what stage 1's test.json says of the fMRI, or of the shuffled fMRI."""
    entries, scores = {}, []
    for file in files:
        with reading(file, advice="python train_stage1.py makes it anew"):
            scores.append(read_json(file)[column])
    for name in OF_STAGE1:
        if values := [score[name] for score in scores if name in score]:
            entries[name] = {"mean": fmean(values), "std": pstdev(values) if len(values) > 1 else None}
    return entries


def result_of(rows: Sequence, files: Files, metrics: list[str]) -> dict:
    """What was measured of a table's rows by the metrics that were asked for."""
    trained = {label: read_runs(label, of_seeds) for label, of_seeds in files.evaluations.items()}
    shuffled = read_runs(MODEL, files.controls)
    check_alike([*trained.values(), shuffled])
    first = next(iter(trained.values())).results[0]
    groups = {name: len(group["clips"]) for name, group in first["groups"].items()}
    columns = ["ms_flow" if name == "ms" and "ms" not in metrics else name for name in COLUMNS]
    columns += [ALL] * (ALL in first["clips"][0])
    of_groups = [name for name in OF_GROUPS if name in columns]

    def measured(runs: Runs, previous: Runs | None) -> dict:
        by_group = {group: cells(runs, previous, of_groups, group) for group in groups}
        return {"metrics": cells(runs, previous, columns), "groups": by_group}

    entries, previous = [], None
    for row in rows:
        entry = {"label": row.label, "quoted": row.quoted.split()}
        if row.lacks:
            entry["lacks"] = row.lacks
        else:
            runs = trained[row.label]
            entry["run"] = runs.results[0]["provenance"]["run"]
            entry["stage1"] = stage1_cells(files.stage1[row.label], "fmri")
            entry |= measured(runs, previous)
            previous = runs
        entries.append(entry)
    return {
        "clips": len(first["clips"]),
        "groups": groups,
        "columns": columns,
        "rows": entries,
        "shuffled": measured(shuffled, None),
        "stage1 shuffled": stage1_cells(files.stage1[[*trained][-1]], "shuffled"),
        "chance": {name: METRICS[name].chance for name in columns if name != ALL and METRICS[name].chance},
    }


def provenance(repository: Path) -> dict:
    """Date, commit (with a + where files differ from it) and versions."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=repository, capture_output=True, text=True).stdout.strip()

    edited = bool(git("status", "--porcelain", "--untracked-files=no"))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": (git("rev-parse", "HEAD") or "unknown") + "+" * edited,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
    }


# ---------------------------------------------------------------- as text


def cell_rows(entries: list[tuple[str, dict]], columns: Sequence[str]) -> list[list[str]]:
    """Of each label and its `cells` a row, and one of how much more it is than the row before."""
    rows = []
    for label, entry in entries:
        rows.append([label, *(mean(entry.get(name)) for name in columns)])
        if any("more" in cell for cell in entry.values()):
            rows.append(["   more than the row before", *(more(entry.get(name)) for name in columns)])
    return rows


def mean(cell: dict | None) -> str:
    """0.384±0.012"""
    if not cell:
        return "-"
    return number(cell["mean"]) + ("" if cell.get("std") is None else f"±{cell['std']:.3f}")


def more(cell: dict | None) -> str:
    """+0.085 [0.026, 0.144]"""
    if not cell or cell.get("more") is None:
        return ""
    return f"{cell['more']:+.3f}" + (" [{:.3f}, {:.3f}]".format(*cell["ci95"]) if cell["ci95"] else "")


def lines_of(result: dict) -> list[list[str]]:
    """A table's rows of cells, the titles first; a row with empty cells is a heading."""
    columns, judges = result["columns"], RESULTS / "judges.json"
    empty = [""] * len(columns)
    trained = [row for row in result["rows"] if "metrics" in row]
    lines = [["", *(TITLES[name] for name in columns)]]
    lines += cell_rows([(row["label"], row["metrics"]) for row in trained], columns)
    lines += [[f"{row['label']}: {row['lacks']}", *empty] for row in result["rows"] if "lacks" in row]
    controls = [(MODEL, result["shuffled"]["metrics"])]
    controls.append(("chance", {name: {"mean": value} for name, value in result["chance"].items()}))
    if ALL in columns and judges.is_file():  # no reconstruction can be expected to do better
        with reading(judges, advice="python extras/judge.py makes it anew"):
            for name, share in read_json(judges)["right"].items():
                check_keys(share, judges, {"all of them": float})
                controls.append((f"judges on: {name}", {ALL: {"mean": share["all of them"]}}))
    lines += cell_rows(controls, columns)
    for group, clips in result["groups"].items():
        lines.append([f"{group}, {clips} clips:", *empty])
        entries = [(row["label"], row["groups"][group]) for row in trained]
        lines += cell_rows([*entries, (MODEL, result["shuffled"]["groups"][group])], columns)
    lines.append([f"quoted from the paper ({result['quoted_of']}):", *empty])
    lines += [[row["label"], *(row["quoted"] + empty)[: len(columns)]] for row in result["rows"]]
    return lines


def stage1_lines(result: dict) -> list[list[str]]:
    """What the fMRI of each row's stage 1 tells, a row of cells each, the titles first."""
    entries = [(row["label"], row["stage1"]) for row in result["rows"] if "stage1" in row]
    entries.append(("shuffled fMRI", result["stage1 shuffled"]))
    return [["stage 1", *OF_STAGE1], *cell_rows(entries, OF_STAGE1)]


def heading(result: dict) -> str:
    table = f"Table {result['table']} on {result['data']}, subject {result['subject']}"
    seeds = " ".join(map(str, result["seeds"]))
    return f"{table}: {result['clips']} held-out clips, mean ± deviation over the seeds {seeds}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Headings are as long as they are."""
    widths = [
        max(map(len, column)) + 2 for column in zip(*(row for row in rows if any(row[1:])), strict=True)
    ]
    lines = []
    for label, *texts in rows:
        columns = map(str.rjust, texts, widths[1:])
        lines.append((label.ljust(widths[0]) + "".join(columns)).rstrip())
    return lines


def as_text(result: dict) -> str:
    remark = "Intervals: 95 %, paired, over blocks of 20 clips, each clip the mean over the seeds."
    tables = [*aligned(lines_of(result)), "", *aligned(stage1_lines(result))]
    return "\n".join([heading(result), "", *tables, "", remark])


def markdown_table(rows: list[list[str]]) -> list[str]:
    titles, *rows = rows
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [row if any(row[1:]) else [f"*{row[0]}*", *row[1:]] for row in rows]
    return ["| " + " | ".join(map(str.strip, line)) + " |" for line in lines]


def as_markdown(result: dict) -> str:
    """The table, and what made it."""
    minutes = [value for value in result["minutes"].values() if value is not None]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    source = f"`{result['command']}`, {result['date']}, commit {result['commit'][:10]}, {versions}"
    duration = f"{len(minutes)} commands took {sum(minutes):.0f} minutes, one after the other"
    tables = [*markdown_table(lines_of(result)), "", *markdown_table(stage1_lines(result))]
    return "\n".join([f"### {heading(result)}", "", *tables, "", f"{source}; {duration}."])


# ---------------------------------------------------------------- read again


def check_all(values: dict | list, place: object, kind: Type) -> None:
    """Raises FileFault where a value is of another type, or a number that is not finite."""
    values = values if isinstance(values, dict) else dict(enumerate(values))
    check_keys(values, place, dict.fromkeys(values, kind))


def check_cells(entries: dict, place: str) -> None:
    """Of `cells`. Raises FileFault."""
    check_all(entries, place, dict)
    for name, cell in entries.items():
        check_keys(cell, f"{place}, {name}", {"mean": float})
        check_all([cell.get("std"), cell.get("more")], f"{place}, {name}", (float, type(None)))
        if cell.get("ci95") is not None:
            check_all(check_keys(cell, f"{place}, {name}", {"ci95": list})["ci95"], f"{place}, {name}", float)
            if len(cell["ci95"]) != 2:
                raise damaged(f"{place}, {name}", f"ci95 = {cell['ci95']}", "its two ends")


def check_measured(entry: dict, groups: dict, place: str) -> None:
    """Of all clips and of each group. Raises FileFault."""
    check_keys(entry, place, {"metrics": dict, "groups": dict})
    check_cells(entry["metrics"], place)
    check_keys(entry["groups"], place, dict.fromkeys(groups, dict))
    for group in groups:
        check_cells(entry["groups"][group], f"{place}, {group}")


def read_result(file: Path) -> dict:
    """A result of `main` of ablations.py. Raises FileFault where a part of it is damaged."""
    result = read_json(file, keys=KEYS)
    for name, kind in {"seeds": int, "columns": str, "groups": int, "rows": dict, "chance": float}.items():
        check_all(result[name], f"{file}, {name}", kind)
    check_all(result["versions"], f"{file}, versions", str)
    check_all(result["minutes"], f"{file}, minutes", (float, type(None)))
    if unknown := {*result["columns"]} - {*TITLES}:
        raise damaged(file, f"columns {', '.join(sorted(unknown))}", "names of metrics")
    for k, row in enumerate(result["rows"], 1):
        place = f"{file}, row {k}"
        check_all(check_keys(row, place, {"label": str, "quoted": list})["quoted"], place, str)
        if len(row["quoted"]) != len(COLUMNS):
            raise damaged(place, f"{len(row['quoted'])} quoted numbers", len(COLUMNS))
        if "lacks" in row:
            check_keys(row, place, {"lacks": str})
        else:
            check_cells(check_keys(row, place, {"stage1": dict})["stage1"], f"{place}, stage1")
            check_measured(row, result["groups"], place)
    check_measured(result["shuffled"], result["groups"], f"{file}, shuffled")
    check_cells(result["stage1 shuffled"], f"{file}, stage1 shuffled")
    return result


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """The tables of docs/ablations.md between its two marks; the words around them stay. Raises
    FileNotFoundError or ValueError where there is no result, or the page has no marks."""
    tables = []
    for file in sorted(results.glob("table*.json")):
        with reading(file, advice="python extras/ablations.py makes it anew"):
            tables.append(as_markdown(read_result(file)))
    if not tables:
        raise FileNotFoundError(f"{results}/table*.json is not there: python extras/ablations.py makes it")
    text = page.read_text(encoding="utf-8") if page.is_file() else "\n".join((*MARKS, ""))
    start, end = (text.find(mark) for mark in MARKS)
    if not 0 <= start < end:
        raise damaged(page, "another text", f"the lines {' and '.join(MARKS)}", "put them back")
    with written_whole(page) as part:
        part.write_text("\n\n".join([text[: start + len(MARKS[0])], *tables, text[end:]]), encoding="utf-8")

"""The runs of extras/ablations.py -> docs/results/*.json; those -> the terminal and the tables of
docs/ablations.md."""

import json
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from metrics.compare import Runs, check_alike, read_runs
from metrics.intervals import Difference, pooled
from metrics.report import MEMORY, table
from metrics.table import METRICS
from support.files import write_text
from support.readers import damaged, read_json, read_text, reading

RESULTS, PAGE = Path("docs", "results"), Path("docs", "ablations.md")
MARKS = "<!-- tables: extras/ablations.py --page writes what follows -->", "<!-- end of the tables -->"
COLUMNS = ("video_2way", "video_50way", "clip_pcc", "dtc", "ms")  # of the paper's tables
WORTH = "video_50way"  # by which the page says what a part is worth
ALL = "all_attributes"  # toy world: share of the clips whose every attribute is recognised
MODEL = "paper's model, shuffled fMRI"
BEFORE = "the row before"
DIFFERENCE = ("more", "ci95", "freedom")

# ---------------------------------------------------------------- what is known of a table


def cells(runs: Runs, others: dict[str, Runs], names: Sequence[str], group: str | None = None) -> dict:
    """Of each metric that has a value: mean and std over the seeds, and how much `more` it is than by others,
    with its paired 95 % interval and degrees of freedom; of all clips or of a group. That of the row before
    stands in the cell itself, the rest in "than"."""
    entries = {}
    for name in names:
        if summary := runs.summary(name, group):
            entries[name] = {"mean": summary[0], "std": summary[1]}
            than = {}
            for label, other in others.items():
                than[label] = dict(zip(DIFFERENCE, runs.less(name, other, group), strict=True))
            entries[name] |= than.pop(BEFORE, {})
            if than:
                entries[name]["than"] = than
    return entries


def result_of(rows: Sequence, files: dict[str, list[Path]]) -> dict:
    """What was measured of a table's rows. files: of each row's label, and of MODEL, metrics.json a seed."""
    trained = {label: read_runs(label, of_seeds) for label, of_seeds in files.items()}
    check_alike([*trained.values()])
    names = {label: runs.results[0]["provenance"]["run"] for label, runs in trained.items()}
    shuffled = trained.pop(MODEL)
    first = next(iter(trained.values())).results[0]
    groups = {name: len(group["clips"]) for name, group in first["groups"].items()}

    def measured(runs: Runs, others: dict[str, Runs]) -> dict:
        by_group = {group: cells(runs, others, (WORTH, ALL), group) for group in groups}
        return {"metrics": cells(runs, others, (*METRICS, ALL)), "groups": by_group}

    steps = [row.label for row in rows if row.quoted and not row.lacks]
    k = [names[label] for label in steps].index(names[MODEL])
    memory = trained[steps[k]].memory()
    rivals = [row.label for row in rows if not row.quoted and not row.lacks] + steps[max(k - 1, 0) : k]
    entries, before = [], None
    for row in rows:
        entry = {"label": row.label, "quoted": row.quoted.split()}
        entries.append(entry)
        if row.lacks:
            entry["lacks"] = row.lacks
            continue
        others = {BEFORE: before} if before else {}
        if row.label == steps[k]:  # the paper's model is to be measured from the strongest
            others |= {label: trained[label] for label in rivals if trained[label] is not before}
            others |= {f"the {MEMORY}": memory} if memory else {}
        before = trained[row.label]
        entry |= {"run": names[row.label], **measured(before, others)}
    if memory:
        entries.append({"label": MEMORY, "quoted": [], **measured(memory, {})})
    return {
        "clips": len(first["clips"]),
        "groups": groups,
        "rows": entries,
        "shuffled": measured(shuffled, {}),
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


def differences_of(cell: dict) -> dict[str, dict]:
    """How much more a cell is than the row before and others, by their labels."""
    return ({BEFORE: cell} if "more" in cell else {}) | cell.get("than", {})


def mean(cell: dict | None) -> str:
    """0.384±0.012"""
    if not cell:
        return "-"
    return f"{cell['mean']:.3f}" + ("" if cell.get("std") is None else f"±{cell['std']:.3f}")


def more(of: Difference) -> str:
    """+0.085 [0.026, 0.144]"""
    if of.more is None:
        return "-"
    return f"{of.more:+.3f}" + (f" [{of.ci95[0]:.3f}, {of.ci95[1]:.3f}]" if of.ci95 else "")


def as_text(result: dict) -> str:
    """A table's metrics beside the paper's numbers; then what the page would have of it."""
    measured = [row for row in result["rows"] if "metrics" in row]
    measured.append({"label": MODEL} | result["shuffled"])
    rows = [(row["label"], {name: mean(cell) for name, cell in row["metrics"].items()}) for row in measured]
    for row in filter(lambda row: row["quoted"], result["rows"]):
        quoted = dict(zip(COLUMNS, row["quoted"], strict=True))
        rows.append((f"{row['label']}, quoted, {result['quoted_of']}", quoted))
    lacks = [f"{row['label']}: {row['lacks']}" for row in result["rows"] if "lacks" in row]
    return "\n\n".join([table(rows, ""), *lacks, *page_of({(result["table"], result["data"]): [result]})])


def markdown_table(titles: list[str], rows: Iterable[list[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------- the page: films side by side


def of_film(results: list[dict]) -> str:
    """The rows of all tables of one film, each once."""
    groups = [*results[0]["groups"]]
    of_groups = [f"50-way, {group}" for group in groups], [f"all four, {group}" for group in groups]
    titles = ["", "2-way", "50-way", *of_groups[0], "all four", *of_groups[1]]
    rows: dict[tuple, list[str]] = {}
    for result in results:
        entries = [row for row in result["rows"] if "metrics" in row]
        entries.append({"label": MODEL} | result["shuffled"])
        for row in entries:
            sets = [row["metrics"], *(row["groups"][group] for group in groups)]
            cells = [entry.get(name) for name in (WORTH, ALL) for entry in sets]
            label = row["label"].removeprefix("+ ") + f" (Table {result['table']})" * ("run" in row)
            run = row.get("run", label), *(cell and cell["mean"] for cell in cells)  # once in all tables
            rows.setdefault(run, [label, *map(mean, [sets[0].get("video_2way"), *cells])])
    guessed = [f"{METRICS[name].chance:.3f}" for name in ("video_2way", WORTH)]
    return markdown_table(titles, [*rows.values(), ["chance", *guessed, *["-"] * (len(titles) - 3)]])


def worth(films: list[dict], metric: str) -> list[list[str]]:
    """How much more the rows of a table have of a metric than others, on each film and together, with the
    interval over clips and seeds: a row of cells each."""
    lines, before = [], ""
    for rows in zip(*(film["rows"] for film in films), strict=True):
        label, entries = rows[0]["label"], [row for row in rows if "metrics" in row]
        first = entries[0]["metrics"].get(metric) if entries else None
        for other in differences_of(first) if first else ():
            measured = [[entry["metrics"], *entry["groups"].values()] for entry in entries]
            parts = []  # of all clips, and of each group, those of the films
            for of_films in zip(*measured, strict=True):
                cells = [differences_of(of.get(metric, {})).get(other, {}) for of in of_films]
                parts.append([Difference(*map(of.get, DIFFERENCE)) for of in cells])
            each, together = (
                " / ".join(more(of._replace(ci95=None)) for of in parts[0]),
                [*map(pooled, parts)],
            )
            less = before if other == BEFORE else other.removeprefix("the ")
            ci95 = together[0].ci95
            sure = ("no" if ci95[0] <= 0 <= ci95[1] else "yes") if ci95 else "-"
            lines.append([f"{label} less {less}".replace("+ ", ""), each, *map(more, together), sure])
        before = label
    return lines


def page_of(tables: dict[tuple, list[dict]]) -> list[str]:
    """The generated part of the page. tables: of each table and dataset the results of its films."""
    parts = []
    for data in dict.fromkeys(data for _, data in tables):
        of_tables = [films for (_, name), films in tables.items() if name == data]
        subjects = sorted({film["subject"] for films in of_tables for film in films})
        alike = [films for films in of_tables if len({repr(shape(film)) for film in films}) == 1]
        parts.append(f"### What a part is worth on {data}")
        for metric, title in ((WORTH, "50-way"), (ALL, "all four")):
            titles = [title, f"subject {' / '.join(map(str, subjects))}", "together"]
            titles += [*of_tables[0][0]["groups"], "sure?"]
            rows: dict[tuple, list[str]] = {}
            for row in (row for films in alike for row in worth(films, metric)):
                rows.setdefault(tuple(row[1:]), row)  # tables share their runs: the same once
            parts += [markdown_table(titles, rows.values())] if rows or metric == WORTH else []
        for subject in subjects:
            results = [film for films in of_tables for film in films if film["subject"] == subject]
            seeds = " ".join(map(str, results[0]["seeds"]))
            remark = f"{results[0]['clips']} held-out clips, mean ± deviation over the seeds {seeds}"
            parts += [f"### {data}, subject {subject}: {remark}", of_film(results)]
            parts += ["\n".join(map(source, results))]
    return parts


def source(result: dict) -> str:
    """What made a table."""
    minutes = [value for value in result["minutes"].values() if value is not None]
    commit = result["commit"][:10] + "+" * result["commit"].endswith("+")
    torch = f"torch {result['versions']['torch']}"
    return f"- `{result['command']}`, {result['date']}, commit {commit}, {torch}, {sum(minutes):.0f} minutes."


def shape(result: dict) -> list:
    """The rows' labels, and what each is compared with."""
    cells = [row.get("metrics", {}) for row in result["rows"]]
    compared = [{name: [*differences_of(cell)] for name, cell in of_row.items()} for of_row in cells]
    return [(row["label"], names) for row, names in zip(result["rows"], compared, strict=True)]


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """The tables of docs/ablations.md between its two marks; the words around them stay. Raises
    FileNotFoundError or ValueError where there is no result, or the page has no marks."""
    tables: dict[tuple, list[dict]] = {}  # table and data: the results of each film
    for file in sorted(results.glob("table*.json")):
        with reading(file, "what extras/ablations.py writes", "python extras/ablations.py makes it anew"):
            result = read_json(file, keys={"table": int, "data": str, "subject": int, "clips": int})
            json.dumps(result, allow_nan=False)  # every number is finite
            as_text(result)  # whatever shows a result finds its faults
            tables.setdefault((result["table"], result["data"]), []).append(result)
    if not tables:
        raise FileNotFoundError(f"{results}/table*.json is not there: python extras/ablations.py makes it")
    text = read_text(page)
    start, end = (text.find(mark) for mark in MARKS)
    if not 0 <= start < end:
        raise damaged(page, "another text", f"the lines {' and '.join(MARKS)}", "put them back")
    write_text(page, "\n\n".join([text[: start + len(MARKS[0])], *page_of(tables), text[end:]]))

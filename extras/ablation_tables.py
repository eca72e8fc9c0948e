"""The runs of extras/ablations.py -> docs/results/*.json; those -> the terminal and the tables of
docs/ablations.md."""

import json
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from metrics.compare import Runs, check_alike, read_runs
from metrics.intervals import Difference, pooled
from metrics.table import METRICS
from support.files import written_whole
from support.readers import check_keys, damaged, read_json, reading

RESULTS, PAGE = Path("docs", "results"), Path("docs", "ablations.md")
MARKS = "<!-- tables: extras/ablations.py --page writes what follows -->", "<!-- end of the tables -->"
COLUMNS = ("video_2way", "video_50way", "clip_pcc", "dtc", "ms")  # of the paper's tables
ALL = "all_attributes"  # toy world: share of the clips whose every attribute is recognised
OF_GROUPS = ("video_50way", ALL)
OF_STAGE1 = ("image 50-way", "text 50-way", "action 50-way", "category mAP")  # of the fMRI, before any video
TITLES = {name: f"{metric.title} {metric.better}" for name, metric in METRICS.items()}
TITLES[ALL] = "all attributes ↑"
MODEL = "paper's model, shuffled fMRI"
BEFORE, PLAYED = "the row before", "best memory, played"
DIFFERENCE = ("more", "ci95", "freedom")

# ---------------------------------------------------------------- what is known of a table


class Files(NamedTuple):
    """What the runs of a table write: of each row's label a file a seed."""

    stage1: dict[str, list[Path]]  # test.json of stage 1
    evaluations: dict[str, list[Path]]  # metrics.json
    controls: list[Path]  # metrics.json of the paper's model on shuffled fMRI, one a seed


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


def stage1_cells(files: list[Path], column: str) -> dict[str, dict]:
    """Mean and std over the seeds of what stage 1's test.json says of the fMRI, or of the shuffled fMRI."""
    entries, scores = {}, []
    for file in files:
        with reading(file, advice="python train_stage1.py makes it anew"):
            scores.append(read_json(file)[column])
    for name in OF_STAGE1:
        if values := [score[name] for score in scores if name in score]:
            entries[name] = {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}
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

    def measured(runs: Runs, others: dict[str, Runs]) -> dict:
        by_group = {group: cells(runs, others, of_groups, group) for group in groups}
        return {"metrics": cells(runs, others, columns), "groups": by_group}

    full = shuffled.results[0]["provenance"]["run"]
    steps = [row.label for row in rows if row.quoted and not row.lacks]
    k = [trained[label].results[0]["provenance"]["run"] for label in steps].index(full)
    model, memory = trained[steps[k]], trained[steps[k]].memory()
    rivals = [row.label for row in rows if not row.quoted and not row.lacks] + steps[max(k - 1, 0) : k]
    entries, before = [], None
    for row in rows:
        entry = {"label": row.label, "quoted": row.quoted.split()}
        if row.lacks:
            entry["lacks"] = row.lacks
        else:
            runs = trained[row.label]
            entry["run"] = runs.results[0]["provenance"]["run"]
            entry["stage1"] = stage1_cells(files.stage1[row.label], "fmri")
            others = {BEFORE: before} if before else {}
            if runs is model:  # it is to be measured from the strongest
                others |= {label: trained[label] for label in rivals if trained[label] is not before}
                others |= {f"the {PLAYED}": memory} if memory else {}
            entry |= measured(runs, others)
            before = runs
        entries.append(entry)
    if memory:
        entries.append({"label": PLAYED, "quoted": [], **measured(memory, {})})
    return {
        "clips": len(first["clips"]),
        "groups": groups,
        "columns": columns,
        "rows": entries,
        "shuffled": measured(shuffled, {}),
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
    """Of each label and its `cells` a row, and one each of how much more it is than others."""
    rows = []
    for label, entry in entries:
        rows.append([label, *(mean(entry.get(name)) for name in columns)])
        differences = {name: differences_of(cell) for name, cell in entry.items()}
        for other in dict.fromkeys(other for of_cell in differences.values() for other in of_cell):
            texts = [more(differences.get(name, {}).get(other)) for name in columns]
            rows.append([f"   more than {other}", *texts])
    return rows


def differences_of(cell: dict) -> dict[str, dict]:
    """How much more a cell is than the row before and others, by their labels."""
    return ({BEFORE: cell} if "more" in cell else {}) | cell.get("than", {})


def mean(cell: dict | None) -> str:
    """0.384±0.012"""
    if not cell:
        return "-"
    return f"{cell['mean']:.3f}" + ("" if cell.get("std") is None else f"±{cell['std']:.3f}")


def more(cell: dict | None) -> str:
    """+0.085 [0.026, 0.144]; "not shown" where the interval holds 0."""
    if not cell or cell.get("more") is None:
        return ""
    text, ci95 = f"{cell['more']:+.3f}", cell["ci95"]
    if not ci95:
        return text
    return f"{text} [{ci95[0]:.3f}, {ci95[1]:.3f}]" + " not shown" * (ci95[0] <= 0 <= ci95[1])


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
    quoted = [row for row in result["rows"] if row["quoted"]]
    lines += [[row["label"], *(row["quoted"] + empty)[: len(columns)]] for row in quoted]
    return lines


def stage1_lines(result: dict) -> list[list[str]]:
    """What the fMRI of each row's stage 1 tells, a row of cells each, the titles first."""
    entries = [(row["label"], row["stage1"]) for row in result["rows"] if "run" in row]
    entries.append(("shuffled fMRI", result["stage1 shuffled"]))
    return [["stage 1", *OF_STAGE1], *cell_rows(entries, OF_STAGE1)]


def heading(result: dict) -> str:
    table, seeds = f"Table {result['table']} on {result['data']}", " ".join(map(str, result["seeds"]))
    table += f", subject {result['subject']}"
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
    remark = "Intervals: 95 %, paired, over blocks of 20 clips and over the seeds."
    tables = [*aligned(lines_of(result)), "", *aligned(stage1_lines(result))]
    return "\n".join([heading(result), "", *tables, "", remark])


def markdown_table(rows: list[list[str]]) -> list[str]:
    titles, *rows = rows
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [row if any(row[1:]) else [f"*{row[0]}*", *row[1:]] for row in rows]
    return ["| " + " | ".join(map(str.strip, line)) + " |" for line in lines]


# ---------------------------------------------------------------- the page: films side by side

WORTH = "video_50way"  # by which the page says what a part is worth


def of_film(results: list[dict]) -> list[list[str]]:
    """The rows of all tables of one film, each once: a row of cells each, the titles first."""
    groups, chance = [*results[0]["groups"]], results[0]["chance"]
    of_groups = [f"50-way, {group}" for group in groups], [f"all four, {group}" for group in groups]
    titles = ["2-way", "50-way", *of_groups[0], "all four", *of_groups[1]]
    rows: dict[tuple, list[str]] = {}
    for result in results:
        entries = [row for row in result["rows"] if "metrics" in row]
        entries.append({"label": MODEL} | result["shuffled"])
        for row in entries:
            sets = [row["metrics"], *(row["groups"][group] for group in groups)]
            cells = [entry.get(name) for name in (WORTH, ALL) for entry in sets]
            label = row["label"].removeprefix("+ ") + f" (Table {result['table']})" * ("stage1" in row)
            run = row.get("run", label), *(cell and cell["mean"] for cell in cells)  # once in all tables
            rows.setdefault(run, [label, *map(mean, [sets[0].get("video_2way"), *cells])])
    guessed = [f"{chance[name]:.3f}" if name in chance else "-" for name in ("video_2way", WORTH)]
    return [["", *titles], *rows.values(), ["chance", *guessed, *["-"] * (len(titles) - 2)]]


def worth(films: list[dict], metric: str) -> list[list[str]]:
    """How much more the rows of a table have of a metric than others, on each film and together, with the
    interval over clips and seeds: a row of cells each."""
    lines, before = [], ""
    for rows in zip(*(film["rows"] for film in films), strict=True):
        label, entries = rows[0]["label"], [row for row in rows if "metrics" in row]
        first = entries[0]["metrics"].get(metric) if len(entries) == len(films) else None
        for other in differences_of(first) if first else ():
            measured = [[entry["metrics"], *entry["groups"].values()] for entry in entries]
            sets = [[of[k] for of in measured] for k in range(len(measured[0]))]  # all clips, and each group
            parts = [[differences_of(of[metric])[other] for of in one] for one in sets]
            together = [pooled([Difference(*map(part.get, DIFFERENCE)) for part in one]) for one in parts]
            each = " / ".join(f"{part['more']:+.3f}" for part in parts[0])
            less = before if other == BEFORE else other.removeprefix("the ")
            cells = [more({"more": of.more, "ci95": of.ci95}).removesuffix(" not shown") for of in together]
            ci95 = together[0].ci95
            sure = ("no" if ci95[0] <= 0 <= ci95[1] else "yes") if ci95 else "-"
            lines.append([f"{label} less {less}".replace("+ ", ""), each, *cells, sure])
        before = label
    return lines


def page_of(tables: dict[tuple, list[dict]]) -> list[str]:
    """The generated part of the page. tables: of each table and dataset the results of its films."""
    parts = []
    for data in dict.fromkeys(data for _, data in tables):
        films = {number: films for (number, name), films in tables.items() if name == data}
        subjects = sorted({film["subject"] for of in films.values() for film in of})
        groups = [*next(iter(films.values()))[0]["groups"]]
        alike = [of for of in films.values() if len({repr(shape(film)) for film in of}) == 1]
        parts.append(f"### What a part is worth on {data}")
        for metric, title in ((WORTH, "50-way"), (ALL, "all four")):
            titles = [title, f"subject {' / '.join(map(str, subjects))}", "together", *groups, "sure?"]
            rows: dict[tuple, list[str]] = {}
            for row in (row for of in alike for row in worth(of, metric)):
                rows.setdefault(tuple(row[1:]), row)  # tables share their runs: the same once
            parts += ["\n".join(markdown_table([titles, *rows.values()]))] if rows or metric == WORTH else []
        for subject in subjects:
            results = [film for of in films.values() for film in of if film["subject"] == subject]
            seeds = " ".join(map(str, results[0]["seeds"]))
            remark = f"{results[0]['clips']} held-out clips, mean ± deviation over the seeds {seeds}"
            parts += [f"### {data}, subject {subject}: {remark}", "\n".join(markdown_table(of_film(results)))]
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
    rows = []
    for row in result["rows"]:
        compared = {name: [*differences_of(cell)] for name, cell in row.get("metrics", {}).items()}
        rows.append((row["label"], "lacks" in row, compared))
    return rows


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """The tables of docs/ablations.md between its two marks; the words around them stay. Raises
    FileNotFoundError or ValueError where there is no result, or the page has no marks."""
    tables: dict[tuple, list[dict]] = {}  # table and data: the results of each film
    for file in sorted(results.glob("table*.json")):
        with reading(file, "what extras/ablations.py writes", "python extras/ablations.py makes it anew"):
            result = read_json(file, keys={"table": int, "data": str, "subject": int, "clips": int})
            json.dumps(result, allow_nan=False)  # every number is finite
            as_text(result)  # whatever shows a result finds its faults
            page_of({(result["table"], result["data"]): [result]})
            if any(len(row["quoted"]) not in (0, len(COLUMNS)) for row in result["rows"]):
                raise ValueError("quoted numbers of some columns")
            tables.setdefault((result["table"], result["data"]), []).append(result)
    if not tables:
        raise FileNotFoundError(f"{results}/table*.json is not there: python extras/ablations.py makes it")
    text = page.read_text(encoding="utf-8") if page.is_file() else "\n".join((*MARKS, ""))
    start, end = (text.find(mark) for mark in MARKS)
    if not 0 <= start < end:
        raise damaged(page, "another text", f"the lines {' and '.join(MARKS)}", "put them back")
    parts = [text[: start + len(MARKS[0])], *page_of(tables), text[end:]]
    with written_whole(page) as part:
        part.write_text("\n\n".join(parts), encoding="utf-8")

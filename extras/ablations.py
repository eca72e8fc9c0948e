"""Tables 4, 5 and 6 of the paper (§4.3) by one command: train what their rows lack, evaluate, compare.

    python extras/ablations.py --table 4                                  on the toy world, three seeds
    python extras/ablations.py --table 6 --data toy --subject 2 --seeds 0 1 2
    python extras/ablations.py --table 5 --data cinebrain --subject 5 --seeds 0
    python extras/ablations.py --table 4 --rows 1 4 6                     some rows: the table is of these
    python extras/ablations.py --table 4 --dry-run                        the commands that are left
    python extras/ablations.py --page                                     docs/ablations.md from docs/results/

Table 4: no stage 2; L_clip; + L_cls; + L_action, and this with any caption in training; + MoM. 5: visual
areas; + hippocampus; + mPFC. 6: without integration, with alpha = 0, and with it. train_stage1.py,
train_stage2.py and evaluate.py run as they do by hand, under their own names of runs, so that tables share
what they can: the last row of Tables 4 and 6 is the run `full`, as is the row of Table 5 whose areas have all
voxels (on the toy the second), and its stage 1 is also that of the rows without stage 2, MoM or integration.
What is finished is kept; after Ctrl-C, or a kill, the same command goes on where it was.

In:  as the three scripts.
Out: runs/ as of the three scripts, what they printed in runs/<data>/sub<S>/ablations/, and
     docs/results/table<N>-<data>-sub<S>.json: means ± over the seeds, paired intervals to the row before, the
     clips whose like was seen in training and the others, shuffled fMRI; what made them.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, this file sees the project
import evaluate  # noqa: E402
import train_stage1  # noqa: E402
import train_stage2  # noqa: E402
from extras import plan as count  # noqa: E402
from extras.ablation_tables import MODEL, PAGE, RESULTS, as_text, provenance, result_of, write_page  # noqa: E402
from metrics.held_out import evaluation_folder  # noqa: E402
from metrics.parallel import end_with_parent  # noqa: E402
from metrics.table import asked  # noqa: E402
from prepare.facts import ROIS, in_areas, raw_folder  # noqa: E402
from support import training  # noqa: E402
from support.files import write_json  # noqa: E402
from support.options import option, parse as parse_options, settings_of, without  # noqa: E402
from support.readers import read_json, read_npz  # noqa: E402
from support.runs import door, run_folder  # noqa: E402
from toy.release import prepare_toy  # noqa: E402
from train_stage2 import UNUSED  # noqa: E402


@dataclass
class Config:
    table: int = option(4, "of the paper", choices=(4, 5, 6))
    data: str = option("toy", "toy, cc2017 or cinebrain")
    subject: int = option(1, "number of the subject (paper: 1 of cc2017, in Table 5 5 of CineBrain)", least=1)
    seeds: list[int] = option([0, 1, 2], "of the runs", least=0)
    rows: list[int] = option([], "of the table, from 1; none: all", least=1)
    dry_run: bool = option(False, "list the commands that are left, with minutes by extras/plan.py")
    page: bool = option(False, "write the tables of docs/ablations.md from docs/results/*.json")
    stage1: str = option("", "more options of train_stage1.py, in quotes: --stage1 '--steps 20'")
    stage2: str = option("", "likewise of train_stage2.py")
    evaluate: str = option("", "likewise of evaluate.py")


# ---------------------------------------------------------------- the tables


class Row(NamedTuple):
    label: str
    stage1: Sequence[str] = ()  # options of train_stage1.py
    stage2: Sequence[str] = ()  # of train_stage2.py
    quoted: str = ""  # 2-way, 50-way, CLIP-pcc, DTC, MS, as the paper prints them; "": it has no such row
    lacks: str = ""  # why it cannot be trained
    has_stage2: bool = True  # without, it is evaluate.py --no-stage2 of its stage 1


FULL = Row("", quoted="0.846±0.02 0.237±0.02 0.973±0.01 0.959±0.01 0.967±0.02")
ROWS = {
    4: [
        Row("no stage 2", has_stage2=False),
        Row("L_clip", ["--no-cls", "--no-action"], ["--no-mom"],
            "0.824±0.01 0.217±0.03 0.973±0.01 0.960±0.03 0.961±0.01"),
        Row("+ L_cls", ["--no-action"], ["--no-mom"],
            "0.829±0.01 0.228±0.03 0.965±0.01 0.951±0.01 0.956±0.02"),
        Row("+ L_action", [], ["--no-mom"], "0.835±0.02 0.223±0.04 0.970±0.01 0.957±0.01 0.963±0.01"),
        Row("+ L_action, any caption in training", [],
            "--no-mom --own_captions 1 --run full-no-mom-any-caption".split()),
        FULL._replace(label="+ MoM"),
    ],
    6: [
        Row("w/o integration", [], ["--no-integration"],
            "0.830±0.02 0.224±0.05 0.802±0.01 0.920±0.01 0.961±0.01"),
        Row("alpha = 0", [], "--alpha 0 --run full-alpha0".split()),
        FULL._replace(label="w/ integration"),
    ],
}  # fmt: skip
REGIONS = {  # of Table 5, a row each
    "visual": Row("visual areas", quoted="0.935±0.02 0.358±0.03 0.993±0.01 0.974±0.01 0.975±0.01"),
    "hippocampus": Row("+ hippocampus", quoted="0.938±0.01 0.401±0.02 0.990±0.01 0.978±0.01 0.976±0.01"),
    "mpfc": Row("+ mPFC", quoted="0.945±0.01 0.442±0.03 0.993±0.01 0.981±0.01 0.976±0.01"),
}
QUOTED_OF = {4: "cc2017, subject 1", 5: "CineBrain, subject 5", 6: "cc2017, subject 1"}
FULL_ROWS = {4: FULL.quoted, 5: REGIONS["hippocampus"].quoted, 6: FULL.quoted}  # of which the control is


def rows_of(table: int, data: str, subject: int) -> list[Row]:
    """The rows of a table from top to bottom. In Table 5 the run of areas is `full` where they are the
    dataset's own and where the prepared subject has no voxel elsewhere. A row cannot be trained where the
    subject has no voxel of its region: nothing drives the toy's mPFC, and reproducible voxels stay."""
    if table != 5:
        return ROWS[table]
    file = Path("data", data, f"sub{subject}", "voxels.npz")
    areas = read_npz(file, {"index": "iu", "roi": "U"})["roi"] if file.is_file() else None
    rows, regions, names = [], [], []
    for region, row in REGIONS.items():
        regions.append(region)
        names += ROIS[region]
        if areas is not None and not in_areas(areas, ROIS[region]).any():
            row = row._replace(lacks="not trained: no voxel of this region responds reproducibly")
        if areas is None or not in_areas(areas, names).all():
            options = ["--rois", ",".join(regions)]
            if train_stage1.PRESETS[data].get("rois") != options[1]:
                options += ["--run", "-".join(regions)]
            row = row._replace(stage1=options)
        rows.append(row)
    return rows


def chosen_rows(config: Config) -> list[Row]:
    """The rows of --rows, or all. Raises ValueError for a number that the table lacks, and where the paper's
    model is left out, whose control and memories every table shows."""
    rows = rows_of(config.table, config.data, config.subject)
    numbers = config.rows or range(1, len(rows) + 1)
    chosen = [rows[k - 1] for k in sorted({*numbers}) if k <= len(rows)]
    if max(numbers) > len(rows) or FULL_ROWS[config.table] not in [row.quoted for row in chosen]:
        full = [row.quoted for row in rows].index(FULL_ROWS[config.table]) + 1
        raise ValueError(f"--rows {' '.join(map(str, numbers))}: wanted 1 to {len(rows)}, {full} among them")
    return chosen


# ---------------------------------------------------------------- what is to be run


class Script(NamedTuple):
    file: str
    parse: Callable[[Sequence[str]], object]
    last: str  # file that it writes last
    may_change: Sequence[str] = ()  # settings, in a run that goes on


SCRIPTS = {
    "stage1": Script("train_stage1.py", train_stage1.parse, train_stage1.LAST, training.MAY_CHANGE),
    "stage2": Script("train_stage2.py", train_stage2.parse, train_stage2.LAST, train_stage2.MAY_CHANGE),
    "evaluate": Script("evaluate.py", partial(evaluate.parse, doc=evaluate.__doc__), "values/0.jsonl"),
}
# options that make rows and seeds, and hardly change what a command takes
ROW_WORDS = (
    "seed run stage1 shuffle no_stage2 no_cls no_action no_mom no_integration own_captions alpha".split()
)
MODES = {"shuffle", "stage2", "fmri", "pairs", "compare"}  # of evaluate.py: the table's to choose


class Job(NamedTuple):
    """One command, and the folder that shows how far it is."""

    script: str  # of SCRIPTS
    options: list[str]
    folder: Path  # a stage of a run, or its eval
    config: object  # the script's
    stage2: Sequence[str] = ()  # options of train_stage2.py, of an evaluation

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}-{self.folder.name}"  # full-s0-stage1

    @property
    def command(self) -> str:
        return shlex.join(["python", SCRIPTS[self.script].file, *self.options])

    def finished(self) -> bool:
        """Is all written: an evaluation of the weights as they are, a stage by these settings? Where these
        differ, the script is to run, and to say so."""
        if self.script == "evaluate":
            file = self.folder / "metrics.json"
            weights = self.folder.with_name("stage2" if self.config.stage2 else "stage1")
            times = [part.stat().st_mtime for part in weights.glob("*/*.safetensors")]
            return bool(times) and file.is_file() and file.stat().st_mtime >= max(times)
        file, script = self.folder / "config.json", SCRIPTS[self.script]
        if not file.is_file() or not (self.folder / script.last).is_file():
            return False
        settings = json.loads(json.dumps(settings_of(self.config, *script.may_change)))
        stored = read_json(file)
        alike = all(stored.get(name) == value for name, value in settings.items() if value is not None)
        return alike and stored.get("step", -1) == stored.get("steps_in_all")


def flags_of(words: Sequence[str]) -> set[str]:
    """The names of the options: {"data", "action"} of --data toy --no-action."""
    return {word.split("=")[0][2:].removeprefix("no-") for word in words if word.startswith("--")}


def joined(argv: Sequence[str]) -> list[str]:
    """--stage1 X -> --stage1=X, likewise of the other scripts: X may be one word that begins with a dash."""
    words = [*argv]
    for i in reversed(range(len(words) - 1)):
        if words[i].removeprefix("--") in SCRIPTS and words[i].startswith("--"):
            words[i : i + 2] = ["=".join(words[i : i + 2])]
    return words


def job_of(script: str, options: list[str], more: str, stage2: Job | None = None) -> Job:
    """The job of a row's options and `more` of the user; stage2: what an evaluation is of. Raises ValueError
    where the user's options replace what the table sets."""
    words = shlex.split(more)
    if clash := sorted((flags_of(options) | MODES) & flags_of(words)):
        raise ValueError(f"--{script} '{more}': --{clash[0]} is the table's to set: leave it out")
    if script == "stage2":  # what a row does not use, it does not get
        words = without(words, [n for n, rows in UNUSED.items() if {f"--{row}" for row in rows} & {*options}])
    config = SCRIPTS[script].parse([*options, *words])
    folder = run_folder(config.data, config.subject, config.run, config.seed) / script
    if stage2:
        every = asked(evaluate.Config(**evaluate.PRESETS[config.data]))
        settings, complete = settings_of(stage2.config), config.clips is None
        folder = evaluation_folder(folder.parent, config, settings, complete, asked(config), every)
    return Job(script, [*options, *words], folder, config, stage2.options if stage2 else ())


def plan(config: Config, rows: Sequence[Row]) -> tuple[list[list[Job]], dict[str, list[Path]]]:
    """All jobs of a table, each once, in waves that need the previous one: stage 1, stage 2, evaluations; and
    of each row's label, and of MODEL, the metrics.json of the seeds."""
    waves: list[dict[Path, Job]] = [{}, {}, {}]
    files: dict[str, list[Path]] = {}
    for seed in config.seeds:
        common = ["--data", config.data, "--subject", str(config.subject), "--seed", str(seed)]
        for row in (row for row in rows if not row.lacks):
            stage1 = job_of("stage1", [*common, *row.stage1], config.stage1)
            from_stage1 = ["--stage1", stage1.config.run]
            stage2 = job_of("stage2", [*common, *from_stage1, *row.stage2], config.stage2)
            if row.has_stage2 and stage2.folder in waves[1]:
                clash = f"two rows would be one run, {stage2.folder.parent}"
                raise ValueError(f"--stage1 '{config.stage1}' --stage2 '{config.stage2}': {clash}")
            waves[0].setdefault(stage1.folder, stage1)
            if row.has_stage2:
                waves[1][stage2.folder] = stage2
            options = [*common, "--run", stage2.config.run]
            scored = {row.label: options if row.has_stage2 else [*options, "--no-stage2"]}
            if row.quoted == FULL_ROWS[config.table]:
                scored[MODEL] = [*options, "--shuffle"]
            for label, of_row in scored.items():
                job = job_of("evaluate", of_row, config.evaluate, stage2)
                waves[2][job.folder] = job
                files.setdefault(label, []).append(job.folder / "metrics.json")
    return [[*wave.values()] for wave in waves], files


@cache
def on_paper(script: str, options: Sequence[str], stage2: Sequence[str]) -> float | None:
    """Minutes by extras/plan.py, on the GPU at hand or an H100; of an evaluation, with those of stage 2."""
    planned = count.PLANS[script](options, 1, *filter(None, [stage2]))
    seconds = count.seconds_of(planned, count.card_of(None)[0])
    return seconds and seconds * planned.number / 60


def listed(jobs: list[Job]) -> str:
    """The commands that are left, with their minutes; of rows that cost the same to 1 %, one is counted, none
    of the toy, which is trained on CPUs."""
    lines, hours = [], 0.0
    for job in jobs:
        words = [tuple(without(options, ROW_WORDS)) for options in (job.options, job.stage2)]
        minutes = None if job.config.data == "toy" else on_paper(job.script, *words)
        lines.append(f"{minutes:6.1f} min  {job.command}" if minutes else job.command)
        hours += (minutes or 0) / 60
    total = f"{len(jobs)} commands are left" + f", {hours:.0f} hours by extras/plan.py" * (hours > 0)
    return "\n".join([*lines, total])


# ---------------------------------------------------------------- running


def run(jobs: list[Job], logs: Path) -> None:
    """Run jobs, one by one, each in a session of its own, which Ctrl-C does not reach. When a signal comes,
    the one under way gets SIGTERM once, and saves what it has. logs/minutes.json has what each took in all.
    Raises ValueError where one fails."""
    for job in jobs:
        log, start = logs / f"{job.name}.log", time.monotonic()
        logs.mkdir(parents=True, exist_ok=True)
        print(f"begins: {job.command}", flush=True)
        command = [sys.executable, str(REPO / SCRIPTS[job.script].file), *job.options]
        first = end_with_parent if sys.platform == "linux" else None
        with open(log, "wb") as file:
            about = dict(stdout=file, stderr=file, start_new_session=True)
            child = subprocess.Popen(command, preexec_fn=first, **about)
        try:
            child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            minutes, spent = (time.monotonic() - start) / 60, minutes_of(logs)
            write_json(logs / "minutes.json", spent | {job.name: spent.get(job.name, 0) + minutes})
        status = child.returncode
        in_part = status == 3 and job.script == "evaluate"
        if in_part or status == 0 and job.finished():
            remark = f", in part: {log} says why" if in_part else ""
            print(f"{minutes:7.1f} min: {job.name}{remark}", flush=True)
            continue
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        message = lines[-1].split("\r")[-1][:300] if lines else "it printed nothing"
        advice = f"all is in {log}; what is finished is kept, the same command goes on"
        raise ValueError(f"{job.command} ended with status {status}: {message}; {advice}")


def minutes_of(logs: Path) -> dict[str, float]:
    """Of each job that was run."""
    file = logs / "minutes.json"
    return read_json(file) if file.is_file() else {}


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str]) -> None:
    config = parse_options(Config, dict.fromkeys(evaluate.PRESETS, {}), __doc__, "ablations.py", joined(argv))
    table, data, subject = config.table, config.data, config.subject
    if config.page:
        write_page()
        print(f"written: {PAGE}")
        return
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, config.seeds))}: wanted each once")
    plan(config, chosen_rows(config))  # refuses what cannot end, before the toy is prepared
    if data == "toy" and not config.dry_run:  # once, before several would at once
        stage2 = train_stage2.parse(["--data", "toy", *shlex.split(config.stage2)])
        size = (stage2.frames, stage2.height, stage2.width)
        prepare_toy(decoder=stage2.decoder, size=size, subject=subject)
    rows = chosen_rows(config)
    waves, files = plan(config, rows)
    if config.dry_run:
        print(listed([job for wave in waves for job in wave if not job.finished()]))
        return
    films = Path(waves[2][0].config.stimuli or raw_folder(data, subject) / "stimuli")
    if data != "toy" and not films.is_dir():  # said before days of training, not after
        advice = "--evaluate '--stimuli FOLDER'"
        raise FileNotFoundError(f"{films} is not there, whose films the evaluations need: {advice}")
    logs = run_folder(data, subject, "full", 0).with_name("ablations")
    for wave in waves:
        run([job for job in wave if not job.finished()], logs)
    spent = minutes_of(logs)
    result = {
        "table": table,
        "data": data,
        "subject": subject,
        "seeds": config.seeds,
        "quoted_of": QUOTED_OF[table],
        "command": shlex.join(["python", "extras/ablations.py", *argv]),
        **provenance(REPO),
        "minutes": {job.name: round(spent.get(job.name, 0), 2) for wave in waves for job in wave},
        **result_of(rows, files),
    }
    file = RESULTS / f"table{table}-{data}-sub{subject}.json"
    write_json(file, result)
    print(f"\n{as_text(result)}\n\nwritten: {file}")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

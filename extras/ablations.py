"""Tables 4, 5 and 6 of the paper (§4.3) by one command: train what their rows lack, evaluate, compare.

    python extras/ablations.py --table 4                                  on the toy world, three seeds
    python extras/ablations.py --table 6 --data toy --subject 2 --seeds 0 1 2 --jobs 2
    python extras/ablations.py --table 5 --data cinebrain --subject 5 --seeds 0
    python extras/ablations.py --table 4 --dry-run                        the commands and minutes, no more
    python extras/ablations.py --page                                     docs/ablations.md from docs/results/

Table 4: L_clip; + L_cls; + L_action; + MoM. 5: visual areas; + hippocampus; + mPFC. 6: without and with
integration. train_stage1.py, train_stage2.py and evaluate.py run as they do by hand, under their own names
of runs, so that tables share what they can: the last row of Tables 4 and 6 is the run `full`, as is the row
of Table 5 whose areas have all voxels (on the toy the second), and its stage 1 is also that of the rows
without MoM and without integration. What is finished is kept; after Ctrl-C, or a kill, the same command goes
on where it was. --jobs 2 runs two at once with a thread each: two cores do more so.

In:  as the three scripts.
Out: runs/ as of the three scripts, what they printed in runs/<data>/sub<K>/ablations/, and
     docs/results/table<N>-<data>-sub<K>.json: means ± over the seeds, paired intervals to the row before, the
     clips whose like was seen in training and the others, shuffled fMRI, chance; what made them.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # run as a script, this file sees the project
import evaluate  # noqa: E402
import train_stage1  # noqa: E402
import train_stage2  # noqa: E402
from extras.ablation_tables import PAGE, RESULTS, as_text, made_by, result_of, write_page  # noqa: E402
from metrics.table import asked  # noqa: E402
from prepare.facts import ROIS, in_areas, raw_folder  # noqa: E402
from support.files import write_json  # noqa: E402
from support.options import (  # noqa: E402
    check_options,
    option,
    parse as parse_options,  # noqa: E402
    settings_of,
)
from support.readers import read_json, read_npz  # noqa: E402
from support.runs import (  # noqa: E402
    door,
    evaluation_folder,  # noqa: E402
    run_folder,
)
from toy.release import prepare_toy  # noqa: E402


@dataclass
class Config:
    table: int = option(4, "of the paper", choices=(4, 5, 6))
    data: str = option("toy", "toy, cc2017 or cinebrain")
    subject: int = option(1, "number of the subject (paper: 1 of cc2017, in Table 5 5 of CineBrain)", least=1)
    seeds: list[int] = option([0, 1, 2], "of the runs", least=0)
    jobs: int = option(1, "trainings at once; two or more take a thread each", least=1, most=64)
    dry_run: bool = option(False, "list the commands that are left and their minutes, and run none")
    page: bool = option(False, "write the tables of docs/ablations.md from docs/results/*.json")
    stage1: str = option("", "more options of train_stage1.py, in quotes: --stage1 '--steps 20'")
    stage2: str = option("", "likewise of train_stage2.py")
    evaluate: str = option("", "likewise of evaluate.py")


# ---------------------------------------------------------------- the tables


class Row(NamedTuple):
    label: str
    stage1: Sequence[str] = ()  # options of train_stage1.py
    stage2: Sequence[str] = ()  # of train_stage2.py
    quoted: str = ""  # 2-way, 50-way, CLIP-pcc, DTC, MS, as the paper prints them
    lacks: str = ""  # why it cannot be trained


def prepared(data: str, subject: int) -> np.ndarray | None:
    """The area of each voxel of the prepared subject, (N,) str; None where it is not prepared."""
    file = Path("data", data, f"sub{subject}", "voxels.npz")
    return read_npz(file, {"index": "iu", "roi": "U"})["roi"] if file.is_file() else None


def areas(rois: str, data: str, subject: int) -> list[str]:
    """The options of a stage 1 on these areas. Its run is `full` where they are the dataset's own, and where
    the prepared subject has no voxel elsewhere."""
    names, roi = [name for region in rois.split(",") for name in ROIS[region]], prepared(data, subject)
    if roi is not None and in_areas(roi, names).all():
        return []
    own = train_stage1.PRESETS[data].get("rois") == rois
    return ["--rois", rois] + ([] if own else ["--run", rois.replace(",", "-")])


def lacking(region: str, data: str, subject: int) -> str:
    """Why no run can have the voxels of this region: where the prepared subject has none of them. The toy
    subject has mPFC voxels that nothing drives, and none but reproducible voxels are kept."""
    roi = prepared(data, subject)
    if roi is None or in_areas(roi, ROIS[region]).any():
        return ""
    return "not trained: no voxel of this region responds reproducibly"


def rows_of(table: int, data: str, subject: int) -> list[Row]:
    """The rows of a table from top to bottom, and what the paper prints of each."""
    full = "0.846±0.02 0.237±0.02 0.973±0.01 0.959±0.01 0.967±0.02"
    if table == 4:
        return [
            Row("L_clip", ["--no-cls", "--no-action"], ["--no-mom"],
                "0.824±0.01 0.217±0.03 0.973±0.01 0.960±0.03 0.961±0.01"),
            Row("+ L_cls", ["--no-action"], ["--no-mom"],
                "0.829±0.01 0.228±0.03 0.965±0.01 0.951±0.01 0.956±0.02"),
            Row("+ L_action", [], ["--no-mom"], "0.835±0.02 0.223±0.04 0.970±0.01 0.957±0.01 0.963±0.01"),
            Row("+ MoM", [], [], full),
        ]  # fmt: skip
    if table == 5:
        quoted = (
            "0.935±0.02 0.358±0.03 0.993±0.01 0.974±0.01 0.975±0.01",
            "0.938±0.01 0.401±0.02 0.990±0.01 0.978±0.01 0.976±0.01",
            "0.945±0.01 0.442±0.03 0.993±0.01 0.981±0.01 0.976±0.01",
        )
        rois = "visual", "visual,hippocampus", "visual,hippocampus,mpfc"
        names = "visual areas", "+ hippocampus", "+ mPFC"
        rows = []
        for name, regions, printed in zip(names, rois, quoted, strict=True):
            lacks = lacking(regions.split(",")[-1], data, subject)
            rows.append(Row(name, areas(regions, data, subject), [], printed, lacks))
        return rows
    quoted = "0.830±0.02 0.224±0.05 0.802±0.01 0.920±0.01 0.961±0.01"
    return [Row("w/o integration", [], ["--no-integration"], quoted), Row("w/ integration", [], [], full)]


QUOTED_OF = {4: "cc2017, subject 1", 5: "CineBrain, subject 5", 6: "cc2017, subject 1"}


# ---------------------------------------------------------------- what is to be run


class Job(NamedTuple):
    """One command, and the folder that shows how far it is."""

    script: str
    options: list[str]
    folder: Path  # a stage of a run, or its eval
    config: object  # the script's

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}-{self.folder.name}"  # full-s0-stage1

    def done(self) -> bool:
        """Has the script written all that it writes?"""
        if self.script == "evaluate.py":
            scored, stage2 = self.folder / "metrics.json", self.folder.with_name("stage2")
            weights = [file.stat().st_mtime for file in stage2.glob("*/*.safetensors")]
            newest = max(weights, default=np.inf)
            return scored.is_file() and scored.stat().st_mtime >= newest and "groups" in read_json(scored)
        file = self.folder / "config.json"
        there = read_json(file) if file.is_file() and self.last_file.is_file() else {}
        return "step" in there and there["step"] == there.get("steps_in_all")

    def finished(self) -> bool:
        """Is it done, by these settings? Where they seem to be others, the script is to run, and to say
        so."""
        if self.script == "evaluate.py" or not self.done():
            return self.done()
        may_change = sys.modules[self.script.removesuffix(".py")].MAY_CHANGE
        wanted = json.loads(json.dumps(settings_of(self.config, "plan", *may_change)))
        there = read_json(self.folder / "config.json")
        return all(there.get(name) == value for name, value in wanted.items() if value is not None)

    @property
    def last_file(self) -> Path:
        """That the script writes last, or, of an evaluation, when all is measured."""
        names = {"train_stage1.py": train_stage1.LAST, "train_stage2.py": "losses.png"}
        return self.folder / names.get(self.script, "values/0.jsonl")

    def minutes(self) -> float | None:
        """How long it took, by the times of the files that it left: a stage from the beginning of its log for
        TensorBoard to its last file, an evaluation from its first stimulus to its last value. None where a
        stage was interrupted, or is not finished."""
        if self.script == "evaluate.py":
            first = [file.stat().st_mtime for file in self.folder.glob("gt/*.mp4")]
        else:
            logs = [file.name.split(".")[3] for file in self.folder.glob("events.out.tfevents.*")]
            first = [int(begun) for begun in logs if begun.isdecimal()]
            first = first if len(first) == 1 else []
        last = self.last_file
        return max(0.0, last.stat().st_mtime - min(first)) / 60 if first and last.is_file() else None

    def command(self) -> str:
        return shlex.join(["python", self.script, *self.options])


class Plan(NamedTuple):
    waves: list[list[Job]]  # each wave needs the one before
    stage1: dict[str, list[Path]]  # row's label -> test.json of stage 1, one a seed
    evaluations: dict[str, list[Path]]  # likewise metrics.json
    controls: list[Path]  # of the paper's model, likewise


def plan(config: Config) -> Plan:
    """All jobs of a table, each once: stage 1, stage 2, evaluations."""
    waves: list[dict[Path, Job]] = [{}, {}, {}]
    tests, evaluations, controls = {}, {}, []
    stage1, stage2 = shlex.split(config.stage1), shlex.split(config.stage2)
    every = evaluate.PRESETS[config.data].get("metrics", evaluate.Config.metrics)

    def add(wave: int, script: str, options: list[str], folder: Path, parsed) -> Path:
        waves[wave].setdefault(folder, Job(script, options, folder, parsed))
        return folder

    for seed in config.seeds:
        common = ["--data", config.data, "--subject", str(config.subject), "--seed", str(seed)]
        rows = rows_of(config.table, config.data, config.subject)
        for row in (row for row in rows if not row.lacks):
            options = [*common, *row.stage1, *stage1]
            first = train_stage1.parse(options)
            place = run_folder(config.data, config.subject, first.run, seed)
            tests.setdefault(row.label, []).append(place / "stage1" / train_stage1.LAST)
            add(0, "train_stage1.py", options, place / "stage1", first)
            options = [*common, "--stage1", first.run, *row.stage2, *stage2]
            second = train_stage2.parse(options)
            place = run_folder(config.data, config.subject, second.run, seed)
            add(1, "train_stage2.py", options, place / "stage2", second)
            for control in (False, True) if row is rows[full_row(config.table)] else (False,):
                more = shlex.split(config.evaluate) + ["--shuffle"] * control
                options = [*common, "--run", second.run, *more]
                third = evaluate.parse(options)
                folder = evaluation_folder(place, third, settings_of(second), third.clips is None, every)
                add(2, "evaluate.py", options, folder, third)
                of_row = controls if control else evaluations.setdefault(row.label, [])
                of_row.append(folder / "metrics.json")
    return Plan([[*wave.values()] for wave in waves], tests, evaluations, controls)


def check_films(third: evaluate.Config) -> None:
    """Raises FileNotFoundError where the films are not there: before days of training, not after. (The toy
    world makes its own.)"""
    films = Path(third.stimuli or raw_folder(third.data, third.subject) / "stimuli")
    if third.data != "toy" and not films.is_dir():
        raise FileNotFoundError(
            f"{films} is not there, whose films the evaluations need: --evaluate '--stimuli FOLDER'"
        )


def full_row(table: int) -> int:
    """The row that is the paper's model, of which the control is: the last, in Table 5 the one before it."""
    return -2 if table == 5 else -1


def estimated(job: Job) -> float | None:
    """Minutes that a job will take: the median of finished ones of the same row; else of the same script
    on this dataset, where the control takes as long as the evaluation; None where no run is finished."""
    runs, stage = job.folder.parents[2], job.folder.name
    row = Path(*job.folder.parts[-3:-1]).as_posix().rstrip("0123456789")  # sub1/full-s
    for like in (f"{row}[0-9]*/{stage}", f"sub*/*-s[0-9]*/{stage}", f"sub*/*-s[0-9]*/{stage.split('-')[0]}"):
        took = [job._replace(folder=folder).minutes() for folder in runs.glob(like)]
        took = [minutes for minutes in took if minutes is not None]
        if took:
            return float(np.median(took))
    return None


def listed(jobs: list[Job], at_once: int) -> str:
    """The commands that are left, with their minutes."""
    guesses = [estimated(job) for job in jobs]
    known = [minutes for minutes in guesses if minutes is not None]
    lines = []
    for job, minutes in zip(jobs, guesses, strict=True):
        lines.append(f"{'?' if minutes is None else f'{minutes:.1f}':>6} min  {job.command()}")
    total = f"{len(jobs)} commands are left"
    if known:
        together = sum(known) / min(at_once, len(jobs))
        total += f", about {together:.0f} minutes at {at_once} a time: the median of finished runs, by the "
        total += "times of their files"
    if len(known) < len(jobs):
        total += f"; no finished run says how long {len(jobs) - len(known)} of them take"
    return "\n".join([*lines, total])


# ---------------------------------------------------------------- running


class Runner:
    """Runs jobs, some at once. When one fails, or a signal comes, those under way are told to stop, which
    saves what they have, and no more are begun."""

    def __init__(self, at_once: int, logs: Path):
        self.at_once, self.logs = at_once, logs
        self.under_way, self.failed, self.stopped = set(), [], False
        self.lock = threading.Lock()
        self.environment = os.environ | ({"OMP_NUM_THREADS": "1"} if at_once > 1 else {})

    def run(self, jobs: list[Job]) -> None:
        """Raises ValueError where one fails."""
        with ThreadPoolExecutor(self.at_once) as pool:
            futures = [pool.submit(self._one, job) for job in jobs]
            try:
                while not all(future.done() for future in futures):
                    time.sleep(0.2)  # the main thread gets the signals
                    if self.failed:
                        self.stop()
            except BaseException:
                self.failed.append("stopped")
                self.stop()
                raise
        for future in futures:
            future.result()
        if self.failed:
            raise ValueError(self.failed[0])

    def _one(self, job: Job) -> None:
        if self.failed:
            return
        log, begun = self.logs / f"{job.name}.log", time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"begins: {job.command()}", flush=True)
        with open(log, "wb") as file:
            command = [sys.executable, str(REPO / job.script), *job.options]
            how = {"stdout": file, "stderr": file, "env": self.environment, "start_new_session": True}
            with self.lock:  # a session of its own: Ctrl-C reaches it once, by `stop`
                if self.stopped:
                    return
                child = subprocess.Popen(command, **how)
                self.under_way.add(child)
            status = child.wait()
            with self.lock:
                self.under_way.discard(child)
        minutes = (time.monotonic() - begun) / 60
        if status == 0 and job.done() or status == 3 and job.script == "evaluate.py":
            in_part = f", in part: {log} says why" if status else ""
            print(f"{minutes:7.1f} min: {job.name}{in_part}", flush=True)
        elif not self.failed:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            said = lines[-1].split("\r")[-1][:300] if lines else "it printed nothing"
            mend = f"all is in {log}; what is finished is kept, the same command goes on"
            self.failed.append(f"{job.command()} ended with status {status}: {said}; {mend}")

    def stop(self) -> None:
        """Tell those under way, once: a second signal would not let them save."""
        with self.lock:
            for child in () if self.stopped else self.under_way:
                child.send_signal(signal.SIGTERM)
            self.stopped = True


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str]) -> None:
    presets = {data: {} for data in evaluate.PRESETS}
    config = parse_options(Config, presets, __doc__, "ablations.py", argv)
    check_options(config)
    if config.page:
        write_page()
        print(f"written: {PAGE}")
        return
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, config.seeds))}: wanted each once")
    if config.data == "toy" and not config.dry_run:  # once, before several would at once
        how = train_stage2.parse(["--data", "toy", *shlex.split(config.stage2)])
        prepare_toy(Path("data"), how.decoder, (how.frames, how.height, how.width), config.subject)
    planned = plan(config)
    if config.dry_run:
        print(listed([job for wave in planned.waves for job in wave if not job.finished()], config.jobs))
        return
    for job in planned.waves[2]:
        check_films(job.config)
    place = run_folder(config.data, config.subject, "full", 0).parent
    runner = Runner(config.jobs, place / "ablations")
    for wave in planned.waves:
        runner.run([job for job in wave if not job.finished()])
    result = {name: getattr(config, name) for name in ("table", "data", "subject", "seeds")}
    command = shlex.join(["python", "extras/ablations.py", *argv])
    result |= {"quoted_of": QUOTED_OF[config.table], "command": command} | made_by(REPO)
    took = {job.name: job.minutes() for wave in planned.waves for job in wave}
    result["minutes"] = {name: minutes and round(minutes, 2) for name, minutes in took.items()}
    rows = rows_of(config.table, config.data, config.subject)
    measured = asked(planned.waves[2][0].config)
    result |= result_of(rows, planned.stage1, planned.evaluations, planned.controls, measured)
    file = RESULTS / f"table{config.table}-{config.data}-sub{config.subject}.json"
    write_json(file, result)
    print(f"\n{as_text(result)}\n\nwritten: {file}")


if __name__ == "__main__":
    door(lambda: main(sys.argv[1:]))

"""extras/ablations.py: the commands of each table, a study that goes on where it was, the numbers."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, environment

from extras import ablation_tables, ablations
from support.options import settings_of

CLIPS = 80  # four blocks of the bootstrap
ODD = np.arange(CLIPS) % 2  # never shown in training

# ---------------------------------------------------------------- the commands


def planned(words: str) -> ablations.Plan:
    config = ablations.parse_options(ablations.Config, dict.fromkeys(("toy", "cc2017", "cinebrain"), {}), "", "", words.split())
    return ablations.plan(config, ablations.rows_of(config.table, config.data, config.subject))


def commands(words: str) -> list[str]:
    """Without --data, --subject and --seed."""
    return [" ".join(job.options[6:]) for wave in planned(words).waves for job in wave]


TABLE_4 = [
    "--no-cls --no-action", "--no-action", "",  # the last is of two rows
    "--stage1 full-no-cls-no-action --no-mom", "--stage1 full-no-action --no-mom", "--stage1 full --no-mom", "--stage1 full",
    "--run full-no-cls-no-action-no-mom", "--run full-no-action-no-mom", "--run full-no-mom", "--run full", "--run full --shuffle",
]  # fmt: skip
TABLE_6 = ["", "--stage1 full --no-integration", "--stage1 full", "--run full-no-integration", "--run full", "--run full --shuffle"]
REGIONS = [("visual", "visual"), ("visual,hippocampus", "visual-hippocampus"), ("visual,hippocampus,mpfc", "visual-hippocampus-mpfc")]


def test_the_rows_share_their_stage_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands("--table 4 --seeds 3") == TABLE_4 and commands("--table 6 --seeds 3") == TABLE_6
    assert planned("--table 6 --seeds 3 --subject 2 --data cc2017").waves[1][0].options[:6] == shlex.split("--data cc2017 --subject 2 --seed 3")
    assert len(commands("--table 4")) == 36


@pytest.mark.parametrize("data, full", [("toy", None), ("cinebrain", 1)])
def test_the_rows_of_table_5_are_areas(data, full, tmp_path, monkeypatch):
    """CineBrain's own areas are the run `full`. The control is the paper's model, not the last row."""
    monkeypatch.chdir(tmp_path)
    runs = ["full" if row == full else run for row, (_, run) in enumerate(REGIONS)]
    stage1 = [f"--rois {rois}" + ("" if run == "full" else f" --run {run}") for (rois, _), run in zip(REGIONS, runs, strict=True)]
    scored = [f"--run {run}" for run in runs]
    assert commands(f"--table 5 --data {data} --seeds 0") == [
        *stage1, *(f"--stage1 {run}" for run in runs), *scored[:2], f"{scored[1]} --shuffle", scored[2],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "roi, lacks, full", [(["L_V1", "hippocampus_left"], [0, 0, 1], 1), (["L_V1", "hippocampus_left", "R_p24"], [0, 0, 0], 2)]
)
def test_a_region_without_voxels_is_not_trained(roi, lacks, full, tmp_path, monkeypatch):
    """As the toy's mPFC, which nothing drives. The row that has all voxels is the run `full`."""
    monkeypatch.chdir(tmp_path)
    Path("data/toy/sub1").mkdir(parents=True)
    np.savez("data/toy/sub1/voxels.npz", index=np.arange(len(roi)), roi=np.array(roi))
    rows = ablations.rows_of(5, "toy", 1)
    assert [bool(row.lacks) for row in rows] == lacks
    assert [not row.stage1 for row in rows[: full + 1]] == [False] * full + [True]
    assert len(commands("--table 5 --seeds 0")) == 3 * (3 - sum(lacks)) + 1


# ---------------------------------------------------------------- a study of scripts that do as if

SCRIPT = """
import os, shutil, sys
from pathlib import Path
words = sys.argv[1:]
option = dict(zip(words, words[1:]))
run = option.get("--run") or option.get("--stage1", "full") + "".join(word[4:] for word in words if word[:5] == "--no-")
stage = {"train_stage1.py": "stage1", "train_stage2.py": "stage2", "evaluate.py": "eval" + "-shuffled" * ("--shuffle" in words)}
folder = Path("runs/cc2017/sub1", f"{run}-s{option['--seed']}", stage[Path(sys.argv[0]).name])
with open("begun", "a") as file:
    print(folder.relative_to("runs/cc2017/sub1"), os.environ.get("OMP_NUM_THREADS"), file=file)
if not Path("store", folder).is_dir():
    sys.exit(f"a line\\\\n\\\\nerror: no {folder.name}\\\\n")
shutil.copytree(Path("store", folder), folder)
"""

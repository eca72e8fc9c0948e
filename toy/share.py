"""Writes toy/trained/: a finished run of the toy world in 16 bits, and one held-out recording to try it on.

    python train_stage1.py && python train_stage2.py --epochs 20 --guidance 2 --run e20
    python -m toy.share runs/toy/sub1/e20-s0 toy/trained

Of each memory only what loading, scores and exercises read is kept: not where its object was. The recording
is one clip's x (T, N) as evaluation sees it; stimulus.gif is what was watched, drawn anew.
"""

import argparse
import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np

from data import LINE, Clips
from evaluate import CineNeuron
from prepare.facts import SECONDS
from support import shared
from support.files import save_folder, write_text, written_whole
from support.runs import door
from support.videos import write_video
from toy.world import ATTRIBUTES, FRAMES, Clip, render

CLIP = 13  # of the test film; toy/trained/README.md says why this one


def main(run: str, out: str) -> None:
    """The run, in the folder `out`. Raises FileNotFoundError or ValueError, as loading does."""
    folder, model = Path(out), CineNeuron.from_pretrained(run).half()
    test = Clips("toy", model.settings["subject"], "test", model.settings["stage1_config"]["rois"])
    for name, write in shared.writers(model).items():
        save_folder(folder / name, write)
    shared.write_memories(folder, model)
    lines = [{key: line[key] for key in (*LINE, *ATTRIBUTES)} for line in model.lines]
    write_text(folder / "memories.json", json.dumps(lines, separators=(",", ":")).replace("},", "},\n"))
    with written_whole(folder / "x.npy") as part, open(part, "wb") as file:
        np.save(file, test.averaged()[CLIP].numpy())
    clip = Clip(**{field.name: test.lines[CLIP][field.name] for field in fields(Clip)})
    write_video(folder / "stimulus.gif", render(clip), FRAMES / SECONDS["toy"])
    shutil.copyfile(model.folder / "config.json", folder / "config.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("toy.share", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("out", help="folder to write")
    door(lambda: main(**vars(parser.parse_args())))

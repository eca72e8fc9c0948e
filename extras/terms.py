"""What each term does (§3.2, §4.3): the same clips by several runs, side by side on a page. Called by
extras/figures.py."""

import re
from pathlib import Path

from extras.memories import Remembered, as_uri, file_as_uri, write_page
from extras.runs import Run, judged, video_file
from metrics.attributes import attribute_values
from prepare.facts import SECONDS

PAGE = Path(__file__).with_suffix(".html")  # it holds the sentence above each column
FOLDER = PAGE.parents[1] / "docs"
ROWS = 128  # pixels of a film at least, twice the toy's: enough for the narrow columns


def words(seen: dict[str, str], line: dict) -> list[tuple[str, bool]]:
    """Each value that was seen: is it that of the clip, a line of clips.jsonl?"""
    return [(value, value == line.get(name)) for name, value in seen.items()]


def page(runs: dict[str, Path], clips: dict[int, str], films: Path | None, out: Path) -> None:
    """A clip at a time: the stimulus, the best memory of the first run, what each run, {title: folder}, made
    of it. Raises ValueError for a run of another subject, whose clips are others."""
    remembered = Remembered(next(iter(runs.values())), clips, films)
    first, (_, height, width) = remembered.run, remembered.size
    columns, evaluations, rows = ["stimulus", "best memory"], {}, []
    for title, folder in runs.items():
        run = Run(folder, "stage1" if "-no-stage2" in folder.name else "stage2")
        if (run.data, run.subject) != (first.data, first.subject):
            raise ValueError(
                f"{folder} is not of {first.data}, subject {first.subject}, as {first.folder} is"
            )
        columns.append(re.sub(r"-s\d+(?=/|$)", "", title))
        evaluations[run.evaluation] = judged(run.evaluation)
    for clip, line in remembered.lines.items():
        name, best = f"{clip:04d}.mp4", remembered.scores[clip].retrieved[0]
        memory, uri = remembered.memories[best], as_uri(remembered.film(best), SECONDS[first.data], ROWS)
        of_memory = {attribute: value for attribute, (value,) in attribute_values([memory]).items()}
        cells = [
            {"film": file_as_uri(video_file(first.evaluation, "gt", clip), ROWS), "words": []},
            {"film": uri, "words": words(of_memory, line), "caption": memory["caption"]},
        ]
        for evaluation, seen in evaluations.items():
            film = file_as_uri(video_file(evaluation, "recon", clip), ROWS)
            cells.append({"film": film, "words": words(seen.get(name, {}), line)})
        texts = {"clip": clip, "id": line["id"], "caption": line["caption"], "group": remembered.groups[clip]}
        rows.append({**texts, "cells": cells})
    values = {"run": f"{first.data}, subject {first.subject}", "width": width, "height": height}
    write_page(PAGE, {**values, "columns": columns, "clips": rows}, out)

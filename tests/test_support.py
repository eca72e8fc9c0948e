"""support/: readers that name what is wrong, options with ranges, runs never mislabelled, the door."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import REPO, environment, sha256
from safetensors import SafetensorError
from safetensors.torch import save_file

from brain_model import BrainModel
from metrics.held_out import claim
from support.files import (
    add_to_manifest,
    hashes,
    is_made_by,
    resumable_arrays,
    save_folder,
    write_json,
    written_whole,
)
from support.options import check_name, option, parse
from support.pictures import spread
from support.readers import (
    FileFault,
    MissingFile,
    damaged,
    load_model,
    read_array,
    read_json,
    read_json_lines,
    read_npz,
    read_state,
    read_tensors,
    reading,
)
from support.runs import RunFolder, brief, read_log, run_folder
from support.shared import finished_run

# ---------------------------------------------------------------- readers


def npy(array, **how):
    def write(path):
        with open(path, "wb") as file:  # np.save adds a suffix to a name
            np.save(file, array, **how)

    return write


def text(content, encoding="utf-8"):
    return lambda path: path.write_bytes(content.encode(encoding))


def raw(content: bytes):
    return lambda path: path.write_bytes(content)


def huge_header(path):
    """A header of 1e12 numbers, and 64 bytes of them."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
        )
        file.write(b"\0" * 64)


def cut(write):
    def write_and_cut(path):
        write(path)
        path.write_bytes(path.read_bytes()[:-9])

    return write_and_cut


def npz(**arrays):
    def write(path):
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    return write


def pt(value):
    return lambda path: torch.save(value, path)


class Bomb:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


def read_floats(path):
    return read_array(path, "f", (None, 4), finite=True)


FLOATS = np.ones((3, 4), np.float32)
BAD_FILES = {
    "array empty": (read_floats, raw(b"")),
    "array garbage": (read_floats, raw(b"not numpy at all")),
    "array html": (read_floats, text("<html>404</html>")),
    "array cut": (read_floats, cut(npy(FLOATS))),
    "array objects": (read_floats, npy(np.array([{}, None], object), allow_pickle=True)),
    "array text": (read_floats, npy(np.array([["a"] * 4]))),
    "array complex": (read_floats, npy(FLOATS.astype(complex))),
    "array whole numbers": (read_floats, npy(FLOATS.astype(int))),
    "array one dimension": (read_floats, npy(FLOATS[0])),
    "array other width": (read_floats, npy(FLOATS[:, :3])),
    "array nan": (read_floats, npy(FLOATS * np.nan)),
    "array infinite": (read_floats, npy(FLOATS * np.inf)),
    "array huge header": (lambda path: read_array(path), huge_header),
    "array pickle": (read_floats, pt({"a": 1})),
    "array folder": (read_floats, lambda path: path.mkdir()),
    "npz garbage": (lambda path: read_npz(path, {"index": "iu"}), raw(b"PK\x03\x04 no")),
    "npz empty": (lambda path: read_npz(path, {"index": "iu"}), raw(b"")),
    "npz lacks a name": (lambda path: read_npz(path, {"index": "iu"}), npz(roi=np.arange(3))),
    "npz kind": (lambda path: read_npz(path, {"index": "iu"}), npz(index=np.ones(3))),
    "npz lengths": (lambda path: read_npz(path, {"a": "f", "b": "f"}), npz(a=np.ones(3), b=np.ones(2))),
    "npz objects": (lambda path: read_npz(path, {"a": "f"}), npz(a=np.array([{}], object))),
    "json empty": (read_json, raw(b"")),
    "json cut": (read_json, text('{"a": ')),
    "json latin-1": (read_json, text('{"a": "é"}', "latin-1")),
    "json list": (read_json, text("[1]")),
    "json number": (read_json, text("3")),
    "json null": (read_json, text("null")),
    "json deep": (read_json, text("[" * 100_000)),
    "json folder": (read_json, lambda path: path.mkdir()),
    "json key": (lambda path: read_json(path, keys={"step": int}), text("{}")),
    "json key type": (lambda path: read_json(path, keys={"step": int}), text('{"step": "4"}')),
    "json key boolean": (lambda path: read_json(path, keys={"step": int}), text('{"step": true}')),
    "json key nan": (lambda path: read_json(path, keys={"x": float}), text('{"x": NaN}')),
    "lines garbage": (read_json_lines, text('{"a": 1}\nno')),
    "lines list": (read_json_lines, text('{"a": 1}\n[1]')),
    "lines empty": (read_json_lines, text("")),
    "lines blank within": (read_json_lines, text('{"a": 1}\n\n{"a": 2}')),
    "lines key": (lambda path: read_json_lines(path, {"a": int}), text('{"a": 1}\n{"b": 1}')),
    "tensors garbage": (read_tensors, raw(b"\xff" * 64)),
    "tensors empty": (read_tensors, raw(b"")),
    "tensors cut": (read_tensors, cut(lambda path: save_file({"w": torch.ones(9)}, path))),
    "tensors nan": (read_tensors, lambda path: save_file({"w": torch.full((2,), torch.nan)}, path)),
    "tensors missing": (
        lambda path: read_tensors(path, {"w": (2,), "b": (1,)}),
        lambda path: save_file({"w": torch.ones(2)}, path),
    ),
    "tensors left over": (
        lambda path: read_tensors(path, {}),
        lambda path: save_file({"w": torch.ones(2)}, path),
    ),
    "tensors shape": (
        lambda path: read_tensors(path, {"w": (2, 1)}),
        lambda path: save_file({"w": torch.ones(2)}, path),
    ),
    "state garbage": (lambda path: read_state(path, {}), raw(b"no")),
    "state empty": (lambda path: read_state(path, {}), raw(b"")),
    "state cut": (lambda path: read_state(path, {}), cut(pt({"step": 1, "w": torch.ones(999)}))),
    "state list": (lambda path: read_state(path, {}), pt([1])),
    "state key": (lambda path: read_state(path, {"step": int}), pt({"model": {}})),
    "state key type": (lambda path: read_state(path, {"step": int}), pt({"step": "3"})),
    "state bomb": (lambda path: read_state(path, {}), pt({"a": Bomb()})),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damage_is_one_error_that_names_the_file(case: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read, write = BAD_FILES[case]
    path = tmp_path / "the file"
    write(path)
    with pytest.raises(ValueError, match="the file") as error:
        read(path)
    assert "wanted" in str(error.value) and len(brief(error.value).splitlines()) == 1
    assert "allow_pickle" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("read", [read_floats, read_json, read_json_lines, read_tensors])
def test_a_missing_file_is_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.* is not there: "):
        read(tmp_path / "absent")


def test_advice_is_that_of_the_innermost_reading_that_has_one(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(MissingFile, match="a.json is not there: delete it and make it anew"):
        read_json(path)
    with reading(tmp_path, advice="outer"), pytest.raises(MissingFile, match="a.json is not there: outer$"):
        read_json(path)
    path.write_text("[1")
    with pytest.raises(FileFault, match="a.json: found .*, wanted JSON: inner$"):
        with reading(tmp_path, "a folder", "outer"), reading(tmp_path, advice="inner"), reading(tmp_path):
            read_json(path)
    assert str(damaged(path, "x", "y")).endswith("y: delete it and make it anew")  # none is left behind


@pytest.mark.parametrize(
    "error", [KeyError("w"), EOFError(), RuntimeError("two\nlines"), IsADirectoryError(21, "b")]
)
def test_whatever_a_library_raises_is_damage(error: Exception):
    with pytest.raises(FileFault, match="^a: found .*, wanted b: c$"), reading("a", "b", "c"):
        raise error


@pytest.mark.parametrize("file", ["a.npy", "a.npz", "a.json", "a.safetensors", "a.pt"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_no_file_is_deleted_for_a_fault_of_the_machine(file: str, number: int, tmp_path, monkeypatch):
    path = tmp_path / file
    path.write_bytes(b"whole")
    read = {"a.npy": read_array, "a.json": read_json, "a.safetensors": read_tensors}.get(file)
    read = read or {"a.npz": partial(read_npz, kinds={"a": "f"}), "a.pt": partial(read_state, keys={})}[file]

    def refuse(name, *_, **__):
        raise OSError(number, os.strerror(number), str(name))

    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", refuse)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        read(path)
    assert caught.value.errno == number


@pytest.mark.parametrize(
    "error", [MemoryError(), ImportError(), RuntimeError("<a>: Too many open files (24)")]
)
def test_what_is_no_damage_passes_through(error: Exception):
    with pytest.raises(type(error)) as caught, reading("a", "b", "delete it"):
        raise error
    assert caught.value is error


def test_what_is_whole_is_read(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, FLOATS.astype(">f4"))
    assert np.array_equal(read_floats(path), FLOATS)
    path.write_text('\ufeff{"a": "x\u2028y"}\n{"a": "z"}\n\n', encoding="utf-8")
    assert read_json_lines(path, {"a": str}) == [{"a": "x\u2028y"}, {"a": "z"}]
    path.write_text('\ufeff{"a": 1}')
    assert read_json(path, keys={"a": float}) == {"a": 1}


@pytest.mark.parametrize("damage", ["nan", "missing", "config", "no config"])
def test_a_model_is_loaded_whole_or_not(damage: str, tmp_path):
    model = BrainModel(voxels=6, tokens=2, width=8, layers=1, attention_heads=2, embed_dim=4)
    model.save_pretrained(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    loaded = load_model(BrainModel, tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    if damage == "nan":
        save_file({k: v * torch.nan for k, v in model.state_dict().items()}, weights)
    elif damage == "missing":
        save_file({k: v for k, v in model.state_dict().items() if k != "position"}, weights)
    elif damage == "config":
        (tmp_path / "m" / "config.json").write_text('{"voxels": "six"}')
    else:
        (tmp_path / "m" / "config.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path / "m")) as error:
        with reading(tmp_path / "m", advice="train it again"):
            load_model(BrainModel, tmp_path / "m")
    assert "train it again" in str(error.value)


# ---------------------------------------------------------------- writers


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(RuntimeError), written_whole(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]

    def write(folder):
        (folder / "x").write_text("new")
        raise RuntimeError

    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "x").write_text("old")
    with pytest.raises(RuntimeError):
        save_folder(tmp_path / "m", write)
    assert (tmp_path / "m" / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("Not enough free space to write 32000000 bytes after offset 128"),  # numpy
    SafetensorError("I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
])  # fmt: skip
def test_a_full_disk_is_one_error_whatever_a_library_says(error, tmp_path, monkeypatch):
    path, free = tmp_path / "a.pt", 5_000_000
    if isinstance(error, RuntimeError):
        free = 0
        with pytest.raises(RuntimeError, match="unexpected pos"), written_whole(path):
            raise error  # another disk has room
    monkeypatch.setattr("shutil.disk_usage", lambda _: Namespace(free=free))
    message = f"a.pt takes 0.002 GB, but the disk is full, with {free / 1e9:.3f} GB free: make room"
    with pytest.raises(OSError, match=message), written_whole(tmp_path / "b"), written_whole(path) as part:
        part.write_bytes(bytes(2_000_000))
        raise error
    with pytest.raises(OSError, match="m takes 0.000 GB, but the disk is full"):
        save_folder(tmp_path / "m", lambda folder: (_ for _ in ()).throw(error))
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_of_a_folder_is_not_saved(tmp_path):
    (tmp_path / ".m.part").mkdir()
    (tmp_path / ".m.part" / "old").touch()
    save_folder(tmp_path / "m", lambda folder: (folder / "new").touch())
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["m", "m/new"]


@pytest.mark.parametrize("damage", ["none", "state", "array"])
def test_arrays_go_on_after_a_kill(damage: str, tmp_path):
    path, recipe = tmp_path / "a.npy", {"by": "test"}
    with (
        pytest.raises(KeyboardInterrupt),
        resumable_arrays({path: (4, 2)}, "float32", recipe, {}) as (arrays, _, filled),
    ):
        arrays[0][:2] = 7
        filled(2)
        raise KeyboardInterrupt
    if damage == "state":
        (tmp_path / ".a.part.json").write_text("half a li")
    elif damage == "array":
        (tmp_path / ".a.part.npy").write_bytes(b"")
    with resumable_arrays({path: (4, 2)}, "float32", recipe, {}) as (arrays, done, _):
        assert done == (2 if damage == "none" else 0)
        arrays[0][done:] = 1
    assert np.load(path).sum() == (2 * 2 * 7 + 2 * 2 if damage == "none" else 8)
    assert is_made_by(path, recipe) and [p.name for p in sorted(tmp_path.iterdir())] == [
        "a.npy",
        "manifest.json",
    ]


def test_another_recipe_is_an_error_that_names_both(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, FLOATS)
    assert not is_made_by(path, {"frames": 8})
    add_to_manifest(path, FLOATS, {"frames": 8}, hashes([[path]]))
    assert is_made_by(path, {"frames": 8})
    with pytest.raises(ValueError, match="frames = 8, but frames = 4"):
        is_made_by(path, {"frames": 4})


# ---------------------------------------------------------------- options


@dataclass
class Options:
    data: str = option("toy", "a dataset")
    tau: float = option(0.07, "temperature, in % of nothing", above=0)
    steps: int = option(10, "steps", least=1, most=100)
    flow: str = option("raft", "which", choices=("raft", "farneback"))
    cls: bool = option(True, "category learning")
    names: list[str] = option([], "names")
    rois: str | None = option(None, "regions")


def ask(*words: str) -> Options:
    return parse(Options, {"toy": {"steps": 5}, "real": {}}, "What it does.", "it.py", words)


def test_options(capsys):
    assert ask().steps == 5 and ask("--data", "real").steps == 10 and ask("--steps", "7").steps == 7
    assert ask("--no-cls").cls is False and ask().cls is True and ask("--names", "a", "b").names == ["a", "b"]
    with pytest.raises(SystemExit):
        ask("--help")
    told = capsys.readouterr().out
    assert (
        told.count("temperature") == 1 and "default: 0.07" in told and "toy: 5" in told and "--no-cls" in told
    )


@pytest.mark.parametrize(
    "words",
    ["--tau 0", "--tau -1", "--tau nan", "--tau inf", "--tau x", "--steps 0", "--steps 101", "--steps 1.5",
     "--flow tv-l1", "--data mars", "--bad 1", "--steps", "--tau=1e400"],
)  # fmt: skip
def test_an_option_out_of_range_is_one_line(words: str, capsys):
    with pytest.raises(SystemExit) as end:
        ask(*words.split())
    told = capsys.readouterr().err
    assert end.value.code == 2 and len(told.splitlines()) == 1 and words.split()[0].split("=")[0] in told


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "a\\b", ".hidden", "x" * 101, "a\0b", "a b"])
def test_a_name_is_one_folder(name: str):
    with pytest.raises(ValueError, match="--run"):
        check_name(name)


def test_the_folder_of_a_run():
    assert str(run_folder("toy", 1, "full-no-mom", 0)) == "runs/toy/sub1/full-no-mom-s0"


# ---------------------------------------------------------------- runs


def weights(value: float = 1.0, rows: int = 1) -> dict:
    return {"weight": torch.full((rows, 2), value), "bias": torch.ones(1)}


def begin(tmp_path, **settings) -> RunFolder:
    settings = {"lr": 1.0, "seed": 0, "save_every": 2, "log_every": 1} | settings
    folder = tmp_path / "runs" / "r" / "stage1"
    return RunFolder(folder, settings, 4, "losses.png", Accelerator(cpu=True), ("seed",))


def restore(run: RunFolder, model: torch.nn.Module, **more) -> None:
    run.restore({"model": model}, {"model": lambda folder: (folder / "weights").write_text("whole")}, **more)


def train(run: RunFolder, model: torch.nn.Module, steps: int, **more) -> None:
    """The steps that are left, `steps` of them at most; a step writes its number into the weights."""
    restore(run, model, **more)
    for step, _ in zip(run.steps(), range(steps), strict=False):
        torch.nn.init.constant_(model.weight, step)
        run.after_step(step, {"loss": torch.tensor(float(step))}, {"lr": 0.5}, lambda: {"held out": 1.0})


def contents(folder: Path) -> dict[Path, str]:
    return {file: sha256(file) for file in folder.rglob("*") if file.is_file()}


def test_a_run_goes_on_finishes_and_refuses_other_settings(tmp_path):
    model = torch.nn.Linear(2, 1)
    with begin(tmp_path) as run:
        restore(run, model)
        assert run.first_step == 0 and not run.finished
    assert not (tmp_path / "runs").exists()  # nothing before the first batch has worked
    with begin(tmp_path) as run:
        train(run, model, 3)  # of which two are saved
    with begin(tmp_path, seed=5) as run:  # what may change
        restore(run, model)
        assert run.first_step == 2 and model.weight.tolist() == [[1, 1]]
        run.log(2, {"loss": 9.0})
        rows = read_log(run.log_file)
        assert [row["loss"] for row in rows] == [0, 1, 9]  # what came after the checkpoint goes
        assert rows[1] == {"step": 1, "loss": 1, "lr": 0.5, "held out": 1} and "held out" not in rows[0]
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"^\S+stage1 was made with lr 1.0 \(now 2.0\): .*--run NAME"):
        begin(tmp_path, lr=2.0)
    assert contents(tmp_path) == before
    with begin(tmp_path) as run:
        train(run, model, 4)
        assert read_json(run.folder / "config.json")["step"] == 4
        assert (run.folder / "model" / "weights").read_text() == "whole"
    with begin(tmp_path) as run:
        assert not run.finished  # what is written last is missing
        run.finish({"loss": "a loss"}, "A run", {"table.txt": "text", "table.json": {"a": 1}})
        assert read_json(run.folder / "table.json") == {"a": 1}
    with begin(tmp_path) as run:
        assert run.finished


def test_samples_and_what_is_written_once(tmp_path):
    model, files, folders = torch.nn.Linear(2, 1), [], []
    for _ in range(2):
        with begin(tmp_path, sample_every=1) as run:
            train(run, model, 2, write_once=folders.append, sample=files.append)
    assert [file.name for file in files] == [f"step-{step:06d}.gif" for step in (1, 2, 3, 4)]
    assert folders == [run.folder]


@pytest.mark.parametrize("step", [5, "2", None])
def test_a_damaged_step_is_one_error(step, tmp_path):
    with begin(tmp_path) as run:
        train(run, torch.nn.Linear(2, 1), 2)
    file = run.folder / "config.json"
    write_json(file, read_json(file) | {"step": step})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="config.json: found step = .*another --run NAME"):
        begin(tmp_path)
    assert contents(tmp_path) == before


def test_one_process_at_a_time(tmp_path):
    with begin(tmp_path), pytest.raises(ValueError, match="another process works in it"):
        begin(tmp_path)
    with begin(tmp_path):
        pass


@pytest.mark.parametrize(
    "state",
    [[1], {"model": {}}, {"step": "2", "model": {}}, {"step": 9, "model": weights()}, {"step": 2},
     {"step": 2, "model": weights(rows=3)}, {"step": 2, "model": {}}, {"step": 0, "model": weights()},
     {"step": 2, "model": weights(torch.nan)}],
)  # fmt: skip
def test_a_damaged_state_is_one_error(state, tmp_path):
    model = torch.nn.Linear(2, 1)
    with begin(tmp_path) as run:
        train(run, model, 2)
    torch.save(state, run.state_file)
    with begin(tmp_path) as run, pytest.raises(ValueError, match="state.pt.*found.*wanted.*train again"):
        restore(run, model)


def test_settings_of_an_evaluation_are_claimed(tmp_path):
    claim(tmp_path / "eval", {"steps": 2}, write=False)
    assert not (tmp_path / "eval").exists()
    claim(tmp_path / "eval", {"steps": 2})
    claim(tmp_path / "eval", {"steps": 2})
    with pytest.raises(ValueError, match=r"^\S+eval was made with steps 2 \(now 3\): .*rm -r "):
        claim(tmp_path / "eval", {"steps": 3})
    (tmp_path / "eval" / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json: found list.*rm -r "):
        claim(tmp_path / "eval", {"steps": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, None), ({"step": 3}, "found .*'step': 3.*a finished run: train"), ({"subject": 2}, "found .*'subject': 2"),
     ({"subject": "1"}, "subject as int"), ({"steps_in_all": None}, "steps_in_all as int")],
)  # fmt: skip
def test_only_a_finished_run_is_started_from(changes, message, tmp_path):
    places = [tmp_path / "absent", tmp_path / "run"]
    write_json(tmp_path / "run" / "config.json", {"subject": 1, "step": 4, "steps_in_all": 4} | changes)
    if message is None:
        assert finished_run(places, {"subject": 1}, {"subject": int}, "train")[0] == tmp_path / "run"
    else:
        with pytest.raises(ValueError, match=message):
            finished_run(places, {"subject": 1}, {"subject": int}, "train")
    with pytest.raises(FileNotFoundError, match="absent/config.json is not there: train"):
        finished_run(places[:1], {}, {}, "train")


# ---------------------------------------------------------------- the door

SCRIPT = """
import os, signal, sys, time, zipfile, pickle
from accelerate import Accelerator
from safetensors import SafetensorError
from accelerate import Accelerator
from support.runs import Stopped, Stopping, door
def train():
    stop, accelerator = Stopping(), Accelerator(cpu=True)
    stop.listen()
    print("ready", flush=True)
    for step in range(1000):
        time.sleep(0.01)
        if stop.asked(accelerator):
            raise Stopped(stop.number, f"stopped at step {step + 1}; the same command goes on")
def wait():
    print("ready", flush=True)
    time.sleep(10)
def fail():
    raise eval(sys.argv[2])
door({"train": train, "wait": wait, "fail": fail}[sys.argv[1]])
"""


def at_the_door(*words: str, number: int = 0) -> tuple[int, str]:
    command = [sys.executable, "-c", SCRIPT, *words]
    how = {"cwd": REPO, "env": environment(), "stdout": -1, "stderr": -1, "text": True}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background ignores it
    process = subprocess.Popen(command, **how, preexec_fn=heard)
    if number:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize(
    "error",
    ["ValueError('a: b')", "FileNotFoundError(2, 'No such file', 'x.npy')", "SafetensorError('bad')",
     "pickle.UnpicklingError('bad')", "zipfile.BadZipFile('bad')", "EOFError()",
     "OSError(28, 'No space left', 'y')", "ValueError('1\\n2\\n3\\n4\\n5')"],
)  # fmt: skip
def test_bad_input_is_one_error(error: str):
    status, told = at_the_door("fail", error)
    assert (
        status == 1 and told.startswith("error: ") and len(told.splitlines()) <= 3 and "Traceback" not in told
    )


def test_a_bug_keeps_its_traceback():
    status, told = at_the_door("fail", "KeyError('bug')")
    assert status == 1 and "Traceback" in told and "KeyError: 'bug'" in told


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("what", ["train", "wait"])
def test_a_signal_ends_in_good_order(what: str, number: int, status: int):
    found, told = at_the_door(what, number=number)
    assert found == status and "the same command goes on" in told and "Traceback" not in told
    assert ("stopped at step" in told) == (what == "train")


def test_one_error_of_several_processes_is_printed_once():
    env = environment() | {"WORLD_SIZE": "3", "MASTER_PORT": str(os.getpid())}
    command = [sys.executable, "-c", SCRIPT, "fail", "ValueError('once')"]
    processes = [subprocess.Popen(command, cwd=REPO, env=env, stderr=-1, text=True) for _ in range(3)]
    told = [process.communicate(timeout=60)[1] for process in processes]
    assert sum("once" in text for text in told) == 1 and all(process.returncode == 1 for process in processes)


@pytest.mark.parametrize(
    ("clips", "n", "groups", "chosen"),
    [
        (range(10), 4, None, [1, 3, 6, 8]),
        (range(10), 4, {"a": [0, 2, 4, 6, 8], "b": [1, 3, 5, 7, 9]}, [2, 6, 3, 7]),
        (range(10), 3, {"a": [0, 2, 4, 6, 8], "b": [1, 3, 5, 7, 9]}, [2, 6, 5]),
        ([4, 5, 6], 4, {"a": [0, 1, 4], "b": [5, 6]}, [4, 5, 6]),  # a group has fewer than its share
        ([4, 5, 6], 2, {"a": [0], "b": [5, 6]}, [4, 5, 6][1:]),  # none of a group can be shown
    ],
)
def test_pictures_choose_clips_by_one_rule(clips, n, groups, chosen):
    masks = groups and {name: np.isin(np.arange(10), inside) for name, inside in groups.items()}
    assert spread(clips, n, masks) == chosen

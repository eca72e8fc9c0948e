"""support/: files written whole, options, runs that go on, the door. Damage to files: test_faults.py."""

import errno
import hashlib
import io
import json
import logging
import os
import re
import signal
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import REPO
from safetensors import SafetensorError
from torch import nn

from prepare.cc2017 import load_pt
from prepare.facts import decoder_recipes
from support import files, runs, shared, training
from support.files import MissingData, read_manifest, resumable_arrays, save_folder, write_json, written_whole
from support.options import check_name, option, parse
from support.readers import FileFault, read_array, read_json, read_npz, read_tensors
from support.runs import RunFolder, Stopped, brief, door, read_log, run_folder


def throw(error: BaseException):
    raise error


def test_no_file_is_deleted_for_a_fault_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"whole")
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", lambda *_, **__: throw(error))
    for read in (read_array, read_json, read_tensors, load_pt, partial(read_npz, kinds={})):
        with pytest.raises(OSError, match="Too many open files") as caught:
            read(tmp_path / "a")
        assert caught.value is error


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path, folder = tmp_path / "a.json", tmp_path / "m"
    write_json(path, ["é"])
    folder.mkdir()
    (folder / "x").write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as part:
        part.write_text("half")
        assert json.loads(path.read_text("utf-8")) == ["é"]
        assert part.parent == path.parent  # of one file system
        raise RuntimeError
    with pytest.raises(ValueError, match="b: another process"), written_whole(tmp_path / "b"):
        pass  # it was done first, and has renamed it

    def write(part: Path) -> None:
        (part / "x").write_text("new")
        assert (folder / "x").read_text() == "old"
        if fails:
            raise RuntimeError

    for fails in (True, False):
        (tmp_path / ".m.part").mkdir()
        (tmp_path / ".m.part" / "y").touch()  # what a kill left is not saved
        with pytest.raises(RuntimeError) if fails else nullcontext():
            save_folder(folder, write)
        assert (folder / "x").read_text() == ("old" if fails else "new")
        assert sorted(tmp_path.rglob("*")) == [path, folder, folder / "x"]


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("Not enough free space to write 32000000 bytes after offset 128"),  # numpy
    OSError("4000 requested and 512 written"),  # numpy, too
    SafetensorError("I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
])  # fmt: skip
def test_a_full_disk_is_one_error_whatever_a_library_says(error, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=500_000))
    path.write_bytes(bytes(3_000_000))  # says how much the next will take
    message = "a.pt: no room on the disk: it takes 3.0 MB or more, 0.5 MB are free: m"
    with pytest.raises(OSError, match=message), written_whole(tmp_path / "b"):
        with written_whole(path) as part:
            part.write_bytes(bytes(2_000_000))
            raise error
    with pytest.raises(OSError, match="m: no room on the disk: it takes 4.8 MB or more, 0.5 MB"):
        save_folder(tmp_path / "m", lambda folder: files.check_room(folder, {"a": [torch.ones(1_200_000)]}))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("builtins.open", lambda *_, **__: throw(full))
    with pytest.raises(OSError, match="a.pt: no room on the disk: it takes 3.0 MB"):
        files.append_text(path, "a line")
    monkeypatch.undo()
    assert [*tmp_path.iterdir()] == [path] and path.stat().st_size == 3_000_000


@pytest.fixture
def windows(monkeypatch):
    """As there, what is mapped is neither replaced nor removed."""

    def refusing(change):
        def refuse(*paths, **options):
            mapped = Path("/proc/self/maps").read_text()
            for path in paths:
                if re.search(rf" {re.escape(os.path.realpath(path))}$", mapped, re.M):
                    raise PermissionError(errno.EACCES, "in use", str(path))
            return change(*paths, **options)

        return refuse

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


@pytest.mark.parametrize("damage", ["none", "array", "recipe", "input"])
def test_arrays_go_on_after_a_kill(damage: str, windows, tmp_path):
    shapes = {tmp_path / "a.npy": (4, 2), tmp_path / "b.npy": (4,)}
    start = partial(resumable_arrays, shapes, "float32")
    with pytest.raises(KeyboardInterrupt), start({"by": "test"}, {"x": "1"}) as (arrays, done, filled):
        assert done == 0
        for array in arrays:
            array[:2] = 7
        filled(2)
        raise KeyboardInterrupt
    assert not any(path.exists() for path in shapes)
    if damage == "array":
        (tmp_path / ".b.part.npy").write_bytes(b"")
    recipe = {"by": "others"} if damage == "recipe" else {"by": "test"}
    first = 2 if damage == "none" else 0
    with start(recipe, {"x": "2" if damage == "input" else "1"}) as (arrays, done, _):
        assert done == first
        for array in arrays:
            array[done:] = 1
    for path in shapes:
        x = np.load(path)
        assert x.shape == shapes[path] and (x[:first] == 7).all() and (x[first:] == 1).all()
        assert files.is_made_by(path, recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "b.npy", "manifest.json"]


def test_the_manifest_says_what_made_an_array(tmp_path):
    path, x = tmp_path / "a.npy", np.arange(6, dtype=np.float32).reshape(3, 2)
    (tmp_path / "one").write_text("one")
    (tmp_path / "two").write_text("two")
    digest = hashlib.sha256(b"onetwo").hexdigest()
    inputs = files.hashes([[tmp_path / "one", tmp_path / "two"], [tmp_path / "two"]])
    assert inputs == {"one ... two": digest, "two": hashlib.sha256(b"two").hexdigest()}
    assert not files.is_made_by(path, {}) and read_manifest(path) is None
    for name in ("b.npy", "a.npy"):
        with files.writing_array(tmp_path / name, (3, 2), "float32", {"frames": (8, 9)}, inputs) as array:
            assert not (tmp_path / name).exists()
            array[:] = x
    entry = read_manifest(path)
    assert entry["recipe"] == {"frames": [8, 9]} and entry["inputs"] == inputs
    assert files.is_made_by(path, {"frames": (8, 9)}) and files.is_made_by(tmp_path / "b.npy", {})
    with pytest.raises(ValueError, match=r"a.npy was made with frames = \[8, 9\], but .* 4 is .*delete it"):
        files.is_made_by(path, {"frames": 4})
    assert np.array_equal(files.read_prepared(path, "f", (None, 2)), x)
    for changed in (x[:2], x.astype(np.float64)):
        np.save(path, changed)
        with pytest.raises(FileFault, match=r"wanted float32 of shape \[3, 2\], as manifest.json"):
            files.read_prepared(path, "f", (None, 2))
    path.unlink()
    assert read_manifest(path) is None  # the array decides


@dataclass
class Options:
    data: str = option("toy", "a dataset")
    tau: float = option(0.07, "temperature, in % of nothing", above=0)
    drop: float = option(0.0, "a share", least=0, below=1)
    batch_steps: int = option(10, "steps", least=1, most=100)
    cls: bool = option(True, "category learning")
    names: list[str] = option([], "names")
    size: int | None = option(None, "or nothing", least=3)


def ask(words: str) -> Options:
    return parse(Options, {"toy": {"batch_steps": 5}, "real": {}}, "What it does.", "it.py", words.split())


def test_the_command_line_stands_over_the_preset_over_the_defaults(capsys):
    """Errors and help name the range and the default."""
    for words, changes in {
        "": {"batch_steps": 5},
        "--data real --drop 0": {"data": "real"},
        "--batch-steps 100 --cls": {"batch_steps": 100},
        "--names a b --size 3 --no-cls": {"batch_steps": 5, "names": ["a", "b"], "size": 3, "cls": False},
    }.items():
        assert ask(words) == Options(**changes)
    for words in ("--drop 1", "--tau inf", "--help"):
        with pytest.raises(SystemExit):
            ask(words)
    text, error = capsys.readouterr()
    assert "--drop 1.0: wanted at least 0 and below 1" in error and "--tau inf" in error
    for message in ("in % of nothing [default: 0.07]", "steps [default: 10; toy: 5]", "--no-cls"):
        assert message in " ".join(text.split())


def test_a_name_is_one_folder():
    assert str(run_folder("toy", 1, "full-no_mom+2.x", 0)) == "runs/toy/sub1/full-no_mom+2.x-s0"
    assert check_name("x" * 100)
    for name in ("", "../x", ".hidden", "x" * 101, "a\n"):
        with pytest.raises(ValueError, match="--run"):
            check_name(name)


def test_a_step_of_adamw_by_hand():
    """A step of the rate against the sign, less rate x decay; the norm before clipping, the rate of the next step."""
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimiser, schedule = training.adamw_onecycle([([p], 0.5)], "adamw", 0.1, 20)
    p.grad = torch.tensor([30.0, -40.0])
    numbers = training.update(optimiser, schedule, 1.0)
    expected = torch.tensor([3.0, -2.0]) * (1 - 0.02 * 0.1) - 0.02 * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(p.data, expected)
    assert numbers["norm"] == 50 and numbers["lr"] == schedule.get_last_lr()[0] > 0.02 and p.grad is None


def test_gradients_are_clipped_together_and_averaged(monkeypatch):
    a, b, unused = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    optimiser = torch.optim.SGD([a, b, unused], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert training.update(optimiser, schedule, 2.5) == {"norm": 5, "lr": 0.5}
    assert (a.item(), b.item()) == pytest.approx((-1.5, -2))
    monkeypatch.setattr(training.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(training.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(training.dist, "all_reduce", lambda x: x.mul_(2))  # twice this one's in all
    a.grad, b.grad = torch.tensor([6.0]), torch.tensor([8.0])
    assert training.update(optimiser, schedule, 10.0)["norm"] == 5
    assert (a.item(), b.item()) == pytest.approx((-3, -4))  # at half the rate
    a.grad = torch.tensor([torch.nan])
    with pytest.raises(ValueError, match="step 2: .* norm is nan, training diverged: the"):
        training.update(optimiser, schedule, 1.0)
    assert a.item() == pytest.approx(-3)
    sent = []  # few messages, each of one type
    monkeypatch.setattr(training.dist, "all_reduce", lambda x: sent.append(x.numel()) or x.mul_(6))
    monkeypatch.setattr(training, "MESSAGE", 100)
    gradients = [torch.randn(n, 3) for n in (5, 1, 7, 200)] + [torch.randn(4, dtype=torch.float64)]
    expected = [1.5 * g for g in gradients]
    training.average(gradients)
    assert sent == [39, 600, 4]
    torch.testing.assert_close(gradients, expected)


def test_bitsandbytes_keeps_all_but_the_first_group_in_32_bits(monkeypatch):
    parameters = [nn.Parameter(torch.ones(n)) for n in (1, 2, 3)]
    groups = [([p], 0.1 * (k + 1)) for k, p in enumerate(parameters)]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="--optimizer adamw8bit: no bitsandbytes .*pip install"):
        training.adamw_onecycle(groups, "adamw8bit", 0.1, 9)
    module = Mock(AdamW8bit=Mock(side_effect=lambda params, **_: torch.optim.AdamW(params)))
    manager = module.GlobalOptimManager.get_instance()
    monkeypatch.setitem(sys.modules, "bitsandbytes", Mock())
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    training.adamw_onecycle(groups, "adamw8bit", 0.3, 9)
    manager.override_config.assert_called_once_with(parameters[1:], "optim_bits", 32)
    assert manager.register_parameters.called
    assert module.AdamW8bit.call_args.kwargs == {"weight_decay": 0.3, "min_8bit_size": 4096}


def test_precision_and_compilation(monkeypatch):
    for asked, device, precision in ((None, "cpu", "fp32"), (None, "cuda", "bf16"), ("x", "cuda", "x")):
        assert training.precision_of(SimpleNamespace(precision=asked), torch.device(device)) == precision
    block, dit = Mock(), Mock()
    monkeypatch.setattr(torch, "compile", lambda _: lambda x: throw(RuntimeError("No compiler\nmore")))
    with pytest.raises(ValueError, match="--compile: No compiler: install .*, or leave the option out$"):
        training.compile_blocks([block])
    monkeypatch.setattr(torch, "compile", lambda function: function)
    training.compile_blocks([block, block], dit)
    assert len(block.compile.mock_calls) == 2 and len(dit.compile_repeated_blocks.mock_calls) == 1


def test_a_run_is_on_cuda_or_the_cpu_unless_another_is_asked_for(monkeypatch):
    def of_a_machine(cpu: bool, **_):
        """As accelerate chooses on Apple silicon, or with CUDA."""
        present.append("cpu" if cpu else "cuda" if torch.cuda.is_available() else "mps")
        return SimpleNamespace(distributed_type=kind, device=torch.device(present[-1]))

    present, kind = [], DistributedType.NO
    monkeypatch.setattr(training, "Accelerator", of_a_machine)
    monkeypatch.setattr(training, "is_initialized", lambda: False)
    for cuda, best, other in ((False, "cpu", "mps"), (True, "cuda", "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert training.device_type() == best
        for device, wanted in ((None, best), (best, best), (other, other)):
            training.start(device)
            assert present[-1] == wanted
    with pytest.raises(ValueError, match="--device mps: this process has cuda: leave it out"):
        training.start("mps")
    kind = DistributedType.FSDP
    with pytest.raises(ValueError, match="FSDP: wanted plain data parallelism"):
        training.start()
    monkeypatch.undo()
    for variable, setting in (("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_MIXED_PRECISION", "fp16")):
        monkeypatch.setenv(variable, setting)
        with pytest.raises(ValueError, match="accelerate is set to .*: wanted plain data parallelism"):
            training.start()


def test_the_networks_beside_the_code_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("toy/wan", "toy/nowhere", "lab/model", "local-dir:toy/clip", ""):
        schema, folder = name[: name.find(":") + 1], REPO / name.removeprefix("local-dir:")
        beside = name.startswith("toy/w") or "clip" in name
        assert files.find_weights(name) == (f"{schema}{folder}" if beside else name)
    recipes = decoder_recipes("toy/wan", (17, 64, 64))
    assert recipes == decoder_recipes(str(REPO / "toy" / "wan"), (17, 64, 64)) and recipes[0]["vae"]
    assert shared.decoder_at("toy/wan", tmp_path / "shared") == str(REPO / "toy" / "wan")
    for name in ("toy/wan", "models"):
        (tmp_path / name).mkdir(parents=True)
    assert files.find_weights("toy/wan") == "toy/wan"
    monkeypatch.chdir("/")  # a decoder of the folder where the run was trained
    assert shared.decoder_at("models", tmp_path / "runs/toy/sub1/full-s0/stage2") == str(tmp_path / "models")


TOTAL = 7


def begin(root: Path, total: int = TOTAL, accelerator=None, **settings) -> RunFolder:
    settings = {"lr": 1.0, "seed": 0, "save_every": 2, "log_every": 1, "shape": (1, 2)} | settings
    folder, may_change = root / "runs" / "r" / "stage1", ("seed", "sample_every")
    return RunFolder(folder, settings, total, "losses.png", accelerator or Accelerator(cpu=True), may_change)


def fit(root: Path, steps=99, at_step=lambda step: None, sample=None, **settings) -> dict:
    """A regression on data drawn by step, `steps` of its steps at most. Returns its weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimiser, schedule = training.adamw_onecycle([(model.parameters(), 0.1)], "adamw", 0.01, TOTAL)

    def write(folder: Path) -> None:
        torch.save(model.state_dict(), folder / "a.pt")
        (folder / "step").write_text(str(schedule.last_epoch))

    with begin(root, **settings) as run:
        state = {"model": model, "optimiser": optimiser, "schedule": schedule}
        run.restore(state, {"model": write}, None, sample)
        assert schedule.last_epoch == run.first_step
        for step, _ in zip(run.steps(), range(steps), strict=False):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x[:, :2].sin()).square().mean()
            loss.backward()
            numbers = training.update(optimiser, schedule, 1.0)
            at_step(step)
            numbers["exact"] = loss.item()
            validate = lambda step=step: {"held out": step}  # noqa: E731
            run.after_step(step, {"loss": loss, "image": 2 * loss}, numbers, validate)
    return model.state_dict()


def stage(root: Path) -> Path:
    return root / "runs" / "r" / "stage1"


def test_after_a_kill_at_any_moment_the_end_is_the_same(tmp_path, monkeypatch):
    weights = fit(tmp_path / "undisturbed")
    rows = read_log(stage(tmp_path / "undisturbed") / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(TOTAL))
    assert all(row["loss"] == row["exact"] == row["image"] / 2 for row in rows)
    replace, k = os.replace, 0
    while True:
        k, root, moments = k + 1, tmp_path / str(k), iter(range(99))

        def replace_or_die(source, target, k=k, moments=moments) -> None:
            if next(moments) == k:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_or_die)
        try:
            fit(root)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", replace)
        if (stage(root) / "config.json").exists():  # what it says is true of the weights
            config = read_json(stage(root) / "config.json")
            assert int((stage(root) / "model" / "step").read_text()) >= config["step"]
            assert torch.load(stage(root) / "state" / "state.pt")["step"] >= config["step"]
            assert config["steps_in_all"] == TOTAL and config["shape"] == [1, 2]
        assert all(torch.equal(x, weights[name]) for name, x in fit(root).items())
        assert read_log(stage(root) / "log.jsonl") == rows
    assert k > 12


def test_a_run_is_new_or_goes_on_or_is_finished(tmp_path, windows):
    with begin(tmp_path) as run:
        run.restore({}, {})
        assert run.first_step == 0 and not run.finished
        with pytest.raises(ValueError, match="another process works in it: wait for it, or"):
            begin(tmp_path)
        begin(tmp_path, accelerator=SimpleNamespace(is_main_process=False))  # one lock for all of a launch
    assert not (tmp_path / "runs").exists()  # nothing changes before a step has worked
    fit(tmp_path, 3)
    with begin(tmp_path, seed=5, sample_every=9) as run:  # which may change
        assert run.first_step == 2 and not run.finished
    files_of = {file: file.read_bytes() for file in stage(tmp_path).rglob("*") if file.is_file()}
    for change in ({"lr": 2.0}, {"shape": (1, 3)}, {"more": 1}):
        with pytest.raises(ValueError, match=rf"made with {[*change][0]} .* \(now .*: .*, or delete"):
            begin(tmp_path, **change)
    assert all(file.read_bytes() == content for file, content in files_of.items())
    fit(tmp_path)
    (stage(tmp_path) / "log.jsonl").open("a").write("no\n[1]\n{}\n")  # such lines are passed over
    with begin(tmp_path) as run:
        assert run.first_step == TOTAL and not run.finished  # what is written last is missing
        run.finish({"loss": "a loss"}, "A run", {"table.txt": "é", "table.json": {"a": 1}})
        assert (
            read_json(run.folder / "table.json") == {"a": 1}
            and (run.folder / "table.txt").stat().st_size == 2
        )
    with begin(tmp_path) as run:
        assert run.finished and (run.folder / "losses.png").stat().st_size > 1000


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_training_after_its_step_and_the_run_goes_on(number, status, tmp_path, capfd):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    samples = []

    def at_step(step: int) -> None:
        if step == 2:
            signal.raise_signal(number)

    with pytest.raises(Stopped, match=f"saved after step 3 of {TOTAL}; the same command goes on") as stopped:
        fit(tmp_path, at_step=at_step, sample_every=3, sample=samples.append)
    assert stopped.value.status == status and samples == []
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    assert read_json(stage(tmp_path) / "config.json")["step"] == 3
    assert "held out" in read_log(stage(tmp_path) / "log.jsonl")[2]
    weights = fit(tmp_path)
    assert all(torch.equal(x, weights[name]) for name, x in fit(tmp_path / "undisturbed").items())
    with pytest.raises(KeyboardInterrupt):  # a second signal does not wait
        fit(tmp_path / "second", at_step=lambda step: [signal.raise_signal(number) for _ in range(2)])


def test_all_processes_stop_once_one_got_a_signal():
    stopping = runs.Stopping()
    gather = lambda x: torch.cat([x, torch.tensor([15])])  # noqa: E731
    assert not stopping.asked(SimpleNamespace(num_processes=1))
    assert stopping.asked(SimpleNamespace(num_processes=2, device="cpu", gather=gather))
    assert stopping.number == 15


@pytest.fixture
def at_the_door(monkeypatch, capfd):
    """(exit status, stderr) of a main at the door."""

    def call(main) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            door(main)
        return end.value.code, capfd.readouterr().err

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # the door sets another
    return call


@pytest.mark.parametrize(("error", "status", "message"), [
    (FileNotFoundError(2, "No such file", "x.npy"), 1, "error: x.npy: No such file\n"),
    (EOFError(), 1, "error: EOFError\n"),
    (ValueError("1\n\n 2\n3\n4\n5"), 1, "error: 1\n2\n3\n"),
    (MissingData("1\n\n2\n3\n4"), 1, "error: 1\n\n2\n3\n4\n"),
    (torch.OutOfMemoryError("x"), 1, "error: out of memory (x): "),
    (MemoryError("8 GB\nmore"), 1, "error: out of memory (8 GB): python extras/plan.py counts what options need; "
        "try --micro_batch 1, --checkpointing or --optimizer adamw8bit\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory ("),
    (RuntimeError("<a>: Too many open files (24)"), 1, "error: <a>: Too many"),
    (KeyboardInterrupt(), 130, "interrupted; the same command goes on where it was\n"),
    (Stopped(signal.SIGTERM, "saved"), 0, "saved\n"),
])  # fmt: skip
def test_bad_input_and_signals_are_said_in_few_lines(error, status, message, at_the_door):
    code, text = at_the_door(lambda: throw(error))
    assert code == status and text.startswith(message) and (not message.endswith("\n") or text == message)


def test_the_door(at_the_door, monkeypatch):
    assert at_the_door(lambda: None) == (0, "") and at_the_door(lambda: 3) == (3, "")
    terminated = at_the_door(lambda: signal.raise_signal(signal.SIGTERM))
    assert terminated == (0, "terminated; the same command goes on where it was\n")
    assert warnings.formatwarning(Warning("odd"), Warning, "a.py", 1) == "warning: odd\n"
    assert logging.getLogger("huggingface_hub.hf_api").level == logging.ERROR  # not a word on being offline
    with pytest.raises(KeyError):  # a bug keeps its traceback
        door(lambda: throw(KeyError("bug")))
    assert len(brief(ValueError("long " * 999))) <= 600
    page = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(page, "cp1252"))  # which lacks these characters
    assert at_the_door(lambda: print("100 ↑ 視")) == (0, "") and page.getvalue() == b"100 ? ?\n"


def test_a_stdout_that_nobody_reads_is_no_traceback(at_the_door, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    full, closed = "error: [Errno 28] No space left on device\n", None  # closed by >&-
    for stream, status, error in (
        (closed, 0, ""),
        (open("/dev/full", "w"), 1, full),
        (os.fdopen(writer, "w"), 1, ""),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        assert at_the_door(lambda: print("a table")) == (status, error)

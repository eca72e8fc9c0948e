"""What the scripts share around their work: the folder of a run, its log, signals, and the door.

RunFolder   settings, log and weights of a run, which change only together; the same command goes on
Stopping    Ctrl-C and SIGTERM end a training run after its step, with a checkpoint
door        bad input ends in one line, a bug in its traceback
"""

import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import textwrap
import time
import typing
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from torch import Tensor

from support.files import MissingData, save_folder, write_json, written_whole
from support.options import check_name
from support.readers import check_tensors, damaged, read_json, read_state

# ---------------------------------------------------------------- a run


def run_folder(data: str, subject: int, run: str, seed: int) -> Path:
    """runs/<data>/sub<K>/<run>-s<seed>"""
    return Path("runs") / data / f"sub{subject}" / f"{check_name(run)}-s{seed}"


def start(mixed_precision: bool = True) -> Accelerator:
    """One process or several, a GPU (bf16 where training) or the CPU."""
    # one process may have far more left to do than another
    patient = InitProcessGroupKwargs(timeout=timedelta(days=30))
    precision = "bf16" if mixed_precision and torch.cuda.is_available() else "no"
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=precision, kwargs_handlers=[patient]
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"{kind}: wanted plain data parallelism: accelerate launch --multi_gpu")
    return accelerator


class RunFolder:
    """The folder of a stage of a run, opened by one function for all scripts.

    Nothing there -> new. The same settings -> it goes on. All steps done and `last`, the file written last,
    there -> finished. Other settings -> ValueError that names them. Nothing in the folder changes before the
    first batch has worked, and one process group at a time may work in it.

    folder/config.json      settings and the step of the weights, written last: what it says is true of them
    folder/state/state.pt   to go on
    folder/log.jsonl        a line a logged step; TensorBoard's files beside it
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        total: int,
        last: str,
        may_change: Sequence[str] = (),
        chief: bool = True,
    ):
        self.folder, self.total, self.chief = folder, total, chief
        self.settings = json.loads(json.dumps(settings))
        self.state_file, self.log_file = folder / "state" / "state.pt", folder / "log.jsonl"
        self.first_step, self._board, self._lock = 0, None, None
        if chief:
            self._take_lock()
        config = folder / "config.json"
        mend = f"choose another --run NAME, or delete {folder}"
        there = read_json(config, keys={"step": int}, mend=mend) if config.exists() else None
        if there is not None:
            self._compare(there, may_change, mend)
            self.first_step = there["step"]
        self.finished = self.first_step == total and (folder / last).is_file()

    def _compare(self, there: dict, may_change: Sequence[str], mend: str) -> None:
        names = self.settings.keys() | there.keys() - {"step", "steps_in_all"}
        other = [name for name in sorted(names - {*may_change}) if there.get(name) != self.settings.get(name)]
        if other:
            self.close()
            pairs = [f"{n} {there.get(n)!r} (now {self.settings.get(n)!r})" for n in other[:4]]
            more = f" and {len(other) - 4} more" if len(other) > 4 else ""
            raise ValueError(f"{self.folder} was made with {', '.join(pairs)}{more}: {mend}")

    def _take_lock(self) -> None:
        """A lock on the folder itself: it leaves no file, and ends with the process."""
        with suppress(ImportError):  # Windows has no fcntl
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self._lock)
                self._lock = None
                raise ValueError(
                    f"{self.folder}: another process works in it: wait for it, or choose another --run NAME"
                ) from error

    def close(self) -> None:
        """Give the lock back, and leave no empty folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            for folder in (self.folder, *self.folder.parents[:4]):
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
        if self._board:
            self._board.close()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def restore(self, parts: dict[str, object]) -> int:
        """Load a checkpoint into the parts (models, optimiser, schedule ...); returns the step to go on from,
        0 for a new run."""
        if not self.first_step:
            return 0
        mend = f"delete {self.folder} and train again"
        keys = {"step": int} | dict.fromkeys(parts, dict)
        state = read_state(self.state_file, keys, mend)
        for name, part in parts.items():
            if all(isinstance(value, Tensor) for value in state[name].values()):
                check_tensors(state[name], self.state_file, mend=mend)
            try:
                part.load_state_dict(state[name])
            except Exception as error:  # other sizes, missing weights
                raise damaged(self.state_file, f"{name}: {error}", "what this run saved", mend) from error
        if not 0 < state["step"] <= self.total:
            raise damaged(self.state_file, f"step {state['step']}", f"a step of 1 to {self.total}", mend)
        self.first_step = state["step"]
        return self.first_step

    def save(self, step: int, state: dict[str, object], models: dict[str, Callable[[Path], object]]) -> None:
        """Weights, then what is needed to go on, then config.json: a kill between them leaves the run at this
        step or the last."""
        for name, write in models.items():
            save_folder(self.folder / name, write)
        with written_whole(self.state_file) as part:
            torch.save({name: part_.state_dict() for name, part_ in state.items()} | {"step": step}, part)
        write_json(self.folder / "config.json", self.settings | {"step": step, "steps_in_all": self.total})

    def log(self, step: int, row: dict[str, float]) -> None:
        """A line of log.jsonl and of TensorBoard; what an earlier start wrote beyond its last checkpoint goes
        first."""
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self.folder.mkdir(parents=True, exist_ok=True)
            kept = [row for row in read_log(self.log_file) if row["step"] < self.first_step]
            with written_whole(self.log_file) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in kept))
            self._board = SummaryWriter(str(self.folder), purge_step=self.first_step)
        with open(self.log_file, "a") as log:
            log.write(json.dumps({"step": step} | row) + "\n")
        for name, value in row.items():
            self._board.add_scalar(f"{self.folder.name}/{name}", value, step)


def finished_run(places: Sequence[Path], wanted: dict, keys: dict, mend: str) -> tuple[Path, dict]:
    """The first of these folders that holds a run, and its config.json with `keys` of their types. Raises
    FileNotFoundError where none does, ValueError where settings are not those `wanted` or steps are left."""
    folder = next((place for place in places if (place / "config.json").is_file()), places[0])
    there = read_json(folder / "config.json", keys=keys | {"step": int, "steps_in_all": int}, mend=mend)
    found = {name: there[name] for name in (*wanted, "step")}
    if found != wanted | {"step": there["steps_in_all"]}:
        raise damaged(folder, found, f"{wanted | {'step': there['steps_in_all']}}, a finished run", mend)
    return folder, there


def read_log(file: Path) -> list[dict]:
    """The lines of log.jsonl that are whole; it is for looking at, so a damaged line is passed over."""
    rows = []
    for line in file.read_text(errors="replace").split("\n") if file.is_file() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def diverged(step: int, norm: float, clips: Sequence[str]) -> ValueError:
    """The error of a training step whose gradient is not finite; nothing of that step is saved."""
    said = f"step {step}: the gradient's norm is {norm}, training diverged"
    mend = "the last checkpoint is whole; train anew with a lower --lr and another --run NAME"
    return ValueError(f"{said}: {mend}. Clips of the step: {textwrap.shorten(', '.join(clips), 200)}")


# ---------------------------------------------------------------- signals and errors


class Stopped(BaseException):
    """A signal ended the work in good order."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 130 if number == signal.SIGINT else 0


class Stopping:
    """with Stopping() as stop: ... `stop.asked(accelerator)` after a step is true in all processes once one
    got Ctrl-C or SIGTERM."""

    def __enter__(self) -> "Stopping":
        self.number, self._before = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.number:  # a second one does not wait for the step
            raise KeyboardInterrupt
        self.number = number

    def asked(self, accelerator: Accelerator) -> bool:
        if accelerator.num_processes > 1:
            numbers = accelerator.gather(torch.tensor([self.number], device=accelerator.device))
            self.number = int(numbers.max())
        return bool(self.number)

    def stopped(self, done: int, total: int) -> Stopped:
        """To raise, once the step is saved."""
        return Stopped(self.number, f"saved after step {done} of {total}; the same command goes on")


BAD_INPUT = (
    OSError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    HfHubHTTPError.__bases__[0],
)


def door(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main and end the process: 0 or what main returns; 1 after bad input, in one `error: ...`
    line; 130 after Ctrl-C and 0 after SIGTERM, which the same command goes on from. A bug keeps its
    traceback."""
    if sys.version_info < (3, 11):  # noqa: UP036  pip installs on older ones, too
        sys.exit(f"error: this is Python {sys.version.split()[0]}, wanted 3.11 or later")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()

    def terminated(number: int, frame) -> typing.NoReturn:
        raise Stopped(number, "terminated; the same command goes on where it was")

    signal.signal(signal.SIGTERM, terminated)
    try:
        status = main() or 0
    except BAD_INPUT as error:
        say(f"error: {brief(error)}")
        status = 1
    except torch.OutOfMemoryError as error:
        say(f"error: out of GPU memory ({str(error).splitlines()[0]}): --plan counts what each option needs")
        status = 1
    except Stopped as stopped:
        say(str(stopped))
        status = stopped.status
    except KeyboardInterrupt:
        say("interrupted; the same command goes on where it was")
        status = 130
    sys.stdout.flush()
    sys.exit(status)


def quiet() -> None:
    """No bar of a library for each model that it reads, nor nibabel's remarks on files: only downloads show
    how far they are. A warning is its words, without the line of code that it comes from."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.getLogger("nibabel.global").setLevel(logging.ERROR)
    hidden = are_progress_bars_disabled()
    for library in ("diffusers", "transformers"):
        if library in sys.modules:
            sys.modules[library].utils.logging.disable_progress_bar()
    if not hidden:
        enable_progress_bars()  # those of downloads, which transformers hides with its own


def brief(error: Exception) -> str:
    """An error in at most three lines; the guide to a missing dataset in as many as it has."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, MissingData):
        return text
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(textwrap.shorten(line, 600) for line in lines[:3])


def say(text: str) -> None:
    """Print to stderr, by one process of a launch: the first that has something to say."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        launch = f"cineneuron-{os.environ.get('MASTER_PORT', 0)}-{os.getppid()}"
        marker = Path(tempfile.gettempdir()) / launch
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            if time.time() - marker.stat().st_mtime < 60:  # another process of this launch said it
                return
            marker.touch()  # an old launch left it
    print(text, file=sys.stderr)


def share(items: Sequence, rank: int, world: int) -> slice:
    """The part of `items` that is this process's; parts differ by one at most."""
    n = len(items)
    return slice(rank * n // world, (rank + 1) * n // world)

"""Folders of runs, signals, and the door that every script goes through."""

import copy
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from support.files import MissingData, append_text, save_folder, save_state, write_json, write_text
from support.options import check_name
from support.readers import check_tensors, damaged, lacks_memory, of_machine, read_json, read_state, reading

Write = Callable[[Path], object]  # to this file or folder


def run_folder(data: str, subject: int, run: str, seed: int) -> Path:
    """runs/<data>/sub<S>/<run>-s<seed>"""
    return Path("runs") / data / f"sub{subject}" / f"{check_name(run)}-s{seed}"


def read_settings(file: Path, settings: dict, may_change: Sequence[str], advice: str) -> dict:
    """config.json of a folder, {} where there is none. Raises ValueError, naming them, where settings differ
    that may not change."""
    if not file.exists():
        return {}
    with reading(file, advice=advice):
        stored = read_json(file)
    names = settings.keys() | stored.keys() - {"step", "steps_in_all"}
    differ = [name for name in sorted(names - {*may_change}) if stored.get(name) != settings.get(name)]
    if differ:
        pairs = [f"{name} {stored.get(name)!r} (now {settings.get(name)!r})" for name in differ[:4]]
        more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ValueError(f"{file.parent} was made with {', '.join(pairs)}{more}: {advice}")
    return stored


class FolderLock(ExitStack):
    """One process group at a time works in a folder: one process of it is to `take` the lock. That leaves no
    file and no empty folder of its own, ends with the process, and is none where the system has none."""

    def __init__(self, folder: Path, advice: str = "wait for it", take: bool = True):
        super().__init__()
        absent = [parent for parent in folder.parents[:4] if not parent.exists()]
        with suppress(ImportError):  # Windows has no fcntl
            import fcntl

            if take:
                folder.mkdir(parents=True, exist_ok=True)
                handle = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    os.close(handle)
                    raise ValueError(f"{folder}: another process works in it: {advice}") from error
                except OSError:  # network disks have no locks of folders
                    pass
                self.callback(self._release, handle, [folder, *absent])

    def _release(self, handle: int, folders: Sequence[Path]) -> None:
        os.close(handle)
        for folder in folders:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


class RunFolder:
    """The folder of a stage of a run: config.json (settings, and the step of the weights), state/state.pt (to
    go on), log.jsonl (a line a logged step; TensorBoard's files beside it), and the weights.

    Nothing in it -> new. The same settings -> it goes on. All of `total` steps done and `last`, the file
    written last, in it -> finished. Other settings -> ValueError. No change before a step has worked."""

    def __init__(
        self,
        folder: Path,
        settings: dict,
        total: int,
        last: str,
        accelerator: Accelerator,
        may_change: Sequence[str] = (),
    ):
        self.folder, self.total, self.accelerator = folder, total, accelerator
        self.chief = accelerator.is_main_process
        self.settings = json.loads(json.dumps(settings))  # tuples are lists there
        self.state_file, self.log_file = folder / "state" / "state.pt", folder / "log.jsonl"
        self.board, self.stopping = None, Stopping()
        file, advice = folder / "config.json", f"choose another --run NAME, or delete {folder}"
        stored = read_settings(file, self.settings, may_change, advice)
        self.first_step = stored.get("step", 0)
        if self.first_step not in range(total + 1):
            raise damaged(file, f"step = {self.first_step!r}", f"a step of 0 to {total}", advice)
        self.lock = FolderLock(folder, "wait for it, or choose another --run NAME", self.chief)
        self.finished = self.first_step == total and (folder / last).is_file()

    def __enter__(self) -> "RunFolder":
        if self.finished:
            self.accelerator.print(f"{self.folder} is finished; another --run NAME or --seed trains anew")
        self.stopping.listen()
        return self

    def __exit__(self, *error) -> None:
        self.stopping.end()
        self.lock.close()
        if self.board:
            self.board.close()

    def restore(
        self,
        state: dict[str, object],
        models: dict[str, Write],
        write_once: Write | None = None,
        sample: Write | None = None,
    ) -> None:
        """state: what has a state_dict, loaded where the run has a checkpoint. models: writers of weights;
        write_once(folder): what stays as it is; sample(file): draws what the model can."""
        self.state, self.models, self.write_once, self.sample = state, models, write_once, sample
        if not self.first_step:
            return
        file, keys = self.state_file, {"step": int} | dict.fromkeys(state, dict)
        with reading(file, "what this run saved", f"delete {self.folder} and train again"):
            stored = read_state(file, keys)
            if not 0 < stored["step"] <= self.total:
                raise damaged(file, f"step {stored['step']}", f"a step of 1 to {self.total}")
            for name, part in state.items():
                check_tensors({key: x for key, x in stored[name].items() if isinstance(x, Tensor)}, file)
                values = copy.deepcopy(stored[name])  # an optimiser keeps what it gets: no piece of the file
                part.load_state_dict(values)
        self.first_step = stored["step"]

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a bar."""
        left, name = range(self.first_step, self.total), self.folder.name.replace("stage", "stage ")
        with tqdm(left, name, self.total, initial=self.first_step, disable=not self.chief) as self.bar:
            yield from self.bar

    def after_step(
        self,
        step: int,
        losses: dict[str, Tensor],
        numbers: dict[str, float],
        validate: Callable | None = None,
    ) -> None:
        """Logs, saves, draws a sample, stops: what is due. losses are averaged over the processes; numbers
        are alike in all; validate() gives more numbers when the weights are saved."""
        done, stop = step + 1, self.stopping.asked(self.accelerator)
        saving = stop or done % self.settings["save_every"] == 0 or done == self.total
        sample_every = self.settings.get("sample_every", 0)
        sampling = sample_every and (done % sample_every == 0 or done == self.total) and not stop
        if saving or step % self.settings["log_every"] == 0:
            values = torch.stack([value.detach().float() for value in losses.values()])
            means = self.accelerator.reduce(values, "mean").tolist()
            row = dict(zip(losses, means, strict=True)) | numbers
            if self.chief:
                self.log(step, row | (validate() if validate and saving else {}))
                losses = {name: f"{row[name]:.3f}" for name in ("loss", "diffusion") if name in row}
                self.bar.set_postfix(losses)
        if saving and self.chief:
            self.save(done)
        if sampling:
            self.sample(self.folder / "samples" / f"step-{done:06d}.gif")
        if saving or sampling:
            self.accelerator.wait_for_everyone()
        if stop:
            message = f"saved after step {done} of {self.total}; the same command goes on"
            raise Stopped(self.stopping.number, message)

    def save(self, step: int) -> None:
        """Weights, state, then config.json: a kill between them leaves the run at this step or the last."""
        if self.write_once and not (self.folder / "config.json").exists():
            self.write_once(self.folder)
        for name, write in self.models.items():
            save_folder(self.folder / name, write)
        state = {name: member.state_dict() for name, member in self.state.items()}
        save_state(self.state_file, state | {"step": step})
        write_json(self.folder / "config.json", self.settings | {"step": step, "steps_in_all": self.total})

    def finish(self, curves: dict[str, str], title: str, files: dict[str, str | dict] | None = None) -> None:
        """losses.png of these columns of the log, then files of text or JSON."""
        from support.pictures import loss_curves  # matplotlib

        loss_curves(self.folder / "losses.png", read_log(self.log_file), curves, title)
        for name, content in (files or {}).items():
            write = write_text if isinstance(content, str) else write_json
            write(self.folder / name, content)

    def log(self, step: int, row: dict[str, float]) -> None:
        """A line of log.jsonl and of TensorBoard. What an earlier start wrote beyond its checkpoint goes."""
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter

            lines = [json.dumps(row) for row in read_log(self.log_file) if row["step"] < self.first_step]
            write_text(self.log_file, "".join(f"{line}\n" for line in lines))
            self.board = SummaryWriter(str(self.folder), purge_step=self.first_step)
        append_text(self.log_file, json.dumps({"step": step} | row) + "\n")
        for name, value in row.items():
            self.board.add_scalar(f"{self.folder.name}/{name}", value, step)


def read_log(file: Path) -> list[dict]:
    """The lines of log.jsonl that are whole; it is for looking at, so a damaged line is passed over."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


class Stopped(BaseException):
    """A signal ended the work in good order."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 130 if number == signal.SIGINT else 0


class Stopping:
    """Between listen() and end() it notes Ctrl-C and SIGTERM; `asked` is then true in all processes."""

    def __init__(self):
        self.number, self.handlers = 0, {}

    def listen(self) -> None:
        self.handlers = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}

    def end(self) -> None:
        for number, handler in self.handlers.items():
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


DAMAGE = SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError
BAD_INPUT = (OSError, ValueError, HfHubHTTPError.__bases__[0], *DAMAGE)  # the last but those: of any request


def door(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main and end the process: 0 or what main returns; 1 after bad input, in one `error: ...`
    line; 130 after Ctrl-C, 0 after SIGTERM. A bug keeps its traceback."""
    if sys.version_info < (3, 11):  # noqa: UP036  pip installs on older ones, too
        sys.exit(f"error: this is Python {sys.version.split()[0]}, wanted 3.11 or later")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it is closed
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):  # what its code page lacks becomes a question mark
            stream.reconfigure(errors="replace")

    def terminated(number: int, frame) -> typing.NoReturn:
        raise Stopped(number, "terminated; the same command goes on where it was")

    signal.signal(signal.SIGTERM, terminated)
    status, message = 1, ""
    try:
        end = main() or 0
        sys.stdout.flush()
        status = end
    except (*BAD_INPUT, MemoryError, RuntimeError) as error:
        if not (isinstance(error, BAD_INPUT) or of_machine(error)):
            raise
        if not isinstance(error, BrokenPipeError) or heard("\n"):
            message = f"error: {brief(error)}"
    except Stopped as stopped:
        status, message = stopped.status, str(stopped)
    except KeyboardInterrupt:
        status, message = 130, "interrupted; the same command goes on where it was"
    if message:
        say(message)
    heard()
    sys.exit(status)


def heard(text: str = "") -> bool:
    """Can stdout be written to? If not, what is left for it goes nowhere."""
    try:
        print(text, end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def quiet() -> None:
    """No bar of a library but for downloads, nor remarks of nibabel on files and of the Hub's cache on being
    offline. A warning is its words, without the line of code that it comes from."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for name in ("nibabel.global", "huggingface_hub.hf_api"):
        logging.getLogger(name).setLevel(logging.ERROR)
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
    if lacks_memory(error):
        advice = "python extras/plan.py counts what options need; try --micro_batch 1, --checkpointing"
        text = f"out of memory ({text.splitlines()[0]}): {advice} or --optimizer adamw8bit"
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "\n".join(textwrap.shorten(line, 600) for line in lines[:3])


def say(text: str) -> None:
    """Print to stderr, by one process of a launch: the first that has something to say."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        marker = Path(tempfile.gettempdir(), f"cineneuron-{os.environ.get('MASTER_PORT', 0)}-{os.getppid()}")
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            if time.time() - marker.stat().st_mtime < 60:  # another process of this launch said it
                return
            marker.touch()  # an old launch left it
    print(text, file=sys.stderr)

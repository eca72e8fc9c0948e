"""Small networks on a CPU: one process a core is quicker than many threads in one process."""

import multiprocessing
import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator


def in_processes(work: Callable[[int, int], object], accelerator: Accelerator, processes: int) -> list:
    """work(rank, world) of this process of a launch. Where it is the only one, on a CPU, it is copied:
    work(k, processes) for each k, a thread each. Returns what they return, raises what the first raises.

    Nothing is sent to a copy: it has all that this process has. What it returns is plain, no tensor. That
    takes Linux.
    """
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu" and sys.platform == "linux"
    if not alone or processes == 1:
        return [work(accelerator.process_index, accelerator.num_processes)]
    fork = multiprocessing.get_context("fork")
    copies, pipes = [], []
    for k in range(processes):
        pipe, theirs = fork.Pipe(duplex=False)
        copies.append(fork.Process(target=_work, args=(work, k, processes, theirs), daemon=True))
        copies[-1].start()
        theirs.close()  # so that a copy that is killed ends the pipe
        pipes.append(pipe)
    try:
        return [_received(pipe, copy) for pipe, copy in zip(pipes, copies, strict=True)]
    finally:
        for copy in copies:
            copy.terminate()
            copy.join()


def _work(work: Callable[[int, int], object], k: int, processes: int, pipe) -> None:
    torch.set_num_threads(1)  # more would hang: OpenMP's threads are not copied
    try:
        result = work(k, processes)
    except BaseException as error:  # Ctrl-C, too
        result = error
    pipe.send(result)


def _received(pipe, copy) -> object:
    try:
        result = pipe.recv()
    except EOFError as error:  # killed, for want of memory perhaps
        copy.join()
        raise RuntimeError(f"a process ended with status {copy.exitcode}") from error
    if isinstance(result, BaseException):
        raise result
    return result

"""Small networks on a CPU: one process a core is quicker than many threads. They are forked: a copy has the
networks that this process has read, and imports nothing anew."""

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from accelerate import Accelerator

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends
SIGNALS = {signal.SIGINT, signal.SIGTERM}


def in_processes(work: Callable[[int, int], object], accelerator: Accelerator, processes: int) -> list:
    """work(rank, world) of this process of a launch. Where it is the only one, on a CPU under Linux, it is
    copied: work(k, processes) for each k, a thread each. Returns what they return (no tensors), raises what
    the first raises. However this process ends, its copies end with it."""
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu" and sys.platform == "linux"
    if not alone or processes == 1:
        return [work(accelerator.process_index, accelerator.num_processes)]
    fork = multiprocessing.get_context("fork")
    copies, receivers = [], []
    # Until a copy has handlers of its own, a signal waits: this process's would raise here, in the copy.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for k in range(processes):
            receiver, sender = fork.Pipe(duplex=False)
            copies.append(fork.Process(target=_copy, args=(work, k, processes, sender), daemon=True))
            copies[k].start()
            sender.close()  # a copy that is killed then ends the pipe
            receivers.append(receiver)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return [_result(receiver, copy) for receiver, copy in zip(receivers, copies, strict=True)]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for copy in copies:
            copy.terminate()
            copy.join()


def end_with_parent() -> None:
    """This process gets SIGTERM when its parent ends, however that does: under Linux."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _copy(work: Callable[[int, int], object], k: int, processes: int, sender: Connection) -> None:
    for number in SIGNALS:
        signal.signal(number, lambda *_: sys.exit(1))  # without a word: the parent speaks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    end_with_parent()
    torch.set_num_threads(1)  # more would hang: OpenMP's threads are not copied
    try:
        sender.send(work(k, processes))
    except Exception as error:
        sender.send(error)


def _result(receiver: Connection, copy: multiprocessing.Process) -> object:
    try:
        result = receiver.recv()
    except EOFError as error:  # killed, for want of memory perhaps
        copy.join()
        raise RuntimeError(f"a process ended with status {copy.exitcode}") from error
    if isinstance(result, Exception):
        raise result
    return result

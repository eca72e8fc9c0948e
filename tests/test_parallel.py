"""Copies of a process: what they return, raise and leave."""

import multiprocessing
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from metrics.parallel import in_processes

ALONE = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies take Linux")


def test_each_copy_does_its_share_with_one_thread_and_they_return_in_order():
    at_hand = torch.arange(10)  # not sent: a copy has it

    def work(k: int, n: int) -> tuple[int, int, int]:
        return os.getpid(), torch.get_num_threads(), int(at_hand[k::n].sum())

    torch.set_num_threads(2)
    pids, threads, sums = zip(*in_processes(work, ALONE, 3), strict=True)
    torch.set_num_threads(1)
    assert len({*pids, os.getpid()}) == 4 and threads == (1, 1, 1) and sums == (18, 12, 15)
    assert not multiprocessing.active_children()


def test_a_gpu_and_a_launch_of_several_are_not_copied():
    for place in (dict(device=torch.device("cuda")), dict(num_processes=2, process_index=1)):
        accelerator = SimpleNamespace(**(vars(ALONE) | place))
        (result,) = in_processes(lambda *of: (os.getpid(), of), accelerator, 3)
        assert result == (os.getpid(), (accelerator.process_index, accelerator.num_processes))


def test_an_error_in_a_copy_is_raised_here_and_ends_the_others_even_as_they_start():
    """The handler of the door raises: in a copy that has none of its own yet, it raised in the caller's code."""

    def terminated(*_) -> None:
        raise KeyboardInterrupt

    def work(k: int, n: int) -> None:
        if k == 0:
            raise ValueError("0007.mp4: found nothing")
        time.sleep(20)

    before, forks, parent = signal.signal(signal.SIGTERM, terminated), [], os.getpid()
    os.register_at_fork(before=lambda: forks.append(0), after_in_child=lambda: time.sleep(len(forks) == 2))
    try:
        with pytest.raises(ValueError, match="0007.mp4: found nothing"):
            in_processes(work, ALONE, 2)
        assert os.getpid() == parent and not multiprocessing.active_children()
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(RuntimeError, match="status -9"):
        in_processes(lambda k, n: os.kill(os.getpid(), signal.SIGKILL), ALONE, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_copy_outlives_its_parent(number):
    reader, writer = os.pipe()

    def work(k: int, n: int) -> None:
        os.write(writer, b"%d\n" % os.getpid())  # in one piece: two write at once
        signal.pause()

    parent = os.fork()
    if parent == 0:
        try:
            in_processes(work, ALONE, 2)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader) as pids:
        copies = [int(pids.readline()) for _ in range(2)]
    os.kill(parent, number)
    os.waitpid(parent, 0)
    for _ in range(100):
        alive = [pid for pid in copies if os.path.exists(f"/proc/{pid}")]
        time.sleep(0.1 if alive else 0)
    assert not alive

"""Work on many shards at a time, in worker processes that never outlive the command."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

__all__ = ["map_in_order"]

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


def map_in_order(
    function: Callable[[JobT], ResultT], jobs: Iterable[JobT], workers: int
) -> Generator[ResultT, None, None]:
    """Results in the order of the jobs, which are taken as they are needed.

    Args:
        function: Importable by name.
        jobs: Small enough to send to another process.
        workers: Processes; 1 works in this one.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    others = set(multiprocessing.active_children())
    # Not forked: torch's threads do not survive that.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: collections.deque[Future[ResultT]] = collections.deque()
    remaining = iter(jobs)
    try:
        # Twice as many as there are workers: none idles, and memory is bounded.
        waiting.extend(pool.submit(function, job) for job in itertools.islice(remaining, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(function, job) for job in itertools.islice(remaining, 1))
    except (KeyboardInterrupt, SystemExit):
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # a shard may take minutes; one that is not finished is made again
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C goes to all processes of a terminal. One that it ends within the pool's queues leaves their lock behind,
    # and the others wait for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch  # heavy, and only workers need it here

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers wait for ever when their parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

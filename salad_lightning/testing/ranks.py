"""Several processes of one run on this machine, as a launcher would start them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import salad_lightning

__all__ = ["finish_ranks", "start_ranks"]

_PORTS = range(20_000, 32_000)  # below those that Linux hands out, so that nothing else takes one before rank 0 does


def start_ranks(folder: Path, count: int, *command: str, name: str = "rank") -> list[subprocess.Popen[bytes]]:
    """Start ``python *command`` ``count`` times in ``folder``, each on one thread.

    Args:
        folder: The working folder; also has the logs, ``{name}-{rank}.log``, errors included.
        count: Processes.
        command: Arguments of Python.
        name: Of the logs.
    """
    # The package under test may be a copy that is not the installed one.
    package = str(Path(salad_lightning.__file__).parents[1])
    common = {**os.environ, "NODE_RANK": "0", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(_free_port()), "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(count):
        with (folder / f"{name}-{rank}.log").open("w") as output:
            environment = common | {"LOCAL_RANK": str(rank)}
            line = [sys.executable, *command]
            processes.append(
                subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
            )
    return processes


def finish_ranks(
    folder: Path, processes: Sequence[subprocess.Popen[bytes]], *, name: str = "rank", timeout_s: float = 400
) -> None:
    """Wait for all.

    Args:
        folder: As given to `start_ranks`.
        processes: Of `start_ranks`; none is left running.
        name: As given to `start_ranks`.
        timeout_s: For each.

    Raises:
        AssertionError: With the ends of the logs, if one does not end with 0, or in time.
    """
    codes: list[int | None] = []
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=timeout_s)
            codes.append(process.poll())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"{name}-{rank}.log").read_text()[-3000:] for rank in range(len(processes)))
    assert codes == [0] * len(processes), f"{codes}\n{logs}"


def _free_port() -> int:
    # Not from the global generator: a seeded run in each of two test processes would make both choose the same port,
    # and a rank of one would join the ranks of the other.
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port is free in {_PORTS}")

"""Starts commands; this package's own as forks of one process, for their imports take longer than many of them."""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from salad_lightning.errors import UserError
from salad_lightning.registry import MODEL_KINDS, load_all

__all__ = ["Launcher", "Process", "serve"]

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_SCRIPT = Path(sys.executable).with_name("salad-lightning")
# What the demo's steps import; by name, as some of it lies above this layer.
_IMPORTS = (
    *(f"salad_lightning.commands.{name}" for name in ("encode", "lightning", "select")),
    *(f"salad_lightning.corpus.{name}" for name in ("encode", "prepare", "shard_maker", "speaking", "split")),
    *(f"salad_lightning.demo.{name}" for name in ("encoder_training", "recognizer_training", "tokenizer")),
    *(f"salad_lightning.training.{name}" for name in ("callbacks", "misalignment_monitor", "spoken_evaluation")),
    "salad_lightning.selection.pipeline",
    "torch.utils.tensorboard",
    "transformers.models.qwen2.modeling_qwen2",
)


class Process(Protocol):
    """A command that has been started; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """The exit code, negative where a signal ended it; None while it runs."""


class Launcher:
    """Starts commands in a folder, on one thread each.

    Args:
        folder: Where they run.
        variables: Of their environment, beside this process's own.
    """

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._environment = os.environ | _ENVIRONMENT | dict(variables or {})
        self._opened: list[subprocess.Popen[bytes]] = []
        self._server: Connection | None = None

    def start(self, command: Sequence[str], log: Path) -> Process:
        """Start a command: this package's own as if in a new process, only sooner.

        Args:
            command: Program and arguments.
            log: Where all goes that it prints.

        Raises:
            UserError: If the process to fork from was ended.
        """
        if _is_own(command) and sys.platform == "linux":  # elsewhere a system library may not survive a fork
            self._server = self._server or self._serve()
            return _Fork(self._server, _asked(self._server, (list(command), log.resolve())))
        with log.open("wb") as output:
            return self._open(command, stdout=output, stderr=subprocess.STDOUT)

    def close(self) -> None:
        """End what still runs, and wait for it."""
        if self._server is not None:
            self._server.close()
        for process in self._opened:
            process.terminate()
        for process in self._opened:
            process.wait()

    def _serve(self) -> Connection:
        ours, theirs = Pipe()
        with theirs:
            code = f"from {__name__} import serve; serve({theirs.fileno()})"
            self._open([sys.executable, "-c", code], stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        return ours

    def _open(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, **options
        )
        self._opened.append(process)
        return process


@dataclass
class _Fork:
    server: Connection
    pid: int
    exit_code: int | None = None

    def poll(self) -> int | None:
        if self.exit_code is None:
            self.exit_code = _asked(self.server, self.pid)
        return self.exit_code


def _asked(server: Connection, request: Any) -> Any:
    try:
        server.send(request)
        return server.recv()
    except (EOFError, ConnectionError) as error:
        cure = "see whether memory ran out, and start again: what is finished is kept"
        raise UserError("the process that the commands are forked from was ended", cure=cure) from error


def serve(connection_fd: int) -> None:
    """Import, then fork for every command, and tell exit codes, until the connection ends; all forks end with it.

    Args:
        connection_fd: A `Connection` that brings ``(command, log)``, answered by the fork's PID, and PIDs, answered by
            the exit code or None.
    """
    # A signal to the whole process group is for the launcher, who ends the connection, and for the forks.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    for module in _IMPORTS:
        with suppress(Exception):  # told by the command that needs it
            importlib.import_module(module)
    load_all(MODEL_KINDS)
    gc.freeze()  # or each fork's collector goes through all of it, and so copies its memory
    connection, forks = Connection(connection_fd), set[int]()
    try:
        while True:
            request = connection.recv()
            if isinstance(request, int):
                ended, status = os.waitpid(request, os.WNOHANG)
                forks.discard(ended)
                connection.send(os.waitstatus_to_exitcode(status) if ended else None)
            elif pid := os.fork():
                forks.add(pid)
                connection.send(pid)
            else:
                break
    except (EOFError, ConnectionError):
        for pid in forks:
            os.kill(pid, signal.SIGTERM)
        for pid in forks:
            os.waitpid(pid, 0)
        return
    connection.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _become(*request)


def _is_own(command: Sequence[str]) -> bool:
    module = command[2] if command[:2] == [sys.executable, "-m"] else ""
    return command[0] == str(_SCRIPT) or module.partition(".")[0] == "salad_lightning"


def _become(command: list[str], log: Path) -> None:
    """What Python does with a command line; returning, or what is raised, ends the process as it would there."""
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if command[0] == sys.executable:
        sys.argv, sys.path[0] = command[2:], os.getcwd()
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, os.path.dirname(command[0])
        runpy.run_path(command[0], run_name="__main__")

"""Shards that a shell command writes to its output: ``pipe:…``."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress

__all__ = ["CommandFile", "is_command"]

_SCHEME = "pipe:"


def is_command(path: str) -> bool:
    """Whether a path names a command instead of a file."""
    return path.startswith(_SCHEME)


class CommandFile:
    """What a shell command writes, read once from start to end. A stall is the command's own to end.

    Args:
        path: ``pipe:`` and the command. It runs with all rights of this process: only for paths that may.

    Raises:
        OSError: From `read`, if the command fails.
    """

    def __init__(self, path: str) -> None:
        # A session of its own, so that all of a pipeline can be ended.
        self._process = subprocess.Popen(
            path.removeprefix(_SCHEME),
            shell=True,
            stdin=subprocess.DEVNULL,  # or it would wait for, or take, what is typed
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None  # asked for
        self._output = self._process.stdout

    def read(self, size: int) -> bytes:
        """``size`` bytes; fewer at the end."""
        piece = self._output.read(size)
        if not piece and (code := self._process.wait()):
            raise OSError(f"the command ended with code {code}")
        return piece

    def __enter__(self) -> CommandFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._output.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

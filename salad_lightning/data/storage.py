"""Shards on other machines: listed by pattern, read ahead, and read on where a connection broke."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import fsspec  # type: ignore[import-untyped]

from salad_lightning.data.commands import is_command
from salad_lightning.errors import UserError

__all__ = ["RemoteFile", "expand_remote", "is_remote"]

_PROTOCOLS = ("s3", "gs", "gcs", "https", "http", "memory")
_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.5
_STALL_S = 60.0
_CHUNK = 2**20
_CHUNKS_AHEAD = 16


def is_remote(path: str) -> bool:
    """Whether fsspec reads it.

    Raises:
        UserError: For a scheme that is not read: chained schemes (``zip::…``) unpack, and `pipe:` runs commands.
    """
    if is_command(path):
        raise UserError(
            "pipe: is not read here: it runs a command",
            where=path,
            cure="set `allow_pipe: true` of the source if you trust it; elsewhere run the command first",
        )
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", path)
    if scheme is None:
        return False
    if scheme[1] not in _PROTOCOLS or not path.startswith(f"{scheme[1]}://"):
        raise UserError(
            f"{scheme[1]}: is not read, only local files and {', '.join(_PROTOCOLS)}",
            where=path,
            cure="download the shards or mount their storage",
        )
    return True


def expand_remote(url: str) -> list[str]:
    """Shards that an address stands for: itself if it ends with .tar, what ``*`` matches, or the .tar files in it.

    Raises:
        UserError: If nothing is found, the storage does not answer, or the package that reads it is missing.
    """
    path = url.partition("?")[0]
    try:
        system, inner = fsspec.core.url_to_fs(url)
        if "*" not in path and path.endswith(".tar"):
            return [url]  # whether it is there shows when it is read: asking for thousands takes minutes
        pattern = inner if "*" in path else f"{inner.rstrip('/')}/*.tar"
        found = [system.unstrip_protocol(entry) for entry in system.glob(pattern)]
    except ImportError as error:
        raise UserError(f"a package is missing ({error})", where=url, cure="pip install it") from error
    except Exception as error:  # each storage has exceptions of its own
        raise UserError(f"cannot be listed ({type(error).__name__}: {error})", where=url, cure="check it") from error
    if not found:
        raise UserError("no shard matches", where=url, cure="check the address")
    return found


class RemoteFile:
    """A file read once from start to end, a thread ahead of its reader.

    A read that fails or brings nothing for a minute is taken up again where it stopped, after pauses that double.

    Args:
        url: Address that fsspec opens.

    Raises:
        OSError: From `read`, if the file is missing or attempts in a row bring nothing more.
    """

    def __init__(self, url: str) -> None:
        self._chunks, self._rest = _chunks(url), memoryview(b"")

    def read(self, size: int) -> bytes:
        """At least one byte and at most ``size``; none at the end."""
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._chunks.close()


def _chunks(url: str) -> Any:  # a generator, which mypy's Iterator has no close() for
    position = failures = 0
    while True:
        feed = _Feed(url, position)
        try:
            for chunk in feed:
                position, failures = position + len(chunk), 0
                yield chunk
            return
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            failures += 1
            if failures == _ATTEMPTS:
                raise OSError(f"{error}; tried {failures} times") from error
            time.sleep(_FIRST_PAUSE_S * 2 ** (failures - 1))
        finally:
            feed.stop()


class _Feed:
    """Reads a file in a thread; a read that never returns leaves its thread behind, and nothing else."""

    def __init__(self, url: str, position: int) -> None:
        self._queue: queue.Queue[bytes | Exception] = queue.Queue(_CHUNKS_AHEAD)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(url, position), daemon=True).start()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                item = self._queue.get(timeout=_STALL_S)
            except queue.Empty as error:
                raise TimeoutError(f"nothing came for {_STALL_S:.0f} s") from error
            if isinstance(item, OSError):
                raise item
            if isinstance(item, Exception):
                raise OSError(f"{type(item).__name__}: {item}") from item
            if not item:
                return
            yield item

    def stop(self) -> None:
        self._stopped.set()

    def _run(self, url: str, position: int) -> None:
        try:
            with fsspec.open(url, "rb") as file:
                _skip(file, position)
                while not self._stopped.is_set():
                    chunk = file.read(_CHUNK)
                    self._put(chunk)
                    if not chunk:
                        return
        except Exception as error:  # raised again in the reader
            self._put(error)

    def _put(self, item: bytes | Exception) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue


def _skip(file: Any, size: int) -> None:
    if not size:
        return
    try:
        file.seek(size)
    except (ValueError, OSError):  # a server that sends whole files only
        while size > 0:
            chunk = file.read(min(size, _CHUNK))
            if not chunk:
                raise OSError("the file became shorter") from None
            size -= len(chunk)

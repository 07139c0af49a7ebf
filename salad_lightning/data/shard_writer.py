"""Samples into numbered shards of a folder; `salad_lightning.data.format` says what is in them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import webdataset

from salad_lightning.data.format import AUDIO_EXTENSIONS, ENCODED_EXTENSIONS

__all__ = ["ShardWriter"]


class ShardWriter:
    """Writes samples into numbered shards of a folder; a shard gets its final name only when it is complete.

    The same samples give the same bytes. Use it as a context manager; after an exception the unfinished shard is gone.

    Args:
        folder: Made if missing.
        prefix: Shards are called ``{prefix}-{number:06d}.tar``.
        samples_per_shard: Samples in every shard but the last; 0 puts all into one that is called ``{prefix}.tar``.

    Attributes:
        paths: The finished shards.
    """

    def __init__(self, folder: str | Path, prefix: str, samples_per_shard: int = 1000) -> None:
        if samples_per_shard < 0:
            raise ValueError(f"samples_per_shard must be at least 0, got {samples_per_shard}")
        self.folder, self.prefix, self.samples_per_shard = Path(folder), prefix, samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.paths: list[Path] = []
        self._open: tuple[Any, Any] | None = None  # file, tar writer
        self._count = 0
        self._keys: set[str] = set()

    def write(self, key: str, record: dict[str, Any], audio: bytes | None = None, extension: str = "flac") -> None:
        """Append a sample.

        Args:
            key: Unique; without ``.`` behind the last ``/``, which WebDataset takes for the start of the extension.
            record: The JSON, with ``text``.
            audio: Content of an audio or ``.npy`` file, or None for plain text.
            extension: Its extension, one of `AUDIO_EXTENSIONS` or `ENCODED_EXTENSIONS`.

        Raises:
            ValueError: If the key has a dot or was used, or the extension is not read back.
        """
        if "." in key.rpartition("/")[2] or not key or key in self._keys:
            raise ValueError(f"keys must be new and without a dot, got {key!r}")
        if extension not in (*AUDIO_EXTENSIONS, *ENCODED_EXTENSIONS):
            raise ValueError(f"the extension {extension!r} is none of {AUDIO_EXTENSIONS + ENCODED_EXTENSIONS}")
        if self._open is None:
            file = open(self._temporary, "wb")  # noqa: SIM115 closed in _finish or __exit__
            # Fixed owner and time: the same samples give the same bytes.
            self._open = file, webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False)
        sample = {"__key__": key, "json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode()}
        if audio is not None:
            sample[extension] = audio
        self._open[1].write(sample)
        self._keys.add(key)
        self._count += 1
        if self._count == self.samples_per_shard:
            self._finish()

    @property
    def _temporary(self) -> Path:
        number = f"-{len(self.paths):06d}" if self.samples_per_shard else ""
        return self.folder / f".{self.prefix}{number}.tar.partial"

    def _close(self) -> None:
        if self._open is not None:
            file, tar = self._open
            tar.close()
            file.close()
            self._open, self._count = None, 0

    def _finish(self) -> None:
        temporary = self._temporary
        self._close()
        final = self.folder / temporary.name[1 : -len(".partial")]
        os.replace(temporary, final)
        self.paths.append(final)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is None:
            return
        if kind is None:
            self._finish()
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is under way
            self._close()
        self._temporary.unlink(missing_ok=True)

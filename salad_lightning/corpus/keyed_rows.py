"""Rows of a manifest with the keys they will have in shards, dealt to shards by number."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from salad_lightning import __version__
from salad_lightning.corpus.manifest import Row

__all__ = ["keyed", "row_batches", "rows_digest"]


def keyed(rows: Iterator[Row]) -> Iterator[tuple[str, Row]]:
    """Rows with their keys; a row whose key was used before becomes a broken one."""
    seen: set[int] = set()
    for number, row in enumerate(rows):
        values = dict(row.values)
        key = _key(values.pop("key", None), number)
        mark = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
        problem = row.problem or (
            f"keys must be new, got {key!r}; give every row its own `key`" if mark in seen else ""
        )
        seen.add(mark)
        yield key, Row(row.where, values, row.audio, problem)


def _key(key: Any, number: int) -> str:
    """The row's key or its number, as WebDataset takes it."""
    name = f"{number:09d}" if key in (None, "") else str(key)
    name = "".join(char if char.isalnum() or char in "-_" else "_" for char in name).strip("_") or f"{number:09d}"
    if len(name.encode()) <= 80:
        return name
    # Tar headers hold 100 bytes of name.
    return f"{name.encode()[:60].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def row_batches(rows: Iterator[tuple[str, Row]], size: int) -> Iterator[list[tuple[str, Row]]]:
    """The rows of every shard: ``size`` each, by number, before anything is decided about them."""
    while batch := list(itertools.islice(rows, size)):
        yield batch


def rows_digest(settings: dict[str, Any], batch: Sequence[tuple[str, Row]]) -> str:
    """Of everything that decides what a shard holds: this version, the settings, the rows with their keys, their files.

    Files are known by size and time.
    """
    rows = [
        [key, row.where, row.values, repr(row.audio), row.audio and row.audio.stamp(), row.problem]
        for key, row in batch
    ]
    content = json.dumps([__version__, settings, rows], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()

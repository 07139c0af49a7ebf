"""Embeddings on disk, read in blocks: what is mapped stays small, however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Vectors"]

_BLOCK_BYTES = 1 << 26
_ROWS_AT_ONCE = 1024


class Vectors:
    """A float32 ``.npy`` file ``[N, D]``.

    The file is mapped anew for every read, because the pages of one long-lived map would count as this process's
    memory until all of the file is in it.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shape: tuple[int, int] = np.load(self.path, mmap_mode="r").shape

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """All rows in order: the place of each block, and a copy of it, ``[n, D]``."""
        size = max(_BLOCK_BYTES // (4 * self.shape[1]), 1)
        for start in range(0, len(self), size):
            place = slice(start, min(start + size, len(self)))
            yield place, np.array(np.load(self.path, mmap_mode="r")[place], dtype=np.float32)

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Copies of some rows, ``[n, D]``; fastest in ascending order."""
        parts = [indices[i : i + _ROWS_AT_ONCE] for i in range(0, len(indices), _ROWS_AT_ONCE)]
        empty = np.empty((0, self.shape[1]), dtype=np.float32)
        return np.concatenate([empty, *(np.load(self.path, mmap_mode="r")[part] for part in parts)])

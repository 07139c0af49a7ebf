"""Clips of like length together, so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["length_batches"]


def length_batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices by length, shortest first, at most so many samples a batch; one clip may be longer by itself.

    Args:
        lengths: Samples of every clip.
        most: Samples of a batch, padding included.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and lengths[index] * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch

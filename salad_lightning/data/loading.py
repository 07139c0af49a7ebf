"""Loaders over streams: batches built in worker processes, errors as they were raised, equal counts on every rank."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from salad_lightning.batch import SpeechBatch
from salad_lightning.data.packing import collate
from salad_lightning.errors import UserError

__all__ = ["EndlessLoader", "InStepLoader", "StreamLoader"]


class StreamLoader:
    """A DataLoader over a stream that batches by itself.

    A user's mistake that a worker finds arrives as the `UserError` it was, not wrapped in the worker's traceback.

    Args:
        stream: Yields batches.
        num_workers: Processes; 0 builds batches in this one.
        keep_workers: Whether workers outlive one iteration.
    """

    def __init__(
        self, stream: IterableDataset[SpeechBatch], *, num_workers: int = 0, keep_workers: bool = False
    ) -> None:
        self._loader: DataLoader[SpeechBatch | UserError] = DataLoader(
            _Reporting(stream),
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=keep_workers and num_workers > 0,
            # Python 3.14 begins workers by copying all that the stream knows, the model's parts included.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[SpeechBatch]:
        return _raising(iter(self._loader))


class EndlessLoader(StreamLoader):
    """Goes on where it was when it is iterated again.

    Lightning begins a new iteration after every ``limit_train_batches``; a DataLoader would then start over and train
    on the same batches again.
    """

    _running: Generator[SpeechBatch, None, None] | None = None

    def __iter__(self) -> Iterator[SpeechBatch]:
        if self._running is None:
            self._running = _raising(iter(self._loader))
        return self._running

    def close(self) -> None:
        """End the workers now; left to the garbage collector among Lightning's cycles, each takes 5 s to end."""
        if self._running is not None:
            self._running.close()
            self._running = self._loader._iterator = None


class InStepLoader(StreamLoader):
    """Gives as many batches on every rank: ranks that run out early give empty ones.

    Uneven counts would leave the other ranks waiting in a collective for ever.

    Args:
        stream: Yields batches; finite.
        num_workers: Processes; 0 builds batches in this one.
        rows_per_batch: Rows of the empty batches.
        device: Where this rank's collectives run.
    """

    def __init__(
        self, stream: IterableDataset[SpeechBatch], *, num_workers: int, rows_per_batch: int, device: torch.device
    ) -> None:
        super().__init__(stream, num_workers=num_workers)
        self.rows_per_batch, self.device = rows_per_batch, device

    def __iter__(self) -> Iterator[SpeechBatch]:
        batches = super().__iter__()
        while True:
            batch = next(batches, None)
            more = torch.tensor([batch is not None], dtype=torch.int32, device=self.device)
            torch.distributed.all_reduce(more, torch.distributed.ReduceOp.MAX)
            if not int(more.item()):
                return
            yield batch or collate([], context=1, rows_per_batch=self.rows_per_batch, trim=True)


def _raising(items: Iterator[SpeechBatch | UserError]) -> Generator[SpeechBatch, None, None]:
    for item in items:
        if isinstance(item, UserError):
            del items  # or the traceback would keep the workers alive
            raise item
        yield item


class _Reporting(IterableDataset["SpeechBatch | UserError"]):
    """Yields a worker's `UserError` as its last item: torch would put a traceback into its message."""

    def __init__(self, stream: IterableDataset[SpeechBatch]) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[SpeechBatch | UserError]:
        try:
            yield from self.stream
        except UserError as error:
            if get_worker_info() is None:
                raise
            yield error

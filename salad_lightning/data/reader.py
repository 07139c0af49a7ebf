"""Undecoded samples of one source, endless, shuffled and dealt out to readers, from any place on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from salad_lightning.data.format import RawSample, read_shard
from salad_lightning.data.tolerance import Tolerance
from salad_lightning.errors import UserError

__all__ = ["PastReaders", "ShuffledReader", "read_shards"]

_BARREN_EPOCHS = 20


@dataclass(frozen=True)
class PastReaders:
    """How far another number of readers had come, before the samples were dealt anew.

    Attributes:
        cursors: ``(epoch, shard, sample)`` of every reader: all before it in its share was read.
    """

    cursors: Sequence[Sequence[int]]

    @property
    def first_epoch(self) -> int:
        """The earliest that one of them was in."""
        return min(cursor[0] for cursor in self.cursors)

    @property
    def last_epoch(self) -> int:
        """The latest."""
        return max(cursor[0] for cursor in self.cursors)

    def have_read(self, epoch: int, place: int, sample: int | None, num_shards: int) -> bool:
        """Whether a sample was read, or (None) surely all of a shard; ``place`` is the shard's in the epoch's order."""
        number = len(self.cursors)
        if num_shards < number:
            if sample is None:
                return False
            part, shard = (sample + place + epoch) % number, place
        else:
            part, shard = place % number, place // number
        if sample is None:
            return (epoch, shard) < tuple(self.cursors[part][:2])
        return (epoch, shard, sample) < tuple(self.cursors[part])


class ShuffledReader:
    """One of ``num_parts`` readers of a source, epoch by epoch, block by block.

    Shards are shuffled each epoch and dealt out; where there are fewer shards than readers, samples are dealt instead,
    every reader reading all shards. A block of samples is shuffled in memory.

    Args:
        name: Name of the source.
        paths: Its shards.
        seed: Decides every order.
        part: Number of this reader.
        num_parts: Readers.
        block_size: Samples shuffled together.
        tolerance: Takes note of shards that cannot be read; by default they are errors.
        past: Readers before the latest changes of ``num_parts``; what they read is left out.
        allow_pipe: Whether a path may be a command; see `Source`.
    """

    def __init__(
        self,
        name: str,
        paths: list[str],
        seed: int,
        part: int,
        num_parts: int,
        block_size: int,
        *,
        tolerance: Tolerance | None = None,
        past: Sequence[PastReaders] = (),
        allow_pipe: bool = False,
    ) -> None:
        self.name, self.paths, self.seed, self.block_size = name, paths, seed, block_size
        self.part, self.num_parts, self.past = part, num_parts, past
        self.tolerance, self.allow_pipe = tolerance or Tolerance(name), allow_pipe
        self.deal_samples = len(paths) < num_parts
        self._barren = 0  # epochs in a row without a sample
        self.seek({"epoch": past[-1].first_epoch if past else 0, "shard": 0, "sample": 0, "taken": 0})

    def cursor(self) -> dict[str, int]:
        """Start of the current block, and the samples taken from it."""
        epoch, shard, sample = self._start
        return {"epoch": epoch, "shard": shard, "sample": sample, "taken": self._taken}

    def seek(self, cursor: dict[str, int]) -> None:
        """Go to a cursor; the block is read when the next sample is asked for."""
        self._start = self._next_start = (cursor["epoch"], cursor["shard"], cursor["sample"])
        self._taken = cursor["taken"]
        self._block: list[RawSample] | None = None
        self._samples: Iterator[tuple[RawSample, tuple[int, int, int]]] | None = None

    def epoch(self) -> int:
        """The epoch that the next sample belongs to.

        Raises:
            UserError: As `next`.
        """
        self._have_sample()
        return self._start[0]

    def upcoming(self, count: int) -> list[RawSample]:
        """Samples that `next` will give, at least one and at most ``count``, all of one epoch; the cursor stays.

        Raises:
            UserError: As `next`.
        """
        return self._have_sample()[self._taken : self._taken + count]

    def next(self) -> tuple[RawSample, int]:
        """The next sample, and the epoch it belongs to.

        Raises:
            UserError: If the shards hold no sample, or more of them are unreadable than may be.
        """
        block = self._have_sample()
        self._taken += 1
        return block[self._taken - 1], self._start[0]

    def _have_sample(self) -> list[RawSample]:
        """The current block, with a sample that is not yet taken."""
        if self._block is None:
            self._block = self._read_block()
        # Not `==`: a block may have become shorter since the cursor was written, where a shard has.
        while self._taken >= len(self._block):
            self._start, self._taken = self._next_start, 0
            self._block = self._read_block()
        return self._block

    def _read_block(self) -> list[RawSample]:
        epoch = self._start[0]
        if self._samples is None:
            self._samples = self._read(*self._start)
        block: list[RawSample] = []
        self._next_start = (epoch + 1, 0, 0)
        for raw, after in self._samples:
            block.append(raw)
            if len(block) == self.block_size:
                self._next_start = after
                break
        else:
            self._samples = None
        random.Random(f"{self.seed}/{self.name}/{self._start}/{self.part}").shuffle(block)
        return block

    def _read(
        self, epoch: int, first_shard: int, first_sample: int
    ) -> Iterator[tuple[RawSample, tuple[int, int, int]]]:
        order = list(self.paths)
        random.Random(f"{self.seed}/{self.name}/{epoch}").shuffle(order)
        places = range(len(order)) if self.deal_samples else range(self.part, len(order), self.num_parts)
        seen = first_shard + first_sample
        for shard, place in list(enumerate(places))[first_shard:]:
            if any(readers.have_read(epoch, place, None, len(order)) for readers in self.past):
                seen += 1
                continue
            for sample, raw in enumerate(read_shards([order[place]], self.tolerance, allow_pipe=self.allow_pipe)):
                seen += 1
                if shard == first_shard and sample < first_sample:
                    continue
                # Turning with shard and epoch: no reader is always left without a sample of small shards.
                if self.deal_samples and (sample + place + epoch) % self.num_parts != self.part:
                    continue
                if any(readers.have_read(epoch, place, sample, len(order)) for readers in self.past):
                    continue
                yield raw, (epoch, shard, sample + 1)
        self._barren = 0 if seen else self._barren + 1
        # In the next epoch a reader of few shards has others of them.
        if self._barren > (0 if self.deal_samples or self.num_parts == 1 else _BARREN_EPOCHS):
            raise self.tolerance.last or UserError(
                "the shards hold no sample", where=", ".join(order[:3]), cure="write them again"
            )


def read_shards(paths: Iterable[str], tolerance: Tolerance, *, allow_pipe: bool = False) -> Iterator[RawSample]:
    """Samples of shards; of one that breaks off, those before, where ``tolerance`` allows it.

    Raises:
        UserError: If more shards are unreadable than may be.
    """
    for path in paths:
        tolerance.count("shard")
        try:
            yield from read_shard(path, allow_pipe=allow_pipe)
        except UserError as error:
            tolerance.skip("shard", error, path)

"""Streams of packed batches: an endless, resumable mixture for training, one pass over a source for evaluation.

A stream is a function of seed, world size and number of workers. Its position travels inside the batch
(`SpeechBatch.stream_state`): loaders prefetch, so only the batch that was trained on knows where training stands. Each
(rank, worker) reads its own share and keeps its own position, which is plain data::

    {"rank": 0, "worker": 0, "sources": {name: {"epoch", "shard", "sample", "taken", "positions"}}, "done": [0, 2, 3]}

``sources`` is where the stream stood before it drew the oldest document that was not yet in a batch, and ``done``
numbers the documents since then that were. Restoring reads again from the start of one block of each source.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from salad_lightning.batch import SpeechBatch
from salad_lightning.data.format import RawSample, Utterance, decode, read_shard
from salad_lightning.data.packing import PackedRows, collate, pack
from salad_lightning.data.segments import Document
from salad_lightning.data.sources import Source, shard_paths
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.errors import UserError

__all__ = ["EvaluationStream", "TrainingStream"]

_MAX_FRUITLESS_DRAWS = 10_000


class TrainingStream(IterableDataset[SpeechBatch]):
    """An endless mixture of sources in packed batches.

    Args:
        sources: Mixed by positions produced: the source furthest behind its weight is drawn from next.
        spec: Lengths and tokenizer of the model.
        rows_per_batch: Rows of ``spec.context`` positions in a batch.
        seed: Decides shard order, shuffling and every choice of the document builders.
        rank: This process among ``world_size`` that read different data.
        world_size: Processes.
        shuffle_block: Samples read and shuffled together.
        lookahead: Documents the packer chooses from.
        trim: Cut rows after the longest one of a batch.
        states: Positions to resume from, by worker.
        first_worker: Worker whose batch comes first; the loader takes them in turn.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        spec: SequenceSpec,
        *,
        rows_per_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_block: int = 512,
        lookahead: int = 32,
        trim: bool = False,
        states: dict[int, dict[str, Any]] | None = None,
        first_worker: int = 0,
    ) -> None:
        self.sources, self.paths = list(sources), [shard_paths(source) for source in sources]
        self.spec, self.rows_per_batch, self.seed = spec, rows_per_batch, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle_block, self.lookahead, self.trim = shuffle_block, lookahead, trim
        self.states, self.first_worker = states or {}, first_worker

    def __iter__(self) -> Iterator[SpeechBatch]:
        number, num_workers = _worker()
        worker = (number + self.first_worker) % num_workers
        part, num_parts = self.rank * num_workers + worker, self.world_size * num_workers
        readers = [
            _ShuffledReader(source.name, paths, self.seed, part, num_parts, self.shuffle_block)
            for source, paths in zip(self.sources, self.paths, strict=True)
        ]
        mixture = _Mixture(self.sources, readers, self.spec, self.seed)
        state = self.states.get(worker)
        if state is not None:
            mixture.restore(state["sources"])
        done = set(state["done"]) if state is not None else set()
        drawn = (item for item in mixture.draw() if item.ordinal not in done)
        for packed in pack(drawn, self.spec.context, self.rows_per_batch, lookahead=self.lookahead):
            yield collate(
                [[item.document for item in row] for row in packed.rows],
                context=self.spec.context,
                rows_per_batch=self.rows_per_batch,
                trim=self.trim,
                stream_state={"rank": self.rank, "worker": worker, **_position(packed)},
            )


class EvaluationStream(IterableDataset[SpeechBatch]):
    """One pass over a source: every sample once, in the order of the shards, dealt one by one to (rank, worker).

    Args:
        source: What is read; its builder's "shuffled" control is applied here, each sample taking the audio of the
            sample before it.
        spec: Lengths and tokenizer of the model.
        rows_per_batch: Rows in a batch, as wide as the longest of them.
        seed: Decides the choices of the document builder.
        rank: This process among ``world_size`` that read different data.
        world_size: Processes.
        lookahead: Documents the packer chooses from.
    """

    def __init__(
        self,
        source: Source,
        spec: SequenceSpec,
        *,
        rows_per_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lookahead: int = 32,
    ) -> None:
        self.source, self.paths, self.spec = source, shard_paths(source), spec
        self.rows_per_batch, self.seed, self.lookahead = rows_per_batch, seed, lookahead
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[SpeechBatch]:
        for packed in pack(self.documents(), self.spec.context, self.rows_per_batch, lookahead=self.lookahead):
            yield collate(packed.rows, context=self.spec.context, rows_per_batch=self.rows_per_batch, trim=True)

    def documents(self) -> Iterator[Document]:
        """Documents of this rank's and worker's share, before packing."""
        worker, num_workers = _worker()
        part, num_parts = self.rank * num_workers + worker, self.world_size * num_workers
        for index, (raw, other) in enumerate(self._paired()):
            if index % num_parts == part:
                utterance = self._decode(raw)
                if other is not None:
                    utterance = utterance.with_audio_of(self._decode(other))
                yield from self.source.documents.build(utterance, self.spec, seed=self.seed)

    def _decode(self, raw: RawSample) -> Utterance:
        return decode(raw, source=self.source.name, sample_rate_hz=self.spec.sample_rate_hz)

    def _paired(self) -> Iterator[tuple[RawSample, RawSample | None]]:
        """Samples, and whose audio they take instead of their own; the first, which takes the last's, comes last."""
        samples = (raw for path in self.paths for raw in read_shard(path))
        if self.source.documents.control != "shuffled":
            yield from ((raw, None) for raw in samples)
            return
        first = before = None
        for raw in samples:
            if not raw.has_audio:
                yield raw, None
                continue
            if before is None:
                first = raw
            else:
                yield raw, before
            before = raw
        if first is None or before is first:
            raise UserError(
                "fewer than two samples have audio to exchange", where=self.source.name, cure="drop `control: shuffled`"
            )
        yield first, before


@dataclass(frozen=True)
class _Drawn:
    """A document and what it takes to draw it again."""

    document: Document
    ordinal: int
    draw_ordinal: int  # ordinal of the first document of the same draw
    before: dict[str, dict[str, int]]  # where the mixture stood before that draw

    @property
    def num_positions(self) -> int:
        return self.document.num_positions


def _position(packed: PackedRows[_Drawn]) -> dict[str, Any]:
    oldest, latest = packed.pending[0], packed.pending[-1]  # an endless stream always has documents waiting
    waiting = {item.ordinal for item in packed.pending}
    since = range(oldest.draw_ordinal, latest.ordinal)
    done = [ordinal - oldest.draw_ordinal for ordinal in since if ordinal not in waiting]
    return {"sources": oldest.before, "done": done}


class _Mixture:
    """Draws documents from several sources so that positions produced follow the weights."""

    def __init__(
        self, sources: Sequence[Source], readers: Sequence[_ShuffledReader], spec: SequenceSpec, seed: int
    ) -> None:
        self.sources, self.readers, self.spec, self.seed = sources, readers, spec, seed
        self.positions = [0] * len(sources)

    def state(self) -> dict[str, dict[str, int]]:
        return {
            source.name: {**reader.cursor(), "positions": positions}
            for source, reader, positions in zip(self.sources, self.readers, self.positions, strict=True)
        }

    def restore(self, state: dict[str, dict[str, int]]) -> None:
        for index, source in enumerate(self.sources):
            self.readers[index].seek(state[source.name])
            self.positions[index] = state[source.name]["positions"]

    def draw(self) -> Iterator[_Drawn]:
        ordinal = fruitless = 0
        while True:
            index = min(range(len(self.sources)), key=lambda i: self.positions[i] / self.sources[i].weight)
            source, before, first = self.sources[index], self.state(), ordinal
            raw, epoch = self.readers[index].next()
            utterance = decode(raw, source=source.name, sample_rate_hz=self.spec.sample_rate_hz)
            documents = source.documents.build(utterance, self.spec, seed=self.seed, epoch=epoch)
            self.positions[index] += sum(document.num_positions for document in documents)
            fruitless = 0 if documents else fruitless + 1
            if fruitless > _MAX_FRUITLESS_DRAWS:
                raise UserError(f"{fruitless} samples in a row gave no document", where=source.name)
            for document in documents:
                yield _Drawn(document, ordinal, first, before)
                ordinal += 1


class _ShuffledReader:
    """Endless undecoded samples of one source for one of ``num_parts`` readers, epoch by epoch, block by block.

    Shards are shuffled each epoch and dealt out; where there are fewer shards than readers, samples are dealt instead,
    every reader reading all shards. A block of samples is shuffled in memory.
    """

    def __init__(self, name: str, paths: list[str], seed: int, part: int, num_parts: int, block_size: int) -> None:
        self.name, self.paths, self.seed, self.block_size = name, paths, seed, block_size
        self.part, self.num_parts = part, num_parts
        self.deal_samples = len(paths) < num_parts
        self.seek({"epoch": 0, "shard": 0, "sample": 0, "taken": 0})

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

    def next(self) -> tuple[RawSample, int]:
        """The next sample, and the epoch it belongs to."""
        if self._block is None:
            self._read_block()
        while self._taken == len(self._block or []):
            self._start, self._taken = self._next_start, 0
            self._read_block()
        assert self._block is not None
        self._taken += 1
        return self._block[self._taken - 1], self._start[0]

    def _read_block(self) -> None:
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
        self._block = block

    def _read(
        self, epoch: int, first_shard: int, first_sample: int
    ) -> Iterator[tuple[RawSample, tuple[int, int, int]]]:
        order = list(self.paths)
        random.Random(f"{self.seed}/{self.name}/{epoch}").shuffle(order)
        if not self.deal_samples:
            order = order[self.part :: self.num_parts]
        seen = first_shard + first_sample
        for shard in range(first_shard, len(order)):
            for sample, raw in enumerate(read_shard(order[shard])):
                seen += 1
                if shard == first_shard and sample < first_sample:
                    continue
                # Turning with shard and epoch: no reader is always left without a sample of small shards.
                if self.deal_samples and (sample + shard + epoch) % self.num_parts != self.part:
                    continue
                yield raw, (epoch, shard, sample + 1)
        if not seen:
            raise UserError("the shards hold no sample", where=", ".join(order[:3]), cure="write them again")


def _worker() -> tuple[int, int]:
    """This loading worker and how many there are; the main process is the only one where there are none."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)

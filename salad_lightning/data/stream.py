"""Streams of packed batches: an endless, resumable mixture for training, one pass over a source for evaluation.

A stream is a function of seed, world size and number of workers. Its position travels inside the batch
(`SpeechBatch.stream_state`): loaders prefetch, so only the batch that was trained on knows where training stands. Each
(rank, worker) reads its own share and keeps its own position, which is plain data::

    {"rank": 0, "worker": 0, "sources": {name: {"epoch", "shard", "sample", "taken", "positions"}}, "done": [0, 2, 3]}

``sources`` is where the stream stood before it drew the oldest document that was not yet in a batch, and ``done``
numbers the documents since then that were. Restoring reads again from the start of one block of each source. A sample
that cannot be used gives no document, today and when it is read again, so what is skipped changes no position.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from salad_lightning.batch import SpeechBatch
from salad_lightning.data.audio import decoded
from salad_lightning.data.format import RawSample, Utterance, decode
from salad_lightning.data.packing import PackedRows, collate, pack
from salad_lightning.data.reader import PastReaders, ShuffledReader, read_shards
from salad_lightning.data.segments import Document
from salad_lightning.data.sources import Source, shard_paths
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.tolerance import Tolerance
from salad_lightning.errors import UserError

__all__ = ["EvaluationStream", "TrainingStream"]

T = TypeVar("T")
_MAX_FRUITLESS_DRAWS = 10_000
_AT_A_TIME = 32  # samples: decoding one throws what all else works with out of the processor's caches
_MAX_BAD_FRACTION = 0.001  # of training sources that name none


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
        past: What other numbers of readers had read, of `past_readers`.
        skipped: File that lists what cannot be used; see `Tolerance`.
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
        past: Sequence[dict[str, Any]] = (),
        skipped: Path | None = None,
    ) -> None:
        self.sources, self.paths = list(sources), [shard_paths(source) for source in sources]
        self.spec, self.rows_per_batch, self.seed = spec, rows_per_batch, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle_block, self.lookahead, self.trim = shuffle_block, lookahead, trim
        self.states, self.first_worker = states or {}, first_worker
        self.past, self.skipped = past, skipped

    def __iter__(self) -> Iterator[SpeechBatch]:
        number, num_workers = _worker()
        worker = (number + self.first_worker) % num_workers
        part, num_parts = self.rank * num_workers + worker, self.world_size * num_workers
        readers = [
            self._reader(source, paths, part, num_parts) for source, paths in zip(self.sources, self.paths, strict=True)
        ]
        mixture = _Mixture(self.sources, readers, self.spec, self.seed)
        if self.past:
            mixture.positions = [self.past[-1][source.name]["positions"] // num_parts for source in self.sources]
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

    def _reader(self, source: Source, paths: list[str], part: int, num_parts: int) -> ShuffledReader:
        fraction = _MAX_BAD_FRACTION if source.max_bad_fraction is None else source.max_bad_fraction
        return ShuffledReader(
            source.name,
            paths,
            self.seed,
            part,
            num_parts,
            self.shuffle_block,
            tolerance=Tolerance(source.name, fraction, self.skipped),
            past=[PastReaders(layout[source.name]["cursors"]) for layout in self.past],
            allow_pipe=source.allow_pipe,
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
        skipped: File that lists what cannot be used, where the source allows such samples; see `Tolerance`.
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
        skipped: Path | None = None,
    ) -> None:
        self.source, self.paths, self.spec = source, shard_paths(source), spec
        self.rows_per_batch, self.seed, self.lookahead = rows_per_batch, seed, lookahead
        self.rank, self.world_size, self.skipped = rank, world_size, skipped

    def __iter__(self) -> Iterator[SpeechBatch]:
        for packed in pack(self.documents(), self.spec.context, self.rows_per_batch, lookahead=self.lookahead):
            yield collate(packed.rows, context=self.spec.context, rows_per_batch=self.rows_per_batch, trim=True)

    def documents(self) -> Iterator[Document]:
        """Documents of this rank's and worker's share, before packing."""
        worker, num_workers = _worker()
        part, num_parts = self.rank * num_workers + worker, self.world_size * num_workers
        tolerance = Tolerance(self.source.name, self.source.max_bad_fraction or 0.0, self.skipped)
        for index, (raw, other) in enumerate(self._paired(tolerance)):
            if index % num_parts == part:
                tolerance.count("sample")
                try:
                    yield from self._build(raw, other)
                except UserError as error:
                    tolerance.skip("sample", error, raw.shard, raw.key)

    def _build(self, raw: RawSample, other: RawSample | None) -> list[Document]:
        utterance = self._decode(raw)
        if other is not None:
            utterance = utterance.with_audio_of(self._decode(other))
        return self.source.documents.build(utterance, self.spec, seed=self.seed)

    def _decode(self, raw: RawSample) -> Utterance:
        return decode(raw, source=self.source.name, sample_rate_hz=self.spec.sample_rate_hz, keep_int16=True)

    def _paired(self, tolerance: Tolerance) -> Iterator[tuple[RawSample, RawSample | None]]:
        """Samples, and whose audio they take instead of their own; the first, which takes the last's, comes last."""
        samples = read_shards(self.paths, tolerance, allow_pipe=self.source.allow_pipe)
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
        self, sources: Sequence[Source], readers: Sequence[ShuffledReader], spec: SequenceSpec, seed: int
    ) -> None:
        self.sources, self.readers, self.spec, self.seed = sources, readers, spec, seed
        self.positions = [0] * len(sources)
        # Of each source's next samples: their documents, or what is wrong with them.
        self.made: list[deque[list[Document] | UserError]] = [deque() for _ in sources]

    def state(self) -> dict[str, dict[str, int]]:
        return {
            source.name: {**reader.cursor(), "positions": positions}
            for source, reader, positions in zip(self.sources, self.readers, self.positions, strict=True)
        }

    def restore(self, state: dict[str, dict[str, int]]) -> None:
        for index, source in enumerate(self.sources):
            self.readers[index].seek(state[source.name])
            self.made[index].clear()
            self.positions[index] = state[source.name]["positions"]

    def draw(self) -> Iterator[_Drawn]:
        ordinal = fruitless = 0
        while True:
            index = min(self._open(), key=lambda i: self.positions[i] / self.sources[i].weight)
            source, before, first = self.sources[index], self.state(), ordinal
            documents = self._documents(index)
            self.positions[index] += sum(document.num_positions for document in documents)
            fruitless = 0 if documents else fruitless + 1
            if fruitless > _MAX_FRUITLESS_DRAWS:
                raise UserError(f"{fruitless} samples in a row gave no document", where=source.name)
            for document in documents:
                yield _Drawn(document, ordinal, first, before)
                ordinal += 1

    def _open(self) -> list[int]:
        """Sources that may still be read."""
        limits = [source.max_epochs for source in self.sources]
        left = [i for i, limit in enumerate(limits) if limit is None or self.readers[i].epoch() < limit]
        if not left:
            raise UserError(
                "every source has been read as often as it may be",
                where="data.train",
                cure="lower `max_steps`; or raise `max_epochs` of a source or leave it out, and start afresh from the "
                "weights alone (`init_from`): a checkpoint is resumed with the same `max_epochs` only",
            )
        return left

    def _documents(self, index: int) -> list[Document]:
        """Of the next sample of a source; none if it cannot be used."""
        reader, made = self.readers[index], self.made[index]
        if not made:
            made.extend(self._make(self.sources[index], reader.upcoming(_AT_A_TIME), reader.epoch()))
        raw, _ = reader.next()
        reader.tolerance.count("sample")
        documents = made.popleft()
        if isinstance(documents, UserError):
            reader.tolerance.skip("sample", documents, raw.shard, raw.key)
            return []
        return documents

    def _make(self, source: Source, raws: Sequence[RawSample], epoch: int) -> list[list[Document] | UserError]:
        rate, build = self.spec.sample_rate_hz, source.documents.build
        read = [_tried(decode, raw, source=source.name, sample_rate_hz=rate, late=True) for raw in raws]
        built = [_tried(build, utterance, self.spec, seed=self.seed, epoch=epoch) for utterance in read]
        return [_tried(_heard, documents) for documents in built]


def _heard(documents: list[Document]) -> list[Document]:
    """What they hear of the audio is decoded; what they only read is not."""
    for document in documents:
        document.clips[:] = map(decoded, document.clips)
    return documents


def _tried(function: Callable[..., T], value: Any, *args: Any, **settings: Any) -> T | UserError:
    """What it makes of a value, or what is wrong with that, now or before."""
    if isinstance(value, UserError):
        return value
    try:
        return function(value, *args, **settings)
    except UserError as error:
        return error


def _worker() -> tuple[int, int]:
    """This loading worker and how many there are; the main process is the only one where there are none."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)

"""The data of a run: sources to dataloaders, and the position of the training stream to checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from salad_lightning.batch import SpeechBatch
from salad_lightning.data.commands import is_command
from salad_lightning.data.loading import EndlessLoader, InStepLoader, StreamLoader
from salad_lightning.data.resharding import past_readers
from salad_lightning.data.sources import Source, check_sources, shard_paths
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.storage import is_remote
from salad_lightning.data.stream import EvaluationStream, TrainingStream
from salad_lightning.errors import UserError

__all__ = ["SpeechDataModule"]


class SpeechDataModule(LightningDataModule):
    """Packed batches of speech and text for training and evaluation.

    Lengths and tokenizer come from the model (``sequence_spec()`` of the LightningModule). Whoever trains must call
    `note_trained` for every batch of an optimizer step when it is taken, so that a checkpoint knows where to go on.
    What cannot be used is listed in ``skipped.jsonl`` of the run's folder (of rank 1: ``skipped-rank1.jsonl``, and so
    on).

    Args:
        train: Sources mixed for training, endless.
        val: Sources to validate on, each read once and in order; one dataloader each.
        test: Sources to test on, and to predict.
        rows_per_batch: Rows of ``context`` positions in a training batch, per process.
        eval_rows_per_batch: Rows in an evaluation batch.
        num_workers: Processes that read and build batches; 0 builds them in the training process.
        seed: Decides order, mixture and every random choice of the document builders.
        shuffle_block: Samples of a source that are read and shuffled together.
        lookahead: Documents the packer chooses from; more fill rows better and hold more audio in memory.
        trim_rows: Cut training rows after the longest one of a batch. Off, every batch has the same shape.
        allow_reshard: Resume a checkpoint of another number of processes or workers too: no longer exactly, but no
            sample is left out, and those of one block of each earlier reader are trained on once more.
    """

    def __init__(
        self,
        train: list[Source] | None = None,
        val: list[Source] | None = None,
        test: list[Source] | None = None,
        rows_per_batch: int = 8,
        eval_rows_per_batch: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_block: int = 512,
        lookahead: int = 32,
        trim_rows: bool = False,
        allow_reshard: bool = False,
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, val, test
        for key, sources in (("train", train), ("val", val), ("test", test)):
            if sources is not None:
                check_sources(sources, f"data.{key}")
        for key, count, least in (
            ("rows_per_batch", rows_per_batch, 1),
            ("eval_rows_per_batch", eval_rows_per_batch, 1),
            ("shuffle_block", shuffle_block, 1),
            ("lookahead", lookahead, 1),
            ("num_workers", num_workers, 0),
        ):
            if count < least:
                raise UserError(f"{count} is too small", where=f"data.{key}", cure=f"give {least} or more")
        for source in train or []:
            if source.documents.control == "shuffled":
                raise UserError("the shuffled control is for evaluation", where=f"data.train: {source.name}")
        self.rows_per_batch, self.eval_rows_per_batch, self.num_workers = (
            rows_per_batch,
            eval_rows_per_batch,
            num_workers,
        )
        self.seed, self.shuffle_block, self.lookahead, self.trim_rows = seed, shuffle_block, lookahead, trim_rows
        self.allow_reshard = allow_reshard
        self.spec: SequenceSpec | None = None
        self._positions: dict[int, dict[str, Any]] = {}  # of this rank, by worker
        self._last_worker = -1
        self._past: list[dict[str, Any]] = []  # of other numbers of readers, before
        self._digest: str | None = None
        self._train_loader: EndlessLoader | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sources, in the order of their dataloaders."""
        return [source.name for source in self.val or []]

    @property
    def test_names(self) -> list[str]:
        """Names of the test sources, in the order of their dataloaders."""
        return [source.name for source in self.test or []]

    def setup(self, stage: str | None = None) -> None:
        """Ask the model for its `SequenceSpec`; without a trainer, set ``spec`` yourself."""
        if self.trainer is not None:
            module: Any = self.trainer.lightning_module  # any module with a sequence_spec() serves
            self.spec = module.sequence_spec()
            if stage == "fit" and not self.trainer.global_step:  # another run than the one before; a restore follows
                self._positions, self._last_worker, self._past, self._digest = {}, -1, [], None

    def teardown(self, stage: str | None = None) -> None:
        """End the training loader's workers."""
        if self._train_loader is not None:
            self._train_loader.close()
            self._train_loader = None

    def train_dataloader(self) -> Iterable[SpeechBatch]:
        """Endless; goes on after the batch last told to `note_trained`.

        Raises:
            UserError: If there is nothing to train on, or a checkpoint's stream is another one.
        """
        if self.train is None:
            raise UserError("there is nothing to train on", where="data.train", cure="list at least one source")
        self.teardown()
        self._restore()
        rank, world_size = self._rank()
        stream = TrainingStream(
            self.train,
            self._spec(),
            rows_per_batch=self.rows_per_batch,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            shuffle_block=self.shuffle_block,
            lookahead=self.lookahead,
            trim=self.trim_rows,
            states=dict(self._positions),
            first_worker=(self._last_worker + 1) % max(self.num_workers, 1),
            past=self._past,
            skipped=self.skipped_listing(),
        )
        self._train_loader = EndlessLoader(stream, num_workers=self.num_workers, keep_workers=True)
        return self._train_loader

    def val_dataloader(self) -> list[Iterable[SpeechBatch]]:
        """One finite loader for each source of ``val``."""
        return self._evaluation(self.val or [])

    def test_dataloader(self) -> list[Iterable[SpeechBatch]]:
        """One finite loader for each source of ``test``.

        Raises:
            UserError: If there is nothing to test on.
        """
        if self.test is None:
            raise UserError("there is nothing to test on", where="data.test", cure="list at least one source")
        return self._evaluation(self.test)

    def predict_dataloader(self) -> list[Iterable[SpeechBatch]]:
        """The test loaders."""
        return self.test_dataloader()

    def note_trained(self, stream_state: dict[str, Any]) -> None:
        """Remember where the stream stood after a batch: loaders run ahead, so only the trained batch knows.

        Args:
            stream_state: See `SpeechBatch`; empty for a batch that is of no stream.
        """
        if stream_state:
            self._last_worker = stream_state["worker"]
            self._positions[self._last_worker] = stream_state

    def state_dict(self) -> dict[str, Any]:
        """Position of the training stream, of every rank; to be called on all ranks, as Lightning does."""
        if self.train is None or self.spec is None:
            return {}
        rank, world_size = self._rank()
        mine = {"last_worker": self._last_worker, "workers": dict(self._positions)}
        ranks = {rank: mine}
        if world_size > 1 and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, (rank, mine))
            ranks = dict(gathered)
        return {**self._identity(), "ranks": ranks, "past": self._past}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict`; checked when the training loader is made, once world and model are known."""
        if self.trainer is None or self.trainer.state.fn in (None, TrainerFn.FITTING):
            self._restored = state_dict or None

    def skipped_listing(self) -> Path | None:
        """The file in which this process lists what could not be used; None without a trainer."""
        if self.trainer is None:
            return None
        rank, _ = self._rank()
        return Path(self.trainer.default_root_dir) / (f"skipped-rank{rank}.jsonl" if rank else "skipped.jsonl")

    def _restore(self) -> None:
        if self._restored is None:
            return
        state, self._restored = {"past": [], **self._restored}, None
        mine, may_differ = self._identity(), ("world_size", "num_workers") if self.allow_reshard else ()
        for name, value in mine.items():
            if state.get(name) != value and name not in may_differ:
                raise UserError(
                    f"the checkpoint's data stream has {name} {state.get(name)!r}, this run has {value!r}",
                    where="ckpt_path",
                    cure="resume with the same data, processes and workers; for other processes and workers set "
                    "`data.allow_reshard: true`; or start afresh from the weights alone",
                )
        if any(state[name] != mine[name] for name in may_differ):
            self._reshard(state)
            return
        self._past, position = state["past"], state["ranks"][self._rank()[0]]
        self._last_worker, self._positions = position["last_worker"], dict(position["workers"])

    def _reshard(self, state: dict[str, Any]) -> None:
        """Go on from what another number of readers read."""
        names = [source.name for source in self.train or []]
        self._past = past_readers(state, names)
        again = ", ".join(f"{self._past[-1][name]['again']} of {name!r}" for name in names)
        rank_zero_info(
            f"The data stream goes on with {self._rank()[1]} × {max(self.num_workers, 1)} readers "
            f"(processes × workers) in place of {state['world_size']} × {state['num_workers']}. "
            f"Samples trained on once more, at most: {again}."
        )

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a position to mean the same."""
        if self._digest is None:
            self._digest = self._fingerprint()
        return {
            "world_size": self._rank()[1],
            "num_workers": max(self.num_workers, 1),
            "fingerprint": self._digest,
        }

    def _fingerprint(self) -> str:
        # `max_epochs` only where there is one, so that checkpoints made before it was noted stay good.
        sources = [
            [
                *(source.name, source.weight, source.documents.fingerprint(), _files(shard_paths(source))),
                *([] if source.max_epochs is None else [source.max_epochs]),
            ]
            for source in self.train or []
        ]
        settings = [self.seed, self.shuffle_block, self.lookahead, self.rows_per_batch, self._spec().context]
        return hashlib.sha256(json.dumps([sources, settings]).encode()).hexdigest()[:16]

    def _evaluation(self, sources: Sequence[Source]) -> list[Iterable[SpeechBatch]]:
        rank, world_size = self._rank()
        loaders: list[Iterable[SpeechBatch]] = []
        for source in sources:
            stream = EvaluationStream(
                source,
                self._spec(),
                rows_per_batch=self.eval_rows_per_batch,
                seed=self.seed,
                rank=rank,
                world_size=world_size,
                lookahead=self.lookahead,
                skipped=self.skipped_listing(),
            )
            if world_size == 1:
                loaders.append(StreamLoader(stream, num_workers=self.num_workers))
            else:
                loaders.append(
                    InStepLoader(
                        stream,
                        num_workers=self.num_workers,
                        rows_per_batch=self.eval_rows_per_batch,
                        device=self._device(),
                    )
                )
        return loaders

    def _spec(self) -> SequenceSpec:
        if self.spec is None:
            raise ValueError("setup() has not been called, and `spec` is not set")
        return self.spec

    def _rank(self) -> tuple[int, int]:
        """Rank and number of processes that read different data; under tensor parallelism fewer than the world."""
        if self.trainer is None:
            return 0, 1
        kwargs = self.trainer.distributed_sampler_kwargs or {}
        return int(kwargs.get("rank", 0)), int(kwargs.get("num_replicas", 1))

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")


def _files(paths: Sequence[str]) -> list[tuple[str, int]]:
    # Asking a remote storage for thousands of sizes takes minutes; a command has none.
    return [
        (path, -1) if is_command(path) else (os.path.basename(path), -1 if is_remote(path) else os.path.getsize(path))
        for path in paths
    ]

"""Runs a frozen encoder once over shards.

Samples keep their key, text and word times; the audio gives way to what `Encoder.encode` makes of it, the whole
utterance at a time. A causal encoder's frames can then be cut anywhere; what another encoder stored serves only
documents that hear whole utterances, and the document builders refuse the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from salad_lightning import __version__
from salad_lightning.corpus.length_batches import length_batches
from salad_lightning.corpus.limits import check_limits, check_positive
from salad_lightning.corpus.output_folder import PARTIAL
from salad_lightning.corpus.workspace import open_workspace
from salad_lightning.corpus.written_shard import Sample, published, shard_digest, shards_by_name, write_shard
from salad_lightning.data.arrays import encode_array
from salad_lightning.data.format import Utterance, decode, read_shard
from salad_lightning.data.packing import pad
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder

__all__ = ["encode_shards"]

_COLUMNS = ("name", "num_samples", "seconds", "sha256")


def encode_shards(
    shards: str | Sequence[str],
    output: str | Path,
    encoder: Encoder,
    *,
    dtype: str = "float16",
    batch_seconds: float = 240.0,
    num_workers: int = 0,
    accelerator: str = "auto",
    devices: str | int = "auto",
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Write a shard of codes or frames for every shard of audio; goes on where an earlier run was killed.

    Args:
        shards: As `Source.shards`.
        output: Folder; made where missing. A shard appears in it when it is complete, ``index.json`` comes last.
        encoder: What training will use.
        dtype: How frames are stored. numpy has no bfloat16; float16 is finer.
        batch_seconds: Padded audio at a time.
        num_workers: Processes that read and decode whole shards ahead.
        accelerator: As Lightning's Trainer takes it.
        devices: As Lightning's Trainer takes it; each device takes whole shards.
        overwrite: Replace the shards that the folder's index lists.

    Returns:
        The content of ``index.json``, with counts, seconds and SHA-256 in all and by shard; None on all ranks but the
        first.

    Raises:
        UserError: If a number is out of range, a shard cannot be read, two have one name, the folder holds other files
            or the shards themselves, or the disk is full.
    """
    check_positive("--batch-seconds", batch_seconds, "s")
    check_limits("--workers", num_workers, 0)
    output, names = Path(output), shards_by_name(shards)
    trainer = _trainer(output, accelerator, devices)
    identity = encoder.identity()  # once: it reads all weights
    made_with = [__version__, identity, dtype]
    loop = _Loop(encoder, identity, output / PARTIAL, made_with, batch_seconds=batch_seconds, num_workers=num_workers)
    if not trainer.is_global_zero:
        _encode(trainer, loop, [])
        return None
    if (done := published(output, made_with, names.values())) is not None:
        _encode(trainer, loop, [])
        return done
    with open_workspace(output, overwrite=overwrite, inputs=names.values()) as space:
        # What an earlier run finished is hashed here, the rest where it is read.
        todo = [
            path
            for name, path in names.items()
            if not (space.folder / f"{name}.json").exists()
            or space.finished(name, shard_digest(made_with, path)) is None
        ]
        _encode(trainer, loop, todo)
        reports = [json.loads((space.folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
        request = json.dumps([report["digest"] for report in reports])
        reports = [report for report in reports if report["num_samples"]]
        if not reports:
            raise UserError("there is no sample", where="shards", cure="give shards of audio")
        index = {
            "encoder": identity,
            "num_samples": sum(report["num_samples"] for report in reports),
            "seconds": round(sum(report["seconds"] for report in reports), 3),
            "shards": [{column: report[column] for column in _COLUMNS} for report in reports],
        }
        return space.publish(request, {report["name"]: report["name"] for report in reports}, index)


def _trainer(output: Path, accelerator: str, devices: str | int) -> pl.Trainer:
    try:
        return pl.Trainer(
            accelerator=accelerator, devices=devices, logger=False, enable_checkpointing=False,
            enable_model_summary=False, default_root_dir=output, use_distributed_sampler=False,
        )  # fmt: skip
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(
            f"{accelerator} and {devices} name no device here ({error})",
            where="--accelerator, --devices",
            cure="give --devices 1 or more, or leave both out",
        ) from error


def _encode(trainer: pl.Trainer, loop: _Loop, todo: list[str]) -> None:
    """Encode what is left, on all ranks; ``todo`` counts on rank 0 alone."""
    loop.todo = todo
    if todo or trainer.world_size > 1:  # the other ranks wait for rank 0, even where nothing is left
        trainer.predict(loop, return_predictions=False)
        trainer.strategy.barrier()  # another process may still be writing its last shard


class _Shard(NamedTuple):
    path: str
    digest: str
    utterances: list[Utterance]
    records: list[dict[str, Any]]


class _Shards(Dataset[_Shard]):
    """Whole shards, read and decoded."""

    def __init__(self, paths: Sequence[str], made_with: Sequence[str], sample_rate_hz: int) -> None:
        self.paths, self.made_with, self.sample_rate_hz = list(paths), made_with, sample_rate_hz

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Shard:
        utterances, records = [], []
        digest = shard_digest(self.made_with, self.paths[index])
        for raw in read_shard(self.paths[index]):
            utterance = decode(raw, source="", sample_rate_hz=self.sample_rate_hz)
            if utterance.audio is None:
                raise UserError("the sample has no audio", where=utterance.where, cure="encode shards of audio")
            utterances.append(utterance)
            records.append(json.loads(raw.members["json"]))
        return _Shard(self.paths[index], digest, utterances, records)


class _Loop(pl.LightningModule):
    """Lightning's predict loop over whole shards: one device or many, one progress bar."""

    def __init__(
        self,
        encoder: Encoder,
        identity: str,
        folder: Path,
        made_with: list[str],
        *,
        batch_seconds: float,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.encoder, self.identity, self.folder, self.made_with = encoder, identity, folder, made_with
        self.batch_seconds, self.num_workers = batch_seconds, num_workers
        self.todo: list[str] = []
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards may be left than there are ranks

    def predict_dataloader(self) -> DataLoader[_Shard]:
        """This rank's part of what rank 0 says is left: others may look before or after rank 0 changes the folder."""
        # Dealt here: Lightning's sampler wants a shard for every rank.
        todo = self.trainer.strategy.broadcast(self.todo)[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(
            _Shards(todo, self.made_with, self.encoder.sample_rate_hz), batch_size=None, num_workers=self.num_workers
        )

    def transfer_batch_to_device(self, batch: _Shard, device: torch.device, dataloader_idx: int) -> _Shard:
        """A shard stays on the host; its batches go one by one."""
        return batch

    def predict_step(self, shard: _Shard, batch_idx: int) -> None:
        stored: dict[int, NDArray[Any]] = {}
        rate = self.encoder.sample_rate_hz
        for rows in length_batches([u.num_samples for u in shard.utterances], round(self.batch_seconds * rate)):
            audio, lengths = pad([shard.utterances[row].audio for row in rows])  # type: ignore[misc]
            output = self.encoder.encode(audio.to(self.device), lengths.to(self.device))
            for row, data, length in zip(rows, output.data.cpu(), output.lengths.tolist(), strict=True):
                stored[row] = self._narrow(data[:length], shard.utterances[row].where)
        name = Path(shard.path).name
        write_shard(self.folder, name, shard.digest, self._samples(shard, stored))

    def _narrow(self, data: torch.Tensor, where: str) -> NDArray[Any]:
        if not data.is_floating_point():
            values: NDArray[Any] = data.numpy()
            smallest = np.min_scalar_type(int(values.max())) if values.min() >= 0 else np.dtype(np.int64)
            return values.astype(smallest)
        narrow = data.float().numpy().astype(self.made_with[-1])
        if not np.isfinite(narrow).all():
            raise UserError(f"a frame does not fit {self.made_with[-1]}", where=where, cure="use --dtype float32")
        return narrow

    def _samples(self, shard: _Shard, stored: dict[int, NDArray[Any]]) -> Iterator[Sample]:
        rate = self.encoder.sample_rate_hz
        for row, (utterance, record) in enumerate(zip(shard.utterances, shard.records, strict=True)):
            record = {**record, "encoded": {"by": self.identity, "num_samples": utterance.num_samples}}
            kind = "codes.npy" if stored[row].dtype.kind in "iu" else "frames.npy"
            yield Sample(utterance.key, record, encode_array(stored[row]), kind, utterance.num_samples / rate)

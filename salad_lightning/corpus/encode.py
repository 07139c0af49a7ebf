"""Runs a frozen encoder once over shards.

Samples keep their key, text and word times; the audio gives way to what `Encoder.encode` makes of it, the whole
utterance at a time. A causal encoder's frames can then be cut anywhere; what another encoder stored serves only
documents that hear whole utterances, and the document builders refuse the rest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from salad_lightning.corpus.length_batches import length_batches
from salad_lightning.corpus.output_folder import INDEX, PARTIAL, replaceable, sha256_of
from salad_lightning.corpus.workspace import write_aside
from salad_lightning.data.arrays import encode_array
from salad_lightning.data.format import Utterance, decode, read_shard
from salad_lightning.data.packing import pad
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import expand_shards
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder

__all__ = ["encode_shards"]

_PLAN = "plan.json"


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
        UserError: If a shard cannot be read, two have one name, or the folder holds other files.
    """
    if batch_seconds <= 0:
        raise UserError(f"{batch_seconds} s of audio are nothing to encode", where="--batch-seconds", cure="give > 0")
    output, identity = Path(output), encoder.identity()
    names: dict[str, str] = {}
    for path in expand_shards(shards):
        name = Path(path).name
        if name in names:
            raise UserError(
                f"{names[name]} and {path} have one name", where="shards", cure="encode them into two folders"
            )
        names[name] = path
    plan = {"encoder": identity, "dtype": dtype, "shards": {name: Path(p).stat().st_size for name, p in names.items()}}
    old = replaceable(output, overwrite)
    partial = _open(output, plan)
    todo = [path for name, path in names.items() if not _entry_path(partial, name).exists()]
    loader = DataLoader(_Shards(todo, encoder.sample_rate_hz), batch_size=None, num_workers=num_workers)
    trainer = pl.Trainer(
        accelerator=accelerator, devices=devices, logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=partial,
    )  # fmt: skip
    if todo:
        trainer.predict(_Loop(encoder, partial, identity, dtype, batch_seconds), loader, return_predictions=False)
    if not trainer.is_global_zero:
        return None
    entries = [json.loads(_entry_path(partial, name).read_text()) for name in names]
    index = {
        "encoder": identity,
        "num_samples": sum(entry["num_samples"] for entry in entries),
        "seconds": round(sum(entry["seconds"] for entry in entries), 3),
        "shards": entries,
    }
    for replaced in old:
        replaced.unlink(missing_ok=True)
    for name in names:
        (partial / name).replace(output / name)
    write_aside(output / INDEX, json.dumps(index, indent=2) + "\n")
    shutil.rmtree(partial)
    return index


def _open(output: Path, plan: dict[str, Any]) -> Path:
    """The folder where finished shards wait for the others; what an earlier run of the same plan left stays."""
    partial, note = output / PARTIAL, json.dumps(plan, sort_keys=True)
    if partial.exists() and not ((partial / _PLAN).exists() and (partial / _PLAN).read_text() == note):
        shutil.rmtree(partial)  # another encoder's, or other shards'
    partial.mkdir(parents=True, exist_ok=True)
    (partial / _PLAN).write_text(note)
    return partial


def _entry_path(partial: Path, name: str) -> Path:
    return partial / f"{name}.entry.json"


class _Shard(NamedTuple):
    path: str
    utterances: list[Utterance]
    records: list[dict[str, Any]]


class _Shards(Dataset[_Shard]):
    """Whole shards, read and decoded."""

    def __init__(self, paths: Sequence[str], sample_rate_hz: int) -> None:
        self.paths, self.sample_rate_hz = list(paths), sample_rate_hz

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Shard:
        utterances, records = [], []
        for raw in read_shard(self.paths[index]):
            utterance = decode(raw, source="", sample_rate_hz=self.sample_rate_hz)
            if utterance.audio is None:
                raise UserError("the sample has no audio", where=utterance.where, cure="encode shards of audio")
            utterances.append(utterance)
            records.append(json.loads(raw.members["json"]))
        return _Shard(self.paths[index], utterances, records)


class _Loop(pl.LightningModule):
    """Lightning's predict loop over whole shards: one device or many, one progress bar."""

    def __init__(self, encoder: Encoder, folder: Path, identity: str, dtype: str, batch_seconds: float) -> None:
        super().__init__()
        self.encoder, self.folder, self.identity = encoder, folder, identity
        self.dtype_name, self.batch_seconds = dtype, batch_seconds

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
        self._write(shard, stored)

    def _narrow(self, data: torch.Tensor, where: str) -> NDArray[Any]:
        if not data.is_floating_point():
            values: NDArray[Any] = data.numpy()
            smallest = np.min_scalar_type(int(values.max())) if values.min() >= 0 else np.dtype(np.int64)
            return values.astype(smallest)
        narrow = data.float().numpy().astype(self.dtype_name)
        if not np.isfinite(narrow).all():
            raise UserError(f"a frame does not fit {self.dtype_name}", where=where, cure="use --dtype float32")
        return narrow

    def _write(self, shard: _Shard, stored: dict[int, NDArray[Any]]) -> None:
        name = Path(shard.path).name
        with ShardWriter(self.folder, name.removesuffix(".tar"), samples_per_shard=0) as writer:
            for row, (utterance, record) in enumerate(zip(shard.utterances, shard.records, strict=True)):
                about = {"by": self.identity, "num_samples": utterance.num_samples}
                kind = "codes.npy" if stored[row].dtype.kind in "iu" else "frames.npy"
                writer.write(utterance.key, {**record, "encoded": about}, encode_array(stored[row]), kind)
        seconds = sum(utterance.num_samples for utterance in shard.utterances) / self.encoder.sample_rate_hz
        entry = {
            "name": name,
            "num_samples": len(stored),
            "seconds": round(seconds, 3),
            "sha256": sha256_of(self.folder / name),
        }
        write_aside(_entry_path(self.folder, name), json.dumps(entry))

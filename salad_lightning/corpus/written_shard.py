"""A shard of a workspace, and beside it the report by which a resumed run knows that it is finished."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from salad_lightning.corpus.output_folder import INDEX, sha256_of
from salad_lightning.corpus.workspace import finish_publication, write_aside
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import expand_shards
from salad_lightning.errors import UserError

__all__ = ["Sample", "published", "shard_digest", "shards_by_name", "write_shard"]


class Sample(NamedTuple):
    """As `ShardWriter.write` takes it.

    Attributes:
        key: Unique in the shard.
        record: The JSON.
        content: Of the audio or ``.npy`` file; None for plain text.
        extension: Of that file.
        seconds: Of audio.
    """

    key: str
    record: dict[str, Any]
    content: bytes | None = None
    extension: str = "flac"
    seconds: float = 0.0


def write_shard(
    folder: Path,
    name: str,
    digest: str,
    samples: Iterable[Sample],
    facts: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Write ``{folder}/{name}`` aside, move it there, and put its report beside it.

    Args:
        folder: Of the workspace.
        name: Ends in ``.tar``.
        digest: Of everything that decides the content.
        samples: May be made while they are written.
        facts: What else the report says, asked for when all samples are written.

    Returns:
        The report: digest, name, SHA-256 (empty where there was no sample, and no file is written), number of samples,
        seconds, and the facts.

    Raises:
        UserError: If a key occurs twice.
    """
    # A folder of this process alone: one that was killed may still be writing.
    aside = folder / f"{name}.{os.getpid()}"
    keys, seconds, sha256 = set[str](), 0.0, ""
    try:
        with ShardWriter(aside, name.removesuffix(".tar"), samples_per_shard=0) as writer:
            for sample in samples:
                if sample.key in keys:
                    raise UserError(
                        "the key occurs twice", where=f"{name}: {sample.key}", cure="give every sample its own key"
                    )
                writer.write(sample.key, sample.record, sample.content, sample.extension)
                keys.add(sample.key)
                seconds += sample.seconds
        if keys:
            sha256 = sha256_of(aside / name)
            os.replace(aside / name, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    report = {"digest": digest, "name": name, "sha256": sha256, "num_samples": len(keys), "seconds": round(seconds, 3)}
    report |= facts()
    write_aside(folder / f"{name}.json", json.dumps(report))
    return report


def shards_by_name(shards: str | Sequence[str]) -> dict[str, str]:
    """File name to path of shards that are to be written again under their names.

    Raises:
        UserError: If one is missing or does not end in ``.tar``, or two have one name.
    """
    paths: dict[str, str] = {}
    for path in expand_shards(shards):
        name = Path(path).name
        if not name.endswith(".tar"):
            raise UserError("the name does not end in .tar", where=path, cure="rename it")
        if name in paths:
            raise UserError(
                f"{paths[name]} and {path} have one name", where="shards", cure="write them into two folders"
            )
        paths[name] = path
    return paths


def shard_digest(made_with: Sequence[Any], path: str) -> str:
    """Of everything that decides what becomes of a shard: how it is made, its path, and its content.

    Tars are padded to whole blocks, so that a corrected text seldom changes their size.
    """
    return hashlib.sha256(json.dumps([*made_with, path, sha256_of(Path(path))]).encode()).hexdigest()


def published(output: Path, made_with: Sequence[Any], paths: Iterable[str]) -> dict[str, Any] | None:
    """The index, where an earlier run on the same shards had only to move its files into place; else None.

    Such a run's request is the digests of its shards, in order.
    """
    request = finish_publication(output)
    if request is None or request != json.dumps([shard_digest(made_with, path) for path in paths]):
        return None
    index: dict[str, Any] = json.loads((output / INDEX).read_text(encoding="utf-8"))
    return index

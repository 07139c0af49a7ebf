"""What a result is of: items, wording and audio of a source, and the files of a model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salad_lightning.corpus.output_folder import sha256_of
from salad_lightning.data.documents import DocumentBuilder
from salad_lightning.data.format import decode
from salad_lightning.data.reader import read_shards
from salad_lightning.data.sources import Source, expand_shards, shard_paths
from salad_lightning.data.tolerance import Tolerance
from salad_lightning.errors import UserError
from salad_lightning.evaluation.transcripts import audio_digest

__all__ = ["fingerprint", "model_name", "source_fingerprint"]


def source_fingerprint(source: Source) -> dict[str, str]:
    """Hashes of a test source, whatever shards its samples are packed into, and wherever these lie.

    Returns:
        ``items``: keys, texts, options and answers; ``audio``: the recordings; ``template``: document builder and
        prompts; ``shots``: items and audio of the examples, where there are any.
    """
    tolerance = Tolerance(source.name, source.max_bad_fraction or 0.0)
    digests = _of_shards(shard_paths(source), tolerance, source.allow_pipe)
    digests["template"] = _digest([_settings(source.documents), digests.pop("prompts")])
    if shots := getattr(source.documents, "shots", None):
        digests["shots"] = _digest(_of_shards(expand_shards(shots, remote=True), Tolerance("shots")))
    return digests


def _of_shards(paths: list[str], tolerance: Tolerance, allow_pipe: bool = False) -> dict[str, str]:
    items, audio, prompts = [], [], set()
    for raw in read_shards(paths, tolerance, allow_pipe=allow_pipe):
        tolerance.count("sample")
        try:
            sample = decode(raw, source=tolerance.source, sample_rate_hz=0)
        except UserError as error:
            tolerance.skip("sample", error, raw.shard, raw.key)
            continue
        items.append([raw.key, sample.text, *(sample.fields.get(name) for name in ("choices", "answer", "shots"))])
        audio.append([raw.key, audio_digest(raw), sample.fields.get("speech_end_s")])
        prompts.add(str(sample.fields.get("prompt")))
    return {"items": _digest(sorted(items, key=str)), "audio": _digest(sorted(audio, key=str)),
            "prompts": _digest(sorted(prompts))}  # fmt: skip


def _settings(documents: DocumentBuilder) -> Any:
    bare = copy.copy(documents)
    vars(bare).pop("shots", None)  # a path; what is in it counts, not where it lies
    return json.loads(bare.fingerprint())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_name(path: str | Path) -> str:
    """A model's path with a hash of what lies there, so that one trained again is another; a hub name as it is."""
    return f"{path} {_digest(fingerprint([path]))}" if Path(path).exists() else str(path)


def fingerprint(paths: Sequence[str | Path]) -> list[str]:
    """Name and content hash of each file; a folder stands for all files in it, and a name that is no path for itself.

    Args:
        paths: Files, folders, or names of models on a hub.
    """
    return [entry for path in paths for entry in _entries(Path(path))]


def _entries(path: Path) -> list[str]:
    if not path.exists():
        return [str(path)]
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [f"{file.name} {sha256_of(file)}" for file in files]

"""Which items, which wording and which audio a result is of, so that two tables can be compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from salad_lightning.data.documents import DocumentBuilder
from salad_lightning.data.format import read_shard
from salad_lightning.data.sources import Source, expand_shards, shard_paths
from salad_lightning.evaluation.transcripts import audio_digest

__all__ = ["source_fingerprint"]

_SETTINGS_ELSEWHERE = ("shots",)  # a path; what is in it counts, not where it lies


def source_fingerprint(source: Source) -> dict[str, str]:
    """Hashes of a test source, whatever shards its samples are packed into, and wherever these lie.

    Returns:
        ``items``: keys, texts, options and answers; ``audio``: the recordings; ``template``: document builder and
        prompts; ``shots``: items and audio of the examples, where there are any.
    """
    digests = _of_shards(shard_paths(source), source.allow_pipe)
    digests["template"] = _digest([_settings(source.documents), digests.pop("prompts")])
    if shots := getattr(source.documents, "shots", None):
        digests["shots"] = _digest(_of_shards(expand_shards(shots, remote=True)))
    return digests


def _of_shards(paths: list[str], allow_pipe: bool = False) -> dict[str, str]:
    items, audio, prompts = [], [], set()
    for path in paths:
        for raw in read_shard(path, allow_pipe=allow_pipe):
            record = json.loads(raw.members["json"])
            items.append([raw.key, *(record.get(name) for name in ("text", "choices", "answer", "shots"))])
            audio.append([raw.key, audio_digest(raw), record.get("speech_end_s")])
            prompts.add(str(record.get("prompt")))
    return {"items": _digest(sorted(items, key=str)), "audio": _digest(sorted(audio, key=str)),
            "prompts": _digest(sorted(prompts))}  # fmt: skip


def _settings(documents: DocumentBuilder) -> list[Any]:
    named = {name: value for name, value in vars(documents).items() if name not in _SETTINGS_ELSEWHERE}
    return [type(documents).__name__, named]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

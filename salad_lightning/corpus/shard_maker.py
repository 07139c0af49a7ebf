"""One shard of ``prepare``, from its rows to its file: the work of a worker process."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from salad_lightning.corpus.manifest import Row, as_json
from salad_lightning.corpus.recordings import Recording
from salad_lightning.corpus.rules import Rejection, Rules
from salad_lightning.corpus.sound import active_range, with_level
from salad_lightning.corpus.split import Segment, split_at_pauses
from salad_lightning.corpus.written_shard import Sample, write_shard
from salad_lightning.data.audio import decode_audio, encode_flac
from salad_lightning.data.format import TIME_SLACK_S, parse_words
from salad_lightning.errors import UserError
from salad_lightning.interfaces import TimedWord

__all__ = ["ShardJob", "make_shard"]


@dataclass(frozen=True)
class ShardJob:
    """A shard that is to be made.

    Attributes:
        folder: Where it waits for the others.
        name: Of the file.
        digest: Of everything that decides its content, for a resumed run.
        rows: Keys and rows.
        has_audio: Whether rows without a recording are broken, or plain text.
        text_column: Of the rows.
        sample_rate_hz: Of the FLAC files; None keeps each recording's own.
        trim: Whether silence at both ends is cut off.
        level_dbfs: Root mean square that audio is brought to, or None.
        rules: What is left out.
    """

    folder: Path
    name: str
    digest: str
    rows: Sequence[tuple[str, Row]]
    has_audio: bool
    text_column: str
    sample_rate_hz: int | None
    trim: bool
    level_dbfs: float | None
    rules: Rules


class _Clip(NamedTuple):
    audio: NDArray[np.float32]
    rate_hz: int
    words: list[TimedWord] | None


class _Broken(Exception):
    """A row that cannot be used: reason, detail, cure."""


def make_shard(job: ShardJob) -> dict[str, Any]:
    """Write a shard and its report; the same job gives the same bytes.

    Returns:
        The report of `write_shard`, with rows, fields, languages, speakers, and what was rejected.
    """
    rejected: list[Rejection] = []
    fields, languages, speakers = Counter[str](), Counter[str](), set[str]()

    def samples() -> Iterator[Sample]:
        for key, row in job.rows:
            for sample in _samples(job, key, row, rejected):
                fields.update(list(sample.record))
                languages.update([str(sample.record["language"])] if "language" in sample.record else [])
                speakers.update([str(sample.record["speaker"])] if "speaker" in sample.record else [])
                yield sample

    def facts() -> dict[str, Any]:
        return {
            "num_rows": len(job.rows),
            "fields": dict(fields),
            "languages": dict(languages),
            "speakers": sorted(speakers),
            "rejected": [rejection._asdict() for rejection in rejected],
        }

    return write_shard(job.folder, job.name, job.digest, samples(), facts)


def _samples(job: ShardJob, key: str, row: Row, rejected: list[Rejection]) -> list[Sample]:
    """What becomes of a row; what does not is added to ``rejected``."""
    try:
        if row.problem:
            raise _Broken("duplicate key" if row.problem.startswith("keys must") else "broken row", row.problem)
        record = dict(row.values)
        text = record.pop(job.text_column, None)
        if not isinstance(text, str) or not text.strip():
            cure = "fill it, drop the row, or name another column with --text-column"
            raise _Broken("no text", f"there is no text in column `{job.text_column}`", cure)
        try:
            record = as_json({**record, "text": text})
        except UserError as error:
            raise _Broken("broken row", error.what, error.cure) from error
        if not job.has_audio:
            return [Sample(key, record)]
        if row.audio is None:
            raise _Broken("broken row", "there is no audio", "drop the row")
        clip = _load(job, row.audio, record, row.where)
        return list(_speech_samples(job, key, row, record, clip, rejected))
    except _Broken as broken:
        rejected.append(Rejection(row.where, key, *broken.args))
        return []


def _load(job: ShardJob, recording: Recording, record: dict[str, Any], where: str) -> _Clip:
    try:
        audio, rate = decode_audio(recording.read(), job.sample_rate_hz, recording.name)
    except UserError as error:
        what = error.what
        detail = f"{error.where}: {what}" if error.where else what
        raise _Broken("unreadable audio", detail, error.cure) from error
    try:
        words = parse_words(record.pop("words", None), "")
    except UserError as error:
        raise _Broken("bad word times", error.what, error.cure) from error
    if "speech_end_s" in record:
        _check_end(record)
    seconds = len(audio) / rate
    if words and words[-1].end_s > seconds + TIME_SLACK_S:
        raise _Broken("bad word times", f"the last word ends at {words[-1].end_s} s, the audio at {seconds:.2f} s")
    clip = _Clip(audio, rate, words)
    return _trimmed(clip, record) if job.trim else clip


def _check_end(record: dict[str, Any]) -> None:
    end_s = record["speech_end_s"]
    if end_s is None:  # an empty cell of parquet
        del record["speech_end_s"]
    elif not isinstance(end_s, int | float) or not 0 <= end_s < math.inf:
        raise _Broken("broken row", f"`speech_end_s` is {end_s!r}, not seconds", "give seconds, or leave it out")


def _trimmed(clip: _Clip, record: dict[str, Any]) -> _Clip:
    """Without silence at both ends, but with every word; times are moved."""
    first, last = active_range(clip.audio, clip.rate_hz)
    if clip.words:
        first = min(first, int(clip.words[0].start_s * clip.rate_hz))
        last = max(last, min(round(max(word.end_s for word in clip.words) * clip.rate_hz), len(clip.audio)))
    offset_s = first / clip.rate_hz
    if "speech_end_s" in record:
        last = max(last, min(round(record["speech_end_s"] * clip.rate_hz), len(clip.audio)))
        record["speech_end_s"] = round(max(record["speech_end_s"] - offset_s, 0.0), 3)
    record.pop("seconds", None)  # no longer true
    words = clip.words and [
        TimedWord(word, round(max(start_s - offset_s, 0.0), 3), round(max(end_s - offset_s, 0.0), 3))
        for word, start_s, end_s in clip.words
    ]
    return _Clip(clip.audio[first:last], clip.rate_hz, words)


def _speech_samples(
    job: ShardJob, key: str, row: Row, record: dict[str, Any], clip: _Clip, rejected: list[Rejection]
) -> Iterator[Sample]:
    seconds = len(clip.audio) / clip.rate_hz
    segments = [Segment(record["text"], clip.words or [], 0.0, seconds)]
    limit_s = job.rules.max_seconds
    # A question must stay whole.
    if limit_s is not None and seconds > limit_s and clip.words and "choices" not in record:
        split = split_at_pauses(record["text"], clip.words, seconds, limit_s)
        if split is None:
            raise _Broken("bad word times", "the words do not spell the text", "align this sample again")
        segments = split
    heard = _heard(record, clip.words or [])
    for number, segment in enumerate(segments):
        first, last = round(segment.start_s * clip.rate_hz), round(segment.end_s * clip.rate_hz)
        audio, name, fields = clip.audio[first:last], key, dict(record)
        if len(segments) > 1:
            name = f"{key}_{number:04d}"
            fields |= {"text": segment.text, "recording": key, "start_s": round(segment.start_s, 3)}
            fields.pop("seconds", None)
            if heard is not None:
                fields["word_confidence"] = list(itertools.islice(heard, len(segment.words)))
        broken = job.rules.broken_by(audio, clip.rate_hz, segment.text)
        if broken:
            rejected.append(Rejection(row.where, name, *broken))
            continue
        if clip.words is not None:
            fields["words"] = segment.words
        fields.setdefault("seconds", round(len(audio) / clip.rate_hz, 3))
        if job.level_dbfs is not None:
            audio = with_level(audio, job.level_dbfs)
        yield Sample(name, fields, encode_flac(audio, clip.rate_hz), seconds=len(audio) / clip.rate_hz)


def _heard(record: dict[str, Any], words: list[TimedWord]) -> Iterator[float | None] | None:
    """How sure `align` was of each word that `split_at_pauses` keeps; None where it has not said."""
    values = record.get("word_confidence")
    if not isinstance(values, list) or len(values) != len(words):
        return None
    return (value for value, word in zip(values, words, strict=True) if any(map(str.isalnum, word.word)))

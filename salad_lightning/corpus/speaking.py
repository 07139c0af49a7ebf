"""One shard of ``synthesize``, from its texts to its file: the work of a worker process."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import multiprocessing
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from salad_lightning.corpus.manifest import Row, as_json
from salad_lightning.corpus.rules import Rejection
from salad_lightning.corpus.written_shard import Sample, write_shard
from salad_lightning.data.audio import as_float, encode_flac, resample
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Speech, Synthesizer
from salad_lightning.registry import load_all

__all__ = ["SpeechJob", "check_voices", "speak_shard"]

_SILENCE = 1e-3  # of full scale: below the quantisation noise of 10 bits
_TIME_SLACK_S = 0.01


@dataclass(frozen=True)
class SpeechJob:
    """A shard that is to be spoken.

    Attributes:
        folder: Where it waits for the others.
        name: Of the file.
        digest: Of everything that decides its content, for a resumed run.
        rows: Keys and rows.
        synthesizer: Name of an installed synthesizer, or the full path of a class.
        voices: Arguments of each voice as JSON, so that what is built from them can be cached.
        seed: Decides who says what.
        text_column: Of the rows.
        sample_rate_hz: Of the FLAC files; None keeps the synthesizer's.
    """

    folder: Path
    name: str
    digest: str
    rows: Sequence[tuple[str, Row]]
    synthesizer: str
    voices: tuple[str, ...]
    seed: int
    text_column: str
    sample_rate_hz: int | None


class _Unspoken(Exception):
    """Why a text has no speech: reason, detail."""


def speak_shard(job: SpeechJob) -> dict[str, Any]:
    """Write a shard and its report; the same job gives the same bytes.

    Returns:
        The report of `write_shard`, with rows and what failed.

    Raises:
        UserError: If the synthesizer cannot be built.
    """
    failed: list[Rejection] = []

    def samples() -> Iterator[Sample]:
        for key, row in job.rows:
            try:
                yield _speak(job, key, row)
            except _Unspoken as unspoken:
                failed.append(Rejection(row.where, key, *unspoken.args))

    def facts() -> dict[str, Any]:
        return {"num_rows": len(job.rows), "failed": [rejection._asdict() for rejection in failed]}

    return write_shard(job.folder, job.name, job.digest, samples(), facts)


def _speak(job: SpeechJob, key: str, row: Row) -> Sample:
    if row.problem:
        raise _Unspoken("broken row", row.problem)
    record = dict(row.values)
    text = record.pop(job.text_column, None)
    if not isinstance(text, str) or not text.strip():
        raise _Unspoken("no text", f"there is no text in column `{job.text_column}`")
    draw = random.Random(f"{job.seed}/{key}")
    voice = draw.choice(job.voices)
    engine = _synthesizer(job.synthesizer, voice)  # outside the `try`: settings that are wrong end the run
    try:
        speech = engine.speak(text, seed=draw.getrandbits(31))
    except Exception as error:  # whatever an engine raises on one text, the others are to be spoken
        detail = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise _Unspoken("the synthesizer failed", detail) from error
    duration_s = _duration(speech, engine.sample_rate_hz)
    audio, rate = speech.audio, engine.sample_rate_hz
    if job.sample_rate_hz is not None and job.sample_rate_hz != rate:
        audio = resample(as_float(audio), rate, job.sample_rate_hz, "--sample-rate")
        rate = job.sample_rate_hz
    record |= {
        "text": text,
        "words": [[unit.word, round(unit.start_s, 3), round(min(unit.end_s, duration_s), 3)] for unit in speech.words],
        "speaker": ",".join(f"{name}={value}" for name, value in json.loads(voice).items()) or job.synthesizer,
        "seconds": round(duration_s, 3),
    }
    try:
        record = as_json(record)
    except UserError as error:
        raise _Unspoken("broken row", error.what) from error
    return Sample(key, record, encode_flac(audio, rate), seconds=record["seconds"])


def _duration(speech: Speech, sample_rate_hz: int) -> float:
    """Seconds of speech, if it can be trained on."""
    if speech.audio.ndim != 1 or not np.isfinite(speech.audio).all():
        raise _Unspoken("broken audio", "the audio is not one channel of finite samples")
    if speech.audio.size == 0 or np.abs(speech.audio).max() < _SILENCE:
        raise _Unspoken("silence", "the synthesizer gave silence")
    duration_s = len(speech.audio) / sample_rate_hz
    if not speech.words or speech.words[-1].end_s > duration_s + _TIME_SLACK_S:
        raise _Unspoken("bad word times", "the word times are missing or go beyond the audio")
    return duration_s


def check_voices(name: str, voices: Sequence[dict[str, Any]]) -> None:
    """Refuse what no synthesizer can be built of, without building one.

    Args:
        name: Name of an installed synthesizer, or the full path of a class.
        voices: Arguments of each voice.

    Raises:
        UserError: If there is no such class, or it takes no such argument.
    """
    signature = inspect.signature(_class_of(name))
    for voice in voices:
        try:
            signature.bind(**voice)
        except TypeError as error:
            raise UserError(f"{name}: {error}", where=f"voice {voice}", cure=f"it takes {signature}") from error


def _class_of(name: str) -> type[Synthesizer]:
    module, _, attribute = name.rpartition(".")
    if not module:
        return load_all(["synthesizer"]).find("synthesizer", name, where="synthesizer")
    try:
        found: type[Synthesizer] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"no such class ({error})", where=f"synthesizer {name}", cure="see `plugins`") from error
    return found


@functools.lru_cache(maxsize=64)
def _synthesizer(name: str, voice: str) -> Synthesizer:
    """The synthesizer of a voice; built once in each process."""
    if torch.cuda.is_available():
        # Processes of a pool are numbered from 1: they take the GPUs in turn.
        number = re.search(r"\d+$", multiprocessing.current_process().name)
        torch.cuda.set_device(int(number[0] if number else 0) % torch.cuda.device_count())
    try:
        built: Synthesizer = _class_of(name)(**json.loads(voice))
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be built: {error}", where=f"voice {voice}", cure="see its docstring") from error
    return built

"""What ``lint`` finds out about one shard: the work of a worker process."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer

from salad_lightning.corpus.split import spells
from salad_lightning.data.audio import decode_audio
from salad_lightning.data.format import AUDIO_EXTENSIONS, TIME_SLACK_S, RawSample, Utterance, decode, read_shard
from salad_lightning.errors import UserError

__all__ = ["ShardFacts", "load_tokenizer", "read_facts"]


@dataclass
class ShardFacts:
    """Counts of a shard, and what is wrong with it.

    Attributes:
        keys: Of all samples.
        seconds: Of samples with audio.
        characters: Of the others' texts.
        num_samples: Samples that can be used.
        num_audio: Those with audio.
        num_timed: Those with word times.
        num_words: Words of their texts.
        num_tokens: Tokens of their texts; 0 without a tokenizer.
        languages: Samples by language.
        speakers: Samples by speaker.
        rates: Samples by sample rate in hertz.
        problems: Key (empty where it is the whole shard's) and problem.
    """

    keys: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    characters: list[float] = field(default_factory=list)
    num_samples: int = 0
    num_audio: int = 0
    num_timed: int = 0
    num_words: int = 0
    num_tokens: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    speakers: Counter[str] = field(default_factory=Counter)
    rates: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)


def read_facts(path: str, *, tokenizer: str | None = None) -> ShardFacts:
    """Read a shard through; goes on after a bad sample, and ends where the tar itself is broken.

    Args:
        path: A .tar file.
        tokenizer: Folder of a tokenizer, or None.
    """
    facts, seen = ShardFacts(), set[str]()
    try:
        for raw in read_shard(path):
            if raw.key in seen:
                facts.problems.append((raw.key, "the key occurs twice"))
            seen.add(raw.key)
            try:
                _add(facts, raw, tokenizer)
            except UserError as error:
                facts.problems.append((raw.key, error.what))
    except UserError as error:
        facts.problems.append(("", error.what))
    facts.keys = sorted(seen)
    return facts


@functools.lru_cache(maxsize=1)
def load_tokenizer(folder: str) -> Any:
    """A Hugging Face tokenizer.

    Raises:
        UserError: If the folder holds none.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError("no tokenizer is there", where=folder, cure="give a model's folder") from error


def _add(facts: ShardFacts, raw: RawSample, tokenizer: str | None) -> None:
    # A rate other than 0 makes `decode` open what an encoder stored; audio is decoded here, at its own rate.
    audio_name = next((name for name in AUDIO_EXTENSIONS if name in raw.members), None)
    utterance = decode(raw, source="", sample_rate_hz=0 if audio_name else 1)
    seconds = _seconds(facts, raw, utterance, audio_name)
    facts.num_samples += 1
    facts.num_audio += seconds is not None
    if seconds is None:
        facts.characters.append(len(utterance.text))
    else:
        facts.seconds.append(seconds)
    facts.num_words += len(utterance.text.split())
    if tokenizer:
        facts.num_tokens += len(load_tokenizer(tokenizer)(utterance.text, add_special_tokens=False).input_ids)
    for counter, name in ((facts.languages, "language"), (facts.speakers, "speaker")):
        if name in utterance.fields:
            counter[str(utterance.fields[name])] += 1
    _check_words(facts, utterance, seconds)


def _seconds(facts: ShardFacts, raw: RawSample, utterance: Utterance, audio_name: str | None) -> float | None:
    if audio_name is None:
        stored = utterance.fields.get("seconds")
        return float(stored) if utterance.encoded is not None and isinstance(stored, (int, float)) else None
    audio, rate = decode_audio(raw.members[audio_name], None, "")
    facts.rates[str(rate)] += 1
    if not audio.any():
        facts.problems.append((raw.key, "the audio is silent"))
    return len(audio) / rate


def _check_words(facts: ShardFacts, utterance: Utterance, seconds: float | None) -> None:
    if utterance.words is None:
        return
    facts.num_timed += 1
    last_s = max((word.end_s for word in utterance.words), default=0.0)
    if seconds is not None and last_s > seconds + TIME_SLACK_S:
        facts.problems.append((utterance.key, f"the last word ends at {last_s} s, the audio at {seconds:.2f} s"))
    if not spells(utterance.text, utterance.words):
        facts.problems.append((utterance.key, "the words do not spell the text"))

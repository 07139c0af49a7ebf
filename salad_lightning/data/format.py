"""What is in a shard: the only file that knows.

A shard is a WebDataset tar. A sample is ``{key}.json`` with ``{"text": …, "words": [[word, start_s, end_s], …], …}``
beside ``{key}.flac`` (or another extension of `AUDIO_EXTENSIONS`); plain text is ``{key}.json`` alone. ``words`` is
optional; every other JSON field is kept. Pre-encoded speech is ``{key}.frames.npy`` or ``{key}.codes.npy`` in place of
the audio, with ``encoded: {"by": encoder, "num_samples": samples}`` in the JSON. In tars made by others, a transcript
may be a ``{key}.txt`` instead. Nothing in a shard is ever unpickled
or executed.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys

from salad_lightning.data.arrays import NOT_AN_ARRAY, decode_array
from salad_lightning.data.audio import Clip, Recording, decode_audio, open_audio
from salad_lightning.data.commands import CommandFile, is_command
from salad_lightning.data.storage import RemoteFile, is_remote
from salad_lightning.data.tars import read_members
from salad_lightning.errors import UserError
from salad_lightning.interfaces import TimedWord

__all__ = [
    "AUDIO_EXTENSIONS",
    "ENCODED_EXTENSIONS",
    "TIME_SLACK_S",
    "Encoded",
    "RawSample",
    "Utterance",
    "decode",
    "parse_words",
    "read_shard",
]

AUDIO_EXTENSIONS = ("flac", "wav", "ogg", "opus", "mp3")
"""Decoded with soundfile, whose wheel carries its own codecs."""

ENCODED_EXTENSIONS = ("frames.npy", "codes.npy")
"""What a frozen encoder made of the audio: floats or integers."""

_READ = frozenset({"json", "txt", *AUDIO_EXTENSIONS, *ENCODED_EXTENSIONS})

TIME_SLACK_S = 0.25
"""How far word times may go beyond the audio: aligners round to their own frames; more is another recording's."""


@dataclass(frozen=True)
class RawSample:
    """A sample as read from its shard, not yet decoded, so that buffering and skipping samples is cheap.

    Attributes:
        key: The sample's key.
        shard: Path of its shard, for messages.
        members: File extension to content.
    """

    key: str
    shard: str
    members: dict[str, bytes]

    @property
    def has_audio(self) -> bool:
        """Whether one of the members is audio, as it was recorded or encoded."""
        return any(extension in self.members for extension in (*AUDIO_EXTENSIONS, *ENCODED_EXTENSIONS))


@dataclass(frozen=True)
class Encoded:
    """Audio as a frozen encoder left it (`Encoder.encode`).

    Attributes:
        data: ``[T, …]`` codes (int64) or frames (float32 or float16), T encoder frames.
        by: Identity of the encoder (`Encoder.identity`).
        num_samples: Length of the audio at the encoder's sample rate.
    """

    data: NDArray[Any]
    by: str
    num_samples: int


@dataclass(frozen=True)
class Utterance:
    """One sample of a shard: a text, and where it is spoken, its audio.

    Attributes:
        key: The sample's key.
        source: Name of the source it is read for.
        text: Transcript, with case and punctuation.
        words: Spoken units in order with their times, or None where the shard has none.
        recording: ``[L]`` mono at the rate asked for, float32 or int16 (`as_float`), decoded or not yet; None for plain
            text and pre-encoded speech.
        encoded: Pre-encoded speech, or None.
        fields: The remaining JSON fields.
        shard: Path of its shard, for messages.
    """

    key: str
    source: str
    text: str
    words: list[TimedWord] | None = None
    recording: NDArray[Any] | Recording | None = None
    encoded: Encoded | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    shard: str = ""

    @property
    def num_samples(self) -> int:
        """Samples of speech at the encoder's rate; 0 for plain text."""
        if self.encoded is not None:
            return self.encoded.num_samples
        return 0 if self.recording is None else len(self.recording)

    @property
    def audio(self) -> NDArray[Any] | None:
        """All of `recording`, decoded.

        Raises:
            UserError: If it cannot be decoded.
        """
        return self.recording.until(len(self.recording)) if isinstance(self.recording, Recording) else self.recording

    def clip(self, start: int, stop: int) -> Clip:
        """Samples ``[start, stop)`` of `recording`, or as far as it goes; not decoded where it is not.

        Raises:
            ValueError: If there is none.
        """
        if self.recording is None:
            raise ValueError(f"{self.where} has no audio")
        return self.recording.cut(start, stop) if isinstance(self.recording, Recording) else self.recording[start:stop]

    @property
    def where(self) -> str:
        """Shard and key, for messages."""
        return f"{self.shard}: {self.key}" if self.shard else self.key

    def with_audio_of(self, other: Utterance) -> Utterance:
        """This transcript over another utterance's audio: the "shuffled" control."""
        fields = {name: value for name, value in self.fields.items() if name != "speech_end_s"}
        if "speech_end_s" in other.fields:
            fields["speech_end_s"] = other.fields["speech_end_s"]
        return dataclasses.replace(self, recording=other.recording, encoded=other.encoded, words=None, fields=fields)


def read_shard(path: str | Path, *, allow_pipe: bool = False) -> Iterator[RawSample]:
    """Samples of a shard in the order of the tar.

    Args:
        path: A local file, or an address that `salad_lightning.data.storage` reads.
        allow_pipe: Whether it may be ``pipe:`` and a command, which is run.

    Yields:
        Samples whose transcript is in their JSON, whether it was there or in a ``.txt``.

    Raises:
        UserError: If the file is missing or not a readable tar, was cut off, holds what `read_members` refuses, or a
            key occurs twice in a row with the same extension.
    """
    try:
        with _open(str(path), allow_pipe) as stream:
            files = ({"fname": name, "data": data, "__url__": ""} for name, data in read_members(stream, _is_read))
            for sample in group_by_keys(files):
                members = {name: value for name, value in sample.items() if not name.startswith("__")}
                if "txt" in members:
                    _move_text(members)
                yield RawSample(sample["__key__"], str(path), members)
    except UserError as error:
        raise UserError(error.what, where=str(path), cure=error.cure) from error
    except OSError as error:
        raise UserError(f"cannot be read ({error})", where=str(path), cure="check the `shards` path") from error
    except (tarfile.TarError, EOFError, ValueError) as error:
        message = str(error.args[0]) if error.args else type(error).__name__
        raise UserError(
            f"not a readable shard ({message})",
            where=str(path),
            cure="unpack it if it is compressed, or write it again with `salad-lightning prepare`",
        ) from error


def decode(
    raw: RawSample, *, source: str, sample_rate_hz: int, keep_int16: bool = False, late: bool = False
) -> Utterance:
    """Parse and decode a sample.

    Args:
        raw: What `read_shard` gave.
        source: Name to put on the utterance.
        sample_rate_hz: Rate the audio is resampled to where it differs; 0 leaves the audio out, for a model that
            takes none.
        keep_int16: As of `decode_audio`.
        late: Leave audio undecoded where that is possible, and 16 bits as they are: see `open_audio`.

    Raises:
        UserError: If the JSON is missing, is no object or has no text, if the audio cannot be decoded, or if word
            times are malformed.
    """
    where = f"{raw.shard}: {raw.key}"
    record = _parse_json(raw, where)
    text = record.pop("text", None)
    if not isinstance(text, str) or not text.strip():
        raise UserError("the JSON has no `text`", where=where, cure="give every sample its transcript")
    words = parse_words(record.pop("words", None), where)
    recording: NDArray[Any] | Recording | None = None
    encoded, about = None, record.pop("encoded", None)
    if sample_rate_hz:
        for extension in AUDIO_EXTENSIONS:
            if extension in raw.members:
                place = f"{where}.{extension}"
                content = raw.members[extension]
                if late:
                    recording = open_audio(content, sample_rate_hz, place)
                else:
                    recording, _ = decode_audio(content, sample_rate_hz, place, keep_int16=keep_int16)
                break
        else:
            encoded = _parse_encoded(raw, about, where)
    return Utterance(raw.key, source, text, words, recording, encoded, record, raw.shard)


def parse_words(words: Any, where: str) -> list[TimedWord] | None:
    """Word times as they stand in JSON.

    Args:
        words: ``[[word, start_s, end_s], …]``, or None.
        where: Shard and key, or file and line, for messages.

    Raises:
        UserError: If they have another shape, or times run backwards.
    """
    if words is None:
        return None
    try:
        timed = [TimedWord(str(word), float(start), float(end)) for word, start, end in words]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError("`words` must be a list of [word, start_s, end_s]", where=where) from error
    last_start = 0.0
    for word in timed:
        if not (last_start <= word.start_s <= word.end_s < float("inf")):
            raise UserError(f"word times run backwards at {word}", where=where, cure="align this sample again")
        last_start = word.start_s
    return timed


def _open(path: str, allow_pipe: bool) -> AbstractContextManager[Any]:
    if allow_pipe and is_command(path):
        return CommandFile(path)
    return RemoteFile(path) if is_remote(path) else open(path, "rb")


def _move_text(members: dict[str, bytes]) -> None:
    """Put a ``.txt`` into the JSON, so that there is one place to look; one that is no text stays, for `decode`."""
    try:
        record = json.loads(members.get("json", b"{}"))
        members["json"] = json.dumps({**record, "text": members["txt"].decode().strip()}).encode()
        del members["txt"]
    except (ValueError, TypeError, RecursionError):
        return


def _is_read(name: str) -> bool:
    """Whether a member of a tar is taken out of it."""
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    return extension in _READ


def _parse_json(raw: RawSample, where: str) -> dict[str, Any]:
    if "txt" in raw.members:
        raise UserError("the .txt is not UTF-8, or the .json beside it does not parse", where=where)
    if "json" not in raw.members:
        raise UserError(
            "the sample has no .json and no .txt", where=where, cure="write shards with `salad-lightning prepare`"
        )
    try:
        record = json.loads(raw.members["json"])
        if b"\\ud" in raw.members["json"].lower():  # half of a surrogate pair is no text, and no tokenizer takes it
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"the .json does not parse ({error})", where=where) from error
    if not isinstance(record, dict):
        raise UserError("the .json is not an object", where=where)
    return record


def _parse_encoded(raw: RawSample, about: Any, where: str) -> Encoded | None:
    extension = next((extension for extension in ENCODED_EXTENSIONS if extension in raw.members), None)
    if extension is None:
        return None
    try:
        data = _widened(decode_array(raw.members[extension]), extension)
        num_samples = int(about["num_samples"])
        if num_samples < 1:
            raise ValueError(f"of {num_samples} samples")
        return Encoded(data, str(about["by"]), num_samples)
    except NOT_AN_ARRAY as error:
        raise UserError(
            f"not what an encoder stored ({error})",
            where=f"{where}.{extension}",
            cure="write the shard again with `salad-lightning encode`",
        ) from error


def _widened(data: NDArray[Any], extension: str) -> NDArray[Any]:
    """Shards hold the smallest type that fits; a model takes int64, and float32, to which it widens half the bytes."""
    if data.ndim < 1 or not len(data) or data.dtype.kind not in {"frames.npy": "f", "codes.npy": "iu"}[extension]:
        raise ValueError(f"an array of type {data.dtype} and shape {data.shape}")
    if data.dtype == np.float16:
        return data
    return data.astype(np.float32 if data.dtype.kind == "f" else np.int64, copy=False)

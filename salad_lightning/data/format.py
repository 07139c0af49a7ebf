"""What is in a shard: the only file that knows.

A shard is a WebDataset tar. A sample is ``{key}.json`` with ``{"text": …, "words": [[word, start_s, end_s], …], …}``
beside ``{key}.flac`` (or another extension of `AUDIO_EXTENSIONS`); plain text is ``{key}.json`` alone. ``words`` is
optional; every other JSON field is kept. Pre-encoded speech is ``{key}.frames.npy`` or ``{key}.codes.npy`` in place of
the audio, with ``encoded: {"by": encoder, "num_samples": samples}`` in the JSON. Nothing in a shard is ever unpickled
or executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import tarfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
import webdataset
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys

from salad_lightning.data.storage import RemoteFile, is_remote
from salad_lightning.data.tars import read_members
from salad_lightning.errors import UserError
from salad_lightning.interfaces import TimedWord

__all__ = [
    "AUDIO_EXTENSIONS",
    "ENCODED_EXTENSIONS",
    "MAX_SECONDS",
    "TIME_SLACK_S",
    "Encoded",
    "RawSample",
    "ShardWriter",
    "Utterance",
    "decode",
    "decode_audio",
    "encode_array",
    "encode_flac",
    "parse_words",
    "read_shard",
    "resample",
]

AUDIO_EXTENSIONS = ("flac", "wav", "ogg", "opus", "mp3")
"""Decoded with soundfile, whose wheel carries its own codecs."""

ENCODED_EXTENSIONS = ("frames.npy", "codes.npy")
"""What a frozen encoder made of the audio: floats or integers."""

_READ = frozenset({"json", *AUDIO_EXTENSIONS, *ENCODED_EXTENSIONS})

MAX_SECONDS = 7200.0
"""Longer recordings are refused before they are decoded: a few bytes of FLAC can claim days of silence."""

_MAX_VALUES = 500_000_000  # samples times channels: 2 GB

_MAX_KERNEL = 10_000_000  # of rates without a common divisor, the resampler's filter would fill gigabytes

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
        data: ``[T, …]`` codes (int64) or frames (float32), T encoder frames.
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
        audio: ``[L]`` float32 mono at the rate asked for, or None for plain text and pre-encoded speech.
        encoded: Pre-encoded speech, or None.
        fields: The remaining JSON fields.
        shard: Path of its shard, for messages.
    """

    key: str
    source: str
    text: str
    words: list[TimedWord] | None = None
    audio: NDArray[np.float32] | None = None
    encoded: Encoded | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    shard: str = ""

    @property
    def num_samples(self) -> int:
        """Samples of speech at the encoder's rate; 0 for plain text."""
        if self.encoded is not None:
            return self.encoded.num_samples
        return 0 if self.audio is None else len(self.audio)

    @property
    def where(self) -> str:
        """Shard and key, for messages."""
        return f"{self.shard}: {self.key}" if self.shard else self.key

    def with_audio_of(self, other: Utterance) -> Utterance:
        """This transcript over another utterance's audio: the "shuffled" control."""
        fields = {name: value for name, value in self.fields.items() if name != "speech_end_s"}
        if "speech_end_s" in other.fields:
            fields["speech_end_s"] = other.fields["speech_end_s"]
        return dataclasses.replace(self, audio=other.audio, encoded=other.encoded, words=None, fields=fields)


def read_shard(path: str | Path) -> Iterator[RawSample]:
    """Samples of a shard in the order of the tar.

    Args:
        path: A local file, or an address that `salad_lightning.data.storage` reads.

    Raises:
        UserError: If the file is missing or not a readable tar, was cut off, holds what `read_members` refuses, or a
            key occurs twice in a row with the same extension.
    """
    try:
        with RemoteFile(str(path)) if is_remote(str(path)) else open(path, "rb") as stream:
            files = ({"fname": name, "data": data, "__url__": ""} for name, data in read_members(stream, _is_read))
            for sample in group_by_keys(files):
                members = {name: value for name, value in sample.items() if not name.startswith("__")}
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


def decode(raw: RawSample, *, source: str, sample_rate_hz: int) -> Utterance:
    """Parse and decode a sample.

    Args:
        raw: What `read_shard` gave.
        source: Name to put on the utterance.
        sample_rate_hz: Rate the audio is resampled to where it differs; 0 leaves the audio out, for a model that
            takes none.

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
    audio, encoded, about = None, None, record.pop("encoded", None)
    if sample_rate_hz:
        for extension in AUDIO_EXTENSIONS:
            if extension in raw.members:
                audio, _ = decode_audio(raw.members[extension], sample_rate_hz, f"{where}.{extension}")
                break
        else:
            encoded = _parse_encoded(raw, about, where)
    return Utterance(raw.key, source, text, words, audio, encoded, record, raw.shard)


def decode_audio(content: bytes, sample_rate_hz: int | None, where: str) -> tuple[NDArray[np.float32], int]:
    """An audio file's content as mono samples.

    Args:
        content: Any format soundfile reads.
        sample_rate_hz: Rate to resample to; None keeps the file's own.
        where: File or shard and key, for messages.

    Returns:
        ``[L]`` in [-1, 1], and their rate.

    Raises:
        UserError: If it cannot be decoded or holds no sample.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = int(file.samplerate)
            if file.frames > MAX_SECONDS * rate or file.frames * file.channels > _MAX_VALUES:
                raise UserError(
                    f"the audio claims {file.frames / rate:.0f} s of {file.channels} channels",
                    where=where,
                    cure=f"cut it into pieces of at most {MAX_SECONDS:.0f} s",
                )
            audio = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        # Its own text names the buffer in memory, at another address in every run.
        reason = getattr(error, "error_string", None) or str(error)
        raise UserError(f"the audio cannot be decoded ({reason})", where=where) from error
    if audio.shape[0] == 0:
        raise UserError("the audio is empty", where=where)
    if not _is_finite(audio):
        raise UserError("the audio holds NaN or infinite values", where=where, cure="record or convert it again")
    mono: NDArray[np.float32] = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1)
    if sample_rate_hz is None or rate == sample_rate_hz:
        return np.ascontiguousarray(mono), rate
    if rate * sample_rate_hz > _MAX_KERNEL * math.gcd(rate, sample_rate_hz) ** 2:
        raise UserError(f"{rate} Hz is no usual sample rate", where=where, cure=f"convert it to {sample_rate_hz} Hz")
    return resample(mono, rate, sample_rate_hz), sample_rate_hz


def resample(audio: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Audio ``[L]`` at another rate, ``[L']`` (sinc interpolation of torchaudio)."""
    resampled = _resampler(from_hz, to_hz)(torch.from_numpy(np.ascontiguousarray(audio)))
    return np.ascontiguousarray(resampled.numpy())


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


def encode_flac(audio: NDArray[np.float32], sample_rate_hz: int) -> bytes:
    """Mono audio ``[L]`` in [-1, 1] as 16-bit FLAC.

    Raises:
        ValueError: If ``audio`` is empty or has more than one axis.
    """
    if audio.ndim != 1 or audio.size == 0:
        raise ValueError(f"expected audio of shape [L] with L ≥ 1, got {audio.shape}")
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, sample_rate_hz, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def encode_array(data: NDArray[Any]) -> bytes:
    """An array as the content of a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, data, allow_pickle=False)
    return buffer.getvalue()


class ShardWriter:
    """Writes samples into numbered shards of a folder; a shard gets its final name only when it is complete.

    The same samples give the same bytes. Use it as a context manager; after an exception the unfinished shard is gone.

    Args:
        folder: Made if missing.
        prefix: Shards are called ``{prefix}-{number:06d}.tar``.
        samples_per_shard: Samples in every shard but the last; 0 puts all into one that is called ``{prefix}.tar``.

    Attributes:
        paths: The finished shards.
    """

    def __init__(self, folder: str | Path, prefix: str, samples_per_shard: int = 1000) -> None:
        if samples_per_shard < 0:
            raise ValueError(f"samples_per_shard must be at least 0, got {samples_per_shard}")
        self.folder, self.prefix, self.samples_per_shard = Path(folder), prefix, samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.paths: list[Path] = []
        self._open: tuple[Any, Any] | None = None  # file, tar writer
        self._count = 0
        self._keys: set[str] = set()

    def write(self, key: str, record: dict[str, Any], audio: bytes | None = None, extension: str = "flac") -> None:
        """Append a sample.

        Args:
            key: Unique; without ``.``, which WebDataset takes for the start of the extension.
            record: The JSON, with ``text``.
            audio: Content of an audio or ``.npy`` file, or None for plain text.
            extension: Its extension, one of `AUDIO_EXTENSIONS` or `ENCODED_EXTENSIONS`.

        Raises:
            ValueError: If the key has a dot or was used, or the extension is not read back.
        """
        if "." in key or not key or key in self._keys:
            raise ValueError(f"keys must be new and without a dot, got {key!r}")
        if extension not in (*AUDIO_EXTENSIONS, *ENCODED_EXTENSIONS):
            raise ValueError(f"the extension {extension!r} is none of {AUDIO_EXTENSIONS + ENCODED_EXTENSIONS}")
        if self._open is None:
            file = open(self._temporary, "wb")  # noqa: SIM115 closed in _finish or __exit__
            # Fixed owner and time: the same samples give the same bytes.
            self._open = file, webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False)
        sample = {"__key__": key, "json": json.dumps(record, ensure_ascii=False, sort_keys=True).encode()}
        if audio is not None:
            sample[extension] = audio
        self._open[1].write(sample)
        self._keys.add(key)
        self._count += 1
        if self._count == self.samples_per_shard:
            self._finish()

    @property
    def _temporary(self) -> Path:
        number = f"-{len(self.paths):06d}" if self.samples_per_shard else ""
        return self.folder / f".{self.prefix}{number}.tar.partial"

    def _close(self) -> None:
        if self._open is not None:
            file, tar = self._open
            tar.close()
            file.close()
            self._open, self._count = None, 0

    def _finish(self) -> None:
        temporary = self._temporary
        self._close()
        final = self.folder / temporary.name[1 : -len(".partial")]
        os.replace(temporary, final)
        self.paths.append(final)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is None:
            return
        if kind is None:
            self._finish()
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the error that is under way
            self._close()
        self._temporary.unlink(missing_ok=True)


def _is_read(name: str) -> bool:
    """Whether a member of a tar is taken out of it."""
    extension = name.rpartition("/")[2].partition(".")[2].lower()
    return extension in _READ


def _parse_json(raw: RawSample, where: str) -> dict[str, Any]:
    if "json" not in raw.members:
        raise UserError("the sample has no .json", where=where, cure="write shards with `salad-lightning prepare`")
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
        data = _widened(_array(raw.members[extension]), extension)
        num_samples = int(about["num_samples"])
        if num_samples < 1:
            raise ValueError(f"of {num_samples} samples")
        return Encoded(data, str(about["by"]), num_samples)
    except _NO_ARRAY as error:
        raise UserError(
            f"not what an encoder stored ({error})",
            where=f"{where}.{extension}",
            cure="write the shard again with `salad-lightning encode`",
        ) from error


# What damaged .npy headers raise in `numpy.lib.format`, and sizes that are no numbers.
_NO_ARRAY = (ValueError, TypeError, KeyError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError)


def _array(content: bytes) -> NDArray[Any]:
    """What `encode_array` wrote, as a view of ``content``: a header cannot ask for more memory than there is data."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"a .npy file of version {version}")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("a pickle")
    data: NDArray[Any] = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    return data.reshape(shape, order="F" if by_columns else "C")


def _widened(data: NDArray[Any], extension: str) -> NDArray[Any]:
    """Shards hold the smallest type that fits; a model takes float32 and int64."""
    if data.ndim < 1 or not len(data) or data.dtype.kind not in {"frames.npy": "f", "codes.npy": "iu"}[extension]:
        raise ValueError(f"an array of type {data.dtype} and shape {data.shape}")
    return data.astype(np.float32 if data.dtype.kind == "f" else np.int64, copy=False)


def _is_finite(audio: NDArray[np.float32]) -> bool:
    # Of all values at once, without a mask of them; finite ones of full scale stay far from the largest float.
    with np.errstate(all="ignore"):
        return math.isfinite(float(audio.sum()))


@functools.lru_cache(maxsize=16)
def _resampler(from_hz: int, to_hz: int) -> torchaudio.transforms.Resample:
    # Its filter kernel costs more than resampling one clip.
    return torchaudio.transforms.Resample(from_hz, to_hz)

"""Rows of the kinds of corpora that ``prepare`` takes; see `salad_lightning.corpus.prepare.add_arguments`."""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from salad_lightning.corpus.hugging_face import hugging_face_files, read_hugging_face
from salad_lightning.corpus.lhotse import read_lhotse
from salad_lightning.corpus.manifest import Row, key_of, read_rows
from salad_lightning.corpus.recordings import AudioFile, TarMember
from salad_lightning.data.tars import StrictTarInfo, check_end, check_member
from salad_lightning.errors import UserError

__all__ = ["READERS", "input_files", "read_librispeech", "read_manifest", "read_tars", "read_text"]


def read_manifest(path: str) -> Iterator[Row]:
    """Rows of a file that names recordings in ``audio``, relative to itself.

    Raises:
        UserError: See `read_rows`.
    """
    folder = Path(path).parent
    for row in read_rows(path):
        values = dict(row.values)
        audio = values.pop("audio", None)
        if not isinstance(audio, str) or not audio:
            yield Row(row.where, values, problem="there is no `audio`; plain text is prepared with --text")
            continue
        if values.get("key") is None:
            values["key"] = key_of(audio)
        yield Row(row.where, values, AudioFile(str(folder / audio)))


def read_text(pattern: str) -> Iterator[Row]:
    """Rows of plain-text files: manifests or shards; a folder stands for the ones in it.

    Raises:
        UserError: If nothing matches, or see `read_rows` and `read_tars`.
    """
    for path in _text_files(pattern):
        for row in read_tars(path) if _is_tar(path) else read_rows(path):
            yield Row(row.where, row.values, problem=row.problem)


def _text_files(pattern: str) -> list[str]:
    paths = [pattern]
    if Path(pattern).is_dir():
        suffixes = (".jsonl", ".parquet", ".tar")
        paths = sorted(str(path) for path in Path(pattern).rglob("*") if path.suffix in suffixes)
    elif glob.has_magic(pattern):
        paths = sorted(glob.glob(pattern))
    if not paths:
        raise UserError("no .jsonl, .parquet or .tar file is there", where=pattern, cure="check the path")
    return paths


def _is_tar(path: str) -> bool:
    return path.endswith(".tar") or "{" in path


def read_librispeech(folder: str) -> Iterator[Row]:
    """Utterances of a folder like LibriSpeech's: ``**/*.trans.txt`` (``id TEXT`` a line) beside ``{id}.flac``.

    Raises:
        UserError: If there is no transcript file, or one is not UTF-8.
    """
    from salad_lightning.data.format import AUDIO_EXTENSIONS  # here: it brings torch, and `--help` should not wait

    transcripts = sorted(Path(folder).rglob("*.trans.txt"))
    if not transcripts:
        raise UserError("no *.trans.txt file is there", where=folder, cure="give a folder like LibriSpeech's")
    for path in transcripts:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 ({error})", where=str(path), cure="convert it to UTF-8") from error
        for number, line in enumerate(lines, 1):
            name, _, text = line.strip().partition(" ")
            if not name:
                continue
            files = (path.with_name(f"{name}.{extension}") for extension in AUDIO_EXTENSIONS)
            audio = next((file for file in files if file.is_file()), path.with_name(f"{name}.flac"))
            values = {"key": name, "text": text.strip(), "speaker": name.split("-")[0]}
            yield Row(f"{path}, line {number}", values, AudioFile(str(audio)))


def read_tars(pattern: str) -> Iterator[Row]:
    """Samples of WebDataset tars: audio with ``{key}.txt`` or ``{key}.json``, whose fields are kept.

    Raises:
        UserError: If no tar matches, or one cannot be read.
    """
    from salad_lightning.data.sources import expand_shards  # as above

    for path in expand_shards(pattern):
        sample: dict[str, Any] = {}
        key = ""
        for prefix, extension, content in _members(path):
            if prefix != key and sample:
                yield _sample(path, key, sample)
                sample = {}
            key, sample[extension] = prefix, content
        if sample:
            yield _sample(path, key, sample)


def _members(path: str) -> Iterator[tuple[str, str, bytes | TarMember]]:
    """Key, extension, and content (of audio: its place) of what is needed of a tar."""
    from salad_lightning.data.format import AUDIO_EXTENSIONS  # as above

    try:
        with tarfile.open(path, "r:", tarinfo=StrictTarInfo) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                base, _, extension = name.partition(".")
                if not member.isfile() or not base:
                    continue
                check_member(member)
                key, extension = f"{folder}/{base}" if folder else base, extension.lower()
                if extension in ("txt", "json"):
                    file = tar.extractfile(member)
                    yield key, extension, file.read() if file else b""
                elif extension in AUDIO_EXTENSIONS:
                    yield key, extension, TarMember(path, member.offset_data, member.size)
            check_end(tar)
    except UserError as error:
        raise UserError(error.what, where=path, cure=error.cure) from error
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise UserError(
            f"not a readable tar ({error})", where=path, cure="unpack it if it is compressed, or fetch it again"
        ) from error


def _sample(path: str, key: str, members: dict[str, Any]) -> Row:
    where, values = f"{path}: {key}", {"key": key}
    audio = next((content for content in members.values() if isinstance(content, TarMember)), None)
    try:
        if "json" in members:
            record = json.loads(members["json"])
            if not isinstance(record, dict):
                return Row(where, values, audio, "the .json is not an object")
            values |= record
            values["key"] = key
        if "txt" in members:
            values["text"] = members["txt"].decode().strip()
    except (ValueError, RecursionError) as error:
        return Row(where, values, audio, f"the sample does not parse ({error})")
    return Row(where, values, audio, "" if audio or "encoded" not in values else "the audio is already encoded")


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    "manifest": read_manifest,
    "text": read_text,
    "hf": read_hugging_face,
    "lhotse": read_lhotse,
    "librispeech": read_librispeech,
    "tars": read_tars,
}
"""By option of ``prepare``."""


def input_files(kind: str, pattern: str) -> Iterator[str]:
    """Files that a corpus is read from, those of its recordings among them.

    Args:
        kind: Of `READERS`.
        pattern: As its reader takes it.

    Raises:
        UserError: As its reader does.
    """
    from salad_lightning.data.sources import expand_shards  # as above

    if kind == "hf":
        yield from map(str, hugging_face_files(pattern))
    elif kind in ("tars", "text"):
        for path in [pattern] if kind == "tars" else _text_files(pattern):
            yield from expand_shards(path) if kind == "tars" or _is_tar(path) else [path]
    else:
        yield pattern
        yield from (row.audio.path for row in READERS[kind](pattern) if row.audio is not None)

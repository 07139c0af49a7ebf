"""``salad-lightning prepare``: a manifest of recordings, or plain text, to shards.

The shards appear together, when all of them are complete; ``index.json`` comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_lightning.corpus.manifest import Row, read_rows
from salad_lightning.errors import UserError

if TYPE_CHECKING:
    from salad_lightning.data.format import ShardWriter

__all__ = ["add_arguments", "prepare", "run"]

_INDEX = "index.json"
_PARTIAL = ".partial"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="recordings: a .tsv (with a header) or .jsonl with `audio` (a path, relative to this file) and `text`; "
        "optional `words` (JSON, [[word, start_s, end_s], …]), `key`; all other columns are kept",
    )
    what.add_argument("--text", type=Path, metavar="FILE", help="plain text: a .jsonl or .parquet with `text`")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--source", metavar="NAME", help="name of the shards; the output folder's name by default")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of the text (default: text)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help="resample the audio (default: keep its rate)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that an earlier run wrote")


def run(args: argparse.Namespace) -> None:
    """Prepare what the options say, and print what came of it."""
    index = prepare(
        args.manifest or args.text,
        args.output,
        audio=args.manifest is not None,
        source=args.source,
        text_column=args.text_column,
        samples_per_shard=args.samples_per_shard,
        sample_rate_hz=args.sample_rate,
        overwrite=args.overwrite,
    )
    hours = f", {index['seconds'] / 3600:.2f} h" if args.manifest else ""
    print(f"{args.output}: {index['num_samples']} samples{hours} in {len(index['shards'])} shards")


def prepare(
    manifest: str | Path,
    output: str | Path,
    *,
    audio: bool = True,
    source: str | None = None,
    text_column: str = "text",
    samples_per_shard: int = 1000,
    sample_rate_hz: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write shards and their index; the same input gives the same bytes.

    Args:
        manifest: ``.tsv``, ``.jsonl`` or ``.parquet``; see `add_arguments`.
        output: Folder for the shards; made if missing.
        audio: Whether the rows name recordings, or are plain text.
        source: Shards are called ``{source}-000000.tar``; the output folder's name by default.
        text_column: Column of the text.
        samples_per_shard: Samples in every shard but the last.
        sample_rate_hz: Rate of the FLAC files; None keeps each recording's own.
        overwrite: Replace the shards listed in the folder's index.

    Returns:
        The content of ``index.json``: counts, seconds and SHA-256 in all and by shard.

    Raises:
        UserError: If a row is unusable, or the folder holds anything that must not be replaced.
    """
    output = Path(output)
    source = source or output.resolve().name
    if not source or any(char in source for char in "./\\{}*?[]"):
        raise UserError(f"{source!r} cannot begin a file name", where="--source", cure="use letters, digits, - and _")
    if samples_per_shard < 1 or (sample_rate_hz is not None and sample_rate_hz < 1):
        raise UserError("sizes and rates start at 1", where="--samples-per-shard, --sample-rate")
    rows = read_rows(manifest)
    old = _replaceable(output, overwrite)
    base = Path(manifest).parent if audio else None
    with _workspace(output) as partial:
        shards = _write(rows, partial, base, source, text_column, samples_per_shard, sample_rate_hz)
        if not shards:
            raise UserError("there is no row", where=str(manifest), cure="list at least one sample")
        index = {
            "source": source,
            "sample_rate_hz": sample_rate_hz,
            "num_samples": sum(shard.num_samples for shard in shards),
            "seconds": round(sum(shard.seconds for shard in shards), 3),
            "shards": [shard.entry(partial) for shard in shards],
        }
        (partial / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for path in old:
            path.unlink(missing_ok=True)
        for shard in shards:
            os.replace(partial / shard.name, output / shard.name)
        os.replace(partial / _INDEX, output / _INDEX)
    return index


@dataclass
class _Shard:
    name: str
    num_samples: int = 0
    seconds: float = 0.0

    def entry(self, folder: Path) -> dict[str, Any]:
        digest = hashlib.sha256()
        with (folder / self.name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        seconds = round(self.seconds, 3)
        return {"name": self.name, "num_samples": self.num_samples, "seconds": seconds, "sha256": digest.hexdigest()}


def _replaceable(output: Path, overwrite: bool) -> list[Path]:
    """Files of an earlier run that are to be replaced, index first: without it a set of shards is incomplete."""
    if output.exists() and not output.is_dir():
        raise UserError("not a folder", where=str(output), cure="choose another --output")
    found = {path.name for path in output.iterdir()} - {_PARTIAL} if output.exists() else set()
    if not found:
        return []
    if not overwrite:
        raise UserError(
            "the folder is not empty", where=str(output), cure="choose another --output, or add --overwrite"
        )
    listed: list[str] = []
    if _INDEX in found:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            listed = [shard["name"] for shard in json.loads((output / _INDEX).read_text(encoding="utf-8"))["shards"]]
    foreign = sorted(found - {*listed, _INDEX})
    if foreign:
        raise UserError(
            f"the folder holds {foreign[0]}, which its {_INDEX} does not list",
            where=str(output),
            cure="remove it yourself, or choose another --output",
        )
    return [output / _INDEX, *(output / name for name in listed if name in found)]


@contextlib.contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    """A folder inside the output where files wait until all are complete; gone afterwards, come what may."""
    created = not output.exists()
    partial = output / _PARTIAL
    if partial.exists():  # an earlier run was killed
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if created and not any(output.iterdir()):
            output.rmdir()


def _write(
    rows: Iterator[Row],
    folder: Path,
    base: Path | None,
    source: str,
    text_column: str,
    samples_per_shard: int,
    sample_rate_hz: int | None,
) -> list[_Shard]:
    # Here, not above: the format brings torch along, and `prepare --help` should answer at once.
    from tqdm import tqdm  # type: ignore[import-untyped]

    from salad_lightning.data.format import ShardWriter

    shards: list[_Shard] = []
    with ShardWriter(folder, source, samples_per_shard) as writer:
        for number, row in enumerate(tqdm(rows, desc="prepare", unit=" samples")):
            if number % samples_per_shard == 0:
                shards.append(_Shard(f"{source}-{len(shards):06d}.tar"))
            shards[-1].seconds += _write_row(row, number, writer, base, text_column, sample_rate_hz)
            shards[-1].num_samples += 1
    return shards


def _write_row(
    row: Row, number: int, writer: ShardWriter, base: Path | None, text_column: str, sample_rate_hz: int | None
) -> float:
    """Append one row to the shards; returns the seconds of its audio."""
    # As in `_write`.
    from salad_lightning.data.format import TIME_SLACK_S, decode_audio, encode_flac, parse_words

    record = dict(row.values)
    text = record.pop(text_column, None)
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"there is no text in column `{text_column}`",
            where=row.where,
            cure="fill it, drop the row, or name another column with --text-column",
        )
    record["text"] = text
    audio_path = record.pop("audio", None) if base is not None else None
    key = _key(record.pop("key", None), audio_path, number)
    content, seconds = None, 0.0
    if base is not None:
        if not isinstance(audio_path, str):
            raise UserError("there is no `audio`", where=row.where, cure="plain text is prepared with --text")
        try:
            encoded = (base / audio_path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{base / audio_path} cannot be read ({error.strerror})", where=row.where, cure="check the path"
            ) from error
        audio, rate = decode_audio(encoded, sample_rate_hz, f"{row.where}: {audio_path}")
        seconds = len(audio) / rate
        words = parse_words(record.get("words"), row.where)
        if words and words[-1].end_s > seconds + TIME_SLACK_S:
            raise UserError(f"the last word ends at {words[-1].end_s} s, the audio at {seconds:.2f} s", where=row.where)
        record.setdefault("seconds", round(seconds, 3))
        content = encode_flac(audio, rate)
    try:
        writer.write(key, json.loads(json.dumps(record, default=str)), content)  # dates of parquet become text
    except ValueError as error:
        raise UserError(str(error), where=row.where, cure="give every row its own `key`") from error
    return seconds


def _key(key: Any, audio_path: Any, number: int) -> str:
    """The ``key`` column, the audio's path, or the row's number, as WebDataset takes it."""
    if key is None and isinstance(audio_path, str):
        key = Path(audio_path).with_suffix("").as_posix()
    name = "".join(char if char.isalnum() or char in "-_" else "_" for char in str(key or f"{number:09d}")).strip("_")
    if len(name.encode()) <= 80:
        return name
    # Tar headers hold 100 bytes of name.
    return f"{name.encode()[:60].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"

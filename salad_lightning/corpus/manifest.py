"""Reading what users list their corpora in: TSV, CSV, JSONL and parquet. Standard library until parquet comes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from salad_lightning.corpus.recordings import Recording
from salad_lightning.errors import UserError

__all__ = ["Row", "as_json", "key_of", "read_rows"]

_JSON_COLUMNS = ("words", "choices")
_NUMBER_COLUMNS = ("seconds", "speech_end_s")


class Row(NamedTuple):
    """One line of a manifest, or one sample of another corpus.

    Attributes:
        where: File and line, for messages.
        values: Column name to value.
        audio: Where the recording is; None for plain text and where it is missing.
        problem: What makes the row unusable; empty where nothing does.
    """

    where: str
    values: dict[str, Any]
    audio: Recording | None = None
    problem: str = ""


def read_rows(path: str | Path) -> Iterator[Row]:
    """Rows of a ``.tsv`` or ``.csv`` (with a header), ``.jsonl`` or ``.parquet`` file, in order.

    In TSV and CSV, ``words`` and ``choices`` are JSON, ``seconds`` and ``speech_end_s`` numbers, ``answer`` an index
    where there are ``choices``; everything else is text, and empty cells are left out.

    Raises:
        UserError: If the file is missing, of another kind, or a line does not parse.
    """
    path = Path(path)
    readers = {".tsv": _read_tsv, ".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if not path.exists():
        raise UserError("the file does not exist", where=str(path), cure="check the path")
    if path.suffix.lower() not in readers or not path.is_file():
        raise UserError("not a .tsv, .csv, .jsonl or .parquet file", where=str(path), cure="convert it or rename it")
    return readers[path.suffix.lower()](path)


def _read_tsv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _read_cells(path, csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), "check the tabs")


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from _read_cells(path, csv.reader(file, strict=True), "check commas and quotes")


def _read_cells(path: Path, lines: Any, cure: str) -> Iterator[Row]:
    try:
        header: list[str] = next(lines, [])
        for cells in lines:
            where = f"{path}, line {lines.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(f"{len(cells)} cells under {len(header)} columns", where=where, cure=cure)
            values: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            yield Row(where, _typed(values, where))
    except UnicodeDecodeError as error:
        raise _not_utf8(path) from error
    except csv.Error as error:
        raise UserError(
            f"the line does not parse ({error})", where=f"{path}, line {lines.line_num}", cure=cure
        ) from error


def _not_utf8(path: Path) -> UserError:
    """Where a file stops being UTF-8: it was decoded in blocks, not by line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                kind = "utf-16" if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"
                return UserError(
                    f"not UTF-8 (byte 0x{line[error.start]:02x})",
                    where=f"{path}, line {number}",
                    cure=f"convert it to UTF-8, for instance `iconv -f {kind} -t utf-8`",
                )
    return UserError("not UTF-8", where=str(path), cure="convert it to UTF-8")


def key_of(audio: str) -> str:
    """The key of a row that has none of its own, from the path of its recording; empty where that names no file."""
    path = Path(audio)
    return path.with_suffix("").as_posix() if path.name else ""


def _typed(values: dict[str, Any], where: str) -> dict[str, Any]:
    for name in (*_JSON_COLUMNS, *_NUMBER_COLUMNS):
        if name in values:
            kind = list if name in _JSON_COLUMNS else (int, float)
            try:
                values[name] = json.loads(values[name])
            except (ValueError, RecursionError) as error:
                raise UserError(f"`{name}` does not parse ({error})", where=where) from error
            if not isinstance(values[name], kind):
                raise UserError(f"`{name}` is {values[name]!r}", where=where, cure="see `prepare --help`")
    if "choices" in values and str(values.get("answer", "")).isdecimal():
        values["answer"] = int(values["answer"])
    return values


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:  # decoded by json, so that a bad byte is named with its line
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"not JSON ({error})", where=where) from error
            if not isinstance(values, dict):
                raise UserError("not a JSON object", where=where)
            yield Row(where, values)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # heavy, and only parquet needs it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except pyarrow.ArrowException as error:
        raise UserError(f"not a readable parquet file ({error})", where=str(path)) from error


def as_json(values: dict[str, Any]) -> dict[str, Any]:
    """A row's values as they will be read from a shard: dates of parquet become text.

    Raises:
        UserError: If they are not Unicode text.
    """
    try:
        record: dict[str, Any] = json.loads(json.dumps(values, default=str, ensure_ascii=False).encode())
    except UnicodeEncodeError as error:  # JSON escapes can spell half of a surrogate pair
        raise UserError(f"the row is not Unicode text ({error})", cure="write the row again") from error
    return record

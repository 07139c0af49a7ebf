"""Reading a Hugging Face datasets folder on disk, without the datasets library."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salad_lightning.corpus.manifest import Row, key_of
from salad_lightning.corpus.recordings import TableCell
from salad_lightning.errors import UserError

__all__ = ["hugging_face_files", "read_hugging_face"]


def read_hugging_face(pattern: str) -> Iterator[Row]:
    """Rows of a dataset with an audio column, ``{bytes, path}``.

    Args:
        pattern: Folder, file or glob of one split: parquet files as on the hub, or what ``Dataset.save_to_disk`` wrote.

    Raises:
        UserError: If there is no such file, the files belong to several splits, or none of the columns is audio.
    """
    for path in hugging_face_files(pattern):
        yield from _read(path)


def hugging_face_files(pattern: str) -> list[Path]:
    """Files of one split.

    Raises:
        UserError: If there is none, or they belong to several splits.
    """
    paths = [Path(path) for path in sorted(glob.glob(pattern))]
    if Path(pattern).is_dir():
        paths = sorted(path for path in Path(pattern).rglob("*") if path.suffix in (".parquet", ".arrow"))
    if not paths:
        raise UserError("no .parquet or .arrow file is there", where=pattern, cure="give the folder of a dataset")
    splits = sorted({_split(path) for path in paths})
    if len(splits) > 1:
        raise UserError(
            f"there is more than one split, {splits[0]} and {splits[1]}",
            where=pattern,
            cure=f"give one, such as --hf '{splits[0]}*'",
        )
    return paths


def _split(path: Path) -> str:
    """``data/train`` of ``data/train-00000-of-00009.parquet``; files named otherwise go by folder."""
    name = re.sub(r"-\d+-of-\d+$", "", path.stem)
    return str(path.with_name(name)) if name != path.stem else f"{path.parent}/"


def _read(path: Path) -> Iterator[Row]:
    # Here, because `prepare --help` imports this module.
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".arrow":
            with pyarrow.memory_map(str(path)) as file:
                table = pyarrow.ipc.open_stream(file).read_all()
            yield from _rows(path, [table], table.schema)
            return
        with pyarrow.parquet.ParquetFile(path) as file:
            audio = _audio_column(path, file.schema_arrow)
            columns = [name if name != audio else f"{name}.path" for name in file.schema_arrow.names]
            groups = (file.read_row_group(group, columns=columns) for group in range(file.num_row_groups))
            yield from _rows(path, groups, file.schema_arrow)
    except pyarrow.ArrowException as error:
        raise UserError(f"not a readable file ({error})", where=str(path), cure="fetch it again") from error


def _rows(path: Path, groups: Any, schema: Any) -> Iterator[Row]:
    audio, number = _audio_column(path, schema), 0
    for group, table in enumerate(groups):
        names = [name for chunk in table.column(audio).chunks for name in chunk.field("path").to_pylist()]
        for row, values in enumerate(table.drop_columns([audio]).to_pylist()):
            number += 1
            if values.get("key") is None and (values.get("id") or names[row]):
                values["key"] = str(values.get("id") or key_of(names[row]))
            yield Row(f"{path}, row {number}", values, TableCell(str(path), audio, group, row))


def _audio_column(path: Path, schema: Any) -> str:
    from pyarrow import types  # as above

    found = [
        field.name
        for field in schema
        if types.is_struct(field.type) and {"bytes", "path"} <= {part.name for part in field.type}
    ]
    if not found:
        raise UserError(
            f"no column is audio ({', '.join(schema.names)})", where=str(path), cure="plain text is read with --text"
        )
    return "audio" if "audio" in found else str(found[0])

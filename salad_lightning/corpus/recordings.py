"""Where a recording is: a file, a part of one, a member of a tar, a cell of a table."""

from __future__ import annotations

import functools
import io
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salad_lightning.errors import UserError

__all__ = ["AudioFile", "Recording", "TableCell", "TarMember"]


class Recording(ABC):
    """Something whose content is an audio file; small enough to send to a worker process.

    Attributes:
        path: The file that it is, or is a part of.
    """

    path: str

    @property
    @abstractmethod
    def name(self) -> str:
        """For messages."""

    @abstractmethod
    def read(self) -> bytes:
        """The content of an audio file.

        Raises:
            UserError: If it cannot be read.
        """

    def stamp(self) -> tuple[int, int] | None:
        """Size and time of the file; None where it is not there."""
        try:
            status = os.stat(self.path)
        except (OSError, ValueError):
            return None
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class AudioFile(Recording):
    """An audio file, or a part of one.

    Attributes:
        path: The file.
        start_s: Where the part begins.
        duration_s: How long it is; None for the whole file.
        channel: Of the part; None averages them.
    """

    path: str
    start_s: float = 0.0
    duration_s: float | None = None
    channel: int | None = None

    @property
    def name(self) -> str:
        """The file."""
        return self.path

    def read(self) -> bytes:
        """See `Recording.read`; a part is read without decoding what lies before it."""
        try:
            return Path(self.path).read_bytes() if self.duration_s is None else self._read_part(self.duration_s)
        except (OSError, ValueError) as error:  # of a path with a null byte or half of a surrogate pair
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.path} cannot be read ({reason})", cure="check the path") from error

    def _read_part(self, duration_s: float) -> bytes:
        # Here, because `prepare --help` imports this module.
        import soundfile

        from salad_lightning.data.audio import check_length

        try:
            with open(self.path, "rb") as content, soundfile.SoundFile(content) as file:
                first = round(self.start_s * file.samplerate)
                if not 0 <= first < file.frames:
                    raise UserError(f"{self.path} is shorter than {self.start_s} s", cure="check the manifest")
                count = min(round(duration_s * file.samplerate), file.frames - first)
                check_length(count, file.channels, file.samplerate, self.path)
                file.seek(first)
                audio = file.read(count, dtype="float32", always_2d=True)
                rate = file.samplerate
        except soundfile.SoundFileError as error:
            raise UserError(f"{self.path}: the audio cannot be decoded ({error})") from error
        if self.channel is not None:
            if self.channel >= audio.shape[1]:
                raise UserError(f"{self.path} has no channel {self.channel}", cure="check the manifest")
            audio = audio[:, self.channel]
        part = io.BytesIO()
        soundfile.write(part, audio, rate, format="WAV", subtype="FLOAT")
        return part.getvalue()


@dataclass(frozen=True)
class TarMember(Recording):
    """A member of an uncompressed tar."""

    path: str
    offset: int
    num_bytes: int

    @property
    def name(self) -> str:
        """Tar and offset."""
        return f"{self.path}, byte {self.offset}"

    def read(self) -> bytes:
        """See `Recording.read`."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.num_bytes)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror})", cure="check the path") from error


@dataclass(frozen=True)
class TableCell(Recording):
    """A cell of an audio column, ``{bytes, path}``, as Hugging Face datasets stores them.

    Attributes:
        path: A parquet file, or an arrow file in the streaming format.
        column: Name.
        group: Row group of the parquet file; 0 for arrow.
        row: Within the group.
    """

    path: str
    column: str
    group: int
    row: int

    @property
    def name(self) -> str:
        """The column; rows are numbered in the file, not in the group."""
        return f"column `{self.column}`"

    def read(self) -> bytes:
        """See `Recording.read`; where the cell holds a path alone, the file is looked for beside the table."""
        cell = _column(self.path, self.column, self.group)[self.row].as_py() or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise UserError(f"column `{self.column}` is empty")
        return AudioFile(str(Path(self.path).parent / cell["path"])).read()


@functools.lru_cache(maxsize=2)
def _column(path: str, column: str, group: int) -> Any:
    # Here, because `prepare --help` imports this module.
    import pyarrow
    import pyarrow.parquet

    try:
        if path.endswith(".arrow"):
            with pyarrow.memory_map(path) as file:
                return pyarrow.ipc.open_stream(file).read_all().column(column)
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read_row_group(group, columns=[column]).column(column)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read ({error})", cure="check the file") from error

"""Tars from strangers: nothing outside of the archive, nothing without bounds, and no end taken for granted."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from salad_lightning.errors import UserError

__all__ = ["MAX_MEMBER_BYTES", "StrictTarInfo", "check_end", "check_member", "read_members"]

MAX_MEMBER_BYTES = 2**30
"""Larger members are refused: none of ours comes near, and all of it would be read into memory."""

_CHUNK = 65_536

_MAX_NAME = 4096
"""The longest path of Linux; splitting a name into key and extension takes quadratic time."""


class StrictTarInfo(tarfile.TarInfo):
    """A header that has to be there; for the ``tarinfo`` of `tarfile.open`.

    The standard reader takes a missing, cut or damaged header for the end of the tar and says nothing of the rest.
    """

    @classmethod
    def fromtarfile(cls, tar: Any) -> StrictTarInfo:
        """Read a header.

        Raises:
            ReadError: If there is neither a whole header nor a block of zeros, which ends a tar.
        """
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"the file was cut off or is damaged: {error}") from error


def read_members(file: Any, is_read: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files of an uncompressed tar; links, devices and folders are passed over.

    Args:
        file: Has ``read``; need not seek.
        is_read: Whether a name is wanted; the others' contents are not read.

    Raises:
        UserError: For a name that leads out of the archive, is no UTF-8 or absurdly long, for absurd sizes, and if
            anything follows the tar.
        TarError: If the tar is damaged or was cut off.
    """
    seekable = getattr(file, "seekable", None)
    mode: Any = "r:" if seekable and seekable() else "r|"  # a stream copies everything once more
    with tarfile.open(fileobj=file, mode=mode, tarinfo=StrictTarInfo, bufsize=_CHUNK) as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # or they would be kept to the end
            if not member.isreg() or not is_read(member.name):
                _check_name(member.name)
                continue
            check_member(member)
            # Not by `extractfile`, which copies in small pieces: the file stands where the content begins.
            content = tar.fileobj.read(member.size)
            if len(content) < member.size:
                raise tarfile.ReadError("unexpected end of data")
            yield member.name, content
        check_end(tar)


def check_end(tar: tarfile.TarFile) -> None:
    """Refuse what follows a tar whose members were all read: `tarfile` stops at the first block of zeros.

    The file is read to its end, where a command that failed says so.

    Raises:
        UserError: If there is more than zeros.
    """
    assert tar.fileobj is not None  # it is open
    while chunk := tar.fileobj.read(_CHUNK):
        if chunk.strip(b"\0"):
            raise UserError(
                "a second tar follows the first, or something else does", cure="list the tars one by one, not joined"
            )


def check_member(member: tarfile.TarInfo) -> None:
    """Refuse what no corpus holds.

    Raises:
        UserError: For a name that leads out of the archive, is no UTF-8 or absurdly long, and for absurd sizes.
    """
    _check_name(member.name)
    if member.issparse() or not 0 <= member.size <= MAX_MEMBER_BYTES:
        raise UserError(
            f"{member.name!r} is sparse or claims {member.size} bytes", cure="do not use this file, or split it"
        )


def _check_name(name: str) -> None:
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"the archive holds {name!r}, a path outside of it", cure="do not use this file")
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"the name {name!r} is not UTF-8", cure="write the shard again with plain names") from error
    if length > _MAX_NAME:
        raise UserError(f"a name of {length} bytes begins {name[:40]!r}", cure="do not use this file")

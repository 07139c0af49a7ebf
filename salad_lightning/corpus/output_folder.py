"""A folder of shards that a command writes: what may be replaced, and where files wait until all are complete."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from salad_lightning.errors import UserError

__all__ = ["INDEX", "PARTIAL", "replaceable", "sha256_of", "shard_prefix"]

INDEX = "index.json"
"""Lists the shards; written last: without it a set of shards is incomplete."""

PARTIAL = ".partial"
"""Folder inside the output where files wait."""


def replaceable(output: Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> list[Path]:
    """Files of an earlier run that are to be replaced, index first.

    Args:
        output: May be missing.
        overwrite: Whether the user allows it.
        inputs: Files that will be read; asked for only where the folder holds anything.

    Raises:
        UserError: If an input lies in the folder, there are files and ``overwrite`` is False, or files that the index
            does not list.
    """
    if output.exists() and not output.is_dir():
        raise UserError("not a folder", where=str(output), cure="choose another --output")
    found = {path.name for path in output.iterdir()} if output.exists() else set()
    if found:
        _refuse_own_input(output, inputs)
    found -= {PARTIAL}
    if not found:
        return []
    if not overwrite:
        raise UserError(
            "the folder is not empty", where=str(output), cure="choose another --output, or add --overwrite"
        )
    listed: list[str] = []
    if INDEX in found:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            index = json.loads((output / INDEX).read_text(encoding="utf-8"))
            listed = [*(shard["name"] for shard in index["shards"]), *index.get("files", [])]
    foreign = sorted(found - {*listed, INDEX})
    if foreign:
        raise UserError(
            f"the folder holds {foreign[0]}, which its {INDEX} does not list",
            where=str(output),
            cure="remove it yourself, or choose another --output",
        )
    return [output / INDEX, *(output / name for name in listed if name in found)]


def _refuse_own_input(output: Path, inputs: Iterable[str | Path]) -> None:
    home, real = os.path.realpath(output), functools.cache(os.path.realpath)  # many inputs lie in few folders
    for path in inputs:
        try:
            place = os.path.normpath(os.path.join(real(os.path.dirname(path)), os.path.basename(path)))
            # A link may lie in the output, or point there.
            places = [place, os.path.realpath(place)] if os.path.islink(place) else [place]
        except ValueError:  # no file can be called that; its row will be a broken one
            continue
        if any(Path(place).is_relative_to(home) for place in places):
            raise UserError(
                f"the output holds its own input, {path}",
                where=str(output),
                cure="choose another --output, or what is read would be lost",
            )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def shard_prefix(source: str | None, output: Path) -> str:
    """What the names of shards begin with: ``source``, or the folder's name.

    Raises:
        UserError: If it would not serve in file names, globs and braces.
    """
    prefix = source or output.resolve().name
    if not prefix or any(char in prefix for char in "./\\{}*?[]"):
        raise UserError(f"{prefix!r} cannot begin a file name", where="--source", cure="use letters, digits, - and _")
    return prefix

"""Where documents come from: named sets of shards, each with its document builder."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from salad_lightning.data.commands import is_command
from salad_lightning.data.documents import DocumentBuilder
from salad_lightning.data.storage import expand_remote, is_remote
from salad_lightning.errors import UserError

__all__ = ["Source", "check_sources", "expand_shards", "shard_paths"]

_RANGE = re.compile(r"(\{\d+\.\.\d+\})")


@dataclass
class Source:
    """A set of shards read with one document builder.

    Attributes:
        shards: A folder, a file, a glob (``train/*.tar``) or braces (``train-{000000..000009}.tar``), or several;
            local, or at an address (``s3://bucket/train``, ``gs://``, ``https://``) that fsspec reads. Samples are as
            `salad_lightning.data.format` says, or audio beside a ``.txt``.
        documents: Builder of documents.
        weight: Share of the *positions* of the mixture, relative to the other sources' weights; training only.
        name: Name in logs; the folder's name by default.
        max_bad_fraction: Share of the samples, and of the shards, that is skipped and listed where it cannot be used;
            every reader skips 5 of each in any case, unless this is 0. By default 0.001 in training, and 0 in
            evaluation, whose results would change with what is left out.
        allow_pipe: Whether shards may be ``pipe:`` and a shell command that writes a tar, which **runs** with all your
            rights. Of the braces in it, ``{000000..000009}`` alone is expanded, to that many commands; the rest is
            the shell's.
        max_epochs: How often training reads it before it leaves the mixture to the others; by default, without end. A
            checkpoint is resumed with the same number only.
    """

    shards: str | list[str]
    documents: DocumentBuilder
    weight: float = 1.0
    name: str = ""
    max_bad_fraction: float | None = None
    allow_pipe: bool = False
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            first = self.shards if isinstance(self.shards, str) else (self.shards or [""])[0]
            path = Path(first)
            self.name = (path.parent if path.name.endswith(".tar") else path).name or "source"


def shard_paths(source: Source) -> list[str]:
    """Files of a source, sorted.

    Raises:
        UserError: If a path is missing or has an unbalanced brace, a folder holds no shard, or a path is a command and
            `allow_pipe` is off.
    """
    if not source.shards:
        raise UserError(f"source {source.name!r} lists no shards", where="shards", cure="give a folder of .tar files")
    return expand_shards(source.shards, remote=True, allow_pipe=source.allow_pipe)


def expand_shards(shards: str | Sequence[str], *, remote: bool = False, allow_pipe: bool = False) -> list[str]:
    """Files that a path stands for, sorted; see `Source.shards`.

    Args:
        shards: One path or several.
        remote: Whether addresses are taken.
        allow_pipe: Whether ``pipe:`` commands are.

    Raises:
        UserError: If a path is missing or has an unbalanced brace, a folder holds no shard, or a path is an unwanted
            command or address.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    return sorted({path for pattern in patterns for path in _expand(pattern, remote, allow_pipe)})


def check_sources(sources: Sequence[Source], where: str) -> None:
    """Refuse what no stream can be built from.

    Args:
        sources: Of one configuration key.
        where: That key, for messages.

    Raises:
        UserError: If there is no source, a weight or count is not positive, a fraction is none, or two sources share a
            name.
    """
    if not sources:
        raise UserError("there is no source", where=where, cure="list at least one")
    names = [source.name for source in sources]
    for source in sources:
        if not source.weight > 0:
            raise UserError(f"the weight of source {source.name!r} is {source.weight}", where=where, cure="give > 0")
        if source.max_epochs is not None and source.max_epochs < 1:
            raise UserError(
                f"`max_epochs` of source {source.name!r} is {source.max_epochs}", where=where, cure="give 1 or more"
            )
        if not 0 <= (source.max_bad_fraction or 0.0) <= 1:
            raise UserError(
                f"`max_bad_fraction` of source {source.name!r} is {source.max_bad_fraction}",
                where=where,
                cure="give 0 to 1",
            )
        if names.count(source.name) > 1:
            raise UserError(f"two sources are called {source.name!r}", where=where, cure="give each a `name`")


def _expand(pattern: str, remote: bool, allow_pipe: bool) -> list[str]:
    if allow_pipe and is_command(pattern):
        return _commands(pattern)
    if is_remote(pattern):
        if not remote:
            raise UserError(
                "only local files are read here", where=pattern, cure="download the shards or mount their storage"
            )
        return [path for address in _braces(pattern) for path in expand_remote(address)]
    paths: list[str] = []
    for path in _braces(pattern):
        if os.path.isdir(path):
            found = glob.glob(os.path.join(glob.escape(path), "*.tar"))
            if not found:
                raise UserError("the folder holds no .tar shard", where=path, cure="write some with `prepare`")
        elif glob.has_magic(path):
            found = glob.glob(path)
            if not found:
                raise UserError("no shard matches", where=path, cure="check the path")
        elif os.path.isfile(path):
            found = [path]
        else:
            raise UserError("the shard does not exist", where=path, cure="check the path")
        paths += found
    return paths


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UserError(
            "a brace has no partner", where=pattern, cure="close it, or put a backslash before one that is of the name"
        ) from error


def _commands(command: str) -> list[str]:
    # Only what numbers shards, and what no `sh` expands: all other braces, and backslashes, are the shell's or awk's.
    parts = [_braces(part) if number % 2 else [part] for number, part in enumerate(_RANGE.split(command))]
    return ["".join(chosen) for chosen in itertools.product(*parts)]

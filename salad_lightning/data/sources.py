"""Where documents come from: named sets of shards, each with its document builder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from salad_lightning.data.documents import DocumentBuilder
from salad_lightning.errors import UserError

__all__ = ["Source", "check_sources", "expand_shards", "shard_paths"]


@dataclass
class Source:
    """A set of shards read with one document builder.

    Attributes:
        shards: A folder, a file, a glob (``train/*.tar``) or braces (``train-{000000..000009}.tar``), or several.
        documents: Builder of documents.
        weight: Share of the *positions* of the mixture, relative to the other sources' weights; training only.
        name: Name in logs; the folder's name by default.
    """

    shards: str | list[str]
    documents: DocumentBuilder
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            first = self.shards if isinstance(self.shards, str) else (self.shards or [""])[0]
            path = Path(first)
            self.name = (path.parent if path.name.endswith(".tar") else path).name or "source"


def shard_paths(source: Source) -> list[str]:
    """Files of a source, sorted.

    Raises:
        UserError: If a path is missing, a folder holds no shard, or a path is a command or an address.
    """
    if not source.shards:
        raise UserError(f"source {source.name!r} lists no shards", where="shards", cure="give a folder of .tar files")
    return expand_shards(source.shards)


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """Files that a path stands for, sorted; see `Source.shards`.

    Raises:
        UserError: If a path is missing, a folder holds no shard, or a path is a command or an address.
    """
    patterns = [shards] if isinstance(shards, str) else shards
    return sorted({path for pattern in patterns for path in _expand(pattern)})


def check_sources(sources: Sequence[Source], where: str) -> None:
    """Refuse what no stream can be built from.

    Args:
        sources: Of one configuration key.
        where: That key, for messages.

    Raises:
        UserError: If there is no source, a weight is not positive, or two sources share a name.
    """
    if not sources:
        raise UserError("there is no source", where=where, cure="list at least one")
    names = [source.name for source in sources]
    for source in sources:
        if not source.weight > 0:
            raise UserError(f"the weight of source {source.name!r} is {source.weight}", where=where, cure="give > 0")
        if names.count(source.name) > 1:
            raise UserError(f"two sources are called {source.name!r}", where=where, cure="give each a `name`")


def _expand(pattern: str) -> list[str]:
    # WebDataset would run `pipe:` in a shell and fetch addresses through one.
    if re.match(r"[A-Za-z][A-Za-z0-9+]+:", pattern):
        raise UserError("only local files are read", where=pattern, cure="download the shards or mount their storage")
    paths: list[str] = []
    for path in braceexpand.braceexpand(pattern):
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

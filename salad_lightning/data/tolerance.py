"""What becomes of samples and shards that cannot be used: skipped, counted and listed, until there are too many."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Literal

from salad_lightning.errors import UserError

__all__ = ["FORGIVEN", "Tolerance"]

FORGIVEN = 5
"""Bad samples, and bad shards, that one reader skips however few it has read: a fraction of few is nothing."""

_log = logging.getLogger(__name__)


class Tolerance:
    """Of one source, as one reader meets it.

    Samples and shards have a budget each: a lost shard is many samples, and nobody knows how many. What is met again in
    another epoch counts once.

    Args:
        source: Name of the source.
        max_bad_fraction: Share of the samples read (of the shards opened) that may be unusable; 0 skips nothing.
        listing: File of JSON lines that each bad sample is added to, with source, shard, key (empty for a shard) and
            reason. What it holds already, of an earlier epoch or run, is not listed again.

    Attributes:
        last: The last mistake that was skipped.
    """

    def __init__(self, source: str, max_bad_fraction: float = 0.0, listing: Path | None = None) -> None:
        self.source, self.max_bad_fraction, self.listing = source, max_bad_fraction, listing
        self.last: UserError | None = None
        self._read: Counter[str] = Counter()
        self._skips: Counter[str] = Counter()
        self._places: dict[str, set[tuple[str, str]]] = {"sample": set(), "shard": set()}
        self._listed: set[tuple[str, str, str]] | None = None

    def count(self, kind: Literal["sample", "shard"]) -> None:
        """One more was read."""
        self._read[kind] += 1

    def skip(self, kind: Literal["sample", "shard"], error: UserError, shard: str, key: str = "") -> None:
        """Note a bad one, which has been counted before.

        Raises:
            UserError: ``error`` itself if nothing may be skipped; with a summary if this is one too many.
        """
        if not self.max_bad_fraction:
            raise error
        self.last = error
        self._skips[kind] += 1
        is_new = (shard, key) not in self._places[kind]
        self._places[kind].add((shard, key))
        bad, read = len(self._places[kind]), self._read[kind]
        if is_new:
            self._list(shard, key, error.what)
            if bad == 1:
                _log.warning(
                    "source %r: skipped a %s: %s\nOthers are only listed: %s", self.source, kind, error, self.listing
                )
        all_bad = not is_new and self._skips[kind] == read  # a second epoch, and none that could be used
        if all_bad or bad > max(FORGIVEN, self.max_bad_fraction * read):
            listed = f", listed in {self.listing}" if self.listing is not None else ""
            raise UserError(
                f"{error.what} (source {self.source!r}: {bad} of {read} {kind}s cannot be used{listed}; "
                f"`max_bad_fraction` is {self.max_bad_fraction:g})",
                where=error.where,
                cure=error.cure or "mend the source, or raise its `max_bad_fraction`",
            ) from error

    def _list(self, shard: str, key: str, reason: str) -> None:
        if self.listing is None:
            return
        place = self.source, shard, key
        try:
            if self._listed is None:
                self._listed = _places(self.listing)
            if place in self._listed:
                return
            self._listed.add(place)
            line = json.dumps({"source": self.source, "shard": shard, "key": key, "reason": reason}) + "\n"
            self.listing.parent.mkdir(parents=True, exist_ok=True)
            # One write a line: the workers of a process share the file.
            descriptor = os.open(self.listing, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:  # a full disk ends no training
            _log.warning("%s cannot be written: %s", self.listing, error)


def _places(listing: Path) -> set[tuple[str, str, str]]:
    places = set()
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a killed run
                entry = json.loads(line)
                places.add((str(entry["source"]), str(entry["shard"]), str(entry["key"])))
    return places

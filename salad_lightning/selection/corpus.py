"""The texts to choose from, as one file with random access; what cannot be chosen is skipped and listed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from salad_lightning.corpus.manifest import read_rows
from salad_lightning.data.format import decode, read_shard
from salad_lightning.errors import UserError
from salad_lightning.selection.settings import TextSettings

__all__ = ["TextCorpus", "corpus_files", "read_corpus"]


class TextCorpus:
    """Texts by number; picklable, and nothing of it stays in memory but 8 bytes a text.

    Args:
        folder: What `read_corpus` wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "texts.jsonl"
        self._offsets: NDArray[np.int64] = np.load(Path(folder) / "offsets.npy")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``{"text": …, …}`` with the other columns of its row."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            row: dict[str, Any] = json.loads(file.readline())
        return row

    def texts(self, start: int, stop: int) -> list[str]:
        """Texts ``[start, stop)``."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[start])
            return [json.loads(file.readline())["text"] for _ in range(start, min(stop, len(self)))]

    def num_bytes(self) -> NDArray[np.int64]:
        """``[N]`` size of each row, to sort by length without reading."""
        return self._offsets[1:] - self._offsets[:-1]


def corpus_files(paths: Sequence[str]) -> list[Path]:
    """Files of a corpus, folders of shards expanded, in order.

    Raises:
        UserError: If a path is missing, or a folder holds no shard.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not found or not found[0].exists():
            what = "the folder holds no .tar shard" if path.is_dir() else "no such file"
            raise UserError(what, where=str(path), cure="check texts.paths")
        files += found
    if not files:
        raise UserError("no text is given", where="texts.paths", cure="list at least one file or folder")
    return files


def read_corpus(settings: TextSettings, folder: Path) -> TextCorpus:
    """Write ``texts.jsonl``, ``offsets.npy`` and ``skipped.jsonl``.

    Empty texts, repeated ones (but for white space) and those above ``max_chars`` are skipped, listed with the reason,
    and counted.

    Args:
        settings: Files, column and limit.
        folder: An existing folder.

    Raises:
        UserError: If a file cannot be read, or no text is left.
    """
    seen: set[bytes] = set()
    skipped: Counter[str] = Counter()
    offsets = [0]
    with (folder / "texts.jsonl").open("wb") as kept, (folder / "skipped.jsonl").open("w", encoding="utf-8") as left:
        for where, row in tqdm(_rows(settings), desc="read", unit=" texts"):
            text = row.pop(settings.column, None)
            reason = _unfit(text, settings.max_chars, seen)
            if reason:
                skipped[reason] += 1
                start = text[:60] if isinstance(text, str) else ""
                left.write(json.dumps({"where": where, "reason": reason, "text": start}, ensure_ascii=False) + "\n")
                continue
            line = json.dumps({**row, "text": text}, ensure_ascii=False, default=str).encode() + b"\n"
            kept.write(line)
            offsets.append(offsets[-1] + len(line))
    if len(offsets) == 1:
        counted = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there is none"
        raise UserError(f"no text can be used ({counted})", where=", ".join(settings.paths), cure="check texts.column")
    np.save(folder / "offsets.npy", np.asarray(offsets, dtype=np.int64))
    (folder / "counts.json").write_text(json.dumps({"kept": len(offsets) - 1, "skipped": dict(skipped)}, indent=1))
    return TextCorpus(folder)


def _unfit(text: Any, max_chars: int, seen: set[bytes]) -> str:
    if not isinstance(text, str) or not text.strip():
        return "empty"
    if len(text) > max_chars:
        return f"longer than {max_chars} characters"
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return ""


def _rows(settings: TextSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in corpus_files(settings.paths):
        if path.suffix != ".tar":
            yield from ((row.where, dict(row.values)) for row in read_rows(path))
            continue
        for raw in read_shard(path):
            utterance = decode(raw, source="", sample_rate_hz=0)
            yield utterance.where, {**utterance.fields, "key": utterance.key, settings.column: utterance.text}

"""Reading lhotse's cut manifests, without lhotse."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salad_lightning.corpus.manifest import Row
from salad_lightning.corpus.recordings import AudioFile, Recording
from salad_lightning.errors import UserError

__all__ = ["read_lhotse"]


def read_lhotse(path: str) -> Iterator[Row]:
    """The supervisions of a cut manifest (https://lhotse.readthedocs.io/en/latest/cuts.html), one row each.

    A row hears its supervision's stretch of the recording. ``words`` come from the ``word`` alignment, whose times
    count from the start of the cut. Speaker, language and gender are kept.

    Args:
        path: ``.jsonl`` or ``.jsonl.gz``. Recordings must be files; relative paths are looked for beside the manifest,
            then in the working directory, as lhotse does.

    Raises:
        UserError: If the file is missing or not a manifest of cuts.
    """
    if not Path(path).is_file():
        raise UserError("the file does not exist", where=path, cure="check the path")
    opener: Any = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield from _rows(json.loads(line), f"{path}, line {number}", Path(path).parent)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(
                f"not JSON ({error})", where=f"{path}, line {number}", cure="give cuts as .jsonl or .jsonl.gz"
            ) from error


def _rows(cut: Any, where: str, folder: Path) -> Iterator[Row]:
    if not isinstance(cut, dict) or "recording" not in cut or "supervisions" not in cut:
        kind = cut.get("type", "no cut") if isinstance(cut, dict) else "no cut"
        raise UserError(
            f"not a cut of one recording ({kind})", where=where, cure="write a CutSet of MonoCuts (lhotse cut simple …)"
        )
    for number, supervision in enumerate(cut["supervisions"]):
        key = str(supervision.get("id") or f"{cut['id']}-{number}")
        values = {
            name: supervision[name] for name in ("speaker", "language", "gender") if supervision.get(name) is not None
        }
        values |= {"key": key, "text": _text(supervision)}
        try:
            words = _words(supervision)
            if words:
                values["words"] = words
            audio = _recording(cut, supervision, folder)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            yield Row(where, values, problem=f"the supervision does not parse ({type(error).__name__}: {error})")
            continue
        problem = "" if audio else "the recording is not a single file; only sources of type `file` are read"
        yield Row(where, values, audio, problem)


def _text(supervision: dict[str, Any]) -> Any:
    # LibriHeavy (arXiv 2309.08105) has no `text` but two in `custom.texts`: with case and punctuation, and without.
    texts = (supervision.get("custom") or {}).get("texts")
    return supervision.get("text") or (texts[0] if texts else None)


def _words(supervision: dict[str, Any]) -> list[list[Any]]:
    offset_s = float(supervision["start"])
    words = []
    for symbol, start_s, duration_s, *_ in (supervision.get("alignment") or {}).get("word", []):
        if str(symbol).strip():  # aligners report pauses as empty words
            begin_s = max(start_s - offset_s, 0.0)
            words.append([symbol, round(begin_s, 3), round(max(start_s - offset_s + duration_s, begin_s), 3)])
    return words


def _recording(cut: dict[str, Any], supervision: dict[str, Any], folder: Path) -> Recording | None:
    sources = [source for source in cut["recording"]["sources"] if source["type"] == "file"]
    if len(sources) != 1 or len(cut["recording"]["sources"]) != 1:
        return None
    path = Path(sources[0]["source"])
    beside = folder / path
    channel = supervision.get("channel", cut.get("channel"))
    # A supervision may reach beyond its cut; what is heard may not.
    start_s = max(float(supervision["start"]), 0.0)
    end_s = min(float(supervision["start"]) + float(supervision["duration"]), float(cut["duration"]))
    return AudioFile(
        str(beside if beside.is_file() else path),
        round(float(cut["start"]) + start_s, 6),
        round(end_s - start_s, 6),
        sources[0]["channels"].index(channel) if isinstance(channel, int) else None,
    )

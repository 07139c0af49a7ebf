"""Reading lhotse's cut manifests, without lhotse."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from salad_lightning.corpus.manifest import Row
from salad_lightning.corpus.recordings import AudioFile, Recording
from salad_lightning.errors import UserError

__all__ = ["read_lhotse"]

_LONGEST_LINE = 2**26
_SLACK_S = 0.25  # as TIME_SLACK_S of the format, which would bring torch along


def read_lhotse(path: str) -> Iterator[Row]:
    """The supervisions of a cut manifest (https://lhotse.readthedocs.io/en/latest/cuts.html), one row each.

    A row hears its supervision's stretch of the recording. ``words`` come from the ``word`` alignment, whose times
    count from the start of the recording, as in lhotse's ``Cut.trim_to_alignments``, or, where only that puts them
    inside the supervision, from the start of the cut. Speaker, language and gender are kept.

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
            # A compressed line may hold more than memory does: a longer one is no JSON.
            for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), ""), 1):
                if line.strip():
                    yield from _rows(json.loads(line), f"{path}, line {number}", Path(path).parent)
        except (ValueError, EOFError, OSError, zlib.error, RecursionError) as error:
            raise UserError(
                f"not JSON ({error})", where=f"{path}, line {number}", cure="give cuts as .jsonl or .jsonl.gz"
            ) from error


def _rows(cut: Any, where: str, folder: Path) -> Iterator[Row]:
    if not isinstance(cut, dict) or "recording" not in cut or "supervisions" not in cut:
        kind = cut.get("type", "no cut") if isinstance(cut, dict) else "no cut"
        raise UserError(
            f"not a cut of one recording ({kind})", where=where, cure="write a CutSet of MonoCuts (lhotse cut simple …)"
        )
    if not isinstance(cut["supervisions"], list):
        raise UserError("`supervisions` is not a list", where=where, cure="write the cuts with lhotse")
    for number, supervision in enumerate(cut["supervisions"]):
        if not isinstance(supervision, dict):
            raise UserError(f"supervision {number} is not an object", where=where, cure="write the cuts with lhotse")
        key = str(supervision.get("id") or f"{cut.get('id', 'cut')}-{number}")
        values = {
            name: supervision[name] for name in ("speaker", "language", "gender") if supervision.get(name) is not None
        }
        values["key"] = key
        try:
            values["text"] = _text(supervision)
            words = _words(cut, supervision)
            if words:
                values["words"] = words
            audio, problem = _recording(cut, supervision, folder), _problem(cut, supervision)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            yield Row(where, values, problem=f"the supervision does not parse ({type(error).__name__}: {error})")
            continue
        yield Row(where, values, audio, problem)


def _text(supervision: dict[str, Any]) -> Any:
    # LibriHeavy (arXiv 2309.08105) has no `text` but two in `custom.texts`: with case and punctuation, and without.
    texts = (supervision.get("custom") or {}).get("texts")
    return supervision.get("text") or (texts[0] if texts else None)


def _problem(cut: dict[str, Any], supervision: dict[str, Any]) -> str:
    """Why the audio is not what the text says; empty where it is."""
    recording = cut["recording"]
    if [source["type"] for source in recording["sources"]] != ["file"]:
        return "the recording is not a single file; only sources of type `file` are read"
    # Resampling moves no time, and `prepare` does it itself.
    changes = [change["name"] for change in recording.get("transforms") or [] if change["name"] != "Resample"]
    if changes:
        return f"the recording is changed on the fly ({changes[0]}); save the changed audio with lhotse first"
    start_s, duration_s = float(supervision["start"]), float(supervision["duration"])
    if not (0 <= float(cut["start"]) < math.inf and 0 < duration_s < math.inf):
        return f"the cut begins at {cut['start']} s, the supervision lasts {duration_s} s"
    if not -_SLACK_S <= start_s <= float(cut["duration"]) + _SLACK_S - duration_s:
        return "the cut ends inside the supervision, whose text says more than is heard"
    return ""


def _words(cut: dict[str, Any], supervision: dict[str, Any]) -> list[list[Any]]:
    items = (supervision.get("alignment") or {}).get("word", [])
    items = [item for item in items if str(item[0]).strip()]  # aligners report pauses as empty words
    if not items:
        return []
    first_s, last_s = min(start for _, start, *_ in items), max(start + duration for _, start, duration, *_ in items)
    in_cut_s = float(supervision["start"])
    for offset_s in (float(cut["start"]) + in_cut_s, in_cut_s):
        if first_s - offset_s >= -_SLACK_S and last_s - offset_s <= float(supervision["duration"]) + _SLACK_S:
            break
    else:
        raise ValueError(f"words from {first_s} to {last_s} s lie outside of the supervision")
    words = []
    for symbol, start_s, duration_s, *_ in items:
        begin_s = max(start_s - offset_s, 0.0)
        words.append([symbol, round(begin_s, 3), round(max(start_s - offset_s + duration_s, begin_s), 3)])
    return words


def _recording(cut: dict[str, Any], supervision: dict[str, Any], folder: Path) -> Recording:
    source = cut["recording"]["sources"][0]
    path = Path(source["source"])
    beside = folder / path
    channel = supervision.get("channel", cut.get("channel"))
    # A supervision may reach a little beyond its cut; what is heard may not.
    start_s = max(float(supervision["start"]), 0.0)
    end_s = min(float(supervision["start"]) + float(supervision["duration"]), float(cut["duration"]))
    return AudioFile(
        str(beside if beside.is_file() else path),
        round(float(cut["start"]) + start_s, 6),
        round(end_s - start_s, 6),
        source["channels"].index(channel) if isinstance(channel, int) else None,
    )

"""Multiple-choice rows to shards of spoken questions, by a synthesizer or from recordings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from salad_lightning.corpus.keyed_rows import keyed
from salad_lightning.corpus.manifest import Row, read_rows
from salad_lightning.corpus.output_folder import INDEX
from salad_lightning.corpus.prepare import prepare
from salad_lightning.corpus.synthesize import synthesize
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.errors import UserError
from salad_lightning.evaluation.question_templates import OWN, TEMPLATES, read_question

__all__ = ["question_shards"]

_QUESTIONS, _SHOTS = "questions", "shots"


def question_shards(
    rows: str | Path,
    output: str | Path,
    *,
    task: str,
    shots: str | Path | None = None,
    num_shots: int = 5,
    labels: str | Path | None = None,
    prompt: str | None = None,
    audio_column: str | None = None,
    limit: int | None = None,
    **speaking: Any,
) -> dict[str, int]:
    """Write ``{output}/questions`` and, where there are examples, ``{output}/shots``, beside their manifests.

    Args:
        rows: ``.jsonl``, ``.parquet``, ``.csv`` or ``.tsv`` in the form of `TEMPLATES`, or of one's own (`OWN`), whose
            rows may list examples of the same form in their field ``shots``.
        output: Folder.
        task: Name in `TEMPLATES`, or any other name for rows of one's own.
        shots: Rows of the same form, of which the first ``num_shots`` are examples for every question.
        num_shots: How many.
        labels: Answers of ``rows`` one a line, in the form of the field they stand for (PIQA is published so).
        prompt: In place of the template's.
        audio_column: Recordings in place of synthetic speech: a path beside the file, or ``{"bytes": …}``.
        limit: Read only so many rows.
        speaking: For `synthesize`, or for `prepare` where there are recordings.

    Returns:
        Samples written to each folder.

    Raises:
        UserError: If a row cannot be used, before anything is written; or as `synthesize` and `prepare`.
    """
    output = Path(output)
    questions, examples = _read(Path(rows), task, limit, labels)
    if examples and audio_column is not None:
        raise UserError("examples in rows have no recordings", where=str(rows), cure="put them into a file of --shots")
    if shots is not None:
        examples = [*_read(Path(shots), task, num_shots, None)[0], *examples]
    if not questions:
        raise UserError("there is no row", where=str(rows), cure="list at least one question")
    tables = {_QUESTIONS: (rows, questions), **({_SHOTS: (shots, examples)} if examples else {})}
    for row in questions + examples:
        row.values["prompt"] = prompt or row.values["prompt"]
        _check_prompt(row)
    if not speaking.get("overwrite") and (found := [name for name in tables if (output / name / INDEX).exists()]):
        raise UserError("the folder holds shards", where=str(output / found[0]), cure="add --overwrite to replace them")
    counts = {}
    for name, (file, table) in tables.items():
        if audio_column is not None:
            _add_recordings(table, Path(str(file)), audio_column, output / "recordings" / name)
        output.mkdir(parents=True, exist_ok=True)
        counts[name] = _speak(table, output, name, audio_column is not None, speaking)
    return counts


def _read(path: Path, task: str, limit: int | None, labels: str | Path | None) -> tuple[list[Row], list[Row]]:
    """Questions, and the examples that they bring along."""
    questions: list[Row] = []
    examples: list[Row] = []
    for key, row in _labelled(keyed(read_rows(path)), labels):
        if limit is not None and len(questions) >= limit:
            break
        if row.problem:
            raise UserError(row.problem, where=row.where)
        own = [] if task in TEMPLATES else row.values.get(_SHOTS) or []
        if not isinstance(own, list) or not all(isinstance(shot, dict) for shot in own):
            raise UserError("`shots` is no list of questions", where=row.where, cure="give objects like the row itself")
        keys = [f"{key}-shot{number}" for number in range(len(own))]
        question = _values(row.values, key, task, row.where)
        questions.append(Row(row.where, question | ({_SHOTS: keys} if own else {})))
        for name, shot in zip(keys, own, strict=True):
            examples.append(Row(row.where, _values(shot, name, task, f"{row.where}, {name}")))
    return questions, examples


def _labelled(rows: Iterable[tuple[str, Row]], labels: str | Path | None) -> Iterable[tuple[str, Row]]:
    if labels is None:
        return rows
    lines = [line.strip() for line in Path(labels).read_text(encoding="utf-8").rstrip().split("\n")]
    rows = list(rows)  # all of them: beside labels of other rows every answer would be wrong
    if len(lines) != len(rows):
        raise UserError(
            f"there are {len(lines)} labels for {len(rows)} rows", where=str(labels), cure="give each row a line"
        )
    return [
        (key, row._replace(values={**row.values, "label": label}))
        for (key, row), label in zip(rows, lines, strict=True)
    ]


def _values(values: Mapping[str, Any], key: str, task: str, where: str) -> dict[str, Any]:
    """A question as its shard holds it; of what the row has beside it, texts and numbers stay."""
    question = read_question(values, task, TEMPLATES.get(task, OWN), where)
    kept = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
    return kept | question._asdict() | {"key": key, "task": task}


def _check_prompt(row: Row) -> None:
    """Refuse a prompt that the row cannot fill, before hours of speech."""
    prompt = row.values["prompt"]
    names = TemplateDocuments(prompt).names  # refuses what does not parse
    for name in ("speech", "answer"):
        if name not in names:
            raise UserError(f"the prompt {prompt!r} has no {{{name}}}", where=row.where, cure=f"put {{{name}}} in it")
    if unknown := [name for name in names if name != "speech" and name not in row.values]:
        raise UserError(
            f"the prompt asks for {{{unknown[0]}}}, which the row does not have",
            where=row.where,
            cure=f"use one of speech, {', '.join(sorted(row.values))}",
        )


def _speak(rows: Sequence[Row], output: Path, name: str, recorded: bool, options: Mapping[str, Any]) -> int:
    manifest = output / f"{name}.jsonl"
    aside = manifest.with_suffix(".part")
    aside.write_text("".join(json.dumps(row.values, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, manifest)
    make = prepare if recorded else synthesize
    # One question less would be another benchmark.
    return int(make(manifest, output / name, **{"max_bad_fraction": 0.0, **options})["num_samples"])


def _add_recordings(rows: Sequence[Row], file: Path, column: str, folder: Path) -> None:
    """Put the path of its recording into every row; recordings that the file itself holds are written out."""
    for row, (key, original) in zip(rows, keyed(read_rows(file)), strict=False):
        value = original.values.get(column)
        path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
        if content:
            folder.mkdir(parents=True, exist_ok=True)
            recording = folder / f"{key}{Path(path or 'audio.wav').suffix}"
            recording.write_bytes(content)
        elif isinstance(path, str) and (file.parent / path).is_file():
            recording = file.parent / path
        else:
            raise UserError(
                f"there is no recording {path!r}", where=row.where, cure="paths in --audio-column begin at the file"
            )
        row.values["audio"] = str(recording.resolve())

"""A whole evaluation in one `test`: the cascade's row, intervals, and what the result is of."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from salad_lightning import __version__
from salad_lightning.corpus.workspace import write_aside
from salad_lightning.data.choice import ChoiceDocuments
from salad_lightning.data.format import decode
from salad_lightning.data.reader import read_shards
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import Source, shard_paths
from salad_lightning.data.tolerance import Tolerance
from salad_lightning.errors import UserError
from salad_lightning.evaluation.comparison import compare, draw, rich_table, to_markdown
from salad_lightning.evaluation.fingerprint import source_fingerprint
from salad_lightning.evaluation.recognizer import Recognizer
from salad_lightning.evaluation.transcription import ErrorRates
from salad_lightning.evaluation.transcripts import Transcript, Transcripts
from salad_lightning.training.base import save_folder

__all__ = ["SpokenEvaluation"]

_CASCADE, _TRANSCRIPTS = "cascade", "transcripts"
_NOTHING_HEARD = "."
# What holds of the audio alone.
_OF_AUDIO = ("words", "encoded", "speech_end_s")


class SpokenEvaluation(Callback):
    """Writes ``evaluation.json``, ``.md`` and ``.png`` after `test`: base LLM, adapted model and cascade on one table.

    The cascade is what the base LLM answers to what a recognizer hears (arXiv 2510.13632, section 5): before the test,
    the audio of every source is transcribed, examples included, and the transcripts become test sources of their own.
    Transcripts are kept in ``transcripts/``, so that a killed run goes on. Sources under a control (``muted``,
    ``shuffled``) have no cascade.

    Args:
        recognizer: Folder or hub name of any speech recognizer that Hugging Face's pipeline runs; None leaves the
            cascade out.
    """

    def __init__(self, recognizer: str | None = None) -> None:
        self.recognizer = recognizer
        self._sources: list[Source] = []
        self._cascades: dict[str, str] = {}
        self._rates: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the transcripts to what is tested."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage != "test" or not data.test or self._sources:
            return
        self._sources = list(data.test)
        if self.recognizer is None:
            return
        folder = save_folder(trainer)
        heard = [source for source in self._sources if source.documents.control == "none"]
        paths = sorted({str(path) for source in heard if (path := getattr(source.documents, "shots", None))})
        # As sources, whose builder nobody asks.
        shots = {path: Source(path, heard[0].documents, name=f"shots-{number}") for number, path in enumerate(paths)}
        sources = [*heard, *shots.values()]
        for source in sources:
            _check_keys(source, _tolerance(source, data))
        recognizer = Recognizer(self.recognizer, trainer.strategy.root_device)
        transcripts = Transcripts(
            folder / _TRANSCRIPTS,
            recognizer.name,
            lambda audio: recognizer.transcribe([audio])[0],
            recognizer.sample_rate_hz,
        )
        if trainer.world_size > 1:  # each its part; then all of them are known to rank 0
            for source in sources:
                for _ in transcripts.of(
                    source.shards,
                    f"{_file_name(source)}-{trainer.global_rank}",
                    part=trainer.global_rank,
                    num_parts=trainer.world_size,
                    allow_pipe=source.allow_pipe,
                    tolerance=_tolerance(source, data),
                ):
                    pass
            trainer.strategy.barrier()
        written = {source.name: folder / _CASCADE / _file_name(source) for source in sources}
        if trainer.is_global_zero:
            if trainer.world_size > 1:
                transcripts.read()
            for source in sources:
                record = _as_text if source in shots.values() else functools.partial(_as_question, source, data)
                self._write(transcripts, source, _tolerance(source, data), record, written[source.name])
        trainer.strategy.barrier()
        for source in heard:
            documents = copy.copy(source.documents)
            if getattr(documents, "shots", None) is not None:
                documents.shots = str(written[shots[str(documents.shots)].name])  # type: ignore[attr-defined]
            name = f"{source.name} ({_CASCADE})"
            data.test = [*data.test, Source(str(written[source.name]), documents, name=name)]
            self._cascades[source.name] = name

    def _write(
        self,
        transcripts: Transcripts,
        source: Source,
        tolerance: Tolerance,
        record: Callable[[Transcript], dict[str, Any]],
        folder: Path,
    ) -> None:
        """Shards of text: all that the samples hold, with what was heard in the place of the transcript."""
        rates = ErrorRates()
        aside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        name = _file_name(source)
        with ShardWriter(aside, name) as writer:
            for sample in transcripts.of(source.shards, name, allow_pipe=source.allow_pipe, tolerance=tolerance):
                try:
                    content = record(sample)
                except UserError as error:  # as the test will skip it
                    tolerance.skip("sample", error, sample.raw.shard, sample.raw.key)
                    continue
                writer.write(sample.raw.key, content)
                fields = sample.utterance.fields
                speaker = str(fields.get("speaker", "unknown"))
                rates.update(sample.utterance.text, sample.heard, speaker=speaker, source=source.name)
        if not writer.paths:
            raise UserError("there is no sample", where=str(source.shards), cure="write the shards again")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        self._rates[source.name] = rates.results()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results."""
        if not trainer.is_global_zero or not self._sources:
            return
        folder = save_folder(trainer)
        figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
        right = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        controls = {source.name for source in self._sources if source.documents.control != "none"}
        content = compare(right, {name: entry["all"] for name, entry in figures.items()}, self._cascades, controls)
        if not content["tasks"]:
            return
        for source in self._sources:
            if source.name in content["tasks"]:
                content["tasks"][source.name]["fingerprint"] = source_fingerprint(source)
                if source.name in self._rates:
                    content["tasks"][source.name]["transcription"] = self._rates[source.name]["all"]
        content |= {
            "model": _describe(trainer, pl_module),
            "recognizer": self.recognizer,
            "salad_lightning": __version__,
            "transcription": self._rates,
        }
        draw(content, folder / "evaluation.png")
        for name, text in (("evaluation.md", to_markdown(content)), ("evaluation.json", json.dumps(content, indent=1))):
            write_aside(folder / name, text)
        Console().print(rich_table(content))


def _tolerance(source: Source, data: Any) -> Tolerance:
    """As the test will have it."""
    return Tolerance(source.name, source.max_bad_fraction or 0.0, data.skipped_listing())


def _file_name(source: Source) -> str:
    return quote(source.name, safe=" ")  # two names stay two


def _check_keys(source: Source, tolerance: Tolerance) -> None:
    """Refuse a key that occurs twice: scores go by key. One reading is little beside hours of transcription."""
    seen: dict[str, str] = {}
    for raw in read_shards(shard_paths(source), tolerance, allow_pipe=source.allow_pipe):
        if raw.key in seen:
            raise UserError(
                f"the key occurs twice, first in {seen[raw.key]}",
                where=f"{raw.shard}: {raw.key}",
                cure="give every sample of the source its own key",
            )
        seen[raw.key] = raw.shard


def _as_text(sample: Transcript) -> dict[str, Any]:
    record = json.loads(sample.raw.members["json"])
    kept = {name: value for name, value in record.items() if name not in _OF_AUDIO}
    return kept | {"text": sample.heard or _NOTHING_HEARD}


def _as_question(source: Source, data: Any, sample: Transcript) -> dict[str, Any]:
    """As text, with the examples that the question has where it is heard: of text alone, more of them would fit.

    Raises:
        UserError: If no document can be built, so that the test has none either.
    """
    spec, builder = data.spec, source.documents
    utterance = decode(sample.raw, source=source.name, sample_rate_hz=spec.sample_rate_hz, keep_int16=True)
    length = builder.build(utterance, spec, seed=data.seed)[0].num_tokens
    if not isinstance(builder, ChoiceDocuments):
        return _as_text(sample)
    keys = [shot.key for shot in builder.examples_of(utterance, spec)]
    while keys:
        fewer = dataclasses.replace(utterance, fields={**utterance.fields, "shots": keys[:-1]})
        if builder.build(fewer, spec)[0].num_tokens < length:
            break
        keys.pop()
    return _as_text(sample) | {"shots": keys}


def _describe(trainer: Trainer, pl_module: LightningModule) -> str:
    """Checkpoint and LLM, by name."""
    parameters: Any = pl_module.hparams
    path = trainer.ckpt_path or parameters.get("init_from")
    return f"{path or 'untrained'} on {parameters.get('llm')}"

"""A whole evaluation in one `test`: the cascade's row, intervals, and what the result is of."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from salad_lightning import __version__
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import Source
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
        recognizer = Recognizer(self.recognizer, trainer.strategy.root_device)
        transcripts = Transcripts(
            folder / _TRANSCRIPTS,
            self.recognizer,
            lambda audio: recognizer.transcribe([audio])[0],
            recognizer.sample_rate_hz,
        )
        shards = {source.name: source.shards for source in heard}
        shots = sorted({str(path) for source in heard if (path := getattr(source.documents, "shots", None))})
        shards |= {f"shots-{number}": path for number, path in enumerate(shots)}
        if trainer.world_size > 1:  # each its part; then all of them are known to rank 0
            for name, path in shards.items():
                for _ in transcripts.of(
                    path, f"{name}-{trainer.global_rank}", part=trainer.global_rank, num_parts=trainer.world_size
                ):
                    pass
            trainer.strategy.barrier()
        written = {str(path): folder / _CASCADE / name for name, path in shards.items()}
        if trainer.is_global_zero:
            if trainer.world_size > 1:
                transcripts.read()
            for name, path in shards.items():
                self._write(transcripts, path, name, folder / _CASCADE / name)
        trainer.strategy.barrier()
        for source in heard:
            documents = copy.copy(source.documents)
            if getattr(documents, "shots", None) is not None:
                documents.shots = str(written[str(documents.shots)])  # type: ignore[attr-defined]
            name = f"{source.name} ({_CASCADE})"
            data.test = [*data.test, Source(str(written[str(source.shards)]), documents, name=name)]
            self._cascades[source.name] = name

    def _write(self, transcripts: Transcripts, shards: str | list[str], name: str, folder: Path) -> None:
        """Shards of text: all that the samples hold, with what was heard in the place of the transcript."""
        rates = ErrorRates()
        aside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        with ShardWriter(aside, name.replace("/", "_")) as writer:
            for sample in transcripts.of(shards, name):
                writer.write(sample.raw.key, _as_text(sample))
                fields = sample.utterance.fields
                speaker = str(fields.get("speaker", "unknown"))
                rates.update(sample.utterance.text, sample.heard, speaker=speaker, source=name)
        if not writer.paths:
            raise UserError("there is no sample", where=str(shards), cure="write the shards again")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        self._rates[name] = rates.results()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results."""
        if not trainer.is_global_zero or not self._sources:
            return
        folder = save_folder(trainer)
        figures = json.loads((folder / "test.json").read_text(encoding="utf-8"))
        right = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        content = compare(right, {name: entry["all"] for name, entry in figures.items()}, self._cascades)
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
            aside = folder / f"{name}.part"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, folder / name)
        Console().print(rich_table(content))


def _as_text(sample: Transcript) -> dict[str, Any]:
    record = json.loads(sample.raw.members["json"])
    kept = {name: value for name, value in record.items() if name not in _OF_AUDIO}
    return kept | {"text": sample.heard or _NOTHING_HEARD}


def _describe(trainer: Trainer, pl_module: LightningModule) -> str:
    """Checkpoint and LLM, by name."""
    parameters: Any = pl_module.hparams
    path = trainer.ckpt_path or parameters.get("init_from")
    return f"{path or 'untrained'} on {parameters.get('llm')}"

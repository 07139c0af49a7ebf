"""Small real runs of the command line: a folder with model, shards and one YAML file, and what a run wrote."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Qwen2Config

from salad_lightning.cli import main
from salad_lightning.model.small import small_qwen2
from salad_lightning.testing.shards import save_choice_shards, save_speech_shards, save_text_shards
from salad_lightning.testing.tiny import save_tiny_llm

__all__ = ["TinyRun", "TinyWorld", "save_tiny_world"]

_INTERLEAVE = {"class_path": "InterleaveDocuments", "init_args": {"text_words": [1, 4], "speech_words": [2, 5]}}
_CHOICE = {"class_path": "TemplateDocuments", "init_args": {"template": "{speech} {answer}", "all_choices": True}}


@dataclass(frozen=True)
class TinyRun:
    """What a run left in its folder.

    Attributes:
        folder: ``trainer.default_root_dir`` of the run.
    """

    folder: Path

    def metrics(self) -> list[dict[str, float]]:
        """Rows of all ``metrics.csv`` in order of writing, empty cells left out."""
        paths = sorted(self.folder.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        rows = [row for path in paths for row in csv.DictReader(path.open())]
        return [{name: float(value) for name, value in row.items() if value} for row in rows]

    def column(self, name: str) -> list[float]:
        """All values of one metric, in order."""
        return [row[name] for row in self.metrics() if name in row]

    def checkpoint(self, name: str = "last.ckpt") -> dict[str, Any]:
        """A checkpoint of this run, loaded without unpickling code."""
        path = self.folder / "checkpoints" / name
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return loaded

    def results(self, name: str = "test.json") -> Any:
        """A JSON file of this run."""
        return json.loads((self.folder / name).read_text())


@dataclass(frozen=True)
class TinyWorld:
    """A folder with all that a run of seconds needs: ``llm``, shards ``speech``, ``text`` and ``choice``, ``run.yaml``.

    Attributes:
        folder: Holds them; runs write below it.
    """

    folder: Path

    @property
    def config(self) -> Path:
        """The configuration of `SpeechLLMModule` on log-mel frames and an MLP."""
        return self.folder / "run.yaml"

    def arguments(self, subcommand: str, name: str, *options: str) -> list[str]:
        """The command line of a run that writes to the folder ``name``; options override ``run.yaml``."""
        root = f"--trainer.default_root_dir={self.folder / name}"
        return [subcommand, "--config", str(self.config), root, *options]

    def run(self, subcommand: str, name: str, *options: str) -> TinyRun:
        """Run in this process.

        Raises:
            RuntimeError: If the command does not end well.
        """
        if code := main(self.arguments(subcommand, name, *options)):
            raise RuntimeError(f"{subcommand} ended with {code}")
        return TinyRun(self.folder / name)

    def start(self, subcommand: str, name: str, *options: str) -> subprocess.Popen[str]:
        """Start a process of its own, on one thread, with its output (errors included) as a pipe."""
        command = [sys.executable, "-m", "salad_lightning", *self.arguments(subcommand, name, *options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=self.folder
        )


def save_tiny_world(folder: str | Path) -> TinyWorld:
    """Save model, shards and configuration.

    Args:
        folder: Where to; made if missing.
    """
    world = TinyWorld(Path(folder).resolve())
    save_tiny_llm(world.folder / "llm", config=_decided())
    save_speech_shards(world.folder / "speech", num_samples=40)
    save_text_shards(world.folder / "text", num_samples=40)
    save_choice_shards(world.folder / "choice", num_samples=12)
    world.config.write_text(yaml.safe_dump(_settings(world.folder), sort_keys=False))
    return world


def _decided() -> Qwen2Config:
    """Weights large enough that the model is sure of some tokens: a KL of a few thousandths would show nothing."""
    return small_qwen2(32, 2, initializer_range=0.3)


def _settings(folder: Path) -> dict[str, Any]:
    speech = {"shards": str(folder / "speech"), "documents": _INTERLEAVE}
    text = {"shards": str(folder / "text"), "documents": {"class_path": "InterleaveDocuments"}}
    model = {
        "llm": str(folder / "llm"),
        "encoder": {"class_path": "LogMelEncoder"},
        "connector": {"class_path": "MLPConnector", "init_args": {"stack": 8}},
        "objective": {"class_path": "ForwardKLObjective"},
        "context": 128,
        "schedule": {"warmup_steps": 2, "decay_fraction": 0.5},
    }
    data = {
        "train": [{**speech, "weight": 2}, text],
        "val": [speech],
        "test": [{"shards": str(folder / "choice"), "documents": _CHOICE}],
        "rows_per_batch": 2,
        "lookahead": 8,
    }
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 10,
        "max_epochs": -1,
        "val_check_interval": 1000,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return {
        "seed_everything": 0,
        "model": {"class_path": "SpeechLLMModule", "init_args": model},
        "data": {"class_path": "SpeechDataModule", "init_args": data},
        "trainer": trainer,
    }

"""What a run, an evaluation or a selection left in its folder, as far as it is there."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from salad_lightning.errors import UserError
from salad_lightning.evaluation.comparison import SPEECH

__all__ = ["Curve", "RunFolder", "read_run", "unique_names"]

Curve = list[tuple[float, float]]
"""Points: tokens trained on (or steps), and a value."""

_SETTINGS = ("config.yaml", "hparams.yaml")


@dataclass
class RunFolder:
    """One run.

    Attributes:
        name: Shown on the page.
        metrics: Logged rows in order of their steps, empty cells left out.
        fit: Content of ``fit.json``.
        test: Of ``test.json``.
        evaluation: Of ``evaluation.json``.
        selection: Of ``selection.json``.
        settings: The merged configuration, flat: dotted key to value.
    """

    name: str
    metrics: list[dict[str, float]] = field(default_factory=list)
    fit: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def counts_tokens(self) -> bool:
        """Whether the log says how many tokens each step had seen."""
        return any("train/tokens" in row for row in self.metrics)

    def curve(self, column: str, over_tokens: bool) -> Curve:
        """A logged value over the tokens trained on, or over optimizer steps."""
        rows = [(row["step"], row[column]) for row in self.metrics if column in row]
        if not over_tokens:
            return rows
        known = [(row["step"], row["train/tokens"]) for row in self.metrics if "train/tokens" in row]
        steps, tokens = zip((-1.0, 0.0), *known, strict=True)
        return [(float(np.interp(step, steps, tokens)), value) for step, value in rows]

    def columns(self, ending: str) -> list[str]:
        """Names logged in training and validation with this ending, those of training first."""
        names = {name for row in self.metrics for name in row if name.endswith(f"/{ending}")}
        return sorted((n for n in names if not n.startswith("test/")), key=lambda n: (not n.startswith("train/"), n))

    def last(self, column: str) -> float | None:
        """Median of a logged value over the second half of the run, or None."""
        values = [row[column] for row in self.metrics if column in row]
        return float(np.median(values[len(values) // 2 :])) if values else None

    def gaps(self) -> dict[str, tuple[float, float, float]]:
        """Task → gap of the adapted model on speech, and its 95 % interval (itself where none is known)."""
        if self.evaluation:
            rows = {name: task["rows"][SPEECH] for name, task in self.evaluation["tasks"].items()}
            return {name: (row["gap"], *row["gap_interval"]) for name, row in rows.items()}
        found = {}
        for name, entry in self.test.items():
            if "gap" in entry["all"]:
                gap = entry["all"]["gap"]
                low, high = entry.get("intervals", {}).get("gap", (gap, gap))
                found[name] = (gap, low, high)
        return found


def read_run(path: str | Path) -> RunFolder:
    """Read a folder.

    Args:
        path: ``trainer.default_root_dir`` of a run, or ``output`` of a selection.

    Raises:
        UserError: If it is no folder, holds nothing to report, or a file in it is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError("no such folder", where=str(path), cure="give the folder of a run (trainer.default_root_dir)")
    # A folder that someone has renamed, to put it aside, is no start of this run.
    starts = (path for path in folder.glob("logs/version_*") if re.fullmatch(r"version_\d+", path.name))
    versions = sorted(starts, key=lambda version: int(version.name.rpartition("_")[2]))
    run = RunFolder(folder.resolve().name, _metrics(versions), settings=_settings(versions))
    for name in ("fit", "test", "evaluation", "selection"):
        setattr(run, name, _json(folder / f"{name}.json"))
    if not (run.metrics or run.fit or run.test or run.evaluation or run.selection):
        raise UserError(
            "the folder holds nothing to report",
            where=str(path),
            cure="give one with logs/, fit.json, test.json, evaluation.json or selection.json",
        )
    return run


def unique_names(runs: Sequence[RunFolder], paths: Sequence[str | Path]) -> None:
    """Where two folders have one name, give both as much of their paths as tells them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    for run, name in zip(runs, names, strict=True):
        run.name = name


def _metrics(versions: Sequence[Path]) -> list[dict[str, float]]:
    """Rows of all starts; of what was trained twice after a crash, the later."""
    kept: list[dict[str, float]] = []
    for version in versions:
        path = version / "metrics.csv"
        if not path.is_file():
            continue
        rows = []
        with path.open(encoding="utf-8", newline="") as file:
            for number, cells in enumerate(csv.DictReader(file), 2):
                try:
                    row = {name: float(cell) for name, cell in cells.items() if cell and name}
                except (TypeError, ValueError) as error:
                    raise UserError(f"not a number ({error})", where=f"{path}, line {number}") from error
                if "step" in row:
                    rows.append(row)
        training = [row["step"] for row in rows if any(name.startswith("train/") for name in row)]
        first = min(training, default=float("inf"))
        kept = [row for row in kept if row["step"] < first] + rows
    return kept


def _settings(versions: Sequence[Path]) -> dict[str, str]:
    """Of the last start that trained, else of the last."""
    # Newest first, and of these the ones that trained.
    for version in sorted(versions, key=lambda version: (_trained(version), versions.index(version)), reverse=True):
        for name in _SETTINGS:
            if (version / name).is_file():
                try:
                    content = yaml.safe_load((version / name).read_text(encoding="utf-8"))
                except yaml.YAMLError:  # hparams.yaml of objects
                    continue
                if isinstance(content, dict):
                    return dict(_flat(content))
    return {}


def _trained(version: Path) -> bool:
    path = version / "metrics.csv"
    return path.is_file() and "train/" in path.read_text(encoding="utf-8").partition("\n")[0]


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        pairs = [_flat(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()]
        return [pair for some in pairs for pair in some]
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return [
            pair for label, inner in zip(_labels(value), value, strict=True) for pair in _flat(inner, f"{key}[{label}]")
        ]
    if key.endswith(".class_path"):
        value = str(value).rpartition(".")[2]
    return [(key.replace(".init_args", "").replace(".class_path", ""), str(value))]


def _labels(items: Sequence[Any]) -> list[str]:
    """What tells the entries of a list apart in any run: name, else class, else place."""
    entries = [item if isinstance(item, dict) else {} for item in items]
    found = [str(entry.get("name") or entry.get("class_path", "")).rpartition(".")[2] for entry in entries]
    return [label if label and found.count(label) == 1 else str(number) for number, label in enumerate(found)]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not JSON ({error})", where=str(path), cure="write it again, or move it away") from error
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=str(path), cure="write it again, or move it away")
    return content

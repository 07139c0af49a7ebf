"""One arm of a study: a Stage I run of the mini recipe with a few keys changed, its test, and its figures."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from salad_lightning.demo.pipeline import Step

__all__ = ["Arm", "arm_row", "arm_steps", "base_steps", "cli", "learning_curve"]


@dataclass(frozen=True)
class Arm:
    """What is changed against the mini recipe.

    Attributes:
        name: Of the arm.
        overrides: Command-line options of ``fit``, which ``test`` gets too.
        seed: Of initialisation, data order and the draw of spans.
    """

    name: str
    overrides: tuple[str, ...] = field(default=())
    seed: int = 0


def base_steps(recipes: Path, root: Path, *, world_seed: int = 0) -> list[Step]:
    """Everything the arms stand on: world, shards, encoder, teacher.

    Args:
        recipes: The project's recipe folder.
        root: Where to, as the commands are to name it.
        world_seed: Of the world.
    """

    def build(part: str, *after: str, weight: float = 1.0) -> Step:
        command = [sys.executable, "-m", "salad_lightning.demo.build", part, "--root", str(root)]
        return Step(part, [*command, "--seed", str(world_seed)], after, weight=weight)

    def prepare(name: str, kind: str, source: str, after: str) -> Step:
        command = [*cli("prepare"), f"--{kind}", str(root / source), "--output", str(root / "shards" / name)]
        # The teacher is the longest way of all, so what it waits for comes first.
        weight = 9.0 if name in ("text", "text_val") else 2.0
        return Step(f"prepare-{name}", [*command, "--overwrite"], (after,), weight=weight)

    text_lm, mini = recipes / "text_lm.yaml", recipes / "scale" / "mini.yaml"
    texts, splits = ("text", "text_val", "text_test", "text_mix", "text_broad"), ("train", "val", "test")
    return [
        build("text", weight=9),
        *[prepare(name, "text", f"world/{name}.jsonl", "text") for name in texts],
        Step(
            "teacher",
            [*cli("fit"), "--config", str(text_lm)],
            ("prepare-text", "prepare-text_val"),
            (text_lm,),
            weight=8.0,
        ),
        Step(
            "test-teacher",
            [
                *cli("test"), "--config", str(text_lm), "--model.init_args.from_scratch=false",
                f"--model.init_args.llm={root / 'teacher'}", f"--trainer.default_root_dir={root / 'teacher_test'}",
            ],
            ("teacher", "prepare-text_test"),
            (text_lm,),
        ),
        build("encoder", weight=5),
        *[build(f"speech-{split}", weight=4) for split in splits],
        *[
            prepare(f"speech_{split}", "manifest", f"speech/{split}/manifest.jsonl", f"speech-{split}")
            for split in splits
        ],
        Step(
            "encode-speech_train",
            [
                *cli("encode"), str(root / "shards" / "speech_train"),
                "--output", str(root / "shards" / "speech_train_encoded"), "--config", str(mini), "--overwrite",
            ],
            ("encoder", "prepare-speech_train"),
            (mini,),
        ),
    ]  # fmt: skip


def arm_steps(arm: Arm, recipes: Path, root: Path, *, warmup: bool = True) -> list[Step]:
    """Warm-up of the connector, Stage I, and the test.

    Args:
        arm: What to change.
        recipes: The project's recipe folder.
        root: Where to.
        warmup: Begin with a warmed-up connector, which arms of the same connector and seed share.
    """
    configs = (recipes / "stage1.yaml", recipes / "scale" / "mini.yaml")
    options = [word for path in configs for word in ("--config", str(path))]
    seed = [f"--seed_everything={arm.seed}", f"--data.init_args.seed={arm.seed}"]
    after: tuple[str, ...] = ("teacher", "encode-speech_train", "prepare-text_mix", "prepare-speech_val")
    steps, start = [], []
    if warmup:
        parts = [word for word in arm.overrides if ".connector=" in word or ".connector.init_args" in word]
        name = f"warmup-{arm.name}-{arm.seed}" if parts else f"warmup-{arm.seed}"
        recipe = recipes / "scale" / "warmup.yaml"
        command = [*cli("fit"), *options, "--config", str(recipe), *seed, *parts]
        steps.append(
            Step(name, [*command, f"--trainer.default_root_dir={root / name}"], after, (*configs, recipe), weight=3)
        )
        start = [f"--model.init_args.init_from={root / name / 'checkpoints' / 'final.ckpt'}"]
        after = (*after, name)
    name = f"{arm.name}-{arm.seed}"
    folder = f"--trainer.default_root_dir={root / name}"
    fit = [*cli("fit"), *options, *seed, *start, *arm.overrides, folder]
    test = [*cli("test"), *options, *arm.overrides, folder]
    checkpoint = f"--ckpt_path={root / name / 'checkpoints' / 'final.ckpt'}"
    steps.append(Step(name, fit, after, configs, weight=2))
    steps.append(Step(f"test-{name}", [*test, checkpoint], (name, "prepare-speech_test"), configs))
    return steps


def arm_row(arm: Arm, root: Path) -> dict[str, Any]:
    """An arm's figures: accuracies 0 to 1, misalignment and forgetting in nats per token.

    "heard" are domains that natural speech covers well, "unheard" those that it covers thinly or not at all.
    """
    folder = root / f"{arm.name}-{arm.seed}"
    results = json.loads((folder / "test.json").read_text())
    fit = json.loads((folder / "fit.json").read_text())
    domains = [json.loads(line) for line in (root / "world" / "domains.jsonl").read_text().splitlines()]
    heard = {domain["name"]: bool(domain["heard"]) for domain in domains}
    figures = ("speech_accuracy", "text_accuracy", "base_text_accuracy", "misalignment", "forgetting")
    row: dict[str, Any] = {"name": arm.name, "seed": arm.seed}
    for figure in figures:
        row[figure] = _by_coverage(results["questions"]["groups"][figure], heard)
    for control in results.keys() & {"muted", "shuffled"}:
        row[f"{control}_speech_accuracy"] = _by_coverage(results[control]["groups"]["speech_accuracy"], heard)
    row |= {
        "train_seconds": fit["seconds"],
        "audio_seconds": fit["audio_seconds"],
        "tokens": fit["tokens"],
        "steps": fit["steps"],
        "trainable_parameters": fit["trainable_parameters"],
    }
    return row


def learning_curve(arm: Arm, root: Path, column: str) -> list[tuple[float, float]]:
    """``(tokens seen, value)`` of a figure, from the newest log that has it (a test writes one of its own)."""
    logs = (root / f"{arm.name}-{arm.seed}" / "logs").glob("version_*/metrics.csv")
    for log in sorted(logs, key=lambda path: int(path.parent.name.removeprefix("version_")), reverse=True):
        if points := _points(log, column):
            return points
    return []


def _points(log: Path, column: str) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    tokens = 0.0
    with log.open(newline="") as file:
        for line in csv.DictReader(file):
            tokens = float(line.get("train/tokens") or tokens)
            if line.get(column):
                points.append((tokens, float(line[column])))
    return points


def _by_coverage(values: dict[str, float], heard: dict[str, bool]) -> dict[str, Any]:
    def mean(which: Sequence[str]) -> float:
        return round(fmean(values[name] for name in which), 4)

    return {
        "heard": mean([name for name in values if heard[name]]),
        "unheard": mean([name for name in values if not heard[name]]),
        "domains": {name: round(value, 4) for name, value in values.items()},
    }


def cli(subcommand: str) -> list[str]:
    """The start of a command line of this package, as a reader would type it."""
    return [str(Path(sys.executable).with_name("salad-lightning")), subcommand]

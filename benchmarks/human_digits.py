"""Stage I on recordings of real people: number tasks spoken digit by digit, tested on a speaker never heard.

    python benchmarks/human_digits.py --data DIR [--test-speaker NAME] [--json FILE]

``DIR`` holds ``manifest.tsv`` (columns audio, text, speaker) and recordings of single digits, such as the Free Spoken
Digit Dataset (https://github.com/Jakobovski/free-spoken-digit-dataset). Each speaker is left out in turn: the model
learns from the others. It runs the public commands and echoes each; what has not changed is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import yaml
from human_digits_corpus import read_manifest
from human_digits_tasks import TASKS, TEMPLATE
from rich.console import Console
from rich.table import Table

from salad_lightning.demo.pipeline import Step, run_steps, seconds_taken, source_fingerprint
from salad_lightning.errors import UserError

__all__ = ["Size", "build_report", "build_steps", "run"]

_HERE = Path(__file__).resolve().parent
_STAGE1 = _HERE.parent / "recipes" / "stage1.yaml"
_WARMUP = _HERE.parent / "recipes" / "scale" / "warmup.yaml"
_FIGURES = ("speech_accuracy", "text_accuracy", "base_text_accuracy", "misalignment", "forgetting")
_PACKAGES = ("salad-lightning", "torch", "torchaudio", "lightning", "transformers")


class Size(NamedTuple):
    """How much of everything; the defaults are the benchmark.

    Attributes:
        text_items: Items the LLM learns from as text.
        train_items: Items spoken by each speaker for training.
        test_items: Items spoken by each speaker for the test, in each task.
        llm_steps: Optimiser steps of the LLM on text.
        warmup_steps: Optimiser steps of the connector alone, by CTC.
        stage1_steps: Optimiser steps of Stage I.
        encoder_steps: Optimiser steps of each fold's encoder.
        encoder_clips: Synthetic digits it is trained on, beside the human ones.
    """

    text_items: int = 12_000
    train_items: int = 1_500
    test_items: int = 100
    llm_steps: int = 600
    warmup_steps: int = 300
    stage1_steps: int = 600
    encoder_steps: int = 1_000
    encoder_clips: int = 3_000


def run(data: Path, output: Path, *, test_speaker: str | None = None, seed: int = 0, size: Size | None = None) -> Any:
    """Run what has changed, and report.

    Args:
        data: Folder of the recordings.
        output: Where everything is written; made where missing.
        test_speaker: The only speaker to leave out; each in turn where None.
        seed: Of items, voices, weights and order.
        size: How much of everything.

    Returns:
        The report, as it is written to ``--json``.

    Raises:
        UserError: If the recordings cannot be used, there is no such speaker, or a step fails.
    """
    data, output, size = data.resolve(), output.resolve(), size or Size()
    speakers = sorted({recording.speaker for recording in read_manifest(data)})
    if len(speakers) < 2:
        raise UserError("one speaker alone cannot be left out", where=str(data / "manifest.tsv"))
    if test_speaker is not None and test_speaker not in speakers:
        raise UserError(f"there is no speaker {test_speaker!r}", where="--test-speaker", cure=f"one of {speakers}")
    left_out = speakers if test_speaker is None else [test_speaker]
    output.mkdir(parents=True, exist_ok=True)
    for name in left_out:
        _write_config(output, name, speakers, seed)
    started = time.perf_counter()
    # The encoder is a class of this folder, not of the package.
    path = os.pathsep.join(filter(None, (str(_HERE), os.environ.get("PYTHONPATH"))))
    steps = build_steps(data, output, speakers, left_out, seed, size)
    run_steps(steps, output, fingerprint=source_fingerprint(), variables={"PYTHONPATH": path})
    report = build_report(output, left_out, seed)
    return {**report, "seconds_now": round(time.perf_counter() - started, 1)}


def build_steps(
    data: Path, output: Path, speakers: Sequence[str], left_out: Sequence[str], seed: int, size: Size
) -> list[Step]:
    """All commands; paths are relative to ``output``, where they run."""
    salad = [sys.executable, "-m", "salad_lightning"]
    make = [sys.executable, str(_HERE / "human_digits_corpus.py")]
    code = tuple(_HERE / f"human_digits_{part}.py" for part in ("corpus", "sound", "tasks", "encoder", "recognition"))
    seeded, sizes = ["--seed", str(seed)], size._asdict()

    def items(kind: str) -> list[str]:
        return ["--items", str(sizes[f"{kind}_items"])]

    steps = [
        Step("llm-config", [*make, "llm", "--output", "llm_config"], reads=code, weight=9),
        Step("text", [*make, "text", "--output", "text.jsonl", *items("text"), *seeded], reads=code, weight=10),
        _prepare(salad, "text", ["--text", "text.jsonl"], "shards/text", ("text",)),
    ]
    for split in ("train", "test"):
        command = [*make, "speech", "--data", str(data), "--split", split, "--output", f"speech/{split}"]
        command += [*items(split), *seeded]
        steps.append(Step(f"speech-{split}", command, reads=(*code, data / "manifest.tsv"), weight=6))
        for name in speakers:
            manifest = ["--manifest", f"speech/{split}/{name}/manifest.jsonl"]
            steps.append(_prepare(salad, f"{split}-{name}", manifest, f"shards/{split}/{name}", (f"speech-{split}",)))
    recipe = _HERE / "human_digits_llm.yaml"
    llm = ["--config", str(recipe), "--trainer.max_steps", str(size.llm_steps), "--seed_everything", str(seed)]
    steps.append(Step("llm", [*salad, "fit", *llm], ("llm-config", "prepare-text"), (recipe,), weight=8))
    for name in left_out:
        command = [*make, "encoder", "--data", str(data), "--without", name, "--output", f"encoders/{name}", *seeded]
        command += ["--steps", str(size.encoder_steps), "--clips", str(size.encoder_clips)]
        steps.append(Step(f"encoder-{name}", command, reads=(*code, data / "manifest.tsv"), weight=7))
        steps += _fold(salad, output, name, speakers, seed, size)
    return steps


def _prepare(salad: list[str], name: str, source: list[str], shards: str, after: tuple[str, ...]) -> Step:
    return Step(f"prepare-{name}", [*salad, "prepare", *source, "--output", shards, "--overwrite"], after, weight=9)


def _fold(salad: list[str], output: Path, name: str, speakers: Sequence[str], seed: int, size: Size) -> list[Step]:
    """Warm the connector up and train on all speakers but one, test on that one."""
    recipes = (_STAGE1, _HERE / "human_digits.yaml", output / f"{name}.yaml")
    warm = (*recipes, _WARMUP, output / f"{name}-warmup.yaml")
    seeded = ["--seed_everything", str(seed)]
    heard = tuple(f"prepare-train-{other}" for other in speakers if other != name)
    after = ("llm", f"encoder-{name}", "prepare-text", *heard)
    warmed = ["--model.init_args.init_from", f"runs/{name}-warmup/checkpoints/final.ckpt"]
    checkpoint = ["--ckpt_path", f"runs/{name}/checkpoints/final.ckpt"]
    steps = [*_configs(recipes), "--trainer.max_steps", str(size.stage1_steps), *seeded]
    return [
        Step(
            f"warmup-{name}",
            [*salad, "fit", *_configs(warm), "--trainer.max_steps", str(size.warmup_steps), *seeded],
            after,
            warm,
            weight=5,
        ),
        Step(f"fit-{name}", [*salad, "fit", *steps, *warmed], (*after, f"warmup-{name}"), recipes, weight=5),
        Step(f"test-{name}", [*salad, "test", *steps, *checkpoint], (f"fit-{name}", f"prepare-test-{name}"), recipes),
    ]


def _configs(paths: Sequence[Path]) -> list[str]:
    return [word for path in paths for word in ("--config", str(path))]


def _write_config(output: Path, name: str, speakers: Sequence[str], seed: int) -> None:
    """What differs from one speaker left out to another: the encoder, the shards, and the runs' folders."""

    def source(label: str, shards: Any, weight: float, **settings: Any) -> dict[str, Any]:
        documents = {"class_path": "TemplateDocuments", "init_args": {"template": TEMPLATE, **settings}}
        return {"name": label, "shards": shards, "weight": weight, "documents": documents}

    heard = [f"shards/train/{other}" for other in speakers if other != name]
    # Speech is two thirds of the positions, as in arXiv 2510.13632, section 4.
    train = [source("speech", heard, 2.0, append_eos=True), source("text", "shards/text", 1.0, append_eos=True)]
    test = [source("unseen", f"shards/test/{name}", 1.0, all_choices=True)]
    encoder = {"class_path": "human_digits_encoder.ClipConvEncoder", "init_args": {"path": f"encoders/{name}"}}
    content = {
        "model": {"init_args": {"encoder": encoder}},
        "data": {"init_args": {"train": train, "val": None, "test": test, "seed": seed}},
        "trainer": {"default_root_dir": f"runs/{name}", "callbacks": [{"class_path": "FinalCheckpoint"}]},
    }
    (output / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    spans = {"class_path": "InterleaveDocuments", "init_args": {"text_words": [0, 1], "speech_words": [1, 2]}}
    warmup = {
        "data": {"init_args": {"train": [{"name": "speech", "shards": heard, "documents": spans}]}},
        "trainer": {"default_root_dir": f"runs/{name}-warmup"},
    }
    (output / f"{name}-warmup.yaml").write_text(yaml.safe_dump(warmup, sort_keys=False), encoding="utf-8")


def build_report(output: Path, left_out: Sequence[str], seed: int) -> dict[str, Any]:
    """Collect what the tests wrote.

    Args:
        output: The benchmark's folder.
        left_out: Speakers tested.
        seed: For the record.

    Returns:
        ``speakers`` (name → task → figures; "all" is all items), ``mean`` over them, ``digit_reading`` (speech as a
        share of text accuracy), seconds by step, versions, machine, seed, commit.
    """
    speakers = {}
    for name in left_out:
        written = json.loads((output / "runs" / name / "test.json").read_text())["unseen"]
        groups = {figure: {**written["groups"][figure], "all": written["all"][figure]} for figure in _FIGURES}
        speakers[name] = {
            task: _with_gap({figure: groups[figure][task] for figure in _FIGURES}) for task in (*TASKS, "all")
        }
    means = {
        task: {figure: mean(speakers[name][task][figure] for name in left_out) for figure in (*_FIGURES, "gap")}
        for task in (*TASKS, "all")
    }
    return {
        "speakers": speakers,
        "mean": means,
        "digit_reading": means["digit"]["speech_accuracy"] / max(means["digit"]["base_text_accuracy"], 1e-9),
        "seconds": {
            path.stem: seconds_taken(path.parent, path.stem) for path in sorted((output / ".steps").glob("*.json"))
        },
        "seed": seed,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "machine": {"platform": platform.platform(), "processor": platform.processor() or platform.machine()},
    }


def _with_gap(figures: dict[str, float]) -> dict[str, float]:
    return {**figures, "gap": figures["base_text_accuracy"] - figures["speech_accuracy"]}


def _commit() -> str:
    command = ["git", "-C", str(_HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _print(report: dict[str, Any], console: Console) -> None:
    columns = ("speech_accuracy", "text_accuracy", "gap", "misalignment", "forgetting")
    table = Table(title="Spoken number tasks, speaker never heard in training")
    for title in ("speaker", "task", "speech", "text", "gap", "M (nats)", "F (nats)"):
        table.add_column(title, justify="left" if title in ("speaker", "task") else "right")
    for name, tasks in [*report["speakers"].items(), ("mean", report["mean"])]:
        for task, figures in tasks.items():
            table.add_row(name if task == "digit" else "", task, *(f"{figures[column]:.3f}" for column in columns))
        table.add_section()
    console.print(table)
    console.print(
        "digit: one digit of ten choices; the others have four. gap: text accuracy of the original LLM − speech."
    )
    console.print(f"digit reading, mean over speakers: {report['digit_reading']:.3f} of text accuracy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 2 after a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with manifest.tsv")
    parser.add_argument("--test-speaker", metavar="NAME", help="leave out this speaker only (default: each in turn)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("--output", type=Path, default=Path("outputs/human_digits"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        report = run(args.data, args.output, test_speaker=args.test_speaker, seed=args.seed)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    content = json.dumps(report, indent=1) + "\n"
    for path in filter(None, (args.output / "report.json", args.json)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    _print(report, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())

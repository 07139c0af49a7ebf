"""``salad-lightning export``: a checkpoint to a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from salad_lightning.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", type=Path, help="checkpoint that `fit` wrote, such as RUN/checkpoints/final.ckpt")
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument(
        "--llm-only", action="store_true", help="write the adapted language model alone, for use with text"
    )
    parser.add_argument(
        "--keep-adapters",
        action="store_true",
        help="write LoRA alone, in peft's format, with the name of the LLM it belongs to (default: merge it)",
    )


def run(args: argparse.Namespace) -> None:
    """Export, and say what can be done with it."""
    # Imported here for start-up time: `export --help` must not wait for torch.
    from salad_lightning.commands.quiet import quieten
    from salad_lightning.export.card import model_card
    from salad_lightning.export.folder import check_target, save_llm, save_speech_llm
    from salad_lightning.training.from_checkpoint import trained_module

    quieten()
    check_target(args.folder)  # before minutes of loading
    module, settings, step = trained_module(str(args.checkpoint), keep_adapters=args.keep_adapters)
    card = model_card(
        args.folder.resolve().name,
        settings,
        step,
        fit=_result(args.checkpoint, "fit.json"),
        test=_result(args.checkpoint, "test.json"),
        sources=_sources(args.checkpoint),
        llm_only=args.llm_only,
    )
    spec = module.sequence_spec()
    if args.llm_only:
        save_llm(module.model.llm, args.folder, tokenizer=spec.tokenizer, card=card)
    else:
        save_speech_llm(
            module.model,
            args.folder,
            spec=spec,
            encoder=settings["encoder"],
            connector=settings["connector"],
            card=card,
        )
    size = sum(path.stat().st_size for path in args.folder.rglob("*") if path.is_file())
    print(f"{args.folder}: step {step}, {size / 1e6:.1f} MB; name a licence in its README.md before you share it")


def _sources(checkpoint: Path) -> list[dict[str, Any]]:
    """What the run that wrote the checkpoint trained on: from the configuration beside its logs, if that is there."""
    logs = sorted(
        (checkpoint.parent.parent / "logs").glob("version_*/config.yaml"), key=lambda path: path.stat().st_mtime
    )
    for path in reversed(logs):
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]["init_args"]
            if data["train"]:
                return [{**source, "name": source["name"] or _name(source["shards"])} for source in data["train"]]
        except (yaml.YAMLError, KeyError, TypeError):  # of another data module
            continue
    return []


def _name(shards: str | list[str]) -> str:
    path = Path(shards if isinstance(shards, str) else shards[0])
    return (path.parent if path.name.endswith(".tar") else path).name


def _result(checkpoint: Path, name: str) -> dict[str, Any] | None:
    """A result file of the run that wrote the checkpoint, or None."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / name).is_file():
            try:
                content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                cure = "write it again, or move it away"
                raise UserError(f"not JSON ({error})", where=str(folder / name), cure=cure) from error
            return content
    return None

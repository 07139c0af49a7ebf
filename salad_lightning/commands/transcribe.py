"""``salad-lightning transcribe``: word and character error rates of a recognizer, or of an exported speech LLM."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_lightning.errors import UserError

if TYPE_CHECKING:
    from salad_lightning.evaluation.transcripts import Hear

__all__ = ["add_arguments", "run"]

_ROWS, _FIGURES = "transcripts.jsonl", "transcription.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="shards with audio and transcripts: folders, files, …"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recognizer", metavar="NAME", help="folder or hub name of any Hugging Face speech recognizer")
    what.add_argument("--model", metavar="DIR", help="folder that `salad-lightning export` wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"folder for {_ROWS} and {_FIGURES}; "
                        "the same command goes on where a killed one stopped")  # fmt: skip
    parser.add_argument(
        "--prompt",
        default="{speech}\nTranscript:",
        help="with --model: what it continues; its first line counts (default: {speech}, a new line, Transcript:)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="with --model (default: 128)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: auto)")


def run(args: argparse.Namespace) -> None:
    """Transcribe, write what was heard and the error rates, and print these."""
    # Imported here for start-up time.
    from rich.console import Console

    from salad_lightning.commands.quiet import quieten
    from salad_lightning.corpus.workspace import write_aside
    from salad_lightning.data.sources import expand_shards
    from salad_lightning.evaluation.transcription import ErrorRates
    from salad_lightning.evaluation.transcripts import Transcripts

    quieten()
    paths = expand_shards(args.shards, remote=True)  # before minutes of loading
    if args.output.is_file():
        raise UserError("not a folder", where=str(args.output), cure="name a folder")
    name, rate_hz, hear = _listener(args)
    transcripts, rates = Transcripts(args.output / "heard", name, hear, rate_hz), ErrorRates()
    aside = args.output / f"{_ROWS}.part"
    with aside.open("w", encoding="utf-8") as file:
        for path in paths:
            folder = Path(path).parent.name
            for sample in transcripts.of(path, f"{folder}-{Path(path).stem}"):
                fields = sample.utterance.fields
                about = {
                    key: str(fields.get(key, other)) for key, other in (("speaker", "unknown"), ("source", folder))
                }
                row = {"key": sample.raw.key, **about, "text": sample.utterance.text, "heard": sample.heard}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rates.update(sample.utterance.text, sample.heard, **about)
    os.replace(aside, args.output / _ROWS)
    write_aside(args.output / _FIGURES, json.dumps({"by": name, **rates.results()}, indent=1))
    Console().print(rates.table(name))


def _listener(args: argparse.Namespace) -> tuple[str, int, Hear]:
    """A name for what hears, the rate of the audio it takes, and the function."""
    # As above.
    from salad_lightning.corpus.device import usable_device
    from salad_lightning.evaluation.fingerprint import model_name
    from salad_lightning.evaluation.recognizer import Recognizer
    from salad_lightning.export.pretrained import load_pretrained

    device = usable_device(args.device)
    if args.recognizer is not None:
        recognizer = Recognizer(args.recognizer, device)
        return recognizer.name, recognizer.sample_rate_hz, lambda audio: recognizer.transcribe([audio])[0]
    model = load_pretrained(args.model, device=device)
    rate_hz = model.processor.sample_rate_hz

    def hear(audio: Any) -> str:
        text = model.generate(audio, args.prompt, sampling_rate=rate_hz, max_new_tokens=args.max_new_tokens)
        return text.strip().partition("\n")[0]

    return f"{model_name(args.model)}, {args.prompt!r}, {args.max_new_tokens} tokens", rate_hz, hear

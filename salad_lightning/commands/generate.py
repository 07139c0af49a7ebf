"""``salad-lightning generate``: what an exported model says to audio and prompts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salad_lightning.errors import UserError

if TYPE_CHECKING:
    from salad_lightning.data.segments import Document
    from salad_lightning.export.pretrained import SpeechLanguageModel
    from salad_lightning.model.generation import Decoding

__all__ = ["add_arguments", "run"]


class _Item(NamedTuple):
    """One prompt: its audio, its template, and what fills the template's other names."""

    audio: str | None
    prompt: str
    fields: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("audio", nargs="*", type=Path, help="audio files of any rate and format, or folders of them")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder that `salad-lightning export` wrote")
    parser.add_argument(
        "--prompt",
        default="{speech}",
        help="text with {speech} where the audio is heard, and {name} for fields of --jsonl lines; in bash, "
        "$'...\\n...' has line breaks (default: {speech})",
    )
    parser.add_argument(
        "--jsonl",
        type=Path,
        metavar="FILE",
        help='lines of {"audio": path beside the file, "prompt": in place of --prompt, …}; without "audio", "text" is '
        "read where {speech} stands",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write lines of JSON here instead of the terminal")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default: 64)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="prompts at a time (default: 8)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="above 0 draws tokens; 0 is greedy (default: 0)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from this much probability")
    parser.add_argument("--seed", type=int, default=0, help="for drawing (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: auto)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the language model")


def run(args: argparse.Namespace) -> None:
    """Generate, and print or write what came of it."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}", cure="give 1 or more")
    if args.output is not None and (args.output.is_dir() or not args.output.parent.is_dir()):
        raise UserError("no file can be written there", where=str(args.output), cure="name a file in a folder")
    items = list(_items(args))
    # Imported here for start-up time: `generate --help` must not wait for torch.
    import torch
    from transformers import TextStreamer
    from transformers.utils import logging

    from salad_lightning.commands.quiet import quieten
    from salad_lightning.corpus.device import usable_device
    from salad_lightning.export.pretrained import load_pretrained
    from salad_lightning.model.generation import Decoding

    quieten()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p)
    device = usable_device(args.device)
    model = load_pretrained(args.model, dtype=getattr(torch, args.dtype), device=device)
    torch.manual_seed(args.seed)
    if len(items) == 1 and args.output is None:
        streamer = TextStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.complete([_prepare(model, items[0], decoding)], decoding, streamer=streamer)
        return
    if len(items) > args.batch_size:
        for item in items:  # all of them once, so that the last one does not stop hours of work
            _prepare(model, item, decoding)
    rows = _rows(model, items, decoding, args.batch_size)
    if args.output is None:
        for row in rows:
            print(f"{row['audio'] or row['prompt']}\t{row['output']}", flush=True)
    else:
        _write(args.output, rows, len(items))


def _rows(
    model: SpeechLanguageModel, items: list[_Item], decoding: Decoding, batch_size: int
) -> Iterator[dict[str, Any]]:
    for first in range(0, len(items), batch_size):
        some = items[first : first + batch_size]
        texts = model.complete([_prepare(model, item, decoding) for item in some], decoding)
        for item, text in zip(some, texts, strict=True):
            yield {**item.fields, "audio": item.audio, "prompt": item.prompt, "output": text}


def _prepare(model: SpeechLanguageModel, item: _Item, decoding: Decoding) -> Document:
    return model.prepare(item.prompt, item.audio, fields=item.fields, max_new_tokens=decoding.max_new_tokens)


def _write(path: Path, rows: Iterator[dict[str, Any]], total: int) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]  # here for the same reason

    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            for row in tqdm(rows, total=total, unit="prompt", disable=not sys.stderr.isatty()):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _items(args: argparse.Namespace) -> Iterator[_Item]:
    if not args.audio and args.jsonl is None:
        if "{speech}" in args.prompt:
            raise UserError("there is nothing to hear", cure="name audio files, or give a --prompt without {speech}")
        yield _Item(None, args.prompt, {})
    for path in args.audio:
        yield from (_Item(str(file), args.prompt, {}) for file in _files(path))
    if args.jsonl is not None:
        yield from _lines(args.jsonl, args.prompt)


def _files(path: Path) -> list[Path]:
    # Heavy, and not needed for --help.
    from salad_lightning.data.format import AUDIO_EXTENSIONS

    if not path.is_dir():
        if not path.is_file():
            raise UserError("no such audio file", where=str(path), cure="check the path")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower().lstrip(".") in AUDIO_EXTENSIONS)
    if not found:
        raise UserError("the folder holds no audio", where=str(path), cure=f"it reads {', '.join(AUDIO_EXTENSIONS)}")
    return found


def _lines(path: Path, prompt: str) -> Iterator[_Item]:
    from salad_lightning.corpus.manifest import read_rows  # as above

    if path.suffix.lower() != ".jsonl":
        raise UserError("not a .jsonl file", where=str(path), cure="rename it or convert it")
    empty = True
    for where, values, *_ in read_rows(path):
        empty = False
        audio, template = values.pop("audio", None), values.pop("prompt", prompt)
        if not isinstance(audio, str | None) or not isinstance(template, str):
            raise UserError("`audio` and `prompt` must be text", where=where)
        if audio is None and "text" not in values and "{speech}" in template:
            raise UserError("the line has neither `audio` nor `text`", where=where, cure="give one of them")
        if audio is not None and not (path.parent / audio).is_file():
            raise UserError(f"there is no audio file {audio}", where=where, cure="paths begin at the JSONL's folder")
        yield _Item(None if audio is None else str(path.parent / audio), template, values)
    if empty:
        raise UserError("the file has no line", where=str(path), cure="give one JSON object a line")

"""What the digits benchmark trains on, made from recordings of single digits: one command for each piece.

``python benchmarks/human_digits_corpus.py speech|text|llm|encoder --help``. The recordings are read where they are;
what is written are strings of one to four of them, for ``salad-lightning prepare``.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
from human_digits_recognition import Spoken, synthetic_digits, train_recognition, trimmed
from human_digits_sound import SAMPLE_RATE_HZ, Voicing, record, vary
from human_digits_tasks import DIGITS, TASKS, Item, digit_items, draw_item
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast, Qwen2Config

from salad_lightning.data.audio import decode_audio
from salad_lightning.errors import UserError
from salad_lightning.testing.tiny import save_tiny_tokenizer

__all__ = [
    "Recording",
    "Voicing",
    "read_manifest",
    "say",
    "spoken_digits",
    "write_encoder",
    "write_llm_config",
    "write_speech",
    "write_text",
]


_HEARD = {"digit": 2.0, "read": 3.0, "add": 1.0, "larger": 1.0, "last": 1.0, "count": 0.5}
"""How often each task is drawn for training, relative."""

_GAP_S = (0.03, 0.2)
_TAIL_S = 0.16  # two frames of silence: a causal encoder hears the last sound late


class Recording(NamedTuple):
    """One spoken digit: where it is, which it is, whose."""

    path: Path
    digit: int
    speaker: str


def read_manifest(data: Path) -> list[Recording]:
    """Recordings listed in ``manifest.tsv`` (columns audio, text, speaker).

    Raises:
        UserError: If it is missing, lacks a column, or holds no digit.
    """
    path = data / "manifest.tsv"
    if not path.is_file():
        raise UserError("there is no manifest.tsv", where=str(data), cure="give the folder of the recordings")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if not rows or not {"audio", "text", "speaker"} <= set(rows[0]):
        raise UserError("columns audio, text and speaker are needed", where=str(path))
    found = [Recording(data / r["audio"], DIGITS.index(r["text"]), r["speaker"]) for r in rows if r["text"] in DIGITS]
    if not found:
        raise UserError("no row's text is a digit from zero to nine", where=str(path))
    return found


def say(
    clips: Sequence[NDArray[np.float32]], words: Sequence[str], voicing: Voicing, rng: random.Random
) -> tuple[NDArray[np.float32], list[list[Any]]]:
    """String recordings together with short gaps.

    Args:
        clips: ``[L]`` each, at `SAMPLE_RATE_HZ`.
        words: What they say.
        voicing: How all of them are changed.
        rng: Of gaps and noise.

    Returns:
        ``[L]`` in [-1, 1], and ``[word, start_s, end_s]`` of each.
    """
    pieces, times, at = [], [], 0
    for clip, word in zip(clips, words, strict=True):
        changed = vary(clip, voicing)
        gap = round(rng.uniform(*_GAP_S) * SAMPLE_RATE_HZ)
        pieces += [np.zeros(gap, dtype=np.float32), changed]
        start, at = at + gap, at + gap + len(changed)
        times.append([word, round(start / SAMPLE_RATE_HZ, 3), round(at / SAMPLE_RATE_HZ, 3)])
    pieces.append(np.zeros(round(_TAIL_S * SAMPLE_RATE_HZ), dtype=np.float32))
    return record(np.concatenate(pieces), voicing, rng), times


def write_speech(data: Path, split: str, output: Path, *, num_items: int, seed: int) -> float:
    """Items spoken by each speaker, as FLAC files and ``manifest.jsonl`` in a folder of the speaker's name.

    Args:
        data: Folder of the recordings.
        split: ``train`` draws tasks, recordings and changes at random; ``test`` leaves recordings as they are, asks
            for single ones and for as many strings in each other task.
        output: Made where missing.
        num_items: How many of each speaker (``train``), or of each speaker in each task (``test``).
        seed: Of the draw.

    Returns:
        Seconds of audio.

    Raises:
        UserError: If a speaker lacks a digit, or a recording cannot be read.
    """
    by_speaker: dict[str, list[Recording]] = {}
    for recording in read_manifest(data):
        by_speaker.setdefault(recording.speaker, []).append(recording)
    for speaker, own in by_speaker.items():
        if lacking := set(range(10)) - {recording.digit for recording in own}:
            what = f"{speaker!r} has no recording of {DIGITS[min(lacking)]!r}"
            raise UserError(
                what, where=str(data / "manifest.tsv"), cure="record all ten digits, or leave the speaker out"
            )
    return sum(
        _write_speaker(speaker, own, split, output / speaker, num_items, seed) for speaker, own in by_speaker.items()
    )


def write_encoder(data: Path, left_out: str, folder: Path, *, steps: int, num_clips: int, seed: int) -> None:
    """The frozen encoder of one fold: it has heard digits of the other speakers, and synthetic ones.

    Args:
        data: Folder of the recordings.
        left_out: Speaker it must not hear.
        folder: Where to.
        steps: Optimiser steps.
        num_clips: Synthetic clips.
        seed: Of voices, weights and order.
    """
    human = [clips for speaker, clips in spoken_digits(data).items() if speaker != left_out]
    encoder, _, loss = train_recognition(human, synthetic_digits(num_clips, seed=seed), steps=steps, seed=seed)
    encoder.save_pretrained(folder)
    print(f"encoder that has not heard {left_out}: CTC loss {loss:.3f}")


def spoken_digits(data: Path) -> dict[str, list[Spoken]]:
    """Speaker to recordings, trimmed."""
    human: dict[str, list[Spoken]] = {}
    for recording in read_manifest(data):
        clip = decode_audio(_read(recording.path), SAMPLE_RATE_HZ, str(recording.path))[0]
        human.setdefault(recording.speaker, []).append((trimmed(clip), recording.digit))
    return human


def write_text(output: Path, *, num_items: int, seed: int) -> None:
    """Items that are read instead of heard, for ``prepare --text``."""
    rng = random.Random(f"{seed}/text")
    names = list(TASKS)
    items = (draw_item(rng.choice(names), rng) for _ in range(num_items))
    _write_lines(output, ({"text": item.speech, **_fields(item)} for item in items))


def write_llm_config(folder: Path) -> None:
    """Tokenizer and configuration of a tiny Qwen2, without weights; every word of an item is one token.

    A byte-level tokenizer, because `AutoTokenizer` rebuilds the one beside a Qwen2 as that whatever its file says.
    """
    # More room than there are merges: they end when every word is whole.
    save_tiny_tokenizer(folder, [item.text for item in _examples()], vocab_size=1000)
    Qwen2Config(
        vocab_size=len(PreTrainedTokenizerFast.from_pretrained(folder)),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)


def _examples() -> list[Item]:
    rng = random.Random(0)
    return [draw_item(name, rng) for name in TASKS for _ in range(500)]


def _write_speaker(speaker: str, own: list[Recording], split: str, folder: Path, num_items: int, seed: int) -> float:
    rng = random.Random(f"{seed}/{speaker}/{split}")
    clips = {r.path: decode_audio(_read(r.path), SAMPLE_RATE_HZ, str(r.path))[0] for r in own}
    folder.mkdir(parents=True, exist_ok=True)
    rows, seconds = [], 0.0
    for index, (item, spoken) in enumerate(_draw(split, own, num_items, rng)):
        voicing = Voicing.draw(rng) if split == "train" else Voicing()
        audio, times = say([clips[r.path] for r in spoken], item.speech.split(), voicing, rng)
        name = f"{index:06d}.flac"
        soundfile.write(folder / name, audio, SAMPLE_RATE_HZ, compression_level=0.0)
        seconds += len(audio) / SAMPLE_RATE_HZ
        # Keys are unique among all speakers, whose shards are mixed.
        key = f"{speaker}-{split}-{index:06d}"
        rows.append(
            {"key": key, "audio": name, "text": item.speech, "words": times, "speaker": speaker} | _fields(item)
        )
    _write_lines(folder / "manifest.jsonl", rows)
    return seconds


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the recording cannot be read ({error.strerror})", where=str(path)) from error


def _draw(
    split: str, own: list[Recording], num_items: int, rng: random.Random
) -> Iterable[tuple[Item, list[Recording]]]:
    by_digit = [[recording for recording in own if recording.digit == digit] for digit in range(10)]
    if split == "train":
        for name in rng.choices(list(_HEARD), list(_HEARD.values()), k=num_items):
            item = draw_item(name, rng)
            yield item, [rng.choice(by_digit[digit]) for digit in item.digits]
        return
    asked = own if len(own) <= num_items else rng.sample(own, num_items)
    yield from zip(digit_items([r.digit for r in asked]), ([recording] for recording in asked), strict=True)
    for name in TASKS:
        for _ in range(num_items if name != "digit" else 0):
            item = draw_item(name, rng)
            yield item, [rng.choice(by_digit[digit]) for digit in item.digits]


def _fields(item: Item) -> dict[str, Any]:
    return {"domain": item.domain, "prompt": item.prompt, "choices": list(item.choices), "answer": item.answer}


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    aside.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pieces = parser.add_subparsers(dest="piece", required=True)
    speech = pieces.add_parser("speech", help="items spoken by each speaker")
    speech.add_argument("--data", type=Path, required=True, help="folder of the recordings")
    speech.add_argument("--split", choices=("train", "test"), required=True)
    text = pieces.add_parser("text", help="items as text")
    for piece in (speech, text):
        piece.add_argument("--items", type=int, required=True, metavar="N")
    pieces.add_parser("llm", help="tokenizer and configuration of the tiny LLM")
    encoder = pieces.add_parser("encoder", help="frozen speech encoder of one fold")
    encoder.add_argument("--data", type=Path, required=True, help="folder of the recordings")
    encoder.add_argument("--without", required=True, metavar="NAME", help="speaker it must not hear")
    encoder.add_argument("--steps", type=int, required=True)
    encoder.add_argument("--clips", type=int, required=True, help="synthetic digits")
    for name, piece in pieces.choices.items():
        piece.add_argument("--output", type=Path, required=True)
        if name != "llm":
            piece.add_argument("--seed", type=int, default=0)
    return parser


def main() -> int:
    """Make one piece; 2 after a user's mistake."""
    args = _parser().parse_args()
    torch.set_num_threads(1)
    try:
        if args.piece == "speech":
            settings = {"num_items": args.items, "seed": args.seed}
            print(f"{write_speech(args.data, args.split, args.output, **settings):.0f} s of speech")
        elif args.piece == "text":
            write_text(args.output, num_items=args.items, seed=args.seed)
        elif args.piece == "llm":
            write_llm_config(args.output)
        else:
            sizes = {"steps": args.steps, "num_clips": args.clips, "seed": args.seed}
            write_encoder(args.data, args.without, args.output, **sizes)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

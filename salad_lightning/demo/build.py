"""Makes the files of the miniature world, one part a call: ``python -m salad_lightning.demo.build PART --root DIR``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from salad_lightning.demo.encoder_training import train_encoder
from salad_lightning.demo.recognizer_training import train_recognizer
from salad_lightning.demo.speech import natural_speech, question_fields, speak_all, spoken_questions
from salad_lightning.demo.tokenizer import train_tokenizer
from salad_lightning.demo.world import World, build_world, sentence_windows
from salad_lightning.model.small import small_qwen2

__all__ = ["PARTS", "build_encoder", "build_recognizer", "build_speech", "build_text"]

NUM_TEXT_DOCUMENTS = 40_000
NUM_MIXED_DOCUMENTS = 12_000
NUM_SPOKEN_DOCUMENTS = 3_000
NUM_POOL_DOCUMENTS = 6_000
NUM_QUESTIONS = {"val": 24, "test": 36}
"""Spoken questions of each domain."""


def build_text(world: World, root: Path) -> None:
    """Text of the world for ``prepare --text``, questions as text, and the LLM's configuration with its tokenizer."""
    folder = root / "world"
    folder.mkdir(parents=True, exist_ok=True)
    train = [text for _, text in world.documents(NUM_TEXT_DOCUMENTS, seed=world.seed)]
    _write(folder / "text.jsonl", ({"text": text} for text in train))
    # Stage I's plain text is about what the natural speech is about, narrower than what the LLM was trained on: no
    # user has the LLM's own training text. So forgetting has something to show in the other domains.
    shares = {domain.name: domain.speech_share for domain in world.domains}
    mixed = world.documents(NUM_MIXED_DOCUMENTS, seed=world.seed + 2, shares=shares)
    _write(folder / "text_mix.jsonl", ({"text": text} for _, text in mixed))
    # Stage II's is about everything, as a corpus from the web is, and drawn anew as well.
    broad = world.documents(NUM_MIXED_DOCUMENTS, seed=world.seed + 4)
    _write(folder / "text_broad.jsonl", ({"text": text} for _, text in broad))
    pool = world.documents(NUM_POOL_DOCUMENTS, seed=world.seed + 3, spoken=True, shares=_web_shares(world))
    unique = {text: domain for domain, text in pool}
    _write(folder / "pool.jsonl", ({"text": text, "domain": domain} for text, domain in unique.items()))
    held_out = world.documents(200, seed=world.seed + 1)
    _write(folder / "text_val.jsonl", ({"text": text, "domain": domain} for domain, text in held_out))
    questions = world.questions()
    _write(folder / "text_test.jsonl", ({"text": q.prompt, **question_fields(q)} for q in questions))
    _write(folder / "domains.jsonl", ({**d._asdict(), "heard": d.heard} for d in world.domains))
    tokenizer = train_tokenizer(train, folder / "llm")
    small_qwen2(
        128, 4, intermediate_size=384, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
    ).save_pretrained(folder / "llm")


def build_speech(world: World, root: Path, split: str) -> None:
    """Speech of a split as FLAC files with a manifest for ``prepare --manifest``."""
    folder = root / "speech" / split
    if split == "train":
        seconds = speak_all(natural_speech(world, NUM_SPOKEN_DOCUMENTS, seed=world.seed), folder)
    else:
        seconds = speak_all(spoken_questions(world, split, NUM_QUESTIONS[split], seed=world.seed), folder)
        _check_unseen(world, root, split)
    print(f"{folder}: {seconds / 3600:.2f} h")


def build_encoder(world: World, root: Path) -> None:
    """The frozen speech encoder, trained on pseudo-words."""
    report = train_encoder(root / "encoder", seed=world.seed)
    (root / "encoder" / "training.json").write_text(json.dumps(report._asdict(), indent=1))
    print(report)


def build_recognizer(world: World, root: Path) -> None:
    """The recognizer of the selection's filter."""
    report = train_recognizer(root / "recognizer", world, seed=world.seed)
    (root / "recognizer" / "training.json").write_text(json.dumps(report, indent=1))
    print(report)


def _web_shares(world: World) -> dict[str, float]:
    """The text to choose from covers every domain, and most of it is about what is heard anyway, as on the web."""
    heard = [domain.name for domain in world.domains if domain.heard]
    rare = [domain.name for domain in world.domains if not domain.heard]
    return dict.fromkeys(heard, 0.7 / len(heard)) | dict.fromkeys(rare, 0.3 / len(rare))


def _check_unseen(world: World, root: Path, split: str) -> None:
    """No five-word window of a question may have been heard in training."""
    heard = sentence_windows(u.text for u in natural_speech(world, NUM_SPOKEN_DOCUMENTS, seed=world.seed))
    lines = (root / "speech" / split / "manifest.jsonl").read_text().splitlines()
    asked = sentence_windows(json.loads(line)["text"] for line in lines)
    if shared := heard & asked:
        raise AssertionError(f"{len(shared)} windows of {split} are heard in training: {sorted(shared)[:3]}")


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    aside = path.with_suffix(".part")
    with aside.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    aside.replace(path)


PARTS: dict[str, Callable[[World, Path], None]] = {
    "text": build_text,
    "encoder": build_encoder,
    "recognizer": build_recognizer,
    "speech-train": lambda world, root: build_speech(world, root, "train"),
    "speech-val": lambda world, root: build_speech(world, root, "val"),
    "speech-test": lambda world, root: build_speech(world, root, "test"),
}
"""What can be built."""


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--root", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    args = parser.parse_args()
    PARTS[args.part](build_world(args.seed), args.root)


if __name__ == "__main__":
    _main()

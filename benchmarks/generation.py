"""Batched answers against single ones on a trained checkpoint: the same tokens? And how much faster?

Run by: python -m benchmarks.generation --checkpoint CKPT --shards DIR, from the folder that CKPT was trained in.

20 greedy batches of mixed lengths, every third prompt without audio, from questions and their recordings. Returns 1
where a batch gives other tokens than its prompts alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from salad_lightning.data.format import Utterance, decode, read_shard
from salad_lightning.data.sources import expand_shards
from salad_lightning.demo.arms import cli
from salad_lightning.demo.report import environment
from salad_lightning.export import load_pretrained
from salad_lightning.model.generation import Decoding, generate

NUM_BATCHES, BATCH_SIZE, NEW_TOKENS = 20, 6, 16


def main() -> int:
    """Returns 1 where a batch differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--shards", required=True, help="spoken questions, as `demo` leaves in shards/speech_test")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/benchmarks/generation"), help="folder of the result"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        exported = str(Path(folder) / "model")
        subprocess.run([*cli("export"), str(args.checkpoint), exported], check=True, stdout=subprocess.DEVNULL)
        result = compare(load_pretrained(exported), utterances(args.shards, NUM_BATCHES * BATCH_SIZE))
    result |= environment()
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "generation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(result["batches_that_differ"] > 0)


def utterances(shards: str, count: int) -> list[Utterance]:
    """From all over the shards."""
    raws = list(itertools.chain.from_iterable(read_shard(path) for path in expand_shards(shards)))
    return [decode(raw, source="questions", sample_rate_hz=16_000) for raw in random.Random(0).sample(raws, count)]


def compare(model: Any, recordings: list[Utterance]) -> dict[str, Any]:
    """Tokens of the batches and of their prompts alone."""
    prompts = []
    for number, utterance in enumerate(recordings):
        heard = number % 3 < 2
        # Some with text before the speech; without audio the question is read.
        prompt = " ".join([*utterance.text.split()[: number % 4], "{speech}"])
        audio = utterance.audio if heard else None
        fields = {} if heard else {"text": utterance.text}
        prompts.append(model.prepare(prompt, audio, sampling_rate=16_000, fields=fields, max_new_tokens=NEW_TOKENS))
    llm, tokenizer = model.model.speech_llm, model.processor.tokenizer
    decoding = Decoding(max_new_tokens=NEW_TOKENS)
    begin = time.perf_counter()
    single = [generate(llm, [prompt], decoding, tokenizer=tokenizer)[0] for prompt in prompts]
    middle = time.perf_counter()
    differ = 0
    for at in range(0, len(prompts), BATCH_SIZE):
        differ += (
            generate(llm, prompts[at : at + BATCH_SIZE], decoding, tokenizer=tokenizer) != single[at : at + BATCH_SIZE]
        )
    return {
        "batches": len(prompts) // BATCH_SIZE,
        "batches_that_differ": differ,
        "prompts": len(prompts),
        "without_audio": sum(number % 3 == 2 for number in range(len(prompts))),
        "lengths": sorted({prompt.num_positions for prompt in prompts}),
        "distinct_outputs": len({tuple(tokens) for tokens in single}),
        "batched_of_single_time": round((time.perf_counter() - middle) / (middle - begin), 3),
        "example": tokenizer.decode(single[0]),
    }


if __name__ == "__main__":
    sys.exit(main())

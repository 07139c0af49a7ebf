"""Whether recordings of people come through: prepared, linted and streamed, with all of them kept.

Run by: python -m benchmarks.human_recordings --data DIR, where DIR/manifest.tsv lists `audio` and `text`. The
recordings are read where they are; the shards are temporary.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from salad_lightning.data.sources import Source
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.stream import EvaluationStream
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.demo.report import environment
from salad_lightning.testing.tiny import save_tiny_tokenizer

RATE_HZ = 16_000


def main() -> int:
    """Returns 1 where a recording was lost or has a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with manifest.tsv")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/human_recordings"))
    args = parser.parse_args()
    manifest = args.data / "manifest.tsv"
    listed = sum(1 for line in manifest.open(encoding="utf-8") if line.strip()) - 1
    with tempfile.TemporaryDirectory() as name:
        shards = str(Path(name) / "shards")
        options = ("--sample-rate", str(RATE_HZ), "--max-bad-fraction", "0")
        prepare_s, _ = timed("prepare", "--manifest", str(manifest), "--output", shards, *options)
        lint_s, printed = timed("lint", shards, "--json")
        report = json.loads(printed)
        begin = time.perf_counter()
        keys, heard_s = streamed(shards, Path(name) / "tokenizer")
        stream_s = time.perf_counter() - begin
    result = {
        "listed": listed,
        "linted": report["samples"],
        "streamed": len(set(keys)),
        "problems": len(report["problems"]),
        "speakers": report["speakers"],
        "seconds": report["seconds"],
        "seconds_streamed": round(heard_s, 3),
        "wall_seconds": {"prepare": prepare_s, "lint": lint_s, "stream": round(stream_s, 2)},
        **environment(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "human_recordings.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    kept = listed == report["samples"] == len(keys) == len(set(keys)) and not report["problems"]
    return 0 if kept else 1


def timed(*arguments: str) -> tuple[float, str]:
    """Wall seconds of a command, and what it printed."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "salad_lightning", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # 1: lint has found problems
        raise SystemExit(done.returncode)
    return round(time.perf_counter() - begin, 2), done.stdout


def streamed(shards: str, folder: Path) -> tuple[list[str], float]:
    """Keys and seconds of speech in packed batches of one pass."""
    source = Source(shards, TemplateDocuments("{speech} {text}"))
    keys: list[str] = []
    samples = 0
    for batch in EvaluationStream(source, spec(folder), rows_per_batch=8):
        keys += [info.key for info in batch.documents]
        samples += int(batch.clip_lengths_N.sum())
    return keys, samples / RATE_HZ


def spec(folder: Path) -> SequenceSpec:
    """Of an encoder with frames of 80 ms and a connector that keeps them."""
    save_tiny_tokenizer(folder)
    hop = RATE_HZ * 80 // 1000
    return SequenceSpec(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        context=512,
        sample_rate_hz=RATE_HZ,
        causal=True,
        num_frames=lambda samples: -(-samples // hop),
        frame_span=lambda start_s, end_s: (int(start_s * RATE_HZ / hop), int(end_s * RATE_HZ / hop)),
        num_positions=lambda frames, words: frames,
    )


if __name__ == "__main__":
    sys.exit(main())

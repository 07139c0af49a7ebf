"""How fast batches are made, beside what reading and decoding alone would allow and beside three other packages.

One process, one thread, the same shards for all. Rates are per second of processor time, which is per core.

Run by: python -m benchmarks.stream
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.stream_peers import hugging_face, lhotse_shar, missing, plain_webdataset, write_shar
from benchmarks.stream_step import step_times
from salad_lightning.data.arrays import encode_array
from salad_lightning.data.audio import decode_audio, encode_flac
from salad_lightning.data.format import read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import Source
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.stream import TrainingStream
from salad_lightning.demo.report import environment
from salad_lightning.testing.shards import random_text, speak_tones
from salad_lightning.testing.tiny import save_tiny_tokenizer

RATE_HZ, HOP = 16_000, 1280
CONTEXT, ROWS = 2048, 8
CODEBOOKS, FRAME_SIZE = 8, 512
SHARD = 250  # utterances
PEERS = {"e": "lhotse", "f": "datasets"}


class Rate(NamedTuple):
    """What was made in a stretch of processor time."""

    samples: int
    positions: int
    core_s: float
    fill: float = math.nan

    @property
    def samples_per_core_s(self) -> float:
        """Samples a second of processor time."""
        return self.samples / self.core_s


def main() -> int:
    """Make the shards, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=2000, help="in the shards, 4 to 20 s each")
    parser.add_argument("--seconds", type=float, default=2.0, help="of processor time for each measurement of a round")
    parser.add_argument(
        "--rounds", type=int, default=15, help="of all measurements in turn; medians of rates and ratios are told"
    )
    parser.add_argument("--memory-samples", type=int, default=0, help="samples to watch the memory over; 0 for none")
    parser.add_argument("--memory-kind", choices=("audio", "frames", "codes"), default="codes", help="shards for that")
    parser.add_argument("--steps", type=int, default=3, help="training steps with and without the encoder; 0 for none")
    parser.add_argument("--parameters", type=float, default=3e9, help="of the LLM, for the table of workers")
    parser.add_argument("--peak-flops", type=float, default=989e12, help="of a GPU; an H100's or H200's in bf16")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/stream"), help="folder of the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        mean_s = write_shards(root, args.utterances)
        spec = sequence_spec(root)
        measurements: dict[str, Callable[[], Iterator[tuple[int, int, float]]]] = {
            "a: tars read, nothing decoded": lambda: tars(root / "audio"),
            "b: decoding alone": lambda: decoding(root / "audio"),
            "c: packed batches from audio": lambda: batches(root / "audio", spec),
            "c: packed batches from stored frames": lambda: batches(root / "frames", spec),
            "c: packed batches from stored codes": lambda: batches(root / "codes", spec),
            "d: WebDataset, padded batches": lambda: plain_webdataset(root / "audio", spec),
            "e: lhotse Shar, buckets": lambda: lhotse_shar(root / "shar", spec),
            "f: Hugging Face datasets, streaming": lambda: hugging_face(root / "audio", spec),
        }
        absent = [package for package in PEERS.values() if missing(package)]
        if "lhotse" not in absent:
            write_shar(root / "shar", root / "audio", SHARD)
        measurements = {name: make for name, make in measurements.items() if PEERS.get(name[0]) not in absent}
        rounds = measure_in_turn({name: make() for name, make in measurements.items()}, args.seconds, args.rounds)
        memory = watch_memory(batches(root / args.memory_kind, spec), args.memory_samples)
        step = step_times(root / "audio", spec.tokenizer, args.steps) if args.steps else {}
    rates = {name: middle(of_rounds) for name, of_rounds in rounds.items()}
    ours = "c: packed batches from audio"
    a_sample = rates[ours]
    rows = {name: row(rate, mean_s, a_sample.positions / a_sample.samples) for name, rate in rates.items()}
    result = {
        "utterances": args.utterances,
        "mean_seconds": round(mean_s, 2),
        "rates": rows,
        "of_decode_floor": ratio(rounds, ours, "b: decoding alone"),
        "stored_over_audio": {
            kind: ratio(rounds, f"c: packed batches from stored {kind}", ours) for kind in ("frames", "codes")
        },
        "of_peers": {name[3:]: ratio(rounds, ours, name) for name in rounds if name[0] in "def"},
        "not_installed": absent,
        "memory_of": f"packed batches from {args.memory_kind}",
        "resident_mb_over_samples": memory,
        "step": step,
        "workers": workers_table(rows, args.parameters, args.peak_flops),
        **environment(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "stream.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def write_shards(root: Path, num_utterances: int) -> float:
    """The same utterances as FLAC, as frames and as codes of an encoder; returns their mean duration in seconds."""
    rng, noise, total = random.Random(0), np.random.default_rng(0), 0
    with contextlib.ExitStack() as stack:
        kinds = {
            kind: stack.enter_context(ShardWriter(root / kind, kind, SHARD)) for kind in ("audio", "frames", "codes")
        }
        for number in range(num_utterances):
            text = random_text(rng, rng.randint(20, 100))
            audio, words = speak_tones(text, sample_rate_hz=RATE_HZ, seed=number)
            total += len(audio)
            length = frames_of(len(audio))
            record = {"text": text, "words": words}
            encoded = {**record, "encoded": {"by": "benchmark", "num_samples": len(audio)}}
            frames = noise.standard_normal((length, FRAME_SIZE), dtype=np.float32).astype(np.float16)
            codes = noise.integers(0, 2048, (length, CODEBOOKS), dtype=np.int16)
            kinds["audio"].write(f"u{number:06d}", record, encode_flac(audio, RATE_HZ))
            kinds["frames"].write(f"u{number:06d}", encoded, encode_array(frames), "frames.npy")
            kinds["codes"].write(f"u{number:06d}", encoded, encode_array(codes), "codes.npy")
    return total / num_utterances / RATE_HZ


def frames_of(num_samples: int) -> int:
    """Frames of 80 ms."""
    return math.ceil(num_samples / HOP)


def sequence_spec(root: Path) -> SequenceSpec:
    """An encoder of 12.5 Hz and a connector that keeps its frames, one switch embedding on either side."""
    save_tiny_tokenizer(root / "tokenizer")

    def frame_span(start_s: float, end_s: float) -> tuple[int, int]:
        last = int(end_s * RATE_HZ / HOP + 1e-3)
        return min(int(start_s * RATE_HZ / HOP + 1e-3), last), last

    return SequenceSpec(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(root / "tokenizer"),
        context=CONTEXT,
        sample_rate_hz=RATE_HZ,
        causal=True,
        num_frames=frames_of,
        frame_span=frame_span,
        num_positions=lambda frames, words: frames + 2,
        encoder="benchmark",
    )


def tars(folder: Path) -> Iterator[tuple[int, int, float]]:
    """Undecoded samples, again and again."""
    while True:
        for path in sorted(folder.iterdir()):
            for _ in read_shard(path):
                yield 1, 0, math.nan


def decoding(folder: Path) -> Iterator[tuple[int, int, float]]:
    """Recordings that lie in memory, decoded again and again."""
    contents = [raw.members["flac"] for path in sorted(folder.iterdir())[:1] for raw in read_shard(path)]
    while True:
        for content in contents:
            decode_audio(content, RATE_HZ, "", keep_int16=True)
            yield 1, 0, math.nan


def batches(folder: Path, spec: SequenceSpec) -> Iterator[tuple[int, int, float]]:
    """The training stream: a document is a whole utterance, which none of this length overflows."""
    stream = TrainingStream([Source(str(folder), InterleaveDocuments())], spec, rows_per_batch=ROWS)
    for batch in stream:
        yield len(batch.documents), batch.num_positions, batch.num_positions / batch.input_ids_BS.numel()


def measure_in_turn(
    kinds: dict[str, Iterator[tuple[int, int, float]]], seconds: float, rounds: int
) -> dict[str, list[Rate]]:
    """Every round's rates: the machine and the allocator are another from minute to minute."""
    found: dict[str, list[Rate]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, items in kinds.items():
            found[name].append(measure(items, seconds))
    return found


def middle(rates: list[Rate]) -> Rate:
    """The median one."""
    return sorted(rates, key=lambda rate: rate.samples_per_core_s)[len(rates) // 2]


def ratio(rounds: dict[str, list[Rate]], one: str, other: str) -> list[float]:
    """Samples (so useful positions, too) of one over the other's in as much time: median, least, most of the rounds."""
    pairs = zip(rounds[one], rounds[other], strict=True)
    found = sorted(mine.samples_per_core_s / its.samples_per_core_s for mine, its in pairs)
    return [round(float(value), 3) for value in (np.median(found), found[0], found[-1])]


def measure(items: Iterator[tuple[int, int, float]], seconds: float) -> Rate:
    """Count for a while, after an item that fills buffers."""
    next(items)
    begin = time.process_time()
    samples = positions = 0
    fills = []
    for count, filled, fill in items:
        samples, positions = samples + count, positions + filled
        fills.append(fill)
        if (elapsed := time.process_time() - begin) > seconds:
            return Rate(samples, positions, elapsed, float(np.mean(fills)))
    raise ValueError("the items ended")


def row(rate: Rate, mean_s: float, positions_of_a_sample: float) -> dict[str, float]:
    """A line of the table; where positions are not counted, they are those of our documents of as many samples."""
    samples = rate.samples_per_core_s
    return {
        "samples_per_core_s": round(samples, 1),
        "audio_hours_per_core_s": round(samples * mean_s / 3600, 4),
        "useful_positions_per_core_s": round(rate.positions / rate.core_s or samples * positions_of_a_sample),
        **({} if math.isnan(rate.fill) else {"fill": round(rate.fill, 4)}),
    }


def watch_memory(items: Iterator[tuple[int, int, float]], num_samples: int) -> dict[int, float]:
    """Resident megabytes after every tenth of the samples."""
    seen, marks = 0, [num_samples * tenth // 10 for tenth in range(1, 11)] if num_samples else []
    memory = {}
    for mark in marks:
        while seen < mark:
            seen += next(items)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory[mark] = round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
    return memory


def workers_table(rows: dict[str, dict[str, float]], parameters: float, peak_flops: float) -> dict[str, Any]:
    """Workers that feed GPUs at half their peak: 6 operations a parameter and position, and 2 for the teacher."""
    positions = 0.5 * peak_flops / (8 * parameters)
    ours = {name: line["useful_positions_per_core_s"] for name, line in rows.items() if name.startswith("c")}
    return {
        "positions_per_second_and_gpu": round(positions),
        **{
            f"{gpus} GPUs, {name[3:]}": math.ceil(gpus * positions / rate)
            for gpus, (name, rate) in itertools.product((1, 8), ours.items())
        },
    }


if __name__ == "__main__":
    sys.exit(main())

"""How well digits of an unseen person are recognised, against how many people were heard: where the target lies.

    python benchmarks/human_digits_frontier.py --data DIR [--steps N] [--json FILE]

Trains the benchmark's encoder with its CTC head alone, on 0, 1, … human speakers beside the synthetic voices, and tests
it on single digits of each speaker left out. One seed; which speakers are heard is drawn by it. (The connector of the
whole benchmark hears people too, in its warm-up and in Stage I, and comes further than this head.)
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import torch
from human_digits_corpus import spoken_digits
from human_digits_recognition import Spoken, share_recognized, synthetic_digits, train_recognition
from matplotlib import pyplot as plt

NUM_TESTED = 200


def measure(by_speaker: dict[str, list[Spoken]], *, steps: int, num_synthetic: int, seed: int) -> list[dict[str, Any]]:
    """One row a speaker left out and a number of speakers heard."""
    synthetic = synthetic_digits(num_synthetic, seed=seed)
    rows = []
    for speaker, clips in sorted(by_speaker.items()):
        others = sorted(by_speaker.keys() - {speaker})
        random.Random(f"{seed}/{speaker}").shuffle(others)
        tested = random.Random(seed).sample(clips, min(NUM_TESTED, len(clips)))
        for count in range(len(others) + 1):
            heard = others[:count]
            found = train_recognition([by_speaker[name] for name in heard], synthetic, steps=steps, seed=seed)
            row = {"tested": speaker, "heard": heard, "accuracy": round(share_recognized(found, tested), 4)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the number of speakers heard; the target as a line."""
    matplotlib.use("Agg")
    figure, panel = plt.subplots(figsize=(6, 4))
    counts = sorted({len(row["heard"]) for row in rows})
    for speaker in sorted({row["tested"] for row in rows}):
        own = [row["accuracy"] for row in rows if row["tested"] == speaker]
        panel.plot(counts, own, marker=".", alpha=0.5, label=speaker)
    means = [fmean(row["accuracy"] for row in rows if len(row["heard"]) == count) for count in counts]
    panel.plot(counts, means, marker="o", color="black", linewidth=2, label="mean")
    panel.axhline(0.85, linestyle=":", color="0.3", label="target")
    panel.set(xlabel="people heard in training", ylabel="digits of an unseen person recognised", xticks=counts)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.tsv")
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of each encoder")
    parser.add_argument("--synthetic", type=int, default=3_000, help="synthetic digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here, and the plot beside it as PNG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(spoken_digits(args.data), steps=args.steps, num_synthetic=args.synthetic, seed=args.seed)
    for count in sorted({len(row["heard"]) for row in rows}):
        print(f"{count} heard: {fmean(row['accuracy'] for row in rows if len(row['heard']) == count):.3f}")
    if args.json:
        args.json.write_text(json.dumps({"steps": args.steps, "seed": args.seed, "rows": rows}, indent=1) + "\n")
        plot(rows, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

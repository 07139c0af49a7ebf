"""Balanced k-means on random vectors: time and peak memory against the number of texts.

Run by: python -m benchmarks.selection --sizes 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from salad_lightning.selection.cluster import balanced_kmeans
from salad_lightning.selection.vectors import Vectors

RESULTS = Path(__file__).parent / "results" / "selection.jsonl"
DIM, NUM_CLUSTERS = 1024, 128  # of BAAI/bge-large-en-v1.5, and K of arXiv 2510.13632
_BLOCK = 8192


def write_vectors(path: Path, count: int) -> None:
    """Random directions: no structure to cluster is the hardest case for balance."""
    rng = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, DIM))
    for start in range(0, count, _BLOCK):
        block = rng.standard_normal((min(_BLOCK, count - start), DIM), dtype=np.float32)
        file[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    file.flush()


def measure(path: Path) -> dict[str, float]:
    """Cluster one file in this process."""
    vectors = Vectors(path)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    found = balanced_kmeans(vectors, NUM_CLUSTERS)
    sizes = np.bincount(found.labels_N, minlength=NUM_CLUSTERS) / (len(vectors) / NUM_CLUSTERS)
    return {
        "texts": len(vectors),
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(time.process_time() - begin_cpu, 1),
        "peak_gib": round(_peak_gib(), 2),
        "smallest": round(float(sizes.min()), 3),
        "largest": round(float(sizes.max()), 3),
        "inertia_ratio": round(found.inertia / found.unbalanced_inertia, 4),
    }


def _peak_gib() -> float:
    """Most memory that was resident, mapped files included (Linux); getrusage would count the parent's, too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def main() -> None:
    """One process for each size; the exponent between the smallest and the largest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where 4 GB of vectors find room (default: the temporary folder)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    rows = []
    RESULTS.parent.mkdir(exist_ok=True)
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder) / "vectors.npy"
            write_vectors(path, size)
            command = [sys.executable, "-m", "benchmarks.selection", "--measure", str(path)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(rows[-1], flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    if len(rows) > 1:
        # k-means on a sample of fixed size is a fixed cost: a line, not an exponent.
        slope, fixed = np.polyfit([row["texts"] for row in rows], [row["cpu_seconds"] for row in rows], 1)
        print(f"{fixed:.0f} s + {1e6 * slope:.0f} s for every million texts")


if __name__ == "__main__":
    main()

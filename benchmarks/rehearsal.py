"""The real recipe at true shapes with random weights: does it load, train, save and go on, and in what memory?

An LLM of Qwen2.5's sizes, its vocabulary, Mimi and the paper's connector are written to disk, with small shards of
speech and text. Then `recipes/stage1.yaml` under `recipes/scale/8gpu.yaml` trains a few steps in processes of its own
(FSDP2, bf16), and goes on as Stage II does, from `pre_decay.ckpt`. Printed are seconds a step and the peak memory of a
process, beside what `salad_lightning.training.cost` predicts; on a CPU the peak counts the Python process too.

Run by: python -m benchmarks.rehearsal --size 0.5B --context 512 --rows 1   # two CPU processes, 16 GiB, 6 minutes
        python -m benchmarks.rehearsal --size 3B --processes 1 --device cuda --compile   # one GPU, 45 GB of disk
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, EncodecFeatureExtractor, MimiConfig, MimiModel

from benchmarks.step import SIZES, config
from salad_lightning.testing.shards import save_speech_shards, save_text_shards
from salad_lightning.testing.tiny import save_tiny_tokenizer
from salad_lightning.testing.tiny_encoders import save_tiny_mimi
from salad_lightning.training.cost import GIB, QWEN2_5, TransformerSize, memory_per_gpu

RECIPES = Path(__file__).parents[1] / "recipes"
TOKENS = 151_665  # of Qwen2.5's tokenizer; further rows of the head are padding
MINI_CONNECTOR = {"num_layers": 1, "dim": 32, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 2}


def write_world(folder: Path, size: str) -> None:
    """Models and shards, once."""
    if (folder / "written").exists():
        return
    torch.manual_seed(0)
    shape = config(size)
    save_tiny_tokenizer(folder / "llm")
    path = folder / "llm" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for index in range(len(vocabulary), min(TOKENS, shape.vocab_size)):
        vocabulary[f"unused{index}"] = index
    path.write_text(json.dumps(tokenizer))
    torch.set_default_dtype(torch.bfloat16)  # as they are given out
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "llm", max_shard_size="1GB")
    torch.set_default_dtype(torch.float32)
    if size == "mini":
        save_tiny_mimi(folder / "mimi")
    else:
        MimiModel(MimiConfig()).save_pretrained(folder / "mimi")
        EncodecFeatureExtractor(sampling_rate=24_000).save_pretrained(folder / "mimi")
    save_speech_shards(folder / "speech", num_samples=60, sample_rate_hz=24_000)
    save_text_shards(folder / "text", num_samples=60)
    (folder / "written").touch()


def settings(folder: Path, stage: int, args: argparse.Namespace) -> dict[str, Any]:
    """What differs from the recipes: where things are, and how much."""
    interleave = {"class_path": "InterleaveDocuments", "init_args": {"text_words": [1, 4], "speech_words": [2, 5]}}
    speech = {"name": "speech", "shards": str(folder / "speech"), "documents": interleave}
    text = {"name": "text", "shards": str(folder / "text"), "documents": {"class_path": "InterleaveDocuments"}}
    model = {
        "llm": str(folder / "llm"),
        "encoder": {"class_path": "MimiEncoder", "init_args": {"path": str(folder / "mimi")}},
        "context": args.context,
        "schedule": {"warmup_steps": 1, "decay_fraction": 1 / args.steps},
        "execution": {"activation_checkpointing": "full", "compile": args.compile, "attention": args.attention},
    }
    if args.size == "mini":
        model["connector"] = {"class_path": "CausalTransformerConnector", "init_args": MINI_CONNECTOR}
    data = {"train": [{**speech, "weight": 0.6667}, {**text, "weight": 0.3333}], "val": [speech]}
    trainer = {
        "accelerator": args.device,
        "devices": args.processes,
        "strategy": {"init_args": {"data_parallel_size": args.processes}},
        "max_steps": args.steps,
        "accumulate_grad_batches": 1,
        "val_check_interval": 1000,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "callbacks": [{"class_path": "PreDecayCheckpoint"}] if stage == 1 else [],
        "enable_checkpointing": False,  # none but that
    }
    loading = {"rows_per_batch": args.rows, "num_workers": 0}
    return {"model": {"init_args": model}, "data": {"init_args": data | loading}, "trainer": trainer}


def train(folder: Path, stage: int, args: argparse.Namespace, *options: str) -> list[dict[str, float]]:
    """A run by the recipes; its metrics, a dictionary a step."""
    name, overlay = f"stage{stage}", folder / "rehearsal.yaml"
    overlay.write_text(yaml.safe_dump(settings(folder, stage, args)))
    files = (RECIPES / "stage1.yaml", RECIPES / "scale" / "8gpu.yaml", overlay)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]  # on a port that is free
    command += ["--nproc-per-node", str(args.processes), "-m", "salad_lightning", "fit"]
    command += [part for file in files for part in ("--config", str(file))]
    command += [f"--trainer.default_root_dir={folder / name}", *options]
    threads = str(max(1, (os.cpu_count() or 1) // args.processes))
    environment = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **os.environ}
    done = subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}; its output is above")
    metrics = max((folder / name).glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    steps: dict[int, dict[str, float]] = {}
    with open(metrics, newline="") as file:
        for row in csv.DictReader(file):
            steps.setdefault(int(row["step"]), {}).update({k: float(v) for k, v in row.items() if v})
    return [steps[number] for number in sorted(steps)]


def report(name: str, steps: list[dict[str, float]], trained: int, args: argparse.Namespace) -> str:
    """A row of the table, of a run that trained so many parameters."""
    seconds = [
        (later["train/tokens"] - step["train/tokens"]) / later["train/tokens_per_second"]
        for step, later in itertools.pairwise(steps)
    ]
    dim, _, layers, heads, _, vocab, tied = SIZES[args.size]
    size = QWEN2_5.get(args.size) or TransformerSize(
        _parameters(args.size), vocab, dim, layers, heads * (dim // heads), tied
    )
    predicted = memory_per_gpu(
        size, size, gpus=args.processes, positions_per_gpu=args.rows * args.context,
        connector_parameters=trained - size.parameters,
    ).total  # fmt: skip
    peak = max(step["train/peak_memory_gib"] for step in steps)
    losses = " → ".join(f"{steps[at]['train/loss']:.3f}" for at in ((0, -1) if len(steps) > 1 else (0,)))
    pace = f"{statistics.median(seconds):.1f}" if seconds else "–"
    mfu = f"{100 * steps[-1]['train/mfu']:.0f} %" if "train/mfu" in steps[-1] else "–"
    return f"| {name} | {len(steps)} | {losses} | {pace} | {mfu} | {peak:.1f} | {predicted / GIB:.1f} |"


def _parameters(size: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config(size)).parameters())


def main() -> None:
    """Rehearse both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5B", choices=list(SIZES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="as the recipe does")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "flex"])
    parser.add_argument("--folder", type=Path, help="keep models and runs here; by default a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve() / args.size
        folder.mkdir(parents=True, exist_ok=True)
        write_world(folder, args.size)
        first = train(folder, 1, args)
        source = folder / "stage1" / "checkpoints" / "pre_decay.ckpt"
        stored = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        trained = json.loads((folder / "stage1" / "fit.json").read_text())["trainable_parameters"]
        second = train(folder, 2, args, f"--model.init_args.init_from={source}",
                       "--model.init_args.require_pre_decay=true")  # fmt: skip
    print(f"torch {torch.__version__}, {args.size}, {args.processes} {args.device} process(es), {args.rows} rows of "
          f"{args.context} positions, pre_decay.ckpt {stored / GIB:.1f} GiB\n")  # fmt: skip
    print("| run | steps | loss | s a step | MFU | peak GiB a process | predicted |\n|---|---|---|---|---|---|---|")
    print(report("Stage I", first, trained, args))
    print(report("on from it", second, trained, args))


if __name__ == "__main__":
    main()

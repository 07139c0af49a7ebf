"""Every connector of the package on the mini recipe, by one changed key: accuracy, parameters, seconds a step.

Run by: python -m benchmarks.connectors --budget-minutes 60
"""

from __future__ import annotations

import argparse
import json

from benchmarks.grid import markdown, run_grid, summarise
from salad_lightning.demo.arms import Arm

STUDY = "connectors"
# Sizes fit the miniature: about the paper's shape at its width, 12.5 positions a second or half of it.
CONNECTORS = {
    "CausalTransformerConnector": {"num_layers": 2, "dim": 128, "mlp_dim": 256, "num_heads": 4, "num_kv_heads": 2},
    "MLPConnector": {"stack": 1, "hidden_dim": 512},
    "ConvConnector": {"strides": [1, 2], "hidden_dim": 192},
    "QFormerConnector": {"num_queries": 1, "window": 2, "num_layers": 2, "num_heads": 4, "hidden_dim": 128},
}
_SCALE = {"output_scale": 0.3}  # about the size of the tiny LLM's embeddings
FIGURES = {
    "speech, heard": lambda row: row["speech_accuracy"]["heard"],
    "speech, unheard": lambda row: row["speech_accuracy"]["unheard"],
    "text, unheard": lambda row: row["text_accuracy"]["unheard"],
    "M, heard": lambda row: row["misalignment"]["heard"],
    "F, unheard": lambda row: row["forgetting"]["unheard"],
    "parameters, millions": lambda row: row["trainable_parameters"] / 1e6,
    "seconds a step": lambda row: row["train_seconds"] / row["steps"],
}


def arms(seeds: int) -> list[Arm]:
    """The whole grid of a seed before the next seed."""
    return [
        Arm(
            name,
            (f"--model.init_args.connector={json.dumps({'class_path': name, 'init_args': settings | _SCALE})}",),
            seed,
        )
        for seed in range(seeds)
        for name, settings in CONNECTORS.items()
    ]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-minutes", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(markdown(summarise(run_grid(STUDY, arms(args.seeds), budget_minutes=args.budget_minutes), FIGURES)))


if __name__ == "__main__":
    main()

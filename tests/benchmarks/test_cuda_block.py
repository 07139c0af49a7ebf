from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

_SHARED_BYTES = 227 * 1024  # that a block of threads may have on an H200


def report(path, *options):
    command = [sys.executable, "-m", "benchmarks.cuda_block", "--json", str(path), "--sizes", "3B", *options]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(path.read_text())["rows"]
    assert all(row["graph_breaks"] == 0 for row in rows)
    return {(row["attention"], row["checkpointing"]): row for row in rows}


@pytest.mark.slow
def test_a_block_is_one_graph_on_a_gpu_and_keeps_what_its_checkpointing_says(tmp_path):
    """Compiled here for a GPU that is not here: what waits for the backward pass, and what is computed again in it."""
    rows = report(tmp_path / "report.json")
    assert len(rows) == 8
    for attention in ("sdpa", "flex"):
        none, selective, full = (rows[attention, kind] for kind in ("none", "selective", "full"))
        assert [row["attention_again"] for row in (none, selective, full)] == [0, 0, 1]
        # Of seven products, every second is kept; the last one's result is not needed.
        assert [row["products_again"] for row in (none, selective, full)] == [0, 3, 6]
        assert full["saved_bytes"] == 2 * 2048, "more than the block's input is kept"
        # Of every width of the block once, and no mask.
        assert none["saved_bytes"] < 49 * 2048
        assert full["saved_bytes"] < selective["saved_bytes"] < 0.4 * none["saved_bytes"]
    for kind, backward in {"none": 1, "selective": 1, "full": 2, "teacher": 0}.items():
        row = rows["flex", kind]
        kernels = [row[part]["attention"] if part in row else [] for part in ("forward", "backward")]
        assert [len(found) for found in kernels] == [1, backward], f"{kind}: FlexAttention is not one kernel"
        for kernel in itertools.chain(*kernels):
            assert kernel["wgmma"] > 0, "no tensor cores"
            assert kernel["shared_bytes"] <= _SHARED_BYTES


@pytest.mark.slow
def test_flex_attention_takes_rows_shorter_than_a_block_of_its_mask(tmp_path):
    """Left to choose, Inductor would take a kernel that there is none of for eight query heads a key head."""
    options = ["--context", "96", "--attention", "flex", "--checkpointing", "selective"]
    row = report(tmp_path / "report.json", *options)["flex", "selective"]
    assert len(row["forward"]["attention"]) == len(row["backward"]["attention"]) == 1

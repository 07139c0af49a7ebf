from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_chunk_is_one_kernel_on_a_gpu_without_a_wide_copy_of_its_logits(tmp_path):
    """Compiled here for a GPU that is not here: what each objective reads and writes of the two logits."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.cuda_code", "--objectives", "kl", "mixture", "jsd"]
    done = subprocess.run(
        [*command, "--json", str(report)], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for row in json.loads(report.read_text())["rows"]:
        name = row["objective"]
        assert row["kernels"] == 1, name
        assert row["whole_tensors"] == ["bfloat16"], f"{name}: more than the gradient is kept"
        assert (row["reads"], row["writes"]) == ((6 if name == "jsd" else 4), 1), name
        assert row["spilled_bytes"] == 0, name
        assert row["bytes_per_load"] >= 8, f"{name}: loads are narrow, so rows do not begin at even places"

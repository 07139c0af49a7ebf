from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_small_run_measures_compares_and_says_what_it_skips(tmp_path):
    report = tmp_path / "report.json"
    sizes = ["--tokens", "256", "--vocab", "4000", "--dim", "32", "--heads", "trained", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.projection", *sizes, "--device", "cpu", "--json", str(report)]
    command += ["--contenders", "ours", "plain", "liger_jsd", "liger_kl"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    ours, plain, liger, on_a_gpu = json.loads(report.read_text())["rows"]
    assert ours["seconds"] > 0
    assert plain["gibibytes_above_inputs"] > 256 * 4000 * 4 / 2**30
    assert max(plain["gradients_differ"].values()) < 1e-5
    assert liger.get("skipped") == "liger_kernel is not installed" or liger["seconds"] > 0
    assert on_a_gpu["skipped"] in ("liger_kernel is not installed", "runs on a GPU only")
    assert "| trained | 256 | ours |" in done.stdout

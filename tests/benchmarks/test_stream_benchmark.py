from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_small_run_gives_every_row(tmp_path):
    pytest.importorskip("lhotse", reason="the `test` extra brings it")
    pytest.importorskip("datasets", reason="the `test` extra brings it")
    sizes = ["--utterances", "40", "--seconds", "0.1", "--rounds", "2", "--steps", "1", "--memory-samples", "300"]
    command = [sys.executable, "-m", "benchmarks.stream", *sizes, "--output", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    result = json.loads((tmp_path / "stream.json").read_text())
    rates = result["rates"]
    assert [name[0] for name in rates] == list("abcccdef")
    assert all(row["samples_per_core_s"] > 0 and row["useful_positions_per_core_s"] > 0 for row in rates.values())
    assert all(0 < row["fill"] <= 1 for name, row in rates.items() if name[0] in "cdef")
    assert rates["c: packed batches from audio"]["fill"] > rates["d: WebDataset, padded batches"]["fill"]
    ratios = [result["of_decode_floor"], *result["stored_over_audio"].values(), *result["of_peers"].values()]
    assert len(ratios) == 6
    assert all(0 < least <= median <= most for median, least, most in ratios)  # which is faster, is no test
    assert len(result["resident_mb_over_samples"]) == 10
    assert result["step"]["losses_differ"] < 1e-5  # which NaN is not
    assert result["step"]["core_s_from_audio"] > 0

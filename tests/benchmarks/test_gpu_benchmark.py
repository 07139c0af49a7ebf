"""The one call that measures on a GPU, where there is none: refused, or in miniature."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


def run(*options):
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(tmp_path):
    done = run("--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_parts_report_and_are_named_where_time_is_over(tmp_path):
    done = run("--mini", "--parts", "projection", "step-0.5B", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "gpu.md").read_text()
    assert f"torch {torch.__version__}" in report
    assert "| frozen | 64 | ours | " in report
    assert "| plain | " in report
    assert report.count("exit code 0") == 2
    late = run("--mini", "--minutes", "0", "--parts", "tests", "--output", str(tmp_path))
    assert late.returncode == 1
    assert "## tests\nnot begun: the time was over" in (tmp_path / "gpu.md").read_text()


def test_what_is_cut_off_keeps_what_it_printed(tmp_path):
    command = [sys.executable, "-c", "import time; print('half', flush=True); time.sleep(60)"]
    text, went_well = gpu.run_part("endless", command, tmp_path, seconds=3)
    assert not went_well
    assert "cut off: the time was over" in text
    assert "half" in text

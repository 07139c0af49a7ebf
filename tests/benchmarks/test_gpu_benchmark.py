"""The one call that measures on a GPU, where there is none: refused, or in miniature."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import time
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
    parts = ("projection", "step-0.5B", "rehearsal-0.5B")
    done = run("--mini", "--parts", *parts, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "gpu.md").read_text()
    assert f"torch {torch.__version__}" in report
    assert "| frozen | 64 | ours | " in report
    assert "| plain | " in report
    assert "| on from it | 2 | " in report
    assert report.count("exit code 0") == 3
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.md", *(f"{part}.log" for part in parts)}
    late = run("--mini", "--minutes", "0", "--parts", "step-3B", "--output", str(tmp_path))
    assert late.returncode == 1
    assert "## step-3B\nnot begun: the time was over" in (tmp_path / "gpu.md").read_text()


def test_what_the_environment_lacks_is_named(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda _: ["numpy>=1", "numpy>=99", "no-such-thing>=1", "x; extra == 'dev'"]
    )
    assert [entry.split(" (")[0] for entry in gpu.missing()] == ["numpy>=99", "no-such-thing>=1"]


def test_what_is_cut_off_keeps_what_it_printed_and_leaves_nothing_running(tmp_path):
    inner = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{inner}']); " \
           "print('half', p.pid, flush=True); p.wait()"  # fmt: skip
    text, went_well = gpu.run_part("endless", [sys.executable, "-c", code], tmp_path, seconds=3)
    assert not went_well
    started = Path("/proc", re.search(r"half (\d+)", text)[1], "stat")
    deadline = time.monotonic() + 10
    while started.exists() and started.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "cut off: the time was over" in text
    assert "half" in text

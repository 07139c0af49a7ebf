"""Everything that wants a GPU, in one call: the projection kernel, whole training steps, tests/gpu, a rehearsal.

Each part is a process with a limit of its own and its log in the output folder, where ``gpu.md`` is rewritten after
every part: with the date, the versions, and what the parts printed. What does not fit into the minutes is cut off; it
keeps what it printed, and a call with ``--parts`` goes on from there. Copy the tables into RESULTS.md.

Run by: python -m benchmarks.gpu --minutes 28 --output outputs/gpu
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from packaging.requirements import Requirement

PACKAGES = ("torch", "triton", "transformers", "lightning", "bitsandbytes", "peft", "torchtune", "liger-kernel")
STEP = ("-m", "benchmarks.step", "--attention", "flex")
TESTS = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--durations", "5")
REHEARSAL = ("-m", "benchmarks.rehearsal", "--device", "cuda", "--processes", "1", "--compile", "--attention", "flex")
# In order of what they tell, each with the minutes that it may take.
PARTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "projection": (5, ("-m", "benchmarks.projection")),
    "step-3B": (5, (*STEP, "--size", "3B", "--rows", "4", "--no-table")),
    "tests-projection": (4, (*TESTS, "tests/gpu/test_projection_gpu.py")),
    "tests-training": (6, (*TESTS, "tests/gpu/test_training_gpu.py")),
    # What comes once a step weighs half as much. The plain step may not fit.
    "step-3B-8-rows": (4, (*STEP, "--size", "3B", "--rows", "8", "--documents", "1024", "--no-table")),
    "step-0.5B": (4, (*STEP, "--size", "0.5B", "--rows", "12", "--documents", "1024", "--no-table")),
    "step-3B-sdpa": (4, ("-m", "benchmarks.step", "--size", "3B", "--rows", "4", "--no-table")),
    "rehearsal-0.5B": (5, (*REHEARSAL, "--rows", "8", "--steps", "12")),
    "rows-0.5B": (4, (*STEP, "--size", "0.5B", "--rows", "8", "--no-compile")),
}
MINI = {"projection": ("--tokens", "64", "--vocab", "512", "--dim", "16"),
        "step-0.5B": ("--size", "mini", "--context", "64", "--rows", "2", "--steps", "2", "--warmup", "1",
                      "--documents", "16", "--attention", "sdpa", "--no-compile"),
        "rehearsal-0.5B": ("--size", "mini", "--device", "cpu", "--context", "64", "--rows", "1", "--steps", "2",
                           "--attention", "sdpa", "--no-compile")}  # fmt: skip


def versions() -> str:
    """Date, device and packages, a line each."""
    lines = [f"- date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"]
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        lines.append(f"- {device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    else:
        lines.append("- no GPU")
    held = []
    for name in PACKAGES:
        try:
            held.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            held.append(f"{name} –")
    return "\n".join([*lines, f"- {', '.join(held)}"])


def missing() -> list[str]:
    """Requirements of the package that this environment does not meet."""
    try:
        asked = importlib.metadata.requires("salad-lightning") or []
    except importlib.metadata.PackageNotFoundError:
        return ["salad-lightning itself, without which no part is registered (pip install -e .)"]
    found = []
    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(str(requirement))
            continue
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            found.append(f"{requirement} (there is {version})")
    return found


def run_part(name: str, command: list[str], output: Path, seconds: float) -> tuple[str, bool]:
    """Run a part for at most so long; what came of it as Markdown, and whether it went well."""
    began, log = time.monotonic(), output / f"{name}.log"
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    with open(output / f"{name}.out", "w+") as out, open(log, "w") as err:
        # A session of its own, so that what it has started ends with it and frees the GPU.
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            end = f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code, end = 124, "cut off: the time was over"
        out.seek(0)
        printed = out.read().strip()
    (output / f"{name}.out").unlink()
    if code:  # rows measured so far are there
        printed += "\n\n" + "\n".join(log.read_text().strip().splitlines()[-12:])
    fence = "" if printed.count("|") > 8 and not code else "```\n"
    head = f"## {name}\n`python {' '.join(command[1:])}`: {end}, {time.monotonic() - began:.0f} s\n"
    return f"{head}\n{fence}{printed}\n{fence}", not code


def main() -> int:
    """Run the parts, the most telling first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder for logs and gpu.md")
    parser.add_argument("--minutes", type=float, default=28, help="for all parts together")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--lacking", action="store_true", help="go on where requirements of the package are not met")
    parser.add_argument("--mini", action="store_true", help="tiny sizes, on any machine: does the call itself work?")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.mini:
        print("torch sees no CUDA device: there is nothing to measure here (--mini tries the call)", file=sys.stderr)
        return 2
    if lacking := missing():
        print("This environment lacks:\n  " + "\n  ".join(lacking), file=sys.stderr)
        if not args.lacking:
            print("Install them, or give --lacking for the parts that do without.", file=sys.stderr)
            return 2
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    report, fine = [f"# On a GPU\n{versions()}\n"], True
    for name in args.parts:
        minutes, command = PARTS[name]
        left = min(deadline - time.monotonic(), 60 * minutes)
        if left < 20:
            report.append(f"## {name}\nnot begun: the time was over\n")
            fine = False
        else:
            extra = MINI.get(name, ()) if args.mini else ()
            text, went_well = run_part(name, [sys.executable, *command, *extra], args.output, left)
            report.append(text)
            fine = fine and went_well
        print(report[-1], flush=True)
        (args.output / "gpu.md").write_text("\n".join(report))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

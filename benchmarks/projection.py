"""Forward KL with its gradient, from hidden states: this package's kernel against plain torch, torchtune and Liger.

Every contender does the same job in a process of its own (on a CPU, one for every size): hidden states [M, D] and heads
[V, D] of student and teacher in, the summed KL(teacher ‖ student) and the gradients out (for `liger_jsd`, and
`ours_jsd` beside it, the Jensen–Shannon divergence). Peers take part where they are installed; what cannot run is
listed with its reason. `bare` is not one: it is the same matrix products and nothing else.

Run by: python -m benchmarks.projection --json projection.json
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from salad_lightning.batch import Head, Prediction
from salad_lightning.projection import LossTerms, projected_loss

GIB = 2**30


class Case(NamedTuple):
    """One job; the student's weight needs a gradient where its head is trained."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor


def ours(case: Case) -> None:
    """`salad_lightning.projection`, as the objectives call it."""
    _project(case, LossTerms(kl=1.0))


def ours_jsd(case: Case) -> None:
    """The same kernel's Jensen–Shannon divergence, for Liger."""
    _project(case, LossTerms(jsd=1.0, beta=0.5))


def _project(case: Case, terms: LossTerms) -> None:
    student = Prediction(case.hidden, Head(case.weight))
    teacher = Prediction(case.teacher_hidden, Head(case.teacher_weight))
    torch.autograd.backward(projected_loss(student, case.labels, teacher, terms).sum)


def plain(case: Case) -> None:
    """Whole logits, log-softmax in fp32, `torch.nn.functional.kl_div`."""
    with torch.no_grad():
        target = F.linear(case.teacher_hidden, case.teacher_weight).float().log_softmax(-1)
    log_probs = F.linear(case.hidden, case.weight).float().log_softmax(-1)
    torch.autograd.backward(F.kl_div(log_probs, target, reduction="sum", log_target=True))


def torchtune(case: Case) -> None:
    """Its ForwardKLWithChunkedOutputLoss: whole logits, made and widened in 8 chunks; the KL but for a constant."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss  # type: ignore[import-not-found]

    with torch.no_grad():
        teacher = [F.linear(chunk, case.teacher_weight)[None] for chunk in case.teacher_hidden.chunk(8)]
    student = [F.linear(chunk, case.weight)[None] for chunk in case.hidden.chunk(8)]
    loss = ForwardKLWithChunkedOutputLoss()(student, teacher, case.labels[None])
    (loss * case.labels.shape[0]).backward()


def liger_jsd(case: Case) -> None:
    """Its LigerFusedLinearJSDLoss: chunks of 1,024 tokens, compiled on CUDA; runs on a CPU too."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=case.hidden.is_cuda)
    mean = loss(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.labels, None, None)
    (mean * case.labels.shape[0]).backward()


def liger_kl(case: Case) -> None:
    """Its LigerFusedLinearKLDivLoss, a Triton kernel; the teacher's probabilities are made whole, as it asks."""
    from liger_kernel.transformers.fused_linear_kl_div import (  # type: ignore[import-not-found]
        LigerFusedLinearKLDivLoss,
    )

    with torch.no_grad():
        target = F.linear(case.teacher_hidden, case.teacher_weight).softmax(-1, dtype=torch.float32)
    LigerFusedLinearKLDivLoss("sum", accum_dtype=torch.float32)(case.hidden, case.weight, target).backward()


def bare(case: Case) -> None:
    """The matrix products that any of them needs, at full size: their time is the floor."""
    with torch.no_grad():
        F.linear(case.teacher_hidden, case.teacher_weight)
        raw = F.linear(case.hidden, case.weight)
        case.hidden.grad = raw @ case.weight
        if case.weight.requires_grad:
            case.weight.grad = raw.T @ case.hidden


CONTENDERS: dict[str, Callable[[Case], None]] = {
    "ours": ours,
    "plain": plain,
    "torchtune": torchtune,
    "liger_kl": liger_kl,
    "bare": bare,
    "ours_jsd": ours_jsd,
    "liger_jsd": liger_jsd,
}
REFERENCES = {"plain": "ours", "torchtune": "ours", "liger_kl": "ours", "liger_jsd": "ours_jsd"}
NEEDS = {"torchtune": "torchtune", "liger_kl": "liger_kernel", "liger_jsd": "liger_kernel"}
ON_A_GPU = {"liger_kl"}
# Whole [M, V] tensors in fp32 that are alive at the peak; more than there is would wake the kernel's killer.
WHOLE_TENSORS = {"plain": 5, "torchtune": 4, "bare": 2}


def make_case(args: argparse.Namespace, head: str, tokens: int, vocab: int) -> Case:
    """Random hidden states and heads whose logits have variance 1."""
    generator = torch.Generator(args.device).manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32

    def normal(*shape: int, scale: float) -> Tensor:
        values = torch.empty(shape, device=args.device, dtype=dtype)
        return values.normal_(0, scale, generator=generator)

    weights = [normal(vocab, args.dim, scale=args.dim**-0.5) for _ in range(2)]
    hidden = [normal(tokens, args.dim, scale=1.0) for _ in range(2)]
    labels = torch.randint(0, vocab, (tokens,), device=args.device, generator=generator)
    weights[0].requires_grad_(head == "trained")
    return Case(hidden[0].requires_grad_(), weights[0], hidden[1], weights[1], labels)


def measure_cases(args: argparse.Namespace) -> None:
    """Measure one contender in this process and print a row as soon as it is there; gradients go to a folder."""
    CONTENDERS[args.contender](make_case(args, "frozen", 64, 128))  # libraries load, threads start
    for head, tokens in itertools.product(args.heads, args.tokens):
        row: dict[str, Any] = {"contender": args.contender, "tokens": tokens, "head": head}
        try:
            row |= measure(args, head, tokens)
        except torch.OutOfMemoryError:
            row["skipped"] = "out of memory"
        print(json.dumps(row), flush=True)
        if args.device == "cuda":
            torch.cuda.empty_cache()


def measure(args: argparse.Namespace, head: str, tokens: int) -> dict[str, Any]:
    """Time and peak memory of a case."""
    run = CONTENDERS[args.contender]
    case = make_case(args, head, tokens, args.vocab)
    if args.device == "cuda":
        run(case)  # compilation
    seconds, cpu_seconds, peak = [], [], 0
    for _ in range(args.repeats):
        case.hidden.grad = case.weight.grad = None
        before = reset_peak(args.device)
        started = time.perf_counter(), time.process_time()
        run(case)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started[0])
        cpu_seconds.append(time.process_time() - started[1])
        peak = max(peak, read_peak(args.device) - before)
    assert case.hidden.grad is not None
    gradients = {"hidden": case.hidden.grad.float()}
    if case.weight.requires_grad:
        assert case.weight.grad is not None
        # All of it would be gigabytes on disk; its product with one vector sees every element.
        gradients["head"] = case.weight.grad.float() @ torch.linspace(-1, 1, args.dim, device=args.device)
    torch.save(gradients, gradients_path(args.gradients, args.contender, head, tokens))
    returned = sum(t.grad.nbytes for t in (case.hidden, case.weight) if t.grad is not None)
    products = 4 if case.weight.requires_grad else 3
    operations = 2 * products * tokens * args.vocab * args.dim
    return {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "gibibytes_above_inputs": peak / GIB,
        "gibibytes_above_inputs_and_gradients": max(0, peak - returned) / GIB,
        "teraflops": operations / statistics.median(seconds) / 1e12,
    }


def gradients_path(folder: str, contender: str, head: str, tokens: int) -> Path:
    return Path(folder) / f"{contender}-{head}-{tokens}.pt"


def reset_peak(device: str) -> int:
    """Bytes in use now, from where the peak is measured."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the high-water mark back to what is resident
    return status_bytes("VmRSS")


def read_peak(device: str) -> int:
    """Bytes in use at the peak."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def status_bytes(name: str, path: str = "/proc/self/status") -> int:
    """A figure that Linux gives in kB."""
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def why_not(args: argparse.Namespace, contender: str, head: str, tokens: int) -> str:
    """Why a contender cannot run; empty if it can."""
    module = NEEDS.get(contender)
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if contender in ON_A_GPU and args.device == "cpu":
        return "runs on a GPU only"
    if args.device == "cpu":
        heads = (3 if head == "trained" else 2) * args.vocab * args.dim * 4
        need = heads + WHOLE_TENSORS.get(contender, 1) * tokens * args.vocab * 4
        free = status_bytes("MemAvailable", "/proc/meminfo")
        if need > 0.9 * free:
            return f"would need {need / GIB:.0f} GiB of {free / GIB:.0f}"
    return ""


def run_child(
    args: argparse.Namespace, contender: str, cases: list[tuple[str, int]], folder: str
) -> list[dict[str, Any]]:
    """Measure one contender in a fresh process."""
    rows: list[dict[str, Any]] = [{"contender": contender, "tokens": tokens, "head": head} for head, tokens in cases]
    for row in rows:
        if reason := why_not(args, contender, row["head"], row["tokens"]):
            row["skipped"] = reason
    if any("skipped" in row for row in rows):
        return rows
    command = [sys.executable, "-m", "benchmarks.projection", "--contender", contender, "--gradients", folder]
    for name in ("vocab", "dim", "device", "repeats", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    heads, tokens = (list(dict.fromkeys(str(case[part]) for case in cases)) for part in (0, 1))
    done = subprocess.run(
        [*command, "--heads", *heads, "--tokens", *tokens], capture_output=True, text=True, check=False
    )
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows[len(measured) :]:
        row["skipped"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    rows[: len(measured)] = measured
    for row in measured:
        paths = [
            gradients_path(folder, name, row["head"], row["tokens"])
            for name in (REFERENCES.get(contender, contender), contender)
        ]
        if paths[0] != paths[1] and all(path.exists() for path in paths):
            mine, theirs = (torch.load(path) for path in paths)
            row["gradients_differ"] = {
                name: float((theirs[name] - value).norm() / theirs[name].norm()) for name, value in mine.items()
            }
    return rows


def markdown(rows: list[dict[str, Any]], time_key: str) -> str:
    """The table; ratios are to ``ours`` of the same job, the rate of bare products is by ``time_key``."""
    head = ["head", "tokens", "contender", "s", "ratio to ours", "CPU s", "ratio to ours", "GiB above inputs"]
    head += ["ratio to ours", "rate of bare", "gradients differ"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["head"], str(row["tokens"]), row["contender"]]
        if "skipped" in row:
            lines.append("| " + " | ".join([*cells, f"skipped: {row['skipped']}"]) + " |" * 8)
            continue
        same = {r["contender"]: r for r in rows if (r["head"], r["tokens"]) == (row["head"], row["tokens"])}
        mine, floor = same.get(REFERENCES.get(row["contender"], "ours"), {}), same.get("bare", {})
        for key, form in (("seconds", ".3g"), ("cpu_seconds", ".3g"), ("gibibytes_above_inputs", ".3f")):
            cells += [f"{row[key]:{form}}", ratio(row, mine, key)]
        cells.append(ratio(floor, row, time_key))
        cells.append(", ".join(f"{name} {value:.0e}" for name, value in row.get("gradients_differ", {}).items()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(row: dict[str, Any], other: dict[str, Any], key: str) -> str:
    """``row / other`` where both were measured."""
    return f"{row[key] / other[key]:.2f}" if row.get(key) and other.get(key) else ""


def main() -> None:
    """Run every job and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--vocab", type=int, default=151_936, help="Qwen2.5's, padded")
    parser.add_argument("--dim", type=int, default=2048, help="of Qwen2.5-3B")
    parser.add_argument("--heads", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=0, help="the median counts; by default 1 on a CPU, 10 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write all figures")
    for hidden in ("contender", "gradients"):  # for the processes that this one starts
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.repeats = args.repeats or (10 if args.device == "cuda" else 1)
    torch.set_num_threads(args.threads)
    if args.contender:
        measure_cases(args)
        return
    cases = list(itertools.product(args.heads, args.tokens))
    # What the allocator of a GPU counts does not depend on what ran before, so one compilation serves all sizes.
    jobs = [cases] if args.device == "cuda" else [[case] for case in cases]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for job, contender in itertools.product(jobs, args.contenders):
            for row in run_child(args, contender, job, folder):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    rows.sort(key=lambda row: cases.index((row["head"], row["tokens"])))
    # A CPU is shared with whatever else runs; its own seconds are the steadier figure.
    table = markdown(rows, "seconds" if args.device == "cuda" else "cpu_seconds")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    if args.json:
        settings = {"machine": machine, "torch": torch.__version__, "vocab": args.vocab, "dim": args.dim}
        args.json.write_text(json.dumps(settings | {"rows": rows}, indent=1))
    print(f"{machine}, torch {torch.__version__}, V = {args.vocab:,}, D = {args.dim:,}\n\n{table}")


if __name__ == "__main__":
    main()

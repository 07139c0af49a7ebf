"""Checks of the compiled kernel, each run by test_projection_kernel.py in a process of its own.

The compiler leaves threads and workers behind, and a process that forks after that (the two-process tests do) can hang.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from unittest.mock import patch

import torch
from test_projection_kernel import TERMS, assert_equals_loop, case, predict
from torch._dynamo.utils import counters

from salad_lightning.projection import projected_loss, rows


def compiled_equals_the_loop():
    """Also where student and teacher have more padding of the vocabulary than the other."""
    cases = {name: case(13, "padded") for name in TERMS}
    cases |= {f"{name}, all": case(13, "all") for name in ("mixture", "all")}
    cases |= {"kl, wider than the teacher": (predict(13, padding=9), *case(13)[1:])}
    for name, (student, teacher, targets) in cases.items():
        terms = TERMS[name.partition(",")[0]]
        assert_equals_loop(student, teacher, targets, terms, chunk_size=9)
        kernels = counters["stats"]["unique_graphs"]
        assert_equals_loop(student, teacher, targets, terms, chunk_size=7)
        assert counters["stats"]["unique_graphs"] == kernels, "another size of chunk is the same kernel"
    assert not rows._compiler.failed
    assert kernels == len(cases), "no combination was one too many for the compiler"


def compiled_equals_uncompiled_under_a_mask():
    student, teacher, targets = case(13, "all", dtype=torch.bfloat16)
    mask = torch.arange(13) % 3 != 0
    results = []
    for devices in ({"cpu"}, set()):
        rows._COMPILED_DEVICES = devices
        total = projected_loss(student, targets, teacher, TERMS["all"], mask_M=mask, chunk_size=5).sum
        results.append((total.detach(), *torch.autograd.grad(total, (student.hidden, student.head.weight))))
    for compiled, uncompiled in zip(*results, strict=True):
        assert (compiled.float() - uncompiled.float()).norm() <= 5e-3 * uncompiled.float().norm()


def without_a_compiler_it_runs_uncompiled():
    with (
        tempfile.TemporaryDirectory() as empty,  # nothing compiled before is found there
        patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": empty}),
        torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler")}),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        assert_equals_loop(*case(13), TERMS["kl"], chunk_size=9)
    assert any("torch.compile failed" in str(warning.message) for warning in caught)
    assert rows._compiler.failed


if __name__ == "__main__":
    import torch._inductor  # for its settings

    rows._COMPILED_DEVICES = {"cpu"}
    globals()[sys.argv[1]]()

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
from test_projection_kernel import TERMS, assert_equals_loop, case

from salad_lightning.projection import rows


def compiled_equals_the_loop():
    assert_equals_loop(*case(13, "all"), TERMS["all"], chunk_size=9)
    assert not rows._compiler.failed


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

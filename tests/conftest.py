"""Every test runs offline, on one thread, from the same seed, and leaves the random state and environment as it was."""

from __future__ import annotations

import os

# Before anything imports torch, numpy or huggingface_hub: they read these once.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import random
import sys

import numpy as np
import pytest
import torch

from salad_lightning.registry import INTERFACES

torch.set_num_threads(1)
_OF_A_LAUNCHER = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _isolated():
    """Tests neither depend on the order they run in nor leak settings to the next one."""
    # A sharded run in this process leaves these behind, and a command that inherits them waits for ranks that nobody
    # starts. Fixtures of a module have run by now.
    for name in _OF_A_LAUNCHER:
        os.environ.pop(name, None)
    environment = dict(os.environ)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    default_dtype = torch.get_default_dtype()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_default_dtype(default_dtype)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages; `install` adds one, with real metadata and entry points."""
    folder = tmp_path / "site"
    folder.mkdir()
    yield Site(folder)
    for name, module in list(sys.modules.items()):
        # Not getattr: lazy modules would import what they are asked for.
        if str(vars(module).get("__file__", "")).startswith(str(folder)):
            del sys.modules[name]


class Site:
    """A folder that, on the import path, is to Python what site-packages is."""

    def __init__(self, folder):
        self.folder = folder

    def on_path(self, monkeypatch):
        """Make this process see what is installed here, for the rest of the test."""
        monkeypatch.syspath_prepend(str(self.folder))

    def install(self, package, *, kind, name, code, version="1.0", target=None):
        """Write a package of one module that offers ``name``; ``code`` may refer to its interface as ``Base``."""
        module = package.replace("-", "_")
        interface_module, _, interface = INTERFACES[kind].rpartition(".")
        head = f"from {interface_module} import {interface} as Base\n"
        (self.folder / f"{module}.py").write_text(head + code)
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        target = target or f"{module}:{name}"
        (info / "entry_points.txt").write_text(f"[salad_lightning.{kind}s]\n{name} = {target}\n")

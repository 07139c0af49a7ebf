"""Imports point one way, from the command line down to the batch; ARCHITECTURE.md shows the layers."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "salad_lightning"

# A layer may import itself and every layer before it. Same line: neither may import the other.
LAYERS = [
    {"errors"},
    {"registry"},
    {"batch"},
    {"interfaces"},
    {"projection"},
    {"encoders", "connectors", "objectives", "synthesizers"},
    {"data"},
    {"model", "corpus"},
    {"evaluation", "export"},
    {"training"},
    {"demo", "selection", "report"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PARTS = {"encoders", "connectors", "objectives", "synthesizers"}
# Parts reach what they exchange and nothing else; the package itself (its version) is open to all.
PART_MAY_IMPORT = {"", "interfaces", "batch", "projection", "errors"}
STANDARD_LIBRARY_ONLY = {"", "errors", "registry", "cli", "__main__"}
# Shipped for tests of this package and of plugins: it may import anything, and nothing else may import it.
TESTING = "testing"


def violations(package: Path) -> list[str]:
    """Every import of a module of ``package`` that breaks a rule, type-checking and in-function imports included."""
    found = []
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        source = "" if relative.name == "__init__.py" and len(relative.parts) == 1 else relative.parts[0]
        source = source.removesuffix(".py")
        for line, target in imports(path, package):
            reason = broken_rule(source, target, package.name)
            if reason:
                found.append(f"{relative}:{line} imports {target}: {reason}")
    return found


def imports(path: Path, package: Path):
    """Line and full name of every import in a file; relative ones resolved."""
    inside = [package.name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name` may import a submodule.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == package.name else [module]
            yield from ((node.lineno, name) for name in names)


def broken_rule(source: str, target: str, package_name: str) -> str:
    top, *rest = target.split(".")
    if top != package_name:
        outside = source in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names
        return "only the standard library is allowed here" if outside else ""
    layer = rest[0] if rest else ""
    layer = "" if layer.startswith("__") else layer
    if source == TESTING or layer in ("", source):
        return ""
    if layer == TESTING:
        return "only tests import the testing package"
    if source not in RANK or layer not in RANK:
        return "this module has no layer yet: give it one in tests/test_arrows.py"
    if source in PARTS and layer not in PART_MAY_IMPORT:
        return f"parts import only {', '.join(sorted(PART_MAY_IMPORT - {''}))}"
    if RANK[layer] >= RANK[source]:
        return f"{layer} is not below {source}"
    return ""


def test_arrows_point_one_way():
    assert violations(PACKAGE) == []


def test_every_module_is_looked_at():
    modules = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert modules - {"__init__", TESTING} <= set(RANK)
    assert len(modules) > 10


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("data/stream.py", "from salad_lightning.model.llm import Llm", "model is not below data"),
        ("model/llm.py", "import salad_lightning.training.schedule", "training is not below model"),
        ("model/llm.py", "from salad_lightning import training", "training is not below model"),
        ("model/llm.py", "from ..training import schedule", "training is not below model"),
        ("model/llm.py", "def f():\n    import salad_lightning.demo.run", "demo is not below model"),
        ("batch.py", "if TYPE_CHECKING:\n    from salad_lightning.interfaces import Encoder", "is not below batch"),
        ("encoders/mine.py", "from salad_lightning.connectors._layers import ceil_div", "parts import only"),
        ("objectives/mine.py", "from salad_lightning.data.spec import SequenceSpec", "parts import only"),
        ("evaluation/gap.py", "from salad_lightning.testing.tiny import llm", "only tests"),
        ("evaluation/gap.py", "from salad_lightning.export import save", "export is not below evaluation"),
        ("registry.py", "import numpy", "only the standard library"),
        ("cli.py", "import torch", "only the standard library"),
        ("novelty.py", "from salad_lightning.batch import SpeechBatch", "has no layer yet"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line, expected):
    package = tmp_path / "salad_lightning"
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text(f"import json\n{line}\n")
    (found,) = violations(package)
    assert expected in found
    assert found.startswith(file)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("encoders/mine.py", "from salad_lightning.encoders._audio import pad"),
        ("encoders/mine.py", "import torch\nfrom salad_lightning.interfaces import Encoder"),
        ("training/loop.py", "from salad_lightning.model.llm import Llm"),
        ("testing/tiny.py", "from salad_lightning.demo.run import run"),
        ("cli.py", "import json\nfrom salad_lightning import __version__"),
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path, file, line):
    package = tmp_path / "salad_lightning"
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text(line)
    assert violations(package) == []

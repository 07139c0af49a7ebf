"""Installed packages, seen through the real command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from salad_lightning.cli import main

PLUGINS = Path(__file__).parents[1] / "plugins"
CONNECTOR = """
from salad_lightning.interfaces import ConnectorOutput
from torch import nn

class {name}(Base):
    \"\"\"A linear map.

    Args:
        encoder_dim: Width of a frame.
        llm_dim: Width of an embedding.
        bias: Whether to add one.
    \"\"\"

    def __init__(self, *, encoder_dim: int, llm_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(encoder_dim, llm_dim, bias=bias)

    def output_lengths(self, lengths, *, num_words=None):
        return lengths

    def forward(self, frames_NTD, lengths_N, *, num_words_N=None):
        return ConnectorOutput(self.linear(frames_NTD), lengths_N, {{}})
"""


def install_all(site):
    site.install("good-pack", kind="connector", name="GoodConnector", code=CONNECTOR.format(name="GoodConnector"))
    site.install("bad-pack", kind="connector", name="BadConnector", code="import no_such_library")
    for package in ("one-pack", "two-pack"):
        site.install(package, kind="connector", name="SameConnector", code=CONNECTOR.format(name="SameConnector"))


@pytest.fixture
def fit(site, monkeypatch, capsys):
    """``salad-lightning fit`` up to the finished configuration, with everything installed."""
    install_all(site)
    site.on_path(monkeypatch)

    def run(connector):
        path = site.folder / "run.yaml"
        path.write_text(
            "model:\n"
            "  llm: nowhere\n"
            "  encoder: LogMelEncoder\n"
            "  objective: ForwardKLObjective\n"
            f"  connector: {connector}\n"
        )
        code = main(["fit", "--config", str(path), "--print_config"])
        return code, *capsys.readouterr()

    return run


def test_the_list_in_a_process_of_its_own(site):
    install_all(site)
    done = subprocess.run(
        [sys.executable, "-m", "salad_lightning", "plugins", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site.folder)},
        check=True,
        timeout=300,
    )
    rows = {row["package"]: row for row in json.loads(done.stdout)}
    assert rows["good-pack"] == {
        "kind": "connector",
        "name": "GoodConnector",
        "package": "good-pack",
        "version": "1.0",
        "state": "ok",
        "target": "good_pack:GoodConnector",
        "reason": "",
    }
    assert rows["bad-pack"]["state"] == "failed"
    assert rows["bad-pack"]["reason"] == "ModuleNotFoundError: No module named 'no_such_library'"
    assert rows["one-pack"]["state"] == rows["two-pack"]["state"] == "clash"
    examples = [path.parent.name for path in PLUGINS.glob("*/pyproject.toml")]
    assert examples
    for example in examples:
        assert rows[example]["state"] == "ok", f"{example} is not installed or not usable: run `make install`"
        assert rows[example]["version"] == version(example)


def test_the_table(site, monkeypatch, capsys):
    install_all(site)
    site.on_path(monkeypatch)
    assert main(["plugins"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["kind", "name", "package", "version", "state"]
    cells = [line.split() for line in lines]
    assert ["connector", "GoodConnector", "good-pack", "1.0", "ok"] in cells
    assert ["connector", "BadConnector", "bad-pack", "1.0", "failed"] in cells
    assert ["connector", "SameConnector", "two-pack", "1.0", "clash"] in cells
    assert "BadConnector of bad-pack: ModuleNotFoundError: No module named 'no_such_library'" in lines


def test_a_run_uses_a_good_part_beside_broken_ones(fit):
    code, out, err = fit("{class_path: GoodConnector, init_args: {bias: false}}")
    assert code == 0, err
    assert "class_path: good_pack.GoodConnector" in out
    assert "bias: false" in out


def test_the_full_path_reaches_a_class_whose_name_is_contested(fit):
    code, out, err = fit("two_pack.SameConnector")
    assert code == 0, err
    assert "class_path: two_pack.SameConnector" in out


@pytest.mark.parametrize(
    ("connector", "words"),
    [
        ("BadConnector", ["bad-pack", "No module named 'no_such_library'"]),
        ("SameConnector", ["one-pack", "two-pack", "uninstall one"]),
        ("GodConnector", ["did you mean GoodConnector?", "MLPConnector", "BadConnector of bad-pack"]),
        ("{class_path: GoodConnector, init_args: {bais: false}}", ["model.connector.bais", "did you mean 'bias'?"]),
    ],
)
def test_what_cannot_be_used_is_refused(fit, connector, words):
    code, _, err = fit(connector)
    assert code == 2
    assert [word for word in ["run.yaml:5", *words] if word not in err] == [], err


def test_a_module_is_named_and_a_broken_one_refused(site, monkeypatch, capsys):
    code = "from salad_lightning.training.text_lm_module import TextLMModule\nclass GoodModule(TextLMModule): pass\n"
    site.install("good-module", kind="module", name="GoodModule", code=code)
    site.install("bad-module", kind="module", name="BadModule", code="import no_such_library")
    site.install("odd-module", kind="module", name="OddModule", code="class OddModule: pass")
    site.on_path(monkeypatch)
    assert main(["fit", "--model=GoodModule", "--model.llm=x", "--print_config"]) == 0
    assert "class_path: good_module.GoodModule" in capsys.readouterr().out
    for name, reason in (("BadModule", "no_such_library"), ("OddModule", "is not a subclass of")):
        assert main(["fit", f"--model={name}", "--print_config"]) == 2
        said = capsys.readouterr().err
        assert f"--model={name}" in said
        assert reason in said

"""README and guides as pages: code in them parses, links lead somewhere, and what they build up step by step works.

Their commands are run in ``test_document_commands.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from document_blocks import DOCUMENTS, ROOT, blocks, command_lines, shown_files

from salad_lightning.testing.runs import save_tiny_world


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A working folder with the files that the document shows."""
    monkeypatch.chdir(tmp_path)
    with shown_files(request.node.callspec.params["document"], tmp_path):
        yield tmp_path


def test_every_document_is_looked_at():
    assert len(DOCUMENTS) >= 15
    assert sum(len(command_lines(document)) for document in DOCUMENTS) >= 100


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_and_yaml_parse(document):
    for block in blocks(document):
        if block.language == "python":
            compile(block.text if not block.text.startswith("   ") else "if 1:\n" + block.text, document, "exec")
        elif block.language == "yaml":
            assert yaml.safe_load(block.text)
        elif block.language == "json":
            assert [json.loads(line) for line in block.text.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="what stands in for pip reads TOML with the standard library")
def test_a_connector_in_ten_minutes(tmp_path):
    """The steps of ``plugins/README.md`` in their order, in a shell, as someone who has only this page."""
    shutil.copytree(ROOT / "plugins" / "salad-gru", tmp_path / "plugins" / "salad-gru")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    script = [
        "salad-lightning() { python -m salad_lightning \"$@\"; }",
        "pytest() { python -m pytest -q -p no:cacheprovider; }",
        # Setuptools writes this when it installs a folder to be edited.
        "pip() { mkdir -p src/my_connector.egg-info; python \"$METADATA\"; }",
    ]  # fmt: skip
    for block in blocks("plugins/README.md"):
        if block.language == "bash":
            text = re.sub(r"^ {3}", "", block.text, flags=re.MULTILINE)
            script.append(re.sub(r"(salad-lightning fit --config )(.*)", r"\1../\2 --print_config", text))
    (tmp_path / "metadata.py").write_text(METADATA)
    source = str(tmp_path / "my-connector" / "src")
    environment = os.environ | {
        "PYTHONPATH": f"{source}:{ROOT}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "METADATA": str(tmp_path / "metadata.py"),
    }
    run = ["bash", "-euo", "pipefail", "-c", "\n".join(script)]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^connector +MyConnector +my-connector +0\.1\.0 +ok$", done.stdout, re.MULTILINE)
    assert re.search(r"\d+ passed", done.stdout)
    assert "class_path: my_connector.connector.MyConnector" in done.stdout
    texts = [path.read_text() for path in (tmp_path / "my-connector").rglob("*.*") if path.suffix in (".py", ".toml")]
    assert len(texts) == 4
    assert not re.search(r"salad[-_]gru|GRUConnector|gru_connector", "".join(texts))


METADATA = """
import pathlib, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
info = pathlib.Path("src/my_connector.egg-info")
(info / "PKG-INFO").write_text(f"Metadata-Version: 2.1\\nName: {project['name']}\\nVersion: {project['version']}\\n")
lines = []
for group, names in project["entry-points"].items():
    lines += [f"[{group}]"] + [f"{name} = {target}" for name, target in names.items()]
(info / "entry_points.txt").write_text("\\n".join(lines))
"""


@pytest.mark.slow
@pytest.mark.parametrize("document", ["docs/guides/subclassing.md"])
def test_the_module_of_the_subclassing_guide_trains(document, folder):
    world = save_tiny_world(folder / "world")
    options = ["--model=my_package.MyModule", "--model.size_weight=0.5", "--model.embedding_lr=2e-6"]
    run = world.run("fit", "own", *options, "--trainer.max_steps=3", "--trainer.callbacks+=LearningRateMonitor",
                    "--trainer.callbacks+=FinalCheckpoint")  # fmt: skip
    plain = world.run("fit", "plain", "--trainer.max_steps=1")
    # The extra loss is in the sum from the first step on, and is logged.
    size = run.column("train/size")
    assert len(size) == 3
    assert run.column("train/loss")[0] == pytest.approx(plain.column("train/loss")[0] + 0.5 * size[0], rel=1e-4)
    assert min(run.column("train/longest_span_frames")) > 0
    groups = {group["name"]: group for group in run.checkpoint("final.ckpt")["optimizer_states"][0]["param_groups"]}
    assert groups["embeddings"]["initial_lr"] == pytest.approx(2e-6)
    assert groups["llm"]["initial_lr"] == pytest.approx(5e-5)
    assert run.checkpoint("final.ckpt")["hyper_parameters"]["size_weight"] == 0.5


# The pages themselves


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the `docs` extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr.strip()
    for page, name in (("interfaces", "Connector"), ("training", "SpeechLLMModule"), ("data", "InterleaveDocuments")):
        html = (tmp_path / "site" / "api" / page / "index.html").read_text()
        assert re.search(rf'<h\d id="salad_lightning\.[\w.]+\.{name}"', html), f"{name} is missing on {page}"


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / document).read_text()):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"

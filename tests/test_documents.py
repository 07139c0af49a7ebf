"""Every command in README and guides: which are run, and which are only parsed, is said here.

* Blocks under ``<!-- run -->`` are **run**, in a folder with small files in the form that the page speaks of.
* The steps of ``plugins/README.md`` are **run** as they stand, but for ``pip install -e .``, in whose place the
  metadata is written that it would write (no network), and for training, which is parsed.
* The module of ``guides/subclassing.md`` is **run** for three steps.
* Every other ``salad-lightning`` command is **parsed** with its real parser, recipes and files included: a wrong
  option, key, file or name of a part is found, a wrong result is not. Paths of data and models are not looked up.
* ``make`` targets and ``pip install`` folders must be there. ``hf download`` is shown and not run.

A command with "…" in it is a sketch. Anything else that stands in a block of commands is an error here.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from salad_lightning.cli import COMMANDS, main
from salad_lightning.data.audio import encode_flac
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.shards import speak_tones

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("plugins/*/README.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/guides/*.md"),
    ]
)
WITH_PRINT_CONFIG = ("fit", "validate", "test", "predict", "select")
SHOWN = ("hf",)


class Block(NamedTuple):
    """A fenced block."""

    language: str
    title: str
    text: str
    run: bool


def blocks(document):
    pattern = r"(<!-- run -->\n)?^ *```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^ *```$"
    for run, language, title, text in re.findall(pattern, (ROOT / document).read_text(), re.DOTALL | re.MULTILINE):
        yield Block(language, title, text, bool(run))


def commands(document):
    """Command lines of shell blocks, as lists of words; of blocks without a language, only what is surely one."""
    found = []
    for block in blocks(document):
        if block.language not in ("", "bash") or block.title or block.run:
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            surely = re.match(r"\s*(salad-lightning|make|pip|cp)\b", line)
            if "…" not in line and line.strip() and (block.language == "bash" or surely):
                found.append(shlex.split(line, comments=True))
    return [words for words in found if words]


def essential(words):
    """Without variables, launchers, and the folder of the environment."""
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "torchrun":
        words = ["salad-lightning", *words[words.index("salad_lightning") + 1 :]]
    words = words[1:] if words[0] == "srun" else words
    return [Path(words[0]).name, *words[1:]]


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A working folder with the repository's recipes and plugins, and the files that the document shows."""
    for name in ("recipes", "plugins"):
        (tmp_path / name).symlink_to(ROOT / name)
    if document := request.node.callspec.params.get("document"):
        write_files(document, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [path.stem for path in tmp_path.glob("*.py")]:
        sys.modules.pop(name, None)


def write_files(document, folder):
    for block in blocks(document):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)


def test_every_document_is_looked_at():
    assert len(DOCUMENTS) >= 15
    assert sum(len(commands(document)) for document in DOCUMENTS) >= 40


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
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if commands(document)])
def test_commands_parse(document, folder, capsys):
    for words in commands(document):
        words = essential(words)
        try:
            problem = parse(words)
        except SystemExit as stop:
            problem = stop.code
        said = capsys.readouterr()
        assert not problem, f"{shlex.join(words)}\n{problem}\n{said.err}"


def parse(words):
    """What is wrong with a command; nothing where all is well."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return "" if rest[0] in " ".join(targets).split() else "no such target"
    if program == "pip":
        paths = [Path(word) for word in rest if word.startswith("./")]
        return "" if paths and all((path / "pyproject.toml").is_file() for path in paths) else "no such package"
    if program in SHOWN:
        return ""
    if program in ("python", "pytest"):
        return "" if rest[:2] == ["-m", "pytest"] else "only `python -m pytest` is known here"
    if program != "salad-lightning":
        return "no command that is known here"
    rest = rest[1:] if rest[0] == "--debug" else rest
    if rest[0] in WITH_PRINT_CONFIG:
        return main([*rest, *(["--print_config"] if "--print_config" not in rest else [])])
    if rest[0].startswith("--") or "--help" in rest:
        return main(rest)
    parser = argparse.ArgumentParser(prog=rest[0])
    importlib.import_module(COMMANDS[rest[0]].module).add_arguments(parser)
    parser.parse_args(rest[1:])
    return ""


def test_a_wrong_command_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    assert parse(["make", "nothing"])
    assert parse(["salad-lightning", "fit", "--config", "recipes/stage1.yaml", "--model.connector=NoConnector"])
    assert parse(["rm", "-rf", "x"])
    with pytest.raises(SystemExit):
        parse(["salad-lightning", "prepare", "--nonsense"])
    capsys.readouterr()


# Run for real


def save_recordings(folder):
    for name, text in (("one", "the quick brown fox"), ("two", "seven bright stars")):
        (folder / f"{name}.flac").write_bytes(encode_flac(speak_tones(text)[0], 16_000))


def save_libriheavy(folder):
    """One long recording, and cuts of it with the two texts of ``custom.texts``."""
    folder.mkdir(parents=True)
    audio, words = speak_tones("the quick brown fox jumps over the lazy dog")
    (folder / "book.flac").write_bytes(encode_flac(audio, 16_000))
    source = {"type": "file", "channels": [0], "source": "book.flac"}
    seconds = len(audio) / 16_000
    recording = {"id": "book", "sources": [source], "sampling_rate": 16_000, "num_samples": len(audio),
                 "duration": seconds, "channel_ids": [0]}  # fmt: skip
    cuts = []
    for number, (first, stop) in enumerate(((0, 4), (4, 9))):
        start, text = words[first][1], " ".join(word[0] for word in words[first:stop])
        length = words[stop - 1][2] - start
        custom = {"texts": [text.capitalize() + ".", text.upper()]}
        supervision = {"id": f"cut{number}", "recording_id": "book", "start": 0.0, "duration": length, "channel": 0,
                       "speaker": "1", "custom": custom}  # fmt: skip
        cuts.append({"id": f"cut{number}", "start": start, "duration": length, "channel": 0, "type": "MonoCut",
                     "supervisions": [supervision], "recording": recording})  # fmt: skip
    with gzip.open(folder / "libriheavy_cuts_small.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(cut) + "\n" for cut in cuts)


def save_emilia(folder):
    folder.mkdir(parents=True)
    with tarfile.open(folder / "EN-B000000.tar", "w") as tar:
        for number, text in enumerate(["the cat sleeps in the warm sun", "nobody is awake to count them"]):
            key = f"EN_B00000_S00000_W{number:06d}"
            record = {"id": key, "wav": f"{key}.mp3", "text": text, "speaker": "EN_B00000_S00000", "language": "en",
                      "dnsmos": 3.3}  # fmt: skip
            for extension, content in (("mp3", mp3(text)), ("json", json.dumps(record).encode())):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def mp3(text):
    import soundfile  # here: only this page needs it

    file = io.BytesIO()
    soundfile.write(file, speak_tones(text, sample_rate_hz=24_000)[0], 24_000, format="MP3")
    return file.getvalue()


def save_parquet(folder, **columns):
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "000_00000.parquet")


def save_what_is_spoken_of(document, folder):
    if document.endswith("your_data.md"):
        save_recordings(folder / "recordings")
    if document.endswith("corpora.md"):
        downloads, texts = folder / "downloads", ["A page about boats.", "A page about stars."]
        save_libriheavy(downloads / "libriheavy")
        save_emilia(downloads / "emilia" / "Emilia-YODAS" / "EN")
        save_parquet(downloads / "smollm" / "cosmopedia-v2", prompt=["x", "y"], text=texts, token_length=[5, 5])
        save_parquet(downloads / "fineweb_edu" / "sample" / "10BT", text=texts, url=["a", "b"], int_score=[3, 4])


@pytest.mark.slow
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if any(b.run for b in blocks(document))])
def test_blocks_to_run_run(document, folder):
    save_what_is_spoken_of(document, folder)
    lines = [line for block in blocks(document) if block.run for line in block.text.strip().splitlines()]
    assert lines
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "salad-lightning"
        assert main(words) == 0, line


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

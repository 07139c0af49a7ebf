"""The command line: fast help, and for every mistake one message that names the place and the cure."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch._utils import ExceptionWrapper

import salad_lightning
from salad_lightning import cli
from salad_lightning.cli import main
from salad_lightning.commands.parse_errors import explain
from salad_lightning.commands.settings import Setting
from salad_lightning.errors import UserError

GOOD = """\
trainer:
  max_steps: 5
  callbacks:
    - class_path: ModelCheckpoint
      init_args: {every_n_train_steps: 3}
model:
  class_path: SpeechLLMModule
  init_args:
    llm: nowhere
    encoder: LogMelEncoder
    connector:
      class_path: MLPConnector
      init_args: {stack: 4, hidden_dim: 24}
    objective: ForwardKLObjective
"""
SOURCES = """\
data:
  init_args:
    train:
      - shards: data/one
        documents: {class_path: InterleaveDocuments}
        weight: 2
      - shards: data/two
        documents: {class_path: InterleaveDocuments}
        weight: 1
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def refused(capsys):
    """Run a command line that must be refused; its message."""

    def run(*argv):
        assert main(list(argv)) == 2
        err = capsys.readouterr().err
        assert err.startswith("salad-lightning: ")
        assert "Traceback" not in err
        return err.removeprefix("salad-lightning: ")

    return run


@pytest.fixture
def merged(capsys):
    """What a command line's YAML files and options add up to."""

    def run(*argv):
        code = main(["fit", *argv, "--print_config"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return yaml.safe_load(captured.out)

    return run


# Help


def salad(*argv):
    return subprocess.run([sys.executable, "-m", "salad_lightning", *argv], capture_output=True, text=True, timeout=300)


def test_help_answers_in_under_a_second_and_imports_no_torch():
    code = (
        "import sys\nfrom salad_lightning.cli import main\n"
        "assert main(['--help']) == 0\n"
        "print(sorted({'torch', 'lightning', 'jsonargparse', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "[]"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert salad("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0, seconds


def processor_seconds(*command):
    """Output and processor time of a process: what else a busy machine does counts little."""
    # Without the coverage tracer, which would be what is timed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_fit_help_answers_in_under_six_seconds():
    text, seconds = processor_seconds("-m", "salad_lightning", "fit", "--help")
    assert "--model CONFIG | CLASS_PATH_OR_NAME | .INIT_ARG_NAME VALUE" in text
    # Most of it is Lightning's own import, so a slow or busy machine is measured by that, both at their best.
    if seconds >= 6.0:
        pairs = [
            (processor_seconds("-m", "salad_lightning", "fit", "--help"), processor_seconds("-c", f"import {module}"))
            for module in 3 * ["lightning.pytorch.cli"]
        ]
        ours, theirs = (min(seconds for _, seconds in side) for side in zip(*pairs, strict=True))
        assert ours < 1.5 * theirs


@pytest.mark.slow
def test_fit_help_loads_no_voice():
    code = (
        "import sys; from salad_lightning.cli import main; main(['fit', '--help']); "
        "print(sorted({'kokoro', 'spacy', 'espeakng_loader', 'sklearn'} & set(sys.modules)))"
    )
    text, _ = processor_seconds("-c", code)
    assert text.splitlines()[-1] == "[]"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_subcommand_in_one_line(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(command.summary)
        assert len(line) <= 100
    assert {"fit", "validate", "test", "predict", "prepare", "plugins", "demo"} <= set(cli.COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["salad-lightning", salad_lightning.__version__]


@pytest.mark.parametrize("name", [name for name, command in cli.COMMANDS.items() if not command.lightning])
def test_help_of_the_other_subcommands(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"salad-lightning {name}" in capsys.readouterr().out


# What is accepted


def test_short_names_of_parts_in_yaml_and_in_options(write, merged):
    config = write(GOOD)
    model = merged("--config", config)["model"]["init_args"]
    assert model["connector"]["class_path"] == "salad_lightning.connectors.mlp.MLPConnector"
    assert model["connector"]["init_args"]["stack"] == 4
    option = ["--model.connector=ConvConnector", "--model.objective", "NLLObjective"]
    model = merged("--config", config, *option)["model"]["init_args"]
    assert model["connector"]["class_path"] == "salad_lightning.connectors.conv.ConvConnector"
    assert model["objective"]["class_path"] == "salad_lightning.objectives.nll.NLLObjective"


def test_model_and_data_default_to_ours_and_can_be_others(write, merged):
    short = "model: {llm: nowhere, encoder: LogMelEncoder, connector: MLPConnector, objective: NLLObjective}"
    config = merged("--config", write(short))
    assert config["model"]["class_path"] == "salad_lightning.training.speech_llm_module.SpeechLLMModule"
    assert config["data"]["class_path"] == "salad_lightning.data.datamodule.SpeechDataModule"
    assert config["seed_everything"] == 0
    other = merged("--model=lightning.pytorch.demos.boring_classes.BoringModel")
    assert other["model"]["class_path"] == "lightning.pytorch.demos.boring_classes.BoringModel"
    assert merged("--model=TextLMModule", "--model.llm=x")["model"]["class_path"].endswith(".TextLMModule")


def test_overlays_merge_init_args_and_replace_lists_and_other_classes(write, merged):
    """What ``--config recipe.yaml --config overlay.yaml`` means."""
    base = write(GOOD)
    overlay = write(
        "trainer: {callbacks: [{class_path: LearningRateMonitor}]}\n"
        "model: {init_args: {context: 64, connector: {init_args: {hidden_dim: 8}}}}\n",
        "overlay.yaml",
    )
    config = merged("--config", base, "--config", overlay)
    model = config["model"]["init_args"]
    # Untouched keys stay, at every depth, and a class keeps the arguments that the overlay does not name.
    assert config["trainer"]["max_steps"] == 5
    assert (model["llm"], model["context"]) == ("nowhere", 64)
    assert model["connector"]["class_path"].endswith(".MLPConnector")
    assert (model["connector"]["init_args"]["stack"], model["connector"]["init_args"]["hidden_dim"]) == (4, 8)
    # A list is replaced, not extended.
    assert [entry["class_path"].split(".")[-1] for entry in config["trainer"]["callbacks"]] == ["LearningRateMonitor"]
    # Another class keeps the arguments that it has too, and drops the rest.
    other = write("model: {init_args: {connector: {class_path: ConvConnector}}}", "other.yaml")
    changed = merged("--config", base, "--config", other)["model"]["init_args"]["connector"]
    assert changed["class_path"].endswith(".ConvConnector")
    assert changed["init_args"]["hidden_dim"] == 24
    assert "stack" not in changed["init_args"]
    # The order of files is the order of precedence.
    steps = write("trainer: {max_steps: 9}", "steps.yaml")
    assert merged("--config", base, "--config", steps)["trainer"]["max_steps"] == 9
    assert merged("--config", steps, "--config", base)["trainer"]["max_steps"] == 5
    assert merged("--config", base, "--trainer.max_steps=7", "--config", steps)["trainer"]["max_steps"] == 9


# Mistakes


def test_unknown_subcommand(refused):
    assert "did you mean fit?" in refused("fitt")
    assert "known: fit, validate" in refused("zzzz")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("MLPConnector", "MLPConector", [":12 ", "connector 'MLPConector'", "did you mean MLPConnector?"]),
        (": ForwardKLObjective", ": KL", [":14 ", "objective 'KL'", "known objectives: ForwardKLObjective"]),
        ("max_steps: 5", "max_stepz: 5", [":2:", "'trainer.max_stepz'", "did you mean 'max_steps'?"]),
        ("trainer:", "trainr:", [":1:", "'trainr'", "did you mean 'trainer'?"]),
        ("llm: nowhere", "lllm: nowhere", [":9:", "'model.lllm'", "did you mean 'llm'?"]),
        ("stack: 4", "stak: 4", [":13:", "'model.connector.stak'", "did you mean 'stack'?"]),
        ("stack: 4", "stack: four", [":13:", "'model.connector.stack'", "four"]),
        ("max_steps: 5", "max_steps: many", [":2:", "'trainer.max_steps' takes int, not 'many'"]),
        ("    llm: nowhere\n", "", ["missing: model.llm", "--model.llm="]),
        ("SpeechLLMModule", "SpechLLMModule", [":7:", "did you mean SpeechLLMModule?"]),
        ("SpeechLLMModule", "my_package.MyModule", [":7:", "No module named 'my_package'"]),
        ("ModelCheckpoint", "ModelChekpoint", ["did you mean ModelCheckpoint?"]),
        ("    llm: nowhere", "    llm: nowhere\n    lora: {r: 8}", [":10:", "'model.lora.r'", "did you mean 'rank'?"]),
        ("every_n_train_steps", "every_n_train_step", [":5:", "did you mean 'every_n_train_steps'?"]),
        ("model:", "model: [", [":8: not valid YAML"]),
        (GOOD, "- a\n- b\n", ["a configuration is a mapping"]),
    ],
)  # fmt: skip
def test_mistakes_in_yaml_name_line_and_cure(write, refused, old, new, words):
    assert GOOD.count(old) == 1
    path = write(GOOD.replace(old, new))
    message = refused("fit", "--config", path)
    missing = [word for word in words if word not in message.replace(path, "run.yaml")]
    assert missing == [], message
    assert len(message.splitlines()) <= 6, message


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--model.connector=MLPConector"], ["--model.connector=MLPConector", "did you mean MLPConnector?"]),
        (["--model.connector", "MLPConector"], ["did you mean MLPConnector?"]),
        (["--model.conector=MLPConnector"], ["'model.conector'", "did you mean 'connector'?"]),
        (["--trainer.max_stepz=3"], ["'trainer.max_stepz'", "did you mean 'max_steps'?"]),
        (["--trainer.max_steps=many"], ["--trainer.max_steps=many", "takes int"]),
        (["--data.rows_per_batch=x"], ["--data.rows_per_batch=x", "takes int, not 'x'"]),
        (["--model.connector.stack=x"], ["--model.connector.stack=x", "'x'"]),
    ],
)
def test_mistakes_in_options_name_the_option(write, refused, option, words):
    message = refused("fit", "--config", write(GOOD), *option)
    assert [word for word in words if word not in message] == [], message


def test_missing_config_suggests_the_nearest(write, refused, tmp_path):
    path = write(GOOD, "stage1.yaml")
    message = refused("fit", "--config", str(tmp_path / "stage.yaml"))
    assert "no such configuration file" in message
    assert f"did you mean {path}?" in message


def test_the_last_file_that_sets_a_key_is_blamed(write, refused):
    first, second = write("trainer: {max_steps: 1}"), write("\n\ntrainer: {max_steps: few}", "second.yaml")
    assert refused("fit", "--config", first, "--config", second).startswith(f"{second}:3:")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("shards", "shard", ["'data.train.shard'", "did you mean 'shards'?"]),
        ("Documents}", "Documents, init_args: {text_word: [1, 2]}}", ["'data.train.documents.text_word'",
                                                                    "did you mean 'text_words'?"]),
        ("InterleaveDocuments", "InterleaveDocument", ["did you mean InterleaveDocuments?"]),
        ("{class_path: InterleaveDocuments}", "InterleaveDocument", ["did you mean InterleaveDocuments?"]),
        ("InterleaveDocuments", "my_package.MyDocuments", ["No module named 'my_package'"]),
        ("weight: ", "weight: x", ["'data.train.weight' takes float"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", [0, 1])
def test_mistakes_in_a_source_name_its_line(write, refused, old, new, words, source):
    first, second = SOURCES.split("      - shards: data/two")
    parts = [first, "      - shards: data/two" + second]
    parts[source] = parts[source].replace(old, new)
    lines = zip("".join(parts).splitlines(), SOURCES.splitlines(), strict=True)
    wrong = next(number for number, (now, before) in enumerate(lines, 1) if now != before)
    path = write("".join(parts), "sources.yaml")
    # Another file that is right is not to blame for it.
    message = refused("fit", "--config", write(GOOD), "--config", path, "--config", write(SOURCES, "right.yaml"))
    assert message.startswith(f"{path}:{wrong}: "), message
    assert [word for word in words if word not in message] == [], message


def test_a_misspelt_key_of_what_makes_the_model(write, refused):
    model = "model:\n  class_path: salad_lightning.training.from_checkpoint.from_checkpoint\n"
    path = write(f"{model}  init_args: {{chekpoint: nowhere.ckpt}}\n")
    message = refused("test", "--config", path)
    assert message.startswith(f"{path}:3: there is no key 'model.chekpoint'")
    assert "did you mean 'checkpoint'?" in message


def test_a_key_of_a_class_that_is_not_known_is_not_said_to_have_none():
    error = ValueError("Problem with given class_path 'my_package.Outer.Inner':\n  Option 'width' is not accepted")
    message = str(explain(error, ArgumentParser(), [Setting("width", "3", "run.yaml:1")], "fit"))
    assert message == "run.yaml:1: there is no key 'width'\n  → salad-lightning fit --help"


@pytest.mark.parametrize("command", ["fit", "select"])
@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_config(write, refused, command, text):
    path = write(text, "empty.yaml")
    assert refused(command, "--config", path).startswith(f"{path}: the configuration file is empty")


def test_a_size_that_a_part_refuses(write, refused):
    config = write(
        GOOD.replace("encoder: LogMelEncoder", "encoder: {class_path: LogMelEncoder, init_args: {num_mels: 0}}")
    )
    assert "num_mels" in refused("fit", "--config", config)


def test_torchaudio_that_cannot_be_imported(monkeypatch, write, refused):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    message = refused("fit", "--config", write(GOOD))
    assert re.search(r"torchaudio 2\.\S+ cannot be imported with torch 2\.", message)
    assert re.search(r"pip install 'torch[<>=\d.,]+' 'torchaudio[<>=\d.,]+'", message)


# What main makes of errors


def test_an_error_in_a_data_loading_process_keeps_its_message(monkeypatch, refused):
    def dispatch(arguments):
        try:
            raise UserError("not a FLAC file", where="shards/000.tar", cure="prepare it again")
        except UserError:
            # What torch's DataLoader makes of it between the two processes.
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    monkeypatch.setattr(cli, "_dispatch", dispatch)
    assert refused("fit") == "shards/000.tar: not a FLAC file\n  → prepare it again\n"


def test_other_errors(monkeypatch, refused, capsys):
    def raising(error):
        def dispatch(arguments):
            raise error

        return dispatch

    monkeypatch.setattr(cli, "_dispatch", raising(MisconfigurationException("no such accelerator")))
    assert "no such accelerator" in refused("fit")
    monkeypatch.setattr(cli, "_dispatch", raising(FileNotFoundError(2, "No such file or directory", "x.ckpt")))
    assert refused("fit").startswith("x.ckpt: No such file")
    for number in (errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG):
        monkeypatch.setattr(cli, "_dispatch", raising(OSError(number, os.strerror(number), "out/x.json")))
        assert refused("fit").startswith(f"out/x.json: {os.strerror(number)}")
    monkeypatch.setattr(cli, "_dispatch", raising(OSError(errno.ENOSPC, "No space left on device")))
    assert "No space left" in refused("fit")
    monkeypatch.setattr(cli, "_dispatch", raising(OSError(errno.EBADF, "Bad file descriptor")))
    with pytest.raises(OSError, match="Bad file"):
        main(["fit"])
    monkeypatch.setattr(cli, "_dispatch", raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        main(["fit"])
    monkeypatch.setattr(cli, "_dispatch", raising(KeyboardInterrupt()))
    assert main(["fit"]) == 130
    monkeypatch.setattr(cli, "_dispatch", raising(UserError("x")))
    capsys.readouterr()
    monkeypatch.setenv("SALAD_DEBUG", "1")
    assert main(["fit"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("SALAD_DEBUG", "0")
    assert main(["--debug", "fit"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_during_training_exits_with_130(site, tmp_path):
    site.install("wait-pack", kind="objective", name="Unused", code=WAITING)
    environment = {**os.environ, "PYTHONPATH": str(site.folder), "PYTHONUNBUFFERED": "1"}
    options = ["--model=wait_pack.WaitingModel", "--data=BoringDataModule", f"--trainer.default_root_dir={tmp_path}"]
    command = [
        sys.executable,
        "-m",
        "salad_lightning",
        "fit",
        *options,
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        # A shell's background job ignores Ctrl-C, and so would the child of tests that run in one.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "step begins" in line:
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(seen) + rest
    assert "Traceback" not in rest


WAITING = """
import time
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

class WaitingModel(BoringModel):
    def training_step(self, batch, batch_idx):
        print("step begins", flush=True)
        time.sleep(60)
"""


def test_commands_are_importable_and_follow_the_protocol():
    for name, command in cli.COMMANDS.items():
        module = __import__(command.module, fromlist=["run"])
        assert callable(module.run), name
        assert command.lightning or callable(module.add_arguments), name


def test_plugins_json_is_json(capsys):
    assert main(["plugins", "--json"]) == 0
    kinds = {row["kind"] for row in json.loads(capsys.readouterr().out)}
    assert {"encoder", "connector", "objective", "synthesizer"} <= kinds

"""Training runs through the command line: what they learn, log, keep, freeze, refuse and hand on."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import warnings

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from salad_lightning.cli import main
from salad_lightning.commands import lightning
from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.data.datamodule import SpeechDataModule
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.sources import Source
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.objectives.forward_kl import ForwardKLObjective
from salad_lightning.testing.runs import TinyRun
from salad_lightning.testing.tiny_encoders import save_tiny_hubert
from salad_lightning.training.callbacks import FinalCheckpoint
from salad_lightning.training.from_checkpoint import trained_module
from salad_lightning.training.from_settings import from_settings
from salad_lightning.training.speech_llm_module import SpeechLLMModule
from salad_lightning.training.text_lm_module import TextLMModule

pytestmark = pytest.mark.slow
EVERY_STEP = [
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=1",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks.save_last=true",
]


def weights(checkpoint):
    return checkpoint["state_dict"]


def assert_same_weights(ours, theirs, rtol=0.0, atol=0.0):
    assert sorted(ours) == sorted(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=name)


# One run of 30 steps


def test_loss_falls(trained):
    losses = trained.column("train/loss")
    assert len(losses) == 30
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    # On the same sentences each time.
    validated = trained.column("val/speech/kl")
    assert validated[-1] < 0.9 * validated[0]


def test_logged_figures(trained):
    rows = trained.metrics()
    every_step = {"train/loss", "train/nll", "train/kl", "train/padding_share", "train/tokens", "train/audio_seconds"}
    for name in every_step:
        assert len(trained.column(name)) == 30, name
    for name in ("train/tokens_per_second", "train/audio_seconds_per_second"):
        assert len(trained.column(name)) == 30, name
        assert min(trained.column(name)) >= 0, name
    assert trained.column("train/loss") == trained.column("train/kl")
    assert all(0 <= share < 0.6 for share in trained.column("train/padding_share"))
    assert [row["step"] for row in rows if "train/misalignment" in row] == [0, 5, 10, 15, 20, 25]
    forgetting = trained.column("train/forgetting")
    assert forgetting[0] == pytest.approx(0, abs=1e-6)  # the student starts as the teacher
    assert min(forgetting[1:]) > 1e-4
    for figure in ("nll", "kl", "misalignment", "forgetting"):
        assert len(trained.column(f"val/speech/{figure}")) == 3, figure
    # Tokens are counted over the run.
    tokens = trained.column("train/tokens")
    assert all(0 < after - before <= 256 for before, after in itertools.pairwise(tokens))


def test_what_the_run_cost(trained):
    cost = trained.results("fit.json")
    assert cost["steps"] == 30
    assert cost["tokens"] == trained.column("train/tokens")[-1]
    assert cost["trainable_parameters"] > 1000


def test_pre_decay_checkpoint(trained):
    kept = trained.checkpoint("pre_decay.ckpt")
    assert kept["global_step"] == 15  # half of 30, as decay_fraction says
    # 15 updates are done; the rate of the next is still whole.
    assert [group["lr"] for group in kept["optimizer_states"][0]["param_groups"]] == [
        group["initial_lr"] for group in kept["optimizer_states"][0]["param_groups"]
    ]
    names = set(weights(kept))
    assert all(name.startswith(("model.llm.", "model.connector.")) for name in names), names
    assert not [name for name in names if "teacher" in name]


def test_parameter_groups_and_their_rates(trained):
    groups = trained.checkpoint("last.ckpt")["optimizer_states"][0]["param_groups"]
    rates = {group["name"]: (group["initial_lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "connector": (3e-3, 0.1),
        "connector_no_decay": (3e-3, 0.0),
        "llm": (1e-3, 0.1),
        "llm_no_decay": (1e-3, 0.0),
    }
    assert [group["lr"] for group in groups] == [0.0] * 4  # at the end of the decay


def test_load_from_checkpoint(trained):
    path = trained.folder / "checkpoints" / "last.ckpt"
    module = SpeechLLMModule.load_from_checkpoint(path, map_location="cpu")
    saved = weights(trained.checkpoint())
    module.configure_model()
    assert {name for name in module.state_dict() if name not in saved} == {
        name for name in module.state_dict() if name.startswith("model.encoder.")
    }
    assert_same_weights({name: module.state_dict()[name] for name in saved}, saved)
    assert module.hparams["llm_lr"] == 1e-3


def test_a_module_that_was_built_of_objects(world, trained, tmp_path, capsys):
    """Its run may go on; others would have to run code to read its checkpoints. Said before training, not after."""
    settings = yaml.safe_load(world.config.read_text())["model"]["init_args"] | {"schedule": None}
    parts = {
        "encoder": LogMelEncoder(),
        "connector": lambda *, encoder_dim, llm_dim: MLPConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, stack=8),
        "objective": ForwardKLObjective(),
    }
    for name, made in (
        ("objects", SpeechLLMModule(**settings | parts)),
        ("settings", from_settings(SpeechLLMModule, **settings)),
    ):
        data = SpeechDataModule([Source(str(world.folder / "speech"), InterleaveDocuments())], rows_per_batch=2)
        trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, default_root_dir=tmp_path / name,
                          enable_progress_bar=False, callbacks=[FinalCheckpoint()])  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(made, data)
        told = [str(warning.message) for warning in caught if "was built with objects" in str(warning.message)]
        assert bool(told) == (name == "objects")
        taken = main(world.arguments("fit", "y", f"--model.init_from={tmp_path / name / 'checkpoints' / 'final.ckpt'}"))
        assert taken == (2 if told else 0)
        if told:
            assert "encoder, objective, optimizer)" in told[0]
            message = capsys.readouterr().err
            for words in ("as it holds an object of", "final.ckpt", "from_settings"):
                assert words in message


# Freezing


@pytest.mark.parametrize(
    ("pattern", "fixed", "free"),
    [
        ("llm.*", "model.llm.", "model.connector."),
        ("*layers.0.mlp*", "model.llm.hf.model.layers.0.mlp", "model.llm.hf.model.layers.1"),
    ],
)
def test_frozen_weights_stay_bit_for_bit(world, pattern, fixed, free):
    run = world.run(
        "fit", f"frozen{len(pattern)}", "--trainer.max_steps=3", f"--model.freeze=['{pattern}']", *EVERY_STEP
    )
    saved = weights(run.checkpoint())
    assert not [name for name in saved if name.startswith(fixed)]
    path = run.folder / "checkpoints" / "last.ckpt"
    module = SpeechLLMModule.load_from_checkpoint(path, map_location="cpu")
    module.configure_model()
    fresh = torch.load(run.folder / "checkpoints" / "epoch=0-step=1.ckpt", weights_only=True)["state_dict"]
    moved = [name for name in saved if name.startswith(free) and not torch.equal(saved[name], fresh[name])]
    assert moved
    untouched = SpeechLLMModule(**dict(module.hparams))
    untouched.configure_model()
    start = untouched.state_dict()
    kept = [name for name in start if name.startswith(fixed)]
    assert kept
    for name in kept:
        assert torch.equal(module.state_dict()[name], start[name]), name


@pytest.mark.parametrize(
    ("patterns", "dtype"),
    [(["llm.*"], torch.bfloat16), (["llm.hf.*"], torch.bfloat16), (["*layers.0*"], torch.float32)],
)
def test_a_frozen_llm_is_held_in_the_compute_dtype(world, patterns, dtype):
    DtypeOfLLM.seen = None
    run = world.run("fit", f"held-{len(patterns[0])}", "--trainer.max_steps=1", f"--model.freeze={patterns}",
                    "--trainer.precision=bf16-mixed", "--trainer.callbacks+=DtypeOfLLM")  # fmt: skip
    assert DtypeOfLLM.seen == dtype
    assert torch.isfinite(torch.tensor(run.column("train/loss"))).all()


class DtypeOfLLM(Callback):
    seen = None

    def on_train_start(self, trainer, pl_module):
        DtypeOfLLM.seen = pl_module.model.llm.hf.dtype


def test_going_on_with_other_weights_frozen(world, trained, capsys):
    """The optimizer's state would be of others."""
    path = trained.folder / "checkpoints" / "last.ckpt"
    assert main(world.arguments("fit", "x", "--model.freeze=['*mlp*']", f"--ckpt_path={path}")) == 2
    message = capsys.readouterr().err
    for words in (str(path), "is not trained here and was there", "model.freeze", "model.init_from"):
        assert words in message
    assert main(world.arguments("validate", "x", "--model.freeze=['*mlp*']", f"--ckpt_path={path}")) == 0


def test_a_pattern_that_matches_nothing(world, capsys):
    assert main(world.arguments("fit", "x", "--model.freeze=['llm.hf.modl.*']")) == 2
    message = capsys.readouterr().err
    assert "'llm.hf.modl.*' matches no parameter" in message
    assert "llm.hf" in message


def test_everything_frozen(world, capsys):
    assert main(world.arguments("fit", "x", "--model.freeze=['*']")) == 2
    assert "every parameter is frozen" in capsys.readouterr().err


# Stopping and going on


class KillBefore(Callback):
    """Ends its process the hard way, or the polite one."""

    def __init__(self, batch: int, signal_number: int) -> None:
        self.batch, self.signal_number = batch, signal_number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.signal_number)


TEN = [
    "--trainer.max_steps=10",
    "--trainer.accumulate_grad_batches=2",
    "--data.rows_per_batch=1",
    "--data.num_workers=1",
    "--model.llm_lr=1e-3",
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.callbacks.save_last=true",
]


def in_process_of_its_own(arguments, extra=None):
    """Exit code of a command line run by a forked process, with one more callback."""

    def work():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # coverage's own handler belongs to the parent
        if extra is not None:
            build = lightning.SaladCLI.instantiate_trainer

            def with_callback(self, **kwargs):
                trainer = build(self, **kwargs)
                trainer.callbacks.append(extra)
                return trainer

            lightning.SaladCLI.instantiate_trainer = with_callback
        os._exit(main(arguments))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(timeout=120)
    return process.exitcode


def test_a_killed_run_goes_on_as_if_nothing_had_happened(world):
    unbroken = world.run("fit", "unbroken", *TEN)
    # Step 5 is half done, step 4 is the last that was saved; the data-loading worker has read ahead.
    assert (
        in_process_of_its_own(world.arguments("fit", "broken", *TEN), KillBefore(11, signal.SIGKILL)) == -signal.SIGKILL
    )
    broken = TinyRun(world.folder / "broken")
    assert broken.checkpoint()["global_step"] == 4
    assert not list(broken.folder.rglob("*.part"))
    resumed = world.run("fit", "broken", "--ckpt_path=last", *TEN)
    ours, theirs = resumed.checkpoint(), unbroken.checkpoint()
    assert ours["global_step"] == theirs["global_step"] == 10
    assert_same_weights(weights(ours), weights(theirs), rtol=1e-6, atol=1e-7)
    losses = resumed.column("train/loss")
    assert losses[-6:] == pytest.approx(unbroken.column("train/loss")[-6:], rel=1e-6)
    assert resumed.column("train/tokens")[-1] == unbroken.column("train/tokens")[-1]


def test_sigterm_saves_the_last_step(world):
    options = [*TEN[:5], "--trainer.callbacks+=SigtermCheckpoint"]
    code = in_process_of_its_own(world.arguments("fit", "terminated", *options), KillBefore(7, signal.SIGTERM))
    assert code == 128 + signal.SIGTERM
    run = TinyRun(world.folder / "terminated")
    assert run.checkpoint()["global_step"] == 4
    resumed = world.run("fit", "terminated", "--ckpt_path=last", *TEN)
    assert [row["step"] for row in resumed.metrics() if "train/loss" in row][-6:] == [4, 5, 6, 7, 8, 9]


def test_checkpoints_by_time(world):
    overlay = world.folder / "timed.yaml"
    overlay.write_text(
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {filename: last, enable_version_counter: false,"
        " train_time_interval: '0:00:00.001'}}]}"
    )
    run = world.run("fit", "timed", "--trainer.max_steps=2", f"--config={overlay}")
    assert run.checkpoint()["global_step"] == 2


# Weights of another run


def test_init_from_takes_weights_and_nothing_else(world, trained):
    source = trained.folder / "checkpoints" / "pre_decay.ckpt"
    still = ["--model.llm_lr=0", "--model.connector_lr=0", "--trainer.max_steps=1", *EVERY_STEP]
    run = world.run("fit", "second", f"--model.init_from={source}", *still)
    checkpoint = run.checkpoint()
    assert checkpoint["global_step"] == 1
    assert {float(state["step"]) for state in checkpoint["optimizer_states"][0]["state"].values()} == {1.0}
    assert run.column("train/tokens")[0] < 300  # counted from zero
    assert_same_weights(weights(checkpoint), weights(trained.checkpoint("pre_decay.ckpt")))


@pytest.mark.parametrize("pattern", ["llm.*", "connector.*"])
def test_frozen_weights_from_another_run_are_in_the_checkpoint(world, trained, pattern):
    """They are not where the LLM and the encoder were loaded from, and that run may be gone one day."""
    source = trained.folder / "checkpoints" / "pre_decay.ckpt"
    own = world.folder / f"source-{len(pattern)}.ckpt"
    shutil.copy(source, own)
    options = [f"--model.init_from={own}", f"--model.freeze=['{pattern}']", "--trainer.max_steps=1", *EVERY_STEP]
    run = world.run("fit", f"frozen-second{len(pattern)}", *options)
    own.unlink()
    expected = weights(torch.load(source, weights_only=True))
    path = str(run.folder / "checkpoints" / "last.ckpt")
    found = {f"model.{name}": value for name, value in trained_module(path).module.model.state_dict().items()}
    kept = [name for name in expected if name.startswith(f"model.{pattern[:-1]}")]
    assert kept
    for name in kept:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("option", ["--model.init_from", "--ckpt_path"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--model.connector.stack=4", ["has another shape: model.connector."]),
        ("--model.connector=ConvConnector", ["connector"]),
    ],
)
def test_weights_of_another_model(world, trained, capsys, option, change, words):
    source = trained.folder / "checkpoints" / "last.ckpt"
    assert main(world.arguments("fit", "x", change, f"{option}={source}")) == 2
    message = capsys.readouterr().err
    assert [word for word in [*words, "use the same llm, encoder and connector"] if word not in message] == [], message


@pytest.mark.parametrize("option", ["--model.init_from", "--ckpt_path"])
def test_missing_or_broken_checkpoint(world, capsys, tmp_path, option):
    assert main(world.arguments("fit", "x", f"{option}={tmp_path / 'none.ckpt'}")) == 2
    assert re.search(r"none.ckpt: no such checkpoint\n  → ", capsys.readouterr().err)
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "other.ckpt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name in ("text", "other", "list"):
        assert main(world.arguments("fit", "x", f"{option}={tmp_path / name}.ckpt")) == 2
        assert f"{name}.ckpt: the " in capsys.readouterr().err


# Options of the model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_mix_and_switch_embeddings_are_trained(world, dtype):
    encoder = save_tiny_hubert(world.folder / "hubert", norm="layer")
    run = world.run(
        "fit",
        f"layers-{dtype}",
        "--trainer.max_steps=3",
        "--model.switch_embeddings=true",
        "--model.encoder=SelfSupervisedEncoder",
        f"--model.encoder.path={encoder}",
        f"--model.encoder.dtype={dtype}",
        *EVERY_STEP,
    )
    first, last = weights(run.checkpoint("epoch=0-step=1.ckpt")), weights(run.checkpoint())
    for name in ("model.layer_mix", "model.switch"):
        assert not torch.equal(first[name], last[name]), name
    assert first["model.layer_mix"].any()  # it starts at 0
    assert not [name for name in last if name.startswith("model.encoder.")]


# Text only


def test_text_model_trains_and_is_exported(world):
    text = world.config.read_text()
    _, _, rest = text.partition("\ndata:")
    alone = world.folder / "text.yaml"
    alone.write_text(
        "seed_everything: 0\nmodel:\n  class_path: TextLMModule\n  init_args:\n"
        f"    llm: {world.folder / 'llm'}\n    objective: NLLObjective\n    context: 128\n    lr: 0.003\n"
        f"    from_scratch: true\n    export_to: {world.folder / 'exported'}\n"
        "    schedule: {warmup_steps: 2, decay_fraction: 0.5}\ndata:" + rest
    )
    root = f"--trainer.default_root_dir={world.folder / 'text-run'}"
    options = ["--trainer.max_steps=30", "--trainer.val_check_interval=15", *EVERY_STEP[:2], EVERY_STEP[3]]
    assert main(["fit", "--config", str(alone), root, *options]) == 0
    run = TinyRun(world.folder / "text-run")
    losses = run.column("train/loss")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert len(run.column("val/nll")) == 2
    module = TextLMModule.load_from_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    module.configure_model()
    saved = weights(run.checkpoint())
    exported = AutoModelForCausalLM.from_pretrained(world.folder / "exported")
    tokenizer = AutoTokenizer.from_pretrained(world.folder / "exported")
    for name, value in exported.state_dict().items():
        assert torch.equal(value, saved[f"model.hf.{name}"]), name
    ids = torch.tensor([tokenizer("the quick brown fox")["input_ids"]])
    module.model.hf.load_state_dict({name.removeprefix("model.hf."): value for name, value in saved.items()})
    torch.testing.assert_close(exported(ids).logits, module.model.hf.eval()(ids).logits)
    # An exported model is an LLM like any other.
    assert (
        main(world.arguments("fit", "from-export", "--trainer.max_steps=1", f"--model.llm={world.folder / 'exported'}"))
        == 0
    )


def test_text_model_refuses_to_be_spread(world, tmp_path, capsys):
    """Every process would train a model of its own."""
    content = {
        "model": {
            "class_path": "TextLMModule",
            "init_args": {"llm": f"{world.folder}/llm", "objective": "NLLObjective"},
        },
        "trainer": {"strategy": {"class_path": "salad_lightning.model.parallel.FullyShardedStrategy"}},
    }
    overlay = tmp_path / "text.yaml"
    overlay.write_text(yaml.safe_dump(content))
    settings = yaml.safe_load(world.config.read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "model"}))
    run = [f"--config={tmp_path}/run.yaml", f"--config={overlay}", f"--trainer.default_root_dir={tmp_path}/out"]
    assert main(["fit", *run]) == 2
    message = capsys.readouterr().err
    assert "TextLMModule does not spread its weights" in message
    assert "trainer.strategy" in message


def test_text_model_refuses_a_teacher(world, capsys):
    options = ["--model=TextLMModule", f"--model.llm={world.folder / 'llm'}", "--model.objective=ForwardKLObjective"]
    assert main(["fit", *options, "--trainer.accelerator=cpu"]) == 2
    assert "NLLObjective" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_checkpoint_that_is_not_there_is_not_replaced_by_untrained_weights(world, capsys, name):
    assert main(world.arguments("test", "never-trained", f"--ckpt_path={name}")) == 2
    assert f"there is no `{name}` checkpoint to test" in capsys.readouterr().err
    assert not (world.folder / "never-trained" / "test.json").exists()


LIARS = """
import torch
from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.interfaces import ConnectorOutput


class Longer(MLPConnector):
    def forward(self, frames_NTD, lengths_N, *, num_words_N=None):
        output = super().forward(frames_NTD, lengths_N)
        return output._replace(embeddings=output.embeddings.repeat(1, 2, 1), lengths=output.lengths * 2)


class Short(MLPConnector):
    def forward(self, frames_NTD, lengths_N, *, num_words_N=None):
        output = super().forward(frames_NTD, lengths_N)
        return output._replace(embeddings=output.embeddings[:, :1], lengths=output.lengths + 1)


class Wider(MLPConnector):
    def forward(self, frames_NTD, lengths_N, *, num_words_N=None):
        output = super().forward(frames_NTD, lengths_N)
        return output._replace(embeddings=output.embeddings.repeat(1, 1, 2))


class Bare(MLPConnector):
    def forward(self, frames_NTD, lengths_N, *, num_words_N=None):
        return super().forward(frames_NTD, lengths_N).embeddings
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Longer", "where output_lengths says"),
        ("Short", "positions and gives 1"),
        ("Wider", "its embeddings are"),
        ("Bare", "gives Tensor"),
    ],
)
def test_a_connector_that_does_other_than_it_says(world, capsys, monkeypatch, name, words):
    """More positions than it announced would overwrite the text before them, without a word."""
    (world.folder / "liars.py").write_text(LIARS)
    monkeypatch.syspath_prepend(str(world.folder))
    assert main(world.arguments("fit", "liar", f"--model.connector=liars.{name}")) == 2
    message = capsys.readouterr().err
    assert name in message
    assert words in message
    assert "Traceback" not in message

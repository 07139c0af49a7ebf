"""One step on the same documents is the same step, however they are spread over micro-batches and processes."""

from __future__ import annotations

import functools
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.packing import collate
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.model.adapters import LoRA
from salad_lightning.model.parallel import FullyShardedStrategy
from salad_lightning.objectives.mixture import MixtureObjective
from salad_lightning.testing.ranks import finish_ranks, start_ranks
from salad_lightning.testing.runs import TinyRun, TinyWorld
from salad_lightning.testing.tiny import save_tiny_llm
from salad_lightning.training.connector_warmup_module import ConnectorWarmupModule
from salad_lightning.training.optimizer import default_optimizer
from salad_lightning.training.schedule import WarmupStableDecay
from salad_lightning.training.speech_llm_module import SpeechLLMModule

pytestmark = pytest.mark.slow
STEPS = 3
FIGURES = ("loss", "nll", "kl", "own", "ctc")


class Recorder(torch.optim.SGD):
    """Keeps the gradients that each step uses: scaled and clipped."""

    def __init__(self, groups):
        super().__init__(groups, lr=0.05)
        self.seen = []

    def step(self, closure=None):
        loss = closure()
        self.seen.append(
            [p.grad.detach().clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        )
        super().step()
        return loss


class LosingConnector(MLPConnector):
    """With a loss of its own, one a span."""

    def forward(self, frames_NTD, lengths_N, *, num_words_N=None):
        output = super().forward(frames_NTD, lengths_N, num_words_N=num_words_N)
        return output._replace(losses={"own": 0.01 * output.embeddings[:, 0].square().sum()})


class Seeded(SpeechLLMModule):
    """Adapters begin alike; Lightning seeds anew where there are several processes."""

    def configure_model(self):
        seed_everything(0, verbose=False)
        super().configure_model()


def build(world, connector=MLPConnector, module_class=SpeechLLMModule, llm="llm", optimizer=Recorder, **options):
    seed_everything(0, verbose=False)
    return module_class(
        llm=str(world.folder / llm),
        encoder=LogMelEncoder(),
        connector=lambda *, encoder_dim, llm_dim: connector(encoder_dim=encoder_dim, llm_dim=llm_dim, stack=8),
        objective=MixtureObjective(alpha=0.5),  # plain KL is 0 on text as long as the LLM is the teacher's equal
        context=128,
        connector_lr=0.05,
        llm_lr=0.05,
        optimizer=optimizer,
        schedule=WarmupStableDecay(warmup_steps=0, decay_fraction=0.0),
        **options,
    )


@pytest.fixture(scope="module")
def rows(world):
    """Rows by the step, four each, of very different numbers of predicted tokens; the last two are text alone."""
    spec = build(world).sequence_spec()
    documents = {}
    for source, builder in (
        ("speech", InterleaveDocuments(text_words=(1, 2), speech_words=(4, 6))),
        ("text", InterleaveDocuments()),
    ):
        samples = [raw for path in sorted(world.folder.glob(f"{source}/*.tar")) for raw in read_shard(str(path))]
        utterances = [decode(raw, source=source, sample_rate_hz=16_000) for raw in samples]
        documents[source] = [document for u in utterances for document in builder.build(u, spec)]
    speech = sorted((d for d in documents["speech"] if d.spans), key=lambda d: int(d.predicted.sum()))
    text = sorted((d for d in documents["text"] if d.num_positions > 60), key=lambda d: -int(d.predicted.sum()))
    made = [[[speech[4 * s]], speech[4 * s + 1 : 4 * s + 3], [text[2 * s]], [text[2 * s + 1]]] for s in range(STEPS)]
    counts = [[sum(int(d.predicted.sum()) for d in row) for row in step] for step in made]
    assert all(max(count) > 5 * min(count) for count in counts), counts
    return made


class Batches:
    """``rows_per_batch`` rows at a time; of several processes, each takes its own share of every step's rows."""

    def __init__(self, rows, rows_per_batch):
        self.rows, self.rows_per_batch = rows, rows_per_batch

    def __iter__(self):
        rank, world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for step in self.rows:
            share = len(step) // world_size
            mine = step[rank * share : (rank + 1) * share]
            for at in range(0, len(mine), self.rows_per_batch):
                yield collate(
                    mine[at : at + self.rows_per_batch], context=128, rows_per_batch=self.rows_per_batch, trim=True
                )


def train(world, rows, name, *, rows_per_batch=4, steps=STEPS, module=None, **options):
    """Gradients by the step, and what was logged."""
    module = module or build(world)
    folder = world.folder / name
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=CSVLogger(folder, name="logs"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"devices": 1, **options},
    )
    trainer.fit(module, Batches(rows, rows_per_batch))
    run = TinyRun(folder)
    logged = {name for row in run.metrics() for name in row}
    names = [name for name in FIGURES if f"train/{name}" in logged]
    return getattr(trainer.optimizers[0], "seen", []), {name: run.column(f"train/{name}") for name in names}


@pytest.fixture(scope="module")
def reference(world, rows):
    return train(world, rows, "whole")


def norm(gradients):
    return float(torch.stack([gradient.double().norm() for gradient in gradients]).norm())


def assert_same_gradients(ours, theirs, rel=1e-5):
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        difference = [a - b for a, b in zip(mine, other, strict=True)]
        assert norm(difference) <= rel * norm(other)


def test_the_gradient_is_that_of_the_mean_over_tokens(world, rows, reference):
    module = build(world)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    total, count = 0.0, 0
    for row in rows[0]:
        batch = collate([row], context=128, rows_per_batch=1)
        output = module.model(batch, module.objective, module.teach(batch))
        total, count = total + output.sum, count + len(batch.labels_M)
    (total / count).backward()
    groups = [group["params"] for group in module.configure_optimizers()["optimizer"].param_groups]
    expected = [parameter.grad for group in groups for parameter in group if parameter.grad is not None]
    assert_same_gradients(reference[0][:1], [expected])
    assert reference[1]["loss"][0] == pytest.approx(float(total / count), rel=1e-5)


@pytest.mark.parametrize(("rows_per_batch", "accumulate"), [(1, 4), (2, 2)])
def test_accumulation_changes_nothing(world, rows, reference, rows_per_batch, accumulate):
    gradients, logged = train(
        world, rows, f"acc{accumulate}", rows_per_batch=rows_per_batch, accumulate_grad_batches=accumulate
    )
    assert_same_gradients(gradients[:1], reference[0][:1])
    assert_same_gradients(gradients, reference[0], rel=1e-4)  # rounding grows over the steps
    for name, values in logged.items():
        assert values == pytest.approx(reference[1][name], rel=1e-5), name


def test_clipping_sees_the_mean(world, rows, reference):
    """A limit above the mean's norm but far below the sum's clips nothing; one below it clips to that norm."""
    norms = [norm(step) for step in reference[0]]
    loose, _ = train(
        world, rows, "loose", rows_per_batch=1, accumulate_grad_batches=4, gradient_clip_val=2 * max(norms)
    )
    assert_same_gradients(loose, reference[0], rel=1e-4)
    limit = 0.5 * min(norms)
    tight, _ = train(world, rows, "tight", rows_per_batch=1, accumulate_grad_batches=4, gradient_clip_val=limit)
    assert [norm(step) for step in tight] == pytest.approx([limit] * STEPS, rel=1e-4)


# Two processes

CLIPPED = {"rows_per_batch": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}


def of_kind(world, kind):
    """The module of a run, and how it is trained."""
    lora = LoRA(rank=4)
    modules = {
        "losing": {"connector": LosingConnector},
        "lora": {"lora": lora, "module_class": Seeded},
        "qlora": {"lora": lora, "module_class": Seeded, "quantize": "nf4", "llm": "wide"},
        "warmup": {"module_class": ConnectorWarmupModule, "switch_embeddings": True},
    }
    return build(world, **modules.get(kind, {})), CLIPPED if kind == "clipped" else {"rows_per_batch": 2}


def main_of_rank(folder, strategy, kind):
    """What ``python test_normalisation.py FOLDER STRATEGY KIND`` does: as one rank; rank 0 keeps gradients."""
    torch.set_num_threads(1)
    with open(f"{folder}/rows.pickle", "rb") as file:
        rows = pickle.load(file)
    world = TinyWorld(Path(folder))
    module, options = of_kind(world, kind)
    spread = "ddp" if strategy == "ddp" else FullyShardedStrategy()
    gradients, _ = train(world, rows, f"{strategy}-{kind}", module=module, devices=2, strategy=spread, **options)
    full = [[g.full_tensor() if hasattr(g, "full_tensor") else g for g in step] for step in gradients]
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(full, f"{folder}/{strategy}-{kind}.pt")


def train_on_two(world, rows, strategy, kind):
    """Gradients by the step, and the run; rank 1 has text alone and ten times the tokens of rank 0."""
    (world.folder / "rows.pickle").write_bytes(pickle.dumps(rows))
    finish_ranks(world.folder, start_ranks(world.folder, 2, __file__, str(world.folder), strategy, kind))
    return torch.load(world.folder / f"{strategy}-{kind}.pt"), TinyRun(world.folder / f"{strategy}-{kind}")


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_take_the_same_steps_as_one(world, rows, reference, strategy):
    gradients, run = train_on_two(world, rows, strategy, "plain")
    for figure in ("loss", "nll", "kl"):
        assert run.column(f"train/{figure}") == pytest.approx(reference[1][figure], rel=1e-5), figure
    assert_same_gradients(gradients, reference[0], rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [("ddp", "losing"), ("sharded", "losing"), ("ddp", "lora"), ("ddp", "qlora"), ("ddp", "warmup")],
)
def test_so_do_those_of_other_kinds(world, rows, strategy, kind):
    """A connector with a loss of its own is run and logged on rank 1 too, though that hears nothing."""
    if "lora" in kind:
        pytest.importorskip("peft")
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
        save_tiny_llm(world.folder / "wide", width=128)  # 4-bit weights come in blocks
    module, _ = of_kind(world, kind)
    gradients, logged = train(world, rows, f"{strategy}-{kind}-alone", module=module)
    together, run = train_on_two(world, rows, strategy, kind)
    own = {"losing": "own", "warmup": "ctc"}.get(kind, "kl")
    assert max(logged[own]) > 0, "CTC has a step in which no span is long enough"
    assert kind == "warmup" or min(logged[own]) > 0
    for figure, values in logged.items():
        assert run.column(f"train/{figure}") == pytest.approx(values, rel=1e-5), figure
    assert_same_gradients(together, gradients, rel=1e-4)


def test_warm_up_loads_a_teacher_only_when_it_is_asked(world, rows):
    module, _ = of_kind(world, "warmup")
    train(world, rows, "warm", module=module, steps=1)
    assert module._teacher is None
    assert torch.isfinite(module.teach(collate([rows[0][0]], context=128, rows_per_batch=1)).hidden).all()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fused_steps_are_clipped_like_others(world, rows, precision, algorithm):
    """As by default on a GPU; a negative limit is none, as with Lightning."""
    losses = {}
    for fused, limit in ((False, 0.01), (True, 0.01), (True, -1.0), (True, None)):
        module = build(world, optimizer=functools.partial(default_optimizer, fused=fused))
        _, logged = train(
            world, rows, f"{precision}-{algorithm}-{fused}-{limit}", module=module, precision=precision,
            gradient_clip_val=limit, gradient_clip_algorithm=algorithm,
        )  # fmt: skip
        losses[fused, limit] = logged["loss"]
    assert losses[True, 0.01] == pytest.approx(losses[False, 0.01], rel=1e-5 if precision == "32-true" else 1e-2)
    assert losses[True, -1.0] == losses[True, None]


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_clipping_and_a_last_step_of_fewer_rows(world, rows, strategy):
    """Micro-batches of one row, two to a step, and one to the last; the norm that is clipped is that of all ranks."""
    fewer = [*rows[:-1], [rows[-1][0], rows[-1][2]]]
    limit = CLIPPED["gradient_clip_val"]
    gradients, logged = train(world, fewer, f"{strategy}-clipped-alone", gradient_clip_val=limit)
    assert [norm(step) for step in gradients] == pytest.approx([limit] * STEPS, rel=1e-4), "the limit must be felt"
    together, run = train_on_two(world, fewer, strategy, "clipped")
    assert run.column("train/loss") == pytest.approx(logged["loss"], rel=1e-5)
    assert_same_gradients(together, gradients, rel=1e-4)


def test_a_fully_sharded_run_validates_stops_and_goes_on(world):
    """Through the command line, with frozen weights, the gap measured, and clipping."""
    overlay = world.folder / "sharded.yaml"
    overlay.write_text("trainer: {strategy: {class_path: salad_lightning.model.parallel.FullyShardedStrategy}}")
    options = [
        f"--config={overlay}",
        "--trainer.devices=2",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=2",
        "--model.gap_every_n_steps=2",
        "--model.freeze=['llm.hf.model.layers.0.*']",
        "--data.rows_per_batch=1",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=2",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.save_last=true",
    ]
    command_line = ("-m", "salad_lightning")
    finish_ranks(
        world.folder, start_ranks(world.folder, 2, *command_line, *world.arguments("fit", "whole-run", *options))
    )
    run = TinyRun(world.folder / "whole-run")
    assert len(run.column("train/loss")) == 4
    assert len(run.column("val/speech/misalignment")) == 2
    assert len(run.column("train/forgetting")) == 2
    assert (run.folder / "checkpoints" / "last.ckpt").is_dir()
    halfway = run.folder / "checkpoints" / "epoch=0-step=2.ckpt"
    going_on = world.arguments("fit", "going-on", *options)
    finish_ranks(world.folder, start_ranks(world.folder, 2, *command_line, *going_on, f"--ckpt_path={halfway}"))
    resumed = TinyRun(world.folder / "going-on")
    assert resumed.column("train/loss") == pytest.approx(run.column("train/loss")[2:], rel=1e-5)


if __name__ == "__main__":
    main_of_rank(*sys.argv[1:])

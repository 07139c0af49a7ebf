"""The same 20 steps on one process, on two under FSDP2 and DDP, and going on with another number of processes."""

from __future__ import annotations

import functools
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger

from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.packing import collate
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.model.checkpoint_folder import stored_shapes
from salad_lightning.model.llm import load_language_model
from salad_lightning.model.parallel import FullyShardedStrategy
from salad_lightning.objectives.mixture import MixtureObjective
from salad_lightning.testing.ranks import finish_ranks, start_ranks
from salad_lightning.testing.runs import TinyRun, TinyWorld
from salad_lightning.training.callbacks import GlobalBatch
from salad_lightning.training.checkpoints import load_checkpoint
from salad_lightning.training.optimizer import default_optimizer
from salad_lightning.training.schedule import WarmupStableDecay
from salad_lightning.training.speech_llm_module import SpeechLLMModule

pytestmark = pytest.mark.slow
STEPS, HALF, ROWS = 20, 10, 4
FUSED = ("bf16", "ddp", "sharded")  # runs that step as a GPU does by default


def build(world, **options):
    seed_everything(0, verbose=False)
    return SpeechLLMModule(
        llm=str(world.folder / "llm"),
        encoder=LogMelEncoder(),
        connector=lambda *, encoder_dim, llm_dim: MLPConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, stack=8),
        objective=MixtureObjective(alpha=0.5),
        context=128,
        connector_lr=1e-3,
        llm_lr=1e-3,
        schedule=WarmupStableDecay(warmup_steps=0, decay_fraction=0.0),
        freeze=["llm.hf.model.layers.0.*"],
        **options,
    )


@pytest.fixture(scope="module")
def rows(world):
    """Four rows a step, half of them text alone."""
    spec = build(world).sequence_spec()
    builder = InterleaveDocuments(text_words=(1, 2), speech_words=(4, 6))
    documents = {}
    for source in ("speech", "text"):
        samples = [raw for path in sorted(world.folder.glob(f"{source}/*.tar")) for raw in read_shard(str(path))]
        utterances = [decode(raw, source=source, sample_rate_hz=16_000) for raw in samples]
        documents[source] = [document for u in utterances for document in builder.build(u, spec)]
    speech, text = documents["speech"], documents["text"]
    made = [
        [[speech[(2 * s) % 40]], [text[(2 * s) % 40]], [speech[(2 * s + 1) % 40]], [text[(2 * s + 1) % 40]]]
        for s in range(STEPS)
    ]
    (world.folder / "steps.pickle").write_bytes(pickle.dumps(made))
    return made


class Rows(LightningDataModule):
    """One row a micro-batch; every process has its share of each step's rows, and goes on where ``trained`` ends."""

    rows_per_batch = 1

    def __init__(self, steps):
        super().__init__()
        self.steps, self.trained = steps, 0

    def train_dataloader(self):
        return self

    def state_dict(self):
        return {"trained": self.trainer.global_step}

    def load_state_dict(self, state_dict):
        self.trained = state_dict["trained"]

    def __iter__(self):
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        share = ROWS // world_size
        for step in self.steps[self.trained :]:
            for row in step[rank * share : (rank + 1) * share]:
                yield collate([row], context=128, rows_per_batch=1, trim=True)


class Halfway(Callback):
    def on_train_start(self, trainer, pl_module):
        name = Path(trainer.default_root_dir).name
        if name in ("sharded", "bf16"):
            check_shards(pl_module, torch.bfloat16 if name == "bf16" else torch.float32)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        fused = Path(trainer.default_root_dir).name in FUSED  # whatever wrote the state that it goes on from
        assert {bool(group["fused"]) for group in optimizer.param_groups} == {fused}
        assert {p.grad.dtype for p in pl_module.parameters() if p.grad is not None} == {torch.float32}

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == HALF and not (Path(trainer.default_root_dir) / "half.ckpt").exists():
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")


def train(world, steps, name, *, ckpt_path=None, callbacks=(), model=None, **options):
    folder = world.folder / name
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        logger=CSVLogger(folder, name="logs"),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[GlobalBatch(rows=ROWS), *callbacks],
        **{"devices": 1, **options},
    )
    module = build(world, **(model or {}))
    trainer.fit(module, datamodule=Rows(steps), ckpt_path=ckpt_path)
    return module


def losses(world, name):
    return TinyRun(world.folder / name).column("train/loss")


@pytest.fixture(scope="module")
def reference(world, rows):
    train(world, rows, "one")
    values = losses(world, "one")
    assert len(values) == STEPS
    assert max(values) > 1.05 * min(values)
    return values


def test_accumulation_changes_nothing(world, rows, reference):
    """Four rows in one micro-batch against one at a time."""

    class Whole(Rows):
        rows_per_batch = ROWS

        def __iter__(self):
            for step in self.steps:
                yield collate(step, context=128, rows_per_batch=ROWS, trim=True)

    folder = world.folder / "whole-step"
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, logger=CSVLogger(folder, name="logs"), log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        default_root_dir=folder, devices=1,
    )  # fmt: skip
    trainer.fit(build(world), datamodule=Whole(rows))
    assert losses(world, "whole-step") == pytest.approx(reference, rel=1e-5)


# Several processes


def main_of_rank(folder, name, count, ckpt_path=""):
    """What ``python test_scale.py FOLDER NAME COUNT [CHECKPOINT]`` does, as one of the ranks."""
    torch.set_num_threads(1)
    world = TinyWorld(Path(folder))
    steps = pickle.loads((world.folder / "steps.pickle").read_bytes())
    strategy = "ddp" if name == "ddp" else FullyShardedStrategy(shard_encoder=name == "four")
    precision = "bf16-mixed" if name == "bf16" else "32-true"
    options = {"devices": int(count), "strategy": strategy, "precision": precision, "callbacks": [Halfway()]}
    model = {"optimizer": functools.partial(default_optimizer, fused=name in FUSED)}
    train(world, steps, name, ckpt_path=ckpt_path or None, model=model, **options)


def check_shards(module, computed):
    """No process holds more than its share of the LLM, nor of its teacher; a tied head is tied."""
    from torch.distributed.tensor import DTensor

    for llm in (module.model.llm, module._teacher[0]):
        parameters = list(llm.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        local = sum(parameter.to_local().numel() for parameter in parameters)
        assert local < 0.6 * sum(parameter.numel() for parameter in parameters)
        assert llm.hf.lm_head.weight is llm.hf.model.embed_tokens.weight
    assert {parameter.dtype for parameter in module.model.llm.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in module._teacher[0].parameters()} == {computed}

    def check(block, inputs, output):
        assert (output[0] if isinstance(output, tuple) else output).dtype == computed

    module.model.llm.blocks[0].register_forward_hook(check)


@pytest.fixture(scope="module")
def sharded(world, rows):
    folder = world.folder
    finish_ranks(folder, start_ranks(folder, 2, __file__, str(folder), "sharded", "2"))
    return folder / "sharded" / "half.ckpt"


def test_two_sharded_processes_take_the_same_steps(world, sharded, reference):
    assert losses(world, "sharded") == pytest.approx(reference, rel=1e-5)


def test_two_replicas_take_the_same_steps(world, rows, reference):
    finish_ranks(world.folder, start_ranks(world.folder, 2, __file__, str(world.folder), "ddp", "2"))
    assert losses(world, "ddp") == pytest.approx(reference, rel=1e-5)


def test_sharded_in_bf16(world, rows, reference):
    """Products, frozen weights and activations in bf16; trained weights, gradients and their sums in fp32."""
    finish_ranks(world.folder, start_ranks(world.folder, 2, __file__, str(world.folder), "bf16", "2"))
    values = losses(world, "bf16")
    assert values == pytest.approx(reference, rel=0.02)
    assert values != pytest.approx(reference, rel=1e-5)


def test_frozen_weights_are_not_in_the_folder(world, sharded):
    names = set(stored_shapes(sharded))
    assert any(name.startswith("model.llm.hf.model.layers.1.") for name in names)
    assert not any(name.startswith("model.llm.hf.model.layers.0.") for name in names)


def test_the_folder_as_one_dictionary(world, sharded):
    """Weights of the folder are those that one process had at the same step."""
    whole = load_checkpoint(sharded, weights_only=False)
    assert whole["global_step"] == HALF
    shapes = {name: value.shape for name, value in whole["state_dict"].items()}
    assert shapes == stored_shapes(sharded)
    moved = load_language_model(str(world.folder / "llm"), 300).hf.state_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(whole["state_dict"][f"model.llm.hf.{name}"], moved[name])
    assert next(group["lr"] for group in whole["optimizer_states"][0]["param_groups"]) == pytest.approx(1e-3)
    outline = load_checkpoint(sharded, weights_only=False, outline=True)
    assert {name: value.shape for name, value in outline["state_dict"].items()} == shapes
    assert all(value.is_meta for value in outline["state_dict"].values())


def test_one_process_goes_on_from_two(world, rows, sharded, reference):
    train(world, rows, "on-one", ckpt_path=str(sharded), strategy=FullyShardedStrategy())
    assert losses(world, "on-one") == pytest.approx(reference[HALF:], rel=1e-5)


def test_four_processes_go_on_from_two(world, rows, sharded, reference):
    finish_ranks(world.folder, start_ranks(world.folder, 4, __file__, str(world.folder), "four", "4", str(sharded)))
    assert losses(world, "four") == pytest.approx(reference[HALF:], rel=1e-5)


# Through the recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(world, out):
    """The paper's Stage I on a tiny model: a third `--config` after the recipe's two."""
    small = world.folder / f"{out}.yaml"
    interleave = "{class_path: InterleaveDocuments, init_args: {text_words: [1, 4], speech_words: [2, 5]}}"
    small.write_text(f"""
model:
  init_args:
    llm: {world.folder}/llm
    encoder: {{class_path: LogMelEncoder}}
    connector:
      class_path: CausalTransformerConnector
      init_args: {{num_layers: 1, dim: 32, mlp_dim: 32, num_heads: 4, num_kv_heads: 2, stack: 8}}
    schedule: {{warmup_steps: 2, decay_fraction: 0.2}}
data:
  init_args:
    train:
      - {{name: speech, shards: {world.folder}/speech, weight: 0.6667, documents: {interleave}}}
      - {{name: text, shards: {world.folder}/text, weight: 0.3333, documents: {{class_path: InterleaveDocuments}}}}
    val: [{{name: heldout, shards: {world.folder}/speech, documents: {interleave}}}]
    rows_per_batch: 1
trainer:
  devices: 2
  strategy: {{class_path: salad_lightning.model.parallel.FullyShardedStrategy}}
  max_steps: 30
  val_check_interval: 1000
  log_every_n_steps: 1
  default_root_dir: {world.folder}/{out}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{filename: last, every_n_train_steps: 6, save_top_k: 1, enable_version_counter: false}}
""")
    files = [RECIPES / "stage1.yaml", RECIPES / "scale" / "mini.yaml", small]
    return ["-m", "salad_lightning", "fit", *(part for file in files for part in ("--config", str(file)))]


def test_a_sharded_run_that_is_killed_ends_where_the_unbroken_one_ends(world):
    folder = world.folder
    finish_ranks(folder, start_ranks(folder, 2, *recipe(world, "unbroken"), name="unbroken"), name="unbroken")
    unbroken = losses(world, "unbroken")
    assert len(unbroken) == 30
    processes = start_ranks(folder, 2, *recipe(world, "killed"), name="killed")
    last = folder / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes:  # all at once: one whose peer is gone ends by itself
        process.send_signal(signal.SIGKILL)
    codes = [process.wait() for process in processes]
    assert codes == [-signal.SIGKILL] * 2, (folder / "killed-0.log").read_text()[-3000:]
    finish_ranks(
        folder, start_ranks(folder, 2, *recipe(world, "killed"), f"--ckpt_path={last}", name="resumed"), name="resumed"
    )
    rows = [row for row in TinyRun(folder / "killed").metrics() if "train/loss" in row]
    assert [row["step"] for row in rows][-6:] == list(range(24, 30))
    assert [row["train/loss"] for row in rows] == pytest.approx([unbroken[int(row["step"])] for row in rows], rel=1e-5)
    shutil.rmtree(folder / "killed")


if __name__ == "__main__":
    main_of_rank(*sys.argv[1:])

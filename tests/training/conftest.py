"""A folder with model and shards for each file of tests, and one run of 30 steps."""

from __future__ import annotations

import pytest

from salad_lightning.testing.runs import save_tiny_world

TRAINED = [
    "--trainer.max_steps=30",
    "--trainer.val_check_interval=10",
    "--trainer.limit_val_batches=2",
    "--model.gap_every_n_steps=5",
    "--model.llm_lr=1e-3",
    "--model.connector_lr=3e-3",
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.every_n_train_steps=10",
    "--trainer.callbacks.save_last=true",
    "--trainer.callbacks.save_top_k=-1",
    "--trainer.callbacks+=PreDecayCheckpoint",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world):
    return world.run("fit", "trained", *TRAINED)

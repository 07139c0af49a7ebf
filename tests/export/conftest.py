"""One short run with an encoder in a local folder, and its export."""

from __future__ import annotations

import pytest

from salad_lightning.cli import main
from salad_lightning.export import load_pretrained
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.tiny_encoders import save_tiny_causal_conv


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def checkpoint(world):
    encoder = save_tiny_causal_conv(world.folder / "encoder")
    options = ("encoder=CausalConvEncoder", f"encoder.path={encoder}", "switch_embeddings=true", "llm_lr=1e-2")
    rest = ("--trainer.max_steps=3", "--trainer.callbacks+=FinalCheckpoint", "--model.connector.stack=2")
    run = world.run("fit", "run", *(f"--model.{option}" for option in options), *rest)
    return run.folder / "checkpoints" / "final.ckpt"


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "speech-llm"
    assert main(["export", str(checkpoint), str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def model(exported):
    return load_pretrained(exported)

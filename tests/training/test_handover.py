"""Stage II takes the weights of a Stage I of the same parts, from before its learning rate fell."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from salad_lightning.cli import main
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.tiny import save_tiny_llm
from salad_lightning.training.from_checkpoint import trained_module


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = save_tiny_world(tmp_path_factory.mktemp("world"))
    callbacks = [{"class_path": name} for name in ("PreDecayCheckpoint", "FinalCheckpoint")]
    overlay = world.folder / "callbacks.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"max_steps": 6, "callbacks": callbacks}}))
    world.run("fit", "stage1", "--config", str(overlay))
    return world


def _stage2(world, name, *options, checkpoint="pre_decay.ckpt", model=None, trainer=None):
    path = world.folder / "stage1" / "checkpoints" / checkpoint
    settings = {"init_from": str(path), "require_pre_decay": True, "schedule": {"warmup_steps": 0, "decay_fraction": 1}}
    overlay = world.folder / f"{name}.yaml"
    content = {"model": {"init_args": {**settings, **(model or {})}}, "trainer": {"max_steps": 2, **(trainer or {})}}
    overlay.write_text(yaml.safe_dump(content))
    return main(world.arguments("fit", name, "--config", str(overlay), *options))


def test_weights_are_taken_and_nothing_else(world, caplog):
    trainer = {"callbacks": [{"class_path": "FinalCheckpoint"}], "max_steps": 1}
    still = {"connector_lr": 0.0, "llm_lr": 0.0}  # a step that changes nothing shows what was taken
    assert _stage2(world, "taken", model=still, trainer=trainer) == 0
    assert re.search(r"weights taken from \S+pre_decay.ckpt \(step \d+\): \d+ of connector, \d+ of llm;", caplog.text)
    folder = world.folder / "stage1" / "checkpoints"
    before = torch.load(folder / "pre_decay.ckpt", weights_only=True)
    after = torch.load(world.folder / "taken" / "checkpoints" / "final.ckpt", weights_only=True)
    assert set(after["state_dict"]) == set(before["state_dict"])
    for name, weight in before["state_dict"].items():
        torch.testing.assert_close(after["state_dict"][name], weight, rtol=0, atol=0)
    assert after["global_step"] == 1
    assert before["global_step"] > 1
    steps = {int(state["step"]) for state in after["optimizer_states"][0]["state"].values()}
    assert steps == {1}  # a fresh optimizer
    assert after["salad_lightning"]["parts"] == before["salad_lightning"]["parts"]


def test_a_decayed_checkpoint_is_refused(world, capfd):
    assert _stage2(world, "decayed", checkpoint="final.ckpt") == 2
    message = capfd.readouterr().err
    assert "has decayed" in message
    assert "pre_decay.ckpt" in message
    assert _stage2(world, "allowed", checkpoint="final.ckpt", model={"require_pre_decay": False}) == 0


@pytest.mark.parametrize("part", ["encoder", "connector", "llm", "tokenizer"])
def test_other_parts_are_refused_with_the_difference(world, tmp_path, capfd, part):
    model = {
        # Same widths everywhere: only what the parts are tells them apart.
        "encoder": {"encoder": {"class_path": "LogMelEncoder", "init_args": {"frame_rate_hz": 50.0}}},
        "connector": {"connector": {"class_path": "ConvConnector", "init_args": {"strides": [2]}}},
        "llm": {"llm": str(save_tiny_llm(tmp_path / "llm"))},
        "tokenizer": {"llm": str(_with_another_word(save_tiny_llm(tmp_path / "same"), world))},
    }[part]
    assert _stage2(world, f"other-{part}", model=model) == 2
    message = capfd.readouterr().err
    assert "trained with other parts" in message
    assert f"{part}: " in message
    assert "here" in message


def _with_another_word(folder, world):
    """The world's LLM with two tokens that have changed places."""
    for path in (world.folder / "llm").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = folder / "tokenizer.json"
    text = tokenizer.read_text()
    swapped = text.replace('"a": ', '"\0": ').replace('"b": ', '"a": ').replace('"\0": ', '"b": ')
    assert swapped != text
    tokenizer.write_text(swapped)
    return folder


def test_a_checkpoint_that_names_the_optimizer_where_it_used_to_be(world, tmp_path):
    checkpoint = torch.load(world.folder / "stage1" / "checkpoints" / "final.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["optimizer"] = "salad_lightning.training.base.default_optimizer"
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert trained_module(str(tmp_path / "old.ckpt")).step == 6

"""Every recipe trains two steps and validates once, models and data small and every other key as written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import MimiConfig

from salad_lightning.cli import main
from salad_lightning.connectors.causal_transformer import CausalTransformerConnector
from salad_lightning.model.llm import build_language_model, load_config
from salad_lightning.testing.runs import TinyRun, save_tiny_world
from salad_lightning.testing.tiny_encoders import save_tiny_causal_conv, save_tiny_mimi

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[1] / "recipes"
# Not for `fit`: tested with `select` and with spoken evaluation.
OTHER = ("select.yaml", "mini_select.yaml", "evaluate.yaml", "mini_evaluate.yaml")
FOUND = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob("**/*.yaml") if path.name not in OTHER)
# Which files a recipe is read after; an overlay alone is no configuration.
BASES = {
    "stage1.yaml": [],
    "scale/1gpu.yaml": ["stage1.yaml"],
    "scale/8gpu.yaml": ["stage1.yaml"],
    "scale/mini.yaml": ["stage1.yaml"],
    "scale/warmup.yaml": ["stage1.yaml", "scale/mini.yaml"],
    "stage2.yaml": [],
    "scale/mini_stage2.yaml": ["stage2.yaml", "scale/mini.yaml"],
    "scale/multinode.yaml": ["stage1.yaml"],
    "text_lm.yaml": [],
}
ROWS = 30
# Sizes alone (and a context of 128): a connector as wide as the paper's takes minutes a step here.
SMALL_CONNECTOR = {"num_layers": 1, "dim": 32, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 2}


def test_every_recipe_is_known_here():
    assert sorted(BASES) == FOUND, "say in BASES which files a new recipe is read after"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("recipes"))


def merged(names):
    """What the files add up to, as far as the shrunken keys go: the last one that names a class or a list wins."""
    model, data, trainer = {}, {}, {}
    for name in names:
        content = yaml.safe_load((RECIPES / name).read_text())
        model |= content["model"].get("init_args", {})
        data |= content["data"].get("init_args", {})
        trainer |= content["trainer"]
    return model, data, trainer


def shrunken(world, model, data, trainer, folder):
    """An overlay that swaps models and data paths for tiny ones and ends the run after two steps."""
    small = {"llm": str(world.folder / "llm"), "context": 128}
    if "encoder" in model:
        kind = model["encoder"]["class_path"]
        encoder = {"MimiEncoder": save_tiny_mimi, "CausalConvEncoder": save_tiny_causal_conv}[kind](folder / kind)
        small["encoder"] = {"class_path": kind, "init_args": {"path": encoder}}
        small["connector"] = {"class_path": model["connector"]["class_path"], "init_args": SMALL_CONNECTOR}
    if "init_from" in model:  # Stage II starts from the weights of a Stage I of the same parts
        small["init_from"] = stage1(world, {**small}, folder / "before")
    if "execution" in model:  # compiling takes a minute here
        small["execution"] = {**model["execution"], "compile": False}
    if "export_to" in model:
        small["export_to"] = str(folder / "exported")
    sources = {}
    for part in ("train", "val", "test"):
        for source in data.get(part, []):
            name = str(source["shards"])
            plain = "text" in Path(name).name or "corpus" in name
            shards = "text" if plain else "choice" if part == "test" or "{answer}" in str(source) else "speech"
            sources.setdefault(part, []).append({**source, "shards": str(world.folder / shards)})
    # 480 rows a step are a minute's work here where nothing but their number is to be seen.
    accumulate = min(trainer.get("accumulate_grad_batches", 1), 15)
    holds_rows = "GlobalBatch" in str(trainer.get("callbacks+"))
    rows = {"rows_per_batch": ROWS // accumulate} if holds_rows else {}
    strategy = trainer.get("strategy", "auto")
    if isinstance(strategy, dict):
        strategy = {**strategy, "init_args": dict.fromkeys(strategy.get("init_args", {}))}  # their defaults
    return {
        "model": {"init_args": small},
        "data": {"init_args": {**sources, **rows, "num_workers": min(data.get("num_workers", 0), 1)}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "num_nodes": 1,
            "strategy": strategy,
            "max_steps": 2,
            "accumulate_grad_batches": accumulate,
            "val_check_interval": 2 * accumulate,
            "limit_val_batches": min(trainer.get("limit_val_batches", 1), 1),
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": str(folder / "out"),
        },
    }  # fmt: skip


def with_fewer_rows(name, folder):
    """A recipe's path, or that of a copy where it holds the rows of a step: no overlay reaches into its callbacks."""
    text = (RECIPES / name).read_text()
    if "{rows: 480}" not in text:
        return str(RECIPES / name)
    (folder / "fewer_rows.yaml").write_text(text.replace("{rows: 480}", f"{{rows: {ROWS}}}"))
    return str(folder / "fewer_rows.yaml")


def stage1(world, small, folder):
    """The pre-decay checkpoint of two steps on the tiny world with these parts."""
    overlay = world.folder / "before.yaml"
    # The tiny world's own connector stacks frames, and overlays keep what a class has in common with the one before.
    connector = {**small["connector"], "init_args": {**small["connector"]["init_args"], "stack": 1}}
    small = {**small, "connector": connector, "schedule": {"warmup_steps": 0, "decay_fraction": 0.5}}
    callbacks = [{"class_path": "PreDecayCheckpoint"}]
    trainer = {"max_steps": 2, "default_root_dir": str(folder), "callbacks": callbacks}
    overlay.write_text(yaml.safe_dump({"model": {"init_args": small}, "trainer": trainer}))
    assert main(["fit", "--config", str(world.config), "--config", str(overlay)]) == 0
    return str(folder / "checkpoints" / "pre_decay.ckpt")


@pytest.mark.parametrize("recipe", FOUND)
def test_two_steps_and_one_validation(world, tmp_path, recipe):
    names = [*BASES[recipe], recipe]
    model, data, trainer = merged(names)
    overlay = tmp_path / "small.yaml"
    overlay.write_text(yaml.safe_dump(shrunken(world, model, data, trainer, tmp_path)))
    files = [*(with_fewer_rows(name, tmp_path) for name in names), str(overlay)]
    assert main(["fit", *(part for file in files for part in ("--config", file))]) == 0
    run = TinyRun(tmp_path / "out")
    losses = run.column("train/loss")
    assert losses
    assert all(torch.isfinite(torch.tensor(losses)))
    assert run.results("fit.json")["steps"] == 2
    validated = [name for row in run.metrics() for name in row if name.startswith("val")]
    assert bool(validated) == (trainer.get("limit_val_batches", 1) > 0)
    if "FinalCheckpoint" in str(trainer.get("callbacks")):
        assert (tmp_path / "out" / "checkpoints" / "final.ckpt").exists()


def test_the_small_evaluation_is_the_large_one_on_what_the_demo_leaves(capsys):
    files = ("evaluate.yaml", "scale/mini_evaluate.yaml")
    configs = [part for name in files for part in ("--config", str(RECIPES / name))]
    assert main(["test", *configs, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    made_by_demo = [config["model"]["init_args"]["checkpoint"], config["data"]["init_args"]["test"][0]["shards"]]
    made_by_demo.append(config["trainer"]["callbacks"][0]["init_args"]["recognizer"])
    assert all(path.startswith("outputs/demo/") for path in made_by_demo)


QWEN_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}


def test_stage2_is_the_model_of_stage1():
    """Said twice, so that one file is a whole recipe; kept equal here."""
    first, second = (
        yaml.safe_load((RECIPES / name).read_text())["model"]["init_args"] for name in ("stage1.yaml", "stage2.yaml")
    )
    differs = {"schedule", "init_from", "require_pre_decay"}
    assert {k: v for k, v in first.items() if k not in differs} == {k: v for k, v in second.items() if k not in differs}
    assert second["schedule"] == {"warmup_steps": 0, "decay_fraction": 1.0}


def test_stage1_at_the_papers_sizes(tmp_path):
    """Qwen2.5-3B as published, on the meta device, and the recipe's connector: real sizes, no memory."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3B))
    recipe = yaml.safe_load((RECIPES / "stage1.yaml").read_text())["model"]["init_args"]
    assert recipe["encoder"]["class_path"] == "MimiEncoder"
    mimi = MimiConfig()
    assert (mimi.sampling_rate, mimi.frame_rate) == (24_000, 12.5)
    with torch.device("meta"):
        llm = build_language_model(load_config(str(tmp_path)), vocab_size=151_665)
        connector = CausalTransformerConnector(
            encoder_dim=mimi.hidden_size, llm_dim=llm.dim, **recipe["connector"].get("init_args", {})
        )
    assert llm.dim == 2048
    assert len(llm.blocks) == 36
    assert sum(p.numel() for p in llm.parameters()) == pytest.approx(3.09e9, rel=0.01)
    assert sum(p.numel() for p in connector.parameters()) == pytest.approx(122e6, rel=0.02)
    # What one optimizer step is made of: about a million positions on 8 processes.
    trainer = yaml.safe_load((RECIPES / "stage1.yaml").read_text())
    rows = trainer["data"]["init_args"]["rows_per_batch"] * trainer["trainer"]["accumulate_grad_batches"] * 8
    assert rows * recipe["context"] == 480 * 2048

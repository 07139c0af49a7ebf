"""LoRA, QLoRA and the 8-bit optimizer through the command line; what they refuse."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from salad_lightning.cli import main
from salad_lightning.export import load_pretrained
from salad_lightning.model.llm import load_language_model
from salad_lightning.model.small import small_qwen2
from salad_lightning.testing.runs import TinyRun
from salad_lightning.testing.tiny import save_tiny_llm
from salad_lightning.training.from_checkpoint import trained_module

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow
SHARDED = {"strategy": {"class_path": "salad_lightning.model.parallel.FullyShardedStrategy"}}
EIGHT_BIT = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1e-3, "betas": [0.9, 0.95]}}


def overlay(world, name, model=None, trainer=None):
    path = world.folder / f"{name}.yaml"
    trainer = {"max_steps": 4, "callbacks": [{"class_path": "FinalCheckpoint"}], **(trainer or {})}
    path.write_text(yaml.safe_dump({"model": {"init_args": {"llm_lr": 1e-2, **(model or {})}}, "trainer": trainer}))
    return f"--config={path}"


@pytest.fixture(scope="module")
def lora(world):
    return world.run("fit", "lora", overlay(world, "lora", {"lora": {"rank": 4}}))


def test_lora_is_trained_against_the_untouched_model(world, lora):
    checkpoint = lora.checkpoint("final.ckpt")
    names = set(checkpoint["state_dict"])
    assert any("lora_B" in name for name in names)
    assert not any("base_layer" in name or "embed_tokens" in name for name in names), "frozen weights are not saved"
    moved = [value for name, value in checkpoint["state_dict"].items() if "lora_B" in name]
    assert all(value.abs().max() > 0 for value in moved)
    # A student that equals its teacher on text alone has none to lose: the loss is that of speech.
    assert all(loss > 0 for loss in lora.column("train/loss"))


def test_lora_comes_back_as_a_plain_model(world, lora):
    module = trained_module(str(lora.folder / "checkpoints" / "final.ckpt")).module
    original = load_language_model(str(world.folder / "llm"), 300).hf.state_dict()
    ours = module.model.llm.hf.state_dict()
    assert set(ours) == set(original)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(ours[name], original[name])
    assert torch.linalg.matrix_rank(ours[name] - original[name], rtol=1e-3) == 4


def test_lora_is_exported_alone_and_read_by_peft(world, lora, tmp_path, capsys):
    checkpoint = str(lora.folder / "checkpoints" / "final.ckpt")
    for name, options in (("kept", ["--keep-adapters"]), ("merged", []), ("llm", ["--keep-adapters", "--llm-only"])):
        assert main(["export", checkpoint, str(tmp_path / name), *options]) == 0
    files = {path.name for path in (tmp_path / "kept" / "llm").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not files & {"config.json", "model.safetensors"}
    # The same model, by us and by transformers with peft alone.
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        merged = load_pretrained(tmp_path / "merged").model.speech_llm.llm.hf(ids).logits
        kept = load_pretrained(tmp_path / "kept").model.speech_llm.llm.hf(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(world.folder / "llm").eval()(ids).logits
    torch.testing.assert_close(kept, merged, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs, merged, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base, merged, atol=1e-3)
    prompts = {
        name: load_pretrained(tmp_path / name).generate(prompt="to be", max_new_tokens=5) for name in ("kept", "merged")
    }
    assert prompts["kept"] == prompts["merged"]
    # What the adapters belong to has moved.
    config = tmp_path / "kept" / "llm" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(world.folder / "llm"), str(world.folder / "moved")))
    assert main(["generate", "--model", str(tmp_path / "kept"), "--prompt", "to be"]) == 2
    assert "moved" in capsys.readouterr().err


def test_what_has_no_adapters_cannot_keep_them(world, tmp_path, capsys):
    run = world.run("fit", "no-lora", overlay(world, "no-lora"))
    checkpoint = run.folder / "checkpoints" / "final.ckpt"
    assert main(["export", str(checkpoint), str(tmp_path / "kept"), "--keep-adapters"]) == 2
    assert "without LoRA" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


def test_lora_goes_on(world, lora):
    last = lora.folder / "checkpoints" / "final.ckpt"
    config = overlay(world, "on", {"lora": {"rank": 4}}, {"max_steps": 6})
    run = world.run("fit", "lora-on", config, f"--ckpt_path={last}")
    assert len(run.column("train/loss")) == 2


def test_a_checkpoint_of_another_rank_is_refused(world, lora, capsys):
    last = lora.folder / "checkpoints" / "final.ckpt"
    config = overlay(world, "rank", {"lora": {"rank": 8}})
    assert main(world.arguments("fit", "lora-rank", config, f"--ckpt_path={last}")) == 2
    assert "has another shape" in capsys.readouterr().err


def test_qlora_with_the_eight_bit_optimizer(world, caplog):
    wide = save_tiny_llm(world.folder / "wide", width=128)  # matrices of less than a block of 4-bit weights fail on CPU
    model = {"llm": str(wide), "lora": {"rank": 4}, "quantize": "nf4", "optimizer": EIGHT_BIT}
    run = world.run("fit", "qlora", overlay(world, "qlora", model))
    assert "KL of the original LLM to its nf4 weights: 0." in caplog.text
    (kl,) = run.column("train/quantization_kl")
    assert 0 < kl < 1
    names = set(run.checkpoint("final.ckpt")["state_dict"])
    assert any("lora_B" in name for name in names)
    assert not any("absmax" in name or "base_layer" in name for name in names)
    assert torch.isfinite(torch.tensor(run.column("train/loss"))).all()


@pytest.mark.parametrize(
    ("model", "trainer", "words"),
    [
        ({"lora": {"rank": 4}}, SHARDED, ["model.lora", "FSDP2"]),
        ({"lora": {"rank": 4}, "quantize": "nf4"}, SHARDED, ["model.lora", "FSDP2"]),
        ({"optimizer": EIGHT_BIT}, SHARDED, ["model.optimizer", "AdamW8bit", "FSDP2"]),
        ({"quantize": "nf4"}, {}, ["model.quantize", "cannot be trained"]),
        ({"lora": {"rank": 0}}, {}, ["rank"]),
        ({"execution": {"attention": "flex"}}, {}, ["model.execution.attention", "sdpa"]),
        ({}, {"precision": "bf16-true"}, ["trainer.precision", "bf16-mixed"]),
        (
            {},
            {"callbacks": [{"class_path": "GlobalBatch", "init_args": {"rows": 3}}]},
            ["GlobalBatch.rows", "rows to 4"],
        ),
        (
            {},
            {"strategy": {**SHARDED["strategy"], "init_args": {"data_parallel_size": 3}}},
            ["trainer.strategy.data_parallel_size", "= 1"],
        ),
    ],
)
def test_refused_at_start_before_any_weight_is_loaded(world, capsys, model, trainer, words):
    """The folder of the model holds no weights at all: whoever looked for them would say so."""
    bare = world.folder / "bare"
    bare.mkdir(exist_ok=True)
    for path in (world.folder / "llm").iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    config = overlay(world, "refused", {"llm": str(bare), **model}, trainer)
    assert main(world.arguments("fit", "refused", config)) == 2
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(("other", "words"), [("layers", '"num_hidden_layers": 2'), ("weights", "llm_weights")])
def test_a_checkpoint_of_another_llm_is_refused_before_any_weight_is_loaded(world, lora, capsys, other, words):
    """Of the LLM it has the updates alone, so one of the same shape and other weights will not do either."""
    folder = world.folder / f"other-{other}"
    if other == "layers":
        save_tiny_llm(folder, config=small_qwen2(32, 3), weights=False)
    else:
        shutil.copytree(world.folder / "llm", folder)
        weights = load_file(folder / "model.safetensors")
        moved = {name: value + 0.01 for name, value in weights.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
    last = lora.folder / "checkpoints" / "final.ckpt"
    for option in (f"--ckpt_path={last}", f"--model.init_from={last}"):
        config = overlay(world, "other", {"llm": str(folder), "lora": {"rank": 4}})
        assert main(world.arguments("fit", "other", config, option)) == 2
        message = capsys.readouterr().err
        assert "trained with other parts" in message
        assert words in message


def test_activation_checkpointing_changes_no_loss(world):
    runs = [
        world.run("fit", f"ac-{kind}", overlay(world, f"ac-{kind}", {"execution": {"activation_checkpointing": kind}}))
        for kind in ("none", "full")
    ]
    losses = [TinyRun(run.folder).column("train/loss") for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)

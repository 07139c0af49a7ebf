"""Training on one GPU: bf16 under FSDP2, compilation, FlexAttention, 8-bit optimizer, QLoRA, memory."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml

from salad_lightning.model.execution import Execution, prepare_blocks
from salad_lightning.model.llm import build_language_model
from salad_lightning.model.small import small_qwen2
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.tiny import save_tiny_llm
from salad_lightning.training.agreement import Agreement

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
SHARDED = {"class_path": "salad_lightning.model.parallel.FullyShardedStrategy"}
EIGHT_BIT = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 1e-3, "betas": [0.9, 0.95]}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = save_tiny_world(tmp_path_factory.mktemp("world"))
    # Heads 32 wide, the least that FlexAttention takes on a GPU is 16.
    save_tiny_llm(world.folder / "wide", config=small_qwen2(128, 3, initializer_range=0.1))
    return world


def fit(world, name, *, model=None, trainer=None, steps=6):
    content = {
        "model": {"init_args": {"llm": str(world.folder / "wide"), "llm_lr": 1e-3, **(model or {})}},
        "trainer": {"accelerator": "cuda", "max_steps": steps, "precision": "bf16-mixed", **(trainer or {})},
    }
    path = world.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    run = world.run("fit", name, f"--config={path}")
    losses = run.column("train/loss")
    assert len(losses) == steps
    assert torch.isfinite(torch.tensor(losses)).all()
    return run, losses


@pytest.fixture(scope="module")
def exact(world):
    return fit(world, "exact", trainer={"precision": "32-true"})[1]


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        ("plain", {}),
        ("checkpointed", {"activation_checkpointing": "selective"}),
        ("compiled", {"compile": True, "activation_checkpointing": "full"}),
        ("flex", {"attention": "flex"}),
        ("flex-compiled", {"attention": "flex", "compile": True, "activation_checkpointing": "selective"}),
    ],
)
def test_sharded_in_bf16(world, exact, name, execution):
    run, losses = fit(world, name, model={"execution": execution}, trainer={"strategy": SHARDED})
    assert losses == pytest.approx(exact, rel=0.05, abs=0.01)
    assert min(run.column("train/peak_memory_gib")) > 0


def test_eight_bit_optimizer(world, exact):
    pytest.importorskip("bitsandbytes")
    _, losses = fit(world, "eight-bit", model={"optimizer": EIGHT_BIT})
    assert losses[0] == pytest.approx(exact[0], rel=0.05, abs=0.01)


def test_qlora(world):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    model = {"lora": {"rank": 8}, "quantize": "nf4", "optimizer": EIGHT_BIT, "llm_lr": 1e-2}
    run, _ = fit(world, "qlora", model=model)
    assert 0 < run.column("train/quantization_kl")[0] < 1


def packed(length=512):
    starts = torch.tensor([0, 100, 230, 470], device="cuda")
    every = torch.arange(length, device="cuda")
    documents = (every[:, None] >= starts).sum(1) - 1
    return (every - starts[documents])[None].expand(2, -1), documents[None].expand(2, -1)


def llm(attention, dtype=torch.bfloat16):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = build_language_model(small_qwen2(256, 2, vocab_size=997), 997, attention)
    return model.to(dtype)


def hidden(model, ids):
    positions, documents = packed(ids.shape[1])
    return model(positions, documents, torch.arange(ids.numel(), device="cuda"), input_ids_BS=ids).hidden


def test_flex_attention_equals_sdpa_in_both_directions():
    ids = torch.randint(997, (2, 512), device="cuda")
    results = []
    for attention in ("sdpa", "flex"):
        model = llm(attention, torch.float32)
        output = hidden(model, ids)
        output.square().mean().backward()
        results.append(
            (output.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        )
    # TF32-sized differences: the kernels multiply in different orders.
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm() + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_no_document_sees_another(attention):
    model = llm(attention)
    ids = torch.randint(997, (2, 512), device="cuda")
    other = ids.clone()
    other[:, :100] = (other[:, :100] + 1) % 997
    before, after = (hidden(model, tokens).view(2, 512, -1) for tokens in (ids, other))
    assert torch.equal(before[:, 100:], after[:, 100:])
    assert not torch.allclose(before[:, :100], after[:, :100])


def test_checkpointing_saves_memory():
    peaks = {}
    for kind in ("none", "selective", "full"):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = build_language_model(small_qwen2(512, 8, vocab_size=997), 997).train()
        prepare_blocks(model.blocks, Execution(activation_checkpointing=kind))
        ids = torch.randint(997, (2, 2048), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hidden(model, ids).square().mean().backward()
        peaks[kind] = torch.cuda.max_memory_allocated() - before
        del model
    assert peaks["full"] < peaks["selective"] < peaks["none"]
    assert peaks["full"] < 0.5 * peaks["none"]


def test_signals_are_agreed_on_without_waiting(tmp_path):
    """One process that believes to be one of two, so that the answer goes through NCCL and pinned memory."""
    torch.distributed.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    device = torch.device("cuda", torch.cuda.current_device())
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=device))
    agreement = Agreement()
    agreement(0, trainer)  # NCCL begins
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        answers = [agreement(number, trainer) for number in (0, 2, 0, 1)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert answers == [0, 0, 2, 0]
    assert agreement(0, trainer) == 1

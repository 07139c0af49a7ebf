"""Checkpointing and the choice of attention change time and memory, not what is computed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from salad_lightning.errors import UserError
from salad_lightning.model.execution import Execution, prepare_blocks
from salad_lightning.model.llm import build_language_model
from salad_lightning.model.small import small_qwen2


def model(attention="sdpa"):
    torch.manual_seed(0)
    return build_language_model(small_qwen2(64, 3, vocab_size=97), 97, attention)


def run(llm, *, documents=None, seed=0, rows=2):
    """Hidden states of rows of packed documents."""
    ids = torch.randint(97, (rows, 160), generator=torch.Generator().manual_seed(seed))
    starts = torch.tensor([0, 40, 97, 150])
    document_ids = (torch.arange(160)[:, None] >= starts).sum(1) - 1
    positions = torch.arange(160) - starts[document_ids]
    document_ids = document_ids if documents is None else documents
    packed = [tensor.expand(rows, -1) for tensor in (positions, document_ids)]
    return llm(*packed, torch.arange(rows * 160), input_ids_BS=ids).hidden


class Saved:
    """Bytes that autograd keeps between forward and backward."""

    def __enter__(self):
        self.seen = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def _keep(self, tensor):
        storage = tensor.untyped_storage()
        self.seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *error):
        self._hooks.__exit__(*error)
        self.bytes = sum(self.seen.values())


def gradients(kind, compiled=False):
    llm = model().train()
    prepare_blocks(llm.blocks, Execution(activation_checkpointing=kind, compile=compiled))
    names = [name for name, _ in llm.named_parameters()]
    with Saved() as saved:
        loss = run(llm).square().sum()
    loss.backward()
    return names, loss.detach(), [p.grad for p in llm.parameters() if p.grad is not None], saved.bytes


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_changes_memory_alone(kind):
    plain_names, plain_loss, plain, plain_bytes = gradients("none")
    names, loss, ours, kept = gradients(kind)
    assert names == plain_names
    torch.testing.assert_close((loss, ours), (plain_loss, plain), rtol=0, atol=0)
    assert kept < 0.6 * plain_bytes


@pytest.mark.slow
def test_compiled_blocks_give_the_same():
    """In a process of its own: compilers start threads."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compiled_equals_plain():
    """One graph serves all blocks, without a break."""
    _, loss, plain, _ = gradients("none")
    _, compiled_loss, compiled, _ = gradients("selective", compiled=True)
    torch.testing.assert_close((compiled_loss, compiled), (loss, plain), rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    teacher = model().eval().requires_grad_(False)
    prepare_blocks(teacher.blocks, Execution(compile=True), trained=False)
    with torch.no_grad():
        made = []
        for rows in (2, 3, 5, 4, 7):  # as many as transcripts fill
            run(teacher, rows=rows, seed=rows)
            made.append(counters["stats"]["unique_graphs"] - 1)
    assert made[1:] == [2] * 4, f"{made}: a graph for two rows, one for any number"


def test_selective_runs_fewer_products_twice():
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for kind in ("none", "selective", "full"):
        llm = model().train()
        prepare_blocks(llm.blocks, Execution(activation_checkpointing=kind))
        with FlopCounterMode(display=False) as counter:
            run(llm).sum().backward()
        counts[kind] = counter.get_total_flops()
    again = {kind: counts[kind] - counts["none"] for kind in ("selective", "full")}
    assert counts["none"] < counts["selective"] < counts["full"]
    assert again["selective"] == pytest.approx(again["full"] / 2, rel=0.4)


def test_without_gradients_nothing_is_checkpointed():
    llm = model().eval()
    with torch.no_grad():
        before = run(llm)
        prepare_blocks(llm.blocks, Execution(activation_checkpointing="full"), trained=False)
        assert torch.equal(run(llm), before)
    assert "forward" not in vars(llm.blocks[0]), "frozen blocks stay as they are"


# FlexAttention runs uncompiled here, without a backward pass; tests/gpu has the rest.


@pytest.fixture
def uncompiled():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_gives_the_same(uncompiled):
    torch.testing.assert_close(run(model("flex").eval()), run(model().eval()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.filterwarnings("ignore")
def test_no_document_sees_another(uncompiled, attention):
    """Other tokens in the other documents change nothing; without the mask they would."""
    llm = model(attention).eval()
    ids = torch.randint(97, (1, 160), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, :40] = (other[:, :40] + 1) % 97
    document_ids = (torch.arange(160) >= 40).long()[None]
    positions = torch.cat([torch.arange(40), torch.arange(120)])[None]
    every = torch.arange(160)
    hidden = [llm(positions, document_ids, every, input_ids_BS=tokens).hidden for tokens in (ids, other)]
    assert torch.equal(hidden[0][40:], hidden[1][40:])
    assert not torch.allclose(hidden[0][:40], hidden[1][:40])
    leaking = [llm(positions, document_ids * 0, every, input_ids_BS=tokens).hidden for tokens in (ids, other)]
    assert not torch.allclose(leaking[0][40:], leaking[1][40:])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_keeps_a_sliding_window(uncompiled):
    outputs = []
    for attention in ("sdpa", "flex"):
        config = small_qwen2(64, 2, vocab_size=97, use_sliding_window=True, sliding_window=16, max_window_layers=1)
        torch.manual_seed(0)
        outputs.append(run(build_language_model(config, 97, attention).eval()))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], run(model().eval()))


def test_flex_attention_is_refused_where_it_cannot_train():
    with pytest.raises(UserError, match="does not train on cpu") as error:
        Execution(attention="flex").check(torch.device("cpu"))
    assert error.value.where == "model.execution.attention"
    Execution().check(torch.device("cpu"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    compiled_equals_plain()

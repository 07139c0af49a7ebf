"""The kernel with gradient, against one token at a time in float64; and what it must not hold in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from salad_lightning.batch import Head, Prediction
from salad_lightning.projection import LossTerms, kernel, projected_loss, rows

VOCAB, WIDTH, TEACHER_WIDTH = 29, 8, 5
TERMS = {
    "nll": LossTerms(nll=1.0),
    "kl": LossTerms(kl=1.0),
    "reverse_kl": LossTerms(reverse_kl=1.0),
    "jsd": LossTerms(jsd=1.0, beta=0.3),
    "mixture": LossTerms(nll=0.75, kl=0.25),
    "softened": LossTerms(nll=0.5, kl=0.5, temperature=2.0),
    "all": LossTerms(nll=0.1, kl=0.2, reverse_kl=0.3, jsd=0.4, beta=0.8, temperature=0.7),
}
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.5},
    "soft_cap": {"soft_cap": 2.0},
    "padded": {"padding": 3},
    "all": {"bias": True, "scale": 1.5, "soft_cap": 3.0, "padding": 4},
}


def predict(tokens, width=WIDTH, seed=0, *, trained=True, bias=False, padding=0, dtype=torch.float32, **settings):
    generator = torch.Generator().manual_seed(seed)
    rows = VOCAB + padding
    hidden, weight, offset = (
        torch.randn(size, generator=generator).to(dtype) for size in ((tokens, width), (rows, width), (rows,))
    )
    head = Head(weight.requires_grad_(trained), offset.requires_grad_(trained) if bias else None, **settings)
    return Prediction(hidden.requires_grad_(), head._replace(vocab_size=VOCAB if padding else None))


def case(tokens, head="plain", *, trained=True, dtype=torch.float32):
    student = predict(tokens, trained=trained, dtype=dtype, **HEADS[head])
    return student, predict(tokens, TEACHER_WIDTH, seed=1, trained=False, dtype=dtype, padding=6), labels(tokens)


def labels(tokens):
    return torch.arange(tokens) * 7 % VOCAB


def leaves(prediction):
    tensors = [prediction.hidden, prediction.head.weight, prediction.head.bias]
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def in_double(prediction):
    hidden, weight, bias = (
        None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)
        for tensor in (prediction.hidden, prediction.head.weight, prediction.head.bias)
    )
    return Prediction(hidden, prediction.head._replace(weight=weight, bias=bias))


def distribution(prediction, token, temperature=1.0):
    """Probabilities of one token, by the definition."""
    hidden, head = prediction
    logits = head.weight[:VOCAB] @ hidden[token]
    logits = logits if head.bias is None else logits + head.bias[:VOCAB]
    logits = logits * head.scale
    logits = logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)
    return (logits / temperature).exp() / (logits / temperature).exp().sum()


def kl(p, q):
    return (p * (p / q).log()).sum()


def loop(student, teacher, targets, terms):
    """The sum and its parts, one token at a time."""
    parts = dict.fromkeys(("nll", "kl", "reverse_kl", "jsd"), 0.0)
    total = sum(leaf.sum() * 0 for leaf in leaves(student))
    for token, target in enumerate(targets.tolist()):
        p, q = (distribution(side, token, terms.temperature) for side in (teacher, student))
        middle = terms.beta * p + (1 - terms.beta) * q
        losses = {
            "nll": -distribution(student, token)[target].log(),
            "kl": kl(p, q) * terms.temperature**2,
            "reverse_kl": kl(q, p) * terms.temperature**2,
            "jsd": (terms.beta * kl(p, middle) + (1 - terms.beta) * kl(q, middle)) * terms.temperature**2,
        }
        total = total + sum(getattr(terms, name) * loss for name, loss in losses.items())
        parts = {name: parts[name] + float(loss.detach()) for name, loss in losses.items()}
    return total, parts


def assert_equals_loop(student, teacher, targets, terms, **settings):
    output = projected_loss(student, targets, teacher, terms, **settings)
    exact = in_double(student)
    expected, parts = loop(exact, in_double(teacher), targets, terms)
    assert_close(output.sum.double(), expected, rtol=1e-4, atol=1e-5)
    for name, part in output.parts.items():
        assert float(part) == pytest.approx(parts[name], rel=1e-4, abs=1e-5)
    found, wanted = (
        torch.autograd.grad(total, leaves(side)) for total, side in ((output.sum, student), (expected, exact))
    )
    for mine, reference in zip(found, wanted, strict=True):
        assert_close(mine.double(), reference, rtol=1e-4, atol=1e-4)
    return output


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("terms", TERMS)
def test_equals_the_loop(terms, head, trained):
    output = assert_equals_loop(*case(13, head, trained=trained), TERMS[terms], chunk_size=5)
    assert set(output.parts) >= {"nll", "kl"}
    assert int(output.count) == 13


@pytest.mark.parametrize("tokens", [0, 1, 601])
@pytest.mark.parametrize("terms", ["mixture", "all"])
def test_any_number_of_tokens(terms, tokens):
    assert_equals_loop(*case(tokens), TERMS[terms], chunk_size=100)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 100])
def test_any_chunk_and_block(chunk_size, monkeypatch):
    monkeypatch.setitem(rows._BLOCK_ELEMENTS, "cpu", 3 * VOCAB)
    assert_equals_loop(*case(13, "all"), TERMS["all"], chunk_size=chunk_size)


def test_masked_tokens_count_nothing():
    student, teacher, targets = case(13, "all")
    mask = torch.arange(13) % 3 != 0
    output = projected_loss(student, targets, teacher, TERMS["all"], mask_M=mask, chunk_size=4)
    kept = [Prediction(side.hidden[mask], side.head) for side in (student, teacher)]
    expected = projected_loss(kept[0], targets[mask], kept[1], TERMS["all"])
    assert_close((output.sum, output.parts), (expected.sum, expected.parts))
    assert int(output.count) == int(mask.sum())
    assert_close(
        torch.autograd.grad(output.sum, leaves(student)), torch.autograd.grad(expected.sum, leaves(student))
    )  # fmt: skip


@pytest.mark.parametrize("terms", TERMS)
def test_tokens_that_a_bias_rules_out(terms):
    student, teacher, _ = case(5, "bias")
    out = torch.tensor([2, 11])
    with torch.no_grad():
        student.head.bias[out] = -torch.inf
    teacher = teacher._replace(head=teacher.head._replace(bias=student.head.bias.new_zeros(VOCAB + 6)))
    teacher.head.bias[out] = -torch.inf
    output = projected_loss(student, torch.tensor([0, 1, 3, 4, 5]), teacher, TERMS[terms])
    gradients = torch.autograd.grad(output.sum, leaves(student))
    assert torch.isfinite(output.sum)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[1][out].abs().max() == 0


@pytest.mark.parametrize("terms", TERMS)
def test_gradcheck(terms):
    student, teacher, targets = case(4, "all", dtype=torch.float64)

    def loss(hidden, weight, bias):
        moved = Prediction(hidden, student.head._replace(weight=weight, bias=bias))
        return projected_loss(moved, targets, teacher, TERMS[terms], chunk_size=3).sum

    assert torch.autograd.gradcheck(loss, leaves(student))


def test_temperature_keeps_the_size_of_the_gradient():
    # Hinton et al., section 2: the gradient of the KL itself falls with T², which the factor undoes.
    student, teacher, targets = case(13)
    norms = []
    for temperature in (20.0, 200.0):
        output = projected_loss(student, targets, teacher, LossTerms(kl=1.0, temperature=temperature))
        norms.append(torch.autograd.grad(output.sum, student.hidden)[0].norm())
    assert 0.8 < norms[1] / norms[0] < 1.25


def test_the_gradient_of_the_sum_is_passed_on():
    student, teacher, targets = case(13, "all")
    output = projected_loss(student, targets, teacher, TERMS["kl"])
    once = torch.autograd.grad(output.sum, leaves(student), retain_graph=True)
    thrice = torch.autograd.grad(3 * output.sum, leaves(student), retain_graph=True)
    again = torch.autograd.grad(output.sum, leaves(student))
    assert_close(thrice, tuple(3 * gradient for gradient in once))
    assert_close(again, once)


def test_two_losses_in_one_step():
    student, teacher, targets = case(13)
    losses = [projected_loss(student, targets, teacher, TERMS[name], chunk_size=4).sum for name in ("kl", "nll")]
    (losses[0] + 2 * losses[1]).backward()
    single = [torch.autograd.grad(projected_loss(student, targets, teacher, TERMS[n]).sum, leaves(student))
              for n in ("kl", "nll")]  # fmt: skip
    for leaf, first, second in zip(leaves(student), *single, strict=True):
        assert_close(leaf.grad, first + 2 * second, rtol=1e-4, atol=1e-5)


def test_a_second_backward_without_its_graph_is_refused():
    student, teacher, targets = case(3)
    output = projected_loss(student, targets, teacher, TERMS["kl"])
    output.sum.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum.backward()


def test_no_tokens_is_connected_and_zero():
    student, teacher, targets = case(0, "all")
    projected_loss(student, targets, teacher, TERMS["all"]).sum.backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves(student))


def test_autocast_trains_fp32_weights_with_bf16_products():
    student, teacher, targets = case(601, "bias")
    exact = projected_loss(student, targets, teacher, TERMS["mixture"]).sum
    with torch.autocast("cpu", torch.bfloat16):
        rough = projected_loss(student, targets, teacher, TERMS["mixture"], chunk_size=100).sum
    assert rough.dtype == torch.float32
    assert 0 < abs(float((rough - exact).detach())) < 1e-2 * float(exact.detach())
    gradients = (torch.autograd.grad(total, leaves(student)) for total in (rough, exact))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 2e-2 * expected.norm()


def test_gradients_of_a_bf16_head_are_added_up_in_fp32():
    # The same token 4,000 times, one by one: a bf16 sum stops growing at about 256 times its increment.
    one, teacher, _ = case(1, "bias", dtype=torch.bfloat16)
    hidden, others = (side.hidden.detach().expand(4000, -1) for side in (one, teacher))
    student = Prediction(hidden.clone().requires_grad_(), one.head)
    targets = torch.zeros(4000, dtype=torch.long)
    sums = projected_loss(student, targets, teacher._replace(hidden=others), TERMS["kl"], chunk_size=1).sum
    single = projected_loss(one, targets[:1], teacher, TERMS["kl"]).sum
    for total, part in zip(
        torch.autograd.grad(sums, leaves(one)[1:]), torch.autograd.grad(single, leaves(one)[1:]), strict=True
    ):
        assert total.dtype == torch.bfloat16
        assert_close(total.float(), 4000 * part.float(), rtol=2e-2, atol=1e-2)


class Recorder(TorchDispatchMode):
    """Remembers the shapes of all tensors that come into being."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("trained", [True, False])
def test_no_tensor_of_all_tokens_by_vocabulary(terms, trained):
    student, teacher, targets = case(13, trained=trained)
    with Recorder() as recorder:
        projected_loss(student, targets, teacher, TERMS[terms], chunk_size=9).sum.backward()
    assert max(shape[0] for shape in recorder.shapes if shape[1:] == (VOCAB,)) == 9
    head_gradients = {shape for shape in recorder.shapes if shape in ((VOCAB, WIDTH), (WIDTH, VOCAB))}
    assert bool(head_gradients) == trained, "a frozen head must cost nothing"


def test_default_chunks_bound_the_memory(monkeypatch):
    monkeypatch.setitem(kernel._CHUNK_ELEMENTS, "cpu", 5 * VOCAB)
    student, teacher, targets = case(13)
    with Recorder() as recorder:
        projected_loss(student, targets, teacher, TERMS["kl"]).sum.backward()
    assert max(shape[0] for shape in recorder.shapes if shape[1:] == (VOCAB,)) == 5


@pytest.mark.parametrize(
    ("vocab", "tokens", "size"),
    [
        (151_936, 100, 128),  # one chunk
        (151_936, 192, 192),
        (151_936, 200, 128),  # two of about the same size, not 192 and 8
        (151_936, 2048, 192),
        (32_000, 8192, 832),
        (10**7, 50, 2),  # fewer than a tile
        (151_936, 0, 32),
    ],
)
def test_default_chunks_are_few_and_alike(vocab, tokens, size):
    assert kernel._chunk_size(torch.empty(vocab, 1, device="meta"), tokens) == size


MEMORY = """
import torch
from pathlib import Path
from salad_lightning.batch import Head, Prediction
from salad_lightning.projection import LossTerms, projected_loss

def resident(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024

torch.set_num_threads(1)
sides = [Prediction(torch.randn(4096, 16), Head(torch.randn(20000, 16))) for _ in range(2)]
labels = torch.zeros(4096, dtype=torch.long)
def run():
    sides[0].hidden.requires_grad_()
    projected_loss(*sides[:1], labels, sides[1], LossTerms(kl=1.0)).sum.backward()
before = resident("VmRSS")
run()
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
def test_resident_memory_is_that_of_two_chunks():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    whole, chunk = 4096 * 20000 * 4 / 2**20, kernel._CHUNK_ELEMENTS["cpu"] * 4 / 2**20
    assert whole > 300, "one whole tensor must show"
    assert 1.5 * chunk < float(done.stdout) < 2.5 * chunk + 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    ["compiled_equals_the_loop", "compiled_equals_uncompiled_under_a_mask", "without_a_compiler_it_runs_uncompiled"],
)
def test_compiled(check):
    script = Path(__file__).with_name("compiled_projection.py")
    done = subprocess.run([sys.executable, str(script), check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": LossTerms(kl=1.0), "teacher": None}, "teacher"),
        ({"terms": LossTerms()}, "nothing to minimise"),
        ({"terms": LossTerms(kl=1.0, temperature=0.0)}, "temperature"),
        ({"terms": LossTerms(jsd=1.0, beta=1.0)}, "beta"),
        ({"mask_M": torch.ones(12, dtype=torch.bool)}, "'mask': 12"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    student, teacher, targets = case(13)
    arguments = {"student": student, "labels_M": targets, "teacher": teacher, "terms": TERMS["kl"]} | change
    with pytest.raises(ValueError, match=message):
        projected_loss(**arguments)

"""The kernel on a GPU: bf16 products, compiled softmax, memory. Run where there is one: pytest tests/gpu."""

from __future__ import annotations

import pytest
import torch

from salad_lightning.batch import Head, Prediction
from salad_lightning.projection import LossTerms, projected_loss, rows, token_kl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")

TERMS = {
    "nll": LossTerms(nll=1.0),
    "kl": LossTerms(kl=1.0),
    "reverse_kl": LossTerms(reverse_kl=1.0),
    "jsd": LossTerms(jsd=1.0, beta=0.3),
    "mixture": LossTerms(nll=0.75, kl=0.25, temperature=2.0),
}


def predict(tokens, vocab, width, seed, *, trained, padding=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, scale):
        return torch.randn(shape, generator=generator, device="cuda").mul_(scale).to(torch.bfloat16)

    weight = normal(vocab + padding, width, scale=2 * width**-0.5).requires_grad_(trained)
    hidden = normal(tokens, width, scale=1.0).requires_grad_()
    return Prediction(hidden, Head(weight, vocab_size=vocab if padding else None))


def reference(student, teacher, labels, terms):
    """The sum and gradients in float64, by autograd through whole logits of the same bf16 weights."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (student.hidden, student.head.weight))
    vocab = student.head.vocab_size or weight.shape[0]
    logits = (hidden @ weight.T)[:, :vocab]
    log_q = (logits / terms.temperature).log_softmax(-1)
    log_p = teacher.hidden.detach().double() @ teacher.head.weight.detach().double().T
    log_p = (log_p[:, :vocab] / terms.temperature).log_softmax(-1)
    log_m = (terms.beta * log_p.exp() + (1 - terms.beta) * log_q.exp()).log()

    def kl(a, b):
        return (a.exp() * (a - b)).sum() * terms.temperature**2

    total = terms.nll * -logits.log_softmax(-1).gather(-1, labels[:, None]).sum()
    total = total + terms.kl * kl(log_p, log_q) + terms.reverse_kl * kl(log_q, log_p)
    total = total + terms.jsd * (terms.beta * kl(log_p, log_m) + (1 - terms.beta) * kl(log_q, log_m))
    return total.detach(), *torch.autograd.grad(total, (hidden, weight))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", TERMS)
def test_bf16_equals_float64(name, trained):
    student = predict(1001, 4001, 256, seed=0, trained=trained, padding=31)
    teacher = predict(1001, 4001, 192, seed=1, trained=False)
    labels = torch.arange(1001, device="cuda") * 7 % 4001
    total, *gradients = reference(student, teacher, labels, TERMS[name])
    output = projected_loss(student, labels, teacher, TERMS[name], chunk_size=300)
    assert float(output.sum.detach()) == pytest.approx(float(total), rel=1e-2)
    leaves = [student.hidden, student.head.weight][: 2 if trained else 1]
    for found, expected in zip(torch.autograd.grad(output.sum, leaves), gradients, strict=False):
        assert (found.double() - expected).norm() < 2e-2 * expected.norm()
    assert not rows._compiler.failed, "the softmax did not compile"


def test_compiled_equals_uncompiled(monkeypatch):
    student = predict(513, 4000, 256, seed=0, trained=True)
    teacher = predict(513, 4000, 192, seed=1, trained=False)
    labels = torch.arange(513, device="cuda") * 7 % 4000
    outputs = []
    for devices in ({"cuda"}, set()):
        monkeypatch.setattr(rows, "_COMPILED_DEVICES", devices)
        total = projected_loss(student, labels, teacher, TERMS["mixture"]).sum
        outputs.append((total.detach(), *torch.autograd.grad(total, (student.hidden, student.head.weight))))
    for compiled, uncompiled in zip(*outputs, strict=True):
        assert (compiled.float() - uncompiled.float()).norm() <= 5e-3 * uncompiled.float().norm()


def test_metrics_are_exact_on_the_same_products():
    one = predict(301, 4000, 256, seed=0, trained=False)
    assert float(token_kl(one, one).abs().max()) < 1e-6


def test_more_combinations_than_dynamo_keeps_by_default_are_compiled():
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    student = predict(300, 1000, 64, seed=0, trained=False)
    teacher = predict(300, 1000, 64, seed=1, trained=False)
    labels = torch.arange(300, device="cuda")
    for number in range(1, 10):
        projected_loss(student, labels, teacher, LossTerms(kl=1.0, temperature=1 + number / 8))
    assert stats["unique_graphs"] == before + 9


@pytest.mark.parametrize("name", ["kl", "mixture", "jsd"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_memory_at_the_shape_of_a_3b_model(trained, name):
    tokens, vocab, width = 8192, 151_936, 2048
    student = predict(tokens, vocab, width, seed=0, trained=trained)
    teacher = predict(tokens, vocab, width, seed=1, trained=False)
    labels = torch.zeros(tokens, dtype=torch.long, device="cuda")
    projected_loss(student, labels, teacher, TERMS[name]).sum.backward()  # compilation
    student.hidden.grad = student.head.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total = projected_loss(student, labels, teacher, TERMS[name]).sum
    in_forward = torch.cuda.max_memory_allocated() - before
    gradients = student.hidden.nbytes + (vocab * width * 4 if trained else 0)
    assert in_forward - gradients <= 2**30
    total.backward()
    assert torch.isfinite(student.hidden.grad).all()
    # At the end autograd asks for the head's gradient in bf16, beside the fp32 sum.
    rounded = student.head.weight.nbytes if trained else 0
    assert torch.cuda.max_memory_allocated() - before - gradients - rounded <= 2**30

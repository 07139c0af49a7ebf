from __future__ import annotations

import weakref

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from salad_lightning.batch import Head, Prediction
from salad_lightning.projection import logits, token_kl, token_log_probs, token_losses

TOKENS, VOCAB = 13, 29


def predict(width=8, rows=VOCAB, tokens=TOKENS, seed=0, **head):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=generator) for s in ((tokens, width), (rows, width), (rows,)))
    vocab_size = None if rows == VOCAB else VOCAB
    return Prediction(hidden.requires_grad_(), Head(weight.requires_grad_(), bias, vocab_size=vocab_size, **head))


def labels(tokens=TOKENS):
    return torch.arange(tokens) * 7 % VOCAB


def double_logits(prediction):
    hidden, head = prediction
    result = (hidden.detach().double() @ head.weight.detach().double().T + head.bias.double()) * head.scale
    if head.soft_cap:
        result = head.soft_cap * torch.tanh(result / head.soft_cap)
    return result[:, :VOCAB]


def gradients(prediction, losses):
    return torch.autograd.grad(losses.nll.sum() + losses.kl.square().sum(), (prediction.hidden, prediction.head.weight))


def test_logits_equal_float64():
    prediction = predict(rows=VOCAB + 3, scale=0.5, soft_cap=2.0)
    result = logits(prediction)
    assert result.shape == (TOKENS, VOCAB)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), double_logits(prediction), rtol=1e-5, atol=1e-5)


def test_logits_are_fp32_for_a_bf16_model():
    prediction = Prediction(torch.randn(3, 8, dtype=torch.bfloat16), Head(torch.randn(VOCAB, 8, dtype=torch.bfloat16)))
    assert logits(prediction).dtype == torch.float32


@pytest.mark.parametrize("family", ["Gemma2", "Cohere"])
def test_logits_equal_hugging_face(family):
    import transformers

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    extra = {"Gemma2": {"final_logit_softcapping": 0.2}, "Cohere": {"logit_scale": 0.0625}}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **extra)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
        hidden = model.model(labels()[None]).last_hidden_state[0]
        expected = model(labels()[None]).logits[0]
    settings = {"Gemma2": {"soft_cap": 0.2}, "Cohere": {"scale": 0.0625}}[family]
    actual = logits(Prediction(hidden, Head(model.lm_head.weight, **settings)))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    plain = logits(Prediction(hidden, Head(model.lm_head.weight)))
    assert (plain - expected).abs().max() > 0.1, "the setting must matter here"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 100])
def test_token_losses_equal_torch_distributions(chunk_size, temperature):
    student, teacher = predict(rows=VOCAB + 3, scale=0.5), predict(width=5, seed=1, soft_cap=3.0)
    losses = token_losses(student, labels(), teacher, temperature=temperature, chunk_size=chunk_size)
    p, q = double_logits(teacher), double_logits(student)
    softened = kl_divergence(Categorical(logits=p / temperature), Categorical(logits=q / temperature))
    torch.testing.assert_close(losses.kl.double(), softened * temperature**2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.nll.double(), -Categorical(logits=q).log_prob(labels()), rtol=1e-5, atol=1e-6)
    assert losses.nll.dtype == losses.kl.dtype == torch.float32


def test_temperature_keeps_the_size_of_the_gradient():
    # Hinton et al., section 2: the gradient of the KL itself falls with T², which the factor undoes.
    student, teacher = predict(), predict(seed=1)
    norms = []
    for temperature in (20.0, 200.0):
        kl = token_losses(student, labels(), teacher, temperature=temperature).kl
        norms.append(torch.autograd.grad(kl.sum(), student.hidden)[0].norm())
    assert 0.8 < norms[1] / norms[0] < 1.25


@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_give_the_gradients_of_the_whole(autocast):
    student, teacher = predict(rows=VOCAB + 3), predict(width=5, seed=1)
    results = []
    for chunk_size in (TOKENS, 4):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(gradients(student, token_losses(student, labels(), teacher, chunk_size=chunk_size)))
    tolerance = {"rtol": 2e-2, "atol": 0.1} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, **tolerance)


class Recorder(TorchDispatchMode):
    """Remembers every tensor as wide as the vocabulary that comes into being."""

    def __init__(self):
        super().__init__()
        self.made, self.tokens = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.ndim == 2 and leaf.shape[1] == VOCAB:
                self.made.append(weakref.ref(leaf.untyped_storage()))
                self.tokens = max(self.tokens, leaf.shape[0])
        return result

    def kept(self):
        """How many of these tensors of 9 tokens or more are alive."""
        # The head's own transpose is [width, VOCAB]; a chunk of more tokens than its width of 8 stands out.
        storages = [ref() for ref in self.made]
        return sum(storage is not None and storage.nbytes() >= 9 * VOCAB * 4 for storage in storages)


def test_no_tensor_of_all_tokens_by_vocabulary():
    student, teacher = predict(), predict(width=5, seed=1)
    with Recorder() as recorder:
        losses = token_losses(student, labels(), teacher, chunk_size=9)
        assert recorder.kept() == 0, "logits are kept between forward and backward"
        gradients(student, losses)
    assert recorder.tokens == 9


def test_the_recorder_sees_kept_logits():
    student, teacher = predict(), predict(width=5, seed=1)
    with Recorder() as recorder:
        losses = token_losses(student, labels(), teacher)
        assert recorder.kept() > 0
    assert recorder.tokens == TOKENS
    assert losses.kl.requires_grad


def test_default_chunks_bound_the_memory(monkeypatch):
    monkeypatch.setattr("salad_lightning.projection._CHUNK_ELEMENTS", 5 * VOCAB)
    with Recorder() as recorder:
        token_losses(predict(width=3), labels(), predict(width=2, seed=1))
    assert recorder.tokens == 5


def test_no_gradient_is_kept_for_the_teacher_or_without_grad():
    student, teacher = predict(), predict(width=5, seed=1)
    token_losses(student, labels(), teacher).kl.sum().backward()
    assert teacher.hidden.grad is None
    assert teacher.head.weight.grad is None
    with torch.no_grad():
        assert not token_losses(student, labels(), teacher, chunk_size=2).kl.requires_grad
    assert not token_kl(student, teacher).requires_grad


def test_frozen_head_trains_hidden_states_only():
    student = predict()
    frozen = Prediction(student.hidden, student.head._replace(weight=student.head.weight.detach()))
    token_losses(frozen, labels(), predict(seed=1), chunk_size=3).kl.sum().backward()
    assert student.hidden.grad.abs().sum() > 0
    assert student.head.weight.grad is None


def test_empty_is_connected_and_zero():
    student, teacher = predict(tokens=0), predict(tokens=0, seed=1)
    losses = token_losses(student, labels(0), teacher)
    assert losses.nll.shape == losses.kl.shape == (0,)
    (losses.nll.sum() + losses.kl.sum()).backward()
    assert torch.equal(student.head.weight.grad, torch.zeros(VOCAB, 8))
    assert token_kl(student, teacher).shape == (0,)


def test_token_kl_has_its_direction():
    p, q = predict(seed=1), predict(width=4, seed=2)
    forward = kl_divergence(Categorical(logits=double_logits(p)), Categorical(logits=double_logits(q)))
    torch.testing.assert_close(token_kl(p, q, chunk_size=4).double(), forward, rtol=1e-5, atol=1e-6)
    assert (token_kl(q, p).double() - forward).abs().max() > 0.1
    assert token_kl(p, p).abs().max() < 1e-6


def test_token_log_probs():
    prediction = predict()
    expected = Categorical(logits=double_logits(prediction)).log_prob(labels())
    result = token_log_probs(prediction, labels(), chunk_size=3)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_different_vocabularies_are_refused():
    teacher = predict(rows=VOCAB + 3)
    with pytest.raises(ValueError, match="29 real tokens, the teacher 32"):
        token_losses(predict(), labels(), teacher._replace(head=teacher.head._replace(vocab_size=None)))


def test_different_counts_are_refused():
    with pytest.raises(ValueError, match=r"'labels': 12"):
        token_losses(predict(), labels(12))
    with pytest.raises(ValueError, match=r"'teacher': 4"):
        token_losses(predict(), labels(), predict(tokens=4))

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

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


def test_metrics_have_no_gradient():
    student, teacher = predict(), predict(width=5, seed=1)
    assert not token_losses(student, labels(), teacher).kl.requires_grad
    assert not token_log_probs(student, labels()).requires_grad
    assert not token_kl(student, teacher).requires_grad


def test_no_tokens():
    student, teacher = predict(tokens=0), predict(tokens=0, seed=1)
    losses = token_losses(student, labels(0), teacher)
    assert losses.nll.shape == losses.kl.shape == token_kl(student, teacher).shape == (0,)


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

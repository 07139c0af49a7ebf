import torch

from salad_lightning.batch import Head, Prediction
from salad_lightning.evaluation.metrics import MeanPerToken, forgetting, misalignment


def kl_float64(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_mean_per_token_weighs_tokens_not_batches():
    metric = MeanPerToken()
    metric.update(torch.tensor([1.0, 2.0, 3.0]))
    metric.update(torch.tensor([10.0, 99.0]), torch.tensor([True, False]))
    assert metric.compute() == 4.0
    assert torch.isnan(MeanPerToken().compute())


def test_directions_are_the_papers():
    torch.manual_seed(0)
    head = Head(torch.randn(11, 6))
    teacher, text, speech = (Prediction(torch.randn(5, 6), head) for _ in range(3))
    logits = [prediction.hidden @ head.weight.T for prediction in (teacher, text, speech)]
    torch.testing.assert_close(
        misalignment(text, speech).double(), kl_float64(logits[1], logits[2]), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        forgetting(teacher, text).double(), kl_float64(logits[0], logits[1]), rtol=1e-5, atol=1e-6
    )
    # the two directions differ, so a swapped one would be seen
    assert not torch.allclose(misalignment(text, speech), misalignment(speech, text), rtol=1e-2)

"""What every objective must hold, as tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from salad_lightning.batch import Head, ObjectiveOutput, Prediction
from salad_lightning.interfaces import Objective
from salad_lightning.testing.device_reads import DeviceReads

__all__ = ["ObjectiveContract"]

_VOCAB, _TOKENS = 11, 9
# Heads of a kind that language models have: what stands beside the weights, and how many padding rows they carry.
_HEADS: dict[str, tuple[dict[str, float], bool, int]] = {
    "plain": ({}, False, 0),
    "bias": ({}, True, 0),
    "scale": ({"scale": 0.25}, False, 0),
    "soft_cap": ({"soft_cap": 3.0}, False, 0),
    "padded": ({}, False, 5),
    "all": ({"scale": 1.5, "soft_cap": 4.0}, True, 3),
}


class ObjectiveContract:
    """Subclass it in a test file as ``class TestMine(ObjectiveContract)``; give the objective and a slow reference.

    Student and teacher differ in width and in the padding of their vocabularies throughout.
    """

    def make_objective(self) -> Objective:
        """The objective under test."""
        raise NotImplementedError

    def reference(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The summed loss, a float64 scalar, written as plainly as possible and by other means than the objective.

        Args:
            student_logits: ``[M, V]`` float64, with gradient; the real vocabulary only.
            teacher_logits: ``[M, V]`` float64.
            labels: ``[M]``.
        """
        raise NotImplementedError

    @pytest.mark.parametrize("kind", _HEADS)
    def test_equals_reference(self, kind: str) -> None:
        """Value and all gradients equal those of the float64 reference, for every kind of head."""
        student, teacher, labels = _case(kind)
        output = self._apply(student, teacher, labels)
        output.sum.backward()  # type: ignore[no-untyped-call]
        exact_student = _double(student)
        expected = self.reference(_slow_logits(exact_student), _slow_logits(_double(teacher)).detach(), labels)
        expected.backward()  # type: ignore[no-untyped-call]
        assert output.sum.dtype == torch.float32
        assert_close(output.sum.double(), expected, rtol=1e-5, atol=1e-6)
        assert int(output.count) == _TOKENS
        for mine, exact in zip(_leaves(student), _leaves(exact_student), strict=True):
            assert mine.grad is not None, "a tensor of the student got no gradient"
            assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)

    def test_teacher_gets_no_gradient(self) -> None:
        """The teacher is fixed even where its tensors would take a gradient."""
        student, teacher, labels = _case("all")
        self._objective()(student, teacher, labels).sum.backward()
        assert all(leaf.grad is None for leaf in _leaves(teacher)), "the teacher got a gradient"

    def test_halves_add_up(self) -> None:
        """Sums, counts and parts of two halves add up to those of the whole, so batches can be cut anywhere."""
        student, teacher, labels = _case("all")
        whole = self._apply(student, teacher, labels)
        halves = [
            self._apply(_cut(student, piece), _cut(teacher, piece), labels[piece])
            for piece in (slice(0, 4), slice(4, None))
        ]
        assert_close(halves[0].sum + halves[1].sum, whole.sum, rtol=1e-5, atol=1e-6)
        assert int(halves[0].count) + int(halves[1].count) == int(whole.count)
        assert set(halves[0].parts) == set(whole.parts)
        for name, part in whole.parts.items():
            assert_close(halves[0].parts[name] + halves[1].parts[name], part, rtol=1e-5, atol=1e-6)

    def test_parts(self) -> None:
        """``nll`` is always logged, ``kl`` with a teacher; nothing logged holds on to the graph."""
        student, teacher, labels = _case("plain")
        parts = self._apply(student, teacher, labels).parts
        assert "nll" in parts
        if self._objective().needs_teacher:
            assert "kl" in parts
        for name, part in parts.items():
            assert part.ndim == 0, f"part {name} is not a scalar"
            assert not part.requires_grad, f"part {name} holds on to the graph"
        exact = _slow_logits(_double(student)).softmax(-1)[torch.arange(_TOKENS), labels].log().sum()
        assert_close(parts["nll"].double(), -exact.detach(), rtol=1e-5, atol=1e-6)

    def test_reads_nothing_back_from_the_device(self) -> None:
        """Neither the loss nor its gradient waits for the device."""
        student, teacher, labels = _case("all")
        with DeviceReads() as reads:
            self._apply(student, teacher, labels).sum.backward()  # type: ignore[no-untyped-call]
        assert not reads.found, "\n".join(reads.found)

    def test_nothing_to_predict(self) -> None:
        """With M = 0 the sum is 0, still part of the graph, and the gradient zero, not NaN."""
        student, teacher, labels = _case("all")
        output = self._apply(_cut(student, slice(0, 0)), _cut(teacher, slice(0, 0)), labels[:0])
        assert float(output.sum.detach()) == 0.0
        assert int(output.count) == 0
        assert all(float(part) == 0.0 for part in output.parts.values())
        output.sum.backward()  # type: ignore[no-untyped-call]
        for leaf in _leaves(student):
            assert leaf.grad is not None, "the empty sum is not part of the graph"
            assert bool((leaf.grad == 0).all()), "the gradient of an empty sum is not zero"

    def test_no_divergence_from_itself(self) -> None:
        """KL(p, p) = 0."""
        if not self._objective().needs_teacher:
            pytest.skip("has no teacher")
        student, _, labels = _case("all")
        output = self._apply(student, Prediction(student.hidden.detach(), student.head), labels)
        assert abs(float(output.parts["kl"])) < 1e-5

    def test_disagreement_is_refused(self) -> None:
        """Student, teacher and labels must speak of the same M tokens, and a needed teacher be there."""
        student, teacher, labels = _case("plain")
        with pytest.raises(ValueError, match=r"\d"):
            self._apply(student, teacher, labels[:-1])
        if self._objective().needs_teacher:
            with pytest.raises(ValueError, match=r"\d"):
                self._apply(student, _cut(teacher, slice(1, None)), labels)
            with pytest.raises(ValueError, match="teacher"):
                self._objective()(student, None, labels)

    def test_large_logits_stay_finite(self) -> None:
        """Confident models give logits of hundreds: no overflow in value or gradient."""
        student, teacher, labels = _case("plain")
        student = Prediction(student.hidden, student.head._replace(scale=200.0))
        output = self._apply(student, Prediction(teacher.hidden, teacher.head._replace(scale=200.0)), labels)
        output.sum.backward()  # type: ignore[no-untyped-call]
        assert torch.isfinite(output.sum)
        assert all(leaf.grad is not None and bool(torch.isfinite(leaf.grad).all()) for leaf in _leaves(student))

    def _objective(self) -> Objective:
        return self.make_objective()

    def _apply(self, student: Prediction, teacher: Prediction, labels: Tensor) -> ObjectiveOutput:
        objective = self._objective()
        output: ObjectiveOutput = objective(student, teacher if objective.needs_teacher else None, labels)
        return output


def _case(kind: str) -> tuple[Prediction, Prediction, Tensor]:
    """Student, teacher and labels; the teacher is narrower and its vocabulary padded by one row more."""
    generator = torch.Generator().manual_seed(len(kind))
    settings, bias, padding = _HEADS[kind]

    def prediction(width: int, rows: int) -> Prediction:
        tensors = [
            torch.randn(shape, generator=generator).requires_grad_() for shape in ((_TOKENS, width), (rows, width))
        ]
        head_bias = torch.randn(rows, generator=generator).requires_grad_() if bias else None
        vocab_size = None if rows == _VOCAB else _VOCAB
        head = Head(tensors[1], head_bias, settings.get("scale", 1.0), settings.get("soft_cap"), vocab_size)
        return Prediction(tensors[0], head)

    labels = torch.randint(0, _VOCAB, (_TOKENS,), generator=generator)
    return prediction(8, _VOCAB + padding), prediction(6, _VOCAB + padding + 1), labels


def _leaves(prediction: Prediction) -> list[Tensor]:
    tensors = [prediction.hidden, prediction.head.weight, prediction.head.bias]
    return [tensor for tensor in tensors if tensor is not None]


def _cut(prediction: Prediction, piece: slice) -> Prediction:
    return prediction._replace(hidden=prediction.hidden[piece])


def _double(prediction: Prediction) -> Prediction:
    hidden, weight, *bias = [leaf.detach().double().requires_grad_() for leaf in _leaves(prediction)]
    return Prediction(hidden, prediction.head._replace(weight=weight, bias=bias[0] if bias else None))


def _slow_logits(prediction: Prediction) -> Tensor:
    head = prediction.head
    logits = prediction.hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.soft_cap is not None:
        logits = torch.tanh(logits / head.soft_cap) * head.soft_cap
    return logits[:, :_VOCAB]

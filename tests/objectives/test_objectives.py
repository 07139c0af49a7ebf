from __future__ import annotations

import pytest
import torch

from salad_lightning.batch import Head, Prediction
from salad_lightning.errors import UserError
from salad_lightning.objectives.forward_kl import ForwardKLObjective
from salad_lightning.objectives.jsd import JSDObjective
from salad_lightning.objectives.mixture import MixtureObjective
from salad_lightning.objectives.nll import NLLObjective
from salad_lightning.objectives.reverse_kl import ReverseKLObjective
from salad_lightning.testing.contracts.objective import ObjectiveContract


def slow_nll(student_logits, labels):
    rows = zip(student_logits, labels.tolist(), strict=True)
    return sum(row.exp().sum().log() - row[label] for row, label in rows)


def slow_kl(student_logits, teacher_logits, temperature=1.0):
    total = 0
    for student, teacher in zip(student_logits / temperature, teacher_logits / temperature, strict=True):
        p, q = teacher.exp() / teacher.exp().sum(), student.exp() / student.exp().sum()
        total = total + sum(a * (a / b).log() for a, b in zip(p, q, strict=True))
    return total * temperature**2


class TestNLLObjective(ObjectiveContract):
    def make_objective(self):
        return NLLObjective()

    def reference(self, student_logits, teacher_logits, labels):
        return slow_nll(student_logits, labels)


class TestForwardKLObjective(ObjectiveContract):
    def make_objective(self):
        return ForwardKLObjective()

    def reference(self, student_logits, teacher_logits, labels):
        return slow_kl(student_logits, teacher_logits)


class TestSoftenedForwardKLObjective(ObjectiveContract):
    def make_objective(self):
        return ForwardKLObjective(temperature=2.0)

    def reference(self, student_logits, teacher_logits, labels):
        return slow_kl(student_logits, teacher_logits, temperature=2.0)


def slow_jsd(student_logits, teacher_logits, beta):
    total = 0
    for student, teacher in zip(student_logits, teacher_logits, strict=True):
        p, q = teacher.exp() / teacher.exp().sum(), student.exp() / student.exp().sum()
        middle = beta * p + (1 - beta) * q
        total = total + beta * (p * (p / middle).log()).sum() + (1 - beta) * (q * (q / middle).log()).sum()
    return total


class TestReverseKLObjective(ObjectiveContract):
    def make_objective(self):
        return ReverseKLObjective(temperature=2.0)

    def reference(self, student_logits, teacher_logits, labels):
        return slow_kl(teacher_logits, student_logits, temperature=2.0)


class TestJSDObjective(ObjectiveContract):
    def make_objective(self):
        return JSDObjective(beta=0.3)

    def reference(self, student_logits, teacher_logits, labels):
        return slow_jsd(student_logits, teacher_logits, beta=0.3)


class TestSoftenedJSDObjective(ObjectiveContract):
    def make_objective(self):
        return JSDObjective(temperature=2.0)

    def reference(self, student_logits, teacher_logits, labels):
        return 4 * slow_jsd(student_logits / 2, teacher_logits / 2, beta=0.5)


class TestMixtureObjective(ObjectiveContract):
    def make_objective(self):
        return MixtureObjective(alpha=0.25, temperature=1.5)

    def reference(self, student_logits, teacher_logits, labels):
        return 0.25 * slow_kl(student_logits, teacher_logits, 1.5) + 0.75 * slow_nll(student_logits, labels)


class TestMixtureWithoutTeacher(TestNLLObjective):
    def make_objective(self):
        return MixtureObjective(alpha=0)


class TestMixtureOfTeacherOnly(TestForwardKLObjective):
    def make_objective(self):
        return MixtureObjective(alpha=1)


def case():
    torch.manual_seed(0)
    student = Prediction(torch.randn(5, 4, requires_grad=True), Head(torch.randn(9, 4)))
    return student, Prediction(torch.randn(5, 3), Head(torch.randn(9, 3))), torch.tensor([0, 8, 3, 3, 1])


def test_needs_teacher():
    assert not NLLObjective().needs_teacher
    assert not MixtureObjective(alpha=0.0).needs_teacher
    assert MixtureObjective(alpha=0.01).needs_teacher
    assert ForwardKLObjective().needs_teacher


@pytest.mark.parametrize("objective", [NLLObjective(), MixtureObjective(alpha=0)])
def test_a_teacher_that_is_not_needed_is_logged_without_gradient(objective):
    student, teacher, labels = case()
    alone, logged = objective(student, None, labels), objective(student, teacher, labels)
    assert set(alone.parts) == {"nll"}
    assert set(logged.parts) == {"nll", "kl"}
    assert logged.parts["kl"] > 0
    first, second = (torch.autograd.grad(output.sum, student.hidden)[0] for output in (alone, logged))
    assert torch.equal(first, second)


def test_the_mixture_projects_the_student_once(monkeypatch):
    student, teacher, labels = case()
    widths, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, *rest: widths.append(x.shape[1]) or linear(x, *rest)
    )  # fmt: skip
    MixtureObjective(alpha=0.3)(student, teacher, labels).sum.backward()
    assert widths == [4, 3], "one product for the student, one for the teacher"


@pytest.mark.parametrize(
    ("beta", "weight", "limit"), [(1e-6, 1e-6, ForwardKLObjective), (1 - 1e-6, 1e-6, ReverseKLObjective)]
)
def test_jsd_tends_to_both_directions(beta, weight, limit):
    student, teacher, labels = case()
    student, teacher = (
        Prediction(side.hidden.double(), Head(side.head.weight.double())) for side in (student, teacher)
    )  # fmt: skip
    divergence = JSDObjective(beta=beta)(student, teacher, labels).sum / weight
    torch.testing.assert_close(divergence, limit()(student, teacher, labels).sum, rtol=1e-3, atol=0)


def test_parts_spell_the_sum():
    output = MixtureObjective(alpha=0.3)(*case())
    torch.testing.assert_close(output.sum.detach(), 0.3 * output.parts["kl"] + 0.7 * output.parts["nll"])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(UserError, match=r"MixtureObjective: alpha"):
        MixtureObjective(alpha=alpha)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, float("nan")])
def test_beta_outside_its_range_is_refused(beta):
    with pytest.raises(UserError, match=r"JSDObjective: beta"):
        JSDObjective(beta=beta)


@pytest.mark.parametrize("kind", [ForwardKLObjective, ReverseKLObjective, JSDObjective, MixtureObjective])
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_that_is_not_positive_is_refused(kind, temperature):
    with pytest.raises(UserError, match=r"temperature must be positive"):
        kind(temperature=temperature)

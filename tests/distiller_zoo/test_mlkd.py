"""MLKD: its terms, its shares, its two passes."""

import copy

import pytest
import torch
from torch.nn import functional as F

from dataset import Batch
from distiller_zoo.kd import kl_divergence
from distiller_zoo.mlkd import correlation_losses, unsure_shares
from tests.check_values import STUDENT_LOGITS, TARGETS, TEACHER_LOGITS
from tests.distiller_zoo.helpers import PROGRESS, build, build_alone, each_with


def test_the_terms_of_mlkd_are_its_formula():
    """Each view with its own logits at all temperatures; the shares on the weak view's terms."""
    temperatures = (4.0, 3.0, 5.0, 2.0, 6.0)
    method = build_alone("mlkd", gamma=0.1, alpha=0.9, beta=0.7)
    assert method.mlkd_temperatures == temperatures
    student, teacher = (STUDENT_LOGITS, STUDENT_LOGITS.flip(1)), (TEACHER_LOGITS, TEACHER_LOGITS.roll(3, 1))
    losses = method.losses(*(each_with(torch.cat(each)) for each in (student, teacher)), TARGETS, TARGETS, None)
    weak, strong = (sum(kl_divergence(s, t, T) for T in temperatures) for s, t in zip(student, teacher, strict=True))
    class_level, batch_level = (
        sum(correlation_losses(student[0], teacher[0], T)[level] for T in temperatures) for level in (0, 1)
    )
    expected = {
        "ce": 0.1 * F.cross_entropy(student[0], TARGETS),
        "ce_strong": 0.1 * F.cross_entropy(student[1], TARGETS),
        "kd": 0.9 * 0.5 * weak,
        "kd_strong": 0.9 * strong,
        "class": 0.7 * 0.5 * class_level,
        "batch": 0.7 * 0.5 * batch_level,
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses[name]) == pytest.approx(float(value), rel=1e-12), name


def test_the_shares_of_mlkd_are_of_what_the_teacher_is_at_most_median_sure_of():
    images, classes = unsure_shares(TEACHER_LOGITS)
    assert (float(images), float(classes)) == (0.5, 0.5)
    assert [float(share) for share in unsure_shares(torch.zeros(4, 10))] == [1.0, 1.0]
    one_sure = torch.zeros(4, 10)
    one_sure[2, 5] = 3.0
    assert [float(share) for share in unsure_shares(one_sure)] == pytest.approx([0.75, 0.9])


def test_each_view_has_its_own_batch_statistics_and_the_weak_one_comes_first():
    teacher, method = build("mlkd")
    method.train()
    alone = copy.deepcopy(method.student)
    weak, strong = torch.randn(4, 3, 32, 32), 3 * torch.randn(4, 3, 32, 32) + 1
    shown = method.respond(torch.cat([weak, strong]), None).logits
    expected = [alone(weak), alone(strong)]
    assert torch.equal(shown, torch.cat(expected))
    assert all(torch.equal(a, b) for a, b in zip(method.student.buffers(), alone.buffers(), strict=True))
    assert torch.equal(method.eval().predict(weak[:1]), alone.eval()(weak[:1]))
    batch = Batch(torch.cat([weak, strong]), torch.arange(4), torch.arange(4))
    logits, _ = method(batch, teacher(batch.images), PROGRESS)
    assert torch.equal(logits, alone(weak)), "what the training accuracy is of"


def test_standardised_mlkd_compares_correlations_of_raw_logits():
    arguments = (TARGETS, TARGETS, None)
    student, teacher = (torch.cat([each, each.flip(1)]) for each in (STUDENT_LOGITS, TEACHER_LOGITS))
    raw, standardised = (
        build_alone("mlkd", alpha=1.0, logit_standardization=on).losses(
            each_with(student), each_with(teacher), *arguments
        )
        for on in (False, True)
    )
    for term in raw:
        assert (raw[term] == standardised[term]) == (term not in ("kd", "kd_strong")), term

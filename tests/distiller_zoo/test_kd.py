"""KD: standardised logits."""

import pytest
import torch

from distiller_zoo import Progress
from distiller_zoo.kd import standardise
from tests.check_values import STUDENT_LOGITS, TARGETS, TEACHER_LOGITS
from tests.distiller_zoo.helpers import build_alone, close, each_with


def test_logits_are_standardised_per_sample_by_the_unbiased_deviation():
    standard = standardise(STUDENT_LOGITS)
    assert standard.mean(1).tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert standard.square().sum(1).tolist() == pytest.approx([9.0] * 4, rel=1e-6)
    assert torch.equal(standardise(torch.full((2, 10), 3.0)), torch.zeros(2, 10))


def test_standardised_kd_is_the_papers_total():
    """Raw logits with the labels, standardised ones with the teacher."""
    method = build_alone("kd", gamma=0.1, alpha=9.0, kd_T=2.0, logit_standardization=True)
    logits = STUDENT_LOGITS, TEACHER_LOGITS
    losses = method.losses(*(each_with(each) for each in logits), TARGETS, TARGETS, Progress(0, 240))
    close([losses["ce"], losses["kd"]], [0.1 * 2.5942054000, 9 * 0.7323762331])


def test_what_is_exported_is_in_eval_mode_and_independent():
    method = build_alone("kd").train()
    exported = method.export()
    assert not any(module.training for module in exported.modules()) and method.student.training
    assert not {*exported.parameters()} & {*method.parameters()}

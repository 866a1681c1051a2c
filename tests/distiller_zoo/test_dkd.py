"""DKD: its two parts and their rise."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo import Progress
from distiller_zoo.dkd import decoupled_losses
from distiller_zoo.kd import kl_divergence
from tests.check_values import STUDENT_LOGITS, TARGETS, TEACHER_LOGITS
from tests.distiller_zoo.helpers import (
    build_alone,
    close,
    logit_outputs,
)


def test_the_two_parts_of_dkd_make_up_kd():
    """KD = TCKD + (1 - p_target of the teacher) * NCKD, equation 7 of the paper, for one image."""
    for row in range(4):
        logits = [each[row : row + 1] / 4 for each in (STUDENT_LOGITS, TEACHER_LOGITS)]
        target, others = decoupled_losses(*logits, TARGETS[row : row + 1], 1.0)
        others_share = 1 - logits[1].softmax(1)[0, TARGETS[row]]
        assert float(target + others_share * others) == pytest.approx(float(kl_divergence(*logits, 1.0)), rel=1e-12)


def test_dkd_is_the_published_formula_where_that_is_defined():
    """Two-class distributions of probabilities, and the target removed by subtracting 1000."""
    student, teacher = (each.clone() / 4 for each in (STUDENT_LOGITS, TEACHER_LOGITS))
    truth = F.one_hot(TARGETS, 10).double()
    pairs = []
    for logits in (student, teacher):
        target = (logits.softmax(1) * truth).sum(1)
        pairs.append((torch.stack([target, 1 - target], 1), (logits - 1000 * truth).softmax(1).clamp_min(1e-300)))
    expected = [16 * F.kl_div(ours.log(), theirs, reduction="sum") / 4 for ours, theirs in zip(*pairs, strict=True)]
    close(decoupled_losses(STUDENT_LOGITS, TEACHER_LOGITS, TARGETS, 4.0), [float(value) for value in expected])


def test_the_weight_of_dkd_rises_over_its_first_epochs():
    method = build_alone("dkd", warmup_epochs=4)
    arguments = (logit_outputs(STUDENT_LOGITS), logit_outputs(TEACHER_LOGITS), TARGETS, TARGETS)
    values = [float(method.losses(*arguments, Progress(epoch, 240))["nckd"]) for epoch in range(6)]
    full = values[-1]
    assert [value / full for value in values] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    method.warmup_epochs = 0
    assert float(method.losses(*arguments, Progress(0, 240))["nckd"]) == full

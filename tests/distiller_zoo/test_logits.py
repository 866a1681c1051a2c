"""The losses of logits: published values, derivatives, gaps, weights, standardisation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller_zoo import DISTILLERS, Progress
from distiller_zoo.dist import relation_losses
from distiller_zoo.dkd import decoupled_losses
from distiller_zoo.kd import kl_divergence, standardise
from distiller_zoo.mlkd import correlation_losses
from distiller_zoo.sskd import selected_divergence, similarities, sources
from tests.check_values import STUDENT_LOGITS, TARGETS, TEACHER_LOGITS, g
from tests.conftest import pair_networks
from tests.distiller_zoo.helpers import TASK, build_alone, close, each_with, logit_outputs

LOGIT_LOSSES = {
    "kd": lambda s, t: kl_divergence(s, t, 4.0),
    "standardised kd": lambda s, t: kl_divergence(standardise(s), standardise(t), 2.0),
    "dkd": lambda s, t: sum(decoupled_losses(s, t, TARGETS, 4.0)),
    "dist": lambda s, t: sum(relation_losses(s, t, 1.0)),
    "mlkd": lambda s, t: sum(correlation_losses(s, t, 4.0)),
    "sskd": lambda s, t: selected_divergence(s, t, torch.tensor([True, False, True, True]), 4.0),
}


def test_check_values():
    logits = STUDENT_LOGITS, TEACHER_LOGITS
    close(decoupled_losses(*logits, TARGETS, 4.0), [0.1623148556, 2.5869784487])
    close(relation_losses(*logits, 1.0), [0.7942510521, 0.8946205901])
    close(relation_losses(*logits, 4.0), [14.2573050871, 15.5601571448])
    close(correlation_losses(*logits, 4.0), [0.0014464735, 0.0014229437])
    close([kl_divergence(*logits, 4.0)], [2.5535618153])
    close([kl_divergence(*map(standardise, logits), 2.0)], [0.7323762331])
    # The check vector lists the four views of an image together; here the views come one after the other.
    representations = g((12, 6), 0.7, 0.2).view(3, 4, 6).transpose(0, 1).reshape(12, 6)
    rows = similarities(representations)
    close([F.cross_entropy(rows, sources(rows))], [1.3682024717])


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_gradients_are_the_derivatives(name):
    student = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: LOGIT_LOSSES[name](logits, TEACHER_LOGITS), student)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("gap", [500.0, 5000.0])
def test_large_gaps_constant_rows_and_doubled_rows_stay_finite(name, gap):
    far = torch.zeros(4, 10)
    far[:, 3] = gap
    for student, teacher in ((far, -far), (torch.zeros(4, 10), far), (far, torch.zeros(4, 10)), (far, far)):
        student = student.clone().requires_grad_()
        loss = LOGIT_LOSSES[name](student, teacher)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("name", "flags", "starts"),
    [
        ("kd", {"alpha": 1.0}, False),
        ("kd", {"alpha": 1.0, "logit_standardization": True}, True),
        ("dist", {}, True),
        ("norm", {}, True),
        ("norm", {"ceta": 0.0}, False),
    ],
)
def test_a_classifier_of_zeros_is_started_where_logits_are_standardised(name, flags, starts):
    teacher, student = pair_networks("resnet14", "resnet8")
    for value in student.fc.parameters():
        nn.init.zeros_(value)
    method = DISTILLERS[name](student, teacher, TASK, **flags)
    assert student.fc.weight.any() == starts
    assert any("classifier began as torch's" in note for note in method.notes()) == starts
    again = DISTILLERS[name](copy.deepcopy(student), teacher, TASK, **flags)
    assert torch.equal(again.student.fc.weight, student.fc.weight) and (not starts or not again.notes())


@pytest.mark.parametrize(
    ("name", "flag", "term", "value"),
    [
        ("kd", "alpha", "kd", 0.5),
        ("dkd", "dkd_alpha", "tckd", 1.0),
        ("dkd", "dkd_beta", "nckd", 1.0),
        ("dkd", "gamma", "ce", 1.0),
        ("dist", "beta", "inter", 1.0),
        ("dist", "beta", "intra", 1.0),
        ("mlkd", "alpha", "kd", 1.0),
        ("mlkd", "alpha", "kd_strong", 1.0),
        ("mlkd", "beta", "class", 1.0),
        ("mlkd", "beta", "batch", 1.0),
        ("mlkd", "gamma", "ce_strong", 1.0),
        ("sskd", "alpha", "kd", 1.0),
        ("sskd", "tf_weight", "tf", 1.0),
        ("sskd", "ss_weight", "ss", 1.0),
    ],
)
def test_a_weight_doubles_its_term_alone(name, flag, term, value):
    views = {"mlkd": 2, "sskd": 4}.get(name, 1)
    torch.manual_seed(0)
    method = build_alone(name, **{flag: value})
    student, teacher = (
        logit_outputs(torch.cat([logits * (1 + view / 8) for view in range(views)]))
        for logits in (STUDENT_LOGITS, TEACHER_LOGITS)
    )
    before = method.losses(student, teacher, TARGETS, TARGETS, Progress(239, 240))
    setattr(method, flag, 2 * value)
    after = method.losses(student, teacher, TARGETS, TARGETS, Progress(239, 240))
    for key in before:
        shared = name in ("mlkd", "dist") and getattr(method, flag) and key != term  # one flag, several terms
        if key == term:
            assert after[key].item() == pytest.approx(2 * before[key].item(), rel=1e-5) and before[key] > 0
        elif not shared:
            assert after[key] == before[key]


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "mlkd", "sskd"])
def test_standardised_logits_do_not_feel_scale_and_shift(name):
    views = {"mlkd": 2, "sskd": 4}.get(name, 1)
    kd = {"alpha": 1.0} if name in ("kd", "mlkd", "sskd") else {}
    student, teacher = (torch.cat([logits] * views) for logits in (STUDENT_LOGITS, TEACHER_LOGITS))
    for standardised, same in ((True, True), (False, False)):
        torch.manual_seed(0)
        method = build_alone(name, gamma=0.0, logit_standardization=standardised, **kd)
        arguments = (TARGETS, TARGETS, Progress(239, 240))
        plain = method.losses(logit_outputs(student), logit_outputs(teacher), *arguments)
        scaled = method.losses(logit_outputs(3 * student + 7), logit_outputs(teacher), *arguments)
        changed = [key for key in plain if scaled[key].item() != pytest.approx(plain[key].item(), rel=1e-4)]
        raw = {"class", "batch"} if name == "mlkd" and standardised else set()  # MLKD standardises for its KL alone
        assert (not set(changed) - raw) is same and raw <= set(changed), changed


@pytest.mark.parametrize("name", ["kd", "dkd", "mlkd"])
def test_one_image_is_enough(name):
    method = build_alone(name, **({"alpha": 1.0} if name != "dkd" else {}))
    rows = 2 if name == "mlkd" else 1
    student, teacher = (logits[:rows].clone() for logits in (STUDENT_LOGITS, TEACHER_LOGITS))
    losses = method.losses(
        each_with(student.requires_grad_()), each_with(teacher), TARGETS[:1], TARGETS[:1], Progress(0, 1)
    )
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values()) and torch.isfinite(student.grad).all()

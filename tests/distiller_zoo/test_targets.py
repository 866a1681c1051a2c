"""Targets of every method: classes or shares, label smoothing and class weights in every cross entropy."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller_zoo import DISTILLERS, Distiller
from distiller_zoo.dkd import decoupled_losses
from helper.loops import set_modes
from tests.check_values import STUDENT_LOGITS, TARGETS, TEACHER_LOGITS
from tests.distiller_zoo.helpers import PROGRESS, TASK, batch_of, build

MIXING = [name for name, method in DISTILLERS.items() if not method.refuses_mixing]
SHARES = 0.7 * F.one_hot(TARGETS, 10).double() + 0.3 * F.one_hot(TARGETS.roll(1), 10).double()
WEIGHTS = torch.linspace(0.5, 2.0, 10)


class Labels(Distiller):
    """Nothing but the contract."""


def labels(**of_task) -> Labels:
    return Labels(nn.Identity(), None, TASK._replace(**of_task)).double()


def written_out(logits, targets, smoothing=0.0, weights=None):
    targets = (F.one_hot(targets, 10) if targets.ndim == 1 else targets).double()
    smoothed = (1 - smoothing) * targets + smoothing / 10
    weights = torch.ones(10) if weights is None else weights
    return -(smoothed * weights.double() * logits.log_softmax(1)).sum(1).mean()


@pytest.fixture(autouse=True)
def _no_batch_norm_check(monkeypatch):
    monkeypatch.setattr("distiller_zoo.base.normalises_single_values", lambda student, size: False)


@pytest.mark.parametrize("targets", [TARGETS, SHARES], ids=["classes", "shares"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_the_cross_entropy_is_its_formula(targets, smoothing, weights):
    method = labels(label_smoothing=smoothing, class_weights=weights)
    found = method.cross_entropy(STUDENT_LOGITS, targets)
    assert torch.allclose(found, written_out(STUDENT_LOGITS, targets, smoothing, weights), rtol=1e-12)
    halves = [method.cross_entropy(*parts) for parts in zip(STUDENT_LOGITS.split(2), targets.split(2), strict=True)]
    assert torch.allclose(sum(halves) / 2, found, rtol=1e-12), "the mean of micro-batches is the batch's"


def test_without_them_the_cross_entropy_is_torchs_to_the_bit():
    logits = STUDENT_LOGITS.float()
    assert torch.equal(labels().cross_entropy(logits, TARGETS), F.cross_entropy(logits, TARGETS))
    assert not labels(class_weights=WEIGHTS).state_dict(), "class weights are no part of a checkpoint"


def build_with_labels(name: str, **values: float):
    """A method whose cross entropy is on, with those of the values that it has."""
    known = {flag.argument for flag in DISTILLERS[name].flags}
    return build(name, **{flag: value for flag, value in ({"gamma": 1.0} | values).items() if flag in known})


def losses_of(method, frozen, batch, targets) -> dict:
    torch.manual_seed(3)
    output = frozen(batch.images, method.teacher_preact) if method.reads_teacher else None
    _, losses = method(batch._replace(targets=targets), output, PROGRESS)
    return losses


@pytest.mark.parametrize("name", MIXING)
def test_shares_of_one_class_are_that_class_and_shares_of_two_train(name):
    frozen, method = build_with_labels(name, alpha=1.0)
    set_modes(method.main_stage(240), method)
    batch = batch_of(method)
    truth = F.one_hot(batch.targets, 10).float()
    hard, soft = (losses_of(method, frozen, batch, targets) for targets in (batch.targets, truth))
    assert hard.keys() == soft.keys()
    for term in hard:
        assert torch.allclose(hard[term], soft[term], rtol=1e-4, atol=1e-6), term
    mixed = losses_of(method, frozen, batch, 0.6 * truth + 0.4 * truth.roll(1, 0))
    total = sum(mixed.values())
    total.backward()
    assert total.isfinite() and any(not torch.equal(mixed[term], hard[term]) for term in mixed if "ce" in term)


def test_methods_refuse_mixed_images_with_a_reason():
    refusing = {name for name, method in DISTILLERS.items() if method.refuses_mixing}
    assert refusing == {"crd", "norm_crd", "sskd"}
    assert all("\n" not in DISTILLERS[name].refuses_mixing for name in refusing)


@pytest.mark.parametrize("name", DISTILLERS)
def test_label_smoothing_and_class_weights_reach_every_cross_entropy_and_nothing_else(name):
    torch.manual_seed(0)
    frozen, method = build_with_labels(name)
    batch = batch_of(method)
    smoothing, weighted = copy.deepcopy(method), copy.deepcopy(method)
    smoothing.label_smoothing, weighted.class_weights = 0.2, torch.full((10,), 2.0)
    with torch.no_grad():
        before, smoothed, doubled = (
            losses_of(each, frozen, batch, batch.targets) for each in (method, smoothing, weighted)
        )
    for term, value in before.items():
        if term.startswith("ce"):
            assert not torch.equal(smoothed[term], value) and torch.allclose(doubled[term], 2 * value), term
        else:
            assert torch.allclose(smoothed[term], value) and torch.allclose(doubled[term], value), term
    assert any(term.startswith("ce") for term in before)


def test_dkd_of_mixed_images_is_the_mean_over_their_classes():
    mixed = decoupled_losses(STUDENT_LOGITS, TEACHER_LOGITS, SHARES, 4.0)
    own = decoupled_losses(STUDENT_LOGITS, TEACHER_LOGITS, TARGETS, 4.0)
    other = decoupled_losses(STUDENT_LOGITS, TEACHER_LOGITS, TARGETS.roll(1), 4.0)
    for found, first, second in zip(mixed, own, other, strict=True):
        assert torch.allclose(found, 0.7 * first + 0.3 * second, rtol=1e-12)


def test_the_gradient_of_dkd_on_mixed_images():
    logits = STUDENT_LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sum(decoupled_losses(x, TEACHER_LOGITS, SHARES, 4.0)), logits)

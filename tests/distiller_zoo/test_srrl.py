"""SRRL: both forms, the connector."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.check_values import g
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import build, doubles, outputs, parts_that_differ, take_steps

S6, T6 = g((4, 6, 8, 8), 0.29, 0.9), g((4, 6, 8, 8), 0.37, 0.2)


def test_srrls_statistics_have_the_published_value():
    _, method = build("srrl", srrl_form="map")
    method.connector, method.teacher_classifier = nn.Identity(), nn.Identity()
    pooled = T6.mean((2, 3))
    student, teacher = outputs([S6], S6.mean((2, 3))), outputs([T6], pooled)
    teacher = teacher._replace(logits=S6.mean((2, 3)))  # the term of the logits is 0
    assert method.feature_loss(student, teacher, None, None).item() == pytest.approx(0.0017330749, abs=5e-11)


def test_srrls_forms_are_the_formula():
    teacher, method = build("srrl", ("vgg13", "resnet8"))
    batch = make_batch(5)
    student_output, teacher_output = method.student.outputs(batch.images), teacher(batch.images)
    conv, bn, _ = method.connector
    for form in ("pooled", "map"):
        method.srrl_form = form
        if form == "map":
            projected = F.conv2d(student_output.activated, conv.weight)
            vector = F.relu(F.batch_norm(projected, None, None, bn.weight, bn.bias, True)).mean((2, 3))
        else:
            projected = student_output.pooled @ conv.weight[:, :, 0, 0].T
            vector = F.relu(F.batch_norm(projected, None, None, bn.weight, bn.bias, True))
        logits = vector @ teacher.network.classifier.weight.T + teacher.network.classifier.bias
        expected = (vector - teacher_output.pooled).square().mean() + (logits - teacher_output.logits).square().mean()
        loss = method.feature_loss(student_output, teacher_output, None, None)
        assert torch.allclose(loss, expected, rtol=1e-4), form


def test_srrl_trains_through_the_teachers_classifier_and_leaves_it_alone():
    teacher, method = build("srrl")
    connector = {name: value.clone() for name, value in method.connector.state_dict().items()}
    take_steps(method, teacher, [make_batch()])
    own, theirs = method.teacher_classifier.state_dict(), teacher.network.get_classifier().state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    assert "0.weight" in parts_that_differ(method.connector, connector)


def test_srrls_connector_starts_as_published():
    for form, deviation in (("map", (2 / 512) ** 0.5), ("pooled", (3 * 512) ** -0.5)):
        _, method = build("srrl", ("vgg13", "vgg8"), srrl_form=form)
        assert method.connector[0].weight.std().item() == pytest.approx(deviation, rel=0.01)


@pytest.mark.parametrize("form", ["pooled", "map"])
def test_the_gradient_of_srrl(form):
    _, method = build("srrl", srrl_form=form)
    method = method.double()
    method.connector[2] = nn.Identity()  # no kinks where the differences are taken
    teacher = outputs([T6], torch.randn(3, 64, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64))

    def loss(feature_map):
        return method.feature_loss(outputs([feature_map], feature_map.mean((2, 3))), teacher, None, None)

    assert torch.autograd.gradcheck(loss, doubles((3, 64, 1, 2)), fast_mode=True)

"""AB: the boundary loss, connectors."""

import pytest
import torch

from distiller_zoo.abound import ABLoss
from helper.loops import set_modes
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import PROGRESS, build, close, random_maps, train_step


def plain_boundary(student, teacher):
    """One layer of weight 1: a loop over neurons."""
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        if t <= 0 and s > -1:
            total += (s + 1) ** 2
        if t > 0 and s <= 1:
            total += (s - 1) ** 2
    return total * 3 / 1000 / len(student)


def test_ab_is_the_formula_and_weighs_deeper_layers_more():
    student, teacher = random_maps((3, 4, 2, 2), (3, 4, 2, 2), scale=2)
    teacher[0] = 0  # on the boundary: off
    plain = plain_boundary(student, teacher)
    close(ABLoss(3)([student] * 3, [teacher] * 3), [plain / 4, plain / 2, plain])
    wide = ABLoss(1, margin=2.0)([2 * student], [teacher])
    close(wide, [4 * plain])  # the square scales


def take_steps(stage, method, teacher, steps=3):
    set_modes(stage, method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    for _ in range(steps):
        batch = make_batch()
        output = teacher(batch.images, method.teacher_preact) if stage.reads_teacher else None
        losses, _ = train_step(method, stage, optimizer, batch, output, PROGRESS)
    return losses


@pytest.mark.parametrize("name", ["abound", "fsp"])
def test_the_first_stage_is_of_the_layers_below_the_head(name):
    teacher, method = build(name, init_epochs=7)
    first, main = method.stages(240)
    assert (first.epochs, first.learning_rate, first.milestones) == (7, None, ())
    trained = {id(parameter) for module in first.trained for parameter in module.parameters()}
    assert id(method.student.conv1.weight) in trained and id(method.student.fc.weight) not in trained
    assert set(take_steps(first, method, teacher)) == {name}
    assert not main.reads_teacher
    assert set(take_steps(main, method, teacher)) == {"ce"}
    assert build(name, alpha=1.0)[1].stages(240)[-1].reads_teacher


def test_ab_reads_maps_before_their_relu_without_the_stems():
    teacher, method = build("abound")
    assert method.student_preact and method.teacher_preact
    first, _ = method.stages(240)
    images = torch.randn(4, 3, 32, 32)
    method.eval()
    with torch.no_grad():
        student, output = first.respond(images, None), teacher(images, preact=True)
        (_, *student_maps), (_, *teacher_maps) = student.maps, output.maps
        expected = sum(
            plain_boundary(s, t) * 0.5 ** (2 - i)
            for i, (s, t) in enumerate(zip(student_maps, teacher_maps, strict=True))
        )
    assert min(each.min() for each in student_maps) < 0
    assert first.losses(student, output, None, None, PROGRESS)["abound"].item() == pytest.approx(expected, rel=1e-5)


def test_ab_leaves_the_deeper_layers_of_the_longer_network_out():
    for pair, layers in ((("vgg8", "resnet8"), 3), (("resnet14", "vgg8"), 3), (("vgg13", "MobileNetV2"), 4)):
        teacher, method = build("abound", pair)
        assert len(method.connector.connectors) == len(method.criterion.weights) == layers
        assert method.criterion.weights[-1] == 1
        assert torch.isfinite(take_steps(method.stages(240)[0], method, teacher, 1)["abound"])

"""FitNet: the regressor, the compared layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller_zoo.hint import ConvReg
from errors import UserError
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import PROGRESS, build


@pytest.mark.parametrize(
    ("student", "teacher", "kernel", "is_transposed"),
    [
        ((8, 16, 16), (6, 16, 16), (1, 1), False),
        ((8, 16, 16), (6, 8, 8), (3, 3), False),
        ((8, 8, 8), (6, 16, 16), (4, 4), True),
        ((8, 8, 8), (6, 5, 5), (4, 4), False),
        ((8, 8, 6), (6, 5, 5), (4, 2), False),
        ((8, 4, 4), (6, 1, 1), (4, 4), False),
    ],
)
def test_the_regressor_gives_the_teachers_shape(student, teacher, kernel, is_transposed):
    for shapes in ((student, teacher), ((2, *student), (7, *teacher))):
        regressor = ConvReg(*shapes)
        assert regressor.conv.kernel_size == kernel and isinstance(regressor.conv, nn.ConvTranspose2d) == is_transposed
        result = regressor(torch.randn(2, *student))
        assert result.shape == (2, *teacher) and result.min() >= 0
        assert ConvReg(*shapes, use_relu=False)(torch.randn(2, *student)).min() < 0


@pytest.mark.parametrize(("student", "teacher"), [((8, 4, 4), (6, 16, 16)), ((8, 8, 4), (6, 8, 8))])
def test_the_regressor_refuses_what_it_cannot_bridge(student, teacher):
    with pytest.raises(UserError, match=f"--model_s: .*{student[1]} pixels high, the teacher's {teacher[1]}"):
        ConvReg(student, teacher)


@pytest.mark.parametrize("hint_layer", range(4))
def test_the_hint_layer_chooses_the_map(hint_layer):
    teacher, method = build("hint", ("wrn_16_2", "resnet8"), hint_layer=hint_layer)
    batch = make_batch(4)
    student_output, teacher_output = method.student.outputs(batch.images), teacher(batch.images)
    expected = F.mse_loss(method.regressor(student_output.maps[hint_layer]), teacher_output.maps[hint_layer])
    losses = method.losses(student_output, teacher_output, batch.targets, batch.index, PROGRESS)
    assert torch.allclose(losses["hint"], expected)


@pytest.mark.parametrize(
    ("pair", "hint_layer", "message"),
    [
        (("vgg13", "resnet8"), 4, r"--hint_layer: there is no map 4 .* choose a number from 0 to 3"),
        (("vgg13", "vgg8"), 5, r"from 0 to 4"),
        (("vgg13", "vgg8"), -1, r"--hint_layer: there is no map -1"),
    ],
)
def test_a_hint_layer_that_does_not_exist_is_refused(pair, hint_layer, message):
    with pytest.raises(UserError, match=message):
        build("hint", pair, hint_layer=hint_layer)

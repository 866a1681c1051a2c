"""SimKD: the projector, the reused classifier, what is shipped."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller_zoo import Predictor, Progress
from distiller_zoo.simkd import SimKD
from errors import UserError
from models import build_model
from models.backbone import probe_shapes
from models.cost import count_parameters
from models.wrappers import ReusedClassifier
from tests.conftest import make_batch, pair_networks
from tests.distiller_zoo.helpers import TASK, build, take_steps

PAIRS = (
    ("resnet14", "resnet8"),
    ("wrn_16_2", "wrn_16_1"),
    ("vgg13", "vgg8"),
    ("resnet14", "MobileNetV2"),
    ("vgg13", "ShuffleV2"),
    ("ShuffleV2", "wrn_16_1"),
    ("MobileNetV2", "resnet8"),
)


def test_simkd_trains_on_one_image():
    teacher, method = build("simkd", batch_size=1)
    assert torch.isfinite(take_steps(method, teacher, [make_batch(1)])[0]["simkd"])


def test_simkd_reuses_a_classifier_without_a_bias():
    teacher, student = pair_networks("resnet14", "resnet8")
    teacher.fc = nn.Linear(64, 10, bias=False)
    shipped = SimKD(student, teacher, TASK).export()
    assert torch.equal(shipped.classifier.weight, teacher.fc.weight) and not shipped.classifier.bias.any()


def test_simkds_projector_has_the_published_size():
    _, method = build("simkd", ("resnet32x4", "resnet8x4"))
    assert count_parameters(method.student.projector) == 214_016
    assert [type(layer) for layer in method.student.projector] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    _, narrower = build("simkd", ("resnet32x4", "resnet8x4"), projector_factor=4)
    assert count_parameters(narrower.student.projector) < 214_016 / 2
    with pytest.raises(UserError, match="--projector_factor: must be at most 64"):
        build("simkd", projector_factor=65)


@pytest.mark.quick(3)
@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
def test_simkd_ships_student_projector_and_the_teachers_classifier(pair):
    teacher, method = build("simkd", pair, gamma=1.0)  # whose gradient reaches the classifier
    plain = build_model(pair[1], 10)
    take_steps(method, teacher, [make_batch() for _ in range(3)])
    method.double().eval()
    exported, images = method.export(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(exported(images), Predictor(method)(images))
        output = exported.outputs(images)
        classifier = teacher.network.get_classifier()
        pooled = output.activated.mean((2, 3)).float()
        assert torch.allclose(output.logits.float(), classifier(pooled), rtol=1e-4, atol=1e-5)
    assert isinstance(exported, ReusedClassifier) and not exported.training
    assert not any(a is b for a in exported.parameters() for b in method.parameters())
    assert count_parameters(exported) == (
        count_parameters(plain)
        - count_parameters(plain.get_classifier())
        - sum(count_parameters(plain.get_submodule(name)) for name in plain.head)
        + count_parameters(method.student.projector)
        + sum(values.numel() for values in classifier.parameters())
    )
    shapes, of_teacher = probe_shapes(exported, 32), probe_shapes(build_model(pair[0], 10), 32)
    assert shapes.pooled == of_teacher.pooled and shapes.final[0] == of_teacher.final[0]
    assert shapes.final[1] == min(probe_shapes(plain, 32).final[1], of_teacher.final[1])
    assert f"{count_parameters(method.student.projector):,}" in method.export_note()


@pytest.mark.parametrize("pair", [("wrn_16_2", "wrn_16_1"), ("vgg13", "resnet8"), ("resnet14", "MobileNetV2")])
def test_simkd_projects_the_last_stage_output_to_the_map_that_the_teacher_pools(pair):
    teacher, method = build("simkd", pair)
    batch = make_batch()
    method.train()
    reference = copy.deepcopy(method.student)
    output = teacher(batch.images)
    losses = method(batch, output, Progress(0, 240))[1]
    (*_, student_map), _ = reference.network.forward_maps(batch.images)
    teacher_map = output.activated
    size = min(student_map.shape[2], teacher_map.shape[2])
    student_map, teacher_map = (F.adaptive_avg_pool2d(each, size) for each in (student_map, teacher_map))
    assert set(losses) == {"simkd"}
    assert torch.allclose(losses["simkd"], F.mse_loss(reference.projector(student_map), teacher_map), rtol=1e-5)
    assert output.activated.min() >= 0, "the projector ends with a ReLU"


@pytest.mark.parametrize(("student", "channels"), [("MobileNetV2", 160), ("ShuffleV2", 464), ("wrn_16_1", 64)])
def test_simkd_reads_stage_outputs_and_does_not_ship_what_is_behind_them(student, channels):
    _, method = build("simkd", ("resnet14", student))
    assert method.student.projector[0].in_channels == channels
    plain = build_model(student, 10)
    behind = [name for name in method.student.network.state_dict() if name.split(".")[0] in plain.head]
    assert plain.head and not behind
    assert isinstance(method.student.network.get_submodule(plain.head[0]), nn.Identity)

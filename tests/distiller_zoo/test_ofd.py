"""OFD: margins, layers, distances."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller_zoo import DISTILLERS
from distiller_zoo.ofd import margins, partial_distance
from tests.conftest import pair_networks
from tests.distiller_zoo.helpers import TASK, build, close, random_maps

PAIRS = (
    ("resnet14", "resnet8"),
    ("wrn_16_2", "wrn_16_1"),
    ("wrn_40_1", "wrn_16_1"),
    ("vgg13", "vgg8"),
    ("vgg13", "MobileNetV2"),
    ("resnet14", "ShuffleV2"),
    ("MobileNetV2", "wrn_16_1"),
)


def test_margins_have_the_published_values():
    golden = [-0.7978845608, -0.3075128801, -2.0183208677, -0.3]
    weight, bias = torch.tensor([[1.0, 0.5, -2.0, 0.1], [0.0, 0.3, -1.0, 1.0]], dtype=torch.float64)
    close(margins(weight, bias), golden)
    dead = margins(torch.zeros(3), torch.tensor([0.0, 1.0, -1.0]))  # the channel is its bias
    assert dead.dtype == torch.float32
    assert torch.allclose(dead, torch.tensor([0.0, 0.0, -1.0]), atol=1e-6)


def test_ofd_is_the_formula():
    student, teacher = random_maps((3, 4, 2, 2), (3, 4, 2, 2))
    total = 0.0
    for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        if s > t or t > 0:
            total += (s - t) ** 2
    close([partial_distance(student, teacher)], [total / 3])


@pytest.mark.parametrize("pair", (*PAIRS, ("vgg13", "resnet8"), ("resnet14", "vgg8")), ids="->".join)
def test_ofd_compares_the_deepest_layers_against_the_teachers_margins(pair):
    teacher, method = build("ofd", pair)
    method.train()
    images = torch.randn(4, 3, 32, 32)
    student_output, teacher_output = method.respond(images, None), teacher(images, preact=True)
    (_, *student_maps), (_, *teacher_maps) = student_output.maps, teacher_output.maps
    assert method.student_preact and method.teacher_preact
    assert len(method.layers) == min(len(student_maps), len(teacher_maps))
    expected = 0.0
    for above, layer in enumerate(reversed(method.layers)):
        f_s, f_t, bn = (maps[-1 - above] for maps in (student_maps, teacher_maps, teacher.network.get_bn_before_relu()))
        mapped = F.batch_norm(F.conv2d(f_s, layer.conv.weight), None, None, layer.bn.weight, layer.bn.bias, True)
        size = min(f_s.shape[2], f_t.shape[2])
        mapped, f_t = (F.adaptive_avg_pool2d(each, size) for each in (mapped, f_t))
        target = torch.maximum(f_t, margins(bn.weight, bn.bias)[:, None, None])
        expected += 0.5**above * partial_distance(mapped, target)
    assert torch.allclose(method.feature_loss(student_output, teacher_output, None, None), expected, rtol=1e-4)


def test_margins_are_copied_from_the_teacher_and_saved():
    teacher, _ = build("ofd")
    batch_norms = teacher.network.get_bn_before_relu()
    for bn in batch_norms:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    method = DISTILLERS["ofd"](pair_networks("resnet14", "resnet8")[1], teacher.network, TASK)
    expected = [margins(bn.weight, bn.bias) for bn in batch_norms]
    for bn in batch_norms:
        nn.init.ones_(bn.weight)
    for number, value in enumerate(expected):
        assert torch.equal(method.state_dict()[f"layers.{number}.margin"].flatten(), value)
    assert not any("margin" in name for name, _ in method.named_parameters())

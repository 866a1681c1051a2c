"""ReviewKD: fusions, the hierarchical context loss, the weight's rise."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo import Progress
from distiller_zoo.reviewkd import WARMUP_EPOCHS, AttentionFusion, ReviewKD, hierarchical_context_loss
from helper.recipes import recipe_of
from tests.check_values import g
from tests.conftest import make_batch, pair_networks
from tests.distiller_zoo.helpers import TASK, build, doubles

S6, T6 = g((4, 6, 8, 8), 0.29, 0.9), g((4, 6, 8, 8), 0.37, 0.2)


def test_the_hierarchical_context_loss_has_the_published_values():
    assert hierarchical_context_loss(S6, T6).item() == pytest.approx(0.5557525229, rel=1e-9)
    es, et = (g((4, 12), *parts)[:, :, None, None] for parts in ((0.37, 0.2), (0.83, 1.1)))
    assert hierarchical_context_loss(es, et).item() == pytest.approx(1.0896527686, rel=1e-9)


@pytest.mark.parametrize(
    ("height", "sizes", "weights"),
    [(7, (4, 2, 1), 1.875), (4, (2, 1), 1.75), (2, (1,), 1.5), (1, (), 1.0)],
)
def test_context_weights_count_the_sizes_that_are_used(height, sizes, weights):
    a, b = torch.randn(2, 3, height, height), torch.randn(2, 3, height, height)
    expected = F.mse_loss(a, b)
    for k, size in enumerate(sizes, 1):
        expected += 0.5**k * F.mse_loss(F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size))
    assert torch.allclose(hierarchical_context_loss(a, b), expected / weights)


def test_reviewkd_is_the_formula():
    teacher, method = build("reviewkd", ("resnet14", "resnet8"))
    batch = make_batch(4)
    student_output = method.student.outputs(batch.images)
    teacher_output = teacher(batch.images, preact=True)
    assert method.teacher_preact and not method.student_preact

    def normalise(block, x, padding):
        conv, bn = block
        return F.batch_norm(F.conv2d(x, conv.weight, padding=padding), None, None, bn.weight, bn.bias, True)

    s_maps = [student_output.pooled[:, :, None, None], *student_output.maps[:0:-1]]
    t_maps = [teacher_output.pooled[:, :, None, None], *teacher_output.maps[:0:-1]]
    expected, passed = 0.0, None
    for fusion, s_map, t_map in zip(method.fusions, s_maps, t_maps, strict=True):
        x = normalise(fusion.reduce, s_map, 0)
        if passed is not None:
            y = F.interpolate(passed, size=x.shape[-2:], mode="nearest")
            z = torch.sigmoid(F.conv2d(torch.cat([x, y], 1), fusion.attention.weight, fusion.attention.bias))
            x = x * z[:, 0][:, None] + y * z[:, 1][:, None]
        expected += hierarchical_context_loss(normalise(fusion.expand, x, 1), t_map)
        passed = x
    assert torch.allclose(method.feature_loss(student_output, teacher_output, None, None), expected, rtol=1e-4)


def test_reviewkds_convolutions_start_as_published():
    fusion = AttentionFusion(200, 100, 50, is_deepest=True)
    for convolution, fan_in in ((fusion.reduce[0], 200), (fusion.expand[0], 900)):
        assert convolution.weight.abs().max().item() == pytest.approx((3 / fan_in) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("pair", "mid", "ins", "outs"),
    [  # the tables of the official code, shallow to deep
        (("resnet32x4", "resnet8x4"), 256, [64, 128, 256, 256], [64, 128, 256, 256]),
        (("resnet56", "resnet20"), 64, [16, 32, 64, 64], [16, 32, 64, 64]),
        (("wrn_40_2", "wrn_40_1"), 64, [16, 32, 64, 64], [32, 64, 128, 128]),
        (("wrn_40_2", "ShuffleV1"), 512, [240, 480, 960, 960], [32, 64, 128, 128]),
        (("resnet32x4", "ShuffleV2"), 512, [116, 232, 464, 1024], [64, 128, 256, 256]),
        (("ResNet50", "vgg8"), 512, [128, 256, 512, 512, 512], [256, 512, 1024, 2048, 2048]),
        (("vgg13", "MobileNetV2"), 512, [12, 16, 48, 160, 1280], [128, 256, 512, 512, 512]),
        # ours: of networks with different numbers of levels the deepest are paired
        (("resnet14", "vgg8"), 512, [256, 512, 512, 512], [16, 32, 64, 64]),
        (("vgg13", "resnet8"), 64, [16, 32, 64, 64], [256, 512, 512, 512]),
    ],
    ids=lambda value: "->".join(value) if isinstance(value, tuple) else "",
)
def test_reviewkds_tables_are_read_off_the_networks(pair, mid, ins, outs):
    with torch.device("meta"):
        teacher, student = pair_networks(*pair)
        fusions = ReviewKD(student, teacher, TASK).fusions
    assert [fusion.reduce[0].in_channels for fusion in fusions] == ins[::-1]
    assert [fusion.expand[0].out_channels for fusion in fusions] == outs[::-1]
    assert {fusion.reduce[0].out_channels for fusion in fusions} == {mid}
    assert [fusion.attention is None for fusion in fusions] == [True] + [False] * (len(ins) - 1)


def test_reviewkds_weight_rises_from_zero():
    teacher, method = build("reviewkd", beta=2.0, gamma=0.0)
    batch = make_batch()
    student, teacher_output = method.student.outputs(batch.images), teacher(batch.images, True)

    def at(epoch):
        return method.losses(student, teacher_output, batch.targets, batch.index, Progress(epoch, 240))["reviewkd"]

    full = 2 * method.feature_loss(student, teacher_output, None, None)
    for epoch, share in ((0, 0.0), (1, 0.05), (10, 0.5), (20, 1.0), (239, 1.0)):
        assert torch.allclose(at(epoch), share * full, rtol=1e-4), epoch
    method.warmup_epochs = 40
    assert torch.allclose(at(10), 0.25 * full, rtol=1e-4)
    method.warmup_epochs = 0
    assert torch.allclose(at(0), full, rtol=1e-4)
    assert WARMUP_EPOCHS.full_run == 240


@pytest.mark.parametrize("height", [5, 2, 1])
def test_the_gradient_of_the_context_loss(height):
    student, teacher = doubles((2, 2, height, height), (2, 2, height, height))
    assert torch.autograd.gradcheck(hierarchical_context_loss, (student, teacher.detach()))


def test_the_gradient_of_a_fused_level():
    deepest, next_level = (AttentionFusion(3, 2, 4, is_deepest).double() for is_deepest in (True, False))
    maps = doubles((3, 3, 1, 1), (3, 3, 2, 2))
    target = torch.randn(3, 4, 4, 4, dtype=torch.float64)

    def loss(deep, shallow):
        _, passed = deepest(deep, None, deep.shape[2:])
        result, _ = next_level(shallow, passed, target.shape[2:])
        return hierarchical_context_loss(result, target)

    assert torch.autograd.gradcheck(loss, maps)


@pytest.mark.parametrize("places", [("behind", "behind"), ("before", "behind"), ("behind", "before")])
def test_maps_are_taken_where_the_flags_say_and_fusions_are_as_wide(places):
    teacher, method = build("reviewkd", review_student=places[0], review_teacher=places[1], review_width=24)
    assert {fusion.reduce[0].out_channels for fusion in method.fusions} == {24}
    assert (method.student_preact, method.teacher_preact) == tuple(place == "before" for place in places)
    method.train()
    images = torch.randn(4, 3, 32, 32)
    for maps, place in zip((method.respond(images, None), teacher(images, method.teacher_preact)), places, strict=True):
        assert (min(each.min() for each in maps.maps[1:]) < 0) == (place == "before")


def test_imagenets_recipes_take_the_maps_as_the_released_code_runs():
    places = ("review_student", "review_teacher", "review_width", "beta")
    for pair, expected in (
        (("resnet34", "resnet18"), ("behind", "behind", 512, 1.0)),
        (("resnet50", "MobileNet"), ("before", "behind", 256, 8.0)),
    ):
        recipe = recipe_of("imagenet", *pair, "reviewkd")
        assert tuple(recipe[place][0] for place in places) == expected

"""RepDistiller's losses of maps and vectors: published values, formulas, gradients, odd batches."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distiller_zoo import DISTILLERS
from distiller_zoo.attention import Attention
from distiller_zoo.correlation import Correlation
from distiller_zoo.hint import HintLoss
from distiller_zoo.nst import NSTLoss
from distiller_zoo.pkt import PKT
from distiller_zoo.rkd import RKDLoss
from distiller_zoo.similarity import Similarity
from distiller_zoo.vid import VIDLoss
from tests.check_values import g
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import (
    PROGRESS,
    build,
    value_and_gradient,
)
from tests.distiller_zoo.plain import LOSSES, OF_MAPS, PLAIN, inputs_of, plain_correlation, plain_similarity

NAMES = ("hint", "attention", "similarity", "correlation", "vid", "rkd", "pkt", "nst")


S6, T6, S5 = g((4, 6, 8, 8), 0.29, 0.9), g((4, 6, 8, 8), 0.37, 0.2), g((4, 5, 4, 4), 0.53, 0.4)


ES, ET = g((4, 12), 0.37, 0.2), g((4, 12), 0.83, 1.1)


def vid_of_equal_weights(student, teacher):
    loss = VIDLoss(5, 6, 6).double()
    for parameter in loss.regressor.parameters():
        parameter.data.fill_(0.05)
    loss.log_scale.data.fill_(math.log(math.expm1(5 - 1e-5)))  # in float64; the constructor's is a float32 number
    return loss(student, teacher)


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "value"),
    [
        (HintLoss(), S6, T6, 0.9917106054),
        (OF_MAPS["attention"], S5, T6, 0.0023210133),
        (OF_MAPS["attention"], g((4, 5, 8, 8), 0.53, 0.4), T6, 0.0000943871),
        (OF_MAPS["similarity"], S5, T6, 0.2808764199),
        (Correlation(), ES, ET, 9.3866186548),
        (vid_of_equal_weights, S5, T6, 0.8051154022),
        (RKDLoss(1, 0), ES, ET, 0.0718303052),
        (RKDLoss(0, 1), ES, ET, 0.0842574311),
        (RKDLoss(), ES, ET, 6.0086291824),
        (PKT(), ES, ET, 0.1770181108),
        (OF_MAPS["nst"], S5, T6, 0.9762057255),
    ],
)
def test_the_losses_have_the_published_values(loss, student, teacher, value):
    rounding = 5.1e-11  # of the ten printed decimals
    assert loss(student, teacher).item() == pytest.approx(value, rel=1e-9, abs=rounding)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_the_formulas(name):
    student, teacher = inputs_of(name, batch=5)
    value, gradient = value_and_gradient(LOSSES[name], student, teacher)
    expected, expected_gradient = value_and_gradient(PLAIN[name], student, teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", OF_MAPS)
@pytest.mark.parametrize("sizes", [(8, 4), (4, 8), (6, 4)])
def test_the_larger_map_is_average_pooled(name, sizes):
    student, teacher = (torch.randn(3, 3, size, size, dtype=torch.float64) for size in sizes)
    if name == "similarity":  # the images' products do not need one size
        expected = plain_similarity(student, teacher)
    else:
        expected = PLAIN[name](*(F.adaptive_avg_pool2d(each, min(sizes)) for each in (student, teacher)))
    assert LOSSES[name](student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_loss(name):
    student, teacher = inputs_of(name, batch=3)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher), student.requires_grad_())


def spoil(tensor, how):
    spoilt = tensor.clone()
    match how:
        case "zero":
            spoilt.zero_()
        case "one zero":
            spoilt[1] = 0
        case "duplicates":
            spoilt[2] = spoilt[0]
        case "all alike":
            spoilt[:] = spoilt[0]
        case "huge":
            spoilt *= 1e4
        case "tiny":
            spoilt *= 1e-10
        case "opposite":
            spoilt[2] = -spoilt[0]
        case "dead channel":
            spoilt[:, 0] = 0
    return spoilt


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("both", [False, True], ids=["student", "both"])
@pytest.mark.parametrize(
    "how", ["zero", "one zero", "duplicates", "all alike", "huge", "tiny", "opposite", "dead channel"]
)
def test_losses_and_gradients_are_finite_in_odd_batches(name, both, how):
    student, teacher = inputs_of(name, dtype=torch.float32)
    teacher = spoil(teacher, how) if both else teacher
    value, gradient = value_and_gradient(LOSSES[name], spoil(student, how), teacher)
    assert torch.isfinite(value) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["attention", "similarity", "nst", "rkd", "pkt"])
def test_what_has_no_direction_is_not_thrown_out(name):
    """A dead image among living ones gets a gradient that a step survives, not 1e12 times what came in."""
    student, teacher = inputs_of(name)
    _, usual = value_and_gradient(LOSSES[name], student, teacher)
    student = torch.rand_like(student)
    student[1] = 0
    if name == "rkd":
        student[2] = 0  # directions are those between two images
    _, gradient = value_and_gradient(LOSSES[name], student, teacher)
    assert gradient.abs().max() < 1e3 * usual.abs().max()


@pytest.mark.parametrize("name", [name for name in LOSSES if DISTILLERS[name.split()[0]].min_batch == 1])
def test_a_batch_of_one_image_is_enough_where_the_method_says_so(name):
    value, gradient = value_and_gradient(LOSSES[name], *inputs_of(name, batch=1))
    assert torch.isfinite(value) and torch.isfinite(gradient).all() and gradient.any()


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that is computed."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (list, tuple)) else [results]:
            if isinstance(result, torch.Tensor):
                self.size = max(self.size, result.numel())
        return results


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "most"),
    [
        (OF_MAPS["nst"], (2, 128, 4, 4), (2, 512, 4, 4), 2 * 512 * 16),
        (OF_MAPS["nst"], (2, 4, 32, 32), (2, 8, 32, 32), 2 * 8 * 1024),
        (RKDLoss(), (8, 4096), (8, 4096), 8 * 4096),
        (OF_MAPS["similarity"], (8, 64, 4, 4), (8, 64, 4, 4), 8 * 64 * 16),
    ],
)
def test_no_tensor_is_much_larger_than_the_inputs(loss, student, teacher, most):
    student = torch.randn(student, requires_grad=True)
    teacher = torch.randn(teacher)
    with LargestTensor() as largest:
        loss(student, teacher).backward()
    assert largest.size <= most


@pytest.mark.parametrize("loss", [Attention(), Similarity(), NSTLoss()])
def test_losses_of_lists_give_a_scalar_for_every_layer_of_the_shorter(loss):
    student = [torch.randn(2, 3, size, size) for size in (8, 4)]
    teacher = [torch.randn(2, 5, size, size) for size in (8, 4, 4)]
    values = loss(student, teacher)
    assert [value.shape for value in values] == [(), ()]
    assert len(loss(teacher, student)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_term_is_the_loss_of_the_right_features(name):
    teacher, method = build(name, ("vgg13", "ShuffleV2"), beta=3.0)
    batch = make_batch(4)
    student_output, teacher_output = method.student.outputs(batch.images), teacher(batch.images)
    (*maps, pooled), (*teacher_maps, teacher_pooled) = (
        [*output.maps, output.pooled] for output in (student_output, teacher_output)
    )
    match name:
        case "hint":
            expected = F.mse_loss(method.regressor(maps[2]), teacher_maps[2])
        case "attention" | "nst":
            loss = {"attention": Attention(), "nst": NSTLoss()}[name]
            expected = sum(loss(maps[1:], teacher_maps[1:]))
        case "similarity":
            expected = plain_similarity(maps[-1], teacher_maps[-1])
        case "correlation":
            expected = plain_correlation(method.embed_s(pooled), method.embed_t(teacher_pooled))
        case "vid":
            layers = zip(method.criteria, maps[1:], teacher_maps[1:], strict=False)
            expected = sum(criterion(s, t) for criterion, s, t in layers)
            assert len(method.criteria) == 3
            assert all(torch.allclose(c.log_scale, torch.tensor(4.99323)) for c in method.criteria)
        case "rkd" | "pkt":
            expected = {"rkd": RKDLoss(), "pkt": PKT()}[name](pooled, teacher_pooled)
    targets, index = batch.targets, batch.index
    losses = method.losses(student_output, teacher_output, targets, index, PROGRESS)
    assert torch.allclose(losses[name], 3 * expected, rtol=1e-4)

"""FitNet, AT, SP, CC, VID, RKD, PKT and NST: published values, formulas, gradients, odd batches, pairs, flags."""

import copy
import json
import math
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_cifar_student
from distiller_zoo import DISTILLERS, Progress, Task
from distiller_zoo.attention import Attention
from distiller_zoo.correlation import Correlation, LinearEmbed
from distiller_zoo.fsp import FSP
from distiller_zoo.hint import ConvReg, HintLoss
from distiller_zoo.kdsvd import KDSVD
from distiller_zoo.maps import unit_vectors
from distiller_zoo.nst import NSTLoss
from distiller_zoo.pkt import PKT, neighbour_probabilities
from distiller_zoo.rkd import RKDLoss, pairwise_distances, triangle_cosines
from distiller_zoo.similarity import Similarity
from distiller_zoo.vid import VIDLoss
from errors import UserError
from helper.loops import begin, train_step
from helper.networks import FrozenTeacher
from models.checkpoints import read_checkpoint
from scripts import export_student
from tests import golden_losses
from tests.check_values import g
from tests.conftest import SHARED, make_batch, message_of, pair_networks
from tests.golden_entry import entry_of
from tests.golden_format import Mismatch, fill
from tests.golden_maps import CHECKS

NAMES = ("hint", "attention", "similarity", "correlation", "vid", "rkd", "pkt", "nst")
PAIRS = (
    ("resnet14", "resnet8"),
    ("wrn_16_2", "wrn_16_1"),
    ("vgg13", "vgg8"),
    ("vgg13", "MobileNetV2"),
    ("resnet14", "ShuffleV2"),
    ("MobileNetV2", "wrn_16_1"),
)
TASK = Task(10, 32, 8, torch.zeros(1, dtype=torch.int64))
PROGRESS = Progress(0, 240)


def build(name, pair=("resnet14", "resnet8"), **hyper_parameters):
    teacher, student = pair_networks(*pair)
    return FrozenTeacher(teacher), DISTILLERS[name](student, teacher, TASK, **hyper_parameters)


# The losses as functions of one tensor of either side. Modules with parameters are made anew, always the same.


def layer(loss, student, teacher):
    (value,) = loss([student], [teacher])
    return value


def vid(student, teacher):
    torch.manual_seed(5)
    loss = VIDLoss(student.shape[1], teacher.shape[1], teacher.shape[1]).to(student.dtype)
    return loss(student, teacher)


OF_MAPS = {
    "attention": partial(layer, Attention()),
    "attention of cubes": partial(layer, Attention(3)),
    "similarity": partial(layer, Similarity()),
    "nst": partial(layer, NSTLoss()),
    "vid": vid,
}
OF_VECTORS = {"rkd": RKDLoss(), "pkt": PKT()}
OF_EQUAL_SHAPES = {"hint": HintLoss(), "correlation": Correlation()}
LOSSES = OF_MAPS | OF_VECTORS | OF_EQUAL_SHAPES


def inputs_of(name, batch=4, dtype=torch.float64):
    """Random tensors of student and teacher that the loss `name` takes."""
    if name in OF_MAPS:
        return torch.randn(batch, 3, 4, 4, dtype=dtype), torch.randn(batch, 5, 4, 4, dtype=dtype)
    return torch.randn(batch, 6, dtype=dtype), torch.randn(batch, 6, dtype=dtype)


def value_and_gradient(loss, student, teacher):
    student = student.detach().clone().requires_grad_()
    value = loss(student, teacher)
    assert value.shape == (), "a scalar"
    value.backward()
    return value.detach(), student.grad


# Published values: waves as inputs, computed once from the official functions.

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


# The formulas, written plainly: loops over images, channels and pixels.


def plain_attention(student, teacher, power=2):
    def attend(feature_map):
        sums = [(image.abs() ** power).sum(0).flatten() for image in feature_map]
        return torch.stack([each / each.norm() for each in sums])

    return (attend(student) - attend(teacher)).square().mean()


def plain_similarity(student, teacher):
    def similarities(maps):
        return torch.stack([torch.stack([(a * b).sum() for b in maps]) for a in maps])

    rows = [each / each.norm(dim=1, keepdim=True) for each in map(similarities, (student, teacher))]
    return (rows[0] - rows[1]).square().sum() / len(student) ** 2


def plain_nst(student, teacher):
    student, teacher = (each.flatten(2) / each.flatten(2).norm(dim=2, keepdim=True) for each in (student, teacher))

    def mean(a, b):
        return (a[:, :, None] * b[:, None]).sum(3).square().mean()

    return mean(teacher, teacher) + mean(student, student) - 2 * mean(student, teacher)


def plain_vid(student, teacher):
    torch.manual_seed(5)
    loss = VIDLoss(student.shape[1], teacher.shape[1], teacher.shape[1]).double()
    first, second, third = (loss.regressor[k].weight.flatten(1) for k in (0, 2, 4))
    pixels = student.movedim(1, 3)
    predicted = (((pixels @ first.T).relu() @ second.T).relu() @ third.T).movedim(3, 1)
    variance = (torch.log(1 + torch.exp(loss.log_scale)) + 1e-5)[:, None, None]
    return ((predicted - teacher) ** 2 / (2 * variance) + variance.log() / 2).mean()


def plain_rkd(student, teacher):
    def distances(x):
        length = torch.stack([torch.stack([(a - b).norm() if a is not b else a.new_zeros(()) for b in x]) for a in x])
        return length / length[length > 0].mean()

    def cosines(x):
        unit = F.normalize(x[None] - x[:, None], dim=2)
        return torch.einsum("ijd,ikd->ijk", unit, unit)

    def rows(x):
        return list(x.unbind())

    return 25 * F.smooth_l1_loss(distances(rows(student)), distances(rows(teacher))) + 50 * F.smooth_l1_loss(
        cosines(student), cosines(teacher)
    )


def plain_pkt(student, teacher):
    def probabilities(x):
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        similar = (unit @ unit.T + 1) / 2
        return similar / similar.sum(1, keepdim=True)

    s, t = probabilities(student), probabilities(teacher)
    return (t * torch.log((t + 1e-7) / (s + 1e-7))).mean()


def plain_correlation(student, teacher):
    difference = (student - teacher).abs()
    pairs = [(difference[i] * difference[i + 1]).sum() for i in range(len(difference) - 1)]
    return sum(pairs) / len(pairs)


PLAIN = {
    "attention": plain_attention,
    "attention of cubes": partial(plain_attention, power=3),
    "similarity": plain_similarity,
    "nst": plain_nst,
    "vid": plain_vid,
    "rkd": plain_rkd,
    "pkt": plain_pkt,
    "correlation": plain_correlation,
    "hint": lambda student, teacher: ((student - teacher) ** 2).sum() / student.numel(),
}


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


@pytest.mark.parametrize("size", [1, 2, 3])
def test_nst_is_one_number_by_channels_and_by_pixels(size):
    student, teacher = torch.randn(2, 6, size, size).double(), torch.randn(2, 8, size, size).double()
    value, gradient = value_and_gradient(OF_MAPS["nst"], student, teacher)
    expected, expected_gradient = value_and_gradient(plain_nst, student, teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-14)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_loss(name):
    student, teacher = inputs_of(name, batch=3)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher), student.requires_grad_())


def test_the_gradients_of_the_modules_are_those_of_the_loss():
    vid_loss, regressor = VIDLoss(2, 3, 3).double(), ConvReg((2, 2, 4, 4), (2, 3, 4, 4)).double()
    student, teacher = torch.randn(2, 2, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    for function, module in (
        (lambda: vid_loss(student, teacher), vid_loss),
        (lambda: HintLoss()(regressor(student), teacher), regressor),
    ):
        assert torch.autograd.gradcheck(lambda *_, function=function: function(), tuple(module.parameters()))


# What a batch may look like at worst.


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


@pytest.mark.parametrize("name", [name for name in NAMES if DISTILLERS[name].min_batch == 2])
def test_a_batch_size_of_one_is_refused_and_two_are_enough(name):
    teacher, student = pair_networks("resnet14", "resnet8")
    with pytest.raises(UserError, match="--batch_size"):
        DISTILLERS[name](student, teacher, TASK._replace(batch_size=1))
    teacher, method = build(name)
    batch = make_batch(2)
    assert torch.isfinite(method.train()(batch, teacher(batch.images), PROGRESS)[1][name])


def test_rounding_makes_no_negative_probabilities():
    passed = False
    for scale in torch.linspace(0.05, 3, 60):
        vectors = scale * torch.rand(1, 3000) * torch.tensor([[1.0], [-1.0]])
        directions = F.normalize(vectors)
        passed |= bool((directions @ directions.T).min() < -1)
        assert neighbour_probabilities(vectors).min() >= 0
    assert passed, "no cosine was below -1: the test shows nothing"


def test_the_angles_are_exact_in_float32_where_images_are_close():
    centre = torch.rand(1, 64) + 5
    student, teacher = centre + 1e-2 * torch.randn(8, 64), torch.rand(8, 64)
    value = RKDLoss()(student, teacher)
    assert value.item() == pytest.approx(plain_rkd(student.double(), teacher.double()).item(), rel=1e-4)


def test_unit_vectors_are_those_of_normalize_and_zero_stays_zero():
    vectors = torch.randn(3, 4, 5).double()
    assert torch.allclose(unit_vectors(vectors, 1), F.normalize(vectors, dim=1), rtol=1e-15)
    zero = torch.zeros(2, 3, requires_grad=True)
    unit = unit_vectors(zero, 1)
    unit.sum().backward()
    assert not unit.any() and not zero.grad.any()


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


# The modules of RepDistiller's names.


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


def test_the_modules_have_repdistillers_keys_and_starting_points():
    vid_loss = VIDLoss(4, 5, 6)
    names = ["log_scale", *(f"regressor.{k}.weight" for k in (0, 2, 4))]
    assert sorted(vid_loss.state_dict()) == sorted(names)
    assert [tuple(p.shape) for p in vid_loss.regressor.parameters()] == [(5, 4, 1, 1), (5, 5, 1, 1), (6, 5, 1, 1)]
    assert torch.allclose(vid_loss.log_scale, torch.full((6,), 4.99323))
    assert F.softplus(vid_loss.log_scale[0]).item() + 1e-5 == pytest.approx(5)
    embed = LinearEmbed(12, 7)
    assert list(embed.state_dict()) == ["linear.weight", "linear.bias"]
    assert embed(torch.randn(3, 3, 2, 2)).shape == (3, 7) and LinearEmbed().linear.weight.shape == (128, 1024)


@pytest.mark.parametrize("loss", [Attention(), Similarity(), NSTLoss()])
def test_losses_of_lists_give_a_scalar_for_every_layer_of_the_shorter(loss):
    student = [torch.randn(2, 3, size, size) for size in (8, 4)]
    teacher = [torch.randn(2, 5, size, size) for size in (8, 4, 4)]
    values = loss(student, teacher)
    assert [value.shape for value in values] == [(), ()]
    assert len(loss(teacher, student)) == 2


# The methods.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
def test_everything_is_trained_and_nothing_of_the_teacher(name, pair):
    teacher, method = build(name, pair)
    stage = method.main_stage(240)
    begin(stage, method)
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-3, momentum=0.9)
    total_gradient = {key: 0.0 for key, _ in method.named_parameters()}
    for _ in range(3):
        batch = make_batch(4)
        losses, _ = train_step(method, stage, optimizer, batch, teacher(batch.images), PROGRESS)
        assert set(losses) == {"ce", name} and all(torch.isfinite(value) for value in losses.values())
        for key, parameter in method.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
            total_gradient[key] += parameter.grad.abs().sum().item()
    silent = {key for key, gradient in total_gradient.items() if not gradient}
    assert silent <= {"regressor.conv.bias"}  # a BatchNorm follows: its gradient is rounding
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


TRAINED = {
    "hint": {"regressor"},
    "correlation": {"embed_s", "embed_t"},
    "vid": {"criteria"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_method_adds_the_modules_it_should_and_ships_the_student(name):
    _, method = build(name)
    added = {key.split(".")[0] for key in method.state_dict()} - {"student"}
    assert added == TRAINED.get(name, set()) and not list(method.parameters(recurse=False))
    exported = method.export()
    assert exported.state_dict().keys() == method.student.state_dict().keys() and method.export_note() == ""


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


@pytest.mark.parametrize("name", NAMES)
def test_each_weight_scales_its_own_term(name):
    teacher, method = build(name, alpha=1.0)
    batch = make_batch(4)
    outputs = method.student.outputs(batch.images), teacher(batch.images)

    def terms(**weights):
        for argument, weight in ({"gamma": 1.0, "alpha": 1.0, "beta": 1.0} | weights).items():
            setattr(method, argument, weight)
        return method.losses(*outputs, batch.targets, batch.index, PROGRESS)

    for argument, term in (("gamma", "ce"), ("alpha", "kd"), ("beta", name)):
        assert terms(**{argument: 2.0})[term].item() == pytest.approx(2 * terms()[term].item(), rel=1e-5)
        assert set(terms(**{argument: 0.0})) == {"ce", "kd", name} - {term}


def rkd_value(**weights):
    _, method = build("rkd", **weights)
    return method.criterion(ES, ET).item()


def test_the_weights_of_rkd_scale_distances_and_angles():
    distance, angle = (
        rkd_value(distance_weight=1.0, angle_weight=0.0),
        rkd_value(distance_weight=0.0, angle_weight=1.0),
    )
    assert rkd_value() == pytest.approx(25 * distance + 50 * angle)
    assert rkd_value(distance_weight=3.0) == pytest.approx(3 * distance + 50 * angle)


def test_the_width_of_the_embeddings_is_a_flag():
    _, method = build("correlation", ("vgg13", "resnet8"), feat_dim=9)
    assert method.embed_s.linear.weight.shape == (9, 64) and method.embed_t.linear.weight.shape == (9, 512)


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


class Enlarged(nn.Module):
    """A network whose maps are repeated to twice their height and width."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def outputs(self, images, preact=False):
        output = self.network.outputs(images, preact)
        return output._replace(maps=[F.interpolate(each, scale_factor=2) for each in output.maps])


def test_maps_that_cannot_be_compared_are_refused():
    teacher, student = pair_networks("wrn_16_2", "MobileNetV2")
    DISTILLERS["hint"](student, teacher, TASK, hint_layer=3)
    with pytest.raises(UserError, match=r"--model_s: .* 4 pixels high, the teacher's 16"):
        DISTILLERS["hint"](student, Enlarged(teacher), TASK, hint_layer=3)


def test_the_command_line_refuses_bad_hint_layers(teacher_run, save_dir):
    argv = ["--distill", "hint", "--path_t", str(teacher_run / "last.pth"), "--model_s", "resnet8"]
    argv += ["--save_dir", str(save_dir)]
    assert "--hint_layer" in message_of(train_cifar_student.main, [*argv, "--hint_layer", "-1"])
    assert "--hint_layer" in message_of(train_cifar_student.main, [*argv, "--hint_layer", "9"])


@pytest.mark.parametrize(("name", "flags"), [("hint", ("--hint_layer", "3")), ("correlation", ()), ("vid", ())])
def test_a_run_keeps_the_added_modules_and_ships_the_student_alone(name, flags, distil, save_dir):
    run = distil("--epochs", "1", "--max_steps", "2", "--batch_size", "8", *flags, distill=name)
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(line[f"loss_{name}"])
    kept = {key.split(".")[0] for key in read_checkpoint(run / "last.pth")["distiller"]}
    assert kept == {"student"} | TRAINED[name]
    exported = read_checkpoint(export_student.main([str(run / "last.pth"), "--out", str(save_dir / "student.pth")]))
    assert exported["model"].keys() == pair_networks("resnet14", "resnet8")[1].state_dict().keys()


# The golden checks.

GOLDEN = SHARED / "golden"


def golden_families():
    content, arrays = json.loads((GOLDEN / "losses.json").read_text()), dict(numpy.load(GOLDEN / "losses.npz"))
    for loss in CHECKS.keys() & content["losses"].keys():
        for case, seeds in content["losses"][loss].items():
            for seed, entry in seeds.items():
                yield loss, case, seed, entry, arrays


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden numbers at {GOLDEN}")
def test_the_golden_numbers(monkeypatch):
    monkeypatch.setattr(golden_losses, "CHECKS", golden_losses.CHECKS | CHECKS)
    checked = [golden_losses.check_entry(*family) or family[0] for family in golden_families()]
    assert len(checked) >= 14 and set(checked) == {"HintLoss", "Attention", "VIDLoss", "Similarity", "PKT"}


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden numbers at {GOLDEN}")
@pytest.mark.parametrize("part", ["values", "grad_norm_student", "grad_norm_params", "bn_after", "module_state_dict"])
def test_a_changed_golden_number_is_noticed(part, monkeypatch):
    monkeypatch.setattr(golden_losses, "CHECKS", golden_losses.CHECKS | CHECKS)
    noticed = 0
    for loss, case, seed, entry, arrays in golden_families():
        if part in entry:
            with pytest.raises(Mismatch):
                golden_losses.check_entry(loss, case, seed, changed(entry, part), arrays)
            noticed += 1
    assert noticed >= 4


def changed(entry, part):
    """The same entry with another last number in one of its parts."""
    entry = copy.deepcopy(entry)
    if part == "values":
        entry[part][-1] *= 1 + 1e-6
    elif part == "module_state_dict":
        entry[part][0][1][0] += 1
    else:
        key = max(entry[part], key=lambda name: numpy.abs(entry[part][name]).max())
        entry[part][key] = (numpy.array(entry[part][key]) * (1 + 1e-6)).tolist()
    return entry


def linear_embed_entry():
    names = [f"embed_{side}.linear.{part}" for side in "st" for part in ("weight", "bias")]
    shapes = [shape for width in (12, 20) for shape in ((7, width), (7,))]
    filled = {name: fill(name, shape).double().requires_grad_() for name, shape in zip(names, shapes, strict=True)}

    def plain(student, teacher):
        embedded = [
            vectors @ filled[f"embed_{side}.linear.weight"].T + filled[f"embed_{side}.linear.bias"]
            for side, (vectors,) in (("s", student), ("t", teacher))
        ]
        return [plain_correlation(*embedded)]

    return entry_of({"q_s": (6, 12), "p_t": (6, 20)}, plain, filled)


def pairwise(plain):
    return lambda student, teacher: [plain(s, t) for s, t in zip(student, teacher, strict=True)]


MAPS = {"f1_s": (3, 4, 6, 6), "f2_s": (3, 9, 2, 2), "f1_t": (3, 5, 6, 6), "f2_t": (3, 8, 2, 2)}
VECTORS = {"q_s": (6, 9), "p_t": (6, 14)}


@pytest.mark.parametrize(
    ("losses", "case", "entry"),
    [
        (("NSTLoss", "NST"), "f1f2", lambda: entry_of(MAPS, pairwise(plain_nst))),
        (("Similarity",), "f1f2", lambda: entry_of(MAPS, pairwise(plain_similarity))),
        (("RKDLoss", "RKD"), "9_14", lambda: entry_of(VECTORS, pairwise(plain_rkd))),
        (("PKT",), "9_14", lambda: entry_of(VECTORS, pairwise(plain_pkt))),
        (
            ("Correlation",),
            "direct",
            lambda: entry_of(dict.fromkeys(("p_s", "p_t"), (6, 9)), pairwise(plain_correlation)),
        ),
        (("Correlation",), "linear_embed", linear_embed_entry),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, tuple)) else "",
)
def test_entries_that_the_golden_file_may_hold_are_checked(losses, case, entry, monkeypatch):
    monkeypatch.setattr(golden_losses, "CHECKS", golden_losses.CHECKS | CHECKS)
    content = entry()
    for loss in losses:
        golden_losses.check_entry(loss, case, "3", content, {})
        parts = ["values", "grad_norm_student", *(part for part in ("grad_norm_params",) if part in content)]
        for part in parts:
            with pytest.raises(Mismatch):
                golden_losses.check_entry(loss, case, "3", changed(content, part), {})
        with pytest.raises(Mismatch, match="nothing checks"):
            golden_losses.check_entry(loss, case, "3", content | {"unheard_of": 1}, {})


def test_angles_of_images_that_are_almost_the_same_stay_angles():
    vectors = torch.randn(8, 16)
    vectors[0] = 0
    vectors[1] = 1e-9 * torch.randn(16)
    cosines = triangle_cosines(pairwise_distances(vectors))
    assert cosines.abs().max() <= 1


def test_kdsvd_of_tiny_maps_is_that_of_maps():
    student, teacher = ([torch.randn(2, 3, 4, 4) for _ in range(2)] for _ in range(2))
    expected = torch.stack(KDSVD()(student, teacher))
    tiny = [(1e-20 * feature_map).requires_grad_() for feature_map in student]
    found = torch.stack(KDSVD()(tiny, teacher))
    found.sum().backward()
    assert torch.allclose(found, expected, rtol=1e-4)
    assert all(feature_map.grad.isfinite().all() for feature_map in tiny)


@pytest.mark.parametrize(
    "make", [lambda: FSP([(4, 8, 8)] * 2, [(5, 8, 8)] * 2), lambda: ConvReg((2, 4, 4, 4), (2, 4, 9, 9))]
)
def test_networks_that_do_not_fit_are_a_value_error_too(make):
    with pytest.raises(ValueError):
        make()

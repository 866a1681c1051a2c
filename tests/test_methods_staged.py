"""AB, FT, FSP, KDSVD and OFD: published values, formulas, gradients, odd maps, stages, pairs, flags, resumption."""

import copy
import itertools
import json
import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train_cifar_student
from distiller_zoo import DISTILLERS, Progress, Task
from distiller_zoo.abound import ABLoss, Connector
from distiller_zoo.factor import FactorTransfer, Paraphraser, Translator
from distiller_zoo.fsp import FSP, flow
from distiller_zoo.kdsvd import KDSVD, align, decompose, first_vectors, with_positive_peaks
from distiller_zoo.ofd import margins, partial_distance
from errors import UserError
from helper import engine
from helper.loops import begin, train_step
from helper.networks import FrozenTeacher
from models.checkpoints import load_exported, read_checkpoint
from scripts import export_student
from tests import golden_losses
from tests.check_values import NARROW_STUDENT_MAP, STUDENT_MAP, TEACHER_MAP
from tests.conftest import SHARED, keep_images, make_batch, pair_networks
from tests.golden_entry import entry_of
from tests.golden_format import Mismatch, fill, loss_input
from tests.run_folders import load, metrics, same_state

NAMES = ("abound", "factor", "fsp", "kdsvd", "ofd")
PAIRS = (
    ("resnet14", "resnet8"),
    ("wrn_16_2", "wrn_16_1"),
    ("wrn_40_1", "wrn_16_1"),
    ("vgg13", "vgg8"),
    ("vgg13", "MobileNetV2"),
    ("resnet14", "ShuffleV2"),
    ("MobileNetV2", "wrn_16_1"),
)
#: Which of the pairs have the channels that FSP and KDSVD need.
OF_EQUAL_CHANNELS = (("resnet14", "resnet8"), ("wrn_40_1", "wrn_16_1"), ("vgg13", "vgg8"))
SUPPORTED = [
    (name, pair) for name in NAMES for pair in PAIRS if pair in OF_EQUAL_CHANNELS or name not in ("fsp", "kdsvd")
]
TASK = Task(10, 32, 4, torch.arange(8) % 4)
PROGRESS = Progress(0, 240)
ROUNDING = 5.1e-11  # of the ten printed decimals of published values


def build(name, pair=("resnet14", "resnet8"), **hyper_parameters):
    teacher, student = pair_networks(*pair)
    return FrozenTeacher(teacher), DISTILLERS[name](student, teacher, TASK, **hyper_parameters)


def close(ours, golden, rel=1e-9, absolute=ROUNDING):
    ours, golden = (
        [float(torch.as_tensor(value, dtype=torch.float64).detach()) for value in values] for values in (ours, golden)
    )
    assert ours == pytest.approx(golden, rel=rel, abs=absolute)


def random_maps(*shapes, scale=1.0):
    return [scale * torch.randn(shape, dtype=torch.float64) for shape in shapes]


# Published values: waves as inputs, computed once from the official functions.


def test_the_losses_have_the_published_values():
    close(ABLoss(3)([STUDENT_MAP] * 3, [TEACHER_MAP] * 3), [0.4300703869, 0.8601407738, 1.7202815475])
    close([FactorTransfer()(NARROW_STUDENT_MAP, TEACHER_MAP)], [0.0415692827])
    student, teacher = ([each, F.avg_pool2d(each, 2)] for each in (STUDENT_MAP, TEACHER_MAP))
    close(FSP(*([each.shape for each in maps] for maps in (student, teacher)))(student, teacher), [0.0040353435])
    channels = torch.arange(6, dtype=torch.float64)
    margin = margins(0.5 + 0.1 * channels, 0.1 * channels - 0.2)[:, None, None]
    close([partial_distance(STUDENT_MAP, torch.maximum(TEACHER_MAP, margin)) / 1000], [0.3231126039])


def test_margins_have_the_published_values():
    golden = [-0.7978845608, -0.3075128801, -2.0183208677, -0.3]
    weight, bias = torch.tensor([[1.0, 0.5, -2.0, 0.1], [0.0, 0.3, -1.0, 1.0]], dtype=torch.float64)
    close(margins(weight, bias), golden)
    dead = margins(torch.zeros(3), torch.tensor([0.0, 1.0, -1.0]))  # the channel is its bias
    assert dead.dtype == torch.float32
    assert torch.allclose(dead, torch.tensor([0.0, 0.0, -1.0]), atol=1e-6)


# The formulas, written plainly.


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


def test_factors_are_the_formula_for_both_powers():
    student, teacher = random_maps((3, 4, 4, 4), (3, 6, 2, 2))
    pooled = F.avg_pool2d(student, 2)
    for p1, p2 in ((2, 1), (1, 1), (3, 1), (2, 2)):
        distances = []
        for s, t in zip(pooled, teacher, strict=True):
            s, t = ((each**p1).mean(0).flatten() for each in (s, t))
            distances.append((s / s.norm() - t / t.norm()).abs() ** p2)
        close([FactorTransfer(p1, p2)(student, teacher)], [torch.stack(distances).mean()])
        close([FactorTransfer(p1, p2)(teacher, student)], [torch.stack(distances).mean()])


def test_a_flow_is_the_mean_product_of_two_layers():
    lower, upper = random_maps((2, 3, 8, 8), (2, 5, 4, 4))
    pooled = F.avg_pool2d(lower, 2)
    expected = torch.tensor([[[(u * low).mean() for low in b] for u in a] for a, b in zip(upper, pooled, strict=True)])
    assert flow(lower, upper).shape == (2, 5, 3)
    assert torch.allclose(flow(lower, upper), expected.double())
    assert torch.allclose(flow(upper, lower).mT, expected.double())  # the larger may be the upper one


def plain_kdsvd(g_s, g_t, k=1, signs=None):
    """With a whole decomposition of every matrix (pixels, channels); `signs` of the teacher's vectors, by layer."""
    layers = []
    for number, (f_s, f_t) in enumerate(zip(g_s, g_t, strict=True)):
        _, values, teacher = torch.linalg.svd(f_t.flatten(2).mT, full_matrices=False)
        _, _, student = torch.linalg.svd(f_s.flatten(2).mT, full_matrices=False)
        teacher, student = teacher.mT[:, :, :k], student.mT[:, :, : k + 3]
        peaks = teacher.gather(1, teacher.abs().argmax(1, keepdim=True))
        teacher = teacher * peaks.sign() * (1 if signs is None else signs[number])
        cosines = student.mT @ teacher
        best = (cosines.abs() == cosines.abs().amax(1, keepdim=True)) * cosines.sign()
        scale = F.normalize(values[:, :k], dim=1)[:, None]
        layers.append((student @ best.detach() * scale, teacher * scale))
    losses = []
    for (s_below, t_below), (s, t) in itertools.pairwise(layers):
        r_s, r_t = (torch.exp(-((a[:, :, None] - b[:, None]) ** 2) / 8) for a, b in ((s, s_below), (t, t_below)))
        losses.append((r_s - r_t).square().sum() / len(s))
    return losses


#: Tall, square and wide matrices; the last two are of one size.
SVD_SHAPES = ((5, 6, 8, 8), (5, 16, 4, 4), (5, 40, 4, 4), (5, 40, 4, 4))


@pytest.mark.parametrize("k", [1, 2])
def test_kdsvd_is_the_whole_decomposition_whatever_the_shape(k):
    teacher, student = random_maps(*SVD_SHAPES), [each.requires_grad_() for each in random_maps(*SVD_SHAPES)]
    ours, plain = KDSVD(k)(student, teacher), plain_kdsvd(student, teacher, k)
    close(ours, plain)
    gradients = [torch.autograd.grad(sum(losses), student) for losses in (ours, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
        assert a.abs().max() > 1e-5


def test_kdsvd_does_not_depend_on_signs():
    teacher, student = random_maps(*SVD_SHAPES), random_maps(*SVD_SHAPES)
    golden = KDSVD()(student, teacher)
    for number in range(len(teacher)):
        for maps in (teacher, student):
            maps[number] = -maps[number]
            close(KDSVD()(student, teacher), golden)
    # Relative signs matter to the formula, so there is something not to depend on.
    assert abs(plain_kdsvd(student, teacher, signs=(1, -1, 1, 1))[0] - golden[0]) > 1e-3 * golden[0]


def test_decompositions_fall_and_leave_missing_vectors_empty():
    for shape in ((2, 9, 4), (2, 4, 9)):
        matrices = torch.randn(shape, dtype=torch.float64)
        matrices[1] = matrices[1, :, :1] @ matrices[1, :1]  # rank 1
        squares, vectors = decompose(matrices)
        close(squares[0].sqrt(), torch.linalg.svdvals(matrices[0]))
        assert torch.allclose(vectors[0].T @ vectors[0], torch.eye(4, dtype=torch.float64))
        direction = F.normalize(matrices[1, 0], dim=0)
        assert abs(vectors[1, :, 0] @ direction).item() == pytest.approx(1)
        assert not vectors[1, :, 1:].any() and not squares[1, 1:].any()


def test_the_students_vector_is_the_closest_and_turned_towards_the_teachers():
    directions = torch.eye(3, dtype=torch.float64)[None]
    teacher = torch.tensor([0.1, -0.9, 0.4], dtype=torch.float64)[None, :, None]
    assert torch.equal(align(directions, teacher), torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)[None, :, None])
    assert torch.equal(with_positive_peaks(teacher), -teacher)


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


# Gradients.

LOSSES = {
    "ABLoss": lambda s, t: sum(ABLoss(2)([s, 2 * s], [t, -t])),
    "FactorTransfer": FactorTransfer(),
    "FactorTransfer squared": FactorTransfer(p2=2),
    "FSP": lambda s, t: sum(FSP([s.shape] * 2, [t.shape] * 2)([s, s.square()], [t, t.square()])),
    "KDSVD": lambda s, t: sum(KDSVD()([s, s.flip(0)], [t, t.flip(0)])),
    "OFD": partial_distance,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_have_their_derivative(name):
    student, teacher = random_maps((2, 3, 3, 2), (2, 3, 3, 2))
    assert torch.autograd.gradcheck(lambda value: LOSSES[name](value, teacher), student.requires_grad_())


@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 4, 9)])
def test_singular_vectors_have_their_derivative(shape):
    (matrices,) = random_maps(shape)
    assert torch.autograd.gradcheck(
        lambda value: with_positive_peaks(first_vectors(value, 2)[1]), matrices.requires_grad_()
    )


def test_equal_singular_values_leave_a_finite_gradient():
    """One of the two equal values moves away: only what is determined is in the gradient."""
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    values = torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    matrices = (basis[:, :4] * values @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0])[None]
    matrices.requires_grad_()
    _, vectors = first_vectors(matrices, 4)
    (gradient,) = torch.autograd.grad((vectors * torch.randn_like(vectors)).sum(), matrices)
    assert torch.isfinite(gradient).all() and 1e-3 < gradient.abs().max() < 1e3
    # The first vector is determined, and has its whole gradient.
    assert torch.autograd.gradcheck(lambda value: with_positive_peaks(first_vectors(value, 1)[1]), matrices)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [0.0, 1.0, 500.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_zero_and_constant_maps_stay_finite(name, value, batch):
    student = torch.full((batch, 4, 3, 3), value).requires_grad_()
    for teacher in (torch.zeros(batch, 4, 3, 3), torch.ones(batch, 4, 3, 3), torch.randn(batch, 4, 3, 3)):
        loss = LOSSES[name](student, teacher)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.shape == () and torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_images_without_a_response_learn_nothing_from_others():
    """A zero map among others: no gradient there where the loss is of directions, and the others keep theirs."""
    losses = {"FactorTransfer": FactorTransfer(p1=1), "KDSVD": LOSSES["KDSVD"]}
    for name, loss in losses.items():
        student, teacher = random_maps((4, 3, 4, 4), (4, 3, 4, 4))
        student[0] = 0
        (gradient,) = torch.autograd.grad(loss(student.requires_grad_(), teacher), student)
        assert not gradient[0].any() and gradient[1:].flatten(1).any(1).all(), name


def test_maps_that_are_not_finite_give_a_loss_that_is_not():
    """So that the run is stopped by the check that names the term."""
    student, teacher = random_maps((2, 3, 4, 4), (2, 3, 4, 4))
    student[0, 0, 0, 0] = torch.nan
    (loss,) = KDSVD()([student] * 2, [teacher] * 2)
    assert loss.isnan()


# Modules under RepDistiller's names.


def test_the_modules_have_the_published_names_and_shapes():
    shapes = {name: (8, channels, size, size) for name, channels, size in (("s", 6, 8), ("t", 10, 8), ("up", 10, 16))}
    paraphraser, translator = Paraphraser(shapes["t"]), Translator(shapes["s"], shapes["t"])
    feature_map = torch.randn(8, 10, 8, 8)
    factor, reconstruction = paraphraser(feature_map)
    assert factor.shape == (8, 5, 8, 8) and reconstruction.shape == feature_map.shape
    assert torch.equal(paraphraser(feature_map, is_factor=True), factor)
    assert translator(torch.randn(8, 6, 8, 8)).shape == factor.shape
    assert list(dict(paraphraser.named_parameters())) == [
        f"{part}.{number}.{kind}"
        for part in ("encoder", "decoder")
        for number in (0, 3, 6)
        for kind in ("weight", "bias")
    ]
    assert {key.split(".")[1] for key in translator.state_dict()} == {"0", "1", "3", "4", "6", "7"}
    assert Paraphraser(shapes["t"], k=0.3, use_bn=True)(feature_map, is_factor=True).shape[1] == 3
    connector = Connector([shapes["t"], shapes["s"], shapes["s"]], [shapes["t"], shapes["t"], shapes["up"]])
    assert {key.rsplit(".", 1)[0] for key in connector.state_dict()} == {
        f"connectors.{number}.{layer}" for number in (1, 2) for layer in ("conv", "bn")
    }
    connected = connector([feature_map, torch.randn(8, 6, 8, 8), torch.randn(8, 6, 8, 8)])
    assert connected[0] is feature_map and [tuple(each.shape) for each in connected[1:]] == [shapes["t"], shapes["up"]]
    assert connected[1].min() < 0, "no ReLU behind a connector"
    with pytest.raises(ValueError, match="zip"):
        Connector([shapes["s"]], [shapes["t"]] * 2)


# Stages.


def take_steps(stage, method, teacher, steps=3):
    begin(stage, method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    for _ in range(steps):
        batch = make_batch()
        output = teacher(batch.images, method.teacher_preact) if stage.needs_teacher else None
        losses, _ = train_step(method, stage, optimizer, batch, output, PROGRESS)
    return losses


@pytest.mark.parametrize(
    ("name", "pair"), SUPPORTED, ids=lambda value: value if isinstance(value, str) else "->".join(value)
)
def test_every_stage_trains_what_it_says_and_nothing_else(name, pair):
    teacher, method = build(name, pair, alpha=0.5)
    for stage in method.stages(240):
        before = copy.deepcopy(method.state_dict())
        losses = take_steps(stage, method, teacher)
        assert losses and all(torch.isfinite(value) for value in losses.values())
        trained = {id(parameter) for module in stage.trained for parameter in module.parameters()}
        in_training = {id(each) for module in stage.trained for each in module.modules()}
        for key, parameter in method.named_parameters():
            if id(parameter) in trained:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), (stage.name, key)
            else:
                assert torch.equal(parameter, before[key]) and not parameter.requires_grad, (stage.name, key)
        for prefix, module in method.named_modules():
            if isinstance(module, nn.BatchNorm2d) and id(module) not in in_training:
                assert torch.equal(module.running_mean, before[f"{prefix}.running_mean"]), (stage.name, prefix)
        method.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(key.startswith("teacher") for key in method.state_dict())


@pytest.mark.parametrize("name", ["abound", "fsp"])
def test_the_first_stage_is_of_the_layers_below_the_head(name):
    teacher, method = build(name, init_epochs=7)
    first, main = method.stages(240)
    assert (first.epochs, first.learning_rate, first.milestones) == (7, None, ())
    trained = {id(parameter) for module in first.trained for parameter in module.parameters()}
    assert id(method.student.conv1.weight) in trained and id(method.student.fc.weight) not in trained
    assert set(take_steps(first, method, teacher)) == {name}
    assert not main.needs_teacher
    assert set(take_steps(main, method, teacher)) == {"ce"}
    assert build(name, alpha=1.0)[1].stages(240)[-1].needs_teacher


def test_the_first_stages_lower_their_own_loss():
    for name in ("abound", "fsp", "factor"):
        teacher, method = build(name)
        stage, batch = method.stages(240)[0], make_batch()
        begin(stage, method)
        output = teacher(batch.images, method.teacher_preact)
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
        values = [sum(train_step(method, stage, optimizer, batch, output, PROGRESS)[0].values()) for _ in range(60)]
        assert values[-1] < 0.97 * values[0], name


def test_the_paraphraser_is_learned_first_and_left_alone_then():
    teacher, method = build("factor")
    first, main = method.stages(240)
    assert list(first.trained) == [method.paraphraser] and first.respond(None, None) is None
    assert (first.epochs, first.learning_rate, first.milestones) == (30, 0.01, ())
    assert method.paraphraser not in main.trained and method.translator in main.trained
    batch = make_batch()
    output = teacher(batch.images)
    begin(first, method)
    logits, losses = method(batch, output, PROGRESS, first)
    *_, last = output.maps
    assert logits is None and list(losses) == ["reconstruction"]
    assert torch.allclose(losses["reconstruction"], F.mse_loss(method.paraphraser(last)[1], last))
    begin(main, method)
    student = method.student.outputs(batch.images)
    *_, student_last = student.maps
    factors = method.translator(student_last), method.paraphraser(last, is_factor=True)
    losses = main.losses(student, output, batch.targets, batch.index, PROGRESS)
    assert set(losses) == {"ce", "factor"}
    assert torch.allclose(losses["factor"], FactorTransfer()(*factors))
    method.paraphraser.requires_grad_(True)  # its factor is a constant even so
    losses = main.losses(method.student.outputs(batch.images), output, batch.targets, batch.index, PROGRESS)
    losses["factor"].backward()
    assert all(parameter.grad is None for parameter in method.paraphraser.parameters())


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


@pytest.mark.parametrize(
    ("name", "pair", "message"),
    [
        (
            "fsp",
            ("resnet8x4", "resnet8"),
            r"--model_s: --distill fsp needs equal channels .*16, 16, 32, 64.*32, 64, 128",
        ),
        ("fsp", ("vgg8", "resnet8"), "equal channels"),
        (
            "kdsvd",
            ("wrn_16_2", "resnet8"),
            r"--distill kdsvd needs equal channels .*16, 32, 64, the teacher 32, 64, 128",
        ),
        ("ofd", ("ShuffleV1", "resnet8"), "--model_t: --distill ofd reads its margins .* ShuffleNetV1 names none"),
    ],
)
def test_pairs_that_are_not_supported_are_explained(name, pair, message):
    with pytest.raises(UserError, match=message):
        build(name, pair)
    with pytest.raises(UserError, match=r"--model_s: .* 4 pixels high, the teacher's 12"):
        Connector([(2, 3, 4, 4)], [(2, 5, 12, 12)])


@pytest.mark.parametrize("name", ["abound", "factor", "ofd"])
def test_one_image_is_refused_where_a_batch_norm_may_need_two(name):
    teacher, student = pair_networks("resnet14", "resnet8")
    with pytest.raises(UserError, match=r"--batch_size: .* at least 2"):
        DISTILLERS[name](student, teacher, TASK._replace(batch_size=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["zeros", "duplicates", "gaps", "two"])
def test_degenerate_batches_have_finite_losses_and_gradients(name, fault):
    size = 2 if fault == "two" else 4
    teacher, method = build(name, alpha=1.0)
    batch = make_batch(size)
    if fault == "duplicates":
        batch = batch._replace(images=batch.images[:1].expand(size, -1, -1, -1).clone())
    for stage in method.stages(240):
        begin(stage, method)
        student, output = stage.respond(batch.images, None), teacher(batch.images, method.teacher_preact)
        if fault == "zeros":
            student, output = (each and each._replace(maps=[m * 0 for m in each.maps]) for each in (student, output))
        if fault == "gaps" and student is not None:
            gap = 500.0 * F.one_hot(torch.arange(size), 10)
            student, output = student._replace(logits=student.logits + gap), output._replace(logits=output.logits - gap)
        losses = stage.losses(student, output, batch.targets, batch.index, PROGRESS)
        method.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) for value in losses.values())
        gradients = [parameter.grad for parameter in method.parameters() if parameter.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_float32_where_the_networks_are_not(name):
    teacher, method = build(name, alpha=1.0)
    batch = make_batch()
    for stage in method.stages(240):
        begin(stage, method)
        with torch.autocast("cpu", torch.bfloat16):
            output = teacher(batch.images, method.teacher_preact)
            _, losses = method(batch, output, PROGRESS, stage)
        sum(losses.values()).backward()
        assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_each_weight_scales_its_own_term(name):
    own = [weight for weight in ("gamma", "alpha", "beta") if weight in {f.argument for f in DISTILLERS[name].flags}]
    assert own == ["gamma", "alpha"] + ["beta"] * (name not in ("abound", "fsp"))
    results = {}
    for changed in (None, *own):
        torch.manual_seed(0)
        teacher, method = build(name, **(dict.fromkeys(own, 1.0) | ({changed: 2.0} if changed else {})))
        batch = make_batch()
        output = teacher(batch.images, method.teacher_preact)
        results[changed] = method.train()(batch, output, PROGRESS)[1]
    for weight in own:
        term = {"gamma": "ce", "alpha": "kd", "beta": name}[weight]
        for key, value in results[weight].items():
            assert torch.allclose(value, results[None][key] * (2 if key == term else 1)), (weight, key)


def test_published_defaults():
    defaults = {name: {flag.argument: flag.default for flag in DISTILLERS[name].flags} for name in NAMES}
    assert all(defaults[name]["init_epochs"] == 30 for name in ("abound", "factor", "fsp"))
    assert defaults["factor"]["init_learning_rate"] == 0.01 and defaults["ofd"]["beta"] == 0.001
    for name in ("abound", "factor", "fsp"):
        (init_epochs,) = (flag for flag in DISTILLERS[name].flags if flag.argument == "init_epochs")
        assert init_epochs.full_run == 240


# Runs.


@pytest.mark.parametrize("name", ["abound", "factor", "fsp", "sskd"])
@pytest.mark.parametrize("saves", [1, 3])
def test_a_staged_run_that_is_cut_goes_on_bit_for_bit(distil, monkeypatch, name, saves, capsys):
    """Cut after the first of two epochs of the first stage, and after the first of the main one."""
    keep_images(monkeypatch, 64)
    flags = ("--batch_size", "32", "--epochs", "2", "--init_epochs", "2")
    whole = distil(*flags, distill=name)
    save, saved = engine.Run._save, []

    def save_then_stop(self, record):
        save(self, record)
        saved.append(record)
        if len(saved) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Run, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        distil(*flags, "--trial", "cut", "--seed", "1", distill=name)
    monkeypatch.setattr(engine.Run, "_save", save)
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    assert not same_state(load(whole / "last.pth")["distiller"], load(cut / "last.pth")["distiller"])
    train_cifar_student.main(["--resume", str(cut)])
    assert "resumed after" in capsys.readouterr().out
    a, b = load(whole / "last.pth"), load(cut / "last.pth")
    for key in ("distiller", "optimizer", "accuracies", "stage_number", "epochs_over"):
        assert same_state(a[key], b[key]), key
    assert [record.get("stage") is None for record in metrics(cut)] == [False, False, True, True]
    assert [record["epoch"] for record in metrics(cut)] == [1, 2, 1, 2]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_ships_the_student_alone(distil, monkeypatch, name, save_dir):
    keep_images(monkeypatch, 64)
    run = distil("--batch_size", "32", "--epochs", "1", "--max_steps", "1", distill=name)
    last = metrics(run)[-1]
    assert math.isfinite(last["loss"]) and ("loss_" + name in last) == (name not in ("abound", "fsp"))
    exported = export_student.main([str(run / "last.pth"), "--out", str(save_dir / "student.pth")])
    network, _ = load_exported(read_checkpoint(exported), "student.pth")
    assert network.state_dict().keys() == pair_networks("resnet14", "resnet8")[1].state_dict().keys()


# The golden checks.

GOLDEN = SHARED / "golden"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden numbers at {GOLDEN}")
def test_the_golden_numbers_of_fsp():
    content, arrays = json.loads((GOLDEN / "losses.json").read_text()), dict(numpy.load(GOLDEN / "losses.npz"))
    for case, seeds in content["losses"]["FSP"].items():
        for seed, entry in seeds.items():
            golden_losses.check_entry("FSP", case, seed, entry, arrays)


def boundary_entry():
    def plain(student, teacher):
        losses = []
        for weight, s, t in zip((0.25, 0.5, 1.0), student, teacher, strict=True):
            off = (s + 1).square() * ((s > -1) & (t <= 0)) + (s - 1).square() * ((s <= 1) & (t > 0))
            losses.append(weight * off.sum() * 3 / 1000 / len(s))
        return losses

    return entry_of({f"f{i}_{side}": (2, 2 * i, 4, 4) for side in "st" for i in (1, 2, 3)}, plain)


def plain_factor(s, t, p1=2, p2=1):
    s, t = (F.normalize(each.pow(p1).mean(1).flatten(1)) for each in (s, t))
    return (s - t).abs().pow(p2).mean()


def factor_entry(p1, p2):
    shapes = {"f3_s": (2, 6, 4, 4), "f3_t": (2, 8, 4, 4)}
    return entry_of(shapes, lambda s, t: [plain_factor(*s, *t, p1, p2)])


def translator_entry():
    def convolutions(prefix, first, last, with_bn):
        filled, in_channels = {}, first
        for layer, out_channels in ((0, first), (3, last), (6, last)):
            filled[f"{prefix}.{layer}.weight"] = (out_channels, in_channels, 3, 3)
            filled[f"{prefix}.{layer}.bias"] = (out_channels,)
            if with_bn:
                filled |= {f"{prefix}.{layer + 1}.{kind}": (out_channels,) for kind in ("weight", "bias")}
            in_channels = out_channels
        return {name: fill(name, shape).double() for name, shape in filled.items()}

    translator = convolutions("translator.encoder", 6, 4, True)
    paraphraser = convolutions("paraphraser.encoder", 8, 4, False)
    translator = {name: value.requires_grad_() for name, value in translator.items()}
    means = {}

    def plain(student, teacher):
        (x,), (y,) = student, teacher
        for layer in (0, 3, 6):
            weights = [
                translator[f"translator.encoder.{n}.{kind}"] for n in (layer, layer + 1) for kind in ("weight", "bias")
            ]
            x = F.conv2d(x, *weights[:2], padding=1)
            name = f"translator.encoder.{layer + 1}.running_mean"
            means[name] = [(0.9 * fill(name, (x.shape[1],)).double() + 0.1 * x.mean((0, 2, 3))).mean().item()]
            x = F.leaky_relu(F.batch_norm(x, None, None, *weights[2:], True), 0.1)
            weights = [paraphraser[f"paraphraser.encoder.{layer}.{kind}"] for kind in ("weight", "bias")]
            y = F.leaky_relu(F.conv2d(y, *weights, padding=1), 0.1)
        return [plain_factor(x, y)]

    entry = entry_of({"f3_s": (2, 6, 4, 4), "f3_t": (2, 8, 4, 4)}, plain, translator)
    modules = {"translator": Translator((2, 6, 4, 4), (2, 8, 4, 4)), "paraphraser": Paraphraser((2, 8, 4, 4))}
    state = [
        [f"{name}.{key}", list(value.shape)]
        for name, each in modules.items()
        for key, value in each.state_dict().items()
    ]
    # A gradient that is exactly zero in theory (a bias before BatchNorm) is stored as 0.
    norms = {key: value if value > 1e-13 else 0.0 for key, value in entry["grad_norm_params"].items()}
    return entry | {"bn_after": means, "module_state_dict": state, "grad_norm_params": norms}


def singular_entry():
    shapes = {f"f{i}_{side}": shape for side in "st" for i, shape in enumerate(SVD_SHAPES, 1)}
    entry = entry_of(shapes, plain_kdsvd)
    student, teacher = ([loss_input(3, tag, shape) for tag, shape in shapes.items() if tag.endswith(s)] for s in "st")
    one = [([each[i : i + 1] for each in student], [each[i : i + 1] for each in teacher]) for i in range(5)]
    agree = [[value.item() / 5 for value in plain_kdsvd(*sample)] for sample in one]
    differ = [[value.item() / 5 for value in plain_kdsvd(*sample, signs=(1, -1, 1, -1))] for sample in one]
    by_sign = [[[agree[i][pair], differ[i][pair]] for i in range(5)] for pair in range(3)]
    raw = [sum(max(both) for both in each) for each in by_sign]
    return entry | {
        "per_pair_per_sample_contribution_by_relative_sign": by_sign,
        "raw_lapack_sign": {"values": raw, "total": sum(raw)},
    }


ENTRIES = {
    ("ABLoss", "f1f2f3"): boundary_entry,
    ("FactorTransfer", "p1_2_p2_1"): lambda: factor_entry(2, 1),
    ("FactorTransfer", "p1=1,p2=2"): lambda: factor_entry(1, 2),
    ("FactorTransfer", "p12_p22"): lambda: factor_entry(2, 2),
    ("FactorTransfer", "translator_paraphraser"): translator_entry,
    ("KDSVD", "f1f2f3"): singular_entry,
}


@pytest.mark.parametrize("key", ENTRIES, ids="-".join)
def test_entries_that_the_golden_file_may_hold_are_checked(key):
    entry = ENTRIES[key]()
    golden_losses.check_entry(*key, "3", entry, {})
    for part in set(entry) - {"inputs"}:
        with pytest.raises(Mismatch):
            golden_losses.check_entry(*key, "3", changed(entry, part), {})
    with pytest.raises(Mismatch, match="nothing checks"):
        golden_losses.check_entry(*key, "3", entry | {"unheard_of": 1}, {})


def changed(entry, part):
    """The same entry with another number in one of its parts."""
    entry = copy.deepcopy(entry)
    if part == "total":
        entry[part] *= 1 + 1e-6
    elif part == "values":
        entry[part][-1] *= 1 + 1e-6
    elif part == "module_state_dict":
        entry[part][0][1][0] += 1
    elif part == "raw_lapack_sign":
        entry[part]["values"][1] *= 1.01
    elif part == "per_pair_per_sample_contribution_by_relative_sign":
        entry[part][1][2][1] *= 1 + 1e-6
    else:
        key = max(entry[part], key=lambda name: numpy.abs(entry[part][name]).max())
        entry[part][key] = (numpy.array(entry[part][key]) * (1 + 1e-6)).tolist()
    return entry

"""DistPro: pathways, the search of the scores, the process."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dataset import Batch
from distiller_zoo import Predictor, Progress
from distiller_zoo.distpro import SEARCHED
from distiller_zoo.pathways import STYLES, Pathways, PathwayTransform, PathwayWeights
from errors import UserError
from helper.loops import set_modes
from models.backbone import Output
from tests.check_values import g
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import (
    build_distpro,
    parts_that_differ,
    start_search,
    train_step,
)


def test_the_styles_have_the_published_values():
    expected = {"softmax": 0.1, "softmax_with_rest": 0.0909091, "scaled": 0.9090909, "sigmoid": 0.7310586}
    expected |= {"magnitude": 0.3, "constant": 1.0}
    assert expected.keys() == STYLES.keys()
    for style, value in expected.items():
        weights = PathwayWeights(10, 2, "softmax", style, 1.0).at(Progress(0, 240))
        assert weights.tolist() == pytest.approx([value] * 10, abs=1e-7), style
        doubled = PathwayWeights(10, 2, "softmax", style, 2.0).at(Progress(0, 240))
        assert torch.allclose(doubled, weights * (2 if style in ("scaled", "constant") else 1)), style


def test_the_pathways_lead_from_the_same_depth_or_deeper_to_all_of_the_teachers_maps():
    pathways = Pathways((16, 16, 32, 64), (16, 32, 64, 128))
    assert pathways.pairs == [(t, s) for t in range(4) for s in range(4) if s >= t] and len(pathways.pairs) == 10
    assert len(Pathways((4,) * 5, (4,) * 5).pairs) == 15
    uneven = Pathways((3, 4, 5), (6, 7))
    assert [(each.reduce[0].in_channels, each.expand[0].out_channels) for each in uneven.transforms] == [
        (4, 6), (5, 6), (5, 7)
    ]  # fmt: skip
    maps = [torch.randn(2, channels, 8, 8) for channels in (3, 4, 5)]
    targets = [torch.randn(2, 6, 16, 16), torch.randn(2, 7, 4, 4)]
    losses = uneven(maps, targets)
    assert losses.shape == (3,) and (losses > 0).all()
    assert torch.equal(losses, uneven([torch.randn(2, 3, 8, 8), *maps[1:]], targets)), "the stem's is left out"


def test_the_transform_is_the_published_one():
    transform, x = PathwayTransform(8, 6), torch.randn(2, 8, 5, 5)
    convolutions = [layer for layer in transform.modules() if isinstance(layer, nn.Conv2d)]
    assert [tuple(layer.weight.shape) for layer in convolutions] == [
        (6, 8, 3, 3),
        (1, 6, 1, 1),
        (6, 6, 3, 3),
        (6, 6, 3, 3),
    ]
    assert all(layer.bias is None for layer in convolutions)
    reduced = transform.reduce(x)
    mixed = transform.mix(reduced * F.conv2d(reduced, transform.attention.weight))
    larger = F.interpolate(mixed, (10, 10), mode="nearest")
    assert torch.allclose(transform(x, (10, 10)), transform.expand(larger), atol=1e-6)
    wide = PathwayTransform(520, 700)
    assert wide.attention.in_channels == 512
    deviation = wide.expand[0].weight.std().item()
    assert deviation == pytest.approx(math.sqrt(2 / (9 * 700)), rel=0.01)


def test_the_step_of_the_scores_is_adam():
    weights = PathwayWeights(6, 3, "softmax", "scaled", 1.0).double()
    scores = torch.ones(6, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([scores], lr=0.1, betas=(0.5, 0.999))
    for _ in range(5):
        scores.grad = torch.randn(6, dtype=torch.float64)
        weights.step(scores.grad.clone())
        adam.step()
    assert torch.allclose(weights.scores, scores, rtol=1e-9, atol=1e-12)
    unmoved = PathwayWeights(6, 3, "softmax", "scaled", 1.0)
    unmoved.step(torch.zeros(6))
    assert torch.equal(unmoved.scores, torch.ones(6))


@pytest.mark.parametrize("style", SEARCHED)
def test_the_gradient_of_the_scores_is_pulled_back_through_the_style(style):
    weights = PathwayWeights(4, 1, style, "scaled", 1.5).double()
    weights.scores.copy_(g((4,), 0.9, 0.3))
    gradient, step = g((4,), 0.4, 1.0), 1e-6
    found = weights.pull_back(gradient)
    for number in range(4):
        shift = torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor(number), step)
        ends = [STYLES[style](weights.scores + sign * shift, 1.5) @ gradient for sign in (1, -1)]
        assert found[number].item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), abs=1e-8)


def test_the_process_is_replayed_over_the_run():
    weights = PathwayWeights(2, 5, "softmax", "sigmoid", 1.0)
    assert torch.equal(weights.at(Progress(7, 20)), torch.ones(2).sigmoid()), "before the search: the first scores"
    weights.process.copy_(torch.arange(5.0)[:, None] * torch.tensor([1.0, 10.0]))
    replayed = torch.stack([weights.at(Progress(epoch, 9)) for epoch in range(9)])
    assert torch.allclose(replayed[:, 0], (torch.arange(9) / 2).sigmoid())
    assert torch.allclose(replayed[:, 1], (torch.arange(9) * 5.0).sigmoid())
    assert torch.equal(weights.at(Progress(0, 1)), torch.zeros(2).sigmoid())
    assert torch.isfinite(weights.at(Progress(400, 240))).all()
    searched = PathwayWeights(2, 4, "softmax", "scaled", 1.0)
    for epoch in range(2):
        searched.scores.fill_(epoch + 5)
        searched.record(Progress(epoch, 4))
    assert searched.process[:, 0].tolist() == [5.0, 6.0, 6.0, 6.0], "scores are recorded, not weights"
    assert searched().tolist() == [0.5, 0.5]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "pair", [("resnet14", "resnet8"), ("wrn_16_2", "wrn_16_1"), ("vgg13", "vgg8"), ("wrn_16_2", "ShuffleV1")]
)
def test_distpro_searches_on_a_copy_and_then_trains_the_student(pair):
    teacher, method = build_distpro(*pair)
    untouched = {name: value.clone() for name, value in method.student.state_dict().items()}
    search, optimizer = start_search(method)
    steps = 3 if pair == ("resnet14", "resnet8") else 1
    for _ in range(steps):
        batch = make_batch(2)
        output = teacher(batch.images, True)
        search.before_step(optimizer, batch, output, make_batch(2), Progress(0, 40))
        losses, _ = train_step(method, search, optimizer, batch, output, Progress(0, 40))
    search.after_epoch(Progress(0, 40))
    assert all(torch.isfinite(value) for value in losses.values())
    assert not parts_that_differ(method.student, untouched)
    searched = dict(method.search.named_parameters())
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in searched.values())
    assert (method.weights.scores != 1).any() and torch.equal(method.weights.process[0], method.weights.scores)
    *_, main = method.stages(240)
    set_modes(main, method)
    assert not any(parameter.requires_grad for parameter in searched.values())
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    for _ in range(steps):
        batch = make_batch(2)
        losses, _ = train_step(method, main, optimizer, batch, teacher(batch.images, True), Progress(9, 240))
    changed = {name.split(".")[0] for name in parts_that_differ(method, before)}
    assert changed == {"student", "pathways"}
    trained = [*method.student.named_parameters(), *method.pathways.named_parameters()]
    for name, parameter in trained:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert all(parameter.grad is None for parameter in teacher.parameters())
    exported, images = method.eval().export(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(exported(images), Predictor(method)(images))


def test_distpros_terms_by_hand_and_its_flags():
    teacher, method = build_distpro(alpha=0.5, beta=3.0, kd_weight=2.0)
    batch = make_batch()
    teacher_output, student = teacher(batch.images, True), method.train().respond(batch.images, None)
    method.weights.process.copy_(torch.rand_like(method.weights.process))
    terms = method.losses(student, teacher_output, batch.targets, batch.index, Progress(239, 240))
    *_, last = method.weights.process
    weights = STYLES["scaled"](last, 2.0)
    expected = 3 * (weights * method.pathways(student.maps, teacher_output.maps)).sum()
    assert set(terms) == {"ce", "kd", "distpro"}
    assert terms["distpro"].item() == pytest.approx(expected.item(), rel=1e-5)
    method.beta = 0.0
    terms = method.losses(student, teacher_output, batch.targets, batch.index, Progress(239, 240))
    assert set(terms) == {"ce", "kd"}


def test_constant_weights_need_no_search_and_unknown_styles_are_refused():
    _, method = build_distpro(distpro_style="constant", kd_weight=0.3)
    (main,) = method.stages(240)
    assert main.name == "main" and method.search is None
    assert torch.allclose(method.weights.at(Progress(5, 240)), torch.full((10,), 0.3))
    with pytest.raises(UserError, match="--distpro_style"):
        build_distpro(distpro_style="333")
    _, method = build_distpro(init_epochs=7)
    assert method.stages(240)[0].epochs == 7 and len(method.weights.process) == 7


def test_distpro_is_finite_for_blank_equal_and_single_images():
    teacher, method = build_distpro("wrn_16_2", "wrn_16_1")
    search, optimizer = start_search(method)
    single = torch.randn(1, 3, 32, 32)
    for images in (torch.zeros(2, 3, 32, 32), single.expand(2, -1, -1, -1), single):
        batch = Batch(images, torch.ones(len(images), dtype=torch.int64), torch.arange(len(images)))
        output = teacher(images, True)
        search.before_step(optimizer, batch, output, batch, Progress(0, 40))
        losses, _ = train_step(method, search, optimizer, batch, output, Progress(0, 40))
        assert all(torch.isfinite(value) for value in losses.values())
        assert all(torch.isfinite(value).all() for value in method.state_dict().values())


def test_maps_of_nothing_and_far_logits_keep_the_pathways_finite():
    pathways = Pathways((3, 4), (5, 6)).train()
    maps = [torch.zeros(2, channels, 8, 8, requires_grad=True) for channels in (3, 4)]
    pathways(maps, [torch.zeros(2, channels, 4, 4) for channels in (5, 6)]).sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in (*maps, *pathways.parameters()))
    _, method = build_distpro(alpha=1.0)
    logits = torch.tensor([[500.0, 0.0], [0.0, 500.0]], requires_grad=True)
    output = Output([], None, None, None, logits)
    terms = method.label_and_logit_losses(output, output._replace(logits=-logits.detach()), torch.tensor([1, 0]))
    sum(terms.values()).backward()
    assert torch.isfinite(logits.grad).all()

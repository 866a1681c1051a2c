"""DistPro: the gradient of the scores and its step."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dataset import Batch
from distiller_zoo import Progress, Task
from distiller_zoo import distpro as distpro_module
from distiller_zoo.distpro import DistPro, look_ahead
from distiller_zoo.kd import kl_divergence
from distiller_zoo.pathways import STYLES
from models.backbone import Backbone
from tests.check_values import g
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import (
    FrozenTeacher,
    build_distpro,
    parts_that_differ,
    start_search,
    train_step,
)


class Tiny(Backbone):
    """Two smooth stages and a BatchNorm, for derivatives of the second order."""

    shows_preactivations = True  # there is no ReLU

    def __init__(self, width):
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width + 1, 3, stride=2, padding=1)
        self.bn, self.fc = nn.BatchNorm2d(width + 1), nn.Linear(width + 1, 4)

    def forward_trunk(self, x, preact=False):
        x = torch.tanh(self.stem(x))
        return [x], x

    def forward_last_stage(self, x, preact=False):
        x = torch.tanh(self.bn(self.stage(x)))
        return x, x

    def get_classifier(self):
        return self.fc


def tiny_search(style="scaled", of_labels=(0.0, None), **hyper_parameters):
    """A search of two tiny networks in float64 behind its first step, and what a step is made of; `of_labels` are label
    smoothing and class weights."""
    student, teacher_network = Tiny(2), Tiny(3)
    teacher = FrozenTeacher(teacher_network).double()
    task = Task(4, 8, 4, torch.zeros(1, dtype=torch.int64), *of_labels)
    method = DistPro(student, teacher_network, task, distpro_search_style=style, **hyper_parameters).double()
    for transform in method.search.pathways.transforms:  # kinks would spoil the finite difference
        transform.reduce[2] = transform.mix[2] = nn.Softplus()
    search, optimizer = start_search(method)
    batches = [
        Batch(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(0, 4, (4,)), torch.arange(4))
        for _ in range(3)
    ]
    train_step(method, search, optimizer, batches[0], teacher(batches[0].images, True), Progress(0, 40))
    return method, search, optimizer, batches[1], teacher(batches[1].images, True), batches[2]


def exact_score_gradient(method, optimizer, batch, teacher, held_out):
    """The derivative of the held-out loss behind the step by the scores, through the graph of the step."""
    search, scores = method.search, method.weights.scores.clone().requires_grad_()
    parameters, (group,) = dict(search.named_parameters()), optimizer.param_groups
    statistics = {name: value.clone() for name, value in search.named_buffers()}

    def run(parameters, images, maps=None):
        return torch.func.functional_call(search, {**parameters, **statistics}, (images, maps))

    def cross_entropy(logits, targets):
        wanted = (1 - method.label_smoothing) * F.one_hot(targets, 4) + method.label_smoothing / 4
        weights = torch.ones(4) if method.class_weights is None else method.class_weights
        return -(wanted * weights * logits.log_softmax(1)).sum(1).mean()

    output, losses = run(parameters, batch.images, teacher.maps)
    loss = method.gamma * cross_entropy(output.logits, batch.targets)
    loss = loss + method.alpha * kl_divergence(output.logits, teacher.logits, method.kd_T)
    loss = loss + method.beta * (STYLES[method.distpro_search_style](scores, method.kd_weight) * losses).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    ahead = {
        name: value - group["lr"] * (
            group["momentum"] * optimizer.state[value]["momentum_buffer"] + gradient + group["weight_decay"] * value
        )
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
    }  # fmt: skip
    validation = cross_entropy(run(ahead, held_out.images)[0].logits, held_out.targets)
    return torch.autograd.grad(validation, scores)[0]


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"constant"}))
def test_the_score_gradient_is_the_exact_one_of_second_order(style, monkeypatch):
    method, _, optimizer, batch, teacher, held_out = tiny_search(style, alpha=0.5, beta=2.0, kd_weight=1.5)
    method.weights.scores.copy_(g((3,), 0.9, 0.3))
    exact = exact_score_gradient(method, optimizer, batch, teacher, held_out)
    published = method.score_gradient(optimizer, batch, teacher, held_out)
    assert exact.norm() > 1e-6
    assert torch.allclose(published, exact, rtol=2e-2, atol=2e-2 * exact.norm().item())
    monkeypatch.setattr(distpro_module, "REACH", 1e-4)
    assert torch.allclose(
        method.score_gradient(optimizer, batch, teacher, held_out), exact, rtol=1e-5, atol=1e-6 * exact.norm().item()
    )


def test_label_smoothing_and_class_weights_reach_the_held_out_images(monkeypatch):
    monkeypatch.setattr(distpro_module, "REACH", 1e-4)
    of_labels = 0.3, torch.tensor([0.2, 3.0, 1.0, 0.5])
    method, _, optimizer, batch, teacher, held_out = tiny_search(of_labels=of_labels)
    exact = exact_score_gradient(method, optimizer, batch, teacher, held_out)
    found = method.score_gradient(optimizer, batch, teacher, held_out)
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6 * exact.norm().item())


def test_the_look_ahead_is_the_step_that_sgd_makes():
    method, search, optimizer, batch, teacher, _ = tiny_search()
    parameters = dict(method.search.named_parameters())
    _, losses = method(batch, teacher, Progress(0, 40), search)
    gradients = dict(zip(parameters, torch.autograd.grad(sum(losses.values()), parameters.values()), strict=True))
    ahead = look_ahead(optimizer, parameters, gradients)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name].clone()
    optimizer.step()
    for name, parameter in parameters.items():
        assert torch.allclose(ahead[name], parameter, rtol=1e-12, atol=1e-15), name


def test_the_step_of_the_scores_leaves_everything_else_as_it_was():
    teacher, method = build_distpro()
    _, optimizer = start_search(method)
    batch, held_out = make_batch(), make_batch()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.move_scores(optimizer, batch, teacher(batch.images, True), held_out, Progress(0, 40))
    moved = {"weights.scores", "weights.adam_mean", "weights.adam_square", "weights.adam_steps"}
    assert parts_that_differ(method, before) == moved
    assert all(parameter.grad is None for parameter in method.parameters())
    assert not optimizer.state, "the optimizer learns nothing of a step that is not made"


def test_scores_move_towards_the_pathways_that_help_the_held_out_images():
    """Where a step of the scores is made many times on the same batches, the held-out loss behind the step falls."""
    method, _, optimizer, batch, teacher, held_out = tiny_search("sigmoid", beta=50.0)

    def behind_the_step():
        parameters = dict(method.search.named_parameters())
        output, losses = method.search(batch.images, teacher.maps)
        loss = sum(method._terms(output, teacher, batch.targets, method.weights(), losses).values())
        ahead = look_ahead(optimizer, parameters, distpro_module.gradients_of(loss, parameters))
        output, _ = torch.func.functional_call(method.search, ahead, (held_out.images,))
        return F.cross_entropy(output.logits, held_out.targets).item()

    before = behind_the_step()
    for _ in range(30):
        method.move_scores(optimizer, batch, teacher, held_out, Progress(0, 40))
    assert behind_the_step() < before

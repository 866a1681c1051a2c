"""Methods that teach themselves or search while they train: ONE and DistPro."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train_cifar_student
from dataset import Batch, Loader
from dataset.images import Augmentation, ImageData, Images
from distiller_zoo import Predictor, Progress, Task
from distiller_zoo import distpro as distpro_module
from distiller_zoo.distpro import DistPro, look_ahead
from distiller_zoo.kd import kl_divergence
from distiller_zoo.one import ONE, ensemble_divergence, ensemble_logits, ramp
from distiller_zoo.pathways import STYLES, Pathways, PathwayTransform, PathwayWeights
from errors import UserError
from helper import engine
from helper.loops import _endless, begin, train_step
from helper.networks import FrozenTeacher
from models import build_model, imagenet_model_dict, model_dict
from models.backbone import Backbone, Output
from tests.check_values import g
from tests.conftest import make_batch, pair_networks
from tests.run_folders import load, metrics, same_state

pytestmark = pytest.mark.usefixtures("few_images")
TASK = Task(10, 32, 8, torch.zeros(1, dtype=torch.int64))


def parts_that_differ(network: nn.Module, before: dict) -> set[str]:
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


# --- the split of the networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*model_dict, *imagenet_model_dict])
def test_a_branch_is_the_last_stage_and_the_head_initialised_anew(name):
    network = build_model(name, 5).eval()
    branch = network.make_branch().eval()
    own, new = dict(network.named_parameters()), dict(branch.named_parameters())
    assert set(new) < set(own) and not any(a is b for a in new.values() for b in own.values())
    for key, value in new.items():
        if value.dim() > 1:
            assert not torch.equal(value, own[key]), f"{key} is not initialised anew"
            assert value.std().item() == pytest.approx(own[key].std().item(), rel=0.15), key
    images = torch.randn(1, 3, 64 if name in imagenet_model_dict else 32, 64 if name in imagenet_model_dict else 32)
    with torch.no_grad():
        for preact in (False, True):
            maps, entering = network.forward_trunk(images, preact)
            last_map, final = branch.forward_last_stage(entering, preact)
            whole = network.outputs(images, preact)
            assert len(maps) == len(whole.maps) - 1 and entering.shape[1] == maps[-1].shape[1]
            assert (last_map.shape, final.shape) == (whole.maps[-1].shape, whole.final.shape)
        # With the network's own weights the branch is the network, so its children are all that is needed.
        branch.load_state_dict({key: network.state_dict()[key] for key in branch.state_dict()})
        _, final = branch.forward_last_stage(network.forward_trunk(images)[1])
        assert torch.equal(branch.classify(branch.activate(final))[1], network(images))
    trunk = nn.ModuleList(network.get_submodule(name) for name in network.trunk)
    in_trunk, in_branch = (sum(p.numel() for p in part.parameters()) for part in (trunk, branch))
    assert in_trunk + in_branch == sum(p.numel() for p in network.parameters())


def test_vgg_pools_images_of_64_pixels_once_more():
    network = build_model("vgg8", 5).eval()
    assert network.outputs(torch.randn(1, 3, 64, 64)).maps[-1].shape[2:] == (4, 4)


# --- ONE --------------------------------------------------------------------------------------------------------------


def build_one(student="resnet8", **hyper_parameters):
    return ONE(build_model(student, 10), None, TASK, **hyper_parameters)


def test_ones_terms_have_the_published_values():
    zs, zt = g((4, 10), 0.7, 0.1, 2), g((4, 10), 0.45, 0.5, 3)
    assert ensemble_divergence(zs, zt, 3).item() == pytest.approx(2.3591304089, abs=1e-9)
    published = {0: 0.0067379, 40: 0.2865048, 79: 0.9992191, 80: 1, 200: 1}
    for epoch, value in published.items():
        assert ramp(epoch, 80) == pytest.approx(value, abs=1e-7)


def test_the_ensemble_is_the_mean_of_the_branches_by_their_gates():
    branches, scores = [torch.randn(5, 7) for _ in range(3)], torch.randn(5, 3)
    gates = scores.softmax(1)
    expected = sum(gates[:, number, None] * branch for number, branch in enumerate(branches))
    assert torch.allclose(ensemble_logits(branches, scores), expected, atol=1e-6)


def test_ones_loss_is_the_sum_of_its_terms_by_hand():
    method, batch = build_one(gamma=0.5, beta=2.0, kd_T=2.0, ramp_epochs=10).double().train(), make_batch()
    batch = batch._replace(images=batch.images.double())
    _, terms = method(batch, None, Progress(5, 20))
    output = method.respond(batch.images, None)
    gates = output.gate_scores.softmax(1)
    ensemble = sum(gates[:, i, None] * z for i, z in enumerate(output.branch_logits))
    labels = sum(F.cross_entropy(z, batch.targets) for z in output.branch_logits)
    target = (ensemble / 2).softmax(1) + 1e-7
    divergence = sum(4 * (target * (target.log() - (z / 2).log_softmax(1))).sum() / 4 for z in output.branch_logits)
    expected = {
        "ce": 0.5 * labels,
        "ce_ensemble": 0.5 * F.cross_entropy(ensemble, batch.targets),
        "one": 2 * math.exp(-5 * 0.25) * divergence,
    }
    assert terms.keys() == expected.keys()
    for name, value in terms.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-9), name


def test_the_divergence_has_its_numerical_gradient_and_does_not_teach_the_ensemble():
    branch, ensemble = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda z: ensemble_divergence(z, ensemble, 3), (branch,))
    assert not ensemble_divergence(branch.detach(), ensemble, 3).requires_grad


def test_ones_flags_move_the_loss_as_they_say():
    method, batch = build_one().train(), make_batch()
    _, first = method(batch, None, Progress(0, 300))
    _, late = method(batch, None, Progress(80, 300))
    assert late["one"].item() == pytest.approx(first["one"].item() / math.exp(-5), rel=1e-4)
    assert late["ce"] == first["ce"]
    method.ramp_epochs = 160
    assert method(batch, None, Progress(80, 300))[1]["one"] < late["one"]
    method.gamma = 0.0
    assert set(method(batch, None, Progress(80, 300))[1]) == {"one"}
    method.gamma, method.beta = 1.0, 0.0
    assert set(method(batch, None, Progress(80, 300))[1]) == {"ce", "ce_ensemble"}
    assert len(build_one(branches=4).other_branches) == 3
    with pytest.raises(UserError, match=r"--branches.*at least 2"):
        build_one(branches=1)
    with pytest.raises(UserError, match="--batch_size"):
        ONE(build_model("resnet8", 10), None, TASK._replace(batch_size=1))


@pytest.mark.parametrize("student", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV2", "ResNet50"])
def test_one_trains_trunk_branches_and_gate_and_ships_the_first_branch(student):
    method = build_one(student)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)
    (stage,) = method.stages(300)
    begin(stage, method)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    for _ in range(3 if student == "resnet8" else 1):
        losses, _ = train_step(method, stage, optimizer, make_batch(2), None, Progress(40, 300))
    assert all(torch.isfinite(value) for value in losses.values())
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    changed = parts_that_differ(method, before)
    assert {name.split(".")[0] for name in changed} == {"student", "other_branches", "gate"}
    method.eval()
    images = torch.randn(2, 3, 32, 32)
    exported = method.export()
    assert exported.state_dict().keys() == build_model(student, 10).state_dict().keys()
    with torch.no_grad():
        assert torch.equal(exported(images), Predictor(method)(images))
        assert torch.allclose(method.respond(images, None).logits, exported(images), atol=1e-6)


def test_every_branch_has_statistics_of_its_own_and_the_trunk_sees_each_image_once():
    method = build_one().train()
    method.respond(make_batch().images, None)
    counts = {name: int(value) for name, value in method.state_dict().items() if name.endswith("num_batches_tracked")}
    assert set(counts.values()) == {1}
    first, second = (branch.layer3[0].bn1.running_mean for branch in (method.student, method.other_branches[0]))
    assert not torch.equal(first, second)


def test_one_is_finite_at_far_logits_equal_rows_and_blank_images():
    far = torch.zeros(2, 6).scatter_(1, torch.tensor([[0], [1]]), 500.0)
    branches = [(far * sign).requires_grad_() for sign in (1, -1, 0)]
    scores = torch.tensor([[500.0, 0, -500], [0, 0, 0]], requires_grad=True)
    ensemble = ensemble_logits(branches, scores)
    loss = F.cross_entropy(ensemble, torch.tensor([3, 4])) + sum(ensemble_divergence(z, ensemble, 3) for z in branches)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(z.grad).all() for z in (*branches, scores))
    method = build_one().train()
    for images in (torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1), torch.zeros(4, 3, 32, 32)):
        _, terms = method(Batch(images, torch.tensor([1, 2, 1, 1]), torch.arange(4)), None, Progress(0, 300))
        sum(terms.values()).backward()
        assert all(torch.isfinite(value) for value in terms.values())
        assert all(torch.isfinite(parameter.grad).all() for parameter in method.parameters())


# --- DistPro ----------------------------------------------------------------------------------------------------------


def build_distpro(teacher_name="resnet14", student_name="resnet8", **hyper_parameters):
    teacher, student = pair_networks(teacher_name, student_name)
    return FrozenTeacher(teacher), DistPro(student, teacher, TASK, **hyper_parameters)


def start_search(method):
    """The search's stage, begun, and its optimizer."""
    search, _ = method.stages(240)
    begin(search, method)
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    return search, torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


def test_the_styles_have_the_published_values():
    expected = {"softmax": 0.1, "softmax_with_rest": 0.0909091, "scaled": 0.9090909, "sigmoid": 0.7310586}
    expected |= {"magnitude": 0.3, "constant": 1.0}
    assert expected.keys() == STYLES.keys()
    for style, value in expected.items():
        weights = PathwayWeights(10, 2, style, 1.0)()
        assert weights.tolist() == pytest.approx([value] * 10, abs=1e-7), style
        doubled = PathwayWeights(10, 2, style, 2.0)()
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
    weights = PathwayWeights(6, 3, "scaled", 1.0).double()
    scores = torch.ones(6, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([scores], lr=0.1, betas=(0.5, 0.999))
    for _ in range(5):
        scores.grad = torch.randn(6, dtype=torch.float64)
        weights.step(scores.grad.clone())
        adam.step()
    assert torch.allclose(weights.scores, scores, rtol=1e-9, atol=1e-12)
    unmoved = PathwayWeights(6, 3, "scaled", 1.0)
    unmoved.step(torch.zeros(6))
    assert torch.equal(unmoved.scores, torch.ones(6))


@pytest.mark.parametrize("style", STYLES)
def test_the_gradient_of_the_scores_is_pulled_back_through_the_style(style):
    weights = PathwayWeights(4, 1, style, 1.5).double()
    weights.scores.copy_(g((4,), 0.9, 0.3))
    gradient, step = g((4,), 0.4, 1.0), 1e-6
    found = weights.pull_back(gradient)
    for number in range(4):
        shift = torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor(number), step)
        ends = [weights.of(weights.scores + sign * shift) @ gradient for sign in (1, -1)]
        assert found[number].item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), abs=1e-8)


def test_the_process_is_replayed_over_the_run():
    weights = PathwayWeights(2, 5, "constant", 1.0)
    assert torch.equal(weights.at(Progress(7, 20)), torch.ones(2)), "before the search: the first weights"
    weights.process.copy_(torch.arange(5.0)[:, None] * torch.tensor([1.0, 10.0]))
    replayed = torch.stack([weights.at(Progress(epoch, 9)) for epoch in range(9)])
    assert torch.allclose(replayed[:, 0], torch.arange(9) / 2) and torch.allclose(replayed[:, 1], torch.arange(9) * 5.0)
    assert weights.at(Progress(0, 1)).tolist() == [0, 0]
    assert torch.isfinite(weights.at(Progress(400, 240))).all()
    searched = PathwayWeights(2, 4, "sigmoid", 1.0)
    for epoch in range(2):
        searched.scores.fill_(epoch + 5)
        searched.record(Progress(epoch, 4))
    assert torch.allclose(searched.process[:, 0], torch.tensor([5.0, 6.0, 6.0, 6.0]).sigmoid())


class Tiny(Backbone):
    """Two smooth stages and a BatchNorm, for derivatives of the second order."""

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


def tiny_search(style="scaled", **hyper_parameters):
    """A search of two tiny networks in float64 behind its first step, and what a step is made of."""
    student, teacher_network = Tiny(2), Tiny(3)
    teacher = FrozenTeacher(teacher_network).double()
    task = Task(4, 8, 4, torch.zeros(1, dtype=torch.int64))
    method = DistPro(student, teacher_network, task, distpro_style=style, **hyper_parameters).double()
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

    output, losses = run(parameters, batch.images, teacher.maps)
    loss = method.gamma * F.cross_entropy(output.logits, batch.targets)
    loss = loss + method.alpha * kl_divergence(output.logits, teacher.logits, method.kd_T)
    loss = loss + method.beta * (method.weights.of(scores) * losses).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    ahead = {
        name: value - group["lr"] * (
            group["momentum"] * optimizer.state[value]["momentum_buffer"] + gradient + group["weight_decay"] * value
        )
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
    }  # fmt: skip
    validation = F.cross_entropy(run(ahead, held_out.images)[0].logits, held_out.targets)
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
    assert (method.weights.scores != 1).any() and torch.equal(method.weights.process[0], method.weights())
    *_, main = method.stages(240)
    begin(main, method)
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
    expected = 3 * (last * method.pathways(student.maps, teacher_output.maps)).sum()
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


# --- the search within a run ------------------------------------------------------------------------------------------


def test_held_out_images_come_in_passes_that_differ_and_can_be_taken_up_anywhere():
    images = Images(torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10))
    data = ImageData("fake", images, images, list("abcdefghij"), (0.5,) * 3, (0.25,) * 3, Augmentation())
    loader = Loader(images, data, 4, torch.device("cpu"), data.augmentation, 3)
    whole = _endless(loader, 2, 0)
    batches = [next(whole) for _ in range(9)]
    for first in (1, 3, 7):
        taken_up = next(_endless(loader, 2, first))
        assert all(torch.equal(a, b) for a, b in zip(taken_up[:3], batches[first][:3], strict=True))
    passes = [torch.cat([batch.index for batch in batches[start : start + 3]]) for start in (0, 3, 6)]
    assert all(torch.equal(each.sort().values, torch.arange(10)) for each in passes)
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])


def test_the_search_never_trains_on_the_held_out_images(distil, monkeypatch):
    seen, original = {"steps": set(), "held out": set()}, DistPro.move_scores

    def spy(self, optimizer, batch, teacher, held_out, progress):
        seen["steps"] |= set(batch.index.tolist())
        seen["held out"] |= set(held_out.index.tolist())
        original(self, optimizer, batch, teacher, held_out, progress)

    monkeypatch.setattr(DistPro, "move_scores", spy)
    distil("--batch_size", "32", "--epochs", "1", "--init_epochs", "1", distill="distpro")
    assert not seen["steps"] & seen["held out"] and (len(seen["steps"]), len(seen["held out"])) == (102, 26)


@pytest.mark.parametrize("place", ["within the search", "behind the search's first epoch"])
def test_a_search_that_is_cut_goes_on_as_if_it_had_not_been(distil, monkeypatch, place):
    flags = ("--batch_size", "64", "--epochs", "1", "--init_epochs", "2", "--save_every_steps", "1")
    whole = distil(*flags, distill="distpro")
    save, save_last = engine.Run._save, engine.Run._save_last

    def stop_after_epoch(self, record):
        save(self, record)
        raise KeyboardInterrupt

    def stop_within_epoch(self, model, epoch_state):
        save_last(self, model, epoch_state)
        if epoch_state is not None and self.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place == "within the search":
            patch.setattr(engine.Run, "_save_last", stop_within_epoch)
        else:
            patch.setattr(engine.Run, "_save", stop_after_epoch)
        with pytest.raises(KeyboardInterrupt):
            distil(*flags, "--trial", "cut", "--seed", "1", distill="distpro")
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    stopped = load(cut / "last.pth")
    assert stopped["stage_number"] == 0 and (stopped["epoch_state"] is not None) == (place == "within the search")
    assert (stopped["distiller"]["weights.scores"] != 1).any()
    train_cifar_student.main(["--resume", str(cut)])
    a, b = load(whole / "last.pth"), load(cut / "last.pth")
    for key in ("distiller", "optimizer", "epoch", "step", "accuracies"):
        assert same_state(a[key], b[key]), key
    assert [record.get("stage") for record in metrics(cut)] == ["search", "search", None]


def test_one_runs_without_a_teacher_and_resumes(distil, monkeypatch):
    flags = ("--batch_size", "32", "--epochs", "2")
    whole = distil(*flags, distill="one", teacher=False)
    (first, _) = metrics(whole)
    assert {name for name in first if name.startswith("loss_")} == {"loss_ce", "loss_ce_ensemble", "loss_one"}
    config = json.loads((whole / "config.json").read_text())
    assert config["kd_T"] == 3 and config["ramp_epochs"] == 1, "80 of 300 epochs, in a run of 2"
    save = engine.Run._save

    def stop(self, record):
        save(self, record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.Run, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            distil(*flags, "--trial", "cut", "--seed", "1", distill="one", teacher=False)
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    train_cifar_student.main(["--resume", str(cut)])
    a, b = load(whole / "last.pth"), load(cut / "last.pth")
    assert same_state(a["distiller"], b["distiller"]) and same_state(a["optimizer"], b["optimizer"])

"""ONE: branches, their gated ensemble, its terms."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dataset import Batch
from distiller_zoo import Predictor, Progress
from distiller_zoo.one import ONE, ensemble_divergence, ensemble_logits, ramp
from errors import UserError
from helper.loops import set_modes
from models import build_model, imagenet_model_dict, model_dict
from tests.check_values import g
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import TASK, parts_that_differ, train_step


@pytest.mark.quick(6)
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
    set_modes(stage, method)
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

"""Several teachers: averaged logits, and segments of NORM for each."""

import copy

import pytest
import torch

from distiller_zoo import DISTILLERS, Progress, Task
from distiller_zoo.feature_transform import FeatureTransform, norm_loss
from distiller_zoo.maps import match_size
from errors import UserError
from models import build_model
from models.ensemble import Ensemble
from tests.conftest import make_batch

CLASSES = 10
TASK = Task(CLASSES, 32, 4, torch.arange(8) % CLASSES)


def teachers(*names: str) -> list:
    torch.manual_seed(0)
    return [build_model(name, CLASSES).eval() for name in names]


@torch.no_grad()
@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ((3.0, 1.0), (0.75, 0.25))])
def test_logits_are_averaged_and_the_rest_is_each_ones_own(weights, shares):
    pair, images = teachers("resnet14", "vgg8"), torch.randn(2, 3, 32, 32)
    both = Ensemble(pair, weights)
    shown, own = both.outputs(images), [each.outputs(images) for each in pair]
    assert torch.allclose(shown.logits, sum(share * each.logits for share, each in zip(shares, own, strict=True)))
    for each, alone in zip((shown, *shown.others), own, strict=True):
        assert torch.equal(each.final, alone.final) and torch.equal(each.pooled, alone.pooled)
    assert ", ".join(f"{share:g}" for share in shares) in both.describe(32)


#: (Ct, H, W) of both teachers, for a student of 4x4: equal sizes, an average in one of them, maxima and an average.
SIZES = [((5, 4, 4), (3, 4, 4)), ((5, 4, 4), (3, 3, 3)), ((5, 3, 3), (3, 2, 2))]


@pytest.mark.parametrize("maps", SIZES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_both_forms_are_each_teachers_own_loss_with_gradients(maps, training):
    """Two teachers of different width and map size: N segments of each, its own loss, summed with their shares."""
    torch.manual_seed(0)
    n, shares, x = 3, (0.7, 0.3), torch.randn(6, 7, 4, 4, dtype=torch.float64, requires_grad=True)
    targets = [torch.randn(6, *shape, dtype=torch.float64) for shape in maps]
    direct = FeatureTransform(7, [shape[0] for shape in maps], n, form="direct", shares=shares).double().train(training)
    collapsed = copy.deepcopy(direct)
    collapsed.form = "collapsed"
    assert direct.expand[0].weight.shape[0] == n * sum(shape[0] for shape in maps)
    found = []
    for transform in (direct, collapsed):
        out, loss = transform(x, targets)
        inputs = (x, *transform.parameters())
        found.append([out, loss, *torch.autograd.grad(out.square().sum() + loss, inputs)])
    with torch.no_grad():
        parts = copy.deepcopy(direct).expand(x).split([n * shape[0] for shape in maps], 1)
        losses = [norm_loss(match_size(y, *each.shape[2:]), each) for y, each in zip(parts, targets, strict=True)]
    assert torch.allclose(found[0][1], 0.7 * losses[0] + 0.3 * losses[1], rtol=1e-12)
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("student", ["resnet8", "wrn_16_1"])
def test_norm_matches_n_segments_of_each(student):
    pair, batch = teachers("resnet14", "wrn_16_2"), make_batch(4)
    both = Ensemble(pair, (0.7, 0.3))
    method = DISTILLERS["norm"](build_model(student, CLASSES), both, TASK, co_sponge=3, beta1=1.0, alpha=1.0)
    method = method.double().eval()
    with torch.no_grad():
        images = batch.images.double()
        seen, own = both.double().outputs(images), [each.outputs(images) for each in pair]
        losses = method(batch._replace(images=images), seen, Progress(0, 2))[1]
        expanded = method.transform.expand(method.student.forward_maps(images)[1])
    parts = [norm_loss(y, each.final) for y, each in zip(expanded.split([3 * 64, 3 * 128], 1), own, strict=True)]
    assert torch.allclose(losses["norm"], 0.7 * parts[0] + 0.3 * parts[1], rtol=1e-12)
    assert losses["kd"].isfinite()


def test_the_transform_of_several_teachers_folds_exactly():
    both = Ensemble(teachers("resnet14", "vgg8"), (1, 2))
    method = DISTILLERS["norm"](build_model("resnet8", CLASSES), both, TASK, co_sponge=3).double()
    batch = make_batch(4)
    images = batch.images.double()
    with torch.no_grad():
        for _ in range(3):  # running statistics that are not the initial ones
            method(batch._replace(images=images), both.double().outputs(images), Progress(0, 2))
        method.eval()
        folded = method.export()
        assert torch.allclose(folded(images), method.predict(images), rtol=1e-12, atol=1e-12)
    assert folded.state_dict().keys() == build_model("resnet8", CLASSES).state_dict().keys()


@pytest.mark.parametrize("distill", ["kd", "attention", "rkd", "crd", "ofd"])
def test_other_methods_read_the_first_ones_maps(distill):
    pair, batch = teachers("resnet14", "vgg8"), make_batch(4)
    small = {"nce_k": 4} if distill == "crd" else {}
    losses = []
    for teacher in (Ensemble(pair, (1, 0)), pair[0]):
        torch.manual_seed(0)
        method = DISTILLERS[distill](build_model("resnet8", CLASSES), teacher, TASK, **small)
        with torch.no_grad():
            seen = teacher.outputs(batch.images, method.teacher_preact)
        losses.append({name: value.item() for name, value in method(batch, seen, Progress(0, 2))[1].items()})
    assert losses[0] == pytest.approx(losses[1])


def test_teachers_with_other_classes_teach_by_their_maps_alone():
    both = Ensemble([build_model("resnet14", CLASSES), build_model("vgg8", 7)]).eval()
    assert both.num_classes == 0 and both.outputs(torch.randn(2, 3, 32, 32)).logits.shape == (2, 0)
    assert "they have 10, 7 classes" in both.describe(32)
    assert DISTILLERS["norm"](build_model("resnet8", CLASSES), both, TASK).transform.teacher_channels == 64 + 512
    with pytest.raises(UserError, match="the teacher has no classifier"):
        DISTILLERS["kd"](build_model("resnet8", CLASSES), both, TASK)


def test_what_cannot_be_averaged_or_shared_is_refused():
    pair = teachers("resnet14", "vgg8")
    for weights in ([1.0], [0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(UserError, match="2 networks need 2 weights"):
            Ensemble(pair, weights)
    for distill, hyper_parameters in (("simkd", {}), ("srrl", {}), ("norm", {"ft": "none", "co_sponge": 1})):
        with pytest.raises(UserError, match=r"choose|use --ft default"):
            DISTILLERS[distill](build_model("resnet8", CLASSES), Ensemble(pair), TASK, **hyper_parameters)

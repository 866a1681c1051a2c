"""Several teachers: averaged logits, and segments of NORM for each."""

import pytest
import torch

from distiller_zoo import DISTILLERS, Progress, Task
from distiller_zoo.feature_transform import norm_loss
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
def test_logits_are_averaged_and_the_rest_is_the_first_ones():
    pair, images = teachers("resnet14", "vgg8"), torch.randn(2, 3, 32, 32)
    for weights, shares in ((None, (0.5, 0.5)), ((3.0, 1.0), (0.75, 0.25))):
        shown, own = Ensemble(pair, weights).outputs(images), [each.outputs(images) for each in pair]
        expected = sum(share * each.logits for share, each in zip(shares, own, strict=True))
        assert torch.allclose(shown.logits, expected)
        assert torch.equal(shown.pooled, own[0].pooled) and torch.equal(shown.maps[-1], own[0].maps[-1])
        assert torch.equal(shown.final[:, :64], own[0].final)
        assert shown.final.shape == (2, 64 + 512, *own[0].final.shape[2:])
    assert "0.75, 0.25" in Ensemble(pair, (3, 1)).describe(32)


def test_norm_matches_n_segments_of_each():
    pair, batch = teachers("resnet14", "wrn_16_2"), make_batch(4)
    both = Ensemble(pair)
    method = DISTILLERS["norm"](build_model("resnet8", CLASSES), both, TASK, co_sponge=3, beta1=1.0, alpha=1.0)
    method = method.double().eval()
    with torch.no_grad():
        images = batch.images.double()
        seen, own = both.double().outputs(images), [each.outputs(images) for each in pair]
        losses = method(batch._replace(images=images), seen, Progress(0, 2))[1]
        expanded = method.transform.expand(method.student.forward_maps(images)[1]).unflatten(1, (3, -1))
    parts = [
        norm_loss(expanded[:, :, channels].flatten(1, 2), each.final)
        for channels, each in zip((slice(0, 64), slice(64, None)), own, strict=True)
    ]
    assert torch.allclose(losses["norm"], (64 * parts[0] + 128 * parts[1]) / 192, rtol=1e-12)
    assert losses["kd"].isfinite()


@pytest.mark.parametrize("distill", ["kd", "attention", "rkd", "crd"])
def test_other_methods_read_the_first_ones_maps(distill):
    both, batch = Ensemble(teachers("resnet14", "vgg8")), make_batch(4)
    small = {"nce_k": 4} if distill == "crd" else {}
    method = DISTILLERS[distill](build_model("resnet8", CLASSES), both, TASK, **small)
    with torch.no_grad():
        seen = both.outputs(batch.images)
    losses = method(batch, seen, Progress(0, 2))[1]
    assert all(value.isfinite() for value in losses.values())


def test_what_cannot_be_averaged_or_shared_is_refused():
    pair = teachers("resnet14", "vgg8")
    with pytest.raises(UserError, match="10 and 7 classes"):
        Ensemble([pair[0], build_model("vgg8", 7)])
    for weights in ([1.0], [0.0, 0.0], [1.0, -1.0]):
        with pytest.raises(UserError, match="2 networks need as many weights"):
            Ensemble(pair, weights)
    for distill in ("simkd", "srrl"):
        with pytest.raises(UserError, match="choose"):
            DISTILLERS[distill](build_model("resnet8", CLASSES), Ensemble(pair), TASK)

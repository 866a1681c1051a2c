"""Maps whose sizes do not divide, for every method that compares maps pixel by pixel."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo import DISTILLERS, Progress, Task
from distiller_zoo.maps import match_size, pool_to_smaller
from errors import UserError
from models import build_model
from tests.conftest import make_batch

CLASSES, SIZE = 7, 80  # 5x5 patches against maps of 40, 20, 10, 5, 3 pixels
TASK = Task(CLASSES, SIZE, 4, torch.arange(8) % CLASSES)
METHODS = ("norm", "attention", "nst", "vid", "semckd", "factor", "hint")


def step(distill: str, pair: tuple[str, str], map_size: str) -> tuple[float, list[str]]:
    torch.manual_seed(0)
    teacher, student = (build_model(name, CLASSES, SIZE) for name in pair)
    extra = {"hint_layer": 0} if distill == "hint" else {}
    method = DISTILLERS[distill](student, teacher.eval(), TASK, map_size=map_size, **extra)
    torch.manual_seed(1)
    batch = make_batch()._replace(images=torch.randn(4, 3, SIZE, SIZE), targets=torch.arange(4))
    with torch.no_grad():
        seen = teacher.outputs(batch.images, method.teacher_preact)
    _, losses = method.eval()(batch, seen, Progress(0, 2))
    sum(losses.values()).backward()
    return losses[distill].item(), method.notes()


@pytest.mark.quick(3)
@pytest.mark.parametrize("distill", METHODS)
@pytest.mark.parametrize("pair", [("timm:test_vit", "timm:test_resnet"), ("timm:test_resnet", "timm:test_vit")])
def test_every_size_is_brought_to_the_other_and_it_is_said(distill, pair):
    pooled, notes = step(distill, pair, "pool")
    interpolated, other_notes = step(distill, pair, "interpolate")
    assert torch.tensor([pooled, interpolated]).isfinite().all() and pooled != interpolated
    assert notes != other_notes and any("interpolated" in note for note in other_notes)
    bridged = distill == "hint" and pair[0] == "timm:test_vit"  # FitNet's convolution shrinks the student's map
    assert bridged or any("-pooled" in note for note in notes)


def test_the_ways_to_one_size():
    feature_map = torch.randn(2, 3, 6, 6)
    assert match_size(feature_map, 6, 6, "interpolate") is feature_map
    assert torch.equal(match_size(feature_map, 3, 3), F.max_pool2d(feature_map, 2))
    assert torch.equal(match_size(feature_map, 3, 3, "average"), F.avg_pool2d(feature_map, 2))
    assert torch.equal(match_size(feature_map, 4, 4), F.adaptive_avg_pool2d(feature_map, 4))
    larger = match_size(feature_map, 9, 9, "interpolate")
    assert torch.allclose(larger, F.interpolate(feature_map, (9, 9), mode="bilinear"), atol=1e-6)
    small = torch.randn(2, 5, 4, 4)
    for pair in ((feature_map, small), (small, feature_map)):
        assert [each.shape[2] for each in pool_to_smaller(*pair)] == [4, 4]
        assert [each.shape[2] for each in pool_to_smaller(*pair, "interpolate")] == [pair[0].shape[2]] * 2


def test_a_network_that_shows_only_its_last_map_is_refused():
    network = build_model("timm:hrnet_w18_small", CLASSES)
    for pair, whose in (((build_model("resnet8", CLASSES), network), "teacher"), ((network, network), "student")):
        with pytest.raises(UserError, match=f"the {whose} shows only its last"):
            DISTILLERS["attention"](*pair, TASK._replace(image_size=64))

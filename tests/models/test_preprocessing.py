"""What published weights expect of images, and a teacher that sees its own."""

import pytest
import torch
from torch.nn import functional as F

from errors import UserError
from models import build_model
from models.backbone import evaluating, probe_shapes
from models.folding import fold_batch_norms
from models.preprocessing import TeacherView, read_preprocessing

CIFAR = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
CLIP = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def test_the_libraries_tell_what_their_weights_expect():
    found = read_preprocessing("torchvision:vit_b_16")
    assert (found.image_size, found.test_size, found.test_resize, found.interpolation) == (224, 224, 256, "bilinear")
    assert found.mean == (0.485, 0.456, 0.406) and found.categories[0] == "tench" and len(found.categories) == 1000
    assert read_preprocessing("torchvision:resnet50@IMAGENET1K_V2").test_resize == 232
    clip = read_preprocessing("timm:vit_base_patch16_clip_224.openai")
    assert clip.mean == pytest.approx(CLIP[0], abs=1e-3) and clip.interpolation == "bicubic" and clip.test_resize == 248
    a1 = read_preprocessing("timm:resnet50.a1_in1k")
    assert (a1.image_size, a1.test_size, a1.test_resize) == (224, 288, 288)  # trained and tested at different sizes
    assert a1.categories[0] == "n01440764" and len(a1.categories) == 1000
    dinov2 = read_preprocessing("timm:vit_small_patch14_dinov2")
    assert dinov2.image_size == 518 and dinov2.categories == ()
    for nothing in ("timm:nonsense", "torchvision:nonsense", "torchvision:resnet50@V9", "resnet20"):
        assert read_preprocessing(nothing) is None


def view(network, size=None, **settings):
    return TeacherView(network.eval(), *CIFAR, *CLIP, size, **settings)


@pytest.mark.parametrize("size", [None, 48])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_teacher_sees_the_pixels_in_its_own_normalisation_and_size(size, interpolation):
    network, pixels = build_model("resnet8", 7), torch.rand(2, 3, 32, 32)
    mean, std, own_mean, own_std = (torch.tensor(each).view(-1, 1, 1) for each in (*CIFAR, *CLIP))
    expected = pixels
    if size:
        expected = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    expected = (expected - own_mean) / own_std
    teacher = view(network, size, interpolation=interpolation)
    assert torch.allclose(teacher.view((pixels - mean) / std), expected, atol=2e-6)
    with evaluating(teacher):
        ours, theirs = teacher.outputs((pixels - mean) / std), network.outputs(expected)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-4)
    assert [each.shape for each in ours.maps] == [each.shape for each in theirs.maps]
    assert probe_shapes(teacher, 32) == probe_shapes(network, size or 32)


def test_equal_settings_leave_the_images_alone():
    images = torch.randn(2, 3, 32, 32)
    assert TeacherView(build_model("resnet8", 7), *CIFAR, *CIFAR, 32).view(images) is images


def test_a_view_is_a_network_like_the_one_inside():
    network = build_model("wrn_16_1", 7)
    teacher, images = view(network, 64), torch.randn(2, 3, 32, 32)
    assert teacher.activates_final and teacher.num_classes == 7 and teacher.get_classifier() is network.get_classifier()
    assert teacher.state_dict().keys() == {f"network.{key}" for key in network.state_dict()}
    with torch.no_grad():
        folded = fold_batch_norms(teacher, 32).outputs(images, preact=True)
        assert torch.allclose(folded.logits, teacher.outputs(images, preact=True).logits, atol=1e-4)
    transformer = view(build_model("timm:test_vit", 7), 64)
    assert probe_shapes(transformer, 32).final == (64, 4, 4) and "64x64" in transformer.describe(32)


def test_an_unknown_way_to_resize_is_refused():
    with pytest.raises(UserError, match="bilinear, bicubic"):
        view(build_model("resnet8", 7), interpolation="lanczos")

"""The changes of a batch are torchvision's of each image, bit for bit: what is drawn, every operation, every group."""

import math

import pytest
import torch
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dataset.changes import Changes
from dataset.policies import AUTOAUGMENT_MAGNITUDES, MAGNITUDES, OPERATIONS, SIGNED, TOGETHER, Step, apply, magnitudes
from dataset.seeds import epoch_seed, share, torch_numbers
from tests.dataset.test_changes import ALONE, NONE, pictures


def affine(image, translate, shear, **center):
    return functional.affine(image, 0.0, translate, 1.0, shear, **center)


def slope(magnitude: float) -> float:
    return math.degrees(math.atan(magnitude))


#: What torchvision's policies call with a magnitude, of one image.
TORCHVISION = {
    "Identity": lambda image, _: image,
    "ShearX": lambda image, m: affine(image, [0, 0], [slope(m), 0.0], center=[0, 0]),
    "ShearY": lambda image, m: affine(image, [0, 0], [0.0, slope(m)], center=[0, 0]),
    "TranslateX": lambda image, m: affine(image, [int(m), 0], [0.0, 0.0]),
    "TranslateY": lambda image, m: affine(image, [0, int(m)], [0.0, 0.0]),
    "Rotate": functional.rotate,
    "Brightness": lambda image, m: functional.adjust_brightness(image, 1.0 + m),
    "Color": lambda image, m: functional.adjust_saturation(image, 1.0 + m),
    "Contrast": lambda image, m: functional.adjust_contrast(image, 1.0 + m),
    "Sharpness": lambda image, m: functional.adjust_sharpness(image, 1.0 + m),
    "Posterize": functional.posterize,
    "Solarize": lambda image, m: functional.solarize(image, 255.0 * m),
    "AutoContrast": lambda image, _: functional.autocontrast(image),
    "Equalize": lambda image, _: functional.equalize(image),
    "Invert": lambda image, _: functional.invert(image),
    "adjust_brightness": functional.adjust_brightness,
    "adjust_contrast": functional.adjust_contrast,
    "adjust_saturation": functional.adjust_saturation,
}
EVERYTHING = NONE._replace(policy="randaugment", colour_jitter=0.4, random_erasing=0.7)


def odd_pictures(size: int) -> torch.Tensor:
    """Noise, a dark image, one of few values, one colour, two values, a ramp."""
    noise = pictures(6, size)
    noise[1] //= 8
    noise[2] = noise[2] // 64 * 64
    noise[3] = torch.tensor([7, 0, 255], dtype=torch.uint8).view(3, 1, 1)
    noise[4] = (noise[4] > 200) * 13 + 100
    noise[5] = torch.arange(size).clamp_max(255)
    return noise


def strengths(operation: str, size: int) -> list:
    """Every magnitude that a policy may give the operation, with both signs where it has them."""
    if operation.startswith("adjust"):
        return torch.linspace(0.0, 2.0, 23).tolist()
    found = [
        level
        for number, wide in ((MAGNITUDES, False), (MAGNITUDES, True), (AUTOAUGMENT_MAGNITUDES, False))
        for level in magnitudes(number, size, size, wide).get(operation, [])
    ]
    return sorted({*found, *(-level for level in found if operation in SIGNED)}) or [0.0]


@pytest.mark.parametrize("operation", TORCHVISION)
@pytest.mark.parametrize("size", [2, 19])
def test_an_operation_of_many_images_is_torchvisions_of_each(operation, size):
    images = odd_pictures(size)
    for magnitude in strengths(operation, size):
        changed = apply(images, [[Step(operation, magnitude)]] * len(images))
        expected = torch.stack([TORCHVISION[operation](image, magnitude) for image in images])
        assert torch.equal(changed, expected), magnitude


def test_every_operation_is_compared():
    assert {*TORCHVISION, "erase"} == set(OPERATIONS)


def transform_of(changes: Changes) -> nn.Module:
    """torchvision's transform of the same changes."""
    alone = {name: transform for name, (_, transform) in ALONE.items()}
    jitter, erasing = v2.ColorJitter(*[changes.colour_jitter] * 3), v2.RandomErasing(0.7, value=[10.0, 20.0, 30.0])
    return nn.Sequential(alone[changes.policy], jitter, erasing)


CASES = {**ALONE, "everything": (EVERYTHING, transform_of(EVERYTHING))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("count", "size"), [(120, 16), (3, math.isqrt(TOGETHER) + 1)])
def test_a_batch_is_changed_as_torchvision_changes_each_image(name, count, size):
    changes, transform = CASES[name]
    images, keys = pictures(count, size), [7 * number for number in range(count)]
    before, expected = images.clone(), []
    for key, image in zip(keys, images, strict=True):
        torch.manual_seed(epoch_seed(changes.seed, changes.epoch, key, stream="changes"))
        expected.append(transform(image))
    changed = changes.of_batch(images, keys)
    wrong = [key for key, ours, theirs in zip(keys, changed, expected, strict=True) if not torch.equal(ours, theirs)]
    assert wrong == [] and torch.equal(images, before), "nor are the images that are held changed"
    mixed = changes.of_batch(images.contiguous(memory_format=torch.channels_last), keys)
    assert torch.equal(mixed, changed)


def test_the_numbers_are_those_of_torchs_generator():
    for seed in (0, 1, 2**32 - 1, epoch_seed(3, 2, 7)):
        torch.manual_seed(seed)
        expected = [int(torch.randint(14, ())), float(torch.rand(())), int(torch.randint(3, 9, ()))]
        first, second, third = torch_numbers(seed, 3)
        assert [first % 14, share(second), 3 + third % 6] == expected


def test_an_image_without_operations_is_left_alone():
    images = pictures(3)
    assert torch.equal(apply(images, [[], [Step("Invert")], []])[[0, 2]], images[[0, 2]])
    assert apply(images[:0], []).shape == (0, 3, 32, 32)

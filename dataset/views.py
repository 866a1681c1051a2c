"""The views of an image that a method may ask for: pixels of a batch in, one batch of pixels per view out.

Each takes pixels (B, 3, H, W), the crops and flips of every view, the augmentation, and a generator on the CPU for what
else is random.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from dataset.images import Augmentation, Draws, augment

#: RandAugment's number of operations, and their strength as a share of the strongest (9 of 30 steps).
STRONG_OPERATIONS, STRENGTH = 2, 0.3
#: The largest side of the square that is cut out, in sides of the image, and its grey.
LARGEST_CUT, GREY = 0.5, 127


def plain(
    pixels: Tensor, draws: list[Draws], augmentation: Augmentation, generator: torch.Generator | None = None
) -> list[Tensor]:
    """The augmented image."""
    return [augment(pixels, draws[0], augmentation.pad)]


def rotations(
    pixels: Tensor, draws: list[Draws], augmentation: Augmentation, generator: torch.Generator | None = None
) -> list[Tensor]:
    """The image turned by 0, 90, 180 and 270 degrees, mirrored alike and each with its own crop (SSKD)."""
    return [
        torch.rot90(augment(pixels, draw._replace(flip=draws[0].flip), augmentation.pad), turn, (2, 3))
        for turn, draw in enumerate(draws)
    ]


def weak_strong(
    pixels: Tensor, draws: list[Draws], augmentation: Augmentation, generator: torch.Generator | None = None
) -> list[Tensor]:
    """The augmented image, and another with RandAugment and a grey square over it (multi-level logit distillation)."""
    weak, strong = (augment(pixels, draw, augmentation.pad) for draw in draws)
    for _ in range(STRONG_OPERATIONS):
        strong = random_operation(strong, generator)
    return [weak, cut_out(strong, generator)]


def random_operation(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels (B, 3, H, W) with one operation of RandAugment each (Cubuk et al., NeurIPS 2020, arXiv 1909.13719).

    Images with the same operation are changed together.
    """
    operations = [*_operations(1, *pixels.shape[2:]), *_operations(-1, *pixels.shape[2:])]
    drawn = torch.randint(len(operations), (len(pixels),), generator=generator)
    sizes = torch.bincount(drawn, minlength=len(operations)).tolist()
    order = drawn.argsort().to(pixels.device)
    groups = pixels[order].split(sizes)
    changed = [operation(group) for operation, group in zip(operations, groups, strict=True) if len(group)]
    return torch.empty_like(pixels).index_copy_(0, order, torch.cat(changed))


def _operations(sign: int, height: int, width: int) -> list[Callable[[Tensor], Tensor]]:
    """RandAugment's operations on bytes; what has a direction goes along `sign`."""
    slant = math.degrees(math.atan(0.3 * STRENGTH * sign))
    down, right = (sign * int(150 / 331 * side * STRENGTH) for side in (height, width))
    factor = 1 + 0.9 * STRENGTH * sign

    def affine(shear=(0.0, 0.0), translate=(0, 0), center=None):
        return lambda x: functional.affine(x, 0.0, list(translate), 1.0, list(shear), center=center)

    return [
        lambda x: x,
        affine(shear=(slant, 0.0), center=[0, 0]),
        affine(shear=(0.0, slant), center=[0, 0]),
        affine(translate=(right, 0)),
        affine(translate=(0, down)),
        lambda x: functional.rotate(x, 30 * STRENGTH * sign),
        lambda x: functional.adjust_brightness(x, factor),
        lambda x: functional.adjust_saturation(x, factor),
        lambda x: functional.adjust_contrast(x, factor),
        lambda x: functional.adjust_sharpness(x, factor),
        lambda x: functional.posterize(x, 8 - round(4 * STRENGTH)),
        lambda x: functional.solarize(x, 255 * (1 - STRENGTH)),
        functional.autocontrast,
        functional.equalize,
    ]


def cut_out(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels (B, 3, H, W) with one grey square each, of random side and place."""
    count, _, height, width = pixels.shape
    side, top, left = torch.rand(3, count, generator=generator)
    side = (side * LARGEST_CUT * min(height, width)).round()
    rows, columns = _covered(top, side, height), _covered(left, side, width)
    inside = (rows[:, :, None] & columns[:, None, :]).to(pixels.device)
    return pixels.masked_fill(inside[:, None], GREY)


def _covered(place: Tensor, side: Tensor, size: int) -> Tensor:
    """Which of `size` pixels a stretch of `side` (B,) covers, (B, size); it lies first at a `place` (B,) of 0."""
    first = (place * (size - side + 1)).floor()[:, None]
    positions = torch.arange(size)
    return (positions >= first) & (positions < first + side[:, None])


#: Name -> (number of views, their function).
VIEWS: dict[str, tuple[int, Callable[..., list[Tensor]]]] = {
    "plain": (1, plain),
    "rotations": (4, rotations),
    "weak_strong": (2, weak_strong),
}

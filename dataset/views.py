"""The views of an image that a method may ask for: pixels of a batch in, one batch of pixels per view out.

Each takes pixels (B, 3, H, W), the crops and flips of every view, the augmentation, and a generator on the CPU for what
else is random.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dataset.images import Augmentation, Draws, augment
from dataset.policies import v2

#: RandAugment's number of operations.
STRONG_OPERATIONS = 2
#: The largest side of the square that is cut out, in widths of the image, and its colour.
LARGEST_CUT, CUT_COLOUR = 0.5, (125, 123, 114)


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
    """The augmented image, and another with RandAugment and a square cut out of it (multi-level logit distillation)."""
    weak, strong = (augment(pixels, draw, augmentation.pad) for draw in draws)
    for _ in range(STRONG_OPERATIONS):
        strong = random_operation(strong, generator)
    return [weak, cut_out(strong, generator)]


def random_operation(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels (B, 3, H, W) with one operation of RandAugment each (Cubuk et al., NeurIPS 2020, arXiv 1909.13719).

    The operation is drawn per image, and its strength over the operation's whole range, as FixMatch does (Sohn et al.,
    NeurIPS 2020). Images with the same operation are changed together.
    """
    drawn = torch.randint(len(OPERATIONS), (len(pixels),), generator=generator)
    strengths = torch.rand(len(pixels), generator=generator)
    sizes = torch.bincount(drawn, minlength=len(OPERATIONS)).tolist()
    order = drawn.argsort()
    strengths = strengths[order].to(pixels.device).split(sizes)
    order = order.to(pixels.device)
    groups = zip(OPERATIONS, pixels[order].split(sizes), strengths, strict=True)
    changed = [operation(group, strength) for operation, group, strength in groups if len(group)]
    return torch.empty_like(pixels).index_copy_(0, order, torch.cat(changed))


def _blend(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """0.05 to 0.95 of the image, the rest of what `name` of torchvision makes at 0: black, grey, its mean, smoothed."""

    def operation(pixels: Tensor, strength: Tensor) -> Tensor:
        share = (0.05 + 0.9 * strength).view(-1, 1, 1, 1)
        return (share * pixels + (1 - share) * getattr(v2().functional, name)(pixels, 0.0)).to(pixels.dtype)

    return operation


def _move(row: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor, Tensor], Tensor]:
    """An affine map of coordinates, the nearest pixel taken and black around the image.

    `row` gives the six numbers (a, b, c, d, e, f) of (x, y) -> (ax + by + c, dx + ey + f), where the pixel of a result
    at (x, y) comes from, of strengths in -1..1 and the image's height and width.
    """

    def operation(pixels: Tensor, strength: Tensor) -> Tensor:
        count, _, height, width = pixels.shape
        numbers = [value.expand(count).view(-1, 1, 1) for value in row(2 * strength - 1, height, width)]
        a, b, c, d, e, f = numbers
        y, x = (torch.arange(size, device=pixels.device) + 0.5 for size in (height, width))
        x, y = x[None, None, :], y[None, :, None]
        columns, rows = (a * x + b * y + c).floor().long(), (d * x + e * y + f).floor().long()
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        place = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).flatten(1)
        moved = pixels.flatten(2).gather(2, place[:, None].expand(-1, pixels.shape[1], -1)).view_as(pixels)
        return moved * inside[:, None]

    return operation


def _rotation(strength: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    angle = math.radians(30) * strength
    cosine, sine = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y


def _affine(entry: int, size: Callable[[int, int], float]) -> Callable[..., tuple[Tensor, ...]]:
    """One entry of the six moves by up to 0.3 times `size`, the others leave the image as it is."""

    def row(strength: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        numbers = [torch.full_like(strength, value) for value in (1, 0, 0, 0, 1, 0)]
        numbers[entry] = 0.3 * size(height, width) * strength
        return tuple(numbers)

    return row


def _posterize(pixels: Tensor, strength: Tensor) -> Tensor:
    """4 to 7 bits are kept."""
    step = 2 ** (4 - (4 * strength).floor()).to(pixels.dtype).view(-1, 1, 1, 1)
    return pixels // step * step


def _solarize(pixels: Tensor, strength: Tensor) -> Tensor:
    """Values from a threshold on are inverted."""
    return torch.where(pixels < (256 * strength).view(-1, 1, 1, 1), pixels, 255 - pixels)


#: FixMatch's list: bytes (n, 3, H, W) and strengths (n,) from 0 to 1 -> bytes.
OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda pixels, _: pixels,
    lambda pixels, _: v2().functional.autocontrast(pixels),
    lambda pixels, _: v2().functional.equalize(pixels),
    _blend("adjust_brightness"),
    _blend("adjust_saturation"),
    _blend("adjust_contrast"),
    _blend("adjust_sharpness"),
    _posterize,
    _solarize,
    _move(_rotation),
    _move(_affine(1, lambda height, width: 1)),  # shear
    _move(_affine(3, lambda height, width: 1)),
    _move(_affine(2, lambda height, width: width)),  # translation
    _move(_affine(5, lambda height, width: height)),
)


def cut_out(pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels (B, 3, H, W) with one square each in one colour: of a random side, around a random place of the image,
    beyond whose border it does not reach."""
    count, _, height, width = pixels.shape
    side, y, x = torch.rand(3, count, generator=generator)
    side = side * LARGEST_CUT * width
    rows, columns = _covered(y * height, side, height), _covered(x * width, side, width)
    inside = (rows[:, :, None] & columns[:, None, :]).to(pixels.device)
    colour = torch.tensor(CUT_COLOUR, dtype=pixels.dtype, device=pixels.device).view(1, -1, 1, 1)
    return torch.where(inside[:, None], colour, pixels)


def _covered(centre: Tensor, side: Tensor, size: int) -> Tensor:
    """Which of `size` pixels a stretch of `side` (B,) covers that begins half of it before `centre` (B,): (B, size)."""
    first = (centre - side / 2).clamp_min(0).floor()[:, None]
    positions = torch.arange(size)
    return (positions >= first) & (positions <= first + side[:, None]) & (side > 0)[:, None]


#: Name -> (number of views, their function; None: the augmented image alone).
VIEWS: dict[str, tuple[int, Callable[..., list[Tensor]] | None]] = {
    "plain": (1, None),
    "rotations": (4, rotations),
    "weak_strong": (2, weak_strong),
}

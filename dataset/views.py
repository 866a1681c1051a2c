"""The views of an image that a method may ask for: pixels of a batch in, one batch of pixels per view out."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from dataset.images import Augmentation, Draws, augment

#: RandAugment's number of operations, and the largest side of the square that is cut out, in sides of the image.
STRONG_OPERATIONS, LARGEST_CUT = 2, 0.5


def plain(pixels: Tensor, draws: list[Draws], augmentation: Augmentation) -> list[Tensor]:
    """The augmented image."""
    return [augment(pixels, draws[0], augmentation.pad)]


def rotations(pixels: Tensor, draws: list[Draws], augmentation: Augmentation) -> list[Tensor]:
    """The image turned by 0, 90, 180 and 270 degrees, mirrored alike and each with its own crop (SSKD)."""
    return [
        torch.rot90(augment(pixels, draw._replace(flip=draws[0].flip), augmentation.pad), turn, (2, 3))
        for turn, draw in enumerate(draws)
    ]


def weak_strong(pixels: Tensor, draws: list[Draws], augmentation: Augmentation) -> list[Tensor]:
    """The augmented image, and another with RandAugment and a grey square over it (multi-level logit distillation).

    RandAugment and the square draw from torch's global generator on the CPU.
    """
    weak, strong = (augment(pixels, draw, augmentation.pad) for draw in draws)
    transform = v2.RandAugment(STRONG_OPERATIONS)
    strong = torch.stack([transform(image) for image in strong.cpu()])
    return [weak, _cut_out(strong).to(pixels.device)]


def _cut_out(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) with one grey square each, of random side and place."""
    count, _, height, width = pixels.shape
    side = (torch.rand(count) * LARGEST_CUT * min(height, width)).round()
    top, left = torch.rand(count) * (height - side), torch.rand(count) * (width - side)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = (rows >= top[:, None]) & (rows < (top + side)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + side)[:, None])
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return pixels.masked_fill(inside, 127)


#: Name -> (number of views, their function).
VIEWS: dict[str, tuple[int, Callable[[Tensor, list[Draws], Augmentation], list[Tensor]]]] = {
    "plain": (1, plain),
    "rotations": (4, rotations),
    "weak_strong": (2, weak_strong),
}

"""torchvision's changes of images, number for number, for a whole batch at once.

torchvision changes one image after the other, and calls cost more than small images do. Here the operations of every
image are drawn first, from its own seed and in torchvision's order; then each operation is applied to all images that
have it. `tests/dataset/test_policies.py` compares with torchvision's own transforms, bit for bit.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from dataset.seeds import share

#: Operations of RandAugment, in a row for each image, and which of its magnitudes they have.
RANDAUGMENT_OPERATIONS, RANDAUGMENT_MAGNITUDE = 2, 9
#: How many magnitudes there are, weakest first: RandAugment's and TrivialAugment's, and AutoAugment's.
MAGNITUDES, AUTOAUGMENT_MAGNITUDES = 31, 10
#: Random erasing: share of the area, height to width, and how often a rectangle is drawn before none is erased.
ERASED, ERASED_RATIO, ERASING_TRIES = (0.02, 0.33), (0.3, 3.3), 10
#: Numbers that all of an image's draws take at most: a policy's, the jitter's, the erasing's.
NUMBERS = 8 + 6 + 2 * ERASING_TRIES + 3
#: Images of at most this many pixels are changed together. For larger ones calls cost nothing, and grey levels of
#: images above 2^16 pixels have no exact sum in single precision.
TOGETHER = 128**2
#: Number of tables that are held, of what an operation does to each value and of where it takes each pixel from.
TABLES_HELD = 512

Numbers = Iterator[int]  # of `dataset.seeds.torch_numbers`


class Step(NamedTuple):
    """An operation, a key of `OPERATIONS`, at a magnitude: a number, or all that the operation must be told."""

    operation: str
    magnitude: float | tuple = 0.0


def v2() -> ModuleType:
    """torchvision's transforms, which take a second to import and are not needed by most runs."""
    from torchvision.transforms import v2

    return v2


def _shear(pixels: Tensor, across: float, down: float) -> Tensor:
    angles = [math.degrees(math.atan(slope)) for slope in (across, down)]
    return v2().functional.affine(pixels, 0.0, [0, 0], 1.0, angles, center=[0, 0])


def _translate(pixels: Tensor, across: float, down: float) -> Tensor:
    return v2().functional.affine(pixels, 0.0, [int(across), int(down)], 1.0, [0.0, 0.0])


def _sharpen(pixels: Tensor, change: float) -> Tensor:
    """torchvision's `adjust_sharpness`, with sums of pixels in place of a convolution, whose calls take longer.

    A thirteenth of a whole number is never halfway between two, so that its rounding is the same however it is summed.
    """
    images = pixels.float()
    if min(images.shape[2:]) > 2:
        inner = images[..., 1:-1, 1:-1]
        columns = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
        around = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]
        smooth = around.add_(inner, alpha=4).div_(13).round_()
        inner.add_(smooth.sub_(inner), alpha=1.0 - (1.0 + change))
    return images.clamp_(0, 255).to(torch.uint8)


def _equalize(pixels: Tensor, _: float) -> Tensor:
    """torchvision's and Pillow's `equalize`: a table of values for each channel, in whole numbers."""
    channels = pixels.flatten(2).flatten(0, 1).numpy()
    number, (_, size) = numpy.arange(len(channels)), channels.shape
    positions = channels + 256 * number[:, None]
    histogram = numpy.bincount(positions.ravel(), minlength=256 * len(channels)).reshape(-1, 256)
    step = ((size - histogram[number, channels.max(1)]) // 255)[:, None]
    divisor = numpy.maximum(step, 1)
    tables = numpy.minimum((histogram.cumsum(1) - histogram + divisor // 2) // divisor, 255)
    tables = numpy.where(step > 0, tables, numpy.arange(256)).astype(numpy.uint8)
    return torch.from_numpy(tables.ravel().take(positions)).view_as(pixels)


#: Bytes (n, 3, H, W) and a magnitude -> bytes in which every pixel is one of the image's, or black.
MOVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "ShearX": lambda pixels, slope: _shear(pixels, slope, 0.0),
    "ShearY": lambda pixels, slope: _shear(pixels, 0.0, slope),
    "TranslateX": lambda pixels, distance: _translate(pixels, distance, 0.0),
    "TranslateY": lambda pixels, distance: _translate(pixels, 0.0, distance),
    "Rotate": lambda pixels, angle: v2().functional.rotate(pixels, angle),
}
#: The same where every value becomes another, wherever it is.
LOOKUPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Brightness": lambda pixels, change: v2().functional.adjust_brightness(pixels, 1.0 + change),
    "Posterize": lambda pixels, bits: v2().functional.posterize(pixels, bits),
    "Solarize": lambda pixels, threshold: v2().functional.solarize(pixels, 255 * threshold),
    "Invert": lambda pixels, _: v2().functional.invert(pixels),
    "adjust_brightness": lambda pixels, factor: v2().functional.adjust_brightness(pixels, factor),
}
#: All operations.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    **MOVES,
    **LOOKUPS,
    "Identity": lambda pixels, _: pixels,
    "Color": lambda pixels, change: v2().functional.adjust_saturation(pixels, 1.0 + change),
    "Contrast": lambda pixels, change: v2().functional.adjust_contrast(pixels, 1.0 + change),
    "Sharpness": _sharpen,
    "AutoContrast": lambda pixels, _: v2().functional.autocontrast(pixels),
    "Equalize": _equalize,
    "adjust_contrast": lambda pixels, factor: v2().functional.adjust_contrast(pixels, factor),
    "adjust_saturation": lambda pixels, factor: v2().functional.adjust_saturation(pixels, factor),
    "erase": lambda pixels, place: v2().functional.erase(pixels, *place[:4], torch.tensor(place[4]).view(-1, 1, 1)),
}
#: Those whose magnitude is drawn with a sign.
SIGNED = frozenset({*MOVES, "Brightness", "Color", "Contrast", "Sharpness"})


@cache
def magnitudes(number: int, height: int, width: int, wide: bool = False) -> dict[str, list[float]]:
    """Operation -> its magnitudes, weakest first, none where it has only one; `wide` as TrivialAugment has them."""
    shear, turn, blend, bits = (0.99, 135.0, 0.99, 6) if wide else (0.3, 30.0, 0.9, 4)
    across, down = (32.0, 32.0) if wide else (150.0 / 331.0 * width, 150.0 / 331.0 * height)
    most = {"ShearX": shear, "ShearY": shear, "TranslateX": across, "TranslateY": down, "Rotate": turn}
    most |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), blend)
    posterize = (8 - torch.arange(number) / ((number - 1) / bits)).round().int()
    rising = {operation: torch.linspace(0.0, largest, number).tolist() for operation, largest in most.items()}
    falling = {"Posterize": posterize.tolist(), "Solarize": torch.linspace(1.0, 0.0, number).tolist()}
    return {"Identity": [], **rising, **falling, "AutoContrast": [], "Equalize": []}


def _step(operation: str, magnitude: float, numbers: Numbers) -> Step:
    """The operation, with a magnitude of either sign where it has one."""
    negative = operation in SIGNED and share(next(numbers)) <= 0.5
    return Step(operation, -magnitude if negative else magnitude)


def _uniform(numbers: Numbers, low: numpy.float32, high: numpy.float32) -> float:
    """What torch's `uniform_(low, high)` draws: single precision, rounded once, as a fused multiply-add is."""
    return float(numpy.float32(share(next(numbers)) * float(high - low) + float(low)))


def randaugment(numbers: Numbers, height: int, width: int, own: str) -> Iterator[Step]:
    """RandAugment (Cubuk et al., NeurIPS 2020) with torchvision's defaults: two operations at a fixed magnitude."""
    known = magnitudes(MAGNITUDES, height, width)
    for _ in range(RANDAUGMENT_OPERATIONS):
        operation = list(known)[next(numbers) % len(known)]
        levels = known[operation]
        yield _step(operation, levels[RANDAUGMENT_MAGNITUDE] if levels else 0.0, numbers)


def trivialaugment(numbers: Numbers, height: int, width: int, own: str) -> Iterator[Step]:
    """TrivialAugment (Mueller & Hutter, ICCV 2021), wide: one operation, at any of its magnitudes."""
    known = magnitudes(MAGNITUDES, height, width, wide=True)
    operation = list(known)[next(numbers) % len(known)]
    levels = known[operation]
    yield _step(operation, levels[next(numbers) % len(levels)] if levels else 0.0, numbers)


def autoaugment(numbers: Numbers, height: int, width: int, own: str) -> Iterator[Step]:
    """AutoAugment (Cubuk et al., CVPR 2019) as it was found on `own`: one of 25 pairs of operations."""
    known = magnitudes(AUTOAUGMENT_MAGNITUDES, height, width)
    pairs = _pairs(own)
    for operation, probability, level in pairs[next(numbers) % len(pairs)]:
        if share(next(numbers)) <= probability:
            yield _step(operation, 0.0 if level is None else known[operation][level], numbers)


@cache
def _pairs(own: str) -> list[list[tuple[str, float, int | None]]]:
    """AutoAugment's pairs of (operation, probability in single precision, magnitude)."""
    from torchvision import transforms

    pairs = transforms.AutoAugment(transforms.AutoAugmentPolicy(own)).policies
    return [[(name, float(numpy.float32(chance)), level) for name, chance, level in pair] for pair in pairs]


def jitter(numbers: Numbers, strength: float) -> Iterator[Step]:
    """Colour jitter as torchvision's `ColorJitter(strength, strength, strength)`: each factor within 1 +- strength."""
    order = list(range(4))
    for place in range(3):  # of torch.randperm; the fourth is hue, which stays
        other = place + next(numbers) % (4 - place)
        order[place], order[other] = order[other], order[place]
    low, high = (numpy.float32(value) for value in (max(1 - strength, 0.0), 1 + strength))
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation")
    steps = [Step(name, _uniform(numbers, low, high)) for name in names]
    yield from (steps[place] for place in order if place < len(steps))


def erasing(numbers: Numbers, height: int, width: int, probability: float, colour: Sequence[float]) -> Iterator[Step]:
    """Random erasing (Zhong et al., AAAI 2020) with torchvision's defaults: a rectangle takes `colour`."""
    if share(next(numbers)) >= probability:
        return
    low, high = (numpy.float32(value) for value in ERASED)
    tall, wide = numpy.log(numpy.float32(ERASED_RATIO))
    for _ in range(ERASING_TRIES):
        area = height * width * _uniform(numbers, low, high)
        ratio = float(numpy.exp(numpy.float32(_uniform(numbers, tall, wide))))
        down, across = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if down < height and across < width:
            top, left = next(numbers) % (height - down + 1), next(numbers) % (width - across + 1)
            yield Step("erase", (top, left, down, across, tuple(map(float, colour))))
            return


def apply(pixels: Tensor, steps: Sequence[Sequence[Step]]) -> Tensor:
    """Bytes (B, 3, H, W) on the CPU, and the operations of each image in their order -> the changed bytes."""
    changed = pixels.clone()
    if pixels.shape[2:].numel() > TOGETHER:
        for image, own in zip(changed.split(1), steps, strict=True):
            for operation, magnitude in own:
                image.copy_(OPERATIONS[operation](image, magnitude))
        return changed
    images, left = changed.numpy(), [iter(own) for own in steps]  # the same memory: numpy indexes faster
    waiting: dict[Step, list[int]] = {}  # an operation -> the images whose next one it is

    def queue(rows: Iterable[int]) -> None:
        for row in rows:
            if (step := next(left[row], None)) is not None:
                waiting.setdefault(step, []).append(row)

    queue(range(len(steps)))
    while waiting:
        step = max(waiting, key=lambda step: len(waiting[step]))  # meanwhile more images come to the others
        rows = waiting.pop(step)
        images[rows] = _of_group(images[rows], *step)
        queue(rows)
    return changed


def _of_group(images: numpy.ndarray, operation: str, magnitude: float | tuple) -> numpy.ndarray:
    if operation in LOOKUPS:
        return _table(operation, magnitude).take(images)
    if operation in MOVES:
        black = numpy.zeros((*images.shape[:2], 1), numpy.uint8)
        flat = numpy.concatenate([images.reshape(*images.shape[:2], -1), black], 2)
        return flat.take(_sources(operation, magnitude, *images.shape[2:]), 2)
    return OPERATIONS[operation](torch.from_numpy(images), magnitude).numpy()


@lru_cache(TABLES_HELD)
def _sources(operation: str, magnitude: float, height: int, width: int) -> numpy.ndarray:
    """Which pixel of an image each pixel (H, W) of the moved one is; -1: none, it is black.

    It is found by moving an image of these numbers, which single precision holds.
    """
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
    return MOVES[operation](numbers, magnitude)[0, 0].long().numpy() - 1


@lru_cache(TABLES_HELD)
def _table(operation: str, magnitude: float) -> numpy.ndarray:
    """What each of the 256 values becomes, found by changing an image of all of them."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, -1)
    return LOOKUPS[operation](values, magnitude).flatten().numpy()

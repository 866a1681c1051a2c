"""Encoded images to pixels of one size: what a worker does with each image of a data set that lies on a disk."""

import io
from typing import NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional

from dataset.seeds import epoch_seed

#: Height to width of random crops.
RATIO = (3 / 4, 4 / 3)


class BrokenImage(Exception):
    """An image that cannot be read; the message says why."""


class RandomCrops(NamedTuple):
    """The random-resized crops of an epoch; each depends on (seed, epoch, sample, view) alone."""

    seed: int
    epoch: int
    views: int
    scale: tuple[float, float]  # share of the image's area

    def of(self, image: Tensor, sample: int, size: int) -> list[Tensor]:
        """An image (3, H, W) -> one crop of (3, size, size) per view."""
        crops = []
        with torch.random.fork_rng(devices=[]):
            for view in range(self.views):
                torch.default_generator.manual_seed(epoch_seed(self.seed, self.epoch, sample, view))
                place = RandomResizedCrop.get_params(image, list(self.scale), list(RATIO))
                crops.append(functional.resized_crop(image, *place, [size, size], antialias=True))
        return crops


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode with three colours of 8 bits."""
    if image.mode.startswith("I;16"):  # Pillow would not scale these greys, but cut them off at 255
        image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if image.mode == "P":  # Pillow warns of some transparent palettes, unless they become RGBA first
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(content: bytes) -> Tensor:
    """An encoded image of any usual format -> RGB bytes (3, H, W); raises `BrokenImage`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(numpy.array(convert_to_rgb(image))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is empty" if not content else str(error).replace(f"{io.BytesIO}", "it")
        raise BrokenImage(reason) from None


def fit(image: Tensor, size: int, cut: int) -> Tensor:
    """The middle square (3, size, size) of an image (3, H, W), whose shorter side is resized to size + 2 * cut."""
    side = size + 2 * cut
    if min(image.shape[1:]) != side:
        image = functional.resize(image, [side], antialias=True)
    return functional.center_crop(image, [size, size])

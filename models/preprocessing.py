"""What a network's images look like: the configuration of published weights, and a teacher that has its own."""

from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from errors import UserError
from models.backbone import Backbone, Wrapper
from models.external import LIBRARIES

#: Ways to resize that `torch.nn.functional.interpolate` has with antialiasing; anything else is done bilinearly.
INTERPOLATIONS = ("bilinear", "bicubic")


class Preprocessing(NamedTuple):
    """What weights were trained on and are tested with, as their library says. Values of pixels are from 0 to 1."""

    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    image_size: int  # height and width in training
    test_size: int  # height and width when the library tests them
    test_resize: int  # the shorter side before the central crop of `test_size`
    interpolation: str  # of INTERPOLATIONS
    squashes: bool = False  # whether both sides become `test_resize`, whatever the image's shape
    categories: tuple[str, ...] = ()  # the classes in their order, as the library names them; empty where it does not


def read_preprocessing(source: str) -> Preprocessing | None:
    """The configuration of `torchvision:NAME[@WEIGHTS]` or `timm:NAME[.TAG]`, without a download; None where there are
    no weights of this name."""
    library, _, weights = source.partition(":")
    if library not in LIBRARIES:
        return None
    return import_module(LIBRARIES[library]).read_preprocessing(weights)


class TeacherView(Wrapper):
    """A network that is given images as another one normalises them, in another size, and sees them as its own.

    mean, std: of the images that are given; own_mean, own_std, image_size: what the network expects. The images keep
    their crop: they are resized with antialiasing and normalised anew, on their device. What is equal is left alone.
    Shapes of the outputs are those for the network's own size, whatever size is given.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: Backbone,
        mean: Sequence[float],
        std: Sequence[float],
        own_mean: Sequence[float],
        own_std: Sequence[float],
        image_size: int | None = None,
        interpolation: str = "bilinear",
    ):
        super().__init__(network)
        if interpolation not in INTERPOLATIONS:
            raise UserError(f"images can be resized by {', '.join(INTERPOLATIONS)}, not {interpolation}")
        self.image_size, self.interpolation = image_size, interpolation
        self.renormalises = (*mean, *std) != (*own_mean, *own_std)
        mean, std, own_mean, own_std = (
            torch.tensor(each, dtype=torch.float64) for each in (mean, std, own_mean, own_std)
        )
        # (x * std + mean - own_mean) / own_std, with the constants rounded once.
        self.register_buffer("scale", (std / own_std).float().view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).float().view(-1, 1, 1), persistent=False)

    def view(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised as they are given -> (B, 3, image_size, image_size), as the network's own."""
        size = self.image_size or images.shape[-1]
        if images.shape[2:] != (size, size):
            images = F.interpolate(images, (size, size), mode=self.interpolation, align_corners=False, antialias=True)
        return images * self.scale + self.shift if self.renormalises else images

    def forward_maps(self, x, preact=False):
        return self.network.forward_maps(self.view(x), preact)

    def outputs(self, x, preact=False):
        return self.network.outputs(self.view(x), preact)

    def describe(self, image_size):
        return self.network.describe(self.image_size or image_size)

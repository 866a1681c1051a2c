"""Batches from images in memory: one gather, crop, flip and normalisation, on the device where the images lie."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from dataset.images import Augmentation, ImageData, Images, augment, draw_augmentation


class Batch(NamedTuple):
    """Normalised images (B, 3, H, W) float32, classes (B,), sample index in the data set (B,)."""

    images: Tensor
    targets: Tensor
    index: Tensor


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of everything random in an epoch, so that a resumed run needs no generator's state."""
    return int(numpy.random.SeedSequence((seed, epoch)).generate_state(1)[0])


class Loader:
    """Batches of one split; shuffled and augmented where `augmentation` is given, in order otherwise.

    What an epoch shows depends on (seed, epoch) alone. The last batch may be short; nothing is dropped.
    """

    def __init__(
        self,
        images: Images,
        data: ImageData,
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ):
        self.images, self.batch_size, self.augmentation, self.seed = images.to(device), batch_size, augmentation, seed
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (data.mean, data.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        return -(-len(self.images.targets) // self.batch_size)

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch."""
        n, device = len(self.images.targets), self.images.targets.device
        if self.augmentation is None:
            order, draws = torch.arange(n, device=device), None
        else:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
            order = torch.randperm(n, generator=generator).to(device)
            draws = draw_augmentation(self.augmentation, n, generator)
            draws = type(draws)(*(values.to(device) for values in draws))
        for index in order.split(self.batch_size):
            pixels = self.images.pixels[index]
            if draws is not None:
                pixels = augment(pixels, type(draws)(*(values[index] for values in draws)), self.augmentation.pad)
            yield Batch(pixels.float() * self._scale + self._shift, self.images.targets[index], index)

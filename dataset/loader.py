"""Batches from images in memory: one gather, crop, flip and normalisation, on the device where the images lie."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from dataset.images import Augmentation, ImageData, Images, draw_augmentation
from dataset.views import VIEWS


class Batch(NamedTuple):
    """Normalised images (B, 3, H, W) float32, classes (B,), sample index in the data set (B,).

    Of images with V views there are V * B rows: the first view of every image, then the second, and so on.
    """

    images: Tensor
    targets: Tensor
    index: Tensor


def epoch_seed(seed: int, epoch: int, *numbers: int) -> int:
    """The seed of everything random in an epoch or a part of it, so that a resumed run needs no generator's state."""
    return int(numpy.random.SeedSequence((seed, epoch, *numbers)).generate_state(1)[0])


class Loader:
    """Batches of one split; shuffled and augmented where `augmentation` is given, in order otherwise.

    What an epoch shows depends on (seed, epoch) alone. The last batch may be short; it is left out where it has fewer
    than `min_batch` images. `subset` holds the sample indices to go through, all by default.
    """

    def __init__(
        self,
        images: Images,
        data: ImageData,
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        views: str = "plain",
        min_batch: int = 1,
        subset: Tensor | None = None,
    ):
        self.images, self.batch_size, self.augmentation, self.seed = images.to(device), batch_size, augmentation, seed
        self.num_views, self._make_views = VIEWS[views]
        self.min_batch = min_batch
        self.subset = torch.arange(len(images.targets)) if subset is None else subset
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (data.mean, data.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        whole, rest = divmod(len(self.subset), self.batch_size)
        return whole + (rest >= self.min_batch and rest > 0)

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the one with number `first` on."""
        n, device = len(self.images.targets), self.images.targets.device
        order, draws = self.subset, None
        if self.augmentation is not None:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
            order = self.subset[torch.randperm(len(self.subset), generator=generator)]
            draws = [draw_augmentation(self.augmentation, n, generator).to(device) for _ in range(self.num_views)]
        parts = order.to(device).split(self.batch_size)[first : len(self)]
        for number, index in enumerate(parts, first):
            pixels = self.images.pixels[index]
            if draws is not None:
                generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch, number))
                drawn = [draw.of(index) for draw in draws]
                pixels = torch.cat(self._make_views(pixels, drawn, self.augmentation, generator))
            yield Batch(pixels.float() * self._scale + self._shift, self.images.targets[index], index)

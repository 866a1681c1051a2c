"""Batches of images in memory or on a disk: gathered, cropped, flipped and normalised on the device of the run."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dataset.decoding import RandomCrops
from dataset.images import Augmentation, ImageData, Images, draw_augmentation
from dataset.seeds import epoch_seed
from dataset.streaming import StreamedImages
from dataset.views import VIEWS


class Batch(NamedTuple):
    """Normalised images (B, 3, H, W) float32, classes (B,), sample index in the data set (B,).

    Of images with V views there are V * B rows: the first view of every image, then the second, and so on. Several
    processes hold a part each of a batch of `whole` images (None: this is all of it, or its parts are equal).
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    whole: int | None = None

    def parts(self, number: int) -> list["Batch"]:
        """The batch in that many parts of nearly one size, with all views of their images."""
        if number == 1:
            return [self]
        views = self.images.unflatten(0, (-1, len(self.targets))).tensor_split(number, 1)
        split = (views, self.targets.tensor_split(number), self.index.tensor_split(number))
        return [Batch(images.flatten(0, 1), *rest, self.whole) for images, *rest in zip(*split, strict=True)]


class Loader:
    """Batches of one split; shuffled and augmented where `augmentation` is given, in order otherwise.

    What an epoch shows depends on (seed, epoch) alone. The last batch may be short; it is left out where it has fewer
    than `min_batch` images. `subset` holds the sample indices to go through, all by default. Of `world_size` processes
    that with number `rank` gets its part of every batch, augmented as if there were one process; a last batch that has
    not `min_batch` images for each of them is left out.
    """

    def __init__(
        self,
        images: Images | StreamedImages,
        data: ImageData,
        batch_size: int,
        device: torch.device,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        views: str = "plain",
        min_batch: int = 1,
        subset: Tensor | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images, self.batch_size, self.augmentation, self.seed = images.to(device), batch_size, augmentation, seed
        self.num_views, self._make_views = VIEWS[views]
        self.min_batch = max(min_batch, 1) * world_size
        self.rank, self.world_size = rank, world_size
        self.subset = torch.arange(len(images.targets)) if subset is None else subset
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (data.mean, data.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        whole, rest = divmod(len(self.subset), self.batch_size)
        return whole + (rest >= self.min_batch)

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the one with number `first` on."""
        n, device = len(self.images.targets), self.images.targets.device
        order, draws = self.subset, None
        if self.augmentation is not None:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
            order = self.subset[torch.randperm(len(self.subset), generator=generator)]
            if self.augmentation.scale is not None:  # nothing of an image depends on which others are shown
                generator.manual_seed(epoch_seed(self.seed, epoch, stream="flips"))
            draws = [draw_augmentation(self.augmentation, n, generator).to(device) for _ in range(self.num_views)]
        wholes = order.to(device).split(self.batch_size)[first : len(self)]
        parts = wholes if self._draws_for_whole_batches() else [self._part(whole) for whole in wholes]
        crops = None
        if draws is not None and self.augmentation.scale is not None:
            crops = RandomCrops(self.images.image_size, self.seed, epoch, self.num_views, self.augmentation.scale)
        read = self.images.read(parts, crops, fill=draws is not None)
        for number, (whole, (index, views)) in enumerate(zip(wholes, read, strict=True), first):
            if draws is None:
                (pixels,) = views
            else:
                shown = self._augmented(views, [draw.of(index) for draw in draws], epoch, number)
                pixels = torch.cat(shown) if len(shown) > 1 else shown[0]
            images = pixels.float().mul_(self._scale).add_(self._shift)
            batch = Batch(images, self.images.targets[index], index, len(whole))
            yield batch.parts(self.world_size)[self.rank] if self._draws_for_whole_batches() else batch

    def _part(self, whole: Tensor) -> Tensor:
        return whole.tensor_split(self.world_size)[self.rank]

    def _draws_for_whole_batches(self) -> bool:
        """Whether something may be random in this process's part of a batch that is drawn for the whole batch."""
        in_memory = isinstance(self.images, Images)  # to decode what other processes show would be too dear
        return self.world_size > 1 and self.num_views > 1 and self.augmentation is not None and in_memory

    def _augmented(self, views: list[Tensor], draws: list, epoch: int, number: int) -> list[Tensor]:
        """The batch with that number in every view; of one crop for all views, or one for each."""

        def make(pixels: Tensor) -> list[Tensor]:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch, number, stream="views"))
            return self._make_views(pixels, draws, self.augmentation, generator)

        if len(views) == 1:
            return make(*views)
        return [make(pixels)[view] for view, pixels in enumerate(views)]

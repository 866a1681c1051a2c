"""Batches of images in memory or on a disk: gathered, cropped, flipped and normalised on the device of the run, and
mixed and resized there where that is asked for."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataset.balance import draw_balanced
from dataset.changes import Changes
from dataset.decoding import RandomCrops
from dataset.images import Augmentation, Draws, ImageData, Images, augment, draw_augmentation, resize
from dataset.policies import v2
from dataset.seeds import epoch_seed
from dataset.streaming import StreamedImages
from dataset.views import VIEWS

#: Bytes of pixels that are augmented and normalised at once on a CPU; as float32 they take four times as much.
IN_CACHE = 2**18


class Batch(NamedTuple):
    """Normalised images (B, 3, H, W) float32, targets, sample index in the data set (B,).

    Targets are classes (B,), int64, or of mixed images every class's share (B, K), float32, at most two of them above
    0. `original` are the images in the size in which they are held, None where `images` are not resized.

    Of images with V views there are V * B rows: the first view of every image, then the second, and so on. Several
    processes hold a part each of a batch of `global_size` images (None: this is all of it, or its parts are equal).
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    global_size: int | None = None
    original: Tensor | None = None

    @property
    def classes(self) -> Tensor:
        """The class (B,) of each image; of a mixed one that with the largest share."""
        return self.targets if self.targets.ndim == 1 else self.targets.argmax(1)

    def parts(self, number: int) -> list["Batch"]:
        """The batch in that many parts of nearly one size, with all views of their images."""
        if number == 1:
            return [self]
        targets, index = self.targets.tensor_split(number), self.index.tensor_split(number)
        originals = self._split(self.original, number) if self.original is not None else [None] * number
        split = zip(self._split(self.images, number), targets, index, originals, strict=True)
        return [Batch(images, *rest, self.global_size, original) for images, *rest, original in split]

    def _split(self, images: Tensor, number: int) -> list[Tensor]:
        views = images.unflatten(0, (-1, len(self.targets))).tensor_split(number, 1)
        return [part.flatten(0, 1) for part in views]


class Shown(NamedTuple):
    """What an epoch shows: images in their order, and what is random of each.

    That belongs to an image's key: its sample index, or its place in the epoch where it may be shown several times.
    """

    order: Tensor  # (m,), sample indices
    keys: Tensor  # (m,)
    draws: Sequence[Draws] = ()  # crops and flips of every view, by key; none where images are shown as they are
    changes: Changes | None = None
    crops: RandomCrops | None = None  # of images that are cropped when they are read


class Loader:
    """Batches of one split; shuffled and augmented where `augmentation` is given, in order otherwise.

    What an epoch shows depends on (seed, epoch) alone, and how images are mixed on the number of the batch too. The
    last batch may be short; it is left out where it has fewer than `min_batch` images. `subset` holds the sample
    indices to go through, all by default. Of `world_size` processes that with number `rank` gets its part of every
    batch, augmented as if there were one process, except that streamed images are mixed within each part; a last batch
    that has not `min_batch` images for each of them is left out.
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
        self._mean, self._resized = data.mean, data.resized
        self._mix = None if augmentation is None else _mixing(augmentation, data.num_classes)
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (data.mean, data.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def __len__(self) -> int:
        full, rest = divmod(len(self.subset), self.batch_size)
        return full + (rest >= self.min_batch)

    @property
    def images_shown(self) -> int:
        """The number of images in the batches of an epoch: all, or those without a last batch that is left out."""
        return min(len(self) * self.batch_size, len(self.subset))

    def batches(self, epoch: int = 0, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from the one with number `first` on."""
        shown, fills = self._shown_in(epoch), self.augmentation is not None
        sizes, parts = self._parts(shown.order, first)
        _, keys = self._parts(shown.keys, first)
        read = self.images.read(parts, shown.crops, fill=fills, changes=shown.changes, keys=keys)
        for number, (size, key, (index, views)) in enumerate(zip(sizes, keys, read, strict=True), first):
            images = self._augmented(views, [draws.of(key) for draws in shown.draws], epoch, number)
            batch = self._finished(Batch(images, self.images.targets[index], index, size), epoch, number)
            yield batch.parts(self.world_size)[self.rank] if self._draws_for_all_processes() else batch

    def _shown_in(self, epoch: int) -> Shown:
        """What an epoch shows; drawn on the CPU, so that every device trains on the same."""
        device, augmentation = self.images.targets.device, self.augmentation
        if augmentation is None:
            order = self.subset.to(device)
            return Shown(order, order)
        generator, crops = torch.Generator().manual_seed(epoch_seed(self.seed, epoch)), None
        order, keys = self._order(generator)
        if augmentation.scale is not None:  # nothing of an image depends on which others are shown
            generator.manual_seed(epoch_seed(self.seed, epoch, stream="flips"))
            crops = RandomCrops(self.images.image_size, self.seed, epoch, self.num_views, augmentation.scale)
        n = len(self.images.targets)
        draws = [draw_augmentation(augmentation, n, generator).to(device) for _ in range(self.num_views)]
        changes = augmentation.changes(self._mean, self.seed, epoch)
        return Shown(order.to(device), keys.to(device), draws, changes, crops)

    def _augmented(self, views: list[Tensor], draws: list[Draws], epoch: int, number: int) -> Tensor:
        """The batch with that number in all its views, augmented and normalised; of one crop for all, or one for each.

        `draws` are the random choices of each view; none where there are none.
        """
        if not draws or self._make_views is None:
            (pixels,) = views
            return self._normalised(pixels, draws[0] if draws else None)
        made = []
        for pixels in views:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch, number, stream="views"))
            made.append(self._make_views(pixels, draws, self.augmentation, generator))
        return self._normalised(torch.cat([each[view] for view, each in enumerate(made)] if len(made) > 1 else made[0]))

    def _normalised(self, pixels: Tensor, draws: Draws | None = None) -> Tensor:
        """Bytes (B, 3, H, W), cropped and mirrored as drawn -> normalised float32.

        On a CPU a few images at a time, which stay in its cache: memory takes most of the time.
        """
        images = torch.empty_like(pixels, dtype=torch.float32)
        at_once = max(len(pixels) if pixels.device.type == "cuda" else IN_CACHE // pixels.shape[1:].numel(), 1)
        groups = pixels.split(at_once)
        if draws is not None:
            groups = map(augment, groups, draws.split(at_once), itertools.repeat(self.augmentation.pad))
        for some, values in zip(images.split(at_once), groups, strict=True):
            some.copy_(values).mul_(self._scale).add_(self._shift)
        return images

    def _order(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The sample indices of an epoch, and their keys."""
        if not self.augmentation.balanced:
            order = self.subset[torch.randperm(len(self.subset), generator=generator)]
            return order, order
        targets = self.images.targets.cpu()[self.subset]
        return self.subset[draw_balanced(targets, generator)], torch.arange(len(self.subset))

    def _parts(self, order: Tensor, first: int) -> tuple[list[int], Sequence[Tensor]]:
        """The number of images in each batch of an epoch, and which of them this process reads."""
        batches = order.split(self.batch_size)[first : len(self)]
        sizes = [len(batch) for batch in batches]
        if self._draws_for_all_processes():
            return sizes, batches
        return sizes, [batch.tensor_split(self.world_size)[self.rank] for batch in batches]

    def _finished(self, batch: Batch, epoch: int, number: int) -> Batch:
        """The batch with that number, mixed and resized where that is asked for."""
        if self._mix is not None:
            seed = epoch_seed(self.seed, epoch, number, stream="mixing")
            views = []
            for view in batch.images.split(len(batch.targets)):  # all views of an image have the same shares
                with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
                    torch.default_generator.manual_seed(seed)
                    view, targets = self._mix(view, batch.targets)
                views.append(view)
            batch = batch._replace(images=torch.cat(views) if len(views) > 1 else views[0], targets=targets)
        if self._resized is None:
            return batch
        return batch._replace(images=resize(batch.images, self._resized), original=batch.images)

    def _draws_for_all_processes(self) -> bool:
        """Whether something may be random in this process's part of a batch that is drawn for the global batch."""
        in_memory = isinstance(self.images, Images)  # to decode what other processes show would be too dear
        draws = self.augmentation is not None and (self.num_views > 1 or self._mix is not None)
        return self.world_size > 1 and draws and in_memory


def _mixing(augmentation: Augmentation, num_classes: int) -> nn.Module | None:
    """torchvision's mixup (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019) of a batch, each image with the
    one before it; one of the two for each batch where both are on. None where neither is."""
    alphas = {"MixUp": augmentation.mixup, "CutMix": augmentation.cutmix}
    chosen = {name: float(alpha) for name, alpha in alphas.items() if alpha}
    if not chosen:
        return None
    classes = max(num_classes, 1)  # images without labels may have no class; their targets are not read
    mixing = [getattr(v2(), name)(alpha=alpha, num_classes=classes) for name, alpha in chosen.items()]
    return v2().RandomChoice(mixing) if len(mixing) > 1 else mixing[0]

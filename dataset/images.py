"""Images in memory, what is known of them, and the augmentation of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dataset.changes import Changes
from dataset.decoding import WHITE
from dataset.streaming import StreamedImages
from errors import count_of

#: Policies that leave the bytes of an image as they are.
UNCHANGED = ("standard", "none")
#: Number of images moved at once where a part of a split is kept.
AT_ONCE = 64
#: Images of more bytes are mirrored one by one on a CPU, in its cache: the calls take less than a copy in memory does.
ONE_BY_ONE = 2**14


class Images(NamedTuple):
    """One split in memory: pixels (n, 3, H, W) as uint8 and classes (n,) as int64."""

    pixels: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.targets.to(device))

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]

    def select(self, chosen: Tensor) -> "Images":
        """Those images for which `chosen` (n,) is true, as a split of their own."""
        return Images(self.pixels[chosen], self.targets[chosen])

    def keep(self, chosen: Tensor) -> "Images":
        """The same in the memory of this split, which is overwritten: a second copy may not fit."""
        kept = chosen.nonzero().flatten()
        for first in range(0, len(kept), AT_ONCE):
            rows = kept[first : first + AT_ONCE]  # none comes before where it goes
            self.pixels[first : first + len(rows)] = self.pixels[rows]
        return Images(self.pixels[: len(kept)], self.targets[chosen])

    def read(
        self,
        parts: Sequence[Tensor],
        crops: None = None,
        fill: bool = False,
        changes: Changes | None = None,
        keys: Sequence[Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Sample indices of the batches -> (indices (B,), [pixels (B, 3, H, W)]); as `StreamedImages.read`."""
        for index, key in zip(parts, keys or parts, strict=True):
            pixels = self.pixels[index]
            yield index, [pixels if changes is None else changes.of_batch(pixels, key.tolist())]


class Augmentation(NamedTuple):
    """Random crop after zero padding by `pad` pixels, horizontal flip of every second image where `flip`.

    Images on a disk may be cropped when they are read instead: a random share of their area within `scale`, resized.
    The rest is off by default; `changes` says what the fields up to `random_erasing` do.
    """

    pad: int = 4
    flip: bool = True
    scale: tuple[float, float] | None = None
    own_policy: str = "imagenet"  # AutoAugment's that was found on data like these
    policy: str = "standard"  # a key of `dataset.changes.POLICIES`
    colour_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0  # of the Beta distribution of the images' shares; 0: off
    cutmix: float = 0.0
    balanced: bool = False  # whether every class is shown equally often, instead of every image once

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed, so that their targets are shares of classes."""
        return bool(self.mixup or self.cutmix)

    @property
    def unmixed(self) -> "Augmentation":
        """The same for images that are not mixed."""
        return self._replace(mixup=0.0, cutmix=0.0)

    @property
    def varies(self) -> bool:
        """Whether an image may look different in another epoch."""
        changed = (self.colour_jitter, self.random_erasing, self.mixes, self.policy not in UNCHANGED)
        return bool(self.pad or self.flip or self.scale or any(changed))

    def describe(self, labelled: bool = True) -> str:
        """One line on what is done besides the data set's own crops and flips; empty where that is nothing."""
        is_still = self.policy == "none"
        plain = Augmentation(self.pad, self.flip, self.scale, self.own_policy, "none" if is_still else "standard")
        added = [(name, value) for name, value, off in zip(self._fields, self, plain, strict=True) if value != off]
        parts = [name if value is True else f"{name} {value}" for name, value in added]
        said = "; the training accuracy counts the class with the larger share" if self.mixes and labelled else ""
        line = "without crops and flips" if is_still else "besides crops and flips"
        return f"{line}: {', '.join(parts).replace('_', ' ')}{said}" if parts else line if is_still else ""

    def changes(self, mean: Sequence[float], seed: int, epoch: int) -> Changes | None:
        """What is done to the images of an epoch besides crops and flips; erased parts take the colour `mean`."""
        changed = (self.colour_jitter, self.random_erasing)
        if self.policy in UNCHANGED and not any(changed):
            return None
        colour = tuple(round(255 * value) for value in mean)
        return Changes(self.policy, self.own_policy, *changed, colour, seed, epoch)


class ImageData(NamedTuple):
    """A data set: splits, classes by index, normalisation (of pixels in 0..1), augmentation of the training images."""

    name: str
    train: Images | StreamedImages
    test: Images | StreamedImages
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    margin: int = 0  # black pixels around each image; below 0: pixels that are cut off all around
    background: tuple[int, int, int] = WHITE  # what transparency is laid on
    split: int = 0  # number of training images that became the test split, where the folder had none
    unreadable: Mapping[str, str] = MappingProxyType({})  # why, by name, of test images that were left out of memory
    labelled: bool = True  # else every target is 0, and there are no test images
    train_files: StreamedImages | None = None  # the files of the training images, where they may be held in memory
    test_files: StreamedImages | None = None  # the files of the test images, where they are image files
    resized: int | None = None  # pixels on a side that batches are resized to; None: as they are held

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Pixels on a side of the images of a batch."""
        return self.resized or self.train.image_size


def hold_out(
    images: Images | StreamedImages, k: int, classes: Sequence[str]
) -> tuple[Images | StreamedImages, Images | StreamedImages]:
    """Images of these classes (of no names without labels) -> (those that are left, `k` held-out ones), each class in
    proportion.

    Which ones depends on the data set and k alone, not on a run's seed, so that all seeds and methods are trained and
    chosen on the same images. Those that are left take the memory of `images`, which must not be used any more. Raises
    `ValueError` unless every class has an image on both sides.
    """
    n = len(images.targets)
    generator = torch.Generator().manual_seed(0)
    targets = images.targets.cpu()
    shuffled = torch.randperm(n, generator=generator)
    # An image's rank within its class, as a share of the class: the k lowest are spread over the classes.
    share = torch.empty(n, dtype=torch.float64)
    for target in targets.unique():
        of_class = shuffled[targets[shuffled] == target]
        share[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + 0.5) / len(of_class)
    is_held_out = torch.zeros(n, dtype=torch.bool)
    is_held_out[share.argsort(stable=True)[:k]] = True
    counts, held_out = (torch.bincount(targets[which], minlength=len(classes)) for which in (slice(None), is_held_out))
    lacking = ((counts > 0) & ((held_out == 0) | (held_out == counts))).nonzero().flatten().tolist()
    if lacking:
        smallest = min(lacking, key=lambda target: int(counts[target]))
        way_out = "hold out fewer" if held_out[smallest] else "hold out more"
        if counts[smallest] == 1:
            way_out = "give it more images, or take its folder away"
        name = f"class {classes[smallest]}" if classes else "the folder"
        has = count_of(int(counts[smallest]), "image")
        raise ValueError(f"{k} of {n} images leave {name}, which has {has}, without images on one side; {way_out}")
    is_held_out = is_held_out.to(images.targets.device)
    held_out = images.select(is_held_out)
    return images.keep(~is_held_out), held_out


class Draws(NamedTuple):
    """The random choices for n images: crop offsets (n,) in 0..2*pad, flips (n,)."""

    top: Tensor
    left: Tensor
    flip: Tensor

    def to(self, device: torch.device) -> "Draws":
        return Draws(*(values.to(device) for values in self))

    def of(self, index: Tensor) -> "Draws":
        """The choices of the samples of a batch."""
        return Draws(*(values[index] for values in self))

    def split(self, size: int) -> list["Draws"]:
        """The choices for as many images at a time."""
        return [Draws(*part) for part in zip(*(values.split(size) for values in self), strict=True)]


def draw_augmentation(augmentation: Augmentation, n: int, generator: torch.Generator) -> Draws:
    """Draw the crops and flips of `n` images; always on the CPU, so that every device trains on the same ones."""
    top, left = torch.randint(0, 2 * augmentation.pad + 1, (2, n), generator=generator)
    flip = torch.randint(0, 2, (n,), generator=generator, dtype=torch.bool) & augmentation.flip
    return Draws(top, left, flip)


def augment(pixels: Tensor, draws: Draws, pad: int) -> Tensor:
    """Pixels (B, 3, H, W) -> each image's own crop of its padded self, mirrored where drawn; shape and type stay."""
    crops = pixels
    if pad:
        height, width = pixels.shape[2:]
        windows = F.pad(pixels, [pad] * 4).unfold(2, height, 1).unfold(3, width, 1)  # (B, 3, 2p+1, 2p+1, H, W), a view
        crops = windows[torch.arange(len(pixels), device=pixels.device), :, draws.top, draws.left]
    return _mirror(crops, draws.flip)


def _mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (B, 3, H, W), those mirrored for which `chosen` (B,) is true; several are in memory of their own."""
    if images.device.type == "cpu" and images.shape[1:].numel() > ONE_BY_ONE:
        if len(images) == 1:
            return images.flip(3) if chosen else images
        mirrored = torch.empty_like(images)
        for place, image, is_chosen in zip(mirrored, images, chosen.tolist(), strict=True):
            place.copy_(image.flip(2) if is_chosen else image)
        return mirrored
    # Whole images are copied: several times as fast as a choice for every byte.
    both = torch.cat([images, images.flip(3)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * chosen)


def resize(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) -> (B, 3, size, size), bilinear; with antialiasing where they become smaller."""
    if images.shape[2:] == (size, size):
        return images
    smaller = size < images.shape[2]
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=smaller)


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (n, 3, H, W) bytes, on the scale 0..1."""
    # A histogram is exact and needs no float copy of the data set.
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in pixels.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append(float((share * values).sum()))
        std.append(float((share * (values - mean[-1]).square()).sum().sqrt()))
    return tuple(mean), tuple(max(value, 1 / 255) for value in std)

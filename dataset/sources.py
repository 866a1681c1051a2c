"""Where the images come from: torchvision's data sets, image folders, ImageNet, shards, and scikit-learn's digits."""

import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch.nn import functional as F

from dataset.folders import (
    Listing,
    has_image_folders,
    is_image_folder,
    list_folder,
    list_images,
    list_judged,
    printable,
    refuse_other_than_folder,
    refuse_without_classes,
    train_folder,
)
from dataset.images import Augmentation, ImageData, Images, channel_statistics, hold_out
from dataset.memory import free_memory
from dataset.pool import Pool
from dataset.shards import find_shards, read_shards
from dataset.streaming import Files, Reading, StreamedImages, too_many_unreadable
from errors import UserError, blamed_on_record

DOWNLOAD_FOLDER = "data"
#: More than this, or than this share of the free memory, is not held in memory.
MEMORY_LIMIT, MEMORY_SHARE = 8 * 2**30, 0.5
#: ImageNet's usual normalisation, and the share of the area that its random crops take.
IMAGENET_MEAN, IMAGENET_STD, CROP_SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.08, 1.0)
#: What is cut off a test image on each side is this part of what is left: 16 pixels of 256 for 224.
TEST_CUT = 14
#: A batch that must fit, of images that are not held in memory.
BATCH = 100
#: About the number of images that give the mean and standard deviation of a folder that is not held in memory.
STATISTICS_IMAGES = 2000


def _images(pixels, targets) -> Images:
    """Bytes (n, H, W, 3) from numpy -> `Images`."""
    return Images(torch.as_tensor(pixels).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(targets).long())


def _download(dataset_class, folder: str | None, may_download: bool, **options):
    folder = folder or DOWNLOAD_FOLDER
    try:
        return dataset_class(folder, download=may_download, **options)
    except (URLError, OSError, RuntimeError, ValueError) as error:
        if not may_download:  # a file names the folder; what a file says is read, and never written to
            raise UserError(
                f"--data: {dataset_class.__name__} is not in {folder}; name another folder with --data"
            ) from None
        raise UserError(
            f"--data: {dataset_class.__name__} is neither in {folder} nor can it be downloaded ({error}); put the "
            "archive there, or try --dataset digits, which needs no network"
        ) from None


def _cifar(name: str, mean: tuple[float, ...], std: tuple[float, ...], *place) -> ImageData:
    from torchvision import datasets

    dataset_class = getattr(datasets, name.upper())
    train, test = (_download(dataset_class, *place, train=is_train) for is_train in (True, False))
    splits = (_images(split.data, split.targets) for split in (train, test))
    return ImageData(name, *splits, train.classes, mean, std, Augmentation(own_policy="cifar10"))


def cifar100(folder: str | None, image_size: int, reading: Reading) -> ImageData:
    """CIFAR-100, 50,000 + 10,000 images; normalised as in RepDistiller."""
    return _cifar("cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), folder, reading.may_download)


def cifar10(folder: str | None, image_size: int, reading: Reading) -> ImageData:
    """CIFAR-10, 50,000 + 10,000 images."""
    return _cifar("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), folder, reading.may_download)


def fashion_mnist(folder: str | None, image_size: int, reading: Reading) -> ImageData:
    """Fashion-MNIST, 60,000 + 10,000 grey images of 28x28, padded to 32x32."""
    from torchvision import datasets

    def split(source) -> Images:
        grey = F.pad(source.data, [2] * 4)
        return _images(grey[..., None].expand(-1, -1, -1, 3), source.targets)

    train, test = (
        _download(datasets.FashionMNIST, folder, reading.may_download, train=is_train) for is_train in (True, False)
    )
    train_images = split(train)
    return ImageData(
        "fashion_mnist",
        train_images,
        split(test),
        train.classes,
        *channel_statistics(train_images.pixels),
        Augmentation(),
        margin=2,
    )


def digits(folder: str | None, image_size: int, reading: Reading) -> ImageData:
    """The 1,797 handwritten digits of 8x8 that scikit-learn ships, enlarged to 32x32; every fifth is for testing."""
    from sklearn.datasets import load_digits

    if folder is not None and reading.may_download:
        raise UserError(f"--data: --dataset {EMBEDDED} is embedded and reads no folder; leave one of them out")
    source = load_digits()
    small = torch.as_tensor(source.images / 16 * 255, dtype=torch.float32)[:, None]
    large = F.interpolate(small, size=32, mode="bilinear").round().byte().expand(-1, 3, -1, -1).contiguous()
    targets = torch.as_tensor(source.target).long()
    is_test = torch.zeros(len(targets), dtype=torch.bool)
    for digit in range(10):
        is_test[(targets == digit).nonzero().flatten()[::5]] = True
    train, test = Images(large[~is_test], targets[~is_test]), Images(large[is_test], targets[is_test])
    classes = [str(digit) for digit in range(10)]
    # A mirrored digit is another sign, so there is no flip.
    augmentation = Augmentation(pad=4, flip=False, own_policy="svhn")
    return ImageData("digits", train, test, classes, *channel_statistics(train.pixels), augmentation)


def image_folder(folder: str | None, image_size: int, reading: Reading) -> ImageData:
    """`PATH/train/CLASS/*` and `PATH/val|test/CLASS/*`, images of any size, resized and cropped to a square."""
    if folder is None:
        raise UserError("--data: name the folder that holds train/ and val/ (or test/), one sub-folder per class")
    if 3 * image_size**2 * BATCH > MEMORY_LIMIT:
        raise UserError(
            f"--image_size: {BATCH} images of {image_size}x{image_size} would take "
            f"{3 * image_size**2 * BATCH / 2**30:.0f} GiB of memory; choose a smaller one"
        )
    train, test, classes, split = _from_folder(folder, image_size, 0, reading)
    unreadable: dict[str, str] = {}
    files = {"train_files": train, "test_files": test}
    if _is_streamed(folder, image_size, len(train.targets) + len(test.targets), reading):
        mean, std = reading.normalisation or channel_statistics(_sample(train))
    else:
        train, _ = _in_memory(train, classes)
        test, unreadable = _in_memory(test, classes)
        mean, std = reading.normalisation or channel_statistics(train.pixels)
    data = ImageData("folder", train, test, classes, mean, std, Augmentation())
    return data._replace(background=reading.background, split=split, unreadable=unreadable, **files)


def imagenet(folder: str | None, image_size: int, reading: Reading) -> ImageData:
    """`PATH/train/CLASS/*` and `PATH/val/CLASS/*`, or shards, streamed; ImageNet's normalisation."""
    if folder is None:
        raise UserError("--data: name the folder that holds train/ and val/ with one sub-folder per class, or shards")
    cut, split = round(image_size / TEST_CUT), 0
    shards = [] if not reading.labelled or _has_classes(folder) else find_shards(folder)
    if shards:
        if reading.split:
            raise UserError(f"--split: {printable(folder)} has shards of test images already; leave --split out")
        (train, test), classes = _sharded(shards, image_size, cut, reading)
    else:
        train, test, classes, split = _from_folder(folder, image_size, cut, reading)
    augmentation = Augmentation(0, True, CROP_SCALE)
    data = ImageData("imagenet", train, test, classes, IMAGENET_MEAN, IMAGENET_STD, augmentation, margin=-cut)
    return data._replace(background=reading.background, split=split, test_files=test)


def _has_classes(folder: str) -> bool:
    """Whether train/ has sub-folders; ImageNet's own archives, which are no shards, are often next to it."""
    train = train_folder(folder)
    return train is not None and any(path.is_dir() for path in Path(train).iterdir())


def _sharded(
    shards: list[list[Path]], image_size: int, cut: int, reading: Reading
) -> tuple[list[StreamedImages], list[str]]:
    """Both splits, and their classes, which are numbers."""
    splits = []
    for paths in shards:
        source, targets = read_shards(paths, reading.num_workers)
        splits.append(StreamedImages(source, targets, image_size, cut, reading))
    _warn_of_dark(splits[0], str(shards[0][0].parent))
    count = 1 + max(int(split.targets.max()) for split in splits)
    return splits, [str(number) for number in range(count)]


def _from_folder(
    folder: str, image_size: int, cut: int, reading: Reading
) -> tuple[StreamedImages, StreamedImages, list[str], int]:
    """Both splits, their classes, and how many training images have become the test split where there was none."""

    def streamed(listing: Listing) -> StreamedImages:
        files, targets = Files(listing.root, listing.names), torch.tensor(listing.targets)
        return StreamedImages(files, targets, image_size, cut, reading)

    if not reading.labelled:
        train = streamed(list_images(folder))
        _warn_of_dark(train, folder)
        return train, train.select(torch.zeros(len(train.targets), dtype=torch.bool)), [], 0
    may_lack_train = reading.judges is not None and not (reading.split or reading.holdout)
    listed = list_judged(folder, reading.judges or ()) if may_lack_train else None
    listed = listed or list_folder(folder, may_split=bool(reading.split or reading.holdout))
    train, test = streamed(listed.train), listed.test and streamed(listed.test)
    _warn_of_dark(train, folder)
    if test is not None:
        if reading.split:
            raise UserError(f"--split: {printable(folder)} has test images already; leave --split out")
        return train, test, listed.classes, 0
    k = round(reading.split * len(train.targets)) or reading.holdout
    try:
        train, test = hold_out(train, k, listed.classes)
    except ValueError as error:
        raise UserError(f"--{'split' if reading.split else 'holdout'}: {error}") from None
    print(f"{printable(folder)} has no test images: {k} training images, each class in proportion, become it")
    return train, test, listed.classes, k


def _warn_of_dark(images: StreamedImages, folder: str) -> None:
    line = images.describe_dark(folder)
    if line:
        print(line)


def _is_streamed(folder: str, image_size: int, images: int, reading: Reading) -> bool:
    """Whether images are streamed: as asked for, else where they would take too much of the free memory."""
    if reading.stream is not None:
        return reading.stream
    size = 3 * image_size**2 * images
    free = [free_memory(), reading.device_memory]
    limit = min([MEMORY_LIMIT, *(MEMORY_SHARE * bytes_free for bytes_free in free if bytes_free is not None)])
    if size <= limit:
        return False
    print(
        f"{printable(folder)} would take {size / 2**30:.2g} GiB of memory at --image_size {image_size}, more than "
        f"{limit / 2**30:.2g} GiB: it is streamed from the disk"
    )
    return True


def _sample(images: StreamedImages) -> torch.Tensor:
    """Pixels of some images of all classes, for statistics."""
    some = torch.arange(0, len(images.targets), max(len(images.targets) // STATISTICS_IMAGES, 1))
    if len(some) < len(images.targets):
        print(f"mean and standard deviation are those of {len(some)} of its {len(images.targets)} training images")
    return torch.cat([pixels.clone() for _, (pixels,) in images.read(some.split(BATCH))])


def _in_memory(images: StreamedImages, classes: list[str]) -> tuple[Images, dict[str, str]]:
    """All images of a split that can be read, in memory, and why, by name, for each that cannot."""
    if not len(images.targets):
        return Images(torch.zeros(0, 3, images.image_size, images.image_size, dtype=torch.uint8), images.targets), {}
    pixels, unreadable = images.pixels()
    if not unreadable:
        return Images(pixels, images.targets), {}
    broken = {images.name_of(sample): reason for sample, reason in unreadable.items()}
    for name, reason in broken.items():
        print(f"skipped an image that cannot be read: {name} ({reason})")
    allowed = images.reading.max_broken
    if len(broken) > allowed:
        raise UserError(too_many_unreadable(broken, allowed))
    whole = torch.ones(len(pixels), dtype=torch.bool)
    whole[list(unreadable)] = False
    for target in images.targets[~whole].unique().tolist():
        if not (images.targets[whole] == target).any():
            name, reason = next(iter(broken.items()))
            others = f"of class {classes[target]} in its split" if classes else "there"
            raise UserError(f"--data: {name} cannot be read ({reason}), nor any other image {others}")
    return Images(pixels, images.targets).keep(whole), broken


#: Data sets that are read from image files: they can be read without labels. And the one that reads no folder.
OF_IMAGE_FILES, EMBEDDED = ("folder", "imagenet"), "digits"
DATASETS = {
    EMBEDDED: digits,
    "cifar100": cifar100,
    "cifar10": cifar10,
    "fashion_mnist": fashion_mnist,
    "folder": image_folder,
    "imagenet": imagenet,
}


def dataset_at(folder: str, known: str | None) -> str | None:
    """The data set of a folder that is named without one, where `known` is the one on record or the default.

    A folder of images is "folder". Raises `UserError` where the folder could be no data set, or two of them.
    """
    place = os.path.abspath(os.path.expanduser(folder))
    if known in OF_IMAGE_FILES:
        return known
    if is_image_folder(place if known in (None, EMBEDDED) else train_folder(place) or ""):
        return "folder"
    if known not in (None, EMBEDDED) and has_image_folders(place):  # other data sets may be next to the archive
        raise UserError(
            f"--data: {printable(folder)} has folders of images, and the data set on record is {known}; say which is "
            f"meant: --dataset folder, or --dataset {known}"
        )
    if known != EMBEDDED:
        return known
    refuse_other_than_folder(place)
    if any(find_shards(place)):
        raise UserError(f"--data: {printable(folder)} holds shards; add --dataset imagenet")
    refuse_without_classes(place)
    raise UserError(f"--data: {printable(folder)} is no folder of images; --dataset says what is stored there")


def load_data(
    name: str,
    folder: str | None = None,
    image_size: int = 32,
    num_workers: int = 4,
    max_broken: int = 10,
    **how: Any,
) -> ImageData:
    """A data set by name, from `folder`; raises `UserError`.

    Images of data sets with a size of their own are resized to `image_size` when a batch is made. `num_workers`,
    `max_broken` and `how` are fields of `Reading`, most of which are for folders of images alone.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset: unknown data set '{name}'; choose from {', '.join(DATASETS)}")
    reading = Reading(num_workers, max_broken, **how)
    if not reading.labelled and name not in OF_IMAGE_FILES:
        raise UserError(f"--labels none: it reads a folder of images, not {name}; name the folder with --data")
    if folder is not None:
        folder = os.path.abspath(os.path.expanduser(folder))
    with blamed_on_record(folder is not None and not reading.may_download, "--data", "data folder"):
        data = DATASETS[name](folder, image_size, reading._replace(pool=Pool(num_workers) if num_workers else None))
    data = data._replace(labelled=reading.labelled)
    if image_size != data.image_size:
        data = data._replace(resized=image_size)
    if reading.normalisation is not None:
        mean, std = reading.normalisation
        data = data._replace(mean=tuple(mean), std=tuple(std))
    return data

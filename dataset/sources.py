"""Where the images come from: torchvision's data sets, a folder of images, and scikit-learn's digits."""

import os
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError

import torch
from torch.nn import functional as F
from torchvision import datasets

from dataset.images import Augmentation, ImageData, Images, channel_statistics
from dataset.single import read_square
from errors import UserError

DOWNLOAD_FOLDER = "data"
#: More than this is not held in memory.
MEMORY_LIMIT = 8 * 2**30


def _images(pixels, targets) -> Images:
    """Bytes (n, H, W, 3) from numpy -> `Images`."""
    return Images(torch.as_tensor(pixels).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(targets).long())


def _download(dataset_class, folder: str, **options):
    try:
        return dataset_class(folder, download=True, **options)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"--data: {dataset_class.__name__} is neither in {folder} nor can it be downloaded ({error}); put the "
            "archive there, or try --dataset digits, which needs no network"
        ) from None


def _cifar(dataset_class, name: str, mean: tuple[float, ...], std: tuple[float, ...], folder: str | None) -> ImageData:
    train, test = (_download(dataset_class, folder or DOWNLOAD_FOLDER, train=is_train) for is_train in (True, False))
    splits = (_images(split.data, split.targets) for split in (train, test))
    return ImageData(name, *splits, train.classes, mean, std, Augmentation())


def cifar100(folder: str | None, image_size: int, num_workers: int) -> ImageData:
    """CIFAR-100, 50,000 + 10,000 images; normalised as in RepDistiller."""
    return _cifar(datasets.CIFAR100, "cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), folder)


def cifar10(folder: str | None, image_size: int, num_workers: int) -> ImageData:
    """CIFAR-10, 50,000 + 10,000 images."""
    return _cifar(datasets.CIFAR10, "cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), folder)


def fashion_mnist(folder: str | None, image_size: int, num_workers: int) -> ImageData:
    """Fashion-MNIST, 60,000 + 10,000 grey images of 28x28, padded to 32x32."""

    def split(source) -> Images:
        grey = F.pad(source.data, [2] * 4)
        return _images(grey[..., None].expand(-1, -1, -1, 3), source.targets)

    train, test = (
        _download(datasets.FashionMNIST, folder or DOWNLOAD_FOLDER, train=is_train) for is_train in (True, False)
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


def digits(folder: str | None, image_size: int, num_workers: int) -> ImageData:
    """The 1,797 handwritten digits of 8x8 that scikit-learn ships, enlarged to 32x32; every fifth is for testing."""
    from sklearn.datasets import load_digits

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
    return ImageData("digits", train, test, classes, *channel_statistics(train.pixels), Augmentation(pad=4, flip=False))


def image_folder(folder: str | None, image_size: int, num_workers: int) -> ImageData:
    """`PATH/train/CLASS/*` and `PATH/val|test/CLASS/*`, images of any size, resized and cropped to a square."""
    if folder is None:
        raise UserError("--data: name the folder that holds train/ and val/ (or test/), one sub-folder per class")
    train_list = _list_images(os.path.join(folder, "train"))
    test_split = next((split for split in ("val", "test") if os.path.isdir(os.path.join(folder, split))), "val")
    test_list = _list_images(os.path.join(folder, test_split))
    if train_list.classes != test_list.classes:
        odd = sorted(set(train_list.classes) ^ set(test_list.classes))
        raise UserError(f"--data: train/ and {test_split}/ of {folder} hold different classes: {', '.join(odd[:5])}")
    size = 3 * image_size**2 * (len(train_list) + len(test_list))
    if size > MEMORY_LIMIT:
        raise UserError(
            f"--data: {folder} would take {size / 2**30:.0f} GiB of memory at --image_size {image_size}; "
            "choose a smaller one"
        )
    train, test = (_read_images(images, image_size, num_workers) for images in (train_list, test_list))
    mean, std = channel_statistics(train.pixels)
    return ImageData("folder", train, test, train_list.classes, mean, std, Augmentation())


def _list_images(path: str) -> datasets.ImageFolder:
    if not os.path.isdir(path):
        raise UserError(
            f"--data: there is no folder {path}; expected train/ and val/ (or test/), one sub-folder per class"
        )
    try:
        return datasets.ImageFolder(path)
    except FileNotFoundError as error:
        raise UserError(f"--data: {path} has no images, or a class without any: {str(error).splitlines()[0]}") from None


def _read_images(listing: datasets.ImageFolder, image_size: int, num_workers: int) -> Images:
    paths, targets = zip(*listing.samples, strict=True)
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        try:
            pixels = list(pool.map(lambda path: read_square(path, image_size), paths))
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return _images(torch.stack(pixels), targets)


DATASETS = {
    "digits": digits,
    "cifar100": cifar100,
    "cifar10": cifar10,
    "fashion_mnist": fashion_mnist,
    "folder": image_folder,
}


def load_data(name: str, folder: str | None = None, image_size: int = 32, num_workers: int = 4) -> ImageData:
    """A data set by name, from `folder`; raises `UserError`. Only `folder` reads `image_size` and uses the threads."""
    if name not in DATASETS:
        raise UserError(f"--dataset: unknown data set '{name}'; choose from {', '.join(DATASETS)}")
    return DATASETS[name](folder, image_size, num_workers)

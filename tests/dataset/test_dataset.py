"""Data sets, augmentation and batches."""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dataset import Augmentation, Images, Loader, load_data
from dataset import loader as loader_module
from dataset.images import Draws, augment, channel_statistics, draw_augmentation
from errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def image_folder(tmp_path):
    """train/ and test/ with two classes of small images of several sizes and modes."""
    generator = numpy.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = (32, 32) if number % 2 else (40, 50)
                pixels = generator.integers(0, 256, (*size, 3), dtype=numpy.uint8)
                image = Image.fromarray(pixels).convert("L" if number == 2 else "RGB")
                image.save(folder / f"{number}.png")
    return tmp_path


def test_the_digits_are_split_by_class_and_never_mirrored(whole_digits):
    data = load_data("digits")
    assert data.train.pixels.shape == (1433, 3, 32, 32) and data.test.pixels.shape == (364, 3, 32, 32)
    assert data.train.pixels.dtype == torch.uint8 and data.num_classes == 10
    assert torch.bincount(data.test.targets).min() >= 35
    assert not data.augmentation.flip


def test_a_crop_is_torchvisions_crop_of_the_padded_image():
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    draws = draw_augmentation(Augmentation(), 6, torch.Generator().manual_seed(0))
    assert draws.flip.any() and not draws.flip.all()
    ours = augment(pixels, draws, 4)
    for number in range(6):
        image = v2.functional.pad(pixels[number], [4, 4, 4, 4])
        image = v2.functional.crop(image, int(draws.top[number]), int(draws.left[number]), 32, 32)
        if draws.flip[number]:
            image = v2.functional.horizontal_flip(image)
        assert torch.equal(ours[number], image)


def test_draws_cover_every_offset_evenly():
    draws = draw_augmentation(Augmentation(), 90_000, torch.Generator().manual_seed(0))
    for offsets in (draws.top, draws.left):
        assert torch.allclose(torch.bincount(offsets, minlength=9) / 10_000, torch.ones(9), atol=0.05)
    assert draws.flip.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert not draw_augmentation(Augmentation(flip=False), 1000, torch.Generator().manual_seed(0)).flip.any()


def test_an_epoch_shows_every_image_once_and_depends_on_seed_and_epoch_alone():
    data = load_data("digits")
    loader = Loader(data.train, data, 64, CPU, data.augmentation, seed=5)
    batches = list(loader.batches(3))
    assert len(batches) == len(loader) == 23 and len(batches[-1].index) == 1433 - 22 * 64
    index = torch.cat([batch.index for batch in batches])
    assert torch.equal(index.sort().values, torch.arange(1433))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), data.train.targets[index])
    again = list(Loader(data.train, data, 64, CPU, data.augmentation, seed=5).batches(3))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(next(loader.batches(4)).index, batches[0].index)
    other = Loader(data.train, data, 64, CPU, data.augmentation, seed=6)
    assert not torch.equal(next(other.batches(3)).index, batches[0].index)


@pytest.mark.parametrize("in_cache", [1, 10_000, 2**20])
def test_test_batches_are_in_order_and_normalised(monkeypatch, in_cache):
    monkeypatch.setattr(loader_module, "IN_CACHE", in_cache)
    data = load_data("digits")
    batches = list(Loader(data.test, data, 50, CPU).batches())
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(73))
    expected = v2.functional.normalize(data.test.pixels[:50].float() / 255, data.mean, data.std)
    assert torch.allclose(batches[0].images, expected, atol=1e-6)
    scale, shift = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.std, data.mean))
    assert torch.equal(batches[0].images, data.test.pixels[:50].float() * (1 / (255 * scale)) + -shift / scale)


def test_channel_statistics_are_mean_and_deviation():
    pixels = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    mean, std = channel_statistics(pixels)
    values = pixels.double() / 255
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), values.mean((0, 2, 3)))
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), values.std((0, 2, 3), correction=0))
    assert min(channel_statistics(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))[1]) > 0


def test_a_folder_of_images_of_any_size_and_mode(image_folder):
    data = load_data("folder", str(image_folder), image_size=32, num_workers=2)
    assert data.classes == ["cat", "dog"] and data.image_size == 32
    assert data.train.pixels.shape == (12, 3, 32, 32) and data.test.pixels.shape == (6, 3, 32, 32)
    assert data.train.targets.tolist() == [0] * 6 + [1] * 6
    exact = numpy.array(Image.open(image_folder / "train" / "cat" / "1.png"))
    assert numpy.array_equal(data.train.pixels[1].permute(1, 2, 0).numpy(), exact)
    assert load_data("folder", str(image_folder), image_size=16).train.pixels.shape[-1] == 16


def test_val_comes_before_test(image_folder):
    (image_folder / "val").mkdir()
    for name in ("cat", "dog"):
        (image_folder / "val" / name).mkdir()
        Image.new("RGB", (32, 32)).save(image_folder / "val" / name / "0.png")
    assert len(load_data("folder", str(image_folder)).test.targets) == 2


def test_faults_of_a_folder_are_named(image_folder, tmp_path):
    def message(path):
        with pytest.raises(UserError) as caught:
            load_data("folder", path and str(path))
        return str(caught.value)

    assert "--data: name the folder" in message(None)
    assert "there is no folder" in message(tmp_path / "nowhere")
    (image_folder / "train" / "bird").mkdir()
    assert "bird" in message(image_folder)
    Image.new("RGB", (32, 32)).save(image_folder / "train" / "bird" / "0.png")
    assert len(load_data("folder", str(image_folder)).classes) == 3
    (image_folder / "test" / "newt").mkdir()
    Image.new("RGB", (32, 32)).save(image_folder / "test" / "newt" / "0.png")
    assert "has classes that train/ has not: newt" in message(image_folder)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "has no images" in message(tmp_path / "empty")
    for image in (image_folder / "train").rglob("*.png"):
        image.unlink()
    assert "no images" in message(image_folder)


def test_too_many_pixels_for_memory_are_refused(image_folder):
    with pytest.raises(UserError, match="GiB of memory"):
        load_data("folder", str(image_folder), image_size=20_000)


@pytest.mark.parametrize("name", ["cifar100", "cifar10", "fashion_mnist"])
def test_downloaded_data_sets_become_images(name, monkeypatch):
    """With torchvision's classes replaced by ones that hold a few images in torchvision's own form."""
    from torchvision import datasets

    class Fake:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            assert download and root == str(Path("somewhere").absolute())
            if name == "fashion_mnist":
                self.data = torch.full((4, 28, 28), 7, dtype=torch.uint8)
            else:
                self.data = numpy.arange(4 * 32 * 32 * 3, dtype=numpy.uint8).reshape(4, 32, 32, 3)
            self.targets = [0, 1, 1, 0]

    class_name = {"cifar100": "CIFAR100", "cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST"}[name]
    monkeypatch.setattr(datasets, class_name, Fake)
    data = load_data(name, "somewhere")
    assert data.train.pixels.shape == (4, 3, 32, 32) and data.train.pixels.dtype == torch.uint8
    if name == "fashion_mnist":
        assert data.train.pixels[0, :, 0, 0].tolist() == [0] * 3 and data.train.pixels[0, :, 2, 2].tolist() == [7] * 3
    else:
        assert data.train.pixels[0, :, 0, 1].tolist() == [3, 4, 5]


@pytest.mark.parametrize("name", ["cifar100", "fashion_mnist"])
def test_a_failed_download_says_where_to_put_the_archive(name, monkeypatch, tmp_path):
    import urllib.error

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=r"--data: .* neither in .* --dataset digits"):
        load_data(name, str(tmp_path))


def test_images_move_to_a_device_together():
    images = Images(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)).to(CPU)
    assert images.pixels.device == images.targets.device == CPU
    assert Draws._fields == ("top", "left", "flip")

"""Changes besides crops and flips: torchvision's, of (seed, epoch, sample) alone wherever they are computed."""

import numpy
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dataset import POLICIES, Augmentation, ImageData, Images, Loader, StreamedImages, load_data
from dataset.changes import Changes
from dataset.seeds import epoch_seed

CPU = torch.device("cpu")
NONE = Changes("standard", "imagenet", 0.0, 0.0, (10, 20, 30), seed=3, epoch=2)
EVERYTHING = {"policy": "randaugment", "colour_jitter": 0.4, "random_erasing": 0.5}
#: What changes an image -> torchvision's transform, said once more.
ALONE = {
    "randaugment": (NONE._replace(policy="randaugment"), v2.RandAugment()),
    "trivialaugment": (NONE._replace(policy="trivialaugment"), v2.TrivialAugmentWide()),
    "autoaugment": (NONE._replace(policy="autoaugment"), v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)),
    "cifar": (
        NONE._replace(policy="autoaugment", own_policy="cifar10"),
        v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    ),
    "jitter": (NONE._replace(colour_jitter=0.4), v2.ColorJitter(0.4, 0.4, 0.4)),
    "erasing": (NONE._replace(random_erasing=0.9), v2.RandomErasing(0.9, value=[10.0, 20.0, 30.0])),
}


def pictures(n: int, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def loader_of(n: int = 23, batch_size: int = 5, **options) -> Loader:
    images = Images(pictures(n), torch.arange(n) % 3)
    data = ImageData("fake", images, images, list("abc"), (0.5,) * 3, (0.25,) * 3, Augmentation())
    return Loader(images, data, batch_size, CPU, data.augmentation._replace(**options), seed=3)


@pytest.mark.parametrize("name", ALONE)
def test_a_change_is_torchvisions_with_the_images_own_seed(name):
    changes, transform = ALONE[name]
    changed = []
    for key, image in enumerate(pictures(8)):
        torch.manual_seed(epoch_seed(3, 2, key, stream="changes"))
        expected = transform(image)
        torch.manual_seed(7)
        before = torch.get_rng_state()
        found = changes.of(image, key)
        assert torch.equal(found, expected) and found.dtype == torch.uint8
        assert torch.equal(torch.get_rng_state(), before), "the run's random numbers are not touched"
        changed.append(not torch.equal(found, image))
    assert any(changed)


def test_the_policies_are_those_that_are_named_and_nothing_is_done_without():
    assert set(POLICIES) == {"standard", "none", "randaugment", "trivialaugment", "autoaugment"}
    assert Augmentation().changes((0.5,) * 3, 0, 0) is None and Augmentation().describe() == ""
    assert Augmentation(pad=0, flip=False, own_policy="svhn").describe() == ""
    assert Augmentation(0, False, policy="none").describe() == "without crops and flips"
    assert Augmentation(0, False, policy="none", mixup=0.2).describe(False) == "without crops and flips: mixup 0.2"
    colour = Augmentation(random_erasing=1.0).changes((0.5, 0.25, 1.0), 4, 6).colour
    assert colour == (128, 64, 255), "what is erased takes the mean colour"
    assert "policy randaugment, colour jitter 0.4, random erasing 0.5" in Augmentation(**EVERYTHING).describe()


def test_erased_parts_have_the_mean_colour():
    image = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    erased = NONE._replace(random_erasing=1.0).of(image, 0)
    inside = erased[0] != 200
    assert 0.01 < inside.float().mean() < 0.4
    assert erased[:, inside].unique(dim=1).flatten().tolist() == [10, 20, 30]


@pytest.mark.parametrize("options", [{"policy": "trivialaugment"}, EVERYTHING], ids=str)
def test_an_image_depends_on_seed_epoch_and_sample_alone(options):
    loader = loader_of(**options)
    whole = {int(i): image for batch in loader.batches(2) for i, image in zip(batch.index, batch.images, strict=True)}
    torch.manual_seed(torch.seed())
    for batch in loader_of(batch_size=7, **options).batches(2):  # other batches
        assert all(torch.equal(whole[int(i)], image) for i, image in zip(batch.index, batch.images, strict=True))
    for ours, theirs in zip(list(loader.batches(2))[3:], loader.batches(2, 3), strict=True):  # a resumed epoch
        assert torch.equal(ours.images, theirs.images)
    other = {int(i): image for batch in loader.batches(3) for i, image in zip(batch.index, batch.images, strict=True)}
    assert sum(torch.equal(whole[i], other[i]) for i in whole) <= 1


def test_everything_else_of_an_epoch_stays_as_it_is():
    """Order, crops and flips: what is changed are the bytes that are cropped."""
    plain, changed = loader_of(), loader_of(colour_jitter=0.3)
    changes = changed.augmentation.changes((0.5,) * 3, 3, 2)
    changed_before = Images(changes.of_batch(pictures(23), list(range(23))), torch.arange(23) % 3)
    data = ImageData("fake", changed_before, changed_before, list("abc"), (0.5,) * 3, (0.25,) * 3, Augmentation())
    expected = Loader(changed_before, data, 5, CPU, data.augmentation, seed=3).batches(2)
    for ours, unchanged, theirs in zip(changed.batches(2), plain.batches(2), expected, strict=True):
        assert torch.equal(ours.index, unchanged.index) and torch.equal(ours.targets, unchanged.targets)
        assert torch.equal(ours.images, theirs.images) and not torch.equal(ours.images, unchanged.images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 9), ("val", 2)):
        for number, image in enumerate(pictures(2 * count, 40)):
            path = root / split / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return root


def epoch_of(folder, workers: int, stream: bool, name: str = "folder", views: str = "plain", **options) -> list:
    data = load_data(name, str(folder), 32, workers, stream=stream, normalisation=((0.5,) * 3, (0.25,) * 3))
    assert isinstance(data.train, StreamedImages) == stream
    loader = Loader(data.train, data, 4, CPU, data.augmentation._replace(**options), seed=5, views=views)
    return list(loader.batches(1))


@pytest.mark.slow
def test_workers_streaming_and_memory_show_the_same(folder):
    expected = epoch_of(folder, 0, False, **EVERYTHING)
    for workers in (0, 2):
        for ours, theirs in zip(expected, epoch_of(folder, workers, True, **EVERYTHING), strict=True):
            assert torch.equal(ours.index, theirs.index) and torch.equal(ours.images, theirs.images), workers


def test_streamed_crops_are_changed_after_they_are_cut_out(folder):
    plain, changed = (epoch_of(folder, 0, True, "imagenet", "rotations", **o) for o in ({}, EVERYTHING))
    for ours, theirs in zip(plain, changed, strict=True):
        assert torch.equal(ours.index, theirs.index) and not torch.equal(ours.images, theirs.images)
    changes = Augmentation(**EVERYTHING).changes((0.5,) * 3, 5, 1)
    (picture,) = pictures(1)
    assert numpy.array_equal(changes.of_array(picture.numpy(), 4), changes.of(picture, 4))

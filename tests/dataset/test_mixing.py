"""mixup and CutMix: shares of images and of classes agree, of (seed, epoch, batch) alone."""

import pytest
import torch

from dataset import VIEWS, Augmentation, Batch, ImageData, Loader
from dataset.sources import _images
from tests.dataset.test_changes import epoch_of, folder

__all__ = ["folder"]  # a fixture
CPU = torch.device("cpu")
CLASSES, STANDARD = 4, Augmentation()


def loader_of(views: str = "plain", n: int = 23, batch_size: int = 6, augmentation=STANDARD, **options) -> Loader:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (n, 16, 16, 3), dtype=torch.uint8, generator=generator)
    images = _images(pixels.numpy(), torch.arange(n) % CLASSES)
    data = ImageData("fake", images, images, list("abcd"), (0.5,) * 3, (0.25,) * 3, augmentation)
    return Loader(images, data, batch_size, CPU, augmentation, 3, views, **options)


def pairs(views: str = "plain", **mixing):
    """(plain batch, mixed batch, shares of each image in itself (B,)) of an epoch."""
    still = Augmentation(pad=0)  # without black borders, which are equal in all images
    plain, mixed = (loader_of(views, augmentation=still._replace(**options)) for options in ({}, mixing))
    for before, after in zip(plain.batches(1), mixed.batches(1), strict=True):
        truth = torch.nn.functional.one_hot(before.targets, CLASSES).float()
        apart = before.targets != before.targets.roll(1)
        own = (after.targets * truth).sum(1)
        lam = own[apart][0]  # one for the whole batch
        assert torch.allclose(after.targets, lam * truth + (1 - lam) * truth.roll(1, 0), atol=1e-6)
        assert torch.allclose(after.targets.sum(1), torch.ones(len(own))) and after.targets.dtype == torch.float32
        assert torch.equal(before.index, after.index)
        yield before, after, float(lam)


def test_mixup_mixes_pixels_and_classes_in_the_same_shares():
    shares = []
    for before, after, lam in pairs(mixup=0.5):
        expected = lam * before.images + (1 - lam) * before.images.roll(1, 0)
        assert torch.allclose(after.images, expected, atol=1e-5)
        shares.append(lam)
    assert len(set(shares)) == len(shares) > 2, "each batch has a share of its own"


def test_cutmix_pastes_a_rectangle_whose_area_is_the_share():
    for before, after, lam in pairs(cutmix=1.0):
        pasted = (after.images != before.images).any(1)
        assert torch.equal(after.images, torch.where(pasted[:, None], before.images.roll(1, 0), before.images))
        rows, columns = pasted.any(2), pasted.any(1)
        assert torch.allclose(rows.sum(1) * columns.sum(1) / 256, torch.tensor(1 - lam)), "a whole rectangle"
        assert torch.equal(rows[0].expand_as(rows), rows)


def test_with_both_each_batch_has_one_of_them():
    both = loader_of(n=400, batch_size=4, augmentation=Augmentation(mixup=1.0, cutmix=1.0))
    pasted = []
    for before, after in zip(loader_of(n=400, batch_size=4).batches(1), both.batches(1), strict=True):
        kept = (after.images == before.images) | (after.images == before.images.roll(1, 0))
        pasted.append(bool(kept.all()))
    assert 30 < sum(pasted) < 70


@pytest.mark.parametrize("views", VIEWS)
def test_all_views_of_an_image_are_mixed_alike(views):
    number, _ = VIEWS[views]
    for before, after, lam in pairs(views, mixup=0.5):
        befores, afters = (batch.images.unflatten(0, (number, -1)) for batch in (before, after))
        assert len(after.targets) == afters.shape[1]
        assert torch.allclose(afters, lam * befores + (1 - lam) * befores.roll(1, 1), atol=1e-5)


def test_how_a_batch_is_mixed_depends_on_seed_epoch_and_its_number():
    augmentation = Augmentation(mixup=0.5, cutmix=1.0)
    loader = loader_of(augmentation=augmentation)
    torch.manual_seed(5)
    before, whole = torch.get_rng_state(), list(loader.batches(1))
    assert torch.equal(torch.get_rng_state(), before), "the run's random numbers are not touched"
    torch.manual_seed(6)
    for ours, theirs in zip(whole[2:], loader.batches(1, 2), strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.targets, theirs.targets)
    assert not torch.equal(whole[0].targets, next(iter(loader.batches(2))).targets)


@pytest.mark.parametrize("views", ["plain", "rotations"])
def test_the_parts_of_all_processes_are_the_mixed_batches_of_one(views):
    options = {"augmentation": Augmentation(mixup=0.5, policy="randaugment"), "views": views}
    parts = [loader_of(rank=number, world_size=2, **options) for number in range(2)]
    for whole, *shares in zip(loader_of(**options).batches(1), *(part.batches(1) for part in parts), strict=True):
        assert torch.equal(whole.targets, torch.cat([share.targets for share in shares]))
        by_view = [share.images.unflatten(0, (-1, len(share.index))) for share in shares]
        assert torch.equal(whole.images, torch.cat(by_view, 1).flatten(0, 1))


def test_streamed_images_are_mixed_too(folder):
    plain, mixed = epoch_of(folder, 0, True), epoch_of(folder, 0, True, mixup=0.5)
    for before, after in zip(plain, mixed, strict=True):
        assert after.targets.shape == (len(before.targets), 2) and not torch.equal(before.images, after.images)


def test_the_class_of_a_mixed_image_is_that_with_the_larger_share():
    shares = torch.tensor([[0.3, 0.7, 0.0], [0.9, 0.0, 0.1]])
    batch = Batch(torch.zeros(2, 3, 4, 4), shares, torch.arange(2))
    assert batch.classes.tolist() == [1, 0]
    assert batch._replace(targets=torch.tensor([2, 1])).classes.tolist() == [2, 1]
    first, second = batch.parts(2)
    assert first.targets.tolist() == shares[:1].tolist() and second.classes.tolist() == [0]


def test_mixed_images_are_said_to_be():
    said = Augmentation(mixup=0.2).describe()
    assert "mixup 0.2; the training accuracy counts the class with the larger share" in said

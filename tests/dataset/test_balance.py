"""Classes that count differently: weights, and sampling that shows each equally often."""

import pytest
import torch

from dataset import Augmentation, ImageData, Images, Loader, class_weights
from dataset.balance import draw_balanced
from errors import UserError

CPU = torch.device("cpu")
CLASSES = ["cat", "dog", "big bird"]
TARGETS = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)


def written(tmp_path, *lines: str) -> str:
    (tmp_path / "weights.txt").write_text("\n".join(lines))
    return str(tmp_path / "weights.txt")


def test_balanced_weights_are_inverse_to_the_numbers_of_images():
    weights = class_weights("balanced", TARGETS, CLASSES)
    assert torch.allclose(weights * torch.tensor([60.0, 30.0, 10.0]), torch.full((3,), 100 / 3))
    assert float(weights[TARGETS].mean()) == pytest.approx(1)
    assert class_weights("balanced", TARGETS[:90], CLASSES)[2] == 1, "a class without training images"


def test_weights_of_a_file_have_the_mean_one_over_the_images(tmp_path):
    weights = class_weights(written(tmp_path, "dog 2", "", "big bird\t4.0", "cat  1"), TARGETS, CLASSES)
    assert torch.allclose(weights / weights[0], torch.tensor([1.0, 2.0, 4.0]))
    assert float(weights[TARGETS].mean()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["cat 1", "dog 1"], "no weight of class big bird; add a line"),
        (["cats 1"], "no class cats; did you mean cat"),
        (["cat 1", "cat 2"], "class cat twice"),
        (["cat -1"], "not a class and its weight"),
        (["cat"], "not a class and its weight"),
        (["cat nan"], "not a class and its weight"),
        (["cat 1e30"], "not a class and its weight"),
        ([], "no weight of class cat"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as caught:
        class_weights(written(tmp_path, *lines), TARGETS, CLASSES)
    assert "--class_weights" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary", "."):
        with pytest.raises(UserError, match="cannot be read"):
            class_weights(str(tmp_path / name), TARGETS, CLASSES)


def test_every_class_is_drawn_equally_often():
    drawn = draw_balanced(TARGETS.repeat(100), torch.Generator().manual_seed(0))
    counts = torch.bincount(TARGETS.repeat(100)[drawn]).double()
    assert len(drawn) == 10_000 and ((counts - 10_000 / 3).square() / (10_000 / 3)).sum() < 15
    of_last = torch.bincount(drawn[TARGETS.repeat(100)[drawn] == 2])
    assert of_last[of_last > 0].double().mean() < 5, "spread over the images of the class"


def loader_of(policy: str = "trivialaugment", **options) -> Loader:
    n = len(TARGETS)
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = Images(pixels, TARGETS)
    data = ImageData("fake", images, images, CLASSES, (0.5,) * 3, (0.25,) * 3, Augmentation())
    augmentation = data.augmentation._replace(balanced=True, policy=policy)
    return Loader(images, data, 8, CPU, augmentation, seed=3, **options)


def test_balanced_epochs_are_as_long_and_depend_on_seed_and_epoch():
    loader = loader_of()
    batches = list(loader.batches(1))
    shown = torch.cat([batch.targets for batch in batches])
    assert len(loader) == len(batches) == 13 and len(shown) == 100
    assert torch.bincount(shown).min() > 18
    for ours, theirs in zip(batches[5:], loader.batches(1, 5), strict=True):
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.images, theirs.images)
    assert not torch.equal(batches[0].index, next(iter(loader.batches(2))).index)
    parts = [loader_of(rank=number, world_size=2) for number in range(2)]
    for whole, *shares in zip(batches, *(part.batches(1) for part in parts), strict=True):
        assert torch.equal(whole.images, torch.cat([share.images for share in shares]))
        assert torch.equal(whole.targets, torch.cat([share.targets for share in shares]))


@pytest.mark.parametrize("policy", ["standard", "trivialaugment"])
def test_an_image_that_is_shown_again_is_cropped_and_changed_anew(policy):
    batches = list(loader_of(policy).batches(1))
    index, images = torch.cat([batch.index for batch in batches]), torch.cat([batch.images for batch in batches])
    sample = int(torch.bincount(index).argmax())
    again = images[index == sample]
    assert len(again) > 2 and len(again.flatten(1).unique(dim=0)) > len(again) // 2


def test_a_part_of_the_images_is_balanced_among_itself():
    subset = torch.arange(50, 100)
    index = torch.cat([batch.index for batch in loader_of(subset=subset).batches(1)])
    assert len(index) == 50 and index.min() >= 50
    assert torch.bincount(TARGETS[index]).min() > 8

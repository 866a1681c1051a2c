"""The views of an image: what they show, in which order, and that they depend on (seed, epoch) alone."""

import pytest
import torch

import dataset.loader as loader_module
from dataset import VIEWS, Augmentation, ImageData, Images, Loader
from dataset.images import ONE_BY_ONE, Draws, augment, draw_augmentation
from dataset.views import rotations, weak_strong
from distiller_zoo import DISTILLERS, Progress, Task
from helper.command_line import resolve
from helper.loops import Training
from helper.teacher import FrozenTeacher
from tests.conftest import pair_networks

CPU = torch.device("cpu")
PAD = Augmentation().pad


def pictures(n: int, size: int = 32) -> torch.Tensor:
    return torch.randint(1, 256, (n, 3, size, size), dtype=torch.uint8)


def draw(n: int, views: int, flip: bool = True, pad: int = PAD) -> list[Draws]:
    generator = torch.Generator().manual_seed(0)
    return [draw_augmentation(Augmentation(pad, flip), n, generator) for _ in range(views)]


def image_data(n: int = 12) -> ImageData:
    images = Images(pictures(n), torch.arange(n))
    return ImageData("fake", images, images, [str(k) for k in range(n)], (0.5,) * 3, (0.25,) * 3, Augmentation())


def test_a_quarter_turn_is_counterclockwise_and_each_view_turns_once_more():
    still = Augmentation(pad=0, flip=False)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    pixels[:, :, 0, 1] = 9  # at the top, left
    corners = [view[0, 0].nonzero().tolist() for view in rotations(pixels, draw(1, 4, False, 0), still)]
    assert corners == [[[0, 1]], [[6, 0]], [[7, 6]], [[1, 7]]]


def test_rotations_share_the_flip_and_have_their_own_crops():
    pixels, draws = pictures(64), draw(64, 4)
    views = rotations(pixels, draws, Augmentation())
    assert draws[0].flip.any() and not torch.equal(draws[0].flip, draws[1].flip)
    for turn, (view, own) in enumerate(zip(views, draws, strict=True)):
        back = torch.rot90(view, -turn, (2, 3))
        assert torch.equal(back, augment(pixels, Draws(own.top, own.left, draws[0].flip), PAD))


def test_images_that_are_cropped_when_they_are_read_are_mirrored_anew_in_every_epoch_whatever_else_is_shown():
    data, only_mirrored = image_data(40), Augmentation(pad=0, scale=(0.5, 1.0))  # images in memory stay uncropped

    def shown(epoch: int, subset: torch.Tensor) -> dict[int, torch.Tensor]:
        (batch,) = Loader(data.train, data, 40, CPU, only_mirrored, subset=subset).batches(epoch)
        return dict(zip(batch.index.tolist(), batch.images, strict=True))

    first, second, part = shown(1, torch.arange(40)), shown(2, torch.arange(40)), shown(1, torch.arange(9))
    assert 0 < sum(torch.equal(first[sample], second[sample]) for sample in first) < 40
    assert all(torch.equal(image, first[sample]) for sample, image in part.items())


@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("pad", [0, 2])
def test_small_and_large_images_are_mirrored_alike_and_the_held_ones_left_alone(size, pad):
    assert 3 * 32**2 < ONE_BY_ONE < 3 * 80**2
    pixels, (draws,) = pictures(6, size), draw(6, 1, pad=pad)
    before, padded = pixels.clone(), torch.nn.functional.pad(pixels, [pad] * 4)
    for image, ours, top, left, flip in zip(padded, augment(pixels, draws, pad), *draws, strict=True):
        crop = image[:, top : top + size, left : left + size]
        assert torch.equal(ours, crop.flip(2) if flip else crop)
    assert torch.equal(pixels, before) and 0 < draws.flip.sum() < 6


@pytest.mark.parametrize("in_cache", [1, 3 * 3 * 80**2])
@pytest.mark.parametrize("pad", [0, 2])
def test_images_that_are_changed_a_few_at_a_time_are_those_of_the_batch(pad, in_cache, monkeypatch):
    images = Images(pictures(11, 80), torch.arange(11))
    data = image_data()._replace(train=images, augmentation=Augmentation(pad))
    loader = Loader(images, data, 8, CPU, data.augmentation)
    monkeypatch.setattr(loader_module, "IN_CACHE", 2**30)
    expected = list(loader.batches(2))
    monkeypatch.setattr(loader_module, "IN_CACHE", in_cache)
    for ours, whole in zip(loader.batches(2), expected, strict=True):
        assert torch.equal(ours.images, whole.images)


def test_the_crops_of_each_view_are_uniform_and_independent():
    """One white pixel in the middle tells where a crop is."""
    n, size = 20_000, 12
    pixels = torch.zeros(n, 3, size, size, dtype=torch.uint8)
    pixels[:, :, 6, 6] = 255
    places = []
    for turn, view in enumerate(rotations(pixels, draw(n, 4, flip=False), Augmentation())):
        flat = torch.rot90(view, -turn, (2, 3))[:, 0].flatten(1).float().argmax(1)
        top, left = 6 + PAD - flat // size, 6 + PAD - flat % size
        assert top.min() == left.min() == 0 and top.max() == left.max() == 2 * PAD
        cells = torch.bincount(top * 9 + left, minlength=81)
        assert ((cells - n / 81).square() / (n / 81)).sum() < 150  # chi-square of 80 degrees: 150 in one of 1e5
        places.append(torch.stack([top, left]).double())
    correlations = torch.corrcoef(torch.cat(places)) - torch.eye(8, dtype=torch.float64)
    assert correlations.abs().max() < 5 / n**0.5


@pytest.mark.parametrize("views", VIEWS)
def test_views_come_one_after_the_other_and_the_first_is_the_plain_one(views):
    data = image_data()
    plain, several = (
        list(Loader(data.train, data, 5, CPU, data.augmentation, 3, views=name).batches(2)) for name in ("plain", views)
    )
    number, _ = VIEWS[views]
    assert [len(batch.images) for batch in several] == [5 * number, 5 * number, 2 * number]
    for ours, expected in zip(several, plain, strict=True):
        assert torch.equal(ours.index, expected.index) and torch.equal(ours.targets, expected.targets)
        assert torch.equal(ours.images[: len(ours.index)], expected.images)
        assert ours.images.dtype == torch.float32


def test_without_augmentation_there_is_one_view():
    data = image_data()
    for views in VIEWS:
        batch = next(Loader(data.test, data, 5, CPU, views=views).batches())
        assert batch.images.shape == (5, 3, 32, 32)


def images_seen(name: str, epochs_over: int, seed: int = 0, state=None) -> tuple[list[torch.Tensor], list[dict]]:
    """What an epoch of a method shows its student, and the states from which the epoch can be resumed."""
    torch.manual_seed(1)
    teacher, student = pair_networks("resnet14", "resnet8", 12)
    data = image_data()
    method = DISTILLERS[name](student, teacher, Task(12, 32, 4, data.train.targets))
    given = {"distill": name, "model_s": "resnet8", "batch_size": 4, "seed": seed, "data_seed": seed}
    config = resolve(given, of_teacher={"model_t": "resnet14"})
    seen, states = [], []
    *_, main = method.stages(240)
    stage = main._replace(respond=lambda images, teacher: seen.append(images) or method.respond(images, teacher))
    training, frozen = Training(stage, method, data, config, CPU), FrozenTeacher(teacher)
    torch.manual_seed(torch.seed())  # what came before an epoch must not matter
    training.begin_epoch(Progress(epochs_over, 240), epochs_over, state)
    first = state["steps"] if state else 0
    for number, batch in enumerate(training.loader.batches(epochs_over + 1, first), first + 1):
        training.go_to(number - 1)
        training.begin_step()
        training.add_gradients(batch, batch, frozen(batch.images, method.teacher_preact), True)
        training.finish_step()
        states.append(training.state(number))
    return seen, states


@pytest.mark.parametrize("name", ["sskd", "mlkd"])
def test_what_an_epoch_shows_depends_on_seed_and_epoch_alone(name):
    (first, states), (again, _) = images_seen(name, 1), images_seen(name, 1)
    assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    resumed, _ = images_seen(name, 1, state=states[0])
    assert len(resumed) == 2 and all(torch.equal(a, b) for a, b in zip(first[1:], resumed, strict=True))
    for other in (images_seen(name, 2)[0], images_seen(name, 1, seed=1)[0]):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_strong_view_has_two_operations_its_own_crop_and_a_square(monkeypatch):
    pixels, draws, calls = pictures(8), draw(8, 2), []

    def operation(strong, generator):
        calls.append(strong)
        return strong // 2

    monkeypatch.setattr("dataset.views.random_operation", operation)
    monkeypatch.setattr("dataset.views.cut_out", lambda strong, generator: strong + 1)
    weak, strong = weak_strong(pixels, draws, Augmentation())
    assert torch.equal(weak, augment(pixels, draws[0], PAD))
    assert torch.equal(strong, augment(pixels, draws[1], PAD) // 2 // 2 + 1) and len(calls) == 2

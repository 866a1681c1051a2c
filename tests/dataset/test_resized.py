"""`--image_size` of images in memory: held as they are, resized when a batch is made."""

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dataset import Loader, data_digest, load_data, read_normalised
from helper.checkpoint import data_record
from helper.fast import Fast
from helper.networks import Network
from helper.teacher import Teacher
from models import build_model
from models.record import check_record

CPU = torch.device("cpu")


def first(data, augment: bool = False, **options):
    return next(iter(Loader(data.test, data, 6, CPU, data.augmentation if augment else None, **options).batches()))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("size", [64, 48, 16])
def test_batches_are_resized_and_memory_holds_what_it_held(size, augment):
    plain, data = load_data("digits"), load_data("digits", image_size=size)
    assert data.image_size == size and data.train.pixels.shape[-1] == 32
    assert data_digest(data) == data_digest(plain)
    before, after = first(plain, augment), first(data, augment)
    assert torch.equal(after.original, before.images) and before.original is None
    expected = F.interpolate(before.images, (size, size), mode="bilinear", align_corners=False, antialias=size < 32)
    assert torch.equal(after.images, expected), "resized last: what is random is as without"
    views = next(iter(Loader(data.train, data, 6, CPU, data.augmentation, views="rotations").batches()))
    assert views.images.shape == (24, 3, size, size) and views.parts(2)[1].original.shape == (12, 3, 32, 32)


def test_the_size_that_is_held_changes_nothing():
    data = load_data("digits", image_size=32)
    assert data.resized is None and first(data).original is None and "source_size" not in data_record(data)


def test_prediction_shows_what_testing_shows(tmp_path):
    data = load_data("digits", image_size=64)
    Image.fromarray(data.test.pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    assert torch.allclose(read_normalised(tmp_path / "a.png", data_record(data)), first(data).images[0], atol=1e-6)


def test_prediction_lays_transparency_on_the_colour_that_testing_does(tmp_path):
    """Also of a run's checkpoint, which need not be exported."""
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGBA", (32, 32), (200, 100, 0, 128)).save(tmp_path / name / "x.png")
    data = load_data("folder", str(tmp_path), background=(0, 0, 255))
    shown = read_normalised(tmp_path / "test/a/x.png", check_record(data_record(data), "a file"))
    assert torch.allclose(shown, first(data).images[0], atol=1e-4)


@pytest.mark.parametrize(
    ("image_size", "of_record", "own", "reads"),
    [(64, 32, None, "original"), (64, 64, None, "images"), (64, None, None, "images"), (64, 32, 48, "original")],
)
def test_a_teacher_with_a_size_of_its_own_is_given_the_images_as_they_are_held(image_size, of_record, own, reads):
    data = load_data("digits", image_size=image_size)
    record = {"mean": list(data.mean), "std": list(data.std), "image_size": of_record}
    network = build_model("resnet8", 10).eval()
    teacher = Teacher(Network("x.pth", "resnet8", network, 10, record=record), data, own, Fast(), CPU)
    batch = first(data)
    assert teacher.shown(batch) is getattr(batch, reads)
    size = own or of_record or image_size
    expected = batch.images if size == image_size else batch.original
    if size == 48:
        expected = F.interpolate(batch.original, (48, 48), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.equal(teacher(teacher.shown(batch), False, False).logits, network(expected))
    assert teacher.image_size == size


def test_a_folded_teacher_resizes_what_it_is_given():
    data = load_data("digits", image_size=64)
    record = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 64}  # of the student's size in another normalisation
    source = Network("x.pth", "resnet8", build_model("resnet8", 10).eval(), 10, record=record)
    batch = first(data)
    plain, folded = (Teacher(source, data, None, Fast(fold_teacher=folds), CPU) for folds in (False, True))
    assert folded.shown(batch) is batch.original
    outputs = [teacher(teacher.shown(batch), False, False) for teacher in (plain, folded)]
    assert outputs[0].final.shape == outputs[1].final.shape
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-3)


def test_a_teacher_of_the_size_that_is_held_sees_it_where_nothing_is_resized():
    data = load_data("digits")
    teacher = Teacher(Network("x.pth", "resnet8", build_model("resnet8", 10), 10), data, 64, Fast(), CPU)
    batch = first(data)
    assert teacher.shown(batch) is batch.images and not teacher.sees_original

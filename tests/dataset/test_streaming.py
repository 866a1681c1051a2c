"""Streamed images."""

import json
import os

import numpy
import pytest
import torch
from PIL import Image

import train_imagenet_student
import train_teacher
from dataset import Augmentation, Loader, hold_out, load_data, read_normalised, sources
from dataset.decoding import Centre, Place, RandomCrops, read_views
from dataset.streaming import AHEAD, fill_gaps
from errors import UserError
from helper.loops import evaluate
from tests.conftest import message_of
from tests.dataset.image_folders import write_images

CPU = torch.device("cpu")


def read(path, crop, sample: int = 0) -> list[torch.Tensor]:
    """Bytes (3, size, size) of each view of an image file."""
    (part,) = crop.of([sample])
    return [torch.tensor(pixels) for pixels in read_views(Place(os.fsencode(path)).read, part)]


def fit(path, size: int, cut: int = 0) -> torch.Tensor:
    (pixels,) = read(path, Centre(size, cut))
    return pixels


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "data")


def loader_of(folder, workers: int = 0, split: str = "train", max_broken: int = 10, batch_size: int = 4, **options):
    data = load_data("imagenet", str(folder), 32, workers, max_broken)
    augmentation = data.augmentation if split == "train" else None
    return Loader(getattr(data, split), data, batch_size, CPU, augmentation, seed=3, **options)


def same(a, b) -> bool:
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.targets, y.targets) and torch.equal(x.index, y.index)
        for x, y in zip(a, b, strict=True)
    )


def test_statistics_are_of_all_batches_that_workers_read(folder, monkeypatch):
    """Their memory is used again for later batches."""
    monkeypatch.setattr(sources, "BATCH", 1)
    alone, shared = (load_data("folder", str(folder), 32, workers, stream=True) for workers in (0, 2))
    assert len(alone.train.targets) > 3 + AHEAD and (shared.mean, shared.std) == (alone.mean, alone.std)


def test_what_an_epoch_shows_does_not_depend_on_the_workers_nor_on_where_it_begins(folder):
    alone = list(loader_of(folder).batches(5))
    assert len(alone) == len(loader_of(folder)) == 4 and alone[0].images.shape == (4, 3, 32, 32)
    assert torch.equal(torch.cat([batch.index for batch in alone]).sort().values, torch.arange(14))
    assert same(alone, list(loader_of(folder, workers=2).batches(5)))
    assert same(alone[2:], list(loader_of(folder, workers=1).batches(5, 2)))
    assert not same(alone, list(loader_of(folder).batches(6)))
    state = torch.get_rng_state()
    list(loader_of(folder).batches(5))
    assert torch.equal(state, torch.get_rng_state()), "the training's own random numbers are left alone"


def test_an_image_keeps_its_crop_whatever_else_is_read(folder):
    batches = list(loader_of(folder).batches(0))
    whole = {int(i): image for batch in batches for i, image in zip(batch.index, batch.images, strict=True)}
    part = loader_of(folder, subset=torch.tensor([1, 2, 9]))
    (batch,) = part.batches(0)
    for sample, image in zip(batch.index, batch.images, strict=True):
        assert torch.equal(whole[int(sample)], image)
    path, crops = folder / "train/cat/3.JPEG", RandomCrops(32, 0, 0, 2, (0.08, 1.0))
    first, second = read(path, crops, 5)
    for other in (second, *read(path, crops, 6), *read(path, crops._replace(epoch=1), 5)):
        assert first.shape == other.shape == (3, 32, 32) and not torch.equal(first, other)
    (other,) = loader_of(folder, subset=torch.tensor([1, 2, 9])).batches(1)
    assert not torch.equal(batch.images[batch.index == 2], other.images[other.index == 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_transparency_is_laid_on_one_colour_in_training_and_in_tests(tmp_path, workers):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGBA", (50, 40), (255, 255, 255, 0)).save(tmp_path / split / name / "a.png")
    data = load_data("imagenet", str(tmp_path), 32, workers, background=(10, 200, 30))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    for images, augmentation in ((data.train, data.augmentation), (data.test, None)):
        (batch,) = Loader(images, data, 2, CPU, augmentation).batches()
        pixels = ((batch.images * std + mean) * 255).round()
        assert torch.equal(pixels, torch.tensor([10.0, 200.0, 30.0]).view(3, 1, 1).expand_as(pixels))


def test_targets_are_the_folders_and_the_index_is_the_samples(folder):
    data = load_data("imagenet", str(folder), 32, 0)
    assert data.classes == ["cat", "dog"] and data.image_size == 32
    for batch in loader_of(folder).batches(0):
        assert torch.equal(batch.targets, (batch.index >= 7).long())


def test_the_test_crop_is_the_middle_of_the_resized_image(folder):
    (batch, *_) = loader_of(folder, split="test").batches()
    data = load_data("imagenet", str(folder), 32, 0)
    with Image.open(folder / "val/cat/2.JPEG") as original:
        width, height = original.size
        side = 32 + 2 * 2
        small = original.resize((int(width * side / height), side), Image.BILINEAR)
    left, top = round((small.width - 32) / 2), round((side - 32) / 2)
    expected = torch.from_numpy(numpy.array(small)).permute(2, 0, 1)[:, top : top + 32, left : left + 32]
    ours = fit(folder / "val/cat/2.JPEG", 32, 2)
    assert (ours.float() - expected.float()).abs().max() <= 3
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    assert torch.allclose(batch.images[2], (ours / 255 - mean) / std, atol=1e-5)
    assert load_data("imagenet", str(folder), 224, 0).margin == -16, "224 pixels from the middle of 256"
    record = {"image_size": 32, "mean": data.mean, "std": data.std, "margin": data.margin}
    alone = read_normalised(folder / "val/cat/2.JPEG", record)
    assert torch.allclose(alone, batch.images[2], atol=1e-5), "a shipped network is shown the same"


def test_images_may_be_kept_apart(folder):
    data = load_data("imagenet", str(folder), 32, 0)
    left, apart = hold_out(data.train, 4, data.classes)
    assert (len(left.targets), apart.targets.tolist()) == (10, [0, 0, 1, 1])
    names = [split.name_of(k) for split in (left, apart) for k in range(len(split.targets))]
    assert sorted(names) == sorted(data.train.name_of(k) for k in range(14))
    (batch,) = Loader(apart, data, 9, CPU).batches()
    expected = fit(apart.name_of(2), 32, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    assert torch.allclose(batch.images[2], (expected / 255 - mean) / std, atol=1e-5)


def test_processes_share_an_epoch_without_gaps_or_doubles(folder):
    whole = list(loader_of(folder).batches(2))
    parts = [list(loader_of(folder, rank=rank, world_size=3).batches(2)) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1
    for number, batches in enumerate(zip(*parts, strict=True)):
        assert torch.equal(torch.cat([batch.index for batch in batches]), whole[number].index)
        assert torch.equal(torch.cat([batch.images for batch in batches]), whole[number].images)
        assert {batch.global_size for batch in batches} == {len(whole[number].index)}
    assert len(parts[0]) == 3, "two images are too few for three processes"


def test_views_have_crops_of_their_own(folder):
    (batch, *_) = loader_of(folder, views="rotations").batches(0)
    views = batch.images.unflatten(0, (4, -1))
    assert views.shape[1] == 4
    (plain, *_) = loader_of(folder).batches(0)
    assert torch.equal(views[0], plain.images)
    assert not torch.allclose(torch.rot90(views[1], -1, (2, 3)), views[0])


def test_broken_images_are_named_and_skipped_up_to_a_limit(folder, capsys):
    path = folder / "train/cat/3.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    (folder / "train/dog/0.JPEG").write_bytes(b"<html>not found</html>")
    (folder / "val/cat/1.JPEG").write_bytes(b"")
    train = loader_of(folder, workers=1)
    batches = list(train.batches(0))
    assert [len(batch.index) for batch in batches] == [4, 4, 4, 2], "batches keep their sizes"
    assert all(torch.equal(batch.targets, (batch.index >= 7).long()) for batch in batches)
    shown = torch.cat([batch.index for batch in batches])
    assert not {3, 7} & set(shown.tolist()) and len(set(shown.tolist())) == 12
    list(train.batches(1))
    printed = capsys.readouterr().out
    assert printed.count("cat/3.JPEG") == 1 and printed.count("dog/0.JPEG") == 1
    tested = torch.cat([batch.index for batch in loader_of(folder, split="test").batches()])
    assert tested.tolist() == [0, *range(2, 10)]
    (path := folder / "val/dog/4.JPEG").write_bytes(b"")
    sizes = [len(batch.images) for batch in loader_of(folder, split="test", batch_size=3).batches()]
    assert sizes == [2, 3, 3, 0], f"nothing is left of the last batch without {path}"
    with pytest.raises(UserError, match=r"--max_broken") as caught:
        list(loader_of(folder, max_broken=1).batches(0))
    assert ".JPEG" in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_without_a_whole_image_names_its_images_their_reasons_and_the_way_out(folder):
    for path in (folder / "train").glob("*/*"):
        path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"^--data: a batch of 4 images has none .*\.JPEG \(.*\); repair or remove"):
        list(loader_of(folder, max_broken=99).batches(0))


def test_a_split_without_a_whole_image_is_one_line(folder):
    for path in (folder / "val").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="--data: testing: no readable image"):
        evaluate(lambda images: images.flatten(1), loader_of(folder, split="test"))


def test_the_next_whole_image_of_a_batch_takes_a_broken_ones_place():
    assert fill_gaps(4, [0, 2, 3]) == [0, 2, 2, 3]
    assert fill_gaps(4, [0, 1, 2]) == [0, 1, 2, 0], "after the last comes the first"


def test_a_folder_that_does_not_fit_into_memory_is_read_as_it_goes(folder, monkeypatch, capsys):
    inside = load_data("folder", str(folder), 32, 0)
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 10_000)
    monkeypatch.setattr(sources, "BATCH", 3)
    outside = load_data("folder", str(folder), 32, 0)
    assert "streamed from the disk" in capsys.readouterr().out
    assert outside.augmentation == inside.augmentation == Augmentation()
    assert numpy.allclose(inside.mean, outside.mean, atol=0.01) and numpy.allclose(inside.std, outside.std, atol=0.01)
    kwargs = {"batch_size": 4, "device": CPU, "augmentation": inside.augmentation, "seed": 1}
    pairs = zip(
        Loader(inside.train, inside, **kwargs).batches(3),
        Loader(outside.train, inside, **kwargs).batches(3),
        strict=True,
    )
    for a, b in pairs:
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.images, b.images), "one reader makes the same bytes"


def run_of(save_dir, known=()):
    return next(path for path in save_dir.iterdir() if path not in known)


def test_a_student_is_trained_and_goes_on_within_an_epoch(folder, save_dir, tmp_path):
    train_teacher.main(
        [
            "--dataset",
            "imagenet",
            "--data",
            str(folder),
            "--image_size",
            "32",
            "--model",
            "resnet14",
            "--batch_size",
            "4",
        ]
        + ["--epochs", "1", "--max_steps", "1", "--save_dir", str(tmp_path / "t"), "--num_workers", "0"]
    )
    teacher = run_of(tmp_path / "t") / "last.pth"
    flags = ["--path_t", str(teacher), "--model_s", "resnet8", "--batch_size", "4", "--epochs", "2", "-s", "2"]
    flags += ["--allow_teacher_gap", "--num_workers", "1"]
    train_imagenet_student.main([*flags, "--save_dir", str(save_dir)])
    whole = run_of(save_dir)
    config = json.loads((whole / "config.json").read_text())
    assert (config["dataset"], config["image_size"], config["beta1"]) == ("imagenet", 32, "imagenet")
    assert (config["weight_decay"], config["lr_decay"], config["learning_rate"]) == (1e-4, "cos", 0.1)
    assert config["data"] == str(folder)
    train_imagenet_student.main([*flags, "--max_steps", "2", "--save_dir", str(tmp_path / "s")])
    cut = run_of(tmp_path / "s")
    assert os.path.exists(cut / "last.pth")


def test_what_is_missing_is_said_in_one_line(tmp_path, folder, save_dir):
    flags = ["--model_s", "resnet18", "--distill", "ce", "--save_dir", str(save_dir)]
    assert "--data" in message_of(train_imagenet_student.main, flags)
    assert "there is no folder" in message_of(train_imagenet_student.main, [*flags, "--data", str(tmp_path / "no")])

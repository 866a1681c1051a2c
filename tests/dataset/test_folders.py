"""Folders of images as people have them: what is read, what is left out and said, what is refused and why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from dataset import data_changes, data_digest, data_identity, dataset_at, load_data, sources
from dataset.folders import is_image_folder
from dataset.memory import free_memory
from dataset.streaming import StreamedImages
from errors import UserError
from tests.dataset.image_folders import load, refusal

ROOT = Path(__file__).resolve().parents[2]


def test_one_class_is_no_task(folder):
    shutil.rmtree(folder / "train" / "cat")
    assert "train has one class folder, dog" in refusal(folder) and "level" in refusal(folder)


def test_hidden_names_are_no_classes_and_no_images(folder):
    before = data_digest(load(folder))
    (folder / "train/.ipynb_checkpoints").mkdir()
    shutil.copy(folder / "train/cat/0.JPEG", folder / "train/cat/._0.JPEG")
    assert data_digest(load(folder)) == before


def test_a_class_without_test_images_keeps_its_number(folder, capsys):
    shutil.rmtree(folder / "val" / "cat")
    data = load(folder)
    assert data.classes == ["cat", "dog"] and data.test.targets.tolist() == [1] * 5
    assert "has no images of 1 class: cat" in capsys.readouterr().out


def test_statistics_of_some_of_the_streamed_images_are_said_to_be(folder, capsys, monkeypatch):
    load(folder, stream=True)
    assert "standard deviation" not in capsys.readouterr().out, "of all"
    monkeypatch.setattr(sources, "STATISTICS_IMAGES", 7)
    load(folder, stream=True)
    assert "mean and standard deviation are those of 7 of its 14 training images" in capsys.readouterr().out


def test_endings_are_read_in_any_case_and_others_counted(folder, capsys):
    for number, name in enumerate(("a.JFIF", "b.Jpg", "c.WebP", "d.GIF", "e.avif")):
        Image.new("RGB", (32, 32)).save(folder / "train" / "cat" / name.lower())
        (folder / "train" / "cat" / name.lower()).rename(folder / "train" / "cat" / name)
        assert len(load(folder).train.targets) == 15 + number
    (folder / "train/cat/notes.txt").write_text("no image")
    (folder / "train/dog/Thumbs.db").write_text("no image")
    capsys.readouterr()
    load(folder)
    assert "left out 2 files" in (said := capsys.readouterr().out) and "notes.txt, Thumbs.db" in said


def test_test_images_in_one_folder_are_explained_or_read_by_their_table(folder):
    for number, path in enumerate(sorted((folder / "val").glob("*/*"))):
        path.rename(folder / "val" / f"{number}.JPEG")
    for name in ("cat", "dog"):
        (folder / "val" / name).rmdir()
    assert "without class folders" in refusal(folder) and "--split" in refusal(folder)
    assert len(load(folder, split=0.3).test.targets) == 4
    (folder / "val/images").mkdir()
    lines = []
    for number in range(10):
        (folder / "val" / f"{number}.JPEG").rename(folder / "val/images" / f"{number}.JPEG")
        lines.append(f"{number}.JPEG\t{'dog' if number % 2 else 'cat'}\t0\t0\t9\t9\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    assert load(folder).test.targets.tolist() == [0, 1] * 5
    (folder / "val/val_annotations.txt").write_text("0.JPEG\tnewt\n")
    assert "line without a class of train/" in refusal(folder)


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_names_of_the_test_split(folder, name):
    (folder / "val").rename(folder / name)
    assert len(load(folder).test.targets) == 10


def test_no_folder_is_followed_twice(folder, capsys):
    (folder / "train/cat/other").symlink_to(folder / "train/dog")
    (folder / "train/dog/other").symlink_to(folder / "train/cat")
    (folder / "train/dog/loop").symlink_to(folder / "train")
    data = load(folder)
    assert data.train.targets.tolist() == [0] * 7 + [1] * 7
    assert capsys.readouterr().out.count("a link to a folder that is read already") == 2 + 2
    (folder / "train/newt").symlink_to(folder / "train/cat")
    assert "links to one folder" in refusal(folder)


def test_a_linked_class_folder_is_read(folder, tmp_path):
    (folder / "train/cat").rename(tmp_path / "elsewhere")
    (folder / "train/cat").symlink_to(tmp_path / "elsewhere")
    assert len(load(folder).train.targets) == 14


def damage(folder, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"no image")


def test_damaged_images_are_all_named_in_one_pass_and_left_out_up_to_a_limit(folder, capsys):
    names = ("train/cat/1.JPEG", "train/cat/3.JPEG", "train/dog/0.JPEG")
    damage(folder, *names)
    data = load(folder, max_broken=3)
    said = capsys.readouterr().out
    assert all(name in said for name in names) and data.train.targets.tolist() == [0] * 5 + [1] * 6
    assert not data.unreadable
    message = refusal(folder, max_broken=2)
    assert all(name in message for name in names) and "3 images" in message and "--max_broken 2" in message


@pytest.mark.parametrize("stream", [False, True])
def test_unreadable_test_images_are_known(folder, stream):
    damage(folder, "val/cat/1.JPEG", "val/dog/3.JPEG")
    data = load(folder, stream=stream)
    if stream:
        list(data.test.read(torch.arange(10).split(4)))
    unreadable = data.test.unreadable if stream else data.unreadable
    assert sorted(Path(name).name for name in unreadable) == ["1.JPEG", "3.JPEG"]
    damage(folder, *(f"val/cat/{number}.JPEG" for number in range(5)))
    if not stream:
        assert "nor any other image of class cat" in refusal(folder)


def test_a_split_is_stratified_and_the_same_each_time(folder):
    shutil.rmtree(folder / "val")
    assert "--split 0.2" in refusal(folder)
    data, again = load(folder, split=0.3), load(folder, split=0.3, stream=True)
    assert data.split == 4 and data.test.targets.tolist() == [0, 0, 1, 1] and len(data.train.targets) == 10
    assert torch.equal(again.test.pixels()[0], data.test.pixels)
    assert len(load(folder, holdout=2).test.targets) == 2
    assert len(load(folder / "train", split=0.3).test.targets) == 4
    assert "neither train/ nor val/" in refusal(folder / "train")
    assert "--split: 0 of 14 images leave class cat, which has 7 images" in refusal(folder, split=0.01)


def test_a_split_where_there_is_one_is_refused(folder):
    assert "--split" in refusal(folder, split=0.2)
    assert len(load(folder, holdout=2).train.targets) == 14, "the run holds them out itself"


def test_a_path_may_begin_at_home_and_is_absolute_on_record(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load("~/data").train.targets) == 14
    monkeypatch.chdir(folder.parent)
    assert load("data", stream=True).train.source.root == str(folder / "train")


def test_what_is_a_folder_of_images(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert is_image_folder(str(folder)) and is_image_folder(str(folder / "train")) and is_image_folder("~/data")
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    assert not is_image_folder(str(tmp_path / "empty")) and not is_image_folder(str(tmp_path / "no"))


def test_a_folder_says_what_data_set_it_is_or_why_it_is_none(folder, tmp_path):
    for known in (None, "digits", "cifar100", "folder"):
        assert dataset_at(str(folder), known) == "folder", known
    assert dataset_at(str(folder), "imagenet") == "imagenet"
    assert dataset_at(str(tmp_path), "cifar10") == "cifar10" and dataset_at(str(tmp_path / "no"), None) is None
    (tmp_path / "shards").mkdir()
    for split in ("train", "val"):
        (tmp_path / "shards" / f"{split}-0.tar").touch()
    for place, known, said in (
        ("no", "digits", "there is no folder"),
        ("shards", "digits", "add --dataset imagenet"),
        ("data/train/cat", "digits", "holds images without class folders"),
        ("data/train", "cifar100", "--dataset folder, or --dataset cifar100"),
    ):
        with pytest.raises(UserError, match=f"--data: .*{said}"):
            dataset_at(str(tmp_path / place), known)
    with pytest.raises(UserError, match="--dataset digits is embedded"):
        load_data("digits", str(folder))


def test_a_folder_on_record_that_is_gone_is_blamed_on_the_record(folder):
    shutil.rmtree(folder)
    for name in ("folder", "imagenet"):
        with pytest.raises(UserError) as caught:
            load_data(name, str(folder), 32, 0, may_download=False)
        message = f"the data folder on record: there is no folder {folder}; name another with --data"
        assert str(caught.value) == message
    assert refusal(folder) == f"--data: there is no folder {folder}"


@pytest.mark.slow
def test_a_name_that_is_not_utf8_ends_nothing(folder):
    shutil.copy(folder / "train/cat/0.JPEG", os.fsencode(folder / "train/cat") + b"/bad\xff.jpg")
    with open(os.fsencode(folder / "train/cat") + b"/broken\xff.jpg", "wb") as file:
        file.write(b"no image")
    assert len(load(folder).train.targets) == 15
    code = "from dataset import load_data; from errors import run_script; "
    code += f"run_script(lambda: print('\\udcff', load_data('folder', {str(folder)!r}, 32, 1).train.targets.shape))"
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "broken\\udcff.jpg" in done.stdout and "[15]" in done.stdout, done


def test_memory_is_looked_at_before_a_folder_is_held_there(folder, monkeypatch):
    assert 0 < free_memory() < 2**50
    size = 24 * 3 * 32**2
    monkeypatch.setattr(sources, "free_memory", lambda: 2 * size)
    assert not isinstance(load(folder).train, StreamedImages)
    assert isinstance(load(folder, device_memory=size).train, StreamedImages)
    assert isinstance(load(folder, stream=True).train, StreamedImages)
    monkeypatch.setattr(sources, "free_memory", lambda: size)
    assert isinstance(load(folder).train, StreamedImages)
    assert not isinstance(load(folder, stream=False).train, StreamedImages)


def test_a_recorded_normalisation_is_used_and_none_computed(folder, monkeypatch):
    monkeypatch.setattr(sources, "channel_statistics", lambda pixels: pytest.fail("it is computed"))
    for stream in (False, True):
        data = load(folder, stream=stream, normalisation=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
        assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    monkeypatch.undo()
    digits = load_data("digits", normalisation=((0.5,) * 3, (0.25,) * 3))
    assert digits.std == (0.25,) * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_change_of_the_data_is_noticed(folder, stream, tmp_path):
    def now(path=folder, stream=stream):
        return data_identity(load(path, stream=stream))

    first, held_otherwise = now(), now(stream=not stream)
    assert first["digest"] != held_otherwise["digest"] and not data_changes(first, held_otherwise)
    shutil.copytree(folder, tmp_path / "moved")
    assert not data_changes(first, now()) and not data_changes(first, now(tmp_path / "moved"))
    assert not data_changes({}, first), "records of older versions say nothing"
    Image.fromarray(numpy.zeros((32, 32, 3), numpy.uint8)).save(folder / "train/cat/0.JPEG")
    for changed in (now(), now(stream=not stream)):
        assert data_changes(first, changed) == ["its images (other names, sizes or pixels)"]
    (folder / "val/cat/0.JPEG").unlink()
    assert data_changes(first, now()) == ["the number of its test images (10 -> 9)"]
    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / "zebra")
    assert "gone: cat; new: zebra" in data_changes(first, now())[0]

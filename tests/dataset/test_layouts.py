"""Layouts of image folders as people have them: names in any case, archives, tables, folders within folders."""

import shutil

import pytest

from dataset import dataset_at, load_data
from dataset.folders import is_image_folder
from errors import UserError
from scripts.predict import find_images
from tests.dataset.image_folders import load, refusal


def rename(folder, train: str, test: str):
    for old, new in (("train", train), ("val", test)):
        (folder / old).rename(folder / f"{old}-")
        (folder / f"{old}-").rename(folder / new)
    return folder


@pytest.mark.parametrize("names", [("TRAIN", "VAL"), ("Train", "Test"), ("Training", "Testing"), ("train", "Valid")])
@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_splits_are_known_in_any_case(folder, names, name):
    """With --split too they would be classes otherwise."""
    data = load_data(name, str(rename(folder, *names)), 32, 0)
    assert data.classes == ["cat", "dog"] and (len(data.train.targets), len(data.test.targets)) == (14, 10)
    assert is_image_folder(str(folder)) and dataset_at(str(folder), "cifar100") == "folder"
    with pytest.raises(UserError, match=r"--split: .* has test images already"):
        load(folder, split=0.2)


def test_exact_names_come_first_and_a_split_that_is_not_read_is_named(folder, capsys):
    for name in ("Train", "test"):
        shutil.copytree(folder / "train" / "cat", folder / name / "bird")
    assert load(folder).classes == ["cat", "dog"]
    assert f"left out {folder}/test: the test images are those in {folder}/val" in capsys.readouterr().out


def test_sub_folders_of_classes_are_said_to_be_no_classes(folder, capsys):
    (folder / "train" / "cat" / "black").mkdir()
    first = min((folder / "train" / "cat").glob("*.*"))
    first.rename(first.parent / "black" / first.name)
    data = load(folder)
    assert data.classes == ["cat", "dog"] and len(data.train.targets) == 14
    assert "images in sub-folders are of the class of the class folder: cat/black" in capsys.readouterr().out


def test_what_systems_put_into_folders_is_passed_over(folder):
    for name in ("__MACOSX", "@eaDir"):
        shutil.copytree(folder / "train" / "cat", folder / "train" / name)
        shutil.copytree(folder / "train" / "cat", folder / "train" / "dog" / name)
    data = load(folder)
    assert data.classes == ["cat", "dog"] and len(data.train.targets) == 14
    assert not any("__MACOSX" in name for name in find_images([str(folder)]))


@pytest.mark.parametrize("name", ["data.zip", "data.tar.gz", "labels.csv"])
def test_a_file_is_no_folder(folder, name):
    path = folder.parent / name
    path.write_bytes(b"x")
    hint = "is a file; name the folder" if name == "labels.csv" else "is a file; unpack it, and name the folder"
    assert hint in refusal(path) and hint in refusal(path, labelled=False)
    with pytest.raises(UserError, match=hint):
        dataset_at(str(path), "digits")


def test_images_without_class_folders_and_a_table_are_explained(folder, monkeypatch):
    flat = folder.parent / "flat"
    shutil.copytree(folder / "train" / "cat", flat / "train")
    assert "flat/train holds images without class folders" in refusal(flat) and "table" not in refusal(flat)
    (flat / "labels.csv").write_text("file,label\n")
    said = "labels.csv is not read; docs/data.md says how to sort images by a table"
    assert said in refusal(flat) and said in refusal(flat, split=0.2)
    (flat / "train").rename(flat / "images")
    assert "one class folder, images" in refusal(flat) and said in refusal(flat)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError, match="holds images without class folders"):
        dataset_at("flat/images", "digits")


def test_a_level_too_high_or_too_low_is_named(folder):
    above, split = folder.parent, folder / "train"
    (above / "other").mkdir()
    for options in ({}, {"split": 0.2}):
        assert f"{above} has no train/, but {folder} has; name that one" in refusal(above, **options)
    assert f"name {folder}, which has both, or split it with --split 0.2" in refusal(split)
    assert load(split, split=0.2).classes == ["cat", "dog"], "as it was asked for"
    shutil.rmtree(split)
    for options in ({}, {"split": 0.2}):
        assert f"there is no folder {split}" in refusal(folder, **options), "val is no class"


def test_classes_above_splits_are_explained(folder):
    """CLASS/train/IMAGE: that folder of a class is no data set."""
    above = folder.parent / "classes"
    for name in ("cat", "dog"):
        shutil.copytree(folder / "train" / name, above / name / "train")
    said = f"{above} has no train/, but {above}/cat has; sort {above}/cat/train into train/cat"
    assert said in refusal(above) and said in refusal(above, split=0.2)


def test_a_folder_of_test_images_alone_is_judged_by_the_names_of_its_classes(folder, capsys):
    """In the order of the network, with the classes of which there are no images."""
    places = ("bird", "cat", "dog")
    for path in (folder / "val", folder):
        shutil.rmtree(folder / "train", ignore_errors=True)
        data = load(path, stream=True, judges=places)
        assert data.classes == list(places) and data.test.targets.tolist() == [1] * 5 + [2] * 5
        out = capsys.readouterr().out
        assert f"{path} has no train/: the images in {folder}/val are test images" in out and "of 1 class: bird" in out
    assert load(folder, stream=True, judges=("dog", "bird")).classes == ["cat", "dog"], "who judges refuses these"
    assert load(folder, stream=True, judges=()).classes == ["cat", "dog"]
    assert "there is no folder" in refusal(folder) and "--split 0.2" in refusal(folder / "val"), "to train"
    assert len(load(folder / "val", stream=True, split=0.2, judges=places).test.targets) == 2, "as it was asked for"

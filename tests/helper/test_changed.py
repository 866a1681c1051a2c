"""What has changed between a stop and --resume is noticed: images, classes, the teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train_cifar_student
import train_teacher
from helper.configuration import row_key
from tests.conftest import message_of
from tests.drawn import write_images

SHORT = ("--image_size", "8", "--batch_size", "4", "--max_steps", "1", "--epochs", "1")
MORE = ("--max_steps", "3", "--epochs", "2")


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder of images and the run of a network on it."""
    write_images(tmp_path / "images", images=4)
    train_teacher.main(["--model", "resnet8", "--data", str(tmp_path / "images"), *SHORT, "--save_dir", str(tmp_path)])
    return tmp_path


def run_of(place: Path) -> Path:
    return next(path for path in place.iterdir() if path.name.startswith("folder_ce"))


def test_a_folder_of_images_is_the_data_set_folder(place, capsys):
    assert json.loads((run_of(place) / "config.json").read_text())["dataset"] == "folder"
    message = message_of(train_teacher.main, ["--model", "resnet8", "--data", str(run_of(place))])
    assert message.startswith(f"--data: {run_of(place)} is no folder of images")
    argv = ["--model", "resnet8", "--data", str(place / "images"), "--dataset", "digits"]
    assert "reads no folder" in message_of(train_teacher.main, argv)


CHANGES = {
    "an image is gone": lambda images: (images / "train/cat/0.png").unlink(),
    "an image is another": lambda images: shutil.copy(images / "train/dog/1.png", images / "train/cat/0.png"),
    "a class has another name": lambda images: [
        (images / s / "cat").rename(images / s / "eel") for s in ("train", "val")
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_are_refused_unless_accepted(place, change):
    CHANGES[change](place / "images")
    message = message_of(train_teacher.main, ["--resume", str(run_of(place)), *MORE])
    assert "the data have changed" in message and "--accept_changes" in message
    train_teacher.main(["--resume", str(run_of(place)), *MORE, "--accept_changes"])
    assert json.loads((run_of(place) / "config.json").read_text())["accept_changes"] is True


def test_a_moved_folder_is_the_same_data(place):
    (place / "images").rename(place / "moved")
    train_teacher.main(["--resume", str(run_of(place)), *MORE, "--data", str(place / "moved")])


def test_images_that_were_in_memory_may_be_streamed_and_the_other_way_round(place):
    """With --stream auto the free memory decides it, which may be another when a run is resumed."""
    before = json.loads((run_of(place) / "config.json").read_text())
    streamed = ("--stream", "on", "--num_workers", "0")
    train_teacher.main(["--resume", str(run_of(place)), *MORE, *streamed])
    train_teacher.main(["--resume", str(run_of(place)), "--max_steps", "5", "--epochs", "3", "--stream", "off"])
    after = json.loads((run_of(place) / "config.json").read_text())
    assert after["epochs"] == 3 and after["data_digest"] == before["data_digest"], "the row of its other seeds"
    CHANGES["an image is gone"](place / "images")
    message = message_of(train_teacher.main, ["--resume", str(run_of(place)), "--epochs", "4", *streamed])
    assert "the data have changed: the number of its training images" in message


def test_a_changed_teacher_is_refused_unless_accepted(teacher_run, tmp_path):
    teacher = shutil.copytree(teacher_run, tmp_path / "teacher") / "last.pth"
    argv = ["--path_t", str(teacher), "--model_s", "resnet8", "--max_steps", "1", "--epochs", "1"]
    train_cifar_student.main([*argv, "--save_dir", str(tmp_path / "save")])
    run = next((tmp_path / "save").iterdir())
    before = row_key(json.loads((run / "config.json").read_text()))
    checkpoint = torch.load(teacher, weights_only=True)
    checkpoint["model"]["fc.bias"] += 1e-3
    torch.save(checkpoint, teacher)
    message = message_of(train_cifar_student.main, ["--resume", str(run), *MORE])
    assert "digest of the teacher's weights was" in message
    train_cifar_student.main(["--resume", str(run), *MORE, "--accept_changes", "--allow_teacher_gap"])
    after = row_key(json.loads((run / "config.json").read_text()))
    assert before["teacher_digest"] != after["teacher_digest"]

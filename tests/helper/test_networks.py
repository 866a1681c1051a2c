"""Networks from files: teachers, held to what is on record of them."""

import pytest
import torch

import train_cifar_student
from errors import UserError
from helper.networks import read_teacher
from helper.teacher import check_accuracy
from models import build_model
from scripts import export_student
from tests.conftest import message_of
from tests.run_folders import load

SHORT = ("--batch_size", "8", "--max_steps", "3")
pytestmark = pytest.mark.usefixtures("few_images")


def test_a_teacher_whose_accuracy_is_off_stops_the_run(teacher_run, save_dir, tmp_path, capsys):
    checkpoint = load(teacher_run / "last.pth")
    checkpoint["record"]["accuracy"] += 1.0
    off = tmp_path / "off.pth"
    torch.save(checkpoint, off)
    argv = ["--model_s", "resnet8", "--path_t", str(off), "--save_dir", str(save_dir), *SHORT]
    message = message_of(train_cifar_student.main, argv)
    assert "1.00 points off" in message and "--allow_teacher_gap" in message
    assert not save_dir.exists(), "a refused run leaves no folder"
    train_cifar_student.main([*argv, "--allow_teacher_gap"])
    checkpoint["record"]["accuracy"] -= 0.6
    torch.save(checkpoint, off)
    train_cifar_student.main(argv)
    assert "on record" in capsys.readouterr().out


def test_a_published_teacher_is_held_to_its_published_accuracy(tmp_path):
    folder = tmp_path / "resnet56_vanilla"
    folder.mkdir()
    path = folder / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": build_model("resnet56", 100).state_dict(), "accuracy": torch.tensor(70.0)}, path)
    teacher = read_teacher(str(path), None)  # the name comes from RepDistiller's folder
    assert (teacher.name, teacher.num_classes, teacher.dataset) == ("resnet56", 100, "cifar100")
    assert "72.34" in check_accuracy(teacher, "cifar100", 72.5, False)
    with pytest.raises(UserError, match=r"2\.34 points off"):
        check_accuracy(teacher, "cifar100", 70.0, False)
    assert "no accuracy recorded" in check_accuracy(teacher, "digits", 3.0, False)


def test_a_head_that_does_not_fit_the_data_teaches_by_its_maps_alone(tmp_path, save_dir, capsys):
    path = tmp_path / "teacher.pth"
    torch.save({"model": build_model("resnet14", 7).state_dict()}, path)
    argv = ["--model_s", "resnet8", "--path_t", str(path), "--model_t", "resnet14", "--save_dir", str(save_dir), *SHORT]
    for logits in (["--distill", "kd"], ["--distill", "norm", "-a", "1"]):
        message = message_of(train_cifar_student.main, [*argv, *logits])
        assert "7 classes" in message and "10" in message
    assert not save_dir.exists() or not list(save_dir.iterdir())
    train_cifar_student.main([*argv, "--distill", "norm"])
    assert "its 7 classes are not those of the data; its maps alone teach" in capsys.readouterr().out


def test_an_exported_student_and_a_distilled_run_can_teach(distil, save_dir):
    run = distil(*SHORT)
    exported = export_student.main([str(run / "last.pth")])
    argv = ["--distill", "kd", "--model_s", "resnet8", "--save_dir", str(save_dir), *SHORT]
    results = [train_cifar_student.main([*argv, "--path_t", str(path)]) for path in (run / "last.pth", exported)]
    assert [result["teacher_accuracy"] for (result,) in results] == [load(run / "last.pth")["record"]["accuracy"]] * 2


def test_a_teacher_of_ones_own_is_held_to_its_own_record(tmp_path):
    path = tmp_path / "resnet56_trial_3" / "last.pth"
    path.parent.mkdir()
    weights = {f"_orig_mod.{key}": value for key, value in build_model("resnet56", 100).state_dict().items()}
    torch.save({"model": weights, "accuracy": 70.0}, path)
    assert read_teacher(str(path), "resnet56").accuracy == 70.0

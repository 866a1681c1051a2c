"""Teachers of other libraries: they see the images as their weights were trained, with other classes or none."""

import json

import pytest
import torch

import train_cifar_student
import train_teacher
from dataset import Augmentation, ImageData, Images
from helper import networks
from helper.configuration import row_key
from helper.networks import Network
from helper.tables.records import read_record
from helper.teacher import as_it_was_trained
from models import build_model
from scripts import evaluate, export_student
from tests.conftest import message_of
from tests.drawn import write_images
from tests.run_folders import metrics, new_run

pytest.importorskip("timm")
IMAGES = {"known": ("cat", "dog"), "others": ("bus", "car")}
SHORT = ("--model_s", "resnet8", "--dataset", "digits", "--batch_size", "8", "--max_steps", "1", "--epochs", "1")


@pytest.fixture
def distil_from(monkeypatch, save_dir):
    """Distil on the digits from timm's network of a name, with random weights in place of a download."""

    def call(name: str, *flags: str, classes: int = 1000, size: int = 64):
        def read(_):
            torch.manual_seed(0)
            return build_model(f"timm:{name}", classes, size), {"dataset": "imagenet"}

        monkeypatch.setattr(networks, "read_timm", read)
        argv = ["--path_t", f"timm:{name}", "--teacher_image_size", str(size), "--save_dir", str(save_dir)]
        train_cifar_student.main([*SHORT, *argv, *flags])
        return max(save_dir.iterdir(), key=lambda path: path.stat().st_mtime)

    return call


def test_a_transformer_teaches_by_its_maps_at_its_own_size(distil_from, capsys):
    run = distil_from("vit_tiny_patch16_224", "--distill", "norm", size=128)
    printed = capsys.readouterr().out
    assert "the teacher sees 128x128, with its own mean and std" in printed
    assert "its 1000 classes are not those of the data; its maps alone teach" in printed
    config = json.loads((run / "config.json").read_text())
    assert config["teacher_image_size"] == 128 and metrics(run)[0]["loss_norm"] > 0
    export_student.main([str(run / "last.pth")])
    assert "same class on 73 of 73" in capsys.readouterr().out


def test_an_encoder_without_classes_teaches(distil_from):
    assert metrics(distil_from("resnet10t", "--distill", "attention", classes=0))[0]["loss_attention"] > 0


def test_logits_of_other_classes_are_refused_or_read_at_some_of_them(distil_from, save_dir):
    message = message_of(lambda argv: distil_from("resnet10t", *argv), ["--distill", "kd"])
    assert "the teacher has 1000 classes, the data 10" in message and not save_dir.exists()
    run = distil_from("resnet10t", "--distill", "kd", "--teacher_classes", "0,1,2,3,4,5,6,7,8,999")
    assert metrics(run)[0]["loss_kd"] > 0
    message = message_of(lambda argv: distil_from("resnet10t", *argv), ["--teacher_classes", "0,1000"])
    assert "the teacher has no class 1000" in message


@pytest.mark.slow
def test_the_classes_of_a_file_are_recorded_and_the_file_is_no_longer_needed(distil_from, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, range(10))))
    run = distil_from("resnet10t", "--distill", "kd", "--teacher_classes", "names.txt")
    assert json.loads((run / "config.json").read_text())["teacher_classes"] == "0,1,2,3,4,5,6,7,8,9"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train_cifar_student.main(["--resume", str(run), "--max_steps", "2"])
    train_cifar_student.main(["--resume", str(run), "--teacher_classes", str(names), "--max_steps", "3"])
    names.write_text("\n".join(map(str, range(1, 11))))
    argv = ["--resume", str(run), "--teacher_classes", str(names)]
    assert "teacher_classes 0,1,2" in message_of(train_cifar_student.main, argv)


@pytest.mark.slow
def test_classes_that_match_by_position_alone_are_said_wherever_weights_meet_data(tmp_path, capsys):
    """Of a teacher, of initial weights, and of what is judged."""
    known, others = (write_images(tmp_path / name, classes) for name, classes in IMAGES.items())
    step = ["--image_size", "8", "--max_steps", "1", "--save_dir", str(tmp_path / "save")]
    train_teacher.main(["--model", "resnet8", "--data", str(known), *step])
    weights = str(next((tmp_path / "save").iterdir()) / "last.pth")
    assert "by position" not in capsys.readouterr().out
    line = "0 of the data's 2 class names are the weights': classes match by position (cat for bus, dog for car)"
    given = ["--path_t", weights, "--init", weights, "--model_s", "resnet8", "--data", str(others)]
    train_cifar_student.main(["--distill", "kd", "--allow_teacher_gap", *given, *step])
    printed = capsys.readouterr().out
    assert f"teacher resnet8: {line}" in printed and printed.count(line) == 2
    evaluate.main([weights, "--teacher", weights, "--data", str(others)])
    printed = capsys.readouterr().out
    assert f"note: {line}" in printed and f"note: teacher: {line}" in printed


@pytest.mark.parametrize("names", [["a", "b"], ["a, an a", "b"], ["a; or, an a", "b"]])
def test_names_of_classes_are_recorded_as_they_are_read_again(names, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names))
    once = networks.with_class_names({"teacher_classes": str(path)})
    assert networks.with_class_names(once) == once and once["teacher_classes"] != str(path)
    source = Network("", "resnet8", build_model("resnet8", 2), 2, record={"classes": ["b", *names[:1]]})
    assert networks.read_at_classes(source, once["teacher_classes"]).record["classes"] == names


def test_a_file_that_does_not_say_its_normalisation_is_given_one_or_it_is_said(tmp_path, save_dir, capsys):
    torch.manual_seed(0)
    torch.save(build_model("resnet8", 10).state_dict(), path := tmp_path / "other.pth")
    flags = ["--distill", "kd", "--path_t", str(path), "--model_t", "resnet8", *SHORT]
    run = new_run(train_cifar_student.main, save_dir, *flags, "--trial", "1")
    out = capsys.readouterr().out
    assert f"{path} does not say its mean and std, so images have those of the data; --teacher_normalisation" in out
    given = ("--teacher_normalisation", "0.5,0.5,0.5,0.25,0.25,1")
    other = new_run(train_cifar_student.main, save_dir, *flags, *given, "--trial", "2")
    out = capsys.readouterr().out
    assert "does not say" not in out and "the teacher sees 32x32, with its own mean and std" in out
    assert run and other
    configs = [json.loads((each / "config.json").read_text()) for each in (run, other)]
    assert [each["teacher_normalisation"] for each in configs] == [None, [0.5, 0.5, 0.5, 0.25, 0.25, 1.0]]
    assert row_key(read_record(run).config) != row_key(read_record(other).config)
    loaded = networks.read_teacher(str(path), "resnet8", normalisation=configs[1]["teacher_normalisation"])
    assert (loaded.record["mean"], loaded.record["std"]) == ((0.5, 0.5, 0.5), (0.25, 0.25, 1.0))
    refused = ["--distill", "kd", "--path_t", str(run / "last.pth"), *SHORT, *given]
    assert "last.pth says its own mean and std; leave it out" in message_of(train_cifar_student.main, refused)
    wrong = [*flags, "--teacher_normalisation", "0.5,0.5,0.5,0.25,0.25,0"]
    assert "must be imagenet, or three means" in message_of(train_cifar_student.main, wrong)
    # RepDistiller's files are known to have the usual normalisation of their data set, which images may not have.
    known = ("x.pth", {"dataset": "cifar100"})
    assert not networks.note_of_normalisation(*known, "cifar100", "--flag")
    assert all("--flag" in networks.note_of_normalisation(*known, each, "--flag") for each in ("folder", None))
    # Whoever compares the student with it shows it the images in the same way.
    (about,) = evaluate.main([str(other), "--teacher", str(path), "--model_t", "resnet8"])
    (same,) = evaluate.main([str(run), "--teacher", str(path), "--model_t", "resnet8", *given])
    assert about["teacher"]["accuracy"] == same["teacher"]["accuracy"]
    assert "does not say its mean" not in capsys.readouterr().out
    (about,) = evaluate.main([str(run), "--teacher", str(path), "--model_t", "resnet8"])
    assert "note: teacher:" in capsys.readouterr().out and about["kl"] != same["kl"]


def test_the_view_is_the_teachers_own_normalisation_exactly():
    network = build_model("resnet8", 4).eval()
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    images = Images(pixels, torch.arange(3))
    data = ImageData("x", images, images, list("abcd"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), Augmentation())
    record = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 0.125], "image_size": 32}
    view = as_it_was_trained(Network("x.pth", "resnet8", network, 4, record=record), data, None)

    def normalise(mean, std):
        mean, std = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (mean, std))
        return ((pixels / 255 - mean) / std).float()

    with torch.no_grad():
        expected = network(normalise(record["mean"], record["std"]))
        assert torch.allclose(view.outputs(normalise(data.mean, data.std)).logits, expected, atol=1e-5)
    same = record | {"mean": list(data.mean), "std": list(data.std)}
    assert as_it_was_trained(Network("x.pth", "resnet8", network, 4, record=same), data, None) is None

"""From a checkpoint to the plain network: ours and the official NORM code's."""

import argparse
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from distiller_zoo import Predictor, Task
from distiller_zoo.feature_transform import FeatureTransform
from distiller_zoo.norm import FTBaseline
from helper.export import RecordedData
from models import build_model
from models.checkpoints import identify, load_exported, read_checkpoint, split_official_norm
from models.cost import count_parameters
from scripts import export_student
from tests.conftest import message_of
from tests.distiller_zoo.test_feature_transform import make_transform

SHORT = ("--batch_size", "256", "--max_steps", "2")


@pytest.mark.slow
def test_the_exported_file_is_the_plain_student_and_predicts_the_same(distil, capsys):
    run = distil(*SHORT)
    capsys.readouterr()
    out = export_student.main([str(run / "best.pth")])
    printed = capsys.readouterr().out
    assert out == run / "best_exported.pth"
    assert "largest difference" in printed and "same class on 73 of 73" in printed
    assert "144,730 parameters" in printed and "78,042 parameters" in printed and " ms " in printed
    network, record = load_exported(read_checkpoint(out), "file")
    assert network.state_dict().keys() == build_model("resnet8", 10).state_dict().keys()
    assert record["model_name"] == "resnet8" and record["num_classes"] == 10 and record["wrapper"] is None
    assert record["classes"] == [str(digit) for digit in range(10)] and len(record["mean"]) == 3
    assert record["accuracy"] == read_checkpoint(run / "best.pth")["record"]["accuracy"]


@pytest.mark.slow
def test_a_wrn_says_plainly_that_a_convolution_is_kept(teacher_run, tmp_path, save_dir, capsys):
    import train_cifar_student
    import train_teacher

    train_teacher.main(["--model", "wrn_16_1", *SHORT, "--save_dir", str(tmp_path)])
    teacher = next(tmp_path.iterdir()) / "last.pth"
    argv = ["--model_s", "wrn_16_1", "--path_t", str(teacher), "--save_dir", str(save_dir), *SHORT]
    train_cifar_student.main(argv)
    out = export_student.main([str(next(save_dir.iterdir()) / "last.pth"), "--out", str(tmp_path / "student.pth")])
    assert "note: one 1x1 convolution is kept" in capsys.readouterr().out
    network, record = load_exported(read_checkpoint(out), "file")
    assert record["wrapper"] == {"kind": "final_conv", "channels": 64}
    assert network.final_conv.weight.shape == (
        64,
        64,
        1,
        1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("distill", ["kd", "ft", "ce"])
def test_other_methods_export_their_student(distil, distill):
    run = distil(*SHORT, distill=distill, teacher=distill == "kd")
    network, _ = load_exported(read_checkpoint(export_student.main([str(run / "last.pth")])), "file")
    assert count_parameters(network) == 78_042


def official_checkpoint(name: str, layers: tuple[str, str], extra: dict, residual: bool = True):
    """A file like the official code's, and the method that predicts what it predicts."""
    network = build_model(name, 10)
    channels = network.get_classifier().in_features
    transform = make_transform(channels, 16, 4, residual, dtype=torch.float32)
    weights = {**network.state_dict(), **extra}
    for key, value in transform.state_dict().items():
        weights[key.replace("expand", layers[0]).replace("contract", layers[1])] = value
    method = FTBaseline(network, None, Task(10, 32, 8, torch.zeros(1, dtype=torch.int64)))
    method.transform = transform
    return weights, Predictor(method).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "extra"),
    [
        ("resnet8x4", ("layer31", "layer32"), {"alpha": torch.ones(4)}),
        ("MobileNetV2_norm", ("layer41", "layer42"), {}),
        ("wrn_16_2", ("layer31", "layer32"), {"layer21.0.weight": torch.ones(8, 64, 1, 1)}),
        ("ShuffleV1", ("layer31", "layer32"), {}),
    ],
)
def test_an_official_student_loads_and_folds(name, layers, extra, tmp_path, capsys):
    weights, predictor = official_checkpoint(name, layers, extra)
    path = tmp_path / "last.pth"
    # What the official code stores: an argparse Namespace and a numpy scalar next to the weights.
    content = {"opt": argparse.Namespace(model_s=name), "model": weights, "best_acc": numpy.float64(76.4)}
    torch.save(content, path)
    out = export_student.main([str(path)])
    network, record = load_exported(read_checkpoint(out), "file")
    assert record["model_name"] == name and (record["wrapper"] is not None) == (name == "wrn_16_2")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(network(images), predictor(images), rtol=1e-3, atol=1e-4)
    out = capsys.readouterr().out
    assert "largest difference" in out and f"its images are: taken for 32x32, as usual of {name}" in out


def test_weights_of_another_librarys_network_are_taken_for_images_of_its_size(tmp_path):
    torch.save(build_model("timm:resnet10t", 10).state_dict(), tmp_path / "other.pth")
    trained = export_student.read_trained(str(tmp_path / "other.pth"), "timm:resnet10t", None)
    assert trained.record["image_size"] == 224


def test_a_plain_official_transform_is_named_by_a_flag(tmp_path):
    weights, predictor = official_checkpoint("resnet8", ("layer31", "layer32"), {}, residual=False)
    path = tmp_path / "student.pth"
    torch.save({"model": weights}, path)
    network, _ = load_exported(read_checkpoint(export_student.main([str(path), "--ft", "plain"])), "file")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(network(images), predictor(images), rtol=1e-3, atol=1e-4)


def test_splitting_leaves_a_four_stage_network_alone():
    weights = build_model("resnet18", 10).state_dict()
    network, transform = split_official_norm(weights)
    assert network.keys() == weights.keys() and transform == {}
    assert identify(network) == ["resnet18"]
    assert set(FeatureTransform(2, 2, 1).state_dict()) == {
        f"{part}.{key}"
        for part in ("expand", "contract")
        for key in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked")
    }


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("container", ["pickle", "torch"])
def test_a_file_that_would_run_code_is_refused(tmp_path, container):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"model": RunsCode(trace)}
    path.write_bytes(pickle.dumps(content)) if container == "pickle" else torch.save(content, path)
    assert "cannot be read as a checkpoint" in message_of(export_student.main, [str(path)])
    assert not trace.exists()


@pytest.mark.slow
def test_faults_are_named_and_write_nothing(distil, tmp_path):
    run = distil(*SHORT)
    checkpoint = run / "best.pth"
    whole = checkpoint.read_bytes()

    def message(*argv):
        before = sorted(tmp_path.rglob("*"))
        text = message_of(export_student.main, [str(arg) for arg in argv])
        assert sorted(tmp_path.rglob("*")) == before, "a refused export writes nothing"
        return text

    assert f"{run} is a folder; name a checkpoint file in it, for example {run}/last.pth" in message(run)
    assert "does not exist" in message(tmp_path / "none.pth")
    assert "there is no folder" in message(checkpoint, "--out", tmp_path / "none" / "student.pth")
    assert "name another file" in message(checkpoint, "--out", checkpoint)
    assert "holds resnet8, not resnet20" in message(checkpoint, "--model_s", "resnet20")
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "damaged, cut off or not one" in message(checkpoint)
    torch.save({"model": {"conv": torch.ones(3)}}, checkpoint)
    assert "fits none of the models" in message(checkpoint)
    torch.save([1, 2], checkpoint)
    assert "not a dictionary" in message(checkpoint)
    for old_or_new in ({"distiller": {}, "config": {}}, {"training": {}, "record": {}}):
        torch.save(old_or_new, checkpoint)
        assert "not a whole checkpoint" in message(checkpoint)


@pytest.mark.slow
def test_a_network_that_diverged_is_not_written(distil, monkeypatch):
    run = distil(*SHORT)
    monkeypatch.setattr(export_student, "real_images", lambda *_: torch.full((2, 3, 32, 32), math.inf))
    assert "logits on digits are not finite" in message_of(export_student.main, [str(run / "best.pth")])
    assert not Path(run / "best_exported.pth").exists()


@pytest.mark.slow
def test_a_network_that_differs_is_not_written(distil, monkeypatch):
    run = distil(*SHORT)
    monkeypatch.setattr(
        FeatureTransform, "as_affine", lambda self: (torch.eye(64).double() * 1.1, torch.zeros(64).double())
    )
    assert "differs from the trained one" in message_of(export_student.main, [str(run / "best.pth")])
    assert not Path(run / "best_exported.pth").exists()


@pytest.mark.slow
def test_it_compares_on_digits_where_the_runs_data_are_gone(distil, capsys):
    run = distil(*SHORT)
    checkpoint = torch.load(run / "best.pth", weights_only=True)
    checkpoint["record"] |= {"dataset": "folder", "data": "/nowhere"}
    torch.save(checkpoint, run / "best.pth")
    export_student.main([str(run / "best.pth")])
    printed = capsys.readouterr().out
    assert "/nowhere" in printed and "comparing on digits instead" in printed


@pytest.mark.slow
def test_a_student_of_a_wrapped_network_is_exported_without_its_teacher(tmp_path):
    """A SimKD student is as wide as its own teacher: what learned from it must know that when it is built again."""
    import train_cifar_student
    import train_teacher

    def distil(distill: str, student: str, teacher: Path) -> Path:
        argv = [
            "--distill",
            distill,
            "--model_s",
            student,
            "--path_t",
            str(teacher),
            "--save_dir",
            str(tmp_path / distill),
        ]
        train_cifar_student.main([*argv, *SHORT])
        (run,) = (tmp_path / distill).iterdir()
        return run / "last.pth"

    train_teacher.main(["--model", "wrn_16_2", *SHORT, "--save_dir", str(tmp_path / "ce")])
    (run,) = (tmp_path / "ce").iterdir()
    wide = distil("simkd", "resnet8", run / "last.pth")
    for teacher in (wide, export_student.main([str(wide)])):
        narrow = distil("srrl", "wrn_16_1", teacher)
        assert read_checkpoint(narrow)["training"]["config"]["wrapper_t"]["channels"] == 128
        network, _ = load_exported(read_checkpoint(export_student.main([str(narrow)])), "file")
        assert network.state_dict().keys() == build_model("wrn_16_1", 10).state_dict().keys()
        shutil.rmtree(narrow.parent)


def test_an_imagenet_student_takes_images_of_its_size(tmp_path):
    path = tmp_path / "official.pth"
    torch.save({"state_dict": build_model("MobileNet", 10).state_dict()}, path)
    trained = export_student.read_trained(str(path), "MobileNet", "default")
    assert trained.record["image_size"] == 224


def test_a_file_does_not_say_where_to_download_to(tmp_path):
    record = {"dataset": "cifar100", "data": str(tmp_path / "there"), "image_size": 32}
    data = [
        RecordedData.of(record),
        RecordedData.of(record, folder="here"),
        RecordedData.of(record | {"data": None}),
    ]
    assert [one.may_download for one in data] == [False, True, True]

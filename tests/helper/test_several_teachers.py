"""Several teachers by --path_t A,B: their run is recorded, resumed, shipped and told from others."""

import json

import pytest
import torch

import train_cifar_student
from helper.command_line import parse, student_parser
from helper.configuration import row_key
from helper.networks import read_teacher
from helper.settings import sources_of
from models import build_model
from scripts import compare, export_student
from tests.conftest import keep_images, killed, message_of
from tests.run_folders import assert_same_end, config_of, load

SHORT = ("--model_s", "resnet8", "--dataset", "digits", "--batch_size", "32", "--epochs", "2", "-s", "2")


@pytest.fixture
def pair(tmp_path, monkeypatch) -> list[str]:
    """Files of two untrained networks of other widths and sizes of the last map, and few images."""
    keep_images(monkeypatch, train=64, test=40)
    paths = []
    for name in ("resnet14", "vgg8"):
        torch.manual_seed(0)
        paths.append(str(tmp_path / f"{name}.pth"))
        torch.save({"model": build_model(name, 10).state_dict()}, paths[-1])
    return paths


def distil(save_dir, paths: list[str], *flags: str):
    argv = [*SHORT, "--path_t", ",".join(paths), "--save_dir", str(save_dir), *flags]
    known = set(save_dir.iterdir()) if save_dir.exists() else set()
    train_cifar_student.main(argv)
    (run,) = set(save_dir.iterdir()) - known
    return run


def test_teachers_without_an_average_have_no_accuracy_together(pair, save_dir):
    """One of them has the classes of the data: its accuracy is its own."""
    torch.save({"model": build_model("vgg8", 7).state_dict()}, pair[1])
    run = distil(save_dir, pair, "--max_steps", "1")
    assert json.loads((run / "result.json").read_text())["teacher_accuracy"] is None


@pytest.mark.slow
def test_a_run_of_two_teachers_is_recorded_resumed_exactly_and_shipped(pair, save_dir, capsys):
    flags = ("-a", "1", "--teacher_weights", "3,1")
    whole = distil(save_dir, pair, *flags)
    printed = capsys.readouterr().out
    assert whole.name == "digits_norm_resnet14+vgg8_resnet8_trial1"
    assert "2 teachers: their logits are averaged with weights 0.75, 0.25; NORM matches each in N segments" in printed
    for line in ("teacher resnet14: ", "teacher vgg8: ", "2 teachers: "):
        assert f"\n{line}" in printed
    config = config_of(whole)
    assert (config["model_t"], config["teacher_weights"]) == ("resnet14,vgg8", [0.75, 0.25])
    assert load(whole / "last.pth")["training"]["distiller"]["transform.expand.0.weight"].shape[0] == 2 * (64 + 512)
    with killed():
        distil(save_dir, pair, *flags)
    stopped = save_dir / f"{whole.name}-2"
    message = message_of(train_cifar_student.main, ["--resume", str(stopped), "--teacher_weights", "0.5,0.5"])
    assert "teacher_weights (0.75, 0.25), not (0.5, 0.5)" in message
    train_cifar_student.main(["--resume", str(stopped), "--teacher_weights", "0.75,0.25"])
    assert_same_end(whole, stopped)
    export_student.main([str(whole / "last.pth")])
    assert "same class on 73 of 73" in capsys.readouterr().out


@pytest.mark.slow
def test_list_order_and_weights_identify_the_teachers(pair, save_dir, capsys):
    def digest(paths, weights=None) -> str:
        return read_teacher(",".join(paths), None, weights=weights).digest

    digests = [digest(pair), digest(pair[::-1]), digest(pair, (0.75, 0.25)), digest(pair[:1] * 2), digest(pair[:1])]
    assert len(set(digests)) == 5 and digest(pair, (2.0, 2.0)) == digests[0]
    runs = [distil(save_dir, pair, "--max_steps", "1", *flags) for flags in ((), ("--teacher_weights", "1,3"))]
    first, second = map(config_of, runs)
    assert first["teacher_weights"] == [0.5, 0.5] and row_key(first) != row_key(second)
    compare.main(list(map(str, runs)))
    assert "teacher_weights" in capsys.readouterr().out


@pytest.mark.slow
def test_a_file_that_is_exchanged_is_noticed_when_a_run_is_resumed(pair, save_dir):
    run = distil(save_dir, pair, "--max_steps", "1")
    torch.save({"model": build_model("vgg8", 10).state_dict()}, pair[1])
    message = message_of(train_cifar_student.main, ["--resume", str(run), "--max_steps", "2"])
    assert "digest of the teacher's weights was" in message and "--accept_changes" in message


@pytest.mark.slow
def test_other_methods_and_the_fast_path_take_two_teachers(pair, save_dir):
    for flags in (("--distill", "kd"), ("--distill", "norm", "-a", "1", "--fold_teacher", "--channels_last")):
        own = SHORT[:-2] if "kd" in flags else SHORT  # without -s, which is NORM's
        argv = [*own, "--path_t", ",".join(pair), "--save_dir", str(save_dir), "--max_steps", "1", *flags]
        (result,) = train_cifar_student.main(argv)
        assert result["teacher_accuracy"] is not None


@pytest.mark.slow
def test_each_teacher_sees_its_own_size(pair, save_dir):
    run = distil(save_dir, pair, "--max_steps", "1", "--teacher_image_size", "32,64")
    assert config_of(run)["teacher_image_size"] == [32, 64]
    method, _ = export_student.rebuild(load(run / "last.pth"), "RUN")
    assert method.transform.teacher_channels == 64 + 512
    train_cifar_student.main(["--resume", str(run), "--max_steps", "2"])


@pytest.mark.slow
def test_what_does_not_fit_is_refused(pair, save_dir):
    def refused(paths, *flags):
        return message_of(lambda argv: distil(save_dir, paths, *argv), list(flags))

    assert "--path_t names one teacher" in refused(pair[:1], "--teacher_weights", "1,1")
    assert "--teacher_weights: 2 networks need 2 weights" in refused(pair, "--teacher_weights", "1,1,1")
    assert "it names 1 network, --path_t 2" in refused(pair, "--model_t", "resnet14")
    assert "3 sizes for 2 teachers" in refused(pair, "--teacher_image_size", "32,48,64")
    assert "must be a weight for each teacher" in refused(pair, "--teacher_weights", "0,0")
    assert not save_dir.exists() or not list(save_dir.iterdir())


def test_a_files_own_name_may_hold_a_comma(tmp_path, monkeypatch):
    path = tmp_path / "a,b.pth"
    path.write_bytes(b"")
    assert sources_of(str(path)) == [str(path)] and sources_of("a.pth,timm:resnet18") == ["a.pth", "timm:resnet18"]
    monkeypatch.chdir(tmp_path)
    (run,) = parse(student_parser(), ["--model_s", "resnet8", "--path_t", "a.pth,timm:resnet18"]).runs
    assert run["path_t"] == f"{tmp_path}/a.pth,timm:resnet18"

"""Runs of methods with stages, adapters and networks of their own: resumed, exported, read back."""

import json
import math

import pytest
import torch

import train_cifar_student
from errors import UserError
from helper import run
from helper.networks import read_teacher
from models import build_model
from models.backbone import FinalConv
from models.checkpoints import load_exported, read_checkpoint
from models.cost import count_parameters
from models.wrappers import ReusedClassifier, describe_wrapper
from scripts import export_student
from tests.conftest import keep_images, message_of, pair_networks, slow_but
from tests.run_folders import metrics, same_state, state, weights

TRAINED = {
    "hint": {"regressor"},
    "correlation": {"embed_s", "embed_t"},
    "vid": {"criteria"},
}


def test_the_command_line_refuses_bad_hint_layers(teacher_run, save_dir):
    argv = ["--distill", "hint", "--path_t", str(teacher_run / "last.pth"), "--model_s", "resnet8"]
    argv += ["--save_dir", str(save_dir)]
    assert "--hint_layer" in message_of(train_cifar_student.main, [*argv, "--hint_layer", "-1"])
    assert "--hint_layer" in message_of(train_cifar_student.main, [*argv, "--hint_layer", "9"])


@pytest.mark.parametrize(("name", "flags"), [("hint", ("--hint_layer", "3")), ("correlation", ()), ("vid", ())])
def test_a_run_keeps_the_added_modules_and_ships_the_student_alone(name, flags, distil, save_dir):
    run = distil("--epochs", "1", "--max_steps", "2", "--batch_size", "8", *flags, distill=name)
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(line[f"loss_{name}"])
    kept = {key.split(".")[0] for key in weights(run)}
    assert kept == {"student"} | TRAINED[name]
    exported = read_checkpoint(export_student.main([str(run / "last.pth"), "--out", str(save_dir / "student.pth")]))
    assert exported["model"].keys() == pair_networks("resnet14", "resnet8")[1].state_dict().keys()


NAMES = ("srrl", "semckd", "reviewkd", "simkd")


SHORT = ("--batch_size", "64", "--max_steps", "2")


@pytest.mark.slow
def test_an_exported_simkd_student_is_read_back_and_teaches(distil, tmp_path, capsys):
    run = distil(*SHORT, distill="simkd")
    assert "a projector (13,568 parameters) and the teacher's classifier (650) are kept" in capsys.readouterr().out
    path = export_student.main([str(run / "last.pth")])
    printed = capsys.readouterr().out
    assert "same class on 73 of 73" in printed and "note: a projector" in printed
    network, record = load_exported(read_checkpoint(path), "file")
    assert describe_wrapper(network) == record["wrapper"]
    assert record["wrapper"] == {"kind": "reused_classifier", "width": 64, "channels": 64, "size": 8, "factor": 2}
    parameters = count_parameters(build_model("resnet8", 10)) + 13_568
    assert count_parameters(network) == parameters and f"{parameters:,} parameters" in printed
    for source in (path, run / "last.pth"):
        teacher = read_teacher(str(source), "resnet8")
        assert isinstance(teacher.network, ReusedClassifier)
        for name in (*NAMES, "norm"):
            argv = ["--distill", name, "--model_s", "resnet8", "--save_dir", str(tmp_path / source.stem)]
            train_cifar_student.main([*argv, "--path_t", str(source), "--max_steps", "1", "--epochs", "1"])


def test_a_simkd_run_is_resumed(distil):
    run = distil(*SHORT, "--epochs", "1", distill="simkd")
    train_cifar_student.main(["--resume", str(run), "--epochs", "2", "--max_steps", "4"])
    assert state(run)["epoch"] == 2


@pytest.fixture
def final_conv_file():
    network = FinalConv(build_model("wrn_16_1", 10), 64)
    content = {"model": network.state_dict(), "model_name": "wrn_16_1", "num_classes": 10}
    return network.eval(), content


def test_files_with_a_final_convolution_are_read_in_both_spellings(final_conv_file):
    network, content = final_conv_file
    images = torch.randn(2, 3, 32, 32)
    for entry in ({"final_conv": True}, {"final_conv": True, "wrapper": describe_wrapper(network)}):
        loaded, _ = load_exported(content | entry, "file")
        with torch.no_grad():
            assert torch.equal(loaded(images), network(images))
    reused = ReusedClassifier(build_model("wrn_16_1", 10), 64, 64, 8, 2)
    assert len(loaded.get_bn_before_relu()) == 3
    assert len(loaded.get_feat_modules()) == len(reused.get_feat_modules()) == 4
    with pytest.raises(NotImplementedError):  # its last BatchNorm is taken out
        reused.get_bn_before_relu()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "another architecture"),
        ({"wrapper": {"kind": "final_conv", "channels": 32}}, "another architecture"),
        (
            {"wrapper": {"kind": "reused_classifier", "width": 64, "channels": 64, "size": 8, "factor": 2}},
            "another architecture",
        ),
        ({"wrapper": {"kind": "final_conv"}}, "is damaged"),
        ({"wrapper": {"kind": "final_conv", "channels": 64, "size": 8}}, "is damaged"),
        ({"wrapper": {"kind": "final_conv", "channels": "64"}}, "is damaged"),
        ({"wrapper": {"kind": "final_conv", "channels": 0}}, "is damaged"),
        ({"wrapper": {"kind": "branches"}}, "unknown kind branches"),
    ],
)
def test_a_wrapper_that_does_not_fit_is_refused(final_conv_file, entry, message):
    with pytest.raises(UserError, match=message):
        load_exported(final_conv_file[1] | entry, "file")


def test_a_damaged_wrapper_entry_is_one_line(final_conv_file, tmp_path):
    path = tmp_path / "student.pth"
    torch.save(final_conv_file[1] | {"wrapper": {"kind": "branches"}}, path)
    argv = ["--distill", "kd", "--model_s", "resnet8", "--path_t", str(path)]
    assert "unknown kind" in message_of(train_cifar_student.main, argv)


NAMES = ("abound", "factor", "fsp", "kdsvd", "ofd")


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(("abound", "factor", "fsp", "sskd"), "factor"))
@pytest.mark.parametrize("saves", slow_but((1, 3), 1))
def test_a_staged_run_that_is_cut_goes_on_bit_for_bit(distil, monkeypatch, name, saves, capsys):
    """Cut after the first of two epochs of the first stage, and after the first of the main one."""
    keep_images(monkeypatch, 64, 32)
    flags = ("--batch_size", "32", "--epochs", "2", "--init_epochs", "2", "--allow_teacher_gap")
    whole = distil(*flags, distill=name)
    save, saved = run.Run._save, []

    def save_then_stop(self, record):
        save(self, record)
        saved.append(record)
        if len(saved) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        distil(*flags, "--trial", "cut", "--seed", "1", distill=name)
    monkeypatch.setattr(run.Run, "_save", save)
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    assert not same_state(weights(whole), weights(cut))
    train_cifar_student.main(["--resume", str(cut)])
    assert "resumed after" in capsys.readouterr().out
    a, b = state(whole), state(cut)
    for key in ("distiller", "optimizer", "stage_number", "epochs_over"):
        assert same_state(a[key], b[key]), key
    assert [record.get("stage") is None for record in metrics(cut)] == [False, False, True, True]
    assert [record["epoch"] for record in metrics(cut)] == [1, 2, 1, 2]


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_ships_the_student_alone(distil, monkeypatch, name, save_dir):
    keep_images(monkeypatch, 64)
    run = distil("--batch_size", "32", "--epochs", "1", "--max_steps", "1", distill=name)
    last = metrics(run)[-1]
    assert math.isfinite(last["loss"]) and ("loss_" + name in last) == (name not in ("abound", "fsp"))
    exported = export_student.main([str(run / "last.pth"), "--out", str(save_dir / "student.pth")])
    network, _ = load_exported(read_checkpoint(exported), "student.pth")
    assert network.state_dict().keys() == pair_networks("resnet14", "resnet8")[1].state_dict().keys()


def test_the_moving_average_begins_with_the_main_stage(distil, monkeypatch):
    keep_images(monkeypatch, 64, 32)
    flags = ("--batch_size", "32", "--epochs", "1", "--init_epochs", "1", "--max_steps", "1", "--ema_decay", "0.9")
    saved = state(distil(*flags, "--allow_teacher_gap", distill="fsp"))
    assert same_state(saved["ema"], saved["distiller"]), "what the first step of the main stage has left"


def test_one_runs_without_a_teacher_and_resumes(distil, monkeypatch):
    keep_images(monkeypatch, 64, 32)
    flags = ("--batch_size", "32", "--epochs", "2")
    whole = distil(*flags, distill="one", teacher=False)
    (first, _) = metrics(whole)
    assert {name for name in first if name.startswith("loss_")} == {"loss_ce", "loss_ce_ensemble", "loss_one"}
    config = json.loads((whole / "config.json").read_text())
    assert config["kd_T"] == 3 and config["ramp_epochs"] == 1, "80 of 300 epochs, in a run of 2"
    save = run.Run._save

    def stop(self, record):
        save(self, record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            distil(*flags, "--trial", "cut", "--seed", "1", distill="one", teacher=False)
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    train_cifar_student.main(["--resume", str(cut)])
    a, b = state(whole), state(cut)
    assert same_state(a["distiller"], b["distiller"]) and same_state(a["optimizer"], b["optimizer"])

"""Rows instead of edits: an optimizer, a schedule, a metric, a data set and a format are one entry each."""

import json

import pytest
import torch

import train_teacher
from dataset import DATASETS, load_data, sources
from helper import export, metrics, optim
from scripts import evaluate, export_student, predict
from tests.conftest import message_of
from tests.run_folders import metrics as records_of
from tests.run_folders import state

SHORT = ("--model", "resnet8", "--batch_size", "8", "--max_steps", "2")
pytestmark = pytest.mark.usefixtures("few_images")


@pytest.fixture
def train(tmp_path):
    """Call `train_teacher.py`; returns the run folder, the newest."""

    def call(*flags: str):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        train_teacher.main([*SHORT, "--save_dir", str(root), *flags])
        (run,) = root.iterdir()
        return run

    return call


def refused(*flags: str) -> str:
    return message_of(train_teacher.main, [*SHORT, *flags])


def test_an_optimizer_is_one_row(train, monkeypatch):
    assert "invalid choice: 'adagrad'" in refused("--optimizer", "adagrad")
    with monkeypatch.context() as patch:
        row = lambda groups, config: torch.optim.Adagrad(groups, lr=0.0, weight_decay=config.weight_decay)  # noqa: E731
        patch.setitem(optim.OPTIMIZERS, "adagrad", row)
        run = train("--optimizer", "adagrad", "--epochs", "2", "--max_steps", "2")
        assert json.loads((run / "config.json").read_text())["optimizer"] == "adagrad"
        assert {"sum", "step"} <= set(state(run)["optimizer"]["state"][0])
        train_teacher.main(["--resume", str(run), "--max_steps", "5"])
        assert state(run)["step"] == 5 and float(state(run)["optimizer"]["state"][0]["step"]) == 5
    with monkeypatch.context() as patch:
        patch.delitem(optim.OPTIMIZERS, "adamw")
        assert "invalid choice: 'adamw'" in refused("--optimizer", "adamw")


def test_a_schedule_is_one_row(train, monkeypatch):
    assert "invalid choice: 'linear'" in refused("--lr_decay", "linear")
    with monkeypatch.context() as patch:
        patch.setitem(optim.SCHEDULES, "linear", lambda base, epoch, *_: base / epoch)
        run = train("--lr_decay", "linear", "--epochs", "2", "--max_steps", "8", "--learning_rate", "0.02")
    assert [record["learning_rate"] for record in records_of(run)] == [0.02, 0.01]
    with monkeypatch.context() as patch:
        patch.delitem(optim.SCHEDULES, "cos")
        assert "invalid choice: 'cos'" in refused("--lr_decay", "cos")


def test_a_metric_is_one_row(train, monkeypatch, capsys):
    share = lambda logits, targets: float((logits.argmax(1) == 0).float().mean())  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setitem(metrics.METRICS, "share_of_zero", metrics.Metric(share, "share of 0", "", 3, goodness=float))
        run = train("--holdout", "20")
        assert metrics.best_epoch(records_of(run), "share_of_zero") == 1
        [about] = evaluate.main([str(run)])
        assert f"share of 0          {about['share_of_zero']:.3f}\n" in capsys.readouterr().out
    [record] = records_of(run)
    assert 0 <= record["test_share_of_zero"] <= 1 and 0 <= record["holdout_share_of_zero"] <= 1
    assert state(run)["records"][0]["test_share_of_zero"] == record["test_share_of_zero"]
    with monkeypatch.context() as patch:
        patch.delitem(metrics.METRICS, "accuracy_top5")
        assert "test_accuracy_top5" not in records_of(train())[0]


def test_a_data_set_is_one_row(train, monkeypatch):
    assert "invalid choice: 'bright_digits'" in refused("--dataset", "bright_digits")
    make = DATASETS["digits"]

    def bright(*arguments):
        data = make(*arguments)
        return data._replace(name="bright_digits", mean=(0.1, 0.1, 0.1))

    with monkeypatch.context() as patch:
        patch.setitem(sources.DATASETS, "bright_digits", bright)
        run = train("--dataset", "bright_digits")
        assert load_data("bright_digits").name == "bright_digits"
        assert run.name == "bright_digits_ce_resnet8_trial1_try"
    with monkeypatch.context() as patch:
        patch.delitem(sources.DATASETS, "fashion_mnist")
        assert "invalid choice: 'fashion_mnist'" in refused("--dataset", "fashion_mnist")


def test_a_format_is_one_row(train, monkeypatch, tmp_path, capsys):
    run, (write, read) = train(), export.FORMATS["pth"]
    argv = [str(run / "last.pth"), "--format", "weights"]
    assert "must be of pth, safetensors, pt2, onnx, not weights" in message_of(export_student.main, argv)
    with monkeypatch.context() as patch:
        patch.setitem(export.FORMATS, "weights", (write, read))
        out = export_student.main(argv)
        assert out.suffix == ".weights" and "same class on 73 of 73" in capsys.readouterr().out
        assert export.read_deployed(str(out)).record["model_name"] == "resnet8"
    with monkeypatch.context() as patch:
        patch.delitem(export.FORMATS, "onnx")
        argv = [str(run / "last.pth"), "--format", "onnx"]
        assert "must be of pth, safetensors, pt2, not onnx" in message_of(export_student.main, argv)
    assert f"{out} is no .pth, .safetensors, .pt2, .onnx file" in message_of(predict.main, [str(out), "image.png"])

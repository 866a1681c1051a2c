"""Run folders of the format before this one still resume, teach, and export (tests/fixtures/README.md)."""

import json
import tarfile
from pathlib import Path

import pytest

import train_cifar_student
import train_teacher
from errors import UserError
from helper.checkpoint import upgrade
from helper.networks import read_teacher
from helper.tables.rows import read_rows
from models import model_dict
from models.checkpoints import read_checkpoint
from scripts import export_student
from tests.conftest import ROOT
from tests.run_folders import load, metrics, state

TEACHER, STUDENT = Path("digits_ce_resnet8_trial1"), Path("digits_norm_resnet8_resnet8_trial1")
#: With what the code that wrote the folders ended the student.
ENDED = {
    "loss": 0.6183016002178192,
    "loss_ce": 0.511901319026947,
    "loss_norm": 0.10640028119087219,
    "train_accuracy": 7.03125,
    "test_loss": 2.3309046147943855,
}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch, whole_digits) -> Path:
    """The folders, in the current directory: the student's configuration names its teacher from there."""
    with tarfile.open(ROOT / "tests" / "fixtures" / "old_runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_that_was_stopped_within_an_epoch_ends_as_it_would_have(capsys):
    [result] = train_cifar_student.main(["--resume", str(STUDENT)])
    assert "resumed after epoch 0/1 and 2 steps" in capsys.readouterr().out
    assert (result["steps"], result["epochs"], result["test_images"]) == (4, 1, 364)
    assert result["accuracy_last"] == pytest.approx(10.44, abs=0.6)
    [record] = metrics(STUDENT)
    for name, value in ENDED.items():
        assert record[name] == pytest.approx(value, rel=1e-3), name
    checkpoint = load(STUDENT / "last.pth")
    model_dict["resnet8"](num_classes=10).load_state_dict(checkpoint["model"])
    config = json.loads((STUDENT / "config.json").read_text())
    assert (
        config["teacher_digest"]
        == checkpoint["record"]["teacher"]["digest"]
        == read_teacher(str(TEACHER / "last.pth"), None).digest
    )


def test_a_finished_run_is_resumed_for_more_epochs():
    before = read_checkpoint(TEACHER / "last.pth")
    train_teacher.main(["--resume", str(TEACHER)])
    assert [record["epoch"] for record in metrics(TEACHER)] == [1] and "record" not in read_checkpoint(
        TEACHER / "last.pth"
    )
    train_teacher.main(["--resume", str(TEACHER), "--max_steps", "4", "--epochs", "2"])
    records = state(TEACHER)["records"]
    assert [record["epoch"] for record in records] == [1, 2] == [record["epoch"] for record in metrics(TEACHER)]
    assert records[0]["test_accuracy"] == before["accuracies"][0]
    assert (TEACHER / "result.json").exists()


def test_an_old_checkpoint_teaches(tmp_path, capsys):
    flags = ["--model_s", "resnet8", "--distill", "kd", "--max_steps", "1", "--save_dir", str(tmp_path / "new")]
    [result] = train_cifar_student.main(["--path_t", str(TEACHER / "last.pth"), *flags])
    assert result["teacher_accuracy"] == pytest.approx(10.71, abs=0.6)
    assert "on record: 10.44 %" in capsys.readouterr().out


@pytest.mark.parametrize("run", [TEACHER, STUDENT])
def test_an_old_checkpoint_is_exported(run, capsys):
    exported = export_student.main([str(run / "last.pth"), "--out", "student.pth"])
    assert "same class on 364 of 364" in capsys.readouterr().out
    record = load(exported)["record"]
    assert (record["model_name"], record["dataset"], record["image_size"]) == ("resnet8", "digits", 32)
    model_dict["resnet8"](num_classes=10).load_state_dict(load(exported)["model"])


def test_an_old_checkpoint_starts_a_run(tmp_path):
    [result] = train_teacher.main(["--init", str(TEACHER / "last.pth"), "--max_steps", "1", "--save_dir", "new"])
    assert result["steps"] == 1


def test_an_upgraded_checkpoint_is_one_of_today():
    upgraded = upgrade(read_checkpoint(TEACHER / "last.pth"), "x")
    assert set(upgraded) == {"model", "record", "training"}
    assert upgrade(upgraded, "x") == upgraded
    train_teacher.main(["--model", "resnet8", "--max_steps", "1", "--save_dir", "new"])
    today = load(next(Path("new").iterdir()) / "last.pth")
    newer = {"overflows", "scaler", "teacher", "identity", "max_steps", "split", "background"}  # what nobody knew then
    assert set(today["training"]) - newer - {"computed_by"} == set(upgraded["training"])
    assert set(today["record"]) - set(upgraded["record"]) <= newer


@pytest.mark.parametrize("lost", ["data", "distiller", "config", "accuracies"])
def test_an_old_checkpoint_that_lacks_something_is_refused_in_one_line(lost):
    import torch

    checkpoint = read_checkpoint(TEACHER / "last.pth")
    del checkpoint[lost]
    torch.save(checkpoint, TEACHER / "last.pth")
    with pytest.raises(UserError):
        train_teacher.main(["--resume", str(TEACHER), "--max_steps", "25", "--epochs", "2"])


def test_finished_ones_are_tabulated_and_the_rest_is_named():
    [row], [left] = read_rows([TEACHER, STUDENT])
    assert (row.label, row.pair) == ("ce --max_steps 2", "- -> resnet8")
    assert (left.folder, left.reason) == (STUDENT, "not finished")

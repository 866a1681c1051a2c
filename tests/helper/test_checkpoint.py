"""Checkpoints: plain weights that anybody can load, what is known of them, and nothing twice."""

import json

import pytest
import torch

import train_cifar_student
from dataset import load_data
from distiller_zoo import DISTILLERS, Distiller, Task
from helper.checkpoint import check_computed_by, check_progress, data_record, network_of, upgrade
from helper.networks import read_network, read_teacher
from models import build_model, model_dict
from models.checkpoints import weights_digest
from scripts import export_student
from tests.conftest import STUDENT, TEACHER
from tests.run_folders import load, state

SHORT = ("--batch_size", "8", "--max_steps", "2")
pytestmark = pytest.mark.usefixtures("few_images")


def build(name: str, student: str = STUDENT) -> Distiller:
    """A method around freshly built networks, its contrast kept small."""
    method = DISTILLERS[name]
    small = {"nce_k": 8} if any(flag.argument == "nce_k" for flag in method.flags) else {}
    teacher = build_model(TEACHER, 10) if method.reads_teacher else None
    return method(build_model(student, 10), teacher, Task(10, 32, 4, torch.arange(20) % 10), **small)


@pytest.mark.parametrize("name", DISTILLERS)
def test_what_a_method_ships_is_the_plain_network_or_says_what_is_around_it(name):
    method = build(name).eval()
    weights, record = network_of(method)
    if name == "simkd":  # ships the teacher's classifier and a projector to it
        assert record["wrapper"]["kind"] == "reused_classifier"
        return
    assert record["wrapper"] is None and record["num_classes"] == 10
    network = model_dict[STUDENT](num_classes=10)
    network.load_state_dict(weights, strict=True)
    assert record["digest"] == weights_digest(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(network.eval()(images), method.predict(images), atol=1e-4)


def test_a_convolution_that_has_to_stay_is_named():
    _, record = network_of(build("norm", student="wrn_16_1").eval())
    assert record["wrapper"] == {"kind": "final_conv", "channels": 64}


@pytest.mark.parametrize("distill", ["norm", "kd"])
def test_the_weights_of_a_run_fit_the_network_of_its_name(distil, distill):
    run = distil(*SHORT, distill=distill)
    result = json.loads((run / "result.json").read_text())
    for name in ("last.pth", "best.pth"):
        checkpoint = load(run / name)
        assert set(checkpoint) == {"model", "record", "training"}
        network = model_dict[STUDENT](num_classes=10)
        network.load_state_dict(checkpoint["model"], strict=True)
        assert checkpoint["record"]["accuracy"] == result["accuracy_last"]


def test_the_record_says_what_is_known_of_the_network(distil, teacher_run):
    run = distil(*SHORT, distill="kd")
    checkpoint, data = load(run / "last.pth"), load_data("digits")
    record = checkpoint["record"]
    assert record["digest"] == weights_digest(checkpoint["model"])
    assert (record["model_name"], record["num_classes"], record["distill"], record["epoch"]) == (STUDENT, 10, "kd", 1)
    assert {name: record[name] for name in data_record(data)} == data_record(data) | {"train_images": 32}
    teacher, config = load(teacher_run / "last.pth")["record"], json.loads((run / "config.json").read_text())
    assert record["teacher"]["digest"] == teacher["digest"] == config["teacher_digest"]
    assert record["teacher"]["name"] == TEACHER
    exported = load(export_student.main([str(run / "last.pth")]))
    assert set(exported) == {"model", "record"} and exported["record"]["digest"] == record["digest"]
    assert exported["record"]["classes"] == data.classes


def test_weights_that_are_the_students_own_are_stored_once(distil):
    run = distil(*SHORT, distill="kd")
    network = sum(value.numel() * value.element_size() for value in load(run / "best.pth")["model"].values())
    assert (run / "best.pth").stat().st_size < 1.3 * network


def test_a_checkpoint_holds_the_records_of_the_epochs_that_its_result_is_made_of(distil):
    run = distil("--batch_size", "16", "--epochs", "2", distill="kd")
    records, result = state(run)["records"], json.loads((run / "result.json").read_text())
    assert [record["epoch"] for record in records] == [1, 2]
    assert result["accuracy_last"] == records[-1]["test_accuracy"]
    assert result["accuracy_best"] == max(record["test_accuracy"] for record in records)


def test_a_network_is_read_without_its_method(distil, monkeypatch):
    run = distil(*SHORT, "--nce_k", "8", distill="crd")
    exported = export_student.main([str(run / "last.pth")])

    def refuse(*arguments, **named):
        raise AssertionError("a method is built")

    monkeypatch.setattr(Distiller, "__init__", refuse)
    for path in (run / "last.pth", run / "best.pth", exported):
        network = read_teacher(str(path), None)
        assert (network.name, network.num_classes, network.dataset) == (STUDENT, 10, "digits")
        assert network.accuracy == load(run / "last.pth")["record"]["accuracy"]
        assert network.digest == weights_digest(load(run / "last.pth")["model"])


def test_a_teacher_is_opened_once_for_eight_runs(teacher_run, save_dir, monkeypatch):
    from helper import networks

    opened, read = [], networks.read_checkpoint

    def count(path, *arguments):
        opened.append(path)
        return read(path, *arguments)

    monkeypatch.setattr(networks, "read_checkpoint", count)
    built, build_one = [], networks.load_exported
    monkeypatch.setattr(networks, "load_exported", lambda *given: built.append(1) or build_one(*given))
    argv = ["--path_t", str(teacher_run / "last.pth"), "--model_s", STUDENT, "--save_dir", str(save_dir)]
    argv += ["--batch_size", "8", "--max_steps", "1", "--allow_teacher_gap", "--distill", "kd"]
    train_cifar_student.main([*argv, "--trials", "2", "--sweep", "a=0.5,1", "kd_T=2,4"])
    assert opened == [str(teacher_run / "last.pth")] and len(built) == 1
    assert len(list(save_dir.iterdir())) == 8


def test_what_is_no_runs_checkpoint_is_left_as_it_is():
    plain = {"model": build_model(STUDENT, 10).state_dict(), "accuracy": 1.0}
    assert upgrade(plain, "x") == plain


def test_a_network_of_the_wrong_name_is_refused(teacher_run):
    from errors import UserError

    with pytest.raises(UserError, match=f"holds another architecture, {TEACHER}, than --model_t resnet20"):
        read_network(str(teacher_run / "last.pth"), "resnet20", "--path_t", "--model_t")


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (("config",), [], "its config is no table of settings"),
        (("records", 0, "learning_rate"), "0.1", "an accuracy or a learning rate is no number"),
        (("records", 0, "test_accuracy"), None, "an accuracy or a learning rate is no number"),
    ],
)
def test_progress_of_another_kind_is_refused(entry, value, message):
    training = dict.fromkeys(("stage_number", "stage_step", "step", "epochs_over", "skipped_steps"), 0)
    training |= {"epoch": 1, "seconds": 1.0, "epoch_state": None, "config": {"epochs": 2}}
    training["records"] = [{"test_accuracy": 50.0, "learning_rate": 0.1}]
    check_progress(training, in_main_stage=True)
    holder = training
    for key in entry[:-1]:
        holder = holder[key]
    holder[entry[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_progress(training, in_main_stage=True)


def test_what_has_computed_a_run_is_known_or_refused():
    now = {"processes": 1, "device": "cpu"}
    assert check_computed_by([now, dict.fromkeys(now)], now) == [now, dict.fromkeys(now)]
    for bad in ({"processes": 1}, now | {"processes": "1"}, now | {"device": torch.zeros(1)}):
        with pytest.raises(ValueError, match="it was computed by"):
            check_computed_by([bad], now)

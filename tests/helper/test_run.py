"""Whole runs on the embedded digits: what they write, what they repeat, what they refuse."""

import json
from types import SimpleNamespace

import pytest
import torch

import train_cifar_student
import train_teacher
from errors import UserError
from helper import distributed
from helper import run as run_module
from helper.distributed import untested_on
from tests.conftest import keep_images, message_of
from tests.run_folders import load, metrics, same_state, state, weights

SHORT = ("--batch_size", "8", "--max_steps", "3")
pytestmark = pytest.mark.usefixtures("few_images")


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("distill", "flags", "terms"),
    [
        ("NORM", (), ["loss_ce", "loss_norm"]),
        ("norm", ("-a", "1"), ["loss_ce", "loss_kd", "loss_norm"]),
        ("norm", ("--ft", "plain", "-s", "2", "--ft_form", "direct"), ["loss_ce", "loss_norm"]),
        ("norm_crd", ("--nce_k", "16"), ["loss_ce", "loss_norm", "loss_crd"]),
        ("ft", ("--ft", "plain"), ["loss_ce"]),
        ("kd", (), ["loss_ce", "loss_kd"]),
        ("crd", ("--nce_k", "16"), ["loss_ce", "loss_crd"]),
        ("ce", (), ["loss_ce"]),
    ],
)
def test_every_method_runs_and_leaves_a_complete_folder(distil, distill, flags, terms):
    run = distil(*SHORT, *flags, distill=distill, teacher=distill not in ("ft", "ce"))
    files = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "last.pth", "best.pth", "result.json", "log.txt"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.endswith(".part") for name in files)
    (record,) = metrics(run)
    assert sorted(name for name in record if name.startswith("loss_")) == sorted(terms)
    assert record["loss"] == pytest.approx(sum(record[name] for name in terms))
    assert {"learning_rate", "train_accuracy", "test_accuracy", "data_wait_s", "compute_s", "images_per_s"} <= set(
        record
    )
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 3
    assert result["accuracy_last"] == result["accuracy_best"] == result["accuracy_mean_last_five"]
    config = json.loads((run / "config.json").read_text())
    assert config["seed"] == 1 and config["distill"] == distill.lower()
    assert state(run)["config"]["seed"] == 1


def test_the_terminal_shows_what_is_no_default_then_defaults_and_at_the_end_the_checkpoints(distil, capsys):
    run = distil(*SHORT)
    printed, log = capsys.readouterr().out.splitlines(), (run / "log.txt").read_text().splitlines()
    assert printed[0].startswith("run folder: ") and "(default)" not in "\n".join(printed)
    first = next(number for number, line in enumerate(printed) if line.startswith("  defaults: accept_changes False, "))
    assert any(line.startswith("  batch_size ") and line.endswith("(command line)") for line in printed[:first])
    assert max(map(len, printed[first : first + 3])) <= 120 and " weight_decay " not in printed[first]
    assert any(line.split() == ["accept_changes", "False", "(default)"] for line in log), "all, one by one"
    assert printed[-1] == log[-1] == f"checkpoints: {run / 'last.pth'} and best.pth"


def test_max_steps_may_fall_into_a_later_epoch(distil):
    run = distil("--batch_size", "8", "--max_steps", "6")
    assert [record["step"] for record in metrics(run)] == [4, 6]
    assert json.loads((run / "result.json").read_text())["steps"] == 6


def test_the_first_line_is_the_run_folder_and_the_terms_are_shown_by_name(distil, capsys):
    run = distil(*SHORT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run folder: {run}"
    assert any("loss" in line and "= ce " in line and "+ norm " in line for line in lines)
    assert any(line.split()[:2] == ["gamma", "0.125"] and "(method norm)" in line for line in lines)
    logged = (run / "log.txt").read_text().splitlines()
    assert any(line.endswith("(default)") for line in logged), "every setting is logged"
    assert not any(line.endswith("(default)") for line in lines), "defaults are one paragraph"
    assert all(line in lines for line in logged if not line.endswith("(default)"))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(distil):
    first, second = distil(*SHORT), distil(*SHORT)
    assert first.name + "-2" == second.name
    third = distil(*SHORT, "--seed", "9")
    states = [weights(run) for run in (first, second, third)]
    assert same_state(states[0], states[1]) and not same_state(states[0], states[2])


def test_best_last_and_mean_of_five_are_told_apart(tmp_path, monkeypatch):
    accuracies = iter([10.0, 30.0, 30.0, 20.0, 25.0, 15.0])

    def fake(predict, loader, title):
        return {"test_accuracy": next(accuracies), "test_accuracy_top5": 0.0, "test_loss": 0.0}

    monkeypatch.setattr(run_module, "evaluate", fake)
    argv = ["--model", "resnet8", "--epochs", "6", "--batch_size", "32", "--save_dir", str(tmp_path)]
    [result] = train_teacher.main(argv)
    assert (result["accuracy_last"], result["accuracy_best"], result["best_epoch"]) == (15.0, 30.0, 2)
    assert result["accuracy_mean_last_five"] == pytest.approx((30 + 30 + 20 + 25 + 15) / 5)
    run = next(tmp_path.iterdir())
    assert load(run / "best.pth")["record"]["epoch"] == 2 and load(run / "last.pth")["record"]["epoch"] == 6
    assert [record["epoch"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]  # epochs mean epochs


def test_a_diverging_loss_names_its_term(distil):
    with pytest.raises(UserError, match=r"loss_\w+ is (nan|inf)"):
        distil("--batch_size", "8", "--epochs", "1", "--learning_rate", "1e30")


def test_weights_that_are_all_zero_are_refused(distil, save_dir):
    for distill, flags in (("kd", "-a 0"), ("norm", "-b 0"), ("norm", "-b1 0"), ("norm_crd", "-b 0 --crd_weight 0")):
        with pytest.raises(UserError, match="every loss weight is 0"):
            distil("-r", "0", *flags.split(), distill=distill)
    runs = len(list(save_dir.iterdir()))
    with pytest.raises(UserError, match="every loss weight is 0"):
        distil("-r", "0", distill="fsp")
    assert len(list(save_dir.iterdir())) == runs, "refused before its first stage"


@pytest.mark.parametrize(("most", "recorded"), [("8", None), ("7", 7)])
def test_a_limit_that_no_stage_reaches_cuts_nothing_short(most, recorded, few_images, tmp_path):
    """Two epochs are eight steps: a student of that teacher is told of a try-out only where it was one."""
    train_teacher.main(
        ["--model", "resnet8", "--epochs", "2", "--max_steps", most, "--save_dir", str(tmp_path)]
        + ["--batch_size", "8"]
    )
    [run] = tmp_path.iterdir()
    assert load(run / "last.pth")["record"]["max_steps"] == recorded
    said = [line for line in (run / "log.txt").read_text().splitlines() if line.startswith("ended by --max_steps")]
    assert said == (["ended by --max_steps 7 before the last of its epochs"] if recorded else [])


def test_an_unknown_device_is_named(save_dir):
    for device in ("tpu", "cuda:99", "meta"):
        message = message_of(
            train_teacher.main, ["--model", "resnet8", "--device", device, "--save_dir", str(save_dir)]
        )
        assert f"--device: {device}" in message
    assert not save_dir.exists()


def test_a_last_batch_of_one_image_is_left_out_where_batch_norms_cannot_read_it(save_dir, monkeypatch):
    keep_images(monkeypatch, 9, 8)
    flags = ["--model", "resnet18", "--epochs", "1", "--save_dir", str(save_dir), "--batch_size"]
    [result] = train_teacher.main([*flags, "4"])
    assert result["steps"] == 2
    assert message_of(train_teacher.main, [*flags, "1"]).startswith("--batch_size: the student's last maps are one")
    [small] = train_teacher.main([*flags, "4", "--model", "resnet8"])
    assert small["steps"] == 3


def test_why_a_run_failed_stands_in_its_log(distil, save_dir):
    with pytest.raises(UserError):
        distil("--learning_rate", "1e25", *SHORT)
    [run] = save_dir.iterdir()
    assert (run / "log.txt").read_text().splitlines()[-1].startswith("failed: ")


IMPOSSIBLE = {
    "method": ("--distill", "ofd", "--model_s", "torchvision:resnet18"),
    "network": ("--model_s", "timm:crossvit_tiny_240", "--image_size", "64"),
    "data": ("--data", "there_is_none", "--dataset", "folder"),
    "teacher": ("--path_t", "there_is_none.pth"),
    "a run of several": ("--sweep", "distill=kd,ofd", "--model_s", "torchvision:resnet18"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_refused_run_leaves_nothing_and_names_no_folder(kind, teacher_run, save_dir, capsys):
    argv = [
        "--path_t",
        str(teacher_run / "last.pth"),
        "--model_s",
        "resnet8",
        "--save_dir",
        str(save_dir),
        *IMPOSSIBLE[kind],
    ]
    assert message_of(train_cifar_student.main, argv)
    assert not save_dir.exists() and "run folder" not in capsys.readouterr().out


def test_a_system_that_nobody_tried_is_said_at_the_start(distil, monkeypatch, capsys):
    assert untested_on(torch.device("cpu")) == untested_on(torch.device("cuda")) == ""
    assert "--device mps" in untested_on(torch.device("mps"))
    monkeypatch.setattr(distributed, "sys", SimpleNamespace(platform="darwin"))
    distil(*SHORT, distill="ce", teacher=False)
    assert "warning: untested: macOS; supported is Linux" in capsys.readouterr().out

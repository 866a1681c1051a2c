"""Whole runs on the embedded digits: what they write, how they resume, what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helper.teacher import read_teacher

import train_cifar_student
import train_teacher
from errors import UserError, run_script
from helper import engine
from helper.run_folder import replacing
from models import build_model
from scripts import export_student
from tests.conftest import keep_images, message_of
from tests.run_folders import assert_same_end, load, metrics, same_state

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("--batch_size", "32", "--max_steps", "3")
pytestmark = pytest.mark.usefixtures("few_images")


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
    assert load(run / "last.pth")["config"]["seed"] == 1


def test_max_steps_may_fall_into_a_later_epoch(distil):
    run = distil("--batch_size", "32", "--max_steps", "6")
    assert [record["step"] for record in metrics(run)] == [4, 6]
    assert json.loads((run / "result.json").read_text())["steps"] == 6


def test_the_first_line_is_the_run_folder_and_the_terms_are_shown_by_name(distil, capsys):
    run = distil(*SHORT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run folder: {run}"
    assert any("loss" in line and "= ce " in line and "+ norm " in line for line in lines)
    assert any(line.split()[:2] == ["gamma", "0.125"] and "(method norm)" in line for line in lines)
    assert (run / "log.txt").read_text().splitlines() == lines[1:]


def test_the_same_seed_gives_the_same_weights_and_another_does_not(distil):
    first, second = distil(*SHORT), distil(*SHORT)
    assert first.name + "-2" == second.name
    third = distil(*SHORT, "--seed", "9")
    states = [load(run / "last.pth")["distiller"] for run in (first, second, third)]
    assert same_state(states[0], states[1]) and not same_state(states[0], states[2])


@pytest.mark.parametrize("distill", ["norm", "norm_crd"])
def test_one_epoch_and_its_resumption_equal_two_epochs(distil, distill, monkeypatch, capsys):
    flags = ("--batch_size", "32", "--epochs", "2", *(("--nce_k", "16") if distill == "norm_crd" else ()))
    whole = distil(*flags, distill=distill)
    original = engine.Run._save

    def save_then_stop(self, record):
        original(self, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Run, "_save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        distil(*flags, "--trial", "cut", "--seed", "1", distill=distill)
    monkeypatch.setattr(engine.Run, "_save", original)
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    assert load(cut / "last.pth")["epoch"] == 1 and not (cut / "result.json").exists()
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "loss"')  # a line that the cut tore
    if distill == "norm":
        train_cifar_student.main(["--resume", str(cut)])
    else:
        distil(*flags, "--trial", "cut", "--seed", "1", "--resume", distill=distill)
    assert "resumed after epoch 1" in capsys.readouterr().out
    assert_same_end(whole, cut)
    assert json.loads((cut / "result.json").read_text())["accuracy_last"] == load(cut / "last.pth")["accuracies"][-1]


def test_a_finished_run_that_is_resumed_changes_nothing(distil):
    run = distil("--batch_size", "64", "--epochs", "1")
    before = load(run / "last.pth")
    train_cifar_student.main(["--resume", str(run)])
    assert same_state(before, load(run / "last.pth")) and len(metrics(run)) == 1


def test_resuming_with_other_settings_is_refused(distil, save_dir):
    run = distil(*SHORT)
    message = message_of(train_cifar_student.main, ["--resume", str(run), "--learning_rate", "0.3"])
    assert "--resume" in message and "learning_rate 0.05, not 0.3" in message
    assert "not a run folder" in message_of(train_cifar_student.main, ["--resume", str(save_dir / "none")])
    (run / "last.pth").write_bytes((run / "last.pth").read_bytes()[:1000])
    assert "last.pth cannot be read" in message_of(train_cifar_student.main, ["--resume", str(run)])
    (run / "last.pth").unlink()
    assert "has no checkpoint yet" in message_of(train_cifar_student.main, ["--resume", str(run)])
    assert (run / "config.json").exists()


def test_a_run_that_is_killed_between_two_checkpoints_ends_with_the_same_best(tmp_path, monkeypatch):
    accuracies, saves = iter([10.0, 20.0, 20.0]), []
    save = engine.RunFolder.save

    def fake(predict, loader, title):
        return {"test_accuracy": next(accuracies), "test_accuracy_top5": 0.0, "test_loss": 0.0}

    def save_then_stop(self, name, checkpoint):
        save(self, name, checkpoint)
        saves.append(name)
        if len(saves) == 3:  # two of the first epoch, and one of the second
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "evaluate", fake)
    monkeypatch.setattr(engine.RunFolder, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train_teacher.main(["--model", "resnet8", "--epochs", "2", "--batch_size", "128", "--save_dir", str(tmp_path)])
    run = next(tmp_path.iterdir())
    [result] = train_teacher.main(["--resume", str(run)])
    best, last = load(run / "best.pth"), load(run / "last.pth")
    assert result["best_epoch"] == best["epoch"] == last["epoch"] == 2
    assert same_state(best["distiller"], last["distiller"])


def test_best_last_and_mean_of_five_are_told_apart(tmp_path, monkeypatch):
    accuracies = iter([10.0, 30.0, 30.0, 20.0, 25.0, 15.0])

    def fake(predict, loader, title):
        return {"test_accuracy": next(accuracies), "test_accuracy_top5": 0.0, "test_loss": 0.0}

    monkeypatch.setattr(engine, "evaluate", fake)
    argv = ["--model", "resnet8", "--epochs", "6", "--batch_size", "128", "--save_dir", str(tmp_path)]
    [result] = train_teacher.main(argv)
    assert (result["accuracy_last"], result["accuracy_best"], result["best_epoch"]) == (15.0, 30.0, 2)
    assert result["accuracy_mean_last_five"] == pytest.approx((30 + 30 + 20 + 25 + 15) / 5)
    run = next(tmp_path.iterdir())
    assert load(run / "best.pth")["epoch"] == 2 and load(run / "last.pth")["epoch"] == 6
    assert [record["epoch"] for record in metrics(run)] == [1, 2, 3, 4, 5, 6]  # epochs mean epochs


def test_a_teacher_whose_accuracy_is_off_stops_the_run(teacher_run, save_dir, tmp_path, capsys):
    checkpoint = load(teacher_run / "last.pth")
    checkpoint["accuracy"] += 1.0
    off = tmp_path / "off.pth"
    torch.save(checkpoint, off)
    argv = ["--model_s", "resnet8", "--path_t", str(off), "--save_dir", str(save_dir), *SHORT]
    message = message_of(train_cifar_student.main, argv)
    assert "1.00 points off" in message and "--allow_teacher_gap" in message
    assert not save_dir.exists(), "a refused run leaves no folder"
    train_cifar_student.main([*argv, "--allow_teacher_gap"])
    checkpoint["accuracy"] -= 0.6
    torch.save(checkpoint, off)
    train_cifar_student.main(argv)
    assert "on record" in capsys.readouterr().out


def test_a_published_teacher_is_held_to_its_published_accuracy(tmp_path):
    from helper.teacher import check_teacher, read_teacher

    folder = tmp_path / "resnet56_vanilla"
    folder.mkdir()
    path = folder / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": build_model("resnet56", 100).state_dict(), "accuracy": torch.tensor(70.0)}, path)
    teacher = read_teacher(str(path), None)  # the name comes from RepDistiller's folder
    assert (teacher.name, teacher.num_classes, teacher.dataset) == ("resnet56", 100, "cifar100")
    assert "72.34" in check_teacher(teacher, "cifar100", 72.5, False)
    with pytest.raises(UserError, match=r"2\.34 points off"):
        check_teacher(teacher, "cifar100", 70.0, False)
    assert "no accuracy recorded" in check_teacher(teacher, "digits", 3.0, False)


def test_a_head_that_does_not_fit_the_data_is_refused(tmp_path, save_dir):
    path = tmp_path / "teacher.pth"
    torch.save({"model": build_model("resnet14", 7).state_dict()}, path)
    argv = ["--model_s", "resnet8", "--path_t", str(path), "--model_t", "resnet14", "--save_dir", str(save_dir)]
    message = message_of(train_cifar_student.main, argv)
    assert "7 classes" in message and "digits has 10" in message


def test_an_exported_student_and_a_distilled_run_can_teach(distil, save_dir):
    run = distil(*SHORT)
    exported = export_student.main([str(run / "last.pth")])
    argv = ["--distill", "kd", "--model_s", "resnet8", "--save_dir", str(save_dir), *SHORT]
    results = [train_cifar_student.main([*argv, "--path_t", str(path)]) for path in (run / "last.pth", exported)]
    assert [result["teacher_accuracy"] for (result,) in results] == [load(run / "last.pth")["accuracy"]] * 2


def test_a_diverging_loss_names_its_term(distil):
    with pytest.raises(UserError, match=r"loss_\w+ is (nan|inf)"):
        distil("--batch_size", "32", "--epochs", "1", "--learning_rate", "1e30")


def test_weights_that_are_all_zero_are_refused(distil, save_dir):
    with pytest.raises(UserError, match="every loss weight is 0"):
        distil("-r", "0", "-a", "0", distill="kd")


def test_an_unknown_device_is_named(save_dir):
    for device in ("tpu", "cuda:99", "meta"):
        message = message_of(
            train_teacher.main, ["--model", "resnet8", "--device", device, "--save_dir", str(save_dir)]
        )
        assert f"--device: {device}" in message
    assert not save_dir.exists()


def test_a_file_that_fails_to_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        Path(temporary).write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_script_can_be_resumed(tmp_path):
    argv = [sys.executable, "train_teacher.py", "--model", "resnet8", "--epochs", "50", "--save_dir", str(tmp_path)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = Path(process.stdout.readline().split("run folder: ")[1].strip())
    while not (run / "last.pth").exists():
        time.sleep(0.1)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    done = load(run / "last.pth")["epoch"]
    step = load(run / "last.pth")["step"]
    train_teacher.main(["--resume", str(run), "--max_steps", str(step + 2)])
    assert load(run / "last.pth")["epoch"] == done + 1


def test_a_teacher_of_ones_own_is_held_to_its_own_record(tmp_path):
    path = tmp_path / "resnet56_trial_3" / "last.pth"
    path.parent.mkdir()
    weights = {f"_orig_mod.{key}": value for key, value in build_model("resnet56", 100).state_dict().items()}
    torch.save({"model": weights, "accuracy": 70.0}, path)
    assert read_teacher(str(path), "resnet56").accuracy == 70.0


def test_a_last_batch_of_one_image_is_left_out_where_batch_norms_cannot_read_it(save_dir, monkeypatch):
    keep_images(monkeypatch, 9, 8)
    flags = ["--model", "resnet18", "--epochs", "1", "--save_dir", str(save_dir), "--batch_size"]
    [result] = train_teacher.main([*flags, "4"])
    assert result["steps"] == 2
    assert message_of(train_teacher.main, [*flags, "1"]).startswith("--batch_size: the student's last maps are one")
    [small] = train_teacher.main([*flags, "4", "--model", "resnet8"])
    assert small["steps"] == 3


def test_what_a_resumed_run_has_changed_is_what_it_goes_on_with(distil, capsys):
    run = distil("--batch_size", "64", "--epochs", "1", "--max_steps", "1")
    train_cifar_student.main(["--resume", str(run), "--epochs", "3", "--max_steps", "2"])
    assert "  epochs             3                        (was 1)" in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    assert (config["epochs"], config["max_steps"], config["resume"]) == (3, 2, None)
    assert config["origins"]["epochs"] == "command line" and config["origins"]["batch_size"] == "command line"
    before = (run / "config.json").read_text()
    train_cifar_student.main(["--resume", str(run)])
    assert (run / "config.json").read_text() == before


def test_a_teacher_that_has_moved_can_be_named_anew(distil, teacher_run, tmp_path):
    run = distil(*SHORT)
    moved = shutil.copy(teacher_run / "last.pth", tmp_path / "moved.pth")
    train_cifar_student.main(["--resume", str(run), "--path_t", str(moved)])
    assert json.loads((run / "config.json").read_text())["path_t"] == str(moved)


def test_why_a_run_failed_stands_in_its_log(distil, save_dir):
    with pytest.raises(UserError):
        distil("--learning_rate", "1e25", *SHORT)
    [run] = save_dir.iterdir()
    assert (run / "log.txt").read_text().splitlines()[-1].startswith("failed: ")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_out_of_memory_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch_size" in message and message.count("\n") == 1

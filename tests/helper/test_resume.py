"""Runs that are resumed: they end as if they had never been stopped, and say what was changed."""

import json
import shutil
import signal

import pytest
import torch

import train_cifar_student
import train_teacher
from distiller_zoo import DISTILLERS
from distiller_zoo.kd import KD
from errors import StoppedAtOnce
from helper import run as run_module
from helper.run_folder import RunFolder
from tests.conftest import killed, killed_within_an_epoch, message_of
from tests.run_folders import assert_same_end, config_of, load, metrics, new_run, same_state, state

SHORT = ("--batch_size", "8", "--max_steps", "3")
pytestmark = pytest.mark.usefixtures("few_images")


@pytest.mark.quick(1)
@pytest.mark.parametrize("distill", ["norm", "norm_crd"])
def test_one_epoch_and_its_resumption_equal_two_epochs(distil, distill, capsys):
    flags = ("--batch_size", "8", "--epochs", "2", *(("--nce_k", "16") if distill == "norm_crd" else ()))
    whole = distil(*flags, distill=distill)
    with killed():
        distil(*flags, "--trial", "cut", "--seed", "1", distill=distill)
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    assert load(cut / "last.pth")["record"]["epoch"] == 1 and not (cut / "result.json").exists()
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "loss"')  # a line that the cut tore
    if distill == "norm":
        train_cifar_student.main(["--resume", str(cut)])
    else:
        distil(*flags, "--trial", "cut", "--seed", "1", "--resume", distill=distill)
    assert "resumed after epoch 1" in capsys.readouterr().out
    assert_same_end(whole, cut)
    assert json.loads((cut / "result.json").read_text())["accuracy_last"] == state(cut)["records"][-1]["test_accuracy"]


@pytest.mark.parametrize(("kept", "threads"), [(True, [1, 2]), (False, [None, 2])])
def test_a_result_tells_everything_that_has_trained_the_run(kept, threads, distil, save_dir):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with killed():
        distil("--batch_size", "8", "--epochs", "2")
    [cut] = save_dir.iterdir()
    if not kept:  # as an older version wrote it
        checkpoint = load(cut / "last.pth")
        del checkpoint["training"]["computed_by"]
        torch.save(checkpoint, cut / "last.pth")
    torch.set_num_threads(2)
    try:
        train_cifar_student.main(["--resume", str(cut)])
    finally:
        torch.set_num_threads(before)
    result = json.loads((cut / "result.json").read_text())
    assert (result["threads"], result["processes"]) == (threads, 1 if kept else [None, 1])


class Counting(KD):
    """KD that counts its epochs where it is saved."""

    name = "counting"

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.register_buffer("counted", torch.zeros(()))

    def main_stage(self, epochs):
        return super().main_stage(epochs)._replace(after_epoch=lambda progress: self.counted.add_(1))


def test_a_run_that_is_stopped_in_its_test_ends_as_if_it_had_not_been(distil, monkeypatch, capsys):
    """The steps of the epoch are saved, and its end is made once."""
    monkeypatch.setitem(DISTILLERS, "counting", Counting)
    flags = ("--batch_size", "8", "--epochs", "2", "--allow_teacher_gap")
    whole = distil(*flags, distill="counting")

    def stop(*_):
        raise StoppedAtOnce(signal.SIGTERM, "no step ended in time")

    with monkeypatch.context() as patch, pytest.raises(StoppedAtOnce):
        patch.setattr(run_module.Run, "_test", stop)
        distil(*flags, "--trial", "cut", "--seed", "1", distill="counting")
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    assert state(cut)["epoch"] == 0 and state(cut)["epoch_state"]["steps"] == 4
    train_cifar_student.main(["--resume", str(cut)])
    assert_same_end(whole, cut)
    assert state(cut)["distiller"]["counted"] == state(whole)["distiller"]["counted"] == 2


@pytest.mark.parametrize(("flags", "way_on"), [(("--epochs", "1"), "--epochs K"), (SHORT[2:], "--max_steps K")])
def test_a_finished_run_that_is_resumed_changes_nothing_and_says_so(distil, flags, way_on, capsys):
    run = distil("--batch_size", "8", *flags)
    before = load(run / "last.pth")
    assert "finished already" not in capsys.readouterr().out
    train_cifar_student.main(["--resume", str(run)])
    assert same_state(before, load(run / "last.pth")) and len(metrics(run)) == 1
    line = f"finished already ({run / 'result.json'}); {way_on} trains longer\n"
    assert line in capsys.readouterr().out and line in (run / "log.txt").read_text()


def test_a_finished_run_keeps_the_settings_that_it_was_trained_with(distil, capsys):
    run = distil("--epochs", "1", "--batch_size", "8", distill="kd")
    before = config_of(run)
    flags = ("--accumulate", "2", "--max_steps", "2", "--print_freq", "7")
    train_cifar_student.main(["--resume", str(run), *flags])
    changed = {name for name, value in config_of(run).items() if value != before[name]}
    assert changed == {"print_freq", "origins"}
    printed = capsys.readouterr().out
    for line in ("accumulate         2", "max_steps          2"):
        assert f"  {line}                        (not recorded: nothing is left to train with it)" in printed


def test_each_of_several_students_says_that_it_is_finished(distil, save_dir, capsys):
    flags = (*SHORT, "--trials", "2")
    distil(*flags, distill="kd")
    distil(*flags, "--resume", distill="kd")
    said = [line for line in capsys.readouterr().out.splitlines() if "finished already" in line]
    assert [line.split("] finished")[0] for line in said] == ["[trial 1", "[trial 2"]


def test_a_run_cannot_become_shorter_than_it_is(distil):
    run = distil("--batch_size", "16", "--epochs", "2")
    message = message_of(train_cifar_student.main, ["--resume", str(run), "--epochs", "1"])
    assert message.startswith("--epochs: 2 are trained already")


def test_momentum_is_dropped_at_a_milestone_and_not_where_the_epoch_behind_it_is_resumed(distil):
    flags = ("--batch_size", "8", "--epochs", "2", "--save_every_steps", "1", "--allow_teacher_gap")
    flags += ("--drop_momentum", "--lr_decay_epochs", "1")
    whole = distil(*flags, distill="kd")
    with killed_within_an_epoch():
        distil(*flags, "--trial", "cut", "--seed", "1", distill="kd")
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    train_cifar_student.main(["--resume", str(cut)])
    assert_same_end(whole, cut)


def test_steps_that_are_more_than_are_asked_for_now_end_the_run(distil, save_dir):
    with killed_within_an_epoch():
        distil("--batch_size", "8", "--epochs", "2", "--save_every_steps", "1", "--allow_teacher_gap", distill="kd")
    [run] = save_dir.iterdir()
    train_cifar_student.main(["--resume", str(run), "--max_steps", "5"])
    assert (state(run)["epoch"], state(run)["step"], len(metrics(run))) == (2, 6, 2)
    assert load(run / "last.pth")["record"]["max_steps"] == 5


def test_a_limit_that_cuts_nothing_off_is_no_try_out(distil):
    flags = ("--batch_size", "8", "--epochs", "1", "--allow_teacher_gap")
    for steps, recorded in (("3", 3), ("4", None)):
        run = distil(*flags, "--max_steps", steps, distill="kd")
        assert load(run / "last.pth")["record"]["max_steps"] == recorded


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
    save = RunFolder.save

    def fake(predict, loader, title):
        return {"test_accuracy": next(accuracies), "test_accuracy_top5": 0.0, "test_loss": 0.0}

    def save_then_stop(self, name, checkpoint):
        save(self, name, checkpoint)
        saves.append(name)
        if len(saves) == 3:  # two of the first epoch, and one of the second
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "evaluate", fake)
    monkeypatch.setattr(RunFolder, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train_teacher.main(["--model", "resnet8", "--epochs", "2", "--batch_size", "32", "--save_dir", str(tmp_path)])
    run = next(tmp_path.iterdir())
    [result] = train_teacher.main(["--resume", str(run)])
    best, last = load(run / "best.pth"), load(run / "last.pth")
    assert result["best_epoch"] == best["record"]["epoch"] == last["record"]["epoch"] == 2
    assert same_state(best["training"]["distiller"], last["training"]["distiller"])
    assert same_state(best["model"], last["model"])


def test_what_a_resumed_run_has_changed_is_what_it_goes_on_with(distil, capsys):
    run = distil("--batch_size", "16", "--epochs", "1", "--max_steps", "1")
    train_cifar_student.main(["--resume", str(run), "--epochs", "3", "--max_steps", "2"])
    assert "  epochs             3                        (was 1)" in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    assert (config["epochs"], config["max_steps"]) == (3, 2) and "resume" not in config
    assert config["origins"]["epochs"] == "command line" and config["origins"]["batch_size"] == "command line"
    before = (run / "config.json").read_text()
    train_cifar_student.main(["--resume", str(run)])
    assert (run / "config.json").read_text() == before


def test_what_was_measured_of_a_shorter_run_is_not_that_of_a_longer_one(distil, capsys):
    run = distil("--batch_size", "16", "--epochs", "1", "--max_steps", "1", distill="kd")
    (run / "fidelity.json").write_text("{}")
    train_cifar_student.main(["--resume", str(run)])
    assert (run / "fidelity.json").exists(), "nothing was trained"
    train_cifar_student.main(["--resume", str(run), "--epochs", "2", "--max_steps", "2"])
    assert not (run / "fidelity.json").exists() and "fidelity.json is removed" in capsys.readouterr().out


def test_a_teacher_that_has_moved_can_be_named_anew(distil, teacher_run, tmp_path):
    run = distil(*SHORT)
    moved = shutil.copy(teacher_run / "last.pth", tmp_path / "moved.pth")
    train_cifar_student.main(["--resume", str(run), "--path_t", str(moved)])
    assert json.loads((run / "config.json").read_text())["path_t"] == str(moved)


def test_a_student_is_resumed_by_the_script_of_students(distil, save_dir):
    run = distil(*SHORT)
    message = message_of(train_teacher.main, ["--resume", str(run), "--max_steps", "4"])
    assert message == "--resume: a student of a teacher is resumed by train_cifar_student.py"
    alone = new_run(train_teacher.main, save_dir, "--model", "resnet8", *SHORT)
    train_cifar_student.main(["--resume", str(alone), "--max_steps", "4"])
    assert metrics(alone)[-1]["step"] == 4


def test_a_file_on_record_that_is_gone_is_not_blamed_on_a_flag(distil, teacher_run, tmp_path):
    """Nobody gave the flag: the record is named, and the flag is the way out."""
    copy, weights = tmp_path / "copy.pth", tmp_path / "weights.txt"
    shutil.copy(teacher_run / "last.pth", copy)
    weights.write_text("".join(f"{digit} 1\n" for digit in range(10)))
    runs = (
        ("teacher", "--path_t", copy, distil(*SHORT, "--path_t", str(copy), teacher=False)),
        ("class weights", "--class_weights", weights, distil(*SHORT, "--class_weights", str(weights))),
    )
    for what, flag, file, run in runs:
        file.unlink()
        message = message_of(train_cifar_student.main, ["--resume", str(run)])
        assert message.startswith(f"the {what} on record: {file}") and flag in message
        given = message_of(train_cifar_student.main, ["--resume", str(run), flag, str(file)])
        assert given.startswith(f"{flag}: {file}")

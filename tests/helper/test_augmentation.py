"""Runs with augmentation, mixed images and classes that count differently: each flag, and exact resume."""

import pytest
import torch

import train_cifar_student
import train_teacher
from helper import loops
from helper.configuration import row_key
from helper.teacher import Teacher
from tests.conftest import killed_within_an_epoch, message_of
from tests.run_folders import assert_same_end, config_of, load, metrics, new_run, same_state, state, weights

pytestmark = pytest.mark.usefixtures("few_images")
ALL = (
    "--augment",
    "randaugment",
    "--colour_jitter",
    "0.4",
    "--random_erasing",
    "0.3",
    "--mixup",
    "0.3",
    "--cutmix",
    "1",
)
ALL += ("--label_smoothing", "0.1", "--balanced_sampling")
STEP = ("--model", "resnet8", "--batch_size", "8", "--max_steps", "1")


@pytest.fixture
def train(save_dir):
    """Call `train_teacher.py` for a step; returns the run folder, the newest."""
    return lambda *flags: new_run(train_teacher.main, save_dir, *STEP, *flags)


def test_a_run_that_is_stopped_within_an_epoch_ends_in_the_same_weights(distil):
    flags = ("--batch_size", "8", "--epochs", "2", "--save_every_steps", "1", *ALL)
    whole = distil(*flags, distill="kd")
    with killed_within_an_epoch():
        distil(*flags, "--trial", "cut", "--seed", "1", distill="kd")
    cut = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    assert state(cut)["epoch_state"]["steps"] == 2
    train_cifar_student.main(["--resume", str(cut)])
    assert_same_end(whole, cut)
    assert "besides crops and flips: policy randaugment" in (whole / "log.txt").read_text()


#: Every flag of the augmentation, and a value that is not its default.
FLAGS = {
    "--augment": "trivialaugment",
    "--colour_jitter": "0.4",
    "--random_erasing": "1",
    "--mixup": "0.2",
    "--cutmix": "1",
    "--label_smoothing": "0.1",
    "--class_weights": "balanced",
    "--balanced_sampling": None,
}


@pytest.mark.slow
def test_a_flag_changes_what_is_learnt_and_one_setting(train):
    without = train()
    before = config_of(without)
    for flag, value in FLAGS.items():
        with_it = train(flag, *([] if value is None else [value]), "--trial", f"with{flag}", "--seed", "1")
        after = config_of(with_it)
        changed = {name for name in before if before[name] != after[name]} - {"trial", "origins", "weights_digest"}
        assert {"--" + name for name in changed} == {flag}
        assert not same_state(weights(without), weights(with_it)), flag
    off = train("--no-balanced_sampling", "--mixup", "0", "--augment", "standard", "--trial", "off", "--seed", "1")
    assert same_state(weights(without), weights(off)), "given as it is by default it changes nothing"


def test_teacher_and_student_see_the_same_mixed_images_and_targets(distil, monkeypatch):
    seen = {"teacher": [], "student": [], "targets": []}
    call, add = Teacher.__call__, loops.forward_backward

    def teacher_sees(self, images, preact, is_whole):
        seen["teacher"].append(images)
        return call(self, images, preact, is_whole)

    def student_sees(method, stage, batch, *rest):
        seen["student"].append(batch.images)
        seen["targets"].append(batch.targets)
        return add(method, stage, batch, *rest)

    monkeypatch.setattr(Teacher, "__call__", teacher_sees)
    monkeypatch.setattr(loops, "forward_backward", student_sees)
    run = distil("--batch_size", "8", "--max_steps", "2", "--mixup", "1", "--accumulate", "2", distill="dkd")
    student, targets = seen["student"], torch.cat(seen["targets"])
    given = [images for images in seen["teacher"] if any(images is one for one in student)]
    assert len(student) == 4 and len(given) == 4
    assert targets.shape == (16, 10) and bool(((targets > 0).sum(1) == 2).any())
    assert torch.allclose(targets.sum(1), torch.ones(16))
    assert 0 <= metrics(run)[0]["train_accuracy"] <= 100


def test_runs_of_one_process_are_as_they_would_be_alone(distil):
    """Those whose batches differ take turns."""
    shared = ("--batch_size", "8", "--max_steps", "2", "--data_seed", "5", "--seed", "3")
    distil(*shared, "--sweep", "mixup=0,0.5", distill="kd")
    alone = distil(*shared, "--mixup", "0.5", distill="kd")
    both = next(path for path in alone.parent.iterdir() if "mixup0.5" in path.name)
    assert same_state(weights(both), weights(alone))


def test_class_weights_that_have_changed_are_refused(train, tmp_path):
    file = tmp_path / "weights.txt"
    file.write_text("\n".join(f"{digit} {digit + 1}" for digit in range(10)))
    run = train("--class_weights", str(file), "--epochs", "3")
    file.write_text("\n".join(f"{digit} {10 - digit}" for digit in range(10)))
    resume = ["--resume", str(run), "--max_steps", "2"]
    message = message_of(train_teacher.main, resume)
    assert f"--class_weights: {file} is not what {run} began with" in message
    train_teacher.main([*resume, "--accept_changes"])
    assert state(run)["step"] == 2
    other = train("--class_weights", str(file), "--epochs", "3", "--trial", "other")
    file.write_text("\n".join(f"{digit} {digit + 1}" for digit in range(10)))
    assert "began with" in message_of(train_teacher.main, [*resume[:3], "4"]), "what was accepted before is over"
    assert row_key(config_of(other)) != row_key(config_of(train("--class_weights", str(file), "--epochs", "3")))
    file.unlink()
    assert "cannot be read" in message_of(train_teacher.main, [*resume[:3], "4"])
    message = message_of(train_teacher.main, [*STEP, "--class_weights", str(file), "--save_dir", str(tmp_path / "no")])
    assert "--class_weights" in message and not any((tmp_path / "no").glob("*"))


def test_a_student_may_have_another_size_than_what_is_held_and_than_the_teacher(distil, monkeypatch):
    sizes, call = [], Teacher.__call__

    def teacher_sees(self, images, preact, is_whole):
        sizes.append(images.shape[-1])
        return call(self, images, preact, is_whole)

    monkeypatch.setattr(Teacher, "__call__", teacher_sees)
    run = distil("--batch_size", "8", "--max_steps", "2", "--image_size", "48", distill="kd")
    config, record = config_of(run), load(run / "last.pth")["record"]
    assert (config["image_size"], config["teacher_image_size"]) == (48, 32)
    assert (record["image_size"], record["source_size"]) == (48, 32)
    assert sizes == [32, 32], "it teaches on what it was trained on"
    train_cifar_student.main(["--resume", str(run), "--max_steps", "3"])
    assert state(run)["step"] == 3

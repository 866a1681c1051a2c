"""Several students in one process: the same numbers as alone, one teacher pass, everyone's own folder."""

import json
from pathlib import Path

import pytest

import train_cifar_student
import train_teacher
from errors import Stopped, UserError
from helper.distributed import StopRequest
from helper.run import Run
from helper.teacher import FrozenTeacher
from tests.conftest import keep_images, message_of
from tests.run_folders import assert_same_end, metrics, same_state, weights

#: Two epochs of four steps.
FLAGS = ("--batch_size", "8", "--epochs", "2")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    keep_images(monkeypatch, 32, 24)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Sizes of the batches that a teacher has answered in training."""
    sizes, forward = [], FrozenTeacher.forward

    def spied(self, images, preact=False):
        sizes.append(len(images))
        return forward(self, images, preact)

    monkeypatch.setattr(FrozenTeacher, "forward", spied)
    return sizes


@pytest.fixture
def train(teacher_run, save_dir):
    """Call the script with a small teacher; returns the run folders by name of the trial."""

    def call(*flags: str) -> dict[str, Path]:
        argv = ["--path_t", str(teacher_run / "last.pth"), "--allow_teacher_gap", "--save_dir", str(save_dir), *flags]
        student = () if any("model_s" in flag for flag in flags) else ("--model_s", "resnet8")
        train_cifar_student.main([*FLAGS, *student, *argv])
        return folders(save_dir)

    return call


def folders(root: Path) -> dict[str, Path]:
    return {json.loads((path / "config.json").read_text())["trial"]: path for path in sorted(root.iterdir())}


def same_weights(left: Path, right: Path) -> bool:
    return same_state(weights(left), weights(right))


@pytest.mark.slow
def test_trials_are_what_they_are_alone_and_share_the_teacher(train, passes, save_dir):
    together = train("--trials", "3", "--distill", "mlkd")  # mlkd draws from the global generators while training
    shared = passes.count(16)  # two views of 8 images
    assert sorted(together) == ["1", "2", "3"] and shared == 2 * 4
    assert [json.loads((together[name] / "config.json").read_text())["seed"] for name in "123"] == [1, 2, 3]
    assert not same_weights(together["1"], together["2"])
    for name in "123":
        single = f"alone{name}"
        alone = train("--trial", single, "--seed", name, "--data_seed", "1", "--distill", "mlkd")[single]
        assert_same_end(together[name], alone)


@pytest.mark.slow
@pytest.mark.parametrize("methods", ["kd,factor,hint", "fsp,crd,abound"])
def test_methods_with_and_without_a_stage_before_are_what_they_are_alone(train, save_dir, methods):
    """Stages put runs out of step: each still has its own numbers, bit for bit."""
    few = ("--epochs", "2", "--init_epochs", "1")
    contrast = {"crd": ("--nce_k", "8")}
    names = methods.split(",")
    flags = [] if "crd" not in names else ["nce_k=8"]
    train("--sweep", f"distill={methods}", "init_epochs=1", *flags, "model_s=resnet14")
    together = {json.loads((path / "config.json").read_text())["distill"]: path for path in save_dir.iterdir()}
    assert sorted(together) == sorted(names)
    for name in names:
        own = few if name not in ("kd", "hint", "crd") else few[:2]
        trial = f"alone_{name}"
        single = ("--trial", trial, "--seed", "1", "--distill", name, "--model_s", "resnet14")
        alone = train(*own, *contrast.get(name, ()), *single)[trial]
        assert_same_end(together[name], alone)


def test_a_sweep_trains_every_combination(train, passes):
    runs = train("--distill", "norm", "--sweep", "b=0.5,2", "co_sponge=1,4", "--max_steps", "2", "--fast", "auto")
    assert sorted(runs) == ["1_b0.5_cosponge1", "1_b0.5_cosponge4", "1_b2_cosponge1", "1_b2_cosponge4"]
    configs = {name: json.loads((run / "config.json").read_text()) for name, run in runs.items()}
    assert {(config["beta"], config["co_sponge"]) for config in configs.values()} == {
        (0.5, 1),
        (0.5, 4),
        (2, 1),
        (2, 4),
    }
    assert {config["seed"] for config in configs.values()} == {1}
    assert passes.count(8) == 2, "two steps, one teacher pass each"
    first, second = (metrics(runs[f"1_b{beta}_cosponge4"])[0]["loss_norm"] for beta in ("0.5", "2"))
    assert second > 3 * first


def test_values_that_hold_commas_can_be_swept(train):
    runs = train("--distill", "kd", "--sweep", "lr_decay_epochs=1,2;1", "--epochs", "2", "--max_steps", "1")
    assert sorted(runs) == ["1_lrdecayepochs1", "1_lrdecayepochs1_2"]
    assert json.loads((runs["1_lrdecayepochs1_2"] / "config.json").read_text())["lr_decay_epochs"] == [1, 2]


@pytest.mark.slow
def test_methods_and_networks_can_be_swept(train, passes, save_dir):
    train("--sweep", "distill=kd,attention,ofd", "model_s=resnet8,resnet14", "--max_steps", "2")
    assert len(list(save_dir.iterdir())) == 6
    # OFD reads the maps before their ReLU: a pass of its own.
    assert passes.count(8) == 2 * 2


def test_trials_without_a_teacher_differ_in_their_order_too(save_dir):
    train_teacher.main(["--model", "resnet8", "--trials", "2", "--max_steps", "1", "--save_dir", str(save_dir)])
    seeds = [json.loads((run / "config.json").read_text())["data_seed"] for run in folders(save_dir).values()]
    assert seeds == [1, 2]


@pytest.mark.slow
def test_trials_that_are_stopped_go_on_together(train, passes, monkeypatch):
    whole = train("--trials", "2", "--distill", "kd")
    asked, finish_step = [], Run.finish_step

    def ask_to_stop(self, number):
        finish_step(self, number)
        if self.epoch == 1 and number == 2:
            asked.append(15)

    names = ("--trials", "2", "--distill", "kd", "--trial", "11", "--seed", "1")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "finish_step", ask_to_stop)
        patch.setattr(StopRequest, "heard_by_any", lambda self: asked[0] if asked else None)
        train(*names)
    passes.clear()
    cut = train(*names, "--resume")
    assert passes.count(8) == 2, "both go on from the second step of the second epoch"
    assert same_weights(whole["1"], cut["11"]) and same_weights(whole["2"], cut["12"])


@pytest.mark.slow
def test_one_that_is_ahead_waits(train, passes, monkeypatch):
    """Runs that were killed at different moments meet again."""
    save_last, kept = Run._save_last, {}

    def save_and_keep(self, model, epoch_state):
        save_last(self, model, epoch_state)
        kept.setdefault((self.config.trial, self.epoch), (self.folder.path / "last.pth").read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save_last", save_and_keep)
        runs = train("--trials", "2", "--distill", "kd", "--epochs", "3")
    (runs["1"] / "last.pth").write_bytes(kept["1", 1])
    (runs["2"] / "last.pth").write_bytes(kept["2", 2])
    passes.clear()
    train("--trials", "2", "--distill", "kd", "--epochs", "3", "--resume")
    assert passes.count(8) == 4 + 4, "the last epoch is shared again"


@pytest.mark.slow
def test_one_that_fails_does_not_stop_the_others(train, save_dir):
    with pytest.raises(UserError) as caught:
        train("--sweep", "b=1,1e30", "--distill", "norm")
    assert "trial 1_b1e30: " in str(caught.value) and "diverged" in str(caught.value)
    runs = folders(save_dir)
    assert (runs["1_b1"] / "result.json").exists() and not (runs["1_b1e30"] / "result.json").exists()
    assert (runs["1_b1e30"] / "log.txt").read_text().splitlines()[-1].startswith("failed: ")
    assert_same_end(runs["1_b1"], train("--trial", "alone", "--seed", "1", "--distill", "norm", "-b", "1")["alone"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sweep", "b"], "b=0.5,1"),
        (["--sweep", "nonsense=1"], "nonsense=1"),
        (["--sweep", "b=one"], "-b"),
        (["--sweep", "device=cpu"], "the same for all"),
        (["--sweep", "b=1,2", "-b", "1"], "given twice"),
        (["--sweep", "b=1,2", "beta=1"], "given twice"),
        (["--trials", "2", "--trial", "x"], "must be a number"),
        (["--trials", "0"], "--trials"),
        (["--trials", "2", "--resume", "save/x"], "leave its value out"),
        (["--sweep", "distill=kd,nonsense"], "nonsense"),
        (["--distill", "kd", "--sweep", "co_sponge=4,8"], "co_sponge: not used by any"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(flags, words, teacher_run, save_dir):
    argv = [
        *FLAGS,
        "--model_s",
        "resnet8",
        "--path_t",
        str(teacher_run / "last.pth"),
        "--save_dir",
        str(save_dir),
        *flags,
    ]
    assert words in message_of(train_cifar_student.main, argv)
    assert not save_dir.exists()


def test_runs_that_go_on_together_have_the_same_data(train):
    train("--trial", "1", "--holdout", "16", "--max_steps", "1", *FLAGS)
    train("--trial", "2", "--max_steps", "1", *FLAGS)
    with pytest.raises(UserError, match=r"has holdout 16, .*trial2_try 0; they cannot train in one process"):
        train("--trials", "2", "--resume", "--max_steps", "2")


def test_runs_whose_changes_are_accepted_are_resumed_alone(train):
    """Each keeps the mean and deviation with which it began, and those of a process are one."""
    train("--trials", "2", "--max_steps", "1", *FLAGS)
    with pytest.raises(UserError, match=r"--accept_changes: resume each run alone"):
        train("--trials", "2", "--resume", "--accept_changes", "--max_steps", "2")


def test_runs_are_told_apart_on_the_terminal(train, capsys):
    train("--sweep", "distill=kd,hint", "--max_steps", "1", *FLAGS)
    lines = [line for line in capsys.readouterr().out.splitlines() if "test accuracy" in line]
    assert ["_kd_" in line for line in lines] == [True, False] and "_hint_" in lines[1]

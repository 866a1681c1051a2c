"""Flags of the training: each does what it says and nothing else, and a run with all of them resumes exactly."""

import json
import re
import sys

import pytest
import torch
from torch import nn

import train_cifar_student
import train_teacher
from distiller_zoo.kd import KD
from errors import UserError
from helper import fast, inputs, optim
from helper.networks import read_network
from models.cost import count_parameters
from scripts import export_student
from tests.conftest import keep_images, killed_within_an_epoch, message_of
from tests.run_folders import assert_same_end, load, metrics, new_run, same_state, state, weights

STEPS = ("--model", "resnet8", "--batch_size", "8")
GAP = "--allow_teacher_gap"  # few images to test on
SMALL_RATE = ("--learning_rate", "0.01")
ADAMW = ("--optimizer", "adamw", "--learning_rate", "0.01", "--lr_decay", "cos", "--lr_warmup_epochs", "1")
ADAMW += ("--min_learning_rate", "0.001", "--clip_grad", "0.5", "--ema_decay", "0.9")
MIXED = ("--mixup", "0.3", "--augment", "randaugment")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """Four steps of 8 in an epoch, and few images to test on."""
    keep_images(monkeypatch, 32, 16)


@pytest.fixture
def train(save_dir):
    """Call `train_teacher.py`; returns the run folder, the newest."""
    return lambda *flags: new_run(train_teacher.main, save_dir, *STEPS, *flags)


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    """The way of float16, gradient scaler and all, in a precision that a CPU computes."""
    monkeypatch.setattr(inputs, "check_precision", lambda precision, device: None)
    monkeypatch.setitem(fast.PRECISIONS, "float16", torch.bfloat16)


def refused(*flags: str) -> str:
    return message_of(train_teacher.main, [*STEPS, *flags])


def result(run) -> dict:
    return json.loads((run / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (*ADAMW, *MIXED),
        pytest.param(("--optimizer", "lamb", "--lr_decay", "one_cycle", *SMALL_RATE), marks=pytest.mark.slow),
        pytest.param(("--optimizer", "adan", "--lr_decay", "cos", *SMALL_RATE), marks=pytest.mark.slow),
        pytest.param(("--precision", "float16", "--ema_decay", "0.5"), marks=pytest.mark.slow),
    ],
    ids=lambda flags: flags[1],
)
def test_a_run_that_is_stopped_within_an_epoch_ends_in_the_same_weights(distil, as_if_on_gpu, flags):
    flags = ("--batch_size", "8", "--epochs", "2", *flags)
    whole = distil(GAP, *flags, distill="kd")
    with killed_within_an_epoch():
        distil(GAP, *flags, "--trial", "cut", "--seed", "1", "--save_every_steps", "1", distill="kd")
    other = next(path for path in whole.parent.iterdir() if path.name.endswith("trialcut"))
    assert state(other)["epoch_state"]["steps"] == 2
    train_cifar_student.main(["--resume", str(other)])
    assert_same_end(whole, other)
    for name in ("ema", "scaler", "overflows"):
        assert same_state(state(whole).get(name), state(other).get(name)), name
    assert ("ema" in state(whole)) == ("--ema_decay" in flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--clip_grad", "1e9"),
        ("--min_learning_rate", "1e-9"),
        ("--ema_decay", "0.9"),
        ("--best_by", "loss"),
        ("--recipe", "tables"),
        ("--freeze", "none"),
    ],
    ids=lambda flags: flags[0],
)
def test_what_a_flag_does_not_say_stays(train, flags):
    limits = ("--epochs", "1", "--max_steps", "2")
    plain, other = weights(train(*limits)), weights(train(*limits, *flags))
    assert same_state(plain, other)


@pytest.mark.parametrize("schedule", ["cos", "one_cycle"])
def test_momentum_is_dropped_at_milestones_alone(train, schedule):
    flags = ("--epochs", "2", "--batch_size", "32", "--lr_decay", schedule)
    assert same_state(weights(train(*flags)), weights(train(*flags, "--drop_momentum")))


def test_norms_and_biases_are_spared_the_weight_decay(train):
    flags = ("--max_steps", "1", "--momentum", "0", "--seed", "1", "--no-decay_norms", "--weight_decay")
    plain, decayed = (weights(train(*flags, decay, "--trial", f"decay{decay}")) for decay in ("0", "0.5"))
    spared = {name for name, value in plain.items() if torch.equal(value, decayed[name])}
    assert spared == {name for name, value in plain.items() if value.dim() <= 1}


def test_the_gradient_is_scaled_down_to_its_norm(train, monkeypatch):
    step, norms = torch.optim.SGD.step, []

    def note(self, *arguments):
        gradients = [one.grad for one in optim.parameters_of(self)]
        norms.append(float(nn.utils.get_total_norm(gradients)))
        step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    train("--max_steps", "2", "--clip_grad", "0.01")
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_rates_of_a_run_with_warm_up_floor_and_one_cycle(train, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def note(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    run = train("--epochs", "3", "--learning_rate", "0.08", "--lr_warmup_epochs", "1", "--lr_decay_epochs", "2")
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, *[0.08] * 4, *[0.008] * 4])
    assert [record["learning_rate"] for record in metrics(run)] == pytest.approx([0.08, 0.08, 0.008])
    rates.clear()
    train("--epochs", "1", "--learning_rate", "0.08", "--lr_decay", "one_cycle", "--min_learning_rate", "0.001")
    assert rates == [optim.one_cycle_learning_rate(0.08, number, 4, 0.001) for number in range(4)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lr_warmup_epochs", "3", "--epochs", "2"), "--lr_warmup_epochs: 3 are more than --epochs 2"),
        (("--lr_warmup_epochs", "1", "--lr_decay", "one_cycle"), "one_cycle has its own rise"),
        (("--min_learning_rate", "1", "--learning_rate", "0.1"), "--min_learning_rate: 1 is above --learning_rate 0.1"),
        (("--patience", "2"), "--patience: the test images must not decide .* --holdout K"),
        (("--precision", "float16", "--device", "cpu"), "--precision float16: a CPU emulates it"),
        (("--drop_rate", "0.1"), "--drop_rate: resnet8 has no dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_cannot_be_is_refused(save_dir, flags, message):
    assert re.search(message, said := refused("--save_dir", str(save_dir), *flags)), said
    assert not save_dir.exists() or not list(save_dir.iterdir())


def test_an_optimizer_of_timm_says_where_timm_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    assert "--optimizer lamb: it is timm's, which is not installed" in refused("--optimizer", "lamb")


# The moving average.


def test_the_moving_average_is_that_of_the_weights_after_every_step(train):
    limits = ("--epochs", "1", "--seed", "1", "--ema_decay", "0.75")
    runs = [train(*limits, "--max_steps", str(number), "--trial", str(number)) for number in (1, 2, 3)]
    first, second, third = map(weights, runs)
    for name, value in state(runs[2])["ema"].items():
        if value.is_floating_point():
            expected = 0.75 * (0.75 * first[name] + 0.25 * second[name]) + 0.25 * third[name]
            torch.testing.assert_close(value, expected)
    (record,) = metrics(runs[2])
    assert {"test_accuracy", "test_accuracy_ema", "test_loss_ema"} <= record.keys()
    assert result(runs[2])["accuracy_last_ema"] == record["test_accuracy_ema"]
    assert f"test of EMA {record['test_accuracy_ema']:.2f} %" in (runs[2] / "log.txt").read_text()


def test_the_moving_average_can_teach_and_start_a_student(train, capsys):
    run = train("--max_steps", "3", "--ema_decay", "0.9", "--epochs", "1")
    path, saved = str(run / "last.pth"), load(run / "last.pth")
    raw, average = (read_network(path, None, "--path_t", "--model_t", ema) for ema in (False, True))
    assert same_state(dict(raw.network.state_dict()), saved["model"])
    assert same_state(dict(average.network.state_dict()), saved["model_ema"])
    assert raw.digest != average.digest == average.record["digest"]
    assert average.accuracy == metrics(run)[0]["test_accuracy_ema"] and raw.accuracy == metrics(run)[0]["test_accuracy"]
    assert "--ema takes the average" in " ".join(raw.notes) and not average.notes
    student = train("--max_steps", "1", "--init", path, "--ema", "--learning_rate", "0", "--trial", "2")
    assert torch.equal(weights(student)["student.conv1.weight"], saved["model_ema"]["conv1.weight"])
    trained = export_student.read_trained(path, None, None, ema=True)
    assert same_state(dict(trained.method.student.state_dict()), saved["model_ema"])
    plain = train("--max_steps", "1", "--trial", "3")
    message = message_of(export_student.main, [str(plain / "last.pth"), "--ema"])
    assert "holds no moving average of weights for --ema; --ema_decay D trains one" in message
    same = read_network(str(plain / "last.pth"), None, "--path_t", "--model_t", ema=True)
    assert "one set of weights" in " ".join(same.notes)


# What is trained, and until when.


def test_a_frozen_trunk_keeps_weights_and_statistics(distil):
    flags = (GAP, "--batch_size", "8", "--epochs", "1", "--freeze", "trunk")
    runs = [distil(*flags, "--max_steps", str(n), distill="hint") for n in (1, 3)]
    short, long = map(weights, runs)
    changed = {name for name in short if not torch.equal(short[name], long[name])}
    assert {name for name in changed if name.startswith("student.")} == {"student.fc.weight", "student.fc.bias"}
    assert changed - {"student.fc.weight", "student.fc.bias"}, "what the method adds is trained"


def test_a_stage_that_trains_the_trunk_alone_is_refused(distil):
    with pytest.raises(UserError, match="--freeze trunk: stage features of --distill fsp"):
        distil(GAP, "--max_steps", "1", "--freeze", "trunk", distill="fsp")


def test_a_linear_probe_says_how_much_it_trains(train):
    run = train("--max_steps", "1", "--freeze", "trunk")
    assert result(run)["parameters_trained"] == 650 == count_parameters(nn.Linear(64, 10))
    assert "trained: 650 parameters" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_ends_when_its_patience_does(train):
    still = ("--learning_rate", "0", "--freeze", "trunk", "--holdout", "10", "--lr_decay", "step")
    run = train(*still, "--epochs", "6", "--patience", "2")
    assert len(metrics(run)) == 3 and result(run)["best_epoch"] == 1 and result(run)["epochs"] == 3
    assert "stopped early: no better accuracy in 2 epochs" in (run / "log.txt").read_text()
    train_teacher.main(["--resume", str(run), "--patience", "0", "--epochs", "4"])
    assert len(metrics(run)) == 4
    for limit in (("--epochs", "3"), ("--epochs", "6", "--max_steps", "9")):  # the epochs end then anyway
        ended = train(*still, *limit, "--patience", "2")
        assert len(metrics(ended)) == 3 and "stopped early" not in (ended / "log.txt").read_text()


def test_the_file_of_class_weights_is_read_once(train, tmp_path, monkeypatch):
    (tmp_path / "weights.txt").write_text("".join(f"{digit} {1 + digit}\n" for digit in range(10)))
    read, texts = inputs.class_weights, []
    monkeypatch.setattr(inputs, "class_weights", lambda how, *rest: texts.append(how) or read(how, *rest))
    flags = ("--class_weights", str(tmp_path / "weights.txt"), "--max_steps", "1")
    train(*flags, "--trials", "2", "--trial", "8")
    assert texts == [str(tmp_path / "weights.txt")]


# float16.


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]
)
def float16(request):
    """The flags of float16 on a device: a GPU, where there is one, or as if on one."""
    if request.param == "cpu":
        request.getfixturevalue("as_if_on_gpu")
    return ("--precision", "float16", "--device", request.param)


def test_float16_trains_with_scaled_losses(distil, float16):
    """The losses are those of float32, up to rounding, and so are the weights, which stay in it."""
    limits = ("--epochs", "1", "--batch_size", "8", "--learning_rate", "0.01")
    whole, half = (distil(GAP, *limits, *flags, distill="kd") for flags in (float16[2:], float16))
    assert metrics(half)[0]["loss"] == pytest.approx(metrics(whole)[0]["loss"], rel=0.1)
    assert metrics(half)[0].get("overflowed_steps", 0) < 4 and state(half)["scaler"]["scale"] > 1
    for name, value in weights(half).items():
        assert value.isfinite().all() and value.dtype == weights(whole)[name].dtype, name


def test_a_step_that_overflows_is_skipped_and_counted(distil, monkeypatch, float16):
    limits = ("--epochs", "1", "--batch_size", "8", *float16)
    first = state(distil(GAP, *limits, "--max_steps", "1", distill="kd"))
    calls, losses = iter(range(1, 100)), KD.losses

    def overflowing(self, *arguments):
        terms = losses(self, *arguments)
        if next(calls) == 2:
            terms["kd"].register_hook(lambda gradient: gradient * torch.inf)
        return terms

    monkeypatch.setattr(KD, "losses", overflowing)
    run = distil(GAP, *limits, "--max_steps", "2", distill="kd")
    second = state(run)
    trained = [name for name, value in first["distiller"].items() if "running" not in name and "num_" not in name]
    for name in trained:  # a GPU may round the first step in two ways
        assert torch.allclose(first["distiller"][name], second["distiller"][name], rtol=0, atol=1e-5), name
    assert second["scaler"]["scale"] == first["scaler"]["scale"] / 2
    assert metrics(run)[0]["overflowed_steps"] == second["overflows"] == first["overflows"] + 1
    assert "step 2/2 skipped" in (run / "log.txt").read_text()


def test_a_loss_that_is_not_finite_is_no_overflow(distil, monkeypatch, float16):
    losses = KD.losses
    monkeypatch.setattr(
        KD, "losses", lambda self, *arguments: losses(self, *arguments) | {"kd": torch.tensor(torch.nan)}
    )
    with pytest.raises(UserError, match="loss_kd is nan"):
        distil(GAP, "--epochs", "1", "--max_steps", "1", *float16, distill="kd")

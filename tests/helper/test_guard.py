"""Numbers that are not finite, and what is the teacher's: found, named, never mixed up."""

import json
import re

import pytest
import torch
from torch import nn

import train_cifar_student
from distiller_zoo import find_distiller
from distiller_zoo.kd import KD
from errors import UserError
from helper import run as run_module
from helper.optim import Guard
from helper.teacher import FrozenTeacher
from models import build_model
from tests.conftest import keep_images, message_of
from tests.run_folders import load, metrics, same_state, state

FLAGS = ("--allow_teacher_gap", "--batch_size", "8", "--epochs", "2")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    """Three steps of 8 in an epoch."""
    keep_images(monkeypatch, 24, 16)


@pytest.fixture
def poison(monkeypatch):
    """Make the loss `name` of a method's calls of these numbers, from 1, what `change` makes of it."""

    def apply(distill, name, calls, change):
        method, count = find_distiller(distill), iter(range(1, 1000))
        losses = method.losses

        def poisoned(self, *arguments):
            terms = losses(self, *arguments)
            return terms | ({name: change(terms[name])} if next(count) in calls else {})

        monkeypatch.setattr(method, "losses", poisoned)

    return apply


class InfiniteGradient(torch.autograd.Function):
    """A finite value with an infinite gradient."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def with_infinite_gradient(loss):
    return InfiniteGradient.apply(loss)


def run_folder(save_dir):
    (run,) = save_dir.iterdir()
    return run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda loss: loss * torch.nan, "loss_kd is nan"),
        (lambda loss: loss + torch.inf, "loss_kd is inf"),
        (with_infinite_gradient, "the gradient is (inf|nan)"),
    ],
)
def test_the_first_bad_step_is_named_and_the_good_checkpoint_stays(distil, poison, save_dir, change, said):
    poison("kd", "kd", {5, 6}, change)
    with pytest.raises(UserError) as caught:
        distil(*FLAGS, "--save_every_steps", "1", distill="kd")
    assert re.search(f"{said} in epoch 2/2 step 2: .* lower --learning_rate or", str(caught.value))
    run = run_folder(save_dir)
    training = state(run)
    assert (training["epoch"], training["epoch_state"]["steps"]) == (1, 1)
    for saved in (training["distiller"], load(run / "last.pth")["model"]):
        assert all(value.isfinite().all() for value in saved.values())
    assert len(metrics(run)) == 1


def test_a_bad_step_stops_the_run_at_the_next_line_of_the_log(distil, poison):
    """Nothing waits for the device in between, but an epoch of hours is not trained on in vain."""
    steps = []
    poison("kd", "kd", {1}, lambda loss: loss * torch.nan)
    losses = KD.losses  # poisoned
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="loss_kd is nan in epoch 1/2 step 1:"):
        patch.setattr(KD, "losses", lambda self, *arguments: steps.append(1) or losses(self, *arguments))
        distil(*FLAGS, "--print_freq", "2", distill="kd")
    assert len(steps) == 2


def test_weights_that_a_finite_step_has_ruined_are_not_saved(distil, monkeypatch, save_dir):
    step = torch.optim.SGD.step
    steps = iter(range(1, 1000))

    def ruin(self, *arguments):
        step(self, *arguments)
        if next(steps) == 6:  # the last of the second epoch
            self.param_groups[0]["params"][0].data.flatten()[0] = torch.inf

    monkeypatch.setattr(torch.optim.SGD, "step", ruin)
    with pytest.raises(UserError, match=r"student\.conv1\.weight is not finite after epoch 2/2"):
        distil(*FLAGS, distill="kd")
    assert state(run_folder(save_dir))["epoch"] == 1


def test_a_first_stage_names_its_own_learning_rate(distil):
    flags = (*FLAGS, "--init_epochs", "1", "--init_learning_rate", "1e29")
    with pytest.raises(UserError, match=r"in paraphraser epoch 1/1 step \d.*lower --init_learning_rate"):
        distil(*flags, distill="factor")


@pytest.mark.parametrize("change", [lambda loss: loss * torch.nan, with_infinite_gradient])
@pytest.mark.parametrize(("distill", "flags"), [("kd", ()), ("crd", ("--nce_k", "16"))])
def test_a_skipped_step_changes_nothing(distil, monkeypatch, poison, distill, flags, change):
    """The run is stopped behind its second step: with that one skipped, only the counters and random numbers move."""
    limits = (*FLAGS[:-1], "1", *flags)
    first = state(distil(*limits, "--max_steps", "1", distill=distill))
    poison(distill, distill, {2}, change)
    run = distil(*limits, "--max_steps", "2", "--max_bad_steps", "1", distill=distill)
    second = state(run)
    assert same_state(first["distiller"], second["distiller"])
    assert same_state(first["optimizer"], second["optimizer"])
    assert (second["step"], second["skipped_steps"]) == (2, 1)
    (record,) = metrics(run)
    assert record["skipped_steps"] == 1 and torch.tensor(record["loss"]).isfinite()
    assert "epoch 1/1 step 2/2 skipped" in (run / "log.txt").read_text()


def test_no_more_steps_are_skipped_than_allowed(distil, poison, save_dir):
    poison("kd", "kd", {2, 4, 6}, lambda loss: loss * torch.nan)
    with pytest.raises(UserError, match=r"loss_kd is nan in epoch 2/2 step 3 \(2 such steps were skipped before\)"):
        distil(*FLAGS, "--max_bad_steps", "2", distill="kd")
    assert state(run_folder(save_dir))["skipped_steps"] == 1  # that of the first epoch


def test_skipped_steps_count_on_in_a_resumed_run(distil, poison, save_dir):
    poison("kd", "kd", {2, 6}, lambda loss: loss * torch.nan)
    run = distil(*FLAGS[:-1], "1", "--max_bad_steps", "1", distill="kd")
    with pytest.raises(UserError, match="1 such steps were skipped before"):
        train_cifar_student.main(["--resume", str(run), "--epochs", "2"])


def test_an_epoch_without_a_good_step_stops_the_run(distil, poison):
    poison("kd", "kd", set(range(100)), lambda loss: loss * torch.nan)
    with pytest.raises(UserError, match="--max_bad_steps: every step of epoch 1/2 was skipped"):
        distil(*FLAGS, "--max_bad_steps", "50", "--print_freq", "1", distill="kd")


def test_nothing_waits_for_the_device_until_it_is_asked():
    guard, weight = Guard(), nn.Parameter(torch.ones(3))
    guard.begin_epoch("epoch 1/1", False)

    class Waits(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            assert name not in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "nonzero"), name
            return function(*args, **(kwargs or {}))

    with Waits():
        for number, value in enumerate([1.0, 1.0, torch.nan, 1.0, torch.inf], 1):
            weight.grad = torch.full((3,), value)
            assert guard.judge({"ce": torch.tensor(2.0)}, [weight], torch.tensor(float(number)))
    with pytest.raises(UserError, match="the gradient is nan in epoch 1/1 step 3"):
        guard.look()


def test_a_test_loss_that_is_not_finite_leaves_metrics_that_can_be_read(distil, monkeypatch, save_dir):
    evaluate = run_module.evaluate
    monkeypatch.setattr(run_module, "evaluate", lambda *arguments: evaluate(*arguments) | {"test_loss": float("inf")})
    run = distil(*FLAGS, "--max_steps", "1", distill="kd")
    (line,) = (run / "metrics.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(line, parse_constant=refuse)["test_loss"] is None


# The teacher.


def test_a_teacher_cannot_be_trained():
    network = build_model("resnet8", 10)
    teacher = FrozenTeacher(network)
    images = torch.randn(4, 3, 32, 32)
    before = teacher(images).logits
    teacher.train().requires_grad_(True)
    nn.ModuleList([teacher]).train().requires_grad_(True)
    network.train().requires_grad_(True)  # whoever holds the original cannot reach the copy
    assert not any(module.training for module in teacher.modules())
    with torch.no_grad():
        network.conv1.weight.add_(1)
        network(images)
    output = teacher(images)
    assert torch.equal(output.logits, before) and not output.logits.requires_grad
    assert not list(teacher.parameters())
    assert not any(value.requires_grad for value in teacher.state_dict(keep_vars=True).values())


def test_a_method_that_would_train_the_teacher_is_refused(distil, monkeypatch, save_dir):
    construct = KD.__init__

    def keep(self, student, teacher, task, **hyper_parameters):
        construct(self, student, teacher, task, **hyper_parameters)
        self.head = teacher.get_classifier()  # not a copy

    monkeypatch.setattr(KD, "__init__", keep)
    with pytest.raises(UserError, match=r"--distill kd: its head\.weight is the teacher's own"):
        distil(*FLAGS, distill="kd")
    assert not save_dir.exists()


def test_a_student_that_is_the_teacher_is_refused(teacher_run, save_dir, monkeypatch):
    networks, prepare = [], train_cifar_student.prepare_teacher

    def remember(*arguments):
        networks.append(prepare(*arguments))
        return networks[-1]

    monkeypatch.setattr(train_cifar_student, "prepare_teacher", remember)
    monkeypatch.setattr(run_module, "build_model", lambda *arguments: networks[-1].network)
    argv = [*FLAGS, "--distill", "kd", "--model_s", "resnet14", "--path_t", str(teacher_run / "last.pth")]
    assert "is the teacher's own" in message_of(train_cifar_student.main, [*argv, "--save_dir", str(save_dir)])


def test_steps_of_one_epoch_may_have_other_terms():
    """SemCKD leaves its attention out of a shorter last batch."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    guard = Guard()
    guard.begin_epoch("epoch 1/1", has_own_rate=False)
    two, one = {"ce": torch.tensor(1.0), "semckd": torch.tensor(1.0)}, {"ce": torch.tensor(1.0)}

    def judge(*losses):
        for number, terms in enumerate(losses, 1):
            assert guard.judge(terms, [parameter], torch.tensor(float(number)))

    judge(two, one)
    guard.look()
    bad = torch.tensor(torch.nan)
    for third, fourth in (({"ce": bad}, two), ({"ce": bad}, two | {"ce": bad}), (two | {"ce": bad}, one)):
        judge(two, one, third, fourth)
        with pytest.raises(UserError, match="loss_ce is nan in epoch 1/1 step 3"):
            guard.look()
        guard.begin_epoch("epoch 1/1", has_own_rate=False)
        guard.look()

"""Learning rates: pure functions of the epoch, those of the published runs."""

import copy
from types import SimpleNamespace

import pytest
import torch

from helper.optim import (
    SCHEDULES,
    cosine_learning_rate,
    make_optimizer,
    restore_optimizer,
    step_learning_rate,
    warm_up,
)
from tests.run_folders import metrics


def test_learning_rates_are_those_of_the_recipe():
    rates = [step_learning_rate(0.05, epoch, (150, 180, 210), 0.1) for epoch in (1, 150, 151, 180, 181, 210, 211, 240)]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])
    assert cosine_learning_rate(0.1, 0, 10, 100) == 0.1
    assert cosine_learning_rate(0.1, 5, 10, 10**9) == pytest.approx(0.05)


def test_the_cosine_never_rises_again():
    for steps in (1, 2, 5):
        rates = [cosine_learning_rate(0.1, epoch, 100, steps) for epoch in range(100)]
        assert rates == sorted(rates, reverse=True)


def rates(epochs: int, steps: int, **settings) -> list[float]:
    """Every rate of a run."""
    defaults = {"lr_decay": "cos", "learning_rate": 1.0, "lr_warmup_epochs": 0, "min_learning_rate": 0.0}
    config = SimpleNamespace(**defaults | {"lr_decay_epochs": (2,), "lr_decay_rate": 0.1} | settings)
    return [
        warm_up(epoch, step, steps, config.lr_warmup_epochs)
        * SCHEDULES[config.lr_decay](config.learning_rate, epoch, config, epochs, steps, step)
        for epoch in range(1, epochs + 1)
        for step in range(steps)
    ]


@pytest.mark.parametrize(("epochs", "steps"), [(1, 20), (5, 8), (2, 1)])
def test_one_cycle_is_torchs(epochs, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, epochs * steps, cycle_momentum=False)
    theirs = []
    for _ in range(epochs * steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(theirs) < epochs * steps else None
    assert rates(epochs, steps, lr_decay="one_cycle") == pytest.approx(theirs)


def test_warm_up_goes_by_steps_and_the_cosine_takes_the_rest():
    found = rates(3, 1000, lr_warmup_epochs=1)
    assert found[:2] == pytest.approx([0.001, 0.002]) and found[999] == 1.0
    assert found[1000:2000] == [1.0] * 1000 and found[2000] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.usefixtures("few_images")
def test_the_rate_of_a_first_stage_does_not_warm_up(distil):
    flags = ("--batch_size", "8", "--epochs", "2", "--lr_warmup_epochs", "2", "--allow_teacher_gap")
    first, second, _ = metrics(distil(*flags, "--init_epochs", "1", distill="fsp"))
    assert (first["stage"], first["learning_rate"], second["learning_rate"]) == ("features", 0.05, 0.025)
    [cut] = metrics(distil(*flags, "--max_steps", "2", distill="kd"))
    assert cut["learning_rate"] == 0.0125, "that of the last step that was made, of 8"


def test_no_schedule_falls_below_its_floor():
    assert rates(4, 1, lr_decay="step", min_learning_rate=0.5) == [1.0, 1.0, 0.5, 0.5]
    for schedule in ("cos", "one_cycle"):
        found = rates(200, 2, lr_decay=schedule, min_learning_rate=0.02)
        assert min(found) >= 0.02 and found[-1] == pytest.approx(0.02, abs=1e-3)


@pytest.mark.parametrize("name", ["lamb", "adan", "adamw", "sgd"])
def test_an_optimizer_is_taken_up_where_it_was(name):
    config = SimpleNamespace(optimizer=name, momentum=0.9, nesterov=False, weight_decay=0.1, compile="off")
    config.fused_optimizer = False
    config.decay_norms = False
    gradients = torch.randn(5, 4, 3)

    def step(module, optimizer, gradient):
        module.weight.grad, module.bias.grad = gradient.clone(), gradient[:, 0].clone()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
        optimizer.step()

    module = torch.nn.Linear(3, 4)
    optimizer = make_optimizer(module, config)
    for gradient in gradients[:3]:
        step(module, optimizer, gradient)
    other, saved = copy.deepcopy(module), copy.deepcopy(optimizer.state_dict())
    resumed = make_optimizer(other, config)
    restore_optimizer(resumed, saved["state"], saved["param_groups"])
    for gradient in gradients[3:]:
        step(module, optimizer, gradient)
        step(other, resumed, gradient)
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)
    saved["param_groups"][0]["count"] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        restore_optimizer(resumed, saved["state"], saved["param_groups"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_its_formula(nesterov):
    config = SimpleNamespace(optimizer="sgd", momentum=0.9, nesterov=nesterov, weight_decay=0.1, compile="off")
    config.fused_optimizer, config.decay_norms = False, True
    layer = torch.nn.Linear(3, 1, bias=False)
    optimizer, expected, velocity = make_optimizer(layer, config), layer.weight.detach().clone(), 0.0
    optimizer.param_groups[0]["lr"] = 0.5
    for gradient in torch.randn(3, 1, 3):
        layer.weight.grad = gradient.clone()
        optimizer.step()
        decayed = gradient + 0.1 * expected
        velocity = 0.9 * velocity + decayed
        expected = expected - 0.5 * (decayed + 0.9 * velocity if nesterov else velocity)
        assert torch.allclose(layer.weight, expected, rtol=1e-5)

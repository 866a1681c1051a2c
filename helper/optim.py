"""Optimizers and learning rate schedules, a row each; rates are pure functions of the epoch, so there is no scheduler
state to save."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError


def _sgd(groups: list[dict], config: Any) -> torch.optim.Optimizer:
    if config.nesterov and not config.momentum:
        raise UserError("--nesterov: needs --momentum above 0")
    return torch.optim.SGD(
        groups,
        lr=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=config.fused_optimizer or None,
    )


def _adamw(groups: list[dict], config: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay, fused=config.fused_optimizer or None)


#: Name -> function (parameter groups, configuration) -> the optimizer; its rate is set before every epoch.
OPTIMIZERS: dict[str, Callable[[list[dict], Any], torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}


def make_optimizer(module: nn.Module, config: Any) -> torch.optim.Optimizer:
    """The run's optimizer of everything in `module` that is to have a gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict] = [{"params": trained}]
    if not config.decay_norms:  # one-dimensional: BatchNorm's weights, and biases
        groups = [{"params": [one for one in trained if one.dim() > 1]}]
        groups.append({"params": [one for one in trained if one.dim() <= 1], "weight_decay": 0.0})
    return OPTIMIZERS[config.optimizer](groups, config)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that an optimizer trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def step_learning_rate(base: float, epoch: int, milestones: Sequence[int], rate: float) -> float:
    """base * rate^(milestones before `epoch`): of 150, 180, 210 epoch 150 is the last at the base rate."""
    return base * rate ** sum(epoch > milestone for milestone in milestones)


def cosine_learning_rate(base: float, epochs_over: int, epochs: int, steps_per_epoch: int) -> float:
    """Half a cosine over the run, set once per epoch; `epochs_over` counts from 0.

    The phase is that of the official NORM code, one step in an epoch ahead; where an epoch has few steps that would
    end the cosine before the run, so it is the plain one.
    """
    ahead = (steps_per_epoch + 1) / steps_per_epoch if steps_per_epoch >= epochs else 1
    phase = epochs_over * ahead / epochs
    return base * (1 + math.cos(math.pi * phase)) / 2


def _step(base: float, epoch: int, config: Any, epochs: int, steps: int) -> float:
    return step_learning_rate(base, epoch, config.lr_decay_epochs, config.lr_decay_rate)


def _cosine(base: float, epoch: int, config: Any, epochs: int, steps: int) -> float:
    return cosine_learning_rate(base, epoch - 1, epochs, steps)


#: Name -> function (base rate, epoch from 1, configuration, epochs, steps per epoch) -> the rate of that epoch.
SCHEDULES: dict[str, Callable[[float, int, Any, int, int], float]] = {"step": _step, "cos": _cosine}


def stretch(milestones: Sequence[int], from_epochs: int, to_epochs: int) -> tuple[int, ...]:
    """The milestones of a run of `from_epochs` at the same fractions of a run of `to_epochs`, at the first or later."""
    return tuple(max(round(milestone * to_epochs / from_epochs), 1) for milestone in milestones)

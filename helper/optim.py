"""Optimizers and learning rate schedules, a row each; rates are pure functions of epoch and step, so there is no
scheduler state to save."""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from errors import UserError


def _rate(groups: list[dict], config: Any) -> float | Tensor:
    """The rate before the first step: a tensor in a run that is compiled, where nothing is then compiled or captured
    again for another rate. Only fused optimizers read it without waiting for the device."""
    if config.compile == "off" or not config.fused_optimizer:
        return 0.0
    return torch.zeros((), device=groups[0]["params"][0].device)


def _sgd(groups: list[dict], config: Any) -> torch.optim.Optimizer:
    if config.nesterov and not config.momentum:
        raise UserError("--nesterov: needs --momentum above 0")
    return torch.optim.SGD(
        groups,
        lr=_rate(groups, config),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=config.fused_optimizer or None,
    )


def _adamw(groups: list[dict], config: Any) -> torch.optim.Optimizer:
    rate = _rate(groups, config)
    return torch.optim.AdamW(
        groups,
        lr=rate,
        weight_decay=config.weight_decay,
        fused=config.fused_optimizer or None,
        capturable=isinstance(rate, Tensor) and rate.is_cuda,
    )


def _of_timm(name: str) -> Callable[[list[dict], Any], torch.optim.Optimizer]:
    def make(groups: list[dict], config: Any) -> torch.optim.Optimizer:
        try:
            tools = import_module("timm.optim")
        except ImportError:
            raise UserError(
                f"--optimizer {name.lower()}: it is timm's, which is not installed; pip install -r "
                "requirements-extras.txt, or take adamw"
            ) from None
        return getattr(tools, name)(groups, lr=0.0, weight_decay=config.weight_decay)

    return make


#: Name -> function (parameter groups, configuration) -> the optimizer; its rate is set before every step.
#: LAMB: You et al., ICLR 2020; Adan: Xie et al., TPAMI 2024.
OPTIMIZERS: dict[str, Callable[[list[dict], Any], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lamb": _of_timm("Lamb"),
    "adan": _of_timm("Adan"),
}


def make_optimizer(module: nn.Module, config: Any) -> torch.optim.Optimizer:
    """The run's optimizer of everything in `module` that is to have a gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict] = [{"params": trained}]
    if not config.decay_norms:  # one-dimensional: BatchNorm's weights, and biases
        groups = [{"params": [one for one in trained if one.dim() > 1]}]
        groups.append({"params": [one for one in trained if one.dim() <= 1], "weight_decay": 0.0})
    return OPTIMIZERS[config.optimizer](groups, config)


def average_of(module: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of a module's weights and statistics, a copy; None where `decay` is 0."""
    if not decay:
        return None
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    return average.requires_grad_(False).eval()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that an optimizer trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take_up(optimizer: torch.optim.Optimizer, state: dict[int, dict], groups: Sequence[Mapping[str, Any]]) -> None:
    """Give an optimizer the saved state of its parameters, and what only its saved groups hold: timm's count steps."""
    taken = []
    for saved, fresh in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
        counts = {name: value for name, value in saved.items() if name not in fresh}
        if not all(math.isfinite(value) for value in counts.values()):
            raise ValueError("a count of the optimizer is not finite")
        taken.append(counts | fresh)
    optimizer.load_state_dict({"state": state, "param_groups": taken})


def step_learning_rate(base: float, epoch: int, milestones: Sequence[int], rate: float) -> float:
    """base * rate^(milestones before `epoch`): of 150, 180, 210 epoch 150 is the last at the base rate."""
    return base * rate ** sum(epoch > milestone for milestone in milestones)


def cosine_learning_rate(base: float, epochs_over: int, epochs: int, steps_per_epoch: int, floor: float = 0.0) -> float:
    """Half a cosine over the run from `base` to `floor`, set once per epoch; `epochs_over` counts from 0.

    The phase is that of the official NORM code, one step in an epoch ahead; where an epoch has few steps that would
    end the cosine before the run, so it is the plain one.
    """
    ahead = (steps_per_epoch + 1) / steps_per_epoch if steps_per_epoch >= epochs else 1
    phase = epochs_over * ahead / epochs
    return floor + (base - floor) * (1 + math.cos(math.pi * phase)) / 2


def one_cycle_learning_rate(base: float, step: int, steps: int, floor: float = 0.0) -> float:
    """The rate of one step, counted from 0, of a run of so many: from base / 25 up to `base` over the first 30 %, then
    down to `floor`, by default base / 250,000 (Smith and Topin, 2018, with the two cosines of torch's OneCycleLR)."""
    low, peak = base / 25, 0.3 * steps - 1
    start, end, share = low, base, step / peak if peak > 0 else 1.0
    if step >= peak:
        start, end, share = base, floor or low / 1e4, (step - peak) / (steps - 1 - peak)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _step(base: float, epoch: int, config: Any, *_: Any) -> float:
    return max(step_learning_rate(base, epoch, config.lr_decay_epochs, config.lr_decay_rate), config.min_learning_rate)


def _cosine(base: float, epoch: int, config: Any, epochs: int, steps: int, *_: Any) -> float:
    warm = config.lr_warmup_epochs
    over, left = max(epoch - 1 - warm, 0), max(epochs - warm, 1)
    return cosine_learning_rate(base, over, left, steps, config.min_learning_rate)


def _one_cycle(base: float, epoch: int, config: Any, epochs: int, steps: int, step: int) -> float:
    return one_cycle_learning_rate(base, (epoch - 1) * steps + step, epochs * steps, config.min_learning_rate)


#: Name -> function (base rate, epoch from 1, configuration, epochs, steps per epoch, step from 0) -> its rate.
SCHEDULES: dict[str, Callable[[float, int, Any, int, int, int], float]] = {
    "step": _step,
    "cos": _cosine,
    "one_cycle": _one_cycle,
}


def warm_up(epoch: int, step: int, steps: int, warm_epochs: int) -> float:
    """The share of the schedule's rate that a step takes: it grows linearly over the first `warm_epochs`, then 1."""
    return 1.0 if epoch > warm_epochs else ((epoch - 1) * steps + step + 1) / (warm_epochs * steps)


def check_rates(config: Any) -> None:
    """Raise `UserError` where the settings of the learning rate contradict each other."""
    if config.lr_warmup_epochs > config.epochs:
        raise UserError(f"--lr_warmup_epochs: {config.lr_warmup_epochs} are more than --epochs {config.epochs}")
    if config.lr_warmup_epochs and config.lr_decay == "one_cycle":
        raise UserError("--lr_warmup_epochs: --lr_decay one_cycle has its own rise; leave the flag out")
    if config.min_learning_rate > config.learning_rate:
        raise UserError(
            f"--min_learning_rate: {config.min_learning_rate:g} is above --learning_rate {config.learning_rate:g}"
        )


def stretch(milestones: Sequence[int], from_epochs: int, to_epochs: int) -> tuple[int, ...]:
    """The milestones of a run of `from_epochs` at the same fractions of a run of `to_epochs`, at the first or later."""
    return tuple(max(round(milestone * to_epochs / from_epochs), 1) for milestone in milestones)

"""The optimizer's step: optimizers and learning rate schedules, a row each, whether a step may be made, the average.

Rates are pure functions of epoch and step, so there is no scheduler state to save.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from errors import UserError
from helper.distributed import largest as largest_of_all

#: A magnitude from here on counts as not finite: sums over an epoch would overflow.
LIMIT = 1e30
GRADIENT = "the gradient"


def _rate(groups: list[dict], config: Any) -> float | Tensor:
    """The rate before the first step: a tensor in a run that is compiled, where nothing is then compiled or captured
    again for another rate. Only what is fused or compiled itself reads it without waiting for the device."""
    if config.compile == "off" or not (config.fused_optimizer or config.compile == "reduce-overhead"):
        return 0.0
    return torch.zeros((), device=groups[0]["params"][0].device)


def _is_fused(config: Any) -> bool | None:
    """Whether torch's fused kernel makes the step. None where a compiler makes one: it does not look into torch's."""
    return None if config.compile == "reduce-overhead" else config.fused_optimizer or None


def _sgd(groups: list[dict], config: Any) -> torch.optim.Optimizer:
    if config.nesterov and not config.momentum:
        raise UserError("--nesterov: needs --momentum above 0")
    return torch.optim.SGD(
        groups,
        lr=_rate(groups, config),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=_is_fused(config),
    )


def _adamw(groups: list[dict], config: Any) -> torch.optim.Optimizer:
    rate = _rate(groups, config)
    return torch.optim.AdamW(
        groups,
        lr=rate,
        weight_decay=config.weight_decay,
        fused=_is_fused(config),
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


class Average:
    """The exponential moving average of a module's weights and statistics, in a copy of it: `module`.

    torch's `AveragedModel` reads a counter on the host in every step, which no CUDA graph can hold.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.module: Any = copy.deepcopy(module).requires_grad_(False).eval()
        self._decay = decay
        self.has_steps = False

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module after a step: a <- decay a + (1 - decay) w, and a <- w after the first one.

        Whole numbers, which are counts, are taken over as they are.
        """
        sides = (itertools.chain(each.parameters(), each.buffers()) for each in (self.module, module))
        pairs = list(zip(*sides, strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point() and self.has_steps]
        copied = [pair for pair in pairs if not (pair[0].is_floating_point() and self.has_steps)]
        if averaged:
            own, new = map(list, zip(*averaged, strict=True))
            torch._foreach_lerp_(own, new, 1 - self._decay)  # pyright: ignore[reportPrivateImportUsage]
        if copied:
            own, new = map(list, zip(*copied, strict=True))
            torch._foreach_copy_(own, new)  # pyright: ignore[reportPrivateImportUsage]
        self.has_steps = True


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that an optimizer trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, state: dict[int, dict], groups: Sequence[Mapping[str, Any]]
) -> None:
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


class Guard:
    """Judges the losses and the gradient of every step of a run: what is not finite is found, named, and never saved.

    By default nothing waits for the device: the numbers of the first bad step stay there until `look`, which raises
    `UserError`. With `most_skipped` each step waits for its judgement, and up to this many bad ones are left out.
    """

    def __init__(self, most_skipped: int = 0):
        self.most_skipped, self.skipped = most_skipped, 0
        self.overflows = 0  # steps that were left out to lower the scale of float16's losses
        self._place, self._flag = "", ""
        #: By the names of what is judged, (terms + 2,) of the first bad step, or of the last: losses, gradient, number.
        self._seen: dict[tuple[str, ...], Tensor] = {}
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @property
    def kept(self) -> list[Tensor]:
        """What the device remembers of the steps; `judge` changes it in place."""
        return list(self._seen.values())

    def overflowed(self, losses: dict[str, Tensor], parameters: Sequence[Tensor]) -> bool:
        """Whether all losses are finite and the gradient is not: the loss was scaled too high for float16. Waits for
        the device; the same in all processes."""
        gradient = get_total_norm([one.grad for one in parameters if one.grad is not None], torch.inf)
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        if largest_of_all(not bool((values.abs() < LIMIT).all())) or not largest_of_all(not bool(gradient < LIMIT)):
            return False
        self.overflows += 1
        return True

    def begin_epoch(self, title: str, has_own_rate: bool) -> None:
        """What messages say of where the run is, and which learning rate is too high."""
        self._place, self._flag = title, "--init_learning_rate" if has_own_rate else "--learning_rate"
        for seen in self._seen.values():  # in place, where a captured step writes
            seen.zero_()

    def begin_step(self, module: nn.Module) -> None:
        """Keep what the forward pass of a step changes, statistics and memory banks, where the step may be skipped."""
        if self.most_skipped:
            self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def judge(self, losses: dict[str, Tensor], parameters: Sequence[Tensor], number: Tensor) -> bool:
        """Whether the optimizer may make the step of this number, a float32 scalar; the gradients are there.

        Where it may not, the buffers are put back, so that only the random numbers of the step are used up.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        largest = get_total_norm(gradients)  # no smaller than the largest entry, and ten times as fast on a CPU
        values = [*(loss.detach().float() for loss in losses.values()), largest.float()]
        seen, names = torch.stack([*values, number]), (*(f"loss_{name}" for name in losses), GRADIENT)
        if self.most_skipped and largest_of_all(not _is_good(seen)):  # all processes skip a step, or none
            self._skip(names, seen)
            return False
        if names not in self._seen:
            self._seen[names] = torch.zeros_like(seen)
        kept = self._seen[names]
        torch.where(_is_good(kept), seen, kept, out=kept)
        return True

    def _skip(self, names: tuple[str, ...], seen: Tensor) -> None:
        if self.skipped == self.most_skipped:
            raise self._diverged(names, seen)
        self.skipped += 1
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)

    def look(self) -> None:
        """Raise `UserError` where a step since the last look was bad."""
        bad = [names for names, seen in self._seen.items() if not _is_good(seen)]
        if bad:
            first = min(bad, key=lambda names: self._seen[names][-1].item())
            raise self._diverged(first, self._seen[first])

    def _diverged(self, names: tuple[str, ...], seen: Tensor) -> UserError:
        *values, number = seen.tolist()
        name, value = next(pair for pair in zip(names, values, strict=True) if not abs(pair[1]) < LIMIT)
        used_up = f" ({self.skipped} such steps were skipped before)" if self.skipped else ""
        terms = "the weights of the terms; every loss is finite" if name == GRADIENT else "the weight of that term"
        return UserError(
            f"{name} is {value} in {self._place} step {number:.0f}{used_up}: the training diverged; lower {self._flag} "
            f"or {terms}"
        )

    def check_weights(self, module: nn.Module) -> None:
        """Raise `UserError` where a weight or statistic is not finite; called before each save."""
        tensors = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
        if get_total_norm([value for value in tensors.values() if value.numel()], torch.inf) < LIMIT:
            return
        name = next(name for name, value in tensors.items() if value.numel() and not value.abs().max() < LIMIT)
        raise UserError(
            f"{name} is not finite after {self._place}: the training diverged; lower {self._flag}; the "
            "checkpoint before is kept"
        )


def _is_good(seen: Tensor) -> Tensor:
    return (seen[:-1].abs() < LIMIT).all()

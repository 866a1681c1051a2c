"""Numbers that are not finite: they are found, named, and never saved."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from errors import UserError
from helper.distributed import largest as largest_of_all

#: A magnitude from here on counts as not finite: sums over an epoch would overflow.
LIMIT = 1e30
GRADIENT = "the gradient"


class Guard:
    """Judges the losses and the gradient of every step of a run.

    By default nothing waits for the device: the numbers of the first bad step stay there until `look`, which raises
    `UserError`. With `most_skipped` each step waits for its judgement, and up to this many bad ones are left out.
    """

    def __init__(self, most_skipped: int = 0):
        self.most_skipped, self.skipped = most_skipped, 0
        self.overflows = 0  # steps that were left out to lower the scale of float16's losses
        self._place, self._flag = "", ""
        self._names: tuple[str, ...] = ()
        self._seen: Tensor | None = None  # (terms + 2,) of the first bad step, or of the last: losses, gradient, number
        self._buffers: list[tuple[Tensor, Tensor]] = []

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
        self._seen = None

    def begin_step(self, module: nn.Module) -> None:
        """Keep what the forward pass of a step changes, statistics and memory banks, where the step may be skipped."""
        if self.most_skipped:
            self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def judge(self, losses: dict[str, Tensor], parameters: Sequence[Tensor], number: int) -> bool:
        """Whether the optimizer may make the step of this number; called when the gradients are there.

        Where it may not, the buffers are put back, so that only the random numbers of the step are used up.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        largest = get_total_norm(gradients)  # no smaller than the largest entry, and ten times as fast on a CPU
        values = [*(loss.detach().float() for loss in losses.values()), largest.float()]
        seen = torch.stack([*values, torch.full_like(largest, number, dtype=torch.float32)])
        names = (*(f"loss_{name}" for name in losses), GRADIENT)
        if names != self._names:
            self.look()
            self._names, self._seen = names, None
        if self.most_skipped and largest_of_all(not _is_good(seen)):  # all processes skip a step, or none
            self._skip(seen)
            return False
        if self._seen is None:
            self._seen = seen
        else:  # in its place, so that a captured step keeps it too
            torch.where(_is_good(self._seen), seen, self._seen, out=self._seen)
        return True

    def _skip(self, seen: Tensor) -> None:
        if self.skipped == self.most_skipped:
            self._seen = seen
            self.look()
        self.skipped += 1
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)

    def look(self) -> None:
        """Raise `UserError` where a step since the last look was bad."""
        if self._seen is None or _is_good(self._seen):
            return
        *values, number = self._seen.tolist()
        name, value = next(pair for pair in zip(self._names, values, strict=True) if not abs(pair[1]) < LIMIT)
        used_up = f" ({self.skipped} such steps were skipped before)" if self.skipped else ""
        terms = "the weights of the terms; every loss is finite" if name == GRADIENT else "the weight of that term"
        raise UserError(
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

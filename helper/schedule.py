"""Learning rates as pure functions of the epoch, so that there is no scheduler state to save.

Epochs count from 1, as in RepDistiller.
"""

import math
from collections.abc import Sequence


def step_learning_rate(base: float, epoch: int, milestones: Sequence[int], rate: float) -> float:
    """base * rate^(milestones that lie before `epoch`): of 150, 180, 210 epoch 150 is the last at the base rate."""
    return base * rate ** sum(epoch > milestone for milestone in milestones)


def cosine_learning_rate(base: float, epochs_over: int, epochs: int, steps_per_epoch: int) -> float:
    """Half a cosine over the run, set once per epoch; `epochs_over` counts from 0.

    The phase is that of the official NORM code, one step in an epoch ahead.
    """
    phase = epochs_over * (steps_per_epoch + 1) / (epochs * steps_per_epoch)
    if epochs_over < epochs:  # where an epoch has few steps the phase would pass the end, and the rate rise again
        phase = min(phase, 1)
    return base * (1 + math.cos(math.pi * phase)) / 2


def stretch(milestones: Sequence[int], from_epochs: int, to_epochs: int) -> tuple[int, ...]:
    """The milestones of a run of `from_epochs` at the same fractions of a run of `to_epochs`, at the first or later."""
    return tuple(max(round(milestone * to_epochs / from_epochs), 1) for milestone in milestones)

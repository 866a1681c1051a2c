"""Where everything random of an epoch comes from."""

import numpy


def epoch_seed(seed: int, epoch: int, *numbers: int) -> int:
    """The seed of everything random in an epoch or a part of it, so that a resumed run needs no generator's state."""
    return int(numpy.random.SeedSequence((seed, epoch, *numbers)).generate_state(1)[0])

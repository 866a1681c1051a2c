"""A network of another library in two parts, before and behind its last feature map."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError

#: Sides of the blank images that are tried in turn; some networks read only one size.
PROBE_SIZES = (224, 256, 299, 384, 448, 512, 160)


class Split(NamedTuple):
    """The parts as functions of the network, whose layers may be exchanged meanwhile, and where it is cut."""

    features: Callable[[nn.Module, Tensor], tuple[list[Tensor], Tensor]]  # images -> maps by resolution, final map
    head: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]  # final map -> what the classifier reads, logits
    classifier: str  # name of the last linear layer
    final_name: str  # what gives the final map
    final: tuple[int, int, int]  # its channels, height and width for an image of `image_size`
    image_size: int


def no_map(name: str, reason: str) -> UserError:
    """The error for a network without a last feature map."""
    return UserError(f"{name} cannot be a teacher or a student here: {reason}; choose a convolutional network")


def probe(name: str, network: nn.Module, run: Callable[[nn.Module, Tensor], None]) -> int:
    """Call `run(copy of the network without values, blank image)` at the first size that works; returns the size."""
    blank, reason = copy.deepcopy(network).to("meta").eval(), ""
    for size in PROBE_SIZES:
        try:
            with torch.no_grad():
                run(blank, torch.zeros(1, 3, size, size, device="meta"))
            return size
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
            reason = str(error).split("\n")[0]
    raise no_map(name, f"it reads images of none of the sizes {', '.join(map(str, PROBE_SIZES))} ({reason})")

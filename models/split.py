"""A network of another library in two parts, before and behind what its head reads."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError, first_line
from models.backbone import evaluating

#: Sides of the blank images that are tried in turn; some networks read only one size.
PROBE_SIZES = (224, 256, 299, 384, 448, 512, 160)
#: How many maps are taken from a network whose blocks all have one resolution: equally spaced, the last included.
STAGES = 4


class Split(NamedTuple):
    """The parts as functions of the network, whose layers may be exchanged meanwhile, and where it is cut.

    What the head reads is a map (B, C, H, W); or tokens, held as (B, C, T, 1) so that a 1x1 convolution acts on each of
    them, class tokens and the like before the patches; or, where `cannot_change` says why, something else.
    """

    features: Callable[[nn.Module, Tensor], tuple[list[Tensor], Any]]  # images -> stage maps, what the head reads
    head: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]  # what the head reads -> pooled vector, logits
    classifier: str | None  # name of the last linear layer; None where the head does not end in one
    final_name: str  # what gives the final map
    final: tuple[int, int, int]  # its channels, height and width for an image of `image_size`
    image_size: int
    prefix: int | None = None  # tokens before the patches; None where the head reads a map
    cannot_change: str = ""  # why the last map cannot be changed before the head reads it; empty where it can


def no_map(name: str, reason: str) -> UserError:
    """The error for a network that cannot be read at all."""
    return UserError(f"{name} cannot be a teacher or a student here: {reason}; choose another network")


def probe(
    name: str, network: nn.Module, run: Callable[[nn.Module, Tensor], None], sizes: Sequence[int | None] = ()
) -> int:
    """Call `run(network, blank image)` at the first size that works; returns the size.

    `sizes` are tried before `PROBE_SIZES`, with a copy of the network that has no values and computes nothing. A
    network may ask for a value, so where all of them fail the network itself is run, small images first. Raises
    `UserError` where that fails, too.
    """
    given, reason = list(filter(None, sizes)), ""
    without_values = copy.deepcopy(network).to("meta")
    for blank, tried in ((without_values, [*given, *PROBE_SIZES]), (network, [*sorted(PROBE_SIZES), *given])):
        device, reason = next(blank.parameters()).device, ""
        for size in dict.fromkeys(tried):
            try:
                with evaluating(blank):
                    run(blank, torch.zeros(1, 3, size, size, device=device))
                return size
            except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
                reason = reason or first_line(error)
    none = ", ".join(map(str, sorted({*given, *PROBE_SIZES})))
    raise no_map(name, f"it reads images of none of the sizes {none} ({reason})")


def equally_spaced(number: int) -> list[int]:
    """Positions of at most `STAGES` of `number` things, equally spaced, the last included: 12 -> 2, 5, 8, 11."""
    count = min(number, STAGES)
    return [(number * (position + 1)) // count - 1 for position in range(count)]


def tokens_to_columns(tokens: Tensor) -> Tensor:
    """(B, T, C) -> (B, C, T, 1)."""
    return tokens.mT.unsqueeze(3)


def columns_to_tokens(columns: Tensor) -> Tensor:
    """(B, C, T, 1) -> (B, T, C)."""
    return columns.squeeze(3).mT


def patches_to_map(columns: Tensor, prefix: int) -> Tensor:
    """Tokens (B, C, T, 1) -> the map (B, C, H, W) of the patches, which are H x W behind `prefix` other tokens."""
    patches = columns[:, :, prefix:, 0]
    side = int(patches.shape[2] ** 0.5 + 0.5)
    return patches.unflatten(2, (side, side))


@contextmanager
def as_if_trained(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients within the block, and other values in tensors whose values are all equal, as those of
    a new BatchNorm are: a layer that changes nothing before it is trained would not be seen."""
    with evaluating(network):
        tensors = [each for each in (*network.parameters(), *network.buffers()) if each.is_floating_point()]
        equal = [each for each in tensors if each.numel() and each.min() == each.max()]
        values = [each.clone() for each in equal]
        for each in equal:
            each.copy_(1.5 + ramp(*each.shape) / 2)
        try:
            yield
        finally:
            for each, value in zip(equal, values, strict=True):
                each.copy_(value)


def ramp(*shape: int) -> Tensor:
    """Values that differ everywhere and need no generator."""
    return torch.arange(float(torch.Size(shape).numel())).sin().view(shape)

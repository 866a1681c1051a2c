"""What a network costs: parameters, multiply-adds, latency."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.backbone import evaluating

#: How many times a latency is measured.
ROUNDS = 30


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_multiply_adds(network: nn.Module, image_size: int) -> int:
    """Multiply-adds of all convolutions and matrix products for one image of (3, image_size, image_size)."""
    image = torch.zeros(1, 3, image_size, image_size).to(next(network.parameters()))
    # With gradients, as the counter hooks every module's inputs, which fails for a parameter that has none. In matrix
    # products, as the counter knows few of the operations that do a whole attention at once.
    with (
        evaluating(network),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        network(image.requires_grad_().clone())  # it may change its images in place
    return counter.get_total_flops() // 2  # an addition and a multiplication each


@torch.inference_mode()
def measure_latency(networks: Sequence[Callable[[Tensor], Any]], image_size: int) -> list[float]:
    """Milliseconds of one image through each network in eval mode, the best of `ROUNDS`, measured in turns."""
    first = networks[0]
    device = next(first.parameters()).device if isinstance(first, nn.Module) else "cpu"
    images = torch.zeros(1, 3, image_size, image_size, device=device)
    best = [float("inf")] * len(networks)
    for warm_up in (True, *([False] * ROUNDS)):
        for position, network in enumerate(networks):
            start = time.perf_counter()
            network(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if not warm_up:
                best[position] = min(best[position], 1000 * (time.perf_counter() - start))
    return best

"""What a network costs: parameters, multiply-adds, latency."""

import time

import torch
from torch import nn

from models.backbone import Backbone, evaluating


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_multiply_adds(network: nn.Module, image_size: int) -> int:
    """Multiply-adds of all convolutions and linear layers for one image of (3, image_size, image_size)."""
    total = 0

    def add(module: nn.Module, inputs, output) -> None:
        nonlocal total
        per_value = module.weight[0].numel()
        total += per_value * output.numel()

    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with evaluating(network):
        network(torch.zeros(1, 3, image_size, image_size).to(next(network.parameters())))
    for hook in hooks:
        hook.remove()
    return total


@torch.inference_mode()
def measure_latency(networks: list[Backbone], image_size: int, batch_size: int = 1, rounds: int = 30) -> list[float]:
    """Milliseconds of one forward pass of each network in eval mode, the best of `rounds`, measured in turns."""
    images = torch.zeros(batch_size, 3, image_size, image_size).to(next(networks[0].parameters()))
    best = [float("inf")] * len(networks)
    for warm_up in (True, *([False] * rounds)):
        for position, network in enumerate(networks):
            start = time.perf_counter()
            network(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if not warm_up:
                best[position] = min(best[position], 1000 * (time.perf_counter() - start))
    return best

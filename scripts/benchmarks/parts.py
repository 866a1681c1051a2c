"""What the benchmarks measure with: the plain input pipeline, memory, work, and the floor that the device sets."""

import json
import math
import os
import platform
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from dataset import Batch, ImageData
from distiller_zoo import Distiller, Task, find_distiller
from helper.command_line import Parser
from helper.distributed import find_device
from helper.recipes import recipe_of
from helper.run_folder import write_text
from helper.tables.plan import read_pairs
from models.backbone import Backbone
from setting import count, file_to_write


class PlainImages(Dataset):
    """Images one by one through PIL and torchvision's transforms, as RepDistiller reads CIFAR-100."""

    def __init__(self, data: ImageData):
        self._pixels = data.train.pixels.permute(0, 2, 3, 1).numpy()
        self._targets = data.train.targets.tolist()
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(data.image_size, padding=data.augmentation.pad),
                transforms.RandomHorizontalFlip(0.5 if data.augmentation.flip else 0.0),
                transforms.ToTensor(),
                transforms.Normalize(data.mean, data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int):
        return self._transform(Image.fromarray(self._pixels[index])), self._targets[index], index


def plain_batches(data: ImageData, batch_size: int, workers: int, device: torch.device) -> Iterator[Batch]:
    """Shuffled batches by worker processes, moved to the device one by one; without end."""
    loader = DataLoader(
        PlainImages(data), batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    while True:
        for images, targets, index in loader:
            yield Batch(images.to(device), targets.to(device), index.to(device))


def recipe_method(
    name: str, student: Backbone, teacher: Backbone | None, pair: tuple[str, str], task: Task, **others
) -> Distiller:
    """The method `name` with its recipe for CIFAR-100 and a (teacher, student) pair, but for `others`."""
    method = find_distiller(name)
    recipe = {argument: value for argument, (value, _) in recipe_of("cifar100", *pair, name).items()}
    recipe = {flag.argument: recipe.get(flag.argument, flag.default) for flag in method.flags}
    return method(student, teacher, task, **(recipe | others))


def pair_parser(docstring: str | None, usual: str) -> Parser:
    """The flags of a benchmark of steps of pairs, by default of the `usual` ones, on digits of any size."""
    parser = Parser.of_script(docstring)
    parser.add_argument("--pairs", type=read_pairs, default=usual, metavar="T:S,...", help=usual)
    parser.add_argument("--image_size", type=count, default=224, help="pixels on a side (224)")
    parser.add_argument("--batch_size", type=count, default=32)
    parser.add_argument("--device", type=find_device, default="auto")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the records there")
    return parser


def describe_step(pair: tuple[str, str], n: int, data: ImageData, args: Namespace) -> dict[str, Any]:
    """What a record says of the step that was measured."""
    known = {"pair": " -> ".join(pair), "n": n, "batch_size": args.batch_size, "image_size": data.image_size}
    return known | {"device": str(args.device)}


def report(measured: Iterable[dict], table: Callable[[list[dict]], str], path: str | os.PathLike | None) -> list[dict]:
    """Print every record as it is measured, write all to `path` if there is one, print them as a table."""
    records = []
    for record in measured:
        records.append(record)
        print(json.dumps(record), flush=True)
    if path:
        write_text(path, json.dumps(records, indent=1) + "\n")
    print(table(records))
    return records


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """How long it takes, with all that the device was given."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step holds at most beyond what was held before it."""
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        step()
    # The profiler's own view hides what was allocated inside an operation; the raw events have every change.
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def count_flops(step: Callable[[], None]) -> int:
    """Floating point operations of the convolutions and matrix products of a step, backward included."""
    fused = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(fused, _fused_flops)) as counter:
        step()
    return counter.get_total_flops()


def _fused_flops(*shapes, out_shape, **_) -> int:
    """Of a convolution with others inside: (x, weight, bias, ...), or with another map in addition to x."""
    weight = shapes[2] if shapes[2] is not None and len(shapes[2]) == 4 else shapes[1]
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def machine_name(device: torch.device) -> str:
    """The name of the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0]}" if names else platform.processor() or "CPU"


def count_bytes(networks: list[nn.Module], run: Callable[[], None]) -> int:
    """Bytes that the convolutions and linear layers of `networks` must read and write in one forward pass."""
    total = 0

    def add(layer, inputs, output):
        nonlocal total
        images, *_ = inputs
        tensors = (images, output, layer.weight)
        total += sum(tensor.numel() for tensor in tensors) * output.element_size()

    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return total


def _best_seconds(run: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    return min(seconds_of(run, device) for _ in range(repetitions))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a large matrix product, measured."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: a @ b, device)


def memory_rate(device: torch.device) -> float:
    """Bytes per second of copying a large tensor, reading and writing counted, measured."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best_seconds(lambda: target.copy_(source), device)

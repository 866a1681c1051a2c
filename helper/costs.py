"""How long runs will take, estimated from the images per second of runs that were measured."""

import json
import math
import os
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from errors import UserError
from helper.device import find_device
from helper.plan import Job
from helper.run_folder import CONFIG, METRICS
from models import build_model
from models.cost import count_multiply_adds

#: Training images of the data sets that have a fixed number of them.
TRAIN_IMAGES = {"digits": 1433, "cifar100": 50_000, "cifar10": 50_000, "fashion_mnist": 60_000}
#: A backward pass costs about two forward passes, and the teacher has none.
STUDENT_PASSES = 3


class Rates:
    """Images per second by method, networks, image size and kind of device."""

    def __init__(self, folders: Iterable[Path]):
        measured, self.folders = defaultdict(list), list(folders)
        for folder in self.folders:
            try:
                config = Namespace(**json.loads((folder / CONFIG).read_text(encoding="utf-8")))
                lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
                rates = [json.loads(line)["images_per_s"] for line in lines]
                measured[_key(config)] += rates[-5:]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # no run folder, or one without an epoch: it tells nothing
        self._rates = {key: statistics.median(rates) for key, rates in measured.items() if rates}

    def find(self, config: Namespace) -> tuple[float, str] | None:
        """(images per second, where the figure is from), or None where nothing on this kind of device was measured."""
        key = _key(config)
        if key in self._rates:
            return self._rates[key], "measured"
        same_pair = [rate for other, rate in self._rates.items() if other[1:] == key[1:]]
        if same_pair:
            return statistics.median(same_pair), "as other methods of the pair"
        work = _multiply_adds(config.model_t, config.model_s, config.image_size)
        scaled = [
            rate * _multiply_adds(teacher, student, size) / work
            for (_, teacher, student, size, device), rate in self._rates.items()
            if device == key[-1]
        ]
        return (statistics.median(scaled), "scaled by multiply-adds") if scaled else None


class Estimate(NamedTuple):
    """Of one job: seconds left, None where nothing was measured yet, and where the rate is from."""

    seconds: float | None
    source: str


def estimate(job: Job, rates: Rates) -> Estimate:
    """How long a job will take. Testing after each epoch is not in it, nor are stages before the main one."""
    if job.state == "finished":
        return Estimate(0.0, "finished")
    found = rates.find(job.config)
    images = count_train_images(job.config)
    if found is None or images is None:
        return Estimate(None, "not measured on this device yet" if found is None else "size of the data set unknown")
    steps = (job.config.epochs - _epochs_over(job.folder)) * math.ceil(images / job.config.batch_size)
    steps = min(steps, job.config.max_steps or steps)
    return Estimate(max(steps, 0) * job.config.batch_size / found[0], found[1])


def count_train_images(config: Namespace) -> int | None:
    """Training images of a configuration's data set, without those that `--holdout` keeps; None where unknown."""
    images = TRAIN_IMAGES.get(config.dataset)
    if images is None and config.data is not None:
        images = sum(len(files) for _, _, files in os.walk(Path(config.data, "train"))) or None
    return None if images is None else images - (config.holdout or 0)


def format_seconds(seconds: float) -> str:
    """42 s, 3 min, 1.5 h, 2.1 days."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _epochs_over(folder: Path) -> int:
    path = folder / METRICS
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def _key(config: Namespace) -> tuple:
    return (config.distill, config.model_t, config.model_s, config.image_size, _device_type(config.device))


def _device_type(name: str) -> str:
    try:
        return find_device(name).type
    except UserError:  # a run of another machine
        return torch.device(name.split(":")[0]).type


def _multiply_adds(teacher: str | None, student: str, image_size: int) -> float:
    total = STUDENT_PASSES * count_multiply_adds(build_model(student, 10), image_size)
    return total + (count_multiply_adds(build_model(teacher, 10), image_size) if teacher else 0)

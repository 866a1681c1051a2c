"""A stage of a method trained by itself, without a run folder and without tests of the student."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from dataset import Augmentation, Batch, ImageData, Images
from distiller_zoo import Progress
from helper import loops
from helper.loops import Training
from models.backbone import Output


def few_images(classes: int, n: int = 24) -> ImageData:
    """Random images of some classes; those that are trained on are those of the test."""
    pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images, names = Images(pixels, torch.arange(n) % classes), [str(number) for number in range(classes)]
    return ImageData("fake", images, images, names, (0.5,) * 3, (0.25,) * 3, Augmentation())


class StageRun:
    """What the loop asks of a run (helper/run.py), of one epoch of one stage; `means` are those of the epoch."""

    first_step, error, latest = 0, None, ""

    def __init__(self, training: Training, progress: Progress, epochs_over: int, most_steps: int | None):
        self.training, self.progress, self.epochs_over = training, progress, epochs_over
        steps = len(training.loader)
        self.last_step = steps if most_steps is None else min(steps, most_steps)
        self.means: dict[str, float] = {}

    def own_turn(self):
        return nullcontext()

    def begin_epoch(self) -> None:
        self.training.begin_epoch(self.progress, self.epochs_over, None)

    def finish_step(self, number: int) -> None:
        self.training.finish_step()

    def end_steps(self) -> None:
        self.means = self.training.end_epoch()

    def end_epoch(self) -> None:
        """Nothing is tested."""
        if self.training.stage.after_epoch is not None:
            self.training.stage.after_epoch(self.progress)


class Shown:
    """A `FrozenTeacher` as the loop asks it."""

    def __init__(self, network: Callable[[Tensor, bool], Output]):
        self.network = network

    def teach(self, part: Batch, training: Training, epoch: int, preact: bool) -> Output:
        return self.network(part.images, preact)


def train_epoch(
    training: Training,
    teacher: Callable[[Tensor, bool], Output] | None,
    progress: Progress,
    epochs_over: int = 0,
    most_steps: int | None = None,
) -> tuple[dict[str, float], int]:
    """An epoch of a stage, of `most_steps` steps at most -> (its means, its steps); a `FrozenTeacher` may teach."""
    run = StageRun(training, progress, epochs_over, most_steps)
    loops.train_epoch([run], None if teacher is None else Shown(teacher), nullcontext, lambda number: None)
    return run.means, run.last_step

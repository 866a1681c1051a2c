"""The contract of a distillation method: one module that holds everything that is trained."""

import copy
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errors import UserError
from models.backbone import Backbone, Output


def number(text: str) -> float:
    """A finite number from 0 on, read from a flag."""
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ArgumentTypeError(f"must be a number from 0 on, not {text}")
    return value


def positive(text: str) -> float:
    """A finite number above 0, read from a flag."""
    if number(text) == 0:
        raise ArgumentTypeError("must be above 0")
    return float(text)


def count(text: str) -> int:
    """A whole number from 1 on, read from a flag."""
    if int(text) < 1:
        raise ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


class Flag(NamedTuple):
    """A hyper-parameter of a method and its command-line flag; the last of `names` is the argument, without dashes."""

    names: tuple[str, ...]
    type: Callable[[str], Any]
    default: Any
    help: str
    choices: Sequence[str] | None = None
    is_weight: bool = False  # a weight of 0 may be given to methods that have no such term

    @property
    def argument(self) -> str:
        return self.names[-1].lstrip("-")


GAMMA = Flag(("-r", "--gamma"), number, 1.0, "weight of the cross entropy", is_weight=True)
ALPHA = Flag(
    ("-a", "--alpha"), number, 0.0, "weight of the KL divergence of the logits (the NORM paper's beta)", is_weight=True
)
BETA = Flag(("-b", "--beta"), number, 1.0, "weight of the method's own loss (the NORM paper's alpha)", is_weight=True)
KD_T = Flag(("--kd_T",), positive, 4.0, "temperature of the KL divergence")


class Task(NamedTuple):
    """What a method may know of the data."""

    num_classes: int
    image_size: int
    train_targets: Tensor  # (n,) class of every training image, by sample index


class Progress(NamedTuple):
    """Where the training stands; `epoch` counts the epochs that are over, so it is 0 in the first."""

    epoch: int
    epochs: int


class Distiller(nn.Module):
    """A method: student, adapters and losses in one module.

    `parameters()` are the optimizer's and `state_dict()` is the checkpoint's. The teacher stays outside: `teacher` is
    read for its shapes when the method is built, and every step receives its outputs.
    A method writes `losses`; one that changes the student's forward pass (NORM) writes `respond` and `export` too.
    """

    #: One line for `--help`.
    summary = ""
    #: Whether the method reads a teacher.
    needs_teacher = True
    #: The method's hyper-parameters: keyword arguments of its constructor and flags of the scripts.
    flags: tuple[Flag, ...] = ()

    def __init__(self, student: Backbone, teacher: Backbone | None, task: Task, **hyper_parameters):
        super().__init__()
        self.student = student
        unknown = set(hyper_parameters) - {flag.argument for flag in self.flags}
        if unknown:
            raise TypeError(f"{type(self).__name__} has no hyper-parameter {', '.join(sorted(unknown))}")
        for flag in self.flags:
            value = hyper_parameters.get(flag.argument, flag.default)
            if flag.choices and value not in flag.choices:
                raise UserError(f"{flag.names[-1]}: must be one of {', '.join(flag.choices)}, not {value}")
            setattr(self, flag.argument, value)

    def respond(self, images: Tensor, teacher: Output | None) -> Output:
        """The student's outputs for images (B, 3, H, W) in training; the networks may run in a lower precision here."""
        return self.student.outputs(images)

    def losses(
        self, student: Output, teacher: Output | None, targets: Tensor, index: Tensor, progress: Progress
    ) -> dict[str, Tensor]:
        """Named, weighted scalars whose sum is trained, from float32 outputs; targets and sample index are (B,)."""
        raise NotImplementedError

    def forward(self, batch, teacher: Output | None, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """A `dataset.Batch` and the teacher's outputs for it -> (student's logits (B, K), named weighted losses)."""
        student = self.respond(batch.images, teacher)
        with torch.autocast(batch.images.device.type, enabled=False):
            losses = self.losses(
                _at_least_float32(student), _at_least_float32(teacher), batch.targets, batch.index, progress
            )
        return student.logits, losses

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, K) of what is being trained, with its adapters where they belong to the network."""
        return self.respond(images, None).logits

    def export(self) -> Backbone:
        """The plain network to ship, in eval mode, independent of this module."""
        return copy.deepcopy(self.student).eval()

    def export_note(self) -> str:
        """One sentence on what `export` kept beside the plain student; empty where it is the plain student."""
        return ""


class Predictor(nn.Module):
    """What a method predicts, as a module: the student with its adapters."""

    def __init__(self, method: Distiller):
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return self.method.predict(images)


def _at_least_float32(outputs):
    """Widen every half-precision tensor of nested tuples and lists; other dtypes pass."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
    if isinstance(outputs, list):
        return [_at_least_float32(value) for value in outputs]
    if isinstance(outputs, tuple):
        return type(outputs)(*(_at_least_float32(value) for value in outputs))
    return outputs


def weighted_cross_entropy(weight: float, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """{"ce": weight * cross entropy of logits (B, K) against classes (B,)}, or {} where the weight is 0."""
    return {"ce": weight * F.cross_entropy(logits, targets)} if weight else {}

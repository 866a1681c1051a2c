"""Classes that count differently: weights of the cross entropy, and sampling every class equally often."""

import difflib
import math

import torch
from torch import Tensor

from errors import UserError

BALANCED = "balanced"


def class_weights(how: str, targets: Tensor, classes: list[str]) -> Tensor:
    """The weight of each class (K,), float32, whose mean over the training images with classes `targets` (n,) is 1.

    `how` is "balanced" (inverse to the number of training images; a class without any has 1), or a file that has a
    class and its weight, a number above 0, in each line. Raises `UserError`.
    """
    counts = torch.bincount(targets.cpu(), minlength=len(classes)).double()
    if how == BALANCED:
        weights = torch.where(counts > 0, len(targets) / (counts.clamp_min(1) * (counts > 0).sum()), 1.0)
    else:
        weights = torch.tensor(_read_weights(how, classes), dtype=torch.float64)
        weights = weights * len(targets) / (weights * counts).sum()
    return weights.float()


def _read_weights(path: str, classes: list[str]) -> list[float]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(
            f"--class_weights: {path} cannot be read ({reason}); give {BALANCED}, or a file with a class and its "
            "weight in each line"
        ) from None
    found: dict[str, float] = {}
    for line in lines:
        name, weight = _read_line(line, path)
        if name not in classes:
            close = difflib.get_close_matches(name, classes, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the classes are {', '.join(classes[:5])}, ..."
            raise UserError(f"--class_weights: {path}: the data have no class {name}; {hint}")
        if name in found:
            raise UserError(f"--class_weights: {path} has class {name} twice; remove one of the lines")
        found[name] = weight
    missing = [name for name in classes if name not in found]
    if missing:
        raise UserError(f"--class_weights: {path} has no weight of class {missing[0]}; add a line '{missing[0]} 1'")
    return [found[name] for name in classes]


def _read_line(line: str, path: str) -> tuple[str, float]:
    name, _, text = line.replace("\t", " ").rpartition(" ")
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not name or not 1e-6 <= weight <= 1e6:
        raise UserError(
            f"--class_weights: {path}: '{line[:80]}' is not a class and its weight from 1e-6 to 1e6, like 'cat 2.5'"
        )
    return name.strip(), weight


def draw_balanced(targets: Tensor, generator: torch.Generator) -> Tensor:
    """As many indices as there are targets (n,), with replacement: every class is equally likely in each draw."""
    counts = torch.bincount(targets)
    return torch.multinomial(1 / counts.double()[targets], len(targets), replacement=True, generator=generator)

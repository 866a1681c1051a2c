"""The check vectors on which reference implementations were run: g(shape, a, phi, s)[i] = s * sin(a * i + phi)."""

import math

import torch
from torch import Tensor


def g(shape: tuple[int, ...], a: float, phi: float, s: float = 1.0) -> Tensor:
    """A float64 tensor, filled in row-major order."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64)
    return (s * torch.sin(a * numbers + phi)).reshape(shape)


STUDENT_LOGITS, TEACHER_LOGITS = g((4, 10), 0.7, 0.1, 2), g((4, 10), 0.45, 0.5, 3)
TARGETS = torch.tensor([0, 3, 7, 9])
TEACHER_MAP, STUDENT_MAP = g((4, 6, 8, 8), 0.37, 0.2), g((4, 6, 8, 8), 0.29, 0.9)
NARROW_STUDENT_MAP = g((4, 5, 4, 4), 0.53, 0.4)

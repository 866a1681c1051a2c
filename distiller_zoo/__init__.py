"""The methods by name, as they are written after `--distill` (in any case)."""

from distiller_zoo.base import Distiller, Flag, Predictor, Progress, Task
from distiller_zoo.ce import CrossEntropy
from distiller_zoo.crd import CRD, NORM_CRD
from distiller_zoo.kd import KD, DistillKL
from distiller_zoo.norm import NORM, FTBaseline
from errors import UserError

DISTILLERS: dict[str, type[Distiller]] = {
    "norm": NORM,
    "norm_crd": NORM_CRD,
    "ft": FTBaseline,
    "ce": CrossEntropy,
    "kd": KD,
    "crd": CRD,
}


def find_distiller(name: str) -> type[Distiller]:
    """The class of a method; raises `UserError` that lists the legal names."""
    method = DISTILLERS.get(name.lower())
    if method is None:
        raise UserError(f"--distill: unknown method '{name}'; choose from {', '.join(DISTILLERS)}")
    return method


__all__ = ["DISTILLERS", "DistillKL", "Distiller", "Flag", "Predictor", "Progress", "Task", "find_distiller"]

"""The methods: every file of this folder that defines a `Distiller` with a name adds one word after `--distill`."""

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from crd import CRDLoss
from distiller_zoo.abound import ABLoss, Connector
from distiller_zoo.attention import Attention
from distiller_zoo.base import Distiller, Flag, Predictor, Progress, Stage, Task, refuse_without_effect, unmet
from distiller_zoo.contract import check_built, check_shipped, check_stages, check_state, explained
from distiller_zoo.correlation import Correlation, LinearEmbed
from distiller_zoo.factor import FactorTransfer, Paraphraser, Translator
from distiller_zoo.fsp import FSP
from distiller_zoo.hint import ConvReg, HintLoss
from distiller_zoo.kd import DistillKL
from distiller_zoo.kdsvd import KDSVD
from distiller_zoo.nst import NSTLoss
from distiller_zoo.pkt import PKT
from distiller_zoo.rkd import RKDLoss
from distiller_zoo.similarity import Similarity
from distiller_zoo.vid import VIDLoss
from errors import UserError
from models.backbone import Backbone


def _methods_of(module: ModuleType) -> list[type[Distiller]]:
    """The methods that a module defines; what it imports belongs to others."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Distiller)]
    return [value for value in classes if value.__module__ == module.__name__ and vars(value).get("name")]


def _discover() -> dict[str, type[Distiller]]:
    """Every named method of this folder's modules, by name; NORM's first, the rest in alphabetical order."""
    found: dict[str, type[Distiller]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        for method in _methods_of(importlib.import_module(f"{__name__}.{module_info.name}")):
            if found.setdefault(method.name, method) is not method:
                raise TypeError(f"two methods are called {method.name}: {found[method.name]} and {method}")
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith("norm"), item[0])))


DISTILLERS = _discover()


def find_distiller(name: str, flag: str = "--distill") -> type[Distiller]:
    """The class of a method; raises `UserError` that names the flag and lists the legal names."""
    method = DISTILLERS.get(name.lower())
    if method is None:
        close = difflib.get_close_matches(name.lower(), DISTILLERS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"{flag}: unknown method '{name}'; {hint}choose from {', '.join(DISTILLERS)}")
    return method


def build_distiller(
    config: Mapping[str, Any],
    student: Backbone,
    teacher: Backbone | None,
    num_classes: int,
    image_size: int,
    train_targets: Tensor,
    class_weights: Tensor | None = None,
) -> Distiller:
    """The method `config["distill"]` around a student, with the hyper-parameters that a run's settings name."""
    method = find_distiller(config["distill"])
    # A flag may be newer than the configuration.
    hyper_parameters = {flag.argument: config.get(flag.argument, flag.default) for flag in method.flags}
    batch_size = config.get("images_per_pass", config["batch_size"])
    smoothing = config.get("label_smoothing", 0.0)
    task = Task(num_classes, image_size, batch_size, train_targets, smoothing, class_weights)
    with explained(method, "its constructor", student, image_size, teacher):
        built = method(student, teacher, task, **hyper_parameters)
    check_built(built)
    return built


#: RepDistiller's loss modules and adapters, for scripts that import them from here.
REPDISTILLER = (
    ABLoss,
    Attention,
    Connector,
    ConvReg,
    Correlation,
    CRDLoss,
    DistillKL,
    FactorTransfer,
    FSP,
    HintLoss,
    KDSVD,
    LinearEmbed,
    NSTLoss,
    Paraphraser,
    PKT,
    RKDLoss,
    Similarity,
    Translator,
    VIDLoss,
)

__all__ = [
    "DISTILLERS",
    "Distiller",
    "Flag",
    "Predictor",
    "Progress",
    "Stage",
    "Task",
    "build_distiller",
    "check_shipped",
    "check_stages",
    "check_state",
    "explained",
    "find_distiller",
    "refuse_without_effect",
    "unmet",
    *(module.__name__ for module in REPDISTILLER),
]

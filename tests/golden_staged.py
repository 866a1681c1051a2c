"""Golden checks of the losses of the methods with a stage of their own, and of KDSVD."""

import re
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller_zoo.abound import ABLoss, Connector
from distiller_zoo.factor import FactorTransfer, Paraphraser, Translator
from distiller_zoo.fsp import FSP
from distiller_zoo.kdsvd import KDSVD
from tests.golden_case import Case, Difference, fill_module
from tests.golden_format import Mismatch, compare
from tests.golden_maps import check_modules, pair, prefixes, sides


def _number(case: Case, name: str, default: float) -> float:
    """The number behind a name in the case's name: p1_2_p2_1, p1=2,p2=1, margin0.5, k1 and the like."""
    found = re.search(rf"(?<![a-z]){name}[_=]?(\d+(?:\.\d+)?)(?!\d)", case.case)
    return float(found[1]) if found else default


def check_boundaries(case: Case) -> Difference:
    student, teacher = sides(case)
    loss = ABLoss(len(student), _number(case, "margin", 1.0))
    modules = {}
    for prefix in prefixes(case):
        shapes = ([each.shape for each in maps] for maps in (student, teacher))
        modules[prefix] = fill_module(prefix, Connector(*shapes)).train()
        student = modules[prefix](student)
    return check_modules(case, loss(student, teacher), modules)


def check_flow(case: Case) -> Difference:
    student, teacher = sides(case)
    shapes = ([tensor.shape for tensor in each] for each in (student, teacher))
    return case.check(FSP(*shapes)(student, teacher))


def check_reconstruction(case: Case) -> Difference:
    """The paraphraser's own stage: one map, whichever side the file lists it on."""
    (feature_map,) = case.inputs.values()
    name = next(iter(prefixes(case)), "paraphraser")
    module = fill_module(name, Paraphraser(feature_map.shape)).train()
    _, reconstruction = module(feature_map)
    return check_modules(case, [F.mse_loss(reconstruction, feature_map)], {name: module})


def check_factor(case: Case) -> Difference:
    if len(case.inputs) == 1:
        return check_reconstruction(case)
    student, teacher = pair(case)
    names = prefixes(case)
    if not names and "translator" in case.case:
        names = ["translator", "paraphraser"]
    modules = {}
    for name in names:
        if name.startswith("para"):
            module = Paraphraser(teacher.shape).eval().requires_grad_(False)
            teacher = fill_module(name, module)(teacher, is_factor=True)
        else:
            module = Translator(student.shape, teacher.shape).train()
            student = fill_module(name, module)(student)
        modules[name] = module
    loss = FactorTransfer(_number(case, "p1", 2), _number(case, "p2", 1))
    return check_modules(case, [loss(student, teacher)], modules)


def check_singular_vectors(case: Case) -> Difference:
    student, teacher = sides(case)
    loss = KDSVD(int(_number(case, "k", 1)))
    by_sign = _contributions(loss, student, teacher)
    golden = case.entry.get("per_pair_per_sample_contribution_by_relative_sign")
    if golden is not None:  # which numbers belong to which sign is a matter of convention
        compare("contributions by relative sign", by_sign.flatten().sort().values, sorted(_numbers(golden)))
    raw = case.entry.get("raw_lapack_sign")
    if raw is not None:
        _check_raw(raw, by_sign)
    return case.check(loss(student, teacher))


@torch.no_grad()
def _contributions(loss: KDSVD, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """What each sample adds to the loss of each pair of layers, for either relative sign: (pairs, B, 2)."""
    layers = [loss.directions(*maps) for maps in zip(student, teacher, strict=True)]
    of_pairs = [
        torch.stack([loss.differences([sign * each for each in lower], upper) for sign in (1, -1)], 1)
        for lower, upper in pairwise(layers)
    ]
    return torch.stack(of_pairs) / len(student[0])


def _numbers(nested) -> Iterator[float]:
    """Every number in nested lists and dictionaries."""
    if isinstance(nested, (int, float)):
        yield float(nested)
    elif isinstance(nested, (list, dict)):
        for value in nested.values() if isinstance(nested, dict) else nested:
            yield from _numbers(value)


def _check_raw(raw, by_sign: Tensor) -> None:
    """The values belong to the machine that made them, but lie between those of the best and the worst signs."""
    values = list(_numbers(raw.get("values", raw.get("total")) if isinstance(raw, dict) else raw))
    bounds = [(each.amin(1).sum().item(), each.amax(1).sum().item()) for each in by_sign]
    if len(values) != len(bounds):
        values, bounds = [sum(values)], [tuple(map(sum, zip(*bounds, strict=True)))]
    for value, (least, most) in zip(values, bounds, strict=True):
        if not least * (1 - 1e-8) <= value <= most * (1 + 1e-8):
            raise Mismatch(f"raw_lapack_sign: {value} is not between {least} and {most}")


CHECKS: dict[str, Callable[[Case], Difference]] = {
    "ABLoss": check_boundaries,
    "AB": check_boundaries,
    "FactorTransfer": check_factor,
    "FSP": check_flow,
    "KDSVD": check_singular_vectors,
}

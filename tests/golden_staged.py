"""Golden checks of the losses of the methods with a stage of their own, and of KDSVD."""

import re
from collections.abc import Callable, Iterator

import numpy
import torch

from distiller_zoo.abound import ABLoss
from distiller_zoo.factor import FactorTransfer, Paraphraser, Translator
from distiller_zoo.fsp import FSP
from distiller_zoo.kdsvd import KDSVD
from tests.golden_case import Case, fill_module
from tests.golden_format import Mismatch, compare
from tests.golden_maps import check_modules, pair, prefixes, sides


def check_boundaries(case: Case) -> None:
    student, teacher = sides(case)
    margin = re.search(r"margin_?([\d.]+)", case.case)
    case.check(ABLoss(len(student), float(margin[1]) if margin else 1.0)(student, teacher))


def check_flow(case: Case) -> None:
    student, teacher = sides(case)
    shapes = ([tensor.shape for tensor in each] for each in (student, teacher))
    case.check(FSP(*shapes)(student, teacher))


def _powers(name: str) -> dict[str, int]:
    """p1 and p2, where the case's name has them: p1_2_p2_1, p1=2,p2=1 and the like."""
    return {power: int(value) for power, value in re.findall(r"(p[12])[_=]?(\d)(?!\d)", name)}


def check_factor(case: Case) -> None:
    student, teacher = pair(case)
    names = prefixes(case)
    if not names and "translator" in case.case:
        names = ["translator", "paraphraser"]
    modules = {}
    for name in names:
        is_paraphraser = "para" in name
        module = Paraphraser(teacher.shape) if is_paraphraser else Translator(student.shape, teacher.shape)
        modules[name] = fill_module(name, module).train(not is_paraphraser)
        if is_paraphraser:
            module.requires_grad_(False)
            teacher = module(teacher, is_factor=True)
        else:
            student = module(student)
    check_modules(case, [FactorTransfer(**_powers(case.case))(student, teacher)], modules)


def check_singular_vectors(case: Case) -> None:
    student, teacher = sides(case)
    case.entry.get("raw_lapack_sign")  # belongs to the machine it was made on
    golden = case.entry.get("per_pair_per_sample_contribution_by_relative_sign")
    if golden is not None:
        _check_contributions(student, teacher, list(_pairs_of_numbers(golden)))
    case.check(KDSVD()(student, teacher))


def _pairs_of_numbers(nested) -> Iterator[list[float]]:
    """The innermost lists of two numbers, one per pair of maps and sample."""
    values = list(nested.values()) if isinstance(nested, dict) else nested
    if len(values) == 2 and all(isinstance(value, float | int) for value in values):
        yield list(values)
        return
    for value in values:
        yield from _pairs_of_numbers(value)


@torch.no_grad()
def _check_contributions(student: list, teacher: list, golden: list[list[float]]) -> None:
    """Every sample's part of every pair's loss is one of the two that the signs allow."""
    batch = len(student[0])
    parts = numpy.array(
        [
            [
                float(value) / batch
                for value in KDSVD()(*([each[i : i + 1] for each in maps] for maps in (student, teacher)))
            ]
            for i in range(batch)
        ]
    ).T.flatten()  # pair by pair
    if len(parts) != len(golden):
        raise Mismatch(f"{len(golden)} contributions instead of {len(parts)}")
    for ours, choices in zip(parts, golden, strict=True):
        compare("contribution of a sample", ours, min(choices, key=lambda choice: abs(choice - ours)))


CHECKS: dict[str, Callable[[Case], None]] = {
    "ABLoss": check_boundaries,
    "AB": check_boundaries,
    "FactorTransfer": check_factor,
    "FSP": check_flow,
    "KDSVD": check_singular_vectors,
}

"""Golden checks of single facts: recipes, how layers start, schedules."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distiller_zoo import Task, find_distiller
from distiller_zoo.pathways import PathwayTransform
from distiller_zoo.srrl import SRRL
from helper.recipes import recipe_of
from models import build_model
from tests import golden_steps
from tests.golden_format import Family, Mismatch, Reader, compare, equal
from tests.stand_in import StandIn

#: How far a measured standard deviation may be from the expected one: it is an estimate.
SPREAD = 0.08


def recipe_families(content: dict, path: Path) -> Iterator[Family]:
    """One family per row of the recipes."""
    for row in content["recipes"]:
        chosen = "".join(f" {flag}={value}" for flag, value in row.get("chosen", {}).items())
        yield (
            f"{row['method']} recipe {row['dataset']} {row['teacher']}->{row['student']}{chosen}",
            partial(check_recipe, row),
        )


def check_recipe(row: Mapping) -> None:
    """What the recipe table gives, or else the flag's default, against the authors' configuration."""
    row = Reader(row, ("source",))
    chosen = row.get("chosen", {})
    recipe = recipe_of(row["dataset"], row["teacher"], row["student"], row["method"], chosen)
    ours = {flag.argument: flag.default for flag in find_distiller(row["method"]).flags}
    ours |= {argument: value for argument, (value, _) in recipe.items()}
    for argument, expected in row["expected"].items():
        if argument not in ours:
            raise Mismatch(f"{argument}: no recipe and no flag gives it")
        if isinstance(expected, (str, bool)):
            equal(argument, ours[argument], expected)
        else:
            compare(argument, ours[argument], expected)
    row.finish("recipe")


def initialisation_families(content: dict, path: Path) -> Iterator[Family]:
    """One family per fact on how a layer starts."""
    for fact in content["initialisation"]:
        yield f"{fact['method']} initialisation", partial(check_spread, fact)


def check_spread(fact: Mapping) -> None:
    """The standard deviation of a layer's first weights; `expected` begins with its formula."""
    layers, sizes = SPREADS[fact["method"]]()
    formula = re.match(r"[\w+*/(). ]+", fact["expected"])[0]
    expected = eval(formula, {"__builtins__": {}, "sqrt": math.sqrt}, sizes)
    measured = torch.cat([layer.weight.flatten() for layer in layers]).std()
    compare(fact["what"], measured, expected, relative=SPREAD)


def _pathways() -> tuple[list[nn.Module], dict[str, int]]:
    return [PathwayTransform(64, 80).attention for _ in range(60)], {"m": 64}


def _connector(form: str) -> tuple[list[nn.Module], dict[str, int]]:
    student, teacher = (StandIn([(8, 2, 2), (width, 2, 2)], width, 10) for width in (64, 96))
    task = Task(10, 32, 4, torch.zeros(8, dtype=torch.int64))
    convolution, *_ = SRRL(student, teacher, task, srrl_form=form).connector
    return [convolution], {"in_channels": 64, "out_channels": 96}


#: Method -> layers that start alike, and the sizes that the formula names.
SPREADS: dict[str, Callable[[], tuple[list[nn.Module], dict[str, int]]]] = {
    "distpro": _pathways,
    "srrl pooled": partial(_connector, "pooled"),
    "srrl map": partial(_connector, "map"),
}


def schedule_families(content: dict, path: Path) -> Iterator[Family]:
    """NORM's schedules by kind and name, or a list of facts on stages."""
    if isinstance(content["schedules"], Mapping):
        yield from golden_steps.schedule_families(content, path)
        return
    for fact in content["schedules"]:
        method, *dataset = fact["method"].split()
        yield f"{fact['method']} schedule", partial(check_schedule, fact, method, *dataset)


def check_schedule(fact: Mapping, method: str, dataset: str = "cifar100") -> None:
    """The epochs after which the rate of the first stage falls, or the styles of search and main run."""
    recipe = {argument: value for argument, (value, _) in recipe_of(dataset, None, "", method).items()}
    flags = {flag.argument for flag in find_distiller(method).flags}
    values = {argument: value for argument, value in recipe.items() if argument in flags}
    length = re.search(r"of (\d+)$", fact["what"])
    if length:
        values["init_epochs"] = int(length[1])
    networks = (build_model(name, 4) for name in ("resnet8", "resnet8"))
    distiller = find_distiller(method)(*networks, Task(4, 32, 4, torch.zeros(8, dtype=torch.int64)), **values)
    if length:
        first, *_ = distiller.stages(100)
        equal(fact["what"], list(first.milestones), fact["expected"])
    else:
        styles = [distiller.distpro_search_style, distiller.distpro_style]
        equal(fact["what"], styles, [each.split(" (")[0] for each in fact["expected"]])

"""What is read back from a run folder or a checkpoint: anybody may have written it, so nothing is taken as it is."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from errors import UserError
from helper.options import student_parser

#: What a stored configuration holds beside flags; most of it is found out again.
DERIVED = ("origins", "resume", "wrapper_t", "images_per_pass")
#: The settings that may be null.
MAY_BE_NONE = ("data", "max_steps", "path_t", "model_t", "init")


def read_configuration(stored: object, source: str) -> dict:
    """A stored configuration -> its values, each read as if its flag had been given; raises `UserError`."""
    if not isinstance(stored, Mapping):
        raise UserError(f"{source} does not hold settings; name a run folder")
    parser = student_parser()
    actions = {action.dest: action for action in parser._actions}
    argv = []
    for argument, value in stored.items():
        if value is None or argument in DERIVED:
            continue
        if argument not in actions or argument in ("help", "trials", "sweep"):
            raise UserError(f"{source} holds the unknown setting {argument!r}; was it written by this version?")
        argv += _as_flag(actions[argument], value, source)
    try:
        read = vars(parser.parse_args(argv))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    switches = {name: value for name, value in stored.items() if value is False and read.get(name) is None}
    none = {argument: None for argument in MAY_BE_NONE if argument in stored and stored[argument] is None}
    given = {argument: value for argument, value in read.items() if value is not None}
    return none | given | switches | _images_per_pass(stored, source)


def _images_per_pass(stored: Mapping, source: str) -> dict:
    """The images of a batch that one forward pass saw: some methods' weights have this size."""
    if "images_per_pass" not in stored:
        return {}
    images = stored["images_per_pass"]
    if type(images) is not int or not 1 <= images < 2**31:
        raise UserError(f"{source}: images_per_pass cannot be {str(images)[:100]!r}")
    return {"images_per_pass": images}


def _as_flag(action: argparse.Action, value: object, source: str) -> list[str]:
    name = action.option_strings[-1] if action.nargs != 0 else action.option_strings[0]
    if action.nargs == 0:  # a switch, alone or with its --no-
        if not isinstance(value, bool):
            raise UserError(f"{source}: {name} must be true or false, not {value!r}")
        off = next((option for option in action.option_strings if option.startswith("--no-")), None)
        return [name] if value else [off] if off else []
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in values):
        raise UserError(f"{source}: {name} cannot be {str(value)[:100]!r}")
    text = ",".join(map(str, values))
    if "\0" in text:
        raise UserError(f"{source}: {name} cannot be {text[:100]!r}")
    return [f"{name}={text}"]


#: The entries of `last.pth` beside weights and optimizer.
STATE_KINDS = {
    **dict.fromkeys(("stage_number", "epoch", "stage_step", "step", "epochs_over", "skipped_steps"), int),
    "seconds": float,
    **dict.fromkeys(("accuracies", "choices"), list),
}


def check_state(checkpoint: Mapping, in_main_stage: bool) -> None:
    """Raise `ValueError` where an entry of a run's `last.pth` cannot have been written by a run."""
    for name, kind in STATE_KINDS.items():
        value = checkpoint[name]
        if type(value) is not kind or (kind is not list and not 0 <= value < 2**40):
            raise ValueError(f"{name} is {str(value)[:40]}")
    for name in ("accuracies", "choices"):
        values = checkpoint[name]
        if not all(type(value) is float and math.isfinite(value) for value in values):
            raise ValueError(f"{name} are no numbers")
        if len(values) != (checkpoint["epoch"] if in_main_stage else 0):
            raise ValueError(f"there are {len(values)} {name} of {checkpoint['epoch']} epochs")
    if checkpoint["stage_step"] and not checkpoint["epoch"]:
        raise ValueError("there are steps and no epoch")
    if checkpoint["epoch_state"] is not None:
        _check_epoch_state(checkpoint["epoch_state"])


def _check_epoch_state(state: Mapping) -> None:
    counts = state["meter"]["counts"]
    sums, numbers = state["meter"]["losses"].values(), (state["steps"], state["meter"]["correct"], *counts)
    kinds = [type(value) for value in numbers]
    if kinds != [int, int, int, bool, float, float] or not all(0 <= value < math.inf for value in numbers):
        raise ValueError("the state within the epoch is of another kind")
    if not all(type(value) is float and math.isfinite(value) for value in sums):
        raise ValueError("the sums within the epoch are not finite")
    torch.Generator().set_state(state["random"]["cpu"])


def check_optimizer(state: Mapping, parameters: Sequence[Tensor]) -> dict:
    """The momentum of an SGD optimizer, by the number of its parameter; raises `ValueError` where it does not fit."""
    for number, entry in state["state"].items():
        momentum = entry["momentum_buffer"]
        parameter = parameters[number]
        if momentum is not None and ((momentum.shape, momentum.dtype) != (parameter.shape, parameter.dtype)):
            raise ValueError(f"momentum {number} has another shape or type than its parameter")
        if momentum is not None and not momentum.isfinite().all():
            raise ValueError(f"momentum {number} is not finite")
    return dict(state["state"])


@contextmanager
def contained(source: str) -> Iterator[None]:
    """Turn whatever an entry of the wrong kind causes into a `UserError` that begins with `source`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # an entry may be of any kind, so it may raise anything
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{source}: {type(error).__name__} {reason}; an entry is missing or of the wrong kind"
        ) from None

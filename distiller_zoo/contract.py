"""What a method's author may get wrong in the contract (base.py): refused in one line, or explained below a traceback.

A misspelt name would otherwise change nothing, in silence.
"""

import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from models.backbone import Backbone, Output, evaluating, probe_shapes, random_images
from setting import Setting

#: What `reads` may name: the parts of an `Output`, and what is said of a batch.
READS = (*(name for name in Output._fields if name != "others"), "sample index and negatives")
#: How much of a name must be that of the contract to be taken for a misspelt one (difflib's ratio).
CLOSE = 0.85
#: How far shipped logits may be from the tested ones, as a share of them: what is folded is rounded anew.
ROUNDING = 0.01
#: What every module has, its parameters and buffers among it.
OF_TORCH = vars(nn.Module())
#: What earlier versions called parts of the contract -> today's names: what is set under those would be ignored.
RENAMED = {
    "needs_teacher": "reads_teacher",
    "needs_teacher_output": "reads_teacher_output",
    "needs_teacher_logits": "reads_teacher_logits",
    "needs_targets": "refuses_unlabelled",
    "needs": "flags_work_if",
}


def check_class(method: type, base: type) -> None:
    """Raise `UserError` for what a class declares that the contract of `base` does not know."""
    own = {name: value for name, value in vars(method).items() if not name.startswith("_")}
    where = _where(method)
    for name, value in own.items():
        if name in RENAMED:
            raise UserError(f"{where.format(name)} is called {RENAMED[name]} now; rename it")
        _check_declared(method, base, name, value, where.format(name))
    if (name := own.get("name", "")) and not re.fullmatch(r"[a-z0-9_.]+", name):
        raise UserError(f"{where.format('name')} is '{name}'; it must be of lower-case letters, digits and _")
    _check_names(own.get("reads", ()), READS, where.format("reads"))
    if isinstance(flags := getattr(method, "flags", ()), list | tuple):
        for flag in flags:
            if not isinstance(flag, Setting):
                raise UserError(f"{where.format('flags')} holds {flag!r}; each must be a Flag")
            if not flag.argument.isidentifier():  # a - would be a _ on the command line, and the default would be kept
                raise UserError(f"{where.format('flags')} holds {flag.names[-1]}; name it with letters, digits and _")
            if hasattr(base, flag.argument):  # every method has an attribute of that name
                raise UserError(f"{where.format('flags')} holds {flag.names[0]}, a name of the contract; rename it")
        _check_names(own.get("flags_work_if", ()), [flag.argument for flag in flags], where.format("flags_work_if"))


def _where(method: type) -> str:
    """How messages name an attribute of a method, in place of {}."""
    return f"{method.__module__}: {{}} of {method.__name__}"


def _check_declared(method: type, base: type, name: str, value: Any, what: str) -> None:
    """Raise `UserError` for an attribute whose name is nearly one of the contract, or that is of another type than it
    is there."""
    if not hasattr(method.__base__, name):
        for meant in difflib.get_close_matches(name, vars(base), n=1, cutoff=CLOSE):
            raise UserError(f"{what} is not known; did you mean {meant}? Rename it")
    default = vars(base).get(name)
    if not isinstance(default, str | bool | int | tuple | Mapping):
        return  # a function, or of no interest to the contract
    kind = list | tuple if isinstance(default, tuple) else type(default)
    if not isinstance(value, kind | property):
        raise UserError(f"{what} is {value!r}; it must be a {type(default).__name__}")


def _check_names(names: Any, known: Sequence[str], what: str) -> None:
    """Raise `UserError` for one of the names that is not known."""
    for name in () if isinstance(names, property) else names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{what} names '{name}'{hint} (known: {', '.join(known) or 'none'})")


def check_built(method: nn.Module) -> None:
    """Raise `UserError` for what a method names and lacks, and for parts of it that would not be trained and saved."""
    where = _where(type(method))
    _check_names(method.reads, READS, where.format("reads"))
    _check_names(method.frozen, [name for name, _ in method.named_children()], where.format("frozen"))
    for name, value in vars(method).items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if not name.startswith("_") and any(isinstance(part, nn.Module | nn.Parameter) for part in parts):
            raise UserError(
                f"{where.format(name)} is a {type(value).__name__} of modules, which are neither trained nor saved in "
                "it; make it an nn.ModuleList, nn.ModuleDict or nn.ParameterList"
            )
    check_state(method)


def check_shipped(method: Any, image_size: int) -> None:
    """Raise `UserError` where a method ships another network than the one that it is tested by."""
    images = random_images(image_size).to(next(method.parameters()))
    with explained(type(method), "its predict or export", method.student, image_size), evaluating(method):
        tested = method.predict(images)
        difference = method.export()(images) - tested
    if difference.norm() > ROUNDING * tested.norm():
        raise UserError(
            f"{_where(type(method)).format('export')} gives another network than predict tests; write export so that "
            "what respond adds to the student is shipped with it, or predict without that"
        )


def check_state(method: nn.Module) -> None:
    """Raise `UserError` for a tensor of a method that no checkpoint holds: a resumed run would begin with another."""
    for name, value in vars(method).items():
        parts = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else (value,)
        if name not in OF_TORCH and any(isinstance(part, Tensor) for part in parts):
            raise UserError(
                f"{_where(type(method)).format(name)} holds a tensor, which is neither saved nor resumed; make it a "
                "buffer (self.register_buffer)"
            )


def check_stages(method: Any, stages: Sequence) -> None:
    """Raise `UserError` for a stage that trains what is no part of the method, and for a parameter that none trains."""
    known, trained = {*method.parameters()}, {*method.student.parameters()}
    for stage in stages:
        modules = stage.trained if isinstance(stage.trained, list | tuple) else ()
        if not modules or not known.issuperset(nn.ModuleList(modules).parameters()):
            what = _where(type(method)).format(f"trained of stage {stage.name}")
            raise UserError(f"{what} must be a list of modules that are parts of the method")
        trained.update(nn.ModuleList(modules).parameters())
    trained |= {part for name in method.frozen for part in method.get_submodule(name).parameters()}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad and parameter not in trained:
            raise UserError(
                f"{_where(type(method)).format(name)} is trained by no stage: stages train modules; make a parameter a "
                "part of one (nn.ParameterList), and name a module in a stage's trained or in frozen"
            )


def check_losses(method: nn.Module, losses: Any) -> None:
    """Raise `UserError` where what a method's losses returned is no dictionary of tensors, or of a lower precision."""
    what = _where(type(method)).format("losses")
    if not isinstance(losses, dict):
        raise UserError(f"{what} returned a {type(losses).__name__}; return a dictionary, each loss by its name")
    for name, value in losses.items():
        if not isinstance(value, Tensor):  # a sum over no maps is the number 0
            raise UserError(f"{what} returned a {type(value).__name__} for {name}; return a tensor")
        if value.dtype in (torch.bfloat16, torch.float16):  # of maps that nobody widened
            dtype = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{what} computed {name} in {dtype}; name what it reads of the networks in reads")


@contextmanager
def explained(method: type, call: str, student: Backbone, image_size: int, teacher: Any = None) -> Iterator[None]:
    """Within this block, in which `call` of a method is made, an error that is not the user's ends with a line on where
    in the method it was raised and, where shapes or numbers of maps may be the reason, on those of both networks.

    `teacher` is its network, its `Output`, or None.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        file = Path(sys.modules[method.__module__].__file__ or "")
        error.add_note(f"in --distill {method.name}: {_place(error, file) or f'{call} ({file})'}")
        if "scalar outputs" in str(error):
            error.add_note("a loss must be one number: take its mean over the batch")
        elif "finished reduction in the prior iteration" in str(error):  # torch's, of several processes
            error.add_note("a loss does not read everything that is trained: give the method uses_everything = False")
        elif isinstance(error, IndexError | RuntimeError | ValueError | AssertionError):
            with suppress(Exception):  # of a network that cannot be run
                sides = (("student", student), ("teacher", teacher))
                shown = [f"{side}: {_describe(one, image_size)}" for side, one in sides if one is not None]
                error.add_note(f"maps (channels x height x width), number 0 first; {'; '.join(shown)}")
        raise


def _place(error: BaseException, file: Path) -> str:
    """The innermost line of a file that an error went through, and its function; empty where there is none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if Path(code.co_filename) == file:
            found = f"{code.co_name}, line {trace.tb_lineno} of {file}"
        trace = trace.tb_next
    return found


def _describe(shown: Backbone | Output, image_size: int) -> str:
    """The shapes of a network's maps."""
    if isinstance(shown, Output):
        shapes = [tuple(each.shape[1:]) for each in (*shown.maps, shown.final)]
    else:
        found = probe_shapes(shown, image_size)
        shapes = [*found.maps, found.final]
    *maps, final = ("x".join(map(str, shape)) for shape in shapes)
    return f"{', '.join(maps)}, final {final}"

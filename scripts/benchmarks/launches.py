"""What a GPU would launch in a training step, and how often the host would wait for it, counted on any device.

python scripts/benchmarks/launches.py SCRIPT [its arguments]   (any training script with an optimizer of torch's)

Launches are the operations that torch dispatches, forward, backward and optimizer, but for those that compute nothing:
views, and memory that is not filled. An operation on many tensors (`_foreach_*`, `_fused_*`) counts as one, and so does
one that a library splits: a convolution's backward pass, or its bias where cuDNN has none. Synchronisations are the
operations whose result the host reads or needs, and numbers of the host that become a tensor.
"""

import json
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from errors import UserError, count_of, run_script

#: Operations that only make memory, or change how it is seen.
_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "as_strided_", "_unsafe_view")
#: Operations whose result's size or value the host has to know; a copy of the host's numbers waits as well.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "lift_fresh")
#: What reads a tensor on the host without an operation, where it is there already.
_READING = (Tensor.cpu, Tensor.numpy, Tensor.tolist)
#: A script's steps of which the last one is counted; in the first ones momentum and the like are made.
STEPS = 4


class Counts(NamedTuple):
    """Of one step; `operations` are the launches by name."""

    launches: int
    synchronisations: int
    operations: Counter[str]


class LaunchCounter(TorchDispatchMode):
    """Counts the operations that are dispatched within it."""

    def __init__(self):
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.synchronisations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in _WAITING or _selects_by_mask(name, tensors) or _copies_to_host(tensors, result):
            self.synchronisations += 1
        views = any(
            value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns
        )
        computes = any(isinstance(leaf, Tensor) for leaf in tree_leaves((result, tensors)))
        if computes and not views and name not in (*_EMPTY, "_local_scalar_dense"):
            self.operations[name] += 1
        return result

    def counts(self) -> Counts:
        """What was counted so far."""
        return Counts(self.operations.total(), self.synchronisations, Counter(self.operations))

    def reset(self) -> None:
        """Count anew."""
        self.operations.clear()
        self.synchronisations = 0


def _selects_by_mask(name: str, tensors: list[Tensor]) -> bool:
    return name in ("index", "index_put", "index_put_") and any(one.dtype == torch.bool for one in tensors[1:])


def _copies_to_host(tensors: list[Tensor], result: Any) -> bool:
    found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return any(one.device.type == "cpu" for one in found) and any(one.device.type != "cpu" for one in tensors)


class _Reads(TorchFunctionMode):
    """Counts what the host reads without an operation."""

    def __init__(self, counter: LaunchCounter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.counter.synchronisations += function in _READING
        return function(*args, **(kwargs or {}))


def count_launches(step: Callable[[], object]) -> Counts:
    """What one call of `step` launches."""
    counter = LaunchCounter()
    with _Reads(counter), counter:
        step()
    return counter.counts()


class _Counted(Exception):
    """A script has taken its steps."""


def count_script(path: str, arguments: list[str]) -> Counts:
    """What a training script launches between two steps of its optimizer, reading a batch included.

    Raises `UserError` where it ends before.
    """
    counter, found = LaunchCounter(), []

    def end_step(*_) -> None:
        found.append(counter.counts())
        counter.reset()
        if len(found) == STEPS:
            raise _Counted

    hook, before = register_optimizer_step_post_hook(end_step), (sys.argv, sys.path)
    sys.argv, sys.path = [path, *arguments], [str(Path(path).resolve().parent), *sys.path]
    try:
        with _Reads(counter), counter:
            runpy.run_path(path, run_name="__main__")
    except (_Counted, SystemExit):
        pass
    finally:
        hook.remove()
        sys.argv, sys.path = before
    if len(found) < STEPS:
        raise UserError(f"{path}: it ended after {count_of(len(found), 'step')} of an optimizer; {STEPS} are needed")
    return found[-1]


def main(argv=None) -> Counts:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        raise UserError("give a training script and its arguments: launches.py train_student.py --epochs 1")
    counts = count_script(argv[0], argv[1:])
    print(json.dumps({"launches": counts.launches, "synchronisations": counts.synchronisations}))
    return counts


if __name__ == "__main__":
    run_script(main)

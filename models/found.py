"""Where the weights are in other people's checkpoints, and what else those tell."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from errors import UserError, count_of
from models.pickled import Unknown

Weights = dict[str, Tensor]

#: Where codes keep a network's weights in a checkpoint; the first that is there is taken.
ENTRIES = ("model", "state_dict", "model_state_dict", "model_state", "net", "weights", "student", "module")
#: Where they keep the exponential moving average of them.
EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema")
#: What profilers and averages leave among the weights.
COUNTERS = ("total_ops", "total_params", "n_averaged")
#: Where they keep the accuracy.
ACCURACIES = ("accuracy", "best_acc", "best_accuracy", "best_acc1", "best_top1", "acc1", "acc")
EMA_FLAG = "--ema"
#: What DataParallel, DDP and torch.compile put before keys.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.){1,3}")


class Found(NamedTuple):
    """Weights by their names, and a sentence on everything that was chosen, converted or left out."""

    weights: Weights
    notes: list[str]


class Accuracy(NamedTuple):
    """An accuracy on record in percent, None where there is none, and a sentence where it was converted."""

    percent: float | None
    notes: list[str]


def locate_weights(checkpoint: Mapping, source: str, ema: bool | None = False) -> Found:
    """The state_dict in a checkpoint: an entry with one of the usual names, the one entry that is a mapping of tensors,
    or the dictionary itself; with `ema` the moving average of the weights (None: no flag asks for it).

    Keys lose what DataParallel, DDP and torch.compile put before them. Raises `UserError`, naming `source`, where there
    are no weights, several that might be meant, or a pickled module.
    """
    raw, average, notes = *_both(checkpoint, source), []
    if ema and average is None:
        raise UserError(
            f"{source} holds no moving average of weights for {EMA_FLAG}; it holds {list_names(checkpoint)}"
        )
    if raw is None and average is None:
        raise UserError(f"{source} holds no weights; it holds {list_names(checkpoint)}")
    if raw and average:
        asked, unasked = f"without {EMA_FLAG} the others are taken", f"{EMA_FLAG} takes the moving average"
        other = "the raw ones are taken" if ema is None else asked if ema else unasked
        notes.append(f"it holds raw weights ({raw[0]}) and their moving average ({average[0]}); {other}")
    place, entries = average if ema or raw is None else raw
    if place not in ("", *ENTRIES[:2]):
        notes.append(f"weights are read from its entry {place}")
    named = {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, Tensor)}
    weights = {key: value for key, value in named.items() if key.rpartition(".")[2] not in COUNTERS}
    if len(weights) < len(named):
        notes.append(f"left out: {count_of(len(named) - len(weights), 'counter')} ({', '.join(COUNTERS)})")
    if not weights:
        raise UserError(f"{source} holds no weights; it holds {list_names(checkpoint)}")
    plain = {WRAPPERS.sub("", key): value for key, value in weights.items()}
    dropped = dict.fromkeys(match[0] for key in weights if (match := WRAPPERS.match(key)))
    return Found(plain, notes + say_prefixes(dropped))


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(part, Tensor) for part in value.values())


def _both(checkpoint: Mapping, source: str) -> tuple[tuple[str, Mapping] | None, tuple[str, Mapping] | None]:
    """The raw weights and the moving average, each as (place, mapping of tensors), where they are there."""
    average = next((found for name in EMA_ENTRIES if (found := _below(checkpoint, name, source))), None)
    raw = next((found for name in ENTRIES if (found := _below(checkpoint, name, source))), None)
    if raw is None:
        others = [name for name, value in checkpoint.items() if _holds_tensors(value) and name not in EMA_ENTRIES]
        if len(others) > 1 and not _holds_tensors(checkpoint):
            raise UserError(
                f"{source} holds several sets of weights, {list_names(others)}; save one as "
                "{'model': its state_dict()}"
            )
        if len(others) == 1:
            raw = str(others[0]), checkpoint[others[0]]
        elif _holds_tensors(checkpoint):
            raw = "", checkpoint
    return (raw, average) if raw is None or average is not None else _apart(*raw)


def _apart(place: str, weights: Mapping) -> tuple[tuple[str, Mapping], tuple[str, Mapping] | None]:
    """Raw and averaged weights of one mapping whose keys begin with the name of either."""
    averaged = {key: value for key, value in weights.items() if str(key).split(".")[0] in EMA_ENTRIES}
    if not averaged or len(averaged) == len(weights):
        return (place, weights), None
    raw = {key: value for key, value in weights.items() if key not in averaged}
    return (place, raw), (f"{next(iter(averaged)).split('.')[0]}.*", averaged)


def _below(checkpoint: Mapping, name: str, source: str, depth: int = 3) -> tuple[str, Mapping] | None:
    """The weights below an entry, which may be a checkpoint in itself."""
    value = checkpoint.get(name)
    if isinstance(value, Unknown):
        raise UserError(f"{source}: its {name} is a pickled {value.name}; save its state_dict() instead")
    if _holds_tensors(value):
        return name, value
    if not isinstance(value, Mapping) or depth == 0:
        return None
    inner = (found for entry in (*ENTRIES, "shadow") if (found := _below(value, entry, source, depth - 1)))
    return next(((f"{name}.{place}", weights) for place, weights in inner), None)


def list_names(names) -> str:
    """The first names of some, and how many more there are."""
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def say_prefixes(prefixes: Collection[str], whose: str = "its") -> list[str]:
    """One sentence on parts of keys that are left out; none where there are none."""
    if len(prefixes) > 1:
        return [f"the prefixes {' and '.join(prefixes)} of {whose} keys are left out"]
    return [f"the prefix {prefix} of {whose} keys is left out" for prefix in prefixes]


def recorded_accuracy(checkpoint: Mapping) -> Accuracy:
    """The accuracy that a checkpoint tells, in percent; one of at most 1 is a share, and is converted."""
    for name in ACCURACIES:
        value = checkpoint.get(name)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            continue
        if 0 < value <= 1:
            return Accuracy(100.0 * value, [f"its {name}, {value:g}, is read as {100 * value:g} %"])
        return Accuracy(float(value), [])
    return Accuracy(None, [])

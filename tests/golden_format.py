"""The format of a golden folder: how its inputs and weights are regenerated, and how numbers are compared."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping

import numpy
import torch
from torch import Tensor

RELATIVE, ABSOLUTE = 1e-8, 1e-12
#: A name, and a check that raises `Mismatch`; it may return a `golden_case.Difference`.
Family = tuple[str, Callable[[], object]]


class Mismatch(Exception):
    """A number, name or shape differs from the golden one."""


def generator(tag: str) -> numpy.random.RandomState:
    return numpy.random.RandomState(zlib.crc32(tag.encode()) & 0x7FFFFFFF)


def fill(key: str, shape: Iterable[int]) -> Tensor:
    """The value of one entry of a state_dict, by the fill rule: float32 (int64 for counters)."""
    shape, last = tuple(shape), key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    z = generator(key).standard_normal(size=shape)
    if last == "running_mean" or last == "bias":
        z = 0.1 * z
    elif last == "running_var":
        z = 1 + 0.1 * abs(z)
    elif last == "weight" and len(shape) >= 2:
        z = z / math.sqrt(math.prod(shape[1:]))
    else:
        z = 1 + 0.1 * z
    return torch.from_numpy(numpy.asarray(z, dtype=numpy.float32))


def fill_all(state_dict: Iterable[tuple[str, list[int]]]) -> dict[str, Tensor]:
    return {key: fill(key, shape) for key, shape in state_dict}


def images(n: int, size: int) -> Tensor:
    """(n, 3, size, size) in float64, rounded through float32."""
    return seeded_images((n, 3, size, size))


def seeded_images(shape: Iterable[int]) -> Tensor:
    values = numpy.random.RandomState(0).standard_normal(tuple(shape)).astype(numpy.float32)
    return torch.from_numpy(values).double()


def loss_input(seed: int | str, tag: str, shape: Iterable[int], scale: float = 1.0) -> Tensor:
    values = generator(f"{seed}:{tag}").standard_normal(tuple(shape)).astype(numpy.float32)
    return torch.from_numpy(values).double() * scale


def flatten(values) -> list[float]:
    """Every number in nested lists and tensors; None becomes nan."""
    if isinstance(values, Tensor):
        return values.detach().double().flatten().tolist()
    if isinstance(values, (list, tuple)):
        return [number for value in values for number in flatten(value)]
    return [math.nan if values is None else float(values)]


def compare(where: str, ours, golden, relative: float = RELATIVE, scale: float | None = None) -> float:
    """Raise `Mismatch` unless |ours - golden| <= relative * scale + ABSOLUTE; scale: the largest golden number.

    Returns the largest difference, divided by the scale; 0 where it is below ABSOLUTE.
    """
    ours, golden = flatten(ours), flatten(golden)
    if len(ours) != len(golden):
        raise Mismatch(f"{where}: {len(ours)} numbers instead of {len(golden)}")
    finite = [abs(number) for number in golden if not math.isnan(number)]
    scale = max(finite, default=0.0) if scale is None else scale
    tolerance, largest = relative * scale + ABSOLUTE, 0.0
    for position, (a, b) in enumerate(zip(ours, golden, strict=True)):
        both_nan = math.isnan(a) and math.isnan(b)
        if not both_nan and not abs(a - b) <= tolerance:
            raise Mismatch(f"{where}[{position}]: {a:.10g} instead of {b:.10g} (tolerance {tolerance:.1e})")
        if not both_nan and abs(a - b) > ABSOLUTE:
            largest = max(largest, abs(a - b) / scale)
    return largest


def compare_named(where: str, ours: Mapping[str, float | None], golden: Mapping[str, float | None]) -> float:
    """Compare numbers by name, on the scale of the largest; returns the largest difference as `compare` does."""
    scale, largest = max((abs(value) for value in golden.values() if value is not None), default=0.0), 0.0
    for name, value in golden.items():
        if name not in ours:
            raise Mismatch(f"{where}: {name} is missing")
        largest = max(largest, compare(f"{where}.{name}", ours[name], value, scale=scale))
    return largest


def by_suffix(values: Mapping, names: Iterable[str]) -> dict:
    """Name -> the entry of `values` whose dotted name ends with it; raises `Mismatch` unless there is exactly one."""
    found = {}
    for name in names:
        keys = [key for key in values if key == name or key.endswith(f".{name}")]
        if len(keys) != 1:
            raise Mismatch(f"{name}: {len(keys)} entries have this name here")
        found[name] = values[keys[0]]
    return found


def equal(where: str, ours, golden) -> None:
    if ours != golden:
        raise Mismatch(f"{where}: {ours} instead of {golden}")


def compare_summary(where: str, tensor: Tensor, golden: Mapping) -> None:
    """shape, mean, population standard deviation and first five values of a tensor."""
    if "shape" in golden:
        equal(f"{where}.shape", list(tensor.shape), list(golden["shape"]))
    compare(f"{where}.mean/std", [tensor.mean(), tensor.std(correction=0)], [golden["mean"], golden["std"]])
    first = golden["first5"]
    compare(f"{where}.first5", tensor.flatten()[: len(first)], first, scale=float(tensor.abs().max()))


class Reader(dict):
    """A golden entry that remembers which of its keys were read: a key that nobody checks is an error."""

    def __init__(self, entry: Mapping, informational: Iterable[str] = ()):
        super().__init__(entry)
        self.unread = set(entry) - set(informational)

    def __getitem__(self, key):
        self.unread.discard(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.unread.discard(key)
        return super().get(key, default)

    def finish(self, where: str) -> None:
        if self.unread:
            raise Mismatch(f"{where}: nothing checks {', '.join(sorted(self.unread))}")

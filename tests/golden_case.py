"""One entry of the golden losses: its inputs, its modules, and the comparison of values and gradients."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy
from torch import Tensor, nn

from tests.golden_format import Reader, by_suffix, compare, compare_named, fill, loss_input


class Difference(NamedTuple):
    """The largest relative differences of a case that agrees."""

    value: float
    gradient: float
    loss: str  # a method, or a class of RepDistiller's


class Case:
    """The inputs of one entry, regenerated and compared with their fingerprints, and the checks all losses share."""

    def __init__(self, loss: str, case: str, seed: str, entry: Mapping, arrays: Mapping[str, numpy.ndarray]):
        self.loss, self.case, self.seed, self.entry, self.arrays = loss, case, seed, Reader(entry), arrays
        self.inputs: dict[str, Tensor] = {}
        for tag, description in self.entry["inputs"].items():
            tensor = loss_input(seed, tag, description["shape"], description["scale"])
            compare(f"input {tag}", tensor.flatten()[:5], description["first5"])
            compare(f"input {tag}", [tensor.sum(), tensor.abs().sum()], [description["sum"], description["abs_sum"]])
            self._compare_array("in", tag, tensor)
            self.inputs[tag] = tensor.requires_grad_(description["student"])

    def _compare_array(self, kind: str, tag: str, tensor: Tensor) -> None:
        key = f"{self.loss}|{self.case}|{self.seed}|{kind}|{tag}"
        if key in self.arrays:
            compare(key, tensor, self.arrays[key].tolist(), relative=1e-10)

    def check(
        self, values: list[Tensor] | Mapping[str, Tensor], modules: Mapping[str, nn.Module] | None = None
    ) -> Difference:
        """Compare values, total and gradients; modules by the prefix under which the reference keeps them."""
        if isinstance(values, Mapping):
            total, golden = sum(values.values()), self.entry["values"]
            value_difference = compare_named("values", by_suffix(values, golden), golden)
        else:
            total, value_difference = sum(values), compare("values", values, self.entry["values"])
        value_difference = max(value_difference, compare("total", total, self.entry["total"]))
        total.backward()
        norms, firsts = (self.entry.get(key, {}) for key in ("grad_norm_student", "grad_first5_student"))
        differences = [0.0]
        for tag, norm in norms.items():
            gradient = self.inputs[tag].grad
            differences.append(compare(f"gradient of {tag}", gradient.norm(), norm))
            where, scale = f"gradient of {tag}", float(gradient.abs().max())
            differences.append(compare(where, gradient.flatten()[:5], firsts[tag], scale=scale))
            self._compare_array("grad", tag, gradient)
        parameters = {
            f"{prefix}.{key}": parameter.grad.norm().item()
            for prefix, module in (modules or {}).items()
            for key, parameter in module.named_parameters()
            if parameter.grad is not None
        }
        golden = self.entry.get("grad_norm_params", {})
        differences.append(compare_named("grad_norm_params", by_suffix(parameters, golden), golden))
        return Difference(value_difference, max(differences), self.loss)


def fill_module(prefix: str, module: nn.Module) -> nn.Module:
    module.load_state_dict({key: fill(f"{prefix}.{key}", value.shape) for key, value in module.state_dict().items()})
    return module.double()

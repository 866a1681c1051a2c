"""Golden checks of the losses that compare feature maps, or the relations between the images of a batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distiller_zoo.attention import Attention
from distiller_zoo.correlation import Correlation, LinearEmbed
from distiller_zoo.hint import ConvReg, HintLoss
from distiller_zoo.nst import NSTLoss
from distiller_zoo.pkt import PKT
from distiller_zoo.rkd import RKDLoss
from distiller_zoo.similarity import Similarity
from distiller_zoo.vid import VIDLoss
from tests.golden_case import Case, Difference, fill_module
from tests.golden_format import Mismatch, compare, compare_named, equal

#: The width of CC's embeddings where the entry does not show it.
EMBEDDING_WIDTH = 128


def sides(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs of the student and of the teacher, in the order of the file; as many of each."""
    student = [tensor for tensor in case.inputs.values() if tensor.requires_grad]
    teacher = [tensor for tensor in case.inputs.values() if not tensor.requires_grad]
    if not student or len(student) != len(teacher):
        raise Mismatch(f"{len(student)} inputs of the student and {len(teacher)} of the teacher")
    return student, teacher


def pair(case: Case) -> tuple[Tensor, Tensor]:
    """The one input of either side."""
    (student,), (teacher,) = sides(case)
    return student, teacher


def prefixes(case: Case) -> list[str]:
    """The prefixes of the modules of an entry, in the order in which they appear."""
    state = [name for name, _ in case.entry.get("module_state_dict", [])]
    names = [*state, *case.entry.get("grad_norm_params", {})]
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def check_modules(case: Case, values: list[Tensor], modules: dict[str, nn.Module]) -> Difference:
    """As `Case.check`, and the modules' keys and shapes, and their BatchNorms' running statistics."""
    state = {
        f"{prefix}.{key}": value for prefix, module in modules.items() for key, value in module.state_dict().items()
    }
    if "module_state_dict" in case.entry:
        shapes = [[name, list(value.shape)] for name, value in state.items()]
        equal("module_state_dict", shapes, [[name, list(shape)] for name, shape in case.entry["module_state_dict"]])
    for name, mean in case.entry.get("bn_after", {}).items():
        compare_named("bn_after", {key: value.double().mean() for key, value in state.items()}, {name: mean[0]})
    return case.check(values, modules)


def check_hint(case: Case) -> Difference:
    student, teacher = pair(case)
    modules = {}
    if prefixes(case) or case.case.startswith("convreg"):
        prefix = (prefixes(case) or ["regress_s"])[0]
        modules[prefix] = fill_module(prefix, ConvReg(student.shape, teacher.shape)).train()
        student = modules[prefix](student)
    return check_modules(case, [HintLoss()(student, teacher)], modules)


def check_correlation(case: Case) -> Difference:
    student, teacher = pair(case)
    modules = {}
    if prefixes(case) or "embed" in case.case:
        shapes = dict(case.entry.get("module_state_dict", []))
        names = sorted(prefixes(case) or ["embed_s", "embed_t"])  # the student's first
        for prefix, vectors in zip(names, (student, teacher), strict=True):
            width = shapes.get(f"{prefix}.linear.weight", [EMBEDDING_WIDTH])[0]
            modules[prefix] = fill_module(prefix, LinearEmbed(vectors[0].numel(), width))
        student, teacher = (
            module(vectors) for module, vectors in zip(modules.values(), (student, teacher), strict=True)
        )
    return check_modules(case, [Correlation()(student, teacher)], modules)


def check_vid(case: Case) -> Difference:
    student, teacher = sides(case)
    names = prefixes(case)
    widths = [(s.shape[1], t.shape[1], t.shape[1]) for s, t in zip(student, teacher, strict=True)]
    modules = {name: VIDLoss(*width).double() for name, width in zip(names, widths, strict=True)}
    starts = {name: module.log_scale.detach().clone() for name, module in modules.items()}
    for name, module in modules.items():
        fill_module(name, module)
    difference = check_modules(case, _vid_values(modules, student, teacher), modules)
    if "default_log_scale_float32" in case.entry:
        golden = case.entry["default_log_scale_float32"]
        for start in starts.values():
            compare("default log_scale", start, [golden] * len(start))
    if "values_with_default_log_scale" in case.entry:
        for name, module in modules.items():
            module.log_scale.data.copy_(starts[name])
        with torch.no_grad():
            ours = _vid_values(modules, student, teacher)
        compare("values with default log_scale", ours, case.entry["values_with_default_log_scale"])
    return difference


def _vid_values(modules: dict[str, nn.Module], student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    return [module(s, t) for module, s, t in zip(modules.values(), student, teacher, strict=True)]


def check_layers(loss: nn.Module) -> Callable[[Case], Difference]:
    """The check of a loss that takes two lists of maps and returns a list."""
    return lambda case: case.check(loss(*sides(case)))


def check_pair(loss: nn.Module) -> Callable[[Case], Difference]:
    """The check of a loss that takes one tensor of either side."""
    return lambda case: case.check([loss(*pair(case))])


CHECKS: dict[str, Callable[[Case], Difference]] = {
    "HintLoss": check_hint,
    "Attention": check_layers(Attention()),
    "Similarity": check_layers(Similarity()),
    "Correlation": check_correlation,
    "VIDLoss": check_vid,
    "RKDLoss": check_pair(RKDLoss()),
    "RKD": check_pair(RKDLoss()),
    "PKT": check_pair(PKT()),
    "NSTLoss": check_layers(NSTLoss()),
    "NST": check_layers(NSTLoss()),
}

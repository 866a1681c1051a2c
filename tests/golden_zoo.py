"""Golden checks of the methods beyond RepDistiller's: `cases[method][case][seed]`.

Methods are built around stand-ins with the shapes of the inputs, filled by the hashed keys of the file, and asked for
their loss. The text under `how` says what else a case needs.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo import Distiller, Progress, Task, find_distiller
from distiller_zoo.factor import FactorTransfer
from distiller_zoo.pathways import STYLES
from tests import golden_zoo_networks
from tests.golden_case import Case, Difference
from tests.golden_format import Family, by_suffix, compare, equal, fill, loss_input
from tests.golden_losses import check_entry, read_arrays
from tests.stand_in import StandIn, output

#: Text for people, and what other code gives.
INFORMATIONAL = ("largest_relative_difference", "note", "rows", "progress", "inputs_are", "labels_rule", "scores_rule")
#: The shape of a stem's map, which no method here reads.
STEM = (2, 4, 4)


class ZooCase(Case):
    """An entry of the zoo, and its inputs by side and kind: `<method>_<kind><number>_<s or t>`."""

    def __init__(self, how: str, method: str, case: str, seed: str, entry: Mapping, arrays: Mapping):
        self.how = how
        kept = {"inputs": {}} | {
            key: value
            for key, value in entry.items()
            if key not in INFORMATIONAL and not key.startswith(("ours_", "product_now_")) and "as_it_runs" not in key
        }
        super().__init__(method, case, seed, kept, arrays)

    def tensors(self, kind: str, side: str) -> list[Tensor]:
        """The inputs whose tag is the kind, a number if any, and the side."""
        return [
            tensor for tag, tensor in self.inputs.items() if re.fullmatch(rf"(?:.*_)?{kind}\d*_{side}", tag) is not None
        ]

    def tensor(self, kind: str, side: str) -> Tensor | None:
        """The one input of a kind and side; None where there is none."""
        return next(iter(self.tensors(kind, side)), None)

    @property
    def labels(self) -> Tensor:
        return torch.tensor(self.entry["labels"])

    def number(self, name: str, default: float) -> float:
        """The number behind a name in the case's name: T4_beta0.5."""
        found = re.search(rf"(?:^|_){name}(\d+(?:\.\d+)?)", self.case)
        return float(found[1]) if found else default

    def build(self, student: nn.Module, teacher: nn.Module, **hyper_parameters) -> Distiller:
        """The method around two networks, with the weights of the file, in float64 and train mode."""
        batch = len(next(iter(self.inputs.values())))
        task = Task(student.get_classifier().out_features, 32, batch, torch.zeros(2 * batch, dtype=torch.int64))
        method = find_distiller(self.loss)(student, teacher, task, **hyper_parameters)
        fill_by_keys(method, self.entry.get("module_state_dict", []))
        return method.double().train()


def fill_by_keys(module: nn.Module, keys: list) -> None:
    """Fill the entries of a state_dict that end like the hashed keys behind their first part."""
    state = module.state_dict()
    own = by_suffix({name: name for name in state}, [key.split(".", 1)[1] for key, _ in keys])
    for key, shape in keys:
        name = own[key.split(".", 1)[1]]
        equal(f"shape of {name}", list(state[name].shape), list(shape))
        state[name] = fill(key, shape)
    module.load_state_dict(state)


def _shapes(maps: list[Tensor]) -> list[tuple[int, int, int]]:
    return [tuple(each.shape[1:]) for each in maps]


def _stand_ins(student: list[Tensor], teacher: list[Tensor], stem: bool = True, num_classes: int = 2, pooled=(2, 2)):
    stems = [STEM] if stem else []
    sides = zip((student, teacher), pooled, strict=True)
    return [StandIn([*stems, *_shapes(maps)], width, num_classes) for maps, width in sides]


def check_srrl(case: ZooCase) -> Difference:
    student, teacher = case.tensor("f", "s"), case.tensor("f", "t")
    pooled_student = case.tensor("p", "s") if student is None else student.mean((2, 3))
    pooled_teacher = case.tensor("p", "t") if teacher is None else teacher.mean((2, 3))
    logits = case.tensor("z", "t")
    networks = [StandIn([STEM], pooled.shape[1], logits.shape[1]) for pooled in (pooled_student, pooled_teacher)]
    method = case.build(*networks, srrl_form="pooled" if student is None else "map")
    shown = output([] if student is None else [student], pooled_student)
    statistics, regression = method.terms(shown, output([], pooled_teacher, logits))
    return case.check({"statistics": statistics, "regression": regression}, {"method": method})


def check_semckd(case: ZooCase) -> Difference:
    student, teacher = case.tensors("f", "s"), case.tensors("f", "t")
    method = case.build(*_stand_ins(student, teacher))
    sides = [output(maps, stem=maps[0]) for maps in (student, teacher)]
    golden = case.entry.get("attention_sum_first3", [])
    with torch.no_grad():
        attention = method.attention(*sides)
    for image, row in enumerate(golden):
        compare(f"attention of image {image}", attention[image], row)
    return case.check({"semckd": method.feature_loss(*sides, None, None)}, {"method": method})


def check_reviewkd(case: ZooCase) -> Difference:
    kind = "f" if case.tensors("f", "s") else "pre"
    student, teacher = case.tensors(kind, "s"), case.tensors(kind, "t")
    pooled = [case.tensor("p", side) for side in "st"]
    widths = [each.shape[1] for each in pooled]
    mid_channels = case.entry.get("mid_channels", 512)
    method = case.build(*_stand_ins(student, teacher, pooled=widths), review_width=mid_channels)

    def loss(student_is_behind: bool, teacher_is_behind: bool) -> Tensor:
        shown = [
            output([F.relu(each) if is_behind else each for each in maps], vector, stem=maps[0])
            for maps, vector, is_behind in zip(
                (student, teacher), pooled, (student_is_behind, teacher_is_behind), strict=True
            )
        ]
        return method.feature_loss(*shown, None, None)

    by_relu = case.entry.get("by_relu")
    if by_relu is None:
        return case.check({"reviewkd": loss(False, False)}, {"method": method})
    places = {name: ("student_behind" in name, "teacher_behind" in name) for name in by_relu}
    for name, place in places.items():
        with torch.no_grad():
            compare(name, loss(*place), by_relu[name])
    used = min(by_relu, key=lambda name: abs(by_relu[name] - case.entry["total"]))
    fill_by_keys(method, case.entry["module_state_dict"])  # the passes above have moved the running statistics
    return case.check({"reviewkd": loss(*places[used])}, {"method": method})


def check_simkd(case: ZooCase) -> Difference:
    student, teacher = case.tensor("f", "s"), case.tensor("f", "t")
    shapes = dict(case.entry["module_state_dict"])
    classes = next(shape[0] for key, shape in shapes.items() if key.endswith("classifier.weight"))
    networks = _stand_ins([student], [teacher], num_classes=classes, pooled=(student.shape[1], teacher.shape[1]))
    method = case.build(*networks, projector_factor=case.entry["factor"])
    networks[0].shown = [student, student]
    shown = method.respond(torch.zeros(len(student), 3, 32, 32), None)
    prediction = case.entry["prediction_first5"]
    compare("prediction", shown.logits.flatten()[: len(prediction)], prediction)
    return case.check({"simkd": method.feature_loss(shown, output([teacher]), None, None)}, {"method": method})


def check_distpro(case: ZooCase) -> Difference | None:
    if "score_gradient" in case.entry:
        return golden_zoo_networks.check_score_gradient(case)
    student, teacher = case.tensors("f", "s"), case.tensors("f", "t")
    method = case.build(*_stand_ins(student, teacher, stem=False), distpro_style="constant")
    losses = method.pathways(student, teacher)
    compare("per_pathway", losses[: len(case.entry["per_pathway"])], case.entry["per_pathway"])
    scores = loss_input(case.seed, "distpro_scores", (len(losses),))
    weights = STYLES[case.entry["style"]](scores, case.entry["kd_weight"])
    return case.check({"distpro": (weights * losses).sum()}, {"method": method})


def check_one(case: ZooCase) -> Difference | None:
    if not case.inputs:
        return golden_zoo_networks.check_ensemble(case)
    branches, gate = case.tensors("z", "s"), case.tensor("gate", "s")
    values = {"branches": len(branches), "ramp_epochs": case.entry["ramp_epochs"]}
    method = case.build(golden_zoo_networks.network("resnet8", branches[0].shape[1]), None, **values)
    shown = golden_zoo_networks.branch_output(branches, gate)
    progress = Progress(case.entry["epoch_counted_from_0"], 300)
    return case.check(method.losses(shown, None, case.labels, None, progress))


def check_sskd(case: ZooCase) -> Difference:
    logits = [case.tensor("z", side) for side in "st"]
    pooled = [case.tensor("p", side) for side in "st"]
    networks = [StandIn([STEM], each.shape[1], logits[0].shape[1]) for each in pooled]
    method = case.build(*networks, gamma=0.1, alpha=0.9)
    shown = [output([], *each) for each in zip(pooled, logits, strict=True)]
    return case.check(method.losses(*shown, case.labels, None, Progress(0, 240)), {"method": method})


def check_ofd(case: ZooCase) -> Difference:
    student, teacher = case.tensors("f", "s"), case.tensors("f", "t")
    norms = []
    for values in case.entry["teacher_bn"]:
        bn = nn.BatchNorm2d(len(values["weight"]))
        bn.weight.data, bn.bias.data = torch.tensor(values["weight"]), torch.tensor(values["bias"])
        norms.append(bn)
    networks = _stand_ins(student, teacher)
    networks[1].batch_norms = norms
    method = case.build(*networks, beta=0.001)
    for layer, golden in zip(method.layers, case.entry.get("margins", []), strict=False):
        compare("margins", layer.margin.flatten()[: len(golden)], golden)
    shown = [output(maps, stem=maps[0]) for maps in (student, teacher)]
    loss = method.beta * method.feature_loss(*shown, None, None)
    return case.check({"ofd": loss}, {"method": method})


def _logit_method(case: ZooCase, **hyper_parameters) -> Distiller:
    logits = next(iter(case.inputs.values()))
    networks = [StandIn([STEM], 2, logits.shape[1]) for _ in "st"]
    return case.build(*networks, logit_standardization="standardised" in case.case, **hyper_parameters)


def check_logits(case: ZooCase) -> Difference:
    """kd, dkd and dist, by the numbers in the case's name."""
    weights = {
        "kd": {"gamma": 0.1, "alpha": 9.0 if "standardised" in case.case else 0.9},
        "dkd": {"gamma": 1.0, "dkd_alpha": 1.0, "dkd_beta": case.number("beta", 8.0), "warmup_epochs": 20},
        "dist": {"gamma": 1.0, "beta": 2.0},
    }
    method = _logit_method(case, kd_T=case.number("T", 4.0), **weights[case.loss])
    shown = [output([], logits=case.inputs[f"logit_{side}"]) for side in "st"]
    return case.check(method.losses(*shown, case.labels, None, Progress(19, 240)))


def check_mlkd(case: ZooCase) -> Difference | None:
    if not case.inputs:
        return golden_zoo_networks.check_two_passes(case)
    weight = 9.0 if "standardised" in case.case else 0.9
    temperatures = tuple(case.entry["temperatures"])
    values = {"alpha": weight, "beta": weight, "mlkd_temperatures": temperatures}
    method = _logit_method(case, gamma=0.1, **values)
    logits = {side: torch.cat([case.inputs[f"weak_{side}"], case.inputs[f"strong_{side}"]]) for side in "st"}
    terms = method.losses(*(output([], logits=logits[side]) for side in "st"), case.labels, None, Progress(0, 240))
    if "as_published" in case.case:
        terms["kd_strong"] = _slip(method, logits, temperatures)
    sums = {name: terms[name] + terms[f"{name}_strong"] for name in ("ce", "kd")}
    return case.check({**sums, "class": terms["class"], "batch": terms["batch"]})


def _slip(method: Distiller, logits: dict[str, Tensor], temperatures: tuple[float, ...]) -> Tensor:
    """The strong view's KL as the published code has it: at the last two temperatures of the weak view's logits."""
    student, teacher = method.compared_logits(*(output([], logits=logits[side]) for side in "st"))
    (weak, strong), (teacher_weak, teacher_strong) = student.chunk(2), teacher.chunk(2)
    divergence = method.divergence(strong, teacher_strong, temperatures[:-2])
    return method.alpha * (divergence + method.divergence(weak, teacher_weak, temperatures[-2:]))


def check_factor(case: ZooCase) -> Difference:
    student, teacher = case.tensor("factor", "s"), case.tensor("factor", "t")
    loss = FactorTransfer(norm="whole" if "whole" in case.case else "channels")
    return case.check({"factor": loss(student, teacher)})


CHECKS: dict[str, Callable[[ZooCase], Difference | None]] = {
    "srrl": check_srrl,
    "semckd": check_semckd,
    "reviewkd": check_reviewkd,
    "simkd": check_simkd,
    "distpro": check_distpro,
    "one": check_one,
    "sskd": check_sskd,
    "ofd": check_ofd,
    "dkd": check_logits,
    "kd": check_logits,
    "dist": check_logits,
    "mlkd": check_mlkd,
    "factor": check_factor,
}


def families(content: dict, path: Path) -> Iterator[Family]:
    """One family per method, case and seed; a method without a check here is a failure by name."""
    arrays = read_arrays(path)
    for method, cases in content["cases"].items():
        for case_name, seeds in cases.items():
            for seed, entry in seeds.items():
                name = f"{method} {case_name} seed {seed}"
                kind = partial(ZooCase, content.get("how", {}).get(method, ""))
                yield name, partial(check_entry, CHECKS.get(method), kind, method, case_name, seed, entry, arrays)

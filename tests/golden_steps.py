"""Golden checks of NORM's training: whole steps, the loss arithmetic, the schedules."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from dataset import Batch
from distiller_zoo import Progress, Task
from distiller_zoo.feature_transform import norm_loss
from distiller_zoo.kd import kl_divergence
from distiller_zoo.norm import NORM, match_size, norm_weight, standardise_logits
from helper.optim import cosine_learning_rate, step_learning_rate
from models import build_model
from models.backbone import Backbone, probe_shapes
from tests.golden_case import Difference
from tests.golden_format import (
    Family,
    Reader,
    compare,
    compare_named,
    equal,
    fill,
    generator,
    images,
    loss_input,
)
from tests.golden_norm import FORMS, OFFICIAL_STUDENTS, form_of


def pair_families(content: dict, path: Path) -> Iterator[Family]:
    """One family per pair, run and form of the transform."""
    for name, entry in content["pairs"].items():
        # Files name the variant in the entry or, as the students' file does, behind the last bar.
        entry = {"variant": name.split("|")[-1]} | entry
        for run_name, run in entry["runs"].items():
            for form in FORMS:
                yield f"{name} {run_name} {form}", partial(check_step, entry, float(run_name.split("=")[1]), run, form)


def unit_families(content: dict, path: Path) -> Iterator[Family]:
    """One family per case of the loss arithmetic."""
    for name, entry in content["unit"].items():
        yield f"unit {name}", partial(check_unit, entry)


def schedule_families(content: dict, path: Path) -> Iterator[Family]:
    """One family per schedule of the weight and of the learning rate."""
    checks = {"beta1": check_beta1, "lr": check_learning_rate}
    for kind, schedules in content["schedules"].items():
        for name, schedule in schedules.items():
            yield f"{kind} {name}", partial(checks[kind], name, schedule)


def official_key(model_name: str, key: str) -> str:
    """Our key of a network's state_dict -> RepDistiller's."""
    if model_name == "ResNet50":
        return key.replace("downsample", "shortcut").replace("fc.", "linear.")
    return key


def fill_network(name: str, network: nn.Module) -> nn.Module:
    network.load_state_dict({k: fill(official_key(name, k), v.shape) for k, v in network.state_dict().items()})
    return network.double()


def official_unused(student: str, n: int, network: Backbone) -> dict[str, tuple[int, ...]]:
    """Parameters of the official student that never get a gradient."""
    if student.startswith("resnet"):
        return {"alpha": (4,)}
    if student.startswith("wrn"):
        channels = network.block2.layer[-1].conv2.out_channels
        expand, contract = (n * channels, channels, 1, 1), (channels, n * channels, 1, 1)
        layers = {"layer21": expand, "layer22": contract}
        return {
            f"{layer}.{end}": shape if end == "0.weight" else shape[:1]
            for layer, shape in layers.items()
            for end in ("0.weight", "1.weight", "1.bias")
        }
    return {}


def check_step(entry: Mapping, alpha: float, run: Mapping, form: str) -> Difference:
    run = Reader(run)
    entry = Reader(entry, ("requested", "runs"))
    name, n = entry["student"], entry["N"]
    teacher = fill_network(entry["teacher"], build_model(entry["teacher"], 100)).eval()
    network = build_model(OFFICIAL_STUDENTS.get(name, name), 100)
    equal("channel_t", probe_shapes(teacher, 32).final[0], entry["channel_t"])
    task = Task(100, 32, 4, torch.zeros(1, dtype=torch.int64))
    ft = form_of({"variant": entry["variant"]}) if n > 1 else "none"
    method = NORM(network, teacher, task, gamma=0.1, alpha=alpha, beta=1.0, co_sponge=n, ft=ft, ft_form=form)
    transform_layers = ("layer41", "layer42") if name == "MobileNetV2" else ("layer31", "layer32")
    to_official = {"transform.expand": transform_layers[0], "transform.contract": transform_layers[1]}

    def official(key: str) -> str:
        for ours, theirs in to_official.items():
            key = key.replace(ours, theirs)
        return key.removeprefix("student.")

    method.load_state_dict({k: fill(official(k), v.shape) for k, v in method.state_dict().items()})
    method.double().train()
    unused = {key: fill(key, shape).double() for key, shape in official_unused(name, n, network).items()}
    targets = torch.from_numpy(numpy.random.RandomState(1).randint(0, 100, 4))
    batch = Batch(images(4, 32), targets, torch.arange(4))
    with torch.no_grad():
        teacher_output = teacher.outputs(batch.images)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    logits, losses = method(batch, teacher_output, Progress(20, 240))
    total = sum(losses.values())
    total.backward()
    standard = [standardise_logits(z.detach(), 2.5) for z in (logits, teacher_output.logits)]
    compare("loss_cls", losses["ce"] / 0.1, run["loss_cls"])
    compare("loss_div", kl_divergence(*standard, 4.0), run["loss_div"])
    if alpha:
        compare("loss_div, weighted", losses["kd"] / alpha, run["loss_div"])
    compare("loss_norm", losses["norm"], run["loss_norm"])
    value_difference = compare("loss_total", total, run["loss_total"])

    parameters = {official(key): parameter for key, parameter in method.named_parameters()}
    gradients = {key: parameter.grad.norm().item() for key, parameter in parameters.items()} | dict.fromkeys(unused)
    equal("n_parameters", len(gradients), run["n_parameters"])
    groups = ("grad_norm_first3", "grad_norm_last6", "grad_norm_ft", "grad_norm_all")
    gradient_difference = max(compare_named(group, gradients, run.get(group, {})) for group in groups)
    norms = torch.tensor([value for value in gradients.values() if value is not None], dtype=torch.float64)
    compare("grad_norm_total", norms.norm(), run["grad_norm_total"])
    equal("params_without_grad", sorted(unused), sorted(run["params_without_grad"]))
    optimizer.step()
    sums = {key: parameter.abs().sum().item() for key, parameter in {**parameters, **unused}.items()}
    compare_named("after_sgd_step_abs_sum_ft", sums, run["after_sgd_step_abs_sum_ft"])
    compare("after_sgd_step_abs_sum_all", sum(sums.values()), run["after_sgd_step_abs_sum_all_params"])
    buffers = {official(key): value.double().mean().item() for key, value in method.state_dict().items()}
    compare_named("after_step_ft_bn_running", buffers, run["after_step_ft_bn_running"])
    run.finish("run")
    entry.finish("entry")
    return Difference(value_difference, gradient_difference, "norm")


def check_unit(entry: Mapping) -> None:
    """The loss arithmetic alone, on given student maps (already expanded) and teacher maps."""
    entry = Reader(entry)
    seed, n, num_classes = entry["seed"], entry["N"], entry["num_classes"]
    student = [
        loss_input(seed, f"u_fs{i}", shape).requires_grad_() for i, shape in enumerate(entry["student_feature_shapes"])
    ]
    teacher = [loss_input(seed, f"u_ft{i}", shape) for i, shape in enumerate(entry["teacher_feature_shapes"])]
    batch = len(student[0])
    logit_s = loss_input(seed, "u_logit_s", (batch, num_classes), 3).requires_grad_()
    logit_t = loss_input(seed, "u_logit_t", (batch, num_classes), 3)
    targets = torch.from_numpy(generator(f"{seed}:u_label").randint(0, num_classes, batch))
    golden_gradients = entry["grad_norm_features"]
    used = [i for i, norm in enumerate(golden_gradients) if norm is not None]
    # Where one network lists more maps, the last ones belong together.
    loss_norm = sum(expanded_loss(student[i], teacher[i - len(student)], n) for i in used)
    standard = [standardise_logits(z, entry["ceta"]) for z in (logit_s, logit_t)]
    loss_cls = torch.nn.functional.cross_entropy(standard[0], targets)
    loss_div = kl_divergence(*standard, entry["kd_T"])
    schedule = "imagenet" if entry["dataset"] == "imagenet" else "cifar"
    weight = norm_weight(schedule, entry["epoch"], 100 if schedule == "imagenet" else 240)
    compare("beta1", weight, entry["beta1_set_by_epoch"])
    total = entry["gamma"] * loss_cls + entry["alpha"] * loss_div + weight * entry["beta"] * loss_norm
    total.backward()
    for name, value in (("cls", loss_cls), ("div", loss_div), ("norm", loss_norm), ("total", total)):
        compare(f"loss_{name}", value, entry[f"loss_{name}"])
    compare("grad_norm_features", [student[i].grad.norm() for i in used], [golden_gradients[i] for i in used])
    for i in used:
        compare(f"grad_first5_features[{i}]", student[i].grad.flatten()[:5], entry["grad_first5_features"][i])
    compare("grad_norm_logits", logit_s.grad.norm(), entry["grad_norm_logits"])
    compare("grad_first5_logits", logit_s.grad.flatten()[:5], entry["grad_first5_logits"])
    entry.finish("unit")


def expanded_loss(expanded: Tensor, teacher_map: Tensor, n: int) -> Tensor:
    equal("segments", expanded.shape[1], n * teacher_map.shape[1])
    ratio = expanded.shape[2] // teacher_map.shape[2]
    if ratio > 1:  # the official ImageNet code pools a larger student map; here such a pair is refused
        expanded = torch.nn.functional.max_pool2d(expanded, ratio)
    return norm_loss(expanded, match_size(teacher_map, *expanded.shape[2:]))


def check_beta1(name: str, schedule: list) -> None:
    kind, epochs = ("imagenet", 100) if name == "imagenet" else ("cifar", 240)
    for first, last, value in schedule:
        for epoch in range(first, last + 1):
            compare(f"epoch {epoch}", norm_weight(kind, epoch, epochs), value)


def check_learning_rate(name: str, schedule: list) -> None:
    """`cifar_step`, `imagenet_cos_num_iter<n>`, ...: one value per epoch from 0, or [first, last, value] ranges."""
    imagenet = name.startswith("imagenet")
    base, epochs = (0.1, 100) if imagenet else (0.05, 240)
    milestones = (30, 60, 90) if imagenet else (150, 180, 210)
    if "num_iter" in name:
        steps = int(name.split("num_iter")[1])
        ours = [cosine_learning_rate(base, epoch, epochs, steps) for epoch in range(len(schedule))]
        compare(name, ours, schedule)
        return
    for first, last, value in schedule:
        for epoch in range(first, last + 1):
            compare(f"epoch {epoch}", step_learning_rate(base, epoch, milestones, 0.1), value)

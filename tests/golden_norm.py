"""Golden checks of NORM: students with their transform, whole training steps, the loss arithmetic, the schedules."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy
import torch
from helper.schedule import cosine_learning_rate, step_learning_rate
from torch import Tensor, nn

from dataset import Batch
from distiller_zoo import Predictor, Progress, Task
from distiller_zoo.feature_transform import norm_loss
from distiller_zoo.kd import kl_divergence
from distiller_zoo.norm import NORM, match_size, norm_weight, standardise_logits
from models import build_model
from models.backbone import Backbone, probe_shapes
from models.checkpoints import OFFICIAL_UNUSED, load_weights, split_official_norm
from models.cost import count_multiply_adds, count_parameters
from tests.golden_format import (
    Reader,
    compare,
    compare_named,
    compare_summary,
    equal,
    fill,
    fill_all,
    generator,
    images,
    loss_input,
    seeded_images,
)
from tests.golden_models import INFORMATIONAL, check_imagenet_logits, running_sums

FORMS = ("direct", "collapsed", "auto")
#: The official MobileNetV2 student is another network than its MobileNetV2 teacher.
OFFICIAL_STUDENTS = {"MobileNetV2": "MobileNetV2_norm"}


class StubTeacher(Backbone):
    """A teacher of which only the shape of the last map is known."""

    def __init__(self, channels: int, size: int, num_classes: int):
        super().__init__()
        self.channels, self.size, self.fc = channels, size, nn.Linear(channels, num_classes)

    def forward_maps(self, x, preact=False):
        final = x.new_zeros(len(x), self.channels, self.size, self.size)
        return [final], final

    def get_classifier(self):
        return self.fc


class Student(NamedTuple):
    method: NORM
    unused: dict[str, Tensor]  # what the official student has besides and never runs


def build_student(name: str, entry: Mapping, image_size: int, form: str) -> Student:
    """The official student as NORM around our network, with the golden weights."""
    n, num_classes = entry["co_sponge"], entry["num_classes"]
    network = build_model(OFFICIAL_STUDENTS.get(name, name), num_classes)
    channels, height, _ = probe_shapes(network, image_size).final
    runs_transform = n > 1 or name == "MobileNet"
    weights = fill_all(entry["state_dict"])
    network_weights, transform_weights = split_official_norm(weights)
    load_weights(network, OFFICIAL_STUDENTS.get(name, name), network_weights, "golden weights")
    teacher_channels = entry["channel_t"] or channels
    equal("width of the transform", len(transform_weights["expand.0.weight"]), n * teacher_channels)
    residual = "default" if "plain" not in entry.get("variant", "") else "plain"
    method = NORM(
        network,
        StubTeacher(teacher_channels if runs_transform else channels, height, num_classes),
        Task(num_classes, image_size, 4, torch.zeros(1, dtype=torch.int64)),
        co_sponge=n,
        ft=residual if runs_transform else "none",
        ft_form=form,
    )
    unused = {key: value for key, value in weights.items() if OFFICIAL_UNUSED.match(key)}
    if runs_transform:
        load_weights(method.transform, "FeatureTransform", transform_weights, "golden transform")
    else:
        unused |= {f"idle.{key}": value for key, value in transform_weights.items()}
    return Student(method.double(), unused)


def parameters_in(weights: Mapping[str, Tensor]) -> int:
    return sum(
        value.numel() for key, value in weights.items() if not key.rsplit(".", 1)[-1].startswith(("running", "num"))
    )


def matched_map(method: NORM, x: Tensor, golden_shape: list[int]) -> Tensor:
    """The entry that the official student puts in place of its last map: the expanded map, or at N = 1 its own."""
    maps, final = method.student.forward_maps(x)
    if method.transform is not None:
        return method.transform.expand(final)
    return final if list(final.shape) == golden_shape else maps[-1]


def check_student_features(where: str, method: NORM, x: Tensor, golden, preact: bool) -> None:
    if isinstance(golden, str):  # the reference raises: nothing to compare
        return
    method = copy.deepcopy(method)  # a second forward pass must not move the running statistics
    method.transform and setattr(method.transform, "form", "direct")
    maps, _ = method.student.forward_maps(x, preact)
    pooled = copy.deepcopy(method).respond(x, None).pooled
    last = golden[-2]
    if list(maps[-1].shape) != last["shape"] or (not preact and method.transform is not None):
        maps[-1] = matched_map(method, x, last["shape"])
    features = [*maps, pooled]
    equal(f"{where}.length", len(features), len(golden))
    for number, (feature, summary) in enumerate(zip(features, golden, strict=True)):
        compare_summary(f"{where}[{number}]", feature, summary)


def student_families(content: dict, folder):
    for name, entry in content["models"].items():
        yield name, partial(check_student, entry)


@torch.no_grad()
def check_student(entry: Mapping) -> None:
    x = images(2, 32)
    for form in FORMS:
        reader = Reader(entry, ("for_teachers",))
        student = build_student(entry["student"], reader, 32, form)
        method = student.method.eval()
        reader["student"], reader.get("variant")
        total = count_parameters(method) + parameters_in(student.unused)
        equal("n_params_trainable", total, reader["n_params_trainable"])
        check_transform_parameters(method, student.unused, reader["n_params_ft"])
        if form == "direct":
            equal("macs", count_multiply_adds(Predictor(method), 32), entry["macs_1x3x32x32"])
        reader["macs_1x3x32x32"]
        expected = Reader(reader["eval"], INFORMATIONAL)
        compare(f"{form} eval.logits", method.predict(x), expected["logits"])
        check_student_features("eval.feats", method, x, expected["feats"], preact=False)
        check_student_features("eval.preact_feats", method, x, expected.get("preact_feats", ""), preact=True)
        expected.finish("eval")
        equal("feat_shapes", [summary["shape"] for summary in expected["feats"]], reader["feat_shapes"])
        check_training_forward(form, student, x, Reader(reader["train"], INFORMATIONAL))
        reader.finish("entry")


def check_transform_parameters(method: NORM, unused: Mapping[str, Tensor], golden: Mapping[str, int]) -> None:
    ours = {}
    if method.transform is not None:
        ours = {"1": count_parameters(method.transform.expand), "2": count_parameters(method.transform.contract)}
    for layer, parameters in golden.items():
        kept = {key: value for key, value in unused.items() if key.startswith(f"{unused_name(layer)}.")}
        equal(f"n_params_ft.{layer}", parameters_in(kept) or ours[layer[-1]], parameters)


def unused_name(layer: str) -> str:
    """Under which name an official transform layer that never runs is kept: layer21 as it is, layer31 where N is 1."""
    return layer if layer[-2] == "2" else "idle." + {"1": "expand", "2": "contract"}[layer[-1]]


def check_training_forward(form: str, student: Student, x: Tensor, train: Reader) -> None:
    method = student.method.train()
    check_student_features("train.feats", method, x, train["feats"], preact=False)
    compare(f"{form} train.logits", method.respond(x, None).logits, train["logits"])
    for layer, golden in train["ft_bn_running"].items():
        layer = layer.split(".")[0]
        mean, variance, batches = transform_running(student, layer)
        compare(f"{form} {layer}", [mean, variance], [golden["mean_running_mean"], golden["mean_running_var"]])
        equal(f"{form} {layer} batches", batches, golden["num_batches_tracked"])
    check_running_sums(student, train["sum_running_mean_all"], train["sum_running_var_all"])
    train.finish("train")


def transform_running(student: Student, layer: str) -> tuple[float, float, int]:
    """Mean running mean, mean running variance and batch count of an official transform layer (layer31.1, ...)."""
    transform = student.method.transform
    if layer[-2] == "2" or transform is None:
        values = [
            student.unused[f"{unused_name(layer)}.1.{name}"]
            for name in ("running_mean", "running_var", "num_batches_tracked")
        ]
    else:
        bn = {"1": transform.expand, "2": transform.contract}[layer[-1]][1]
        values = [bn.running_mean, bn.running_var, bn.num_batches_tracked]
    return values[0].double().mean().item(), values[1].double().mean().item(), int(values[2])


def check_running_sums(student: Student, golden_mean: float, golden_variance: float) -> None:
    sums = running_sums(student.method)
    idle = [
        sum(float(v.double().sum()) for k, v in student.unused.items() if k.endswith(end)) for end in ("_mean", "_var")
    ]
    compare("running sums", [a + b for a, b in zip(sums, idle, strict=True)], [golden_mean, golden_variance])


@torch.no_grad()
def check_imagenet_student(network_name: str, name: str, entry: Mapping) -> None:
    fields = dict(part.split("=") for part in name.split("|")[1:] if "=" in part)
    channel_t = None if fields["channel_t"] == "None" else int(fields["channel_t"])
    built = {**entry, "co_sponge": int(fields["N"]), "channel_t": channel_t, "variant": name}
    for form in FORMS:
        reader = Reader(entry, ("teacher", "state_dict", "num_classes"))
        student = build_student(network_name, built, 224, form)
        method = student.method.eval()
        total = count_parameters(method) + parameters_in(student.unused)
        equal("n_params_trainable", total, reader["n_params_trainable"])
        if form == "direct":
            equal("macs", count_multiply_adds(Predictor(method), 224), entry["macs_1x3x224x224"])
        reader["macs_1x3x224x224"]
        expected, x = Reader(reader["eval"], INFORMATIONAL), images(1, 224)
        check_imagenet_logits(method.predict(x), expected)
        compare_summary("feats", matched_map(method, x, reader["feat_shapes"][0]), expected["feats"][0])
        expected.finish("eval")
        train = Reader(reader["train"])
        x = seeded_images(train["input_shape"])
        method.train()
        compare_summary(
            "train.feats", matched_map(copy.deepcopy(method), x, train["feats"][0]["shape"]), train["feats"][0]
        )
        logits = method.respond(x, None).logits
        first = train["logits_first20_row0"]
        compare("train.logits", logits[0, : len(first)], first, scale=float(logits.abs().max()))
        mean_std = [logits.mean(), logits.std(correction=0)]
        compare("train.logits mean/std", mean_std, [train["logits_mean"], train["logits_std"]])
        check_running_sums(student, train["sum_running_mean_all"], train["sum_running_var_all"])
        train.finish("train")
        reader.finish("entry")


# --- norm_step.json ---------------------------------------------------------------------------------------------------


def step_families(content: dict, folder):
    for name, entry in content.get("pairs", {}).items():
        for run_name, run in entry["runs"].items():
            for form in FORMS:
                yield f"{name} {run_name} {form}", partial(check_step, entry, float(run_name.split("=")[1]), run, form)
    for name, entry in content.get("unit", {}).items():
        yield f"unit {name}", partial(check_unit, entry)
    for name, schedule in content.get("schedules", {}).get("beta1", {}).items():
        yield f"beta1 {name}", partial(check_beta1, name, schedule)
    for name, schedule in content.get("schedules", {}).get("lr", {}).items():
        yield f"lr {name}", partial(check_learning_rate, name, schedule)


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


def check_step(entry: Mapping, alpha: float, run: Mapping, form: str) -> None:
    run = Reader(run)
    entry = Reader(entry, ("requested", "runs"))
    name, n = entry["student"], entry["N"]
    teacher = fill_network(entry["teacher"], build_model(entry["teacher"], 100)).eval()
    network = build_model(OFFICIAL_STUDENTS.get(name, name), 100)
    equal("channel_t", probe_shapes(teacher, 32).final[0], entry["channel_t"])
    task = Task(100, 32, 4, torch.zeros(1, dtype=torch.int64))
    ft = "default" if n > 1 else "none"
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
    compare("loss_total", total, run["loss_total"])

    parameters = {official(key): parameter for key, parameter in method.named_parameters()}
    gradients = {key: parameter.grad.norm().item() for key, parameter in parameters.items()} | dict.fromkeys(unused)
    equal("n_parameters", len(gradients), run["n_parameters"])
    for group in ("grad_norm_first3", "grad_norm_last6", "grad_norm_ft", "grad_norm_all"):
        compare_named(group, gradients, run.get(group, {}))
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
    loss_norm = sum(expanded_loss(student[i], teacher[i], n) for i in used)
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

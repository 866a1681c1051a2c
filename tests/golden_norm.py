"""Golden checks of NORM: students with their transform, whole training steps, the loss arithmetic, the schedules."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distiller_zoo import Predictor, Task
from distiller_zoo.norm import NORM
from models import build_model
from models.backbone import Backbone, probe_shapes
from models.checkpoints import OFFICIAL_UNUSED, load_weights, split_official_norm
from models.cost import count_multiply_adds, count_parameters
from tests.golden_format import (
    Reader,
    compare,
    compare_summary,
    equal,
    fill_all,
    images,
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
    weights = fill_all(entry["state_dict"])
    network_weights, transform_weights = split_official_norm(weights)
    # At N = 1 most official students hold a transform that never runs; some students have none at all.
    runs_transform = bool(transform_weights) and (n > 1 or name == "MobileNet")
    load_weights(network, OFFICIAL_STUDENTS.get(name, name), network_weights, "golden weights")
    teacher_channels = entry["channel_t"] or channels
    if transform_weights:
        equal("width of the transform", len(transform_weights["expand.0.weight"]), n * teacher_channels)
    method = NORM(
        network,
        StubTeacher(teacher_channels if runs_transform else channels, height, num_classes),
        Task(num_classes, image_size, 4, torch.zeros(1, dtype=torch.int64)),
        co_sponge=n if runs_transform else 1,
        ft=form_of(entry) if runs_transform else "none",
        ft_form=form,
    )
    unused = {key: value for key, value in weights.items() if OFFICIAL_UNUSED.match(key)}
    if runs_transform:
        load_weights(method.transform, "FeatureTransform", transform_weights, "golden transform")
    else:
        unused |= {f"idle.{key}": value for key, value in transform_weights.items()}
    return Student(method.double(), unused)


def form_of(entry: Mapping) -> str:
    """The transform of an entry: with the residual, or where its `variant` says so, without."""
    return "plain" if "plain" in entry.get("variant", "") else "default"


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

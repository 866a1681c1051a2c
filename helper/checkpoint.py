"""What a checkpoint holds: `model`, the plain weights to ship; `record`, what is known of them; `training`, the rest.

`torch.load(file, weights_only=True)["model"]` fits `model_dict[name]` for every method that ships the plain student.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dataset import ImageData
from distiller_zoo import Distiller, Task, build_distiller
from distiller_zoo.ce import CrossEntropy
from distiller_zoo.feature_transform import FeatureTransform
from distiller_zoo.norm import FTBaseline
from errors import UserError, first_line
from helper.configuration import Configuration, read_stored
from models import build_model
from models.backbone import Backbone
from models.checkpoints import Weights, build_with, identify, load_weights, split_official_norm, weights_digest
from models.ensemble import Ensemble
from models.found import locate_weights
from models.preprocessing import TeacherView
from models.wrappers import describe_wrapper, wrap

#: The entry of a checkpoint that holds the moving average of the weights to ship; as timm calls it.
AVERAGE = "model_ema"
#: More training images are a damaged number.
MOST_IMAGES = 10**8


@contextmanager
def contained(source: str) -> Iterator[None]:
    """Turn whatever an entry of the wrong kind causes into a `UserError` that begins with `source`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # an entry may be of any kind, so it may raise anything
        reason = f"{type(error).__name__} {first_line(error)}"
        raise UserError(f"{source}: {reason}; an entry is missing or of the wrong kind") from None


def data_record(data: ImageData) -> dict:
    """What a trained network must know of its images."""
    return {
        "classes": data.classes,
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
        "margin": data.margin,
        "background": list(data.background),
        "train_images": len(data.train.targets),
        **({"source_size": data.train.image_size} if data.resized else {}),
    }


def network_of(method: Distiller) -> tuple[Weights, dict]:
    """What a method ships: (its plain weights, the entries of the record that build a network for them).

    Weights that are the student's own share its memory, so that a checkpoint holds them once.
    """
    network = method.export()
    own = method.student.state_dict()
    weights = {
        key: own[key] if key in own and own[key].shape == value.shape and torch.equal(own[key], value) else value
        for key, value in network.state_dict().items()
    }
    record = {"num_classes": network.num_classes, "wrapper": describe_wrapper(network)}
    return weights, record | {"digest": weights_digest(weights)}


def make_checkpoint(
    method: Distiller, config: Configuration, data: Mapping[str, Any], average: Distiller | None, **known: Any
) -> dict:
    """A checkpoint of a run, with the moving average of its method if there is one; `known` are further entries of the
    record."""
    weights, record = network_of(method)
    record = {"model_name": config.model_s, **record, **data, "dataset": config.dataset, "data": config.data, **known}
    record |= {"distill": config.distill, "split": config.split}
    training = {"config": dict(config), "distiller": method.state_dict()}
    if average is None:
        return {"model": weights, "record": record, "training": training}
    averaged, training["ema"] = network_of(average)[0], average.state_dict()
    return {"model": weights, AVERAGE: averaged, "record": record, "training": training}


def take_average(checkpoint: Mapping, source: str) -> dict:
    """A run's checkpoint with the moving average of the weights in place of the raw ones; raises `UserError` where it
    holds none. The accuracy on record is that of the average."""
    if AVERAGE not in checkpoint:
        raise UserError(f"{source} holds no moving average of weights for --ema; --ema_decay D trains one")
    with contained(f"{source} is not a whole checkpoint of a run"):
        record = dict(checkpoint["record"])
        record |= {"accuracy": record.get("accuracy_ema"), "digest": weights_digest(checkpoint[AVERAGE])}
        training = dict(checkpoint["training"])
        training["distiller"] = training.pop("ema")
        others = {key: value for key, value in checkpoint.items() if key != AVERAGE}
        return others | {"model": checkpoint[AVERAGE], "record": record, "training": training}


def upgrade(checkpoint: Mapping, source: str) -> dict:
    """A run's checkpoint of any version as this one writes it; others are left as they are."""
    if "distiller" not in checkpoint:
        return dict(checkpoint)
    with contained(f"{source} is not a whole checkpoint of a run"):
        state = {key: value for key, value in checkpoint.items() if key not in ("data", "accuracy")}
        if "accuracies" in state:  # of every epoch; now there are the epochs' whole records
            test, chosen = state.pop("accuracies"), state.pop("choices", None)
            chosen = test if chosen is None else chosen
            state["records"] = [
                {"epoch": number, "test_accuracy": one, "holdout_accuracy": other}
                for number, (one, other) in enumerate(zip(test, chosen, strict=True), 1)
            ]
        whole = {"record": dict(checkpoint["data"]), "training": state}
        method, config = rebuild(whole, source)
        weights, record = network_of(method)
        known = {"dataset": config["dataset"], "data": config.get("data"), "accuracy": checkpoint["accuracy"]}
        known["epoch"] = checkpoint["epoch"]
        record = {"model_name": config["model_s"], **record, **checkpoint["data"], **known}
        return {"model": weights, "record": record | {"distill": config["distill"]}, "training": state}


def rebuild(checkpoint: Mapping, source: str) -> tuple[Distiller, dict]:
    """A run's checkpoint -> (the method as it was trained, its settings); needs neither teacher file nor data.

    Only for what the shipped network does not show; reading a network is `networks.read_network`.
    """
    with contained(f"{source} is not a whole checkpoint of a run"):
        training, data = checkpoint["training"], checkpoint["record"]
        config = read_stored(training["config"], source)
        num_classes = len(data["classes"])
        if not num_classes <= data["train_images"] <= MOST_IMAGES:
            raise ValueError(f"{data['train_images']} training images")
        targets = torch.arange(data["train_images"]) % max(num_classes, 1)  # only their number matters here
        student = build_model(config["model_s"], num_classes, data["image_size"])
        teacher = None if config.get("model_t") is None else _like_teacher(config, data, source)
        method = build_distiller(config, student, teacher, num_classes, data["image_size"], targets)
        weights = training["distiller"]
    load_weights(method, config["model_s"], weights, source)
    return method.eval(), config


def _like_teacher(config: Mapping, data: Mapping, source: str) -> Backbone:
    """A network of the shapes of a run's teacher, or of several."""
    names, seen = config["model_t"].split(","), config.get("teacher_image_size")
    known, wrapper = data.get("teacher") or {}, config.get("wrapper_t")
    values: tuple[Any, Any] = known.get("num_classes", len(data["classes"])), seen
    classes, sizes = (list(value) if isinstance(value, list | tuple) else [value] * len(names) for value in values)
    wrappers = [wrapper] if len(names) == 1 else (wrapper or {}).get("teachers", [None] * len(names))
    networks: list[Backbone] = []
    for name, count, size, description in zip(names, classes, sizes, wrappers, strict=True):
        network = wrap(build_model(name, count, size or data["image_size"]), description, source)
        same = (0.5,) * 3, (0.5,) * 3
        networks.append(TeacherView(network, *same, *same, size) if size else network)
    return networks[0] if len(networks) == 1 else Ensemble(networks, config.get("teacher_weights"))


def rebuild_official(
    checkpoint: Mapping, source: str, model_s: str | None, ft: str
) -> tuple[Distiller, str, list[str]]:
    """A student of the official NORM code, or plain weights, as a method: (method, model's name, what was converted).

    Where `model_s` is None the model is recognised by its weights. N is not needed: only N * Ct shows in a prediction.
    """
    weights, notes = locate_weights(checkpoint, source)
    network_weights, transform_weights = split_official_norm(weights)
    name = model_s or _recognise(network_weights, bool(transform_weights), source)
    network, more = build_with(name, network_weights, source)
    notes = [*notes, *more]
    task = Task(network.num_classes, 32, 2, torch.zeros(1, dtype=torch.int64))
    if not transform_weights:
        return CrossEntropy(network, None, task).eval(), name, notes
    method = FTBaseline(network, None, task, ft=ft)
    expanded, channels = transform_weights["expand.0.weight"].shape[:2]
    method.transform = FeatureTransform(channels, expanded, 1, residual=ft == "default")
    load_weights(method.transform, "a feature transform", transform_weights, source)
    return method.eval(), name, notes


def _recognise(weights: Weights, has_transform: bool, source: str) -> str:
    names = identify(weights)
    if has_transform and "MobileNetV2_norm" in names:
        return "MobileNetV2_norm"  # the official students are the variant; the weights have the same shapes
    if not names:
        raise UserError(f"{source} fits none of the models; was it trained by another code?")
    return names[0]


def check_progress(training: Mapping, in_main_stage: bool) -> None:
    """Raise `ValueError` where the numbers of a run's checkpoint cannot have been written by a run."""
    counters = ("stage_number", "epoch", "stage_step", "step", "epochs_over", "skipped_steps")
    for name in counters:
        if type(training[name]) is not int or not 0 <= training[name] < 2**40:
            raise ValueError(f"{name} is {str(training[name])[:40]}")
    seconds, records = training["seconds"], training["records"]
    if type(seconds) is not float or not 0 <= seconds < 2**40:
        raise ValueError(f"seconds is {str(seconds)[:40]}")
    if len(records) != (training["epoch"] if in_main_stage else 0):
        raise ValueError(f"there are {len(records)} records of {training['epoch']} epochs")
    if training["stage_step"] and not training["epoch"]:
        raise ValueError("there are steps and no epoch")
    for record in records:
        values = [value for name, value in record.items() if name.endswith(("_accuracy", "_matching_loss"))]
        values.append(record.get("learning_rate", 0.0))
        if len(values) < 2 or not all(type(value) is float and math.isfinite(value) for value in values):
            raise ValueError("an accuracy or a learning rate is no number")
    if not isinstance(training["config"], Mapping):
        raise ValueError("its config is no table of settings")
    if training["epoch_state"] is not None:
        _check_epoch_state(training["epoch_state"])


def _check_epoch_state(state: Mapping) -> None:
    counts = state["meter"]["counts"]
    sums, numbers = state["meter"]["losses"].values(), (state["steps"], state["meter"]["correct"], *counts)
    kinds = [type(value) for value in numbers]
    if kinds != [int, int, int, bool, float, float] or not all(0 <= value < math.inf for value in numbers):
        raise ValueError("the state within the epoch is of another kind")
    if not all(type(value) is float and math.isfinite(value) for value in sums):
        raise ValueError("the sums within the epoch are not finite")
    torch.Generator().set_state(state["random"]["cpu"])


def check_computed_by(stored: Sequence[Mapping], now: Mapping) -> list[dict]:
    """What a run has been trained by, with the names and kinds of `now`, or None where a version did not keep it;
    raises `ValueError`."""
    for each in stored:
        if each.keys() != now.keys() or any(type(each[name]) not in (type(now[name]), type(None)) for name in now):
            raise ValueError(f"it was computed by {str(each)[:40]}")
    return [dict(each) for each in stored]


def check_optimizer(state: Mapping, parameters: Sequence[Tensor]) -> dict:
    """An optimizer's state by the number of its parameter; raises `ValueError` where it does not fit."""
    for number, entry in state["state"].items():
        parameter = parameters[number]
        for name, value in entry.items():
            is_number = name == "step" and (
                type(value) in (int, float) or (isinstance(value, Tensor) and not value.dim())
            )
            if value is None or is_number:
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} of parameter {number} is no tensor")
            if (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
                raise ValueError(f"{name} of parameter {number} has another shape or type")
            if not value.isfinite().all():
                raise ValueError(f"{name} of parameter {number} is not finite")
    return dict(state["state"])

"""What a run's checkpoint holds, and how a method is built: from a configuration, or again from a checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dataset import ImageData
from distiller_zoo import Distiller, Task, find_distiller
from distiller_zoo.ce import CrossEntropy
from distiller_zoo.feature_transform import FeatureTransform
from distiller_zoo.norm import FTBaseline
from errors import UserError
from helper.stored import contained, read_configuration
from models import build_model
from models.backbone import Backbone
from models.checkpoints import (
    Weights,
    count_classes,
    find_weights,
    identify,
    load_weights,
    name_for,
    rename_for,
    split_official_norm,
)
from models.wrappers import wrap

#: More training images are a damaged number.
MOST_IMAGES = 10**8


def build_distiller(
    config: Mapping,
    student: Backbone,
    teacher: Backbone | None,
    num_classes: int,
    image_size: int,
    train_targets: Tensor,
) -> Distiller:
    """The method `config["distill"]` around a student, with the hyper-parameters that it names."""
    method = find_distiller(config["distill"])
    # A flag may be newer than the configuration.
    hyper_parameters = {flag.argument: config.get(flag.argument, flag.default) for flag in method.flags}
    batch_size = config.get("images_per_pass", config["batch_size"])
    return method(student, teacher, Task(num_classes, image_size, batch_size, train_targets), **hyper_parameters)


def data_record(data: ImageData) -> dict:
    """What an exported network must know of the data it was trained on."""
    return {
        "classes": data.classes,
        "mean": list(data.mean),
        "std": list(data.std),
        "image_size": data.image_size,
        "margin": data.margin,
        "train_images": len(data.train.targets),
    }


def rebuild(checkpoint: Mapping, source: str) -> tuple[Distiller, dict]:
    """A run's checkpoint -> (the method with its weights, its configuration); needs neither teacher file nor data."""
    with contained(f"{source} is not a whole checkpoint of a run"):
        config, data, weights = (
            read_configuration(checkpoint["config"], source),
            checkpoint["data"],
            checkpoint["distiller"],
        )
        num_classes = len(data["classes"])
        if not num_classes <= data["train_images"] <= MOST_IMAGES:
            raise ValueError(f"{data['train_images']} training images")
        targets = torch.arange(data["train_images"]) % num_classes  # only their number matters here
        student = build_model(config["model_s"], num_classes)
        teacher = build_model(config["model_t"], num_classes) if config.get("model_t") else None
        teacher = wrap(teacher, checkpoint["config"].get("wrapper_t"), source)
        distiller = build_distiller(config, student, teacher, num_classes, data["image_size"], targets)
    load_weights(distiller, config["model_s"], weights, source)
    return distiller.eval(), config


def rebuild_official(checkpoint: Mapping, source: str, model_s: str | None, ft: str) -> tuple[Distiller, str]:
    """A student of the official NORM code, or plain weights, as a method: (method, model's name).

    Where `model_s` is None the model is recognised by its weights. N is not needed: only N * Ct shows in a prediction.
    """
    network_weights, transform_weights = split_official_norm(find_weights(checkpoint, source))
    name = model_s or _recognise(network_weights, bool(transform_weights), source)
    network_weights = name_for(name, network_weights)
    num_classes = count_classes(build_model(name, 1), rename_for(name, network_weights)) or 1
    network = build_model(name, num_classes)
    load_weights(network, name, network_weights, source)
    task = Task(num_classes, 32, 2, torch.zeros(1, dtype=torch.int64))
    if not transform_weights:
        return CrossEntropy(network, None, task).eval(), name
    method = FTBaseline(network, None, task, ft=ft)
    expanded, channels = transform_weights["expand.0.weight"].shape[:2]
    method.transform = FeatureTransform(channels, expanded, 1, residual=ft == "default")
    load_weights(method.transform, "a feature transform", transform_weights, source)
    return method.eval(), name


def _recognise(weights: Weights, has_transform: bool, source: str) -> str:
    names = identify(weights)
    if has_transform and "MobileNetV2_norm" in names:
        return "MobileNetV2_norm"  # the official students are the variant; the weights have the same shapes
    if not names:
        raise UserError(f"{source} fits none of the models; was it trained by another code?")
    return names[0]

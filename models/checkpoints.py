"""Weights from files: ours, RepDistiller's, the official NORM code's. Every rename of a key lives here.

A checkpoint is a dictionary. Where the weights lie in it, and what they are called, is all that this file knows.
"""

import hashlib
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from errors import UserError
from models import build_model, imagenet_model_dict, model_dict
from models.backbone import Backbone
from models.external import is_external
from models.files import read_checkpoint as read_checkpoint  # also found here
from models.wrappers import wrap

Weights = dict[str, Tensor]

#: Names of earlier versions of this toolbox -> today's, which are RepDistiller's: (pattern, replacement).
EARLIER_NAMES = {
    "ResNet50": ((r"\.downsample\.", ".shortcut."), (r"(^|\.)fc\.", r"\1linear.")),
}

#: The official NORM code's feature transform -> (expand, contract); its transform stands under one of these pairs.
OFFICIAL_TRANSFORMS = (("layer31", "layer32"), ("layer41", "layer42"))
#: Parameters that the official code constructs and never uses.
OFFICIAL_UNUSED = re.compile(r"^(alpha$|layer2[12]\.)")


def _unwrapped(key: str) -> str:
    """A key without what DataParallel, DDP and torch.compile put before it."""
    return key.removeprefix("module.").removeprefix("_orig_mod.").removeprefix("module.")


def find_weights(checkpoint: Mapping, source: str) -> Weights:
    """The state_dict in a checkpoint: under `model` (RepDistiller, NORM) or `state_dict`, or the dictionary itself."""
    for key in ("model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    weights = {
        _unwrapped(key): value
        for key, value in checkpoint.items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not weights:
        raise UserError(f"{source} holds no weights")
    return weights


def name_for(model_name: str, weights: Weights) -> Weights:
    """A plain network's weights from another code; of a foreign library's network they stand below `network` here."""
    if not is_external(model_name) or all(key.startswith("network.") for key in weights):
        return weights
    return {f"network.{key}": value for key, value in weights.items()}


def rename_for(model_name: str, weights: Weights) -> Weights:
    """The same weights under this project's key names."""
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in EARLIER_NAMES.get(model_name, ()):
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _differences(expected: Mapping[str, Tensor], weights: Weights) -> list[str]:
    missing = [f"no {key}" for key in expected if key not in weights]
    unknown = [f"unknown {key}" for key in weights if key not in expected]
    both = [(key, value, weights[key]) for key, value in expected.items() if key in weights]
    shapes = [
        f"{key} is {tuple(found.shape)} instead of {tuple(value.shape)}"
        for key, value, found in both
        if found.shape != value.shape
    ]
    # Floats of another width are fine; they are converted.
    kinds = [
        f"{key} is {found.dtype} instead of {value.dtype}"
        for key, value, found in both
        if found.dtype != value.dtype and not (found.is_floating_point() and value.is_floating_point())
    ]
    return shapes + missing + unknown + kinds


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


def load_weights(model: nn.Module, model_name: str, weights: Weights, source: str) -> None:
    """Load strictly: every key, shape and kind of number must agree, and every number be finite, else `UserError`."""
    if not isinstance(weights, Mapping) or not all(_is_plain(value) for value in weights.values()):
        raise UserError(f"{source} holds something else than weights")
    weights = rename_for(model_name, weights)
    differences = _differences(model.state_dict(), weights)
    if differences:
        more = f" and {len(differences) - 2} more" if len(differences) > 2 else ""
        raise UserError(
            f"{source} holds another architecture than {model_name}: {'; '.join(differences[:2])}{more}"
            f"{_suggestion(weights)}"
        )
    for key, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{source} is of no use: {key} is not finite")
    model.load_state_dict(weights)


def _suggestion(weights: Weights) -> str:
    names = identify(weights)
    return f" (the weights fit {' or '.join(names)})" if names else ""


def count_classes(model: Backbone, weights: Weights) -> int | None:
    """Number of classes of these weights, read where `model` has its classifier; None where they have nothing there."""
    bias = weights.get(f"{_name_of_classifier(model)}.bias")
    return None if bias is None else len(bias)


def _name_of_classifier(model: Backbone) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_classifier())


def load_initial(model: Backbone, model_name: str, network: Backbone, source: str) -> bool:
    """Give `model` the weights of `network`, as strictly as `load_weights`; where the numbers of classes differ, its
    classifier stays as it is initialised.

    Returns whether the classifier was taken too; raises `UserError` for another architecture.
    """
    weights, own = network.state_dict(), model.state_dict()
    takes_classifier = network.get_classifier().out_features == model.get_classifier().out_features
    if not takes_classifier:
        prefix = f"{_name_of_classifier(model)}."
        weights |= {key: value for key, value in own.items() if key in weights and key.startswith(prefix)}
    load_weights(model, model_name, weights, source)
    return takes_classifier


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The first 16 hex digits of the SHA-256 over keys, kinds of number, shapes and bytes, in the order of the keys.

    Of a `network.state_dict()` it is the same however the file that the network was read from wraps and names it.
    """
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def identify(weights: Weights) -> list[str]:
    """Names of the models whose keys and shapes these weights have, whatever the number of classes."""
    fitting = []
    for name in (*model_dict, *imagenet_model_dict):
        renamed = rename_for(name, weights)
        with torch.device("meta"):
            num_classes = count_classes(build_model(name, 1), renamed)
            if num_classes and not _differences(build_model(name, num_classes).state_dict(), renamed):
                fitting.append(name)
    return fitting


def split_official_norm(weights: Weights) -> tuple[Weights, Weights]:
    """Weights of an official NORM student -> (weights of the plain network, weights of a `FeatureTransform`).

    The second is empty where the file holds no transform.
    """
    network = {key: value for key, value in weights.items() if not OFFICIAL_UNUSED.match(key)}
    for expand, contract in OFFICIAL_TRANSFORMS:
        # layer41 of a four-stage network would be a block: a transform's first layer is its convolution, `.0.weight`.
        if f"{expand}.0.weight" in network:
            names = {expand: "expand", contract: "contract"}
            transform = {
                key.replace(key.split(".")[0], names[key.split(".")[0]], 1): network.pop(key)
                for key in list(network)
                if key.split(".")[0] in names
            }
            return network, transform
    return network, {}


def load_exported(checkpoint: Mapping, source: str) -> tuple[Backbone, dict]:
    """A run's checkpoint or an exported network -> (the network in eval mode, its record: what is known of it)."""
    record = checkpoint.get("record", checkpoint)  # files from before there was `record`
    if not isinstance(record, Mapping) or "model_name" not in record or "num_classes" not in record:
        raise UserError(f"{source} does not say which network it holds; was it written by this toolbox?")
    name, weights = record["model_name"], find_weights(checkpoint, source)
    wrapper = record.get("wrapper")
    if wrapper is None and record.get("final_conv"):  # files from before there were several kinds of wrappers
        wrapper = {"kind": "final_conv", "channels": len(weights.get("final_conv.bias", ()))}
    network = wrap(build_model(name, record["num_classes"]), wrapper, source)
    load_weights(network, name, weights, source)
    return network.eval(), {key: value for key, value in record.items() if key != "model"}

"""The networks by name: `model_dict[name](num_classes=...)`, the names of RepDistiller; other libraries' by prefix."""

import difflib
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType

from errors import UserError
from models.backbone import Backbone
from models.external import find_external, is_external
from models.mobilenetv1 import MobileNetV1
from models.mobilenetv2 import mobilenetv2_half, mobilenetv2_half_norm
from models.resnet import (
    ResNet50,
    resnet8,
    resnet8x4,
    resnet14,
    resnet18_imagenet,
    resnet20,
    resnet32,
    resnet32x4,
    resnet34_imagenet,
    resnet44,
    resnet50_imagenet,
    resnet50_quarter_imagenet,
    resnet56,
    resnet110,
)
from models.shufflenetv1 import ShuffleV1
from models.shufflenetv2 import ShuffleV2
from models.vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from models.wrn import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

#: Networks for small images, 32x32.
model_dict = {
    "resnet8": resnet8,
    "resnet14": resnet14,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet8x4": resnet8x4,
    "resnet32x4": resnet32x4,
    "ResNet50": ResNet50,
    "wrn_16_1": wrn_16_1,
    "wrn_16_2": wrn_16_2,
    "wrn_40_1": wrn_40_1,
    "wrn_40_2": wrn_40_2,
    "vgg8": vgg8,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "MobileNetV2": mobilenetv2_half,
    "MobileNetV2_norm": mobilenetv2_half_norm,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
}

#: Networks for large images, 224x224.
imagenet_model_dict = {
    "resnet18": resnet18_imagenet,
    "resnet34": resnet34_imagenet,
    "resnet50": resnet50_imagenet,
    "resnet50_4": resnet50_quarter_imagenet,
    "MobileNet": MobileNetV1,
}


def find_builder(name: str) -> Callable[..., Backbone]:
    """The function `(num_classes) -> network` of a name; raises `UserError` for one that is in neither table.

    Names like `torchvision:NAME` and `timm:NAME` are looked up in those libraries.
    """
    if is_external(name):
        return find_external(name)
    builder = model_dict.get(name) or imagenet_model_dict.get(name)
    if builder is None:
        known = [*model_dict, *imagenet_model_dict]
        by_lower_case = {known_name.lower(): known_name for known_name in known}
        close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
        hint = f"did you mean {by_lower_case[close[0]]}? " if close else ""
        raise UserError(f"unknown model '{name}': {hint}choose from {', '.join(known)}, torchvision:NAME, timm:NAME")
    return builder


def build_model(
    name: str, num_classes: int, image_size: int | None = None, drops: Mapping[str, float] = MappingProxyType({})
) -> Backbone:
    """A freshly initialised network; raises `UserError` for an unknown name, or where it has nothing to drop.

    `image_size` is that of the images it will read: some networks of other libraries are built for one size. `drops`
    are rates from 0 to 1 by the names of `external.DROPS`, of networks of other libraries.
    """
    options = {"image_size": image_size, "drops": drops} if is_external(name) else {}
    if drops and not is_external(name):
        raise UserError(f"--{next(iter(drops))}: {name} has no dropout; only networks of torchvision and timm have")
    with warnings.catch_warnings():
        if not num_classes:  # a network without a classifier has an empty layer in its place
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        return find_builder(name)(num_classes=num_classes, **options)

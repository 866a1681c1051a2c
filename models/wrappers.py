"""Networks that hold another one: what a method ships where its student is more than the plain network.

A file with such a network names its kind and its sizes next to the weights, so that it is built again before they are
loaded.
"""

import copy
from collections.abc import Mapping
from inspect import signature

import torch
from torch import nn
from torch.nn import functional as F

from errors import UserError, first_line
from models.backbone import Backbone, FinalConv, Wrapper, random_images
from models.cost import count_parameters
from models.external import External

#: How far the logits of a network with merged branches may be from the network's, relative to the largest.
MERGED_TOLERANCE = 1e-3


class ReusedClassifier(Wrapper):
    """A network with a projector and another network's classifier in place of its own (SimKD's student).

    The last stage output of `network`, brought to at most `size` pixels in height and width, is projected to
    `channels`, pooled, and classified. The projector, for maps of `width` channels, is SimKD's: 1x1, 3x3 and 1x1
    convolution, each with BatchNorm and ReLU, the inner ones narrower by `factor` (Chen et al., CVPR 2022, section
    3.2). What the network has behind that output is taken out.
    """

    def __init__(self, network: Backbone, width: int, channels: int, size: int, factor: int):
        super().__init__(network)
        if network.cannot_change:
            raise UserError(f"the classifier cannot be exchanged: {network.cannot_change}")
        own = network.get_classifier()
        self.activates_final, self.classifies_average, self.classifies_mean = False, True, True
        inner = channels // factor
        self.sizes = {"width": width, "channels": channels, "size": size, "factor": factor}
        self.projector = nn.Sequential(
            *_convolution(width, inner, 1),
            *_convolution(inner, inner, 3),
            *_convolution(inner, channels, 1),
        )
        self.classifier = nn.Linear(channels, own.out_features)
        classifier = next(name for name, module in network.named_modules() if module is own)
        for name in (*network.head, classifier):
            network.set_submodule(name, nn.Identity())

    def forward_maps(self, x, preact=False):
        maps, _ = self.network.forward_maps(x, preact)
        *_, last = maps
        if last.shape[2] > self.sizes["size"]:
            last = F.adaptive_avg_pool2d(last, self.sizes["size"])
        return maps, self.projector(last)

    def get_classifier(self):
        return self.classifier

    @property
    def num_classes(self):
        return self.classifier.out_features

    def to_map(self, final):
        return final

    def activate(self, final):
        return final

    def classify(self, activated):
        pooled = F.adaptive_avg_pool2d(activated, 1).flatten(1)
        return pooled, self.classifier(pooled)

    def get_bn_before_relu(self):
        """As the network's; what it has behind its last stage output is not there any more."""
        return Backbone.get_bn_before_relu(self) if self.network.head else super().get_bn_before_relu()


def added_layers(network: Backbone) -> list[str]:
    """The names of the layers that a network has around the plain one; none where it is the plain one."""
    if not isinstance(network, Wrapper):
        return []
    return [name for name, _ in network.named_children() if name != "network"] + added_layers(network.network)


def _convolution(in_channels: int, out_channels: int, kernel_size: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()


class Reparameterised(Wrapper):
    """A network whose branches are merged into single convolutions, as RepVGG's and MobileOne's are for inference.

    timm does it, by what the network's own blocks have for it. In eval mode the outputs are the same up to rounding;
    nothing is trained in this form.
    """

    def __init__(self, network: Backbone):
        super().__init__(network)
        self.sizes = {}
        for external in _with_branches(network):
            from timm.utils import reparameterize_model

            dtype = next(external.parameters()).dtype
            external.network = reparameterize_model(external.network.eval(), inplace=True).to(dtype)


def _with_branches(network: Backbone) -> list[External]:
    """The networks of other libraries in this one that have blocks with branches to merge."""
    found = [module for module in network.modules() if isinstance(module, External)]
    ways = ("fuse", "reparameterize", "switch_to_deploy")
    return [each for each in found if any(hasattr(block, way) for block in each.network.modules() for way in ways)]


@torch.no_grad()
def merge_branches(network: Backbone, image_size: int) -> tuple[Backbone, str]:
    """A network in eval mode -> (a copy with merged branches, a sentence on it); (itself, "") where it has none.

    Both are compared on random images of (3, image_size, image_size): where they differ by more than rounding, or timm
    cannot merge them, the network itself is returned, and the sentence says why.
    """
    if not _with_branches(network) or isinstance(network, Reparameterised):
        return network, ""
    images = random_images(image_size).to(next(network.parameters()))
    try:
        merged = Reparameterised(copy.deepcopy(network)).eval()
        expected, logits = network.eval()(images), merged(images)
    except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
        return network, f"its branches are kept: timm cannot merge them ({first_line(error)})"
    difference = float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= MERGED_TOLERANCE:
        return network, f"its branches are kept: merged by timm, its logits differ by {difference:.1e}"
    before, after = (count_parameters(each) for each in (network, merged))
    return (
        merged,
        f"its branches are merged: {before:,} parameters are {after:,}, and logits differ by {difference:.1e}",
    )


#: The kinds by the name that files give them. Their sizes are the arguments of their constructors behind the network.
WRAPPERS: dict[str, type[Wrapper]] = {
    "final_conv": FinalConv,
    "reused_classifier": ReusedClassifier,
    "reparameterised": Reparameterised,
}


def describe_wrapper(network: Backbone) -> dict | None:
    """What a file says of a wrapped network, {"kind": name, size: value...}; None of a plain one.

    A wrapper around another one has an entry "inside" with the other's description.
    """
    for kind, wrapper in WRAPPERS.items():
        if type(network) is wrapper:
            inside = describe_wrapper(network.network)
            return {"kind": kind, **network.sizes} | ({"inside": inside} if inside else {})
    return None


def wrap(network: Backbone, description: Mapping | None, source: str) -> Backbone:
    """The inverse of `describe_wrapper`, around a plain network and without weights.

    Raises `UserError`, naming `source`, for a description that this code does not write.
    """
    if description is None:
        return network
    kind, inside = str(description.get("kind")), description.get("inside")
    if kind not in WRAPPERS or not (inside is None or isinstance(inside, Mapping)):
        raise UserError(f"{source} holds a network of the unknown kind {kind}; get a newer version of this code for it")
    network = wrap(network, inside, source)
    sizes = {name: value for name, value in description.items() if name not in ("kind", "inside")}
    _, *expected = signature(WRAPPERS[kind]).parameters
    if set(sizes) != set(expected) or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise UserError(f"{source} is damaged: a {kind} network has {', '.join(expected)}, all above 0, not {sizes}")
    return WRAPPERS[kind](network, **sizes)

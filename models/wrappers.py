"""Networks that hold another one: what a method ships where its student is more than the plain network.

A file with such a network names its kind and its sizes beside the weights, so that it is built again before they are
loaded.
"""

from collections.abc import Mapping
from inspect import signature

from torch import nn
from torch.nn import functional as F

from errors import UserError
from models.backbone import Backbone, FinalConv, Wrapper


class ReusedClassifier(Wrapper):
    """A network with a projector and another network's classifier in place of its own (SimKD's student).

    The last stage output of `network`, brought to at most `size` pixels in height and width, is projected to
    `channels`, pooled, and classified. The projector, for maps of `width` channels, is SimKD's: 1x1, 3x3 and 1x1
    convolution, each with BatchNorm and ReLU, the inner ones narrower by `factor` (Chen et al., CVPR 2022, section
    3.2). What the network has behind that output is taken out.
    """

    def __init__(self, network: Backbone, width: int, channels: int, size: int, factor: int):
        super().__init__(network)
        own = network.get_classifier()
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

    def get_bn_before_relu(self):
        """As the network's; what it has behind its last stage output is not there any more."""
        return Backbone.get_bn_before_relu(self) if self.network.head else super().get_bn_before_relu()


def _convolution(in_channels: int, out_channels: int, kernel_size: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()


#: The kinds by the name that files give them. Their sizes are the arguments of their constructors behind the network.
WRAPPERS: dict[str, type[Wrapper]] = {"final_conv": FinalConv, "reused_classifier": ReusedClassifier}


def describe_wrapper(network: Backbone) -> dict | None:
    """What a file says of a wrapped network, {"kind": name, size: value...}; None of a plain one."""
    for kind, wrapper in WRAPPERS.items():
        if type(network) is wrapper:
            return {"kind": kind, **network.sizes}
    return None


def wrap(network: Backbone, description: Mapping | None, source: str) -> Backbone:
    """The inverse of `describe_wrapper`, around a plain network and without weights.

    Raises `UserError`, naming `source`, for a description that this code does not write.
    """
    if description is None:
        return network
    kind = str(description.get("kind"))
    if kind not in WRAPPERS:
        raise UserError(f"{source} holds a network of the unknown kind {kind}; get a newer version of this code for it")
    sizes = {name: value for name, value in description.items() if name != "kind"}
    _, *expected = signature(WRAPPERS[kind]).parameters
    if set(sizes) != set(expected) or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise UserError(f"{source} is damaged: a {kind} network has {', '.join(expected)}, all above 0, not {sizes}")
    return WRAPPERS[kind](network, **sizes)

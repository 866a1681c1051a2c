"""The contract that every network keeps, teacher or student.

A network writes `forward_trunk`, `forward_last_stage`, `get_classifier` and, where its head differs from "pool, then
classify", the parts of the head; the base class gives the rest. Shapes: B batch, C channels, H x W pixels, D pooled
width, K classes.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errors import UserError, first_line


class Output(NamedTuple):
    """What one forward pass shows of a network."""

    maps: list[Tensor]  # stage outputs, shallow to deep, each (B, C_i, H_i, W_i)
    final: Tensor  # (B, C, H, W), the map that the head reads; of a transformer's tokens the patches, as a map
    activated: Tensor  # (B, C, H, W), the map that is pooled: `final` behind the head's own BatchNorm and ReLU, if any
    pooled: Tensor  # (B, D), what the classifier reads
    logits: Tensor  # (B, K); K is 0 in an encoder without a classifier
    others: Sequence["Output"] = ()  # of the further networks of an `Ensemble`, in their order

    def tensors(self) -> list[Tensor]:
        """All of them, those of the further networks last."""
        *own, others = self[1:]
        return [*self.maps, *own, *(tensor for output in others for tensor in output.tensors())]


class Shapes(NamedTuple):
    """The shapes of an `Output`, without the batch dimension."""

    maps: list[tuple[int, int, int]]
    final: tuple[int, int, int]
    pooled: int
    num_classes: int
    others: Sequence["Shapes"] = ()


class Backbone(nn.Module):
    """A classification network whose last feature map can be reached, and changed, before the head reads it."""

    #: What messages call it: its class, unless it says more.
    name: str
    #: Whether something is between `final` and the pooling: BatchNorm and ReLU in pre-activation networks. True in a
    #: class that writes `activate`.
    activates_final = False
    #: Whether the classifier reads the average of the activated map over its pixels, and nothing else. False in a class
    #: that writes `classify` and says nothing of it, like the next.
    classifies_average = True
    #: Whether the classifier reads a weighted mean of the activated map's positions, so that one affine map of every
    #: position can be folded into it.
    classifies_mean = True
    #: Why the final map cannot be changed before the head reads it; empty where it can.
    cannot_change = ""
    #: A side of images, in pixels, that it surely reads; None where that is not known.
    reads_size: int | None = None
    #: Whether `preact` shows the stage outputs before their last ReLU.
    shows_preactivations = False
    #: Names of the sub-modules below the last stage.
    trunk: tuple[str, ...] = ()
    #: Names of the sub-modules between the last stage output and the classifier.
    head: tuple[str, ...] = ()
    #: What each of the networks that it consists of counts; models/ensemble.py has several.
    shares: Sequence[float] = (1.0,)
    #: One sentence that a run says of the network; empty where its name says enough.
    note = ""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.name = cls.__name__
        # Nothing is known of a head of its own: a transform that is folded into it may make another network.
        cls.activates_final = vars(cls).get("activates_final", "activate" in vars(cls) or cls.activates_final)
        for name in ("classifies_average", "classifies_mean"):
            setattr(cls, name, vars(cls).get(name, "classify" not in vars(cls) and getattr(cls, name)))

    def forward_trunk(self, x: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        """Images (B, 3, H, W) -> (stage outputs but the last, the map that enters the last stage)."""
        raise NotImplementedError

    def forward_last_stage(self, x: Tensor, preact: bool = False) -> tuple[Tensor, Tensor]:
        """The map that enters the last stage -> (the last stage output, final map)."""
        raise NotImplementedError

    def forward_maps(self, x: Tensor, preact: bool = False) -> tuple[list[Tensor], Tensor]:
        """Images (B, 3, H, W) -> (stage outputs, final map); with `preact` stage outputs before their last ReLU.

        Where the head reads tokens, they take the final map's place, as (B, C, T, 1); `to_map` finds the map.
        """
        maps, x = self.forward_trunk(x, preact)
        last_map, final = self.forward_last_stage(x, preact)
        return [*maps, last_map], final

    def get_classifier(self) -> nn.Linear:
        """The last linear layer, (D -> K)."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """K, the number of logits."""
        return self.get_classifier().out_features

    def describe(self, image_size: int) -> str:
        """One sentence that a run on images of this size says of the network; empty where its name says enough."""
        return self.note

    def to_map(self, final: Tensor) -> Tensor:
        """What the head reads -> the map (B, C, H, W) of its pixels: the same, except among tokens (B, C, T, 1)."""
        return final

    def activate(self, final: Tensor) -> Tensor:
        """What is between the final map and the pooling: nothing, except in pre-activation networks."""
        return final

    def classify(self, activated: Tensor) -> tuple[Tensor, Tensor]:
        """Activated final map (B, C, H, W) -> (pooled (B, C), logits (B, K)): global average pooling, linear layer."""
        pooled = F.adaptive_avg_pool2d(activated, 1).flatten(1)
        return pooled, self.get_classifier()(pooled)

    def outputs(self, x: Tensor, preact: bool = False) -> Output:
        """Images (B, 3, H, W) -> everything that a distillation method may look at."""
        maps, final = self.forward_maps(x, preact)
        activated = self.activate(final)
        return Output(maps, self.to_map(final), self.to_map(activated), *self.classify(activated))

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits (B, K); with `is_feat` (list of features, logits) in RepDistiller's order, the pooled vector last."""
        output = self.outputs(x, preact)
        return ([*output.maps, output.pooled], output.logits) if is_feat else output.logits

    def initialise(self) -> None:
        """Initialise in place as the family is, on top of what its layers do themselves."""

    def make_branch(self) -> "Backbone":
        """A second last stage and head on top of the same trunk: a copy without `trunk`, initialised anew."""
        branch = copy.deepcopy(self)
        for name in self.trunk:
            branch.set_submodule(name, nn.Identity())
        for module in branch.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        branch.initialise()
        return branch

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The BatchNorms before the ReLU that ends each stage (OFD reads its margins from them)."""
        raise NotImplementedError(f"{type(self).__name__} names no BatchNorms before its stages' last ReLUs")

    def get_feat_modules(self) -> nn.ModuleList:
        """The layers up to the last stage output, without the head (what AB and FSP train in their first stage).

        Of a network that does not say: everything that does not hold the classifier.
        """
        head = self.get_classifier()
        return nn.ModuleList(child for child in self.children() if not any(part is head for part in child.modules()))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients within the block; afterwards every sub-module is back in its own mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def random_images(image_size: int) -> Tensor:
    """Two images (2, 3, image_size, image_size) of noise, the same ones each time, to compare networks on."""
    return torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def probe_shapes(network: Backbone, image_size: int) -> Shapes:
    """Shapes of every output for images of (3, image_size, image_size), found by running one blank image.

    Raises `UserError` where the network cannot read images of this size.
    """
    parameter = next(network.parameters())
    try:
        with evaluating(network):
            output = network.outputs(torch.zeros(1, 3, image_size, image_size).to(parameter))
    except (AssertionError, RuntimeError, ValueError) as error:
        name, reason, size = network.name, first_line(error), network.reads_size
        hint = f"; it reads {size}x{size}" if size not in (None, image_size) else ""
        raise UserError(
            f"--image_size: {name} cannot read images of {image_size}x{image_size} ({reason}){hint}"
        ) from None
    return _shapes_of(output)


def _shapes_of(output: Output) -> Shapes:
    return Shapes(
        maps=[tuple(feature_map.shape[1:]) for feature_map in output.maps],
        final=tuple(output.final.shape[1:]),
        pooled=output.pooled.shape[1],
        num_classes=output.logits.shape[1],
        others=[_shapes_of(other) for other in output.others],
    )


@torch.no_grad()
def select_classes(network: Backbone, columns: Sequence[int]) -> Backbone:
    """A copy of a network whose logits (B, len(columns)) are these columns of the network's own, in this order.

    Raises `UserError` where a column does not exist, or occurs twice, or the network's head ends in no linear layer.
    """
    copied = copy.deepcopy(network)
    own = copied.get_classifier()
    if len(set(columns)) != len(columns) or not all(0 <= column < own.out_features for column in columns):
        raise UserError(f"the classes must be different numbers from 0 to {own.out_features - 1}")
    name = next(name for name, module in copied.named_modules() if module is own)
    selected = nn.Linear(own.in_features, len(columns), bias=own.bias is not None).to(own.weight)
    selected.weight.copy_(own.weight[list(columns)])
    if own.bias is not None:
        selected.bias.copy_(own.bias[list(columns)])
    copied.set_submodule(name, selected.train(own.training))
    return copied


def normalises_single_values(network: Backbone, image_size: int) -> bool:
    """Whether a BatchNorm sees one value per channel of an image, so that training needs two images at a time."""
    single = []

    def note(module, inputs):
        single.append(inputs[0][0, 0].numel() == 1)

    norms = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    hooks = [layer.register_forward_pre_hook(note) for layer in norms]
    try:
        probe_shapes(network, image_size)
    finally:
        for hook in hooks:
            hook.remove()
    return any(single)


class Wrapper(Backbone):
    """Base of networks that hold another one, whose stage outputs, head and properties are theirs unless they write
    their own (models/wrappers.py lists those that are shipped)."""

    #: The constructor's arguments behind the network.
    sizes: dict[str, int]

    def __init__(self, network: Backbone):
        super().__init__()
        self.network = network
        self.name = network.name
        self.activates_final, self.cannot_change = network.activates_final, network.cannot_change
        self.classifies_average, self.classifies_mean = network.classifies_average, network.classifies_mean
        self.shows_preactivations = network.shows_preactivations

    def forward_maps(self, x, preact=False):
        return self.network.forward_maps(x, preact)

    def get_classifier(self):
        return self.network.get_classifier()

    @property
    def num_classes(self):
        return self.network.num_classes

    def describe(self, image_size):
        return self.network.describe(image_size)

    def to_map(self, final):
        return self.network.to_map(final)

    def activate(self, final):
        return self.network.activate(final)

    def classify(self, activated):
        return self.network.classify(activated)

    def get_bn_before_relu(self):
        return self.network.get_bn_before_relu()

    def get_feat_modules(self):
        return self.network.get_feat_modules()


class FinalConv(Wrapper):
    """A network with one 1x1 convolution between its final map, or its tokens, and its head: the folded form of a
    transform that the head's own layers keep from disappearing into the classifier."""

    def __init__(self, network: Backbone, channels: int):
        super().__init__(network)
        self.sizes = {"channels": channels}
        self.final_conv = nn.Conv2d(channels, channels, 1)

    def forward_maps(self, x, preact=False):
        maps, final = self.network.forward_maps(x, preact)
        return maps, self.final_conv(final)


def forward_stage(stage: nn.Sequential, x: Tensor, preact: bool) -> tuple[Tensor, Tensor]:
    """A chain of blocks, the last of which shows its sum before the ReLU as `preactivation`, on a map (B, C, H, W) ->
    (the stage's entry in the list of maps, its output)."""
    before_relu = stage[-1].preactivation(stage[:-1](x))
    x = F.relu(before_relu)
    return before_relu if preact else x, x


def initialise(network: nn.Module) -> None:
    """Initialise in place as the CIFAR networks of the tables are: convolutions by He et al. (ICCV 2015, fan-out),
    BatchNorm weights 1 and biases 0. Linear layers are left to their family."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def initialise_linear(linear: nn.Linear, std: float = 0.01) -> None:
    """Initialise a classifier in place: weights N(0, std^2), biases 0 (the VGG and MobileNetV2 convention)."""
    nn.init.normal_(linear.weight, 0.0, std)
    nn.init.zeros_(linear.bias)

"""Any classification network or encoder of torchvision or timm as a backbone: `torchvision:NAME`, `timm:NAME`.

Where the last feature map is, or the tokens that the head reads, and which layer classifies, is found from the shapes
of one blank image (in torchvision_split.py and timm_split.py); nothing is known of single architectures.
"""

import difflib
import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType

import torch
from torch import Tensor, nn

from errors import UserError, count_of, first_line
from models.backbone import Backbone, Output, probe_shapes
from models.split import Split, as_if_trained, patches_to_map, ramp

#: Library -> the module that names, builds and splits its networks; imported when a network of it is asked for.
LIBRARIES = {"torchvision": "models.torchvision_split", "timm": "models.timm_split"}


#: What a network may drop at random while it trains: features before its classifier, and whole residual branches.
DROPS = ("drop_rate", "drop_path_rate")


class External(Backbone):
    """A foreign network under our contract; its weights keep their own names, below `network`."""

    def __init__(self, name: str, network: nn.Module, split: Split, num_classes: int):
        super().__init__()
        self.name, self.network, self.split, self._num_classes = name, network, split, num_classes
        self.cannot_change, self.reads_size = split.cannot_change, split.image_size
        self.classifies_average, self.classifies_mean = self._look_at_head()

    @torch.no_grad()
    def _look_at_head(self) -> tuple[bool, bool]:
        """(whether the classifier reads the average of the final map, whether it reads a weighted mean)."""
        channels, height, width = self.split.final
        if self.cannot_change or self.split.classifier is None:
            return False, False
        positions = (height, width) if self.split.prefix is None else (self.split.prefix + height * width, 1)
        final = ramp(1, channels, *positions)
        # A mean whose weights sum to 1 commutes with every affine map of the positions; nothing else does.
        matrix, shift = ramp(channels, channels) / channels**0.5, ramp(channels).cos()
        moved = torch.einsum("dc,bcij->bdij", matrix, final) + shift[:, None, None]
        with as_if_trained(self.network):
            (pooled, _), (pooled_moved, _) = (self.split.head(self.network, each) for each in (final, moved))
        average = self.to_map(final).mean((2, 3))
        if pooled.shape != average.shape:
            return False, False
        is_mean = torch.allclose(pooled_moved, pooled @ matrix.T + shift, atol=1e-4)
        return torch.allclose(pooled, average, atol=1e-5), is_mean

    @property
    def note(self):
        return self._describe(self.split.final, self.split.image_size)

    def describe(self, image_size):
        return self._describe(probe_shapes(self, image_size).final, image_size)

    def _describe(self, final: tuple[int, int, int], size: int) -> str:
        channels, height, width = final
        if self.cannot_change:
            reads = self.cannot_change
        elif self._num_classes == 0:
            reads = "it has no classifier"
        elif self.split.classifier is None:
            reads = "its head does not end in one linear layer"
        else:
            kind = ("the average" if self.classifies_average else "a mean") if self.classifies_mean else "a function"
            whole = "it" if self.split.prefix is None else "the tokens"
            reads = f"the classifier {self.split.classifier} reads {kind} of {whole}"
        return (
            f"{self.name}: the last feature map is {self.split.final_name}, {channels} channels of {height}x{width} "
            f"pixels for an image of {size}x{size}; {reads}"
        )

    def forward_maps(self, x, preact=False):
        if preact:
            raise UserError(f"{self.name}: its maps before their ReLU are not known; only our own networks show them")
        if self.cannot_change:
            raise UserError(f"{self.name}: its last map cannot be changed, since {self.cannot_change}")
        return self.split.features(self.network, x)

    def outputs(self, x, preact=False):
        if preact or not self.cannot_change:
            return super().outputs(x, preact)
        maps, features = self.split.features(self.network, x)
        *_, final = maps
        return Output(maps, final, final, *self.split.head(self.network, features))

    def get_classifier(self):
        if self.split.classifier is None:
            reason = "it has no classifier" if self._num_classes == 0 else "its head does not end in one linear layer"
            raise UserError(f"{self.name}: {reason}, which this needs; choose another network or --distill method")
        return self.network.get_submodule(self.split.classifier)

    @property
    def num_classes(self) -> int:
        return self._num_classes if self.split.classifier is None else self.get_classifier().out_features

    def to_map(self, final: Tensor) -> Tensor:
        return final if self.split.prefix is None else patches_to_map(final, self.split.prefix)

    def classify(self, activated):
        return self.split.head(self.network, activated)

    def make_branch(self):
        raise UserError(f"{self.name}: its last stage is not known; only our own networks name it")

    def get_feat_modules(self):
        raise UserError(f"{self.name}: its stages are not known; only our own networks name them")


def is_external(name: str) -> bool:
    """Whether a model's name is that of another library's."""
    return name.partition(":")[0] in LIBRARIES and ":" in name


def find_external(name: str) -> Callable[..., External]:
    """The function `(num_classes, image_size=None) -> network` of `torchvision:NAME` or `timm:NAME`; `UserError` for an
    unknown one."""
    library, _, architecture = name.partition(":")
    known = import_module(LIBRARIES[library]).list_names()
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f"; did you mean {', '.join(f'{library}:{other}' for other in close)}?" if close else ""
        raise UserError(f"unknown model '{name}': {library} has no classification network of this name{hint}")
    return functools.partial(build_external, name)


def build_pretrained(name: str, image_size: int | None = None) -> External:
    """timm's trained network of `timm:NAME`, which may carry a tag, `timm:resnet34.a1_in1k`; timm downloads it."""
    library, _, architecture = name.partition(":")
    tools = import_module(LIBRARIES[library])
    network = tools.build_pretrained(architecture, image_size)
    plain, num_classes = f"{library}:{architecture.partition('.')[0]}", network.num_classes
    return External(plain, network, tools.split(plain, network, num_classes, image_size), num_classes)


def build_external(
    name: str, num_classes: int, image_size: int | None = None, drops: Mapping[str, float] = MappingProxyType({})
) -> External:
    """A freshly initialised network; with 0 classes an encoder, without a classifier.

    `image_size` is needed by networks whose weights belong to one size, and not by others. `drops` are rates by the
    names of `DROPS`; without one the network has its library's. Raises `UserError` where the network cannot be built or
    read, or has nothing to drop.
    """
    library, _, architecture = name.partition(":")
    tools = import_module(LIBRARIES[library])
    try:
        network = tools.build(architecture, num_classes, image_size, drops)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        with_classes = f"with {count_of(num_classes, 'class')}"
        raise UserError(f"{name}: {library} cannot build it {with_classes}: {first_line(error)}") from None
    return External(name, network, tools.split(name, network, num_classes, image_size), num_classes)

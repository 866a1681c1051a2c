"""Any classification network of torchvision or timm as a backbone: `torchvision:NAME`, `timm:NAME`.

Where the last feature map is, and which layer classifies, is found from the shapes of one blank image (in
torchvision_split.py and timm_split.py); nothing is known of single architectures.
"""

import difflib
import functools
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from errors import UserError
from models.backbone import Backbone, evaluating
from models.split import Split

#: Library -> the module that names, builds and splits its networks; imported when a network of it is asked for.
LIBRARIES = {"torchvision": "models.torchvision_split", "timm": "models.timm_split"}


class External(Backbone):
    """A foreign network under our contract; its weights keep their own names, below `network`."""

    def __init__(self, name: str, network: nn.Module, split: Split):
        super().__init__()
        self.name, self.network, self.split = name, network, split
        final = torch.arange(float(torch.Size(split.final).numel())).sin().view(1, *split.final)
        with evaluating(network):
            pooled, _ = split.head(network, final)
        average = final.mean((2, 3))
        self.classifies_average = pooled.shape == average.shape and torch.allclose(pooled, average, atol=1e-5)

    @property
    def note(self):
        channels, height, width = self.split.final
        size = self.split.image_size
        pooling = "the average" if self.classifies_average else "a function"
        return (
            f"{self.name}: the last feature map is {self.split.final_name}, {channels} channels of {height}x{width} "
            f"pixels for an image of {size}x{size}; the classifier {self.split.classifier} reads {pooling} of it"
        )

    def forward_maps(self, x, preact=False):
        if preact:
            raise UserError(f"{self.name}: its maps before their ReLU are not known; only our own networks show them")
        return self.split.features(self.network, x)

    def get_classifier(self):
        return self.network.get_submodule(self.split.classifier)

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
    """The function `(num_classes) -> network` of `torchvision:NAME` or `timm:NAME`; `UserError` for an unknown one."""
    library, _, architecture = name.partition(":")
    known = import_module(LIBRARIES[library]).list_names()
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f"; did you mean {', '.join(f'{library}:{other}' for other in close)}?" if close else ""
        raise UserError(f"unknown model '{name}': {library} has no classification network of this name{hint}")
    return functools.partial(build_external, name)


def build_pretrained(name: str) -> External:
    """timm's trained network of `timm:NAME`, which may carry a tag, `timm:resnet34.a1_in1k`; timm downloads it."""
    library, _, architecture = name.partition(":")
    tools = import_module(LIBRARIES[library])
    network = tools.build_pretrained(architecture)
    plain = f"{library}:{architecture.partition('.')[0]}"
    return External(plain, network, tools.split(plain, network, network.num_classes))


def build_external(name: str, num_classes: int) -> External:
    """A freshly initialised network; `UserError` where it has no last feature map or no linear classifier."""
    library, _, architecture = name.partition(":")
    tools = import_module(LIBRARIES[library])
    try:
        network = tools.build(architecture, num_classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: {library} cannot build it with {num_classes} classes: {error}") from None
    return External(name, network, tools.split(name, network, num_classes))

"""Several teachers as one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errors import UserError
from models.backbone import Backbone, Output


class Ensemble(Backbone):
    """Networks whose logits are averaged, and whose final maps stand next to each other.

    `final` and `activated` hold the channels of all networks, in the size of the first one's map, to which the others
    are interpolated: each of NORM's N segments then holds one segment for every network, and its loss is the mean of
    theirs, weighted by their channels. Stage outputs and pooled vector are the first network's. Only for teachers.

    weights: of the logits, one for each network; equal by default. Raises `UserError` where the numbers of classes or
    of weights differ.
    """

    classifies_average = classifies_mean = False
    cannot_change = "several networks have no head in common"

    def __init__(self, networks: Sequence[Backbone], weights: Sequence[float] | None = None):
        super().__init__()
        weights = [1.0] * len(networks) if weights is None else list(weights)
        classes = [network.num_classes for network in networks]
        if len(weights) != len(networks) or min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"{len(networks)} networks need as many weights, none below 0 and one above, not {weights}")
        if len(set(classes)) > 1:
            raise UserError(f"networks of {' and '.join(map(str, classes))} classes have no average")
        self.networks = nn.ModuleList(networks)
        self.shares = [weight / sum(weights) for weight in weights]
        self.shows_preactivations = networks[0].shows_preactivations

    @property
    def name(self) -> str:
        return "+".join(getattr(network, "name", type(network).__name__) for network in self.networks)

    @property
    def num_classes(self):
        first, *_ = self.networks
        return first.num_classes

    def describe(self, image_size):
        parts = [network.describe(image_size) for network in self.networks]
        of_all = (
            f"{len(self.networks)} teachers: logits are averaged with weights "
            f"{', '.join(f'{share:.3g}' for share in self.shares)}; last maps are matched together; stage outputs and "
            "pooled vectors are the first teacher's"
        )
        return "\n".join(filter(None, [*parts, of_all]))

    def get_classifier(self):
        raise UserError("several teachers have no classifier in common; choose one teacher or another --distill method")

    def forward_maps(self, x, preact=False):
        raise UserError(f"several teachers cannot be a student: {self.cannot_change}")

    def outputs(self, x: Tensor, preact: bool = False) -> Output:
        first, *others = shown = [
            network.outputs(x, preact and number == 0) for number, network in enumerate(self.networks)
        ]
        logits = sum(share * each.logits for share, each in zip(self.shares, shown, strict=True))
        final = _side_by_side(first.final, [each.final for each in others])
        activated = _side_by_side(first.activated, [each.activated for each in others])
        return Output(first.maps, final, activated, first.pooled, logits)


def _side_by_side(first: Tensor, others: list[Tensor]) -> Tensor:
    """Maps (B, C_i, H_i, W_i) -> (B, sum of C_i, H, W), in the size of the first."""
    size = first.shape[2:]
    resized = [
        each
        if each.shape[2:] == size
        else F.interpolate(each, size, mode="bilinear", align_corners=False, antialias=True)
        for each in others
    ]
    return torch.cat([first, *resized], 1)

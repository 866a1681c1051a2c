"""A network of which only the shapes of its outputs are known, for checks of what methods compute from them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.backbone import Backbone, Output

Shape = tuple[int, int, int]


class StandIn(Backbone):
    """Shows maps of the given shapes (C, H, W), shallow to deep, all zero; the last one is pooled.

    `shown` maps take the place of the zeros. `batch_norms` are those that OFD reads its margins from.
    """

    classifies_average = shows_preactivations = True

    def __init__(self, maps: Sequence[Shape], pooled: int, num_classes: int, batch_norms: Sequence[nn.Module] = ()):
        super().__init__()
        self.shapes, self.batch_norms = list(maps), list(batch_norms)
        self.fc = nn.Linear(pooled, num_classes)
        self.shown: list[Tensor] | None = None

    def forward_maps(self, x, preact=False):
        maps = self.shown or [x.new_zeros(len(x), *shape) for shape in self.shapes]
        *_, last = maps
        return maps, last

    def classify(self, activated):
        pooled = activated.new_zeros(len(activated), self.fc.in_features)
        return pooled, self.fc(pooled)

    def get_classifier(self):
        return self.fc

    def get_bn_before_relu(self):
        return self.batch_norms


def output(
    maps: Sequence[Tensor] = (), pooled: Tensor | None = None, logits: Tensor | None = None, stem: Tensor | None = None
) -> Output:
    """What a network would show that has these outputs; behind a `stem` map, the first of `maps` is a middle one."""
    maps = list(maps)
    last = maps[-1] if maps else None
    if stem is not None:
        maps.insert(0, stem)
    return Output(maps, last, last, pooled, torch.zeros(()) if logits is None else logits)

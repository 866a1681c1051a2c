"""Several teachers as one."""

from collections.abc import Sequence

from torch import nn

from errors import UserError
from models.backbone import Backbone, Output


def shares_of(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """What each of `count` networks counts, from 0 to 1, summing to 1; equal where there are no weights.

    Raises `UserError` for other numbers of weights, and for weights that cannot be shares.
    """
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        written = ", ".join(f"{weight:g}" for weight in weights)
        raise UserError(f"{count} networks need {count} weights, none below 0 and one above, not {written}")
    total = sum(weights)
    if abs(total - 1) < 1e-9:
        return tuple(weights)  # as shares are stored, and read again
    return tuple(weight / total for weight in weights)


class Ensemble(Backbone):
    """Networks that teach together: their logits are averaged, and each shows a last map of its own.

    Everything but the logits is the first one's; the others' outputs are `Output.others`, without their logits' part
    in the average. Networks with different numbers of classes have no average: there are no logits then. Only for
    teachers.

    weights: what each counts, in the logits and in NORM's loss; equal by default. Raises `UserError` where there is
    another number of them.
    """

    classifies_average = classifies_mean = False
    cannot_change = "several networks have no head in common"

    def __init__(self, networks: Sequence[Backbone], weights: Sequence[float] | None = None):
        super().__init__()
        self.shares = shares_of(weights, len(networks))
        self.networks = nn.ModuleList(networks)
        counts = {network.num_classes for network in networks}
        self._num_classes = counts.pop() if len(counts) == 1 else 0
        self.shows_preactivations = networks[0].shows_preactivations
        self.name = ",".join(network.name for network in networks)

    @property
    def num_classes(self):
        """K of every network; 0 where they differ."""
        return self._num_classes

    def describe(self, image_size):
        parts = [network.describe(image_size) for network in self.networks]
        written = ", ".join(f"{share:.3g}" for share in self.shares)
        logits = f"their logits are averaged with weights {written}"
        if not self.num_classes:
            counts = ", ".join(str(network.num_classes) for network in self.networks)
            logits = f"they have {counts} classes, so there are no logits of all"
        others = "other methods that read maps or pooled vectors read the first teacher's"
        of_all = f"{len(self.networks)} teachers: {logits}; NORM matches each in N segments of its own; {others}"
        return "\n".join(filter(None, [*parts, of_all]))

    def get_classifier(self):
        raise UserError("several teachers have no classifier in common; choose one teacher or another --distill method")

    def get_bn_before_relu(self):
        return self.networks[0].get_bn_before_relu()

    def forward_maps(self, x, preact=False):
        raise UserError(f"several teachers cannot be a student: {self.cannot_change}")

    def outputs(self, x, preact=False) -> Output:
        first, *others = [network.outputs(x, preact and number == 0) for number, network in enumerate(self.networks)]
        if not self.num_classes:
            return first._replace(logits=first.logits[:, :0], others=others)
        shown = zip(self.shares, (first, *others), strict=True)
        return first._replace(logits=sum(share * each.logits for share, each in shown), others=others)

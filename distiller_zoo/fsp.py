"""FSP: a gift from knowledge distillation, the flow of the solution procedure (Yim, Joo, Bae & Kim, CVPR 2017).

First stage, --init_epochs epochs: sum over pairs of consecutive maps of MSE(M_s, M_t), with the flow

    M[c, c'] = mean over pixels of upper[c] * lower[c']

(equations 1 and 2; the larger map is pooled to the smaller). Then L = gamma * CE(s, y) + alpha * KL_T(s, t).
Maps are all feature maps, the stem's included, and pooling is the average, as in RepDistiller, whose numbers the
tables quote (the paper: max-pooling). There, the weight -b of its command for FSP is in no loss; here it is no flag.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.maps import pool_to_smaller, require_equal_channels, require_maps
from distiller_zoo.staged import FeaturesFirst
from models.backbone import probe_shapes


def flow(lower: Tensor, upper: Tensor) -> Tensor:
    """Consecutive maps (B, C, H, W) and (B, C', H', W') of one network -> (B, C', C)."""
    lower, upper = (each.flatten(2) for each in pool_to_smaller(lower, upper))
    return upper @ lower.mT / lower.shape[2]


class FSP(nn.Module):
    """Lists of maps (B, C_i, H_i, W_i) of student and teacher -> list of scalars, one per pair of consecutive maps.

    Shapes end with (C, H, W). Raises `UnfitPair` where the channels of the two networks are not equal.
    """

    def __init__(self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]):
        super().__init__()
        require_equal_channels("fsp", s_shapes, t_shapes)

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        flows = ([flow(*pair) for pair in pairwise(maps)] for maps in (g_s, g_t))
        return [F.mse_loss(student, teacher) for student, teacher in zip(*flows, strict=True)]


class SolutionFlow(FeaturesFirst):
    """The student's layers first learn how the teacher's lead from one to the next."""

    name = "fsp"
    summary, source = "FSP: L2 between Gram matrices of consecutive maps, in a first stage", "Yim et al., CVPR 2017"
    reference = "HobbitLong/RepDistiller"

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        shapes = [probe_shapes(network, task.image_size).maps for network in (student, teacher)]
        require_maps(self.name, *shapes, least=2)
        self.criterion = FSP(*shapes)

    def first_loss(self, student, teacher):
        return sum(self.criterion(student.maps, teacher.maps))

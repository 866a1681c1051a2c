"""AB: knowledge transfer via distillation of activation boundaries (Heo, Lee, Yun & Choi, AAAI 2019, arXiv 1811.03233).

First stage, --init_epochs epochs: the student's neurons s are moved to the teacher's side of zero,

    sum over layers of 3 / (1000 B) * 2^-(layers above) * |max(0, 1 - side(t) r(s))|^2,    side(t) = 1 if t > 0, else -1

(section 3, with a margin of 1). s and t are feature maps before their last ReLU, without the stem's; r is a connector
to the teacher's shape. Then L = gamma * CE(s, y) + alpha * KL_T(s, t), without connectors.

The factors, the connectors and the cross entropy of the second stage are RepDistiller's, whose numbers the tables
quote; the authors' code trains on softened logits alone there. RepDistiller demands networks of equally many maps;
here the deeper layers of the longer one are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.hint import ConvReg
from distiller_zoo.maps import describe_left_out, middle_maps, require_maps
from distiller_zoo.staged import FeaturesFirst
from models.backbone import probe_shapes


class ABLoss(nn.Module):
    """Lists of student's and teacher's maps (B, C_i, H_i, W_i) before their ReLU, equal shapes -> list of scalars.

    The weight of a layer is half that of the next one, and 1 in the last of `feat_num`.
    """

    def __init__(self, feat_num: int, margin: float = 1.0):
        super().__init__()
        self.weights = [2.0 ** (layer - feat_num + 1) for layer in range(feat_num)]
        self.margin = margin

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return [
            weight * 3 / (1000 * len(student)) * self.violation(student, teacher)
            for weight, student, teacher in zip(self.weights, g_s, g_t, strict=False)
        ]

    def violation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Sum of the squares by which neurons miss the teacher's side of zero and the margin; a scalar."""
        wrong_way = torch.where(teacher > 0, -student, student)
        return F.relu(self.margin + wrong_way).square().sum()


class Connector(nn.Module):
    """Student maps -> maps of the teacher's shapes: a convolution and a BatchNorm where the shape differs.

    Shapes end with (C, H, W). Raises `UserError` for sizes that no convolution bridges, `ValueError` for lists of
    different length.
    """

    def __init__(self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]):
        super().__init__()
        pairs = zip(s_shapes, t_shapes, strict=True)
        self.connectors = nn.ModuleList(_connect(student, teacher) for student, teacher in pairs)

    def forward(self, g_s: Sequence[Tensor]) -> list[Tensor]:
        return [connector(each) for connector, each in zip(self.connectors, g_s, strict=False)]


def _connect(s_shape: Sequence[int], t_shape: Sequence[int]) -> nn.Module:
    same = tuple(s_shape[-3:]) == tuple(t_shape[-3:])
    return nn.Identity() if same else ConvReg(s_shape, t_shape, use_relu=False)


class ActivationBoundaries(FeaturesFirst):
    """The student's neurons first learn when to fire."""

    name = "abound"
    summary, source = "AB: signs of the maps before their ReLU (hinge loss), in a first stage", "Heo et al., AAAI 2019"
    reference = "HobbitLong/RepDistiller"
    departures = (
        "Networks of unequally many maps are allowed: the deeper layers of the longer one are left out. The"
        " second stage is RepDistiller's cross entropy (the authors: softened logits), since the tables' "
        "numbers come from it."
    )
    student_preact = teacher_preact = True
    min_batch = 2  # the connectors' BatchNorm, where the map is one pixel
    frozen = ("connector",)

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        shapes = [middle_maps(probe_shapes(network, task.image_size)) for network in (student, teacher)]
        require_maps(self.name, *shapes)
        self.note(describe_left_out(*shapes))
        layers = min(map(len, shapes))
        self.connector = Connector(*(each[:layers] for each in shapes))
        self.criterion = ABLoss(layers)

    def first_loss(self, student, teacher):
        return sum(self.criterion(self.connector(middle_maps(student)), middle_maps(teacher)))

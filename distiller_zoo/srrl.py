"""SRRL: softmax regression representation learning (Yang, Martinez, Bulat & Tzimiropoulos, ICLR 2021).

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * [MSE(v, pooled_t) + MSE(W_t(v), t)]

v is the student's representation, brought to the teacher's width by a connector (1x1 convolution, BatchNorm, ReLU), and
W_t the teacher's classifier, frozen: its gradient reaches the connector and the student. The two published forms, by
--srrl_form:

- map: the connector reads the map that the student pools, and its result is pooled (the official ImageNet code; it has
  no KL term, so its recipe is -a 0); the convolution starts as there, by He et al. over its outputs.
- pooled: the connector reads the pooled vector (the repository of SimKD, which made the CIFAR-100 rows; -a 1); the
  convolution starts as torch starts it.
"""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import BETA, Flag, above_zero
from distiller_zoo.kd import FeatureDistiller
from models.backbone import Output, initialise, probe_shapes

SRRL_FORM = Flag(
    ("--srrl_form",),
    str,
    "pooled",
    "what SRRL's connector reads: pooled (the vector; the published CIFAR rows) or map (what is pooled; the official "
    "ImageNet code, which has no KL term: -a 0)",
    choices=("pooled", "map"),
)


def connector(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution, BatchNorm, ReLU: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


class SRRL(FeatureDistiller):
    """The student's representation must be the teacher's, and must mean the same to the teacher's classifier."""

    name = "srrl"
    summary, source = (
        "SRRL: L2 between pooled features, and between the logits of the teacher's classifier on both",
        "Yang et al., ICLR 2021",
    )
    reference = "jingyang2017/KD_SRRL (map), DefangChen/SimKD (pooled)"
    group = "feature maps"
    reads = ("pooled",)
    min_batch = 2  # the connector's BatchNorm sees one pixel per image
    frozen = ("teacher_classifier",)
    flags = (*FeatureDistiller.flags, SRRL_FORM)
    flags_work_if = {**FeatureDistiller.flags_work_if, "srrl_form": (above_zero(BETA),)}

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        if self.srrl_form == "map":
            self.reads = ("activated", "pooled")
        widths = (probe_shapes(network, task.image_size).pooled for network in (student, teacher))
        self.connector = connector(*widths)
        if self.srrl_form == "map":
            initialise(self.connector)
        self.teacher_classifier = copy.deepcopy(teacher.get_classifier()).requires_grad_(False)

    def reads_teacher_logits(self):
        return self.alpha > 0 or self.beta > 0

    def represent(self, student: Output) -> Tensor:
        """The student's representation in the teacher's space, (B, Dt)."""
        read = student.activated if self.srrl_form == "map" else student.pooled[:, :, None, None]
        return self.connector(read).mean((2, 3))

    def terms(self, student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
        """The scalars (MSE to the teacher's pooled vector, MSE of the logits that its classifier gives)."""
        representation = self.represent(student)
        regression = F.mse_loss(self.teacher_classifier(representation), teacher.logits)
        return F.mse_loss(representation, teacher.pooled), regression

    def feature_loss(self, student, teacher, targets, index):
        return sum(self.terms(student, teacher))

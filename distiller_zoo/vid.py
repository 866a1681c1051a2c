"""VID, variational information distillation (Ahn et al., CVPR 2019, arXiv 1904.05835), with a Gaussian.

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * sum over layers of mean[(mu(F_s) - F_t)^2 / (2 v) + ln(v) / 2]

mu is a trained regressor and v a trained variance per channel of the teacher, v = ln(1 + e^log_scale) + eps. Layers are
the feature maps without the stem's, paired from the shallowest on; the larger map of a pair is average-pooled first.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.maps import MapDistiller, middle_maps, pool_to_smaller
from models.backbone import probe_shapes


class VIDLoss(nn.Module):
    """The negative log-likelihood of a teacher's map, given the student's.

    Maps (B, num_input_channels, H, W) and (B, num_target_channels, H', W') -> scalar. `init_pred_var` is the variance
    at the start, above `eps`, which it never falls below.
    """

    def __init__(
        self,
        num_input_channels: int,
        num_mid_channel: int,
        num_target_channels: int,
        init_pred_var: float = 5.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(num_input_channels, num_mid_channel, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(num_mid_channel, num_mid_channel, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(num_mid_channel, num_target_channels, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((num_target_channels,), math.log(math.expm1(init_pred_var - eps))))
        self.eps = eps

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        input, target = pool_to_smaller(input, target)
        variance = F.softplus(self.log_scale) + self.eps
        squared_error = (self.regressor(input) - target).square().mean((0, 2, 3))  # (C,), as the variance is
        return 0.5 * (squared_error / variance + variance.log()).mean()


class VID(MapDistiller):
    """The student's maps must tell as much as possible about the teacher's."""

    name = "vid"
    summary, source = "VID: Gaussian log-likelihood of the teacher's maps given the student's", "Ahn et al., CVPR 2019"
    reference = "HobbitLong/RepDistiller"
    group = "feature maps"
    reads = ("maps",)

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        student_maps, teacher_maps = (middle_maps(probe_shapes(each, task.image_size)) for each in (student, teacher))
        self.criteria = nn.ModuleList(
            VIDLoss(channels, teacher_channels, teacher_channels)
            for (channels, _, _), (teacher_channels, _, _) in zip(student_maps, teacher_maps, strict=False)
        )

    def feature_loss(self, student, teacher, targets, index):
        layers = zip(self.criteria, *self.sized(middle_maps(student), middle_maps(teacher)), strict=True)
        return sum(criterion(student_map, teacher_map) for criterion, student_map, teacher_map in layers)

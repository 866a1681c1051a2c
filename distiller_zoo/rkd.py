"""RKD, relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068), section 3.2.

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * (distance_weight * L_distance + angle_weight * L_angle)

L_distance compares the distances of all pairs of pooled vectors, divided by their mean, L_angle the cosines at x_i of
all triangles x_j x_i x_k; both by the Huber loss. The published weights are 25 and 50.
Cosines come from the distances by the law of cosines, so that the (B, B, D) differences of the vectors are not kept.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import BETA, Flag, above_zero, number
from distiller_zoo.kd import FeatureDistiller
from distiller_zoo.maps import ZERO_LENGTH

DISTANCE_WEIGHT = Flag(("--distance_weight",), number, 25.0, "weight of RKD's distances, within -b")
ANGLE_WEIGHT = Flag(("--angle_weight",), number, 50.0, "weight of RKD's angles, within -b")
#: The distance at which two different images are taken to be at least, for their share in the mean distance.
SMALLEST_DISTANCE = 1e-6


def pairwise_distances(vectors: Tensor) -> Tensor:
    """Vectors (B, D) -> Euclidean distances (B, B), from differences: exact where vectors are close or equal."""
    return torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")


def relative_distances(distances: Tensor) -> Tensor:
    """Distances (B, B) divided by the mean over all pairs of different images, B at least 2."""
    same = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    distances = distances.clamp_min(SMALLEST_DISTANCE).masked_fill(same, 0)
    return distances / (distances.sum() / (len(distances) * (len(distances) - 1)))


def triangle_cosines(distances: Tensor) -> Tensor:
    """Distances (B, B) -> (B, B, B): the cosine at i between the directions to j and to k.

    cos = (d_ij^2 + d_ik^2 - d_jk^2) / (2 d_ij d_ik); zero, without gradient, where j or k coincides with i.
    """
    squares = distances.square()
    inverse = torch.where(distances > ZERO_LENGTH, 1 / distances.clamp_min(ZERO_LENGTH), 0)
    products = squares[:, :, None] + squares[:, None, :] - squares
    # Where images are almost the same the three squares cancel, and rounding would be taken for a direction.
    return (products * (0.5 * inverse[:, :, None] * inverse[:, None, :])).clamp(-1, 1)


class RKDLoss(nn.Module):
    """Pooled vectors (B, D_s) of the student and (B, D_t) of the teacher, B at least 2 -> scalar."""

    def __init__(self, w_d: float = 25, w_a: float = 50):
        super().__init__()
        self.w_d, self.w_a = w_d, w_a

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        student, teacher = pairwise_distances(f_s.flatten(1)), pairwise_distances(f_t.flatten(1))
        distance_loss = F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))
        angle_loss = F.smooth_l1_loss(triangle_cosines(student), triangle_cosines(teacher))
        return self.w_d * distance_loss + self.w_a * angle_loss


class RKD(FeatureDistiller):
    """The images of a batch form the same figure in both networks' spaces."""

    name = "rkd"
    summary, source = (
        "RKD: pairwise distances and angles of the pooled features within a batch",
        "Park et al., CVPR 2019",
    )
    reference = "HobbitLong/RepDistiller"
    departures = "Equal or almost equal images get finite gradients."
    group = "relations between images"
    reads = ("pooled",)
    min_batch = 2
    flags = (*FeatureDistiller.flags, DISTANCE_WEIGHT, ANGLE_WEIGHT)
    flags_work_if = {
        **FeatureDistiller.flags_work_if,
        **dict.fromkeys(("distance_weight", "angle_weight"), (above_zero(BETA),)),
    }

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        if not (self.distance_weight or self.angle_weight):
            self.beta = 0.0  # its term has neither part
        self.criterion = RKDLoss(self.distance_weight, self.angle_weight)

    def feature_loss(self, student, teacher, targets, index):
        return self.criterion(student.pooled, teacher.pooled)

"""PKT, probabilistic knowledge transfer (Passalis & Tefas, ECCV 2018, arXiv 1803.10837), cosine similarity.

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * mean over i, j of t_ij * ln(t_ij / s_ij)

s_ij and t_ij are the probabilities that image i picks image j of the batch, in proportion to (cos(x_i, x_j) + 1) / 2 of
the pooled vectors. The mean over all pairs and the diagonal are RepDistiller's, and the published beta = 30000 is too.
RepDistiller sets NaNs to zero; here a zero vector, which has no direction, stays zero and gets no gradient.
"""

import torch
from torch import Tensor, nn

from distiller_zoo.kd import FeatureDistiller

EPSILON = 1e-7


def neighbour_probabilities(vectors: Tensor) -> Tensor:
    """Vectors (B, D) -> (B, B), rows of sum 1: how probable it is that an image picks each image of the batch."""
    length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    directions = vectors * torch.where(length > 0, 1 / (length + EPSILON), 0)
    cosines = (directions @ directions.T).clamp_min(-1)  # rounding can pass -1, and a logarithm follows
    similarities = (cosines + 1) / 2
    return similarities / similarities.sum(1, keepdim=True)


class PKT(nn.Module):
    """Pooled vectors (B, D_s) of the student and (B, D_t) of the teacher -> scalar."""

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        student, teacher = neighbour_probabilities(f_s), neighbour_probabilities(f_t)
        return (teacher * ((teacher + EPSILON).log() - (student + EPSILON).log())).mean()


class ProbabilisticTransfer(FeatureDistiller):
    """Each image has the same neighbours in both networks' spaces."""

    name = "pkt"
    summary, source = (
        "PKT: KL divergence of the cosine similarity distributions within a batch",
        "Passalis & Tefas, ECCV 2018",
    )
    reference = "HobbitLong/RepDistiller"
    departures = "A zero vector gets no gradient; the reference sets NaNs to 0."
    group = "relations between images"
    reads = ("pooled",)
    min_batch = 2

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.criterion = PKT()

    def feature_loss(self, student, teacher, targets, index):
        return self.criterion(student.pooled, teacher.pooled)

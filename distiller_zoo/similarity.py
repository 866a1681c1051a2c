"""SP, similarity-preserving distillation (Tung & Mori, ICCV 2019, arXiv 1907.09682), section 3.

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * ||G(F_s) - G(F_t)||^2 / B^2

G(F) = Q Q^T with the flattened maps of the B images as the rows of Q, and rows of length 1. F is the last feature map.
RepDistiller returns tensors of shape (1,); here they are scalars.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.kd import FeatureDistiller
from distiller_zoo.maps import last_map, unit_vectors


def similarity_matrix(feature_map: Tensor) -> Tensor:
    """(B, ...) -> (B, B): how similar each image is to every other, rows of length 1."""
    rows = feature_map.flatten(1)
    return unit_vectors(rows @ rows.T, dim=1)


class Similarity(nn.Module):
    """Lists of maps (B, C_i, H_i, W_i) of student and teacher -> list of scalars, one per layer of the shorter list."""

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        return [self.similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def similarity_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one layer, a scalar."""
        return F.mse_loss(similarity_matrix(f_s), similarity_matrix(f_t))


class SimilarityPreserving(FeatureDistiller):
    """Images that are similar to the teacher are similar to the student."""

    name = "similarity"
    summary, source = "SP: L2 between the similarity matrices of a batch's last maps", "Tung & Mori, ICCV 2019"
    reference = "HobbitLong/RepDistiller"
    group = "relations between images"
    reads = ("maps",)
    min_batch = 2

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.criterion = Similarity()

    def feature_loss(self, student, teacher, targets, index):
        return sum(self.criterion([last_map(student)], [last_map(teacher)]))

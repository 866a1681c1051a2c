"""NST, neuron selectivity transfer (Huang & Wang, 2017, arXiv 1707.01219), polynomial kernel.

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * sum over layers of mean k(t, t) + mean k(s, s) - 2 mean k(s, t)

This is the squared maximum mean discrepancy of the channels of two maps with the kernel k(a, b) = (a.b)^2, where each
channel is a vector of length 1 over its pixels; means are over images and pairs of channels. Layers are the feature
maps without the stem's, paired from the shallowest on; the larger map of a pair is average-pooled to the smaller.
RepDistiller keeps all products (B, C, C', H * W), gigabytes for wide teachers; here they are matrix products, over
channels or over pixels, whichever are fewer.
"""

import torch
from torch import Tensor, nn

from distiller_zoo.maps import MapDistiller, middle_maps, pool_to_smaller, unit_vectors


def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Channels (B, C, P) and (B, C', P) -> the mean of (a_c . b_c')^2 over images and pairs of channels, a scalar."""
    (batch, channels, pixels), other_channels = a.shape, b.shape[1]
    if pixels >= min(channels, other_channels):
        return (a @ b.mT).square().mean()
    # The same sum, trace(A^T A B^T B), from matrices of P x P.
    return torch.sum((a.mT @ a) * (b.mT @ b)) / (batch * channels * other_channels)


class NSTLoss(nn.Module):
    """Lists of maps (B, C_i, H_i, W_i) of student and teacher -> list of scalars, one per layer of the shorter list."""

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        return [self.nst_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def nst_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one layer, a scalar."""
        student, teacher = (unit_vectors(each.flatten(2), dim=2) for each in pool_to_smaller(f_s, f_t))
        return (
            mean_kernel(teacher, teacher).detach() + mean_kernel(student, student) - 2 * mean_kernel(student, teacher)
        )


class NeuronSelectivity(MapDistiller):
    """The student's channels are distributed as the teacher's: they respond to the same positions."""

    name = "nst"
    summary, source = (
        "NST: maximum mean discrepancy between the channels of the maps, polynomial kernel",
        "Huang & Wang, 2017",
    )
    reference = "HobbitLong/RepDistiller"
    group = "feature maps"
    reads = ("maps",)

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.criterion = NSTLoss()

    def feature_loss(self, student, teacher, targets, index):
        return sum(self.criterion(*self.sized(middle_maps(student), middle_maps(teacher))))

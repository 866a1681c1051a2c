"""KDSVD: self-supervised knowledge distillation using singular value decomposition (Lee, Kim & Song, ECCV 2018).

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * sum over consecutive layers of |R_s - R_t|^2 / B
    R[c, c'] = exp(-(v[c] - v'[c'])^2 / 8)

v and v' (one number per channel) are the first right singular vectors of a layer's map and of the one below it, taken
as matrices (pixels, channels). The student's v is the one of its first four that is closest to the teacher's, with the
sign that brings it closest. Layers are the feature maps without the stem's; the channels of both networks are equal.

RepDistiller takes the teacher's signs as the library returns them, which differ between backends, and the loss depends
on those of consecutive layers; here the largest entry of the teacher's vector is positive. Nor is the gradient that of
a full decomposition, infinite where any two singular values are equal: it is that of the vectors in use, without the
directions in which they are not determined. A map of rank below four has vectors of zeros in place of the missing ones.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from distiller_zoo.kd import FeatureDistiller
from distiller_zoo.maps import middle_maps, require_equal_channels, require_maps, unit_vectors
from models.backbone import probe_shapes

#: How many more of its first vectors the student offers than the teacher has.
SPARE_VECTORS = 3


def scaled_rows(feature_map: Tensor) -> Tensor:
    """(B, C, H, W) -> pixels x channels (B, P, C) over the largest entry: the same vectors, without underflow."""
    rows = feature_map.flatten(2).mT
    largest = rows.detach().abs().amax((1, 2), keepdim=True)
    return rows / torch.where(largest > 0, largest, 1)


@torch.no_grad()
def decompose(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices X (B, P, C) -> squared singular values (B, R), falling, and right singular vectors (B, C, R).

    R = min(P, C). They are the eigenvalues and -vectors of the smaller of X^T X and X X^T, which is cheaper than a
    singular value decomposition. Zero values have vectors of zeros. NaN where X is not finite.
    """
    pixels, channels = matrices.shape[1:]
    wide = channels > pixels
    gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
    try:
        rising, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # the run is stopped where its losses are checked
        rising, vectors = gram.sum(2) * torch.nan, gram * torch.nan
    squares, vectors = rising.flip(1), vectors.flip(2)
    if wide:
        vectors = unit_vectors(matrices.mT @ vectors, dim=1)
    is_zero = squares <= torch.finfo(squares.dtype).eps * max(pixels, channels) * squares[:, :1]
    return squares.masked_fill(is_zero, 0), vectors.masked_fill(is_zero[:, None], 0)


def first_vectors(matrices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Matrices X (B, P, C) -> the first squared singular values (B, k) and right singular vectors (B, C, k).

    k is `count`, or fewer where X has fewer. Vectors are differentiable: with the values l and G = X^T X,
    dv_j = sum over i of v_i (v_i^T dG v_j) / (l_j - l_i) + (the part of dG v_j outside of all v_i) / l_j.
    Differences that are zero in half of the digits are left out: there the vectors are not determined.
    """
    squares, vectors = decompose(matrices)
    first, first_squares = vectors[:, :, :count], squares[:, :count]
    negligible = torch.finfo(squares.dtype).eps ** 0.5 * squares[:, :1, None]

    def divide(values: Tensor, by: Tensor) -> Tensor:
        return values * torch.where(by.abs() > negligible, 1 / by, 0)

    mapped = matrices.mT @ (matrices @ first)  # G v_j, with the gradient of G alone
    along = vectors.mT @ mapped
    outside = mapped - vectors @ along
    gaps = first_squares[:, None, :] - squares[:, :, None]
    moved = vectors @ divide(along, gaps) + divide(outside, first_squares[:, None, :])
    return first_squares, first + (moved - moved.detach())  # the value is `first`


def with_positive_peaks(vectors: Tensor) -> Tensor:
    """Vectors (B, C, k), each with the sign that makes its largest entry positive."""
    return vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()


def align(student: Tensor, teacher: Tensor) -> Tensor:
    """For each of the teacher's vectors (B, C, k) the closest of the student's (B, C, k'), of the nearer sign."""
    cosines = student.mT @ teacher
    closest = cosines.abs().argmax(1, keepdim=True)
    signs = cosines.gather(1, closest).sign()
    return signs * student.gather(2, closest.expand(-1, student.shape[1], -1))


def correlations(upper: Tensor, lower: Tensor) -> Tensor:
    """Vectors (B, C, k) and (B, C', k) of consecutive layers -> their radial basis correlations (B, C, C', k)."""
    return torch.exp((upper.unsqueeze(2) - lower.unsqueeze(1)).square() / -8)


class KDSVD(nn.Module):
    """Lists of maps (B, C_i, H_i, W_i) of student and teacher -> list of scalars, one per two consecutive layers."""

    def __init__(self, k: int = 1):
        super().__init__()
        self.k = k

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        layers = [self.directions(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]
        return [self.differences(lower, upper).mean() for lower, upper in pairwise(layers)]

    def directions(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of one layer -> k aligned vectors (B, C, k) of the student and of the teacher, scaled by its values."""
        with torch.no_grad():
            squares, teacher = first_vectors(scaled_rows(f_t), self.k)
            teacher, scales = with_positive_peaks(teacher), unit_vectors(squares.sqrt(), dim=1)[:, None]
        _, student = first_vectors(scaled_rows(f_s), self.k + SPARE_VECTORS)
        return align(student, teacher) * scales, teacher * scales

    def differences(self, lower: tuple[Tensor, Tensor], upper: tuple[Tensor, Tensor]) -> Tensor:
        """The `directions` of two layers -> squared distances (B,) of the networks' correlations."""
        student, teacher = (correlations(above, below) for above, below in zip(upper, lower, strict=True))
        return (student - teacher).square().sum((1, 2, 3))


class SingularVectors(FeatureDistiller):
    """The first singular vectors of consecutive maps are correlated as the teacher's."""

    name = "kdsvd"
    summary, source = (
        "KDSVD: radial basis functions of consecutive maps' first singular vectors",
        "Lee et al., ECCV 2018",
    )
    reference = "HobbitLong/RepDistiller"
    departures = (
        "Singular vectors get a sign of their own, as the reference's value depends on the library's; the "
        "gradient leaves out directions that are not determined, where the reference's is infinite."
    )
    group = "feature maps"
    reads = ("maps",)

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        shapes = [middle_maps(probe_shapes(network, task.image_size)) for network in (student, teacher)]
        require_maps(self.name, *shapes, least=2)
        require_equal_channels(self.name, *shapes)
        self.criterion = KDSVD()

    def feature_loss(self, student, teacher, targets, index):
        return sum(self.criterion(middle_maps(student), middle_maps(teacher)))

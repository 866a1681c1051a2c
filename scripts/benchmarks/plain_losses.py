"""Feature losses as their formulas are usually written in PyTorch: what `scripts/benchmarks/losses.py` compares with.

Shapes: maps (B, C, H, W), vectors (B, D); student first, teacher second; each returns a scalar. Only losses that this
project computes in another way are here; the others are their formula.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller_zoo.feature_transform import FeatureTransform, match_size


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Zagoruyko & Komodakis, ICLR 2017: mean squared distance of the normalised attention maps."""

    def attend(feature_map):
        return F.normalize(feature_map.pow(2).mean(1).flatten(1))

    return (attend(student) - attend(teacher)).pow(2).mean()


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Tung & Mori, ICCV 2019."""

    def similarities(feature_map):
        rows = feature_map.flatten(1)
        return F.normalize(rows @ rows.T)

    return (similarities(teacher) - similarities(student)).pow(2).sum() / len(student) ** 2


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Huang & Wang, 2017: the polynomial kernel by all products of two channels' pixels, (B, C, C', H*W)."""
    student, teacher = (F.normalize(each.flatten(2), dim=2) for each in (student, teacher))

    def kernel(a, b):
        return (a[:, :, None] * b[:, None]).sum(3).pow(2).mean()

    return kernel(teacher, teacher).detach() + kernel(student, student) - 2 * kernel(student, teacher)


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Park et al., CVPR 2019: distances of all pairs, angles of all triples (B, B, B)."""

    def distances(vectors):
        squares = vectors.pow(2).sum(1)
        distance = (squares[:, None] + squares - 2 * vectors @ vectors.T).clamp_min(1e-12).sqrt()
        distance = distance * (1 - torch.eye(len(vectors), device=vectors.device))
        return distance / distance[distance > 0].mean()

    def angles(vectors):
        unit = F.normalize(vectors[None] - vectors[:, None], dim=2)
        return torch.bmm(unit, unit.transpose(1, 2)).flatten()

    with torch.no_grad():
        teacher_distances, teacher_angles = distances(teacher), angles(teacher)
    return 25 * F.smooth_l1_loss(distances(student), teacher_distances) + 50 * F.smooth_l1_loss(
        angles(student), teacher_angles
    )


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Passalis & Tefas, ECCV 2018."""

    def probabilities(vectors):
        unit = vectors / (vectors.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
        similar = (unit @ unit.T + 1) / 2
        return similar / similar.sum(1, keepdim=True)

    s, t = probabilities(student), probabilities(teacher)
    return (t * torch.log((t + 1e-7) / (s + 1e-7))).mean()


def kdsvd(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Lee et al., ECCV 2018, of consecutive maps with equal channels, by full singular value decompositions."""
    total, before = 0.0, None
    for s, t in zip(student, teacher, strict=True):
        vectors = []
        for feature_map, count in ((s, 4), (t, 1)):
            _, values, right = torch.linalg.svd(feature_map.flatten(2).transpose(1, 2), full_matrices=False)
            vectors.append((values[:, :count], F.normalize(right[:, :count].transpose(1, 2), dim=1)))
        (_, s_vectors), (t_values, t_vectors) = vectors
        cosines = s_vectors.transpose(1, 2) @ t_vectors
        best = cosines.abs().argmax(1, keepdim=True)
        s_vectors = torch.gather(s_vectors, 2, best.expand(-1, s_vectors.shape[1], -1))
        s_vectors = s_vectors * torch.gather(cosines, 1, best).sign()
        scale = F.normalize(t_values)[:, None]
        now = [s_vectors * scale, t_vectors * scale]
        if before is not None:
            rbf = [torch.exp(-(a[:, :, None] - b[:, None]).pow(2) / 8) for a, b in zip(now, before, strict=True)]
            total = total + (rbf[0] - rbf[1].detach()).pow(2).sum() / len(s)
        before = now
    return total


def norm(expanded: Tensor, target: Tensor) -> Tensor:
    """Liu et al., ICLR 2023: the mean squared distance to the teacher's map repeated N times, times N."""
    n = expanded.shape[1] // target.shape[1]
    return F.mse_loss(expanded, target.repeat(1, n, 1, 1)) * n


def crd(v_student: Tensor, v_teacher: Tensor, banks: list[Tensor], index: Tensor, contrast_index: Tensor, z) -> Tensor:
    """Tian et al., ICLR 2020: both sides' scores from gathered rows (B, 1 + K, d), at a temperature of 0.07."""
    total = 0.0
    for vector, bank, normaliser in zip((v_student, v_teacher), banks, z, strict=True):
        rows = bank.index_select(0, contrast_index.flatten()).view(*contrast_index.shape, -1)
        scores = torch.exp(torch.bmm(rows, vector[:, :, None])[..., 0] / 0.07) / normaliser
        noise = (contrast_index.shape[1] - 1) / len(bank)
        positive = torch.log(scores[:, 0] / (scores[:, 0] + noise + 1e-7)).sum()
        negative = torch.log(noise / (scores[:, 1:] + noise + 1e-7)).sum()
        total = total - (positive + negative) / len(vector)
    with torch.no_grad():
        for vector, bank in ((v_student, banks[1]), (v_teacher, banks[0])):
            bank.index_copy_(0, index, F.normalize(0.5 * bank[index] + 0.5 * vector))
    return total


class PlainTransform(FeatureTransform):
    """Liu et al., ICLR 2023: the feature transform in its direct form as two convolutions of maps (B, C, H, W)."""

    @classmethod
    def like(cls, transform: FeatureTransform) -> "PlainTransform":
        """The same transform with the same weights in this form."""
        channels = transform.contract[0].out_channels
        plain = cls(channels, transform.teacher_channels, transform.n, transform.residual, transform.form)
        plain.load_state_dict(transform.state_dict())
        return plain.to(transform.expand[0].weight.device)

    def _direct(self, x: Tensor, targets: Sequence[Tensor], to_map: Callable) -> tuple[Tensor, Tensor | None]:
        expanded = self.expand(x)
        out = self.contract(expanded)
        losses = [norm(match_size(to_map(expanded), *target.shape[2:]), target) for target in targets]  # of one teacher
        return (out + x if self.residual else out), losses[0] if losses else None

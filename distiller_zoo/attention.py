"""AT, attention transfer (Zagoruyko & Komodakis, ICLR 2017, arXiv 1612.03928), activation-based, equation 2.

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * sum over layers of MSE(A(F_s), A(F_t))

A(F) is the mean of the squares of a map over its channels, as a vector of length 1 per image. Layers are the feature
maps without the stem's, paired from the shallowest on; the larger map of a pair is average-pooled to the smaller.
The paper sums the squared differences, RepDistiller takes their mean, to which the published beta = 1000 belongs.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.maps import MapDistiller, middle_maps, pool_to_smaller, unit_vectors


def attention_map(feature_map: Tensor, power: int = 2) -> Tensor:
    """(B, C, H, W) -> (B, H * W) of length 1: where the map is large. Zero where the map is zero."""
    magnitudes = feature_map if power % 2 == 0 else feature_map.abs()
    return unit_vectors(magnitudes.pow(power).mean(1).flatten(1), dim=1)


class Attention(nn.Module):
    """Lists of maps (B, C_i, H_i, W_i) of student and teacher -> list of scalars, one per layer of the shorter list."""

    def __init__(self, p: int = 2):
        super().__init__()
        self.p = p

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> list[Tensor]:
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one layer, a scalar."""
        f_s, f_t = pool_to_smaller(f_s, f_t)
        return F.mse_loss(attention_map(f_s, self.p), attention_map(f_t, self.p))


class AttentionTransfer(MapDistiller):
    """The student looks where the teacher looks."""

    name = "attention"
    summary, source = (
        "AT: L2 between normalised attention maps (mean of squares over channels)",
        "Zagoruyko & Komodakis, ICLR 2017",
    )
    reference = "HobbitLong/RepDistiller"
    group = "feature maps"
    reads = ("maps",)

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.criterion = Attention()

    def feature_loss(self, student, teacher, targets, index):
        return sum(self.criterion(*self.sized(middle_maps(student), middle_maps(teacher))))

"""CC, correlation congruence (Peng et al., ICCV 2019, arXiv 1904.01802), in RepDistiller's form.

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * mean over i of <d_i, d_(i+1)>, d_i = |e_s(x_i) - e_t(x_i)|

e_s and e_t are linear embeddings of the pooled vectors, --feat_dim wide; both are trained, so the trivial solution of
two constant embeddings exists. The paper compares the images' correlations by a Gaussian kernel instead; the numbers
of the tables come from this form: products of the differences of neighbours in the batch.
"""

from torch import Tensor, nn

from distiller_zoo.base import BETA, above_zero
from distiller_zoo.crd import FEAT_DIM
from distiller_zoo.kd import FeatureDistiller
from models.backbone import probe_shapes


class LinearEmbed(nn.Module):
    """A linear layer: (B, ...) -> (B, dim_out)."""

    def __init__(self, dim_in: int = 1024, dim_out: int = 128):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Correlation(nn.Module):
    """Embeddings (B, D) of student and teacher, B at least 2 -> scalar."""

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        difference = (f_s - f_t).abs()
        return (difference[:-1] * difference[1:]).sum(1).mean()


class CorrelationCongruence(FeatureDistiller):
    """Where student and teacher differ, neighbours in the batch must not differ alike."""

    name = "correlation"
    summary, source = (
        "CC: products of the embedding differences of neighbouring images in a batch",
        "Peng et al., ICCV 2019",
    )
    reference = "HobbitLong/RepDistiller"
    group = "relations between images"
    reads = ("pooled",)
    min_batch = 2
    flags = (*FeatureDistiller.flags, FEAT_DIM)
    flags_work_if = {**FeatureDistiller.flags_work_if, "feat_dim": (above_zero(BETA),)}

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.embed_s = LinearEmbed(probe_shapes(student, task.image_size).pooled, self.feat_dim)
        self.embed_t = LinearEmbed(probe_shapes(teacher, task.image_size).pooled, self.feat_dim)
        self.criterion = Correlation()

    def feature_loss(self, student, teacher, targets, index):
        return self.criterion(self.embed_s(student.pooled), self.embed_t(teacher.pooled))

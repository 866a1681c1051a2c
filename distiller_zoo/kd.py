"""Knowledge distillation by softened logits (Hinton, Vinyals & Dean, 2015, arXiv 1503.02531)."""

from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import ALPHA, GAMMA, KD_T, Distiller, weighted_cross_entropy


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of the softened classes of logits (B, K), mean over the batch, times temperature^2."""
    student = F.log_softmax(student_logits / temperature, 1)
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class DistillKL(nn.Module):
    """RepDistiller's module of the same name: `DistillKL(T)(student_logits, teacher_logits)`."""

    def __init__(self, T: float):
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return kl_divergence(y_s, y_t, self.T)


def weighted_kd(weight: float, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> dict[str, Tensor]:
    """{"kd": weight * KL divergence}, or {} where the weight is 0."""
    return {"kd": weight * kl_divergence(student_logits, teacher_logits, temperature)} if weight else {}


class KD(Distiller):
    """L = gamma * CE(s, y) + alpha * KL_T(s, t)."""

    summary = "softened logits (Hinton et al., 2015)"
    flags = (GAMMA, ALPHA, KD_T)

    def losses(self, student, teacher, targets, index, progress):
        return {
            **weighted_cross_entropy(self.gamma, student.logits, targets),
            **weighted_kd(self.alpha, student.logits, teacher.logits, self.kd_T),
        }

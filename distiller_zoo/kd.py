"""Knowledge distillation by softened logits (Hinton, Vinyals & Dean, 2015, arXiv 1503.02531)."""

from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import ALPHA, BETA, GAMMA, KD_T, Distiller, Flag, above_zero
from models.backbone import Output

LOGIT_STANDARDIZATION = Flag(
    ("--logit_standardization",),
    bool,
    False,
    "standardise the logits of both networks per sample before they are compared (Sun et al., CVPR 2024)",
)


def standardise(logits: Tensor) -> Tensor:
    """Logits (B, K) -> (z - mean) / (std + 1e-7) per sample, unbiased std (Sun et al., CVPR 2024, arXiv 2403.01427)."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


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


#: Up to this number of classes standardised logits are constants: -c and c (or 0), whatever the network says.
CONSTANT_CLASSES = 2


class LogitDistiller(Distiller):
    """Base of methods with the terms gamma * CE(s, y) + alpha * KL_T(s, t), where CE is of the raw logits."""

    flags = (GAMMA, ALPHA, KD_T, LOGIT_STANDARDIZATION)
    flags_work_if = {"kd_T": (above_zero(ALPHA),), "logit_standardization": (above_zero(ALPHA),)}

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.standardises = self.logit_standardization and task.num_classes > CONSTANT_CLASSES
        if self.standardises:
            self.start_classifier()
        if self.logit_standardization and not self.standardises:
            self.note(
                "--logit_standardization is off: standardised logits of two classes are constants, without gradient"
            )

    def compared_logits(self, student: Output, teacher: Output) -> tuple[Tensor, Tensor]:
        """The logits (B, K) that logit losses compare: raw, or standardised with `--logit_standardization`.

        Two classes are always compared raw.
        """
        logits = student.logits, teacher.logits
        return (standardise(logits[0]), standardise(logits[1])) if self.standardises else logits

    def label_and_logit_losses(self, student: Output, teacher: Output | None, targets: Tensor) -> dict[str, Tensor]:
        """The weighted terms "ce" and "kd"; one whose weight is 0 is left out."""
        terms = self.weighted_cross_entropy(student.logits, targets)
        if self.alpha:
            terms |= weighted_kd(self.alpha, *self.compared_logits(student, teacher), self.kd_T)
        return terms


class FeatureDistiller(LogitDistiller):
    """Base of L = gamma * CE + alpha * KL_T + beta * L_method, RepDistiller's total: a method writes `feature_loss`."""

    flags = (GAMMA, ALPHA, BETA, KD_T, LOGIT_STANDARDIZATION)

    def feature_loss(self, student: Output, teacher: Output, targets: Tensor, index: Tensor) -> Tensor:
        """The method's own loss, a scalar without its weight."""
        raise NotImplementedError(f"{type(self).__name__} defines no feature_loss")

    def reads_teacher_logits(self):
        return self.alpha > 0

    def losses(self, student, teacher, targets, index, progress):
        terms = self.label_and_logit_losses(student, teacher, targets)
        if self.beta:
            terms[self.name] = self.beta * self.feature_loss(student, teacher, targets, index)
        return terms


class KD(LogitDistiller):
    """L = gamma * CE(s, y) + alpha * KL_T(s, t)."""

    name = "kd"
    summary, source = "KD: KL divergence of the softened logits", "Hinton et al., 2015"
    reference = "HobbitLong/RepDistiller; standardised: sunshangquan/logit-standardization-KD"
    departures = "Two classes are compared raw: their standardised logits are constants."
    group = "logits"

    def losses(self, student, teacher, targets, index, progress):
        return self.label_and_logit_losses(student, teacher, targets)

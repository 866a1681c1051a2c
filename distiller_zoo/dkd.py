"""DKD: decoupled knowledge distillation (Zhao, Cui, Song, Qiu & Liang, CVPR 2022, arXiv 2203.08679).

    L = gamma * CE(s, y) + min(epoch / warmup_epochs, 1) * (dkd_alpha * TCKD + dkd_beta * NCKD)

TCKD is the KL divergence of (target class, all others), NCKD that among the other classes, both softened by --kd_T and
times T^2; of a mixed image both are means over its classes, weighted by their shares. Epochs count from 1. The
published code takes the logarithm of a probability that may have rounded to 0 and removes the target by subtracting
1000 from its logit; here both parts are log-softmaxes, the second without the target.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller_zoo.base import GAMMA, KD_T, WARMUP_EPOCHS, Flag, above_zero, number
from distiller_zoo.kd import LOGIT_STANDARDIZATION, LogitDistiller
from errors import UserError

DKD_ALPHA = Flag(("--dkd_alpha",), number, 1.0, "weight of the target-class part of DKD")
DKD_BETA = Flag(("--dkd_beta",), number, 8.0, "weight of the non-target-class part of DKD")


def _split(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, K), classes (B,) -> log-probabilities of (target, others) (B, 2), and among the others (B, K - 1)."""
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, columns + (columns >= targets[:, None]))  # a mask would have to wait for the device
    target = logits.gather(1, targets[:, None])
    either = torch.cat([target, others.logsumexp(1, keepdim=True)], 1)
    return either.log_softmax(1), others.log_softmax(1)


def decoupled_losses(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(TCKD, NCKD) of logits (B, K) and classes (B,), mean over the batch, times temperature^2.

    Of shares (B, K) of mixed images, at most two of an image above 0, the mean over its classes with their shares as
    weights: the expected loss of a class that is drawn by its share, as mixup defines it for the cross entropy.
    """
    student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
    if targets.ndim == 2:
        return _of_shares(student_logits, teacher_logits, targets, temperature)
    student, teacher = _split(student_logits, targets), _split(teacher_logits, targets)
    target_class, non_target_class = (
        F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
        for ours, theirs in zip(student, teacher, strict=True)
    )
    return target_class, non_target_class


def _of_shares(student_logits: Tensor, teacher_logits: Tensor, shares: Tensor, temperature: float):
    """The same of softened logits and of shares (B, K): a row for each of the two classes of an image."""
    shares, classes = shares.topk(2)
    student, teacher = (_split(logits.repeat(2, 1), classes.T.flatten()) for logits in (student_logits, teacher_logits))
    weights = shares.T.flatten() * temperature**2 / len(shares)
    return tuple(
        (F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * weights).sum()
        for ours, theirs in zip(student, teacher, strict=True)
    )


class DKD(LogitDistiller):
    """KL divergence of the logits in two parts with a weight each."""

    name = "dkd"
    summary, source = (
        "DKD: KL divergence split into target and non-target classes, weighted separately",
        "Zhao et al., CVPR 2022",
    )
    reference = "megvii-research/mdistiller"
    departures = "Log-softmaxes in place of the logarithm of a probability that may round to 0."
    group = "logits"
    refuses_unlabelled = "it treats the class of the label apart from the others"
    flags = (GAMMA, DKD_ALPHA, DKD_BETA, KD_T, WARMUP_EPOCHS, LOGIT_STANDARDIZATION)
    flags_work_if = dict.fromkeys(
        ("kd_T", "warmup_epochs", "logit_standardization"), (above_zero(DKD_ALPHA, DKD_BETA),)
    )

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        if task.num_classes < 2:
            raise UserError("--distill dkd compares a target with other classes; it needs more than one")

    def losses(self, student, teacher, targets, index, progress):
        terms, risen = self.weighted_cross_entropy(student.logits, targets), self.factor(progress)
        if not (self.dkd_alpha or self.dkd_beta):
            return terms
        logits = self.compared_logits(student, teacher)
        target_class, non_target_class = decoupled_losses(*logits, targets, self.kd_T)
        if self.dkd_alpha:
            terms["tckd"] = risen * self.dkd_alpha * target_class
        if self.dkd_beta:
            terms["nckd"] = risen * self.dkd_beta * non_target_class
        return terms

    def schedule(self, progress):
        return min((progress.epoch + 1) / max(self.warmup_epochs, 1), 1.0)

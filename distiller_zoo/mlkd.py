"""MLKD: multi-level logit distillation (Jin, Wang & Lin, CVPR 2023).

Every image has a weak and a strong view. With KL_T, class correlation CC_T and batch correlation BC_T summed over the
temperatures T of --mlkd_temperatures,

    L = gamma * [CE(weak) + CE(strong)] + alpha * [m * KL(weak) + KL(strong)] + beta * [k * CC(weak) + m * BC(weak)]
    CC = |P_t' P_t - P_s' P_s|^2 / K,    BC = |P_t P_t' - P_s P_s'|^2 / B,    P the softened classes (B, K)

m is the share of images whose teacher is at most as confident as the median image's, k that of the classes: in the
published code the masks multiply losses that are already means over the batch, so only their share has an effect, and
the published numbers were made with it. That code also takes the weak view's logits for the strong one at the last two
temperatures; here the strong view's are taken at all. The student sees the views one after the other, so that each has
its own batch statistics. With --logit_standardization the KL terms alone read standardised logits.
"""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distiller_zoo.base import ALPHA, BETA, GAMMA, Flag, above_zero, positive
from distiller_zoo.kd import LOGIT_STANDARDIZATION, LogitDistiller, kl_divergence


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"must be temperatures like 4,3,5,2,6, not {text}") from None


TEMPERATURES = Flag(
    ("--mlkd_temperatures",), _temperatures, (4.0, 3.0, 5.0, 2.0, 6.0), "temperatures at which MLKD compares"
)


def correlation_losses(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(CC, BC) of logits (B, K)."""
    student, teacher = ((logits / temperature).softmax(1) for logits in (student_logits, teacher_logits))
    batch, classes = student.shape
    class_level = (teacher.T @ teacher - student.T @ student).square().sum() / classes
    return class_level, (teacher @ teacher.T - student @ student.T).square().sum() / batch


def _median(values: Tensor) -> Tensor:
    """The mean of the two middle ones of (n,); `quantile` is the same, but waits for the device."""
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def unsure_shares(teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """(m, k): shares of the images, and of the classes, on which the teacher (B, K) is at most median-confident."""
    probabilities = teacher_logits.softmax(1)
    return tuple(
        (confidence <= _median(confidence)).to(confidence.dtype).mean()
        for confidence in (probabilities.amax(1), probabilities.sum(0))
    )


class ViewLogits(NamedTuple):
    """What MLKD reads of its student: the logits (2B, K), view by view."""

    logits: Tensor


class MLKD(LogitDistiller):
    """Logits compared per image, per class and per batch, at several temperatures, on two views."""

    name = "mlkd"
    summary, source = (
        "MLKD: logits matched per image, per class and per batch, on weak and strong augmentations",
        "Jin et al., CVPR 2023",
    )
    reference = "Jin-Ying/Multi-Level-Logit-Distillation; standardised: sunshangquan/logit-standardization-KD"
    departures = (
        "The strong view's KL reads the strong view's logits at all temperatures: the released code reads the"
        " weak view's at the last two, a slip (`as_published` gives its numbers). In runs longer than 240 "
        "epochs the rate falls at the same fractions."
    )
    group = "logits"
    views = "weak_strong"
    flags = (GAMMA, ALPHA, BETA, TEMPERATURES, LOGIT_STANDARDIZATION)
    flags_work_if = {"mlkd_temperatures": (above_zero(ALPHA, BETA),), "logit_standardization": (above_zero(ALPHA),)}

    @classmethod
    def trains_classifier(cls, flags):
        return bool(flags["alpha"] or flags["beta"])

    def respond(self, images, teacher):
        return ViewLogits(torch.cat([self.student(view) for view in images.chunk(2)]))

    def predict(self, images):
        return self.student(images)

    def losses(self, student, teacher, targets, index, progress):
        raw_weak, raw_strong = student.logits.chunk(2)
        strong_terms = self.weighted_cross_entropy(raw_strong, targets)
        terms = self.weighted_cross_entropy(raw_weak, targets)
        terms |= {f"{name}_strong": value for name, value in strong_terms.items()}
        if not (self.alpha or self.beta):
            return terms
        raw_teacher, _ = teacher.logits.chunk(2)
        images, classes = unsure_shares(raw_teacher)
        if self.alpha:
            compared = self.compared_logits(student, teacher)
            (weak, strong), (teacher_weak, teacher_strong) = (logits.chunk(2) for logits in compared)
            terms["kd"] = self.alpha * images * self.divergence(weak, teacher_weak, self.mlkd_temperatures)
            terms["kd_strong"] = self.alpha * self.divergence(strong, teacher_strong, self.mlkd_temperatures)
        if self.beta:
            levels = (correlation_losses(raw_weak, raw_teacher, each) for each in self.mlkd_temperatures)
            class_level, batch_level = zip(*levels, strict=True)
            terms["class"] = self.beta * classes * sum(class_level)
            terms["batch"] = self.beta * images * sum(batch_level)
        return terms

    @staticmethod
    def divergence(student_logits: Tensor, teacher_logits: Tensor, temperatures: Sequence[float]) -> Tensor:
        """The sum of KL_T of logits (B, K) over temperatures, a scalar."""
        return sum(kl_divergence(student_logits, teacher_logits, each) for each in temperatures)

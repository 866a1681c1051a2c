"""DIST: knowledge distillation from a stronger teacher (Huang, You, Wang, Qian & Xu, NeurIPS 2022, arXiv 2205.10536).

    L = gamma * CE(s, y) + beta * (inter + intra),    inter = T^2 * (1 - mean over images of the Pearson correlation of
    their softened classes), intra the same for the classes over the images of the batch

T is --kd_T. The paper has a weight for each of the two; both are 2 in its runs, so there is one here. With two classes
the correlation of an image's classes is 1 or -1, whatever the network says, so that there is no inter term.
"""

from torch import Tensor

from distiller_zoo.base import BETA, GAMMA, KD_T, above_zero
from distiller_zoo.kd import CONSTANT_CLASSES, LOGIT_STANDARDIZATION, LogitDistiller

#: What keeps the correlation of a constant row finite.
EPSILON = 1e-8


def pearson_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean correlation of the rows of two matrices (n, m); a constant row correlates with nothing."""
    a, b = (matrix - matrix.mean(1, keepdim=True) for matrix in (a, b))
    return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPSILON)).mean()


def relation_losses(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(inter, intra) of logits (B, K), times temperature^2."""
    student, teacher = ((logits / temperature).softmax(1) for logits in (student_logits, teacher_logits))
    scale = temperature**2
    return scale * pearson_distance(student, teacher), scale * pearson_distance(student.T, teacher.T)


class DIST(LogitDistiller):
    """Correlation in place of equality, between classes and between images."""

    name = "dist"
    summary, source = (
        "DIST: Pearson correlation of predictions, between classes and within each class",
        "Huang et al., NeurIPS 2022",
    )
    reference = "hunto/image_classification_sota"
    departures = (
        "One weight for both terms, which are equal in all published runs. No inter term with two classes: it"
        " is a constant."
    )
    group = "logits"
    min_batch = 2  # one image has no correlation over images
    flags = (GAMMA, BETA, KD_T, LOGIT_STANDARDIZATION)
    flags_work_if = dict.fromkeys(("kd_T", "logit_standardization"), (above_zero(BETA),))

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.start_classifier()
        self.has_inter = task.num_classes > CONSTANT_CLASSES
        if not self.has_inter:
            self.note("DIST's inter term is off: the correlation of two classes is a constant")

    def losses(self, student, teacher, targets, index, progress):
        terms = self.weighted_cross_entropy(student.logits, targets)
        if not self.beta:
            return terms
        inter, intra = relation_losses(*self.compared_logits(student, teacher), self.kd_T)
        if self.has_inter:
            terms["inter"] = self.beta * inter
        return {**terms, "intra": self.beta * intra}

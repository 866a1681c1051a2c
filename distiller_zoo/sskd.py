"""SSKD: knowledge distillation meets self-supervision (Xu, Liu, Li & Loy, ECCV 2020, arXiv 2006.07114).

Every image is seen turned by 0, 90, 180 and 270 degrees. A head on the pooled vector of either network is trained to
find, among the upright images of the batch, the one that a turned image comes from, by their cosine similarity. First
stage: the teacher's head, --init_epochs epochs (section 3.2). Then, with that head frozen,

    L = gamma * CE(upright) + alpha * KL_T(upright) + tf_weight * KL_T(turned) + ss_weight * KL_ss_T(similarities)

each KL over the turned images that the teacher gets right, and the share --ratio_tf or --ratio_ss of the others, those
of best rank first and, where ranks are equal, image by image (section 3.3). T is --kd_T. The head is not shipped.
"""

import math
from argparse import ArgumentTypeError

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import (
    ALPHA,
    GAMMA,
    INIT_EPOCHS,
    INIT_LEARNING_RATE,
    KD_T,
    Flag,
    Stage,
    above_zero,
    number,
    positive,
    without_student,
)
from distiller_zoo.kd import LOGIT_STANDARDIZATION, LogitDistiller, weighted_kd
from distiller_zoo.maps import unit_vectors
from models.backbone import probe_shapes


def share(text: str) -> float:
    """A number from 0 to 1, read from a flag."""
    if number(text) > 1:
        raise ArgumentTypeError(f"must be a number from 0 to 1, not {text}")
    return float(text)


TF_WEIGHT = Flag(("--tf_weight",), number, 2.7, "weight of SSKD's KL divergence on turned images")
SS_WEIGHT = Flag(("--ss_weight",), number, 10.0, "weight of SSKD's KL divergence of similarities")
SS_T = Flag(("--ss_T",), positive, 0.5, "temperature of SSKD's similarities")
RATIO_TF = Flag(("--ratio_tf",), share, 1.0, "share of the turned images that the teacher gets wrong to keep")
RATIO_SS = Flag(("--ratio_ss",), share, 0.75, "share of the similarities that the teacher gets wrong to keep")
VIEWS = 4


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(share(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"must be shares of the stage like 0.5,0.75, not {text}") from None


INIT_MILESTONES = Flag(
    ("--init_milestones",),
    _shares,
    (0.5, 0.75),
    "shares of the stage before the main one after which its rate falls: of 60 epochs after 30 and 45",
)


def head(width: int) -> nn.Sequential:
    """The head on a pooled vector (B, width) -> (B, width)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def similarities(representations: Tensor) -> Tensor:
    """Representations (4B, D), view by view -> cosines (3B, B) of turned images to upright ones."""
    directions = unit_vectors(representations, 1)
    upright, turned = directions[: len(directions) // VIEWS], directions[len(directions) // VIEWS :]
    return turned @ upright.T


def sources(turned: Tensor) -> Tensor:
    """The upright image (3B,) that each row of `similarities` (3B, B) comes from."""
    return torch.arange(turned.shape[1], device=turned.device).repeat(VIEWS - 1)


def select(teacher_rows: Tensor, truth: Tensor, ratio: float) -> Tensor:
    """Which rows (3B, m) to keep, (3B,): those largest at `truth` (3B,), and a share of the others, best rank first.

    Rows come view by view. Where ranks are equal, all views of an image come before those of the next one.
    """
    ranks = (teacher_rows > teacher_rows.gather(1, truth[:, None])).sum(1)
    right = (ranks == 0).sum()
    kept = right + ((len(ranks) - right) * ratio).long()
    by_image = ranks.view(VIEWS - 1, -1).T.flatten()
    places = by_image.argsort(stable=True).argsort()
    return (places < kept).view(-1, VIEWS - 1).T.flatten()


def selected_divergence(student: Tensor, teacher: Tensor, selected: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softened rows (n, m), mean over the selected ones (n,), times temperature^2.

    0 where none is selected. All rows are computed: to gather some, one would have to wait for their number.
    """
    logarithms = ((rows / temperature).log_softmax(1) for rows in (student, teacher))
    divergences = F.kl_div(*logarithms, reduction="none", log_target=True).sum(1)
    return (divergences * selected).sum() / selected.sum().clamp_min(1) * temperature**2


class SSKD(LogitDistiller):
    """Self-supervised similarities of turned images, and logits on them."""

    name = "sskd"
    summary, source = (
        "SSKD: contrastive self-supervision on rotated images, similarities and logits matched",
        "Xu et al., ECCV 2020",
    )
    reference = "xuguodong03/SSKD"
    group = "relations between images"
    reads = ("pooled",)
    views = "rotations"
    refuses_unlabelled = "it ranks the teacher's outputs for rotated images by the label"
    refuses_mixing = "it ranks the teacher's outputs for rotated images by their one class"
    min_batch = 2  # one upright image leaves nothing to choose from
    frozen = ("teacher_head",)
    flags = (
        GAMMA,
        ALPHA,
        TF_WEIGHT,
        SS_WEIGHT,
        KD_T,
        SS_T,
        RATIO_TF,
        RATIO_SS,
        LOGIT_STANDARDIZATION,
        INIT_EPOCHS._replace(default=60),
        INIT_LEARNING_RATE,
        INIT_MILESTONES,
    )
    flags_work_if = {
        **dict.fromkeys(("kd_T", "logit_standardization"), (above_zero(ALPHA, TF_WEIGHT),)),
        "ratio_tf": (above_zero(TF_WEIGHT),),
        **dict.fromkeys(
            ("ss_T", "ratio_ss", "init_epochs", "init_learning_rate", "init_milestones"), (above_zero(SS_WEIGHT),)
        ),
    }

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.uses_everything = self.ss_weight > 0
        self.student_head = head(probe_shapes(student, task.image_size).pooled)
        self.teacher_head = head(probe_shapes(teacher, task.image_size).pooled)

    def stages(self, epochs):
        first = Stage(
            name="teacher's head",
            epochs=self.init_epochs,
            trained=[self.teacher_head],
            losses=self.head_losses,
            respond=without_student,
            learning_rate=self.init_learning_rate,
            milestones=tuple(math.ceil(part * self.init_epochs) for part in self.init_milestones),
        )
        main = self.main_stage(epochs)
        return [first, main] if self.ss_weight else [main]  # nothing else reads the head

    def head_losses(self, student, teacher, targets, index, progress):
        """The first stage's loss: which upright image each turned one comes from."""
        rows = similarities(self.teacher_head(teacher.pooled))
        return {"head": F.cross_entropy(rows, sources(rows))}

    def losses(self, student, teacher, targets, index, progress):
        terms = self.weighted_cross_entropy(student.logits[: len(targets)], targets)
        if self.alpha or self.tf_weight:
            compared = self.compared_logits(student, teacher)
            (upright, turned), (teacher_upright, teacher_turned) = (
                logits.split([len(targets), len(logits) - len(targets)]) for logits in compared
            )
            terms |= weighted_kd(self.alpha, upright, teacher_upright, self.kd_T)
        if self.tf_weight:
            confident = select(teacher_turned, targets.repeat(VIEWS - 1), self.ratio_tf)
            terms["tf"] = self.tf_weight * selected_divergence(turned, teacher_turned, confident, self.kd_T)
        if self.ss_weight:
            rows, teacher_rows = (
                similarities(self.student_head(student.pooled)),
                similarities(self.teacher_head(teacher.pooled)),
            )
            alike = select(teacher_rows, sources(teacher_rows), self.ratio_ss)
            terms["ss"] = self.ss_weight * selected_divergence(rows, teacher_rows, alike, self.ss_T)
        return terms

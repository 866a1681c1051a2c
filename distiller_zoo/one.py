"""ONE: knowledge distillation by an on-the-fly native ensemble (Lan, Zhu & Gong, NeurIPS 2018, arXiv 1806.04606).

    L = gamma * (sum over branches of CE(z_i, y) + CE(z_e, y)) + beta * r(epoch) * sum over branches of KL_T(z_i, z_e)

There is no teacher. On one trunk the student is given its last layers and head `--branches` times, each initialised on
its own. z_e = sum_i g_i z_i is their mean, weighted by a gate that reads the map before these layers, pooled:
g = softmax(ReLU(BN(linear(map)))). In KL_T, T^2 times the divergence of z_i from z_e, the ensemble gets no gradient,
and 1e-7 is added to its probabilities, as in the official code. r(epoch) = exp(-5 (1 - min(epoch, R) / R)^2) with
R = `--ramp_epochs`. The first branch is the student itself: it is what is tested and shipped. The gated ensemble
(ONE-E) is neither; no accuracy of this project is that of an ensemble.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import BETA, GAMMA, KD_T, Distiller, Flag, above_zero, count
from errors import UserError
from models.backbone import Backbone, probe_shapes

BRANCHES = Flag(
    ("--branches",), count, 3, "how often the last layers and head are there, to learn together on one trunk"
)
RAMP_EPOCHS = Flag(
    ("--ramp_epochs",), count, 80, "epochs over which the ensemble becomes a teacher, in a run of 300", full_run=300
)
PROBABILITY_FLOOR = 1e-7


class BranchOutput(NamedTuple):
    """What ONE shows of a forward pass; `pooled` and `logits` are the first branch's."""

    pooled: Tensor  # (B, D)
    logits: Tensor  # (B, K)
    branch_logits: list[Tensor]  # of every branch, (B, K) each
    gate_scores: Tensor  # (B, branches), before their softmax


def ensemble_logits(branch_logits: list[Tensor], gate_scores: Tensor) -> Tensor:
    """Logits (B, K) of n branches and scores (B, n) -> the mean of the logits, weighted by the scores' softmax."""
    return torch.einsum("bn,nbk->bk", gate_scores.softmax(1), torch.stack(branch_logits))


def ensemble_divergence(branch: Tensor, ensemble: Tensor, temperature: float) -> Tensor:
    """T^2 KL(ensemble || branch) of softened logits (B, K), mean over the batch; the ensemble gets no gradient."""
    target = (ensemble.detach() / temperature).softmax(1) + PROBABILITY_FLOOR
    return F.kl_div(F.log_softmax(branch / temperature, 1), target, reduction="batchmean") * temperature**2


def ramp(epoch: int, ramp_epochs: int) -> float:
    """r(epoch), which rises from exp(-5) to 1."""
    return math.exp(-5 * (1 - min(epoch, ramp_epochs) / ramp_epochs) ** 2)


class ONE(Distiller):
    """The student is the first of several branches that learn from their gated ensemble."""

    name = "one"
    summary, source = (
        "ONE: online distillation, student branches learn from their gated ensemble",
        "Lan et al., NeurIPS 2018",
    )
    reference = "Lan1991Xu/ONE_NeurIPS2018"
    group = "without a teacher"
    reads_teacher = False
    refuses_unlabelled = "its branches learn from labels"
    min_batch = 2  # the gate's BatchNorm sees one vector per image
    flags = (GAMMA, BETA, KD_T._replace(default=3.0), BRANCHES, RAMP_EPOCHS)
    flags_work_if = dict.fromkeys(("kd_T", "ramp_epochs"), (above_zero(BETA),))

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        if self.branches < 2:
            raise UserError(f"--branches: an ensemble needs at least 2, not {self.branches}")
        self.other_branches = nn.ModuleList(student.make_branch() for _ in range(self.branches - 1))
        *_, (channels, _, _), _ = probe_shapes(student, task.image_size).maps
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, self.branches),
            nn.BatchNorm1d(self.branches),
            nn.ReLU(),
        )

    def respond(self, images, teacher):
        _, shared = self.student.forward_trunk(images)
        pooled, logits = zip(*(_finish(branch, shared) for branch in (self.student, *self.other_branches)), strict=True)
        (first_pooled, *_), (first_logits, *_) = pooled, logits
        return BranchOutput(first_pooled, first_logits, list(logits), self.gate(shared))

    def losses(self, student, teacher, targets, index, progress):
        ensemble, terms = ensemble_logits(student.branch_logits, student.gate_scores), {}
        if self.gamma:
            terms["ce"] = self.gamma * sum(self.cross_entropy(logits, targets) for logits in student.branch_logits)
            terms["ce_ensemble"] = self.gamma * self.cross_entropy(ensemble, targets)
        if self.beta:
            divergences = [ensemble_divergence(logits, ensemble, self.kd_T) for logits in student.branch_logits]
            terms["one"] = self.beta * self.factor(progress) * sum(divergences)
        return terms

    def schedule(self, progress):
        return ramp(progress.epoch, self.ramp_epochs)

    def predict(self, images):
        return self.student(images)


def _finish(network: Backbone, shared: Tensor) -> tuple[Tensor, Tensor]:
    """The map that enters the last layers -> pooled (B, D) and logits (B, K) of one branch."""
    _, final = network.forward_last_stage(shared)
    return network.classify(network.activate(final))

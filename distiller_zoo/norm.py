"""NORM: N-to-one representation matching (Liu, Li, Li & Yao, ICLR 2023, arXiv 2305.13803).

    L = gamma * CE(s', y) + alpha * KL_T(s', t') + beta * w(epoch) * L_norm

L_norm matches each of the N segments of the student's expanded map to the teacher's last map (feature_transform.py); of
several teachers each has N segments of its own, and L_norm is the mean of theirs, weighted as their logits are;
s' and t' are logits standardised per sample. gamma, alpha, beta are the flags -r, -a, -b; the paper's alpha is -b here
and its beta is -a. Standardised logits of two classes are constants, so that raw ones are taken there. Deviations from
the official code are listed in docs/norm.md.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller_zoo.base import ALPHA, BETA, GAMMA, KD_T, Distiller, Flag, above_zero, count, number, widen
from distiller_zoo.feature_transform import FORMS, FeatureTransform, norm_loss
from distiller_zoo.kd import CONSTANT_CLASSES, weighted_kd
from distiller_zoo.maps import MAP_SIZE, describe_sizes, match_size, takes_maximum
from errors import UserError, count_of
from models.backbone import Backbone, FinalConv, Output, Shapes, probe_shapes

#: w(epoch) of the official code, as (epochs of the full run, ((until this epoch, weight), ...)); epochs count from 0.
NORM_SCHEDULES = {
    "cifar": (240, ((10, 0.1), (20, 0.5), (180, 1.0), (210, 0.5), (240, 0.1))),
    "imagenet": (100, ((5, 0.1), (15, 0.5), (60, 0.9), (80, 0.5), (100, 0.1))),
}


def norm_weight(schedule: str | float, epoch: int, epochs: int) -> float:
    """w(epoch): a constant, or a published schedule stretched from its own number of epochs to `epochs`."""
    if not isinstance(schedule, str):
        return schedule
    full_run, steps = NORM_SCHEDULES[schedule]
    return next((weight for until, weight in steps if epoch * full_run < until * epochs), steps[-1][1])


def _schedule(text: str) -> str | float:
    return text if text in NORM_SCHEDULES else number(text)


CETA = Flag(("-c", "--ceta"), number, 2.5, "scale of the standardised logits of student and teacher; 0: raw logits")
CO_SPONGE = Flag(("-s", "--co_sponge"), count, 8, "N, the segments of the expanded representation")
FT = Flag(
    ("--ft",),
    str,
    "default",
    "feature transform: default (with the residual), plain (without), none (the raw student map is matched; N = 1)",
    choices=("default", "plain", "none"),
)
FT_POSITION = Flag(
    ("--ft_position",),
    str,
    "pre",
    "where a WRN's transform is inserted: pre (before the last BatchNorm and ReLU, as published) or post (behind them, "
    "where it folds away); elsewhere the two are the same",
    choices=("pre", "post"),
)
FT_FORM = Flag(("--ft_form",), str, "auto", "how the transform is computed; the numbers are the same", choices=FORMS)
LARGER_STUDENT = Flag(
    ("--larger_student",),
    str,
    "pool",
    "where the student's last map is larger than the teacher's: pool its expanded map, as the official ImageNet loop "
    "does, or refuse, as its CIFAR loop does; a larger teacher's map is always pooled",
    choices=("pool", "refuse"),
    tells_apart="none",  # what is refused is no run
)
BETA1 = Flag(
    ("-b1", "--beta1"),
    _schedule,
    "cifar",
    "factor on -b: cifar or imagenet (the published schedules, scaled to --epochs) or a number",
)


def standardise_logits(logits: Tensor, scale: float) -> Tensor:
    """Logits (B, K) -> scale * (z - mean) / sqrt(var + 1e-7) per sample; unchanged where the scale is 0."""
    return scale * F.layer_norm(logits, logits.shape[1:], eps=1e-7) if scale else logits


def _check_sizes(student: Sequence[int], teacher: Sequence[int], larger_student: str, form: str) -> None:
    """Raise `UserError` where a student's map (C, H, W) is larger than the teacher's and is not to be pooled."""
    (_, height, width), (_, *size) = student, teacher
    if height <= size[0] and width <= size[1]:
        return
    if larger_student == "refuse":
        raise UserError(
            f"--model_s: the student's last map ({count_of(height, 'pixel')} wide) is larger than the teacher's "
            f"({size[0]}); choose a --model_t with a larger last map, --map_size interpolate, or leave "
            "--larger_student at pool"
        )
    if form == "collapsed" and takes_maximum((height, width), size):
        raise UserError("--ft_form collapsed cannot max-pool the student's larger map; leave it at auto")


def _final_maps(teacher: Output | Shapes | None, name: str = "final") -> list:
    """The last map of every teacher, or its shape; of no teacher none."""
    return [] if teacher is None else [getattr(each, name) for each in (teacher, *teacher.others)]


class NormOutput(NamedTuple):
    """`Output` with the transform's result in its place, and the matching loss (None without a teacher)."""

    maps: list[Tensor]
    final: Tensor
    activated: Tensor
    pooled: Tensor
    logits: Tensor
    norm_loss: Tensor | None


class NORM(Distiller):
    """NORM, and NORM+KD with `-a` above 0."""

    name = "norm"
    summary, source = (
        "NORM: N segments of the expanded last map matched to the teacher's; NORM+KD with -a > 0",
        "Liu et al., ICLR 2023",
    )
    reference = "OSVAI/NORM"
    departures = (
        "See docs/norm.md, line by line. Raw logits with two classes: standardised ones are constants, "
        "without a gradient."
    )
    group = "N-to-one"
    reads = ("final",)
    ships = "student (transform folded in)"
    flags = (GAMMA, ALPHA, BETA, BETA1, CETA, CO_SPONGE, KD_T, FT, FT_POSITION, FT_FORM, LARGER_STUDENT, MAP_SIZE)
    flags_work_if = {
        "kd_T": (above_zero(ALPHA),),
        **dict.fromkeys(("beta1", "larger_student", "map_size"), (above_zero(BETA),)),
    }
    larger_student, map_size = "pool", "pool"

    def __init__(self, student: Backbone, teacher: Backbone | None, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        if not self.beta1:
            self.beta = 0.0  # a factor of 0 leaves the term out
        #: The scale of the standardised logits that the losses read; 0: raw logits.
        self.scale = self._choose_scale(task.num_classes)
        if self.co_sponge < 1:
            raise UserError(f"-s/--co_sponge: N must be at least 1, not {self.co_sponge}")
        if student.cannot_change:
            raise UserError(
                f"--distill {self.name}: the student's last map must be changed, but {student.cannot_change}"
            )
        student_map = probe_shapes(student, task.image_size).final
        teacher_maps = [student_map] if teacher is None else _final_maps(probe_shapes(teacher, task.image_size))
        if self.map_size == "pool":
            for each in teacher_maps:
                _check_sizes(student_map, each, self.larger_student, self.ft_form)
        sizes = (describe_sizes(student_map, each, self.map_size, "max") for each in teacher_maps)
        self.note(*sizes)
        if self.ft_position == "post" and student.activates_final and not self._folds_into_classifier():
            raise UserError(
                "--ft_position post: the transform cannot be folded into this student's classifier, which needs a bias "
                "and must read an average; leave it at pre"
            )
        channels, teacher_channels = student_map[0], [each[0] for each in teacher_maps]
        if self.ft == "none":
            if self.co_sponge != 1 or [channels] != teacher_channels:
                raise UserError(
                    "--ft none matches the raw maps: it needs -s 1, one teacher and equal channels (student "
                    f"{channels}, teacher {', '.join(map(str, teacher_channels))}); use --ft default"
                )
            self.transform = None
        else:
            shares = (1.0,) if teacher is None else teacher.shares
            residual = self.ft == "default"
            self.transform = FeatureTransform(
                channels, teacher_channels, self.co_sponge, residual, self.ft_form, shares
            )

    def _choose_scale(self, num_classes: int) -> float:
        """-c, or 0 for two classes; where logits are standardised, a classifier of zeros is started."""
        scale = self.ceta if num_classes > CONSTANT_CLASSES else 0.0
        if scale:
            self.start_classifier()
        elif self.ceta and self.student.num_classes:
            self.note(
                f"-c/--ceta {self.ceta} is off: standardised logits of two classes are constants, without gradient"
            )
        return scale

    def respond(self, images: Tensor, teacher: Output | None) -> NormOutput:
        student = self.student
        maps, final = student.forward_maps(images)
        loss = None
        if self.ft_position == "pre":
            final, loss = self._transform(final, _final_maps(teacher))
        activated = student.activate(final)
        if self.ft_position == "post":
            activated, loss = self._transform(activated, _final_maps(teacher, "activated"))
        return NormOutput(maps, student.to_map(final), student.to_map(activated), *student.classify(activated), loss)

    def _transform(self, student_map: Tensor, teacher_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        to_map = self.student.to_map
        size = to_map(student_map).shape[2:]
        targets = [self._target(each, size) for each in teacher_maps]
        if self.transform is not None:
            return self.transform(student_map, targets, to_map)
        with torch.autocast(student_map.device.type, enabled=False):
            if not targets:
                return student_map, None
            (target,) = targets
            matched = match_size(to_map(student_map), *target.shape[2:])
            return student_map, norm_loss(matched.to(target.dtype), target)

    def _target(self, teacher_map: Tensor, size: torch.Size) -> Tensor:
        """The teacher's map (B, Ct, H, W) in the student's size, unless the student's is larger and will be pooled."""
        target = teacher_map.detach()
        if self.map_size == "interpolate":
            return match_size(widen(target), *size, "interpolate")
        return match_size(target, *size) if target.shape[2] > size[0] else target

    def losses(self, student, teacher, targets, index, progress):
        student_logits = standardise_logits(student.logits, self.scale)
        terms = self.weighted_cross_entropy(student_logits, targets)
        if self.alpha:
            terms |= weighted_kd(self.alpha, student_logits, standardise_logits(teacher.logits, self.scale), self.kd_T)
        if self.beta:
            terms["norm"] = self.beta * self.factor(progress) * student.norm_loss
        return terms

    def schedule(self, progress):
        return norm_weight(self.beta1, progress.epoch, progress.epochs)

    def reads_teacher_logits(self):
        return self.alpha > 0

    def export(self) -> Backbone:
        """The student with the transform folded in: W' = W K, b' = W k + b in the classifier (docs/norm.md)."""
        network = copy.deepcopy(self.student).eval()
        if self.transform is None:
            return network
        return fold(network, *self.transform.as_affine(), into_classifier=self._folds_into_classifier())

    def export_note(self) -> str:
        if self.transform is None or self._folds_into_classifier():
            return ""
        if not self.student.classifies_mean:
            return (
                "one linear layer (a 1x1 convolution) is kept: this network's head is more than one linear layer on "
                "the average of its last map or on one of its tokens"
            )
        if not self._has_bias():
            return "one 1x1 convolution is kept: this network's classifier has no bias, which would take up its bias"
        return (
            "one 1x1 convolution is kept: this network's last BatchNorm and ReLU are between the transform and the "
            "classifier (--ft_position post trains one that folds away)"
        )

    def _folds_into_classifier(self) -> bool:
        """Whether there is only a weighted mean of the positions between the transform and the classifier, which has a
        bias for the transform's."""
        averaged = self.ft_position == "post" or not self.student.activates_final
        return averaged and self.student.classifies_mean and self._has_bias()

    def _has_bias(self) -> bool:
        return self.student.get_classifier().bias is not None


@torch.no_grad()
def fold(network: Backbone, weight: Tensor, bias: Tensor, into_classifier: bool) -> Backbone:
    """Apply x -> weight x + bias, weight (C, C), to what the head of `network` reads, at no cost where possible.

    The map is affine and pooling is a mean, or takes one token, so it moves behind the pooling and into the classifier;
    where something else is in between, it becomes one 1x1 convolution in front of the head, which acts on every pixel
    or token. Products are taken in float64.
    """
    if into_classifier:
        classifier = network.get_classifier()
        classifier.bias.copy_(classifier.weight.double() @ bias + classifier.bias.double())
        classifier.weight.copy_(classifier.weight.double() @ weight)
        return network
    folded = FinalConv(network, len(bias)).to(bias.device, next(network.parameters()).dtype).eval()
    folded.final_conv.weight.copy_(weight[:, :, None, None])
    folded.final_conv.bias.copy_(bias)
    return folded


class FTBaseline(NORM):
    """The paper's baselines "student w/ 1 plain/default FT": the transform is trained with the labels alone."""

    name = "ft"
    summary, source = (
        "NORM's feature transform without a teacher: the paper's FT-only baselines",
        "Liu et al., ICLR 2023",
    )
    reference = "OSVAI/NORM"
    departures = "N, and whether logits are standardised, are not published: 8, raw."
    reads = ()
    reads_teacher = False
    refuses_unlabelled = "it learns from labels alone"
    # The paper's baseline is trained with the cross entropy only; whether on raw logits is not published.
    flags = (
        GAMMA,
        CETA._replace(default=0.0),
        CO_SPONGE,
        FT._replace(choices=("default", "plain")),
        FT_POSITION,
        FT_FORM,
    )
    flags_work_if = {}
    beta1 = 1.0

    def reads_teacher_logits(self):
        return False

    def losses(self, student, teacher, targets, index, progress):
        return self.weighted_cross_entropy(standardise_logits(student.logits, self.scale), targets)

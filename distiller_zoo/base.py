"""The contract of a distillation method: one module that holds everything that is trained."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.contract import check_class, check_losses
from errors import UserError, count_of
from models.backbone import Backbone, Output, normalises_single_values
from setting import Setting, count, number, positive, whole

#: A method's hyper-parameter.
Flag = Setting

GAMMA = Flag(("-r", "--gamma"), number, 1.0, "weight of the cross entropy", is_weight=True)
ALPHA = Flag(
    ("-a", "--alpha"), number, 0.0, "weight of the KL divergence of the logits (the NORM paper's beta)", is_weight=True
)
BETA = Flag(("-b", "--beta"), number, 1.0, "weight of the method's own loss (the NORM paper's alpha)", is_weight=True)
KD_T = Flag(("--kd_T",), positive, 4.0, "temperature of the KL divergence", called=("t", "temperature", "temp", "tau"))
INIT_EPOCHS = Flag(
    ("--init_epochs",), count, 30, "epochs of the stage before the main one, in a run of 240", full_run=240
)
INIT_LEARNING_RATE = Flag(("--init_learning_rate",), positive, 0.05, "learning rate of the stage before the main one")
WARMUP_EPOCHS = Flag(
    ("--warmup_epochs",),
    whole,
    20,
    "epochs over which the weight of the method's own loss rises from 0, in a run of 240 (0: it is there at once)",
    full_run=240,
)


#: What a run is refused with whose losses are all left out.
NOTHING_TO_TRAIN = "every loss weight is 0: there is nothing to train; set -r, -a or -b"


class Condition(NamedTuple):
    """What must hold for a flag to have an effect."""

    flags: tuple[Flag, ...]  # those that decide it
    holds: Callable[..., bool]  # of their values
    remedy: str  # what to give instead, in words


def above_zero(*weights: Flag) -> Condition:
    """One of these weights is above 0."""
    return Condition(weights, lambda *values: any(values), f"{' or '.join(spelling(each) for each in weights)} above 0")


def is_one_of(flag: Flag, *choices: Any) -> Condition:
    """A flag has one of these values."""
    return Condition((flag,), lambda value: value in choices, f"{spelling(flag)} {' or '.join(map(str, choices))}")


def spelling(flag: Flag) -> str:
    """The flag as messages name it: -a/--alpha."""
    return "/".join(flag.names)


class Task(NamedTuple):
    """What a method may know of the data and of the batches."""

    num_classes: int
    image_size: int
    batch_size: int
    train_targets: Tensor  # (n,) class of every training image, by sample index
    label_smoothing: float = 0.0  # share of a label that is spread over all classes, in the cross entropy
    class_weights: Tensor | None = None  # (K,) what a class counts in the cross entropy; None: 1


class Progress(NamedTuple):
    """How far a stage is; `epoch` counts its finished epochs, so it is 0 in the first."""

    epoch: int
    epochs: int
    factor: Tensor | None = None  # `Distiller.schedule` as a tensor, in steps that are compiled


class Stage(NamedTuple):
    """A part of the training with its own parameters, loss and schedule; the last stage of a method is the main one.

    `trained` modules are in train mode and get gradients; everything else of the method is frozen and in eval mode.
    """

    name: str
    epochs: int
    trained: Sequence[nn.Module]
    losses: Callable[..., dict[str, Tensor]]  # as `Distiller.losses`
    respond: Callable[[Tensor, Output | None], Output | None]  # as `Distiller.respond`; None: the student is not run
    reads_teacher: bool = True
    learning_rate: float | None = None  # None: the run's
    milestones: tuple[int, ...] | None = None  # epochs after which the rate falls; None: the run's schedule
    decay_rate: float = 0.1  # the factor at each of these milestones
    holdout: float = 0.0  # share of the training images that is kept from the steps and given to `before_step`
    #: Called before each step as before_step(optimizer, batch, teacher's outputs, held-out batch, progress).
    before_step: Callable[..., None] | None = None
    #: Called after each epoch, and its test, with its progress, to record what the epoch has found.
    after_epoch: Callable[[Progress], None] | None = None


def without_student(images: Tensor, teacher: Output | None) -> None:
    """The `respond` of a stage that does not run the student."""


class Distiller(nn.Module):
    """A method: student, adapters and losses in one module.

    `parameters()` are the optimizer's and `state_dict()` is the checkpoint's. The teacher stays outside: `teacher` is
    read for its shapes (or copied in part) when the method is built, and every step receives its outputs.
    A method has a `name` and writes `losses`; one that changes the student's forward pass (NORM) writes `respond` and
    `export` too; one that prepares something first writes `stages`. A class without a name of its own is only a base.
    """

    #: The value of `--distill`, in lower case.
    name = ""
    #: One line for `--help`, and where the method comes from.
    summary, source = "", ""
    #: The heading under which `--help` and the README list the method.
    group = "other"
    #: What the losses read of student's and teacher's outputs, in addition to the logits.
    reads: tuple[str, ...] = ()
    #: Whether the method reads a teacher.
    reads_teacher = True
    #: Whether `Output.maps` holds the maps before their last ReLU, on either side.
    student_preact = teacher_preact = False
    #: Views of every image, a key of `dataset.VIEWS`; images and outputs then have V * B rows, view by view.
    views = "plain"
    #: The smallest batch whose losses are defined; a shorter last batch is left out.
    min_batch = 1
    #: Why the method cannot learn from mixed images (mixup, CutMix), whose targets are shares (B, K) of classes; empty
    #: where it can.
    refuses_mixing = ""
    #: Why the method cannot learn from images without labels, whose targets are all 0, with -r 0; empty where it can.
    refuses_unlabelled = ""
    #: Whether the losses of every step depend on everything that is trained, apart from -r, -a or -b 0.
    uses_everything = True
    #: Children that the main stage does not train.
    frozen: tuple[str, ...] = ()
    #: What `export` writes, for the tables.
    ships = "student"
    #: The method's hyper-parameters: keyword arguments of its constructor and flags of the scripts.
    flags: tuple[Flag, ...] = ()
    #: Argument of a flag -> what must hold for it to have an effect; a flag that is not listed always has one.
    flags_work_if: Mapping[str, tuple[Condition, ...]] = {}
    #: The code that the method's published numbers come from, and what is done otherwise here, and why.
    reference, departures = "", ""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        check_class(cls, Distiller)

    def __init__(self, student: Backbone, teacher: Backbone | None, task: Task, **hyper_parameters):
        super().__init__()
        self.student = student
        self._notes: dict[str, None] = {}
        self.label_smoothing = task.label_smoothing
        self.register_buffer("class_weights", task.class_weights, persistent=False)
        unknown = set(hyper_parameters) - {flag.argument for flag in self.flags}
        if unknown:
            raise TypeError(f"{type(self).__name__} has no hyper-parameter {', '.join(sorted(unknown))}")
        for flag in self.flags:
            value = hyper_parameters.get(flag.argument, flag.default)
            if flag.choices and value not in flag.choices:
                raise UserError(f"{flag.names[-1]}: must be one of {', '.join(flag.choices)}, not {value}")
            setattr(self, flag.argument, value)
        self._check_networks(student, teacher, task)
        self._check_batch(student, task)

    def _check_networks(self, student: Backbone, teacher: Backbone | None, task: Task) -> None:
        """Raise `UserError` where a network does not show what the method reads."""
        for whose, network, reads in (
            ("student", student, self.student_preact),
            ("teacher", teacher, self.teacher_preact),
        ):
            if reads and network is not None and not network.shows_preactivations:
                raise UserError(
                    f"--distill {self.name}: it reads the {whose}'s maps before their last ReLU, which {network.name} "
                    f"does not show (shows_preactivations); choose another --distill or --model_{whose[0]}"
                )
        fits = teacher is None or (teacher.num_classes and task.num_classes in (0, teacher.num_classes))
        if not fits and self.reads_teacher_logits():
            has = count_of(teacher.num_classes, "class") if teacher.num_classes else "no classifier"
            raise UserError(
                f"--model_t: the teacher has {has}, the data {count_of(task.num_classes, 'class')}, and --distill "
                f"{self.name} reads the teacher's logits; choose another teacher, -a 0, or a method that reads "
                "feature maps"
            )

    def _check_batch(self, student: Backbone, task: Task) -> None:
        """Raise `UserError` where a batch is too small; BatchNorms of the student may make `min_batch` 2."""
        if task.batch_size < self.min_batch:
            raise UserError(
                f"--batch_size: --distill {self.name} compares images of a batch, it needs at least {self.min_batch}"
            )
        if self.min_batch < 2 and normalises_single_values(student, task.image_size):
            self.min_batch = 2
            if task.batch_size < 2:
                raise UserError(
                    "--batch_size: the student's last maps are one pixel wide, and its BatchNorms need two images; "
                    "raise it, or lower --accumulate"
                )

    def start_classifier(self) -> None:
        """Initialise the student's classifier where all its weights are 0, as timm's MLP networks start: for a
        constructor whose losses divide the logits by their deviation, which is 0 then and tiny for the next steps."""
        with suppress(UserError):  # of a network without a linear classifier
            classifier = self.student.get_classifier()
            if not classifier.weight.is_meta and not classifier.weight.any():  # a plan builds networks without values
                classifier.reset_parameters()
                self.note(  # true of a resumed run too, which says it again and then has its own weights
                    "the student's classifier began as torch's linear layers do, not with this network's zeros, where "
                    "standardised logits have no scale"
                )

    def respond(self, images: Tensor, teacher: Output | None) -> Output:
        """The student's outputs for images (B, 3, H, W) in training; the networks may run in a lower precision here."""
        return self.student.outputs(images, self.student_preact)

    def losses(
        self, student: Output, teacher: Output | None, targets: Tensor, index: Tensor, progress: Progress
    ) -> dict[str, Tensor]:
        """Named, weighted scalars whose sum is trained, from float32 outputs; sample index is (B,), targets are classes
        (B,), or shares (B, K) of mixed images where the method does not refuse them."""
        raise NotImplementedError(f"{type(self).__name__} defines no losses")

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch of -sum_c w_c y_c log p_c, of logits (B, K) and classes (B,) or shares (B, K).

        y are the targets with label smoothing (Szegedy et al., CVPR 2016): (1 - s) y + s / K. The class weights w have
        the mean 1 over the training images, so that the mean is over images, and the same in micro-batches.
        """
        if targets.ndim == 2 or self.class_weights is not None:
            targets = (F.one_hot(targets, logits.shape[1]) if targets.ndim == 1 else targets).to(logits.dtype)
        return F.cross_entropy(logits, targets, self.class_weights, label_smoothing=self.label_smoothing)

    def weighted_cross_entropy(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """{"ce": gamma * cross entropy} of a method with the flag `GAMMA`, or {} where gamma is 0."""
        return {"ce": self.gamma * self.cross_entropy(logits, targets)} if self.gamma else {}

    def schedule(self, progress: Progress) -> float | Tensor:
        """What changes with the epoch in `losses`: a factor, or a tensor of several."""
        return 1.0

    def factor(self, progress: Progress) -> float | Tensor:
        """The schedule's value, as `losses` reads it: given as a tensor, nothing is compiled again in another epoch."""
        return self.schedule(progress) if progress.factor is None else progress.factor

    def stages(self, epochs: int) -> list[Stage]:
        """The parts of the training in their order, the main one last; `epochs` are the main one's."""
        return [self.main_stage(epochs)]

    def main_stage(self, epochs: int) -> Stage:
        """The stage that trains everything but `frozen` with `losses`."""
        trained = [child for name, child in self.named_children() if name not in self.frozen]
        return Stage("main", epochs, trained, self.losses, self.respond, self.reads_teacher_output())

    def reads_teacher_output(self) -> bool:
        """Whether the main stage reads the teacher's outputs."""
        return self.reads_teacher

    def reads_teacher_logits(self) -> bool:
        """Whether any stage reads the teacher's logits, so that its classes must be those of the data."""
        return self.reads_teacher

    @classmethod
    def trains_classifier(cls, flags: Mapping[str, Any]) -> bool:
        """Whether what is shipped classifies where no label is read, with these values of the flags: into the teacher's
        classes then."""
        return bool(flags[ALPHA.argument]) if ALPHA in cls.flags else True

    def forward(
        self, batch, teacher: Output | None, progress: Progress, stage: Stage | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """A `dataset.Batch` and the teacher's outputs for it -> (student's logits (B, K) of the first view, named
        weighted losses), in a stage or else in the main one. Logits are None in a stage that runs no student."""
        stage = stage or self.main_stage(progress.epochs)
        student = stage.respond(batch.images, teacher)
        with torch.autocast(batch.images.device.type, enabled=False):
            outputs = (widen_output(output, self.reads) for output in (student, teacher))
            losses = stage.losses(*outputs, batch.targets, batch.index, progress)
        check_losses(self, losses)
        return None if student is None else student.logits[: len(batch.targets)], losses

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, K) of what is being trained, with its adapters where they belong to the network."""
        return self.respond(images, None).logits

    def export(self) -> Backbone:
        """The plain network to ship, in eval mode, independent of this module."""
        return copy.deepcopy(self.student).eval()

    def note(self, *lines: str) -> None:
        """Keep lines for the log, for a method's constructor; empty ones are left out, and those that are there."""
        self._notes |= dict.fromkeys(filter(None, lines))

    def notes(self) -> list[str]:
        """Lines for the log: what the task and the networks have changed of the method's flags, or decided."""
        return list(self._notes)

    def export_note(self) -> str:
        """One sentence on what `export` kept in addition to the plain student; empty where it is the plain student."""
        return ""


def unmet(method: type[Distiller], flag: Flag, values: Mapping[str, Any]) -> Condition | None:
    """Why a flag changes nothing, given the resolved `values` of all flags; None where it has an effect."""
    conditions = method.flags_work_if.get(flag.argument, ())
    return next((one for one in conditions if not one.holds(*(values[each.argument] for each in one.flags))), None)


def refuse_without_effect(method: type[Distiller], values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise `UserError` for a flag in `given` that changes nothing, given the resolved `values` of all flags.

    A weight of 0 may be given anywhere.
    """
    for flag in method.flags:
        if flag.argument not in given or (flag.is_weight and not given[flag.argument]):
            continue
        if (condition := unmet(method, flag, values)) is not None:
            state = ", ".join(f"{spelling(other)} {values[other.argument]}" for other in condition.flags)
            raise UserError(
                f"{spelling(flag)}: has no effect on --distill {method.name} with {state}; leave it out, or give "
                f"{condition.remedy}"
            )


class Predictor(nn.Module):
    """What a method predicts, as a module: the student with its adapters."""

    def __init__(self, method: Distiller):
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return self.method.predict(images)


def widen(values):
    """Half-precision tensors as float32, in lists too; other dtypes pass."""
    if isinstance(values, list):
        return [widen(value) for value in values]
    if isinstance(values, Tensor) and values.dtype in (torch.float16, torch.bfloat16):
        return values.float()
    return values


def widen_output(output: Output | None, reads: Sequence[str]) -> Output | None:
    """The same output in float32; feature maps and vectors that are not in `reads` are left as they are."""
    if output is None:
        return None
    unread = set(Output._fields) - {*reads, "logits"}
    widened = {name: widen(value) for name, value in zip(output._fields, output, strict=True) if name not in unread}
    if others := getattr(output, "others", ()):
        widened["others"] = tuple(widen_output(other, reads) for other in others)
    return output._replace(**widened)

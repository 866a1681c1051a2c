"""DistPro: the distillation process is searched on a copy of the student and replayed (Deng, Sun, Newsam & Wang, ECCV
2022, arXiv 2204.05547).

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * sum_i w_i(scores) * HCL_i

Pathways i lead from maps of the student to maps of the teacher, both before their last ReLU (pathways.py); HCL is
ReviewKD's. The search trains a copy of the student on four fifths of the images for `--init_epochs` epochs. Before each
step the scores move so that the cross entropy of held-out images after that step falls (the second-order step of DARTS,
Liu et al., ICLR 2019): with w' = w - rate * (momentum * velocity + grad_w L + decay * w) and v = grad_w' CE_held-out,

    grad_scores = -rate * (grad_scores L(w + R v) - grad_scores L(w - R v)) / (2 R),   R = 0.01 / |v|.

L depends on the scores through the weights alone, so the two ends of the difference are forward passes without
gradients. Then the student itself is trained on all images, with the scores of the search at the same fraction of the
run. `--distpro_search_style` and `--distpro_style` say how scores become weights in the search and in the main run. The
official code can neither load what it has found nor end its search, and after the two passes of the difference it
restores nothing, so that its weights drift; here the process is replayed and the formula is followed, as in the paper.
Its teacher is in train mode; here the teacher is in eval mode, as for every method.
"""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distiller_zoo.base import BETA, INIT_EPOCHS, Condition, Flag, Stage, above_zero, is_one_of, positive, widen_output
from distiller_zoo.kd import FeatureDistiller, LogitDistiller
from distiller_zoo.maps import describe_left_out
from distiller_zoo.pathways import STYLES, Pathways, PathwayWeights
from models.backbone import Backbone, Output, probe_shapes
from models.synchronised import average

KD_WEIGHT = Flag(("--kd_weight",), positive, 1.0, "DistPro's factor on the weights of the styles scaled and constant")
DISTPRO_STYLE = Flag(
    ("--distpro_style",),
    str,
    "scaled",
    "how DistPro's scores become weights in the main run: scaled (kd_weight times the number of pathways times "
    "softmax_with_rest, as published), softmax, softmax_with_rest (next to one more score of 1), sigmoid, magnitude "
    "(shares of 3), constant (kd_weight for all; no search)",
    choices=tuple(STYLES),
)
SEARCHED = tuple(style for style in STYLES if style != "constant")
DISTPRO_SEARCH_STYLE = Flag(
    ("--distpro_search_style",),
    str,
    "softmax",
    "the same in DistPro's search, which records the scores; as published: softmax",
    choices=SEARCHED,
)
#: The styles that have the factor --kd_weight, in the main run or in a search.
WEIGHTED = Condition(
    (DISTPRO_STYLE, DISTPRO_SEARCH_STYLE),
    lambda style, search_style: style in ("scaled", "constant") or search_style == "scaled",
    "--distpro_style scaled or constant",
)
HOLDOUT = 0.2
#: Length of the step to either side in the finite difference.
REACH = 0.01

Parameters = dict[str, Tensor]


class SearchedStudent(nn.Module):
    """The copy of student and pathways that the search trains."""

    def __init__(self, student: Backbone, pathways: Pathways):
        super().__init__()
        self.student, self.pathways = copy.deepcopy(student), copy.deepcopy(pathways)

    def forward(self, images: Tensor, teacher_maps: list[Tensor] | None = None) -> tuple[Output, Tensor | None]:
        """The student's outputs, and the loss of every pathway where the teacher's maps are given."""
        output = self.student.outputs(images, preact=True)
        return output, None if teacher_maps is None else self.pathways(output.maps, teacher_maps)


class DistPro(LogitDistiller):
    """Weighted pathways between all maps, whose weights follow a searched process."""

    name = "distpro"
    summary, source = (
        "DistPro: weighted matching of all pairs of maps, the weights' schedule searched beforehand",
        "Deng et al., ECCV 2022",
    )
    reference = "bytedance/DistPro"
    departures = (
        "The search ends and its scores are replayed in the main run, as the paper says: the released code "
        "can do neither. The gradient of the scores is the paper's formula: that code restores neither "
        "weights nor statistics after the passes of the difference. The teacher is in eval mode; that code "
        "leaves it in train mode, so that its statistics drift."
    )
    group = "feature maps"
    reads = ("maps",)
    student_preact = teacher_preact = True
    refuses_unlabelled = "its search minimises the cross entropy of held-out images"
    frozen = ("search",)
    flags = (
        *FeatureDistiller.flags,
        KD_WEIGHT,
        DISTPRO_STYLE,
        DISTPRO_SEARCH_STYLE,
        INIT_EPOCHS._replace(default=40),
    )
    flags_work_if = {
        **FeatureDistiller.flags_work_if,
        "kd_weight": (above_zero(BETA), WEIGHTED),
        "distpro_style": (above_zero(BETA),),
        **dict.fromkeys(
            ("distpro_search_style", "init_epochs"), (above_zero(BETA), is_one_of(DISTPRO_STYLE, *SEARCHED))
        ),
    }

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        student_channels, teacher_channels = (
            [channels for channels, _, _ in probe_shapes(network, task.image_size).maps]
            for network in (student, teacher)
        )
        self.pathways = Pathways(student_channels, teacher_channels)
        self.note(describe_left_out(student_channels, teacher_channels, from_deepest=True, without=""))
        styles = self.distpro_search_style, self.distpro_style
        self.weights = PathwayWeights(len(self.pathways.pairs), self.init_epochs, *styles, self.kd_weight)
        searches = self.beta and self.distpro_style != "constant"  # without -b nothing reads what is found
        self.search = SearchedStudent(student, self.pathways) if searches else None

    def stages(self, epochs):
        main = self.main_stage(epochs)
        if self.search is None:
            return [main]
        search = Stage(
            name="search",
            epochs=self.init_epochs,
            trained=[self.search],
            losses=self._search_losses,
            respond=self._search_respond,
            milestones=(),
            holdout=HOLDOUT,
            before_step=self.move_scores,
            after_epoch=self.weights.record,
        )
        return [search, main]

    def losses(self, student, teacher, targets, index, progress):
        if not self.beta:
            return self.label_and_logit_losses(student, teacher, targets)
        pathway_losses = self.pathways(student.maps, teacher.maps)
        return self._terms(student, teacher, targets, self.factor(progress), pathway_losses)

    def schedule(self, progress):
        return self.weights.at(progress)

    def _search_respond(self, images, teacher):
        output, _ = self.search(images)
        return output

    def _search_losses(self, student, teacher, targets, index, progress):
        pathway_losses = self.search.pathways(student.maps, teacher.maps)
        return self._terms(student, teacher, targets, self.weights(), pathway_losses)

    def _terms(self, student, teacher, targets, weights: Tensor, pathway_losses: Tensor) -> dict[str, Tensor]:
        terms = self.label_and_logit_losses(student, teacher, targets)
        return {**terms, "distpro": self.beta * (weights * pathway_losses).sum()}

    def move_scores(self, optimizer, batch, teacher, held_out, progress) -> None:
        """One step of the scores; weights, statistics and gradients of the searched student stay as they are."""
        gradient = self.score_gradient(optimizer, batch, widen_output(teacher, self.reads), held_out)
        self.weights.step(average(gradient))

    def score_gradient(self, optimizer, batch, teacher: Output, held_out) -> Tensor:
        """The gradient (pathways,) of the held-out cross entropy behind the next step of an SGD `optimizer`."""
        parameters = dict(self.search.named_parameters())
        # BatchNorms would move their running statistics in every pass: these passes move a copy.
        statistics = {name: value.clone() for name, value in self.search.named_buffers()}

        def run(parameters: Parameters, images: Tensor, teacher_maps: list[Tensor] | None = None):
            return functional_call(self.search, {**parameters, **statistics}, (images, teacher_maps))

        student, pathway_losses = run(parameters, batch.images, teacher.maps)
        loss = sum(self._terms(student, teacher, batch.targets, self.weights(), pathway_losses).values())
        ahead = look_ahead(optimizer, parameters, gradients_of(loss, parameters))
        held_out_output, _ = run(ahead, held_out.images)
        held_out_loss = self.cross_entropy(held_out_output.logits, held_out.targets)
        direction = gradients_of(held_out_loss, ahead)
        length = torch.stack([value.square().sum() for value in direction.values()]).sum().sqrt()
        radius = REACH / length.clamp_min(torch.finfo(length.dtype).eps)
        with torch.no_grad():
            _, forward = run(displaced(parameters, direction, radius), batch.images, teacher.maps)
            _, backward = run(displaced(parameters, direction, -radius), batch.images, teacher.maps)
        group, *_ = optimizer.param_groups
        return self.weights.pull_back(-group["lr"] * self.beta * (forward - backward) / (2 * radius))


def gradients_of(loss: Tensor, parameters: Parameters) -> Parameters:
    """The gradient of a loss by each parameter's name, the mean over all processes; zero where the loss does not depend
    on it."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, map(average, gradients), strict=True))


def displaced(parameters: Parameters, direction: Parameters, distance: Tensor) -> Parameters:
    """parameters + distance * direction."""
    return {name: value + distance * direction[name] for name, value in parameters.items()}


@torch.no_grad()
def look_ahead(optimizer: torch.optim.SGD, parameters: Parameters, gradients: Parameters) -> Parameters:
    """The parameters behind one step of SGD, which is not made; they are leaves of a new graph."""
    groups = {value: group for group in optimizer.param_groups for value in group["params"]}
    ahead = {}
    for name, value in parameters.items():
        group = groups[value]
        step = gradients[name] + group["weight_decay"] * value
        velocity = optimizer.state.get(value, {}).get("momentum_buffer")
        if velocity is not None:
            step = step + group["momentum"] * velocity
        ahead[name] = (value - group["lr"] * step).requires_grad_()
    return ahead

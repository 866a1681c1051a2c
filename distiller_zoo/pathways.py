"""DistPro's parts: the pathways from a student's maps to a teacher's, and the learned process of their weights."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import Progress
from distiller_zoo.reviewkd import hierarchical_context_loss
from models.backbone import initialise

#: Widest map within a transform; narrower where student or teacher are.
WIDEST_TRANSFORM = 512
LEARNING_RATE, BETAS, EPSILON = 0.1, (0.5, 0.999), 1e-8


def _convolution(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)]


class PathwayTransform(nn.Module):
    """A student's map (B, Cs, H, W) -> (B, Ct, *size): 3x3 convolutions, and in between a product with a map of one
    channel, which attends to positions."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        mid_channels = min(WIDEST_TRANSFORM, in_channels, out_channels)
        self.reduce = nn.Sequential(*_convolution(in_channels, mid_channels), nn.ReLU())
        self.attention = nn.Conv2d(mid_channels, 1, 1, bias=False)
        self.mix = nn.Sequential(*_convolution(mid_channels, mid_channels), nn.ReLU())
        self.expand = nn.Sequential(*_convolution(mid_channels, out_channels))
        for convolutions in (self.reduce, self.mix, self.expand):  # the attention starts as torch starts it
            initialise(convolutions)

    def forward(self, student_map: Tensor, size: torch.Size) -> Tensor:
        x = self.reduce(student_map)
        x = self.mix(x * self.attention(x))
        return self.expand(x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest"))


class Pathways(nn.Module):
    """The transforms of all pathways: to every teacher's map from the student's maps of the same depth and deeper.

    Where one network has more maps, its shallowest are left out. Channels are given shallow to deep.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]):
        super().__init__()
        self.levels = min(len(student_channels), len(teacher_channels))
        #: (teacher's level, student's level) of every pathway
        self.pairs = [(t, s) for t in range(self.levels) for s in range(t, self.levels)]
        student_channels, teacher_channels = self._deepest(student_channels), self._deepest(teacher_channels)
        self.transforms = nn.ModuleList(
            PathwayTransform(student_channels[s], teacher_channels[t]) for t, s in self.pairs
        )

    def _deepest(self, values: Sequence) -> Sequence:
        return values[len(values) - self.levels :]

    def forward(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
        """Maps of both networks -> the hierarchical context loss of every pathway, (pathways,)."""
        student_maps, teacher_maps = self._deepest(student_maps), self._deepest(teacher_maps)
        losses = []
        for (t, s), transform in zip(self.pairs, self.transforms, strict=True):
            target = teacher_maps[t]
            losses.append(hierarchical_context_loss(transform(student_maps[s], target.shape[2:]), target))
        return torch.stack(losses)


def _softmax_with_rest(scores: Tensor) -> Tensor:
    """The softmax with one more score, 1, whose share no pathway gets: the weights may fall together."""
    return torch.cat([scores, scores.new_ones(1)]).softmax(0)[: len(scores)]


#: Scores (n,) and --kd_weight -> weights (n,). In brackets the official code's numbers of these styles.
STYLES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "scaled": lambda scores, weight: len(scores) * weight * _softmax_with_rest(scores),  # (333)
    "softmax": lambda scores, weight: scores.softmax(0),  # (1)
    "softmax_with_rest": lambda scores, weight: _softmax_with_rest(scores),  # (2)
    "sigmoid": lambda scores, weight: scores.sigmoid(),  # (3)
    "magnitude": lambda scores, weight: 3 * F.normalize(scores.abs(), p=1, dim=0),  # (5)
    "constant": lambda scores, weight: torch.full_like(scores, weight),  # (0): nothing is searched
}


class PathwayWeights(nn.Module):
    """The pathways' scores, the Adam that moves them, and the process: the scores after each epoch of the search.

    The search turns scores into weights by `search_style`, the main run by `style`. All of it is in buffers, so that it
    is saved and resumed exactly.
    """

    def __init__(self, pathways: int, search_epochs: int, search_style: str, style: str, kd_weight: float):
        super().__init__()
        self.search_style, self.style, self.kd_weight = search_style, style, kd_weight
        self.register_buffer("scores", torch.ones(pathways))
        self.register_buffer("adam_mean", torch.zeros(pathways))
        self.register_buffer("adam_square", torch.zeros(pathways))
        self.register_buffer("adam_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("process", torch.ones(search_epochs, pathways))

    def forward(self) -> Tensor:
        """The weights (pathways,) of the search so far."""
        return STYLES[self.search_style](self.scores, self.kd_weight)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient of a loss with respect to the weights -> its gradient with respect to the scores."""
        with torch.enable_grad():
            scores = self.scores.detach().requires_grad_()
            weights = STYLES[self.search_style](scores, self.kd_weight)
        return torch.autograd.grad(weights, scores, gradient)[0]

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """One step of Adam (Kingma & Ba, ICLR 2015, algorithm 1) on the scores."""
        mean_rate, square_rate = BETAS
        self.adam_steps += 1
        self.adam_mean.lerp_(gradient, 1 - mean_rate)
        self.adam_square.lerp_(gradient.square(), 1 - square_rate)
        steps = self.adam_steps.to(gradient.dtype)
        # expm1 gives 1 - rate^steps without cancellation.
        mean = self.adam_mean / -torch.expm1(steps * math.log(mean_rate))
        square = self.adam_square / -torch.expm1(steps * math.log(square_rate))
        self.scores -= LEARNING_RATE * mean / (square.sqrt() + EPSILON)

    def record(self, progress: Progress) -> None:
        """Write down the scores after an epoch of the search; until the next one ends they hold for the rest too."""
        self.process[progress.epoch :] = self.scores

    def at(self, progress: Progress) -> Tensor:
        """The main run's weights (pathways,) of the scores at the same fraction of the process; between the epochs of
        the search scores are interpolated."""
        last = len(self.process) - 1
        place = last * progress.epoch / max(progress.epochs - 1, 1)
        before = min(int(place), last)
        scores = torch.lerp(self.process[before], self.process[min(before + 1, last)], place - before)
        return STYLES[self.style](scores, self.kd_weight)

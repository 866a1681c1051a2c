"""SemCKD: cross-layer distillation with semantic calibration (Chen et al., AAAI 2021, arXiv 2012.03236).

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * L_semckd
    L_semckd = 1 / (B * S) * sum over images b, student's maps i, teacher's maps j of A_bij * D_bij

D_bij is the mean squared difference of the teacher's map j and the student's map i, pooled to the smaller and projected
to the teacher's width. The attention A, a softmax over j, is learned: row b of the similarity matrix of the images
(B, B) of each map goes through a small network, and the products of the student's queries and the teacher's keys are
the energies (section 3.3). The gradient flows through both factors.

These networks read B similarities, so B is the --batch_size; a shorter last batch makes no step, as published. Of fewer
than four images, whose quarter is no width, the embedding keeps a width of 1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.maps import MapDistiller, middle_maps, pool_to_smaller
from errors import UserError
from models.backbone import Backbone, Output, probe_shapes

#: How much narrower an embedding is than the rows of similarities that it reads.
REDUCTION = 4


class SimilarityEmbedding(nn.Module):
    """A map (B, C, H, W) -> what each image is similar to in it, embedded: (B, D), of length 1."""

    def __init__(self, batch_size: int):
        super().__init__()
        width = max(batch_size // REDUCTION, 1)
        self.layers = nn.Sequential(nn.Linear(batch_size, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, feature_map: Tensor) -> Tensor:
        rows = feature_map.flatten(1)
        return F.normalize(self.layers(rows @ rows.T), dim=1)


def projector(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolution over twice the width: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
    inner = 2 * out_channels
    return nn.Sequential(
        nn.Conv2d(in_channels, inner, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(),
        nn.Conv2d(inner, out_channels, 1, bias=False),
    )


def squared_difference(student_map: Tensor, teacher_map: Tensor, project: nn.Module, map_size: str = "pool") -> Tensor:
    """Per image (B,): the mean squared difference of two maps in one size, the student's projected."""
    student_map, teacher_map = pool_to_smaller(student_map, teacher_map, map_size)
    return (project(student_map) - teacher_map).square().mean((1, 2, 3))


def attend(queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """S queries and T keys, each (B, D) -> attention (B, S, T); rows over the teacher's maps sum to 1."""
    return (torch.stack(queries, 1) @ torch.stack(keys, 2)).softmax(2)


def calibrated_loss(attention: Tensor, differences: Tensor) -> Tensor:
    """Attention and squared differences, both (B, S, T) -> their sum of products over B * S."""
    return (attention * differences).sum(2).mean()


class SemCKD(MapDistiller):
    """Each of the student's maps learns from all of the teacher's, in learned shares."""

    name = "semckd"
    summary, source = "SemCKD: L2 between all pairs of maps, weighted by learned attention", "Chen et al., AAAI 2021"
    reference = "DefangChen/SimKD, DefangChen/SemCKD"
    departures = "With --accumulate a short last batch makes a step on labels and logits alone."
    group = "feature maps"
    reads = ("maps",)
    pairs_maps = False
    min_batch = 2  # one image is similar to itself only
    uses_everything = False  # a part of a short batch leaves the attention out

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        if len(task.train_targets) < task.batch_size:
            raise UserError(
                f"--batch_size: --distill semckd needs whole batches, but there are only {len(task.train_targets)} "
                f"images for one of {task.batch_size}; choose a smaller one"
            )
        self.batch_size = task.batch_size
        self.min_batch = task.batch_size
        student_channels, teacher_channels = (_channels(each, task.image_size) for each in (student, teacher))
        self.queries = nn.ModuleList(SimilarityEmbedding(task.batch_size) for _ in student_channels)
        self.keys = nn.ModuleList(SimilarityEmbedding(task.batch_size) for _ in teacher_channels)
        self.projectors = nn.ModuleList(
            nn.ModuleList(projector(in_channels, out_channels) for out_channels in teacher_channels)
            for in_channels in student_channels
        )

    def losses(self, student, teacher, targets, index, progress):
        if len(targets) != self.batch_size:  # a short batch in parts (--accumulate)
            return self.label_and_logit_losses(student, teacher, targets)
        return super().losses(student, teacher, targets, index, progress)

    def attention(self, student: Output, teacher: Output) -> Tensor:
        """A (B, S, T) of the outputs of both networks."""
        queries, keys = _embed_all(self.queries, middle_maps(student)), _embed_all(self.keys, middle_maps(teacher))
        return attend(queries, keys)

    def feature_loss(self, student, teacher, targets, index):
        differences = self._differences(middle_maps(student), middle_maps(teacher))
        return calibrated_loss(self.attention(student, teacher), differences)

    def _differences(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
        rows = []
        for student_map, projectors in zip(student_maps, self.projectors, strict=True):
            pairs = zip(teacher_maps, projectors, strict=True)
            row = [
                squared_difference(student_map, teacher_map, project, self.map_size) for teacher_map, project in pairs
            ]
            rows.append(torch.stack(row, 1))
        return torch.stack(rows, 1)


def _embed_all(embeddings: nn.ModuleList, maps: list[Tensor]) -> list[Tensor]:
    return [embed(feature_map) for embed, feature_map in zip(embeddings, maps, strict=True)]


def _channels(network: Backbone, image_size: int) -> list[int]:
    """The channels of the middle maps."""
    return [channels for channels, _, _ in middle_maps(probe_shapes(network, image_size))]

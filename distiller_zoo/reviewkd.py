"""ReviewKD: knowledge review (Chen, Liu, Zhao & Jia, CVPR 2021, arXiv 2104.09044).

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * min(1, epoch / warmup_epochs) * sum over levels of HCL

Levels are the feature maps without the stem's, and the pooled vector as a map of one pixel. From the deepest to the
shallowest, an attention-based fusion (ABF, section 3.3) joins each of the student's maps with what came from the deeper
levels and turns it into the width and size of the teacher's map; both are compared by the hierarchical context loss
(HCL). --review_student and --review_teacher say whether maps are taken before or behind their last ReLU, and
--review_width how wide a fusion is: on CIFAR the student's are behind it and the teacher's before it; on ImageNet, as
the released code runs, both are behind it for ResNet34 -> ResNet18 and the student's before it, the teacher's behind it
for ResNet50 -> MobileNet. Epochs count from 0, so the first trains without the term, as published.
The official code keeps tables of channels and sizes per pair and stops at pairs without one; here the channels are read
off both networks and the sizes off the maps. Where one network has more levels, the deepest are paired. That code runs
the teacher with the statistics of the batch on CIFAR; here the teacher is in eval mode, as for every method.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import BETA, WARMUP_EPOCHS, Flag, above_zero, count
from distiller_zoo.kd import FeatureDistiller
from distiller_zoo.maps import describe_left_out, middle_maps
from models.backbone import Backbone, Output, probe_shapes

PLACES = ("before", "behind")
REVIEW_STUDENT = Flag(
    ("--review_student",), str, "behind", "ReviewKD's student maps: before or behind their last ReLU", choices=PLACES
)
REVIEW_TEACHER = Flag(
    ("--review_teacher",), str, "before", "ReviewKD's teacher maps: before or behind their last ReLU", choices=PLACES
)
REVIEW_WIDTH = Flag(
    ("--review_width",),
    count,
    512,
    "channels that ReviewKD passes from level to level, at most; fewer where the student's pooled vector has fewer",
)
#: Heights and widths that HCL pools to, where the maps are larger.
CONTEXT_SIZES = (4, 2, 1)


def hierarchical_context_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """HCL of two maps (B, C, H, W) of one shape: the weighted mean of their MSE at full size and pooled to 4, 2 and 1
    pixels, each weight half of the one before; sizes that are not smaller than the maps are left out."""
    difference = student_map - teacher_map  # pooling is linear: the difference of the pooled maps is its pooled map
    loss, weight, weights = difference.square().mean(), 1.0, 1.0
    for size in CONTEXT_SIZES:
        if size < min(difference.shape[2:]):
            weight /= 2
            weights += weight
            loss = loss + weight * F.adaptive_avg_pool2d(difference, size).square().mean()
    return loss / weights


class AttentionFusion(nn.Module):
    """ABF of one level: joins the student's map with what deeper levels passed on, and shapes it like the teacher's.

    Maps (B, in_channels, H, W) and (B, mid_channels, h, w) -> (result (B, out_channels, *size), what is passed on to
    the next level (B, mid_channels, *size)). The deepest level has nothing to join.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, is_deepest: bool):
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels))
        self.attention = None if is_deepest else nn.Conv2d(2 * mid_channels, 2, 1)
        self.expand = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        for convolution, _ in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, student_map: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        joined = self.reduce(student_map)
        if self.attention is not None:
            joined = self._join(joined, _resize(deeper, joined.shape[2:]))
        joined = _resize(joined, size)
        return self.expand(joined), joined

    def _join(self, own: Tensor, deeper: Tensor) -> Tensor:
        shares = self.attention(torch.cat([own, deeper], 1)).sigmoid()
        own_share, deeper_share = shares.chunk(2, 1)  # (B, 1, H, W) each
        return own * own_share + deeper * deeper_share


def _resize(feature_map: Tensor, size: torch.Size) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), the nearest pixel."""
    return feature_map if feature_map.shape[2:] == size else F.interpolate(feature_map, size, mode="nearest")


def _levels(output: Output) -> list[Tensor]:
    """The reviewed maps, deep to shallow: the pooled vector as (B, D, 1, 1), then the feature maps but the stem's."""
    return [output.pooled[:, :, None, None], *reversed(middle_maps(output))]


def _level_channels(network: Backbone, image_size: int) -> list[int]:
    """The channels of `_levels`."""
    shapes = probe_shapes(network, image_size)
    return [shapes.pooled, *(channels for channels, _, _ in reversed(middle_maps(shapes)))]


class ReviewKD(FeatureDistiller):
    """Every level of the teacher is learned from this and all deeper levels of the student."""

    name = "reviewkd"
    summary, source = (
        "ReviewKD: student maps fused across levels (ABF), hierarchical context loss (HCL)",
        "Chen et al., CVPR 2021",
    )
    reference = "dvlab-research/ReviewKD"
    departures = (
        "Channels and sizes are read off the networks: the released tables stop at pairs that are not in "
        "them. The teacher is in eval mode; the released code leaves it in train mode on CIFAR, so that its "
        "statistics drift."
    )
    group = "feature maps"
    reads = ("maps", "pooled")
    teacher_preact = True  # unless --review_teacher says behind
    min_batch = 2  # the deepest level's BatchNorms see one pixel per image
    flags = (*FeatureDistiller.flags, WARMUP_EPOCHS, REVIEW_STUDENT, REVIEW_TEACHER, REVIEW_WIDTH)
    flags_work_if = {
        **FeatureDistiller.flags_work_if,
        **dict.fromkeys(("warmup_epochs", "review_student", "review_teacher", "review_width"), (above_zero(BETA),)),
    }

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        self.student_preact, self.teacher_preact = self.review_student == "before", self.review_teacher == "before"
        levels = [_level_channels(each, task.image_size) for each in (student, teacher)]
        student_channels, teacher_channels = levels
        self.note(describe_left_out(*(middle for _, *middle in levels), from_deepest=True))
        deepest, *_ = student_channels
        mid_channels = min(self.review_width, deepest)
        # The lists run from deep to shallow, so that the shorter one decides and the deepest are paired.
        pairs = zip(student_channels, teacher_channels, strict=False)
        self.fusions = nn.ModuleList(
            AttentionFusion(in_channels, mid_channels, out_channels, is_deepest=number == 0)
            for number, (in_channels, out_channels) in enumerate(pairs)
        )

    def feature_loss(self, student, teacher, targets, index):
        losses, deeper = [], None
        for fusion, student_map, teacher_map in zip(self.fusions, _levels(student), _levels(teacher), strict=False):
            result, deeper = fusion(student_map, deeper, teacher_map.shape[2:])
            losses.append(hierarchical_context_loss(result, teacher_map))
        return sum(losses)

    def losses(self, student, teacher, targets, index, progress):
        terms = super().losses(student, teacher, targets, index, progress)
        if self.name in terms:
            terms[self.name] = terms[self.name] * self.factor(progress)
        return terms

    def schedule(self, progress):
        return min(1.0, progress.epoch / self.warmup_epochs) if self.warmup_epochs else 1.0

"""Which of a network's feature maps the methods mean, by name, and how maps of two networks are made comparable."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from errors import UnfitPair
from models.backbone import Output, Shapes


def last_map(output: Output | Shapes) -> Tensor:
    """The deepest stage output (B, C, H, W); in MobileNetV2 and ShuffleV2 it lies before the last 1x1 convolution."""
    *_, last = output.maps
    return last


def middle_maps(output: Output | Shapes) -> list:
    """The stage outputs without the stem's, shallow to deep; of a network's `Shapes`, their (C, H, W)."""
    _, *middle = output.maps
    return middle


def pool_to_smaller(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps (B, C, H, W) to the height and width of the smaller."""
    if student_map.shape[2] > teacher_map.shape[2]:
        return F.adaptive_avg_pool2d(student_map, teacher_map.shape[2:]), teacher_map
    if student_map.shape[2] < teacher_map.shape[2]:
        return student_map, F.adaptive_avg_pool2d(teacher_map, student_map.shape[2:])
    return student_map, teacher_map


def require_equal_channels(method: str, student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]) -> None:
    """Raise `UnfitPair` unless the maps that `method` compares, of shapes (..., C, H, W), have the same channels."""
    channels = [[shape[-3] for shape in shapes] for shapes in (student, teacher)]
    if channels[0] != channels[1]:
        listed = (", ".join(map(str, each)) for each in channels)
        raise UnfitPair(
            "--model_s: --distill {} needs equal channels in all maps; the student has {}, the teacher {}: choose "
            "networks of one family and width".format(method, *listed)
        )


#: The length up to which a vector counts as zero.
ZERO_LENGTH = 1e-12


def unit_vectors(vectors: Tensor, dim: int) -> Tensor:
    """Vectors along `dim`, scaled to length 1; a zero vector stays zero.

    Its gradient is zero too, since it has no direction; `F.normalize` multiplies the incoming gradient by 1e12 there.
    """
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors * torch.where(length > ZERO_LENGTH, 1 / length.clamp_min(ZERO_LENGTH), 0)

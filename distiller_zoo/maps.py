"""Which of a network's feature maps the methods mean, by name, and how maps of two networks are made comparable."""

from torch import Tensor
from torch.nn import functional as F

from models.backbone import Output


def last_map(output: Output) -> Tensor:
    """The deepest stage output (B, C, H, W); in MobileNetV2 and ShuffleV2 it lies before the last 1x1 convolution."""
    *_, last = output.maps
    return last


def middle_maps(output: Output) -> list[Tensor]:
    """The stage outputs without the stem's, shallow to deep."""
    _, *middle = output.maps
    return middle


def pool_to_smaller(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps (B, C, H, W) to the height and width of the smaller."""
    if student_map.shape[2] > teacher_map.shape[2]:
        return F.adaptive_avg_pool2d(student_map, teacher_map.shape[2:]), teacher_map
    if student_map.shape[2] < teacher_map.shape[2]:
        return student_map, F.adaptive_avg_pool2d(teacher_map, student_map.shape[2:])
    return student_map, teacher_map

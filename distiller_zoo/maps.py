"""Which of a network's feature maps the methods mean, by name, and how maps of two networks are made comparable."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller_zoo.base import BETA, Flag, above_zero
from distiller_zoo.kd import FeatureDistiller
from errors import UnfitPair, UserError, count_of
from models.backbone import Output, Shapes, probe_shapes

MAP_SIZE = Flag(
    ("--map_size",),
    str,
    "pool",
    "how maps of different sizes are compared: pool (the larger one is pooled to the smaller, by maximum where the "
    "method's paper does and the sizes divide, else by average) or interpolate (the teacher's map is resized to the "
    "student's size, bilinearly)",
    choices=("pool", "interpolate"),
)


def last_map(output: Output | Shapes) -> Tensor:
    """The deepest feature map (B, C, H, W); in MobileNetV2 and ShuffleV2 it is before the last 1x1 convolution."""
    *_, last = output.maps
    return last


def middle_maps(output: Output | Shapes) -> list:
    """The feature maps without the stem's, shallow to deep; of a network's `Shapes`, their (C, H, W)."""
    _, *middle = output.maps
    return middle


def match_size(feature_map: Tensor, height: int, width: int, how: str = "max") -> Tensor:
    """A map (B, C, H, W) -> (B, C, height, width); unchanged where it has that size.

    how: "max" (max-pooling where the sizes divide, adaptive average pooling elsewhere), "average" (adaptive average
    pooling) or "interpolate" (bilinear, antialiased where the map shrinks).
    """
    if feature_map.shape[2:] == (height, width):
        return feature_map
    if how == "interpolate":
        return F.interpolate(feature_map, (height, width), mode="bilinear", align_corners=False, antialias=True)
    if takes_maximum(feature_map.shape[2:], (height, width), how):
        return F.max_pool2d(feature_map, (feature_map.shape[2] // height, feature_map.shape[3] // width))
    return F.adaptive_avg_pool2d(feature_map, (height, width))


def takes_maximum(size: Sequence[int], target: Sequence[int], how: str = "max") -> bool:
    """Whether `match_size` takes maxima from a map of `size` (H, W) to `target`: not linear, unlike everything else."""
    divides = all(own % wanted == 0 for own, wanted in zip(size, target, strict=True))
    return how == "max" and divides and tuple(size) != tuple(target)


def pool_to_smaller(student_map: Tensor, teacher_map: Tensor, map_size: str = "pool") -> tuple[Tensor, Tensor]:
    """Two maps (B, C, H, W) in one height and width: the larger one average-pooled to the smaller, or with
    `map_size` "interpolate" the teacher's resized to the student's."""
    if map_size == "interpolate":
        return student_map, match_size(teacher_map, *student_map.shape[2:], "interpolate")
    if student_map.shape[2] > teacher_map.shape[2]:
        return match_size(student_map, *teacher_map.shape[2:], "average"), teacher_map
    return student_map, match_size(teacher_map, *student_map.shape[2:], "average")


def describe_sizes(student: Sequence[int], teacher: Sequence[int], map_size: str | None, paper: str = "average") -> str:
    """One sentence on how maps of shape (C, H, W) are brought to one size; empty where they have one.

    map_size: the flag's value, None where the method has no such flag and pools. paper: "max" or "average", the pooling
    of the method's paper where the sizes divide.
    """
    own, other = student[1:], teacher[1:]
    if tuple(own) == tuple(other):
        return ""
    sizes = " and ".join("x".join(map(str, size)) for size in (own, other))
    if map_size == "interpolate":
        return f"maps of student and teacher are {sizes}: the teacher's is interpolated to the student's size"
    smaller, larger = sorted((tuple(own), tuple(other)))
    kind = "max" if takes_maximum(larger, smaller, paper) else "average"
    whose = "student" if tuple(own) == larger else "teacher"
    flag = " (--map_size)" if map_size else ""
    return f"maps of student and teacher are {sizes}: the {whose}'s is {kind}-pooled{flag}"


def describe_left_out(
    student: Sequence, teacher: Sequence, *, from_deepest: bool = False, without: str = "without the first of each, "
) -> str:
    """One sentence on the maps that pairs from the shallowest (or deepest) on leave out of the longer list; empty where
    none. `without` says which of a network's maps neither list holds."""
    if len(student) == len(teacher):
        return ""
    whose, others = ("student", "teacher") if len(student) > len(teacher) else ("teacher", "student")
    fewer, more = sorted((len(student), len(teacher)))
    paired, unpaired = ("deepest", "shallowest") if from_deepest else ("shallowest", "deepest")
    left_out = f"{unpaired} is" if more - fewer == 1 else f"{more - fewer} {unpaired} are"
    return (
        f"{without}the {whose} shows {count_of(more, 'feature map')} and the {others} {fewer}: maps are paired from "
        f"the {paired} on, and the {whose}'s {left_out} left out"
    )


class MapDistiller(FeatureDistiller):
    """Base of methods that compare maps of both networks pixel by pixel, in one size (`--map_size`).

    A method pools the larger of two maps by itself, as its paper does; `sized` is asked before.
    """

    flags = (*FeatureDistiller.flags, MAP_SIZE)
    flags_work_if = {**FeatureDistiller.flags_work_if, "map_size": (above_zero(BETA),)}
    #: Whether maps are compared in pairs, from the shallowest on; else each with all of the other network's.
    pairs_maps = True

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        shapes = [self.compared(probe_shapes(each, task.image_size)) for each in (student, teacher)]
        require_maps(self.name, *shapes)
        pairs = zip(*shapes, strict=False)
        left_out = describe_left_out(*shapes) if self.pairs_maps else ""
        how = self.map_size if MAP_SIZE in self.flags else None
        self.note(left_out, *(describe_sizes(*pair, how) for pair in pairs))

    @staticmethod
    def compared(output: Output | Shapes) -> list:
        """The maps of a network that are compared, or their shapes."""
        return middle_maps(output)

    def sized(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Both lists of maps (B, C, H, W), of the length of the shorter one, ready to be compared in pairs."""
        pairs = zip(student_maps, teacher_maps, strict=False)
        return tuple(map(list, zip(*(pool_to_smaller(*pair, self.map_size) for pair in pairs), strict=True)))


def require_maps(method: str, student: Sequence, teacher: Sequence, *, least: int = 1) -> None:
    """Raise `UserError` where a network has fewer than `least` of the maps that `method` compares: with none to compare
    there would be no loss."""
    for whose, maps in (("student", student), ("teacher", teacher)):
        if len(maps) < least:
            shown = "too few" if maps else "only its last"
            raise UserError(
                f"--model_{whose[0]}: --distill {method} compares several feature maps, and the {whose} shows {shown}; "
                "choose another network or method"
            )


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

"""FitNet: hints for thin deep nets (Romero et al., ICLR 2015, arXiv 1412.6550), equation 3.

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * MSE(r(F_s), F_t)

F_s and F_t are the maps of number --hint_layer of student and teacher, r is a trained regressor on the student's side.
As in RepDistiller, whose numbers the tables quote, everything is trained at once (the paper trains the layers below the
hint first), and r ends with BatchNorm and ReLU, also where the teacher's map is signed (WRN, MobileNetV2).
A pair that r cannot bridge ends in a TypeError there; here the teacher's map is averaged to the student's size.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import BETA, Flag, above_zero, whole
from distiller_zoo.kd import FeatureDistiller
from distiller_zoo.maps import MAP_SIZE, describe_sizes, match_size
from errors import UnfitPair, UserError, count_of
from models.backbone import Output, Shapes, probe_shapes

HINT_LAYER = Flag(
    ("--hint_layer",), whole, 2, "number of the feature map that FitNet compares, in both networks; 0 is the stem's"
)


class HintLoss(nn.Module):
    """Mean squared difference of two maps (B, C, H, W) of one shape -> scalar."""

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return F.mse_loss(f_s, f_t)


class ConvReg(nn.Module):
    """Regressor from a student's map to the shape of a teacher's: one convolution, BatchNorm and, if asked for, ReLU.

    `s_shape` and `t_shape` end with (C, H, W). Twice the teacher's size: 3x3, stride 2; half of it: transposed 4x4,
    stride 2; another larger size, or the same: the kernel that leaves the teacher's. (B, C_s, H_s, W_s) ->
    (B, C_t, H_t, W_t). Raises `UnfitPair` where the student's map is smaller and not half the teacher's.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True):
        super().__init__()
        self.use_relu = use_relu
        self.conv = _resizing_convolution(s_shape, t_shape)
        self.bn = nn.BatchNorm2d(self.conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.use_relu else x


def _resizing_convolution(s_shape: Sequence[int], t_shape: Sequence[int]) -> nn.Conv2d | nn.ConvTranspose2d:
    (in_channels, *s_size), (out_channels, *t_size) = s_shape[-3:], t_shape[-3:]
    if s_size == [2 * size for size in t_size]:
        return nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
    if t_size == [2 * size for size in s_size]:
        return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)
    kernel = [1 + s - t for s, t in zip(s_size, t_size, strict=True)]
    if min(kernel) < 1:
        height, teacher_height = s_size[0], t_size[0]
        raise UnfitPair(
            f"--model_s: the student's compared map is {count_of(height, 'pixel')} high, the teacher's "
            f"{teacher_height}; a smaller one can only be doubled, so choose another --model_s or --model_t (or layer, "
            "where the method has a flag)"
        )
    return nn.Conv2d(in_channels, out_channels, kernel)


class FitNet(FeatureDistiller):
    """One map of the student, behind a regressor, becomes the teacher's."""

    name = "hint"
    summary, source = (
        "FitNets: L2 between one student map (after a 1x1 regressor) and the teacher's",
        "Romero et al., ICLR 2015",
    )
    reference = "HobbitLong/RepDistiller"
    departures = "Trained jointly, as the tables' numbers were; the paper has two stages."
    group = "feature maps"
    reads = ("maps",)
    min_batch = 2  # the regressor's BatchNorm, where the map is one pixel
    flags = (*FeatureDistiller.flags, HINT_LAYER, MAP_SIZE)
    flags_work_if = {**FeatureDistiller.flags_work_if, **dict.fromkeys(("hint_layer", "map_size"), (above_zero(BETA),))}

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        shapes = [probe_shapes(network, task.image_size) for network in (student, teacher)]
        layers = min(len(each.maps) for each in shapes)
        if not 0 <= self.hint_layer < layers:
            raise UserError(
                f"--hint_layer: there is no map {self.hint_layer} in both networks; choose a number from 0 to "
                f"{layers - 1}"
            )
        own, (channels, *size) = (self._hinted(each) for each in shapes)
        # The regressor reaches every size up to its own, and twice its own; elsewhere the teacher's map is resized.
        reaches = all(ours >= theirs or 2 * ours == theirs for ours, theirs in zip(own[1:], size, strict=True))
        self._resizes = self.map_size == "interpolate" or not reaches
        self.note(describe_sizes(own, (channels, *size), self.map_size) if self._resizes else "")
        self.regressor = ConvReg(own, (channels, *(own[1:] if self._resizes else size)))
        self.criterion = HintLoss()

    def _hinted(self, network: Output | Shapes):
        return network.maps[self.hint_layer]

    def feature_loss(self, student, teacher, targets, index):
        regressed, target = self.regressor(self._hinted(student)), self._hinted(teacher)
        if self._resizes:
            target = match_size(target, *regressed.shape[2:], "interpolate" if self.map_size != "pool" else "average")
        return self.criterion(regressed, target)

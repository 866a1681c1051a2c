"""OFD: a comprehensive overhaul of feature distillation (Heo et al., ICCV 2019, arXiv 1904.01866).

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * sum over layers of 2^-(layers above) * d(r(F_s), max(F_t, m)) / B

F_s and F_t are feature maps before their last ReLU, without the stem's, r is a 1x1 convolution with BatchNorm, and
d is the sum of squared differences, without those where the teacher's value is not positive and the student's is below
it (section 3.4). The margin m of a channel is the mean of its negative values (section 3.1), which follows from weight
and bias of the BatchNorm before the ReLU. The larger map is average-pooled to the smaller; where one network has more
layers, the deepest are compared. The authors' code runs the teacher with the statistics of the batch; here the teacher
is in eval mode, as for every method.
"""

import torch
from torch import Tensor, nn

from distiller_zoo.base import ALPHA, BETA, GAMMA, KD_T
from distiller_zoo.kd import LOGIT_STANDARDIZATION, FeatureDistiller
from distiller_zoo.maps import describe_left_out, describe_sizes, middle_maps, pool_to_smaller, require_maps
from errors import UserError
from models.backbone import Backbone, initialise, probe_shapes

#: A channel with a smaller share of negative values than this has the margin of three standard deviations.
RARELY_NEGATIVE = 0.001


def margins(weight: Tensor, bias: Tensor) -> Tensor:
    """Weight and bias (C,) of a BatchNorm -> the mean of the negative part of N(bias, weight^2), (C,).

    Mean of a truncated normal distribution; -3 |weight| where almost nothing is negative.
    """
    std, mean = weight.detach().double().abs().clamp_min(1e-12), bias.detach().double()
    share = torch.special.ndtr(-mean / std)
    density = torch.exp(-((mean / std) ** 2) / 2) / (2 * torch.pi) ** 0.5
    negative_mean = mean - std * density / share.clamp_min(RARELY_NEGATIVE)
    return torch.where(share > RARELY_NEGATIVE, negative_mean, -3 * std).to(weight.dtype)


def partial_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Maps (B, C, H, W) before their ReLU -> sum of squared differences over B, where the ReLU would show them.

    Where the teacher is off (not positive), a student below it is off too, and counts nothing.
    """
    counts = (student > teacher) | (teacher > 0)
    return (counts * (student - teacher)).square().sum() / len(student)


class Layer(nn.Module):
    """One pair of maps: the student's connector to the teacher's channels, and the teacher's margins."""

    def __init__(self, channels: int, teacher_bn: nn.BatchNorm2d):
        super().__init__()
        self.conv = nn.Conv2d(channels, teacher_bn.num_features, 1, bias=False)
        self.bn = nn.BatchNorm2d(teacher_bn.num_features)
        self.register_buffer("margin", margins(teacher_bn.weight, teacher_bn.bias).view(-1, 1, 1))
        initialise(self)

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """Maps before their ReLU -> scalar."""
        student_map, teacher_map = pool_to_smaller(self.bn(self.conv(student_map)), teacher_map)
        return partial_distance(student_map, torch.maximum(teacher_map, self.margin))


def _find_batch_norms(teacher: Backbone) -> list[nn.BatchNorm2d]:
    try:
        return teacher.get_bn_before_relu()
    except NotImplementedError:
        raise UserError(
            f"--model_t: --distill ofd reads its margins from the BatchNorms before a teacher's ReLUs, and "
            f"{type(teacher).__name__} names none; choose a ResNet, WRN, VGG or MobileNetV2 as the teacher"
        ) from None


class Overhaul(FeatureDistiller):
    """The student's maps before their ReLU become the teacher's, where those matter behind it."""

    name = "ofd"
    summary, source = (
        "OFD: partial L2 between maps before their ReLU, with a margin ReLU on the teacher's",
        "Heo et al., ICCV 2019",
    )
    reference = "clovaai/overhaul-distillation; unequal sizes: megvii-research/mdistiller"
    departures = "The teacher is in eval mode; the released code leaves it in train mode, so that its statistics drift."
    group = "feature maps"
    reads = ("maps",)
    student_preact = teacher_preact = True
    min_batch = 2  # the connectors' BatchNorm, where the map is one pixel
    flags = (GAMMA, ALPHA, BETA._replace(default=0.001), KD_T, LOGIT_STANDARDIZATION)  # the authors' code, on CIFAR

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        shapes = [middle_maps(probe_shapes(network, task.image_size)) for network in (student, teacher)]
        require_maps(self.name, *shapes)
        self.layers = nn.ModuleList(
            Layer(channels, teacher_bn)
            for (channels, *_), teacher_bn in _pair_deepest(shapes[0], _find_batch_norms(teacher))
        )
        sizes = (describe_sizes(own, other, None) for own, other in _pair_deepest(*shapes))
        self.note(describe_left_out(*shapes, from_deepest=True), *sizes)

    def feature_loss(self, student, teacher, targets, index):
        pairs = _pair_deepest(middle_maps(student), middle_maps(teacher))
        losses = [layer(*maps) for layer, maps in zip(self.layers, pairs, strict=True)]
        return sum(loss / 2**above for above, loss in enumerate(reversed(losses)))


def _pair_deepest(student: list, teacher: list) -> list[tuple]:
    """Pairs of two lists' entries, shallow to deep, without the shallowest of the longer list."""
    return list(zip(reversed(student), reversed(teacher), strict=False))[::-1]

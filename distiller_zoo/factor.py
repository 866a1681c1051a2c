"""FT, factor transfer: paraphrasing complex network (Kim, Park & Kwak, NeurIPS 2018, arXiv 1802.04977).

First stage, --init_epochs epochs at --init_learning_rate: the paraphraser, an autoencoder of the teacher's last map,
learns to reconstruct it: MSE(decoder(encoder(F_t)), F_t) (section 3.1). Then, with the paraphraser frozen,

    L = gamma * CE(s, y) + alpha * KL_T(s, t) + beta * mean |f(translator(F_s)) - f(encoder(F_t))|

(section 3.2), where f, by --factor_norm, averages the squares of a factor over its channels and scales the result to
length 1 per image (channels: RepDistiller, whose numbers the tables quote), or scales the factor itself, channels and
all (whole: the paper, its authors' code, and torchdistill's ImageNet run, whose translator has no BatchNorm:
--translator_bn none). The larger factor is average-pooled to the smaller. The last map is the deepest feature map.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from distiller_zoo.base import BETA, INIT_EPOCHS, INIT_LEARNING_RATE, Flag, Stage, above_zero, without_student
from distiller_zoo.kd import FeatureDistiller
from distiller_zoo.maps import MAP_SIZE, MapDistiller, last_map, pool_to_smaller, unit_vectors
from models.backbone import probe_shapes

FACTOR_NORM = Flag(
    ("--factor_norm",),
    str,
    "channels",
    "what FT scales to length 1 per image: the squares' mean over the channels, or the whole factor, as in the paper",
    choices=("channels", "whole"),
)
TRANSLATOR_BN = Flag(
    ("--translator_bn",),
    str,
    "batch",
    "FT's translator with BatchNorm, as in RepDistiller, or without (none), as in torchdistill's ImageNet run",
    choices=("batch", "none"),
)


def _layers(convolution: type[nn.Module], widths: Sequence[int], use_bn: bool) -> nn.Sequential:
    """3x3 convolutions between the widths, each with BatchNorm (or nothing) and LeakyReLU."""
    layers = []
    for in_channels, out_channels in pairwise(widths):
        bn = nn.BatchNorm2d(out_channels) if use_bn else nn.Identity()
        layers += [convolution(in_channels, out_channels, 3, padding=1), bn, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


def _factors(channels: int, k: float) -> int:
    """The channels of the factor of a map with so many, at least one."""
    return max(int(channels * k), 1)


class Paraphraser(nn.Module):
    """The teacher's autoencoder: maps (B, C, H, W), whose shape is `t_shape`, to factors (B, k * C, H, W) and back."""

    def __init__(self, t_shape: Sequence[int], k: float = 0.5, use_bn: bool = False):
        super().__init__()
        channels, *_ = t_shape[-3:]
        factors = _factors(channels, k)
        self.encoder = _layers(nn.Conv2d, (channels, channels, factors, factors), use_bn)
        self.decoder = _layers(nn.ConvTranspose2d, (factors, factors, channels, channels), use_bn)

    def forward(self, f_s: Tensor, is_factor: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """A map -> (factor, reconstruction), or the factor alone."""
        factor = self.encoder(f_s)
        return factor if is_factor else (factor, self.decoder(factor))


class Translator(nn.Module):
    """The student's encoder: maps of `s_shape` to factors of as many channels as the teacher's paraphraser gives."""

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], k: float = 0.5, use_bn: bool = True):
        super().__init__()
        (channels, *_), (teacher_channels, *_) = s_shape[-3:], t_shape[-3:]
        factors = _factors(teacher_channels, k)
        self.encoder = _layers(nn.Conv2d, (channels, channels, factors, factors), use_bn)

    def forward(self, f_s: Tensor) -> Tensor:
        return self.encoder(f_s)


class FactorTransfer(nn.Module):
    """Factors (B, C, H, W) of student and teacher, of any sizes -> scalar; p1: power within f, p2: of the distance.

    `norm` is the flag --factor_norm; p1 has no part in `whole`.
    """

    def __init__(self, p1: float = 2, p2: float = 1, norm: str = "channels"):
        super().__init__()
        self.p1, self.p2, self.norm = p1, p2, norm

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        student, teacher = (self.factor(each) for each in pool_to_smaller(f_s, f_t))
        distance = student - teacher
        return distance.abs().mean() if self.p2 == 1 else distance.pow(self.p2).mean()

    def factor(self, f: Tensor) -> Tensor:
        """A factor (B, C, H, W) -> (B, H * W), or (B, C * H * W), of length 1 per image; zeros stay zero."""
        if self.norm == "whole":
            return unit_vectors(f.flatten(1), dim=1)
        return unit_vectors(f.pow(self.p1).mean(1).flatten(1), dim=1)


class Paraphrasing(MapDistiller):
    """The student's translated last map becomes the teacher's paraphrased one."""

    name = "factor"
    summary, source = (
        "FT, factor transfer: L1 between the last maps' factors (paraphraser and translator)",
        "Kim et al., NeurIPS 2018",
    )
    reference = "HobbitLong/RepDistiller; whole: Jangho-Kim/Factor-Transfer-pytorch, yoshitomo-matsubara/torchdistill"
    group = "feature maps"
    reads = ("maps",)
    min_batch = 2  # the translator's BatchNorm, where the map is one pixel
    frozen = ("paraphraser",)
    flags = (
        *FeatureDistiller.flags,
        FACTOR_NORM,
        TRANSLATOR_BN,
        INIT_EPOCHS,
        INIT_LEARNING_RATE._replace(default=0.01),
        MAP_SIZE,
    )
    flags_work_if = {
        **MapDistiller.flags_work_if,
        **dict.fromkeys(("factor_norm", "translator_bn", "init_epochs", "init_learning_rate"), (above_zero(BETA),)),
    }

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        s_shape, t_shape = (last_map(probe_shapes(network, task.image_size)) for network in (student, teacher))
        self.paraphraser = Paraphraser(t_shape)
        self.translator = Translator(s_shape, t_shape, use_bn=self.translator_bn == "batch")
        self.criterion = FactorTransfer(norm=self.factor_norm)

    @staticmethod
    def compared(output):
        return [last_map(output)]

    def stages(self, epochs):
        first = Stage(
            name="paraphraser",
            epochs=self.init_epochs,
            trained=[self.paraphraser],
            losses=self.reconstruction_losses,
            respond=without_student,
            learning_rate=self.init_learning_rate,
            milestones=(),
        )
        main = self.main_stage(epochs)
        return [first, main] if self.beta else [main]  # nothing else reads the paraphraser

    def reconstruction_losses(self, student, teacher, targets, index, progress):
        """The first stage's loss: what the paraphraser leaves out of the teacher's map."""
        teacher_map = last_map(teacher)
        _, reconstruction = self.paraphraser(teacher_map)
        return {"reconstruction": F.mse_loss(reconstruction, teacher_map)}

    def feature_loss(self, student, teacher, targets, index):
        teacher_factor = self.paraphraser(last_map(teacher), is_factor=True)
        factors = pool_to_smaller(self.translator(last_map(student)), teacher_factor.detach(), self.map_size)
        return self.criterion(*factors)

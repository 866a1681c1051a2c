"""MobileNetV2 at half width for 32x32 images (Sandler et al., CVPR 2018; expansion 6, as in the tables)."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, initialise, initialise_linear

# (output channels at full width, repetitions, stride of the first) of the seven groups of inverted residuals;
# strides for 32x32 images. The first group does not expand.
GROUPS = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
LAST_WIDTH = 1280


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a residual where the shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        self.is_residual = stride == 1 and in_channels == out_channels
        hidden = in_channels * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if self.is_residual else self.conv(x)


class MobileNetV2(Backbone):
    """The maps are linear bottlenecks (signed, so `preact` changes nothing); the final map is that of the last 1x1
    convolution.

    Without `stem_and_head_relu` the ReLUs behind the stem and behind that convolution are left out, as in the students
    of the official NORM code: for parity only (docs/norm.md).
    """

    shows_preactivations = True
    trunk = ("conv1", *(f"blocks.{group}" for group in range(5)))
    head = ("conv2",)

    def __init__(
        self,
        width: float = 0.5,
        expansion: int = 6,
        num_classes: int = 100,
        stem_and_head_relu: bool = True,
    ):
        super().__init__()
        self.stem_and_head_relu = stem_and_head_relu
        channels = int(32 * width)
        self.conv1 = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels))
        groups = []
        for full_width, repetitions, stride in GROUPS:
            out_channels = int(full_width * width)
            group_expansion = expansion if groups else 1
            blocks = [InvertedResidual(channels, out_channels, stride, group_expansion)]
            blocks += [InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(repetitions - 1)]
            groups.append(nn.Sequential(*blocks))
            channels = out_channels
        self.blocks = nn.Sequential(*groups)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, LAST_WIDTH, 1, bias=False), nn.BatchNorm2d(LAST_WIDTH))
        self.classifier = nn.Sequential(nn.Linear(LAST_WIDTH, num_classes))
        self.initialise()

    def initialise(self):
        initialise(self)
        initialise_linear(self.get_classifier())

    def _activate(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.stem_and_head_relu else x

    def forward_trunk(self, x, preact=False):
        x = self._activate(self.conv1(x))
        maps = [x]
        # A stage ends where the resolution is about to fall, or at the last group: groups 1, 2, 4 and 6.
        for first, last in ((0, 1), (2, 2), (3, 4)):
            x = self.blocks[first : last + 1](x)
            maps.append(x)
        return maps, x

    def forward_last_stage(self, x, preact=False):
        x = self.blocks[5:](x)
        return x, self._activate(self.conv2(x))

    def get_classifier(self):
        return self.classifier[0]

    def get_bn_before_relu(self):
        return [self.blocks[group][-1].conv[-1] for group in (1, 2, 4, 6)]

    def get_feat_modules(self):
        return nn.ModuleList([self.conv1, self.blocks])


def mobilenetv2_half(num_classes=100):
    return MobileNetV2(0.5, 6, num_classes)


def mobilenetv2_half_norm(num_classes=100):
    """The official NORM code's variant, without the ReLUs behind the stem and the last 1x1 convolution."""
    return MobileNetV2(0.5, 6, num_classes, stem_and_head_relu=False)

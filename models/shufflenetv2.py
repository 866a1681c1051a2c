"""ShuffleNet V2 x1 for 32x32 images (Ma et al., ECCV 2018)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone

STEM_WIDTH = 24
LAST_WIDTH = 1024


def _pointwise(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class BasicUnit(nn.Module):
    """One half of the channels passes, the other is convolved; `joined` is their concatenation, before the shuffle."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _depthwise(half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The passed half and the convolved half before its last ReLU."""
        passed, x = x.chunk(2, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        return passed, self.bn3(self.conv3(self.bn2(self.conv2(x))))

    def join(self, passed: Tensor, before_relu: Tensor) -> Tensor:
        return self.shuffle(torch.cat([passed, F.relu(before_relu)], 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*self.branches(x))


class DownUnit(nn.Module):
    """Both branches are convolved with stride 2 and concatenated, which changes the width."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.conv1, self.bn1 = _depthwise(in_channels, 2), nn.BatchNorm2d(in_channels)
        self.conv2, self.bn2 = _pointwise(in_channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _pointwise(in_channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _depthwise(half, 2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _pointwise(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return self.shuffle(torch.cat([left, right], 1))


def _forward_stage(stage: nn.Sequential, x: Tensor, preact: bool) -> tuple[Tensor, Tensor]:
    """The stage's entry in the list of maps, and its output."""
    passed, before_relu = stage[-1].branches(stage[:-1](x))
    x = stage[-1].join(passed, before_relu)
    return torch.cat([passed, before_relu], 1) if preact else x, x


class ShuffleNetV2(Backbone):
    """The last map of the list has 464 channels; the final map is that of the 1x1 convolution behind it, 1024 channels.

    Pre-activations are listed as RepDistiller lists them: both halves side by side, before the shuffle.
    """

    shows_preactivations = True
    trunk = ("conv1", "bn1", "layer1", "layer2")
    head = ("conv2", "bn2")

    def __init__(self, widths=(116, 232, 464), depths=(3, 7, 3), num_classes: int = 100):
        super().__init__()
        self.conv1 = _pointwise(3, STEM_WIDTH)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        in_channels, stages = STEM_WIDTH, []
        for width, depth in zip(widths, depths, strict=True):
            stages.append(nn.Sequential(DownUnit(in_channels, width), *(BasicUnit(width) for _ in range(depth))))
            in_channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = _pointwise(in_channels, LAST_WIDTH)
        self.bn2 = nn.BatchNorm2d(LAST_WIDTH)
        self.linear = nn.Linear(LAST_WIDTH, num_classes)

    def forward_trunk(self, x, preact=False):
        x = F.relu(self.bn1(self.conv1(x)))
        maps = [x]
        for stage in (self.layer1, self.layer2):
            stage_output, x = _forward_stage(stage, x, preact)
            maps.append(stage_output)
        return maps, x

    def forward_last_stage(self, x, preact=False):
        stage_output, x = _forward_stage(self.layer3, x, preact)
        return stage_output, F.relu(self.bn2(self.conv2(x)))

    def get_classifier(self):
        return self.linear

    def get_feat_modules(self):
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])


def ShuffleV2(num_classes=100):
    return ShuffleNetV2(num_classes=num_classes)

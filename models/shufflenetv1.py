"""ShuffleNet V1 for 32x32 images (Zhang et al., CVPR 2018; three groups, widths 240-480-960, as in the tables)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, forward_stage

STEM_WIDTH = 24


class ShuffleUnit(nn.Module):
    """Grouped 1x1, channel shuffle, 3x3 depthwise, grouped 1x1; a stride-2 unit concatenates its pooled input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int):
        super().__init__()
        self.stride = stride
        width = out_channels // 4
        # The stem is too narrow to be grouped.
        first_groups = 1 if in_channels == STEM_WIDTH else groups
        self.conv1 = nn.Conv2d(in_channels, width, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.shuffle = nn.ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolved part before its ReLU, and what is added to it or, with a stride, joined to it."""
        out = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out, x if self.stride == 1 else F.avg_pool2d(x, 3, stride=2, padding=1)

    def preactivation(self, x: Tensor) -> Tensor:
        out, rest = self.branches(x)
        return out + rest if self.stride == 1 else torch.cat([out, rest], 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.relu(self.preactivation(x))
        # The same as a ReLU of both together; a BatchNorm is several times slower on part of another gradient.
        return torch.cat([F.relu(part) for part in self.branches(x)], 1)


class ShuffleNetV1(Backbone):
    shows_preactivations = True
    trunk = ("conv1", "bn1", "layer1", "layer2")

    def __init__(self, widths=(240, 480, 960), depths=(4, 8, 4), groups: int = 3, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        in_channels, stages = STEM_WIDTH, []
        for width, depth in zip(widths, depths, strict=True):
            units = [ShuffleUnit(in_channels, width - in_channels, 2, groups)]
            units += [ShuffleUnit(width, width, 1, groups) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*units))
            in_channels = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(in_channels, num_classes)

    def forward_trunk(self, x, preact=False):
        x = F.relu(self.bn1(self.conv1(x)))
        maps = [x]
        for stage in (self.layer1, self.layer2):
            stage_output, x = forward_stage(stage, x, preact)
            maps.append(stage_output)
        return maps, x

    def forward_last_stage(self, x, preact=False):
        return forward_stage(self.layer3, x, preact)

    def get_classifier(self):
        return self.linear

    def get_feat_modules(self):
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])


def ShuffleV1(num_classes=100):
    return ShuffleNetV1(num_classes=num_classes)

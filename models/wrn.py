"""Wide ResNets, wrn_<depth>_<width> (Zagoruyko & Komodakis, BMVC 2016): pre-activation blocks, so the stage outputs are
signed sums and the last BatchNorm and ReLU belong to the head."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, initialise
from models.synchronised import is_synchronised, normalise, total_moments


class WideBlock(nn.Module):
    """BN-ReLU-conv3x3 twice around a shortcut; where the width changes, the shortcut reads the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes_width = in_channels != out_channels
        self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes_width else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        out = F.relu(self.bn2(self.conv1(activated)))
        return self.conv2(out) + shortcut


class WideStage(nn.Module):
    """A chain of blocks; a module of its own for the published key names (`block1.layer.0...`)."""

    def __init__(self, depth: int, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        first = WideBlock(in_channels, out_channels, stride)
        self.layer = nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _normalise_once_more(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """`bn(x)` without a second update of the running statistics: the network normalises this very map itself."""
    if not bn.training:
        return bn(x)
    if is_synchronised(bn):
        mean, variance, _ = total_moments(x)
        return normalise(x, bn, (mean, variance))
    return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)


class WideResNet(Backbone):
    shows_preactivations = True
    trunk = ("conv1", "block1", "block2")
    head = ("bn1",)

    def __init__(self, depth: int, width: int, num_classes: int = 100):
        super().__init__()
        blocks_per_stage = (depth - 4) // 6
        channels = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.block1 = WideStage(blocks_per_stage, channels[0], channels[1], stride=1)
        self.block2 = WideStage(blocks_per_stage, channels[1], channels[2], stride=2)
        self.block3 = WideStage(blocks_per_stage, channels[2], channels[3], stride=2)
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)
        self.initialise()

    def initialise(self):
        initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward_trunk(self, x, preact=False):
        *bns, _ = self.get_bn_before_relu()
        x = self.conv1(x)
        maps = [x]
        for stage, bn in zip((self.block1, self.block2), bns, strict=True):
            x = stage(x)
            maps.append(_normalise_once_more(bn, x) if preact else x)
        return maps, x

    def forward_last_stage(self, x, preact=False):
        x = self.block3(x)
        return _normalise_once_more(self.bn1, x) if preact else x, x

    def activate(self, final):
        return F.relu(self.bn1(final))

    def get_classifier(self):
        return self.fc

    def get_bn_before_relu(self):
        return [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]

    def get_feat_modules(self):
        return nn.ModuleList([self.conv1, self.block1, self.block2, self.block3])


def wrn_16_1(num_classes=100):
    return WideResNet(16, 1, num_classes)


def wrn_16_2(num_classes=100):
    return WideResNet(16, 2, num_classes)


def wrn_40_1(num_classes=100):
    return WideResNet(40, 1, num_classes)


def wrn_40_2(num_classes=100):
    return WideResNet(40, 2, num_classes)

"""ResNets: CIFAR's (He et al., CVPR 2016, section 4.2), RepDistiller's CIFAR ResNet50, torchvision's ImageNet ones.

One class: the families differ in the stem, the block, the widths and the depths only. Parameter names are those of
torchvision; RepDistiller's ResNet50 says `shortcut` and `linear` for `downsample` and `fc` (models/checkpoints.py).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, forward_stage, initialise


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class _Block(nn.Module):
    """A residual block; `preactivation` is its sum, `forward` the sum after the ReLU."""

    def preactivation(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.preactivation(x))


class BasicBlock(_Block):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def preactivation(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x)) + residual


class Bottleneck(_Block):
    expansion = 4
    shortcut_name = "downsample"  # torchvision's

    def __init__(self, in_channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        setattr(self, self.shortcut_name, _shortcut(in_channels, width * self.expansion, stride))

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def preactivation(self, x):
        shortcut = getattr(self, self.shortcut_name)
        residual = x if shortcut is None else shortcut(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x)) + residual


class RepDistillerBottleneck(Bottleneck):
    shortcut_name = "shortcut"


class ResNet(Backbone):
    """A residual network with one stage per entry of `depths`; every stage but the first halves the resolution.

    `imagenet_stem` chooses the 7x7 stride-2 convolution with max-pooling over the 3x3 convolution of CIFAR.
    """

    shows_preactivations = True

    def __init__(
        self,
        block: type[_Block],
        depths: Sequence[int],
        widths: Sequence[int],
        stem_width: int,
        num_classes: int = 100,
        imagenet_stem: bool = False,
        classifier: str = "fc",
    ):
        super().__init__()
        if imagenet_stem:
            self.conv1 = nn.Conv2d(3, stem_width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(3, stem_width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet_stem else nn.Identity()
        self._stage_names = [f"layer{number}" for number in range(1, len(depths) + 1)]
        channels = stem_width
        for name, depth, width in zip(self._stage_names, depths, widths, strict=True):
            stride = 1 if name == "layer1" else 2
            blocks = [block(channels, width, stride)]
            channels = width * block.expansion
            blocks += [block(channels, width) for _ in range(depth - 1)]
            setattr(self, name, nn.Sequential(*blocks))
        self.classifier_name = classifier
        setattr(self, classifier, nn.Linear(channels, num_classes))
        self.initialise()

    def initialise(self):
        initialise(self)

    @property
    def trunk(self):
        return ("conv1", "bn1", "pool", *self._stage_names[:-1])

    @property
    def stages(self) -> list[nn.Sequential]:
        return [getattr(self, name) for name in self._stage_names]

    def forward_trunk(self, x, preact=False):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        maps = [x]
        for stage in self.stages[:-1]:
            stage_output, x = forward_stage(stage, x, preact)
            maps.append(stage_output)
        return maps, x

    def forward_last_stage(self, x, preact=False):
        return forward_stage(self.stages[-1], x, preact)

    def get_classifier(self):
        return getattr(self, self.classifier_name)

    def get_bn_before_relu(self):
        return [stage[-1].last_bn for stage in self.stages]

    def get_feat_modules(self):
        return nn.ModuleList([self.conv1, self.bn1, *self.stages])


def _cifar(depth: int, widths: Sequence[int], stem_width: int, num_classes: int) -> ResNet:
    blocks_per_stage = (depth - 2) // 6
    return ResNet(BasicBlock, [blocks_per_stage] * 3, widths, stem_width, num_classes)


def resnet8(num_classes=100):
    return _cifar(8, (16, 32, 64), 16, num_classes)


def resnet14(num_classes=100):
    return _cifar(14, (16, 32, 64), 16, num_classes)


def resnet20(num_classes=100):
    return _cifar(20, (16, 32, 64), 16, num_classes)


def resnet32(num_classes=100):
    return _cifar(32, (16, 32, 64), 16, num_classes)


def resnet44(num_classes=100):
    return _cifar(44, (16, 32, 64), 16, num_classes)


def resnet56(num_classes=100):
    return _cifar(56, (16, 32, 64), 16, num_classes)


def resnet110(num_classes=100):
    return _cifar(110, (16, 32, 64), 16, num_classes)


def resnet8x4(num_classes=100):
    return _cifar(8, (64, 128, 256), 32, num_classes)


def resnet32x4(num_classes=100):
    return _cifar(32, (64, 128, 256), 32, num_classes)


def ResNet50(num_classes=100):
    """RepDistiller's ResNet50 for 32x32 images: a 3x3 stride-1 stem, no max-pooling."""
    widths = (64, 128, 256, 512)
    return ResNet(RepDistillerBottleneck, (3, 4, 6, 3), widths, 64, num_classes, classifier="linear")


def resnet18_imagenet(num_classes=1000):
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), 64, num_classes, imagenet_stem=True)


def resnet34_imagenet(num_classes=1000):
    return ResNet(BasicBlock, (3, 4, 6, 3), (64, 128, 256, 512), 64, num_classes, imagenet_stem=True)


def resnet50_imagenet(num_classes=1000):
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), 64, num_classes, imagenet_stem=True)


def resnet50_quarter_imagenet(num_classes=1000):
    """ResNet50-1/4, the student of NORM's Table 6: the stem keeps its 64 channels, the four stages have a quarter of
    their width."""
    return ResNet(Bottleneck, (3, 4, 6, 3), (16, 32, 64, 128), 64, num_classes, imagenet_stem=True)

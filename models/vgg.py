"""VGG with BatchNorm for 32x32 images (Simonyan & Zisserman, ICLR 2015; the five-block form of RepDistiller)."""

from collections.abc import Sequence

from torch import nn
from torch.nn import functional as F

from models.backbone import Backbone, initialise, initialise_linear


def _block(in_channels: int, widths: Sequence[int]) -> nn.Sequential:
    """conv-BN-ReLU per width, without the last ReLU, which the network applies (its input is the pre-activation)."""
    layers = []
    for width in widths:
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        in_channels = width
    return nn.Sequential(*layers[:-1])


class VGG(Backbone):
    """Five blocks; max-pooling after the first three (and after the fourth for images of 64 pixels)."""

    shows_preactivations = True
    trunk = ("block0", "block1", "block2", "block3")

    def __init__(self, block_widths: Sequence[Sequence[int]], num_classes: int = 100):
        super().__init__()
        in_channels = 3
        for number, widths in enumerate(block_widths):
            setattr(self, f"block{number}", _block(in_channels, widths))
            in_channels = widths[-1]
        self.classifier = nn.Linear(in_channels, num_classes)
        self.initialise()

    def initialise(self):
        initialise(self)
        initialise_linear(self.classifier)

    @property
    def blocks(self) -> list[nn.Sequential]:
        return [self.block0, self.block1, self.block2, self.block3, self.block4]

    def forward_trunk(self, x, preact=False):
        pools_fourth = x.shape[2] == 64
        x = F.relu(self.block0(x))
        # RepDistiller's first entry stays behind its ReLU also in the list of pre-activations.
        maps = [x]
        for block in (self.block1, self.block2, self.block3):
            before_relu = block(F.max_pool2d(x, 2))
            x = F.relu(before_relu)
            maps.append(before_relu if preact else x)
        return maps, F.max_pool2d(x, 2) if pools_fourth else x

    def forward_last_stage(self, x, preact=False):
        before_relu = self.block4(x)
        x = F.relu(before_relu)
        return before_relu if preact else x, x

    def get_classifier(self):
        return self.classifier

    def get_bn_before_relu(self):
        return [self.block1[-1], self.block2[-1], self.block3[-1], self.block4[-1]]

    def get_feat_modules(self):
        return nn.ModuleList(self.blocks)


def vgg8(num_classes=100):
    return VGG(([64], [128], [256], [512], [512]), num_classes)


def vgg11(num_classes=100):
    return VGG(([64], [128], [256] * 2, [512] * 2, [512] * 2), num_classes)


def vgg13(num_classes=100):
    return VGG(([64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2), num_classes)


def vgg16(num_classes=100):
    return VGG(([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3), num_classes)


def vgg19(num_classes=100):
    return VGG(([64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4), num_classes)

"""MobileNetV1 for ImageNet (Howard et al., 2017), with the parameter names of the official NORM code."""

from torch import nn
from torch.nn import functional as F

from models.backbone import Backbone, initialise

# (output channels, stride) of the depthwise-separable blocks; each inner tuple ends where a stage does.
STAGES = (
    ((64, 1), (128, 2), (128, 1)),
    ((256, 2), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class MobileNetV1(Backbone):
    """The published names split the chain in two: `model1` (stem and stages 1-3) and `model2` (stage 4)."""

    shows_preactivations = True
    trunk = ("model1",)

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        channels, chain, self._stage_ends = 32, [_convolution(3, 32, 2)], []
        for stage in STAGES:
            for out_channels, stride in stage:
                chain.append(_separable(channels, out_channels, stride))
                channels = out_channels
            self._stage_ends.append(len(chain) - 1)
        last_stage = len(chain) - len(STAGES[-1])
        self.model1 = nn.Sequential(*chain[:last_stage])
        self.model2 = nn.Sequential(*chain[last_stage:])
        self.fc = nn.Linear(channels, num_classes)
        self.initialise()

    def initialise(self):
        initialise(self)

    def forward_trunk(self, x, preact=False):
        maps = []
        for number, block in enumerate(self.model1):
            before_relu = block[:-1](x)
            x = F.relu(before_relu)
            if number == 0 or number in self._stage_ends:
                maps.append(before_relu if preact and number > 0 else x)
        return maps, x

    def forward_last_stage(self, x, preact=False):
        before_relu = self.model2[-1][:-1](self.model2[:-1](x))
        x = F.relu(before_relu)
        return before_relu if preact else x, x

    def get_classifier(self):
        return self.fc

    def get_bn_before_relu(self):
        blocks = [*self.model1, *self.model2]
        return [blocks[end][-2] for end in self._stage_ends]

    def get_feat_modules(self):
        return nn.ModuleList([self.model1, self.model2])

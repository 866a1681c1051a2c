"""BatchNorms folded into convolutions: the same outputs, fewer operations, and only where it is allowed."""

import pytest
import torch
from torch import nn

from models import build_model
from models.backbone import Backbone
from models.folding import fold_batch_norms

#: Network -> BatchNorms that stay, because something else reads what they read too.
REMAINING = {"resnet20": 0, "ResNet50": 0, "vgg13": 0, "MobileNetV2": 0, "ShuffleV1": 0, "ShuffleV2": 0, "wrn_16_2": 7}


def with_statistics(network: nn.Module) -> nn.Module:
    """Running statistics and weights as after some training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.double().eval()


def count_batch_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", REMAINING)
@torch.no_grad()
def test_folded_networks_show_the_same(name):
    network = with_statistics(build_model(name, 10))
    state = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold_batch_norms(network, 32)
    assert count_batch_norms(folded) == REMAINING[name]
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for preact in (False, True):
        ours, theirs = folded.outputs(images, preact), network.outputs(images, preact)
        for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.abs().max()))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())


class Shared(Backbone):
    """A convolution whose output is read by its BatchNorm and, as `reader` says, by something else."""

    def __init__(self, reader: str):
        super().__init__()
        self.reader = reader
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward_maps(self, x, preact=False):
        convolved = self.conv(x)
        normalised = self.bn(convolved)
        if self.reader == "a sum":
            normalised = normalised + convolved
        maps = [convolved if self.reader == "a method" else normalised]
        return maps, normalised

    def get_classifier(self):
        return self.fc


@pytest.mark.parametrize(("reader", "remaining"), [("nothing", 0), ("a sum", 1), ("a method", 1)])
def test_a_convolution_that_is_read_elsewhere_is_left_alone(reader, remaining):
    assert count_batch_norms(fold_batch_norms(with_statistics(Shared(reader)), 8)) == remaining


class ActiveBatchNorm(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d`: with the activation inside."""

    def forward(self, input):
        return super().forward(input).relu()


class Twice(Backbone):
    """One convolution that is called twice, each time with a BatchNorm of its own behind it."""

    def __init__(self, kind=nn.BatchNorm2d, calls=2):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(kind(4) for _ in range(calls))
        self.fc = nn.Linear(4, 10)

    def forward_maps(self, x, preact=False):
        x = self.first(x)
        for norm in self.norms:
            x = norm(self.conv(x))
        return [x], x

    def get_classifier(self):
        return self.fc


@pytest.mark.parametrize("network", [Twice(), Twice(ActiveBatchNorm, 1)])
@torch.no_grad()
def test_what_is_more_than_one_convolution_and_its_batch_norm_is_left_alone(network):
    network, images = with_statistics(network), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = fold_batch_norms(network, 8)
    assert torch.allclose(folded.outputs(images).logits, network.outputs(images).logits)
    assert count_batch_norms(folded) == len(network.norms)

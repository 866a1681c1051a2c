"""Dropout and drop path of foreign networks: the layers that a rate reaches, and networks that have none."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from errors import UserError
from models import build_model


def rates(name: str, kind: type[nn.Module], attribute: str, **drops: float) -> list[float]:
    network = build_model(name, 10, 32, drops)
    return [getattr(layer, attribute) for layer in network.modules() if isinstance(layer, kind)]


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout_of_torchvision_has_the_rate(rate):
    assert rates("torchvision:mobilenet_v2", nn.Dropout, "p", drop_rate=rate) == [rate]


@pytest.mark.slow
def test_stochastic_depth_grows_with_the_depth_up_to_the_rate():
    own = rates("torchvision:efficientnet_b0", StochasticDepth, "p")
    found = rates("torchvision:efficientnet_b0", StochasticDepth, "p", drop_path_rate=0.3)
    assert found[-1] == max(found) == pytest.approx(0.3)
    assert found == pytest.approx([0.3 * rate / own[-1] for rate in own])
    dropout = rates("torchvision:efficientnet_b0", nn.Dropout, "p", drop_path_rate=0.3)
    assert dropout == rates("torchvision:efficientnet_b0", nn.Dropout, "p")


@pytest.mark.slow
def test_drops_of_timm_have_the_rate():
    assert rates("timm:resnet10t", DropPath, "drop_prob", drop_path_rate=0.3)[-1] == pytest.approx(0.3)
    assert not rates("timm:resnet10t", DropPath, "drop_prob", drop_rate=0.3)
    network = build_model("timm:resnet10t", 10, 32, {"drop_rate": 0.5}).train()
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


@pytest.mark.parametrize(
    ("name", "drop", "message"),
    [
        ("resnet8", "drop_rate", "--drop_rate: resnet8 has no dropout; only networks of torchvision and timm have"),
        ("torchvision:resnet18", "drop_rate", "--drop_rate: torchvision:resnet18 has no dropout"),
        ("torchvision:mobilenet_v2", "drop_path_rate", "--drop_path_rate: torchvision:mobilenet_v2 has no stochastic"),
        ("timm:vgg11", "drop_path_rate", "--drop_path_rate: timm:vgg11 drops nothing of this kind"),
    ],
)
def test_a_network_that_drops_nothing_is_refused(name, drop, message):
    with pytest.raises(UserError, match=message):
        build_model(name, 10, 32, {drop: 0.1})

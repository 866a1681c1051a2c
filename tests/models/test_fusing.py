"""Activations and sums inside convolutions: the same outputs, fewer operations, and only where it is allowed."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import build_model
from models.backbone import Backbone
from models.folding import fold_batch_norms
from models.fusing import Fused, FusedConvolution, fuse_activations
from tests.models.test_folding import with_statistics

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
#: Network -> (fused convolutions, those whose sum takes the place of the other map).
FUSED = {"resnet20": (19, 8), "wrn_16_1": (12, 2), "vgg8": (5, 0), "ShuffleV2": (37, 0), "MobileNetV2": (46, 10)}


def fuse(network: Backbone) -> Backbone:
    return fuse_activations(network, IMAGES, nullcontext)


def convolutions(network: Backbone, preact: bool = False) -> list[FusedConvolution]:
    graph = network.graphs[str(preact)]
    return [layer for layer in graph.modules() if isinstance(layer, FusedConvolution)]


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_fused_networks_show_the_same(name):
    network = fold_batch_norms(with_statistics(build_model(name, 10)).float(), 32)
    fused = fuse(network)
    layers = convolutions(fused)
    assert (len(layers), sum(layer.overwrites for layer in layers)) == FUSED[name]
    images = torch.randn(3, 3, 32, 32)  # not as many as it was traced with
    for preact in (False, True):
        expected, found = network.outputs(images, preact), fused.outputs(images, preact)
        for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


class Case(Backbone):
    """One convolution after another, added in a way that `add` chooses."""

    shows_preactivations = False

    def __init__(self, add):
        super().__init__()
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.fc, self.add = nn.Linear(3, 2), add

    def forward_maps(self, x, preact=False):
        final = self.add(self, self.first(x), x)
        return [final], final

    def get_classifier(self):
        return self.fc


def read_by_its_convolution(case, first, x):
    return F.relu(case.second(first) + first)


def read_later(case, first, x):
    total = F.relu(case.second(x) + first)
    return total + case.second(first)


def read_before(case, first, x):
    return F.relu(case.second(x) + first)


def seen_through_a_view(case, first, x):
    flat = first.flatten(1)
    total = F.relu(case.second(x) + first)
    return total * flat.mean()


@pytest.mark.parametrize(
    ("add", "overwrites"),
    [(read_by_its_convolution, False), (read_later, False), (read_before, True), (seen_through_a_view, False)],
)
@torch.no_grad()
def test_a_sum_takes_the_place_of_a_map_that_nothing_reads_any_more(add, overwrites):
    network = Case(add).eval()
    fused = fuse(network)
    assert isinstance(fused, Fused) and convolutions(fused)[0].overwrites == overwrites
    assert torch.allclose(fused.outputs(IMAGES).final, network.outputs(IMAGES).final, atol=1e-5)


def decided_by_values(case, first, x):
    return first if first.mean() > 0 else x


def test_what_cannot_be_traced_or_computes_something_else_is_left_as_it_is(monkeypatch):
    network = Case(decided_by_values).eval()
    assert fuse(network) is network
    network = Case(read_before).eval()
    monkeypatch.setattr(FusedConvolution, "_by_onednn", lambda self, x, other: x)
    assert fuse(network) is network

"""FSP: flows between layers."""

import torch
from torch.nn import functional as F

from distiller_zoo.fsp import flow
from tests.distiller_zoo.helpers import random_maps


def test_a_flow_is_the_mean_product_of_two_layers():
    lower, upper = random_maps((2, 3, 8, 8), (2, 5, 4, 4))
    pooled = F.avg_pool2d(lower, 2)
    expected = torch.tensor([[[(u * low).mean() for low in b] for u in a] for a, b in zip(upper, pooled, strict=True)])
    assert flow(lower, upper).shape == (2, 5, 3)
    assert torch.allclose(flow(lower, upper), expected.double())
    assert torch.allclose(flow(upper, lower).mT, expected.double())  # the larger may be the upper one

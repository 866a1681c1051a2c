"""PKT: probabilities."""

import torch
from torch.nn import functional as F

from distiller_zoo.pkt import neighbour_probabilities


def test_rounding_makes_no_negative_probabilities():
    passed = False
    for scale in torch.linspace(0.05, 3, 60):
        vectors = scale * torch.rand(1, 3000) * torch.tensor([[1.0], [-1.0]])
        directions = F.normalize(vectors)
        passed |= bool((directions @ directions.T).min() < -1)
        assert neighbour_probabilities(vectors).min() >= 0
    assert passed, "no cosine was below -1: the test shows nothing"

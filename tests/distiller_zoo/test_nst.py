"""NST: its kernel by channels and by pixels."""

import pytest
import torch

from tests.distiller_zoo.helpers import value_and_gradient
from tests.distiller_zoo.plain import OF_MAPS, plain_nst


@pytest.mark.parametrize("size", [1, 2, 3])
def test_nst_is_one_number_by_channels_and_by_pixels(size):
    student, teacher = torch.randn(2, 6, size, size).double(), torch.randn(2, 8, size, size).double()
    value, gradient = value_and_gradient(OF_MAPS["nst"], student, teacher)
    expected, expected_gradient = value_and_gradient(plain_nst, student, teacher)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-14)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-8, atol=1e-13)

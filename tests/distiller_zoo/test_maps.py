"""What the methods share on maps: unit vectors, pairs that do not fit."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo.fsp import FSP
from distiller_zoo.hint import ConvReg
from distiller_zoo.kdsvd import KDSVD
from distiller_zoo.maps import unit_vectors


def test_unit_vectors_are_those_of_normalize_and_zero_stays_zero():
    vectors = torch.randn(3, 4, 5).double()
    assert torch.allclose(unit_vectors(vectors, 1), F.normalize(vectors, dim=1), rtol=1e-15)
    zero = torch.zeros(2, 3, requires_grad=True)
    unit = unit_vectors(zero, 1)
    unit.sum().backward()
    assert not unit.any() and not zero.grad.any()


def test_kdsvd_of_tiny_maps_is_that_of_maps():
    student, teacher = ([torch.randn(2, 3, 4, 4) for _ in range(2)] for _ in range(2))
    expected = torch.stack(KDSVD()(student, teacher))
    tiny = [(1e-20 * feature_map).requires_grad_() for feature_map in student]
    found = torch.stack(KDSVD()(tiny, teacher))
    found.sum().backward()
    assert torch.allclose(found, expected, rtol=1e-4)
    assert all(feature_map.grad.isfinite().all() for feature_map in tiny)


@pytest.mark.parametrize(
    "make", [lambda: FSP([(4, 8, 8)] * 2, [(5, 8, 8)] * 2), lambda: ConvReg((2, 4, 4, 4), (2, 4, 9, 9))]
)
def test_networks_that_do_not_fit_are_a_value_error_too(make):
    with pytest.raises(ValueError):
        make()

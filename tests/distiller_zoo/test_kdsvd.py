"""KDSVD: decompositions, signs, gradients."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo.kdsvd import KDSVD, align, decompose, first_vectors, with_positive_peaks
from tests.distiller_zoo.helpers import close, random_maps
from tests.distiller_zoo.plain import SVD_SHAPES, plain_kdsvd


@pytest.mark.parametrize("k", [1, 2])
def test_kdsvd_is_the_whole_decomposition_whatever_the_shape(k):
    teacher, student = random_maps(*SVD_SHAPES), [each.requires_grad_() for each in random_maps(*SVD_SHAPES)]
    ours, plain = KDSVD(k)(student, teacher), plain_kdsvd(student, teacher, k)
    close(ours, plain)
    gradients = [torch.autograd.grad(sum(losses), student) for losses in (ours, plain)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
        assert a.abs().max() > 1e-5


def test_kdsvd_does_not_depend_on_signs():
    teacher, student = random_maps(*SVD_SHAPES), random_maps(*SVD_SHAPES)
    golden = KDSVD()(student, teacher)
    for number in range(len(teacher)):
        for maps in (teacher, student):
            maps[number] = -maps[number]
            close(KDSVD()(student, teacher), golden)
    # Relative signs matter to the formula, so there is something not to depend on.
    assert abs(plain_kdsvd(student, teacher, signs=(1, -1, 1, 1))[0] - golden[0]) > 1e-3 * golden[0]


def test_decompositions_fall_and_leave_missing_vectors_empty():
    for shape in ((2, 9, 4), (2, 4, 9)):
        matrices = torch.randn(shape, dtype=torch.float64)
        matrices[1] = matrices[1, :, :1] @ matrices[1, :1]  # rank 1
        squares, vectors = decompose(matrices)
        close(squares[0].sqrt(), torch.linalg.svdvals(matrices[0]))
        assert torch.allclose(vectors[0].T @ vectors[0], torch.eye(4, dtype=torch.float64))
        direction = F.normalize(matrices[1, 0], dim=0)
        assert abs(vectors[1, :, 0] @ direction).item() == pytest.approx(1)
        assert not vectors[1, :, 1:].any() and not squares[1, 1:].any()


def test_the_students_vector_is_the_closest_and_turned_towards_the_teachers():
    directions = torch.eye(3, dtype=torch.float64)[None]
    teacher = torch.tensor([0.1, -0.9, 0.4], dtype=torch.float64)[None, :, None]
    assert torch.equal(align(directions, teacher), torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)[None, :, None])
    assert torch.equal(with_positive_peaks(teacher), -teacher)


@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 4, 9)])
def test_singular_vectors_have_their_derivative(shape):
    (matrices,) = random_maps(shape)
    assert torch.autograd.gradcheck(
        lambda value: with_positive_peaks(first_vectors(value, 2)[1]), matrices.requires_grad_()
    )


def test_equal_singular_values_leave_a_finite_gradient():
    """One of the two equal values moves away: only what is determined is in the gradient."""
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    values = torch.tensor([3.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    matrices = (basis[:, :4] * values @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0])[None]
    matrices.requires_grad_()
    _, vectors = first_vectors(matrices, 4)
    (gradient,) = torch.autograd.grad((vectors * torch.randn_like(vectors)).sum(), matrices)
    assert torch.isfinite(gradient).all() and 1e-3 < gradient.abs().max() < 1e3
    # The first vector is determined, and has its whole gradient.
    assert torch.autograd.gradcheck(lambda value: with_positive_peaks(first_vectors(value, 1)[1]), matrices)


def test_maps_that_are_not_finite_give_a_loss_that_is_not():
    """So that the run is stopped by the check that names the term."""
    student, teacher = random_maps((2, 3, 4, 4), (2, 3, 4, 4))
    student[0, 0, 0, 0] = torch.nan
    (loss,) = KDSVD()([student] * 2, [teacher] * 2)
    assert loss.isnan()

"""RKD: its two weights, angles of images that are close."""

import pytest
import torch

from distiller_zoo.rkd import RKDLoss, pairwise_distances, triangle_cosines
from tests.check_values import g
from tests.distiller_zoo.helpers import build
from tests.distiller_zoo.plain import plain_rkd

ES, ET = g((4, 12), 0.37, 0.2), g((4, 12), 0.83, 1.1)


def test_the_angles_are_exact_in_float32_where_images_are_close():
    centre = torch.rand(1, 64) + 5
    student, teacher = centre + 1e-2 * torch.randn(8, 64), torch.rand(8, 64)
    value = RKDLoss()(student, teacher)
    assert value.item() == pytest.approx(plain_rkd(student.double(), teacher.double()).item(), rel=1e-4)


def rkd_value(**weights):
    _, method = build("rkd", **weights)
    return method.criterion(ES, ET).item()


def test_the_weights_of_rkd_scale_distances_and_angles():
    distance, angle = (
        rkd_value(distance_weight=1.0, angle_weight=0.0),
        rkd_value(distance_weight=0.0, angle_weight=1.0),
    )
    assert rkd_value() == pytest.approx(25 * distance + 50 * angle)
    assert rkd_value(distance_weight=3.0) == pytest.approx(3 * distance + 50 * angle)


def test_angles_of_images_that_are_almost_the_same_stay_angles():
    vectors = torch.randn(8, 16)
    vectors[0] = 0
    vectors[1] = 1e-9 * torch.randn(16)
    cosines = triangle_cosines(pairwise_distances(vectors))
    assert cosines.abs().max() <= 1

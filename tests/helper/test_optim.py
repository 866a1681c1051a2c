"""Learning rates: pure functions of the epoch, those of the published runs."""

import pytest

from helper.optim import cosine_learning_rate, step_learning_rate


def test_learning_rates_are_those_of_the_recipe():
    rates = [step_learning_rate(0.05, epoch, (150, 180, 210), 0.1) for epoch in (1, 150, 151, 180, 181, 210, 211, 240)]
    assert rates == pytest.approx([0.05, 0.05, 5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5])
    assert cosine_learning_rate(0.1, 0, 10, 100) == 0.1
    assert cosine_learning_rate(0.1, 5, 10, 10**9) == pytest.approx(0.05)


def test_the_cosine_never_rises_again():
    for steps in (1, 2, 5):
        rates = [cosine_learning_rate(0.1, epoch, 100, steps) for epoch in range(100)]
        assert rates == sorted(rates, reverse=True)

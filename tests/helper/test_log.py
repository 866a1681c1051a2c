"""The lines of the log."""

import pytest

from helper.log import format_result


@pytest.mark.parametrize(
    ("epochs", "mean"),
    [(1, ""), (3, ", mean of the last 3 epochs 40.00 %"), (5, ", mean of the last five epochs 40.00 %")],
)
def test_the_mean_is_of_the_epochs_that_there_were(epochs, mean):
    result = {"accuracy_last": 40.0, "accuracy_best": 50.0, "best_epoch": 1, "protocol": "best on test"}
    line = format_result(result | {"epochs": epochs, "accuracy_mean_last_five": 40.0})
    assert line == f"test accuracy: last 40.00 %, best 50.00 % (epoch 1, best on test){mean}"

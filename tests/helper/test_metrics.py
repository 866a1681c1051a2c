"""What is measured on a split, and the best epoch by it."""

import math

import pytest
import torch

from helper.metrics import BEST_BY, METRICS, best_epoch


def test_means_over_classes_count_every_class_alike():
    logits = torch.eye(3)[torch.tensor([0, 0, 0, 0, 1, 0])]  # four of class 0, two of class 1, of which one is right
    targets = torch.tensor([0, 0, 0, 0, 1, 1])
    assert METRICS["balanced_accuracy"].measure(logits, targets) == pytest.approx(75)
    assert METRICS["macro_f1"].measure(logits, targets) == pytest.approx(50 * (8 / 9 + 2 / 3))
    logits[0] = torch.eye(3)[2]  # a class that no image has
    assert METRICS["balanced_accuracy"].measure(logits, targets) == pytest.approx(100 * (3 / 4 + 1 / 2) / 2)


def test_the_best_epoch_is_by_its_metric_on_the_held_out_images():
    records = [
        {"test_accuracy": 90.0, "test_loss": 0.2, "test_macro_f1": 1.0},
        {"test_accuracy": 95.0, "test_loss": math.inf, "test_macro_f1": 3.0},
        {"test_accuracy": 95.0, "test_loss": 0.1, "test_macro_f1": 2.0},
    ]
    assert [best_epoch(records, name) for name in ("accuracy", "loss", "macro_f1")] == [2, 3, 2]
    held_out = [record | {"holdout_accuracy": 50.0 - number} for number, record in enumerate(records)]
    assert best_epoch(held_out, "accuracy") == 1
    assert best_epoch([{"test_accuracy": 1.0, "test_loss": math.nan}], "loss") == 1
    assert BEST_BY == ("accuracy", "balanced_accuracy", "macro_f1", "loss")

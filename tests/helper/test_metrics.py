"""What is measured on a split, and the best epoch by it."""

import math

import pytest
import torch

from helper.metrics import BEST_BY, METRICS, best_epoch, summarise


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


def test_a_run_is_summed_up_by_its_last_its_best_and_its_last_five_epochs():
    accuracies = (10.0, 90.0, 30.0, 40.0, 50.0, 60.0, 20.0)
    records = [{"test_accuracy": value} for value in accuracies]
    expected = {"accuracy_last": 20.0, "accuracy_best": 90.0, "accuracy_mean_last_five": 40.0, "best_epoch": 2}
    assert summarise(records, 2) == expected
    averaged = [record | {"test_accuracy_ema": record["test_accuracy"] + 1} for record in records]
    assert summarise(averaged, 2) == expected | {"accuracy_last_ema": 21.0, "accuracy_best_ema": 91.0}

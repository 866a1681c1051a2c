"""Accuracies that papers report, each with its source; what is not here is not known to this repository.

Our means are next to them in the reports (scripts/report.py).
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from helper.recipes import PUBLISHED_TEACHERS


class Published(NamedTuple):
    """A mean test accuracy (%) of a paper, and with which of our accuracies it compares."""

    accuracy: float
    source: str
    compared: str = "accuracy_last"  # a key of result.json: what the authors report, the last epoch or the best on test
    runs: int = 1  # how many runs the mean is of; 1 where that is not known


#: How many test images the values of a data set are of; another folder may be given for ImageNet.
TEST_IMAGES = {"cifar100": 10_000, "imagenet": 50_000}
_NORM = "Liu et al., ICLR 2023 (README of its code, Table 1)"
#: (data set, teacher, student, method with the flags that make it another row) -> what is published.
PUBLISHED = {
    # The official script runs three trials; its code reports the best epoch on the test images.
    ("cifar100", "resnet32x4", "resnet8x4", "norm"): Published(76.49, _NORM, "accuracy_best", 3),
    ("cifar100", "ResNet50", "MobileNetV2", "norm"): Published(70.56, _NORM, "accuracy_best", 3),
    # RepDistiller and the CRD paper report the last epoch.
    ("cifar100", "resnet56", "resnet20", "kd"): Published(70.66, "Tian et al., ICLR 2020"),
    ("cifar100", None, "MobileNetV2", "ce"): Published(64.60, "Tian et al., ICLR 2020"),
    # mdistiller reports the best epoch; DKD is a mean of five.
    ("cifar100", "resnet32x4", "resnet8x4", "dkd"): Published(76.32, "Zhao et al., CVPR 2022", "accuracy_best", 5),
    ("cifar100", "ResNet50", "MobileNetV2", "reviewkd"): Published(69.89, "Chen et al., CVPR 2021", "accuracy_best"),
    # The official code's teacher scores 76.94 instead of the table's 76.16 and was never released.
    ("imagenet", "resnet50", "MobileNet", "norm"): Published(74.26, "Liu et al., ICLR 2023", "accuracy_best"),
    ("imagenet", "resnet34", "resnet18", "crd"): Published(71.17, "Tian et al., ICLR 2020"),
    ("imagenet", "resnet34", "resnet18", "sskd"): Published(71.62, "Xu et al., ECCV 2020"),
    ("imagenet", "resnet34", "resnet18", "dist"): Published(72.07, "Huang et al., NeurIPS 2022"),
    ("imagenet", "resnet34", "resnet18", "reviewkd"): Published(71.61, "Chen et al., CVPR 2021"),
    **{
        (dataset, None, network, "ce"): Published(accuracy, "RepDistiller's downloadable teacher")
        for (dataset, network), accuracy in PUBLISHED_TEACHERS.items()
    },
}


def judge(published: Published, accuracies: Sequence[float]) -> str:
    """Whether our mean lies within the band of the published one: "within", "below", "above", or why that is open.

    The band is as far as seeds alone carry the difference of two such means in 95 of 100 cases (two-sided t-test), if
    the paper's runs scatter as ours do.
    """
    n = len(accuracies)
    if n < 2:
        return "one seed"
    from scipy.stats import t

    spread = statistics.stdev(accuracies) * math.sqrt(1 / n + 1 / published.runs)
    difference = statistics.mean(accuracies) - published.accuracy
    if abs(difference) <= t.ppf(0.975, n - 1) * spread:
        return "within"
    return "below" if difference < 0 else "above"

"""What is measured: of a split's logits, of two networks' maps, and of an epoch while it is trained."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from helper.distributed import count_processes, is_main, total_of

#: Of the linear probe, at most; and images that the nearest neighbours' vote counts, as DINO's evaluation does (Caron
#: et al., ICCV 2021).
PROBE_ITERATIONS, NEIGHBOURS = 1000, 20


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Top-1 accuracy (%) of logits (n, K) against classes (n,)."""
    return 100 * int((logits.argmax(1) == targets).sum()) / len(targets)


def accuracy_top5(logits: Tensor, targets: Tensor) -> float | None:
    """Top-5 accuracy (%); None with up to 5 classes, where it would always be 100."""
    right = _in_top5(logits, targets)
    return None if right is None else 100 * int(right.sum()) / len(targets)


def _in_top5(logits: Tensor, targets: Tensor) -> Tensor | None:
    return None if logits.shape[1] <= 5 else (logits.topk(5, 1).indices == targets[:, None]).any(1)


def loss(logits: Tensor, targets: Tensor) -> float:
    """Mean cross entropy."""
    return float(F.cross_entropy(logits.double(), targets))


def balanced_accuracy(logits: Tensor, targets: Tensor) -> float:
    """The mean over the classes of the share of their images that is right (%)."""
    from sklearn.metrics import recall_score  # here, as it takes long to import

    recalls: Any = recall_score(
        targets,
        logits.argmax(1),
        labels=targets.unique(),
        average=None,  # pyright: ignore[reportArgumentType]
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    return 100 * float(recalls.mean())


def macro_f1(logits: Tensor, targets: Tensor) -> float:
    """The mean over the classes of the F1 score (%)."""
    from sklearn.metrics import f1_score

    score = f1_score(targets, logits.argmax(1), average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
    return 100 * float(score)


def _lower(value: float) -> float:
    return -value if math.isfinite(value) else -math.inf


class Metric(NamedTuple):
    """What is measured on the images of a whole split, and how it is shown."""

    measure: Callable[[Tensor, Tensor], float | None]  # logits (n, K), classes (n,); None: it says nothing of such data
    title: str
    unit: str = " %"
    decimals: int = 2
    goodness: Callable[[float], float] | None = None  # larger for a better epoch; None: the best is not chosen by it


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, "accuracy", goodness=float),
    "accuracy_top5": Metric(accuracy_top5, "top-5 accuracy"),
    "balanced_accuracy": Metric(balanced_accuracy, "balanced accuracy", goodness=float),
    "macro_f1": Metric(macro_f1, "macro F1", goodness=float),
    "loss": Metric(loss, "loss", "", 4, goodness=_lower),
}
#: What the best epoch may be chosen by.
BEST_BY = tuple(name for name, metric in METRICS.items() if metric.goodness is not None)


def measure_all(logits: Tensor, targets: Tensor) -> dict[str, float | None]:
    """Every one of `METRICS`, given logits (n, K) and classes (n,)."""
    return {name: metric.measure(logits, targets) for name, metric in METRICS.items()}


def best_epoch(records: Sequence[Mapping[str, float]], metric: str) -> int:
    """The number of the best epoch, from 1, by a metric on the held-out images, or the test images where there are
    none; the first of equals."""
    values = [record.get(f"holdout_{metric}", record.get(f"test_{metric}")) for record in records]
    goodness = METRICS[metric].goodness or float
    found = [goodness(math.nan if value is None else value) for value in values]
    return found.index(max(found)) + 1


def summarise(records: Sequence[Mapping[str, float]], best: int) -> dict[str, Any]:
    """The test accuracies (%) of a run with labels, of the moving average too where it was tested, and the number of
    its best epoch, for `result.json`."""
    last, chosen, last_five = records[-1], records[best - 1], [one["test_accuracy"] for one in records[-5:]]
    summary: dict[str, Any] = {
        "accuracy_last": last["test_accuracy"],
        "accuracy_best": chosen["test_accuracy"],
        "accuracy_mean_last_five": sum(last_five) / len(last_five),
    }
    if "test_accuracy_ema" in last:
        summary |= {
            f"accuracy_{when}_ema": one["test_accuracy_ema"] for when, one in (("last", last), ("best", chosen))
        }
    return summary | {"best_epoch": best}


def probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How well features (n, D) tell classes (n,) apart, on others than they are fitted to: the accuracies (%) of a
    linear probe (logistic regression of standardised features) and of the nearest neighbours by cosine."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, classes = (part.numpy() for part in train)
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_ITERATIONS))
    nearest = KNeighborsClassifier(min(NEIGHBOURS, len(classes)), metric="cosine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = {"probe": linear.fit(features, classes), "knn": nearest.fit(features, classes)}
    tested = [part.numpy() for part in test]
    return {f"{name}_accuracy": 100 * float(model.score(*tested)) for name, model in fitted.items()}


#: The best epoch of a run without labels has the lowest of these, the first that was measured; a probe only reports, as
#: its accuracy is that of test images.
MATCHING_LOSSES, PROBE_ACCURACIES = ("holdout_matching_loss", "train_matching_loss"), ("probe_accuracy", "knn_accuracy")


def best_without_labels(records: Sequence[Mapping[str, float]]) -> tuple[str, int]:
    """What the epochs of a run without labels are compared by, and the best of them, counted from 1; the first of
    equals."""
    name = next(name for name in MATCHING_LOSSES if name in records[0])
    values = [_lower(record[name]) for record in records]
    return name, values.index(max(values)) + 1


def summarise_without_labels(records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The last and the best value of everything that tells how good such a run is, for `result.json`."""
    name, best = best_without_labels(records)
    summary: dict[str, Any] = {"best_by": name, "best_epoch": best}
    for measured in (*MATCHING_LOSSES, *PROBE_ACCURACIES):
        if measured in records[-1]:
            summary |= {f"{measured}_last": records[-1][measured], f"{measured}_best": records[best - 1][measured]}
    return summary


#: Bins of the confidence, as in Guo et al., ICML 2017.
BINS = 15
#: Resamples of the test images, and the share of them that an interval holds.
RESAMPLES, COVERED = 1000, 0.95


def judge(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """What the logits (n, K) of a split say of a network, given the classes (n,): every one of `METRICS`,
    `calibration`, intervals (name -> [low, high]), confusion (K x K counts, row by row a true class), and
    per_class: images, accuracy (%, recall), precision (%) and f1 (%) of each class.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    labels = range(logits.shape[1])
    true, found = targets.numpy(), logits.argmax(1).numpy()
    measured: Any = precision_recall_fscore_support(
        true,
        found,
        labels=labels,
        zero_division=0,  # pyright: ignore[reportArgumentType]
    )
    precision, recall, f1, images = measured
    columns = [images.tolist(), *((100 * values).tolist() for values in (recall, precision, f1))]
    names = ("images", "accuracy", "precision", "f1")
    losses = F.cross_entropy(logits.double(), targets, reduction="none")
    top5 = _in_top5(logits, targets)
    of_images = {"accuracy": 100.0 * (true == found)}
    of_images |= {} if top5 is None else {"accuracy_top5": 100.0 * top5.numpy()}
    of_images["loss"] = losses.numpy()
    return {
        **measure_all(logits, targets),
        **calibration(logits, targets),
        "intervals": mean_intervals(of_images) | _class_intervals(true, found, len(labels)),
        "confusion": confusion_matrix(true, found, labels=labels).tolist(),
        "per_class": [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)],
    }


def mean_intervals(of_images: Mapping[str, numpy.ndarray]) -> dict[str, list[float]]:
    """Percentile intervals of means over the test images, by bootstrap (Efron & Tibshirani 1993, chapter 13)."""
    generator, found = numpy.random.default_rng(0), {}
    for name, values in of_images.items():
        n = len(values)
        means = [values[generator.integers(0, n, n)].mean() for _ in range(RESAMPLES)]
        found[name] = _interval(means)
    return found


def _class_intervals(true: numpy.ndarray, found: numpy.ndarray, classes: int) -> dict[str, list[float]]:
    """Such intervals of the means over classes. To resample images is to draw how often each (true, found) occurs."""
    pairs, counts = numpy.unique(numpy.stack([true, found]), axis=1, return_counts=True)
    drawn = numpy.random.default_rng(0).multinomial(len(true), counts / len(true), RESAMPLES).astype(float)
    of_true, of_found = (drawn @ numpy.eye(classes)[side] for side in pairs)  # images (resamples, K)
    right = (drawn * (pairs[0] == pairs[1])) @ numpy.eye(classes)[pairs[0]]
    counted = {"balanced_accuracy": of_true, "macro_f1": (of_true + of_found) / 2}
    return {
        name: _interval(100 * (right / count.clip(0.5)).mean(1, where=count > 0)) for name, count in counted.items()
    }


def _interval(values: list[float] | numpy.ndarray) -> list[float]:
    outside = 100 * (1 - COVERED) / 2
    return [float(end) for end in numpy.percentile(values, [outside, 100 - outside])]


def calibration(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """How far confidence (the largest probability) and accuracy are apart (Guo et al., ICML 2017).

    ece: the expected calibration error (%) over `BINS` bins of equal width; reliability: of each bin that holds images
    its limits (0..1), images, mean confidence (%) and accuracy (%).
    """
    confidence, found = logits.double().softmax(1).max(1)
    right = (found == targets).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    bins = []
    for number in place.unique().tolist():
        inside = place == number
        means = {"confidence": confidence[inside].mean(), "accuracy": right[inside].mean()}
        one = {"limits": [number / BINS, (number + 1) / BINS], "images": int(inside.sum())}
        bins.append(one | {name: 100 * float(mean) for name, mean in means.items()})
    gaps = [one["images"] * abs(one["confidence"] - one["accuracy"]) for one in bins]
    return {"ece": sum(gaps) / len(targets), "reliability": bins}


def fidelity(logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """How a student's logits (n, K) compare with its teacher's (Stanton et al., NeurIPS 2021), given classes (n,).

    agreement: images (%) that both give one class; kl: mean KL(teacher || student) of the probabilities, in nats;
    intervals of both; outcomes: images (%) by who is right.
    """
    ours, theirs = logits.argmax(1), teacher_logits.argmax(1)
    same, right, teacher_right = ours == theirs, ours == targets, theirs == targets
    outcomes = {
        "both right": right & teacher_right,
        "only the student right": right & ~teacher_right,
        "only the teacher right": ~right & teacher_right,
        "both wrong, same class": same & ~right,
        "both wrong, different classes": ~same & ~right & ~teacher_right,
    }
    of_images = {"agreement": 100.0 * same.numpy(), "kl": divergences(logits, teacher_logits).numpy()}
    return {
        **{name: float(values.mean()) for name, values in of_images.items()},
        "intervals": mean_intervals(of_images),
        "outcomes": {name: 100 * float(which.double().mean()) for name, which in outcomes.items()},
    }


def divergences(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of every image (n,), in nats, from logits (n, K)."""
    ours, theirs = (values.double().log_softmax(1) for values in (logits, teacher_logits))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


class MinibatchCKA:
    """Linear CKA of two networks' maps over the batches of a split, from HSIC's unbiased estimator.

    Nguyen, Raghu & Kornblith, ICLR 2021, minibatch CKA. It needs batches of four images or more, in random order:
    shorter ones are left out.
    """

    def __init__(self):
        self._sums = torch.zeros(3, dtype=torch.float64)

    def update(self, first: Tensor, second: Tensor) -> None:
        """Count a batch of maps, (B, ...) of any shape each."""
        if len(first) >= 4:
            x, y = (_gram(maps) for maps in (first, second))
            self._sums += torch.stack([_hsic(x, y), _hsic(x, x), _hsic(y, y)]).cpu()

    def value(self) -> float | None:
        """About 0 (unrelated) to 1 (equal up to rotation and scale); None where a map does not vary."""
        both, first, second = self._sums.tolist()
        return both / (first * second) ** 0.5 if first > 0 and second > 0 else None


def _gram(maps: Tensor) -> Tensor:
    """Maps (B, ...) -> products of every two images (B, B), without the diagonal."""
    rows = maps.flatten(1).float()
    rows = rows - rows.mean(0)  # changes no HSIC, and spares rounding
    return (rows @ rows.T).double().fill_diagonal_(0)


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC's unbiased estimator of Gram matrices (B, B) without their diagonals (Song et al., JMLR 2012)."""
    n = len(x)
    total = x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (x.sum(0) @ y.sum(0))
    return ((x * y).sum() + total) / (n * (n - 3))


class EpochMeter:
    """Means over an epoch and all processes, summed on the device: nothing waits for it before `summary` is asked for.

    All processes ask for `summary` and `state` together.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._losses: dict[str, Tensor] = {}  # of every term that there has been
        self._correct, self._images = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.begin()

    def begin(self) -> None:
        """Forget what was counted; sums stay where a captured step writes them."""
        self._terms: set[str] = set()  # of this epoch
        for value in self.kept:
            value.zero_()
        self._has_logits = False
        self._start = time.perf_counter()
        self._data_wait = 0.0

    @property
    def kept(self) -> list[Tensor]:
        """The sums on the device; `update` changes them in place."""
        return [*self._losses.values(), self._correct, self._images]

    def waited(self, seconds: float) -> None:
        """Count time that was spent waiting for a batch."""
        self._data_wait += seconds

    @torch.no_grad()
    def update(self, losses: dict[str, Tensor], logits: Tensor | None, targets: Tensor) -> None:
        """Count one batch: named weighted losses, logits (B, K) if there are any, classes (B,)."""
        values = [value.detach() for value in losses.values()]
        for name, value in zip(losses, values, strict=True):
            if name not in self._losses:
                self._losses[name] = torch.zeros_like(value)
            self._terms.add(name)
        if losses:  # all terms in one operation
            sums = torch._foreach_mul(values, len(targets))  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_([self._losses[name] for name in losses], sums)  # pyright: ignore[reportPrivateImportUsage]
        if logits is not None:
            self._correct += (logits.argmax(1) == targets).sum()
            self._has_logits = True
        self._images += len(targets)

    def state(self) -> dict:
        """What `load_state` restores, in any number of processes."""
        losses, correct, images, data_wait = self._totals()
        seconds = time.perf_counter() - self._start
        return {"losses": losses, "correct": correct, "counts": (images, self._has_logits, data_wait, seconds)}

    def load_state(self, state: dict) -> None:
        images, self._has_logits, self._data_wait, seconds = state["counts"]
        self._start = time.perf_counter() - seconds
        share = 1 if is_main() else 0  # what is over counts once
        self._images.fill_(share * images)
        self._correct.fill_(share * state["correct"])
        self._terms = set(state["losses"])
        for name, value in state["losses"].items():
            self._losses[name] = torch.tensor(share * float(value), device=self._device)

    def _totals(self) -> tuple[dict[str, float], int, int, float]:
        """Sums of losses by name, right predictions, images, and the mean time waited, of all processes."""
        counted = (self._correct, self._images, self._data_wait)
        terms = [name for name in self._losses if name in self._terms]
        *losses, correct, images, data_wait = total_of([*(self._losses[name] for name in terms), *counted])
        losses = dict(zip(terms, losses, strict=True))
        return losses, int(correct), int(images), data_wait / count_processes()

    def summary(self) -> dict[str, float]:
        """Means so far; empty where no step has been counted."""
        totals, correct, images, data_wait = self._totals()
        if not images:
            return {}
        losses = {f"loss_{name}": total / images for name, total in totals.items()}
        accuracy = {"train_accuracy": 100 * correct / images} if self._has_logits else {}
        # The sums above waited for the device, so the clock below covers all the work.
        seconds = time.perf_counter() - self._start
        return {
            "loss": sum(losses.values()),
            **losses,
            **accuracy,
            "images_per_s": images / seconds,
            "data_wait_s": data_wait,
            "compute_s": seconds - data_wait,
        }

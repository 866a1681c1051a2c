"""What is measured while training: weighted losses by name, accuracy, and where the time goes."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dataset import Batch, Loader
from helper.reporting import progress_bar


class EpochMeter:
    """Means over an epoch, summed on the device: nothing waits for it before `summary` is asked for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._losses: dict[str, Tensor] = {}
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._images, self._has_logits = 0, False
        self._start = time.perf_counter()
        self._data_wait = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time spent waiting for them is counted."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self._data_wait += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @torch.no_grad()
    def update(self, losses: dict[str, Tensor], logits: Tensor | None, targets: Tensor) -> None:
        """Count one batch: named weighted losses, logits (B, K) if there are any, classes (B,)."""
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + value.detach() * len(targets)
        if logits is not None:
            self._correct += (logits.argmax(1) == targets).sum()
            self._has_logits = True
        self._images += len(targets)

    @property
    def has_images(self) -> bool:
        return self._images > 0

    def state(self) -> dict:
        """What `load_state` takes up again."""
        seconds = time.perf_counter() - self._start
        return {
            "losses": {name: value.clone() for name, value in self._losses.items()},
            "correct": self._correct.clone(),
            "counts": (self._images, self._has_logits, self._data_wait, seconds),
        }

    def load_state(self, state: dict) -> None:
        self._losses = {name: value.to(self._device) for name, value in state["losses"].items()}
        self._correct = state["correct"].to(self._device)
        self._images, self._has_logits, self._data_wait, seconds = state["counts"]
        self._start = time.perf_counter() - seconds

    def summary(self) -> dict[str, float]:
        """Means so far, where there are any images."""
        losses = {f"loss_{name}": float(total) / self._images for name, total in self._losses.items()}
        accuracy = {"train_accuracy": 100 * int(self._correct) / self._images} if self._has_logits else {}
        # The sums above waited for the device, so the clock below covers all the work.
        seconds = time.perf_counter() - self._start
        return {
            "loss": sum(losses.values()),
            **losses,
            **accuracy,
            "images_per_s": self._images / seconds,
            "data_wait_s": self._data_wait,
            "compute_s": seconds - self._data_wait,
        }


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], loader: Loader, title: str = "testing") -> dict[str, float]:
    """Accuracy (%), top-5 accuracy (%) and mean cross entropy of `predict(images) -> logits` over a whole split."""
    correct = correct_top5 = loss = n = 0
    for batch in progress_bar(loader.batches(), title, len(loader)):
        logits = predict(batch.images).float()
        top = logits.topk(min(5, logits.shape[1]), 1).indices == batch.targets[:, None]
        correct += top[:, 0].sum()
        correct_top5 += top.sum()
        loss += F.cross_entropy(logits, batch.targets, reduction="sum")
        n += len(batch.targets)  # images that cannot be read are left out
    return {
        "test_accuracy": 100 * int(correct) / n,
        "test_accuracy_top5": 100 * int(correct_top5) / n,
        "test_loss": float(loss) / n,
    }

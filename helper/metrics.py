"""What is measured while training: weighted losses by name, accuracy, and where the time goes."""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dataset import Batch, Loader
from errors import UserError
from helper.distributed import count_processes, is_main, total_of
from helper.reporting import progress_bar


class EpochMeter:
    """Means over an epoch and all processes, summed on the device: nothing waits for it before `summary` is asked for.

    All processes ask for `summary` and `state` together.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._losses: dict[str, Tensor] = {}
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._images, self._has_logits = 0, False
        self.has_images = False  # in any process
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
        self.has_images = True

    def state(self) -> dict:
        """What `load_state` takes up again, in any number of processes."""
        losses, correct, images, data_wait = self._totals()
        seconds = time.perf_counter() - self._start
        return {"losses": losses, "correct": correct, "counts": (images, self._has_logits, data_wait, seconds)}

    def load_state(self, state: dict) -> None:
        images, self._has_logits, self._data_wait, seconds = state["counts"]
        self._start = time.perf_counter() - seconds
        share = 1 if is_main() else 0  # what is over counts once
        self._images, self.has_images = share * images, images > 0
        self._correct.fill_(share * state["correct"])
        self._losses = {
            name: torch.tensor(share * float(value), device=self._device) for name, value in state["losses"].items()
        }

    def _totals(self) -> tuple[dict[str, float], int, int, float]:
        """Sums of losses by name, right predictions, images, and the mean time waited, of all processes."""
        counted = (self._correct, self._images, self._data_wait)
        *losses, correct, images, data_wait = total_of([*self._losses.values(), *counted])
        losses = dict(zip(self._losses, losses, strict=True))
        return losses, int(correct), int(images), data_wait / count_processes()

    def summary(self) -> dict[str, float]:
        """Means so far, where there are any images."""
        totals, correct, images, data_wait = self._totals()
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


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], loader: Loader, title: str = "testing") -> dict[str, float]:
    """Accuracy (%), top-5 accuracy (%) and mean cross entropy of `predict(images) -> logits` over a whole split.

    Of several processes each goes through its own part of the split, in `loader`. Raises `UserError` where no image of
    the split can be read.
    """
    correct = correct_top5 = loss = n = 0
    for batch in progress_bar(loader.batches(), title, len(loader)):
        logits = predict(batch.images).float()
        top = logits.topk(min(5, logits.shape[1]), 1).indices == batch.targets[:, None]
        correct += top[:, 0].sum()
        correct_top5 += top.sum()
        loss += F.cross_entropy(logits, batch.targets, reduction="sum")
        n += len(batch.targets)  # images that cannot be read are left out
    correct, correct_top5, loss, n = total_of([correct, correct_top5, loss, n])
    if not n:
        raise UserError(f"--data: {title}: none of the images can be read; mend them")
    return {
        "test_accuracy": 100 * correct / n,
        "test_accuracy_top5": 100 * correct_top5 / n,
        "test_loss": loss / n,
    }

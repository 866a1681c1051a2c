"""Which images CRD contrasts a sample with, drawn on the device."""

import functools
import itertools
from math import isqrt

import torch
from torch import Tensor, nn

from crd.processes import part_of_all, rows_of_all
from errors import UserError

MODES = ("exact", "relax")


@functools.cache
def _next_prime(number: int) -> int:
    """The smallest prime that is not below a number."""
    return next(each for each in itertools.count(max(number, 2)) if all(each % d for d in range(2, isqrt(each) + 1)))


class NegativeSampler(nn.Module):
    """Draws, per sample, the positive and K images of other classes, each at most once where there are enough.

    Images are sorted by class, so "another class" is a range of ranks with one gap. Distinct ranks come from a random
    affine map i -> (a * i + b) mod p for i = 0, 1, ..., p the first prime from the number of available images on. The
    few that are not below that number are left out, and a random turn of the range makes every image of another class
    equally probable. No permutation of the data set is made, and the device is never waited for.

    Several processes draw for the batch of all of them alike, and each takes its part: the negatives of an image do not
    depend on how many there are.

    mode "exact": the positive is the sample itself; "relax": any image of its class.
    """

    def __init__(self, targets: Tensor, k: int, mode: str = "exact"):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode}")
        self.k, self.mode = k, mode
        class_sizes = torch.bincount(targets)
        self.register_buffer("by_class", targets.argsort(stable=True), persistent=False)
        self.register_buffer("class_sizes", class_sizes, persistent=False)
        self.register_buffer("class_starts", class_sizes.cumsum(0) - class_sizes, persistent=False)
        available = [len(targets) - size for size in class_sizes.tolist()]
        if min(available) == 0:
            raise UserError("--data: contrastive negatives need at least two classes")
        self.replace = k > min(available)
        primes = [_next_prime(number) for number in available]
        self.register_buffer("class_primes", torch.tensor(primes), persistent=False)
        self.most_left_out = max(prime - number for prime, number in zip(primes, available, strict=True))

    def forward(self, index: Tensor, targets: Tensor) -> Tensor:
        """Sample index (B,) and classes (B,) -> contrast index (B, 1 + K), the positive first."""
        rows_by_rank = rows_of_all(len(index))
        whole, part = sum(rows_by_rank), part_of_all(rows_by_rank)
        starts, sizes = self.class_starts[targets, None], self.class_sizes[targets, None]
        ranks = self._ranks(len(self.by_class) - sizes, self.class_primes[targets, None], whole, part)
        negatives = self.by_class[torch.where(ranks < starts, ranks, ranks + sizes)]
        return torch.cat([self._positives(index, starts, sizes, whole, part), negatives], 1)

    def _positives(self, index: Tensor, starts: Tensor, sizes: Tensor, whole: int, part: slice) -> Tensor:
        if self.mode == "exact":
            return index[:, None]
        return self.by_class[starts + (torch.rand(whole, 1, device=sizes.device)[part] * sizes).long()]

    def _ranks(self, available: Tensor, primes: Tensor, whole: int, part: slice) -> Tensor:
        """(B, K) ranks below `available` (B, 1), distinct in a row unless there are too few."""
        device = available.device
        if self.replace:
            drawn = torch.rand(whole, self.k, device=device, dtype=torch.float64)[part]
            return (drawn * available).long()
        a, b, turn = torch.rand(3, whole, 1, device=device, dtype=torch.float64)[:, part]
        a, b, turn = 1 + (a * (primes - 1)).long(), (b * primes).long(), (turn * available).long()
        ranks = (a * torch.arange(self.k + self.most_left_out, device=device) + b) % primes
        is_below = ranks < available
        # The first K below get columns of their own, all others share one column behind them.
        places = torch.where(is_below, is_below.cumsum(1) - 1, self.k).clamp(max=self.k)
        kept = ranks.new_empty(len(ranks), self.k + 1).scatter_(1, places, ranks)[:, : self.k]
        return (kept + turn) % available

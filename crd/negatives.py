"""Which images CRD contrasts a sample with, drawn on the device."""

import torch
from torch import Tensor, nn

from crd.processes import part_of_all, rows_of_all
from errors import UserError

MODES = ("exact", "relax")


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


class NegativeSampler(nn.Module):
    """Draws, per sample, the positive and K images of other classes, each at most once where there are enough.

    Images are sorted by class, so "another class" is a range of ranks with one gap. Distinct ranks come from a random
    affine map modulo a prime p, rank -> (a * rank + b) mod p, applied again while it falls outside the range: its pairs
    are distributed exactly as those of a random permutation, and no permutation of the data set is ever made.

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
        most = len(targets) - int(class_sizes[class_sizes > 0].min())
        fewest = len(targets) - int(class_sizes.max())
        if fewest == 0:
            raise UserError("--data: contrastive negatives need at least two classes")
        self.replace = k > fewest
        self.prime = next(number for number in range(max(most, 2), 2 * max(most, 2) + 1) if _is_prime(number))

    def forward(self, index: Tensor, targets: Tensor) -> Tensor:
        """Sample index (B,) and classes (B,) -> contrast index (B, 1 + K), the positive first."""
        rows_by_rank = rows_of_all(len(index))
        whole, part = sum(rows_by_rank), part_of_all(rows_by_rank)
        starts, sizes = self.class_starts[targets, None], self.class_sizes[targets, None]
        ranks = self._ranks(len(self.by_class) - sizes, whole, part)
        negatives = self.by_class[torch.where(ranks < starts, ranks, ranks + sizes)]
        return torch.cat([self._positives(index, starts, sizes, whole, part), negatives], 1)

    def _positives(self, index: Tensor, starts: Tensor, sizes: Tensor, whole: int, part: slice) -> Tensor:
        if self.mode == "exact":
            return index[:, None]
        return self.by_class[starts + (torch.rand(whole, 1, device=sizes.device)[part] * sizes).long()]

    def _ranks(self, available: Tensor, whole: int, part: slice) -> Tensor:
        """(B, K) ranks below `available` (B, 1), distinct in a row unless there are too few."""
        device = available.device
        if self.replace:
            drawn = torch.rand(whole, self.k, device=device, dtype=torch.float64)[part]
            return (drawn * available).long()
        a = torch.randint(1, self.prime, (whole, 1), device=device)[part]
        b = torch.randint(0, self.prime, (whole, 1), device=device)[part]
        ranks = (a * torch.arange(self.k, device=device) + b) % self.prime
        while (outside := ranks >= available).any():
            ranks = torch.where(outside, (a * ranks + b) % self.prime, ranks)
        return ranks

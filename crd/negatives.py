"""Which images CRD contrasts a sample with, drawn on the device."""

import torch
from torch import Tensor, nn

from errors import UserError

MODES = ("exact", "relax")


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


class NegativeSampler(nn.Module):
    """Draws, per sample, the positive and K images of other classes, each at most once where there are enough.

    Images are sorted by class, so "another class" is a range of ranks with one gap. Distinct ranks come from a random
    affine map modulo a prime p, rank -> (a * rank + b) mod p, applied again while it falls outside the range: its pairs
    are distributed exactly as those of a random permutation, and no permutation of the data set is ever made.

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
        starts, sizes = self.class_starts[targets, None], self.class_sizes[targets, None]
        ranks = self._ranks(len(self.by_class) - sizes)
        negatives = self.by_class[torch.where(ranks < starts, ranks, ranks + sizes)]
        return torch.cat([self._positives(index, starts, sizes), negatives], 1)

    def _positives(self, index: Tensor, starts: Tensor, sizes: Tensor) -> Tensor:
        if self.mode == "exact":
            return index[:, None]
        return self.by_class[starts + (torch.rand(sizes.shape, device=sizes.device) * sizes).long()]

    def _ranks(self, available: Tensor) -> Tensor:
        """(B, K) ranks below `available` (B, 1), distinct in a row unless there are too few."""
        shape, device = (len(available), self.k), available.device
        if self.replace:
            return (torch.rand(shape, device=device, dtype=torch.float64) * available).long()
        a = torch.randint(1, self.prime, (shape[0], 1), device=device)
        b = torch.randint(0, self.prime, (shape[0], 1), device=device)
        ranks = (a * torch.arange(self.k, device=device) + b) % self.prime
        while (outside := ranks >= available).any():
            ranks = torch.where(outside, (a * ranks + b) % self.prime, ranks)
        return ranks

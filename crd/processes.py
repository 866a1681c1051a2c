"""The batch of all processes: which rows are this process's, and everybody's rows together."""

import torch
from torch import Tensor, distributed


def rows_of_all(rows: int) -> list[int]:
    """How many rows every process has, by rank; with one process only this one's."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [rows]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.tensor([rows]))  # on the CPU: nothing waits for an accelerator
    return [int(size) for size in sizes]


def part_of_all(sizes: list[int]) -> slice:
    """The rows of this process among those of all."""
    if len(sizes) == 1:
        return slice(None)
    rank = distributed.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


@torch.no_grad()
def gather_rows(values: Tensor, sizes: list[int]) -> Tensor:
    """Rows (B, ...) of every process, by rank, without gradients."""
    if len(sizes) == 1:
        return values.detach()
    padded = values.new_zeros(max(sizes), *values.shape[1:])
    padded[: len(values)] = values
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

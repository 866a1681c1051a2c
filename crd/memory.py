"""CRD's memory banks: one embedding per training image and side, kept as buffers, so they are saved and moved."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crd.processes import gather_rows, rows_of_all

#: A bank of up to this many rows per index is multiplied as a whole, which is faster than visiting rows one by one.
WHOLE_BANK_ROWS = 32


def unit_rows(rows: Tensor) -> Tensor:
    """Rows (B, d) scaled to length 1; a row of zeros stays so and gets no gradient, since it has no direction."""
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(length > 1e-12, length, math.inf)


class BankProducts(torch.autograd.Function):
    """<bank[i], v> for every index i of a row: v (B, d), bank (n, d), contrast index (B, 1 + K) -> (B, 1 + K).

    The gradient of v is that of the bank as it is now, although the rows of `updated` (B,) may be overwritten before it
    is asked for: they are kept, and put back for that moment, which spares a copy of the bank.
    """

    @staticmethod
    def forward(ctx, v: Tensor, bank: Tensor, contrast_index: Tensor, updated: Tensor) -> Tensor:
        ctx.save_for_backward(contrast_index, updated, bank[updated])
        ctx.bank, ctx.version = bank, None if torch.compiler.is_compiling() else bank._version
        if multiplies_whole_bank(bank, contrast_index):
            return (v @ bank.T).gather(1, contrast_index)
        return row_products(v, bank, contrast_index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        contrast_index, updated, rows_then = ctx.saved_tensors
        bank = ctx.bank
        if ctx.version is not None and bank._version > ctx.version + 1:
            raise RuntimeError("the memory bank has been updated again since these scores were computed")
        rows_now = bank[updated]
        bank[updated] = rows_then
        if multiplies_whole_bank(bank, contrast_index):
            spread = gradient.new_zeros(len(gradient), len(bank)).scatter_add_(1, contrast_index, gradient)
            result = spread @ bank
        else:
            result = weighted_rows(gradient, bank, contrast_index)
        bank[updated] = rows_now
        if ctx.version is not None:
            ctx.version = bank._version
        return result, None, None, None


def multiplies_whole_bank(bank: Tensor, contrast_index: Tensor) -> bool:
    """Whether products are taken with every row of the bank, and the asked ones picked."""
    return len(bank) <= WHOLE_BANK_ROWS * contrast_index.shape[1]


def weighted_rows(weights: Tensor, bank: Tensor, contrast_index: Tensor) -> Tensor:
    """sum_k weights[b, k] * bank[contrast_index[b, k]], (B, d); no copy of the rows is made."""
    return F.embedding_bag(contrast_index, bank, mode="sum", per_sample_weights=weights.contiguous())


def row_products(v: Tensor, bank: Tensor, contrast_index: Tensor) -> Tensor:
    """<bank[contrast_index[b, k]], v[b]>, (B, 1 + K); no copy of the rows is made.

    The products are the gradient of <v[b], weighted sum of the rows> with respect to the weights.
    """
    with torch.enable_grad():
        weights = torch.zeros(contrast_index.shape, dtype=bank.dtype, device=bank.device, requires_grad=True)
        sums = weighted_rows(weights, bank, contrast_index)
    return torch.autograd.grad(sums, weights, v)[0]


class ContrastMemory(nn.Module):
    """Scores of the student's embeddings against the teacher's bank and the other way round.

    `memory_v1` holds the student's embeddings, `memory_v2` the teacher's, each (n_data, feat_dim). Z_1 and Z_2 are set
    from the first batch, as in the paper's code, and kept from then on (0 means: not set yet). Several processes make
    the updates of all of them, so their banks stay alike.
    """

    def __init__(self, feat_dim: int, n_data: int, temperature: float = 0.07, momentum: float = 0.5):
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        bound = 1 / math.sqrt(feat_dim / 3)
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, torch.empty(n_data, feat_dim).uniform_(-bound, bound))
        self.register_buffer("z_v1", torch.zeros(()))
        self.register_buffer("z_v2", torch.zeros(()))

    def forward(self, v1: Tensor, v2: Tensor, index: Tensor, contrast_index: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, d) of both sides, sample index (B,), contrast index (B, 1 + K) -> both scores (B, 1 + K).

        Afterwards the banks' rows of the batch move towards the new embeddings.
        """
        sizes = rows_of_all(len(index))
        updated = gather_rows(index, sizes)
        products_1 = BankProducts.apply(v1, self.memory_v2, contrast_index, updated)
        products_2 = BankProducts.apply(v2, self.memory_v1, contrast_index, updated)
        self._update(self.memory_v1, gather_rows(v1, sizes), updated)
        self._update(self.memory_v2, gather_rows(v2, sizes), updated)
        return self._normalised(products_1, self.z_v1, sizes), self._normalised(products_2, self.z_v2, sizes)

    def _normalised(self, products: Tensor, z: Tensor, sizes: list[int]) -> Tensor:
        """exp(products / T) / Z; Z is set where it is not."""
        similarities = torch.exp(products / self.temperature)
        with torch.no_grad():
            mean = gather_rows(similarities.mean(1), sizes).mean() if len(sizes) > 1 else similarities.mean()
            z.copy_(torch.where(z == 0, mean * len(self.memory_v1), z))
        return similarities / z.clone()

    @torch.no_grad()
    def _update(self, memory: Tensor, v: Tensor, index: Tensor) -> None:
        memory[index] = unit_rows(memory[index] * self.momentum + v.to(memory.dtype) * (1 - self.momentum))

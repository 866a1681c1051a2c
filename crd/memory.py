"""CRD's memory banks: one embedding per training image and side, kept as buffers, so they are saved and moved."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ContrastMemory(nn.Module):
    """Scores of the student's embeddings against the teacher's bank and the other way round.

    `memory_v1` holds the student's embeddings, `memory_v2` the teacher's, each (n_data, feat_dim). Z_1 and Z_2 are set
    from the first batch, as in the paper's code, and kept from then on (0 means: not set yet).
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
        scores_1 = self._normalised(self._similarities(self.memory_v2, v1, contrast_index), self.z_v1)
        scores_2 = self._normalised(self._similarities(self.memory_v1, v2, contrast_index), self.z_v2)
        self._update(self.memory_v1, v1, index)
        self._update(self.memory_v2, v2, index)
        return scores_1, scores_2

    def _similarities(self, memory: Tensor, v: Tensor, contrast_index: Tensor) -> Tensor:
        """exp(<memory[i], v> / T) for every index i of a row, by whichever product holds fewer numbers."""
        # The autograd graph must not see the update in place that follows.
        memory = memory.clone()
        if len(memory) <= contrast_index.shape[1] * memory.shape[1]:
            products = (v @ memory.T).gather(1, contrast_index)
        else:
            products = (memory[contrast_index] @ v.unsqueeze(2)).squeeze(2)
        return torch.exp(products / self.temperature)

    def _normalised(self, similarities: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            z.copy_(torch.where(z == 0, similarities.mean() * len(self.memory_v1), z))
        return similarities / z.clone()

    @torch.no_grad()
    def _update(self, memory: Tensor, v: Tensor, index: Tensor) -> None:
        memory[index] = F.normalize(memory[index] * self.momentum + v.detach().to(memory.dtype) * (1 - self.momentum))

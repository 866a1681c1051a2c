"""The contrastive objective of CRD (Tian, Krishnan & Isola, ICLR 2020) in its NCE form."""

from argparse import Namespace

import torch
from torch import Tensor, nn

from crd.memory import ContrastMemory, unit_rows

EPSILON = 1e-7


class Embed(nn.Module):
    """A linear layer followed by L2 normalisation: (B, in_dim) -> (B, out_dim) of length 1."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return unit_rows(self.linear(x.flatten(1)))


class ContrastLoss(nn.Module):
    """Noise-contrastive loss of scores (B, 1 + K), the positive first, over a data set of `n_data` images -> scalar."""

    def __init__(self, n_data: int):
        super().__init__()
        self.n_data = n_data

    def forward(self, scores: Tensor) -> Tensor:
        scores = scores.flatten(1)
        batch, negatives = len(scores), scores.shape[1] - 1
        noise = negatives / self.n_data
        positive, negative = scores[:, 0], scores[:, 1:]
        log_positive = torch.log(positive / (positive + noise + EPSILON)).sum()
        log_negative = torch.log(noise / (negative + noise + EPSILON)).sum()
        return -(log_positive + log_negative) / batch


class CRDLoss(nn.Module):
    """The CRD loss with both embeddings and both memory banks (RepDistiller's class of the same name).

    Pooled student features (B, s_dim), teacher features (B, t_dim), sample index (B,) and contrast index (B, 1 + K),
    the positive first -> scalar. The teacher's embedding is trained too. Without a contrast index the `nce_k`
    negatives are drawn from all images. The first argument may be an object with all of these names, as in
    RepDistiller.
    """

    def __init__(
        self,
        s_dim: int | Namespace,
        t_dim: int = 0,
        n_data: int = 0,
        feat_dim: int = 128,
        nce_t: float = 0.07,
        nce_m: float = 0.5,
        nce_k: int = 16384,
    ):
        super().__init__()
        if not isinstance(s_dim, int):
            names = ("s_dim", "t_dim", "n_data", "feat_dim", "nce_t", "nce_m", "nce_k")
            s_dim, t_dim, n_data, feat_dim, nce_t, nce_m, nce_k = (getattr(s_dim, name) for name in names)
        self.nce_k = nce_k
        self.embed_s = Embed(s_dim, feat_dim)
        self.embed_t = Embed(t_dim, feat_dim)
        self.contrast = ContrastMemory(feat_dim, n_data, nce_t, nce_m)
        self.criterion = ContrastLoss(n_data)

    def terms(self, f_s: Tensor, f_t: Tensor, index: Tensor, contrast_index: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the student's side and of the teacher's side."""
        scores_s, scores_t = self.contrast(self.embed_s(f_s), self.embed_t(f_t), index, contrast_index)
        return self.criterion(scores_s), self.criterion(scores_t)

    def forward(self, f_s: Tensor, f_t: Tensor, index: Tensor, contrast_index: Tensor | None = None) -> Tensor:
        if contrast_index is None:
            negatives = torch.randint(self.criterion.n_data, (len(index), self.nce_k), device=index.device)
            contrast_index = torch.cat([index[:, None], negatives], 1)
        return sum(self.terms(f_s, f_t, index, contrast_index))

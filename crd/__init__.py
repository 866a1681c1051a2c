"""Contrastive representation distillation (Tian, Krishnan & Isola, ICLR 2020): criterion, memory banks, negatives."""

from crd.criterion import ContrastLoss, CRDLoss, Embed
from crd.memory import ContrastMemory
from crd.negatives import NegativeSampler

__all__ = ["CRDLoss", "ContrastLoss", "ContrastMemory", "Embed", "NegativeSampler"]

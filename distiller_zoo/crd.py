"""CRD, contrastive representation distillation (Tian, Krishnan & Isola, ICLR 2020, arXiv 1910.10699), and NORM+CRD."""

from torch import Tensor

from crd import CRDLoss, NegativeSampler
from crd.negatives import MODES
from distiller_zoo.base import BETA, Distiller, Flag, above_zero, count, number, positive
from distiller_zoo.kd import FeatureDistiller
from distiller_zoo.norm import NORM
from models.backbone import Output, probe_shapes

FEAT_DIM = Flag(("--feat_dim",), count, 128, "width of the embeddings of CRD and CC")
NCE_K = Flag(("--nce_k",), count, 16384, "CRD's negatives per sample")
NCE_T = Flag(("--nce_t",), positive, 0.07, "CRD's temperature")
NCE_M = Flag(("--nce_m",), number, 0.5, "momentum of CRD's memory banks")
MODE = Flag(("--mode",), str, "exact", "CRD's positive: the sample itself, or any of its class", choices=MODES)
CRD_WEIGHT = Flag(
    ("--crd_weight",), number, 0.8, "weight of the CRD term (the official NORM code takes -c for it)", is_weight=True
)
CONTRAST_FLAGS = (FEAT_DIM, NCE_K, NCE_T, NCE_M, MODE)
WHY_LABELLED = "its negatives are images of other classes"
WHY_UNMIXED = "its memory banks hold one vector for each training image, and a mixed image is none of them"


def attach_contrast(method: Distiller, teacher, task) -> None:
    """Give a method with `CONTRAST_FLAGS` its `crd_loss` and its `negatives`."""
    s_dim, t_dim = (probe_shapes(network, task.image_size).pooled for network in (method.student, teacher))
    n_data = len(task.train_targets)
    method.crd_loss = CRDLoss(s_dim, t_dim, n_data, method.feat_dim, method.nce_t, method.nce_m)
    method.negatives = NegativeSampler(task.train_targets, method.nce_k, method.mode)


def contrast_term(method: Distiller, student: Output, teacher: Output, targets: Tensor, index: Tensor) -> Tensor:
    """The CRD loss of the pooled features (B, D) of both networks, with freshly drawn negatives."""
    return method.crd_loss(student.pooled, teacher.pooled, index, method.negatives(index, targets))


class CRD(FeatureDistiller):
    """L = gamma * CE + alpha * KL_T + beta * L_crd; CRD+KD with alpha > 0."""

    name = "crd"
    summary, source = (
        "CRD: contrastive loss between pooled features, negatives from memory banks; CRD+KD with -a > 0",
        "Tian et al., ICLR 2020",
    )
    reference = "HobbitLong/RepDistiller"
    departures = (
        "Negatives are drawn on the device and are distinct on every data set: a permutation per sample held "
        "up the CPU."
    )
    group = "relations between images"
    reads = ("pooled", "sample index and negatives")
    refuses_mixing = WHY_UNMIXED
    refuses_unlabelled = WHY_LABELLED
    flags = (*FeatureDistiller.flags, *CONTRAST_FLAGS)
    flags_work_if = {
        **FeatureDistiller.flags_work_if,
        **{flag.argument: (above_zero(BETA),) for flag in CONTRAST_FLAGS},
    }

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        attach_contrast(self, teacher, task)

    def feature_loss(self, student, teacher, targets, index):
        return contrast_term(self, student, teacher, targets, index)


class NORM_CRD(NORM):
    """NORM's loss plus crd_weight * L_crd on the pooled features behind the transform."""

    name = "norm_crd"
    summary, source = (
        "NORM+CRD: N-to-one matching of the last map and CRD on the pooled features",
        "Liu et al., ICLR 2023",
    )
    reference = "OSVAI/NORM"
    departures = "The official code cannot start this method and takes -c for CRD's weight; here it is --crd_weight."
    reads = ("final", "pooled", "sample index and negatives")
    refuses_mixing = WHY_UNMIXED
    refuses_unlabelled = WHY_LABELLED
    flags = (*NORM.flags, CRD_WEIGHT, *CONTRAST_FLAGS)
    flags_work_if = {**NORM.flags_work_if, **{flag.argument: (above_zero(CRD_WEIGHT),) for flag in CONTRAST_FLAGS}}

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        attach_contrast(self, teacher, task)

    def losses(self, student, teacher, targets, index, progress):
        terms = super().losses(student, teacher, targets, index, progress)
        if self.crd_weight:
            terms["crd"] = self.crd_weight * contrast_term(self, student, teacher, targets, index)
        return terms

"""RepDistiller's losses of one tensor of either side, and the same written plainly: loops over images and pixels."""

import itertools
from functools import partial

import torch
from torch.nn import functional as F

from distiller_zoo.attention import Attention
from distiller_zoo.correlation import Correlation
from distiller_zoo.hint import HintLoss
from distiller_zoo.nst import NSTLoss
from distiller_zoo.pkt import PKT
from distiller_zoo.rkd import RKDLoss
from distiller_zoo.similarity import Similarity
from distiller_zoo.vid import VIDLoss


def layer(loss, student, teacher):
    (value,) = loss([student], [teacher])
    return value


def vid(student, teacher):
    torch.manual_seed(5)
    loss = VIDLoss(student.shape[1], teacher.shape[1], teacher.shape[1]).to(student.dtype)
    return loss(student, teacher)


OF_MAPS = {
    "attention": partial(layer, Attention()),
    "attention of cubes": partial(layer, Attention(3)),
    "similarity": partial(layer, Similarity()),
    "nst": partial(layer, NSTLoss()),
    "vid": vid,
}


OF_VECTORS = {"rkd": RKDLoss(), "pkt": PKT()}


OF_EQUAL_SHAPES = {"hint": HintLoss(), "correlation": Correlation()}


LOSSES = OF_MAPS | OF_VECTORS | OF_EQUAL_SHAPES


def inputs_of(name, batch=4, dtype=torch.float64):
    """Random tensors of student and teacher that the loss `name` takes."""
    if name in OF_MAPS:
        return torch.randn(batch, 3, 4, 4, dtype=dtype), torch.randn(batch, 5, 4, 4, dtype=dtype)
    return torch.randn(batch, 6, dtype=dtype), torch.randn(batch, 6, dtype=dtype)


def plain_attention(student, teacher, power=2):
    def attend(feature_map):
        sums = [(image.abs() ** power).sum(0).flatten() for image in feature_map]
        return torch.stack([each / each.norm() for each in sums])

    return (attend(student) - attend(teacher)).square().mean()


def plain_similarity(student, teacher):
    def similarities(maps):
        return torch.stack([torch.stack([(a * b).sum() for b in maps]) for a in maps])

    rows = [each / each.norm(dim=1, keepdim=True) for each in map(similarities, (student, teacher))]
    return (rows[0] - rows[1]).square().sum() / len(student) ** 2


def plain_nst(student, teacher):
    student, teacher = (each.flatten(2) / each.flatten(2).norm(dim=2, keepdim=True) for each in (student, teacher))

    def mean(a, b):
        return (a[:, :, None] * b[:, None]).sum(3).square().mean()

    return mean(teacher, teacher) + mean(student, student) - 2 * mean(student, teacher)


def plain_vid(student, teacher):
    torch.manual_seed(5)
    loss = VIDLoss(student.shape[1], teacher.shape[1], teacher.shape[1]).double()
    first, second, third = (loss.regressor[k].weight.flatten(1) for k in (0, 2, 4))
    pixels = student.movedim(1, 3)
    predicted = (((pixels @ first.T).relu() @ second.T).relu() @ third.T).movedim(3, 1)
    variance = (torch.log(1 + torch.exp(loss.log_scale)) + 1e-5)[:, None, None]
    return ((predicted - teacher) ** 2 / (2 * variance) + variance.log() / 2).mean()


def plain_rkd(student, teacher):
    def distances(x):
        length = torch.stack([torch.stack([(a - b).norm() if a is not b else a.new_zeros(()) for b in x]) for a in x])
        return length / length[length > 0].mean()

    def cosines(x):
        unit = F.normalize(x[None] - x[:, None], dim=2)
        return torch.einsum("ijd,ikd->ijk", unit, unit)

    def rows(x):
        return list(x.unbind())

    return 25 * F.smooth_l1_loss(distances(rows(student)), distances(rows(teacher))) + 50 * F.smooth_l1_loss(
        cosines(student), cosines(teacher)
    )


def plain_pkt(student, teacher):
    def probabilities(x):
        unit = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        similar = (unit @ unit.T + 1) / 2
        return similar / similar.sum(1, keepdim=True)

    s, t = probabilities(student), probabilities(teacher)
    return (t * torch.log((t + 1e-7) / (s + 1e-7))).mean()


def plain_correlation(student, teacher):
    difference = (student - teacher).abs()
    pairs = [(difference[i] * difference[i + 1]).sum() for i in range(len(difference) - 1)]
    return sum(pairs) / len(pairs)


PLAIN = {
    "attention": plain_attention,
    "attention of cubes": partial(plain_attention, power=3),
    "similarity": plain_similarity,
    "nst": plain_nst,
    "vid": plain_vid,
    "rkd": plain_rkd,
    "pkt": plain_pkt,
    "correlation": plain_correlation,
    "hint": lambda student, teacher: ((student - teacher) ** 2).sum() / student.numel(),
}


#: Tall, square and wide matrices; the last two are of one size.
SVD_SHAPES = ((5, 6, 8, 8), (5, 16, 4, 4), (5, 40, 4, 4), (5, 40, 4, 4))


def plain_kdsvd(g_s, g_t, k=1, signs=None):
    """With a whole decomposition of every matrix (pixels, channels); `signs` of the teacher's vectors, by layer."""
    layers = []
    for number, (f_s, f_t) in enumerate(zip(g_s, g_t, strict=True)):
        _, values, teacher = torch.linalg.svd(f_t.flatten(2).mT, full_matrices=False)
        _, _, student = torch.linalg.svd(f_s.flatten(2).mT, full_matrices=False)
        teacher, student = teacher.mT[:, :, :k], student.mT[:, :, : k + 3]
        peaks = teacher.gather(1, teacher.abs().argmax(1, keepdim=True))
        teacher = teacher * peaks.sign() * (1 if signs is None else signs[number])
        cosines = student.mT @ teacher
        best = (cosines.abs() == cosines.abs().amax(1, keepdim=True)) * cosines.sign()
        scale = F.normalize(values[:, :k], dim=1)[:, None]
        layers.append((student @ best.detach() * scale, teacher * scale))
    losses = []
    for (s_below, t_below), (s, t) in itertools.pairwise(layers):
        r_s, r_t = (torch.exp(-((a[:, :, None] - b[:, None]) ** 2) / 8) for a, b in ((s, s_below), (t, t_below)))
        losses.append((r_s - r_t).square().sum() / len(s))
    return losses

"""CRD's criterion, memory and negatives."""

import pytest
import torch
from torch.nn import functional as F

from crd import ContrastLoss, ContrastMemory, NegativeSampler
from dataset import Batch
from distiller_zoo import Progress, Task
from distiller_zoo.crd import CRD, NORM_CRD
from errors import UserError
from helper.teacher import FrozenTeacher
from tests.conftest import pair_networks
from tests.test_norm import wave


def test_scores_loss_and_update_have_the_published_values():
    """Check values computed once from RepDistiller's functions (waves as inputs)."""
    memory = ContrastMemory(8, 20).double()
    memory.memory_v1.copy_(F.normalize(wave((20, 8), 0.9, 0.3)))
    memory.memory_v2.copy_(F.normalize(wave((20, 8), 1.3, 0.6)))
    v1, v2 = F.normalize(wave((3, 8), 0.5, 0.2)), F.normalize(wave((3, 8), 0.8, 0.9))
    index = torch.tensor([2, 5, 11])
    contrast_index = torch.tensor([[2, 7, 8, 9, 10], [5, 0, 1, 3, 4], [11, 12, 13, 14, 15]])
    scores_s, scores_t = memory(v1, v2, index, contrast_index)
    assert memory.z_v1.item() == pytest.approx(46.99199, rel=1e-6)
    assert memory.z_v2.item() == pytest.approx(3400539.102, rel=1e-9)
    criterion = ContrastLoss(20)
    assert criterion(scores_s).item() == pytest.approx(2.7983201585, abs=1e-9)
    assert criterion(scores_t).item() == pytest.approx(20.8881931422, abs=1e-9)
    assert memory.memory_v1[2, 0].item() == pytest.approx(0.5635395278, abs=1e-9)
    assert memory.memory_v2[2, 0].item() == pytest.approx(0.6268290051, abs=1e-9)


def test_both_ways_to_score_agree_and_z_is_set_once():
    torch.manual_seed(0)
    memory = ContrastMemory(4, 30)
    v = F.normalize(torch.randn(5, 4))
    few, many = torch.randint(0, 30, (5, 3)), torch.randint(0, 30, (5, 20))
    for contrast_index in (few, many):  # gathers rows, multiplies the whole bank
        expected = torch.exp((memory.memory_v1[contrast_index] * v[:, None]).sum(2) / 0.07)
        assert torch.allclose(memory._similarities(memory.memory_v1, v, contrast_index), expected, rtol=1e-5)
    memory(v, v, torch.arange(5), few)
    z = memory.z_v1.clone()
    memory(F.normalize(torch.randn(5, 4)), v, torch.arange(5), few)
    assert torch.equal(memory.z_v1, z)


@pytest.mark.parametrize("sizes", [[50, 50, 50], [5, 80, 20, 0, 30]], ids=["balanced", "unbalanced"])
def test_negatives_are_distinct_images_of_other_classes(sizes):
    targets = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    targets = targets[torch.randperm(len(targets))]
    k = len(targets) - max(sizes)
    sampler = NegativeSampler(targets, k)
    index = torch.randint(0, len(targets), (16,))
    drawn = sampler(index, targets[index])
    assert torch.equal(drawn[:, 0], index)
    assert (targets[drawn[:, 1:]] != targets[index][:, None]).all()
    assert all(len(row.unique()) == k for row in drawn[:, 1:])


def test_negatives_are_uniform_over_the_other_classes():
    targets = torch.arange(12) % 3
    sampler = NegativeSampler(targets, 4)
    counts = torch.zeros(12)
    for _ in range(3000):
        counts += torch.bincount(sampler(torch.tensor([0]), targets[:1])[0, 1:], minlength=12)
    assert (counts[targets == 0] == 0).all()
    assert torch.allclose(counts[targets != 0] / 1500, torch.ones(8), atol=0.1)


def test_too_few_images_are_drawn_with_replacement_and_relax_takes_any_positive():
    targets = torch.tensor([0, 0, 1, 1, 1, 1])
    drawn = NegativeSampler(targets, 50, "relax")(torch.tensor([0] * 8), torch.tensor([0] * 8))
    assert drawn.shape == (8, 51) and (targets[drawn[:, 1:]] == 1).all()
    assert set(drawn[:, 0].tolist()) <= {0, 1}
    with pytest.raises(ValueError):
        NegativeSampler(targets, 5, "strict")
    with pytest.raises(UserError, match="two classes"):
        NegativeSampler(torch.zeros(5, dtype=torch.int64), 2)


@pytest.mark.parametrize("method_class", [CRD, NORM_CRD])
def test_methods_train_both_embeddings_and_keep_their_banks(method_class):
    teacher, student = pair_networks("wrn_16_2", "resnet8")
    targets = torch.arange(40) % 10
    method = method_class(student, teacher, Task(10, 32, len(targets), targets), nce_k=8, feat_dim=16)
    batch = Batch(torch.randn(4, 3, 32, 32), targets[:4], torch.arange(4))
    _, losses = method.train()(batch, FrozenTeacher(teacher)(batch.images), Progress(0, 240))
    sum(losses.values()).backward()
    assert "crd" in losses
    trained = dict(method.named_parameters())
    for side in ("embed_s", "embed_t"):
        assert trained[f"crd_loss.{side}.linear.weight"].grad.norm() > 0
    assert {"crd_loss.contrast.memory_v1", "crd_loss.contrast.z_v1"} <= set(method.state_dict())
    doubled = method_class(student, teacher, Task(10, 32, len(targets), targets), nce_k=8, feat_dim=16)
    assert doubled.export().state_dict().keys() == student.state_dict().keys()

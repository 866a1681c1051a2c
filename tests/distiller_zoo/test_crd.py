"""CRD's criterion, memory and negatives."""

import math
from argparse import Namespace
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from crd import ContrastLoss, ContrastMemory, CRDLoss, NegativeSampler
from crd import memory as memory_module
from crd.memory import BankProducts, multiplies_whole_bank, unit_rows
from dataset import Batch
from distiller_zoo import Progress, Task
from distiller_zoo.crd import CRD, NORM_CRD
from errors import UserError
from tests.check_values import g
from tests.conftest import pair_networks
from tests.distiller_zoo.helpers import FrozenTeacher


def test_scores_loss_and_update_have_the_published_values():
    """Check values computed once from RepDistiller's functions (waves as inputs)."""
    memory = ContrastMemory(8, 20).double()
    memory.memory_v1.copy_(F.normalize(g((20, 8), 0.9, 0.3)))
    memory.memory_v2.copy_(F.normalize(g((20, 8), 1.3, 0.6)))
    v1, v2 = F.normalize(g((3, 8), 0.5, 0.2)), F.normalize(g((3, 8), 0.8, 0.9))
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


def test_the_momentum_is_the_share_of_the_bank_that_stays():
    memory = ContrastMemory(6, 20, momentum=0.9)
    before, (v1, v2) = memory.memory_v1.clone(), (F.normalize(torch.randn(3, 6)) for _ in range(2))
    memory(v1, v2, torch.arange(3), torch.arange(15).view(3, 5))
    assert torch.allclose(memory.memory_v1[:3], F.normalize(0.9 * before[:3] + 0.1 * v1), atol=1e-6)


def plain_scores(memory: ContrastMemory, v1, v2, contrast_index):
    """CRD's scores as its equations read, from copies of the banks."""
    for bank, v in ((memory.memory_v2.clone(), v1), (memory.memory_v1.clone(), v2)):
        similarities = torch.exp((bank[contrast_index] * v[:, None]).sum(2) / memory.temperature)
        yield similarities / (similarities.mean().detach() * len(bank))


@pytest.fixture(params=["whole bank", "rows"])
def way(request, monkeypatch):
    """Both ways to multiply a bank."""
    monkeypatch.setattr(memory_module, "WHOLE_BANK_ROWS", {"whole bank": math.inf, "rows": 0}[request.param])
    return request.param


def banks_and_batch(n=40, batch=5, k=8, d=6, repeated=False):
    memory = ContrastMemory(d, n).double()
    v1, v2 = (F.normalize(torch.randn(batch, d, dtype=torch.float64)).requires_grad_() for _ in range(2))
    index = torch.randperm(n)[:batch]
    if repeated:
        index[1] = index[0]
    contrast_index = torch.randint(0, n, (batch, 1 + k))
    contrast_index[:, 0] = index
    return memory, v1, v2, index, contrast_index


@pytest.mark.parametrize("repeated", [False, True])
def test_both_ways_are_the_plain_formula_although_the_banks_move_before_the_gradient(way, repeated):
    memory, v1, v2, index, contrast_index = banks_and_batch(repeated=repeated)
    criterion, banks = ContrastLoss(40), [memory.memory_v1.clone(), memory.memory_v2.clone()]
    expected = [criterion(scores) for scores in plain_scores(memory, v1, v2, contrast_index)]
    expected_gradients = torch.autograd.grad(sum(expected), (v1, v2))
    found = [criterion(scores) for scores in memory(v1, v2, index, contrast_index)]
    moved = memory.memory_v1.clone()
    assert not torch.equal(moved[index], banks[0][index]) and not torch.equal(memory.memory_v2[index], banks[1][index])
    for _ in range(2):  # twice through one graph
        gradients = torch.autograd.grad(sum(found), (v1, v2), retain_graph=True)
        for ours, plain in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
            assert torch.allclose(ours, plain, rtol=1e-12, atol=1e-13)
    assert torch.equal(memory.memory_v1, moved), "the gradient leaves the banks as they are"
    others = torch.ones(40, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(memory.memory_v1[others], banks[0][others])


def test_the_products_have_their_numerical_gradient(way):
    memory, v1, _, index, contrast_index = banks_and_batch()
    bank = memory.memory_v2
    assert torch.autograd.gradcheck(lambda v: BankProducts.apply(v, bank, contrast_index, index), (v1,))


def test_a_gradient_of_a_bank_that_has_moved_on_is_refused(way):
    memory, v1, v2, index, contrast_index = banks_and_batch()
    first, _ = memory(v1, v2, index, contrast_index)
    memory(v1, v2, index, contrast_index)
    with pytest.raises(RuntimeError, match="updated again"):
        first.sum().backward()


class Allocations(TorchDispatchMode):
    """The numbers in each new tensor."""

    def __init__(self, known: Sequence[torch.Tensor]):
        super().__init__()
        self.known, self.sizes = {tensor.data_ptr() for tensor in known}, [0]

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in self.known:
                self.sizes.append(tensor.numel())
        return result


def test_no_bank_is_copied_and_no_rows_are_gathered(way):
    n, batch, k, d = 3000, 5, 8, 6
    memory, v1, v2, index, contrast_index = banks_and_batch(n, batch, k, d)
    with Allocations((memory.memory_v1, memory.memory_v2)) as allocations:
        sum(scores.sum() for scores in memory(v1, v2, index, contrast_index)).backward()
    if way == "whole bank":
        assert max(allocations.sizes) == batch * n < n * d
    else:
        assert max(allocations.sizes) <= batch * (1 + k) < batch * (1 + k) * d


def test_which_way_is_taken_for_the_published_sizes():
    index = torch.empty(1, 1 + 16384, device="meta")
    cifar, imagenet = (torch.empty(n, 128, device="meta") for n in (50_000, 1_281_167))
    assert multiplies_whole_bank(cifar, index) and not multiplies_whole_bank(imagenet, index)


def test_z_is_set_by_the_first_batch_and_kept(way):
    memory, v1, v2, index, contrast_index = banks_and_batch()
    memory(v1, v2, index, contrast_index)
    z = memory.z_v1.clone()
    memory(F.normalize(torch.randn_like(v1)), v2, index, contrast_index)
    assert z > 0 and torch.equal(memory.z_v1, z)


def test_embeddings_without_a_length_have_finite_losses_and_gradients(way):
    loss = CRDLoss(4, 4, 40, feat_dim=6)
    with torch.no_grad():
        for embed in (loss.embed_s, loss.embed_t):
            embed.linear.bias.zero_()
    features = [torch.randn(5, 4) for _ in range(2)]
    for each in features:
        each[:2] = 0
        each.requires_grad_()
    _, _, _, index, contrast_index = banks_and_batch()
    value = loss(*features, index, contrast_index)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(loss.contrast.memory_v1).all()
    for each in features:
        assert torch.isfinite(each.grad).all() and each.grad[2:].norm() > 0
        assert (each.grad[:2] == 0).all(), "a vector of zeros has no direction"
    assert all(torch.isfinite(parameter.grad).all() for parameter in loss.parameters())


def test_unit_rows_have_length_one_and_the_gradient_of_a_normalisation():
    rows = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(unit_rows(rows), F.normalize(rows), rtol=1e-14)
    assert torch.autograd.gradcheck(unit_rows, (rows,))


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
    drawn = NegativeSampler(targets, 4)(torch.zeros(100_000, dtype=torch.int64), targets[:1].expand(100_000))[:, 1:]
    for column in drawn.T:
        counts = torch.bincount(column, minlength=12).double()
        assert (counts[targets == 0] == 0).all()
        # Six standard deviations of a binomial count of 100,000 with a probability of 1/8.
        assert torch.allclose(counts[targets != 0], torch.full((8,), 12_500.0).double(), rtol=0, atol=6 * 105)


def test_too_few_images_are_drawn_with_replacement_and_relax_takes_any_positive():
    targets = torch.tensor([0, 0, 1, 1, 1, 1])
    drawn = NegativeSampler(targets, 50, "relax")(torch.tensor([0] * 8), torch.tensor([0] * 8))
    assert drawn.shape == (8, 51) and (targets[drawn[:, 1:]] == 1).all()
    assert set(drawn[:, 0].tolist()) <= {0, 1}
    with pytest.raises(ValueError):
        NegativeSampler(targets, 5, "strict")
    with pytest.raises(UserError, match="two classes"):
        NegativeSampler(torch.zeros(5, dtype=torch.int64), 2)


def test_relax_draws_every_image_of_the_class_alike_and_no_other():
    targets = torch.tensor([1, 0, 1, 2, 1, 0, 2, 1])
    index = torch.tensor([0] * 4000 + [5] * 2000)
    drawn = NegativeSampler(targets, 2, "relax")(index, targets[index])
    assert torch.equal(targets[drawn[:, 0]], targets[index])
    assert (targets[drawn[:, 1:]] != targets[index][:, None]).all()
    counts = torch.bincount(drawn[:, 0], minlength=8).double()
    assert torch.allclose(counts[targets < 2] / 1000, torch.ones(6, dtype=torch.float64), atol=0.15)
    exact = NegativeSampler(targets, 2)(index, targets[index])
    assert torch.equal(exact[:, 0], index)


def test_relax_moves_the_row_of_the_image_and_not_of_its_positive():
    teacher, student = pair_networks("resnet14", "resnet8")
    targets = torch.zeros(40, dtype=torch.int64).index_fill(0, torch.arange(20, 40), 1)
    method = CRD(student, teacher, Task(10, 32, 4, targets), nce_k=8, feat_dim=16, mode="relax")
    batch = Batch(torch.randn(4, 3, 32, 32), targets[:4], torch.arange(4))
    before = method.crd_loss.contrast.memory_v1.clone()
    method.train()(batch, FrozenTeacher(teacher)(batch.images), Progress(0, 240))
    moved = (method.crd_loss.contrast.memory_v1 != before).any(1)
    assert torch.equal(moved.nonzero().flatten(), batch.index)


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


def test_the_loss_takes_repdistillers_arguments():
    names = {"s_dim": 4, "t_dim": 5, "n_data": 40, "feat_dim": 6, "nce_k": 7, "nce_t": 0.07, "nce_m": 0.5}
    loss = CRDLoss(Namespace(**names))
    assert loss.contrast.memory_v1.shape == (40, 6)
    assert loss(torch.randn(3, 4), torch.randn(3, 5), torch.arange(3)).isfinite()

"""SemCKD: attention over all pairs of maps, whole batches."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller_zoo.semckd import attend, calibrated_loss, projector, squared_difference
from errors import UserError
from models.cost import count_parameters
from tests.check_values import g
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import build, doubles, take_steps

S6, T6 = g((4, 6, 8, 8), 0.29, 0.9), g((4, 6, 8, 8), 0.37, 0.2)


def test_semckds_pairs_have_the_published_value_where_attention_sums_to_one():
    attention = torch.rand(4, 2, 3, dtype=torch.float64).softmax(2)
    differences = squared_difference(S6, T6, nn.Identity())[:, None, None].expand(4, 2, 3)
    assert calibrated_loss(attention, differences).item() == pytest.approx(0.9917106054, rel=1e-9)


def test_semckd_is_the_formula():
    teacher, method = build("semckd", ("resnet14", "vgg8"), batch_size=8)
    batch = make_batch(8)
    student_output, teacher_output = method.student.outputs(batch.images), teacher(batch.images)
    s_maps, t_maps = student_output.maps[1:], teacher_output.maps[1:]

    def embed(module, feature_map):
        rows = feature_map.reshape(8, -1)
        similarity = torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
        first, _, second = module.layers
        hidden = F.relu(similarity @ first.weight.T + first.bias) @ second.weight.T + second.bias
        return hidden / hidden.norm(dim=1, keepdim=True)

    expected = 0.0
    for i, s_map in enumerate(s_maps):
        query = embed(method.queries[i], s_map)
        energies = [(query * embed(method.keys[j], t_map)).sum(1) for j, t_map in enumerate(t_maps)]
        shares = torch.stack(energies, 1).softmax(1)
        for j, t_map in enumerate(t_maps):
            size = min(s_map.shape[2], t_map.shape[2])
            pooled_s, pooled_t = (F.adaptive_avg_pool2d(each, size) for each in (s_map, t_map))
            projected = method.projectors[i][j](pooled_s)
            expected += (shares[:, j] * (projected - pooled_t).square().mean((1, 2, 3))).sum() / (8 * len(s_maps))
    assert torch.allclose(method.feature_loss(student_output, teacher_output, None, None), expected, rtol=1e-4)
    assert [layer.out_features for layer in method.queries[0].layers if isinstance(layer, nn.Linear)] == [4, 2]
    assert len(method.projectors) == 4 and all(len(row) == 3 for row in method.projectors)


def test_semckds_projector_has_the_published_layers():
    assert count_parameters(projector(16, 8)) == 16 * 16 + 9 * 16 * 16 + 16 * 8 + 2 * 2 * 16


def test_the_gradient_of_attention_and_differences():
    parts = doubles((3, 2), (3, 2), (3, 2), (3, 2), (3, 2, 2))

    def loss(query1, query2, key1, key2, differences):
        attention = attend([query1, query2], [key1, key2])
        assert torch.allclose(attention.sum(2), torch.ones(3, 2, dtype=torch.float64))
        return calibrated_loss(attention, differences)

    assert torch.autograd.gradcheck(loss, parts)


def test_semckds_gradient_reaches_queries_keys_and_projectors():
    teacher, method = build("semckd", batch_size=16)
    take_steps(method, teacher, [make_batch(16)])
    for part in (method.queries, method.keys, method.projectors):
        assert all(parameter.grad.abs().max() > 0 for parameter in part.parameters())


def test_semckd_makes_no_step_on_a_short_batch():
    teacher, method = build("semckd", batch_size=6)
    losses, _ = take_steps(method, teacher, [make_batch(6)])
    assert set(losses) == {"ce", "semckd"}
    losses, _ = take_steps(method, teacher, [make_batch(5)])
    assert set(losses) == {"ce"}, "a part of a short batch has no such rows"
    assert method.min_batch == 6, "loaders leave a shorter last batch out"
    with pytest.raises(UserError, match="only 64 images for one of 65"):
        build("semckd", batch_size=65)

"""FT: factors, paraphraser and translator."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo.abound import Connector
from distiller_zoo.factor import FactorTransfer, Paraphraser, Translator
from distiller_zoo.kdsvd import KDSVD
from helper.loops import set_modes
from helper.recipes import recipe_of
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import PROGRESS, build, close, random_maps


def test_factors_are_the_formula_for_both_powers():
    student, teacher = random_maps((3, 4, 4, 4), (3, 6, 2, 2))
    pooled = F.avg_pool2d(student, 2)
    for p1, p2 in ((2, 1), (1, 1), (3, 1), (2, 2)):
        distances = []
        for s, t in zip(pooled, teacher, strict=True):
            s, t = ((each**p1).mean(0).flatten() for each in (s, t))
            distances.append((s / s.norm() - t / t.norm()).abs() ** p2)
        close([FactorTransfer(p1, p2)(student, teacher)], [torch.stack(distances).mean()])
        close([FactorTransfer(p1, p2)(teacher, student)], [torch.stack(distances).mean()])


def test_images_without_a_response_learn_nothing_from_others():
    """A zero map among others: no gradient there where the loss is of directions, and the others keep theirs."""
    losses = {
        "FactorTransfer": FactorTransfer(p1=1),
        "KDSVD": lambda s, t: sum(KDSVD()([s, s.flip(0)], [t, t.flip(0)])),
    }
    for name, loss in losses.items():
        student, teacher = random_maps((4, 3, 4, 4), (4, 3, 4, 4))
        student[0] = 0
        (gradient,) = torch.autograd.grad(loss(student.requires_grad_(), teacher), student)
        assert not gradient[0].any() and gradient[1:].flatten(1).any(1).all(), name


def test_the_modules_have_the_published_names_and_shapes():
    shapes = {name: (8, channels, size, size) for name, channels, size in (("s", 6, 8), ("t", 10, 8), ("up", 10, 16))}
    paraphraser, translator = Paraphraser(shapes["t"]), Translator(shapes["s"], shapes["t"])
    feature_map = torch.randn(8, 10, 8, 8)
    factor, reconstruction = paraphraser(feature_map)
    assert factor.shape == (8, 5, 8, 8) and reconstruction.shape == feature_map.shape
    assert torch.equal(paraphraser(feature_map, is_factor=True), factor)
    assert translator(torch.randn(8, 6, 8, 8)).shape == factor.shape
    assert list(dict(paraphraser.named_parameters())) == [
        f"{part}.{number}.{kind}"
        for part in ("encoder", "decoder")
        for number in (0, 3, 6)
        for kind in ("weight", "bias")
    ]
    assert {key.split(".")[1] for key in translator.state_dict()} == {"0", "1", "3", "4", "6", "7"}
    assert Paraphraser(shapes["t"], k=0.3, use_bn=True)(feature_map, is_factor=True).shape[1] == 3
    single = Paraphraser((8, 1, 8, 8)), Translator(shapes["s"], (8, 1, 8, 8))
    assert [part(torch.randn(8, width, 8, 8))[0].numel() for part, width in zip(single, (1, 6), strict=True)] == [
        512,
        64,
    ]
    connector = Connector([shapes["t"], shapes["s"], shapes["s"]], [shapes["t"], shapes["t"], shapes["up"]])
    assert {key.rsplit(".", 1)[0] for key in connector.state_dict()} == {
        f"connectors.{number}.{layer}" for number in (1, 2) for layer in ("conv", "bn")
    }
    connected = connector([feature_map, torch.randn(8, 6, 8, 8), torch.randn(8, 6, 8, 8)])
    assert connected[0] is feature_map and [tuple(each.shape) for each in connected[1:]] == [shapes["t"], shapes["up"]]
    assert connected[1].min() < 0, "no ReLU behind a connector"
    with pytest.raises(ValueError, match="zip"):
        Connector([shapes["s"]], [shapes["t"]] * 2)


def test_the_paraphraser_is_learned_first_and_left_alone_then():
    teacher, method = build("factor")
    first, main = method.stages(240)
    assert list(first.trained) == [method.paraphraser] and first.respond(None, None) is None
    assert (first.epochs, first.learning_rate, first.milestones) == (30, 0.01, ())
    assert method.paraphraser not in main.trained and method.translator in main.trained
    batch = make_batch()
    output = teacher(batch.images)
    set_modes(first, method)
    logits, losses = method(batch, output, PROGRESS, first)
    *_, last = output.maps
    assert logits is None and list(losses) == ["reconstruction"]
    assert torch.allclose(losses["reconstruction"], F.mse_loss(method.paraphraser(last)[1], last))
    set_modes(main, method)
    student = method.student.outputs(batch.images)
    *_, student_last = student.maps
    factors = method.translator(student_last), method.paraphraser(last, is_factor=True)
    losses = main.losses(student, output, batch.targets, batch.index, PROGRESS)
    assert set(losses) == {"ce", "factor"}
    assert torch.allclose(losses["factor"], FactorTransfer()(*factors))
    method.paraphraser.requires_grad_(True)  # its factor is a constant even so
    losses = main.losses(method.student.outputs(batch.images), output, batch.targets, batch.index, PROGRESS)
    losses["factor"].backward()
    assert all(parameter.grad is None for parameter in method.paraphraser.parameters())


def test_imagenets_form_scales_whole_factors_and_has_no_batch_norm_in_the_translator():
    recipe = recipe_of("imagenet", "resnet34", "resnet18", "factor")
    values = {name: recipe[name][0] for name in ("factor_norm", "translator_bn", "beta", "init_epochs")}
    assert values == {"factor_norm": "whole", "translator_bn": "none", "beta": 1000.0, "init_epochs": 1}
    _, method = build("factor", factor_norm="whole", translator_bn="none")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in method.translator.modules())
    student, teacher = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    unit = [each / each.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for each in (student, teacher)]
    assert torch.allclose(method.criterion(student, teacher), (unit[0] - unit[1]).abs().mean())

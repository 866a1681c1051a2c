"""SRRL, SemCKD, ReviewKD and SimKD: published values, gradients, pairs, odd batches, and what SimKD ships."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import train_cifar_student
from distiller_zoo import DISTILLERS, Predictor, Progress, Task
from distiller_zoo.reviewkd import WARMUP_EPOCHS, AttentionFusion, ReviewKD, hierarchical_context_loss
from distiller_zoo.semckd import SemCKD, attend, calibrated_loss, projector, squared_difference
from distiller_zoo.simkd import SimKD
from distiller_zoo.srrl import SRRL
from errors import UserError
from helper.loops import begin, train_step
from helper.networks import FrozenTeacher, read_teacher
from models import build_model
from models.backbone import FinalConv, Output, probe_shapes
from models.checkpoints import load_exported, read_checkpoint
from models.cost import count_parameters
from models.wrappers import ReusedClassifier, describe_wrapper
from scripts import export_student
from tests.check_values import g
from tests.conftest import make_batch, message_of, pair_networks

NAMES = ("srrl", "semckd", "reviewkd", "simkd")
VARIANTS = [(name, {}) for name in NAMES] + [("srrl", {"srrl_form": "map"})]
#: The copy of the teacher's classifier, where a method has one.
FROZEN = {"srrl": "teacher_classifier", "simkd": "student.classifier"}
PAIRS = (
    ("resnet14", "resnet8"),
    ("wrn_16_2", "wrn_16_1"),
    ("vgg13", "vgg8"),
    ("resnet14", "MobileNetV2"),
    ("vgg13", "ShuffleV2"),
    ("ShuffleV2", "wrn_16_1"),
    ("MobileNetV2", "resnet8"),
)
SHORT = ("--batch_size", "64", "--max_steps", "2")


def task(batch_size=4):
    return Task(10, 32, batch_size, torch.arange(64) % 10)


def build(name, pair=("resnet14", "resnet8"), batch_size=4, **hyper_parameters):
    teacher, student = pair_networks(*pair)
    return FrozenTeacher(teacher), DISTILLERS[name](student, teacher, task(batch_size), **hyper_parameters)


def take_steps(method, teacher, batches):
    """Steps of the main stage; returns the losses of the last, and the stage."""
    stage = method.main_stage(240)
    begin(stage, method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    for batch in batches:
        teacher_output = teacher(batch.images, method.teacher_preact)
        losses, _ = train_step(method, stage, optimizer, batch, teacher_output, Progress(120, 240))
    return losses, stage


def outputs(maps, pooled, logits=None, activated=None) -> Output:
    return Output(maps, maps[-1], maps[-1] if activated is None else activated, pooled, logits)


# Published values: waves as inputs, computed once from the official functions.

S6, T6 = g((4, 6, 8, 8), 0.29, 0.9), g((4, 6, 8, 8), 0.37, 0.2)


def test_the_hierarchical_context_loss_has_the_published_values():
    assert hierarchical_context_loss(S6, T6).item() == pytest.approx(0.5557525229, rel=1e-9)
    es, et = (g((4, 12), *parts)[:, :, None, None] for parts in ((0.37, 0.2), (0.83, 1.1)))
    assert hierarchical_context_loss(es, et).item() == pytest.approx(1.0896527686, rel=1e-9)


@pytest.mark.parametrize(
    ("height", "sizes", "weights"),
    [(7, (4, 2, 1), 1.875), (4, (2, 1), 1.75), (2, (1,), 1.5), (1, (), 1.0)],
)
def test_context_weights_count_the_sizes_that_are_used(height, sizes, weights):
    a, b = torch.randn(2, 3, height, height), torch.randn(2, 3, height, height)
    expected = F.mse_loss(a, b)
    for k, size in enumerate(sizes, 1):
        expected += 0.5**k * F.mse_loss(F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size))
    assert torch.allclose(hierarchical_context_loss(a, b), expected / weights)


def test_srrls_statistics_have_the_published_value():
    _, method = build("srrl", srrl_form="map")
    method.connector, method.teacher_classifier = nn.Identity(), nn.Identity()
    pooled = T6.mean((2, 3))
    student, teacher = outputs([S6], S6.mean((2, 3))), outputs([T6], pooled)
    teacher = teacher._replace(logits=S6.mean((2, 3)))  # the term of the logits is 0
    assert method.feature_loss(student, teacher, None, None).item() == pytest.approx(0.0017330749, abs=5e-11)


def test_semckds_pairs_have_the_published_value_where_attention_sums_to_one():
    attention = torch.rand(4, 2, 3, dtype=torch.float64).softmax(2)
    differences = squared_difference(S6, T6, nn.Identity())[:, None, None].expand(4, 2, 3)
    assert calibrated_loss(attention, differences).item() == pytest.approx(0.9917106054, rel=1e-9)


# The formulas, written plainly.


def test_srrls_forms_are_the_formula():
    teacher, method = build("srrl", ("vgg13", "resnet8"))
    batch = make_batch(5)
    student_output, teacher_output = method.student.outputs(batch.images), teacher(batch.images)
    conv, bn, _ = method.connector
    for form in ("pooled", "map"):
        method.srrl_form = form
        if form == "map":
            projected = F.conv2d(student_output.activated, conv.weight)
            vector = F.relu(F.batch_norm(projected, None, None, bn.weight, bn.bias, True)).mean((2, 3))
        else:
            projected = student_output.pooled @ conv.weight[:, :, 0, 0].T
            vector = F.relu(F.batch_norm(projected, None, None, bn.weight, bn.bias, True))
        logits = vector @ teacher.network.classifier.weight.T + teacher.network.classifier.bias
        expected = (vector - teacher_output.pooled).square().mean() + (logits - teacher_output.logits).square().mean()
        loss = method.feature_loss(student_output, teacher_output, None, None)
        assert torch.allclose(loss, expected, rtol=1e-4), form


def test_srrls_connector_starts_as_published():
    _, method = build("srrl", ("vgg13", "vgg8"))
    assert method.connector[0].weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.01)


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


def test_reviewkd_is_the_formula():
    teacher, method = build("reviewkd", ("resnet14", "resnet8"))
    batch = make_batch(4)
    student_output = method.student.outputs(batch.images)
    teacher_output = teacher(batch.images, preact=True)
    assert method.teacher_preact and not method.student_preact

    def normalise(block, x, padding):
        conv, bn = block
        return F.batch_norm(F.conv2d(x, conv.weight, padding=padding), None, None, bn.weight, bn.bias, True)

    s_maps = [student_output.pooled[:, :, None, None], *student_output.maps[:0:-1]]
    t_maps = [teacher_output.pooled[:, :, None, None], *teacher_output.maps[:0:-1]]
    expected, passed = 0.0, None
    for fusion, s_map, t_map in zip(method.fusions, s_maps, t_maps, strict=True):
        x = normalise(fusion.reduce, s_map, 0)
        if passed is not None:
            y = F.interpolate(passed, size=x.shape[-2:], mode="nearest")
            z = torch.sigmoid(F.conv2d(torch.cat([x, y], 1), fusion.attention.weight, fusion.attention.bias))
            x = x * z[:, 0][:, None] + y * z[:, 1][:, None]
        expected += hierarchical_context_loss(normalise(fusion.expand, x, 1), t_map)
        passed = x
    assert torch.allclose(method.feature_loss(student_output, teacher_output, None, None), expected, rtol=1e-4)


def test_reviewkds_convolutions_start_as_published():
    fusion = AttentionFusion(200, 100, 50, is_deepest=True)
    for convolution, fan_in in ((fusion.reduce[0], 200), (fusion.expand[0], 900)):
        assert convolution.weight.abs().max().item() == pytest.approx((3 / fan_in) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("pair", "mid", "ins", "outs"),
    [  # the tables of the official code, shallow to deep
        (("resnet32x4", "resnet8x4"), 256, [64, 128, 256, 256], [64, 128, 256, 256]),
        (("resnet56", "resnet20"), 64, [16, 32, 64, 64], [16, 32, 64, 64]),
        (("wrn_40_2", "wrn_40_1"), 64, [16, 32, 64, 64], [32, 64, 128, 128]),
        (("wrn_40_2", "ShuffleV1"), 512, [240, 480, 960, 960], [32, 64, 128, 128]),
        (("resnet32x4", "ShuffleV2"), 512, [116, 232, 464, 1024], [64, 128, 256, 256]),
        (("ResNet50", "vgg8"), 512, [128, 256, 512, 512, 512], [256, 512, 1024, 2048, 2048]),
        (("vgg13", "MobileNetV2"), 512, [12, 16, 48, 160, 1280], [128, 256, 512, 512, 512]),
        # ours: of networks with different numbers of levels the deepest are paired
        (("resnet14", "vgg8"), 512, [256, 512, 512, 512], [16, 32, 64, 64]),
        (("vgg13", "resnet8"), 64, [16, 32, 64, 64], [256, 512, 512, 512]),
    ],
    ids=lambda value: "->".join(value) if isinstance(value, tuple) else "",
)
def test_reviewkds_tables_are_read_off_the_networks(pair, mid, ins, outs):
    with torch.device("meta"):
        teacher, student = pair_networks(*pair)
        fusions = ReviewKD(student, teacher, task()).fusions
    assert [fusion.reduce[0].in_channels for fusion in fusions] == ins[::-1]
    assert [fusion.expand[0].out_channels for fusion in fusions] == outs[::-1]
    assert {fusion.reduce[0].out_channels for fusion in fusions} == {mid}
    assert [fusion.attention is None for fusion in fusions] == [True] + [False] * (len(ins) - 1)


def test_reviewkds_weight_rises_from_zero():
    teacher, method = build("reviewkd", beta=2.0, gamma=0.0)
    batch = make_batch()
    student, teacher_output = method.student.outputs(batch.images), teacher(batch.images, True)

    def at(epoch):
        return method.losses(student, teacher_output, batch.targets, batch.index, Progress(epoch, 240))["reviewkd"]

    full = 2 * method.feature_loss(student, teacher_output, None, None)
    for epoch, share in ((0, 0.0), (1, 0.05), (10, 0.5), (20, 1.0), (239, 1.0)):
        assert torch.allclose(at(epoch), share * full, rtol=1e-4), epoch
    method.warmup_epochs = 40
    assert torch.allclose(at(10), 0.25 * full, rtol=1e-4)
    method.warmup_epochs = 0
    assert torch.allclose(at(0), full, rtol=1e-4)
    assert WARMUP_EPOCHS.full_run == 240


# Gradients.


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("height", [5, 2, 1])
def test_the_gradient_of_the_context_loss(height):
    student, teacher = doubles((2, 2, height, height), (2, 2, height, height))
    assert torch.autograd.gradcheck(hierarchical_context_loss, (student, teacher.detach()))


def test_the_gradient_of_attention_and_differences():
    parts = doubles((3, 2), (3, 2), (3, 2), (3, 2), (3, 2, 2))

    def loss(query1, query2, key1, key2, differences):
        attention = attend([query1, query2], [key1, key2])
        assert torch.allclose(attention.sum(2), torch.ones(3, 2, dtype=torch.float64))
        return calibrated_loss(attention, differences)

    assert torch.autograd.gradcheck(loss, parts)


def test_the_gradient_of_a_fused_level():
    deepest, next_level = (AttentionFusion(3, 2, 4, is_deepest).double() for is_deepest in (True, False))
    maps = doubles((3, 3, 1, 1), (3, 3, 2, 2))
    target = torch.randn(3, 4, 4, 4, dtype=torch.float64)

    def loss(deep, shallow):
        _, passed = deepest(deep, None, deep.shape[2:])
        result, _ = next_level(shallow, passed, target.shape[2:])
        return hierarchical_context_loss(result, target)

    assert torch.autograd.gradcheck(loss, maps)


@pytest.mark.parametrize("form", ["pooled", "map"])
def test_the_gradient_of_srrl(form):
    _, method = build("srrl", srrl_form=form)
    method = method.double()
    method.connector[2] = nn.Identity()  # no kinks where the differences are taken
    teacher = outputs([T6], torch.randn(3, 64, dtype=torch.float64), torch.randn(3, 10, dtype=torch.float64))

    def loss(feature_map):
        return method.feature_loss(outputs([feature_map], feature_map.mean((2, 3))), teacher, None, None)

    assert torch.autograd.gradcheck(loss, doubles((3, 64, 1, 2)), fast_mode=True)


def test_semckds_gradient_reaches_queries_keys_and_projectors():
    teacher, method = build("semckd", batch_size=16)
    take_steps(method, teacher, [make_batch(16)])
    for part in (method.queries, method.keys, method.projectors):
        assert all(parameter.grad.abs().max() > 0 for parameter in part.parameters())


# Training.


@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
@pytest.mark.parametrize(("name", "flags"), VARIANTS, ids=lambda value: str(value))
def test_three_steps_train_what_should_be_trained(name, flags, pair):
    teacher, method = build(name, pair, alpha=0.5, **flags)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    losses, stage = take_steps(method, teacher, [make_batch() for _ in range(3)])
    assert name in losses and all(torch.isfinite(value) for value in losses.values())
    trained = {id(parameter) for module in stage.trained for parameter in module.parameters()}
    frozen = {key for key, parameter in method.named_parameters() if id(parameter) not in trained}
    assert frozen == {f"{FROZEN[name]}.{key}" for key in ("weight", "bias") if name in FROZEN}
    for key, parameter in method.named_parameters():
        if key in frozen:
            assert parameter.grad is None and torch.equal(parameter, before[key]), key
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(key.startswith("teacher.") for key in method.state_dict())


@pytest.mark.parametrize(("name", "flags"), VARIANTS, ids=lambda value: str(value))
def test_each_weight_scales_its_own_term(name, flags):
    results = {}
    for changed in (None, "gamma", "alpha", "beta"):
        torch.manual_seed(0)
        weights = {"gamma": 1.0, "alpha": 1.0, "beta": 1.0} | ({changed: 2.0} if changed else {})
        teacher, method = build(name, **weights, **flags)
        batch = make_batch()
        output = teacher(batch.images, method.teacher_preact)
        results[changed] = method.train()(batch, output, Progress(120, 240))[1]
    for weight, term in (("gamma", "ce"), ("alpha", "kd"), ("beta", name)):
        assert set(results[weight]) == {"ce", "kd", name}
        for key, value in results[weight].items():
            assert torch.allclose(value, results[None][key] * (2 if key == term else 1)), (weight, key)


@pytest.mark.parametrize(("name", "flags"), VARIANTS, ids=lambda value: str(value))
@pytest.mark.parametrize("fault", ["zeros", "duplicates", "gaps", "two"])
def test_degenerate_batches_have_finite_losses_and_gradients(name, flags, fault):
    size = 2 if fault == "two" else 4
    teacher, method = build(name, batch_size=size, alpha=1.0, gamma=1.0, **flags)
    batch = make_batch(size)
    if fault == "duplicates":
        batch = batch._replace(images=batch.images[:1].expand(size, -1, -1, -1).clone())
    method.train()
    student, output = method.respond(batch.images, None), teacher(batch.images, method.teacher_preact)
    if fault == "zeros":
        student, output = (
            Output([m * 0 for m in each.maps], *(value * 0 for value in each[1:])) for each in (student, output)
        )
    if fault == "gaps":
        gap = 500.0 * F.one_hot(torch.arange(size), 10)
        student, output = student._replace(logits=student.logits + gap), output._replace(logits=output.logits - gap)
    losses = method.losses(student, output, batch.targets, batch.index, Progress(120, 240))
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(parameter.grad).all() for parameter in method.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(("name", "flags"), VARIANTS, ids=lambda value: str(value))
def test_losses_are_float32_where_the_networks_are_not(name, flags):
    teacher, method = build(name, alpha=1.0, **flags)
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = teacher(batch.images, method.teacher_preact)
        logits, losses = method.train()(batch, output, Progress(120, 240))
    sum(losses.values()).backward()
    assert logits.dtype == torch.bfloat16 and name in losses
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


@pytest.mark.parametrize("name", ["srrl", "reviewkd", "semckd"])
def test_one_image_is_refused(name):
    with pytest.raises(UserError, match=r"--batch_size: .* at least 2"):
        build(name, batch_size=1)


def test_simkd_trains_on_one_image():
    teacher, method = build("simkd", batch_size=1)
    assert torch.isfinite(take_steps(method, teacher, [make_batch(1)])[0]["simkd"])


def test_semckd_leaves_a_short_batch_to_the_other_terms():
    teacher, method = build("semckd", batch_size=6)
    losses, _ = take_steps(method, teacher, [make_batch(6)])
    assert set(losses) == {"ce", "semckd"}
    losses, _ = take_steps(method, teacher, [make_batch(5)])
    assert set(losses) == {"ce"} and method.min_batch == 2
    _, alone = build("semckd", batch_size=6, gamma=0.0)
    assert alone.min_batch == 6, "without other terms such a batch is left out"
    with pytest.raises(UserError, match="only 64 images for one of 65"):
        build("semckd", batch_size=65)


# What SimKD ships.


def test_simkds_projector_has_the_published_size():
    _, method = build("simkd", ("resnet32x4", "resnet8x4"))
    assert count_parameters(method.student.projector) == 214_016
    assert [type(layer) for layer in method.student.projector] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    _, narrower = build("simkd", ("resnet32x4", "resnet8x4"), projector_factor=4)
    assert count_parameters(narrower.student.projector) < 214_016 / 2
    with pytest.raises(UserError, match="--projector_factor: must be at most 64"):
        build("simkd", projector_factor=65)


@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
def test_simkd_ships_student_projector_and_the_teachers_classifier(pair):
    teacher, method = build("simkd", pair)
    plain = build_model(pair[1], 10)
    take_steps(method, teacher, [make_batch() for _ in range(3)])
    method.double().eval()
    exported, images = method.export(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(exported(images), Predictor(method)(images))
        output = exported.outputs(images)
        classifier = teacher.network.get_classifier()
        pooled = output.activated.mean((2, 3)).float()
        assert torch.allclose(output.logits.float(), classifier(pooled), rtol=1e-4, atol=1e-5)
    assert isinstance(exported, ReusedClassifier) and not exported.training
    assert not any(a is b for a in exported.parameters() for b in method.parameters())
    assert count_parameters(exported) == (
        count_parameters(plain)
        - count_parameters(plain.get_classifier())
        + count_parameters(method.student.projector)
        + sum(values.numel() for values in classifier.buffers())
    )
    shapes, of_teacher = probe_shapes(exported, 32), probe_shapes(build_model(pair[0], 10), 32)
    assert shapes.pooled == of_teacher.pooled and shapes.final[0] == of_teacher.final[0]
    assert shapes.final[1] == min(probe_shapes(plain, 32).final[1], of_teacher.final[1])
    assert f"{count_parameters(method.student.projector):,}" in method.export_note()


@pytest.mark.parametrize("pair", [("wrn_16_2", "wrn_16_1"), ("vgg13", "resnet8"), ("resnet14", "MobileNetV2")])
def test_simkd_matches_the_maps_that_are_pooled(pair):
    teacher, method = build("simkd", pair)
    batch = make_batch()
    method.train()
    reference = copy.deepcopy(method.student)
    output = teacher(batch.images)
    losses = method(batch, output, Progress(0, 240))[1]
    _, final = reference.network.forward_maps(batch.images)
    student_map, teacher_map = reference.network.activate(final), output.activated
    size = min(student_map.shape[2], teacher_map.shape[2])
    student_map, teacher_map = (F.adaptive_avg_pool2d(each, size) for each in (student_map, teacher_map))
    assert set(losses) == {"simkd"}
    assert torch.allclose(losses["simkd"], F.mse_loss(reference.projector(student_map), teacher_map), rtol=1e-5)
    assert output.activated.min() >= 0, "the projector ends with a ReLU"


def test_an_exported_simkd_student_is_read_back_and_teaches(distil, tmp_path, capsys):
    run = distil(*SHORT, distill="simkd")
    assert "a projector (13,568 parameters) and the teacher's classifier (650) are kept" in capsys.readouterr().out
    path = export_student.main([str(run / "last.pth")])
    printed = capsys.readouterr().out
    assert "same class on 364 of 364" in printed and "note: a projector" in printed
    network, record = load_exported(read_checkpoint(path), "file")
    assert describe_wrapper(network) == record["wrapper"]
    assert record["wrapper"] == {"kind": "reused_classifier", "channels": 64, "size": 8, "factor": 2}
    parameters = count_parameters(build_model("resnet8", 10)) + 13_568
    assert count_parameters(network) == parameters and f"{parameters:,} parameters" in printed
    for source in (path, run / "last.pth"):
        teacher = read_teacher(str(source), "resnet8")
        assert isinstance(teacher.network, ReusedClassifier)
        for name in (*NAMES, "norm"):
            argv = ["--distill", name, "--model_s", "resnet8", "--save_dir", str(tmp_path / source.stem)]
            train_cifar_student.main([*argv, "--path_t", str(source), "--max_steps", "1", "--epochs", "1"])


def test_a_simkd_run_is_resumed(distil):
    run = distil(*SHORT, "--epochs", "1", distill="simkd")
    train_cifar_student.main(["--resume", str(run), "--epochs", "2", "--max_steps", "4"])
    assert read_checkpoint(run / "last.pth")["epoch"] == 2


@pytest.fixture
def final_conv_file():
    network = FinalConv(build_model("wrn_16_1", 10), 64)
    content = {"model": network.state_dict(), "model_name": "wrn_16_1", "num_classes": 10}
    return network.eval(), content


def test_files_with_a_final_convolution_are_read_in_both_spellings(final_conv_file):
    network, content = final_conv_file
    images = torch.randn(2, 3, 32, 32)
    for entry in ({"final_conv": True}, {"final_conv": True, "wrapper": describe_wrapper(network)}):
        loaded, _ = load_exported(content | entry, "file")
        with torch.no_grad():
            assert torch.equal(loaded(images), network(images))
    for wrapped in (loaded, ReusedClassifier(build_model("wrn_16_1", 10), 64, 8, 2)):
        assert len(wrapped.get_bn_before_relu()) == 3 and len(wrapped.get_feat_modules()) == 4


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "another architecture"),
        ({"wrapper": {"kind": "final_conv", "channels": 32}}, "another architecture"),
        ({"wrapper": {"kind": "reused_classifier", "channels": 64, "size": 8, "factor": 2}}, "another architecture"),
        ({"wrapper": {"kind": "final_conv"}}, "is damaged"),
        ({"wrapper": {"kind": "final_conv", "channels": 64, "size": 8}}, "is damaged"),
        ({"wrapper": {"kind": "final_conv", "channels": "64"}}, "is damaged"),
        ({"wrapper": {"kind": "final_conv", "channels": 0}}, "is damaged"),
        ({"wrapper": {"kind": "branches"}}, "unknown kind branches"),
    ],
)
def test_a_wrapper_that_does_not_fit_is_refused(final_conv_file, entry, message):
    with pytest.raises(UserError, match=message):
        load_exported(final_conv_file[1] | entry, "file")


def test_a_damaged_wrapper_entry_is_one_line(final_conv_file, tmp_path):
    path = tmp_path / "student.pth"
    torch.save(final_conv_file[1] | {"wrapper": {"kind": "branches"}}, path)
    argv = ["--distill", "kd", "--model_s", "resnet8", "--path_t", str(path)]
    assert "unknown kind" in message_of(train_cifar_student.main, argv)


def test_the_classes_are_the_methods():
    assert (SRRL, SemCKD, ReviewKD, SimKD) == tuple(DISTILLERS[name] for name in NAMES)

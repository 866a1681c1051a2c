"""NORM's loss, its options, its students on every pair, and the fold."""

import pytest
import torch
from torch.nn import functional as F

from distiller_zoo import Predictor, Progress, Task
from distiller_zoo.feature_transform import norm_loss
from distiller_zoo.kd import kl_divergence
from distiller_zoo.norm import NORM, FTBaseline, match_size, norm_weight, standardise_logits
from errors import UserError
from models.backbone import FinalConv
from models.cost import count_parameters
from tests.check_values import g
from tests.conftest import make_batch, pair_networks
from tests.distiller_zoo.helpers import FrozenTeacher, train_step

TASK = Task(10, 32, 8, torch.zeros(1, dtype=torch.int64))


def build(teacher_name="resnet14", student_name="resnet8", **hyper_parameters):
    teacher, student = pair_networks(teacher_name, student_name)
    return FrozenTeacher(teacher), NORM(student, teacher, TASK, **hyper_parameters)


def train_some_steps(method, teacher, steps=3, lr=0.01):
    """Steps on random images, so that no parameter or statistic keeps its initial value."""
    optimizer = torch.optim.SGD(method.parameters(), lr=lr, momentum=0.9)
    method.train()
    for _ in range(steps):
        batch = make_batch()
        losses, _ = train_step(
            method,
            method.main_stage(240),
            optimizer,
            batch,
            teacher(batch.images) if teacher else None,
            Progress(0, 240),
        )
    return losses


def test_the_terms_have_the_published_values():
    """Check values computed once from the official functions (waves as inputs)."""
    zs, zt, targets = g((4, 10), 0.7, 0.1, 2), g((4, 10), 0.45, 0.5, 3), torch.tensor([0, 3, 7, 9])
    student, teacher = standardise_logits(zs, 2.5), standardise_logits(zt, 2.5)
    assert F.cross_entropy(zs, targets).item() == pytest.approx(2.5942054000, abs=1e-9)
    assert kl_divergence(zs, zt, 4).item() == pytest.approx(2.5535618153, abs=1e-9)
    assert F.cross_entropy(student, targets).item() == pytest.approx(3.3448433614, abs=1e-9)
    assert kl_divergence(student, teacher, 4).item() == pytest.approx(4.7814957858, abs=1e-9)
    target = match_size(g((4, 6, 8, 8), 0.37, 0.2), 4, 4)
    assert norm_loss(g((4, 18, 4, 4), 0.61, 0.3), target).item() == pytest.approx(3.3509210361, abs=1e-9)


def test_the_kl_divergence_is_the_hand_formula_and_stays_finite_at_large_gaps():
    zs, zt = torch.randn(5, 7), torch.randn(5, 7)
    p, q = (zt / 4).softmax(1), (zs / 4).softmax(1)
    assert torch.allclose(kl_divergence(zs, zt, 4), 16 * (p * (p.log() - q.log())).sum() / 5, rtol=1e-4)
    far = torch.tensor([[500.0, 0.0], [0.0, 500.0]], requires_grad=True)
    loss = kl_divergence(far, -far.detach(), 1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(far.grad).all()


def test_logits_are_standardised_per_sample_and_left_alone_at_zero():
    logits = torch.randn(6, 20) * 7 + 3
    standard = standardise_logits(logits, 2.5)
    assert torch.allclose(standard.mean(1), torch.zeros(6), atol=1e-5)
    assert torch.allclose(standard.std(1, correction=0), torch.full((6,), 2.5), atol=1e-5)
    assert torch.equal(standardise_logits(logits, 0.0), logits)


def test_the_schedule_is_the_published_one_and_stretches():
    published = [norm_weight("cifar", epoch, 240) for epoch in range(240)]
    assert published == [0.1] * 10 + [0.5] * 10 + [1.0] * 160 + [0.5] * 30 + [0.1] * 30
    assert [norm_weight("cifar", epoch, 24) for epoch in range(24)] == published[5::10]
    assert [norm_weight("imagenet", epoch, 100) for epoch in (0, 5, 15, 60, 80, 99)] == [0.1, 0.5, 0.9, 0.5, 0.1, 0.1]
    assert norm_weight(0.7, 3, 10) == 0.7
    _, method = build()
    assert [method.schedule(Progress(epoch, 240)) for epoch in range(240)] == published


def test_the_logit_terms_read_the_standardised_logits_of_both_networks():
    teacher, method = build(gamma=0.5, alpha=2.0)
    batch = make_batch()
    seen = teacher(batch.images)
    logits, losses = method(batch, seen, Progress(0, 240))
    ours, theirs = standardise_logits(logits, 2.5), standardise_logits(seen.logits, 2.5)
    assert torch.allclose(losses["ce"], 0.5 * F.cross_entropy(ours, batch.targets))
    assert torch.allclose(losses["kd"], 2 * kl_divergence(ours, theirs, 4))


@pytest.mark.parametrize("position", ["pre", "post"])
def test_a_wrns_transform_is_matched_to_the_teachers_map_of_the_same_position(position):
    teacher, method = build("wrn_16_2", "wrn_16_1", ft_position=position)
    images, expand = torch.randn(2, 3, 32, 32), method.eval().transform.expand
    seen, final = teacher(images), method.student.forward_maps(images)[1]
    own, theirs = (final, seen.final) if position == "pre" else (method.student.activate(final), seen.activated)
    assert torch.allclose(method.respond(images, seen).norm_loss, norm_loss(expand(own), theirs), rtol=1e-4)


@pytest.mark.slow
def test_every_published_pair_takes_three_steps_and_folds(cifar_pair):
    teacher, method = build(*cifar_pair, alpha=0.5)
    losses = train_some_steps(method, teacher)
    assert set(losses) == {"ce", "kd", "norm"}
    assert all(torch.isfinite(value) for value in losses.values())
    without = [name for name, parameter in method.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient for {without}"
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_folds(method)


def assert_folds(method):
    """The exported network computes what the method predicts, in float64 to rounding."""
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    method.double().eval()
    exported = method.export()
    assert not any(a is b for a in exported.parameters() for b in method.parameters())
    with torch.no_grad():
        before, after = Predictor(method)(images), exported(images)
    assert torch.allclose(before, after, rtol=1e-10, atol=1e-10)
    return exported


@pytest.mark.parametrize("ft", ["default", "plain"])
@pytest.mark.parametrize("position", ["pre", "post"])
def test_a_wrn_keeps_one_convolution_only_where_its_relu_is_in_the_way(position, ft):
    teacher, method = build("wrn_16_2", "wrn_16_1", ft_position=position, ft=ft)
    plain = count_parameters(method.student)
    train_some_steps(method, teacher)
    exported = assert_folds(method)
    if position == "pre":
        assert isinstance(exported, FinalConv) and "1x1 convolution" in method.export_note()
        assert count_parameters(exported) == plain + 64 * 64 + 64
    else:
        assert not isinstance(exported, FinalConv) and method.export_note() == ""
        assert exported.state_dict().keys() == method.student.state_dict().keys()


def test_a_classifier_without_a_bias_keeps_the_convolution():
    teacher, student = pair_networks("resnet14", "resnet8")
    student.fc = torch.nn.Linear(64, 10, bias=False)
    method = NORM(student, teacher, TASK)
    train_some_steps(method, FrozenTeacher(teacher))
    assert isinstance(assert_folds(method), FinalConv) and "no bias" in method.export_note()
    _, wrn = pair_networks("wrn_16_2", "wrn_16_1")
    wrn.fc = torch.nn.Linear(64, 10, bias=False)
    with pytest.raises(UserError, match=r"--ft_position post: .*needs a bias"):
        NORM(wrn, teacher, TASK, ft_position="post")
    student.classifies_mean, student.get_classifier = False, None  # it ends in something else: nothing asks for it
    assert "more than one linear layer" in method.export_note()


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "MobileNetV2", "ShuffleV2"])
def test_a_folded_student_has_the_plain_students_class_and_keys(name):
    teacher, method = build("resnet14", name) if name == "resnet8" else build("vgg13", name)
    train_some_steps(method, teacher)
    exported = method.export()
    assert type(exported) is type(method.student)
    assert exported.state_dict().keys() == method.student.state_dict().keys()
    assert count_parameters(exported) == count_parameters(method.student)
    assert method.export_note() == "" and not exported.training


def test_forms_give_one_training_step():
    results = []
    for form in ("direct", "collapsed", "auto"):
        torch.manual_seed(3)
        teacher, method = build(ft_form=form, alpha=0.9)
        method, teacher = method.double(), teacher.double()
        batch = make_batch(8)
        batch = batch._replace(images=batch.images.double())
        optimizer = torch.optim.SGD(method.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        train_step(method.train(), method.main_stage(240), optimizer, batch, teacher(batch.images), Progress(100, 240))
        results.append(method.state_dict())
    for key, value in results[0].items():
        for other in results[1:]:
            assert torch.allclose(value, other[key], rtol=1e-11, atol=1e-12), key


@pytest.mark.parametrize(
    ("flag", "term"),
    [("gamma", "ce"), ("alpha", "kd"), ("beta", "norm"), ("beta1", "norm")],
    ids=lambda value: str(value),
)
def test_each_weight_scales_its_own_term(flag, term):
    values = []
    for weight in (1.0, 2.0):
        torch.manual_seed(0)
        teacher, method = build(**({"gamma": 1.0, "alpha": 1.0, "beta": 1.0, "beta1": 1.0} | {flag: weight}))
        torch.manual_seed(1)
        batch = make_batch()
        values.append(method.train()(batch, teacher(batch.images), Progress(0, 240))[1])
    for name in values[0]:
        assert torch.allclose(values[1][name], values[0][name] * (2 if name == term else 1)), name


def test_weights_of_zero_leave_their_terms_out():
    teacher, method = build(gamma=0.0, alpha=0.0)
    batch = make_batch()
    assert set(method(batch, teacher(batch.images), Progress(0, 240))[1]) == {"norm"}


def test_the_baseline_has_the_transform_and_no_teacher():
    _, student = pair_networks("resnet14", "resnet8")
    method = FTBaseline(student, None, TASK, ft="plain")
    assert set(train_some_steps(method, None)) == {"ce"}
    assert method.transform.teacher_channels == 64 and not method.transform.residual
    assert all(parameter.grad is not None for parameter in method.transform.parameters())
    assert_folds(method)
    with pytest.raises(UserError, match="must be one of default, plain"):
        FTBaseline(student, None, TASK, ft="none")


def test_without_a_transform_the_raw_maps_are_matched():
    teacher, method = build(ft="none", co_sponge=1, beta1=1.0)
    batch = make_batch()
    teacher_output = teacher(batch.images)
    losses = method.train()(batch, teacher_output, Progress(0, 240))[1]
    student_map = method.student.outputs(batch.images).final
    assert torch.allclose(losses["norm"], F.mse_loss(student_map, teacher_output.final))
    assert count_parameters(method) == count_parameters(method.student)
    assert method.export_note() == ""
    with pytest.raises(UserError, match=r"--ft none.*equal channels \(student 64, teacher 128\)"):
        build("wrn_16_2", "resnet8", ft="none", co_sponge=1)


def test_a_larger_student_map_is_pooled_and_said_so_unless_that_is_to_be_refused():
    teacher, student = pair_networks("MobileNetV2", "resnet8")
    assert "the student's is max-pooled" in NORM(student, teacher, TASK).notes()[0]
    assert "interpolated" in NORM(student, teacher, TASK, map_size="interpolate").notes()[0]
    with pytest.raises(UserError, match=r"larger than the teacher's.*--map_size interpolate"):
        NORM(student, teacher, TASK, larger_student="refuse")


def test_a_larger_teacher_map_is_max_pooled():
    teacher_map = torch.randn(2, 3, 8, 4)
    assert torch.equal(match_size(teacher_map, 4, 4), F.max_pool2d(teacher_map, (2, 1)))
    assert match_size(teacher_map, 8, 4) is teacher_map


@pytest.mark.parametrize(("ft", "n", "student"), [("default", 3, "resnet8"), ("none", 1, "MobileNetV2")])
def test_a_larger_student_map_is_max_pooled_behind_its_expansion_where_wanted(ft, n, student):
    teacher = pair_networks("MobileNetV2", "resnet8")[0]
    student = pair_networks("MobileNetV2", student)[1]
    size = 32 if ft == "default" else 64
    method = NORM(student, teacher, TASK._replace(image_size=size), ft=ft, co_sponge=n).eval()
    images = torch.randn(2, 3, size, size)
    seen = teacher.outputs(images[:, :, ::2, ::2] if ft == "none" else images)
    final = student.forward_maps(images)[1]
    expanded = final if method.transform is None else method.transform.expand(final)
    assert final.shape[2] > seen.final.shape[2]
    pooled = F.adaptive_max_pool2d(expanded, seen.final.shape[2:])
    assert torch.allclose(method.respond(images, seen).norm_loss, norm_loss(pooled, seen.final), rtol=1e-5)
    if ft == "default":
        with pytest.raises(UserError, match="--ft_form collapsed"):
            NORM(student, teacher, TASK, ft_form="collapsed")


def test_n_below_one_is_refused():
    with pytest.raises(UserError, match=r"-s/--co_sponge: N must be at least 1"):
        build(co_sponge=0)


def test_losses_are_float32_and_finite_under_autocast():
    teacher, method = build(alpha=1.0)
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits, losses = method.train()(batch, teacher(batch.images), Progress(0, 240))
    assert logits.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())
    assert all(buffer.dtype != torch.bfloat16 for buffer in method.buffers())


def test_losses_are_called_outside_autocast_with_what_they_read_widened():
    class Spy(NORM):
        reads = ("maps",)

        def losses(self, student, teacher, targets, index, progress):
            assert not torch.is_autocast_enabled("cpu")
            assert student.logits.dtype == teacher.logits.dtype == student.maps[0].dtype == torch.float32
            assert student.pooled.dtype == teacher.pooled.dtype == torch.bfloat16  # not read, so not copied
            return {"spied": student.logits.sum()}

    teacher, student = pair_networks("resnet14", "resnet8")
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        teacher_output = teacher.outputs(batch.images)
        assert teacher_output.logits.dtype == torch.bfloat16
        assert "spied" in Spy(student, teacher, TASK)(batch, teacher_output, Progress(0, 240))[1]

"""The two forms of the transform are one mathematics."""

import copy

import pytest
import torch
from torch import nn

from distiller_zoo.feature_transform import FeatureTransform, multiply_adds, norm_loss
from distiller_zoo.norm import match_size
from models.backbone import probe_shapes
from tests.conftest import pair_networks, slow_but

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_transform(channels, teacher_channels, n, residual=True, form="direct", dtype=torch.float64):
    """A transform whose every parameter and buffer is away from its initial value."""
    transform = FeatureTransform(channels, teacher_channels, n, residual, form).to(dtype)
    with torch.no_grad():
        for _, bn in (transform.expand, transform.contract):
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_()
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2.0)
    return transform


def twins(transform):
    """The same transform in the direct and in the collapsed form."""
    collapsed = copy.deepcopy(transform)
    transform.form, collapsed.form = "direct", "collapsed"
    return transform, collapsed


def everything(transform, x, target):
    """Output, loss, gradients and buffers after one step's forward and backward pass, by name."""
    x = x.clone().requires_grad_()
    transform.zero_grad()
    out, loss = transform(x, target)
    # Any loss behind the transform would do; this one weighs every output differently.
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (loss + (out * weights).mean() * 10).backward()
    numbers = {"out": out, "loss": loss, "x.grad": x.grad}
    numbers |= {f"{name}.grad": parameter.grad for name, parameter in transform.named_parameters()}
    return numbers | dict(transform.named_buffers())


def assert_same(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        scale = theirs[name].double().abs().max().clamp_min(1e-300)
        error = ((value.double() - theirs[name].double()).abs().max() / scale).item()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("residual", [True, False], ids=["default", "plain"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_few_operations_are_the_same_step(dtype, residual):
    few = make_transform(6, 5, 3, residual, "collapsed", dtype)
    many = copy.deepcopy(few)
    few.few_operations, few.called = True, []
    matched = few._matched
    few._matched = lambda *given: few.called.append(True) or matched(*given)
    x, target = torch.randn(4, 6, 3, 3, dtype=dtype) + 1, torch.randn(4, 5, 3, 3, dtype=dtype) + 2
    assert_same(everything(few, x, target), everything(many, x, target), 10 * TOLERANCE[dtype])
    assert few.called


def test_few_operations_take_what_only_reads_one_of_both_results():
    transform = make_transform(6, 5, 3, True, "collapsed")
    few, x, target = copy.deepcopy(transform), torch.randn(4, 6, 3, 3).double(), torch.randn(4, 5, 3, 3).double()
    few.few_operations = True
    for read in (lambda out, loss: out.square().sum(), lambda out, loss: loss):
        for each in (transform, few):
            each.zero_grad()
            read(*each(x, target)).backward()
        for ours, theirs in zip(few.parameters(), transform.parameters(), strict=True):
            wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            found = torch.zeros_like(ours) if ours.grad is None else ours.grad
            assert torch.allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("case", ["eval", "frozen", "pooled", "small"])
def test_few_operations_stand_aside_where_they_do_not_apply(case):
    transform = make_transform(6, 5, 3, True, "collapsed")
    transform.few_operations = True
    transform.train(case != "eval")
    transform.contract[1].train(case in ("pooled", "small"))
    x, target = torch.randn(4, 6, 4, 4).double(), torch.randn(4, 5, 4, 4).double()
    if case == "pooled":
        target = target[..., :3, :3]
    if case == "small":
        x, target = x[:1, :, :2, :2], target[:1, :, :2, :2]
    transform._matched = None  # would fail
    out, loss = transform(x, target)
    assert out.shape == x.shape and loss > 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n", slow_but([2, 8, 16], 2))
def test_both_forms_agree_on_every_pair(cifar_pair, n, training):
    teacher, student = (probe_shapes(network, 32).final for network in pair_networks(*cifar_pair))
    channels, height, width = student
    wide = n * teacher[0] > 2**13  # minutes; one precision will do
    for dtype, tolerance in TOLERANCE.items() if not wide else [(torch.float64, TOLERANCE[torch.float64])]:
        # A BatchNorm over four pixels amplifies the rounding of float32 beyond the bound in either form.
        batches = [1 if dtype == torch.float64 or height > 2 else 16]
        if n * teacher[0] * channels <= 2**21:
            batches.append(channels // (height * width) + 1)  # more pixels than channels: the covariance's branch
        for batch in batches:
            transform = make_transform(channels, teacher[0], n, dtype=dtype).train(training)
            x = torch.randn(batch, *student, dtype=dtype).relu()
            target = match_size(torch.randn(batch, *teacher, dtype=dtype).relu(), height, width)
            direct, collapsed = twins(transform)
            assert_same(everything(collapsed, x, target), everything(direct, x, target), tolerance)


@pytest.mark.parametrize("residual", [True, False], ids=["default", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [1, 5])  # 12 pixels, 60 pixels
def test_both_forms_agree_for_any_batch_and_after_moves_and_copies(batch, training, residual):
    transform = make_transform(6, 5, 3, residual, dtype=torch.float32).train(training)
    x, target = torch.randn(batch, 6, 4, 3), torch.randn(batch, 5, 4, 3)
    expected = everything(copy.deepcopy(transform), x, target)
    restored = FeatureTransform(6, 5, 3, residual, "collapsed")
    restored.load_state_dict(transform.state_dict())
    moved = copy.deepcopy(transform).to("cpu", non_blocking=True)
    for other in (restored.train(training), moved, copy.deepcopy(transform)):
        other.form = "collapsed"
        assert_same(everything(other, x, target), expected, 1e-5)
    direct, collapsed = twins(copy.deepcopy(transform).double())
    x, target = x.double(), target.double()
    assert_same(everything(collapsed, x, target), everything(direct, x, target), 1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_both_forms_agree_where_the_expanded_map_is_averaged_to_a_smaller_target(training):
    """From 5 to 3 pixels some count twice, so that the mean is another one than that of the map."""
    direct, collapsed = twins(make_transform(6, 5, 3).train(training))
    x, target = torch.randn(4, 6, 5, 5).double(), torch.randn(4, 5, 3, 3).double()
    assert_same(everything(collapsed, x, target), everything(direct, x, target), 1e-12)


@pytest.mark.parametrize("form", ["direct", "collapsed"])
def test_gradients_are_those_of_finite_differences(form):
    transform = make_transform(4, 3, 2, form=form).train()
    target = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    parameters = dict(transform.named_parameters())

    def step(x, *values):
        fresh = copy.deepcopy(transform)
        state = dict(zip(parameters, values, strict=True))
        out, loss = torch.func.functional_call(fresh, state, (x, target))
        return out, loss

    x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    values = [parameter.detach().clone().requires_grad_() for parameter in parameters.values()]
    assert torch.autograd.gradcheck(step, (x, *values))


@pytest.mark.parametrize("form", ["direct", "collapsed"])
@pytest.mark.parametrize("value", [0.0, 1.0, 1000.0])
def test_constant_features_give_finite_numbers(form, value):
    transform = FeatureTransform(8, 6, 4, form=form).train()
    numbers = everything(transform, torch.full((4, 8, 3, 3), value), torch.full((4, 6, 3, 3), value))
    assert all(torch.isfinite(number).all() for number in numbers.values())


def test_under_autocast_statistics_output_and_loss_are_those_of_float32():
    direct, collapsed = twins(make_transform(8, 6, 4, dtype=torch.float32).train())
    x, target = torch.randn(4, 8, 3, 3).bfloat16(), torch.randn(4, 6, 3, 3).bfloat16()
    reference = copy.deepcopy(direct)
    out, loss = reference(x.float(), target.float())
    for transform in (direct, collapsed):
        with torch.autocast("cpu", torch.bfloat16):
            out16, loss16 = transform(x, target)
        assert out16.dtype == torch.bfloat16 and loss16.dtype == torch.float32
        assert torch.allclose(out16.float(), out, rtol=1e-2, atol=1e-2) and torch.allclose(loss16, loss, rtol=1e-5)
        for name, buffer in transform.named_buffers():
            assert buffer.dtype == dict(reference.named_buffers())[name].dtype
            assert torch.allclose(buffer, dict(reference.named_buffers())[name], rtol=1e-5, atol=1e-6), name


def test_the_collapsed_form_holds_nothing_of_the_size_of_the_expanded_map():
    transform = make_transform(8, 8, 16, dtype=torch.float32)
    x, target = torch.randn(16, 8, 8, 8), torch.randn(16, 8, 8, 8)
    expanded = 16 * 8 * 8 * 16 * 8

    def largest_saved(form: str) -> int:
        transform.form, sizes = form, []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t
        ):
            transform(x.clone().requires_grad_(), target)
        return max(sizes)

    assert largest_saved("direct") >= expanded
    assert largest_saved("collapsed") <= max(x.numel(), transform.expand[0].weight.numel())


def test_auto_takes_the_form_with_fewer_multiply_adds():
    wide = FeatureTransform(256, 256, 8)
    assert wide._chosen_form(torch.empty(64, 256, 8, 8), True) == "collapsed"
    assert wide._chosen_form(torch.empty(1, 256, 2, 2), True) == "direct"
    # P = 10, C = 3, Ct = 5, N = 2: 2 P C N Ct against P C (2 C + Ct) + 2 N Ct C^2
    assert multiply_adds(10, 3, 5, 2) == {"direct": 2 * 10 * 3 * 10, "collapsed": 10 * 3 * (6 + 5) + 2 * 10 * 9}


def test_the_affine_map_is_the_transform_in_eval_mode():
    for residual in (True, False):
        transform = make_transform(6, 5, 3, residual).eval()
        weight, bias = transform.as_affine()
        x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
        expected = nn.functional.conv2d(x, weight[:, :, None, None], bias)
        for form in ("direct", "collapsed"):
            transform.form = form
            assert torch.allclose(transform(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_the_loss_sums_the_segments_mean_squared_distances():
    expanded, target = torch.randn(3, 8, 2, 2), torch.randn(3, 4, 2, 2)
    by_hand = sum(nn.functional.mse_loss(segment, target) for segment in expanded.split(4, 1))
    assert torch.allclose(norm_loss(expanded, target), by_hand)
    repeated = 2 * nn.functional.mse_loss(expanded, target.repeat(1, 2, 1, 1))
    assert torch.allclose(norm_loss(expanded, target), repeated)


@pytest.mark.parametrize("form", ["direct", "collapsed"])
def test_a_single_pixel_in_training_is_a_clear_error(form):
    with pytest.raises(ValueError, match="more than"):
        FeatureTransform(4, 4, 2, form=form).train()(torch.randn(1, 4, 1, 1), torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize(("n", "form"), [(0, "auto"), (2, "fast")])
def test_illegal_arguments_are_refused(n, form):
    with pytest.raises(ValueError):
        FeatureTransform(4, 4, n, form=form)

"""Transformers as students and teachers: tokens behind the contract, NORM on every token, the fold."""

import copy

import pytest
import torch
from timm import create_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torchvision.models import VisionTransformer

from distiller_zoo import DISTILLERS, Predictor, Progress, Task
from distiller_zoo.feature_transform import FeatureTransform, norm_loss
from models import build_model, torchvision_split
from models.backbone import FinalConv, evaluating, probe_shapes
from models.cost import count_multiply_adds
from models.external import External
from models.split import patches_to_map, tokens_to_columns
from tests.conftest import make_batch
from tests.distiller_zoo.helpers import train_step

SIZE, CLASSES = 64, 7
TASK = Task(CLASSES, SIZE, 4, torch.arange(8) % CLASSES)


def torchvision_vit() -> External:
    """torchvision's transformer in a small size, which none of its names has."""
    network = VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=4, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=CLASSES
    )
    torch.nn.init.normal_(network.heads.head.weight)  # torchvision begins with zeros
    return External("small", network, torchvision_split.split("small", network, CLASSES), CLASSES)


def timm(name: str):
    return lambda: build_model(f"timm:{name}", CLASSES, SIZE)


#: Name -> (how to build it, tokens before the patches, what the classifier reads of the tokens).
NETWORKS = {
    "torchvision": (torchvision_vit, 1, "a mean"),  # a class token
    "test_vit": (timm("test_vit"), 1, "a mean"),
    "test_vit2": (timm("test_vit2"), 1, "a function"),
    "test_vit3": (timm("test_vit3"), 1, "a function"),
    "mixer": (timm("gmixer_12_224"), 0, "the average"),
}


def build(name: str, dtype=torch.float64) -> External:
    torch.manual_seed(0)
    return NETWORKS[name][0]().to(dtype)


def images(dtype=torch.float64, n: int = 3):
    return torch.randn(n, 3, SIZE, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_shown_is_the_networks_own(name):
    network, (_, prefix, reads) = build(name), NETWORKS[name]
    with evaluating(network):
        output, logits = network.outputs(images()), network.network(images())
        _, tokens = network.forward_maps(images())
    assert torch.allclose(output.logits, logits, rtol=1e-12)
    assert tokens.shape[2] == prefix + output.final[0, 0].numel()
    assert torch.equal(output.final.flatten(2), tokens[:, :, prefix:, 0])
    assert torch.equal(output.maps[-1], output.final) and len(output.maps) == 4
    assert all(each.shape[2] == each.shape[3] for each in output.maps)
    assert f"reads {reads} of the tokens" in network.describe(SIZE) and f"of {SIZE}x{SIZE}" in network.describe(SIZE)
    if name == "mixer":
        assert network.classifies_average


@pytest.mark.parametrize("name", NETWORKS)
def test_what_an_image_costs_is_counted(name):
    """Also where a module reads a parameter, as the token that pools by attention."""
    assert count_multiply_adds(build(name, torch.float32), SIZE) > 10_000


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("name", "width"), [("torchvision", 24), ("test_vit", 64)])
def test_attention_is_counted_in_what_an_image_costs(name, width, trained):
    """Patches, then in every block queries, keys, values, their two products, the projection and two linear layers."""
    network = build(name, torch.float32).requires_grad_(trained)
    blocks = [module for module in network.modules() if type(module).__name__ in ("Block", "EncoderBlock")]
    hidden = next(layer.out_features for layer in blocks[0].mlp.modules() if isinstance(layer, torch.nn.Linear))
    patches = (SIZE // 16) ** 2
    tokens = 1 + patches
    block = tokens * width * (3 * width + 2 * tokens + width + 2 * hidden)
    expected = patches * 3 * 16**2 * width + len(blocks) * block + width * CLASSES
    assert count_multiply_adds(network, SIZE) == expected


def test_maps_are_timms_own_without_the_class_token():
    network = build("test_vit")
    with evaluating(network):
        shown = network.outputs(images())
        _, normalised = network.network.forward_intermediates(images(), norm=True)
        _, plain = network.network.forward_intermediates(images())
    assert torch.equal(shown.final, normalised[-1])
    assert all(torch.equal(ours, plain[number]) for ours, number in zip(shown.maps[:3], (0, 2, 3), strict=True))


def norm_method(student, teacher, image_size=SIZE, **hyper_parameters):
    task = TASK._replace(image_size=image_size)
    method = DISTILLERS["norm"](student, teacher, task, **({"co_sponge": 3} | hyper_parameters))
    return method.to(next(student.parameters()).dtype)


def scramble(transform: FeatureTransform) -> None:
    """Move every parameter and statistic away from its initial value."""
    for _, bn in (transform.expand, transform.contract):
        torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
        torch.nn.init.normal_(bn.bias)
        torch.nn.init.normal_(bn.running_mean)
        torch.nn.init.uniform_(bn.running_var, 0.5, 2)


@pytest.mark.parametrize("residual", ["default", "plain"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_fold_is_exact_or_one_linear_layer_that_is_named(name, residual):
    teacher = build_model("resnet14", CLASSES).double()
    method = norm_method(build(name), teacher, ft=residual).eval()
    scramble(method.transform)
    exported, reads = method.export(), NETWORKS[name][2]
    with torch.no_grad():
        expected, folded = Predictor(method)(images()), exported(images())
    assert (folded - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert isinstance(exported, FinalConv) == (reads == "a function")
    assert ("one linear layer" in method.export_note()) == (reads == "a function")
    if reads != "a function":
        assert exported.state_dict().keys() == method.student.state_dict().keys()
    assert exported.num_classes == CLASSES


@pytest.mark.parametrize("training", [True, False])
def test_the_transform_acts_on_every_token_and_the_patches_are_matched(training):
    transform = FeatureTransform(6, 5, 3, form="direct").double().train(training)
    scramble(transform)
    tokens, target = torch.randn(4, 6, 2 + 9, 1).double(), torch.randn(4, 5, 3, 3).double()
    alone = copy.deepcopy(transform)
    (conv1, bn1), (conv2, bn2) = alone.expand, alone.contract
    expanded = bn1(conv1(tokens))
    out, loss = transform(tokens, target, lambda columns: patches_to_map(columns, 2))
    assert torch.allclose(out, bn2(conv2(expanded)) + tokens, rtol=1e-12, atol=1e-12)
    patches = expanded[:, :, 2:, 0].unflatten(2, (3, 3))
    assert torch.allclose(loss, norm_loss(patches, target), rtol=1e-12)
    for name, buffer in alone.named_buffers():
        assert torch.allclose(buffer, transform.get_buffer(name)), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("prefix", "side", "target_side"), [(1, 4, 4), (0, 4, 4), (5, 4, 4), (1, 5, 3), (0, 5, 3)])
@pytest.mark.parametrize("batch", [1, 5])
def test_both_forms_agree_on_tokens_and_on_sizes_that_do_not_divide(prefix, side, target_side, training, batch):
    torch.manual_seed(2)
    results = []
    tokens, target = (
        torch.randn(batch, 6, prefix + side**2, 1).double(),
        torch.randn(batch, 5, target_side, target_side).double(),
    )
    first = FeatureTransform(6, 5, 3).double().train(training)
    scramble(first)
    for form in ("direct", "collapsed"):
        transform, x = copy.deepcopy(first), tokens.clone().requires_grad_()
        transform.form = form
        out, loss = transform(x, target, lambda columns: patches_to_map(columns, prefix))
        (10 * (out * out.detach().cos()).mean() + loss).backward()
        gradients = {name: parameter.grad for name, parameter in transform.named_parameters()}
        results.append({"out": out, "loss": loss, "x": x.grad, **gradients, **dict(transform.named_buffers())})
    direct, collapsed = results
    for name, value in direct.items():
        scale = value.double().abs().max().clamp_min(1e-300)
        assert (value.double() - collapsed[name].double()).abs().max() / scale <= 1e-12, name


@pytest.mark.slow
def test_memory_hardly_grows_with_n():
    """What a step of a ViT-S/16 keeps at 224 pixels and 64 images, in sizes without numbers: N = 16 within 5 % of 1."""

    def kept(n: int) -> int:
        sizes = {}

        def keep(tensor):
            sizes[id(tensor.untyped_storage())] = (tensor.untyped_storage(), tensor.untyped_storage().nbytes())
            return tensor

        transform = FeatureTransform(384, 384, n, form="collapsed")
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            columns = tokens_to_columns(network.forward_features(torch.empty(64, 3, 224, 224)))
            transform(columns, torch.empty(64, 384, 14, 14), lambda tokens: patches_to_map(tokens, 1))
        # Each parameter has a gradient and a momentum too.
        parameters = [*network.parameters(), *transform.parameters()]
        return sum(size for _, size in sizes.values()) + 8 * sum(each.numel() for each in parameters)

    network = create_model("vit_small_patch16_224")
    assert kept(16) < 1.05 * kept(1)


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
@pytest.mark.parametrize("distill", ["norm", "kd", "attention", "hint", "similarity"])
def test_a_transformer_is_trained_by_a_transformer(name, distill):
    teacher, student = (build_model(f"timm:{each}", CLASSES, SIZE) for each in ("test_vit2", name))
    method = DISTILLERS[distill](student, teacher.eval(), TASK, alpha=0.5)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01)
    batch = make_batch()
    batch = batch._replace(images=images(torch.float32, 4), targets=batch.targets % CLASSES)
    with torch.no_grad():
        seen = teacher.outputs(batch.images)
    for _ in range(2):
        losses, logits = train_step(method.train(), method.main_stage(2), optimizer, batch, seen, Progress(0, 2))
    assert logits.shape == (4, CLASSES) and all(torch.isfinite(value) for value in losses.values())
    without = [key for key, parameter in student.named_parameters() if parameter.grad is None]
    assert not without, without


def test_maps_whose_sizes_do_not_divide_are_averaged_or_interpolated():
    transformer, convolutional = (build_model(f"timm:{name}", CLASSES, 80) for name in ("test_vit", "test_resnet"))
    whole = norm_method(transformer, build_model("resnet14", CLASSES), 80)
    assert "5x5 and 20x20: the teacher's is max-pooled" in whole.notes()[0]
    method = norm_method(convolutional, transformer, 80)
    assert "3x3 and 5x5: the teacher's is average-pooled" in method.notes()[0]
    smaller, larger = torch.randn(2, 64, 3, 3), torch.randn(2, 64, 5, 5)
    assert torch.equal(method._target(larger, smaller.shape[2:]), F.adaptive_avg_pool2d(larger, 3))
    method = norm_method(convolutional, transformer, 80, map_size="interpolate")
    expected = F.interpolate(larger, (3, 3), mode="bilinear", antialias=True)
    assert torch.equal(method._target(larger, smaller.shape[2:]), expected) and "interpolated" in method.notes()[0]


def test_a_students_larger_map_is_averaged_behind_its_expansion_in_both_forms():
    student, teacher = (build_model(f"timm:{name}", CLASSES, 80) for name in ("test_vit", "test_resnet"))
    method = norm_method(student, teacher, 80, ft_form="collapsed").eval()
    assert "5x5 and 3x3: the student's is average-pooled" in method.notes()[0]
    tokens, small = torch.randn(2, 64, 1 + 25, 1), torch.randn(2, probe_shapes(teacher, 80).final[0], 3, 3)
    _, loss = method.transform(tokens, method._target(small, student.to_map(tokens).shape[2:]), student.to_map)
    expanded = student.to_map(method.transform.expand(tokens))
    assert torch.allclose(loss, norm_loss(F.adaptive_avg_pool2d(expanded, 3), small), rtol=1e-4)

"""Heads of every kind: none, other classes, two classifiers, merged branches; and what needs the plain average."""

import pytest
import torch

from distiller_zoo import DISTILLERS, Progress, Task
from errors import UserError
from models import build_model
from models.backbone import FinalConv, evaluating, select_classes
from models.external import External
from models.vgg import VGG
from models.wrappers import describe_wrapper, merge_branches, wrap
from tests.conftest import make_batch

SIZE, CLASSES = 64, 7
TASK = Task(CLASSES, SIZE, 4, torch.arange(8) % CLASSES)


def images(n: int = 2):
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def one_step(method, teacher):
    batch = make_batch()
    batch = batch._replace(images=images(4), targets=batch.targets % CLASSES)
    with torch.no_grad():
        seen = teacher.eval().outputs(batch.images)
    _, losses = method.train()(batch, seen, Progress(0, 2))
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_resnet", "torchvision:shufflenet_v2_x0_5"])
def test_an_encoder_without_a_classifier_teaches_what_reads_no_logits(name):
    encoder = build_model(name, 0)
    with evaluating(encoder):
        output = encoder.outputs(images())
    assert encoder.num_classes == 0 and output.logits.shape == (2, 0) and output.pooled.shape[1] > 0
    for distill in ("norm", "attention", "rkd", "hint"):
        method = DISTILLERS[distill](build_model("resnet8", CLASSES), encoder, TASK)
        assert all(loss.isfinite() for loss in one_step(method, encoder).values())
    for distill, weights in (("norm", {"alpha": 1.0}), ("kd", {}), ("dkd", {}), ("srrl", {})):
        with pytest.raises(UserError, match=r"no classifier, the data 7 classes.*-a 0"):
            DISTILLERS[distill](build_model("resnet8", CLASSES), encoder, TASK, **weights)


def test_a_teacher_of_other_classes_teaches_what_reads_no_logits():
    teacher = build_model("resnet14", 11)
    DISTILLERS["norm"](build_model("resnet8", CLASSES), teacher, TASK)
    with pytest.raises(UserError, match="11 classes, the data 7 classes"):
        DISTILLERS["norm"](build_model("resnet8", CLASSES), teacher, TASK, alpha=0.5)


@pytest.mark.parametrize("name", ["resnet8", "timm:test_vit", "timm:test_convnext", "torchvision:shufflenet_v2_x0_5"])
def test_a_subset_of_the_columns_is_a_network_of_fewer_classes(name):
    network = build_model(name, 10).eval()
    columns = [7, 0, 3]
    few = select_classes(network, columns).eval()
    with torch.no_grad():
        assert torch.allclose(few(images()), network(images())[:, columns], atol=1e-6)
    assert few.num_classes == 3 and network.num_classes == 10
    for wrong in ([0, 0], [10], [-1]):
        with pytest.raises(UserError, match="different numbers from 0 to 9"):
            select_classes(network, wrong)


@pytest.mark.parametrize("name", ["timm:deit_tiny_distilled_patch16_224", "timm:resnetv2_18", "timm:pit_ti_224"])
def test_a_head_that_is_not_one_linear_layer_teaches_and_says_what_it_cannot(name):
    network = build_model(name, CLASSES, SIZE)
    with evaluating(network):
        assert torch.allclose(network.outputs(images()).logits, network.network(images()), atol=1e-5)
    for distill in ("kd", "norm", "attention"):
        method = DISTILLERS[distill](build_model("resnet14", CLASSES), network, TASK, alpha=1.0)
        one_step(method, network)
    with pytest.raises(UserError, match=r"--distill (simkd|method)"):
        DISTILLERS["simkd"](build_model("resnet8", CLASSES), network, TASK)


@pytest.mark.parametrize("name", ["timm:efficientvit_m0", "timm:shvit_s1"])
def test_a_layer_of_the_head_that_changes_nothing_before_training_is_found(name):
    """A BatchNorm in front of the classifier, whose weights, biases and statistics are 1 and 0 at first."""
    network = build_model(name, CLASSES, SIZE)
    (norm,) = (module for module in network.modules() if isinstance(module, torch.nn.BatchNorm1d))
    assert norm.weight.eq(1).all() and norm.running_mean.eq(0).all() and network.training
    torch.nn.init.normal_(norm.running_mean)
    with evaluating(network):
        assert torch.allclose(network.outputs(images()).logits, network.network(images()), atol=1e-5)
    assert not network.classifies_average and not network.classifies_mean


def test_a_layer_behind_the_average_is_no_average_before_it_is_trained_either():
    """As the head's BatchNorm, if the pooled vector is what comes behind it."""
    network = build_model("timm:test_resnet", CLASSES, SIZE)
    norm = network.network.global_pool = torch.nn.Sequential(network.network.global_pool, torch.nn.BatchNorm1d(96))
    again = External("test", network.network, network.split, CLASSES)
    assert network.classifies_average and not again.classifies_average
    assert norm[1].weight.eq(1).all() and norm[1].running_var.eq(1).all()


def test_features_are_dropped_where_the_network_does_it_itself():
    """One network of timm drops behind what it calls the features before the classifier."""
    network = build_model("timm:lcnetv2_small", CLASSES, SIZE, {"drop_rate": 0.5}).train()
    images_of_a_batch = images(4)
    torch.manual_seed(0)
    expected = network.network(images_of_a_batch)
    torch.manual_seed(0)
    assert torch.allclose(network(images_of_a_batch), expected, atol=1e-5)


def test_a_transform_stays_one_layer_where_two_classifiers_read_the_tokens():
    student, teacher = (
        build_model("timm:deit_tiny_distilled_patch16_224", CLASSES, SIZE),
        build_model("resnet14", CLASSES),
    )
    method = DISTILLERS["norm"](student, teacher, TASK)
    one_step(method, teacher)
    exported = method.eval().export()
    assert isinstance(exported, FinalConv) and exported.num_classes == CLASSES
    with torch.no_grad():
        assert torch.allclose(exported(images()), method.predict(images()), atol=1e-4)


def test_a_head_apart_from_the_last_map_cannot_be_trained_by_norm():
    student = build_model("timm:pit_ti_224", CLASSES, SIZE)
    with pytest.raises(UserError, match=r"--distill norm: .*its head does not read that map"):
        DISTILLERS["norm"](student, build_model("resnet14", CLASSES), TASK)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050", "timm:test_convnext"])
def test_simkd_reuses_only_a_classifier_of_the_plain_average(name):
    network = build_model(name, CLASSES)
    with pytest.raises(UserError, match="--distill simkd reuses the teacher's classifier"):
        DISTILLERS["simkd"](build_model("timm:test_resnet", CLASSES), network, TASK)
    teacher = build_model("timm:test_resnet", CLASSES)
    one_step(DISTILLERS["simkd"](network, teacher, TASK), teacher)


@pytest.mark.parametrize("distill", ["reviewkd", "distpro", "abound"])
def test_pre_activations_are_refused_when_the_method_is_built(distill):
    with pytest.raises(UserError, match=f"--distill {distill}.*before their last ReLU.*timm:test_resnet"):
        DISTILLERS[distill](build_model("resnet8", CLASSES), build_model("timm:test_resnet", CLASSES), TASK)


def with_statistics(network):
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.running_var, module.weight):
                torch.nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.running_mean, module.bias):
                torch.nn.init.normal_(values, 0, 0.1)
    return network.eval()


@pytest.mark.quick(1)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["timm:repvgg_a0", "timm:mobileone_s0", "timm:repghostnet_050"])
@torch.no_grad()
def test_branches_are_merged_and_the_file_says_so(name, kept):
    network = build_model(name, CLASSES)
    network = with_statistics(FinalConv(network, network.split.final[0]) if kept else network).double()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    merged, sentence = merge_branches(network, SIZE)
    assert "branches are merged" in sentence and len(merged.state_dict()) < len(state)
    expected = network(images().double())
    assert (merged(images().double()) - expected).abs().max() <= 1e-12 * expected.abs().max()
    again = wrap(build_model(name, CLASSES), describe_wrapper(merged), "a file").double().eval()
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(images().double()), merged(images().double()))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_networks_without_branches_and_with_branches_that_timm_cannot_merge_stay_as_they_are(monkeypatch):
    plain = build_model("resnet8", CLASSES).eval()
    assert merge_branches(plain, SIZE) == (plain, "")
    broken = build_model("timm:shvit_s1", CLASSES).eval()
    monkeypatch.setattr("timm.utils.reparameterize_model", lambda network, inplace: network.missing)
    kept, sentence = merge_branches(broken, SIZE)
    assert kept is broken and "branches are kept" in sentence


def test_a_head_is_looked_at_on_more_than_one_pixel():
    """At 32 pixels the map has one, whose maximum is its average."""
    small, large = (build_model("timm:test_resnet", CLASSES, size) for size in (32, 224))
    assert small.split.final[1:] == large.split.final[1:] == (5, 5)
    built_for_its_size = build_model("timm:gmixer_12_224", CLASSES, 32)
    assert built_for_its_size.split.final[1:] == (2, 2) and "32x32" in built_for_its_size.describe(32)


class Peaks(VGG):
    """Its head pools by maximum."""

    def classify(self, activated):
        pooled = activated.amax((2, 3))
        return pooled, self.get_classifier()(pooled)


class Squares(VGG):
    """Something is in front of its pooling."""

    def activate(self, final):
        return final.square()


@pytest.mark.parametrize("family", [Peaks, Squares])
def test_nothing_is_folded_into_a_head_of_its_own(family):
    """A network that writes a part of its head and says nothing more of it ships what was trained."""
    student, teacher = family([[8], [8], [8], [8], [8]], CLASSES), build_model("resnet14", CLASSES)
    method = DISTILLERS["norm"](student, teacher, TASK)
    one_step(method, teacher)
    exported = method.eval().export()
    assert isinstance(exported, FinalConv)
    with torch.no_grad():
        assert torch.allclose(exported(images()), method.predict(images()), atol=1e-4)
    assert Squares.classifies_average and not Peaks.classifies_average  # SimKD reuses the classifier of an average

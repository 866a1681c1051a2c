"""The contract that every network keeps."""

import pytest
import torch

from errors import UserError
from models import build_model, imagenet_model_dict, model_dict
from models.backbone import evaluating, normalises_single_values, probe_shapes
from models.checkpoints import identify, load_weights
from models.cost import count_parameters

#: Parameters with 100 classes, as published with RepDistiller.
PARAMETERS = {
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "MobileNetV2": 812_836,
    "ShuffleV1": 949_258,
    "ShuffleV2": 1_355_528,
    "ResNet50": 23_705_252,
}
ALL = dict.fromkeys(model_dict, 32) | dict.fromkeys(imagenet_model_dict, 64)


@pytest.mark.quick(7)
@pytest.mark.parametrize(("name", "size"), ALL.items())
def test_every_network_keeps_the_contract(name, size):
    network, x = build_model(name, 7).train(), torch.randn(2, 3, size, size)
    logits = network(x)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    without = [key for key, parameter in network.named_parameters() if parameter.grad is None]
    assert not without, f"no gradient for {without}"
    assert network.get_classifier().out_features == 7
    with evaluating(network):
        for preact in (False, True):
            features, logits = network(x, is_feat=True, preact=preact)
            output = network.outputs(x, preact)
            assert isinstance(features, list) and len(features) == len(output.maps) + 1
            assert torch.equal(logits, network(x)) and torch.equal(features[-1], output.pooled)
        assert output.activated.shape[2:] == output.final.shape[2:]
        assert torch.allclose(output.activated.mean((2, 3)), output.pooled, atol=1e-6)
        assert torch.allclose(network.get_classifier()(output.pooled), logits)


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", model_dict)
def test_asking_for_preactivations_does_not_move_the_running_statistics_twice(name):
    network, x = build_model(name, 5).train(), torch.randn(2, 3, 32, 32)
    twin = build_model(name, 5).train()
    twin.load_state_dict(network.state_dict())
    network(x)
    twin(x, is_feat=True, preact=True)
    for key, value in network.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


@pytest.mark.parametrize("name", ["resnet20", "vgg8", "ShuffleV1", "ResNet50", "wrn_16_2"])
def test_activated_preactivations_are_the_maps(name):
    network = build_model(name, 5).eval()
    x = torch.randn(2, 3, 32, 32)
    maps, preacts = network.outputs(x).maps, network.outputs(x, preact=True).maps
    if network.activates_final:
        assert torch.allclose(preacts[-1].relu(), network.outputs(x).activated)
    else:
        assert all(torch.equal(after, before.relu()) for after, before in zip(maps, preacts, strict=True))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNet", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_the_first_map_stays_behind_its_relu(name):
    """As in RepDistiller's lists of pre-activations."""
    network, x = build_model(name, 5).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(network.outputs(x).maps[0], network.outputs(x, preact=True).maps[0])


def test_one_batch_norm_that_sees_one_value_of_an_image_is_enough():
    sizes = {"vgg8": 8, "MobileNetV2": 16, "resnet8": 4}
    assert all(normalises_single_values(build_model(name, 5), size) for name, size in sizes.items())
    assert not any(normalises_single_values(build_model(name, 5), 2 * size) for name, size in sizes.items())


def test_parameter_counts_are_the_published_ones():
    assert {name: count_parameters(build_model(name, 100)) for name in PARAMETERS} == PARAMETERS


def test_networks_start_as_repdistillers_do():
    """Convolutions by He et al. over what they give, the classifiers of VGG and MobileNetV2 at 0.01."""
    for name, layer, fan_out in (
        ("resnet8x4", "layer3.0.conv1", 9 * 256),
        ("wrn_16_2", "block3.layer.0.conv1", 9 * 128),
    ):
        weight = build_model(name, 10).get_submodule(layer).weight
        assert weight.shape[1] == weight.shape[0] / 2, "so that what it reads would give another deviation"
        assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
    for name in ("vgg8", "MobileNetV2"):
        classifier = build_model(name, 100).get_classifier()
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.02) and not classifier.bias.any()
    assert not build_model("wrn_16_2", 10).fc.bias.any() and build_model("resnet8x4", 10).fc.bias.any()


def test_the_official_variant_of_mobilenetv2_lacks_its_two_relus():
    ours, official = build_model("MobileNetV2", 5).eval(), build_model("MobileNetV2_norm", 5).eval()
    official.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert (ours.outputs(x).final >= 0).all() and (official.outputs(x).final < 0).any()
    assert (ours.outputs(x).maps[0] >= 0).all() and (official.outputs(x).maps[0] < 0).any()


@pytest.mark.slow
def test_repdistillers_resnet50_loads_under_its_own_names():
    network = build_model("ResNet50", 10)
    theirs = {
        key.replace("downsample", "shortcut").replace("fc.", "linear."): value.clone()
        for key, value in network.state_dict().items()
    }
    fresh = build_model("ResNet50", 10)
    load_weights(fresh, "ResNet50", theirs, "file")
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in fresh.state_dict().items())


@pytest.mark.slow
def test_weights_are_recognised_and_another_architecture_is_refused():
    weights = build_model("resnet20", 9).state_dict()
    assert identify(weights) == ["resnet20"]
    with pytest.raises(UserError, match=r"another architecture than resnet32.*the weights fit resnet20"):
        load_weights(build_model("resnet32", 9), "resnet32", weights, "file")
    del weights["fc.bias"]
    with pytest.raises(UserError, match=r"no fc\.bias"):
        load_weights(build_model("resnet20", 9), "resnet20", weights, "file")


def test_an_unknown_name_lists_the_legal_ones_and_the_closest():
    with pytest.raises(UserError, match=r"did you mean resnet8x4\?.*ShuffleV2"):
        build_model("ResNet8X4x", 10)


def test_probing_leaves_every_mode_and_statistic_as_it_was():
    network = build_model("resnet8", 5).train()
    network.bn1.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    shapes = probe_shapes(network, 32)
    assert shapes.final == (64, 8, 8) and shapes.pooled == 64 and shapes.num_classes == 5
    assert network.training and not network.bn1.training
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def test_a_network_that_fails_without_a_word_is_named():
    class Silent(torch.nn.Module):
        def forward(self, x):
            raise AssertionError

    network = build_model("resnet8", 7)
    network.conv1 = Silent()
    with pytest.raises(UserError, match="cannot read images of 32x32 \\(AssertionError\\)"):
        probe_shapes(network, 32)

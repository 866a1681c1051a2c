"""Networks of torchvision and timm behind our contract: found, cut, distilled, folded, exported, read again."""

import json

import pytest
import torch
from timm.models.convmixer import ConvMixer

import train_cifar_student
from distiller_zoo import DISTILLERS, Task
from errors import UserError
from helper.command_line import student_parser
from helper.networks import read_teacher
from models import build_model, published, timm_split, torchvision_split
from models.backbone import FinalConv, probe_shapes
from models.folding import fold_batch_norms
from models.split import STAGES
from models.synchronised import synchronise
from scripts import export_student
from tests.conftest import message_of

#: One with an average pool and one whose head has more layers, from both libraries.
AVERAGED = ("torchvision:shufflenet_v2_x0_5", "timm:resnet10t")
NOT_AVERAGED = ("torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050")
SIZE = 64


@pytest.mark.parametrize("name", [*AVERAGED, *NOT_AVERAGED, "torchvision:regnet_y_400mf", "timm:test_convnext"])
def test_the_parts_are_the_network(name):
    network = build_model(name, 7).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        output, whole = network.outputs(images), network.network(images)
    assert torch.allclose(output.logits, whole, atol=1e-5)
    assert output.final.shape[1:] == probe_shapes(network, SIZE).final and output.final.shape[2] > 1
    assert torch.equal(output.maps[-1], output.final)
    sizes = [feature_map.shape[2] for feature_map in output.maps]
    assert len(sizes) > 2 and sizes == sorted(set(sizes), reverse=True)
    assert torch.allclose(network.get_classifier()(output.pooled), output.logits, atol=1e-5)
    assert str(output.final.shape[1]) in network.note


class ChannelsLast(torch.nn.Module):
    """A stage of 6 channels, which come last."""

    def __init__(self):
        super().__init__()
        self.conv, self.stage = torch.nn.Conv2d(3, 6, 4, 4), torch.nn.Identity()

    def forward_features(self, images):
        return self.stage(self.conv(images).permute(0, 2, 3, 1))


class Windows(torch.nn.Module):
    """A map of 16 channels and 8x8 pixels, in between as its 16 windows of 4 pixels: (B, 4, 16, 16)."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 16, 1, 28), torch.nn.Conv2d(16, 24, 1, 2)
        self.pool, self.flat, self.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(24, 5)

    def forward(self, images):
        windows = self.first(images).reshape(-1, 16, 4, 2, 4, 2).permute(0, 3, 5, 2, 4, 1).reshape(-1, 4, 16, 16)
        merged = torch.relu(windows).reshape(-1, 2, 2, 4, 4, 16).permute(0, 5, 3, 1, 4, 2).reshape(-1, 16, 8, 8)
        return self.fc(self.flat(self.pool(self.last(merged))))


def test_windows_of_an_attention_are_no_stage():
    network = Windows().eval()
    maps, _ = torchvision_split.split("windows", network, 5).features(network, torch.randn(2, 3, 224, 224))
    assert [tuple(each.shape) for each in maps] == [(2, 16, 8, 8), (2, 24, 4, 4)]


@pytest.mark.parametrize("size", [16, 24, 32])
def test_channels_that_come_last_are_found_in_a_map_as_wide_as_it_has_channels(size):
    network = ChannelsLast()
    images = torch.randn(2, 3, size, size)
    maps, last = timm_split._map_features({"stage": 6}, channels_last=True)(network, images)
    assert torch.equal(maps[0], network.conv(images)) and torch.equal(maps[0], last)


def test_of_blocks_with_one_resolution_some_are_shown():
    network = ConvMixer(dim=6, depth=9, patch_size=8, num_classes=7)
    network.default_cfg = {"input_size": (3, SIZE, SIZE)}
    maps, last = timm_split.split("mixer", network, 7).features(network, torch.randn(1, 3, SIZE, SIZE))
    assert [each.shape for each in maps] == [last.shape] * STAGES and torch.equal(maps[-1], last)


def test_a_size_that_a_network_cannot_read_is_refused_with_one_that_it_reads():
    with pytest.raises(UserError, match=r"cannot read images of 150x150 \(.*16.*\); it reads 160x160"):
        probe_shapes(build_model("timm:test_vit", 7), 150)


def test_stages_that_are_no_modules_of_the_network_are_left_out():
    network = build_model("timm:hrnet_w18_small", 7).eval()
    with torch.no_grad():
        output = network.outputs(torch.randn(1, 3, SIZE, SIZE))
    assert [feature_map.shape for feature_map in output.maps] == [output.final.shape]


def test_a_network_of_timm_can_be_exported():
    network, images = build_model("timm:resnet10t", 7).eval(), torch.randn(1, 3, SIZE, SIZE)
    program = torch.export.export(network, (images,)).module()
    assert torch.allclose(program(images), network(images), atol=1e-5)


@pytest.mark.parametrize("name", AVERAGED[:1])
def test_training_mode_reaches_both_parts(name):
    network = build_model(name, 7)
    images = torch.randn(4, 3, SIZE, SIZE)
    assert not torch.equal(network.train().outputs(images).logits, network.eval().outputs(images).logits)
    before = network.network.conv1[1].running_mean.clone()
    network.train().outputs(images)
    assert not torch.equal(before, network.network.conv1[1].running_mean)


def norm_method(name: str, n: int = 2):
    student, big = build_model(name, 7), build_model("resnet14", 7)
    task = Task(7, SIZE, 4, torch.arange(8) % 7)
    return DISTILLERS["norm"](student, big, task, co_sponge=n)


@pytest.mark.parametrize("name", [*AVERAGED, *NOT_AVERAGED])
def test_a_transform_that_does_nothing_leaves_the_network_as_it_is(name):
    method = norm_method(name).eval()
    torch.nn.init.zeros_(method.transform.contract[1].weight)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.allclose(method.predict(images), method.student.network(images), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*AVERAGED, *NOT_AVERAGED])
def test_the_transform_folds_into_the_classifier_or_says_why_not(name):
    method = norm_method(name).eval()
    for layer in (method.transform.expand[1], method.transform.contract[1]):
        torch.nn.init.uniform_(layer.running_var, 0.5, 2)
        torch.nn.init.normal_(layer.bias)
    exported, images = method.export(), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.allclose(exported(images), method.predict(images), atol=1e-4)
    assert isinstance(exported, FinalConv) == (name in NOT_AVERAGED)
    assert ("more than one linear layer" in method.export_note()) == (name in NOT_AVERAGED)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("torchvision:squeezenet1_1", "no linear classifier"), ("timm:crossvit_tiny_240", "none of the sizes")],
)
def test_a_network_that_cannot_be_read_is_refused_in_one_line(name, reason):
    with pytest.raises(UserError, match=reason) as caught:
        build_model(name, 7, SIZE)
    assert name in str(caught.value)


def test_unknown_names_are_refused_with_close_ones():
    parser = student_parser()
    for name, hint in (("torchvision:resnet19", "torchvision:resnet1"), ("timm:resnett18", "timm:resnet18")):
        with pytest.raises(UserError, match=hint):
            parser.parse_args(["--model_s", name])


def test_without_timm_its_names_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        build_model("timm:resnet18", 7)


@pytest.mark.slow
def test_a_foreign_student_is_distilled_exported_and_read_again_as_a_teacher(distil, capsys):
    name = AVERAGED[0]
    run = distil("--max_steps", "2", "--batch_size", "16", "-s", "2", student=name)
    assert run.name == "digits_norm_resnet14_torchvision-shufflenet_v2_x0_5_trial1_try"
    assert f"{name}: the last feature map is" in capsys.readouterr().out
    out = export_student.main([str(run / "last.pth")])
    assert "same class on 73 of 73" in capsys.readouterr().out
    read = read_teacher(str(out), None)
    assert read.name == name and read.num_classes == 10
    plain = torch.load(out, weights_only=True)["model"]
    foreign = {key.removeprefix("network."): value for key, value in plain.items()}
    torch.save(foreign, run / "plain.pth")
    again = read_teacher(str(run / "plain.pth"), name)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.network.eval()(images), read.network.eval()(images))
    assert json.loads((run / "config.json").read_text())["model_s"] == name


def test_a_method_that_needs_our_own_networks_says_so(teacher_run, save_dir):
    argv = ["--path_t", str(teacher_run / "last.pth"), "--model_s", AVERAGED[0], "--save_dir", str(save_dir)]
    message = message_of(train_cifar_student.main, [*argv, "--distill", "ofd"])
    assert f"which {AVERAGED[0]} does not show" in message
    assert "only our own networks" in message_of(train_cifar_student.main, [*argv[2:], "--distill", "one"])


@pytest.mark.slow
def test_torchvisions_weights_become_our_own_network_of_that_name(tmp_path, monkeypatch):
    """With weights of our own in the place where torchvision keeps its files."""
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.hub.set_dir(str(tmp_path / "hub"))
    weights = torchvision.models.resnet18().eval()
    monkeypatch.setattr(
        published, "provide", lambda file: torch.save(weights.state_dict(), tmp_path / "x.pth") or tmp_path / "x.pth"
    )
    images = torch.randn(1, 3, 64, 64)
    for model_t, name in ((None, "resnet18"), ("torchvision:resnet18", "torchvision:resnet18")):
        read = read_teacher("torchvision:resnet18", model_t)
        assert (read.name, read.num_classes, read.dataset, read.image_size) == (name, 1000, "imagenet", 224)
        assert read.accuracy == pytest.approx(69.758)
        with torch.no_grad():
            assert torch.allclose(read.network.eval()(images), weights(images), atol=1e-4)
    with pytest.raises(UserError, match="IMAGENET1K_V1, IMAGENET1K_V2"):
        read_teacher("torchvision:resnet50@V3", None)


def test_a_files_name_tells_its_sum_and_its_place():
    file = published.imagenet_teacher("resnet34")
    assert file.sha256 == "b627a593" and file.target.name == "resnet34-b627a593.pth"
    assert file.url == "https://download.pytorch.org/models/resnet34-b627a593.pth"


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "timm:densenet121", "timm:resnet10t"])
@torch.no_grad()
def test_activations_inside_of_batch_norms_survive_folding_and_synchronising(name):
    network, images = build_model(name, 7).eval(), torch.randn(2, 3, SIZE, SIZE)
    expected, keys = network.outputs(images).logits, network.state_dict().keys()
    assert torch.allclose(fold_batch_norms(network, SIZE).outputs(images).logits, expected, rtol=1e-3, atol=1e-4)
    synchronise(network)
    assert torch.allclose(network.outputs(images).logits, expected) and network.state_dict().keys() == keys


def test_an_unknown_kind_of_batch_norm_is_not_synchronised():
    class Own(torch.nn.BatchNorm2d):
        pass

    with pytest.raises(UserError, match="--sync_bn: Own cannot"):
        synchronise(torch.nn.Sequential(Own(3)))

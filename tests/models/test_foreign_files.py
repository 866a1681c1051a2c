"""Checkpoints as other people save them: where their weights are, what is converted and said, what is refused."""

import re
import warnings

import pytest
import torch

from errors import UserError
from models import build_model
from models.checkpoints import (
    build_with,
    find_weights,
    identify,
    load_weights,
    read_checkpoint,
    weights_digest,
)
from models.files import DamagedFile
from models.found import locate_weights, recorded_accuracy


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_model("resnet8", 10)


@pytest.fixture
def weights(network):
    return dict(network.state_dict())


def prefixed(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def without_counters(weights: dict) -> dict:
    return {key: value for key, value in weights.items() if "num_batches" not in key}


def with_profile(weights: dict) -> dict:
    counters = {"total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)}
    return weights | counters


def wide() -> dict:
    """Weights whose keys are resnet8's and whose shapes are not."""
    return dict(build_model("resnet8x4", 10).state_dict())


#: A checkpoint of some kind -> what is said of it.
WRAPPED = {
    "plain": (lambda w: w, None),
    "ours": (lambda w: {"model": w}, None),
    "lightning's": (lambda w: {"state_dict": prefixed("model.", w), "epoch": 3}, "the prefix model. of all its keys"),
    **{
        entry: (lambda w, entry=entry: {entry: w, "optimizer": {"state": {0: torch.ones(1)}}}, f"its entry {entry}")
        for entry in ("model_state_dict", "model_state", "net", "weights", "student", "anything")
    },
    "a checkpoint in another": (lambda w: {"model": {"state_dict": w}}, "its entry model.state_dict"),
    "parallel": (lambda w: {"model": prefixed("module.", w)}, "the prefix module. of its keys"),
    "compiled": (lambda w: prefixed("_orig_mod.module.", w), "the prefix _orig_mod.module. of its keys"),
    "with losses": (
        lambda w: {"state_dict": prefixed("model.", w) | {"criterion.weight": torch.ones(4), "loss.n": torch.ones(1)}},
        "of its entries those below model. are taken; left out are criterion.*, loss.*",
    ),
    "with a teacher": (
        lambda w: {"state_dict": prefixed("student.", w) | prefixed("teacher.", wide())},
        "of its entries those below student. are taken; left out are teacher.*",
    ),
    "parallel within": (lambda w: prefixed("backbone.module.", w), "the prefixes backbone. and module. of all its"),
    "compiled within": (lambda w: prefixed("a.module._orig_mod.", w), "a. and module. and _orig_mod. of all its"),
    "two prefixes": (lambda w: prefixed("model.backbone.", w), "the prefix model.backbone. of all its keys"),
    "profiled": (lambda w: {"model": with_profile(w)}, "2 counters"),
    "old": (lambda w: {"model": without_counters(w)}, "9 missing entries num_batches_tracked filled in"),
    "averaged": (lambda w: {"model_ema": w}, "its entry model_ema"),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_found_wherever_they_are(tmp_path, weights, kind):
    wrap, note = WRAPPED[kind]
    torch.save(wrap(weights), tmp_path / "file.pth")
    found = locate_weights(read_checkpoint(tmp_path / "file.pth"), "file")
    assert "resnet8" in identify(found.weights)
    built, notes = build_with("resnet8", found.weights, "file")
    assert weights_digest(built.state_dict()) == weights_digest(weights), "however they are wrapped"
    said = [*found.notes, *notes]
    assert len(said) == (note is not None) and (note is None or note in said[0])


def test_of_two_keys_that_a_wrapper_tells_apart_none_is_lost(weights):
    both = prefixed("a.", weights) | {"a.module.fc.bias": torch.full_like(weights["fc.bias"], 7.0)}
    with pytest.raises(UserError, match=r"unexpected a\."):
        build_with("resnet8", both, "file")
    part = {"criterion.weight": torch.ones(4)} | prefixed("student.module.", weights)
    _, notes = build_with("resnet8", part, "file")
    assert "the prefix module. of its keys is left out" in notes, "where a part is taken too"


def test_of_two_parts_that_fit_none_is_chosen(weights):
    both = prefixed("student.", weights) | prefixed("teacher.", weights)
    with pytest.raises(UserError, match=r"resnet8 several times, below student\. and teacher\.; save the one"):
        build_with("resnet8", both, "file")
    both |= prefixed("teacher.", wide())
    assert build_with("resnet8x4", both, "file")[0].num_classes == 10, "the name decides where the networks differ"


def test_a_network_with_the_prefix_as_a_part_of_it_keeps_it(weights):
    external = build_model("torchvision:resnet18", 10).state_dict()
    for given in (external, {key.removeprefix("network."): value for key, value in external.items()}):
        network, notes = build_with("torchvision:resnet18", given, "file")
        assert network.state_dict().keys() == external.keys() and not notes


AVERAGED = {
    "apart": lambda raw, average: {"model": raw, "model_ema": average},
    "timm's": lambda raw, average: {"state_dict": raw, "state_dict_ema": average},
    "with its decay": lambda raw, average: {"model": raw, "ema": {"decay": 0.999, "module": average}},
    "together": lambda raw, average: {"state_dict": prefixed("model.", raw) | prefixed("ema_model.", average)},
    "at the top": lambda raw, average: raw | {"ema": average},
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_of_raw_and_averaged_weights_one_is_taken_and_said(weights, kind):
    average = {key: value + 1 for key, value in weights.items()}
    checkpoint = AVERAGED[kind](weights, average)
    for ema, expected in ((False, weights), (True, average)):
        found = locate_weights(checkpoint, "file", ema)
        assert "--ema" in found.notes[0] and "moving average" in found.notes[0]
        network, _ = build_with("resnet8", found.weights, "file")
        assert weights_digest(network.state_dict()) == weights_digest(expected)


REFUSED = {
    "nothing": ({"epoch": 3, "lr": 0.1}, False, "holds no weights; it holds epoch, lr"),
    "counters alone": ({"total_ops": torch.ones(1)}, False, "holds no weights"),
    "several": (
        {"net_a": {"w": torch.ones(1)}, "net_b": {"w": torch.ones(1)}},
        False,
        "several sets of weights, net_a, net_b",
    ),
    "no average": ({"model": {"w": torch.ones(1)}}, True, "no moving average of weights for --ema; it holds model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_there_instead_of_weights_is_said(kind):
    checkpoint, ema, message = REFUSED[kind]
    with pytest.raises(UserError, match=re.escape(message)):
        locate_weights(checkpoint, "file", ema)


def test_a_pickled_network_is_refused_with_the_way_out(tmp_path, network):
    path = tmp_path / "file.pth"
    for content in (network, {"model": network}):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"pickled models\.resnet\..*state_dict\(\)"):
            find_weights(read_checkpoint(path), "file")
    torch.save({"model": network.state_dict(), "config": torch.nn.ReLU()}, path)
    assert len(find_weights(read_checkpoint(path), "file")) == len(network.state_dict()), (
        "beside weights it is harmless"
    )
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated, its files are about
        torch.jit.save(torch.jit.trace(network.eval(), torch.zeros(1, 3, 32, 32)), path)
    with pytest.raises(DamagedFile, match=r"TorchScript file; save the state_dict\(\)") as caught:
        read_checkpoint(path)
    assert "safe_globals" not in str(caught.value)


OTHERS = {
    "a.jpg": (b"\xff\xd8\xff\xe0", "a JPEG image"),
    "a.png": (b"\x89PNG\r\n", "a PNG image"),
    "a.onnx": (b"\x08\x0a\x12\x07pytorch", "an ONNX file"),
    "b.onnx": (b"\x08\x03\x12\x07", "an ONNX file"),
    "a.pth": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    "b.pth": (b"<!DOCTYPE html>", "a web page"),
    "c.pth": (b'{"a": 1}', "JSON text"),
    "d.pth": (b"", "it is empty"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_called_that(tmp_path, name):
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content + b"\0" * 40 if content else b"")
    with pytest.raises(DamagedFile, match=message):
        read_checkpoint(tmp_path / name)


def test_safetensors_are_read(tmp_path, weights):
    safetensors = pytest.importorskip("safetensors.torch")
    for name in ("model.pth", "model.safetensors"):
        path = tmp_path / name
        safetensors.save_file(weights, path)
        built, _ = build_with("resnet8", find_weights(read_checkpoint(path), "file"), "file")
        assert weights_digest(built.state_dict()) == weights_digest(weights)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match="cannot be read as a checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("checkpoint", "percent", "note"),
    [
        ({"accuracy": 76.4}, 76.4, None),
        ({"best_acc": 0.93}, 93.0, "its best_acc, 0.93, is read as 93 %"),
        ({"best_acc1": torch.tensor(71.5)}, 71.5, None),
        ({"acc": 1}, 100.0, "its acc, 1, is read as 100 %"),
        ({"best_acc": 0.0}, 0.0, None),
        *(({"best_acc": odd}, None, None) for odd in (True, "93", -1.0, 930.0, float("nan"), None, [93.0])),
        ({}, None, None),
    ],
)
def test_an_accuracy_is_a_percentage(checkpoint, percent, note):
    found = recorded_accuracy(checkpoint)
    assert (found.percent, found.notes) == (None if percent is None else pytest.approx(percent), [note] if note else [])


@pytest.mark.slow
def test_what_does_not_fit_says_what_it_is(weights):
    wide = prefixed("backbone.", build_model("resnet20", 10).state_dict())
    wide["head.weight"] = torch.ones(1)
    with pytest.raises(UserError, match="the weights fit resnet20"):
        load_weights(build_model("vgg8", 10), "vgg8", wide, "--path_t: x")
    del wide["backbone.layer1.2.bn2.bias"]
    with pytest.raises(UserError) as caught:
        load_weights(build_model("vgg8", 10), "vgg8", wide, "--path_t: x")
    message = str(caught.value)
    assert "no block0.0.weight" in message and "unexpected backbone.conv1.weight" in message
    assert "its keys begin with backbone, head" in message
    del wide["head.weight"]
    with pytest.raises(UserError, match=r"keys begin with backbone; nearest is resnet20, 9\d % of it"):
        load_weights(build_model("vgg8", 10), "vgg8", wide, "--path_t: x")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "classifier"), [("resnet8", "fc"), ("torchvision:resnet18", "fc")])
def test_weights_without_the_classifier_are_an_encoder(name, classifier):
    torch.manual_seed(0)
    weights = {key.removeprefix("network."): value for key, value in build_model(name, 10).state_dict().items()}
    trunk = prefixed("module.", {key: value for key, value in weights.items() if key.partition(".")[0] != classifier})
    assert len(trunk) == len(weights) - 2
    encoder, notes = build_with(name, trunk, "file")
    assert encoder.num_classes == 0 and "it holds no classifier, so it is an encoder" in notes
    assert build_with(name, weights, "file")[0].num_classes == 10
    assert build_with(name, build_model(name, 0).state_dict(), "file")[0].num_classes == 0
    with pytest.raises(UserError, match="another architecture"):
        build_with(name, dict(list(trunk.items())[1:]), "file")

"""Golden checks of the plain networks: RepDistiller's CIFAR networks, NORM's ImageNet teachers and students."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models import build_model, imagenet_model_dict
from models.backbone import Backbone
from models.checkpoints import load_weights
from models.cost import count_multiply_adds, count_parameters
from tests.golden_format import Family, Mismatch, Reader, compare, compare_summary, equal, fill_all, images

#: Kept in the file for people: Python types of the reference, and its float32 error on its own machine.
INFORMATIONAL = ("is_feat_container", "preact_container", "float32_vs_float64_logits_max_abs_diff")


def families(content: dict, path: Path) -> Iterator[Family]:
    """One family per network: plain, or a student of the official NORM code, of either data set."""
    from tests.golden_norm import check_imagenet_student, check_student

    for name, entry in content["models"].items():
        if "co_sponge" in entry:
            yield name, partial(check_student, entry)
        elif "|" in name:
            yield name, partial(check_imagenet_student, imagenet_name(name.split("|")[0], "S"), name, entry)
        elif "macs_1x3x224x224" in entry:
            yield name, partial(check_imagenet_teacher, imagenet_name(name, "T"), entry)
        else:
            yield name, partial(check_network, name, entry)


def imagenet_name(name: str, role: str) -> str:
    """Our name of an official ImageNet network, to whose name its role may be added: resnet18S, resnet18T."""
    return name.removesuffix(role) if name not in imagenet_model_dict else name


def filled_network(name: str, entry: Mapping) -> Backbone:
    network = build_model(name, entry["num_classes"])
    load_weights(network, name, fill_all(entry["state_dict"]), "golden weights")
    return network.double()


def running_sums(module: nn.Module) -> tuple[float, float]:
    """Sums over all running means and all running variances."""
    buffers = module.state_dict()
    return tuple(sum(float(v.sum()) for k, v in buffers.items() if k.endswith(end)) for end in ("_mean", "_var"))


@torch.no_grad()
def check_network(name: str, entry: Mapping) -> None:
    entry = Reader(entry, INFORMATIONAL)
    network = filled_network(name, entry).eval()
    equal("n_params_trainable", count_parameters(network), entry["n_params_trainable"])
    equal("macs", count_multiply_adds(network, 32), entry["macs_1x3x32x32"])
    expected = Reader(entry["eval"], INFORMATIONAL)
    x = images(2, 32)
    for preact, features_key, shapes_key in (
        (False, "feats", "feat_shapes"),
        (True, "preact_feats", "preact_feat_shapes"),
    ):
        features, logits = network(x, is_feat=True, preact=preact)
        compare("eval.logits", logits, expected["logits"])
        check_features(features_key, features, expected[features_key])
        equal(shapes_key, [list(feature.shape) for feature in features], entry[shapes_key])
    expected.finish("eval")
    check_feature_layers(network, entry)
    train = Reader(entry["train"])
    network.train()
    compare("train.logits", network(x), train["logits"])
    sums = running_sums(network)
    compare("train.running", sums, [train["sum_running_mean"], train["sum_running_var"]])
    train.finish("train")
    entry.finish("entry")


def check_features(where: str, features: list[Tensor], golden: list[Mapping]) -> None:
    equal(f"{where}.length", len(features), len(golden))
    for number, (feature, summary) in enumerate(zip(features, golden, strict=True)):
        compare_summary(f"{where}[{number}]", feature, summary)


def check_feature_layers(network: Backbone, entry: Mapping) -> None:
    names = {module: name for name, module in network.named_modules()}
    golden = entry["get_bn_before_relu"]
    if isinstance(golden, str):  # the reference raises
        try:
            network.get_bn_before_relu()
            raise Mismatch("get_bn_before_relu: returned something where the reference raises")
        except NotImplementedError:
            pass
    else:
        equal("get_bn_before_relu", [names[bn] for bn in network.get_bn_before_relu()], golden)
    equal("get_feat_modules", count_parameters(network.get_feat_modules()), entry["get_feat_modules_n_params"])


# --- ImageNet: teachers are plain, students carry the transform -------------------------------------------------------


@torch.no_grad()
def check_imagenet_teacher(name: str, entry: Mapping) -> None:
    entry = Reader(entry)
    network = filled_network(name, entry).eval()
    equal("n_params_trainable", count_parameters(network), entry["n_params_trainable"])
    equal("macs", count_multiply_adds(network, 224), entry["macs_1x3x224x224"])
    output = network.outputs(images(1, 224))
    expected = Reader(entry["eval"], INFORMATIONAL)
    check_features("feats", output.maps[-2:], expected["feats"])
    equal("feat_shapes", [list(feature.shape) for feature in output.maps[-2:]], entry["feat_shapes"])
    check_imagenet_logits(output.logits, expected)
    expected.finish("eval")
    entry.finish("entry")


def check_imagenet_logits(logits: Tensor, expected: Mapping) -> None:
    scale = float(logits.abs().max())
    first = expected["logits_first20"]
    compare("logits", logits[0, : len(first)], first, scale=scale)
    compare(
        "logits mean/std", [logits.mean(), logits.std(correction=0)], [expected["logits_mean"], expected["logits_std"]]
    )
    equal("argmax", int(logits[0].argmax()), expected["logits_argmax"])

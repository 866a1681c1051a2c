"""Splits a network of timm at its own seam, between `forward_features` and `forward_head`.

Maps are read where timm says that a convolutional network's stages end, and by timm's `forward_intermediates` from
networks whose features are tokens.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import Parameter, signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError, count_of, first_line
from models.backbone import evaluating
from models.preprocessing import INTERPOLATIONS, Preprocessing
from models.split import (
    Split,
    as_if_trained,
    columns_to_tokens,
    equally_spaced,
    no_map,
    patches_to_map,
    probe,
    ramp,
    tokens_to_columns,
)

#: The files of weights that timm looks for on the Hugging Face Hub, in its order; seconds that the hub may be silent.
HUB_FILES, HUB_TIMEOUT = ("model.safetensors", "pytorch_model.bin"), 10.0

Features = Callable[[nn.Module, Tensor], tuple[list[Tensor], Any]]
Head = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise UserError("networks named timm:NAME need the library timm: pip install timm") from None
    return timm


def list_names() -> list[str]:
    """The networks, without tags of trained weights."""
    return _timm().list_models()


def build(architecture: str, num_classes: int, image_size: int | None, drops: Mapping[str, float]) -> nn.Module:
    """A network without trained weights."""
    options = _size_options(architecture, image_size)
    for name, rate in drops.items():
        _check_drop(architecture, name, rate)
    return _timm().create_model(architecture, pretrained=False, num_classes=num_classes, **options, **drops)


def _check_drop(architecture: str, name: str, rate: float) -> None:
    """Raise `UserError` where a network does not drop what this rate is of."""
    from timm.layers import DropPath

    try:
        with torch.device("meta"):
            network = _timm().create_model(architecture, **{name: rate or 0.1})
    except TypeError:  # it has no such argument
        layers: list[nn.Module] = []
    else:
        layers = list(network.modules())
    paths = any(isinstance(layer, DropPath) for layer in layers)
    units = any(getattr(layer, "drop_rate", 0) or (isinstance(layer, nn.Dropout) and layer.p) for layer in layers)
    if not (paths if name == "drop_path_rate" else units):
        raise UserError(f"--{name}: timm:{architecture} drops nothing of this kind; leave the flag out")


def build_pretrained(architecture: str, image_size: int | None = None) -> nn.Module:
    """A network with trained weights, which timm downloads and keeps; `UserError` where it cannot."""
    try:
        options = {**_size_options(architecture, image_size), **_kept(architecture)}
        return _timm().create_model(architecture, pretrained=True, **options)
    except UserError:
        raise
    except Exception as error:  # timm, huggingface_hub and its network libraries have their own errors each
        reason = first_line(error)
        raise UserError(
            f"timm's weights of {architecture} are not on this machine and cannot be downloaded ({reason}); give a "
            f"file of them, and name its network, timm:{architecture.partition('.')[0]}"
        ) from None


def _kept(architecture: str) -> dict[str, object]:
    """What makes timm read weights of the Hugging Face Hub that are on this machine from there; else raises what the
    hub's library does where the hub cannot be reached.

    Its own download would try for a minute before it says so, and for half of one before it reads what is here.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    entry = _timm().get_pretrained_cfg(architecture)
    if entry is None or not entry.hf_hub_id:
        return {}
    name, _, revision = entry.hf_hub_id.partition("@")
    for file in HUB_FILES:
        path = try_to_load_from_cache(name, file, revision=revision or None)
        if isinstance(path, str):
            return {"pretrained_cfg_overlay": {"file": path, "custom_load": False}}
    with suppress(EntryNotFoundError):  # the hub has an answer, if not this file
        get_hf_file_metadata(hf_hub_url(name, HUB_FILES[0], revision=revision or None), timeout=HUB_TIMEOUT)
    return {}


def _size_options(architecture: str, image_size: int | None) -> dict[str, object]:
    """What makes a network read images of this size: all sizes with the same weights where timm can, else this one."""
    with torch.device("meta"):
        kind = type(_timm().create_model(architecture.partition(".")[0]))
    accepted: set[str] = set()
    for base in kind.__mro__:
        parameters = signature(base.__init__).parameters
        accepted |= parameters.keys()
        if all(parameter.kind != Parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # nothing is handed on to what it inherits from
    if "dynamic_img_size" in accepted:
        return {"dynamic_img_size": True}
    return {"img_size": image_size} if image_size and "img_size" in accepted else {}


def read_preprocessing(weights: str) -> Preprocessing | None:
    """What timm says of weights, by `NAME[.TAG]`; None where it has none."""
    timm = _timm()
    from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config

    if not timm.is_model_pretrained(weights):
        return None
    entry = timm.get_pretrained_cfg(weights).to_dict()
    trained, tested = (resolve_data_config(pretrained_cfg=entry, use_test_size=each) for each in (False, True))
    size, mode = tested["input_size"][-1], tested["interpolation"]
    subset = infer_imagenet_subset(entry)
    return Preprocessing(
        mean=tuple(tested["mean"]),
        std=tuple(tested["std"]),
        image_size=trained["input_size"][-1],
        test_size=size,
        test_resize=math.floor(size / tested["crop_pct"]),
        interpolation=mode if mode in INTERPOLATIONS else "bilinear",
        squashes=tested["crop_mode"] == "squash",
        categories=tuple(ImageNetInfo(subset).label_names()) if subset else (),
    )


def split(name: str, network: nn.Module, num_classes: int, image_size: int | None = None) -> Split:
    """Take the network apart; raises `UserError` where it shows no maps at any image size."""
    seen: list[tuple[object, list[Tensor]]] = []
    own_size = network.default_cfg["input_size"][-1]

    def look(blank, image):
        last = blank.forward_features(image)
        seen.append((last, [] if is_map(last) else blank.forward_intermediates(image)[1]))

    def is_map(last):
        return isinstance(last, Tensor) and last.ndim == 4 and network.num_features in (last.shape[1], last.shape[3])

    # Small images come last: of a map of one pixel the average is the maximum too.
    size = probe(name, network, look, (own_size, image_size))
    last, maps = seen[-1]
    shape = tuple(last.shape) if isinstance(last, Tensor) else ()
    if is_map(last):
        return _split_map(network, num_classes, shape, size)
    if not maps or any(each.ndim != 4 for each in maps):
        raise no_map(name, "timm shows no maps of it")
    return _split_tokens(network, num_classes, shape, [tuple(each.shape[1:]) for each in maps], size)


def _split_map(network: nn.Module, num_classes: int, shape: tuple[int, ...], size: int) -> Split:
    channels_last = shape[1] != network.num_features
    final = (shape[3], *shape[1:3]) if channels_last else shape[1:]
    modules = dict(network.named_modules())
    told = [stage for stage in getattr(network, "feature_info", None) or () if stage["module"] in modules]
    if len({stage["reduction"] for stage in told}) == 1:  # blocks of one resolution
        told = [told[position] for position in equally_spaced(len(told))]
    stages = {stage["module"]: stage["num_chs"] for stage in told}

    def restore(final: Tensor) -> Tensor:
        return final.movedim(1, 3) if channels_last else final

    classifier, head = _make_head(network, num_classes, restore, ramp(1, *final))
    features = _map_features(stages, channels_last)
    return Split(features, head, classifier, "the output of forward_features", final, size)


def _map_features(stages: dict[str, int], channels_last: bool) -> Features:
    """Maps where the stages end, by the module's name, in channels; the last map too where none has its size."""

    def features(module: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps: list[Tensor] = []

        def keep(layer, inputs, output):
            if isinstance(output, Tensor) and output.ndim == 4:
                width = stages[names[layer]]
                # A map may be as wide as it has channels; then its layout is the last one's.
                is_last = output.shape[3] == width and (channels_last or output.shape[1] != width)
                maps.append(output.movedim(3, 1) if is_last else output)

        # Hooks cannot be exported, and who exports a network wants its logits.
        kept = () if torch.compiler.is_exporting() else stages
        names = {module.get_submodule(stage): stage for stage in kept}
        hooks = [layer.register_forward_hook(keep) for layer in names]
        try:
            last = module.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        last = last.movedim(3, 1) if channels_last else last
        if not maps or maps[-1].shape[2:] != last.shape[2:]:
            maps.append(last)
        return maps, last

    return features


def _split_tokens(
    network: nn.Module, num_classes: int, shape: tuple[int, ...], maps: list[tuple[int, ...]], size: int
) -> Split:
    channels, height, width = maps[-1]
    prefix = shape[1] - height * width if len(shape) == 3 and shape[2] == channels else -1
    indices = equally_spaced(len(maps))
    if prefix < 0 or height != width:
        with evaluating(network):
            features = network.forward_features(ramp(1, 3, size, size))
        classifier, head = _make_head(network, num_classes, lambda features: features, features)
        return Split(
            lambda module, images: module.forward_intermediates(images, indices=indices)[::-1],
            head,
            classifier,
            "the last map of forward_intermediates",
            maps[-1],
            size,
            cannot_change="its head does not read that map",
        )

    def features(module: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
        tokens, maps = module.forward_intermediates(images, indices=indices)
        columns = tokens_to_columns(tokens)
        return [*maps[:-1], patches_to_map(columns, prefix)], columns  # the last map behind the last norm

    classifier, head = _make_head(network, num_classes, columns_to_tokens, ramp(1, channels, shape[1], 1))
    name = f"the patch tokens of forward_features, behind {count_of(prefix, 'other')}"
    return Split(features, head, classifier, name, maps[-1], size, prefix)


def _make_head(
    network: nn.Module, num_classes: int, restore: Callable[[Any], Any], example: Any
) -> tuple[str | None, Head]:
    """The classifier's name, if a linear layer ends the head, and the head; `restore` gives it what timm's own reads.

    `example` is what the head may read, on which that is tried.
    """

    def pool(module: nn.Module, final: Any) -> Tensor:
        return module.forward_head(restore(final), pre_logits=True).flatten(1)

    def ends_linearly(module: nn.Module, final: Tensor) -> tuple[Tensor, Tensor]:
        pooled = pool(module, final)
        return pooled, module.get_classifier()(pooled)

    def ends_otherwise(module: nn.Module, final: Any) -> tuple[Tensor, Tensor]:
        logits = module.forward_head(restore(final))
        return pool(module, final), logits.flatten(1)

    def ends_early(module: nn.Module, final: Any) -> tuple[Tensor, Tensor]:
        pooled = pool(module, final)
        return pooled, pooled[:, :0]

    if num_classes == 0:
        return None, ends_early
    linear = network.get_classifier()
    if not isinstance(linear, nn.Linear) or linear.out_features != num_classes:
        return None, ends_otherwise
    with as_if_trained(network):
        try:
            logits, expected = _logits_in_training(network, example, ends_linearly, ends_otherwise)
        except RuntimeError:  # the layer reads something else than the pooled vector
            return None, ends_otherwise
    if not torch.allclose(logits, expected, atol=1e-5):
        return None, ends_otherwise
    return next(name for name, module in network.named_modules() if module is linear), ends_linearly


def _logits_in_training(network: nn.Module, example: Any, *heads: Head) -> list[Tensor]:
    """What each head gives with features dropped alike; BatchNorms are in eval mode, as one image is no batch. Modes
    are for the caller to restore."""
    logits = []
    for module in network.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    with torch.random.fork_rng(devices=[]):
        for head in heads:
            torch.default_generator.manual_seed(0)
            logits.append(head(network, example)[1])
    return logits

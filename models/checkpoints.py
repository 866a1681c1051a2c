"""Weights from files: ours, RepDistiller's, the official NORM code's. Every rename of a key is made here.

Names of weights, strict loading, digests and recognition; where in a file the weights are, `found.py` says.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from errors import UserError, count_of
from models import build_model, imagenet_model_dict, model_dict
from models.backbone import Backbone, Wrapper
from models.external import is_external
from models.files import read_checkpoint as read_checkpoint  # also found here
from models.found import Found, Weights, list_names, locate_weights, say_prefixes
from models.record import check_record
from models.wrappers import wrap

#: Names of earlier versions of this toolbox -> today's, which are RepDistiller's: (pattern, replacement).
EARLIER_NAMES = {
    "ResNet50": ((r"\.downsample\.", ".shortcut."), (r"(^|\.)fc\.", r"\1linear.")),
}

#: The official NORM code's feature transform -> (expand, contract); its transform has one of these pairs of names.
OFFICIAL_TRANSFORMS = (("layer31", "layer32"), ("layer41", "layer42"))
#: Parameters that the official code constructs and never uses.
OFFICIAL_UNUSED = re.compile(r"^(alpha$|layer2[12]\.)")

#: What DataParallel, DDP and torch.compile put into keys, of a part of a network also within them.
WRAPPER = re.compile(r"\b(?:module|_orig_mod)\.")


def find_weights(checkpoint: Mapping, source: str) -> Weights:
    """The weights of `locate_weights`, for who has nothing to say of them."""
    return locate_weights(checkpoint, source).weights


def _fit_all(model: Backbone, model_name: str, weights: Weights) -> Found | None:
    """All the weights under this project's names of a network, without a prefix that all keys share; None where they
    have other keys. Counters of batches that old versions of torch did not write are filled in with 0."""
    for prefixes, candidate in _without_prefixes(weights):
        fitted, filled = _filled(model, model_name, candidate)
        if fitted is not None:
            whose = "all its" if all(key.startswith("".join(prefixes)) for key in weights) else "its"
            return Found(fitted, say_prefixes(prefixes, whose) + filled)
    return None


def _fit_part(parts: Mapping[str, Found], model_name: str, weights: Weights) -> Found:
    """The first of `_fitting_parts`; all the weights under their own names where there is none."""
    for prefix, part in parts.items():
        others = {f"{key.partition('.')[0]}.*": key for key in _unwrapped(weights) if not key.startswith(prefix)}
        left = f"of its entries those below {prefix} are taken; left out are {list_names(others)}"
        return Found(part.weights, [left, *say_prefixes(_wrappers_in(weights)), *part.notes])
    return Found(rename_for(model_name, name_for(model_name, weights)), [])


def _filled(model: Backbone, model_name: str, weights: Weights) -> tuple[Weights | None, list[str]]:
    """These weights, None where they have other keys than the network, and a note on counters that were filled in."""
    renamed = rename_for(model_name, name_for(model_name, weights))
    expected = model.state_dict()
    empty = {key: value for key, value in expected.items() if not value.numel()}  # of no classes
    missing = expected.keys() - renamed.keys() - empty.keys()
    if not (renamed.keys() <= expected.keys() and all(_can_be_filled(key, renamed) for key in missing)):
        return None, []
    note = [f"{count_of(len(missing), 'missing entry')} num_batches_tracked filled in with 0"] * bool(missing)
    return empty | renamed | {key: torch.tensor(0, device="cpu") for key in missing}, note


def _fitting_parts(model: Backbone, model_name: str, weights: Weights) -> dict[str, Found]:
    """The parts of the weights that are the whole network but for its classifier's size, by their prefix; a training
    module's file holds losses, a teacher or an average next to it."""
    unwrapped, expected = _unwrapped(weights), model.state_dict()
    classifier, found = f"{_name_of_classifier(model)}.", {}
    counts = Counter(key[: match.end()] for key in unwrapped for match in re.finditer(r"\.", key))
    for prefix, count in counts.items():
        if count == len(unwrapped) or not len(expected) / 2 < count <= len(expected):
            continue  # at most every other entry can be filled in
        part = {key.removeprefix(prefix): value for key, value in unwrapped.items() if key.startswith(prefix)}
        fitted, notes = _filled(model, model_name, part)
        if fitted and all(
            value.shape == expected[key].shape for key, value in fitted.items() if not key.startswith(classifier)
        ):
            found[prefix] = Found(fitted, notes)
    return found


def _unwrapped(weights: Weights) -> Weights:
    """Without the wrappers' names, wherever they are in the keys."""
    return {WRAPPER.sub("", key): value for key, value in weights.items()}


def _wrappers_in(weights: Weights) -> list[str]:
    """The wrappers' names that are in keys."""
    return list(dict.fromkeys(name for key in weights for name in WRAPPER.findall(key)))


def _can_be_filled(key: str, weights: Weights) -> bool:
    return key.endswith(".num_batches_tracked") and key.replace("num_batches_tracked", "running_mean") in weights


def _without_prefixes(weights: Weights) -> Iterator[tuple[list[str], Weights]]:
    """(what was left out of the keys, the weights): as they are, without the wrappers' names within keys, and then
    without one shared first part after the other."""
    yield [], weights
    stripped, wrappers, prefix = _unwrapped(weights), _wrappers_in(weights), ""
    if len(stripped) < len(weights):  # two keys would become one
        stripped, wrappers = weights, []
    if wrappers:
        yield wrappers, stripped
    while len(first := {key.partition(".")[0] for key in stripped}) == 1 and all("." in key for key in stripped):
        prefix += f"{first.pop()}."
        stripped = {key.partition(".")[2]: value for key, value in stripped.items()}
        yield [prefix, *wrappers], stripped


def build_with(model_name: str, weights: Weights, source: str) -> tuple[Backbone, list[str]]:
    """A network of these weights, in as many classes as they have (0 without a classifier), and notes on what was
    converted or left out; `UserError` like `load_weights`."""
    probe = build_model(model_name, 1)
    found = _fit_all(probe, model_name, weights)
    if found is None:
        encoder = _encoder_with(model_name, weights, source)
        if encoder is not None:
            return encoder
        parts = _fitting_parts(probe, model_name, weights)
        if len(parts) > 1:
            raise UserError(
                f"{source} holds {model_name} several times, below {' and '.join(parts)}; save the one that is meant "
                "as {'model': its state_dict()}"
            )
        found = _fit_part(parts, model_name, weights)
    fitted, notes = found
    num_classes = count_classes(probe, fitted)  # 0 in a file of a network that was built without a classifier
    network = build_model(model_name, 1 if num_classes is None else num_classes)
    load_weights(network, model_name, fitted, source)
    return network, notes


def _encoder_with(model_name: str, weights: Weights, source: str) -> tuple[Backbone, list[str]] | None:
    """The network without a classifier, and notes, where the weights are all of it and no more; else None."""
    network = build_model(model_name, 0)
    found = _fit_all(network, model_name, weights)
    if found is None or _differences(network.state_dict(), found.weights):
        return None
    load_weights(network, model_name, found.weights, source)
    return network, [*found.notes, "it holds no classifier, so it is an encoder"]


def name_for(model_name: str, weights: Weights) -> Weights:
    """A plain network's weights from another code; of a foreign library's network they are below `network` here."""
    if not is_external(model_name) or all(key.startswith("network.") for key in weights):
        return weights
    return {f"network.{key}": value for key, value in weights.items()}


def rename_for(model_name: str, weights: Weights) -> Weights:
    """The same weights under this project's key names."""
    renamed = {}
    for key, value in weights.items():
        for pattern, replacement in EARLIER_NAMES.get(model_name, ()):
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _differences(expected: Mapping[str, Tensor], weights: Weights) -> list[str]:
    """What does not agree, the first of each kind first: shapes, missing and unexpected keys, kinds of number."""
    both = [(key, value, weights[key]) for key, value in expected.items() if key in weights]
    kinds = [
        [
            f"{key} is {tuple(found.shape)} instead of {tuple(value.shape)}"
            for key, value, found in both
            if found.shape != value.shape
        ],
        [f"no {key}" for key in expected if key not in weights],
        [f"unexpected {key}" for key in weights if key not in expected],
        # Floats of another width are fine; they are converted.
        [
            f"{key} is {found.dtype} instead of {value.dtype}"
            for key, value, found in both
            if found.dtype != value.dtype and not (found.is_floating_point() and value.is_floating_point())
        ],
    ]
    return [kind[0] for kind in kinds if kind] + [difference for kind in kinds for difference in kind[1:]]


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


def load_weights(model: nn.Module, model_name: str, weights: Weights, source: str) -> None:
    """Load strictly: every key, shape and kind of number must agree, and every number be finite, else `UserError`."""
    if not isinstance(weights, Mapping) or not all(_is_plain(value) for value in weights.values()):
        raise UserError(f"{source} holds something else than weights")
    weights = rename_for(model_name, weights)
    differences = _differences(model.state_dict(), weights)
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"{source} holds another architecture than {model_name}: {'; '.join(differences[:3])}{more}"
            f"{_describe(weights)}"
        )
    for key, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{source} contains non-finite values ({key})")
    model.load_state_dict(weights)


def _describe(weights: Weights) -> str:
    """What weights that do not fit are: the beginnings of their keys, and the nearest networks."""
    names = identify(weights)
    if names:
        return f" (the weights fit {' or '.join(names)})"
    beginnings = list(dict.fromkeys(key.partition(".")[0] for key in weights))
    text = ", ".join(beginnings[:6]) + (", ..." if len(beginnings) > 6 else "")
    shares = {name: _resemblance(name, weights) for name in (*model_dict, *imagenet_model_dict)}
    nearest = max(shares, key=shares.get)
    near = f"; nearest is {nearest}, {100 * shares[nearest]:.0f} % of it" if shares[nearest] > 0.2 else ""
    return f" (its keys begin with {text}{near})"


def _resemblance(model_name: str, weights: Weights) -> float:
    """The share, 0 to 1, of the keys of both that are in both, with the same shape."""
    with torch.device("meta"):
        expected = {key: value.shape for key, value in build_model(model_name, 1).state_dict().items()}
    _, stripped = list(_without_prefixes(weights))[-1] if weights else ("", {})
    found = {key: value.shape for key, value in rename_for(model_name, stripped).items()}
    same = sum(found.get(key) == shape for key, shape in expected.items())
    return same / len(expected.keys() | found.keys())


def count_classes(model: Backbone, weights: Weights) -> int | None:
    """Number of classes of these weights, read where `model` has its classifier; None where they have nothing there."""
    weight = weights.get(f"{_name_of_classifier(model)}.weight")  # not every classifier has a bias
    return None if weight is None else len(weight)


def _name_of_classifier(model: Backbone) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_classifier())


def load_initial(model: Backbone, model_name: str, network: Backbone, source: str, same_classes: bool = True) -> bool:
    """Give `model` the weights of `network`, as strictly as `load_weights`; its classifier stays as it is initialised
    where the classes are not the same, or where a wrapper had one of its own.

    Returns whether the classifier was taken too; raises `UserError` for another architecture.
    """
    plain = network
    while isinstance(plain, Wrapper):
        plain = plain.network
    weights, own = plain.state_dict(), model.state_dict()
    takes_classifier = same_classes and plain is network and plain.num_classes == model.num_classes
    if not takes_classifier:
        prefix = f"{_name_of_classifier(model)}."
        new = {
            key: value
            for key, value in own.items()
            if key.startswith(prefix) or (plain is not network and key not in weights)
        }
        weights = {key: value for key, value in weights.items() if not key.startswith(prefix)} | new
    load_weights(model, model_name, weights, source)
    return takes_classifier


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """The first 16 hex digits of the SHA-256 over keys, kinds of number, shapes and bytes, in the order of the keys.

    Of a `network.state_dict()` it is the same however the file that the network was read from wraps and names it.
    """
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def identify(weights: Weights) -> list[str]:
    """Names of the models whose keys and shapes these weights have, whatever the number of classes."""
    fitting = []
    for name in (*model_dict, *imagenet_model_dict):
        with torch.device("meta"):
            probe = build_model(name, 1)
            found = _fit_all(probe, name, weights) or _fit_part(_fitting_parts(probe, name, weights), name, weights)
            fitted = found.weights
            num_classes = fitted.keys() == probe.state_dict().keys() and count_classes(probe, fitted)
            if num_classes and not _differences(build_model(name, num_classes).state_dict(), fitted):
                fitting.append(name)
    return fitting


def split_official_norm(weights: Weights) -> tuple[Weights, Weights]:
    """Weights of an official NORM student -> (weights of the plain network, weights of a `FeatureTransform`).

    The second is empty where the file holds no transform.
    """
    network = {key: value for key, value in weights.items() if not OFFICIAL_UNUSED.match(key)}
    for expand, contract in OFFICIAL_TRANSFORMS:
        # layer41 of a four-stage network would be a block: a transform's first layer is its convolution, `.0.weight`.
        if f"{expand}.0.weight" in network:
            names = {expand: "expand", contract: "contract"}
            transform = {
                key.replace(key.split(".")[0], names[key.split(".")[0]], 1): network.pop(key)
                for key in list(network)
                if key.split(".")[0] in names
            }
            return network, transform
    return network, {}


def load_exported(checkpoint: Mapping, source: str) -> tuple[Backbone, dict]:
    """A run's checkpoint or an exported network -> (the network in eval mode, its record: what is known of it).

    Raises `UserError`, naming `source`, where an entry is missing, of another kind or out of its range.
    """
    record = checkpoint.get("record", checkpoint)  # files from before there was `record`
    if not isinstance(record, Mapping) or record.get("model_name") is None or record.get("num_classes") is None:
        raise UserError(f"{source} does not say which network it holds; was it written by this toolbox?")
    record = check_record({key: value for key, value in record.items() if key != "model"}, source)
    weights = find_weights(checkpoint, source)
    wrapper = record.get("wrapper")
    if wrapper is None and record.get("final_conv") is True:  # files from before there were several kinds of wrappers
        wrapper = {"kind": "final_conv", "channels": len(weights.get("final_conv.bias", ()))}
    # No network is built that is larger than its weights: sizes may be anything.
    largest = max(size for value in weights.values() for size in (1, *value.shape))
    sizes = [record["num_classes"], *(wrapper.values() if isinstance(wrapper, Mapping) else ())]
    if not isinstance(wrapper, Mapping | None) or any(isinstance(size, int) and size > largest for size in sizes):
        raise UserError(f"{source} is damaged: its weights are of another size than it says")
    try:
        network = wrap(
            build_model(record["model_name"], record["num_classes"], record.get("image_size")), wrapper, source
        )
    except (RuntimeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source} is damaged: its network cannot be built: {error}") from None
    load_weights(network, record["model_name"], weights, source)
    return network.eval(), record

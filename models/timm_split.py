"""Splits a network of timm at its own seam, between `forward_features` and `forward_head`."""

from types import ModuleType

import torch
from torch import Tensor, nn

from errors import UserError
from models.backbone import evaluating
from models.split import Split, no_map, probe


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError:
        raise UserError("networks named timm:NAME need the library timm: pip install timm") from None
    return timm


def list_names() -> list[str]:
    """The networks, without tags of trained weights."""
    return _timm().list_models()


def build(architecture: str, num_classes: int) -> nn.Module:
    """A network without trained weights."""
    return _timm().create_model(architecture, pretrained=False, num_classes=num_classes)


def build_pretrained(architecture: str) -> nn.Module:
    """A network with trained weights, which timm downloads and keeps; `UserError` where it cannot."""
    try:
        return _timm().create_model(architecture, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # timm, huggingface_hub and its network libraries have their own errors each
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"timm's weights of {architecture} are not on this machine and cannot be downloaded ({reason}); give a "
            f"file of them, and name its network, timm:{architecture.partition('.')[0]}"
        ) from None


def split(name: str, network: nn.Module, num_classes: int) -> Split:
    """Take the network apart; raises `UserError` where it has no last feature map or no linear classifier."""
    linear = network.get_classifier()
    if not isinstance(linear, nn.Linear) or linear.out_features != num_classes:
        raise no_map(name, "its last layer is no linear classifier")
    seen: list[Tensor] = []
    size = probe(name, network, lambda blank, image: seen.append(blank.forward_features(image)))
    shape = tuple(seen[-1].shape) if isinstance(seen[-1], Tensor) else ()
    channels = network.num_features
    if len(shape) != 4 or channels not in (shape[1], shape[3]):
        raise no_map(name, "its features are no map of pixels")
    told, modules = getattr(network, "feature_info", None) or (), dict(network.named_modules())
    stages = {stage["module"]: stage["num_chs"] for stage in told if stage["module"] in modules}
    channels_last = shape[1] != channels
    final = (channels, *shape[1:3]) if channels_last else shape[1:]

    def features(module: nn.Module, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps: list[Tensor] = []

        def keep(layer, inputs, output):
            if isinstance(output, Tensor) and output.ndim == 4:
                width = stages[names[layer]]
                maps.append(output if output.shape[1] == width else output.movedim(3, 1))

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

    def head(module: nn.Module, activated: Tensor) -> tuple[Tensor, Tensor]:
        activated = activated.movedim(1, 3) if channels_last else activated
        pooled = module.forward_head(activated, pre_logits=True)
        return pooled, module.get_classifier()(pooled)

    _check_head(name, network, head, final, channels_last)
    classifier = next(layer for layer, module in network.named_modules() if module is linear)
    return Split(features, head, classifier, "the output of forward_features", final, size)


def _check_head(name: str, network: nn.Module, head, final: tuple[int, int, int], channels_last: bool) -> None:
    activated = torch.arange(float(torch.Size(final).numel())).sin().view(1, *final)
    with evaluating(network):
        _, logits = head(network, activated)
        expected = network.forward_head(activated.movedim(1, 3) if channels_last else activated)
    if not torch.allclose(logits, expected, atol=1e-5):
        raise no_map(name, "its classifier is not the last step of its head")

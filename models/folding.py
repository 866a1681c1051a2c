"""BatchNorms folded into the convolutions before them: the same network in eval mode, in fewer operations."""

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from models.backbone import Backbone, evaluating


class _CountUses(TorchFunctionMode):
    """Counts how often each tensor is an argument of an operation."""

    def __init__(self):
        super().__init__()
        self.uses: Counter[int] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # What returns no tensor asks for shapes and the like, not for values.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.uses.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)})
        return result


def _find_pairs(network: Backbone, image_size: int) -> list[tuple[str, str]]:
    """Names of (convolution, BatchNorm), each called once, where nothing but the BatchNorm reads the convolution."""
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no two share an id
    candidates: list[tuple[int, str, str]] = []
    calls: Counter[str] = Counter()

    counter = _CountUses()

    def note_output(name):
        def hook(module, inputs, output):
            calls[name] += 1
            outputs[id(output)] = (name, output)
            counter.uses[id(output)] = 0  # what had this id before is gone

        return hook

    def note_input(name):
        def hook(module, inputs):
            calls[name] += 1
            (tensor,) = inputs
            if id(tensor) in outputs:
                candidates.append((id(tensor), outputs[id(tensor)][0], name))

        return hook

    hooks = []
    for name, module in network.named_modules():
        # Kinds of them from elsewhere may do more: timm's BatchNormAct2d has the activation inside.
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(note_output(name)))
        elif type(module) is nn.BatchNorm2d:
            hooks.append(module.register_forward_pre_hook(note_input(name)))
    with evaluating(network), counter:
        shown = network.outputs(torch.zeros(1, 3, image_size, image_size).to(next(network.parameters())))
    for hook in hooks:
        hook.remove()
    seen = {id(leaf) for leaf in tree_leaves(tuple(shown))}
    return [
        (conv, bn)
        for key, conv, bn in candidates
        if counter.uses[key] == 1 and key not in seen and calls[conv] == calls[bn] == 1
    ]


def fold_batch_norms(network: Backbone, image_size: int) -> Backbone:
    """A copy of `network` in eval mode with every BatchNorm folded that follows a convolution directly.

    Its outputs, maps before and behind their ReLU included, are the network's up to rounding.
    """
    folded = copy.deepcopy(network).eval()
    for conv, bn in _find_pairs(folded, image_size):
        folded.set_submodule(conv, fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(bn)))
        folded.set_submodule(bn, nn.Identity())
    return folded

"""A network that is only evaluated, with activations and residual sums computed inside its convolutions.

oneDNN on a CPU and cuDNN on a GPU have one operation for a convolution, its bias, a sum with another map and a ReLU. It
saves reading and writing maps, and launches. The network is traced (torch.fx); whatever else it does is left as it is.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from models.backbone import Backbone, Output, Wrapper

_RELUS = (F.relu, torch.relu, "relu")
_SUMS = (operator.add, torch.add)
#: Largest difference from the network as it was, relative to the largest value: bfloat16 has eight bits.
CLOSENESS = {torch.bfloat16: 0.05, torch.float32: 1e-3}


class FusedConvolution(nn.Conv2d):
    """relu(convolution + other), where `relu` and `other` are optional; the sum may take other's place where it
    `overwrites`."""

    def __init__(self, layer: nn.Conv2d, relu: bool, overwrites: bool):
        sizes: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, **sizes, device="meta")
        self.weight, self.bias, self.relu, self.overwrites = layer.weight, layer.bias, relu, overwrites

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.to(self.weight.dtype)
        if other is not None:
            other = other.to(x.dtype)
        return (self._by_cudnn if x.device.type == "cuda" else self._by_onednn)(x, other)

    def _by_onednn(self, x: Tensor, other: Tensor | None) -> Tensor:
        sizes = (self.padding, self.stride, self.dilation, self.groups)
        activation = "relu" if self.relu else None
        if other is None:
            none = activation or "none"
            return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *sizes, none, [], "")
        how = (self.weight, self.bias, *sizes, "add", 1.0, activation, [], "")
        if self.overwrites:
            return torch.ops.mkldnn._convolution_pointwise_.binary(other, x, *how)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, other, *how)

    def _by_cudnn(self, x: Tensor, other: Tensor | None) -> Tensor:
        sizes = (self.stride, self.padding, self.dilation, self.groups)
        if other is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *sizes)
        return torch.cudnn_convolution_add_relu(x, self.weight, other, 1.0, self.bias, *sizes)


class _Outputs(nn.Module):
    """A network's `outputs` as a module's `forward`, to be traced."""

    def __init__(self, network: Backbone, preact: bool):
        super().__init__()
        self.network, self.preact = network, preact

    def forward(self, x: Tensor) -> Output:
        return self.network.outputs(x, self.preact)


class _Images(fx.Proxy):
    """Traced images whose sizes are known, but for their number: networks decide by them."""

    @property
    def shape(self) -> tuple:
        return self.size(0), *self.tracer.sizes


class _Tracer(fx.Tracer):
    """Traces a network for images of known sizes (3, H, W)."""

    def __init__(self, sizes: torch.Size):
        super().__init__()
        self.sizes = sizes

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Images(node, self) if node.op == "placeholder" else super().proxy(node)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if type(module) is nn.Sequential:  # a slice of one is a module of nobody
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)


class Fused(Wrapper):
    """A network by its graphs with fused convolutions, one for the maps behind their last ReLU and one for those before
    it."""

    def __init__(self, network: Backbone, graphs: dict[bool, nn.Module]):
        super().__init__(network)
        self.graphs = nn.ModuleDict({str(preact): graph for preact, graph in graphs.items()})

    def outputs(self, x: Tensor, preact: bool = False) -> Output:
        return self.graphs[str(preact)](x)


class _Place(NamedTuple):
    """The nodes that become one: a convolution, the sum with another map, if any, and the ReLU, if any."""

    convolution: fx.Node
    end: fx.Node  # the last of them
    relu: bool
    total: fx.Node | None = None
    other: fx.Node | None = None


def fuse_activations(network: Backbone, images: Tensor, context: Callable) -> Backbone:
    """`network` (in eval mode) with fused convolutions, checked on images (B, 3, H, W) within `context()`; the network
    itself where it cannot be traced, or its device has no such operations, or they give something else."""
    preacts = (False, True) if network.shows_preactivations else (False,)
    errors = (fx.proxy.TraceError, NameError, RuntimeError, TypeError, ValueError, AttributeError)
    with torch.no_grad(), context():
        try:
            fused = Fused(network, {preact: _fused_graph(network, preact, images) for preact in preacts})
            found = [fused.outputs(images, preact) for preact in preacts]
        except errors:  # the tracer's, or the device library's
            return network
        expected = [network.outputs(images, preact) for preact in preacts]
    return fused.eval() if all(map(_agree, expected, found)) else network


def _agree(expected: Output, found: Output) -> bool:
    return all(
        one.shape == other.shape
        and bool((one.float() - other.float()).abs().max() <= CLOSENESS[one.dtype] * one.float().abs().max())
        for one, other in zip(expected.tensors(), found.tensors(), strict=True)
    )


def _fused_graph(network: Backbone, preact: bool, images: Tensor) -> fx.GraphModule:
    root = _Outputs(network, preact).eval()
    traced = fx.GraphModule(root, _Tracer(images.shape[1:]).trace(root))
    for node in list(traced.graph.nodes):  # two names of one map would hide that it is still read
        if node.op == "call_module" and type(traced.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    for node in list(traced.graph.nodes):
        place = _find_place(traced, node)
        if place is not None and (place.relu or images.device.type != "cuda"):
            _fuse(traced, place)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _find_place(traced: fx.GraphModule, node: fx.Node) -> _Place | None:
    """What can become one operation and ends at `node`: a ReLU, or a sum that is not only read by a ReLU."""
    relu = _is_relu(traced, node)
    inner = node.args[0] if relu else node
    if not isinstance(inner, fx.Node) or (relu and len(inner.users) > 1):
        return None
    if relu and _is_convolution(traced, inner):
        return _Place(inner, node, relu)
    if not _is_sum(inner) or (not relu and [_is_relu(traced, user) for user in inner.users] == [True]):
        return None
    for convolution, other in (inner.args, inner.args[::-1]):
        if not _is_convolution(traced, convolution) or len(convolution.users) > 1 or not isinstance(other, fx.Node):
            continue
        if other < convolution:  # it is there when the convolution is computed
            return _Place(convolution, node, relu, inner, other)
    return None


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(node.target)) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _is_sum(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _SUMS and len(node.args) == 2 and not node.kwargs


def _is_convolution(traced: fx.GraphModule, node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    layer = traced.get_submodule(node.target)
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _fuse(traced: fx.GraphModule, place: _Place) -> None:
    convolution, end, other = place.convolution, place.end, place.other
    overwrites = other is not None and _can_overwrite(traced, other, place)
    name = f"fused_{end.name}"
    traced.add_submodule(name, FusedConvolution(traced.get_submodule(convolution.target), place.relu, overwrites))
    # Where the convolution was, so that it reads nothing later than before, when something may have been overwritten.
    with traced.graph.inserting_before(convolution):
        inputs = convolution.args if other is None else (*convolution.args, other)
        fused = traced.graph.call_module(name, inputs)
    end.replace_all_uses_with(fused)
    for node in dict.fromkeys((end, place.total, convolution)):
        if node is not None:
            traced.graph.erase_node(node)


def _can_overwrite(traced: fx.GraphModule, other: fx.Node, place: _Place) -> bool:
    """Whether `other` is memory of its own that nothing reads any more: only convolutions did, before this one."""

    def computes(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Conv2d)

    readers = [user for user in other.users if user is not place.total]
    return computes(other) and all(computes(user) and user < place.convolution for user in readers)
